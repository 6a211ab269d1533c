package tenancy_test

import (
	"context"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// slowCommits makes a COMMIT that follows a write take 20 ms.
var slowCommits = fstest.MapFS{"migrations/00001_notes.sql": {Data: []byte(`-- +goose Up
CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL, title text NOT NULL);
-- +goose StatementBegin
CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_catalog.pg_sleep(0.02); RETURN NULL; END $$;
-- +goose StatementEnd
CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION nap();
-- +goose Down
DROP TABLE notes;
`)}}

// TestATenantThatLeavesTheSharedPoolEndsNobodyElsesTransaction, whatever a session of another tenant ran last.
func TestATenantThatLeavesTheSharedPoolEndsNobodyElsesTransaction(t *testing.T) {
	t.Parallel()
	const read = `SELECT count(*) FROM notes`
	const pause = 300 * time.Millisecond // longer than the drain
	for name, work := range map[string]func(ctx context.Context, tx pgx.Tx) error{
		"commits": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, $1)`, "globex")
			return err
		},
		"has_begun": func(ctx context.Context, tx pgx.Tx) error {
			time.Sleep(pause)
			return tx.QueryRow(ctx, read).Scan(new(int))
		},
		"has_a_savepoint": func(ctx context.Context, tx pgx.Tx) error {
			return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
				time.Sleep(pause)
				return tx.QueryRow(ctx, read).Scan(new(int))
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := tenancytest.NewFleet(t)
			tn := f.Open(t, tenancy.Config{Migrations: slowCommits, DrainTimeout: 200 * time.Millisecond})
			acme, other := createIn(t, tn, "acme", tenancy.IsolationSchema), createIn(t, tn, "globex", tenancy.IsolationSchema)
			for _, id := range []tenancy.ID{acme.ID, other.ID} {
				if err := tn.Catalog().SetDense(t.Context(), id, true); err != nil {
					t.Fatal(err)
				}
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			globex := tenancytest.Context(t, tn, "globex")
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					for ctx.Err() == nil {
						if err := tn.DB().InTx(globex, pgx.TxOptions{}, work); err != nil {
							t.Errorf("a transaction of globex, which moves nowhere: %v", err)
							return
						}
					}
				})
			}
			for i := range 6 {
				if err := tn.Catalog().SetDense(t.Context(), acme.ID, i%2 == 1); err != nil {
					t.Error(err)
				}
			}
			stop()
			clients.Wait()
		})
	}
}
