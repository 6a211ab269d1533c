package tenancy_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestACallInsideATransactionHasAnotherConnectionOfTheSharedPool(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		_, tn, _ := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 2}}, isolation, "acme", "globex")
		ctx := tenancytest.Context(t, tn, "acme")
		err := tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'inside')`, "acme"); err != nil {
				return err
			}
			var n int
			if err := tn.DB().QueryRow(ctx, `SELECT count(*) FROM notes WHERE title = $1`, "inside").Scan(&n); err != nil || n != 0 {
				t.Errorf("another connection sees %d rows that are not committed: %v", n, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestATenantHoldsNoMoreOfASharedPoolThanItsOwnLimit(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		limits := tenancy.Limits{DenseConns: 3, TenantConns: 2, TenantWaiters: 5, AcquireTimeout: 300 * time.Millisecond}
		_, tn, _ := denseFleet(t, tenancy.Config{Limits: limits}, isolation, "acme", "globex")
		acme, globex := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		if _, err := tn.DB().Exec(globex, `SELECT 1`); err != nil {
			t.Fatal(err)
		}
		var flood sync.WaitGroup
		var mu sync.Mutex
		full, waited := 0, 0
		for range 12 {
			flood.Go(func() {
				began := time.Now()
				_, err := tn.DB().Exec(acme, `SELECT pg_sleep($1)`, 1)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case errors.Is(err, tenancy.ErrBusy) && time.Since(began) < 200*time.Millisecond:
					full++
				case errors.Is(err, tenancy.ErrBusy):
					waited++
				case err != nil:
					t.Error(err)
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		for range 20 {
			if _, err := tn.DB().Exec(globex, `INSERT INTO notes (tenant, title) VALUES ($1, 'beside')`, "globex"); err != nil {
				t.Errorf("beside the flood: %v", err)
			}
		}
		for id, s := range tn.Stats() {
			if s.Name == "acme" && (s.Busy != 2 || !s.Dense) {
				t.Errorf("tenant %d holds %d connections, want 2: %+v", id, s.Busy, s)
			}
		}
		flood.Wait()
		if full+waited != 10 || full < 5 || waited == 0 { // one that waits while its connection is opened waits, too
			t.Errorf("of 12 calls on 2 connections %d were refused at once and %d after a wait, want 10 together, and at most 5 that waited", full, waited)
		}
	})
}

func TestASharedSessionIsReplacedWhenItHasSeenEnough(t *testing.T) {
	t.Parallel()
	names := []string{"acme", "globex", "initech", "hooli"}
	_, tn, _ := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 1, DenseTenants: 2}}, tenancy.IsolationSchema, names...)
	pids := map[int]bool{}
	for range 3 {
		for _, name := range names {
			var pid int
			if err := tn.DB().QueryRow(tenancytest.Context(t, tn, name), `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
				t.Fatal(err)
			}
			pids[pid] = true
		}
	}
	if len(pids) != 4 { // after each third tenant
		t.Errorf("12 calls of four tenants in turn were answered by %d sessions, want 4", len(pids))
	}
}

func TestSetDenseRefusesWhatCannotShareAPool(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	apart, acme := createIn(t, tn, "apart", tenancy.IsolationDatabase), createIn(t, tn, "acme", tenancy.IsolationSchema)
	c := tn.Catalog()
	wantError(t, c.SetDense(t.Context(), apart.ID, true), tenancy.ErrInvalid, "database")
	wantError(t, c.SetDense(t.Context(), 99, true), tenancy.ErrTenantNotFound)
	if err := c.SetDense(t.Context(), acme.ID, false); err != nil {
		t.Errorf("what it is already: %v", err)
	}
	for range 2 {
		if err := c.SetDense(t.Context(), acme.ID, true); err != nil {
			t.Errorf("twice: %v", err)
		}
	}
	if now, err := c.Tenant(t.Context(), acme.ID); err != nil || !now.Dense {
		t.Errorf("the catalog tells of %+v, %v", now, err)
	}
	if err := c.SetDense(t.Context(), acme.ID, false); err != nil {
		t.Fatal(err)
	}
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.SetDense(t.Context(), acme.ID, true), tenancy.ErrInvalid, "suspended")
	if err := c.Delete(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.SetDense(t.Context(), acme.ID, true), tenancy.ErrTenantGone)
}

func TestSetDenseIsFinishedWhereverItDied(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{DrainTimeout: 100 * time.Millisecond}, isolation, "acme", "globex")
		ctx, globex := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		deaths := 0
		for i := range 16 {
			short, cancel := context.WithTimeout(t.Context(), time.Duration(3+8*i)*time.Millisecond)
			if err := tn.Catalog().SetDense(short, tenants[0].ID, i%2 == 1); err != nil {
				deaths++
			}
			cancel()
			for name, ctx := range map[string]context.Context{"acme": ctx, "globex": globex} {
				var got string
				if err := tn.DB().QueryRow(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'x') RETURNING tenant`, name).Scan(&got); err != nil || got != name {
					t.Fatalf("%s after try %d: %q, %v", name, i, got, err)
				}
			}
		}
		if deaths == 0 {
			t.Error("none died: nothing was shown")
		}
		must(t, f.Admin(t, "primary"), `UPDATE tenancy.data_sources SET updated = now() - interval '1 minute'`)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		unfinished := `SELECT count(*) FROM tenancy.data_sources WHERE dense_role <> '' AND NOT dense`
		if n := scan[int](t, f.Admin(t, "primary"), unfinished); n != 0 {
			t.Errorf("the validity job has left %d roles", n)
		}
		if err := tn.Catalog().SetDense(t.Context(), tenants[0].ID, true); err != nil {
			t.Error(err)
		}
	})
}

// TestATenantOfASharedPoolIsToldOfAUsedUpBudget, and so are its Stats.
func TestATenantOfASharedPoolIsToldOfAUsedUpBudget(t *testing.T) {
	t.Parallel()
	limits := tenancy.Limits{ServerConns: 18, PrimaryConns: 3, TenantConns: 10, DenseConns: 4, AcquireTimeout: 300 * time.Millisecond}
	_, tn, dense := denseFleet(t, tenancy.Config{Limits: limits}, tenancy.IsolationSchema, "acme", "globex")
	apart := createIn(t, tn, "apart", tenancy.IsolationSchema)
	acme, other := tenancytest.Context(t, tn, "acme"), entered(t, tn, apart.ID)
	held, err := tn.DB().Begin(acme)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Rollback(context.Background())
	for {
		tx, err := tn.DB().Begin(other)
		if err != nil {
			wantError(t, err, tenancy.ErrBusy, "Limits.ServerConns")
			break
		}
		defer tx.Rollback(context.Background())
	}
	_, err = tn.DB().Exec(acme, `SELECT 1`)
	wantError(t, err, tenancy.ErrBusy, "beside the 1 of 4", "this node's budget of the server is used up", "Limits.ServerConns")
	if s := statsOf(tn, dense[0].ID); s.Starved == 0 || s.Refused != 1 {
		t.Errorf("%+v", s)
	}
	if err := held.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err = tn.DB().Exec(acme, `SELECT 1`); err != nil {
		t.Error(err)
	}
}
