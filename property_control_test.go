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

// forgetful is the router that this library is instead of: one pool for all tenants, a
// search_path set at each checkout, and one checkout in a hundred at which that is forgotten.
type forgetful struct{ *pgxpool.Pool }

func (f forgetful) WithConn(ctx context.Context, fn func(ctx context.Context, conn *pgx.Conn) error) error {
	return f.AcquireFunc(ctx, func(c *pgxpool.Conn) error { return fn(ctx, c.Conn()) })
}

type schemaKey struct{}

func newForgetful(tb testing.TB, admin *pgx.Conn) forgetful {
	tb.Helper()
	cfg, err := pgxpool.ParseConfig(admin.Config().ConnString())
	if err != nil {
		tb.Fatal(err)
	}
	cfg.ConnConfig = admin.Config()
	cfg.MaxConns = 8
	cfg.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		if rand.IntN(100) == 0 {
			return true, nil
		}
		_, err := conn.Exec(ctx, `SET search_path TO `+pgx.Identifier{ctx.Value(schemaKey{}).(string)}.Sanitize())
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
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	admin := f.Admin(t, "tenants")
	router := newForgetful(t, admin)
	var subjects []*subject
	for i := range 3 {
		tenant := tenancytest.Create(t, tn, fmt.Sprintf("tenant-%d", i+1))
		place := placeOf(t, f, tenant.ID)
		subjects = append(subjects, &subject{name: tenant.Name, id: tenant.ID, uid: tenant.UID.String(),
			stays: []stay{{schema: place.Schema, from: time.Now()}}}) // any login
	}
	a := &arena{ledger: newLedger(), kinds: plainOperations, door: func(c *call) bool {
		c.db, c.ctx = router, context.WithValue(c.ctx, schemaKey{}, c.who.current().schema)
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
