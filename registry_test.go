package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// worker is a registry's value that knows whether it was closed.
type worker struct {
	tenant tenancy.Tenant
	closed atomic.Bool
}

func newWorkers(t *testing.T, tn *tenancy.Tenancy, replace tenancy.Replacement) (*tenancy.Registry[*worker], *atomic.Int32) {
	t.Helper()
	var live atomic.Int32
	r, err := tenancy.NewRegistry(tn, tenancy.RegistryConfig[*worker]{
		Build: func(ctx context.Context, tenant tenancy.Tenant) (*worker, error) {
			if err := tn.DB().QueryRow(ctx, `SELECT 1`).Scan(new(int)); err != nil {
				return nil, err // ctx is the tenant's
			}
			live.Add(1)
			return &worker{tenant: tenant}, nil
		},
		Close: func(ctx context.Context, w *worker) error {
			if w.closed.Swap(true) {
				t.Errorf("the value of tenant %d was closed twice", w.tenant.ID)
			}
			live.Add(-1)
			return nil
		},
		Replace: replace,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r, &live
}

func TestARegistryKeepsOneValuePerTenant(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{})
	r, live := newWorkers(t, tn, tenancy.CloseFirst)
	use := func(id tenancy.ID) (w *worker) {
		t.Helper()
		ctx, err := tn.Enter(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Use(ctx, func(got *worker) error {
			if got.tenant.ID != id || got.closed.Load() {
				t.Errorf("tenant %d got the value of %d, closed %v", id, got.tenant.ID, got.closed.Load())
			}
			w = got
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return w
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { use(acme.ID) })
		wg.Go(func() { use(globex.ID) })
	}
	wg.Wait()
	if n := live.Load(); n != 2 {
		t.Fatalf("%d values live, want one per tenant", n)
	}
	first := use(acme.ID)
	if err := r.Use(t.Context(), func(*worker) error { return nil }); !errors.Is(err, tenancy.ErrNoTenant) {
		t.Errorf("without a tenant: %v", err)
	}

	// A new generation ends the old value, and the tenant's end ends the new one.
	place, err := tn.Catalog().Prepare(t.Context(), acme.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, place); err != nil {
		t.Fatal(err)
	}
	if second := use(acme.ID); second == first || !first.closed.Load() {
		t.Error("the value of the old generation is still in use")
	}
	second := use(acme.ID)
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	until(t, 2*time.Second, "true", func() string { return fmt.Sprint(second.closed.Load()) })

	// The registry ends with the Tenancy, in time for its values to use the pools.
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	if n := live.Load(); n != 0 {
		t.Errorf("%d values were left open by Close", n)
	}
	if _, err := tenancy.NewRegistry(tn, tenancy.RegistryConfig[int]{Build: func(context.Context, tenancy.Tenant) (int, error) { return 0, nil }}); !errors.Is(err, tenancy.ErrClosed) {
		t.Errorf("a registry after Close: %v", err)
	}
}

func TestACachesEntriesBelongToOneTenant(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, err := tenancy.NewCache[string, string](tn, tenancy.CacheConfig{Size: 100})
	if err != nil {
		t.Fatal(err)
	}
	var loads atomic.Int32
	get := func(id tenancy.ID) string {
		t.Helper()
		ctx, err := tn.Enter(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		v, err := c.Get(ctx, "key", func(ctx context.Context, key string) (v string, err error) {
			loads.Add(1)
			err = tn.DB().QueryRow(ctx, `SELECT current_schema() || '/' || $1`, key).Scan(&v)
			return v, err
		})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	a, b := get(acme.ID), get(globex.ID)
	if a == b || get(acme.ID) != a || get(globex.ID) != b || loads.Load() != 2 {
		t.Errorf("%q and %q after %d loads", a, b, loads.Load())
	}
	place, err := tn.Catalog().Prepare(t.Context(), acme.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, place); err != nil {
		t.Fatal(err)
	}
	if moved := get(acme.ID); moved == a {
		t.Error("a moved tenant is answered from its old place")
	}
	boom := errors.New("boom")
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, "other", func(context.Context, string) (string, error) { return "", boom }); !errors.Is(err, boom) {
		t.Errorf("a failed load: %v", err)
	}
	if v, err := c.Get(ctx, "other", func(context.Context, string) (string, error) { return "ok", nil }); v != "ok" || err != nil {
		t.Errorf("an error was remembered: %q, %v", v, err)
	}
}

func TestCloseDrainsAndThenCuts(t *testing.T) {
	t.Parallel()
	f, _, acme, _ := twoTenants(t, tenancy.Config{})
	tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys})
	if err != nil {
		t.Fatal(err)
	}
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	other := f.Open(t, tenancy.Config{})
	short, err := other.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}

	// Work that ends within the time is waited for.
	done := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		done <- other.DB().WithConn(short, func(ctx context.Context, conn *pgx.Conn) error {
			close(started)
			_, err := conn.Exec(ctx, `SELECT pg_sleep(0.3)`)
			return err
		})
	}()
	<-started
	if err := other.Close(); err != nil {
		t.Errorf("a drain that was long enough: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("work within the drain time: %v", err)
	}
	if _, err := other.DB().Exec(short, `SELECT 1`); !errors.Is(err, tenancy.ErrClosed) {
		t.Errorf("work after Close: %v, want ErrClosed", err)
	}

	// Work that does not is cut, and named.
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	late, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	first := tn.Shutdown(late)
	if first == nil || time.Since(began) > 5*time.Second {
		t.Errorf("a shutdown over an open transaction: %v after %v", first, time.Since(began))
	}
	if _, err := tx.Exec(t.Context(), `SELECT 1`); err == nil {
		t.Error("the transaction goes on after the cut")
	}
	if err := tx.Rollback(t.Context()); err == nil {
		t.Error("the rollback of a cut transaction")
	}
	if again := tn.Shutdown(t.Context()); !errors.Is(again, first) {
		t.Errorf("the second Shutdown: %v, want the first one's error", again)
	}
}

func TestARegistrysValueCanWorkUntilItIsClosed(t *testing.T) {
	t.Parallel()
	_, tn, acme, _ := twoTenants(t, tenancy.Config{})
	flushed := make(chan error, 1)
	r, err := tenancy.NewRegistry(tn, tenancy.RegistryConfig[context.Context]{
		Build: func(ctx context.Context, _ tenancy.Tenant) (context.Context, error) { return tenancy.Detach(ctx), nil },
		Close: func(ctx context.Context, _ context.Context) error {
			_, err := tn.DB().Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ('acme', 'flushed')`)
			flushed <- err
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Use(ctx, func(own context.Context) error {
		_, err := tn.DB().Exec(own, `SELECT 1`) // what Build kept outlives Build
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-flushed; err != nil {
		t.Errorf("the last words of a value: %v", err)
	}
}

func TestOneTenantsLoadsHoldUpNoOther(t *testing.T) {
	t.Parallel()
	f, _, acme, globex := twoTenants(t, tenancy.Config{})
	tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys})
	if err != nil {
		t.Fatal(err)
	}
	c, err := tenancy.NewCache[int, int](tn, tenancy.CacheConfig{Size: 1000, LoadTimeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	slow, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	fast, err := tn.Enter(t.Context(), globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	var began, done sync.WaitGroup
	for i := range 200 {
		began.Add(1)
		done.Go(func() {
			_, _ = c.Get(slow, i, func(context.Context, int) (int, error) { began.Done(); <-release; return i, nil })
		})
	}
	began.Wait()
	if _, err := c.Get(fast, 1, func(context.Context, int) (int, error) { return 1, nil }); err != nil {
		t.Error(err)
	}
	close(release)
	done.Wait()

	// And a load that heeds nothing does not hold Close up beyond its time.
	heedless := make(chan struct{})
	stuck := make(chan struct{})
	done.Go(func() {
		_, _ = c.Get(fast, 2, func(context.Context, int) (int, error) { close(stuck); <-heedless; return 2, nil })
	})
	<-stuck
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := tn.Shutdown(ctx); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("a shutdown over a load that goes on: %v after %v", err, time.Since(start))
	}
	close(heedless)
	done.Wait()
}
