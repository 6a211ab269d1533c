package tenancy_test

import (
	"context"
	databasesql "database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// sharedFleet is a node on a fleet with two tenants whose rows are in one schema, and one with a schema of its own.
func sharedFleet(t *testing.T) (f *tenancytest.Fleet, tn *tenancy.Tenancy, acme, globex, initech tenancy.Tenant) {
	t.Helper()
	f = tenancytest.NewFleet(t)
	tn = f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	return f, tn, createIn(t, tn, "acme", tenancy.IsolationShared), createIn(t, tn, "globex", tenancy.IsolationShared), createIn(t, tn, "initech", tenancy.IsolationSchema)
}

func TestTenantsOfOneSchemaAreServedBesideOthers(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, initech := sharedFleet(t)
	node := f.Open(t, tenancy.Config{})
	for _, n := range []*tenancy.Tenancy{tn, node} {
		for _, tenant := range []tenancy.Tenant{acme, globex, initech} {
			var got string
			var id int64
			err := n.DB().QueryRow(tenancytest.Context(t, n, tenant.Name), `SELECT string_agg(tenant, ','), min(tenant_id) FROM notes`).Scan(&got, &id)
			if err != nil || got != tenant.Name || tenancy.ID(id) != tenant.ID {
				t.Errorf("%s (%d) reads the rows of %q (%d): %v", tenant.Name, tenant.ID, got, id, err)
			}
		}
	}
	a, g := placeOf(t, f, acme.ID), placeOf(t, f, globex.ID)
	if a.Schema != g.Schema || a.Owner != g.Owner || a.Runtime != g.Runtime || a.Login == g.Login {
		t.Errorf("they live in %+v and %+v", a, g)
	}
	if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM `+a.table("notes")); n != 2 {
		t.Errorf("a superuser counts %d rows of the two", n)
	}
	done, err := tn.Migrator().All(t.Context())
	if err != nil || len(done) != 3 {
		t.Errorf("migrated %+v, %v", done, err)
	}
}

// Whoever has the password of one tenant, or a hole in the service's SQL, reaches nothing of the other, nor a place to lay something in its way.
func TestNothingOfATenantIsReachedFromTheSameSchema(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, initech := sharedFleet(t)
	victim, attacker, neighbour := login(t, tn, globex.ID), login(t, tn, acme.ID), login(t, tn, initech.ID)
	must(t, victim, `INSERT INTO notes (tenant, title) VALUES ('globex', '`+treasure+`')`)
	admin, place := f.Admin(t, "tenants"), placeOf(t, f, globex.ID)
	before := scan[string](t, admin, `SELECT string_agg(n::text, ',' ORDER BY id) FROM `+place.table("notes")+` n WHERE tenant_id = $1`, globex.ID)
	ctx := tenancytest.Context(t, tn, "acme")
	for _, sql := range []string{
		`SELECT title FROM notes WHERE title = '` + treasure + `' OR tenant = 'globex'`,
		`SELECT title FROM ` + place.table("notes") + ` WHERE tenant_id = ` + fmt.Sprint(globex.ID),
		`SELECT tenant::text FROM tenancy_marker WHERE tenant <> '` + acme.UID.String() + `'`,
		`UPDATE notes SET title = 'mine' WHERE tenant_id = ` + fmt.Sprint(globex.ID) + ` RETURNING title`,
		`DELETE FROM notes WHERE tenant_id <> ` + fmt.Sprint(acme.ID) + ` RETURNING title`,
	} {
		for how, rows := range map[string]func() (pgx.Rows, error){
			"the library": func() (pgx.Rows, error) { return tn.DB().Query(ctx, sql) },
			"a raw login": func() (pgx.Rows, error) { return attacker.Query(t.Context(), sql) },
		} {
			r, _ := rows()
			if got, err := pgx.CollectRows(r, pgx.RowTo[string]); err != nil || len(got) != 0 {
				t.Errorf("%s through %s: %q, %v", sql, how, got, err)
			}
		}
	}
	for _, reach := range []struct{ state, sql string }{
		{"42501", `INSERT INTO notes (tenant_id, tenant, title) VALUES (` + fmt.Sprint(globex.ID) + `, 'globex', 'evil')`},
		{"42501", `UPDATE notes SET tenant_id = ` + fmt.Sprint(globex.ID)},
		{"42501", `SELECT * FROM tenancy_map`},
		{"42501", `SELECT * FROM tenancy_roster`},
		{"42501", `SELECT tenancy_enter(` + fmt.Sprint(globex.ID) + `)`},
		{"42501", `SELECT * FROM goose_db_version`},
		{"42501", `SELECT nextval('goose_db_version_id_seq')`},
		{"42501", `TRUNCATE notes`},
		{"42501", `ALTER TABLE notes DISABLE ROW LEVEL SECURITY`},
		{"42501", `CREATE TEMP TABLE notes ()`},
		{"42501", `CREATE TABLE evil ()`},
		{"42501", `CREATE SCHEMA evil`},
		{"42501", `CREATE TABLE tenancy_ref.evil ()`},
		{"42501", `SET ROLE ` + place.Login},
		{"42501", `SET ROLE ` + place.Owner},
		{"42501", `SET ROLE ` + fleetName(t, f) + `_tenants_tenants`},
		{"42501", `SET SESSION AUTHORIZATION ` + place.Login},
		{"42501", `SELECT pg_terminate_backend(` + fmt.Sprint(victim.PgConn().PID()) + `)`},
		{"42501", `SET row_security = off; SELECT count(*) FROM notes`},
	} {
		if _, err := attacker.Exec(t.Context(), reach.sql); sqlState(err) != reach.state {
			t.Errorf("%s: %v, want %s", reach.sql, err, reach.state)
		}
		must(t, attacker, `RESET row_security`)
	}
	if _, err := neighbour.Exec(t.Context(), `SELECT title FROM `+place.table("notes")); sqlState(err) != "42501" {
		t.Errorf("one with a schema of its own reads the shared one: %v, want 42501", err)
	}
	if _, err := attacker.Exec(t.Context(), `SELECT title FROM `+placeOf(t, f, initech.ID).table("notes")); sqlState(err) != "42501" {
		t.Errorf("one of the shared schema reads that of another: %v, want 42501", err)
	}
	must(t, attacker, `SET tenancy.entered = '`+fmt.Sprint(globex.ID)+`'`)
	must(t, attacker, `SET ROLE `+place.Runtime)
	if n := scan[int](t, attacker, `SELECT count(*) FROM notes`); n != 0 {
		t.Errorf("as the group it sees %d rows", n)
	}
	_, _ = attacker.Exec(t.Context(), `DROP OWNED BY `+place.Runtime) // what it did is looked at
	if after := scan[string](t, admin, `SELECT string_agg(n::text, ',' ORDER BY id) FROM `+place.table("notes")+` n WHERE tenant_id = $1`, globex.ID); after != before {
		t.Errorf("the victim's rows were %s, and are %s", before, after)
	}
	for _, name := range []string{"globex", "acme"} {
		if _, err := tn.DB().Exec(tenancytest.Context(t, tn, name), `INSERT INTO notes (tenant, title) VALUES ($1, 'still served')`, name); err != nil {
			t.Errorf("%s is served no more: %v", name, err)
		}
	}
	_ = login(t, tn, globex.ID)
}

func TestCreateInASharedSchemaResumesWhereverItDied(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationShared})
	random := rand.New(rand.NewPCG(1, 2))
	admin, deaths := f.Admin(t, "tenants"), 0
	for try := 0; ; try++ {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+random.IntN(15*(try+1)))*time.Millisecond)
		if try > 20 {
			ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		}
		with, ended := ctx, make(chan error, 1)
		if try%2 == 1 { // every other time the server's sessions end under its hands, and the node lives
			with = t.Context()
			go func() {
				<-ctx.Done()
				_, err := admin.Exec(context.WithoutCancel(ctx), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name IN ('tenancy provisioner', 'tenancy migration') AND datname = current_database()`)
				ended <- err
			}()
		} else {
			ended <- nil
		}
		_, err := tn.Catalog().Create(with, tenancy.NewTenant{Name: "acme"})
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
	if deaths == 0 {
		t.Error("no Create died: nothing was shown")
	}
	createIn(t, tn, "globex", tenancy.IsolationShared)
	owner := placeOf(t, f, mustTenant(t, tn, "acme").ID).Owner
	if scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, owner) {
		t.Error("the owner of the shared schema may log in")
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.shared_areas`); n != 1 {
		t.Errorf("the primary lists %d shared schemas", n)
	}
}

// TestASharedSchemaIsFinishedStepByStep takes back what each step did, one after the other, and has the same call finish it.
func TestASharedSchemaIsFinishedStepByStep(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_bad.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}, Isolation: tenancy.IsolationShared})
	create := func(n *tenancy.Tenancy) error {
		return second(n.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}))
	}
	if err := create(broken); sqlState(err) != "22012" {
		t.Fatal(err)
	}
	admin := f.Admin(t, "tenants")
	place := placeOf(t, f, mustTenant(t, broken, "acme").ID)
	for _, died := range []string{
		`DROP TABLE {}.goose_db_version`,
		`DROP VIEW {}.tenancy_marker`,
		`REVOKE CONNECT ON DATABASE ` + fleetName(t, f) + `_tenants FROM {}_r`,
		`REVOKE ` + fleetName(t, f) + `_tenants_tenants FROM {}_o`,
		`DROP SCHEMA {} CASCADE`,
		`DROP OWNED BY {}_r; DROP ROLE {}_r`,
	} {
		must(t, admin, strings.ReplaceAll(died, "{}", place.Schema))
		if err := create(broken); sqlState(err) != "22012" {
			t.Errorf("after %s: %v, want that the migration is come to", died, err)
		}
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, place.Login); n != 0 {
		t.Error("a login was made before its schema")
	}
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationShared})
	primary := f.Admin(t, "primary")
	for _, died := range []string{`SELECT`, `DELETE FROM {}.tenancy_map`, `DELETE FROM {}.tenancy_map; DELETE FROM {}.tenancy_roster`, `DROP ROLE ` + place.Login} {
		must(t, admin, strings.ReplaceAll(died, "{}", place.Schema))
		if err := create(tn); err != nil {
			t.Fatalf("after %s: %v", died, err)
		}
		_ = login(t, tn, mustTenant(t, tn, "acme").ID)
		must(t, primary, `UPDATE tenancy.tenants SET state = 'provisioning'`)
		must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent'`)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if now := placeOf(t, f, mustTenant(t, tn, "acme").ID); now != place {
		t.Errorf("it lives in %+v, not in %+v", now, place)
	}
}

func TestPurgeErasesTheRowsOfOneTenant(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, _ := sharedFleet(t)
	admin, place := f.Admin(t, "tenants"), placeOf(t, f, acme.ID)
	must(t, login(t, tn, acme.ID), `INSERT INTO notes (tenant, title) SELECT 'acme', i::text FROM generate_series(1, 2500) i`)
	if err := tn.Catalog().Delete(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := tryLogin(t, tn, acme.ID); err == nil {
		t.Error("a deleted tenant logs in")
	}
	// A Purge dies after its first thousand rows: a trigger of the service's keeps one of the others.
	must(t, admin, `CREATE FUNCTION `+place.table("keep")+`() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF OLD.title = '1500' THEN RAISE 'kept'; END IF; RETURN OLD; END $$`)
	must(t, admin, `CREATE TRIGGER keep BEFORE DELETE ON `+place.table("notes")+` FOR EACH ROW EXECUTE FUNCTION `+place.table("keep")+`()`)
	if _, err := tn.Catalog().PurgeNow(t.Context(), acme.ID, "acme"); sqlState(err) != "P0001" {
		t.Fatalf("purge: %v", err)
	}
	must(t, admin, `DROP FUNCTION `+place.table("keep")+`() CASCADE`)
	receipt, err := tn.Catalog().PurgeNow(t.Context(), acme.ID, "acme")
	if err != nil {
		t.Fatal(err)
	}
	if want := []tenancy.ErasedRows{{Table: "notes", Rows: 2501}}; !slices.Equal(receipt.Rows, want) || !slices.Equal(receipt.Roles, []string{place.Login}) {
		t.Errorf("receipt %+v, want the rows %v and the role %s", receipt, want, place.Login)
	}
	got := scan[map[string]int](t, admin, `SELECT jsonb_object_agg(tenant_id, n) FROM (SELECT tenant_id, count(*) AS n FROM `+place.table("notes")+` GROUP BY 1) c`)
	if len(got) != 1 || got[fmt.Sprint(globex.ID)] != 1 {
		t.Errorf("left are %v rows by tenant, want one of %d", got, globex.ID)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM `+place.Schema+`.tenancy_roster`); n != 1 {
		t.Errorf("%d tenants are on the roster", n)
	}
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "globex"), `SELECT 1 FROM notes`).Scan(new(int)); err != nil {
		t.Errorf("the other is not served: %v", err)
	}
	createIn(t, tn, "hooli", tenancy.IsolationShared)
}

func TestATenantOfASharedSchemaGoesOutOfServiceAlone(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex, _ := sharedFleet(t)
	held := login(t, tn, acme.ID)
	other := login(t, tn, globex.ID)
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{Drain: 1}); err != nil {
		t.Fatal(err)
	}
	if err := held.Ping(t.Context()); err == nil {
		t.Error("a session of a suspended tenant lives")
	}
	if _, err := tryLogin(t, tn, acme.ID); err == nil {
		t.Error("a suspended tenant logs in")
	}
	if n := scan[int](t, other, `SELECT count(*) FROM notes`); n != 1 {
		t.Errorf("the other sees %d rows", n)
	}
	createIn(t, tn, "hooli", tenancy.IsolationShared)
	if err := tn.Catalog().Resume(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT 1 FROM notes WHERE tenant = 'acme'`).Scan(new(int)); err != nil {
		t.Error(err)
	}
}

func TestALoginOfASharedSchemaIsRotated(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, _ := sharedFleet(t)
	old := placeOf(t, f, acme.ID)
	must(t, login(t, tn, acme.ID), `SELECT lo_from_bytea(4711, 'mine')`)
	for range 2 {
		if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil {
			t.Fatal(err)
		}
	}
	now := placeOf(t, f, acme.ID)
	if want := strings.TrimSuffix(old.Login, "_l1") + "_l3"; now.Login != want || now.Schema != old.Schema {
		t.Errorf("it is at %+v, want login %s", now, want)
	}
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT 1 FROM notes WHERE tenant = 'acme'`).Scan(new(int)); err != nil {
		t.Error(err)
	}
	if got := scan[string](t, login(t, tn, acme.ID), `SELECT convert_from(lo_get(4711), 'UTF8')`); got != "mine" {
		t.Errorf("the new login reads %q of what the old one had", got)
	}
	admin := f.Admin(t, "tenants")
	got := scan[[]string](t, admin, `SELECT array_agg(login::text ORDER BY login) FROM `+now.Schema+`.tenancy_map`)
	want := []string{now.Login, placeOf(t, f, globex.ID).Login}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the map has the logins %q, want %q", got, want)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, old.Login); n != 0 {
		t.Error("the old login is there")
	}
}

func TestASharedSchemaIsMigratedOnceForAll(t *testing.T) {
	t.Parallel()
	f, _, acme, globex, initech := sharedFleet(t)
	files := fstest.MapFS{}
	data, err := fs.ReadFile(noteMigrations, "00001_notes.sql")
	if err != nil {
		t.Fatal(err)
	}
	files["00001_notes.sql"] = &fstest.MapFile{Data: data}
	files["00002_tags.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE tags (name text);\nSELECT tenancy_must('tags');\nCREATE TABLE forgotten (name text);\n")}
	next := f.Open(t, tenancy.Config{Migrations: files})
	done, err := next.Migrator().All(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	runs := 0
	for _, m := range done {
		if m.Version != 2 {
			t.Errorf("migrated %+v, want version 2", m)
		}
		if len(m.Applied) > 0 && m.Tenant.ID != initech.ID {
			runs++
		}
	}
	if runs != 1 {
		t.Errorf("the shared schema was migrated by %d runs", runs)
	}
	for _, was := range []tenancy.Tenant{acme, globex, initech} {
		now := mustTenant(t, next, was.Name)
		if now.Generation <= was.Generation {
			t.Errorf("%s is of generation %d, as before", was.Name, now.Generation)
		}
		ctx := tenancytest.Context(t, next, was.Name)
		if _, err := next.DB().Exec(ctx, `INSERT INTO tags VALUES ('new')`); err != nil {
			t.Error(err)
		}
		_, err := next.DB().Exec(ctx, `SELECT FROM forgotten`)
		if want := map[bool]string{true: "42501", false: ""}[was.Isolation == tenancy.IsolationShared]; sqlState(err) != want {
			t.Errorf("%s reads a table that nobody protects: %v, want %q", was.Name, err, want)
		}
	}
	files["00003_bad.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nGRANT SELECT ON forgotten TO PUBLIC;\n")}
	open := f.Open(t, tenancy.Config{Migrations: files})
	for range 2 { // and again: it is not taken for done
		if _, err := open.Migrator().Tenant(t.Context(), acme.ID); err == nil || !strings.Contains(err.Error(), "tenants may read forgotten, which has no wall") {
			t.Errorf("a migration that opens a table: %v", err)
		}
	}
}

func TestATenantOfASharedSchemaStays(t *testing.T) {
	t.Parallel()
	_, tn, acme, _, initech := sharedFleet(t)
	c := tn.Catalog()
	for what, err := range map[string]error{
		"away":       second(c.Prepare(t.Context(), acme.ID, "", tenancy.IsolationSchema)),
		"elsewhere":  second(c.Prepare(t.Context(), acme.ID, "")),
		"there":      second(c.Prepare(t.Context(), initech.ID, "", tenancy.IsolationShared)),
		"for no one": second(c.Prepare(t.Context(), 0, "", tenancy.IsolationShared)),
	} {
		if wantError(t, err, tenancy.ErrInvalid, "stays where it is"); err == nil {
			t.Error(what)
		}
	}
	d, err := c.DataSource(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(t.Context(), acme.ID, d); err != nil { // its own place
		t.Error(err)
	}
	if err := c.DropPlace(t.Context(), d); err == nil {
		t.Error("its place was dropped under it")
	}
}

func TestAPreparedPlacePromisesItsNumber(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_plans.sql": {Data: []byte("-- +goose Up\nCREATE TABLE plans (name text);\nSELECT tenancy_must('plans');\nINSERT INTO plans VALUES ('free');\n")}}})
	d, err := tn.Catalog().Prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	tenancytest.Create(t, tn, "globex")
	made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", DataSource: &d})
	if err != nil {
		t.Fatal(err)
	}
	var id int64
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT tenant_id FROM plans`).Scan(&id); err != nil || tenancy.ID(id) != made.ID {
		t.Errorf("its row is of tenant %d and not of %d: %v", id, made.ID, err)
	}
	if d, err = tn.Catalog().Prepare(t.Context(), made.ID, "", tenancy.IsolationSchema); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().SetDataSource(t.Context(), made.ID, d); err != nil {
		t.Fatal(err)
	}
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT tenant_id FROM plans`).Scan(&id); err != nil || tenancy.ID(id) != made.ID {
		t.Errorf("in its new place its row is of tenant %d and not of %d: %v", id, made.ID, err)
	}
}

// COPY FROM is refused by a table with policies: rows are inserted, and what can be told apart is the number of round trips.
func TestRowsAreCopiedIntoASharedSchema(t *testing.T) {
	t.Parallel()
	_, tn, _, globex, _ := sharedFleet(t)
	ctx := tenancytest.Context(t, tn, "acme")
	notes, columns := pgx.Identifier{"notes"}, []string{"id", "tenant", "title"}
	rows := func(from, to int) pgx.CopyFromSource {
		return pgx.CopyFromSlice(to-from, func(i int) ([]any, error) {
			if from+i == 13_000 {
				return nil, errors.New("the source failed")
			}
			return []any{int64(from + i), "acme", fmt.Sprint(i)}, nil
		})
	}
	count := func() int {
		var n int
		if err := tn.DB().QueryRow(ctx, `SELECT count(*) FROM notes`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n, err := tn.DB().CopyFrom(ctx, notes, columns, rows(10_000, 10_501)); n != 501 || err != nil || count() != 502 {
		t.Errorf("copied %d of 501: %v; the table has %d rows", n, err, count())
	}
	if n, err := tn.DB().CopyFrom(ctx, notes, columns, rows(12_500, 13_100)); n != 0 || err == nil || count() != 502 {
		t.Errorf("copied %d of a source that fails: %v; the table has %d rows", n, err, count())
	}
	if n, err := tn.DB().CopyFrom(ctx, notes, columns, rows(9_500, 10_100)); n != 0 || sqlState(err) != "23505" || count() != 502 {
		t.Errorf("copied %d rows, some of which were there: %v; the table has %d rows", n, err, count())
	}
	if n, err := tn.DB().CopyFrom(ctx, notes, columns, rows(0, 0)); n != 0 || err != nil {
		t.Errorf("copied %d of none: %v", n, err)
	}
	err := tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		if n, err := tx.CopyFrom(ctx, notes, columns, rows(20_000, 20_300)); n != 300 || err != nil {
			t.Errorf("copied %d of 300 in a transaction: %v", n, err)
		}
		if n, err := tx.CopyFrom(ctx, notes, columns, rows(12_500, 13_100)); n != 0 || err == nil {
			t.Errorf("copied %d of a source that fails: %v", n, err)
		}
		return nil
	})
	if err != nil || count() != 802 {
		t.Errorf("transaction: %v; the table has %d rows", err, count())
	}
	_, err = tn.DB().CopyFrom(ctx, notes, []string{"tenant_id", "tenant", "title"}, pgx.CopyFromRows([][]any{{int64(globex.ID), "globex", "evil"}}))
	if sqlState(err) != "42501" {
		t.Errorf("copied into another tenant: %v, want 42501", err)
	}
	if n := scan[int](t, login(t, tn, globex.ID), `SELECT count(*) FROM notes`); n != 1 {
		t.Errorf("the other sees %d rows", n)
	}
}

// All of them lend the login of one owner, from two nodes, and take it back.
func TestTenantsOfASharedSchemaAreMadeAtOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	nodes := []*tenancy.Tenancy{
		f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationShared}),
		f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationShared}),
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			tn, name := nodes[i%2], fmt.Sprintf("acme-%d", i)
			made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name})
			if err == nil && i%4 < 2 { // purged while others are made
				if err = tn.Catalog().Delete(t.Context(), made.ID); err == nil {
					_, err = tn.Catalog().PurgeNow(t.Context(), made.ID, name)
				}
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	place := placeOf(t, f, mustTenant(t, nodes[0], "acme-2").ID)
	if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM `+place.Schema+`.tenancy_map`); n != 4 {
		t.Errorf("the map has %d logins, want those of 4 tenants", n)
	}
}

// A tenant that goes out of service in the middle of a migration takes none of the others with it.
func TestAMigrationOfASharedSchemaOutlivesASuspension(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex, _ := sharedFleet(t)
	started, proceed := make(chan struct{}), make(chan struct{})
	next := f.Open(t, tenancy.Config{Migrations: noteMigrations, GoMigrations: []tenancy.GoMigration{{Version: 2, Up: func(ctx context.Context, tx *databasesql.Tx) error {
		close(started)
		<-proceed
		_, err := tx.ExecContext(ctx, `SELECT 1`)
		return err
	}}}})
	ended := make(chan error, 1)
	go func() { ended <- second(next.Migrator().Tenant(t.Context(), globex.ID)) }()
	<-started
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{Drain: 1}); err != nil {
		t.Error(err)
	}
	close(proceed)
	if err := <-ended; err != nil {
		t.Errorf("the migration ended with the other's suspension: %v", err)
	}
}

func TestAMigrationThatFailsIsTriedOnceForASharedSchema(t *testing.T) {
	t.Parallel()
	f, _, acme, globex, _ := sharedFleet(t)
	var tries atomic.Int64
	failed := errors.New("the migration failed")
	next := f.Open(t, tenancy.Config{Migrations: noteMigrations, GoMigrations: []tenancy.GoMigration{{Version: 2, Up: func(context.Context, *databasesql.Tx) error {
		tries.Add(1)
		return failed
	}}}})
	done, err := next.Migrator().All(t.Context())
	if _, many := errors.AsType[*tenancy.MigrateError](err); !many || len(done) != 3 {
		t.Fatalf("migrated %+v, %v", done, err)
	}
	for _, m := range done {
		if !errors.Is(m.Err, failed) {
			t.Errorf("%s: %v", m.Tenant.Name, m.Err)
		}
	}
	if n := tries.Load(); n != 2 { // and once for the one with a schema of its own
		t.Errorf("it was tried %d times, want 2", n)
	}
	for _, tenant := range []tenancy.Tenant{acme, globex} {
		if err := next.DB().QueryRow(tenancytest.Context(t, next, tenant.Name), `SELECT 1 FROM notes`).Scan(new(int)); err != nil {
			t.Errorf("%s is not served: %v", tenant.Name, err)
		}
	}
	if err := next.Catalog().Delete(t.Context(), acme.ID); err != nil { // its rows can be erased all the same
		t.Fatal(err)
	}
	if r, err := next.Catalog().PurgeNow(t.Context(), acme.ID, "acme"); err != nil || !slices.Equal(r.Rows, []tenancy.ErasedRows{{Table: "notes", Rows: 1}}) {
		t.Errorf("purged %+v, %v", r, err)
	}
}

// The least budget that Open takes is enough for each verb.
func TestASharedSchemaIsMadeOnALeastBudget(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var tn *tenancy.Tenancy
	for conns := 1; tn == nil; conns++ {
		opened, err := tenancy.Open(ctx, tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Migrations: noteMigrations, Isolation: tenancy.IsolationShared,
			Limits: tenancy.Limits{ServerConns: conns, Nodes: 1, PrimaryConns: 4, TenantConns: 1}})
		if err == nil {
			tn = opened
			t.Cleanup(func() { _ = tn.Close() })
		} else if !errors.Is(err, tenancy.ErrInvalid) || conns > 100 {
			t.Fatal(err)
		}
	}
	made, err := tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tn.Catalog().AddReader(ctx, "main"); err != nil {
		t.Error(err)
	}
	if _, err := tn.Catalog().Export(ctx, made.ID, io.Discard); err != nil {
		t.Error(err)
	}
	if err := tn.Catalog().RotatePassword(ctx, made.ID); err != nil {
		t.Error(err)
	}
	if err := tn.Catalog().Delete(ctx, made.ID); err != nil {
		t.Error(err)
	}
	if _, err := tn.Catalog().Export(ctx, made.ID, io.Discard); err != nil {
		t.Error(err)
	}
	if err := tn.Catalog().DropReader(ctx, "main"); err != nil {
		t.Error(err)
	}
	if _, err := tn.Catalog().PurgeNow(ctx, made.ID, "acme"); err != nil {
		t.Error(err)
	}
}
