package tenancy_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// actsFor are the roles of the fleet's places that the provisioner has made itself a member of.
func actsFor(tb testing.TB, f *tenancytest.Fleet, admin *pgx.Conn) []string {
	tb.Helper()
	rows, _ := admin.Query(tb.Context(), `SELECT r.rolname::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
		WHERE m.member = ($1 || '_provisioner')::regrole AND m.grantor = m.member AND r.rolname ~ '^t_' ORDER BY 1`, fleetName(tb, f))
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		tb.Fatal(err)
	}
	return roles
}

func TestTheProvisionerActsForATenantsRolesWhileAVerbIsAtWork(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, DrainTimeout: 100 * time.Millisecond, Isolation: tenancy.IsolationSchema})
	f.AllowDatabases(t)
	admin, primary, cat := f.Admin(t, "tenants"), f.Admin(t, "primary"), tn.Catalog()
	// Of an area and of a shared pool's login it is a member for good.
	own := func() []string {
		of := scan[[]string](t, primary, `SELECT coalesce(array_agg(role), '{}') FROM (SELECT unnest(ARRAY[owner, runtime]) role FROM tenancy.shared_areas UNION ALL SELECT login FROM tenancy.dense_logins) r`)
		return slices.DeleteFunc(actsFor(t, f, admin), func(role string) bool { return slices.Contains(of, role) })
	}
	nobody := func(after string) {
		t.Helper()
		if left := own(); len(left) != 0 {
			t.Errorf("after %s the provisioner is a member of %v", after, left)
		}
	}
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase, tenancy.IsolationShared} {
		var ids []tenancy.ID
		for _, name := range []string{"acme", "globex"} {
			tenant, err := cat.Create(t.Context(), tenancy.NewTenant{Name: name + "-" + string(isolation), Isolation: isolation})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, tenant.ID)
		}
		nobody("Create")
		// A session at work is seen, waited for and ended by who is no member before.
		busy := login(t, tn, ids[0])
		ended := make(chan error, 1)
		go func() { _, err := busy.Exec(context.Background(), `SELECT pg_sleep(60)`); ended <- err }()
		for scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND state = 'active'`, busy.PgConn().PID()) == 0 {
			time.Sleep(time.Millisecond)
		}
		type verb struct {
			name string
			run  func() error
		}
		verbs := []verb{
			{"Suspend", func() error { return cat.Suspend(t.Context(), ids[0], tenancy.Suspension{}) }},
			{"RotatePassword", func() error { return cat.RotatePassword(t.Context(), ids[0]) }},
			{"Resume", func() error { return cat.Resume(t.Context(), ids[0]) }},
			{"Verify", func() error {
				drifts, err := tn.Migrator().Verify(t.Context(), ids...)
				if err == nil && len(drifts) > 0 {
					err = fmt.Errorf("%v: %w", drifts, drifts[0].Err)
				}
				return err
			}},
		}
		if isolation != tenancy.IsolationDatabase {
			verbs = append(verbs, verb{"SetDense", func() error { return cat.SetDense(t.Context(), ids[0], true) }},
				verb{"SetDense, back", func() error { return cat.SetDense(t.Context(), ids[0], false) }})
		}
		verbs = append(verbs, verb{"Delete", func() error { return cat.Delete(t.Context(), ids[0]) }},
			verb{"Purge", func() error { _, err := cat.PurgeNow(t.Context(), ids[0], "acme-"+string(isolation)); return err }})
		for _, v := range verbs {
			if err := v.run(); err != nil {
				t.Fatalf("%s, %s: %v", isolation, v.name, err)
			}
			nobody(v.name)
		}
		if err := <-ended; sqlState(err) != "57P01" {
			t.Errorf("%s: the session of a suspended tenant ended with %v", isolation, err)
		}
		conn := login(t, tn, ids[1])
		if isolation != tenancy.IsolationShared && scan[bool](t, conn, `SELECT has_schema_privilege($1, 'USAGE')`, placeOf(t, f, ids[1]).Schema) != true {
			t.Error("the other tenant is not served")
		}
	}
}

func TestMembershipsThatWereLeftAreEndedWhereNoVerbIsAtWork(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	admin, primary := f.Admin(t, "tenants"), f.Admin(t, "primary")
	provisioner := connectURL(t, f.ServerURL)
	var places []placeRow
	var ids []tenancy.ID
	for _, name := range []string{"acme", "globex"} {
		tenant := create(t, f, tn, name)
		ids, places = append(ids, tenant.ID), append(places, placeOf(t, f, tenant.ID))
	}
	join := "GRANT %s TO " + fleetName(t, f) + "_provisioner" + with(t, f)
	for _, p := range places {
		for _, role := range []string{p.Owner, p.Runtime, p.Login} {
			must(t, provisioner, fmt.Sprintf(join, role))
		}
	}
	refresh := func() {
		t.Helper()
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	must(t, primary, `INSERT INTO tenancy.nodes (id, name, epoch) SELECT gen_random_uuid(), 'before', epoch + 1000 FROM tenancy.epoch`)
	refresh()
	create(t, f, tn, "initech")
	if left := actsFor(t, f, admin); len(left) != 9 {
		t.Errorf("beside a node of the release before, the provisioner is a member of %v, want of all roles of three tenants", left)
	}
	must(t, primary, `DELETE FROM tenancy.nodes WHERE name = 'before'`)
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`, ids[0])
	refresh()
	if left := actsFor(t, f, admin); len(left) != 3 || !slices.Contains(left, places[0].Owner) {
		t.Errorf("while a verb is at work on %s the provisioner is a member of %v", places[0].Schema, left)
	}
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	refresh()
	if left := actsFor(t, f, admin); len(left) != 0 {
		t.Errorf("the provisioner is a member of %v", left)
	}
}
