package tenancy

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A server without a connection left is told of once a minute, whoever wanted one.
func TestAFullServerIsToldOfOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := newServers(Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}.withDefaults())
		full := &pgconn.PgError{SeverityUnlocalized: "FATAL", Severity: "FATAL", Code: "53300", Message: "sorry, too many clients already", Routine: "InitProcess"}
		config := func(host string) *pgx.ConnConfig {
			return &pgx.ConnConfig{Config: pgconn.Config{Host: host, Port: 5432}}
		}
		said := func(what ...string) {
			t.Helper()
			lines := strings.Split(strings.TrimSuffix(log.String(), "\n"), "\n")
			if log.Len() == 0 {
				lines = nil
			}
			if len(lines) != len(what) {
				t.Errorf("the log says %q, want %q", lines, what)
			}
			for i, line := range lines {
				if i < len(what) && (!strings.Contains(line, what[i]) || !strings.Contains(line, "level=WARN")) {
					t.Errorf("the log says %q, want %q", line, what[i])
				}
			}
			log.Reset()
		}

		verb, own, other := config("db"), config("db"), config("other")
		passed := 0
		own.OnPgError = func(*pgconn.PgConn, *pgconn.PgError) bool { passed++; return true }
		s.single(verb)
		s.ownPool(own)
		s.single(other)
		if verb.OnPgError(nil, full) { // as pgx does: the connection is closed
			t.Error("a connection goes on after FATAL")
		}
		said("a server has no connection left")
		if !own.OnPgError(nil, full) || passed != 1 {
			t.Error("the connection's own handler was not asked")
		}
		said()
		other.OnPgError(nil, full)
		said("server=other:5432")
		time.Sleep(seldomPeriod)
		verb.OnPgError(nil, full)
		said(`server=db:5432 times=2 error="FATAL: sorry, too many clients already (SQLSTATE 53300)"`)

		// A login's limit is not the server's.
		verb.OnPgError(nil, &pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "53300", Routine: "InitializeSessionUserId"})
		said("a login has no connection left")
		// And what a tenant's function raises is nobody's.
		verb.OnPgError(nil, &pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "53300", Routine: "exec_stmt_raise"})
		verb.OnPgError(nil, &pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "57P03"})
		time.Sleep(seldomPeriod)
		said()
		if n := s.of("db", 5432).stats().TooManyConns; n != 3 {
			t.Errorf("%d times counted, want 3", n)
		}
		if n := s.of("other", 5432).stats().TooManyConns; n != 1 {
			t.Errorf("%d times counted at the other server, want 1", n)
		}
	})
}

// What an outage is called tells where to look.
func TestAnOutageOfALoginIsCalledSo(t *testing.T) {
	for code, want := range map[string]string{
		"28P01": "a server refuses a tenant's login",
		"28000": "a server refuses a tenant's login",
		"57P03": "a tenant's database cannot be reached",
		"":      "a tenant's database cannot be reached",
	} {
		var log bytes.Buffer
		b := newBreaker(slog.New(slog.NewTextHandler(&log, nil)), Tenant{ID: 7, Name: "acme"})
		for range breakerFailures {
			_ = b.do(func() error {
				if code == "" {
					return errors.New("connection refused")
				}
				return &connectFailure{text: "no", cause: &pgconn.PgError{Code: code}}
			})
		}
		if text := log.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, want) || !strings.Contains(text, "name=acme") {
			t.Errorf("%q: the log says %q, want %q", code, text, want)
		}
	}
}
