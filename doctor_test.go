package tenancy_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
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
	h := &ill{Fleet: tenancytest.NewFleet(t), tenants: map[string]tenancy.Tenant{}}
	h.AllowDatabases(t)
	for _, name := range []string{"primary", "tenants"} { // the test server commits for nobody but tests
		admin := h.Admin(t, name)
		must(t, admin, "ALTER DATABASE "+scan[string](t, admin, "SELECT quote_ident(current_database())")+" SET synchronous_commit = on")
	}
	h.tn = h.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema, Logger: slog.New(slog.DiscardHandler)})
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
	pairs = append(pairs, "{pool}", scan[string](t, h.Admin(t, "primary"), "SELECT login FROM tenancy.dense_logins WHERE isolation = 'schema'"))
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
		{"tenants", `ALTER ROLE {o:schema1} CREATEDB`, "role", tenancy.LevelFailure, "schema1", "has CREATEDB", ""},
		{"tenants", `ALTER ROLE {l:database1} BYPASSRLS REPLICATION`, "role", tenancy.LevelFailure, "database1", "has REPLICATION, BYPASSRLS", ""},
		{"tenants", `ALTER ROLE {pool} INHERIT`, "role", tenancy.LevelFailure, "", "inherits", ""},
		{"tenants", `GRANT {r:schema2} TO {l:dense2}`, "membership", tenancy.LevelFailure, "schema2", "{l:dense2} is a member of {r:schema2}", ""},
		{"tenants", `GRANT pg_read_all_data TO {l:shared1}`, "membership", tenancy.LevelFailure, "shared1", "is a member of pg_read_all_data", ""},
		{"tenants", `GRANT USAGE ON SCHEMA {s:dense1} TO PUBLIC`, "privilege", tenancy.LevelFailure, "dense1", "PUBLIC has rights on schema", ""},
		{"tenants", `GRANT CONNECT ON DATABASE {tenants} TO PUBLIC`, "server", tenancy.LevelFailure, "", "every role may connect to the tenants' database", ""},
		{"{db:database2}", `GRANT CREATE ON SCHEMA public TO PUBLIC`, "place", tenancy.LevelFailure, "database2", "may create in schema public", ""},
		{"tenants", `ALTER TABLE {s:shared1}.notes NO FORCE ROW LEVEL SECURITY`, "rows", tenancy.LevelFailure, "", "notes has a wall that is not forced", ""},
		{"tenants", `CREATE SCHEMA t_0123456789abcdef0123`, "orphan", tenancy.LevelWarning, "", "schema t_0123456789abcdef0123 is of no place", `DROP SCHEMA t_0123456789abcdef0123`},
		{"primary", `INSERT INTO tenancy.nodes (id, name, epoch, seen) VALUES ('00000000-0000-4000-8000-000000000001', 'lost/1', 0, now() - interval '9 min')`, "nodes", tenancy.LevelWarning, "", "node lost/1 (00000000-0000-4000-8000-000000000001) has been silent", `DELETE FROM tenancy.nodes WHERE name = 'lost/1'`},
		{"primary", `ALTER DATABASE {primary} SET synchronous_commit = off`, "settings", tenancy.LevelWarning, "", "synchronous_commit is off", ""},
	}, {
		{"tenants", `ALTER ROLE {o:schema1} LOGIN`, "role", tenancy.LevelFailure, "schema1", "may log in", ""},
		{"tenants", `ALTER ROLE {r:schema2} LOGIN`, "role", tenancy.LevelFailure, "schema2", "may log in", ""},
		{"tenants", `ALTER ROLE {l:shared2} NOLOGIN`, "role", tenancy.LevelFailure, "shared2", "may not log in", ""},
		{"tenants", `ALTER ROLE {l:shared1} CONNECTION LIMIT 1`, "role", tenancy.LevelWarning, "shared1", "CONNECTION LIMIT 1", ""},
		{"tenants", `REVOKE {r:dense1} FROM {l:dense1}`, "membership", tenancy.LevelFailure, "dense1", "is no member of {r:dense1}", ""},
		{"tenants", `GRANT SELECT ON {s:dense2}.notes TO {l:tight1}`, "privilege", tenancy.LevelFailure, "dense2", "{l:tight1} of tenant tight1 has rights on tables", ""},
		{"{db:database1}", `GRANT SELECT ON {s:database1}.notes TO PUBLIC`, "privilege", tenancy.LevelWarning, "database1", "PUBLIC has rights on tables", ""},
		{"{db:database2}", `CREATE EXTENSION dblink SCHEMA public`, "extension", tenancy.LevelWarning, "database2", "extension dblink is there", ""},
		{"tenants", `GRANT SELECT, UPDATE ON {s:shared1}.tenancy_map TO {r:shared1}`, "rows", tenancy.LevelFailure, "", "tenancy_map is the library's", ""},
		{"primary", `GRANT USAGE ON SCHEMA tenancy TO PUBLIC`, "primary", tenancy.LevelFailure, "", "every role may use schema tenancy", ""},
		{"primary", `UPDATE tenancy.data_sources SET version = 0 WHERE schema = '{s:dense1}'`, "migration", tenancy.LevelWarning, "dense1", "at version 0, and the service wants 1", `UPDATE tenancy.data_sources SET version = 1 WHERE version = 0`},
		{"primary", `UPDATE tenancy.data_sources SET migrating = 99 WHERE schema = '{s:dense2}'`, "migration", tenancy.LevelFailure, "dense2", "migration 99 has died half-way", `UPDATE tenancy.data_sources SET migrating = NULL`},
		{"primary", `INSERT INTO tenancy.data_sources (uid, server, schema, owner, runtime, login, sealed, state, updated) SELECT gen_random_uuid(), server, 't_ffffffffffffffffffff', 'o', 'r', 'l', sealed, 'intent', now() - interval '2 h' FROM tenancy.data_sources LIMIT 1`,
			"intent", tenancy.LevelWarning, "", "place t_ffffffffffffffffffff is unfinished", `DELETE FROM tenancy.data_sources WHERE state = 'intent'`},
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
		{"tenants", `CREATE FUNCTION {s:shared2}.risky() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'`, "extension", tenancy.LevelWarning, "", "risky(), which works with the rights of the superuser", `DROP FUNCTION {s:shared2}.risky()`},
	},
}

func TestDoctorFindsEachFault(t *testing.T) {
	t.Parallel()
	h := newIll(t)
	bad, all := h.doctor(t, h.tn)
	for _, f := range bad {
		t.Errorf("a healthy fleet: %s", f)
	}
	for _, f := range all {
		t.Log(f)
	}
	for n, wave := range faults {
		for _, f := range wave {
			h.exec(t, f.in, f.seed)
		}
		bad, _ := h.doctor(t, h.tn)
		for _, f := range wave {
			if f.check == "" {
				continue
			}
			i := slices.IndexFunc(bad, func(is tenancy.Finding) bool {
				return is.Check == f.check && is.Level == f.level && is.Tenant.Name == f.tenant && strings.Contains(is.What, h.names.Replace(f.says))
			})
			if i < 0 {
				t.Errorf("wave %d: %s was not found", n, f.seed)
				h.exec(t, f.in, "SELECT 1")
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
}

var _ = time.Now
