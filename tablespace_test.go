package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// spaceMigrations make what has a tablespace, and what has none but says where its partitions are; so does the second file, which comes later.
func spaceMigrations(files int) fstest.MapFS {
	m := fstest.MapFS{}
	for i := range files {
		m[fmt.Sprintf("%05d_file.sql", i+1)] = &fstest.MapFile{Data: fmt.Appendf(nil, `-- +goose Up
CREATE TABLE notes_%[1]d (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text);
SELECT tenancy_must('notes_%[1]d');
CREATE INDEX ON notes_%[1]d (title);
CREATE TABLE log_%[1]d (at timestamptz) PARTITION BY RANGE (at);
CREATE TABLE log_%[1]d_all PARTITION OF log_%[1]d DEFAULT;
SELECT tenancy_must('log_%[1]d');
`, i+1)}
	}
	return m
}

// spacedFleet is a fleet on a server with a tablespace beside it, whose directory the server makes. The tablespace goes after what is in it.
func spacedFleet(t *testing.T, newFleet func() *tenancytest.Fleet) (f *tenancytest.Fleet, space string) {
	t.Helper()
	made := false
	t.Cleanup(func() {
		if !made {
			return
		}
		if _, err := superuser(t, f.AdminURL, "postgres").Exec(context.Background(), "DROP TABLESPACE "+pgx.Identifier{space}.Sanitize()); err != nil {
			t.Error(err)
		}
	})
	f = newFleet()
	space = fleetName(t, f) + `_Fast "1"`
	admin := f.Admin(t, "tenants")
	if _, err := admin.Exec(t.Context(), "SET allow_in_place_tablespaces = on"); err != nil {
		t.Skip("the server makes no tablespace without a directory of somebody's: ", err)
	}
	must(t, admin, "CREATE TABLESPACE "+pgx.Identifier{space}.Sanitize()+" LOCATION ''")
	made = true
	for _, name := range []string{space, "pg_default"} { // or the roles could not be dropped
		atEnd(t, f, fleetName(t, f), "REVOKE ALL ON TABLESPACE "+pgx.Identifier{name}.Sanitize()+" FROM {}_tenants_tenants, {}_provisioner")
	}
	return f, space
}

// spacesOf lists where a schema's tables and indexes are; "" is the database's own tablespace, in which PostgreSQL keeps every sequence.
func spacesOf(t *testing.T, conn *pgx.Conn, schema string) []string {
	t.Helper()
	return scan[[]string](t, conn, `SELECT coalesce(array_agg(DISTINCT coalesce(t.spcname, '')), '{none}') FROM pg_class c LEFT JOIN pg_tablespace t ON t.oid = c.reltablespace
		WHERE relnamespace = to_regnamespace($1) AND relkind IN ('r', 'i', 'p', 'I', 'm')`, schema)
}

func setTablespace(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy, space string) error {
	t.Helper()
	s := f.AdminConfig().Server
	s.Tablespace = space
	return tn.Catalog().AddServer(t.Context(), s)
}

func TestTenantsAreKeptInTheTablespaceThatTheyWereMadeIn(t *testing.T) {
	t.Parallel()
	f, space := spacedFleet(t, func() *tenancytest.Fleet { return tenancytest.NewFleet(t) })
	f.AllowDatabases(t)
	tn := f.Open(t, tenancy.Config{Migrations: spaceMigrations(1), Isolation: tenancy.IsolationSchema})
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "tenants")
	spaces := map[string]string{} // where each schema of the server's own database has to be
	created := func(name string, n tenancy.NewTenant, want string) tenancy.Tenant {
		t.Helper()
		n.Name = name
		tenant, err := c.Create(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		if n.Isolation != tenancy.IsolationDatabase {
			spaces[placeOf(t, f, tenant.ID).Schema] = want
		}
		return tenant
	}
	before := created("before", tenancy.NewTenant{}, "")

	// A right that is missing is told with the statement that gives it; Init gives it itself.
	mend := func(err error, says string) {
		t.Helper()
		wantError(t, err, tenancy.ErrSetup, says)
		setup, ok := errors.AsType[*tenancy.SetupError](err)
		if !ok || len(setup.Missing) != 1 {
			t.Fatalf("got %v, want one finding", err)
		}
		must(t, admin, setup.Missing[0].Mend)
	}
	wantError(t, setTablespace(t, f, tn, "nowhere"), tenancy.ErrSetup, `the tablespace "nowhere" is missing; mend it with: CREATE TABLESPACE "nowhere"`)
	mend(setTablespace(t, f, tn, space), "GRANT CREATE ON TABLESPACE "+pgx.Identifier{space}.Sanitize()+" TO")
	if got := scan[string](t, f.Admin(t, "primary"), `SELECT tablespace FROM tenancy.servers`); got != "" {
		t.Fatalf("a refused AddServer has written %q", got)
	}
	must(t, admin, "REVOKE ALL ON TABLESPACE "+pgx.Identifier{space}.Sanitize()+" FROM "+fleetName(t, f)+"_tenants_tenants")
	again := f.AdminConfig()
	again.TenantDatabases, again.Server.Tablespace = true, space
	if err := tenancy.Init(ctx, again); err != nil {
		t.Fatal(err)
	}

	revoke := "REVOKE ALL ON TABLESPACE " + pgx.Identifier{space}.Sanitize() + " FROM " + fleetName(t, f) + "_tenants_tenants"
	must(t, admin, revoke)
	found, err := tn.Doctor(ctx)
	if err != nil || !slices.ContainsFunc(found, func(f tenancy.Finding) bool { return strings.HasPrefix(f.Mend, "GRANT CREATE ON TABLESPACE ") }) {
		t.Errorf("the doctor has not found that a right is missing: %v, %v", found, err)
	}
	for name, isolation := range map[string]tenancy.Isolation{"schema": tenancy.IsolationSchema, "shared": tenancy.IsolationShared} {
		must(t, admin, revoke)
		mend(second(c.Create(ctx, tenancy.NewTenant{Name: name, Isolation: isolation})), "GRANT CREATE ON TABLESPACE ")
	}

	schema := created("schema", tenancy.NewTenant{Isolation: tenancy.IsolationSchema}, space)
	prepared, err := c.Prepare(ctx, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	shared := created("shared", tenancy.NewTenant{Isolation: tenancy.IsolationShared}, space)
	own := created("own", tenancy.NewTenant{Isolation: tenancy.IsolationDatabase}, space)
	database := placeOf(t, f, own.ID).Schema
	inOwn := superuser(t, f.AdminURL, database)
	if got := scan[string](t, inOwn, `SELECT spcname FROM pg_database d JOIN pg_tablespace t ON t.oid = dattablespace WHERE datname = current_database()`); got != space {
		t.Errorf("the database is in %q", got)
	}

	// The server's setting is another one: each stays, with what it gets later. The database's own tablespace can have a name.
	mend(setTablespace(t, f, tn, "pg_default"), `GRANT CREATE ON TABLESPACE "pg_default" TO`)
	if err := setTablespace(t, f, tn, "pg_default"); err != nil {
		t.Fatal(err)
	}
	created("named", tenancy.NewTenant{}, "")
	if err := setTablespace(t, f, tn, ""); err != nil {
		t.Fatal(err)
	}
	created("moved", tenancy.NewTenant{DataSource: &prepared}, space)
	also := created("also", tenancy.NewTenant{Isolation: tenancy.IsolationShared}, space)
	purge(t, tn, shared) // so that it is the other who has their schema migrated
	after := created("after", tenancy.NewTenant{}, "")
	look := func(when string) {
		t.Helper()
		for schema, want := range spaces {
			if got := spacesOf(t, admin, schema); !slices.Equal(got, []string{want}) {
				t.Errorf("%s: %s is in %q, want %q", when, schema, got, want)
			}
		}
		if got := spacesOf(t, inOwn, database); !slices.Equal(got, []string{""}) {
			t.Errorf("%s: in the tenant's own database tables are in %q", when, got)
		}
	}
	look("made")
	next := f.Open(t, tenancy.Config{Migrations: spaceMigrations(2), Isolation: tenancy.IsolationSchema})
	if _, err := next.Migrator().All(ctx); err != nil {
		t.Fatal(err)
	}
	look("migrated")
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_class WHERE relname = 'notes_2'`); n != len(spaces) {
		t.Errorf("%d schemas are migrated, want %d", n, len(spaces))
	}

	// A purge leaves nothing in the tablespace, of nobody.
	_ = inOwn.Close(ctx)
	for _, tenant := range []tenancy.Tenant{schema, own, before} {
		purge(t, tn, tenant)
	}
	for _, tenant := range []tenancy.Tenant{also, after} {
		if err := second(next.DB().Exec(enter(t, next, tenant.ID), `SELECT FROM notes_2`)); err != nil {
			t.Errorf("%s: %v", tenant.Name, err)
		}
	}
	for _, gone := range []string{placeOf(t, f, schema.ID).Schema, database} {
		if n := scan[int](t, admin, `SELECT (SELECT count(*) FROM pg_namespace WHERE nspname = $1) + (SELECT count(*) FROM pg_database WHERE datname = $1) + (SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1))`, gone); n != 0 {
			t.Errorf("the purge has left %d of %s", n, gone)
		}
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_tablespace t, aclexplode(spcacl) JOIN pg_roles r ON r.oid = grantee WHERE spcname = $1 AND rolname LIKE 't\_%'`, space); n != 0 {
		t.Errorf("the tablespace's rights name %d roles of tenants", n)
	}
}

func purge(t *testing.T, tn *tenancy.Tenancy, tenant tenancy.Tenant) {
	t.Helper()
	if err := tn.Catalog().Delete(t.Context(), tenant.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := tn.Catalog().PurgeNow(t.Context(), tenant.ID, tenant.Name); err != nil {
		t.Fatal(err)
	}
}

func TestAnAdoptedSchemaStaysInItsTablespace(t *testing.T) {
	t.Parallel()
	var s *oldService
	f, space := spacedFleet(t, func() *tenancytest.Fleet { s = newOldService(t, 2); return s.Fleet })
	a := f.AdminConfig()
	a.Server.Tablespace = space
	if err := tenancy.Init(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	tn := s.open(t, later)
	acme, err := tn.Catalog().Adopt(t.Context(), s.adoption("acme"))
	if err != nil {
		t.Fatal(err)
	}
	globex := tenancytest.Create(t, tn, "globex")
	for id, want := range map[tenancy.ID]string{acme.ID: "", globex.ID: space} {
		if got := spacesOf(t, s.admin, placeOf(t, f, id).Schema); !slices.Equal(got, []string{want}) {
			t.Errorf("tenant %d is in %q, want %q", id, got, want)
		}
	}
}

func TestTheStockIsKeptInTheTablespace(t *testing.T) {
	t.Parallel()
	f, space := spacedFleet(t, func() *tenancytest.Fleet { return tenancytest.NewFleet(t) })
	a := f.AdminConfig()
	a.Server.Tablespace = space
	if err := tenancy.Init(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	stocked(t, f, tenancy.Config{Stock: 1})
	if got := spacesOf(t, f.Admin(t, "tenants"), inStock(t, f.Admin(t, "primary"))[0]); !slices.Equal(got, []string{space}) {
		t.Errorf("the stock is in %q", got)
	}
}

func TestATablespaceIsChecked(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"pg_global", "pg_toast", "a\x00", "a\nb", "\xff", strings.Repeat("a", 64)} {
		err := tenancy.Init(context.Background(), tenancy.AdminConfig{Server: tenancy.ServerConfig{URL: "postgres://u:p@127.0.0.1:1/d", Tablespace: name}})
		wantError(t, err, tenancy.ErrInvalid, "ServerConfig.Tablespace")
	}
}
