package tenancy_test

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// sharedLogins are the logins of the fleet's shared pools that the server has.
func sharedLogins(t *testing.T, f *tenancytest.Fleet) []string {
	t.Helper()
	rows, _ := f.Admin(t, "tenants").Query(t.Context(), `SELECT DISTINCT l.rolname::text FROM pg_roles l JOIN pg_auth_members m ON m.roleid = l.oid JOIN pg_roles p ON p.oid = m.member
		WHERE l.rolcanlogin AND NOT l.rolinherit AND p.rolname = (SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database())`)
	logins, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return logins
}

func TestTheLoginOfASharedPoolIsRotatedUnderLoad(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{}, isolation, "acme", "globex", "initech")
		node := f.Open(t, tenancy.Config{})
		if err := tn.Catalog().Suspend(t.Context(), tenants[2].ID, tenancy.Suspension{}); err != nil {
			t.Fatal(err)
		}
		before := sharedLogins(t, f)
		var calls atomic.Int64
		stop := make(chan struct{})
		var clients sync.WaitGroup
		for i := range 6 {
			clients.Go(func() {
				n, name := []*tenancy.Tenancy{tn, node}[i%2], []string{"acme", "globex"}[i/2%2]
				random := rand.New(rand.NewPCG(uint64(i), 3))
				for {
					select {
					case <-stop:
						return
					default:
					}
					calls.Add(1)
					if err := denseCall(tenancytest.Context(t, n, name), n.DB(), name, i, random); err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
		for range 4 {
			if err := tn.Catalog().RotateDense(t.Context(), ""); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		clients.Wait()
		t.Logf("4 rotations under %d calls", calls.Load())
		after := sharedLogins(t, f)
		if len(before) != 1 || len(after) != 1 || before[0] == after[0] {
			t.Errorf("the server had the logins %v and has %v, want one, and another one", before, after)
		}
		if err := tn.Catalog().Resume(t.Context(), tenants[2].ID); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*tenancy.Tenancy{tn, node} {
			if _, err := n.DB().Exec(tenancytest.Context(t, n, "initech"), `INSERT INTO notes (tenant, title) VALUES ($1, $1)`, "initech"); err != nil {
				t.Errorf("resumed after a rotation: %v", err)
			}
		}
	})
}

func TestARotationOfASharedLoginIsFinishedWhereverItDied(t *testing.T) {
	t.Parallel()
	f, tn, _ := denseFleet(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond}, tenancy.IsolationSchema, "acme", "globex")
	random := rand.New(rand.NewPCG(4, 4))
	deaths := 0
	for try := range 12 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+random.IntN(120))*time.Millisecond)
		err := tn.Catalog().RotateDense(ctx, "main")
		cancel()
		if err != nil {
			deaths++
		}
		for _, name := range []string{"acme", "globex"} {
			if err := denseCall(tenancytest.Context(t, tn, name), tn.DB(), name, try, random); err != nil {
				t.Fatalf("after %v, %s: %v", err, name, err)
			}
		}
	}
	primary := f.Admin(t, "primary")
	if unfinished := scan[int](t, primary, `SELECT count(*) FROM tenancy.dense_logins WHERE next_login <> '' OR old_login <> ''`); deaths > 0 {
		t.Logf("%d of 12 died, %d left unfinished", deaths, unfinished)
	}
	must(t, primary, `UPDATE tenancy.dense_logins SET updated = now() - interval '1 minute'`)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := scan[int](t, primary, `SELECT count(*) FROM tenancy.dense_logins WHERE next_login <> '' OR old_login <> ''`); left != 0 {
		t.Error("the validity job has left the rotation unfinished")
	}
	if logins := sharedLogins(t, f); len(logins) != 1 || logins[0] != scan[string](t, primary, `SELECT login FROM tenancy.dense_logins`) {
		t.Errorf("the server has the logins %v", logins)
	}
	if deaths == 0 {
		t.Error("no rotation died: nothing was shown")
	}
}
