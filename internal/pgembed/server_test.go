//go:build linux || darwin

package pgembed_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

func TestStartConnectStopLeavesNothing(t *testing.T) {
	t.Parallel()
	s, err := pgembed.Start(t.Context(), pgembed.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	conn := connect(t, s.URL())
	if got := ask(t, conn, "SELECT split_part(current_setting('server_version'), ' ', 1)"); got != s.Version() {
		t.Errorf("Version is %q, the server says %q", s.Version(), got)
	}
	if want := fmt.Sprint(s.Major()); !strings.HasPrefix(s.Version(), want) {
		t.Errorf("Major is %s, Version %s", want, s.Version())
	}
	if got := ask(t, conn, "SELECT current_user || ' ' || current_database() || ' ' || rolsuper FROM pg_roles WHERE rolname = current_user"); got != "postgres postgres true" {
		t.Errorf("the URL leads to %q", got)
	}
	if s.External() || s.PID() == 0 {
		t.Errorf("External %v, PID %d", s.External(), s.PID())
	}
	pid, folder := s.PID(), s.Folder()
	if err := s.Stop(); err != nil { // with a client still connected
		t.Fatal(err)
	}
	if _, err := os.Stat(folder); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
	if !dead(pid) || !dead(s.WatchdogPID()) {
		t.Error("a process is left")
	}
	if err := s.Stop(); err != nil {
		t.Errorf("stopping twice: %v", err)
	}
	_, logErr := s.Log()
	for what, err := range map[string]error{"Log": logErr, "Kill": s.Kill(), "Restart": s.Restart(t.Context(), false)} {
		if !errors.Is(err, pgembed.ErrStopped) {
			t.Errorf("%s after Stop: %v", what, err)
		}
	}
	if s.PID() != 0 {
		t.Errorf("PID after Stop is %d", s.PID())
	}
}

func TestServerAllowsWhatTestsNeed(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{Settings: map[string]string{"work_mem": "7MB", "app.quoted": `it's a \ "test"`}})
	conn := connect(t, s.URL())
	for sql, want := range map[string]string{
		"SHOW fsync":                     "off",
		"SHOW max_connections":           "300",
		"SHOW max_locks_per_transaction": "256",
		"SHOW password_encryption":       "scram-sha-256",
		"SHOW listen_addresses":          "127.0.0.1",
		"SHOW work_mem":                  "7MB",
		"SHOW app.quoted":                `it's a \ "test"`,
		"SHOW server_encoding":           "UTF8",
	} {
		if got := ask(t, conn, sql); got != want {
			t.Errorf("%s is %q, want %q", sql, got, want)
		}
	}
	exec1(t, conn, "CREATE ROLE tenant_a LOGIN PASSWORD 'right'")
	exec1(t, conn, "CREATE DATABASE app OWNER tenant_a")
	exec1(t, conn, "LISTEN changed")
	exec1(t, conn, "NOTIFY changed, 'tenant a'")
	n, err := conn.WaitForNotification(t.Context())
	if err != nil || n.Payload != "tenant a" {
		t.Errorf("notification %v, %v", n, err)
	}
}

func TestEveryoneNeedsTheRightPassword(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{Settings: map[string]string{"log_statement": "all", "log_connections": "on"}})
	conn := connect(t, s.URL())
	exec1(t, conn, "CREATE ROLE tenant_a LOGIN PASSWORD 'right'")
	port := conn.Config().Port
	for _, host := range []string{"127.0.0.1", s.Folder() + "/s"} {
		for _, user := range []string{"postgres", "tenant_a"} {
			_, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=%d user=%s password=wrong dbname=postgres sslmode=disable", host, port, user))
			var pgErr *pgconn.PgError
			if !errors.As(err, &pgErr) || pgErr.Code != "28P01" {
				t.Errorf("%s over %s with a wrong password: %v", user, host, err)
			}
		}
	}
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	log, err := s.Log()
	if err != nil {
		t.Fatal(err)
	}
	if len(password) < 20 || strings.Contains(log, password) {
		t.Error("the log holds the superuser's password, or there is none")
	}
	if !strings.Contains(log, "ALTER ROLE") || !strings.Contains(log, "tenant_a@postgres") {
		t.Errorf("Log does not return the whole log:\n%s", log)
	}
	if info, err := os.Stat(s.Folder()); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: %v, %v", info.Mode(), err)
	}
}

func TestServersStartInParallel(t *testing.T) {
	t.Parallel()
	const n = 4
	servers := make([]*pgembed.Server, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { servers[i], errs[i] = pgembed.Start(t.Context(), pgembed.Options{}) })
	}
	wg.Wait()
	seen := map[string]bool{}
	for i, s := range servers {
		if errs[i] != nil {
			t.Error(errs[i])
			continue
		}
		defer s.Stop()
		exec1(t, connect(t, s.URL()), "CREATE TABLE mine ()") // fails where another server's is
		seen[s.Folder()], seen[s.URL()] = true, true
	}
	if len(seen) != 2*n && !t.Failed() {
		t.Errorf("servers share a folder or a URL: %v", seen)
	}
}

func TestRestartKeepsDataAndPort(t *testing.T) {
	t.Parallel()
	for name, immediate := range map[string]bool{"orderly": false, "immediate": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, pgembed.Options{Settings: map[string]string{"synchronous_commit": "on"}})
			before, url := s.PID(), s.URL()
			exec1(t, connect(t, s.URL()), "CREATE TABLE kept AS SELECT 'still here' AS word")
			if err := s.Restart(t.Context(), immediate); err != nil {
				t.Fatal(err)
			}
			if s.PID() == before || s.URL() != url {
				t.Errorf("PID %d then %d, URL changed: %v", before, s.PID(), s.URL() != url)
			}
			if got := ask(t, connect(t, s.URL()), "SELECT word FROM kept"); got != "still here" {
				t.Errorf("read %q", got)
			}
			log, err := s.Log()
			if err != nil || strings.Count(log, "ready to accept connections") != 2 {
				t.Errorf("the log spans not both runs (%v):\n%s", err, log)
			}
			if recovered := strings.Contains(log, "not properly shut down"); recovered != immediate {
				t.Errorf("recovery after the restart: %v", recovered)
			}
		})
	}
}

func TestKilledServerStaysDownUntilRestart(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{})
	pid := s.PID()
	for range 2 {
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if !dead(pid) || s.PID() != 0 {
		t.Errorf("the server is up: PID %d", s.PID())
	}
	if conn, err := pgx.Connect(t.Context(), s.URL()); err == nil {
		conn.Close(t.Context())
		t.Error("a killed server answers")
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Restart(cancelled, false); !errors.Is(err, context.Canceled) || s.PID() != 0 {
		t.Errorf("Restart with a cancelled context: %v, PID %d", err, s.PID())
	}
	if err := s.Restart(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	connect(t, s.URL())
}

func TestServerThatDiedByItselfCanBeRestartedAndStopped(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{})
	if err := syscall.Kill(s.PID(), syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	if err := s.Restart(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	pid := s.PID()
	if err := syscall.Kill(pid, syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	assertGone(t, pid, s.Folder())
}

func TestStopWakesAStoppedServer(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{})
	if err := syscall.Kill(s.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
}

func TestRestartWaitsForItsPort(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{})
	addr := fmt.Sprintf("127.0.0.1:%d", connect(t, s.URL()).Config().Port)
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	thief, err := net.Listen("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	done := make(chan error, 1)
	go func() { done <- s.Restart(t.Context(), false) }()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if log, err := s.Log(); err == nil && strings.Contains(log, "could not bind IPv4 address") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the server did not meet the other listener")
		}
	}
	thief.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	connect(t, s.URL())
}

func TestRestartWorksAfterTheSuperuserGotAnotherPassword(t *testing.T) {
	t.Parallel()
	s := start(t, pgembed.Options{})
	exec1(t, connect(t, s.URL()), "ALTER ROLE postgres PASSWORD 'another'")
	if err := s.Restart(t.Context(), false); err != nil {
		t.Error(err)
	}
}

func TestFailedStartShowsTheLogAndLeavesNothing(t *testing.T) {
	t.Parallel()
	_, err := pgembed.Start(t.Context(), pgembed.Options{Settings: map[string]string{"shared_preload_libraries": "no_such_library"}})
	if err == nil || !strings.Contains(err.Error(), "ended while starting") || !strings.Contains(err.Error(), `could not access file "no_such_library"`) {
		t.Fatalf("error is %v", err)
	}
	if pgembed.PortTaken(err) {
		t.Error("taken for a lost port")
	}
}

func TestCancelledStartReturnsTheContextsError(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := pgembed.Start(ctx, pgembed.Options{}); !errors.Is(err, context.Canceled) {
		s.Stop()
		t.Errorf("error is %v", err)
	}
}

func TestServerRunsUnderAnotherAccountThanRoot(t *testing.T) {
	t.Parallel()
	asRoot(t)
	s := start(t, pgembed.Options{})
	for what, path := range map[string]string{
		"folder":         s.Folder(),
		"data directory": s.Folder() + "/data",
	} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Sys().(*syscall.Stat_t).Uid == 0 {
			t.Errorf("the %s is root's", what)
		}
	}
	for what, pid := range map[string]int{"server": s.PID(), "watchdog": s.WatchdogPID()} {
		if uid := uidOf(t, pid); uid == "0" || uid == "" {
			t.Errorf("the %s runs as %q", what, uid)
		}
	}
}
