package tenancy_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// overtaker are the verbs of another process in the middle of one that has lost the tenant's lock and does not know it yet.
func overtaker(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID, to tenancy.DataSource) map[string]func() error {
	c := tn.Catalog()
	return map[string]func() error{
		"suspend": func() error { return c.Suspend(t.Context(), id, tenancy.Suspension{}) },
		"delete":  func() error { return c.Delete(t.Context(), id) },
		"move":    func() error { return c.SetDataSource(t.Context(), id, to) },
		"rotate":  func() error { return c.RotatePassword(t.Context(), id) },
	}
}

// TestASwitchThatIsOvertakenSpoilsNothing: the place in use is open, and of a tenant that is out of service none.
func TestASwitchThatIsOvertakenSpoilsNothing(t *testing.T) {
	t.Parallel()
	f, tn, _, globex := twoTenants(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond})
	other := f.Open(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond})
	admin := f.Admin(t, "tenants")
	for _, at := range []string{"enter", "move", "leave"} {
		for _, by := range []string{"suspend", "delete", "move", "rotate"} {
			t.Run(by+"_before_"+at, func(t *testing.T) {
				made := tenancytest.Create(t, tn, by+"-"+at)
				here, there := sourceOf(t, tn, made.ID), prepare(t, tn, made.ID, "")
				err := tenancy.MoveUnlocked(t.Context(), tn, made.ID, there, func(step string) {
					if step != at {
						return
					}
					to := there // wherever the tenant is not
					if step == "leave" {
						to = here
					}
					if err := overtaker(t, other, made.ID, to)[by](); err != nil {
						t.Fatal(err)
					}
				})
				t.Logf("the switch: %v", err)
				if at != "leave" {
					wantError(t, err, tenancy.ErrInProgress)
				}
				wantNothingSpoiled(t, f, tn, made, by)
				now := sourceOf(t, tn, made.ID)
				for _, d := range []tenancy.DataSource{here, there} {
					// One that was prepared and never used is open, for the operator.
					if used := d != there || at == "leave" || by != "rotate"; used && d.Schema != now.Schema {
						for _, login := range loginsOf(t, admin, d.Schema) {
							wantClosed(t, admin, login)
						}
					}
				}
				if by == "delete" {
					if _, err := tn.Catalog().PurgeNow(t.Context(), made.ID, made.Name); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

// wantNothingSpoiled has the validity job end what an overtaken verb has left, and checks that the tenant is served or, after a verb by which it is out of service, closed.
func wantNothingSpoiled(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy, tenant tenancy.Tenant, by string) {
	t.Helper()
	for range 2 {
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Errorf("the validity job: %v", err)
		}
	}
	if by == "delete" { // whose Purge drops what the verb has left
		admin := f.Admin(t, "tenants")
		for _, login := range loginsOf(t, admin, sourceOf(t, tn, tenant.ID).Schema) {
			wantClosed(t, admin, login)
		}
		return
	}
	wantOneLogin(t, f, tn, tenant.ID, by != "suspend")
}

// TestARotationThatIsOvertakenByAnotherVerbSpoilsNothing is TestARotationThatIsOvertakenSpoilsNothing for verbs that are none: ahead of the two steps at which most is
// under way, with TENANCY_LONG=1 of all four.
func TestARotationThatIsOvertakenByAnotherVerbSpoilsNothing(t *testing.T) {
	t.Parallel()
	f, tn, _, globex := twoTenants(t, tenancy.Config{DrainTimeout: 100 * time.Millisecond})
	other := f.Open(t, tenancy.Config{DrainTimeout: 100 * time.Millisecond})
	admin := f.Admin(t, "tenants")
	for at := range tenancy.RotationSteps(tn) {
		if os.Getenv("TENANCY_LONG") != "1" && at != 1 && at != 2 {
			continue
		}
		for _, by := range []string{"suspend", "delete", "move"} {
			t.Run(by+"_before_"+[]string{"intend", "make", "take", "drop"}[at], func(t *testing.T) {
				made := tenancytest.Create(t, tn, fmt.Sprint(by, at))
				here, there := sourceOf(t, tn, made.ID), prepare(t, tn, made.ID, "")
				err := tenancy.RotateUnlocked(t.Context(), tn, made.ID, func(step int) {
					if step != at {
						return
					}
					if err := overtaker(t, other, made.ID, there)[by](); err != nil {
						t.Fatal(err)
					}
				})
				t.Logf("the rotation: %v", err)
				if at < 3 {
					wantError(t, err, tenancy.ErrInProgress)
				}
				wantNothingSpoiled(t, f, tn, made, by)
				if by == "move" {
					for _, login := range loginsOf(t, admin, here.Schema) {
						wantClosed(t, admin, login)
					}
				}
				if by == "delete" {
					if _, err := tn.Catalog().PurgeNow(t.Context(), made.ID, made.Name); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestNoRotationBeginsBeforeTheLastOneHasEnded: a place has two logins at most.
func TestNoRotationBeginsBeforeTheLastOneHasEnded(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, 3); err != nil {
		t.Fatal(err)
	}
	wantError(t, tenancy.RotateUnlocked(t.Context(), tn, acme.ID, func(int) {}), tenancy.ErrInProgress)
	if logins := loginsOf(t, f.Admin(t, "tenants"), sourceOf(t, tn, acme.ID).Schema); len(logins) != 2 {
		t.Errorf("the place has logins %q, want two", logins)
	}
	age(t, f)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestAMoveThatIsOvertakenByAResumeClosesNothing: another process has moved the tenant, which was suspended, and resumed it.
func TestAMoveThatIsOvertakenByAResumeClosesNothing(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond})
	other := f.Open(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond})
	there := prepare(t, tn, acme.ID, "")
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	err := tenancy.MoveLate(t.Context(), tn, acme.ID, there, func() {
		if err := other.Catalog().SetDataSource(t.Context(), acme.ID, there); err != nil {
			t.Fatal(err)
		}
		if err := other.Catalog().Resume(t.Context(), acme.ID); err != nil {
			t.Fatal(err)
		}
	})
	wantError(t, err, tenancy.ErrInProgress)
	if login := sourceOf(t, tn, acme.ID).User; !scan[bool](t, f.Admin(t, "tenants"), `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, login) {
		t.Errorf("the login %s of a tenant in service is closed", login)
	}
}
