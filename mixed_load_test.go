package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// mixedTurns is how often a tenant is rotated and moved under calls of every kind: twice, with TENANCY_LONG=1 24 times.
func mixedTurns() int {
	if os.Getenv("TENANCY_LONG") == "1" {
		return 24
	}
	return 2
}

// mixedKinds is how many kinds of calls mixedCall has.
const mixedKinds = 6

// mixedCall is a call that holds its connection for longer than a statement takes: WithConn with pauses, COPY from a slow source, a batch, rows that are read slowly, a
// transaction with a pause, and LISTEN.
func mixedCall(ctx context.Context, db *tenancy.TenantAwareDB, name string, turn int) (written int, err error) {
	pause := func() { time.Sleep(2 * time.Millisecond) } // that the connection is held and idle is the point
	switch turn % mixedKinds {
	case 0:
		return 0, db.WithConn(ctx, func(ctx context.Context, conn *pgx.Conn) error {
			for range 3 {
				if _, err := conn.Exec(ctx, `SELECT pg_sleep(0.003)`); err != nil {
					return err
				}
				pause()
			}
			return nil
		})
	case 1:
		copied, err := db.CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, pgx.CopyFromSlice(20, func(i int) ([]any, error) {
			if i%5 == 0 {
				pause()
			}
			return []any{name, "alone"}, nil
		}))
		return int(copied), err
	case 2:
		b := &pgx.Batch{}
		b.Queue(writeNote, name, "alone")
		foreign := -1
		b.Queue(`SELECT count(*) FROM notes WHERE tenant <> $1`, name).QueryRow(func(row pgx.Row) error { return row.Scan(&foreign) })
		if err := db.SendBatch(ctx, b).Close(); err != nil {
			return 0, err
		}
		if foreign != 0 {
			err = fmt.Errorf("%s reads %d rows of others", name, foreign)
		}
		return 1, err
	case 3:
		rows, err := db.Query(ctx, `SELECT n FROM generate_series(1, 5) n`)
		if err != nil {
			return 0, err
		}
		defer rows.Close()
		for rows.Next() {
			pause()
		}
		return 0, rows.Err()
	case 4:
		return 2, db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, writeNote, name, "pair"); err != nil {
				return err
			}
			pause()
			_, err := tx.Exec(ctx, writeNote, name, "pair")
			return err
		})
	}
	return 0, db.WithConn(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, `LISTEN mixed`); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		_, err := conn.WaitForNotification(wait)
		if errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err) {
			return nil
		}
		return err
	})
}

// TestCallsOfEveryKindOutliveRotationsAndSwitches has two nodes make them while a tenant's password is rotated and it is moved to and fro.
func TestCallsOfEveryKindOutliveRotationsAndSwitches(t *testing.T) {
	t.Parallel()
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase} {
		t.Run(string(isolation), func(t *testing.T) {
			t.Parallel()
			f := tenancytest.NewFleet(t)
			cfg := tenancy.Config{Migrations: noteMigrations, Isolation: isolation, Limits: tenancy.Limits{Nodes: 2, TenantConns: 3}}
			tn, second := f.Open(t, cfg), f.Open(t, cfg)
			acme, globex := tenancytest.Create(t, tn, "acme"), tenancytest.Create(t, tn, "globex")
			here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
			l := startLoadOf(t, mixedCall, mixedKinds, []tenancy.Tenant{acme, globex}, tn, second)
			for i := range mixedTurns() {
				c := []*tenancy.Tenancy{tn, second}[i%2].Catalog()
				if err := c.RotatePassword(t.Context(), acme.ID); err != nil {
					t.Errorf("rotation %d: %v", i, err)
				}
				to := []tenancy.DataSource{there, here}[i%2]
				to.Password = ""
				if err := c.SetDataSource(t.Context(), acme.ID, to); err != nil {
					t.Errorf("switch %d: %v", i, err)
				}
			}
			l.wantNoFailure(nil, nil)
			for tenant, places := range map[string][]tenancy.DataSource{"acme": {here, there}, "globex": {sourceOf(t, tn, globex.ID)}} {
				var rows, foreign int64
				for _, d := range places {
					admin := f.Admin(t, "tenants")
					if isolation == tenancy.IsolationDatabase {
						admin = superuser(t, f.AdminURL, d.Database)
					}
					rows += scan[int64](t, admin, `SELECT count(*) FROM `+tableOf(d))
					foreign += scan[int64](t, admin, `SELECT count(*) FROM `+tableOf(d)+` WHERE tenant <> $1`, tenant)
				}
				if acknowledged := l.writes[tenant].Load(); rows != acknowledged || foreign != 0 {
					t.Errorf("%s: %d rows for %d acknowledged, %d of others", tenant, rows, acknowledged, foreign)
				}
			}
		})
	}
}
