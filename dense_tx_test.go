package tenancy_test

import (
	"context"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestATransactionThatItsOwnSQLEndsStaysItsTenants: the role was taken before it began, and what ends it gives nothing back.
func TestATransactionThatItsOwnSQLEndsStaysItsTenants(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		_, tn, _ := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 1}}, isolation, "acme", "globex")
		acme, globex := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		for name, ctx := range map[string]context.Context{"acme": acme, "globex": globex} {
			if _, err := tn.DB().Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'own')`, name); err != nil {
				t.Fatal(err)
			}
		}
		const whose = `SELECT coalesce(string_agg(DISTINCT tenant, ','), '') FROM notes`
		read := func(db interface {
			QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
		}, ctx context.Context) (got string) {
			if err := db.QueryRow(ctx, whose).Scan(&got); err != nil {
				return err.Error()
			}
			return got
		}
		for _, end := range []string{`ROLLBACK`, `COMMIT`, `ROLLBACK AND CHAIN`, `ROLLBACK; BEGIN`, `SELECT 1/0`} {
			for range 2 { // plain reads: no reset follows them
				if got := read(tn.DB(), acme); got != "acme" {
					t.Fatalf("acme reads %q", got)
				}
			}
			tx, err := tn.DB().Begin(globex)
			if err != nil {
				t.Fatal(err)
			}
			if got := read(tx, globex); got != "globex" {
				t.Errorf("globex reads %q", got)
			}
			_, _ = tx.Exec(globex, end)
			if end == `SELECT 1/0` {
				_, _ = tx.Exec(globex, `COMMIT`)
			}
			if got := read(tx, globex); got != "globex" {
				t.Errorf("after %s in globex's transaction it reads %q", end, got)
			}
			_ = tx.Rollback(globex)
		}
	})
}

// TestAFinishedTransactionTouchesNoSession: it is another tenant's by then.
func TestAFinishedTransactionTouchesNoSession(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		_, tn, _ := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 1}}, isolation, "acme", "globex")
		acme, globex := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		old, err := tn.DB().Begin(acme)
		if err != nil {
			t.Fatal(err)
		}
		inner, err := old.Begin(acme)
		if err != nil {
			t.Fatal(err)
		}
		if err := old.Commit(acme); err != nil {
			t.Fatal(err)
		}
		tx, err := tn.DB().Begin(globex)
		if err != nil {
			t.Fatal(err)
		}
		for name, late := range map[string]pgx.Tx{"transaction": old, "savepoint": inner} {
			for verb, err := range map[string]error{
				"exec":      errorOf(late.Exec(acme, `UPDATE nowhere SET x = $1`, 1)),
				"query":     errorOf(late.Query(acme, `SELECT x FROM nowhere WHERE x = $1`, 1)),
				"query row": late.QueryRow(acme, `SELECT x FROM nowhere WHERE x = $1`, 1).Scan(new(int)),
				"begin":     errorOf(late.Begin(acme)),
				"prepare":   errorOf(late.Prepare(acme, "name", `SELECT x FROM nowhere`)),
				"copy":      errorOf(late.CopyFrom(acme, pgx.Identifier{"notes"}, []string{"tenant"}, pgx.CopyFromRows(nil))),
				"batch":     late.SendBatch(acme, new(pgx.Batch)).Close(),
				"commit":    late.Commit(acme),
			} {
				if !errors.Is(err, pgx.ErrTxClosed) {
					t.Errorf("%s of a finished %s: %v", verb, name, err)
				}
			}
		}
		if _, err := tx.Exec(globex, `INSERT INTO notes (tenant, title) VALUES ($1, 'x')`, "globex"); err != nil {
			t.Errorf("the transaction beside it: %v", err)
		}
		if err := tx.Commit(globex); err != nil {
			t.Error(err)
		}
	})
}

func errorOf[T any](_ T, err error) error { return err }

// TestASessionWhoseStatementsWereDroppedIsReplaced: what one tenant drops is not missing for another.
func TestASessionWhoseStatementsWereDroppedIsReplaced(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		_, tn, _ := denseFleet(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 1}}, isolation, "acme", "globex")
		acme, globex := tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		ask := func(ctx context.Context) error {
			return tn.DB().QueryRow(ctx, `SELECT count(*) FROM notes WHERE id > $1`, 0).Scan(new(int))
		}
		for _, drop := range []string{`DISCARD ALL`, `DEALLOCATE ALL`, `DO $$ BEGIN EXECUTE 'DEALLOCATE' || ' ALL'; END $$`} {
			for range 3 {
				for _, ctx := range []context.Context{acme, globex} {
					if err := ask(ctx); err != nil {
						t.Fatal(err)
					}
				}
			}
			if _, err := tn.DB().Exec(acme, drop); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := ask(globex); err != nil {
					t.Errorf("after %s by another tenant: %v", drop, err)
				}
			}
		}
	})
}
