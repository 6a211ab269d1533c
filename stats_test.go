package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// logged keeps what is logged. Safe for concurrent use.
type logged struct {
	mu   sync.Mutex // guards text
	text strings.Builder
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// lines returns those that say what.
func (l *logged) lines(what string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, what) {
			found = append(found, line)
		}
	}
	return found
}

// serverStats returns the figures of the server that the tenant lives on, and the tenant's.
func serverStats(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID) (tenancy.ServerStats, tenancy.TenantStats) {
	t.Helper()
	for tenant, ts := range tn.Stats() {
		if tenant != id {
			continue
		}
		for s := range tn.Servers() {
			if s.Address == ts.Server {
				return s, ts
			}
		}
		t.Fatalf("the tenant is at %q, of which no server is known", ts.Server)
	}
	t.Fatalf("tenant %d has no pool", id)
	return tenancy.ServerStats{}, tenancy.TenantStats{}
}

// TestFiguresOfAServerCountCallsWithoutAConnection has the one connection of a tenant, or of a pool that tenants share, in use, and calls come.
func TestFiguresOfAServerCountCallsWithoutAConnection(t *testing.T) {
	t.Parallel()
	var log logged
	_, tn, acme, globex := twoTenants(t, tenancy.Config{Logger: log.logger(),
		Limits: tenancy.Limits{TenantConns: 1, TenantWaiters: 1, DenseConns: 1, AcquireTimeout: 300 * time.Millisecond}})
	busy := 0 // calls that were told so
	for _, dense := range []bool{false, true} {
		name := map[bool]string{false: "a pool of its own", true: "a shared pool"}[dense]
		if err := tn.Catalog().SetDense(t.Context(), acme.ID, dense); err != nil {
			t.Fatal(err)
		}
		ctx, other := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		exec := func(ctx context.Context) error {
			_, err := tn.DB().Exec(ctx, "select 1")
			return err
		}
		if err := errors.Join(exec(other), exec(ctx)); err != nil { // one has to be opened for it
			t.Fatal(err)
		}
		before, its := serverStats(t, tn, acme.ID)
		if its.Dense != dense || before.Connects < 1 || before.Waits < 1 || before.WaitTime <= 0 {
			t.Errorf("%s: at first %+v, %+v", name, its, before)
		}
		held, err := tn.DB().Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}

		// Three calls whose ctx ends, one of them before it could wait.
		hurried, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		wantError(t, exec(hurried), context.DeadlineExceeded, "context deadline exceeded while the call waited in line for a connection", `"acme"`)
		wantError(t, exec(hurried), context.DeadlineExceeded)
		cancel()
		left, leave := context.WithCancel(ctx)
		gone := make(chan error, 1)
		go func() { gone <- exec(left) }()
		untilTrue(t, "it waits", func() bool { _, ts := serverStats(t, tn, acme.ID); return ts.Waiting == 1 })
		wantError(t, exec(ctx), tenancy.ErrBusy, "calls wait") // TenantWaiters
		leave()
		wantError(t, <-gone, context.Canceled, "while the call waited in line")
		wantError(t, exec(ctx), tenancy.ErrBusy, "within 300ms")
		busy += 2
		if err := held.Rollback(ctx); err != nil {
			t.Error(err)
		}

		after, its := serverStats(t, tn, acme.ID)
		if n := after.Canceled - before.Canceled; n != 2 || its.Canceled != 2 {
			t.Errorf("%s: %d calls left the line, and %d of the tenant's, want 2", name, n, its.Canceled)
		}
		if n := after.Refused - before.Refused; n != 2 || its.Refused != 2 {
			t.Errorf("%s: %d calls were refused, and %d of the tenant's, want 2", name, n, its.Refused)
		}
		if n := after.Waits - before.Waits; n != 3 {
			t.Errorf("%s: %d calls waited, want 3", name, n)
		}
		if d := after.WaitTime - before.WaitTime; d < 320*time.Millisecond {
			t.Errorf("%s: they waited for %v, want 20ms and 300ms at least", name, d)
		}
		if after.Connects != before.Connects || after.ConnectFailures != 0 || after.TooManyConns != 0 || after.Starved != 0 {
			t.Errorf("%s: none was opened: %+v", name, after)
		}
		if _, theirs := serverStats(t, tn, globex.ID); theirs.Canceled != 0 || theirs.Refused != 0 {
			t.Errorf("%s: the other tenant: %+v", name, theirs)
		}
		if lines := log.lines("calls are refused, because no connection is free"); len(lines) != 1 || !strings.Contains(lines[0], "level=WARN") ||
			!strings.Contains(lines[0], "name=acme") || !strings.Contains(lines[0], after.Address) || !strings.Contains(lines[0], "times=1 ") {
			t.Errorf("%s: %d calls were refused within a minute, and the log says %q", name, busy, lines)
		}
	}

	// The other tenant has the one connection of the shared pool: a wait in its line is counted once.
	if err := tn.Catalog().SetDense(t.Context(), globex.ID, true); err != nil {
		t.Fatal(err)
	}
	other := tenancytest.Context(t, tn, "globex")
	held, err := tn.DB().Begin(other)
	if err != nil {
		t.Fatal(err)
	}
	first, _ := serverStats(t, tn, acme.ID)
	hurried, cancel := context.WithTimeout(tenancytest.Context(t, tn, "acme"), 20*time.Millisecond)
	defer cancel()
	_, err = tn.DB().Exec(hurried, "select 1")
	wantError(t, err, context.DeadlineExceeded, "while the call waited in line", `"acme"`)
	if s, _ := serverStats(t, tn, acme.ID); s.Waits != first.Waits+1 || s.Canceled != first.Canceled+1 {
		t.Errorf("one call waited for another tenant's: %+v, before %+v", s, first)
	}
	if err := held.Rollback(other); err != nil {
		t.Error(err)
	}

	// The pool goes, and with it the tenant's figures. The server's stay.
	before, _ := serverStats(t, tn, acme.ID)
	if err := tn.Catalog().SetDense(t.Context(), acme.ID, false); err != nil {
		t.Fatal(err)
	}
	if _, err := tn.DB().Exec(tenancytest.Context(t, tn, "acme"), "select 1"); err != nil {
		t.Fatal(err)
	}
	after, its := serverStats(t, tn, acme.ID)
	if its.Refused != 0 || its.Canceled != 0 || after.Refused != before.Refused || after.Canceled != before.Canceled || after.Waits < before.Waits || after.WaitTime < before.WaitTime {
		t.Errorf("another pool: %+v\nbefore %+v\nafter  %+v", its, before, after)
	}
}

// TestFiguresOfAServerTellThatItsBudgetIsUsedUp: what operations.md says to alert on is so then, and not before.
func TestFiguresOfAServerTellThatItsBudgetIsUsedUp(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 22, TenantConns: 10, TenantFloor: 10}})
	ctx, other := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
	hold := func(ctx context.Context) {
		t.Helper()
		tx, err := tn.DB().Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tx.Rollback(ctx) })
	}
	hold(ctx)
	s, _ := serverStats(t, tn, acme.ID)
	if s.Shared != 22-13-2 || s.Tenants != s.Shared-3 {
		t.Fatalf("%+v", s)
	}
	for s.Used < s.Tenants {
		if s.Hungry != 0 || s.Starved != 0 {
			t.Fatalf("there is room: %+v", s)
		}
		hold(ctx)
		s, _ = serverStats(t, tn, acme.ID)
	}
	waits, cancel := context.WithCancel(other)
	done := make(chan error, 1)
	go func() { _, err := tn.DB().Exec(waits, "select 1"); done <- err }()
	untilTrue(t, "the other tenant waits", func() bool { s, _ := serverStats(t, tn, acme.ID); return s.Hungry == 1 })
	cancel()
	wantError(t, <-done, context.Canceled, "in line")
	s, _ = serverStats(t, tn, acme.ID)
	if _, its := serverStats(t, tn, globex.ID); s.Starved != 1 || its.Starved != 1 || s.Used != s.Tenants || s.Canceled != 1 {
		t.Errorf("%+v\n%+v", s, its)
	}
}

// TestOperationsCountsConnectionsAsNodesDo opens the nodes of the worked example, and of the defaults.
func TestOperationsCountsConnectionsAsNodesDo(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	server, err := url.Parse(f.ServerURL)
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	// figures are those of a node's budget of the tenants' server.
	figures := func(cfg tenancy.Config) (s tenancy.ServerStats) {
		t.Helper()
		cfg.Keys = f.Keys
		if cfg.PrimaryURL == "" {
			cfg.PrimaryURL = f.PrimaryURL
		}
		tn, err := tenancy.Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer tn.Close()
		for s := range tn.Servers() {
			if s.Address == server.Host {
				return s
			}
		}
		t.Fatalf("nothing is known of %s", server.Host)
		return s
	}
	text, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	limits := func(nodes int, primaryConns int32) tenancy.Limits {
		return tenancy.Limits{ServerConns: 200 - 3 - 16 - 5, Nodes: nodes, PrimaryConns: primaryConns}
	}
	elsewhere := newStrait(t, f.PrimaryURL).url // another address, and so another server
	host := f.PrimaryURL + map[bool]string{true: "&", false: "?"}[strings.Contains(f.PrimaryURL, "?")] + "pool_max_conns=4"
	for row, cfg := range map[string]tenancy.Config{
		"The primary is elsewhere":                                        {PrimaryURL: elsewhere, Limits: limits(4, 0)},
		"The primary is on this server":                                   {Limits: limits(4, 0)},
		"The same, `PrimaryConns` 3":                                      {Limits: limits(4, 3)},
		"The same as the second, and a `HostURL` with `pool_max_conns=4`": {HostURL: host, Limits: limits(4, 0)},
		"The same as the second, `Nodes` 5 for deployments":               {Limits: limits(5, 0)},
	} {
		s := figures(cfg)
		want := fmt.Sprintf("| %s | %d | %d | %d", row, s.Own, s.Tenants, cfg.Limits.Nodes*s.Tenants)
		if !strings.Contains(string(text), "\n"+want) {
			t.Errorf("docs/operations.md does not say %q: %+v", want, s)
		}
	}

	// What the comments of Limits and models.md say of the defaults.
	for nodes, want := range map[int]int{1: 62, 3: 8} {
		if s := figures(tenancy.Config{Limits: tenancy.Limits{Nodes: nodes}}); s.Tenants != want {
			t.Errorf("the defaults with %d nodes leave tenants %d, want %d", nodes, s.Tenants, want)
		}
	}
	if s := figures(tenancy.Config{PrimaryURL: elsewhere}); s.Tenants != 75 {
		t.Errorf("the defaults with a primary elsewhere leave tenants %d, want 75", s.Tenants)
	}
	_, err = tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Limits: tenancy.Limits{Nodes: 4}})
	wantError(t, err, tenancy.ErrInvalid, "own pools need 13")
}
