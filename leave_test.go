package tenancy_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestAFrozenServerKeepsNoVerbThatHasDoneItsWork freezes the server of what the tenant leaves, when it is closed there. The caller sets no bound.
func TestAFrozenServerKeepsNoVerbThatHasDoneItsWork(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond})
	far := tenancytest.NewFleet(t)
	way := newStrait(t, far.ServerURL)
	c, admin := tn.Catalog(), far.Admin(t, "tenants")
	if err := c.AddServer(t.Context(), tenancy.ServerConfig{Name: "far", URL: way.url}); err != nil {
		t.Fatal(err)
	}
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "far")
	if err := c.SetDataSource(t.Context(), acme.ID, there); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"rotation", "switch"} {
		leaves := sourceOf(t, tn, acme.ID)
		tenancy.SetLeaveTime(tn, 500*time.Millisecond)
		way.freezeAt(" NOLOGIN")
		left := make(chan error, 1)
		go func() { left <- leavers(t, tn, acme.ID, here)[name]() }()
		select {
		case err := <-left:
			wantError(t, err, tenancy.ErrNotClosed)
		case <-time.After(50 * time.Second):
			t.Fatalf("%s: it goes on", name)
		}
		if now := sourceOf(t, tn, acme.ID); now.User == leaves.User {
			t.Errorf("%s: the tenant's login is %s still", name, now.User)
		}
		way.calm()
		tenancy.SetLeaveTime(tn, time.Minute)
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantClosed(t, admin, leaves.User)
	}
	for id, want := range map[tenancy.ID]string{acme.ID: here.Schema, globex.ID: placeOf(t, f, globex.ID).Schema} {
		if got := current(t, tn, id); got != want {
			t.Errorf("work is done in %s, want %s", got, want)
		}
	}
}

// TestACallThatEndsInItsCommitDoesNotSayThatNothingWasDone: the answer is on its way when the caller goes.
func TestACallThatEndsInItsCommitDoesNotSayThatNothingWasDone(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	there, row := prepare(t, tn, acme.ID, ""), f.Admin(t, "primary")
	for _, name := range []string{"rotation", "switch"} {
		way := newStrait(t, f.PrimaryURL)
		through := *f
		through.PrimaryURL = way.url
		other := through.Open(t, tenancy.Config{DrainTimeout: 500 * time.Millisecond})
		verb := func(ctx context.Context) error { return other.Catalog().SetDataSource(ctx, acme.ID, there) }
		if name == "rotation" {
			verb = func(ctx context.Context) error { return other.Catalog().RotatePassword(ctx, acme.ID) }
		}
		before := sourceOf(t, tn, acme.ID)

		// Before its COMMIT nothing was done, and it is the caller's doing alone.
		must(t, row, `BEGIN`)
		must(t, row, `SELECT FROM tenancy.tenants WHERE id = $1 FOR UPDATE`, acme.ID)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- verb(ctx) }()
		watch := f.Admin(t, "primary")
		until(t, 20*time.Second, "1", func() string { return waiting(t, watch, "tenancy") })
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) || errors.Is(err, tenancy.ErrPrimaryUnavailable) {
			t.Errorf("%s: before its COMMIT: %v", name, err)
		}
		must(t, row, `ROLLBACK`)
		if now := sourceOf(t, tn, acme.ID); now != before {
			t.Errorf("%s: the login of a call that ended before its COMMIT is taken", name)
		}

		way.freezeAt("commit")
		ctx, cancel = context.WithCancel(t.Context())
		go func() { ended <- verb(ctx) }()
		untilTrue(t, "the verb is done", func() bool { return sourceOf(t, tn, acme.ID).User != before.User })
		cancel()
		err := <-ended
		wantError(t, err, tenancy.ErrPrimaryUnavailable)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
		way.calm()
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantClosed(t, f.Admin(t, "tenants"), before.User)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestAFenceClosesTheLoginBeforeItWaitsForAnything: others' work on the tenant's roles is in the way of what comes after.
func TestAFenceClosesTheLoginBeforeItWaitsForAnything(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: 500 * time.Millisecond, Isolation: tenancy.IsolationSchema})
	p, admin, blocker := placeOf(t, f, acme.ID), f.Admin(t, "tenants"), f.Admin(t, "tenants")
	provisioner := scan[string](t, admin, `SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()`)
	must(t, blocker, `BEGIN`)
	must(t, blocker, `SET LOCAL ROLE `+provisioner)
	must(t, blocker, `GRANT `+p.Owner+` TO `+provisioner) // the fence's own grant waits for this one
	suspended := make(chan error, 1)
	go func() { suspended <- tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}) }()
	untilTrue(t, "the login is closed", func() bool {
		return !scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, p.Login)
	})
	select {
	case err := <-suspended:
		t.Errorf("it waits for nothing, and the test shows nothing: %v", err)
	default:
	}
	must(t, blocker, `ROLLBACK`)
	if err := <-suspended; err != nil {
		t.Error(err)
	}
	wantClosed(t, admin, p.Login)
	if got := current(t, tn, globex.ID); got != placeOf(t, f, globex.ID).Schema {
		t.Errorf("the other tenant is in %s", got)
	}
}
