package pgembed

import (
	"context"
	"errors"
)

// ErrExternal is what methods return that would need to own a server which
// TENANCY_TEST_URL names.
var ErrExternal = errors.New("the server of TENANCY_TEST_URL is not ours to inspect or stop")

// ErrStopped is what methods return after [Server.Stop].
var ErrStopped = errors.New("the PostgreSQL server was stopped and its folder removed")

// Server is a running PostgreSQL. It is safe for concurrent use; the zero value is
// not usable; who called [Start] calls [Server.Stop].
type Server struct {
	url     string
	version version
	cluster *cluster // nil when the server is external
}

// version is a PostgreSQL version as the server writes it ("15.18", "19beta1").
type version struct {
	text  string
	major int
	minor int
}

// URL is a connection string for the superuser and the database postgres.
// It holds a password. An external server's is TENANCY_TEST_URL, unchanged.
func (s *Server) URL() string { return s.url }

// External tells whether this is the server of TENANCY_TEST_URL, which [Server.Stop]
// leaves alone and on which others may work too: take random names there.
func (s *Server) External() bool { return s.cluster == nil }

// Version is the server's version, such as "15.18".
func (s *Server) Version() string { return s.version.text }

// Major is the first number of [Server.Version].
func (s *Server) Major() int { return s.version.major }

// PID is the process id of the postmaster; 0 when the server is external or down.
func (s *Server) PID() int {
	if s.cluster == nil {
		return 0
	}
	return s.cluster.pid()
}

// Log returns all that the server has logged, through every restart.
// The error is [ErrExternal], [ErrStopped] or that of reading a file.
func (s *Server) Log() (string, error) {
	if s.cluster == nil {
		return "", ErrExternal
	}
	return s.cluster.readLog()
}

// Kill ends the server as a crash would and keeps its data, until [Server.Restart]
// or [Server.Stop]. Killing twice is safe. The error is [ErrExternal] or [ErrStopped],
// or says that the server would not die.
func (s *Server) Kill() error {
	if s.cluster == nil {
		return ErrExternal
	}
	return s.cluster.kill()
}

// Restart stops the server and starts it with the same data on the same port.
// immediate skips the orderly shutdown: connections break without a word, the next
// start recovers, and as after any crash the commits of the last moment may be gone
// (set synchronous_commit=on where that matters).
//
// Cancelling ctx ends the wait for the new server and leaves it down; Restart may be
// called again. The error is [ErrExternal] or [ErrStopped], ctx.Err(), or holds the
// end of the server's log.
func (s *Server) Restart(ctx context.Context, immediate bool) error {
	if s.cluster == nil {
		return ErrExternal
	}
	return s.cluster.restart(ctx, immediate)
}

// Stop disconnects all clients, ends the server and removes its folder; after 10 s
// without success it stops being polite. An external server is left alone.
// Stopping twice is safe.
func (s *Server) Stop() error {
	if s.cluster == nil {
		return nil
	}
	return s.cluster.stop()
}
