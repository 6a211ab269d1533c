package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/tenancytest"
)

// ill is a fleet with two tenants of each isolation, of which faults are seeded.
type ill struct {
	*tenancytest.Fleet
	tn      *tenancy.Tenancy
	tenants map[string]tenancy.Tenant
	names   *strings.Replacer // {schema1}, {owner1}, {runtime1}, {login1} and so on
	secrets []string
}

func newIll(t *testing.T) *ill {
	t.Helper()
	h := &ill{Fleet: tenancytest.NewFleet(t, "citext", "pg_stat_statements"), tenants: map[string]tenancy.Tenant{}}
	h.AllowDatabases(t)
	for _, name := range []string{"primary", "tenants"} { // the test server commits for nobody but tests
		admin := h.Admin(t, name)
		must(t, admin, "ALTER DATABASE "+scan[string](t, admin, "SELECT quote_ident(current_database())")+" SET synchronous_commit = on")
	}
	h.tn = h.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema, Logger: slog.New(slog.DiscardHandler)})
	// What an operator may make, and a reader, are no faults.
	provider, err := pgx.Connect(t.Context(), h.ServerURL)
	if err != nil {
		t.Fatal(err)
	}
	must(t, provider, "CREATE TABLE tenancy_ref.currencies (code text PRIMARY KEY, old boolean); CREATE VIEW tenancy_ref.current AS SELECT code FROM tenancy_ref.currencies WHERE NOT old")
	must(t, provider, "CREATE FUNCTION tenancy_ref.known(text) RETURNS boolean LANGUAGE sql AS 'SELECT count(*) > 0 FROM tenancy_ref.currencies WHERE code = $1'")
	if err := provider.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.tn.Catalog().AddReader(t.Context(), "main"); err != nil {
		t.Fatal(err)
	}
	group := scan[string](t, h.Admin(t, "tenants"), "SELECT current_database()") + "_tenants"
	pairs := []string{"{group}", group, "{tenants}", strings.TrimSuffix(group, "_tenants"), "{primary}", scan[string](t, h.Admin(t, "primary"), "SELECT current_database()")}
	for _, of := range []struct {
		name      string
		isolation tenancy.Isolation
		dense     bool
	}{{"schema", tenancy.IsolationSchema, false}, {"database", tenancy.IsolationDatabase, false}, {"shared", tenancy.IsolationShared, false}, {"dense", tenancy.IsolationSchema, true}, {"tight", tenancy.IsolationShared, true}} {
		for n := 1; n <= 2; n++ {
			name := fmt.Sprint(of.name, n)
			made := makeIn(t, h.tn, name, of.isolation)
			if of.dense {
				if err := h.tn.Catalog().SetDense(t.Context(), made.ID, true); err != nil {
					t.Fatal(err)
				}
			}
			h.tenants[name] = made
			p := placeOf(t, h.Fleet, made.ID)
			pairs = append(pairs, "{s:"+name+"}", p.Schema, "{o:"+name+"}", p.Owner, "{r:"+name+"}", p.Runtime, "{l:"+name+"}", p.Login, "{id:"+name+"}", fmt.Sprint(made.ID))
			d, err := h.tn.Catalog().SourceForTest(t.Context(), made.ID)
			if err != nil {
				t.Fatal(err)
			}
			pairs = append(pairs, "{db:"+name+"}", d.Database)
			h.secrets = append(h.secrets, d.Password.Reveal())
		}
	}
	provisioner, err := url.Parse(h.ServerURL)
	if err != nil {
		t.Fatal("the fleet's URL cannot be parsed")
	}
	pairs = append(pairs, "{provisioner}", provisioner.User.Username(), "{pool}", scan[string](t, h.Admin(t, "primary"), "SELECT login FROM tenancy.dense_logins WHERE isolation = 'schema'"))
	h.names = strings.NewReplacer(pairs...)
	for _, raw := range []string{h.PrimaryURL, h.ServerURL} {
		u, _ := url.Parse(raw)
		password, _ := u.User.Password()
		h.secrets = append(h.secrets, password)
	}
	_, key, _ := strings.Cut(h.KeyText, ":")
	h.secrets = append(h.secrets, key)
	return h
}

// doctor returns what is above a note, and checks what holds of each result.
func (h *ill) doctor(t *testing.T, tn *tenancy.Tenancy) (bad, all []tenancy.Finding) {
	t.Helper()
	all, err := tn.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range all {
		if f.Level > tenancy.LevelNote {
			bad = append(bad, f)
		}
		if i > 0 && all[i-1].Level < f.Level {
			t.Errorf("%s comes after %s", f, all[i-1])
		}
		if f.Check == "" || f.What == "" || f.Level > tenancy.LevelNote && (f.Why == "" || f.Mend == "") {
			t.Errorf("it does not say all: %#v", f)
		}
		for _, secret := range h.secrets {
			if strings.Contains(f.String()+fmt.Sprintf("%+v", f), secret) {
				t.Errorf("a secret is in %s", f)
			}
		}
	}
	return bad, all
}

func (h *ill) wantHealthy(t *testing.T, when string) {
	t.Helper()
	bad, _ := h.doctor(t, h.tn)
	for _, f := range bad {
		t.Errorf("%s: %s", when, f)
	}
}

// in is a superuser's session in a database: "tenants", "primary", or one by its name.
func (h *ill) in(t *testing.T, database string) *pgx.Conn {
	t.Helper()
	if database == "tenants" || database == "primary" {
		return h.Admin(t, database)
	}
	cc, err := pgx.ParseConfig(h.AdminURL)
	if err != nil {
		t.Fatal("the test server's URL cannot be parsed")
	}
	cc.Database = database
	cc.RuntimeParams["search_path"] = ""
	conn, err := pgx.ConnectConfig(t.Context(), cc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (h *ill) exec(t *testing.T, database, sql string) {
	t.Helper()
	conn := h.in(t, h.names.Replace(database))
	defer conn.Close(t.Context())
	if _, err := conn.PgConn().Exec(t.Context(), h.names.Replace(sql)).ReadAll(); err != nil {
		t.Fatalf("%s: %v", h.names.Replace(sql), err)
	}
}

var mendIn = regexp.MustCompile(`-- in database "([^"]*)"`)

// mend runs the statement of the finding, where it says.
func (h *ill) mend(t *testing.T, f tenancy.Finding) {
	t.Helper()
	database := "tenants"
	if f.Server == "" {
		database = "primary"
	}
	if m := mendIn.FindStringSubmatch(f.Mend); m != nil {
		database = m[1]
	}
	statement, _, _ := strings.Cut(f.Mend, " -- in database")
	h.exec(t, database, statement)
}

// fault is seeded by a superuser, found, and mended by the finding's own statement, or else by mend.
type fault struct {
	in, seed string
	check    string
	level    tenancy.Level
	tenant   string // "": none
	says     string
	mend     string // in the same database; "": that of the finding
}

// faults come in waves of those that do not hide each other.
var faults = [][]fault{
	{
		{"tenants", `ALTER ROLE {l:tight1} RENAME TO lost; ALTER ROLE lost NOLOGIN`, "role", tenancy.LevelFailure, "tight1", "the login {l:tight1} is missing", `ALTER ROLE lost RENAME TO {l:tight1}; ALTER ROLE {l:tight1} LOGIN`},
		{"tenants", `SELECT 1`, "membership", tenancy.LevelFailure, "", "lost is a member of {r:tight1}", `SELECT 1`}, // as it is called now
		{"tenants", `ALTER ROLE {o:schema1} CREATEDB`, "role", tenancy.LevelFailure, "schema1", "has CREATEDB", ""},
		{"tenants", `ALTER ROLE {l:database1} BYPASSRLS REPLICATION`, "role", tenancy.LevelFailure, "database1", "has REPLICATION, BYPASSRLS", ""},
		{"tenants", `ALTER ROLE {pool} INHERIT`, "role", tenancy.LevelFailure, "", "inherits", ""},
		{"tenants", `GRANT {r:schema2} TO {l:dense2}`, "membership", tenancy.LevelFailure, "schema2", "{l:dense2} is a member of {r:schema2}", ""},
		{"tenants", `GRANT pg_read_all_data TO {l:shared1}`, "membership", tenancy.LevelFailure, "shared1", "is a member of pg_read_all_data", ""},
		{"tenants", `GRANT USAGE ON SCHEMA {s:dense1} TO PUBLIC`, "privilege", tenancy.LevelFailure, "dense1", "PUBLIC has rights on schema", ""},
		{"tenants", `GRANT CONNECT ON DATABASE {tenants} TO PUBLIC`, "server", tenancy.LevelFailure, "", "every role may connect to the tenants' database", ""},
		{"{db:database2}", `GRANT CREATE ON SCHEMA public TO PUBLIC`, "place", tenancy.LevelFailure, "database2", "may create in schema public", ""},
		{"tenants", `ALTER TABLE {s:shared1}.notes NO FORCE ROW LEVEL SECURITY`, "rows", tenancy.LevelFailure, "", "notes has a wall that is not forced", ""},
		{"tenants", `CREATE SCHEMA t_0123456789abcdef0123`, "orphan", tenancy.LevelWarning, "", "schema t_0123456789abcdef0123 is of no place", ""},
		{"primary", `INSERT INTO tenancy.nodes (id, name, epoch, seen) VALUES ('00000000-0000-4000-8000-000000000001', 'lost/1', 0, now() - interval '9 min')`, "nodes", tenancy.LevelWarning, "", "node lost/1 (00000000-0000-4000-8000-000000000001) has been silent", ""},
		{"tenants", `CREATE ROLE t_0123456789abcdef0123_o; GRANT t_0123456789abcdef0123_o TO {provisioner}`, "orphan", tenancy.LevelWarning, "", "role t_0123456789abcdef0123_o is of no place", ""},
		{"primary", `ALTER DATABASE {primary} SET synchronous_commit = off`, "settings", tenancy.LevelWarning, "", "synchronous_commit is off", ""},
	}, {
		{"tenants", `ALTER ROLE {o:schema1} LOGIN VALID UNTIL 'infinity'`, "role", tenancy.LevelFailure, "schema1", "may log in", ""},
		{"tenants", `ALTER ROLE {r:schema2} LOGIN`, "role", tenancy.LevelFailure, "schema2", "may log in", ""},
		{"tenants", `ALTER ROLE {l:shared2} NOLOGIN`, "role", tenancy.LevelFailure, "shared2", "may not log in", ""},
		{"tenants", `ALTER ROLE {l:shared1} CONNECTION LIMIT 1`, "role", tenancy.LevelWarning, "shared1", "CONNECTION LIMIT 1", ""},
		{"tenants", `REVOKE {r:dense1} FROM {l:dense1} GRANTED BY {provisioner}`, "membership", tenancy.LevelFailure, "dense1", "is no member of {r:dense1}", ""},
		{"tenants", `GRANT SELECT ON {s:dense2}.notes TO {l:tight1}`, "privilege", tenancy.LevelFailure, "dense2", "{l:tight1} of tenant tight1 has rights on tables", ""},
		{"{db:database1}", `GRANT SELECT ON {s:database1}.notes TO PUBLIC`, "privilege", tenancy.LevelWarning, "database1", "PUBLIC has rights on tables", ""},
		{"{db:database2}", `CREATE EXTENSION dblink SCHEMA public`, "extension", tenancy.LevelWarning, "database2", "extension dblink is there", ""},
		{"tenants", `GRANT SELECT, UPDATE ON {s:shared1}.tenancy_map TO {r:shared1}`, "rows", tenancy.LevelFailure, "", "tenancy_map is the library's", ""},
		{"primary", `GRANT USAGE ON SCHEMA tenancy TO PUBLIC`, "primary", tenancy.LevelFailure, "", "every role may use schema tenancy", ""},
		{"primary", `UPDATE tenancy.data_sources SET version = 0 WHERE schema = '{s:dense1}'`, "migration", tenancy.LevelWarning, "dense1", "at version 0, and the service wants 1", `UPDATE tenancy.data_sources SET version = 1 WHERE version = 0`},
		{"primary", `UPDATE tenancy.data_sources SET migrating = 99 WHERE schema = '{s:dense2}'`, "migration", tenancy.LevelFailure, "dense2", "migration 99 has died half-way", `UPDATE tenancy.data_sources SET migrating = NULL`},
		{"primary", `INSERT INTO tenancy.data_sources (uid, server, schema, owner, runtime, login, sealed, state, updated) SELECT gen_random_uuid(), server, 't_ffffffffffffffffffff', 'o', 'r', 'l', sealed, 'intent', now() - interval '2 h' FROM tenancy.data_sources LIMIT 1`,
			"intent", tenancy.LevelWarning, "", "place t_ffffffffffffffffffff is unfinished", `DELETE FROM tenancy.data_sources WHERE state = 'intent'`},
	}, {
		{"tenants", `ALTER DATABASE {tenants} SET default_transaction_read_only = on`, "settings", tenancy.LevelFailure, "", "default_transaction_read_only is on", ""},
	}, {
		{"tenants", `GRANT CREATE ON SCHEMA {s:schema1} TO {r:schema1}`, "isolation", tenancy.LevelFailure, "schema1", "may create in its schema", ""},
		{"tenants", `GRANT UPDATE ON {s:schema2}.tenancy_marker TO {r:schema2}`, "isolation", tenancy.LevelFailure, "schema2", "may change", ""},
		{"tenants", `GRANT CONNECT ON DATABASE {db:database1} TO {group}`, "database", tenancy.LevelFailure, "database1", "{group} has CONNECT on database", ""},
		{"tenants", `ALTER TABLE {s:dense1}.notes OWNER TO {l:dense2}`, "owner", tenancy.LevelFailure, "dense1", "belong to {l:dense2}", ""},
		{"tenants", `ALTER SCHEMA {s:dense2} OWNER TO CURRENT_USER`, "place", tenancy.LevelFailure, "dense2", "and not to {o:dense2}", ""},
		{"tenants", `ALTER DEFAULT PRIVILEGES FOR ROLE {o:shared1} IN SCHEMA {s:shared1} GRANT SELECT ON TABLES TO PUBLIC`, "privilege", tenancy.LevelWarning, "", "PUBLIC will have rights on tables to come", ""},
		{"{db:database2}", `ALTER SCHEMA {s:database2} RENAME TO lost`, "place", tenancy.LevelFailure, "database2", "is missing", `ALTER SCHEMA lost RENAME TO {s:database2}`},
		{"primary", `UPDATE tenancy.tenants SET state = 'suspended', updated = now() - interval '1 h' WHERE id = {id:tight1}`, "fence", tenancy.LevelWarning, "tight1", "was not closed at its server", `UPDATE tenancy.tenants SET state = 'active' WHERE id = {id:tight1}`},
		{"primary", `UPDATE tenancy.tenants SET state = 'suspended', fenced = now() WHERE id = {id:tight2}`, "fence", tenancy.LevelFailure, "tight2", "may log in", `UPDATE tenancy.tenants SET state = 'active', fenced = NULL WHERE id = {id:tight2}`},
		{"tenants", `CREATE FUNCTION public.noop() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; CREATE EVENT TRIGGER noop ON ddl_command_end EXECUTE FUNCTION public.noop()`, "extension", tenancy.LevelWarning, "", "event trigger noop is there", ""},
		{"{db:database1}", `UPDATE pg_catalog.pg_language SET lanpltrusted = false WHERE lanname = 'plpgsql'`, "extension", tenancy.LevelNote, "database1", "language plpgsql is not trusted", `UPDATE pg_catalog.pg_language SET lanpltrusted = true WHERE lanname = 'plpgsql'`},
		{"tenants", `CREATE FUNCTION public.risky() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'`, "extension", tenancy.LevelWarning, "", "risky(), which works with the rights of the superuser", ""},
	}, {
		{"tenants", `GRANT pg_read_all_data TO {group}`, "membership", tenancy.LevelFailure, "", "{group} is a member of pg_read_all_data", ""},
		{"tenants", `CREATE FUNCTION tenancy_ref.peek() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'; ALTER FUNCTION tenancy_ref.peek() OWNER TO {provisioner}`, "extension", tenancy.LevelWarning, "", "PUBLIC may call tenancy_ref.peek(), which works with the rights of the provisioner", ""},
		{"tenants", `CREATE FUNCTION public.chosen() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'; REVOKE ALL ON FUNCTION public.chosen() FROM PUBLIC; GRANT EXECUTE ON FUNCTION public.chosen() TO {group}, {l:dense1}`,
			"extension", tenancy.LevelWarning, "", "public.chosen(), which works with the rights of the superuser", ""},
		{"tenants", `CREATE SCHEMA common; GRANT USAGE ON SCHEMA common TO PUBLIC; CREATE FUNCTION common.take() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'; ALTER FUNCTION common.take() OWNER TO {o:schema1}`,
			"extension", tenancy.LevelFailure, "", "PUBLIC may call common.take(), which works with the rights of {o:schema1}", ""},
		{"tenants", `CREATE VIEW tenancy_ref.leak AS SELECT * FROM {s:schema2}.notes; CREATE VIEW tenancy_ref.deep AS SELECT * FROM tenancy_ref.leak; GRANT SELECT ON tenancy_ref.deep TO {group}`,
			"extension", tenancy.LevelFailure, "", "{group} may use tenancy_ref.deep, which shows {s:schema2}.notes", ""},
		{"tenants", `CREATE VIEW tenancy_ref.part AS SELECT * FROM {s:shared1}.notes; GRANT SELECT (id) ON tenancy_ref.part TO {r:shared1}`, "extension", tenancy.LevelFailure, "", "{r:shared1} may use tenancy_ref.part, which shows {s:shared1}.notes", ""},
		{"tenants", `GRANT EXECUTE ON FUNCTION pg_read_file(text), lo_export(oid, text) TO {group}`, "extension", tenancy.LevelFailure, "", "{group} may call pg_read_file(text), which nobody may by default", ""},
		{"tenants", `SELECT 1`, "extension", tenancy.LevelFailure, "", "{group} may call lo_export(oid,text), which nobody may by default", ""},
		{"tenants", `ALTER POLICY tenancy_wall_delete ON {s:shared1}.notes USING (tenant_id = (SELECT {s:shared1}.tenancy_tenant()) OR 1 = 1)`, "rows", tenancy.LevelFailure, "", "notes has a wall that is not forced, or was changed", ""},
		{"{db:database1}", `GRANT EXECUTE ON FUNCTION pg_ls_dir(text) TO PUBLIC`, "extension", tenancy.LevelFailure, "database1", "PUBLIC may call pg_ls_dir(text)", ""},
		{"tenants", `GRANT SELECT (rolpassword) ON pg_authid TO {group}`, "extension", tenancy.LevelFailure, "", "{group} has SELECT on the system's pg_authid", ""},
		{"{db:database2}", `GRANT SELECT ON pg_statistic TO PUBLIC`, "extension", tenancy.LevelFailure, "database2", "PUBLIC has SELECT on the system's pg_statistic", ""},
		{"tenants", `CREATE TABLE tenancy_ref.countries (code text); GRANT UPDATE (code) ON tenancy_ref.countries TO {group}`, "extension", tenancy.LevelWarning, "", "{group} has UPDATE on tenancy_ref.countries", ""},
		{"tenants", `ALTER DEFAULT PRIVILEGES FOR ROLE {o:schema2} GRANT SELECT ON TABLES TO {l:schema1}`, "privilege", tenancy.LevelFailure, "schema2", "{l:schema1} of tenant schema1 will have rights on tables to come anywhere", ""},
		{"tenants", `SELECT lo_create(4711); ALTER LARGE OBJECT 4711 OWNER TO {l:schema1}; GRANT SELECT ON LARGE OBJECT 4711 TO PUBLIC`, "privilege", tenancy.LevelFailure, "schema1", "PUBLIC has rights on 1 large objects of {l:schema1}", ""},
		{"tenants", `ALTER ROLE {l:tight1} VALID UNTIL '2020-01-01'`, "role", tenancy.LevelFailure, "tight1", "the password of the login {l:tight1} of a tenant in service has expired", ""},
		{"tenants", `ALTER ROLE {pool} VALID UNTIL '2020-01-01'`, "role", tenancy.LevelFailure, "", "the password of the shared pool's login {pool} has expired", ""},
		{"tenants", `ALTER ROLE {l:dense2} IN DATABASE {tenants} SET search_path = public, {s:dense2}`, "role", tenancy.LevelFailure, "dense2", "has search_path set to public", ""},
		{"tenants", `ALTER ROLE {l:shared1} SET row_security = off`, "role", tenancy.LevelWarning, "shared1", "has row_security set to off", ""},
		{"tenants", `ALTER DATABASE {tenants} SET lo_compat_privileges = on`, "role", tenancy.LevelFailure, "", "database {tenants} has lo_compat_privileges set to on", ""},
		{"tenants", `CREATE ROLE t_0123456789abcdef0124_l1; GRANT {group} TO t_0123456789abcdef0124_l1`, "orphan", tenancy.LevelWarning, "", "role t_0123456789abcdef0124_l1 is of no place", ""},
		{"tenants", `CREATE ROLE t_0123456789abcdef0125_r; GRANT USAGE ON SCHEMA tenancy_ref TO t_0123456789abcdef0125_r`, "orphan", tenancy.LevelWarning, "", "role t_0123456789abcdef0125_r is of no place", ""},
	},
}

func TestDoctorFindsEachFault(t *testing.T) {
	t.Parallel()
	h := newIll(t)
	_, all := h.doctor(t, h.tn)
	var made []string
	for _, f := range all {
		made = append(made, f.Check)
		if f.Level != tenancy.LevelOK {
			t.Errorf("a healthy fleet: %s", f)
		}
	}
	slices.Sort(made)
	if want := strings.Fields("clock connections database extension fence intent isolation keys listen membership migration nodes orphan owner place pooler primary privilege role rows server settings version"); !slices.Equal(made, want) {
		t.Errorf("made %q, want %q", made, want)
	}
	for n, wave := range faults {
		for _, f := range wave {
			h.exec(t, f.in, f.seed)
		}
		bad, all := h.doctor(t, h.tn)
		for _, f := range all {
			if f.Level == tenancy.LevelNote {
				bad = append(bad, f)
			}
		}
		for _, f := range wave {
			i := slices.IndexFunc(bad, func(is tenancy.Finding) bool {
				return is.Check == f.check && is.Level == f.level && is.Tenant.Name == f.tenant && strings.Contains(is.What, h.names.Replace(f.says))
			})
			if i < 0 {
				t.Errorf("wave %d: %s was not found", n, f.seed)
				continue
			}
			found := bad[i]
			bad = slices.Delete(bad, i, i+1)
			if f.mend == "" {
				h.mend(t, found)
			}
		}
		for _, f := range bad {
			t.Errorf("wave %d: nobody has done that: %s", n, f)
		}
		for _, f := range wave {
			if f.mend != "" {
				h.exec(t, f.in, f.mend)
			}
		}
		h.wantHealthy(t, fmt.Sprintf("after wave %d", n))
	}
	// A tenant's transaction that holds its table hides nothing, and what of a wall could not be asked is a failure.
	h.exec(t, "tenants", `ALTER TABLE {s:shared1}.notes NO FORCE ROW LEVEL SECURITY`)
	holder := login(t, h.tn, h.tenants["shared2"].ID)
	must(t, holder, "BEGIN")
	must(t, holder, h.names.Replace("LOCK TABLE {s:shared1}.notes IN ACCESS EXCLUSIVE MODE"))
	_, all = h.doctor(t, h.tn)
	wantFinding(t, all, "rows", "notes has a wall that is not forced", tenancy.LevelFailure)
	must(t, holder, "ROLLBACK")
	open, _ := find(all, "rows", "notes has a wall that is not forced")
	h.mend(t, open)
	admin := h.in(t, "tenants")
	must(t, admin, "BEGIN")
	must(t, admin, "LOCK TABLE pg_catalog.pg_default_acl IN ACCESS EXCLUSIVE MODE")
	_, all = h.doctor(t, h.tn)
	wantFinding(t, all, "privilege", "the check could not be made", tenancy.LevelFailure)
	must(t, admin, "ROLLBACK")
	h.wantHealthy(t, "without what held it")

	major := scan[int](t, h.Admin(t, "tenants"), "SELECT current_setting('server_version_num')::int / 10000")
	if major < 15 {
		return // nobody can be granted a parameter
	}
	h.exec(t, "tenants", `GRANT ALTER SYSTEM ON PARAMETER lo_compat_privileges TO {group}`)
	_, all = h.doctor(t, h.tn)
	wantFinding(t, all, "role", h.names.Replace("{group} has ALTER SYSTEM on the server's parameter lo_compat_privileges"), tenancy.LevelFailure)
	granted, _ := find(all, "role", "on the server's parameter lo_compat_privileges")
	h.mend(t, granted)
	h.wantHealthy(t, "after the parameter is the superuser's")
	if major < 16 {
		return // memberships do not say by themselves whether they are inherited
	}
	h.exec(t, "tenants", `GRANT {s:dense2} TO {pool} WITH INHERIT TRUE GRANTED BY {provisioner}`)
	_, all = h.doctor(t, h.tn)
	wantFinding(t, all, "membership", "inherits the rights of "+h.names.Replace("{s:dense2}"), tenancy.LevelFailure)
	inherits, _ := find(all, "membership", "inherits the rights of")
	h.mend(t, inherits)
	h.wantHealthy(t, "after the membership inherits no more")
}

// find returns the finding of a check that says the text.
func find(found []tenancy.Finding, check, says string) (tenancy.Finding, bool) {
	i := slices.IndexFunc(found, func(f tenancy.Finding) bool { return f.Check == check && strings.Contains(f.What, says) })
	if i < 0 {
		return tenancy.Finding{}, false
	}
	return found[i], true
}

func wantFinding(t *testing.T, found []tenancy.Finding, check, says string, level tenancy.Level) {
	t.Helper()
	if f, ok := find(found, check, says); !ok || f.Level != level {
		t.Errorf("%s: %q with level %s was not found, but %v", check, says, level, f)
		for _, f := range found {
			t.Log(f)
		}
	}
}

// A rotation that was cut off leaves a login that is a member of another one: the library made it so, and finishes it.
func TestDoctorFindsNothingWrongBesideAnUnfinishedRotation(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	var tenants []tenancy.Tenant
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase, tenancy.IsolationShared} {
		tenants = append(tenants, makeIn(t, tn, "acme-"+string(isolation), isolation))
	}
	globex := placeOf(t, f, makeIn(t, tn, "globex", tenancy.IsolationSchema).ID)
	for step := 1; step < tenancy.RotationSteps(tn); step++ {
		for _, acme := range tenants {
			if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, step); err != nil {
				t.Fatal(err)
			}
		}
		found, err := tn.Doctor(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if f.Check == "membership" && f.Level > tenancy.LevelNote {
				t.Errorf("after %d steps: %s", step, f)
			}
		}
	}
	// Others' memberships in a login are wrong as ever.
	admin, acme := f.Admin(t, "tenants"), placeOf(t, f, tenants[0].ID)
	must(t, admin, "GRANT "+acme.Login+" TO "+globex.Login)
	found, err := tn.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "membership", globex.Login+" is a member of "+acme.Login, tenancy.LevelFailure)
}

// A node that is set up in another way than its servers, keys and fellows.
func TestDoctorLooksAtTheNodeItself(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	acme, globex := makeIn(t, tn, "acme", tenancy.IsolationSchema), makeIn(t, tn, "globex", tenancy.IsolationSchema)
	for _, skew := range []time.Duration{-time.Hour, time.Minute} {
		found, err := tn.DoctorAt(t.Context(), func() time.Time { return time.Now().Add(skew) })
		if err != nil {
			t.Fatal(err)
		}
		says := map[bool]string{true: "ahead of this node's", false: "behind this node's"}[skew < 0]
		wantFinding(t, found, "clock", says, tenancy.LevelWarning)
		if n := len(slices.DeleteFunc(found, func(f tenancy.Finding) bool { return f.Check != "clock" })); n != 2 {
			t.Errorf("%d clocks were found, want those of the primary and of the server", n)
		}
	}

	fresh, err := tenancy.NewKey("k")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := tenancy.ParseKeyring(fresh + "," + f.KeyText)
	if err != nil {
		t.Fatal(err)
	}
	other, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: keys, Limits: tenancy.Limits{ServerConns: 5000}})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := tn.Migrator().Pin(t.Context(), acme.ID, 1); err != nil {
		t.Fatal(err)
	}
	must(t, f.Admin(t, "primary"), "UPDATE tenancy.data_sources SET version = 7 WHERE uid = $1", globex.UID)
	found, err := other.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "keys", `sealed with the older key "test"`, tenancy.LevelWarning)
	wantFinding(t, found, "connections", "Limits.ServerConns is 5000", tenancy.LevelWarning)
	wantFinding(t, found, "nodes", "nothing found", tenancy.LevelOK) // this one only asks
	wantFinding(t, found, "migration", "were not looked at", tenancy.LevelNote)
	must(t, f.Admin(t, "primary"), "INSERT INTO tenancy.nodes (id, name, epoch) VALUES ('00000000-0000-4000-8000-000000000002', 'fellow/1', 0)")
	if found, err = other.Doctor(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "nodes", "2 nodes are alive, and Limits.Nodes is 1", tenancy.LevelWarning)
	must(t, f.Admin(t, "primary"), "DELETE FROM tenancy.nodes WHERE name = 'fellow/1'")
	if _, err := other.DB().Exec(tenancytest.Context(t, other, "globex"), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	if found, err = other.Doctor(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "nodes", "2 nodes are alive, and Limits.Nodes is 1", tenancy.LevelWarning) // it serves now
	if _, err := other.Catalog().RotateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found, err = other.Doctor(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "keys", `key "test" seals nothing any more`, tenancy.LevelNote)
	for _, d := range found { // the sentinel is no longer than its key's id makes it
		if d.Check == "keys" && d.Level > tenancy.LevelNote {
			t.Errorf("after the rotation: %v", d)
		}
	}
	if found, err = tn.Doctor(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "keys", `a key of id "k", which Config.Keys has not`, tenancy.LevelFailure)
	wantFinding(t, found, "server", "cannot be looked at", tenancy.LevelFailure)
	wantFinding(t, found, "migration", "it is pinned to version 1", tenancy.LevelNote)
	wantFinding(t, found, "migration", "at version 7, and this release knows 1", tenancy.LevelNote)
	wantFinding(t, found, "isolation", "was not made", tenancy.LevelNote)
}

func TestDoctorGoesOnWithoutWhatIsDown(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	acme, globex := makeIn(t, tn, "acme", tenancy.IsolationSchema), makeIn(t, tn, "globex", tenancy.IsolationSchema)
	primary, tenants := f.Admin(t, "primary"), f.Admin(t, "tenants")
	// A server whose port nobody listens on, with acme's place.
	must(t, primary, `INSERT INTO tenancy.servers (name, host, port, database, tls, provisioner) SELECT 'down', '127.0.0.1', 1, 'gone', tls, $1 FROM tenancy.servers`, sealProvisioner(t, tn, f, 1))
	must(t, primary, `UPDATE tenancy.data_sources SET server = (SELECT id FROM tenancy.servers WHERE name = 'down') WHERE uid = $1`, acme.UID)
	must(t, tenants, "ALTER ROLE "+placeOf(t, f, globex.ID).Runtime+" CREATEDB")
	found, err := tn.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "server", "it cannot be reached", tenancy.LevelFailure)
	wantFinding(t, found, "role", "has CREATEDB", tenancy.LevelFailure)
	if down, _ := find(found, "server", "it cannot be reached"); down.Server != "down" {
		t.Errorf("it is said of server %q", down.Server)
	}
	// Missing rights of the catalog's login are a check that cannot be made.
	must(t, primary, "ALTER TABLE tenancy.nodes RENAME TO lost")
	if found, err = tn.Doctor(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "nodes", "the check could not be made", tenancy.LevelWarning)
	wantFinding(t, found, "keys", "nothing found", tenancy.LevelOK)
	must(t, primary, "ALTER TABLE tenancy.lost RENAME TO nodes")

	must(t, tenants, "ALTER DATABASE "+primary.Config().Database+" ALLOW_CONNECTIONS false")
	defer must(t, tenants, "ALTER DATABASE "+primary.Config().Database+" ALLOW_CONNECTIONS true")
	if found, err = tn.Doctor(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, found, "primary", "the primary cannot be reached", tenancy.LevelFailure)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tn.Doctor(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
}

// sealProvisioner is the fleet's provisioner as it is kept, at another port.
func sealProvisioner(t *testing.T, tn *tenancy.Tenancy, f *tenancytest.Fleet, port uint16) []byte {
	t.Helper()
	d, err := tenancy.ParseDataSource(f.ServerURL)
	if err != nil {
		t.Fatal(err)
	}
	d.Host, d.Port = "127.0.0.1", port
	sealed, err := tn.SealProvisionerForTest(d)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func TestDoctorKnowsAPooler(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	var users strings.Builder
	for _, raw := range []string{f.PrimaryURL, f.ServerURL} {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal("the fleet's URL cannot be parsed")
		}
		password, _ := u.User.Password()
		fmt.Fprintf(&users, "%q %q\n", u.User.Username(), password)
	}
	server, err := url.Parse(f.ServerURL)
	if err != nil {
		t.Fatal("the fleet's URL cannot be parsed")
	}
	b, err := pgembed.StartBouncer(t.Context(), fmt.Sprintf("[databases]\n* = host=%s port=%s\n\n[pgbouncer]\nauth_type = scram-sha-256\npool_mode = transaction\nignore_startup_parameters = search_path, lock_timeout, extra_float_digits\n",
		server.Hostname(), server.Port()), users.String())
	if err != nil {
		t.Fatal(err)
	}
	primary := f.Admin(t, "primary")
	t.Cleanup(func() {
		if err := b.Stop(); err != nil {
			t.Error(err)
		}
	})
	doctor := func(tn *tenancy.Tenancy) []tenancy.Finding {
		t.Helper()
		found, err := tn.Doctor(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(b.Port()))
	must(t, primary, "UPDATE tenancy.servers SET pooler = $1", address)
	wantFinding(t, doctor(tn), "pooler", "nothing found", tenancy.LevelOK)
	must(t, primary, "UPDATE tenancy.servers SET pooler = '127.0.0.1:1'")
	wantFinding(t, doctor(tn), "pooler", "its pooler cannot be reached", tenancy.LevelFailure)
	must(t, primary, "UPDATE tenancy.servers SET pooler = '', provisioner = $1", sealProvisioner(t, tn, f, uint16(b.Port())))
	found := doctor(tn)
	wantFinding(t, found, "pooler", "between this node and the server is a pooler", tenancy.LevelFailure)
	wantFinding(t, found, "role", "was not made", tenancy.LevelNote)
	must(t, primary, "UPDATE tenancy.servers SET provisioner = NULL")

	way, err := url.Parse(f.PrimaryURL)
	if err != nil {
		t.Fatal("the fleet's URL cannot be parsed")
	}
	way.Host, way.RawQuery = address, "sslmode=disable&default_query_exec_mode=exec"
	for _, listen := range []string{f.PrimaryURL, ""} {
		pooled, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: way.String(), ListenURL: listen, Keys: f.Keys, CheckPrimaryOnly: true, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		found := doctor(pooled)
		if err := pooled.Close(); err != nil {
			t.Error(err)
		}
		if listen != "" {
			wantFinding(t, found, "pooler", "Config.PrimaryURL leads through a pooler", tenancy.LevelNote)
			wantFinding(t, found, "listen", "nothing found", tenancy.LevelOK)
		} else {
			wantFinding(t, found, "pooler", "Config.ListenURL leads through a pooler", tenancy.LevelFailure)
			wantFinding(t, found, "listen", "a notification did not come back", tenancy.LevelWarning)
		}
	}
}

func TestDoctorJudgesSettings(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{})
	good := map[string]string{"server_version_num": "150018", "synchronous_commit": "on", "password_encryption": "scram-sha-256", "ssl": "on", "default_transaction_read_only": "off",
		"max_connections": "100", "superuser_reserved_connections": "3", "reserved_connections": "0", "in_recovery": "false"}
	if found := tenancy.SettingsForTest(tn, "db.example.com", good); len(found) > 0 {
		t.Errorf("good settings: %v", found)
	}
	for _, c := range []struct {
		name, value, host string
		level             tenancy.Level
		says              string
	}{
		{"server_version_num", "130010", "", tenancy.LevelFailure, "PostgreSQL 13 is older"},
		{"server_version_num", "190000", "", tenancy.LevelNote, "PostgreSQL 19 is newer"},
		{"in_recovery", "true", "", tenancy.LevelFailure, "is a standby"},
		{"synchronous_commit", "off", "", tenancy.LevelWarning, "synchronous_commit is off"},
		{"default_transaction_read_only", "on", "", tenancy.LevelFailure, "default_transaction_read_only is on"},
		{"lo_compat_privileges", "on", "", tenancy.LevelFailure, "lo_compat_privileges is on"},
		{"password_encryption", "md5", "", tenancy.LevelWarning, "password_encryption is md5"},
		{"ssl", "off", "", tenancy.LevelWarning, "has no TLS"},
		{"ssl", "off", "127.0.0.1", 0, ""},
		{"ssl", "off", "localhost", 0, ""},
		{"max_connections", "82", "", tenancy.LevelWarning, "the server gives 79"},
		{"reserved_connections", "18", "", tenancy.LevelWarning, "the server gives 79"},
	} {
		settings := maps.Clone(good)
		settings[c.name] = c.value
		host := c.host
		if host == "" {
			host = "db.example.com"
		}
		found := tenancy.SettingsForTest(tn, host, settings)
		if c.says == "" {
			if len(found) > 0 {
				t.Errorf("%s %s at %s: %v", c.name, c.value, host, found)
			}
			continue
		}
		if len(found) != 1 || found[0].Level != c.level || !strings.Contains(found[0].What, c.says) {
			t.Errorf("%s %s at %s: %v, want %s %q", c.name, c.value, host, found, c.level, c.says)
		}
	}
}

func TestAFindingIsOneLine(t *testing.T) {
	t.Parallel()
	f := tenancy.Finding{Check: "role", Level: tenancy.LevelFailure, Tenant: tenancy.Tenant{ID: 7, Name: "acme"}, Server: "main", What: "a\nb \x1b[31mred \u202e", Why: "w", Mend: "m"}
	if got, want := f.String(), `failure role server main tenant acme (7): a\nb \x1b[31mred \u202e; it matters: w; mend it with: m`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got, want := (tenancy.Finding{Check: "clock", What: "nothing found"}).String(), "ok clock: nothing found"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := tenancy.Level(9).String(); got != "level 9" {
		t.Error(got)
	}
}
