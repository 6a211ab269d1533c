// Package tenancytest gives a service's own tests a real PostgreSQL with tenants on it.
//
//	func TestMain(m *testing.M) { tenancytest.Main(m) }
//
//	func TestNotes(t *testing.T) {
//		tn := tenancytest.Open(t, tenancy.Config{Migrations: migrations})
//		tenancytest.Create(t, tn, "acme")
//		ctx := tenancytest.Context(t, tn, "acme")
//		...
//	}
//
// The server is started from the PostgreSQL binaries of the machine, one for each test package, and
// is gone when the test process is, however that ends. TENANCY_TEST_URL names a running server
// to use instead, on which the tests may create databases and roles; TENANCY_PG_DOWNLOAD=on allows fetching
// binaries where there are none. A running server is never used uninvited.
//
// TENANCY_TEST_ISOLATION=database runs the tests with a database for each tenant, where their Config.Isolation says nothing, and
// TENANCY_TEST_ISOLATION=shared with all tenants in one schema. TENANCY_TEST_DENSE=true has the tenants share a pool. TENANCY_TEST_POOLER=1 sends the tenants' calls
// through a PgBouncer in transaction mode, which is started from the machine's.
package tenancytest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

// server is the test process's one PostgreSQL, started at first use.
var server struct {
	sync.Mutex
	*pgembed.Server
	pooler *pgembed.Bouncer // nil: nobody has asked for one
}

// Main runs the tests and stops the server, if they started one, and exits. m is the *testing.M, or what wraps it.
func Main(m interface{ Run() int }) {
	code := m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func stop() error {
	server.Lock()
	defer server.Unlock()
	if server.Server == nil {
		return nil
	}
	var err error
	if server.pooler != nil {
		err = server.pooler.Stop()
	}
	return errors.Join(err, server.Stop())
}

// start returns the server. A failed start is tried again by the next test.
func start(tb testing.TB) *pgembed.Server {
	tb.Helper()
	server.Lock()
	defer server.Unlock()
	if server.Server == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		s, err := pgembed.Start(ctx, pgembed.Options{})
		if err != nil {
			tb.Fatal(err)
		}
		server.Server = s
	}
	return server.Server
}

// Open makes a fleet of its own (both databases and logins) for the test and opens it. Fields of cfg that
// say where it is (PrimaryURL, ListenURL, Keys) are filled in. It is closed and dropped when the test ends,
// and a test that leaves work in flight fails.
func Open(tb testing.TB, cfg tenancy.Config) *tenancy.Tenancy {
	tb.Helper()
	return NewFleet(tb).Open(tb, cfg)
}

// Create makes an active tenant.
func Create(tb testing.TB, tn *tenancy.Tenancy, name string) tenancy.Tenant {
	tb.Helper()
	t, err := tn.Catalog().Create(tb.Context(), tenancy.NewTenant{Name: name})
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

// Context returns a context of the named tenant, which must exist. It ends with the test.
func Context(tb testing.TB, tn *tenancy.Tenancy, name string) context.Context {
	tb.Helper()
	t, err := tn.Catalog().TenantByName(tb.Context(), name)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, err := tn.Enter(tb.Context(), t.ID)
	if err != nil {
		tb.Fatal(err)
	}
	return ctx
}

// NoCrossing runs fn, a piece of the service that reads or writes through tn, in ways that must fail or stay
// apart: without a tenant it must be refused with [tenancy.ErrNoTenant]; as the host likewise;
// and in two new tenants at once, many times over, it must succeed in both. What fn finds is fn's to check: it gets the
// tenant by [tenancy.TenantFrom] and returns an error when it sees another's data.
func NoCrossing(t *testing.T, tn *tenancy.Tenancy, fn func(ctx context.Context) error) {
	t.Helper()
	for name, ctx := range map[string]context.Context{"no_tenant": t.Context(), "host": tenancy.AsHost(t.Context())} {
		if err := fn(ctx); !errors.Is(err, tenancy.ErrNoTenant) {
			t.Errorf("%s: got %v, want tenancy.ErrNoTenant", name, err)
		}
	}
	var wg sync.WaitGroup
	for _, name := range []string{"nocrossing-" + random(4), "nocrossing-" + random(4)} {
		Create(t, tn, name)
		ctx := Context(t, tn, name)
		for range 4 {
			wg.Go(func() {
				for range 25 {
					if err := fn(ctx); err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
}
