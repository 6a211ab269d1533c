package tenancy_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestEachIsolationStopsAndLeaksWhatTheGuaranteesSay is the table of docs/guarantees.md: one tenant's login, with any SQL, looks for what
// another's has. A cell that says "leaks" is shown to, so that nobody takes it for a wall.
func TestEachIsolationStopsAndLeaksWhatTheGuaranteesSay(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	for isolation, leaks := range map[tenancy.Isolation]struct{ structure, lock, tableLock, notify, number bool }{
		tenancy.IsolationDatabase: {},
		tenancy.IsolationSchema:   {structure: true, lock: true, notify: true, number: true},
		tenancy.IsolationShared:   {structure: true, lock: true, tableLock: true, notify: true, number: true},
	} {
		t.Run(string(isolation), func(t *testing.T) {
			a, b := createIn(t, tn, "a-"+string(isolation), isolation), createIn(t, tn, "b-"+string(isolation), isolation)
			victim, attacker := login(t, tn, b.ID), login(t, tn, a.ID)
			place := placeOf(t, f, b.ID)
			must(t, victim, `INSERT INTO notes (tenant, title) VALUES ('victim', '`+treasure+`')`)

			// Without a tenant, or with another's: nothing is sent.
			if _, err := tn.DB().Exec(t.Context(), `SELECT 1`); err == nil {
				t.Error("a forgotten tenant was served")
			}
			tx, err := tn.DB().Begin(entered(t, tn, a.ID))
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback(context.Background())
			if _, err := tx.Exec(entered(t, tn, b.ID), `SELECT 1`); err == nil {
				t.Error("another tenant's context was taken on a transaction")
			}

			// Rows, with any SQL.
			var stolen int
			_ = attacker.QueryRow(t.Context(), `SELECT count(*) FROM `+place.table("notes")+` WHERE title = '`+treasure+`'`).Scan(&stolen) // refused, or finds nothing
			if stolen != 0 {
				t.Errorf("%d rows of the other tenant were read", stolen)
			}

			saw := scan[bool](t, attacker, `SELECT count(*) > 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'notes'`, place.Schema)
			wantLeak(t, "the structure of its tables", saw, leaks.structure)

			if !scan[bool](t, attacker, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, place.Login) {
				t.Error("the name of its login is not seen, and the guarantees say that it leaks")
			}

			must(t, victim, `SELECT pg_advisory_lock(4711)`)
			wantLeak(t, "its advisory locks", !scan[bool](t, attacker, `SELECT pg_try_advisory_lock(4711)`), leaks.lock)

			must(t, attacker, `SET lock_timeout = '100ms'`)
			must(t, attacker, `BEGIN`)
			_, locked := attacker.Exec(t.Context(), `LOCK TABLE `+place.table("notes")+` IN SHARE MODE`)
			wantLeak(t, "a lock on its table", locked == nil, leaks.tableLock)
			must(t, attacker, `ROLLBACK`)

			lo := scan[uint32](t, victim, `SELECT lo_from_bytea(0, convert_to('`+treasure+`', 'UTF8'))`)
			wantLeak(t, "the number of its large object", scan[bool](t, attacker, `SELECT count(*) > 0 FROM pg_largeobject_metadata WHERE oid = $1`, lo), leaks.number)
			if err := attacker.QueryRow(t.Context(), `SELECT lo_get($1)`, lo).Scan(new([]byte)); err == nil {
				t.Error("its large object was read")
			}

			must(t, victim, `LISTEN news`)
			must(t, attacker, `NOTIFY news, 'forged'`)
			must(t, victim, `NOTIFY news, 'own'`)
			wantLeak(t, "a forged notification", firstHeard(t, victim) == "forged", leaks.notify)
		})
	}
}

// firstHeard is the first notification that the connection has.
func firstHeard(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	n, err := conn.WaitForNotification(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return n.Payload
}

func wantLeak(t *testing.T, what string, got, want bool) {
	t.Helper()
	if got != want {
		t.Errorf("%s: reached is %v, the guarantees say %v", what, got, want)
	}
}
