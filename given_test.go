package tenancy_test

import (
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
)

// TestWhatALoginWasGivenGoesWithIt: nothing that it was given by hand, or gave away itself, keeps a rotation from its end.
func TestWhatALoginWasGivenGoesWithIt(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond})
	admin, p := f.Admin(t, "tenants"), placeOf(t, f, acme.ID)
	for what, give := range map[string]func(d tenancy.DataSource){
		"by_hand": func(d tenancy.DataSource) { must(t, admin, `GRANT SELECT ON `+tableOf(d)+` TO `+d.User) },
		"by_the_owner": func(d tenancy.DataSource) {
			must(t, admin, `SET ROLE `+p.Owner)
			must(t, admin, `GRANT SELECT ON `+tableOf(d)+` TO `+d.User)
			must(t, admin, `RESET ROLE`)
		},
		"by_itself": func(d tenancy.DataSource) {
			own := login(t, tn, acme.ID)
			must(t, own, `ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC`)
			must(t, own, `ALTER DEFAULT PRIVILEGES IN SCHEMA `+d.Schema+` GRANT SELECT ON TABLES TO PUBLIC`)
			must(t, own, `DO $$ BEGIN EXECUTE format('GRANT SELECT ON LARGE OBJECT %s TO PUBLIC', lo_create(0)); END $$`)
			must(t, own, `ALTER ROLE CURRENT_USER SET work_mem = '5MB'`)
			_ = own.Close(t.Context())
		},
	} {
		give(sourceOf(t, tn, acme.ID))
		if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Errorf("%s: the validity job: %v", what, err)
		}
		wantOneLogin(t, f, tn, acme.ID, true)
	}
	wantOneLogin(t, f, tn, globex.ID, true)
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid WHERE r.rolname = $1 AND m.grantor = m.member`, p.Owner); n != 0 {
		t.Error("the provisioner is a member of the tenant's owner when no verb is at work")
	}
}

// TestWhatADenseRoleWasGivenGoesWithIt is the same for the role that a tenant's calls take in a shared pool.
func TestWhatADenseRoleWasGivenGoesWithIt(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond, Isolation: tenancy.IsolationSchema})
	admin, d := f.Admin(t, "tenants"), sourceOf(t, tn, acme.ID)
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := tn.Catalog().SetDense(t.Context(), id, true); err != nil {
			t.Fatal(err)
		}
	}
	role := scan[string](t, f.Admin(t, "primary"), `SELECT dense_role FROM tenancy.data_sources WHERE schema = $1`, d.Schema)
	must(t, admin, `GRANT SELECT ON `+tableOf(d)+` TO `+role)
	if err := tn.Catalog().SetDense(t.Context(), acme.ID, false); err != nil {
		t.Error(err)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, role); n != 0 {
		t.Errorf("role %s is left", role)
	}
	for id, want := range map[tenancy.ID]string{acme.ID: d.Schema, globex.ID: placeOf(t, f, globex.ID).Schema} {
		if got := current(t, tn, id); got != want {
			t.Errorf("work is done in %s, want %s", got, want)
		}
	}
}
