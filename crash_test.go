package tenancy_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// crashes is how many processes are killed in the middle of a tenant's life: 8, with TENANCY_LONG=1 1,000.
func crashes() int {
	if os.Getenv("TENANCY_LONG") == "1" {
		return 1000
	}
	return 8
}

// TestLifeCyclesKilledAnywhereLeaveNothing kills processes that create, rotate, delete and purge tenants, at random moments, and lets the
// validity job of a node that lives go over what they left: no tenant hangs, and the server has neither a schema nor a role that no tenant's place names.
func TestLifeCyclesKilledAnywhereLeaveNothing(t *testing.T) {
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, DrainTimeout: 300 * time.Millisecond, Limits: tenancy.Limits{ServerConns: 125, Nodes: 5}})
	acme := create(t, f, tn, "acme")
	admin, primary, rng := f.Admin(t, "tenants"), f.Admin(t, "primary"), rand.New(rand.NewPCG(5, 6))
	died := map[string]int{}
	for killed := 0; killed < crashes(); {
		var group sync.WaitGroup
		for range 4 {
			cmd, wait := startLife(t, f, fmt.Sprintf("t%d", killed)), time.Duration(rng.Int64N(int64(1500*time.Millisecond)))
			killed++
			group.Go(func() {
				time.Sleep(300*time.Millisecond + wait) // a moment that nothing waits for is the point
				killAtWork(t, cmd)
			})
		}
		group.Wait()
		must(t, primary, `DELETE FROM tenancy.nodes WHERE seen < (SELECT max(seen) FROM tenancy.nodes)`) // or every fence waits for the dead
		orphans(t, admin)
		for _, at := range loose(t, primary) {
			died[at]++
		}
		for _, table := range []string{"tenants", "data_sources"} {
			must(t, primary, `UPDATE tenancy.`+table+` SET updated = updated - interval '1 hour'`)
		}
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if left := loose(t, primary); len(left) > 0 {
			t.Fatalf("after %d were killed, the validity job leaves: %v", killed, left)
		}
		wantNoOrphans(t, primary, admin)
		finishLives(t, primary, tn, rng)
	}
	wantNoOrphans(t, primary, admin)
	t.Logf("what the killed left: %v", died)
	if len(died) == 0 {
		t.Error("nothing was killed in the middle: the test shows nothing")
	}
	if got, want := current(t, tn, acme.ID), placeOf(t, f, acme.ID).Schema; got != want {
		t.Errorf("work is done in %s, want %s", got, want)
	}
}

// finishLives has each tenant of a killed process work, or, where it was deleted, be purged or come back.
func finishLives(t *testing.T, primary *pgx.Conn, tn *tenancy.Tenancy, rng *rand.Rand) {
	t.Helper()
	for tenant, err := range tn.Catalog().Tenants(t.Context(), tenancy.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		if tenant.Name == "acme" {
			continue
		}
		if tenant.State == tenancy.StateDeleted && rng.IntN(2) == 0 {
			if err := tn.Catalog().Restore(t.Context(), tenant.ID); err != nil {
				t.Fatal(err)
			}
			tenant.State = tenancy.StateActive
		}
		if tenant.State == tenancy.StateActive {
			if got, want := current(t, tn, tenant.ID), scan[string](t, primary, `SELECT d.schema FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1`, tenant.ID); got != want {
				t.Errorf("work is done in %s, want %s", got, want)
			}
			if err := tn.Catalog().Delete(t.Context(), tenant.ID); err != nil {
				t.Fatal(err)
			}
		}
		if tenant.State != tenancy.StatePurged {
			if _, err := tn.Catalog().PurgeNow(t.Context(), tenant.ID, tenant.Name); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// loose are the verbs that were begun and are not finished, as the primary has them.
func loose(t *testing.T, primary *pgx.Conn) []string {
	t.Helper()
	rows, _ := primary.Query(t.Context(), `SELECT 'create' FROM tenancy.tenants WHERE state = 'provisioning'
		UNION ALL SELECT 'delete' FROM tenancy.tenants WHERE state = 'deleted' AND fenced IS NULL
		UNION ALL SELECT 'rotate' FROM tenancy.data_sources WHERE state = 'made' AND (next_login <> '' OR old_login <> '')`)
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// wantNoOrphans compares the server with the places that the primary lists.
func wantNoOrphans(t *testing.T, primary, admin *pgx.Conn) {
	t.Helper()
	column := func(conn *pgx.Conn, sql string, args ...any) []string {
		rows, _ := conn.Query(t.Context(), sql, args...)
		list, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	want := column(primary, `SELECT schema FROM tenancy.data_sources WHERE state <> 'dropped' ORDER BY 1`)
	if got := column(admin, `SELECT nspname::text FROM pg_namespace WHERE nspname ~ '^t_' ORDER BY 1`); !slices.Equal(got, want) {
		t.Errorf("schemas %v, want %v", got, want)
	}
	// Roles are the server's, which other tests use too: those count whose name begins as a place of this fleet's, now or before.
	want = column(primary, `SELECT unnest(ARRAY[owner, runtime, login]) FROM tenancy.data_sources WHERE state <> 'dropped' ORDER BY 1`)
	got := column(admin, `SELECT rolname::text FROM pg_roles WHERE EXISTS (SELECT FROM unnest($1::text[]) s WHERE starts_with(rolname, s)) ORDER BY rolname::text`,
		column(primary, `SELECT schema FROM tenancy.data_sources`))
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("roles %v, want %v", got, want)
	}
}

// startLife has another process create, rotate, delete and purge one tenant after another, until it is killed.
func startLife(t *testing.T, f *tenancytest.Fleet, prefix string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestLifeProcess$")
	cmd.Env = append(os.Environ(), "TENANCY_TEST_LIFE="+prefix, "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(cmd) })
	return cmd
}

// TestLifeProcess is the other process; without its environment it is nothing.
func TestLifeProcess(t *testing.T) {
	prefix := os.Getenv("TENANCY_TEST_LIFE")
	if prefix == "" {
		return
	}
	cfg, err := tenancy.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Migrations, cfg.DrainTimeout = noteMigrations, 300*time.Millisecond
	cfg.Limits.ServerConns, cfg.Limits.Nodes = 125, 5
	tn, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	c := tn.Catalog()
	for i := 0; ; i++ {
		made, err := c.Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("%s-%d", prefix, i), Admin: "alice"})
		if err == nil {
			err = c.RotatePassword(t.Context(), made.ID)
		}
		if err == nil {
			err = c.Delete(t.Context(), made.ID)
		}
		if err == nil {
			_, err = c.PurgeNow(t.Context(), made.ID, made.Name)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
