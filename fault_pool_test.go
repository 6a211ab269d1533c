package tenancy_test

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
)

// What a pool concludes from what its server says, and how long it lets a caller wait for that.

// TestAServerThatGoesAwayTakesIdleConnectionsAlong, whichever of its three codes says so, and no other does. PostgreSQL says 57P02 and 57P03 while it
// crashes and while it starts, and what stands before one says them at any time.
func TestAServerThatGoesAwayTakesIdleConnectionsAlong(t *testing.T) {
	t.Parallel()
	x := newFaulty(t, tenancy.Config{})
	x.neighbourAtWork()
	for state, goes := range map[string]bool{"57P01": true, "57P02": true, "57P03": true, "57014": false, "57P04": false, "P0001": false} {
		x.warm(4)
		before := x.pids()
		if _, err := x.tn.DB().Exec(x.ctx, `DO $$ BEGIN RAISE 'as told' USING ERRCODE = '`+state+`'; END $$`); sqlState(err) != state {
			t.Errorf("%s: %v", state, err)
		}
		x.settled()
		if goes {
			untilTrue(t, "the connections are gone after "+state, func() bool {
				return !slices.ContainsFunc(x.pids(), func(pid int32) bool { return slices.Contains(before, pid) })
			})
			continue
		}
		x.warm(4)
		if after := x.pids(); !slices.Equal(before, after) {
			t.Errorf("%s replaced connections: %v, then %v", state, before, after)
		}
	}
}

// TestAQuestionTakesNoLongerThanACallMayWait: whether a connection lives is asked for PingTimeout, and at most for AcquireTimeout.
func TestAQuestionTakesNoLongerThanACallMayWait(t *testing.T) {
	t.Parallel()
	const wait = 500 * time.Millisecond
	var idle atomic.Bool // as if connections had been unused for long
	x := newFaulty(t, tenancy.Config{
		Limits: tenancy.Limits{AcquireTimeout: wait, PingTimeout: 30 * time.Second, ConnectTimeout: 30 * time.Second},
		PoolConfig: func(_ context.Context, t tenancy.Tenant, cfg *pgxpool.Config) error {
			if t.Name == "acme" {
				cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return idle.Load() }
			}
			return nil
		}})
	x.neighbourAtWork()
	until(t, 20*time.Second, "", func() string { return outage(x.tryWarm(2)) })
	idle.Store(true)
	x.strait.freeze()
	ctx, cancel := context.WithTimeout(x.ctx, 15*time.Second) // or a failure of this test is a hang
	defer cancel()
	began := time.Now()
	_, err := x.tn.DB().Exec(ctx, `SELECT 1`)
	took := time.Since(began)
	wantError(t, err, tenancy.ErrBusy) // nobody has said no to a connection yet
	t.Logf("failed after %v", took.Round(time.Millisecond))
	if took > 10*wait {
		t.Errorf("failed after %v, want %v for the question and as long for another connection", took, wait)
	}
	x.strait.calm()
	idle.Store(false)
	until(t, 20*time.Second, "", func() string { _, err := x.tn.DB().Exec(x.ctx, `SELECT 1`); return outage(err) })
}

// TestNobodyWaitsInLineForAServerThatIsOutOfReach: a tenant whose breaker is open has no use for the connection that others do not give it.
func TestNobodyWaitsInLineForAServerThatIsOutOfReach(t *testing.T) {
	t.Parallel()
	const wait = 3 * time.Second
	x := newFaulty(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 18, PrimaryConns: 3, TenantConns: 18, AcquireTimeout: wait}})
	x.neighbourAtWork()
	var held []pgx.Tx // all that the budget of acme's server has
	take := func(ctx context.Context, within time.Duration) bool {
		ctx, cancel := context.WithTimeout(ctx, within)
		defer cancel()
		tx, err := x.tn.DB().Begin(ctx)
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if err == nil {
			held = append(held, tx)
		}
		return err == nil
	}
	var last context.Context
	for _, name := range []string{"initech", "hooli"} { // the second one gets what is kept for who has none
		made, err := x.tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Server: "far"})
		if err != nil {
			t.Fatal(err)
		}
		last = entered(t, x.tn, made.ID)
		for take(last, 300*time.Millisecond) {
		}
	}
	defer func() {
		for _, tx := range held {
			_ = tx.Rollback(last)
		}
	}()
	must(x, x.admin, `ALTER ROLE `+x.place.Login+` NOLOGIN`)
	var took time.Duration
	for range 3 {
		tx := held[len(held)-1]
		held = held[:len(held)-1]
		if err := tx.Conn().Close(t.Context()); err != nil { // its place in the budget, too
			t.Fatal(err)
		}
		_ = tx.Rollback(last)
		x.openBreaker()
		if !take(last, wait) {
			t.Fatal("the connection that was given up cannot be had again")
		}
		began := time.Now()
		_, err := x.tn.DB().Exec(x.ctx, `SELECT 1`)
		took = time.Since(began)
		if x.stats().Breaker != "open" { // its pause was over before
			continue
		}
		wantError(t, err, tenancy.ErrTenantUnavailable)
		if e, ok := errors.AsType[*tenancy.Error](err); !ok || sqlState(err) != "28000" || e.RetryAfter <= 0 || took > wait/2 {
			t.Errorf("after %v: %#v", took, err)
		}
		return
	}
	t.Errorf("each of three calls waited until the breaker was open no more, the last one for %v", took)
}
