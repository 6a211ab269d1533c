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

func TestWhoHasLostTheTenantsLockEndsNoMembership(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, DrainTimeout: time.Minute, Isolation: tenancy.IsolationSchema})
	admin, primary := f.Admin(t, "tenants"), f.Admin(t, "primary")
	for _, name := range []string{"acme", "globex"} {
		tenant := create(t, f, tn, name)
		busy := login(t, tn, tenant.ID)
		must(t, busy, `BEGIN`)
		must(t, busy, `SELECT 1`)
		ctx, cancel := context.WithCancel(t.Context())
		suspended := make(chan error, 1)
		go func() { suspended <- tn.Catalog().Suspend(ctx, tenant.ID, tenancy.Suspension{}) }()
		until(t, 10*time.Second, "true", func() string {
			return fmt.Sprint(len(actsFor(t, f, admin)) > 0 && !scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, placeOf(t, f, tenant.ID).Login))
		})
		want := 0
		if name == "globex" { // the last, whose memberships stay
			want = 2 // owner and login
			must(t, primary, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
		} else {
			cancel()
		}
		if err := <-suspended; err == nil {
			t.Errorf("%s: nothing was in the way of Suspend", name)
		}
		cancel()
		if left := actsFor(t, f, admin); len(left) != want {
			t.Errorf("%s: the provisioner is a member of %v, want %d", name, left, want)
		}
	}
}

func TestDropPlaceLocksThePlace(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	primary, cat := f.Admin(t, "primary"), tn.Catalog()
	acme := create(t, f, tn, "acme")
	for key, id := range map[string]tenancy.ID{`'tenancy uid ' || uid`: 0, fmt.Sprintf(`'tenancy tenant %d'`, acme.ID): acme.ID} {
		d, err := cat.Prepare(t.Context(), id, "")
		if err != nil {
			t.Fatal(err)
		}
		must(t, primary, `SELECT pg_advisory_lock(hashtextextended(`+key+`, 0)) FROM tenancy.data_sources WHERE schema = $1`, d.Schema)
		wantError(t, cat.DropPlace(t.Context(), d), tenancy.ErrInProgress)
		must(t, primary, `SELECT pg_advisory_unlock_all()`)
		if err := cat.DropPlace(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
}

func TestAMembershipThatAnotherVerbEndsIsMadeAgain(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	admin, provisioner := f.Admin(t, "tenants"), connectURL(t, f.ServerURL)
	owner := placeOf(t, f, create(t, f, tn, "acme").ID).Owner
	create(t, f, tn, "globex")
	must(t, provisioner, "GRANT "+owner+" TO "+fleetName(t, f)+"_provisioner"+with(t, f))
	// It ends while the reader's rights are half given.
	must(t, admin, `BEGIN`)
	must(t, admin, `LOCK TABLE pg_default_acl IN ACCESS EXCLUSIVE MODE`)
	added := make(chan error, 1)
	go func() { _, err := tn.Catalog().AddReader(t.Context(), "main"); added <- err }()
	until(t, 10*time.Second, "1", func() string {
		return fmt.Sprint(scan[int](t, provisioner, `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tenancy provisioner' AND wait_event_type = 'Lock' AND datname = current_database()`))
	})
	must(t, provisioner, "REVOKE "+owner+" FROM "+fleetName(t, f)+"_provisioner")
	must(t, admin, `ROLLBACK`)
	if err := <-added; err != nil {
		t.Error(err)
	}
	if left := actsFor(t, f, admin); slices.Contains(left, owner) {
		t.Errorf("the provisioner is a member of %v", left)
	}
}

func TestDropReaderActsForAFewOwnersAtOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	admin := f.Admin(t, "tenants")
	acme := placeOf(t, f, create(t, f, tn, "acme").ID)
	create(t, f, tn, "globex")
	d, err := tn.Catalog().AddReader(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	must(t, admin, `CREATE FUNCTION `+acme.table("by_hand")+`() RETURNS int LANGUAGE sql AS 'SELECT 1'`)
	must(t, admin, `ALTER FUNCTION `+acme.table("by_hand")+` OWNER TO `+acme.Owner)
	must(t, admin, `GRANT EXECUTE ON FUNCTION `+acme.table("by_hand")+` TO `+d.User)
	must(t, admin, fmt.Sprintf(`DO $$ DECLARE place text; BEGIN FOR i IN 1..70 LOOP
		place := 't_' || left(md5(random()::text), 20);
		EXECUTE format('CREATE ROLE %%I', place || '_o');
		IF current_setting('server_version_num')::int >= 160000 THEN EXECUTE format('GRANT %%I TO %[1]s_provisioner WITH ADMIN OPTION', place || '_o'); END IF;
		EXECUTE format('CREATE SCHEMA %%I AUTHORIZATION %%I', place, place || '_o');
		EXECUTE format('GRANT USAGE ON SCHEMA %%I TO %[2]s', place);
		END LOOP; END $$`, fleetName(t, f), d.User))
	must(t, admin, `CREATE TABLE public.seen (owners int)`)
	must(t, admin, fmt.Sprintf(`CREATE FUNCTION public.see() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
		INSERT INTO public.seen SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
			WHERE m.grantor = m.member AND m.member = '%s_provisioner'::regrole AND r.rolname ~ '^t_.*_o$'; END $$`, fleetName(t, f)))
	must(t, admin, `CREATE EVENT TRIGGER see ON ddl_command_end WHEN TAG IN ('REVOKE', 'DROP OWNED') EXECUTE FUNCTION public.see()`)
	if err := tn.Catalog().DropReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, admin, `SELECT coalesce(max(owners), 0) FROM public.seen`); n == 0 || n > 50 {
		t.Errorf("the provisioner was a member of %d owners at once, want 1 to 50", n)
	}
	if left := actsFor(t, f, admin); len(left) != 0 || scan[bool](t, admin, `SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)`, d.User) {
		t.Errorf("there is the reader, or the provisioner is a member of %v", left)
	}
}
