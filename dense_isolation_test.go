package tenancy_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestASharedPoolStopsAndLeaksWhatTheGuaranteesSay is the last columns of the table in docs/guarantees.md: what a tenant's own statements reach by
// mistake, and what whoever runs SQL of their own reaches, which is everything of the pool.
func TestASharedPoolStopsAndLeaksWhatTheGuaranteesSay(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		f, tn, tenants := denseFleet(t, tenancy.Config{}, isolation, "acme", "globex")
		db, a, b := tn.DB(), tenancytest.Context(t, tn, "acme"), tenancytest.Context(t, tn, "globex")
		place := placeOf(t, f, tenants[1].ID)
		role := scan[string](t, f.Admin(t, "primary"), `SELECT d.dense_role FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.id = $1`, tenants[1].ID)
		if _, err := db.Exec(b, `INSERT INTO notes (tenant, title) VALUES ('victim', $1)`, treasure); err != nil {
			t.Fatal(err)
		}
		theirs := `SELECT title FROM ` + place.table("notes") + ` WHERE title = $1`

		// Without a tenant, or with another's: nothing is sent.
		if _, err := db.Exec(t.Context(), `SELECT 1`); err == nil {
			t.Error("a forgotten tenant was served")
		}
		tx, err := db.Begin(a)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.Background())
		if _, err := tx.Exec(b, `SELECT 1`); err == nil {
			t.Error("another tenant's context was taken on a transaction")
		}
		if err := tx.Rollback(a); err != nil {
			t.Fatal(err)
		}

		// By mistake: the other's table by its full name.
		var got string
		err = db.QueryRow(a, theirs, treasure).Scan(&got)
		if isolation == tenancy.IsolationSchema && sqlState(err) != "42501" || isolation == tenancy.IsolationShared && err != pgx.ErrNoRows {
			t.Errorf("the other's table by its name: %q, %v", got, err)
		}

		// On purpose: the other's role.
		err = db.InTx(a, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `SET LOCAL ROLE `+pgx.Identifier{role}.Sanitize()); err != nil {
				return err
			}
			return tx.QueryRow(ctx, theirs, treasure).Scan(&got)
		})
		wantLeak(t, "the other's rows, by SQL that takes its role", err == nil && got == treasure, true)
		if err := db.QueryRow(a, `SELECT title FROM notes WHERE title = $1`, treasure).Scan(&got); err != pgx.ErrNoRows {
			t.Errorf("the next call: %q, %v", got, err)
		}

		var saw bool
		if err := db.QueryRow(a, `SELECT count(*) > 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'notes'`, place.Schema).Scan(&saw); err != nil {
			t.Fatal(err)
		}
		wantLeak(t, "the structure of its tables", saw, true)

		if _, err := db.Exec(a, `CREATE TEMP TABLE notes ()`); sqlState(err) != "42501" {
			t.Errorf("a temporary table: %v", err)
		}

		err = db.WithConn(b, func(ctx context.Context, conn *pgx.Conn) error {
			if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(4712)`); err != nil {
				return err
			}
			var free bool
			if err := db.QueryRow(a, `SELECT pg_try_advisory_xact_lock($1)`, 4712).Scan(&free); err != nil {
				return err
			}
			wantLeak(t, "its advisory locks", !free, true)
			if _, err := conn.Exec(ctx, `LISTEN news`); err != nil {
				return err
			}
			if _, err := db.Exec(a, `SELECT pg_notify('news', $1)`, "forged"); err != nil {
				return err
			}
			wantLeak(t, "a forged notification", firstHeard(t, conn) == "forged", true)
			return nil
		})
		if err != nil {
			t.Error(err)
		}

		var lo uint32
		if err := db.QueryRow(b, `SELECT lo_from_bytea(0, convert_to($1, 'UTF8'))`, treasure).Scan(&lo); err != nil {
			t.Fatal(err)
		}
		if err := db.QueryRow(a, `SELECT lo_get($1)`, lo).Scan(new([]byte)); err == nil {
			t.Error("its large object was read by mistake")
		}

		// A lock on its table, by mistake: of a schema that is not its own it is refused, of the common one it is not.
		err = db.InTx(a, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `LOCK TABLE `+place.table("notes")+` IN SHARE MODE NOWAIT`)
			return err
		})
		wantLeak(t, "a lock on its table", err == nil, isolation == tenancy.IsolationShared)
	})
}
