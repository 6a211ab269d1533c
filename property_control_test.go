package tenancy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// forgetful is the router that this library is instead of: one pool for all tenants, whose session is made the tenant's at each checkout (by a
// search_path, or in shared tables by a login), and one checkout in thirty at which that is forgotten.
type forgetful struct{ *pgxpool.Pool }

func (f forgetful) WithConn(ctx context.Context, fn func(ctx context.Context, conn *pgx.Conn) error) error {
	return f.AcquireFunc(ctx, func(c *pgxpool.Conn) error { return fn(ctx, c.Conn()) })
}

type entryKey struct{} // of the SQL that makes a session the tenant's

func newForgetful(tb testing.TB, admin *pgx.Conn) forgetful {
	tb.Helper()
	cfg, err := pgxpool.ParseConfig(admin.Config().ConnString())
	if err != nil {
		tb.Fatal(err)
	}
	cfg.ConnConfig = admin.Config()
	cfg.MaxConns = 8
	cfg.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		if rand.IntN(30) == 0 {
			return true, nil
		}
		_, err := conn.Exec(ctx, ctx.Value(entryKey{}).(string))
		return err == nil, err
	}
	pool, err := pgxpool.NewWithConfig(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(pool.Close)
	return forgetful{pool}
}

// TestTheOraclesFindAForgetfulRouter is the control of TestNothingCrosses: the same bursts and oracles, put on a router
// that forgets, have to find its crossings by each of the three ways.
func TestTheOraclesFindAForgetfulRouter(t *testing.T) {
	t.Parallel()
	for _, as := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationShared} {
		t.Run(string(as), func(t *testing.T) { findForgetfulRouter(t, as) })
	}
}

func findForgetfulRouter(t *testing.T, as tenancy.Isolation) {
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: as})
	admin := f.Admin(t, "tenants")
	router := newForgetful(t, admin)
	var subjects []*subject
	entry := map[*subject]string{}
	for i := range 3 {
		tenant := tenancytest.Create(t, tn, fmt.Sprintf("tenant-%d", i+1))
		place := placeOf(t, f, tenant.ID)
		s := &subject{name: tenant.Name, id: tenant.ID, uid: tenant.UID.String(), shared: as == tenancy.IsolationShared,
			stays: []stay{{schema: place.Schema, from: time.Now()}}} // any login
		entry[s] = `SET search_path TO ` + pgx.Identifier{place.Schema}.Sanitize()
		if s.shared {
			entry[s] += `; SET SESSION AUTHORIZATION ` + pgx.Identifier{place.Login}.Sanitize()
		}
		subjects = append(subjects, s)
	}
	a := &arena{ledger: newLedger(), kinds: plainOperations, door: func(c *call) bool {
		c.db, c.ctx = router, context.WithValue(c.ctx, entryKey{}, entry[c.who])
		return true
	}}
	a.burst(1, 3000, subjects, nil)
	a.audit(t, admin, subjects)
	t.Logf("%d statements, %d crossings", a.ops.Load(), a.crossings())
	for _, k := range []kind{foreignRow, foreignConn, foreignPlace} {
		t.Logf("%s: %d times", k, a.count(k))
		if a.count(k) == 0 {
			t.Errorf("%s: not found, though the router forgets", k)
		}
	}
}
