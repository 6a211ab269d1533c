package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// fleetName is the beginning of all names of a fleet.
func fleetName(tb testing.TB, f *tenancytest.Fleet) string {
	tb.Helper()
	cc, err := pgx.ParseConfig(f.PrimaryURL)
	if err != nil {
		tb.Fatal("the fleet's URL cannot be parsed")
	}
	return strings.TrimSuffix(cc.Database, "_primary")
}

// uninitialised returns what Init needs for a fleet beside f that does not exist yet.
func uninitialised(tb testing.TB, f *tenancytest.Fleet) tenancy.AdminConfig {
	tb.Helper()
	return uninitialisedAs(tb, f, "b")
}

// uninitialisedAs is uninitialised for one of several fleets; suffix ends their names.
func uninitialisedAs(tb testing.TB, f *tenancytest.Fleet, suffix string) tenancy.AdminConfig {
	tb.Helper()
	old := fleetName(tb, f)
	name := old + suffix
	a := f.AdminConfig()
	a.PrimaryURL, a.Server.URL = strings.ReplaceAll(a.PrimaryURL, old, name), strings.ReplaceAll(a.Server.URL, old, name)
	atEnd(tb, f, name, `DROP DATABASE IF EXISTS {}_primary WITH (FORCE)`, `DROP DATABASE IF EXISTS {}_tenants WITH (FORCE)`,
		`DO $$ DECLARE r text; BEGIN -- the tenants' roles, whose members' grantor the provisioner is
			FOR r IN SELECT DISTINCT roleid::regrole FROM pg_auth_members WHERE member = to_regrole('{}_provisioner') AND roleid <> to_regrole('{}_tenants_tenants') LOOP
				EXECUTE 'DROP ROLE ' || r;
			END LOOP;
		END $$`,
		`DROP ROLE IF EXISTS {}_tenants_tenants`, `DROP ROLE IF EXISTS {}_provisioner`, `DROP ROLE IF EXISTS {}_catalog`)
	return a
}

// atEnd runs statements as a superuser when the test has ended; {} is the fleet's name.
func atEnd(tb testing.TB, f *tenancytest.Fleet, name string, statements ...string) {
	tb.Helper()
	tb.Cleanup(func() {
		admin, err := pgx.Connect(context.Background(), f.AdminURL)
		if err != nil {
			tb.Error(err)
			return
		}
		defer admin.Close(context.Background())
		for _, s := range statements {
			if _, err := admin.Exec(context.Background(), strings.ReplaceAll(s, "{}", name)); err != nil {
				tb.Error(err)
			}
		}
	})
}

func TestInitMayBeCalledAgain(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t, "citext")
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Extensions: true})
	before := create(t, f, tn, "acme")
	for range 2 {
		if err := tenancy.Init(t.Context(), f.AdminConfig("citext", "pg_trgm")); err != nil {
			t.Fatal(err)
		}
	}
	after, err := f.Open(t, tenancy.Config{Migrations: noteMigrations, Extensions: true}).Catalog().Tenant(t.Context(), before.ID)
	if err != nil || after.UID != before.UID || after.State != tenancy.StateActive {
		t.Errorf("after Init the tenant is %+v: %v", after, err)
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.servers`); n != 1 {
		t.Errorf("%d servers are registered, want one", n)
	}
	create(t, f, tn, "globex")
}

func TestInitsAtOnceMakeOneFleet(t *testing.T) {
	t.Parallel()
	admin := uninitialised(t, tenancytest.NewFleet(t))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := tenancy.Init(t.Context(), admin); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: admin.PrimaryURL, Keys: admin.Keys, Migrations: noteMigrations})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	tenancytest.Create(t, tn, "acme")
	if n := scan[int](t, connectURL(t, admin.PrimaryURL), `SELECT count(*) FROM tenancy.servers`); n != 1 {
		t.Errorf("%d servers are registered, want one", n)
	}
}

func TestInitNeedsNoSuperuser(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	name := fleetName(t, f)
	super := f.Admin(t, "tenants")
	atEnd(t, f, name, `DROP ROLE {}_admin`) // last, when nothing that it made is left
	admin := uninitialised(t, f)
	must(t, super, fmt.Sprintf(`CREATE ROLE %s_admin LOGIN CREATEDB CREATEROLE PASSWORD 'admin'`, name))
	cc := super.Config()
	admin.AdminURL = fmt.Sprintf("postgres://%s_admin:admin@%s:%d/postgres?sslmode=disable", name, cc.Host, cc.Port)
	for range 2 {
		if err := tenancy.Init(t.Context(), admin); err != nil {
			t.Fatal(err)
		}
	}
	tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: admin.PrimaryURL, Keys: admin.Keys, Migrations: noteMigrations})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	tenancytest.Create(t, tn, "acme")
}

func TestInitRefuses(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	super, err := pgx.ParseConfig(f.AdminURL)
	if err != nil {
		t.Fatal("the test server's URL cannot be parsed")
	}
	as := func(url, user, password, database string) string {
		cc, err := pgx.ParseConfig(url)
		if err != nil {
			t.Fatal("the fleet's URL cannot be parsed")
		}
		return fmt.Sprintf("postgres://%s:%s@%s:%d/%s?sslmode=disable", user, password, cc.Host, cc.Port, database)
	}
	name := fleetName(t, f)
	must(t, f.Admin(t, "tenants"), fmt.Sprintf(`CREATE ROLE %s_catalog2 SUPERUSER`, name))
	atEnd(t, f, name, `DROP ROLE {}_catalog2`)
	for rule, c := range map[string]struct {
		change func(*tenancy.AdminConfig)
		class  error  // nil: the server's answer
		says   string // a code of the server where class is nil
	}{
		"admin_url_missing":    {func(a *tenancy.AdminConfig) { a.AdminURL = "" }, tenancy.ErrInvalid, "AdminConfig.AdminURL"},
		"admin_url_is_no_url":  {func(a *tenancy.AdminConfig) { a.AdminURL = "postgres://a:b c@host" }, tenancy.ErrInvalid, "AdminConfig.AdminURL"},
		"admin_url_is_jdbc":    {func(a *tenancy.AdminConfig) { a.AdminURL = "jdbc:postgresql://127.0.0.1/d?user=u&password=p" }, tenancy.ErrInvalid, "AdminConfig.AdminURL"},
		"admin_password_wrong": {func(a *tenancy.AdminConfig) { a.AdminURL = as(f.AdminURL, super.User, "wrong", "postgres") }, nil, "28P01"},
		"admin_without_rights": {func(a *tenancy.AdminConfig) { a.AdminURL = f.PrimaryURL }, nil, "42501"},
		"provisioner_is_superuser": {func(a *tenancy.AdminConfig) {
			*a = uninitialised(t, f)
			a.Server.URL = as(f.ServerURL, name+"_catalog2", "x", name+"b_tenants")
		}, tenancy.ErrInvalid, "is a superuser"},
		"another_provisioner":  {func(a *tenancy.AdminConfig) { a.Server.URL = as(f.ServerURL, name+"_other", "x", name+"_tenants") }, tenancy.ErrInvalid, "only its password can change"},
		"catalog_is_superuser": {func(a *tenancy.AdminConfig) { a.PrimaryURL = as(f.ServerURL, name+"_catalog2", "x", name+"_primary") }, tenancy.ErrInvalid, "is a superuser"},
		"one_database_for_both": {func(a *tenancy.AdminConfig) {
			a.Server.URL = as(f.ServerURL, name+"_provisioner", "x", name+"_primary")
		}, tenancy.ErrInvalid, "databases of their own"},
		"one_login_for_both":        {func(a *tenancy.AdminConfig) { a.Server.URL = as(f.ServerURL, name+"_catalog", "x", name+"_tenants") }, tenancy.ErrInvalid, "must not be one"},
		"keys_missing":              {func(a *tenancy.AdminConfig) { a.Keys = tenancy.Keyring{} }, tenancy.ErrInvalid, "AdminConfig.Keys"},
		"keys_of_another_primary":   {func(a *tenancy.AdminConfig) { a.Keys = otherKeys(t) }, tenancy.ErrWrongKey, "Keys"},
		"primary_without_password":  {func(a *tenancy.AdminConfig) { a.PrimaryURL = "postgres://user@localhost/db" }, tenancy.ErrInvalid, "password"},
		"primary_named_postgres":    {func(a *tenancy.AdminConfig) { a.PrimaryURL = as(f.PrimaryURL, "cat", "x", "postgres") }, tenancy.ErrInvalid, "AdminConfig.PrimaryURL"},
		"server_named_template1":    {func(a *tenancy.AdminConfig) { a.Server.URL = as(f.ServerURL, "prov", "x", "template1") }, tenancy.ErrInvalid, "ServerConfig.URL"},
		"server_database_uppercase": {func(a *tenancy.AdminConfig) { a.Server.URL = as(f.ServerURL, "prov", "x", "Tenants") }, tenancy.ErrInvalid, "ServerConfig.URL"},
		"server_name":               {func(a *tenancy.AdminConfig) { a.Server.Name = "Main Server" }, tenancy.ErrInvalid, "ServerConfig.Name"},
		"provisioner_named_pg":      {func(a *tenancy.AdminConfig) { a.Server.URL = as(f.ServerURL, "pg_prov", "x", "fine") }, tenancy.ErrInvalid, "ServerConfig.URL"},
		"extension_unknown":         {func(a *tenancy.AdminConfig) { a.Extensions = []string{"no such"} }, nil, "0A000"},
	} {
		t.Run(rule, func(t *testing.T) {
			a := f.AdminConfig()
			c.change(&a)
			err := tenancy.Init(t.Context(), a)
			if c.class != nil {
				wantError(t, err, c.class, c.says)
			} else if state := sqlState(err); state != c.says && !(c.says == "0A000" && state == "58P01") { // PostgreSQL 15 says the latter
				t.Errorf("got %v, want %s", err, c.says)
			}
		})
	}
}

func otherKeys(tb testing.TB) tenancy.Keyring {
	tb.Helper()
	text, err := tenancy.NewKey("test")
	if err != nil {
		tb.Fatal(err)
	}
	keys, err := tenancy.ParseKeyring(text)
	if err != nil {
		tb.Fatal(err)
	}
	return keys
}

func TestOpenRefusesAWrongKey(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: otherKeys(t)})
	wantError(t, err, tenancy.ErrWrongKey, "Config.Keys")
}

func TestOpenRefusesANewerPrimary(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	must(t, f.Admin(t, "primary"), `INSERT INTO tenancy.goose_db_version (version_id, is_applied) VALUES (99, true)`)
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys})
	wantError(t, err, tenancy.ErrPrimaryNewer, "version 99")
}

func TestOpenNamesAnUnreachablePrimary(t *testing.T) {
	t.Parallel()
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: "postgres://u:p@127.0.0.1:1/d", Keys: otherKeys(t)})
	wantError(t, err, tenancy.ErrPrimaryUnavailable)
}

// emptyPrimary takes away everything in the primary, as if only its database had been made.
func emptyPrimary(t *testing.T, f *tenancytest.Fleet) {
	t.Helper()
	must(t, f.Admin(t, "primary"), `DROP SCHEMA tenancy CASCADE`)
}

func TestOpenChecksAnEmptyPrimaryOnly(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	emptyPrimary(t, f)
	open := func() error {
		tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, CheckPrimaryOnly: true})
		if err == nil {
			err = tn.Close()
		}
		return err
	}
	err := open()
	wantError(t, err, tenancy.ErrSetup, "no schema tenancy", "CREATE SCHEMA tenancy AUTHORIZATION")
	setup, ok := errors.AsType[*tenancy.SetupError](err)
	if !ok || len(setup.Missing) != 1 {
		t.Fatalf("got %v", err)
	}
	must(t, f.Admin(t, "primary"), setup.Missing[0].Mend)
	wantError(t, open(), tenancy.ErrSetup, "version 0")
	f.Open(t, tenancy.Config{})
	if err := open(); err != nil {
		t.Error(err)
	}
}

func TestOpensAtOnceMakeOnePrimary(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	emptyPrimary(t, f)
	cfg := tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Migrations: noteMigrations, Server: &tenancy.ServerConfig{URL: f.ServerURL}}
	nodes := make([]*tenancy.Tenancy, 6)
	var wg sync.WaitGroup
	for i := range nodes {
		wg.Go(func() {
			var err error
			if nodes[i], err = tenancy.Open(t.Context(), cfg); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, tn := range nodes {
		if tn != nil {
			defer tn.Close()
		}
	}
	if t.Failed() {
		return
	}
	a := create(t, f, nodes[0], "acme")
	for _, tn := range nodes { // one realm: each accepts what another read
		if got, err := tn.Catalog().Tenant(t.Context(), a.ID); err != nil || got != a {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.servers`); n != 1 {
		t.Errorf("%d servers are registered, want one", n)
	}
}

func TestOpenSaysWhatIsMissingAndHowToMendIt(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t, "citext")
	name := fleetName(t, f)
	names := strings.NewReplacer("{P}", name+"_provisioner", "{G}", name+"_tenants_tenants", "{DB}", name+"_tenants", "{PRIMARY}", name+"_primary")
	open := func(t *testing.T) error {
		tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Extensions: true, Logger: slog.New(slog.DiscardHandler)})
		if err == nil {
			err = tn.Close()
		}
		return err
	}
	for rule, c := range map[string]struct {
		database, harm string
		says           string
	}{
		"provisioner_lacks_createrole": {"tenants", `ALTER ROLE {P} NOCREATEROLE`,
			`tenancy: set-up is incomplete: the provisioner "{P}" lacks CREATEROLE; mend it with: ALTER ROLE "{P}" CREATEROLE;`},
		"provisioner_is_superuser":      {"tenants", `ALTER ROLE {P} SUPERUSER`, `the provisioner "{P}" is a superuser`},
		"provisioner_bypasses_policies": {"tenants", `ALTER ROLE {P} BYPASSRLS`, `may bypass row-level security`},
		"primary_open_to_all":           {"primary", `GRANT CONNECT ON DATABASE {PRIMARY} TO PUBLIC`, `every role may connect to the primary "{PRIMARY}"`},
		"primary_schema_open_to_all":    {"primary", `GRANT USAGE ON SCHEMA tenancy TO PUBLIC`, `every role may use schema tenancy`},
		"tenants_open_to_all":           {"tenants", `GRANT CONNECT ON DATABASE {DB} TO PUBLIC`, `every role may connect to the tenants' database "{DB}"`},
		"group_not_grantable":           {"tenants", `REVOKE {G} FROM {P}`, `may not grant the role "{G}"`},
		"group_may_not_connect":         {"tenants", `REVOKE CONNECT ON DATABASE {DB} FROM {G}`, `the role "{G}" of all tenants may not connect`},
		"group_missing":                 {"tenants", `DROP OWNED BY {G} CASCADE; DROP ROLE {G}`, `the role "{G}" of all tenants is missing`},
		"database_of_another_owner":     {"tenants", `ALTER DATABASE {DB} OWNER TO CURRENT_USER`, `does not own the tenants' database "{DB}"`},
		"public_open_for_create":        {"tenants", `GRANT CREATE ON SCHEMA public TO PUBLIC`, `every role may create in schema public`},
		"extensions_missing":            {"tenants", `DROP SCHEMA tenancy_ext CASCADE`, `schema tenancy_ext is missing in "{DB}"`},
		"extensions_not_usable":         {"tenants", `REVOKE USAGE ON SCHEMA tenancy_ext FROM {G}`, `tenants may not use schema tenancy_ext`},
		"extensions_open_for_create":    {"tenants", `GRANT CREATE ON SCHEMA tenancy_ext TO {G}`, `tenants may create in schema tenancy_ext`},
		"references_missing":            {"tenants", `DROP SCHEMA tenancy_ref CASCADE`, `schema tenancy_ref is missing`},
		"references_open_for_create":    {"tenants", `GRANT CREATE ON SCHEMA tenancy_ref TO PUBLIC`, `tenants may create in schema tenancy_ref`},
	} {
		t.Run(rule, func(t *testing.T) {
			super := f.Admin(t, c.database)
			if _, err := super.PgConn().Exec(t.Context(), names.Replace(c.harm)).ReadAll(); err != nil {
				t.Fatal(err)
			}
			err := open(t)
			says := names.Replace(c.says)
			wantError(t, err, tenancy.ErrSetup, says)
			if strings.HasPrefix(says, "tenancy:") && err.Error() != says {
				t.Errorf("the text is %q, want %q", err, says)
			}
			setup, ok := errors.AsType[*tenancy.SetupError](err)
			if !ok {
				t.Fatalf("got %v, want a *SetupError", err)
			}
			for _, m := range setup.Missing {
				if _, err := super.PgConn().Exec(t.Context(), m.Mend).ReadAll(); err != nil {
					t.Fatalf("%s: %v", m.Mend, err)
				}
			}
			if err := open(t); err != nil {
				t.Errorf("after mending: %v", err)
			}
		})
	}
}

func TestAnUnreachableServerDoesNotStopOpen(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	must(t, f.Admin(t, "tenants"), fmt.Sprintf(`ALTER ROLE %s_provisioner PASSWORD 'changed by hand'`, fleetName(t, f)))
	var log strings.Builder
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if !strings.Contains(log.String(), "a server could not be checked") {
		t.Errorf("the log says %q", log.String())
	}
	if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); sqlState(err) != "28P01" {
		t.Errorf("got %v, want the server's 28P01", err)
	}
	if err := tenancy.Init(t.Context(), f.AdminConfig()); err != nil { // sets the password again
		t.Fatal(err)
	}
	tenancytest.Create(t, tn, "acme")
}
