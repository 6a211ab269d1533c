package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
	"github.com/pressly/goose/v3"
	goosedb "github.com/pressly/goose/v3/database"
)

// shopMigrations are those of a service that has had one customer: one of each kind of object, and a last one that its customer does not have yet.
func shopMigrations(last string) fstest.MapFS {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte("-- +goose Up\n" + text)} }
	return fstest.MapFS{
		"00001_shop.sql": file(`CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE DOMAIN price AS numeric CHECK (VALUE > 0);
CREATE TYPE pair AS (a int, b text);
CREATE TYPE span AS RANGE (subtype = int4);
CREATE SEQUENCE tickets INCREMENT 5;
CREATE TABLE customers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, mood mood DEFAULT 'sad', digest text NOT NULL DEFAULT encode(digest('none', 'sha256'), 'hex'));
CREATE TABLE orders (
	id serial PRIMARY KEY,
	customer bigint NOT NULL REFERENCES customers ON DELETE CASCADE,
	ticket bigint NOT NULL DEFAULT nextval('tickets'),
	total price NOT NULL,
	note text
);
CREATE INDEX orders_note ON orders (note);
CREATE TABLE "Log" (at timestamptz NOT NULL, line text) PARTITION BY RANGE (at);
CREATE TABLE log_2026 PARTITION OF "Log" FOR VALUES FROM ('2026-01-01Z') TO ('2027-01-01Z');
CREATE VIEW totals AS SELECT name, sum(total) AS total FROM orders JOIN customers c ON c.id = customer GROUP BY name;
CREATE MATERIALIZED VIEW names AS SELECT name FROM customers;
CREATE STATISTICS orders_stat ON customer, note FROM orders;
`),
		"00002_functions.sql": file(`-- +goose StatementBegin
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := coalesce(NEW.note, (SELECT name FROM customers WHERE id = NEW.customer)); RETURN NEW; END $$;
-- +goose StatementEnd
CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT n * 2 $$;
CREATE PROCEDURE forget(who text) LANGUAGE sql AS $$ DELETE FROM customers WHERE name = who $$;
CREATE AGGREGATE summed(int) (SFUNC = int4pl, STYPE = int, INITCOND = '0');
CREATE TRIGGER stamped BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION stamp();
`),
		"00003_later.sql": file(last),
	}
}

const later = "CREATE TABLE later (id int PRIMARY KEY);\n"

// oldService is a service with one customer in public of the fleet's tenants' database.
type oldService struct {
	*tenancytest.Fleet
	login, password string
	admin           *pgx.Conn // a superuser in its database
}

func (s *oldService) database() string { return s.admin.Config().Database }

func (s *oldService) adoption(name string) tenancy.Adoption {
	return tenancy.Adoption{Name: name, Login: s.login, Server: "main", Admin: "ann"}
}

func (s *oldService) tryLogin(t *testing.T) (*pgx.Conn, error) {
	u, err := url.Parse(s.ServerURL)
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	u.User = url.UserPassword(s.login, s.password)
	conn, err := pgx.Connect(t.Context(), u.String())
	if err == nil {
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
	}
	return conn, err
}

func newOldService(t *testing.T, version int64) *oldService {
	t.Helper()
	f := tenancytest.NewFleet(t)
	server, err := url.Parse(f.ServerURL)
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	s := &oldService{Fleet: f, login: strings.TrimSuffix(strings.TrimPrefix(server.Path, "/"), "_tenants") + "_App", password: "old secret", admin: f.Admin(t, "tenants")}
	app, database := pgx.Identifier{s.login}.Sanitize(), pgx.Identifier{s.database()}.Sanitize()
	membership := "GRANT " + app + " TO " + server.User.Username()
	if scan[int](t, s.admin, `SELECT current_setting('server_version_num')::int`) >= 160000 {
		membership += " WITH ADMIN TRUE, INHERIT TRUE, SET TRUE"
	}
	if scan[bool](t, s.admin, `SELECT count(*) = 0 FROM pg_available_extensions WHERE name = 'pgcrypto'`) {
		t.Skip("the server has no extension pgcrypto")
	}
	for _, sql := range []string{
		"CREATE ROLE " + app + " LOGIN PASSWORD '" + s.password + "'",
		membership,
		"GRANT CONNECT ON DATABASE " + database + " TO " + app,
		"GRANT USAGE, CREATE ON SCHEMA public TO " + app,
		"CREATE EXTENSION pgcrypto SCHEMA public",
		// As one that its login has made, for which it takes an extension without code in C.
		"UPDATE pg_extension SET extowner = '" + app + "'::regrole WHERE extname = 'pgcrypto'",
		"UPDATE pg_proc SET proowner = '" + app + "'::regrole FROM pg_depend d WHERE d.objid = pg_proc.oid AND d.deptype = 'e' AND pronamespace = 'public'::regnamespace",
	} {
		must(t, s.admin, sql)
	}
	conn, err := s.tryLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	db := stdlib.OpenDB(*conn.Config())
	defer db.Close()
	store, err := goosedb.NewStore(goose.DialectPostgres, goose.DefaultTablename)
	if err != nil {
		t.Fatal(err)
	}
	p, err := goose.NewProvider("", db, shopMigrations(later), goose.WithStore(store), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.UpTo(t.Context(), version); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`INSERT INTO customers (name, mood) VALUES ('Ada', 'happy'), ('Bob', DEFAULT)`,
		`INSERT INTO orders (customer, total) VALUES (1, 10), (2, 20), (1, 12)`,
		`INSERT INTO "Log" VALUES ('2026-05-01Z', 'begun')`,
		`REFRESH MATERIALIZED VIEW names`,
	} {
		must(t, conn, sql)
	}
	_ = conn.Close(t.Context())
	return s
}

// dump is what pg_dump says of the database, or, where there is none for the server's version, what the catalogs say of owners and rights.
func (s *oldService) dump(t *testing.T) string {
	t.Helper()
	u, err := url.Parse(s.AdminURL)
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	u.Path = "/" + s.database()
	out, err := exec.CommandContext(t.Context(), "pg_dump", "-d", u.String()).Output()
	if err != nil {
		t.Logf("pg_dump: %v", err)
		return scan[string](t, s.admin, `SELECT string_agg(line, E'\n' ORDER BY line) FROM (
			SELECT format('%s %s %s', nspname, pg_get_userbyid(nspowner), (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(nspacl) a)) FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'
			UNION ALL SELECT format('%s %s %s %s', c.oid::regclass, relkind, pg_get_userbyid(relowner),
				(SELECT array_agg(a::text ORDER BY a::text) FROM unnest(coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))) a))
				FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname !~ '^(pg_|information_schema)'
			UNION ALL SELECT format('%s %s %s', p.oid::regprocedure, pg_get_userbyid(proowner), (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(coalesce(proacl, acldefault('f', proowner))) a))
				FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname !~ '^(pg_|information_schema)'
			UNION ALL SELECT format('%s %s', extname, extnamespace::regnamespace) FROM pg_extension) AS all_of_it (line)`)
	}
	var kept []string
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, `\restrict`) && !strings.HasPrefix(line, `\unrestrict`) {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

func wantSame(t *testing.T, what, was, is string) {
	t.Helper()
	if was == is {
		return
	}
	a, b := strings.Split(was, "\n"), strings.Split(is, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			t.Errorf("%s: the dump differs from line %d on:\nwas %s\nis  %s", what, i, strings.Join(a[i:min(len(a), i+6)], "\n    "), strings.Join(b[i:min(len(b), i+6)], "\n    "))
			return
		}
	}
	t.Errorf("%s: the dump had %d lines and has %d", what, len(a), len(b))
}

func (s *oldService) open(t *testing.T, last string) *tenancy.Tenancy {
	t.Helper()
	return s.Open(t, tenancy.Config{Migrations: shopMigrations(last), Extensions: true, Isolation: tenancy.IsolationSchema})
}

// describeSchema is what the server's catalogs say of a tenant's schema: owners, rights, definitions.
func describeSchema(t *testing.T, s *oldService, id tenancy.ID) []string {
	t.Helper()
	p := placeOf(t, s.Fleet, id)
	var all []string
	for _, sql := range []string{
		`SELECT jsonb_build_array('schema', nspowner::regrole, nspacl::text) FROM pg_namespace WHERE nspname = $1`,
		`SELECT jsonb_build_array('default', defaclrole::regrole, defaclobjtype, defaclacl::text) FROM pg_default_acl WHERE defaclnamespace = to_regnamespace($1)`,
		`SELECT jsonb_build_array('relation', relname, relkind, relowner::regrole, (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(relacl) a)) FROM pg_class WHERE relnamespace = to_regnamespace($1)`,
		`SELECT jsonb_build_array('routine', oid::regprocedure, proowner::regrole, (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(proacl) a)) FROM pg_proc WHERE pronamespace = to_regnamespace($1)`,
		`SELECT jsonb_build_array('type', typname, typowner::regrole, (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(typacl) a)) FROM pg_type WHERE typnamespace = to_regnamespace($1) AND typtype <> 'm' AND typcategory <> 'A'`, // whose owner ALTER TYPE forgets where they are of a multirange,
		`SELECT jsonb_build_array('statistics', stxname, stxowner::regrole) FROM pg_statistic_ext WHERE stxnamespace = to_regnamespace($1)`,
		`SELECT jsonb_build_array('constraint', conrelid::regclass, conname, pg_get_constraintdef(oid)) FROM pg_constraint WHERE connamespace = to_regnamespace($1)`,
		`SELECT jsonb_build_array('column', table_name, column_name, column_default, identity_generation) FROM information_schema.columns WHERE table_schema = $1`,
		`SELECT jsonb_build_array('role', rolname, rolcanlogin, rolconnlimit, rolinherit, rolcreaterole) FROM pg_roles WHERE starts_with(rolname, $1)`,
		`SELECT jsonb_build_array('member', a.rolname, b.rolname) FROM pg_roles a, pg_roles b WHERE starts_with(a.rolname, $1) AND pg_has_role(a.oid, b.oid, 'MEMBER')`,
	} {
		rows, _ := s.admin.Query(t.Context(), `SELECT line::text FROM (`+sql+`) x (line)`, p.Schema)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		for i := range lines {
			lines[i] = strings.ReplaceAll(lines[i], p.Schema, "{place}")
		}
		slices.Sort(lines)
		all = append(all, lines...)
	}
	return all
}

func enter(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID) context.Context {
	t.Helper()
	ctx, err := tn.Enter(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return ctx
}

func TestAnOldServiceIsAdopted(t *testing.T) {
	t.Parallel()
	s := newOldService(t, 2)
	must(t, s.admin, "GRANT SELECT ON public.orders, public.customers TO pg_monitor")
	must(t, s.admin, "GRANT SELECT (name) ON public.customers TO PUBLIC")
	tn := s.open(t, later)
	before := s.dump(t)
	plan, err := tn.Catalog().PlanAdoption(t.Context(), s.adoption("acme"))
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Obstacles) > 0 || plan.Version != 2 || plan.Wants != 3 {
		t.Fatalf("from version %d to %d:\n%s", plan.Version, plan.Wants, plan)
	}
	for _, want := range []string{"ALTER SCHEMA \"public\" RENAME TO {schema};", "ALTER TABLE public.\"Log\" OWNER TO {owner};", "the pending migrations 3.", "ALTER EXTENSION \"pgcrypto\" SET SCHEMA tenancy_ext;", "the rights of pg_monitor in the schema end"} {
		if !strings.Contains(plan.String(), want) {
			t.Errorf("the plan does not say %q:\n%s", want, plan)
		}
	}
	wantSame(t, "the plan", before, s.dump(t))

	old, err := s.tryLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	must(t, old, "SELECT count(*) FROM orders")
	acme, err := tn.Catalog().Adopt(t.Context(), s.adoption("acme"))
	if err != nil {
		t.Fatal(err)
	}
	if acme.State != tenancy.StateActive || acme.Isolation != tenancy.IsolationSchema {
		t.Errorf("the tenant is %s, with %s", acme.State, acme.Isolation)
	}

	// The old login.
	if _, err := old.Exec(t.Context(), "SELECT count(*) FROM orders"); err == nil {
		t.Error("a session of the old login goes on")
	}
	if _, err := s.tryLogin(t); err == nil {
		t.Error("the old login may log in")
	}
	must(t, s.admin, "ALTER ROLE "+pgx.Identifier{s.login}.Sanitize()+" LOGIN")
	if _, err := s.tryLogin(t); sqlState(err) != "42501" {
		t.Errorf("the old login, opened by hand, may connect: %v", err)
	}
	must(t, s.admin, "ALTER ROLE "+pgx.Identifier{s.login}.Sanitize()+" NOLOGIN")
	place := placeOf(t, s.Fleet, acme.ID)
	for _, role := range []string{s.login, "pg_monitor"} {
		if scan[bool](t, s.admin, `SELECT has_table_privilege($1, $2, 'SELECT') OR has_schema_privilege($1, $3, 'USAGE') OR has_any_column_privilege($1, $4, 'SELECT')`, role, place.table("orders"), place.Schema, place.table("customers")) {
			t.Errorf("%s has rights in the schema still", role)
		}
	}
	if scan[bool](t, s.admin, `SELECT has_schema_privilege('public', 'public', 'CREATE') OR has_schema_privilege('public', 'public', 'USAGE') OR count(*) > 0 FROM pg_class WHERE relnamespace = 'public'::regnamespace`) {
		t.Error("the new public is open, or not empty")
	}

	// The tenant reads its rows, and writes more.
	ctx := enter(t, tn, acme.ID)
	var note, sums string
	if err := tn.DB().QueryRow(ctx, `SELECT string_agg(name || ' ' || total, ', ' ORDER BY name) FROM totals`).Scan(&sums); err != nil || sums != "Ada 22, Bob 20" {
		t.Errorf("the rows: %q, %v", sums, err)
	}
	var id, ticket int
	if err := tn.DB().QueryRow(ctx, `INSERT INTO orders (customer, total) VALUES (2, twice(4)) RETURNING id, ticket, note`).Scan(&id, &ticket, &note); err != nil || id != 4 || ticket != 16 || note != "Bob" {
		t.Errorf("a new order: %d, ticket %d, %q, %v", id, ticket, note, err)
	}
	for _, sql := range []string{`INSERT INTO customers (name) VALUES ('Cid')`, `INSERT INTO later VALUES (1)`, `CALL forget('Cid')`, `SELECT summed(id) FROM orders`, `INSERT INTO "Log" VALUES ('2026-06-01Z', 'x')`, `SELECT 'sad'::mood, ROW(1, 'x')::pair, '[1,2)'::span`} {
		if _, err := tn.DB().Exec(ctx, sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	if _, err := tn.DB().Exec(ctx, `UPDATE goose_db_version SET is_applied = false`); sqlState(err) != "42501" {
		t.Errorf("the tenant writes its versions: %v", err)
	}
	if v := scan[int](t, s.Admin(t, "primary"), `SELECT d.version FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.id = $1`, acme.ID); v != 3 {
		t.Errorf("the primary has version %d", v)
	}

	// A second tenant, and neither reads the other.
	globex := tenancytest.Create(t, tn, "globex")
	for _, pair := range [][2]tenancy.ID{{acme.ID, globex.ID}, {globex.ID, acme.ID}} {
		theirs := placeOf(t, s.Fleet, pair[1])
		for _, sql := range []string{"SELECT * FROM " + theirs.table("customers"), "INSERT INTO " + theirs.table("customers") + " (name) VALUES ('x')", "SELECT " + theirs.table("twice") + "(1)", "SELECT nextval('" + theirs.table("tickets") + "')"} {
			if _, err := login(t, tn, pair[0]).Exec(t.Context(), sql); sqlState(err) != "42501" {
				t.Errorf("tenant %d: %s: %v", pair[0], sql, err)
			}
		}
	}
	if want, got := describeSchema(t, s, globex.ID), describeSchema(t, s, acme.ID); !slices.Equal(want, got) {
		for _, line := range got {
			if !slices.Contains(want, line) {
				t.Errorf("adopted: %s", line)
			}
		}
		for _, line := range want {
			if !slices.Contains(got, line) {
				t.Errorf("created: %s", line)
			}
		}
	}

	// With another tenant at the server the extension stays where it is, and the login finds it.
	if err := tn.Catalog().Unadopt(t.Context(), globex.ID); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("a tenant that was created is taken back: %v", err)
	}
	wantError(t, tn.Catalog().ConfirmAdoption(t.Context(), globex.ID), tenancy.ErrInvalid)
	if err := tn.Catalog().Unadopt(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	old, err = s.tryLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	if got := scan[string](t, old, `INSERT INTO customers (name) VALUES ('Dee') RETURNING left(digest, 4)`); got != "140b" {
		t.Errorf("the digest is %q", got)
	}
	if got := scan[bool](t, old, `SELECT has_table_privilege('pg_monitor', 'orders', 'SELECT') AND has_column_privilege('public', 'customers', 'name', 'SELECT')`); !got {
		t.Error("others have not got their rights back")
	}
	must(t, old, `SELECT digest('by name', 'sha256')`)
	if _, err := tn.DB().Exec(enter(t, tn, globex.ID), `INSERT INTO customers (name, digest) VALUES ('Eve', encode(digest('by name', 'sha256'), 'hex'))`); err != nil {
		t.Errorf("the other tenant: %v", err)
	}
}

// TestAnAdoptionIsTakenBack leaves the database as it was.
func TestAnAdoptionIsTakenBack(t *testing.T) {
	t.Parallel()
	s := newOldService(t, 3)
	app := pgx.Identifier{s.login}.Sanitize()
	for _, sql := range []string{
		"GRANT SELECT ON public.orders TO pg_monitor WITH GRANT OPTION",
		"GRANT UPDATE (name) ON public.customers TO pg_monitor",
		"GRANT USAGE ON SCHEMA public TO pg_monitor",
		"REVOKE ALL ON FUNCTION public.twice(int) FROM PUBLIC",
		"ALTER DEFAULT PRIVILEGES FOR ROLE " + app + " IN SCHEMA public GRANT SELECT ON TABLES TO pg_monitor",
		"CREATE SCHEMA elsewhere AUTHORIZATION " + app,
		"CREATE TABLE elsewhere.kept (id int)",
		"ALTER TABLE elsewhere.kept OWNER TO " + app,
	} {
		must(t, s.admin, sql)
	}
	tn := s.open(t, later)
	before := s.dump(t)
	acme, err := tn.Catalog().Adopt(t.Context(), s.adoption("acme"))
	if err != nil {
		t.Fatal(err)
	}
	place := placeOf(t, s.Fleet, acme.ID)
	if got := scan[string](t, s.admin, `SELECT relowner::regrole::text FROM pg_class WHERE oid = 'elsewhere.kept'::regclass`); got != app {
		t.Errorf("what is elsewhere belongs to %s", got)
	}
	if n := scan[int](t, s.admin, `SELECT count(*) FROM pg_default_acl d, aclexplode(defaclacl) a WHERE defaclnamespace = $1::regnamespace AND grantee = 'pg_monitor'::regrole`, place.Schema); n != 0 {
		t.Error("a default privilege is left")
	}
	if err := tn.Catalog().Unadopt(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	wantSame(t, "taken back", before, s.dump(t))
	if n := scan[int](t, s.admin, `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, place.Schema); n != 0 {
		t.Errorf("%d roles are left", n)
	}
	wantError(t, tn.Catalog().Unadopt(t.Context(), acme.ID), tenancy.ErrTenantGone)
	if got, err := tn.Catalog().Tenant(t.Context(), acme.ID); err != nil || got.State != tenancy.StatePurged {
		t.Errorf("the tenant is %s, %v", got.State, err)
	}
	if conn, err := s.tryLogin(t); err != nil {
		t.Errorf("the old login: %v", err)
	} else {
		must(t, conn, `INSERT INTO orders (customer, total) VALUES (1, 1)`)
		_ = conn.Close(t.Context())
	}

	again, err := tn.Catalog().Adopt(t.Context(), s.adoption("acme-2"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := tn.Catalog().ConfirmAdoption(t.Context(), again.ID); err != nil {
			t.Fatal(err)
		}
	}
	wantError(t, tn.Catalog().Unadopt(t.Context(), again.ID), tenancy.ErrInvalid, "confirmed")
	if got := mustTenant(t, tn, "acme-2").State; got != tenancy.StateActive {
		t.Errorf("the tenant is %s", got)
	}
}

// TestWhatStandsInTheWayOfAnAdoptionIsFound plants one thing after the other, and takes it away by the statement that the plan gives, where it is one.
func TestWhatStandsInTheWayOfAnAdoptionIsFound(t *testing.T) {
	t.Parallel()
	s := newOldService(t, 2)
	tn := s.open(t, later)
	app, provisioner := pgx.Identifier{s.login}.Sanitize(), strings.TrimSuffix(s.database(), "_tenants")+"_provisioner"
	find := func(list []tenancy.Finding, want string) (found tenancy.Finding) {
		for _, f := range list {
			if strings.Contains(f.What, want) {
				return f
			}
		}
		return found
	}
	type seed struct{ sql, want, mend string } // mend "": by the plan's own statement
	for _, seeds := range [][]seed{
		{
			{"ALTER TABLE public.orders OWNER TO " + provisioner, `table public.orders belongs to`, ""},
			{"ALTER FUNCTION public.twice(int) OWNER TO CURRENT_USER", `function public.twice(integer) belongs to a superuser`, ""},
			{"CREATE EXTENSION citext SCHEMA public", `extension citext is in schema public`, ""},
			{"CREATE EXTENSION tablefunc SCHEMA public; UPDATE pg_extension SET extrelocatable = false WHERE extname = 'tablefunc'",
				`extension tablefunc cannot leave`, "DROP EXTENSION tablefunc"},
			{"CREATE SCHEMA et; CREATE FUNCTION et.f() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$; CREATE EVENT TRIGGER spy ON ddl_command_end EXECUTE FUNCTION et.f()",
				`event trigger spy`, ""},
			{"CREATE PUBLICATION away FOR TABLE public.orders", `publication away`, ""},
			{"CREATE SCHEMA other1; CREATE VIEW other1.v AS SELECT * FROM public.orders", `view other1.v depends on`, "DROP SCHEMA other1 CASCADE"},
			{"CREATE SCHEMA other2; CREATE TABLE other2.t (id bigint REFERENCES public.customers)", `constraint t_id_fkey on table other2.t depends on`, "DROP SCHEMA other2 CASCADE"},
			{"CREATE SCHEMA other3; CREATE TABLE other3.t (id int PRIMARY KEY); ALTER TABLE public.orders ADD CONSTRAINT out FOREIGN KEY (id) REFERENCES other3.t NOT VALID", `on table public.orders depends on`, "ALTER TABLE public.orders DROP CONSTRAINT out; DROP SCHEMA other3 CASCADE"},
			{"CREATE SCHEMA other4; CREATE TABLE other4.t (m public.mood)", `table other4.t depends on type public.mood`, "DROP SCHEMA other4 CASCADE"},
			{"INSERT INTO public.goose_db_version (version_id, is_applied) VALUES (77, true)", `version 77, which is not among`, "DELETE FROM public.goose_db_version WHERE version_id = 77"},
			{"DELETE FROM public.goose_db_version WHERE version_id = 1", `has not version 1`, "INSERT INTO public.goose_db_version (version_id, is_applied) VALUES (1, true)"},
			{"GRANT " + s.database() + "_tenants TO " + app, `may connect as a member of`, ""},
			{"CREATE TABLE public.tenancy_marker (x int); ALTER TABLE public.tenancy_marker OWNER TO " + app, `is called as one of the library's own`, "DROP TABLE public.tenancy_marker"},
			{"ALTER SCHEMA public OWNER TO CURRENT_USER", `schema public belongs to`, "ALTER SCHEMA public OWNER TO pg_database_owner"},
		},
		{{"ALTER TABLE public.goose_db_version RENAME TO versions", `no table goose_db_version`, "ALTER TABLE public.versions RENAME TO goose_db_version"}},
		{{"ALTER ROLE " + app + " SUPERUSER", `is a superuser`, "ALTER ROLE " + app + " NOSUPERUSER"}},
		{{"REVOKE " + app + " FROM " + provisioner, `may not act for the login`, ""}},
	} {
		for _, o := range seeds {
			must(t, s.admin, o.sql)
		}
		plan, err := tn.Catalog().PlanAdoption(t.Context(), s.adoption("acme"))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range seeds {
			f := find(plan.Obstacles, o.want)
			if f.What == "" || f.Mend == "" {
				t.Errorf("%s: not found among\n%s", o.sql, plan)
			}
			if o.mend == "" {
				o.mend = f.Mend
			}
			if _, err := s.admin.Exec(t.Context(), o.mend); err != nil {
				t.Fatalf("%s: the plan says %q: %v", o.sql, o.mend, err)
			}
		}
		if plan, err := tn.Catalog().PlanAdoption(t.Context(), s.adoption("acme")); err != nil || len(plan.Obstacles) > 0 {
			t.Fatalf("all is mended, and there is still: %v\n%s", err, plan)
		}
	}
	for _, w := range []struct{ sql, want, mend string }{
		{"ALTER FUNCTION public.twice(int) SET search_path = public", `function public.twice(integer) has a search_path`, ""},
		{"CREATE FUNCTION public.named() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM public.orders'; ALTER FUNCTION public.named() OWNER TO " + app, `body of function public.named() names`, "DROP FUNCTION public.named()"},
		{"ALTER TABLE public.orders ENABLE ROW LEVEL SECURITY", `public.orders has row-level security`, "ALTER TABLE public.orders DISABLE ROW LEVEL SECURITY"},
		{"SET SESSION AUTHORIZATION " + app + "; SELECT lo_create(77); RESET SESSION AUTHORIZATION", `1 large objects`, "SELECT lo_unlink(77)"},
	} {
		must(t, s.admin, w.sql)
		plan, err := tn.Catalog().PlanAdoption(t.Context(), s.adoption("acme"))
		if err != nil {
			t.Fatalf("%s: %v", w.sql, err)
		}
		f := find(plan.Warnings, w.want)
		if f.What == "" || len(plan.Obstacles) > 0 {
			t.Errorf("%s: not found among\n%s", w.sql, plan)
		}
		if w.mend == "" {
			w.mend = f.Mend
		}
		must(t, s.admin, w.mend)
	}
	old, err := s.tryLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	a := s.adoption("acme")
	if plan, err := tn.Catalog().PlanAdoption(t.Context(), a); err != nil || find(plan.Warnings, "1 sessions of").What == "" {
		t.Errorf("an open session: %v\n%s", err, plan)
	}

	bare := s.Open(t, tenancy.Config{Migrations: shopMigrations(later), Isolation: tenancy.IsolationSchema})
	if plan, err := bare.Catalog().PlanAdoption(t.Context(), a); err != nil || find(plan.Obstacles, "Config.Extensions is off").What == "" {
		t.Errorf("a fleet without extensions: %v\n%s", err, plan)
	}

	// What stands in the way keeps Adopt from doing anything.
	must(t, s.admin, "CREATE PUBLICATION away FOR TABLE public.orders")
	before := s.dump(t)
	_, err = tn.Catalog().Adopt(t.Context(), a)
	wantError(t, err, tenancy.ErrSetup, "publication away", "DROP PUBLICATION away;")
	wantSame(t, "refused", before, s.dump(t))
	must(t, old, "SELECT 1")
	if n := scan[int](t, s.Admin(t, "primary"), `SELECT count(*) FROM tenancy.tenants`); n != 0 {
		t.Error("a tenant is left of an adoption that was refused")
	}
	must(t, s.admin, "DROP PUBLICATION away")

	must(t, s.admin, "ALTER EXTENSION pgcrypto SET SCHEMA tenancy_ext")
	tenancytest.Create(t, tn, "acme")
	if plan, err := tn.Catalog().PlanAdoption(t.Context(), a); err != nil || find(plan.Obstacles, `the name "acme" is taken`).What == "" {
		t.Errorf("a name that is taken: %v\n%s", err, plan)
	}
	_, err = tn.Catalog().Adopt(t.Context(), a)
	wantError(t, err, tenancy.ErrTenantExists)
	for what, wrong := range map[string]tenancy.Adoption{
		"no login":                      {Name: "b"},
		"a tenant's schema":             {Name: "b", Login: s.login, Schema: placeOf(t, s.Fleet, mustTenant(t, tn, "acme").ID).Schema},
		"a tenant's role":               {Name: "b", Login: placeOf(t, s.Fleet, mustTenant(t, tn, "acme").ID).Owner},
		"the library's own schema":      {Name: "b", Login: s.login, Schema: "tenancy_ext"},
		"the system's":                  {Name: "b", Login: s.login, Schema: "pg_catalog"},
		"a server that is not known":    {Name: "b", Login: s.login, Server: "other"},
		"a name that cannot be a label": {Name: "B!", Login: s.login},
	} {
		if _, err := tn.Catalog().PlanAdoption(t.Context(), wrong); !errors.Is(err, tenancy.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, missing := range []tenancy.Adoption{{Name: "b", Login: "nobody_" + s.login}, {Name: "b", Login: s.login, Schema: "nowhere"}} {
		if plan, err := tn.Catalog().PlanAdoption(t.Context(), missing); err != nil || len(plan.Obstacles) != 1 || len(plan.Steps) > 0 {
			t.Errorf("%+v: %v\n%s", missing, err, plan)
		}
	}
}

// TestAnAdoptionIsFinishedWhereverItDied: each round is cut off on the way there and on the way back, and called again.
func TestAnAdoptionIsFinishedWhereverItDied(t *testing.T) {
	t.Parallel()
	s := newOldService(t, 3)
	tn := s.open(t, later)
	before := s.dump(t)
	rounds := 3
	if os.Getenv("TENANCY_LONG") == "1" {
		rounds = 60
	}
	there, back, died := 300*time.Millisecond, 300*time.Millisecond, 0
	for i := range rounds + 1 {
		a := s.adoption(fmt.Sprintf("acme-%d", i))
		cut := func(whole *time.Duration, verb func(ctx context.Context) error) {
			t.Helper()
			began := time.Now()
			if i > 0 {
				ctx, cancel := context.WithTimeout(t.Context(), *whole*time.Duration(i)/time.Duration(rounds+1))
				err := verb(ctx)
				cancel()
				if err == nil {
					return
				}
				died++
			}
			if err := verb(t.Context()); err != nil && !(i > 0 && (errors.Is(err, tenancy.ErrTenantExists) && mustTenant(t, tn, a.Name).State == tenancy.StateActive || errors.Is(err, tenancy.ErrTenantGone))) {
				t.Fatalf("round %d does not go on: %v", i, err)
			}
			if i == 0 {
				*whole = time.Since(began)
			}
		}
		cut(&there, func(ctx context.Context) error { _, err := tn.Catalog().Adopt(ctx, a); return err })
		acme := mustTenant(t, tn, a.Name)
		var n int
		if err := tn.DB().QueryRow(enter(t, tn, acme.ID), `SELECT count(*) FROM orders`).Scan(&n); err != nil || n != 3 {
			t.Fatalf("round %d: %d orders, %v", i, n, err)
		}
		cut(&back, func(ctx context.Context) error { return tn.Catalog().Unadopt(ctx, acme.ID) })
		wantSame(t, fmt.Sprintf("round %d", i), before, s.dump(t))
		if t.Failed() {
			return
		}
	}
	if died < rounds {
		t.Errorf("%d of %d died on the way: the moments are chosen badly", died, 2*rounds)
	}
	if n := scan[int](t, s.admin, `SELECT count(*) FROM pg_roles WHERE pg_has_role($1, oid, 'MEMBER') AND rolname ~ '^t_[0-9a-f]{20}'`, strings.TrimSuffix(s.database(), "_tenants")+"_provisioner"); n != 0 {
		t.Errorf("%d roles are left", n)
	}
}

// TestAnAdoptionThatStopsHalfWayGoesEitherWay: before its commit the service goes on; after it, in a migration, both Adopt and Unadopt end it.
func TestAnAdoptionThatStopsHalfWayGoesEitherWay(t *testing.T) {
	t.Parallel()
	s := newOldService(t, 2)
	before := s.dump(t)
	tn := s.open(t, "SELECT 1 / count(*) FROM customers WHERE name = 'Cid';\n")

	name := "never"
	// adopt has it wait for the lock of somebody who is no customer's, and runs meanwhile.
	adopt := func(ctx context.Context, meanwhile func(other *pgx.Conn)) error {
		must(t, s.admin, "BEGIN")
		must(t, s.admin, "LOCK TABLE public.orders IN ACCESS SHARE MODE")
		other := s.Admin(t, "tenants")
		failed := make(chan error, 1)
		go func() {
			_, err := tn.Catalog().Adopt(ctx, s.adoption(name))
			failed <- err
		}()
		untilTrue(t, "the adoption waits for the lock", func() bool {
			return scan[bool](t, other, `SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'tenancy provisioner' AND wait_event_type = 'Lock'`)
		})
		meanwhile(other)
		return <-failed
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := adopt(ctx, func(*pgx.Conn) { cancel() })
	if err == nil {
		t.Fatal("it was adopted under a lock")
	}
	must(t, s.admin, "ROLLBACK")
	schema := placeOf(t, s.Fleet, mustTenant(t, tn, name).ID).Schema
	if n := scan[int](t, s.admin, `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, schema); n != 3 {
		t.Errorf("%d roles were made before it stopped", n)
	}
	for _, sneaked := range []struct{ make, want string }{
		{"CREATE TABLE public.sneaked (id int)", "something in the schema belongs to others"},
		{"CREATE TABLE public.sneaked (id int); ALTER TABLE public.sneaked OWNER TO " + pgx.Identifier{s.login}.Sanitize() + "; GRANT SELECT ON public.log_2026 TO pg_monitor", "somebody has rights in the schema"},
	} {
		err = adopt(t.Context(), func(other *pgx.Conn) {
			must(t, other, sneaked.make)
			must(t, s.admin, "ROLLBACK")
		})
		wantError(t, err, tenancy.ErrSetup, "nothing was changed")
		must(t, s.admin, "DROP TABLE public.sneaked; REVOKE ALL ON public.log_2026 FROM pg_monitor")
	}
	wantSame(t, "before the commit", before, s.dump(t))
	old, err := s.tryLogin(t)
	if err != nil {
		t.Fatalf("before the commit the service has to go on: %v", err)
	}
	never := mustTenant(t, tn, name)
	if err := tn.Catalog().Unadopt(t.Context(), never.ID); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, s.admin, `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, schema); n != 0 {
		t.Errorf("%d roles are left", n)
	}
	must(t, old, "SELECT count(*) FROM orders")
	name = "acme"

	err = adopt(t.Context(), func(*pgx.Conn) { // a session that comes after the first were ended
		if old, err = s.tryLogin(t); err != nil {
			t.Error(err)
		}
		must(t, s.admin, "ROLLBACK")
	})
	if err == nil || !strings.Contains(err.Error(), "division by zero") {
		t.Fatalf("with a migration that fails: %v", err)
	}
	if _, err := old.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("a session of the old login goes on")
	}
	acme := mustTenant(t, tn, "acme")
	if acme.State != tenancy.StateProvisioning {
		t.Errorf("the tenant is %s", acme.State)
	}
	wantError(t, tn.Catalog().ConfirmAdoption(t.Context(), acme.ID), tenancy.ErrTenantNotReady)
	other := s.adoption("acme")
	other.Schema = "other"
	_, err = tn.Catalog().Adopt(t.Context(), other)
	wantError(t, err, tenancy.ErrTenantExists)
	_, err = tn.Catalog().Adopt(t.Context(), s.adoption("acme-too"))
	wantError(t, err, tenancy.ErrSetup)
	if err := tn.Catalog().Unadopt(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	wantSame(t, "taken back", before, s.dump(t))

	_, err = tn.Catalog().Adopt(t.Context(), s.adoption("acme-2"))
	if err == nil {
		t.Fatal("the migration does not fail")
	}
	acme = mustTenant(t, tn, "acme-2")
	// Somebody took it back by hand, and not all of it: nothing is dropped.
	schema = placeOf(t, s.Fleet, acme.ID).Schema
	must(t, s.admin, "ALTER SCHEMA "+schema+" RENAME TO by_hand")
	if err := tn.Catalog().Unadopt(t.Context(), acme.ID); err == nil || !strings.Contains(err.Error(), "objects still") {
		t.Errorf("taken back by hand: %v", err)
	}
	if n := scan[int](t, s.admin, `SELECT count(*) FROM by_hand.orders`); n != 3 {
		t.Errorf("%d orders", n)
	}
	must(t, s.admin, "ALTER SCHEMA by_hand RENAME TO "+schema)
	wantError(t, tn.Catalog().Restore(t.Context(), acme.ID), tenancy.ErrTenantNotReady)
	must(t, s.admin, "INSERT INTO "+placeOf(t, s.Fleet, acme.ID).table("customers")+" (name, digest) VALUES ('Cid', '')")
	if acme, err = tn.Catalog().Adopt(t.Context(), s.adoption("acme-2")); err != nil || acme.State != tenancy.StateActive {
		t.Fatalf("again: %s, %v", acme.State, err)
	}
}

// TestTheAdoptionDocumentIsTrue does what docs/adoption.md says, with a database that the service's login owns, and compares the plan.
func TestTheAdoptionDocumentIsTrue(t *testing.T) {
	t.Parallel()
	blocks := map[string]string{}
	for _, b := range blocksOf(t, "docs/adoption.md") {
		blocks[b.lang] += b.text
	}
	f := tenancytest.NewFleet(t)
	admin := f.Admin(t, "tenants")
	database := admin.Config().Database
	prefix := strings.TrimSuffix(database, "_tenants")
	s := &oldService{Fleet: f, admin: admin, login: prefix + "_app", password: "secret"}
	names := strings.NewReplacer("shop_provisioner", prefix+"_provisioner", "shop_tenants", database+"_tenants", "app", s.login, "shop", database)
	back := strings.NewReplacer(prefix+"_provisioner", "shop_provisioner", database+"_tenants", "shop_tenants", s.login, "app", database, "shop")
	must(t, admin, "CREATE ROLE "+s.login+" LOGIN PASSWORD 'secret'")
	must(t, admin, "ALTER DATABASE "+database+" OWNER TO "+s.login)
	conn, err := s.tryLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	must(t, conn, `CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text NOT NULL);
		INSERT INTO notes (title) VALUES ('the first'), ('the second');
		CREATE TABLE goose_db_version (id integer PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY, version_id bigint NOT NULL, is_applied boolean NOT NULL, tstamp timestamp NOT NULL DEFAULT now());
		INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, true), (1, true)`)
	_ = conn.Close(t.Context())
	before, after, found := strings.Cut(blocks["sql"], "-- tenancy.Init\n")
	if !found {
		t.Fatal("docs/adoption.md does not say what comes before tenancy.Init, and what after")
	}
	before = strings.ReplaceAll(names.Replace(before), "OWNER TO postgres", "OWNER TO "+pgx.Identifier{admin.Config().User}.Sanitize())
	must(t, admin, before)
	works := func(when string) {
		t.Helper()
		conn, err := s.tryLogin(t)
		if err != nil {
			t.Fatalf("%s: the service cannot connect: %v", when, err)
		}
		must(t, conn, "INSERT INTO notes (title) VALUES ('"+when+"')")
		must(t, conn, "CREATE TABLE made (); DROP TABLE made")
		_ = conn.Close(t.Context())
	}
	works("before")
	if err := tenancy.Init(t.Context(), f.AdminConfig()); err != nil {
		t.Fatal(err)
	}
	works("after")
	tn := f.Open(t, tenancy.Config{Isolation: tenancy.IsolationSchema, Migrations: fstest.MapFS{
		"00001_notes.sql": &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text NOT NULL);\n")},
		"00002_done.sql":  &fstest.MapFile{Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN done boolean NOT NULL DEFAULT false;\n")},
	}})
	a := tenancy.Adoption{Name: "acme", Login: s.login}
	plan, err := tn.Catalog().PlanAdoption(t.Context(), a)
	if err != nil || len(plan.Obstacles) != 1 || !strings.Contains(plan.Obstacles[0].What, "may not act") {
		t.Fatalf("before the grant: %v\n%s", err, plan)
	}
	grant, clean, _ := strings.Cut(after, "-- after Catalog.ConfirmAdoption\n")
	if scan[int](t, admin, `SELECT current_setting('server_version_num')::int`) < 160000 {
		grant, _, _ = strings.Cut(grant, " WITH ADMIN")
	}
	must(t, admin, names.Replace(grant))
	works("granted")
	if plan, err = tn.Catalog().PlanAdoption(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if got := strings.ReplaceAll(back.Replace(plan.String()), "\t", "    "); got != strings.ReplaceAll(blocks["text"], "\t", "    ") {
		t.Errorf("docs/adoption.md shows another plan than\n%s", got)
	}
	acme, err := tn.Catalog().Adopt(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := tn.DB().QueryRow(enter(t, tn, acme.ID), `SELECT count(*) FROM notes WHERE NOT done`).Scan(&n); err != nil || n != 5 {
		t.Errorf("%d notes, %v", n, err)
	}
	if err := tn.Catalog().ConfirmAdoption(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	must(t, admin, names.Replace(clean))
}
