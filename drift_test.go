package tenancy_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// driftMigrations make one of each kind of object, and columns with a gap.
var driftMigrations = fstest.MapFS{"00001_shop.sql": &fstest.MapFile{Data: []byte(`-- +goose Up
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE DOMAIN price AS numeric CONSTRAINT positive CHECK (VALUE > 0);
CREATE TYPE pair AS (a int, b text);
CREATE SEQUENCE tickets INCREMENT 5;
CREATE TABLE customers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, gone text, name text NOT NULL COLLATE "C", mood mood DEFAULT 'sad');
ALTER TABLE customers DROP COLUMN gone;
CREATE TABLE orders (
	id bigint PRIMARY KEY,
	customer bigint CONSTRAINT of_customer REFERENCES customers ON DELETE CASCADE,
	total numeric NOT NULL DEFAULT 0 CONSTRAINT not_negative CHECK (total >= 0),
	gross numeric GENERATED ALWAYS AS (total * 1.2) STORED,
	note text,
	slug text CONSTRAINT one_slug UNIQUE,
	size varchar(1) DEFAULT 'M' CHECK (size IN ('S', 'M')),
	state varchar(9) CHECK (state = 'new')
);
COMMENT ON TABLE orders IS 'What was bought.';
CREATE INDEX orders_note ON orders (note);
CREATE TABLE log (at timestamptz NOT NULL, line text) PARTITION BY RANGE (at);
CREATE TABLE log_2026 PARTITION OF log FOR VALUES FROM ('2026-01-01Z') TO ('2027-01-01Z');
CREATE VIEW totals AS SELECT customer, sum(total) AS total FROM orders GROUP BY customer;
CREATE STATISTICS orders_stat ON customer, note FROM orders;
-- +goose StatementBegin
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := coalesce(NEW.note, 'new'); RETURN NEW; END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT n * 2 $$;
-- +goose StatementEnd
CREATE TRIGGER stamped BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION stamp();
CREATE POLICY visible ON customers USING (id > 0);
SELECT tenancy_must('orders');
-- +goose Down
`)}}

func driftFleet(t *testing.T) (*tenancytest.Fleet, *tenancy.Tenancy) {
	t.Helper()
	f := tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	return f, f.Open(t, tenancy.Config{Migrations: driftMigrations, Isolation: tenancy.IsolationSchema})
}

func makeIn(t *testing.T, tn *tenancy.Tenancy, name string, isolation tenancy.Isolation) tenancy.Tenant {
	t.Helper()
	made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Isolation: isolation})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func drift(t *testing.T, tn *tenancy.Tenancy, reference ...tenancy.ID) map[string]tenancy.Drift {
	t.Helper()
	all, err := tn.Catalog().Drift(t.Context(), reference...)
	if err != nil {
		t.Fatal(err)
	}
	by := map[string]tenancy.Drift{}
	for _, d := range all {
		by[d.Tenant.Name] = d
	}
	if !slices.IsSortedFunc(all, func(a, b tenancy.Drift) int { return int(a.Tenant.ID - b.Tenant.ID) }) {
		t.Error("the result is not in order of ID")
	}
	return by
}

// wantNoDrift checks that nothing differs, and that all have the same fingerprint.
func wantNoDrift(t *testing.T, what string, by map[string]tenancy.Drift, tenants int) {
	t.Helper()
	prints := map[string]bool{}
	for name, d := range by {
		if d.Err != nil || d.Version != d.Wants || d.Fingerprint == "" {
			t.Errorf("%s: %s was not compared: version %d, wants %d: %v", what, name, d.Version, d.Wants, d.Err)
		}
		for _, diff := range d.Differences {
			t.Errorf("%s: %s: %s", what, name, diff)
		}
		prints[d.Fingerprint] = true
	}
	if len(by) != tenants || len(prints) != 1 {
		t.Errorf("%s: %d tenants with %d fingerprints, want %d with 1", what, len(by), len(prints), tenants)
	}
}

func TestDriftIsToldInWords(t *testing.T) {
	t.Parallel()
	f, tn := driftFleet(t)
	acme, globex := makeIn(t, tn, "acme", tenancy.IsolationSchema), makeIn(t, tn, "globex", tenancy.IsolationSchema)
	wantNoDrift(t, "untouched", drift(t, tn), 2)
	admin, place := f.Admin(t, "tenants"), placeOf(t, f, acme.ID)
	names := strings.NewReplacer("{s}", pgx.Identifier{place.Schema}.Sanitize(), "{owner}", place.Owner, "{runtime}", place.Runtime)
	for _, seed := range []struct{ sql, want string }{
		{`DROP TABLE {s}.log_2026`, `missing table log_2026: wants "table, partition of {schema}.log, FOR VALUES FROM`},
		{`CREATE TABLE {s}.extra (id int)`, `extra table extra: has "table"`},
		{`ALTER TABLE {s}.customers ALTER name TYPE varchar(20) COLLATE "C"`, `column customers.name: has "character varying(20) COLLATE \"C\" NOT NULL", wants "text COLLATE \"C\" NOT NULL"`},
		{`ALTER TABLE {s}.customers ALTER name TYPE text COLLATE "POSIX"`, `column customers.name: has "text COLLATE \"POSIX\" NOT NULL", wants "text COLLATE \"C\" NOT NULL"`},
		{`ALTER TABLE {s}.orders ALTER total SET DEFAULT 1`, `column orders.total: has "numeric DEFAULT 1 NOT NULL", wants "numeric DEFAULT 0 NOT NULL"`},
		{`ALTER TABLE {s}.orders ALTER total DROP NOT NULL`, `column orders.total: has "numeric DEFAULT 0", wants "numeric DEFAULT 0 NOT NULL"`},
		{`ALTER TABLE {s}.customers ALTER id DROP IDENTITY`, `column customers.id: has "bigint NOT NULL", wants "bigint GENERATED ALWAYS AS IDENTITY NOT NULL"`},
		{`ALTER TABLE {s}.orders ALTER gross DROP EXPRESSION`, `column orders.gross: has "numeric", wants "numeric GENERATED ALWAYS AS`},
		{`ALTER TABLE {s}.orders ADD COLUMN colour text`, `extra column orders.colour: has "text"`},
		{`ALTER TABLE {s}.orders DROP COLUMN note CASCADE`, `missing column orders.note: wants "text"`},
		{`ALTER TABLE {s}.orders ALTER note SET STORAGE EXTERNAL`, `column orders.note: has "text STORAGE EXTERNAL", wants "text"`},
		{`ALTER TABLE {s}.orders ALTER note SET STATISTICS 500`, `column orders.note: has "text STATISTICS 500", wants "text"`},
		{`ALTER TABLE {s}.orders DROP CONSTRAINT not_negative`, `missing check orders.not_negative: wants "CHECK ((total >= (0)::numeric))"`},
		{`ALTER TABLE {s}.orders DROP CONSTRAINT one_slug`, `missing unique constraint orders.one_slug: wants "UNIQUE (slug)"`},
		{`ALTER TABLE {s}.orders DROP CONSTRAINT of_customer, ADD CONSTRAINT of_customer FOREIGN KEY (customer) REFERENCES {s}.customers`,
			`foreign key orders.of_customer: has "FOREIGN KEY (customer) REFERENCES {schema}.customers(id)", wants "FOREIGN KEY (customer) REFERENCES {schema}.customers(id) ON DELETE CASCADE"`},
		{`ALTER TABLE {s}.orders DISABLE TRIGGER ALL`, `foreign key orders.of_customer: has "FOREIGN KEY (customer) REFERENCES {schema}.customers(id) ON DELETE CASCADE, not enforced`},
		{`DROP INDEX {s}.orders_note`, `missing index orders_note: wants "CREATE INDEX orders_note ON {schema}.orders USING btree (note)"`},
		{`DROP INDEX {s}.orders_note; CREATE INDEX orders_note ON {s}.orders USING hash (note)`, `index orders_note: has "CREATE INDEX orders_note ON {schema}.orders USING hash (note)"`},
		{`DROP INDEX {s}.orders_note; CREATE INDEX orders_note ON {s}.orders (note) WHERE note <> ''`, `WHERE (note <> ''::text)", wants "CREATE INDEX orders_note`},
		{`UPDATE pg_catalog.pg_index SET indisvalid = false WHERE indexrelid = '{s}.orders_note'::regclass`, `btree (note), invalid", wants "CREATE INDEX`},
		{`CREATE OR REPLACE VIEW {s}.totals AS SELECT customer, sum(total) * 2 AS total FROM {s}.orders GROUP BY customer`, `view totals: has "`},
		{`CREATE OR REPLACE FUNCTION {s}.twice(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT n * 3'`, `function twice(n integer): has "CREATE OR REPLACE FUNCTION {schema}.twice(n integer)`},
		{`ALTER FUNCTION {s}.twice(int) VOLATILE`, `function twice(n integer): has "`},
		{`ALTER FUNCTION {s}.twice(int) SECURITY DEFINER`, `SECURITY DEFINER`},
		{`ALTER FUNCTION {s}.twice(int) SET search_path = pg_temp`, `SET search_path TO 'pg_temp'`},
		{`CREATE FUNCTION {s}.thrice(n int) RETURNS int LANGUAGE sql AS 'SELECT n * 3'`, `extra function thrice(n integer): has "`},
		{`CREATE OR REPLACE FUNCTION {s}.tenancy_tenant(who name DEFAULT current_user) RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE AS ' SELECT 99::bigint '`, `SELECT 99::bigint`},
		{`ALTER TABLE {s}.orders DISABLE TRIGGER stamped`, `trigger orders.stamped: has "CREATE TRIGGER stamped BEFORE INSERT ON {schema}.orders FOR EACH ROW EXECUTE FUNCTION {schema}.stamp() disabled"`},
		{`DROP TRIGGER stamped ON {s}.orders`, `missing trigger orders.stamped: wants "`},
		{`CREATE RULE kept AS ON DELETE TO {s}.customers DO INSTEAD NOTHING`, `extra rule customers.kept: has "`},
		{`ALTER SEQUENCE {s}.tickets INCREMENT 1`, `sequence tickets: has "AS bigint START 1 INCREMENT 1 FROM 1 TO`},
		{`ALTER SEQUENCE {s}.tickets OWNED BY {s}.orders.id`, `CACHE 1, owned by orders.id", wants "AS bigint`},
		{`ALTER TYPE {s}.mood ADD VALUE 'angry' BEFORE 'happy'`, `enum mood: has "'sad', 'angry', 'happy'", wants "'sad', 'happy'"`},
		{`ALTER TYPE {s}.pair ADD ATTRIBUTE c int`, `type pair: has "(a integer, b text, c integer)", wants "(a integer, b text)"`},
		{`ALTER DOMAIN {s}.price DROP CONSTRAINT positive`, `missing check price.positive: wants "CHECK ((VALUE > (0)::numeric))"`},
		{`ALTER POLICY visible ON {s}.customers USING (true)`, `policy customers.visible: has "PERMISSIVE FOR ALL TO PUBLIC USING (true)", wants "PERMISSIVE FOR ALL TO PUBLIC USING ((id > 0))"`},
		{`ALTER TABLE {s}.customers ENABLE ROW LEVEL SECURITY`, `table customers: has "table, row security", wants "table"`},
		{`ALTER TABLE {s}.orders REPLICA IDENTITY FULL`, `table orders: has "table, replica identity full", wants "table"`},
		{`ALTER TABLE {s}.orders SET (fillfactor = 70)`, `table orders: has "table, with (fillfactor=70)", wants "table"`},
		{`ALTER TABLE {s}.log DETACH PARTITION {s}.log_2026`, `table log_2026: has "table", wants "table, partition of`},
		{`DROP STATISTICS {s}.orders_stat`, `missing statistics orders_stat`},
		{`REVOKE INSERT ON {s}.orders FROM {runtime}`, `grant table orders to {runtime}: has "DELETE, SELECT, UPDATE", wants "DELETE, INSERT, SELECT, UPDATE"`},
		{`GRANT TRUNCATE ON {s}.orders TO PUBLIC`, `extra grant table orders to everybody: has "TRUNCATE"`},
		{`GRANT UPDATE (version_id) ON {s}.goose_db_version TO {runtime}`, `extra grant column goose_db_version.version_id to {runtime}: has "UPDATE"`},
		{`GRANT USAGE ON SCHEMA {s} TO PUBLIC`, `extra grant schema to everybody: has "USAGE"`},
		{`REVOKE EXECUTE ON FUNCTION {s}.twice(int) FROM {runtime}, PUBLIC`, `missing grant function twice(n integer) to {runtime}: wants "EXECUTE"`},
		{`ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA {s} GRANT TRUNCATE ON TABLES TO {runtime}`, `default privileges of {owner} for tables to {runtime}: has "DELETE, INSERT, SELECT, TRUNCATE, UPDATE"`},
		{`COMMENT ON TABLE {s}.orders IS 'What was sold.'`, `comment table orders: has "What was sold.", wants "What was bought."`},
		{`COMMENT ON COLUMN {s}.orders.note IS 'by hand'`, `extra comment table orders.note: has "by hand"`},
		{`ALTER TABLE {s}.orders OWNER TO CURRENT_USER`, `owner table orders: has "`},
		{`DROP SCHEMA {s} CASCADE`, `missing schema {schema}: wants`},
	} {
		// Each in a transaction that is taken back, in which the superuser's session reads what the catalog's would.
		if _, err := admin.Exec(t.Context(), "BEGIN"); err != nil {
			t.Fatal(err)
		}
		must(t, admin, names.Replace(seed.sql))
		var told []string
		for _, d := range tenancy.CompareForTest(t, tn, admin, acme.ID, globex.ID) {
			told = append(told, d.String())
		}
		if !slices.ContainsFunc(told, func(s string) bool { return strings.Contains(s, seed.want) }) {
			t.Errorf("%s:\nwant %s\ntold %s", seed.sql, seed.want, strings.Join(told, "\n     "))
		}
		if len(told) > 8 {
			t.Errorf("%s: %d differences of one change:\n%s", seed.sql, len(told), strings.Join(told, "\n"))
		}
		must(t, admin, "ROLLBACK")
	}
	// And by the verb, of which the other tenant hears nothing.
	must(t, admin, names.Replace(`ALTER TABLE {s}.orders ALTER note TYPE varchar(20)`))
	by := drift(t, tn)
	if d := by["acme"]; d.Err != nil || len(d.Differences) != 1 || d.Differences[0] != (tenancy.Difference{Kind: "column", Object: "orders.note", Has: "character varying(20)", Wants: "text"}) || d.Fingerprint == by["globex"].Fingerprint {
		t.Errorf("acme: %+v", d)
	}
	if d := by["globex"]; d.Err != nil || len(d.Differences) > 0 {
		t.Errorf("globex: %+v", d)
	}
	if d := drift(t, tn, acme.ID)["globex"]; len(d.Differences) != 1 || d.Differences[0].Has != "text" {
		t.Errorf("globex beside acme: %+v", d)
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.data_sources WHERE state <> 'dropped'`); n != 2 {
		t.Errorf("%d places are left, want 2", n)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_namespace WHERE nspname LIKE 't\_%'`); n != 2 {
		t.Errorf("%d schemas are left, want 2", n)
	}
}

func TestWhatIsATenantsOwnIsNoDrift(t *testing.T) {
	t.Parallel()
	f, tn := driftFleet(t)
	c, admin := tn.Catalog(), f.Admin(t, "tenants")
	acme := makeIn(t, tn, "acme", tenancy.IsolationSchema)
	globex := makeIn(t, tn, "globex", tenancy.IsolationSchema)
	makeIn(t, tn, "initech", tenancy.IsolationDatabase)
	if _, err := c.Create(t.Context(), tenancy.NewTenant{Name: "hooli", Isolation: tenancy.IsolationShared}); err != nil {
		t.Log(err) // its migrations are not made for it
	}
	wantNoDrift(t, "a schema and a database", drift(t, tn), 3)
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		wantNoDrift(t, what, drift(t, tn), 3)
	}
	step("renamed", c.Rename(t.Context(), acme.ID, "acme-2"))
	step("a rotated password", c.RotatePassword(t.Context(), acme.ID))
	step("dense", c.SetDense(t.Context(), acme.ID, true))
	d, err := c.Prepare(t.Context(), globex.ID, "")
	if err == nil {
		err = c.SetDataSource(t.Context(), globex.ID, d)
	}
	step("moved", err)
	wantNoDrift(t, "moved, beside globex", drift(t, tn, globex.ID), 3)
	_, err = c.AddReader(t.Context(), "main")
	must(t, admin, `REVOKE SELECT ON `+placeOf(t, f, acme.ID).table("orders")+` FROM `+scan[string](t, f.Admin(t, "primary"), `SELECT role FROM tenancy.readers`))
	step("with a reader that may read less of one", err)
	step("without it", c.DropReader(t.Context(), "main"))
	makeIn(t, tn, "new", tenancy.IsolationSchema)
	wantNoDrift(t, "one that was made after the reader had gone", drift(t, tn), 4)
	place := placeOf(t, f, acme.ID)
	must(t, admin, `SET ROLE `+place.Owner)
	must(t, admin, `ALTER TABLE `+place.table("orders")+` DROP COLUMN slug, ADD COLUMN slug text CONSTRAINT one_slug UNIQUE`)
	must(t, admin, `SELECT nextval('`+place.table("tickets")+`'); INSERT INTO `+place.table("orders")+` (id) VALUES (1); ANALYZE `+place.table("orders"))
	must(t, admin, `RESET ROLE`)
	wantNoDrift(t, "a column at another place, a row, a sequence", drift(t, tn), 4)
	if err := c.Suspend(t.Context(), globex.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	wantNoDrift(t, "suspended", drift(t, tn), 4)
	t.Run("restored", func(t *testing.T) {
		restore(t, admin, place.Schema)
		wantNoDrift(t, "restored from a dump", drift(t, tn), 4)
	})
}

// restore dumps the schema, drops it, and restores it, as operators do.
func restore(t *testing.T, admin *pgx.Conn, schema string) {
	t.Helper()
	bin := scan[string](t, admin, `SELECT setting FROM pg_catalog.pg_config WHERE name = 'BINDIR'`)
	if _, err := os.Stat(filepath.Join(bin, "pg_dump")); err != nil {
		t.Skip("no pg_dump beside the server: ", err)
	}
	c := admin.Config()
	run := func(program string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, program), args...)
		cmd.Env = []string{"PGHOST=" + c.Host, fmt.Sprint("PGPORT=", c.Port), "PGUSER=" + c.User, "PGPASSWORD=" + c.Password, "PGDATABASE=" + c.Database}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", program, err, out)
		}
	}
	file := filepath.Join(t.TempDir(), "dump")
	run("pg_dump", "--schema="+schema, "--format=custom", "--file="+file)
	must(t, admin, `DROP SCHEMA `+pgx.Identifier{schema}.Sanitize()+` CASCADE`)
	run("pg_restore", "--exit-on-error", "--dbname="+c.Database, file)
}

func TestDriftTellsVersionsAndFailuresApart(t *testing.T) {
	t.Parallel()
	f, tn := driftFleet(t)
	acme, globex := makeIn(t, tn, "acme", tenancy.IsolationSchema), makeIn(t, tn, "globex", tenancy.IsolationSchema)
	later := fstest.MapFS{"00001_shop.sql": driftMigrations["00001_shop.sql"], "00002_more.sql": &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE more (id int);\n-- +goose Down\n")}}
	next := f.Open(t, tenancy.Config{Migrations: later, Isolation: tenancy.IsolationSchema})
	if _, err := next.Migrator().Tenant(t.Context(), globex.ID); err != nil {
		t.Fatal(err)
	}
	by := drift(t, next)
	if d := by["acme"]; d.Err != nil || d.Version != 1 || d.Wants != 2 || d.Differences != nil || d.Fingerprint != "" {
		t.Errorf("a tenant behind: %+v", d)
	}
	if d := by["globex"]; d.Err != nil || d.Version != 2 || d.Wants != 2 || d.Differences != nil || d.Fingerprint == "" {
		t.Errorf("a tenant at the version: %+v", d)
	}
	if d := drift(t, next, acme.ID); d["globex"].Wants != 1 || d["acme"].Fingerprint == "" {
		t.Errorf("beside one that is behind: %+v", d)
	}
	// A tenant whose view cannot be read in time stops no other.
	place, admin := placeOf(t, f, acme.ID), f.Admin(t, "tenants")
	must(t, admin, `BEGIN; LOCK TABLE `+place.table("orders")+` IN ACCESS EXCLUSIVE MODE`)
	hooli := makeIn(t, tn, "hooli", tenancy.IsolationSchema)
	by = drift(t, tn, hooli.ID)
	if d := by["acme"]; d.Err == nil {
		t.Errorf("a tenant whose table is locked: %+v", d)
	}
	if d := by["hooli"]; d.Err != nil || d.Differences != nil {
		t.Errorf("one beside it: %+v", d)
	}
	must(t, admin, `ROLLBACK`)
	primary := f.Admin(t, "primary")
	must(t, admin, `ALTER TABLE `+place.table("orders")+` ALTER note TYPE varchar(20)`)
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`, acme.ID)
	by = drift(t, tn, hooli.ID)
	wantError(t, by["acme"].Err, tenancy.ErrInProgress)
	if d := by["acme"]; d.Differences != nil {
		t.Errorf("while a verb is at work: %+v", d)
	}
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	_, err := tn.Catalog().Drift(t.Context(), 99)
	wantError(t, err, tenancy.ErrTenantNotFound)
	_, err = tn.Catalog().Drift(t.Context(), acme.ID, globex.ID)
	wantError(t, err, tenancy.ErrInvalid, "give one")
	bare := f.Open(t, tenancy.Config{Isolation: tenancy.IsolationSchema})
	_, err = bare.Catalog().Drift(t.Context())
	wantError(t, err, tenancy.ErrNoMigrations)
}

// TestDriftRunsNoCodeOfATenants has traps wherever a catalog query could step: in what the server prints, and in names that would be found first.
func TestDriftRunsNoCodeOfATenants(t *testing.T) {
	t.Parallel()
	f, tn := driftFleet(t)
	acme, globex := makeIn(t, tn, "acme", tenancy.IsolationSchema), makeIn(t, tn, "globex", tenancy.IsolationSchema)
	admin, place := f.Admin(t, "tenants"), placeOf(t, f, acme.ID)
	server, err := pgx.ParseConfig(f.ServerURL)
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	run := strings.NewReplacer("{s}", pgx.Identifier{place.Schema}.Sanitize(), "{owner}", place.Owner, "{provisioner}", server.User,
		"{trap}", `LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN IF session_user = '`+server.User+`' THEN RAISE 'a trap of the tenant was stepped on'; END IF; RETURN NULL; END $$`)
	must(t, admin, run.Replace(`BEGIN; SET LOCAL ROLE {owner}; SET LOCAL search_path = {s}, pg_catalog;
		CREATE FUNCTION trap() RETURNS text {trap};
		CREATE FUNCTION trap(a anyelement) RETURNS boolean {trap};
		CREATE DOMAIN trapped AS text DEFAULT trap() CHECK (trap(VALUE));
		CREATE TABLE traps (a text DEFAULT trap(), b text GENERATED ALWAYS AS (trap()) STORED, c trapped, CHECK (trap(a)));
		CREATE INDEX ON traps (trap(a)) WHERE trap(a);
		CREATE STATISTICS st ON (trap(a)), a FROM traps;
		CREATE VIEW peep AS SELECT trap(), count(*) FROM traps WHERE trap(a);
		CREATE POLICY p ON traps USING (trap(a));
		ALTER TABLE traps ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
		CREATE RULE r AS ON INSERT TO traps DO ALSO SELECT trap();
		CREATE FUNCTION defaulted(a text DEFAULT trap()) RETURNS text LANGUAGE sql RETURN trap();
		CREATE VIEW pg_class AS SELECT trap(); CREATE VIEW pg_namespace AS SELECT trap(); CREATE VIEW pg_description AS SELECT trap();
		COMMIT`))
	// Functions and operators that the provisioner would find first, were its search_path not its own.
	for _, of := range []string{"set_config(text, text, boolean)", "pg_get_expr(pg_node_tree, oid)", "pg_get_viewdef(oid)", "pg_get_userbyid(oid)", "format_type(oid, integer)"} {
		must(t, admin, run.Replace(`CREATE FUNCTION {s}.`+of+` RETURNS text {trap}`))
	}
	for _, of := range []string{"oid", "name", `"char"`, "text"} {
		must(t, admin, run.Replace(`CREATE FUNCTION {s}.trap_of(`+of+`, `+of+`) RETURNS boolean {trap};
			CREATE OPERATOR {s}.= (FUNCTION = {s}.trap_of, LEFTARG = `+of+`, RIGHTARG = `+of+`)`))
	}
	must(t, admin, run.Replace(`GRANT USAGE ON SCHEMA {s} TO PUBLIC; ALTER ROLE {provisioner} SET search_path = {s}, pg_catalog`))
	d := drift(t, tn, globex.ID)["acme"]
	if d.Err != nil {
		t.Error(d.Err)
	}
	if !slices.ContainsFunc(d.Differences, func(d tenancy.Difference) bool { return d.Kind == "view" && d.Object == "peep" }) {
		t.Errorf("what is trapped is not told: %v", d.Differences)
	}
}

func TestDriftIsToldWithoutControlCharacters(t *testing.T) {
	t.Parallel()
	f, tn := driftFleet(t)
	acme, globex := makeIn(t, tn, "acme", tenancy.IsolationSchema), makeIn(t, tn, "globex", tenancy.IsolationSchema)
	admin, place := f.Admin(t, "tenants"), placeOf(t, f, acme.ID)
	evil := "e\x1b[2J\r\nfake: \u009b \u202e \u2028"
	must(t, admin, `CREATE TABLE `+pgx.Identifier{place.Schema, evil}.Sanitize()+` (id int)`)
	must(t, admin, `COMMENT ON TABLE `+place.table("orders")+` IS E'`+evil+`'`)
	all := drift(t, tn, globex.ID)["acme"].Differences
	for _, d := range all {
		if strings.ContainsFunc(d.String(), func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q", d.String())
		}
	}
	if !slices.ContainsFunc(all, func(d tenancy.Difference) bool { return d.Object == evil }) {
		t.Errorf("the table is not told: %q", all)
	}
}

// bulkShops makes tenants with twelve tables each.
func bulkShops(tb testing.TB, n int) *benchFleet {
	tb.Helper()
	f := newBulkFleet(tb, n, 100)
	admin, primary := superuser(tb, f.AdminURL, bulkTenants), superuser(tb, f.AdminURL, bulkPrimary)
	for _, t := range f.tenants {
		p := bulkPlaceOf(tb, primary, t.ID)
		must(tb, admin, "BEGIN; SET LOCAL ROLE "+p.Owner+"; SET LOCAL search_path = "+pgx.Identifier{p.Schema}.Sanitize()+";"+strings.ReplaceAll(denseTables, "{name}", "'x'")+"COMMIT")
	}
	return f
}

func TestDriftFindsTheOneOfAFleet(t *testing.T) {
	t.Parallel()
	n := 105 // more than are read at once
	f := bulkShops(t, n)
	odd := bulkPlaceOf(t, superuser(t, f.AdminURL, bulkPrimary), f.tenants[n/2].ID)
	must(t, superuser(t, f.AdminURL, bulkTenants), `ALTER TABLE `+odd.table("more1")+` ALTER a SET NOT NULL`)
	by := drift(t, f.Open(t, tenancy.Config{}), f.tenants[0].ID)
	for name, d := range by {
		if want := name == f.tenants[n/2].Name; d.Err != nil || (len(d.Differences) > 0) != want {
			t.Errorf("%s: %v %v", name, d.Err, d.Differences)
		}
	}
	if len(by) != n {
		t.Errorf("%d tenants, want %d", len(by), n)
	}
}

// BenchmarkDrift compares 300 tenants of twelve tables, and 1,000 with TENANCY_LONG=1, and reports the milliseconds of each:
//
//	go test -run '^$' -bench 'BenchmarkDrift' -benchtime=5x .
func BenchmarkDrift(b *testing.B) {
	n := 300
	if os.Getenv("TENANCY_LONG") == "1" {
		n = 1000
	}
	f := bulkShops(b, n)
	tn := f.Open(b, tenancy.Config{})
	for b.Loop() {
		all, err := tn.Catalog().Drift(b.Context(), f.tenants[0].ID)
		if err != nil || len(all) != n {
			b.Fatal(len(all), err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N)/float64(n), "ms/tenant")
}
