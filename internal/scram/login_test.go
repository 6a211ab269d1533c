package scram_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/internal/scram"
)

func TestVerifiersLogInAndTheServerKeepsThem(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	for name, verifier := range map[string]func(password string) (string, error){
		"random": scram.RandomVerifier,
		"chosen": func(password string) (string, error) { return scram.Verifier(password, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			p := password(t)
			v, err := verifier(p)
			if err != nil {
				t.Fatal(err)
			}
			cc := s.login(t, p, v)
			conn, err := pgx.ConnectConfig(t.Context(), cc)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(context.WithoutCancel(t.Context()))
			var user, kept string
			if err := conn.QueryRow(t.Context(), "SELECT session_user").Scan(&user); err != nil || user != cc.User {
				t.Errorf("logged in as %q, %v", user, err)
			}
			if err := s.admin.QueryRow(t.Context(), "SELECT rolpassword FROM pg_authid WHERE rolname = $1", cc.User).Scan(&kept); err != nil || kept != v {
				t.Errorf("the server keeps %q, %v, want %q", kept, err, v)
			}

			other := cc.Copy()
			other.Password = password(t)
			_, err = pgx.ConnectConfig(t.Context(), other)
			if refused, ok := errors.AsType[*pgconn.PgError](err); !ok || refused.Code != "28P01" {
				t.Errorf("another password: %v, want a refusal", err)
			}
		})
	}
}

// server is a PostgreSQL of the test's own.
type server struct {
	config *pgx.ConnConfig
	admin  *pgx.Conn
}

func startServer(tb testing.TB) *server {
	tb.Helper()
	s, err := pgembed.Start(tb.Context(), pgembed.Options{Download: true})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Stop(); err != nil {
			tb.Error(err)
		}
	})
	cc, err := pgx.ParseConfig(s.URL())
	if err != nil {
		tb.Fatal(err)
	}
	admin, err := pgx.ConnectConfig(tb.Context(), cc)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { admin.Close(context.Background()) })
	return &server{config: cc, admin: admin}
}

// login makes a role with the verifier and returns how to connect as it with the password.
func (s *server) login(tb testing.TB, password, verifier string) *pgx.ConnConfig {
	tb.Helper()
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	cc := s.config.Copy()
	cc.User, cc.Password = "scram_"+hex.EncodeToString(b[:]), password
	cc.RequireAuth = "scram-sha-256"
	if _, err := s.admin.Exec(tb.Context(), fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", cc.User, verifier)); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if _, err := s.admin.Exec(context.Background(), "DROP ROLE "+cc.User); err != nil {
			tb.Error(err)
		}
	})
	return cc
}
