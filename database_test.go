package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/tenancytest"
)

// createIn makes an active tenant of the isolation, whose table notes holds one row of its own.
func createIn(tb testing.TB, tn *tenancy.Tenancy, name string, isolation tenancy.Isolation) tenancy.Tenant {
	tb.Helper()
	made, err := tn.Catalog().Create(tb.Context(), tenancy.NewTenant{Name: name, Isolation: isolation})
	if err != nil {
		tb.Fatal(err)
	}
	if made.Isolation != isolation {
		tb.Fatalf("made %+v, want isolation %s", made, isolation)
	}
	conn := login(tb, tn, made.ID)
	must(tb, conn, "INSERT INTO notes (tenant, title) VALUES ($1, $1)", name)
	_ = conn.Close(tb.Context())
	return made
}

// mixedFleet is a node on a fleet whose server can make databases, with two tenants that have one each, and one in a schema.
func mixedFleet(t *testing.T) (f *tenancytest.Fleet, tn *tenancy.Tenancy, acme, globex, initech tenancy.Tenant) {
	t.Helper()
	f = tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	tn = f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	return f, tn, createIn(t, tn, "acme", tenancy.IsolationDatabase), createIn(t, tn, "globex", tenancy.IsolationDatabase), createIn(t, tn, "initech", tenancy.IsolationSchema)
}

// databasesOf are the databases of tenants' own that the fleet has at its server.
func databasesOf(tb testing.TB, f *tenancytest.Fleet) []string {
	tb.Helper()
	return scan[[]string](tb, f.Admin(tb, "tenants"), `SELECT coalesce(array_agg(datname::text ORDER BY datname), '{}') FROM pg_database
		WHERE datname ~ '^t_[0-9a-f]{20}$' AND datdba = (SELECT datdba FROM pg_database WHERE datname = current_database())`)
}

// assertDatabases checks that the server has the databases of the primary's places, and no other.
func assertDatabases(tb testing.TB, f *tenancytest.Fleet) {
	tb.Helper()
	listed := scan[[]string](tb, f.Admin(tb, "primary"), `SELECT coalesce(array_agg(database ORDER BY database), '{}') FROM tenancy.data_sources WHERE state <> 'dropped' AND isolation = 'database'`)
	if found := databasesOf(tb, f); !slices.Equal(found, listed) {
		tb.Errorf("the server has the databases %q, the primary lists %q", found, listed)
	}
}

func TestOneServiceServesTenantsOfEachIsolation(t *testing.T) {
	t.Parallel()
	f, tn, acme, _, initech := mixedFleet(t)
	node := f.Open(t, tenancy.Config{Isolation: tenancy.IsolationSchema})
	for _, n := range []*tenancy.Tenancy{tn, node} {
		for _, name := range []string{"acme", "globex", "initech"} {
			var got string
			ctx := tenancytest.Context(t, n, name)
			if err := n.DB().QueryRow(ctx, `SELECT string_agg(tenant, ',') FROM notes`).Scan(&got); err != nil || got != name {
				t.Errorf("%s reads the rows of %q: %v", name, got, err)
			}
			if _, err := n.DB().Exec(ctx, `INSERT INTO notes (tenant, title) SELECT $1, title FROM notes LIMIT 0`, name); err != nil {
				t.Error(err)
			}
		}
	}
	d, err := tn.Catalog().DataSource(t.Context(), acme.ID)
	if p := placeOf(t, f, acme.ID); err != nil || d.Database != p.Schema || d.Schema != p.Schema {
		t.Errorf("its data source is %v, %v", d, err)
	}
	if d, err = tn.Catalog().DataSource(t.Context(), initech.ID); err != nil || d.Database != fleetName(t, f)+"_tenants" {
		t.Errorf("the schema tenant's data source is %v, %v", d, err)
	}
	assertDatabases(t, f)
	for _, name := range databasesOf(t, f) {
		acl := scan[[]string](t, f.Admin(t, "tenants"), `SELECT array_agg(DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END) FROM pg_database, aclexplode(datacl) WHERE datname = $1`, name)
		if want := []string{fleetName(t, f) + "_provisioner", name + "_o", name + "_r"}; !slices.Equal(slices.Sorted(slices.Values(acl)), slices.Sorted(slices.Values(want))) {
			t.Errorf("database %s is open to %q, want %q", name, acl, want)
		}
	}
	done, err := tn.Migrator().All(t.Context())
	if err != nil || len(done) != 3 {
		t.Errorf("migrated %+v, %v", done, err)
	}
}

// A tenant's login gets into its own database and into no other one of the fleet, whoever has how much of it.
func TestLoginsConnectToTheirOwnDatabaseAlone(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, initech := mixedFleet(t)
	admin := f.Admin(t, "tenants")
	name := fleetName(t, f)
	source := map[string]tenancy.DataSource{}
	for _, tenant := range []tenancy.Tenant{acme, globex, initech} {
		d, err := tn.Catalog().SourceForTest(t.Context(), tenant.ID)
		if err != nil {
			t.Fatal(err)
		}
		source[tenant.Name] = d
	}
	elsewhere := []string{name + "_primary", name + "_tenants_template"}
	for of, d := range source {
		owner := d
		owner.User = d.Schema + "_o"
		must(t, admin, `ALTER ROLE `+owner.User+` LOGIN PASSWORD '`+owner.Password.Reveal()+`'`) // as a migration does for its time
		for _, at := range []tenancy.DataSource{d, owner} {
			if _, err := connectTo(t, at); err != nil {
				t.Errorf("%s does not get into its own database: %v", at.User, err)
			}
			for other, o := range source {
				if o.Database != d.Database {
					at.Database, at.Schema = o.Database, ""
					if _, err := connectTo(t, at); sqlState(err) != "42501" {
						t.Errorf("%s of %s connecting to the database of %s: %v, want 42501", at.User, of, other, err)
					}
				}
			}
			for _, database := range elsewhere {
				at.Database, at.Schema = database, ""
				if _, err := connectTo(t, at); sqlState(err) != "42501" {
					t.Errorf("%s of %s connecting to %s: %v, want 42501", at.User, of, database, err)
				}
			}
		}
	}
}

// What is shared within a database is not shared by tenants with one each, whose login tries all that an injection could.
func TestNothingOfADatabaseIsSeenFromAnother(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, initech := mixedFleet(t)
	victim, attacker, neighbour := login(t, tn, globex.ID), login(t, tn, acme.ID), login(t, tn, initech.ID)
	must(t, victim, `INSERT INTO notes (tenant, title) VALUES ('globex', '`+treasure+`')`)
	must(t, victim, `SELECT pg_advisory_lock(4711)`)
	lo := scan[uint32](t, victim, `SELECT lo_from_bytea(0, convert_to('`+treasure+`', 'UTF8'))`)
	must(t, victim, `CREATE TEMP TABLE open AS SELECT 1`)
	must(t, victim, `LISTEN news`)
	place := placeOf(t, f, globex.ID)
	for _, conn := range []*pgx.Conn{attacker, neighbour} {
		who := conn.Config().User
		if !scan[bool](t, conn, `SELECT pg_try_advisory_lock(4711)`) {
			t.Errorf("%s finds an advisory lock of another database taken", who)
		}
		if n := scan[int](t, conn, `SELECT count(*) FROM pg_namespace WHERE nspname = $1`, place.Schema); n != 0 {
			t.Errorf("%s sees the schema of another database", who)
		}
		if n := scan[int](t, conn, `SELECT count(*) FROM pg_largeobject_metadata WHERE oid = $1`, lo); n != 0 {
			t.Errorf("%s sees a large object of another database", who)
		}
		if err := conn.QueryRow(t.Context(), `SELECT lo_get($1)`, lo).Scan(new([]byte)); sqlState(err) != "42704" {
			t.Errorf("%s reads a large object of another database: %v, want 42704", who, err)
		}
		for _, reach := range []struct{ state, sql string }{
			{"42P01", `SELECT title FROM ` + place.table("notes")},
			{"0A000", `SELECT title FROM ` + place.Schema + `.` + place.table("notes")},
			{"42501", `CREATE EXTENSION dblink`},
			{"42501", `CREATE EXTENSION postgres_fdw`},
			{"42501", `ALTER DATABASE ` + place.Schema + ` RENAME TO evil`},
			{"42501", `ALTER DATABASE ` + place.Schema + ` ALLOW_CONNECTIONS false`},
			{"42501", `DROP DATABASE ` + place.Schema},
			{"42501", `CREATE DATABASE evil TEMPLATE ` + place.Schema},
			{"42501", `ALTER DATABASE ` + conn.Config().Database + ` SET search_path = public`},
			{"42501", `CREATE SCHEMA evil`},
			{"42501", `CREATE TABLE tenancy_ref.evil ()`},
			{"42501", `CREATE TABLE public.evil ()`},
			{"42501", `SET ROLE ` + place.Runtime},
			{"42501", `SET ROLE ` + fleetName(t, f) + `_provisioner`},
			{"42501", `SELECT pg_terminate_backend(` + fmt.Sprint(victim.PgConn().PID()) + `)`},
		} {
			if _, err := conn.Exec(t.Context(), reach.sql); sqlState(err) != reach.state {
				t.Errorf("%s: %s: %v, want %s", who, reach.sql, err, reach.state)
			}
		}
		for _, without := range []string{`GRANT CONNECT ON DATABASE ` + place.Schema + ` TO ` + who, `GRANT CONNECT ON DATABASE ` + conn.Config().Database + ` TO PUBLIC`} {
			_, _ = conn.Exec(t.Context(), without) // refused or answered with a warning: what it did is looked at
		}
		must(t, conn, `NOTIFY news, 'from `+who+`'`)
	}
	if scan[bool](t, f.Admin(t, "tenants"), `SELECT bool_or(grantee = 0) FROM pg_database, aclexplode(datacl) WHERE datname = $1 OR datname = $2`, place.Schema, attacker.Config().Database) {
		t.Error("a tenant has opened a database to PUBLIC")
	}
	must(t, login(t, tn, globex.ID), `NOTIFY news, 'own'`)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if heard, err := victim.WaitForNotification(ctx); err != nil || heard.Payload != "own" {
		t.Errorf("heard %+v, %v; want what the tenant itself said, and nothing before", heard, err)
	}
}

func TestCreateOfADatabaseResumesWhereverItDied(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationDatabase})
	random := rand.New(rand.NewPCG(1, 2))
	admin, deaths := f.Admin(t, "tenants"), 0
	for i := range 3 {
		name := fmt.Sprintf("acme-%d", i)
		for try := 0; ; try++ {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.IntN(40*(try+1)))*time.Millisecond)
			if try > 20 {
				ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
			}
			ended := make(chan error, 1)
			go func() { // every other time the server's sessions end under its hands, and the node lives
				if try%2 == 0 {
					ended <- nil
					return
				}
				<-ctx.Done()
				_, err := admin.Exec(context.WithoutCancel(ctx), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name IN ('tenancy provisioner', 'tenancy migration')
					AND datname IN (SELECT datname FROM pg_database WHERE datdba = (SELECT datdba FROM pg_database WHERE datname = current_database()))`)
				ended <- err
			}()
			with := ctx
			if try%2 == 1 {
				with = t.Context()
			}
			_, err := tn.Catalog().Create(with, tenancy.NewTenant{Name: name})
			cancel()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			if err == nil || deaths > 0 && errors.Is(err, tenancy.ErrTenantExists) { // it died after its last commit
				break
			}
			if deaths++; try > 25 {
				t.Fatal(err)
			}
		}
	}
	if deaths == 0 {
		t.Error("no Create died: nothing was shown")
	}
	assertDatabases(t, f)
	for i := range 3 {
		made := mustTenant(t, tn, fmt.Sprintf("acme-%d", i))
		if made.State != tenancy.StateActive {
			t.Errorf("made %+v", made)
		}
		if scan[bool](t, admin, `SELECT NOT datallowconn OR has_database_privilege('public', oid, 'CONNECT') FROM pg_database WHERE datname = $1`, placeOf(t, f, made.ID).Schema) {
			t.Errorf("the database of %s is closed, or open to everyone", made.Name)
		}
	}
}

// TestADatabaseIsFinishedStepByStep takes back what each step did, one after the other, and has the same call finish it.
func TestADatabaseIsFinishedStepByStep(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_bad.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}, Isolation: tenancy.IsolationDatabase})
	if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); sqlState(err) != "22012" {
		t.Fatal(err)
	}
	admin := f.Admin(t, "tenants")
	place := databasesOf(t, f)[0]
	for _, died := range []string{
		`ALTER DATABASE {} ALLOW_CONNECTIONS false`,
		`REVOKE ALL ON DATABASE {} FROM {}_o, {}_r`,
		`GRANT CONNECT ON DATABASE {} TO PUBLIC`,
		`DROP DATABASE {}`,
	} {
		must(t, admin, strings.ReplaceAll(died, "{}", place))
		if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); sqlState(err) != "22012" {
			t.Errorf("after %s: %v, want that the migration is come to", died, err)
		}
		if scan[bool](t, admin, `SELECT NOT datallowconn OR has_database_privilege('public', oid, 'CONNECT') FROM pg_database WHERE datname = $1`, place) {
			t.Errorf("after %s it is closed, or open to everyone", died)
		}
	}
	// What is there is finished without the right to make another; what is not, is not begun.
	provisioner := fleetName(t, f) + "_provisioner"
	must(t, admin, `ALTER ROLE `+provisioner+` NOCREATEDB`)
	if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); sqlState(err) != "22012" {
		t.Errorf("without CREATEDB: %v, want that the migration is come to", err)
	}
	must(t, admin, `DROP DATABASE `+place)
	must(t, admin, `DROP ROLE `+place+`_l1`)
	_, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	wantError(t, err, tenancy.ErrSetup, "CREATEDB;")
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, place+"_l1"); n != 0 {
		t.Error("a login was made for a database that cannot be")
	}
	must(t, admin, `ALTER ROLE `+provisioner+` CREATEDB`)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationDatabase})
	if made := tenancytest.Create(t, tn, "acme"); placeOf(t, f, made.ID).Schema != place {
		t.Errorf("it lives in %s, not in %s", placeOf(t, f, made.ID).Schema, place)
	}
	assertDatabases(t, f)
}

func TestADatabaseOfAnotherIsNotTouched(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_bad.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}, Isolation: tenancy.IsolationDatabase})
	if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); sqlState(err) != "22012" {
		t.Fatal(err)
	}
	admin, place := f.Admin(t, "tenants"), databasesOf(t, f)[0]
	must(t, admin, `ALTER DATABASE `+place+` OWNER TO `+pgx.Identifier{admin.Config().User}.Sanitize())
	atEnd(t, f, place, `DROP DATABASE {} WITH (FORCE)`)
	refused := func(op string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "it was not touched") {
			t.Errorf("%s: %v", op, err)
		}
	}
	refused("create", second(broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})))
	id := mustTenant(t, broken, "acme").ID
	if err := broken.Catalog().Delete(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	refused("purge", second(broken.Catalog().PurgeNow(t.Context(), id, "acme")))
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_database WHERE datname = $1`, place); n != 1 {
		t.Error("the database of another is gone")
	}
}

func TestATenantWithADatabaseLivesAsOneWithASchema(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, _ := mixedFleet(t)
	c, ctx := tn.Catalog(), t.Context()
	reads := func() string {
		var s string
		if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT string_agg(tenant, ',') FROM notes`).Scan(&s); err != nil {
			return err.Error()
		}
		return s
	}
	old, err := c.SourceForTest(ctx, acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.RotatePassword(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := connectTo(t, old); sqlState(err) != "28P01" && sqlState(err) != "28000" {
		t.Errorf("the login before the rotation: %v", err)
	}
	if got := reads(); got != "acme" {
		t.Errorf("after the rotation it reads %q", got)
	}
	later := f.Open(t, tenancy.Config{Isolation: tenancy.IsolationSchema, Migrations: fstest.MapFS{
		"00001_notes.sql": {Data: []byte("-- +goose Up\nSELECT 1;\n")},
		"00002_more.sql":  {Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN done boolean;\n")},
	}})
	if done, err := later.Migrator().Tenant(ctx, acme.ID); err != nil || done.Version != 2 {
		t.Errorf("migrated %+v, %v", done, err)
	}
	session := login(t, tn, acme.ID)
	if err := c.Suspend(ctx, acme.ID, tenancy.Suspension{Drain: 1}); err != nil {
		t.Fatal(err)
	}
	if err := session.Ping(ctx); err == nil {
		t.Error("a session outlived the suspension")
	}
	if _, err := tryLogin(t, tn, acme.ID); sqlState(err) != "28000" {
		t.Errorf("a suspended tenant's login: %v, want 28000", err)
	}
	if err := c.Resume(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "acme", reads)
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if err := c.Restore(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "acme", reads)
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	// A node that was cut off left a session of the provisioner's in there.
	cc, err := pgx.ParseConfig(f.ServerURL)
	if err != nil {
		t.Fatal("the fleet's URL cannot be parsed")
	}
	cc.Database = old.Database
	forgotten, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		t.Fatal(err)
	}
	defer forgotten.Close(context.Background())
	receipt, err := c.PurgeNow(ctx, acme.ID, "acme")
	if err != nil || !slices.Equal(receipt.Databases, []string{old.Database}) || len(receipt.Roles) != 3 {
		t.Errorf("the receipt is %+v, %v", receipt, err)
	}
	assertDatabases(t, f)
	if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, old.Schema); n != 0 {
		t.Errorf("%d roles are left", n)
	}
	var got string
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "globex"), `SELECT string_agg(tenant, ',') FROM notes`).Scan(&got); err != nil || got != "globex" {
		t.Errorf("tenant %d reads %q, %v", globex.ID, got, err)
	}
}

func TestATenantMovesBetweenASchemaAndADatabase(t *testing.T) {
	t.Parallel()
	f, tn, _, globex, initech := mixedFleet(t)
	node := f.Open(t, tenancy.Config{Isolation: tenancy.IsolationSchema})
	c, ctx := tn.Catalog(), t.Context()
	atNode := tenancytest.Context(t, node, "initech")
	reads := func() string {
		var s string
		if err := node.DB().QueryRow(atNode, `SELECT coalesce(string_agg(title, ','), '-') FROM notes`).Scan(&s); err != nil {
			return err.Error()
		}
		return s
	}
	if got := reads(); got != "initech" {
		t.Fatalf("before the move: %q", got)
	}
	before, err := c.DataSource(ctx, initech.ID)
	if err != nil {
		t.Fatal(err)
	}
	d, err := c.Prepare(ctx, initech.ID, "", tenancy.IsolationDatabase)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, c.SetDataSource(ctx, globex.ID, d), tenancy.ErrIdentity, "another tenant")
	wrong := d
	wrong.Database = before.Database
	wantError(t, c.SetDataSource(ctx, initech.ID, wrong), tenancy.ErrInvalid, "Prepare")
	if got := mustTenant(t, tn, "initech"); got.Isolation != tenancy.IsolationSchema {
		t.Errorf("a place that was only prepared has moved it: %+v", got)
	}
	if err := c.SetDataSource(ctx, initech.ID, d); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "-", reads)
	if got := mustTenant(t, tn, "initech"); got.Isolation != tenancy.IsolationDatabase {
		t.Errorf("it moved to a database, and is %+v", got)
	}
	// A further place is of the tenant's own isolation, if nothing is said.
	same, err := c.Prepare(ctx, initech.ID, "")
	if err != nil || same.Database != same.Schema {
		t.Errorf("prepared %v, %v", same, err)
	}
	if err := c.DropPlace(ctx, same); err != nil {
		t.Error(err)
	}
	if err := c.SetDataSource(ctx, initech.ID, before); err != nil { // back, with what DataSource answered
		t.Fatal(err)
	}
	until(t, 5*time.Second, "initech", reads)
	if got := mustTenant(t, tn, "initech"); got.Isolation != tenancy.IsolationSchema {
		t.Errorf("it moved back to a schema, and is %+v", got)
	}
	if err := c.DropPlace(ctx, d); err != nil {
		t.Fatal(err)
	}
	assertDatabases(t, f)
	// A new tenant takes the isolation of the place that it is given.
	d, err = c.Prepare(ctx, 0, "", tenancy.IsolationDatabase)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Create(ctx, tenancy.NewTenant{Name: "hooli", DataSource: &d, Isolation: tenancy.IsolationSchema})
	wantError(t, err, tenancy.ErrInvalid, "isolation")
	if made, err := c.Create(ctx, tenancy.NewTenant{Name: "hooli", DataSource: &d}); err != nil || made.Isolation != tenancy.IsolationDatabase {
		t.Errorf("made %+v, %v", made, err)
	}
	assertDatabases(t, f)
}

func TestIsolationsThatAreNotThereAreRefused(t *testing.T) {
	t.Parallel()
	tn := tenancytest.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	for what, err := range map[string]error{
		"create_rows":     second(c.Create(ctx, tenancy.NewTenant{Name: "acme", Isolation: "rows"})),
		"prepare_rows":    second(c.Prepare(ctx, 0, "", "rows")),
		"prepare_nothing": second(c.Prepare(ctx, 0, "", "")),
		"prepare_two":     second(c.Prepare(ctx, 0, "", tenancy.IsolationSchema, tenancy.IsolationDatabase)),
	} {
		if !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "isolation: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A server that cannot make databases is found out before anything is made there or written in the primary.
func TestAServerWithoutDatabasesSaysSoBeforeAnythingIsMade(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "tenants")
	open := func() error {
		node, err := tenancy.Open(ctx, tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Isolation: tenancy.IsolationDatabase, Logger: slog.New(slog.DiscardHandler)})
		if err == nil {
			err = node.Close()
		}
		return err
	}
	for what, err := range map[string]error{
		"create":  second(c.Create(ctx, tenancy.NewTenant{Name: "acme", Isolation: tenancy.IsolationDatabase})),
		"prepare": second(c.Prepare(ctx, 0, "", tenancy.IsolationDatabase)),
		"open":    open(),
	} {
		setup, ok := errors.AsType[*tenancy.SetupError](err)
		if !ok || len(setup.Missing) < 2 || !strings.Contains(err.Error(), "lacks CREATEDB") || !strings.Contains(err.Error(), `_template" of tenants' databases is missing`) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT (SELECT count(*) FROM tenancy.tenants) + (SELECT count(*) FROM tenancy.data_sources)`); n != 0 {
		t.Errorf("%d rows were written", n)
	}
	// What the error says mends it.
	for range 3 {
		setup, ok := errors.AsType[*tenancy.SetupError](open())
		if !ok {
			break
		}
		for _, m := range setup.Missing {
			statement, place, _ := strings.Cut(m.Mend, " -- ")
			conn := admin
			if _, database, ok := strings.Cut(place, "in database "); ok {
				conn = readmeConn(t, f, strings.Trim(database, `"`))
			}
			if _, err := conn.Exec(ctx, statement); err != nil && sqlState(err) != "42704" && sqlState(err) != "3D000" {
				t.Errorf("%s: %v", m.Mend, err)
			}
			if conn != admin {
				_ = conn.Close(ctx) // one who is connected keeps copies from being made
			}
		}
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	createIn(t, tn, "acme", tenancy.IsolationDatabase)
	must(t, admin, `ALTER ROLE `+fleetName(t, f)+`_provisioner NOCREATEDB`)
	_, err := c.Create(ctx, tenancy.NewTenant{Name: "globex", Isolation: tenancy.IsolationDatabase})
	wantError(t, err, tenancy.ErrSetup, "CREATEDB;")
	_, err = c.TenantByName(ctx, "globex")
	wantError(t, err, tenancy.ErrTenantNotFound)
	createIn(t, tn, "globex", tenancy.IsolationSchema)
}

// Init gives the right to make databases where it is asked for, and takes it away where it is not. The tenants that have one keep it.
func TestInitGivesAndTakesTheRightToMakeDatabases(t *testing.T) {
	t.Parallel()
	f, tn, acme, _, _ := mixedFleet(t)
	admin, ctx := f.Admin(t, "tenants"), t.Context()
	may := func() bool {
		return scan[bool](t, admin, `SELECT rolcreatedb FROM pg_roles WHERE rolname = $1`, fleetName(t, f)+"_provisioner")
	}
	if !may() {
		t.Error("the provisioner has no CREATEDB")
	}
	if err := tenancy.Init(ctx, f.AdminConfig()); err != nil {
		t.Fatal(err)
	}
	if may() {
		t.Error("the provisioner kept CREATEDB")
	}
	_, err := tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "hooli", Isolation: tenancy.IsolationDatabase})
	wantError(t, err, tenancy.ErrSetup, "CREATEDB;")
	if err := tn.Catalog().RotatePassword(ctx, acme.ID); err != nil {
		t.Error(err)
	}
	if err := tn.Catalog().Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if receipt, err := tn.Catalog().PurgeNow(ctx, acme.ID, "acme"); err != nil || len(receipt.Databases) != 1 {
		t.Errorf("%+v, %v", receipt, err)
	}
	f.AllowDatabases(t)
	createIn(t, tn, "hooli", tenancy.IsolationDatabase)
}

func TestExtensionsOfASuperusersAreThereInATenantsDatabase(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t, "citext", "dblink")
	tn := f.Open(t, tenancy.Config{Isolation: tenancy.IsolationDatabase, Extensions: true, ReferenceTables: true, Migrations: fstest.MapFS{
		"00001_words.sql": {Data: []byte("-- +goose Up\nCREATE TABLE words (word citext PRIMARY KEY);\n")},
	}})
	template := readmeConn(t, f, fleetName(t, f)+"_tenants_template")
	must(t, template, `SET ROLE `+fleetName(t, f)+`_provisioner`)
	must(t, template, `CREATE TABLE tenancy_ref.countries (code text)`)
	must(t, template, `INSERT INTO tenancy_ref.countries VALUES ('AT')`)
	_ = template.Close(t.Context())
	for _, name := range []string{"acme", "globex"} {
		tenancytest.Create(t, tn, name)
		ctx := tenancytest.Context(t, tn, name)
		var code string
		if err := tn.DB().QueryRow(ctx, `SELECT code FROM countries WHERE 'A'::citext = 'a'`).Scan(&code); err != nil || code != "AT" {
			t.Errorf("%s reads %q, %v", name, code, err)
		}
		for _, s := range []string{`INSERT INTO countries VALUES ('evil')`, `CREATE TABLE tenancy_ext.evil ()`, `DROP EXTENSION citext`} {
			if _, err := tn.DB().Exec(ctx, s); sqlState(err) != "42501" {
				t.Errorf("%s: %v, want 42501", s, err)
			}
		}
	}
}

// TestNoAttackReachesAnotherDatabase has a tenant's login try all attacks, from a database to another one, and to and from a schema.
func TestNoAttackReachesAnotherDatabase(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, initech := mixedFleet(t)
	for name, pair := range map[string][2]tenancy.Tenant{
		"from_a_database_to_a_database": {acme, globex}, "from_a_database_to_a_schema": {acme, initech}, "from_a_schema_to_a_database": {initech, globex},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := placeOf(t, f, pair[0].ID), placeOf(t, f, pair[1].ID)
			victim := login(t, tn, pair[1].ID)
			must(t, victim, `INSERT INTO notes (tenant, title) VALUES ($1, '`+treasure+`')`, pair[1].Name)
			lo := scan[uint32](t, victim, `SELECT lo_from_bytea(0, convert_to('`+treasure+`', 'UTF8'))`)
			fleet := fleetName(t, f)
			w := &battle{names: strings.NewReplacer(
				"{A}", a.Schema, "{Ao}", a.Owner, "{Ar}", a.Runtime, "{Al}", a.Login,
				"{B}", b.Schema, "{Bo}", b.Owner, "{Br}", b.Runtime, "{Bl}", b.Login,
				"{Blo}", fmt.Sprint(lo), "{Bpid}", fmt.Sprint(victim.PgConn().PID()),
				"{DB}", victim.Config().Database, "{PRIMARY}", fleet+"_primary", "{G}", fleet+"_tenants_tenants",
				"{P}", fleet+"_provisioner", "{C}", fleet+"_catalog", "{S}", f.Admin(t, "tenants").Config().User)}
			admin := readmeConn(t, f, victim.Config().Database)
			look := func() string {
				return scan[string](t, admin, `SELECT concat_ws(E'\n', (SELECT string_agg(n::text, ' ' ORDER BY id) FROM `+b.table("notes")+` n), (SELECT string_agg(tenant::text, ' ') FROM `+b.table("tenancy_marker")+`),
					(SELECT string_agg(encode(data, 'hex'), ' ' ORDER BY loid, pageno) FROM pg_largeobject),
					(SELECT string_agg(concat_ws(' ', nspname, nspowner::regrole, nspacl), E'\n' ORDER BY nspname) FROM pg_namespace WHERE nspname !~ '^pg_'),
					(SELECT string_agg(concat_ws(' ', relname, relacl), E'\n' ORDER BY oid) FROM pg_class WHERE relnamespace = $1::text::regnamespace),
					(SELECT string_agg(concat_ws(' ', datname, datdba::regrole, datacl, datallowconn), E'\n' ORDER BY datname) FROM pg_database WHERE datdba = (SELECT oid FROM pg_roles WHERE rolname = $2)),
					(SELECT string_agg(concat_ws(' ', rolname, rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolconnlimit, rolpassword), E'\n' ORDER BY rolname) FROM pg_authid WHERE starts_with(rolname, $1) OR starts_with(rolname, $3)),
					(SELECT string_agg(concat_ws(' ', roleid::regrole, member::regrole), E'\n' ORDER BY roleid, member) FROM pg_auth_members WHERE starts_with(roleid::regrole::text, $1) OR starts_with(member::regrole::text, $3)))`,
					b.Schema, fleet+"_provisioner", a.Schema)
			}
			before := look()
			// They ask the catalog for what to take, and it is not in there.
			nothing := []string{"table_by_oid_to_xml", "its_sequence_by_oid"}
			for _, attack := range attacks() {
				conn := login(t, tn, pair[0].ID)
				state, leaked, err := w.run(t.Context(), conn, attack)
				if leaked {
					t.Errorf("%s: the other tenant's row was read", attack.name)
				}
				if state == "" && attack.state != "" && !slices.Contains(nothing, attack.name) {
					t.Errorf("%s was accepted (%v), within one database it is %s", attack.name, err, attack.state)
				}
				_ = conn.Close(t.Context())
				if after := look(); after != before {
					t.Errorf("%s has changed\n%s\nto\n%s", attack.name, before, after)
					before = after
				}
			}
			if err := victim.Ping(t.Context()); err != nil {
				t.Errorf("the other tenant's session has ended: %v", err)
			}
		})
	}
}

// A database is made closed: at no moment can one connect to it whom its grants will not let in.
func TestADatabaseIsNeverOpenToEveryone(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationDatabase})
	admin, ctx := f.Admin(t, "tenants"), t.Context()
	stop, watched := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			var open string
			err := admin.QueryRow(ctx, `SELECT coalesce(string_agg(datname, ','), '') FROM pg_database WHERE datallowconn AND has_database_privilege('public', oid, 'CONNECT')
				AND datdba = (SELECT datdba FROM pg_database WHERE datname = current_database())`).Scan(&open)
			if err == nil && open != "" {
				err = fmt.Errorf("%s is open to everyone", open)
			}
			select {
			case <-stop:
				watched <- err
				return
			default:
				if err != nil {
					watched <- err
					return
				}
			}
		}
	}()
	for _, name := range []string{"acme", "globex", "initech"} {
		tenancytest.Create(t, tn, name)
	}
	close(stop)
	if err := <-watched; err != nil {
		t.Error(err)
	}
}

// What was opened by hand is found when a login is made, before it is anybody's.
func TestADatabaseThatWasOpenedByHandIsFound(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, initech := mixedFleet(t)
	admin, c, ctx := f.Admin(t, "tenants"), tn.Catalog(), t.Context()
	place, group := placeOf(t, f, acme.ID).Schema, fleetName(t, f)+"_tenants_tenants"
	for _, s := range []struct {
		open, shut string
		of         tenancy.Tenant
		says       string
	}{
		{`GRANT CONNECT ON DATABASE ` + place + ` TO PUBLIC`, `REVOKE CONNECT ON DATABASE ` + place + ` FROM PUBLIC`, acme, "every role may connect"},
		{`GRANT CONNECT ON DATABASE ` + place + ` TO PUBLIC`, `REVOKE CONNECT ON DATABASE ` + place + ` FROM PUBLIC`, globex, "the login may connect to a database of other tenants"},
		{`GRANT CONNECT ON DATABASE ` + place + ` TO ` + group, `REVOKE CONNECT ON DATABASE ` + place + ` FROM ` + group, acme, "the tenants of the server's own database"},
		{`GRANT CONNECT ON DATABASE ` + place + ` TO ` + group, `REVOKE CONNECT ON DATABASE ` + place + ` FROM ` + group, initech, "the login may connect to a database of other tenants"},
		{`GRANT ` + group + ` TO ` + place + `_r`, `REVOKE ` + group + ` FROM ` + place + `_r`, acme, "the login may connect to a database of other tenants"},
	} {
		must(t, admin, s.open)
		wantError(t, c.RotatePassword(ctx, s.of.ID), tenancy.ErrSetup, s.says)
		must(t, admin, s.shut)
		if err := c.RotatePassword(ctx, s.of.ID); err != nil {
			t.Errorf("after %s: %v", s.shut, err)
		}
	}
}

// TestAPurgeOfADatabaseGoesOnWhereItDied takes each step of a drop beforehand, as a run that died there has.
func TestAPurgeOfADatabaseGoesOnWhereItDied(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationDatabase})
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "tenants")
	for i, died := range []string{
		`ALTER DATABASE {} ALLOW_CONNECTIONS false`,
		`UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{}'`, // the server stopped while it removed the files
		`DROP DATABASE {}`,
		`DO $$ BEGIN EXECUTE 'REVOKE ALL ON DATABASE {} FROM {}_o, {}_r'; EXECUTE 'DROP ROLE {}_l1'; END $$`,
	} {
		made := tenancytest.Create(t, tn, fmt.Sprintf("acme-%d", i))
		place := placeOf(t, f, made.ID).Schema
		if err := c.Delete(ctx, made.ID); err != nil {
			t.Fatal(err)
		}
		must(t, admin, strings.ReplaceAll(died, "{}", place))
		receipt, err := c.PurgeNow(ctx, made.ID, made.Name)
		if err != nil || len(receipt.Databases) != 1 && !strings.HasPrefix(died, "DROP DATABASE") {
			t.Errorf("after %s: %+v, %v", died, receipt, err)
		}
		if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, place); n != 0 {
			t.Errorf("after %s: %d roles are left", died, n)
		}
	}
	assertDatabases(t, f)
}

// The documented order moves a suspended tenant with its rows.
func TestASuspendedTenantMovesIntoADatabase(t *testing.T) {
	t.Parallel()
	f, tn, _, _, initech := mixedFleet(t)
	c, ctx := tn.Catalog(), t.Context()
	if err := c.Suspend(ctx, initech.ID, tenancy.Suspension{Maintenance: true}); err != nil {
		t.Fatal(err)
	}
	d, err := c.Prepare(ctx, initech.ID, "", tenancy.IsolationDatabase)
	if err != nil {
		t.Fatal(err)
	}
	operator := readmeConn(t, f, d.Database)
	must(t, operator, `INSERT INTO `+d.Schema+`.notes (tenant, title) VALUES ('initech', 'moved')`)
	_ = operator.Close(ctx)
	if err := c.SetDataSource(ctx, initech.ID, d); err != nil {
		t.Fatal(err)
	}
	if _, err := connectTo(t, d); sqlState(err) != "28000" {
		t.Errorf("the place of a suspended tenant is open: %v", err)
	}
	if err := c.Resume(ctx, initech.ID); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "initech"), `SELECT string_agg(title, ',') FROM notes`).Scan(&got); err != nil || got != "moved" {
		t.Errorf("it reads %q, %v", got, err)
	}
	if err := c.Delete(ctx, initech.ID); err != nil {
		t.Fatal(err)
	}
	if receipt, err := c.PurgeNow(ctx, initech.ID, "initech"); err != nil || len(receipt.Databases) != 1 || receipt.Tables == 0 || len(receipt.Roles) != 6 {
		t.Errorf("both places are purged: %+v, %v", receipt, err)
	}
	assertDatabases(t, f)
}

// The server's own work in a database, which the provisioner may not end, does not keep it.
func TestAnAutovacuumDoesNotKeepADatabase(t *testing.T) {
	t.Parallel()
	server, err := pgembed.Start(t.Context(), pgembed.Options{Settings: map[string]string{"autovacuum_naptime": "1s"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	if server.External() {
		t.Skip("the autovacuum of the server of TENANCY_TEST_URL is as it is")
	}
	super, ctx := connectURL(t, server.URL()), t.Context()
	at := func(login, database string) string {
		cc := super.Config()
		return fmt.Sprintf("postgres://%s:secret@%s:%d/%s?sslmode=disable", login, cc.Host, cc.Port, database)
	}
	cfg := tenancy.Config{PrimaryURL: at("catalog", "fleet_primary"), Keys: otherKeys(t), Isolation: tenancy.IsolationDatabase, Migrations: fstest.MapFS{
		"00001_slow.sql": {Data: []byte("-- +goose Up\nCREATE TABLE slow (n int) WITH (autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, fillfactor = 10);\nINSERT INTO slow SELECT generate_series(1, 20000);\nDELETE FROM slow;\n")},
	}}
	if err := tenancy.Init(ctx, tenancy.AdminConfig{AdminURL: server.URL(), PrimaryURL: cfg.PrimaryURL, Keys: cfg.Keys,
		Server: tenancy.ServerConfig{URL: at("provisioner", "fleet_tenants")}, TenantDatabases: true}); err != nil {
		t.Fatal(err)
	}
	tn, err := tenancy.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	made := tenancytest.Create(t, tn, "acme")
	d, err := tn.Catalog().DataSource(ctx, made.ID)
	if err != nil {
		t.Fatal(err)
	}
	until(t, 30*time.Second, "true", func() string {
		return fmt.Sprint(scan[bool](t, super, `SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND datname = $1`, d.Database))
	})
	if err := tn.Catalog().Delete(ctx, made.ID); err != nil {
		t.Fatal(err)
	}
	if receipt, err := tn.Catalog().PurgeNow(ctx, made.ID, "acme"); err != nil || !slices.Equal(receipt.Databases, []string{d.Database}) {
		t.Errorf("%+v, %v", receipt, err)
	}
}

// TestTheThirdReleaseWorksOnTheFourthVersion runs the statements of a release that knows nothing of isolations, weights and capacities, as a
// deployment from node to node does.
func TestTheThirdReleaseWorksOnTheFourthVersion(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, _ := mixedFleet(t)
	old := connectURL(t, f.PrimaryURL)
	must(t, old, `INSERT INTO tenancy.servers (name, host, port, database, tls, provisioner) SELECT 'main', host, port, database, tls, provisioner FROM tenancy.servers
		ON CONFLICT (host, port, database) DO UPDATE SET provisioner = excluded.provisioner, tls = excluded.tls, updated = now()`)
	must(t, old, `WITH t AS (INSERT INTO tenancy.tenants (uid, name, display_name, state, isolation, intent, max_users, attributes)
			VALUES (gen_random_uuid(), 'hooli', '', 'provisioning', 'schema', '', NULL, '{}') RETURNING uid)
		INSERT INTO tenancy.data_sources (uid, server, schema, owner, runtime, login, sealed, state) SELECT uid, (SELECT min(id) FROM tenancy.servers), 't_old', 't_old_o', 't_old_r', 't_old_l1', '', 'intent' FROM t`)
	if got := scan[string](t, old, `SELECT concat_ws(' ', d.isolation, '(' || d.database || ')', s.weight, s.capacity) FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE d.schema = 't_old'`); got != "schema () 1 0" {
		t.Errorf("what it wrote reads %q", got)
	}
	// It moves a tenant without a word of its isolation, and serves one with a database by the sealed record.
	must(t, old, `UPDATE tenancy.tenants SET data_source = data_source, generation = generation + 1, updated = now() WHERE id = $1`, globex.ID)
	for _, name := range []string{"acme", "globex"} {
		var got string
		if err := tn.DB().QueryRow(tenancytest.Context(t, tn, name), `SELECT string_agg(tenant, ',') FROM notes`).Scan(&got); err != nil || got != name {
			t.Errorf("%s reads %q, %v", name, got, err)
		}
	}
	if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil {
		t.Error(err)
	}
}

func TestTheEnvironmentSaysTheIsolation(t *testing.T) {
	key, err := tenancy.NewKey("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TENANCY_PRIMARY_URL", "postgres://u@127.0.0.1:1/db")
	t.Setenv("TENANCY_KEYS", key)
	for _, value := range []string{"", "database"} {
		t.Setenv("TENANCY_ISOLATION", value)
		if cfg, err := tenancy.FromEnv(); err != nil || string(cfg.Isolation) != value {
			t.Errorf("%q: got %q, %v", value, cfg.Isolation, err)
		}
	}
}

func TestDatabasesAreMadeAtOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	var nodes []*tenancy.Tenancy
	for range 2 {
		nodes = append(nodes, f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationDatabase, Limits: tenancy.Limits{Provisions: 4}}))
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			made, err := nodes[i%2].Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("acme-%d", i)})
			if err != nil {
				t.Error(err)
				return
			}
			if i%4 > 1 {
				return
			}
			if err := nodes[i%2].Catalog().Delete(t.Context(), made.ID); err != nil {
				t.Error(err)
			} else if _, err := nodes[1-i%2].Catalog().PurgeNow(t.Context(), made.ID, made.Name); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	assertDatabases(t, f)
	if n := len(databasesOf(t, f)); n != 4 {
		t.Errorf("%d databases are there, want 4", n)
	}
}
