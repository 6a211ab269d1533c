//go:build unix

package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestTheBudgetIsKeptAndNobodyIsRefused(t *testing.T) {
	var out strings.Builder
	end, err := run(t.Context(), &out, false, options{tenants: 30, conns: 20, clients: 12, time: 2500 * time.Millisecond})
	if err != nil || end.errors > 0 {
		t.Fatalf("%d errors, %v\n%s", end.errors, err, &out)
	}
	if end.most > 20 || end.most == 0 {
		t.Errorf("PostgreSQL counted %d connections, the budget is 20", end.most)
	}
	if end.evicted == 0 || end.calls < 30 {
		t.Errorf("it shows nothing: %s", end)
	}
	if lines := strings.Count(out.String(), "\n"); lines < 3 || lines > 6 || strings.Contains(out.String(), "\x1b") {
		t.Errorf("it printed\n%s", &out)
	}
}

// TestTheViewEndsWithItsContext as it does at Ctrl-C.
func TestTheViewEndsWithItsContext(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	out := &untilShown{text: "waiting most", then: stop}
	end, err := run(ctx, out, true, options{tenants: 12, conns: 20, clients: 4})
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"making tenants [", "\x1b[?25l", "\x1b[?1049h", "12 tenants on 20 connections, 4 clients", "of 7, ", "3 more are for verbs", "0 errors", "asked most", "tenant-0001", "\x1b[?25h", "\x1b[?1049l", end.String()} {
		if !strings.Contains(out.all.String(), part) {
			t.Errorf("%q is not in what it drew:\n%q", part, out.all.String())
		}
	}
}

func TestAProgramThatIsEndedEarlyLeavesNothing(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	f, err := openFleet(ctx, 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.provision(ctx, 1000, func(done int) { stop() }); err == nil {
		t.Error("the tenants are made after all")
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
	if pid := f.server.PID(); pid != 0 {
		t.Errorf("its PostgreSQL still runs as process %d", pid)
	}
	if _, err := f.server.Log(); err == nil {
		t.Error("its folder is still there")
	}
}

// untilShown calls then when it has been told of text.
type untilShown struct {
	all  strings.Builder
	text string
	then func()
}

func (u *untilShown) Write(p []byte) (int, error) {
	n, err := u.all.Write(p)
	if strings.Contains(string(p), u.text) {
		u.then()
	}
	return n, err
}
