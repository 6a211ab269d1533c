package tenancy_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestHalfOfTheTenantsOfASharedPoolAreMigratedUnderLoad: with SELECT *, whose columns a migration changes, nobody's call fails. With plans
// that tenants share it is 0A000 at each change between old and new ones.
func TestHalfOfTheTenantsOfASharedPoolAreMigratedUnderLoad(t *testing.T) {
	t.Parallel()
	const first = `-- +goose Up
CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL, title text NOT NULL);
`
	files := func(more ...string) fstest.MapFS {
		fs := fstest.MapFS{"00001_notes.sql": {Data: []byte(first)}}
		for i, sql := range more {
			fs[fmt.Sprintf("0000%d_more.sql", i+2)] = &fstest.MapFile{Data: []byte("-- +goose Up\n" + sql)}
		}
		return fs
	}
	f := tenancytest.NewFleet(t)
	limits := tenancy.Limits{DenseConns: 2}
	tn := f.Open(t, tenancy.Config{Migrations: files(), Limits: limits, Dense: true, Isolation: tenancy.IsolationSchema})
	var tenants []tenancy.Tenant
	for i := range 6 {
		tenants = append(tenants, tenancytest.Create(t, tn, fmt.Sprintf("tenant-%d", i)))
	}
	var calls, old, new atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 5))
			for {
				select {
				case <-stop:
					return
				default:
				}
				tenant := tenants[random.IntN(len(tenants))]
				ctx := tenancytest.Context(t, tn, tenant.Name)
				if _, err := tn.DB().Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'x')`, tenant.Name); err != nil {
					t.Errorf("%s: %v", tenant.Name, err)
					return
				}
				rows, _ := tn.DB().Query(ctx, `SELECT * FROM notes WHERE id > $1 ORDER BY id LIMIT 2`, 0)
				found, err := pgx.CollectRows(rows, pgx.RowToMap)
				if err != nil {
					t.Errorf("%s: %v", tenant.Name, err)
					return
				}
				if found[0]["tenant"] != tenant.Name {
					t.Errorf("%s reads %v", tenant.Name, found[0])
				}
				if _, more := found[0]["pinned"]; more {
					new.Add(1)
				} else {
					old.Add(1)
				}
				calls.Add(2)
			}
		})
	}
	// Two releases of the service, one after the other; each migrates the first three tenants while the others stay behind.
	for _, more := range [][]string{
		{"ALTER TABLE notes ADD COLUMN pinned boolean NOT NULL DEFAULT false;"},
		{"ALTER TABLE notes ADD COLUMN pinned boolean NOT NULL DEFAULT false;", "ALTER TABLE notes ALTER COLUMN title TYPE varchar(50);"},
	} {
		next := f.Open(t, tenancy.Config{Migrations: files(more...), Limits: limits})
		for _, tenant := range tenants[:3] {
			if _, err := next.Migrator().Tenant(t.Context(), tenant.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	for had := calls.Load(); calls.Load() < had+200 && !t.Failed(); {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	clients.Wait()
	t.Logf("%d calls, %d saw the old table, %d the new one", calls.Load(), old.Load(), new.Load())
	if old.Load() == 0 || new.Load() == 0 {
		t.Error("one of the two was never seen")
	}
}
