package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// denseFleet is a node, and tenants of one isolation that share a pool.
func denseFleet(t *testing.T, cfg tenancy.Config, isolation tenancy.Isolation, names ...string) (f *tenancytest.Fleet, tn *tenancy.Tenancy, tenants []tenancy.Tenant) {
	t.Helper()
	f = tenancytest.NewFleet(t)
	cfg.Migrations = noteMigrations
	tn = f.Open(t, cfg)
	for _, name := range names {
		tenant := createIn(t, tn, name, isolation)
		if err := tn.Catalog().SetDense(t.Context(), tenant.ID, true); err != nil {
			t.Fatal(err)
		}
		tenants = append(tenants, tenant)
	}
	return f, tn, tenants
}

// eachDense runs the test for each isolation that has shared pools.
func eachDense(t *testing.T, test func(t *testing.T, isolation tenancy.Isolation)) {
	t.Parallel()
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationShared} {
		t.Run(string(isolation), func(t *testing.T) {
			t.Parallel()
			test(t, isolation)
		})
	}
}

func TestTenantsOfASharedPoolAreServedApart(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, _ := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 2}}, isolation, "acme", "globex", "initech")
		names := []string{"acme", "globex", "initech"}
		var calls sync.WaitGroup
		for i := range 6 {
			calls.Go(func() {
				random := rand.New(rand.NewPCG(uint64(i), 1))
				for n := range 200 {
					name := names[random.IntN(len(names))]
					if err := denseCall(tenancytest.Context(t, tn, name), tn.DB(), name, n, random); err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
		calls.Wait()
		for _, name := range names {
			var others int
			if err := tn.DB().QueryRow(tenancytest.Context(t, tn, name), `SELECT count(*) FROM notes WHERE tenant <> $1`, name).Scan(&others); err != nil || others != 0 {
				t.Errorf("%s has %d rows of others: %v", name, others, err)
			}
		}
		if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(DISTINCT usename) FROM pg_stat_activity WHERE usename LIKE 't\_%\_d' AND datname = current_database()`); n != 1 {
			t.Errorf("they are served over %d logins", n)
		}
		if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM pg_stat_activity WHERE usename LIKE 't\_%\_d' AND datname = current_database()`); n < 1 || n > 2 {
			t.Errorf("they are served over %d connections, at most 2", n)
		}
	})
}

// denseCall makes one call of one of many kinds, and checks that what it reads is the tenant's.
func denseCall(ctx context.Context, db *tenancy.TenantAwareDB, name string, n int, random *rand.Rand) error {
	title := fmt.Sprint(name, " ", n)
	check := func(got string, err error) error {
		if err == nil && got != name && got != "" {
			err = fmt.Errorf("it reads what is %s's", got)
		}
		return err
	}
	var got string
	switch random.IntN(8) {
	case 0:
		_, err := db.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, $2)`, name, title)
		return err
	case 1:
		_, err := db.Exec(ctx, `UPDATE notes SET title = 'changed' WHERE id = (SELECT min(id) FROM notes)`)
		return err
	case 2:
		rows, _ := db.Query(ctx, `SELECT DISTINCT tenant FROM notes`)
		all, err := pgx.CollectRows(rows, pgx.RowTo[string])
		return check(strings.Join(all, ","), err)
	case 3:
		var b pgx.Batch
		b.Queue(`INSERT INTO notes (tenant, title) VALUES ($1, $2)`, name, title)
		b.Queue(`SELECT min(tenant) FROM notes`).QueryRow(func(row pgx.Row) error { return row.Scan(&got) })
		err := db.SendBatch(ctx, &b).Close()
		return check(got, err)
	case 4:
		err := db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, $2)`, name, title); err != nil {
				return err
			}
			if random.IntN(2) == 0 {
				return errUndo
			}
			return tx.QueryRow(ctx, `SELECT max(tenant) FROM notes`).Scan(&got)
		})
		if errors.Is(err, errUndo) {
			err = nil
		}
		return check(got, err)
	case 5:
		_, err := db.CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, pgx.CopyFromRows([][]any{{name, title}, {name, title}}))
		return err
	case 6:
		return check(got, db.QueryRow(ctx, `SELECT tenant FROM notes WHERE title = @title OR true ORDER BY 1 DESC LIMIT 1`, pgx.NamedArgs{"title": title}).Scan(&got))
	}
	return check(got, db.QueryRow(ctx, `SELECT coalesce(min(tenant), '') FROM notes WHERE id >= $1`, 1).Scan(&got))
}

var errUndo = errors.New("undo")

func TestATenantMovesBetweenPoolsWhileItIsServed(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{}, isolation, "acme", "globex")
		node := f.Open(t, tenancy.Config{})
		var calls, failed atomic.Int64
		stop := make(chan struct{})
		var clients sync.WaitGroup
		for i := range 8 {
			clients.Go(func() {
				n, name := []*tenancy.Tenancy{tn, node}[i%2], []string{"acme", "globex"}[i/2%2]
				random := rand.New(rand.NewPCG(uint64(i), 2))
				for {
					select {
					case <-stop:
						return
					default:
					}
					calls.Add(1)
					if err := denseCall(tenancytest.Context(t, n, name), n.DB(), name, i, random); err != nil {
						failed.Add(1)
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
		for i := range 6 {
			if err := tn.Catalog().SetDense(t.Context(), tenants[0].ID, i%2 == 1); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		clients.Wait()
		t.Logf("%d of %d calls failed over 6 moves", failed.Load(), calls.Load())
		if err := tn.Catalog().SetDense(t.Context(), tenants[0].ID, false); err != nil {
			t.Fatal(err)
		}
		admin := f.Admin(t, "primary")
		if left := scan[string](t, admin, `SELECT dense_role FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.id = $1`, tenants[0].ID); left != "" {
			t.Errorf("role %s is still written", left)
		}
	})
}

// TestASharedPoolSeesWhatAllTenantsShare: the extensions and the reference tables.
func TestASharedPoolSeesWhatAllTenantsShare(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t, "citext")
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Extensions: true, ReferenceTables: true})
	provisioner := connectURL(t, f.ServerURL)
	must(t, provisioner, `CREATE TABLE tenancy_ref.countries (code tenancy_ext.citext)`)
	must(t, provisioner, `INSERT INTO tenancy_ref.countries VALUES ('at')`)
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationShared} {
		for _, name := range []string{"acme-", "globex-"} {
			made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name + string(isolation), Isolation: isolation})
			if err != nil {
				t.Fatal(err)
			}
			if err := tn.Catalog().SetDense(t.Context(), made.ID, true); err != nil {
				t.Fatal(err)
			}
			var n int
			if err := tn.DB().QueryRow(tenancytest.Context(t, tn, made.Name), `SELECT count(*) FROM countries WHERE code = 'AT'::citext`).Scan(&n); err != nil || n != 1 {
				t.Errorf("%s sees %d countries, %v", made.Name, n, err)
			}
		}
	}
	findings, err := tn.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range findings {
		if d.Level > tenancy.LevelNote && d.Check != "settings" {
			t.Error(d)
		}
	}
}
