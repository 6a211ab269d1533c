package tenancy_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// readerMigrations are pageMigrations and a later one, with what could be written by: a routine with its owner's rights, and sequences.
func readerMigrations(t *testing.T) fstest.MapFS {
	t.Helper()
	files := maps.Clone(pageMigrations)
	files["00002_later.sql"] = &fstest.MapFile{Data: []byte(`-- +goose Up
CREATE TABLE later (tenant_id bigint, words text NOT NULL);
SELECT tenancy_must('later');
CREATE TABLE countries (name text NOT NULL);
INSERT INTO countries VALUES ('Andorra');
SELECT tenancy_common('countries');
CREATE SEQUENCE counter;
CREATE TABLE host_log (line text);
-- +goose StatementBegin
CREATE FUNCTION bump() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $$ SELECT nextval('counter') $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE PROCEDURE log_it() LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $$ INSERT INTO host_log VALUES ('x') $$;
-- +goose StatementEnd
`)}
	return files
}

// asReader connects with the reader's login where the tenant's data is.
func asReader(t *testing.T, tn *tenancy.Tenancy, d tenancy.DataSource, tenant tenancy.Tenant) (conn *pgx.Conn, schema string) {
	t.Helper()
	at, err := tn.Catalog().DataSource(t.Context(), tenant.ID)
	if err != nil {
		t.Fatal(err)
	}
	d.Database = at.Database
	if conn, err = connectTo(t, d); err != nil {
		t.Fatalf("the reader at %s: %v", d.Address(), err)
	}
	return conn, pgx.Identifier{at.Schema}.Sanitize() + "."
}

// wantRead checks that the reader sees all rows of the tenant, and of a shared schema those of its other tenants too.
func wantRead(t *testing.T, conn *pgx.Conn, schema string, tenant tenancy.Tenant) {
	t.Helper()
	for table, want := range map[string]int{"pages": 3, "footers": 2} {
		rows, err := conn.Query(t.Context(), `SELECT count(*) FROM `+schema+table+` WHERE tenant_id = $1`, tenant.ID)
		n, err2 := pgx.CollectExactlyOneRow(rows, pgx.RowTo[int])
		if err != nil || err2 != nil || n != want {
			t.Errorf("%s: the reader sees %d rows of %s, want %d: %v", tenant.Name, n, table, want, err2)
		}
	}
	if tenant.Isolation == tenancy.IsolationShared && scan[int](t, conn, `SELECT current_setting('server_version_num')::int`) < 150000 {
		return // a view asks there with its owner's rights, who is no reader
	}
	if n := scan[int](t, conn, `SELECT count(*) FROM `+schema+`titles WHERE title LIKE $1`, tenant.Name+"%"); n != 3 {
		t.Errorf("%s: the reader sees %d rows of a view, want 3", tenant.Name, n)
	}
}

func TestAReaderReadsAllTenantsAndWritesNothing(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	primary, admin := f.Admin(t, "primary"), f.Admin(t, "tenants")
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid WHERE m.member = ($1 || '_provisioner')::regrole AND r.rolname LIKE '%\_reader'`, fleetName(t, f)); n != 0 {
		t.Fatal("there is a reader before one was added")
	}
	d, err := tn.Catalog().AddReader(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	// What is made and migrated from here on is read as well.
	next := f.Open(t, tenancy.Config{Migrations: readerMigrations(t), Isolation: tenancy.IsolationSchema})
	if _, err := next.Migrator().All(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase, tenancy.IsolationShared} {
		tenants = append(tenants, withPages(t, next, "initech-"+string(isolation), isolation))
	}
	for i, tenant := range tenants {
		own := login(t, next, tenant.ID)
		must(t, own, `INSERT INTO later (words) VALUES ('later')`)
		must(t, own, `SELECT nextval('counter'), bump()`) // the tenant's own roles keep what PUBLIC had
		if tenant.Isolation != tenancy.IsolationShared {
			must(t, own, `CALL log_it()`)
		}
		conn, schema := asReader(t, next, d, tenant)
		wantRead(t, conn, schema, tenant)
		if n := scan[int](t, conn, `SELECT count(*) FROM `+schema+`later WHERE tenant_id = $1`, tenant.ID); n != 1 {
			t.Errorf("%s: the reader sees %d rows of a later table, want 1", tenant.Name, n)
		}
		if got := scan[string](t, conn, `SELECT name FROM `+schema+`countries`); got != "Andorra" {
			t.Errorf("%s: the reader sees %q in a table for all", tenant.Name, got)
		}
		if got := scan[string](t, conn, `SHOW default_transaction_read_only`) + scan[string](t, conn, `SHOW application_name`); got != "ontenancy reader" {
			t.Errorf("%s: its settings are %q", tenant.Name, got)
		}
		place, other := placeOf(t, f, tenant.ID), placeOf(t, f, tenants[(i+1)%len(tenants)].ID)
		wantNothingWritten(t, conn, schema, place, other)
		_ = conn.Close(t.Context())
	}
	// A tenant gains nothing by it.
	for _, tenant := range tenants {
		own := login(t, next, tenant.ID)
		if n := scan[int](t, own, `SELECT count(*) FROM pages WHERE title NOT LIKE $1`, tenant.Name+"%"); n != 0 {
			t.Errorf("%s reads %d rows of others", tenant.Name, n)
		}
		if _, err := own.Exec(t.Context(), `SET ROLE `+d.User); sqlState(err) != "42501" {
			t.Errorf("%s becomes the reader: %v", tenant.Name, err)
		}
		_ = own.Close(t.Context())
	}
	// A table that its owner makes by hand is read, by default privileges.
	for _, tenant := range tenants[:1] {
		place := placeOf(t, f, tenant.ID)
		must(t, admin, `SET ROLE `+place.Owner)
		must(t, admin, `CREATE TABLE `+place.table("by_hand")+` AS SELECT 'mine' AS words`)
		must(t, admin, `RESET ROLE`)
		conn, schema := asReader(t, next, d, tenant)
		if got := scan[string](t, conn, `SELECT words FROM `+schema+`by_hand`); got != "mine" {
			t.Errorf("%s: the reader sees %q in a table made by hand", tenant.Name, got)
		}
		_ = conn.Close(t.Context())
	}
	// What an administrator has it log stays, whatever it does.
	must(t, admin, `ALTER ROLE `+d.User+` SET log_statement = 'all'`)
	logged, _ := asReader(t, next, d, tenants[0])
	for _, sql := range []string{`SET log_statement = 'none'`, `ALTER ROLE ` + d.User + ` SET log_statement = 'none'`, `ALTER ROLE ` + d.User + ` RESET log_statement`} {
		must(t, logged, `SET default_transaction_read_only = off`)
		if _, err := logged.Exec(t.Context(), sql); sqlState(err) != "42501" {
			t.Errorf("%s: %v, want 42501", sql, err)
		}
	}
	must(t, logged, `ALTER ROLE `+d.User+` RESET ALL`)
	_ = logged.Close(t.Context())
	// Called again it has another password, and the role stays.
	again, err := tn.Catalog().AddReader(t.Context(), "main")
	if err != nil || again.User != d.User || again.Password == d.Password {
		t.Errorf("again: %v, %v", again, err)
	}
	if _, err := connectTo(t, d); sqlState(err) != "28P01" {
		t.Errorf("the first password: %v, want 28P01", err)
	}
	held, _ := asReader(t, next, again, tenants[0])
	if got := scan[string](t, held, `SHOW log_statement`) + scan[string](t, held, `SHOW default_transaction_read_only`); got != "allon" {
		t.Errorf("its settings are %q", got)
	}
	wantDropped(t, f, tn, again.User, tenants)
	if err := held.Ping(t.Context()); err == nil {
		t.Error("a session of the reader outlived it")
	}
	if _, err := connectTo(t, again); sqlState(err) != "28P01" && sqlState(err) != "28000" {
		t.Errorf("a dropped reader logs in: %v", err)
	}
	wantError(t, tn.Catalog().DropReader(t.Context(), "main"), tenancy.ErrInvalid, "no reader")
	actions := scan[[]string](t, primary, `SELECT array_agg(action ORDER BY id) FROM tenancy.audit WHERE action LIKE '%reader' AND detail ->> 'role' = $1`, again.User)
	if !slices.Equal(actions, []string{"add reader", "add reader", "drop reader"}) {
		t.Errorf("the audit trail has %q", actions)
	}
	for _, tenant := range tenants { // who is served as before
		own := login(t, next, tenant.ID)
		must(t, own, `INSERT INTO pages (title) VALUES ('after'); SELECT nextval('counter'), bump()`)
	}
}

// wantNothingWritten tries to write with the read-only setting of its login off: it is the rights that count.
func wantNothingWritten(t *testing.T, conn *pgx.Conn, schema string, place, other placeRow) {
	t.Helper()
	writes := []string{
		`INSERT INTO ` + schema + `pages (tenant_id, title) VALUES (1, 'evil')`,
		`UPDATE ` + schema + `pages SET title = 'evil'`,
		`DELETE FROM ` + schema + `footers`,
		`TRUNCATE ` + schema + `footers`,
		`COPY ` + schema + `pages (title) FROM STDIN`,
		`SELECT title FROM ` + schema + `pages FOR UPDATE`,
		`INSERT INTO ` + schema + `goose_db_version (version_id, is_applied) VALUES (9, true)`,
		`CREATE TABLE ` + schema + `evil ()`,
		`CREATE SCHEMA evil`,
		`CREATE TEMP TABLE evil ()`,
		`ALTER TABLE ` + schema + `pages ADD COLUMN evil text`,
		`CREATE INDEX ON ` + schema + `pages (title)`,
		`DROP TABLE ` + schema + `pages`,
		`SELECT nextval('` + schema + `counter')`,
		`SELECT setval('` + schema + `counter', 99)`,
		`SELECT ` + schema + `bump()`,
		`CALL ` + schema + `log_it()`,
		`SELECT ` + schema + `tenancy_enter(1)`,
		`CREATE ROLE evil`,
	}
	for _, role := range []string{place.Login, place.Owner, place.Runtime, other.Login, other.Owner, other.Runtime} {
		writes = append(writes, `SET ROLE `+role)
	}
	if _, err := conn.Exec(t.Context(), writes[0]); sqlState(err) != "25006" && sqlState(err) != "42501" {
		t.Errorf("read-only: %v", err)
	}
	must(t, conn, `SET default_transaction_read_only = off`)
	for _, sql := range writes {
		if _, err := conn.Exec(t.Context(), sql); sqlState(err) != "42501" {
			t.Errorf("%s: %v, want 42501", sql, err)
		}
	}
	must(t, conn, `SET default_transaction_read_only = on`)
}

// wantDropped drops the reader, and looks for what is left of it.
func wantDropped(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy, role string, tenants []tenancy.Tenant) {
	t.Helper()
	admin := f.Admin(t, "tenants")
	oid := scan[uint32](t, admin, `SELECT oid FROM pg_roles WHERE rolname = $1`, role)
	granted := scan[int](t, admin, `SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1`, oid)
	if granted < 30 {
		t.Errorf("the reader had %d grants only: nothing will be shown", granted)
	}
	if err := tn.Catalog().DropReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	for what, sql := range map[string]string{
		"roles":        `SELECT count(*) FROM pg_roles WHERE oid = $1`,
		"dependencies": `SELECT count(*) FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1`,
		"memberships":  `SELECT count(*) FROM pg_auth_members WHERE $1 IN (roleid, member)`,
		"settings":     `SELECT count(*) FROM pg_db_role_setting WHERE setrole = $1`,
		"databases":    `SELECT count(*) FROM pg_database d, aclexplode(d.datacl) a WHERE a.grantee = $1`,
	} {
		if n := scan[int](t, admin, sql, oid); n != 0 {
			t.Errorf("%d %s of the reader are left", n, what)
		}
	}
	for _, tenant := range tenants {
		at, err := tn.Catalog().SourceForTest(t.Context(), tenant.ID)
		if err != nil {
			t.Fatal(err)
		}
		own, err := connectTo(t, at)
		if err != nil {
			t.Fatal(err)
		}
		for what, sql := range map[string]string{
			"grants on relations":  `SELECT count(*) FROM pg_class c, aclexplode(c.relacl) a WHERE a.grantee = $1`,
			"grants on schemas":    `SELECT count(*) FROM pg_namespace n, aclexplode(n.nspacl) a WHERE a.grantee = $1`,
			"grants on routines":   `SELECT count(*) FROM pg_proc p, aclexplode(p.proacl) a WHERE a.grantee = $1`,
			"default privileges":   `SELECT count(*) FROM pg_default_acl d, aclexplode(d.defaclacl) a WHERE a.grantee = $1`,
			"policies":             `SELECT count(*) FROM pg_policy WHERE $1 = ANY (polroles)`,
			"policies that say so": `SELECT count(*) FROM pg_policy WHERE $1 <> 0 AND pg_get_expr(polqual, polrelid) LIKE '%\_reader%'`,
		} {
			if n := scan[int](t, own, sql, oid); n != 0 {
				t.Errorf("%s: %d %s of the reader are left", tenant.Name, n, what)
			}
		}
		_ = own.Close(t.Context())
	}
}

// A reader stands in nobody's way, and what is dropped and moved is not missed.
func TestPlacesComeAndGoBesideAReader(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	c := tn.Catalog()
	d, err := c.AddReader(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	// One moves to a database of its own, one back to a schema.
	for id, isolation := range map[tenancy.ID]tenancy.Isolation{tenants[1].ID: tenancy.IsolationDatabase, tenants[3].ID: tenancy.IsolationSchema} {
		was, err := c.DataSource(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		to, err := c.Prepare(t.Context(), id, "", isolation)
		if err != nil {
			t.Fatal(err)
		}
		own, err := connectTo(t, to)
		if err != nil {
			t.Fatal(err)
		}
		must(t, own, `INSERT INTO pages (title) VALUES ('moved')`)
		_ = own.Close(t.Context())
		if err := c.SetDataSource(t.Context(), id, to); err != nil {
			t.Fatal(err)
		}
		moved, err := c.Tenant(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		conn, schema := asReader(t, tn, d, moved)
		if got := scan[string](t, conn, `SELECT title FROM `+schema+`pages`); got != "moved" {
			t.Errorf("%s: the reader sees %q in its new place", moved.Name, got)
		}
		_ = conn.Close(t.Context())
		if err := c.DropPlace(t.Context(), was); err != nil {
			t.Errorf("%s: the place that it has left: %v", moved.Name, err)
		}
	}
	for _, tenant := range []tenancy.Tenant{tenants[0], tenants[2], tenants[4]} {
		conn, schema := asReader(t, tn, d, tenant) // which is idle there
		wantRead(t, conn, schema, tenant)
		if err := c.RotatePassword(t.Context(), tenant.ID); err != nil {
			t.Error(err)
		}
		if err := c.Delete(t.Context(), tenant.ID); err != nil {
			t.Fatal(err)
		}
		wantRead(t, conn, schema, tenant)
		if _, err := c.PurgeNow(t.Context(), tenant.ID, tenant.Name); err != nil {
			t.Errorf("purge beside a reader: %v", err)
		}
	}
	conn, schema := asReader(t, tn, d, tenants[5])
	wantRead(t, conn, schema, tenants[5])
	if n := scan[int](t, conn, `SELECT count(*) FROM `+schema+`pages WHERE tenant_id <> $1`, tenants[5].ID); n != 0 {
		t.Errorf("%d rows of a purged tenant are left", n)
	}
	if n, err := c.RotateKeys(t.Context()); err != nil || n != 0 {
		t.Errorf("sealed again %d, %v", n, err)
	}
	// A shared schema in which nobody is any more is one all the same.
	area := placeOf(t, f, tenants[5].ID)
	if err := c.Delete(t.Context(), tenants[5].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.PurgeNow(t.Context(), tenants[5].ID, tenants[5].Name); err != nil {
		t.Fatal(err)
	}
	if err := c.DropReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM `+area.table("tenancy_readers")); n != 0 {
		t.Errorf("the shared schema has %d readers", n)
	}
	if d, err = c.AddReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	hooli := withPages(t, tn, "hooli", tenancy.IsolationShared)
	conn, schema = asReader(t, tn, d, hooli)
	wantRead(t, conn, schema, hooli)
}

// Whoever comes first, a place that is being made is read in the end, and one that is dropped meanwhile keeps nobody.
func TestAReaderComesWhileTenantsAreMade(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	nodes := []*tenancy.Tenancy{
		f.Open(t, tenancy.Config{Migrations: pageMigrations, Isolation: tenancy.IsolationSchema}),
		f.Open(t, tenancy.Config{Migrations: pageMigrations, Isolation: tenancy.IsolationSchema}),
	}
	c := nodes[0].Catalog()
	var wg sync.WaitGroup
	for i := range 9 {
		wg.Go(func() {
			isolation := []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase, tenancy.IsolationShared}[i%3]
			if _, err := nodes[i%2].Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("acme-%d", i), Isolation: isolation}); err != nil {
				t.Errorf("create beside a reader: %v", err)
			}
		})
	}
	if _, err := c.AddReader(t.Context(), "main"); err != nil {
		t.Error(err)
	}
	for tries := 1; ; tries++ {
		err := c.DropReader(t.Context(), "main")
		if err == nil {
			break
		}
		if sqlState(err) != "2BP01" || tries == 100 { // a place that was let read a moment before: it is called again
			t.Fatal(err)
		}
	}
	d, err := c.AddReader(t.Context(), "main")
	if err != nil {
		t.Error(err)
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for tenant, err := range c.Tenants(t.Context(), tenancy.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		conn, schema := asReader(t, nodes[0], d, tenant)
		if n := scan[int](t, conn, `SELECT count(*) FROM `+schema+`pages`); n != 0 {
			t.Errorf("%s has %d rows", tenant.Name, n)
		}
		_ = conn.Close(t.Context())
	}
}

func TestAReaderIsMadeAndDroppedStepByStep(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	c, admin, primary := tn.Catalog(), f.Admin(t, "tenants"), f.Admin(t, "primary")
	wantError(t, second(c.AddReader(t.Context(), "elsewhere")), tenancy.ErrInvalid, "elsewhere", "not registered")
	wantError(t, c.DropReader(t.Context(), "elsewhere"), tenancy.ErrInvalid, "elsewhere", "not registered")
	wantError(t, c.DropReader(t.Context(), "main"), tenancy.ErrInvalid, "no reader")
	d, err := c.AddReader(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	area := placeOf(t, f, tenants[4].ID)
	for _, died := range []string{ // after which the next call finds what is there
		`REVOKE ALL ON SCHEMA ` + placeOf(t, f, tenants[0].ID).Schema + ` FROM ` + d.User,
		`DELETE FROM ` + area.table("tenancy_readers"),
		`DROP OWNED BY ` + d.User + ` CASCADE`,
	} {
		must(t, admin, died)
		must(t, primary, `UPDATE tenancy.readers SET state = 'intent'`)
		if d, err = c.AddReader(t.Context(), "main"); err != nil {
			t.Fatalf("after %s: %v", died, err)
		}
		for _, tenant := range tenants {
			conn, schema := asReader(t, tn, d, tenant)
			wantRead(t, conn, schema, tenant)
			_ = conn.Close(t.Context())
		}
	}
	// A right that was given by hand is seen.
	must(t, admin, `GRANT `+placeOf(t, f, tenants[0].ID).Runtime+` TO `+d.User)
	wantError(t, second(c.AddReader(t.Context(), "main")), tenancy.ErrSetup, "member of a role")
	must(t, admin, `REVOKE `+placeOf(t, f, tenants[0].ID).Runtime+` FROM `+d.User)
	must(t, admin, `GRANT INSERT ON `+placeOf(t, f, tenants[0].ID).table("pages")+` TO `+d.User)
	wantError(t, second(c.AddReader(t.Context(), "main")), tenancy.ErrSetup, "write to a table")
	// A DropReader died when the role was gone.
	must(t, admin, `DELETE FROM `+area.table("tenancy_readers"))
	for _, database := range scan[[]string](t, admin, `SELECT array_agg(datname::text) FROM pg_database d, aclexplode(d.datacl) a WHERE a.grantee = $1::regrole`, d.User) {
		cc := admin.Config().Copy()
		cc.Database = database
		conn, err := pgx.ConnectConfig(t.Context(), cc)
		if err != nil {
			t.Fatal(err)
		}
		must(t, conn, `DROP OWNED BY `+d.User+` CASCADE`)
		_ = conn.Close(t.Context())
	}
	must(t, admin, `DROP ROLE `+d.User)
	if err := c.DropReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, primary, `SELECT count(*) FROM tenancy.readers`); n != 0 {
		t.Errorf("the primary lists %d readers", n)
	}
	if fresh, err := c.AddReader(t.Context(), "main"); err != nil || fresh.User == d.User {
		t.Errorf("another reader: %v, %v", fresh, err)
	}
	if text := fmt.Sprintf("%v %+v", d, &d); strings.Contains(text, d.Password.Reveal()) {
		t.Error("its password is shown")
	}
}

// DROP OWNED BY in one database takes back CONNECT on all: what is left in the others is found without it.
func TestADropReaderThatDiedBetweenDatabasesIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	c, admin := tn.Catalog(), f.Admin(t, "tenants")
	d, err := c.AddReader(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	own, err := c.DataSource(t.Context(), tenants[2].ID)
	if err != nil {
		t.Fatal(err)
	}
	cc := admin.Config().Copy()
	cc.Database = own.Database
	conn, err := pgx.ConnectConfig(t.Context(), cc)
	if err != nil {
		t.Fatal(err)
	}
	must(t, conn, `DROP OWNED BY `+d.User+` CASCADE`)
	_ = conn.Close(t.Context())
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_database d, aclexplode(d.datacl) a WHERE a.grantee = $1::regrole`, d.User); n != 0 {
		t.Fatalf("it may connect to %d databases", n)
	}
	if err := c.DropReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, d.User); n != 0 {
		t.Error("the role is left")
	}
}
