//go:build !linux && !darwin

package pgembed

import (
	"context"
	"fmt"
	"runtime"
)

// startCluster refuses. Windows would need a job object for the watchdog and a
// restricted token for the dropped privileges.
func startCluster(context.Context, Options) (*Server, error) {
	return nil, fmt.Errorf("a throw-away PostgreSQL runs on Linux and macOS, not on %s: set TENANCY_TEST_URL to a server on which the tests may create databases and roles", runtime.GOOS)
}

// cluster never exists here: every [Server] is external.
type cluster struct{}

func (*cluster) pid() int                            { return 0 }
func (*cluster) readLog() (string, error)            { return "", ErrExternal }
func (*cluster) kill() error                         { return ErrExternal }
func (*cluster) restart(context.Context, bool) error { return ErrExternal }
func (*cluster) stop() error                         { return ErrExternal }

// Bouncer never exists here.
type Bouncer struct{}

// StartBouncer refuses.
func StartBouncer(context.Context, string, string) (*Bouncer, error) {
	return nil, fmt.Errorf("PgBouncer is run on Linux and macOS, not on %s", runtime.GOOS)
}

// Port is 0.
func (*Bouncer) Port() int { return 0 }

// Log returns [ErrExternal].
func (*Bouncer) Log() (string, error) { return "", ErrExternal }

// Stop does nothing.
func (*Bouncer) Stop() error { return nil }
