package tenancy_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestVerbsThatWaitForOneTenantHoldUpNoOther has another node at work on acme, and a budget that feeds one verb at a time.
func TestVerbsThatWaitForOneTenantHoldUpNoOther(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	acme, globex := tenants[0], tenants[1]
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant), Limits: tenancy.Limits{ServerConns: 20, PrimaryConns: 3}})
	if n := tenancy.VerbsAtOnce(tn); n != 1 {
		t.Fatalf("%d verbs may be at work, and the test wants 1", n)
	}
	c, primary := tn.Catalog(), f.Admin(t, "primary")
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`, acme.ID)
	migrated := make(chan error, 1)
	go func() { migrated <- second(tn.Migrator().All(t.Context())) }()
	untilTrue(t, "the migrator waits for acme", func() bool { return tenancy.InTurn(tn, acme.ID) == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var waiting sync.WaitGroup
	for range 20 {
		waiting.Go(func() {
			err := c.RotatePassword(ctx, acme.ID)
			wantError(t, err, tenancy.ErrInProgress, "its lock was not free in time")
			wantError(t, err, context.Canceled)
		})
	}
	untilTrue(t, "20 verbs wait for acme", func() bool { return tenancy.InTurn(tn, acme.ID) == 21 })
	bounded, done := context.WithTimeout(t.Context(), 10*time.Second)
	defer done()
	if err := c.Suspend(bounded, globex.ID, tenancy.Suspension{}); err != nil {
		t.Errorf("the other tenant's verb: %v", err)
	}
	cancel()
	waiting.Wait()
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	if err := <-migrated; err != nil {
		t.Error(err)
	}
	for _, tenant := range tenants {
		if v := versionIn(t, f, tenant.ID); v != 2 {
			t.Errorf("%s is at version %d", tenant.Name, v)
		}
	}
	if n := tenancy.InTurn(tn, acme.ID); n != 0 {
		t.Errorf("%d are at work still", n)
	}
}

// TestVerbsOfOneProcessTakeTurns: each goes on when the one before has ended, and who has gone away keeps no turn.
func TestVerbsOfOneProcessTakeTurns(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c := tn.Catalog()
	var verbs sync.WaitGroup
	for range 3 {
		for _, id := range []tenancy.ID{acme.ID, globex.ID} {
			verbs.Go(func() {
				if err := c.RotatePassword(t.Context(), id); err != nil {
					t.Error(err)
				}
			})
			verbs.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
				defer cancel()
				if err := c.RotatePassword(ctx, id); err == nil {
					t.Error("a verb took no millisecond")
				}
			})
		}
	}
	verbs.Wait()
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		wantOneLogin(t, f, tn, id, true)
		if n := tenancy.InTurn(tn, id); n != 0 {
			t.Errorf("%d are at work still", n)
		}
	}
}

// TestAVerbWithoutAPlaceSaysSo: nobody is at work on the tenant.
func TestAVerbWithoutAPlaceSaysSo(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{})
	release := tenancy.BusyVerbs(tn)
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := tn.Catalog().Suspend(ctx, id, tenancy.Suspension{})
		cancel()
		wantError(t, err, tenancy.ErrBusy, "as many verbs are at work", "Limits.ServerConns")
		if errors.Is(err, tenancy.ErrInProgress) {
			t.Errorf("%v: none is at work on the tenant", err)
		}
	}
	release()
	if err := tn.Catalog().Suspend(t.Context(), globex.ID, tenancy.Suspension{}); err != nil {
		t.Error(err)
	}
}
