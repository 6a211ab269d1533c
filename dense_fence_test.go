package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// denseRole is the tenant's role in a shared pool, read past the library; "" for none.
func denseRole(t *testing.T, f *tenancytest.Fleet, id tenancy.ID) string {
	t.Helper()
	return ask[string](t, f, "primary", `SELECT d.dense_role FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1`, id)
}

// atWorkFor counts the sessions that are in a statement or a transaction of the role's.
func atWorkFor(t *testing.T, f *tenancytest.Fleet, role string) int {
	t.Helper()
	return ask[int](t, f, "tenants", `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle' AND starts_with(query, '/* `+role+` ')`)
}

// slowRows are rows that come one after the other.
func slowRows(name string, n int, pause time.Duration) pgx.CopyFromSource {
	return pgx.CopyFromFunc(func() ([]any, error) {
		if n--; n < 0 {
			return nil, nil
		}
		time.Sleep(pause)
		return []any{name, "copied"}, nil
	})
}

// TestSuspendingATenantOfASharedPoolTouchesNobodyElse suspends and resumes acme while the others do what a fence could take for acme's: longer than it waits.
func TestSuspendingATenantOfASharedPoolTouchesNobodyElse(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		const drain, longer = 60 * time.Millisecond, 150 * time.Millisecond
		f, tn, tenants := denseFleet(t, tenancy.Config{DrainTimeout: drain, Limits: tenancy.Limits{DenseConns: 6}}, isolation, "acme", "globex", "initech")
		db, acme := tn.DB(), tenancytest.Context(t, tn, "acme")
		l := startLoad(t, 1, tenants[1:], tn)
		var kinds sync.WaitGroup
		stop := make(chan struct{})
		for name, call := range map[string]func(ctx context.Context, own string) error{
			"begun": func(ctx context.Context, own string) error {
				return db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
					time.Sleep(longer)
					return second(tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'kind')`, own))
				})
			},
			"savepoint": func(ctx context.Context, own string) error {
				return db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
					sp, err := tx.Begin(ctx)
					if err != nil {
						return err
					}
					time.Sleep(longer)
					if err := sp.Commit(ctx); err != nil {
						return err
					}
					time.Sleep(longer)
					return nil
				})
			},
			"copy": func(ctx context.Context, own string) error {
				return second(db.CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, slowRows(own, 3, longer/3)))
			},
			"batch": func(ctx context.Context, own string) error {
				var b pgx.Batch
				b.BeginTx(pgx.TxOptions{})
				b.Queue(`INSERT INTO notes (tenant, title) VALUES ($1, 'kind')`, own)
				br := db.SendBatch(ctx, &b)
				tx := br.Tx()
				if err := br.Close(); err != nil {
					return err
				}
				time.Sleep(longer)
				return tx.Commit(ctx)
			},
			"sleep": func(ctx context.Context, own string) error {
				return second(db.Exec(ctx, `SELECT pg_sleep($1)`, longer.Seconds()))
			},
		} {
			kinds.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					own := tenants[1+i%2].Name
					if err := call(tenancytest.Context(t, tn, own), own); err != nil {
						t.Errorf("%s: %s: %v", own, name, err)
						return
					}
				}
			})
		}
		var served, failed atomic.Int64
		kinds.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := db.Exec(acme, `INSERT INTO notes (tenant, title) VALUES ('acme', $1)`, "kind"); err == nil {
					served.Add(1)
				} else if failed.Add(1); errors.Is(err, tenancy.ErrTenantSuspended) {
					time.Sleep(time.Millisecond)
				} else if !errors.Is(err, tenancy.ErrTenantUnavailable) && !slices.Contains([]string{"57P01", "42501"}, sqlState(err)) {
					t.Errorf("acme: %v", err)
				}
			}
		})
		role := denseRole(t, f, tenants[0].ID)
		var slowest time.Duration
		for i := range 20 {
			began := time.Now()
			if err := tn.Catalog().Suspend(t.Context(), tenants[0].ID, tenancy.Suspension{Drain: drain}); err != nil {
				t.Fatal(err)
			}
			slowest = max(slowest, time.Since(began))
			if n := atWorkFor(t, f, role); n != 0 {
				t.Errorf("suspension %d: %d sessions are at work for it", i, n)
			}
			if err := second(db.Exec(acme, `SELECT 1`)); !errors.Is(err, tenancy.ErrTenantSuspended) {
				t.Errorf("suspension %d: %v", i, err)
			}
			if err := tn.Catalog().Resume(t.Context(), tenants[0].ID); err != nil {
				t.Fatal(err)
			}
			before := served.Load()
			untilTrue(t, "acme is served again", func() bool { return served.Load() > before })
		}
		close(stop)
		kinds.Wait()
		t.Logf("acme: %d served, %d refused; the slowest suspension took %v", served.Load(), failed.Load(), slowest)
		l.wantNoFailure(nil, nil)
	})
}

// TestWorkOfATenantOfASharedPoolEndsWithItsSuspension has acme in a transaction of each kind when it is suspended: it has the drain's time, and then ends.
func TestWorkOfATenantOfASharedPoolEndsWithItsSuspension(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 2}}, isolation, "acme", "globex")
		db, acme, id := tn.DB(), tenancytest.Context(t, tn, "acme"), tenants[0].ID
		const read = `SELECT count(*) FROM notes`
		for name, start := range map[string]func(tx pgx.Tx) error{
			"begun": func(tx pgx.Tx) error { return nil },
			"read":  func(tx pgx.Tx) error { return tx.QueryRow(acme, read).Scan(new(int)) },
			"savepoint": func(tx pgx.Tx) error {
				return errors.Join(tx.QueryRow(acme, read).Scan(new(int)), second(tx.Begin(acme)))
			},
			"released": func(tx pgx.Tx) error {
				return pgx.BeginFunc(acme, tx, func(tx pgx.Tx) error { return tx.QueryRow(acme, read).Scan(new(int)) })
			},
			"copied": func(tx pgx.Tx) error {
				return second(tx.CopyFrom(acme, pgx.Identifier{"notes"}, []string{"tenant", "title"}, slowRows("acme", 1, 0)))
			},
			"raw":          func(tx pgx.Tx) error { return tx.Conn().QueryRow(acme, read).Scan(new(int)) },
			"large_object": func(tx pgx.Tx) error { objects := tx.LargeObjects(); return second(objects.Create(acme, 0)) },
			"failed":       func(tx pgx.Tx) error { _, _ = tx.Exec(acme, `SELECT 1 / 0`); return nil },
			"role_put_down": func(tx pgx.Tx) error {
				return errors.Join(tx.QueryRow(acme, read).Scan(new(int)), second(tx.Exec(acme, `RESET ROLE`)))
			},
		} {
			t.Run(name, func(t *testing.T) {
				for _, bound := range []bool{false, true} { // whether the session had acme's role before
					who := map[bool]string{false: "globex", true: "acme"}[bound]
					for range 3 {
						if err := db.QueryRow(tenancytest.Context(t, tn, who), `SELECT 1`).Scan(new(int)); err != nil {
							t.Fatal(err)
						}
					}
					tx, err := db.Begin(acme)
					if err != nil {
						t.Fatal(err)
					}
					defer tx.Rollback(context.Background())
					if err := start(tx); err != nil {
						t.Fatal(err)
					}
					if err := tn.Catalog().Suspend(t.Context(), id, tenancy.Suspension{Drain: 100 * time.Millisecond}); err != nil {
						t.Fatal(err)
					}
					var n int
					if err := tx.Conn().QueryRow(acme, read).Scan(&n); err == nil {
						t.Errorf("it goes on and reads %d rows", n)
					}
					if n := atWorkFor(t, f, denseRole(t, f, id)); n != 0 {
						t.Errorf("%d sessions are at work for it", n)
					}
					_ = tx.Rollback(acme)
					if err := tn.Catalog().Resume(t.Context(), id); err != nil {
						t.Fatal(err)
					}
					for want, ctx := range map[string]context.Context{"acme": acme, "globex": tenancytest.Context(t, tn, "globex")} {
						var got string
						if err := db.QueryRow(ctx, `SELECT min(tenant) FROM notes`).Scan(&got); err != nil || got != want {
							t.Errorf("%s reads the rows of %q: %v", want, got, err)
						}
					}
				}
			})
		}
		// What ends in time is not touched.
		begun, done := make(chan struct{}), make(chan error, 1)
		go func() {
			done <- db.InTx(acme, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
				close(begun)
				for range 20 { // it goes on as before
					time.Sleep(10 * time.Millisecond)
					var n int
					if err := tx.QueryRow(ctx, read).Scan(&n); err != nil || n == 0 {
						return fmt.Errorf("it reads %d rows: %w", n, err)
					}
				}
				return second(tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ('acme', 'drained')`))
			})
		}()
		<-begun
		if err := tn.Catalog().Suspend(t.Context(), id, tenancy.Suspension{Drain: 5 * time.Second}); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Errorf("a transaction that ended in time: %v", err)
		}
	})
}

// TestADeafNodeCannotWorkForASuspendedTenantOfASharedPool suspends acme while another node, which hears of it later, works on it and on globex.
func TestADeafNodeCannotWorkForASuspendedTenantOfASharedPool(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond, Limits: tenancy.Limits{Nodes: 2}}, isolation, "acme", "globex")
		w, late := watchedNode(t, f, tenancy.Config{Lookups: tenancy.LookupConfig{PollPeriod: 4 * time.Second}, Limits: tenancy.Limits{DenseConns: 2}})
		acme, globex := tenancytest.Context(t, late, "acme"), tenancytest.Context(t, late, "globex")
		for range 4 {
			for _, ctx := range []context.Context{globex, acme} {
				if err := second(late.DB().Exec(ctx, `UPDATE notes SET title = title WHERE id > $1`, 0)); err != nil {
					t.Fatal(err)
				}
			}
		}
		w.silence() // it cannot ask either, and serves what it knows for StaleGrace
		var failed atomic.Value
		stop, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := second(late.DB().Exec(globex, `INSERT INTO notes (tenant, title) VALUES ('globex', $1)`, "beside")); err != nil {
					failed.CompareAndSwap(nil, err.Error())
				}
			}
		}()
		if err := tn.Catalog().Suspend(t.Context(), tenants[0].ID, tenancy.Suspension{Drain: 200 * time.Millisecond}); err != nil {
			t.Fatal(err)
		}
		rows := func() int {
			return ask[int](t, f, "tenants", `SELECT count(*) FROM `+placeOf(t, f, tenants[0].ID).table("notes")+` WHERE tenant = 'acme'`)
		}
		before := rows()
		deaf := false
		for range 3 {
			var n int
			for _, sql := range []string{`SELECT count(*) FROM notes`, `WITH w AS (INSERT INTO notes (tenant, title) VALUES ('acme', 'late') RETURNING 1) SELECT count(*) FROM w`} {
				bounded, cancel := context.WithTimeout(acme, time.Second)
				err := late.DB().QueryRow(bounded, sql).Scan(&n)
				cancel()
				if err == nil {
					t.Errorf("the node that hears nothing reads or writes: %s", sql)
				}
				deaf = deaf || !errors.Is(err, tenancy.ErrTenantSuspended)
			}
		}
		if !deaf {
			t.Error("the node had heard of it: nothing was shown")
		}
		if after := rows(); after != before {
			t.Errorf("%d rows were written after the suspension", after-before)
		}
		close(stop)
		<-ended
		if err := failed.Load(); err != nil {
			t.Errorf("globex: %v", err)
		}
		w.mend()
		if err := tn.Catalog().Resume(t.Context(), tenants[0].ID); err != nil {
			t.Fatal(err)
		}
		untilTrue(t, "it is served again", func() bool { return late.DB().QueryRow(acme, `SELECT count(*) FROM notes`).Scan(new(int)) == nil })
	})
}

func TestATenantOfASharedPoolIsDeletedRestoredAndPurged(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{DrainTimeout: 100 * time.Millisecond}, isolation, "acme", "globex")
		c, id := tn.Catalog(), tenants[0].ID
		acme, globex := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		reads := func(ctx context.Context, want string) {
			t.Helper()
			var got string
			if err := tn.DB().QueryRow(ctx, `SELECT min(tenant) FROM notes`).Scan(&got); err != nil || got != want {
				t.Errorf("%s reads the rows of %q: %v", want, got, err)
			}
		}
		reads(acme, "acme")
		role := denseRole(t, f, id)
		if err := c.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := c.Restore(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		reads(acme, "acme")
		reads(globex, "globex")
		if err := c.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		receipt, err := c.PurgeNow(t.Context(), id, "acme")
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(receipt.Roles, role) {
			t.Errorf("the receipt names roles %q, and not %s", receipt.Roles, role)
		}
		admin := f.Admin(t, "tenants")
		if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, role); n != 0 {
			t.Errorf("role %s is left", role)
		}
		if acls := scan[string](t, admin, `SELECT coalesce(string_agg(a::text, ' '), '') FROM (SELECT relacl::text FROM pg_class UNION ALL SELECT nspacl::text FROM pg_namespace UNION ALL SELECT datacl::text FROM pg_database) s(a)`); strings.Contains(acls, role) {
			t.Errorf("something is still granted to %s: %s", role, acls)
		}
		if left := ask[int](t, f, "primary", `SELECT count(*) FROM tenancy.data_sources WHERE dense_role = '`+role+`'`); left != 0 {
			t.Errorf("the primary lists it")
		}
		reads(globex, "globex")
	})
}

func TestPasswordsAndKeysAreRotatedBesideASharedPool(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{}, isolation, "acme", "globex")
		l := startLoad(t, 2, tenants, tn)
		for range 5 {
			if err := tn.Catalog().RotatePassword(t.Context(), tenants[0].ID); err != nil {
				t.Fatal(err)
			}
		}
		l.wantNoFailure(nil, nil)
		text, err := tenancy.NewKey("new")
		if err != nil {
			t.Fatal(err)
		}
		both, err := tenancy.ParseKeyring(text + "," + f.KeyText)
		if err != nil {
			t.Fatal(err)
		}
		rotating := f.Open(t, tenancy.Config{Keys: both})
		if _, err := rotating.Catalog().RotateKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
		alone, err := tenancy.ParseKeyring(text)
		if err != nil {
			t.Fatal(err)
		}
		after := f.Open(t, tenancy.Config{Keys: alone, Migrations: noteMigrations})
		for _, tenant := range tenants {
			var got string
			if err := after.DB().QueryRow(tenancytest.Context(t, after, tenant.Name), `SELECT min(tenant) FROM notes`).Scan(&got); err != nil || got != tenant.Name {
				t.Errorf("%s reads the rows of %q: %v", tenant.Name, got, err)
			}
		}
		made := createIn(t, after, "initech", isolation)
		if err := after.Catalog().SetDense(t.Context(), made.ID, true); err != nil {
			t.Errorf("with the new key alone: %v", err)
		}
	})
}
