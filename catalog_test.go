package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
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

func TestCreateNeedsNothingButAName(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	if made.State != tenancy.StateActive || made.Name != "acme" || made.ID == 0 || made.UID == (tenancy.UID{}) || made.Isolation != tenancy.IsolationSchema {
		t.Errorf("made %+v", made)
	}
	for _, read := range []func() (tenancy.Tenant, error){
		func() (tenancy.Tenant, error) { return tn.Catalog().Tenant(t.Context(), made.ID) },
		func() (tenancy.Tenant, error) { return tn.Catalog().TenantByName(t.Context(), "acme") },
	} {
		if got, err := read(); err != nil || got != made {
			t.Errorf("read %+v, %v; made %+v", got, err, made)
		}
	}
	p, admin := placeOf(t, f, made.ID), f.Admin(t, "tenants")
	if strings.Contains(p.Schema+p.Owner+p.Runtime+p.Login, "acme") {
		t.Errorf("a name in the server's catalogs says who the customer is: %+v", p)
	}
	if got := scan[string](t, admin, `SELECT string_agg(tenant::text, ',') FROM `+p.table("tenancy_marker")); got != made.UID.String() {
		t.Errorf("the marker names %s, want %s", got, made.UID)
	}
	var n string
	for what, ok := range map[string]string{
		"the owner holds the schema and cannot log in":          `SELECT count(*) = 1 FROM pg_namespace JOIN pg_roles r ON r.oid = nspowner WHERE nspname = $1 AND r.rolname = $2 AND NOT rolcanlogin AND $3 || $4 <> ''`,
		"the owner has no password any more":                    `SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = $2 AND $1 || $3 || $4 <> ''`,
		"the runtime group cannot log in":                       `SELECT NOT rolcanlogin FROM pg_roles WHERE rolname = $3 AND $1 || $2 || $4 <> ''`,
		"the login holds a SCRAM verifier":                      `SELECT rolcanlogin AND rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname = $4 AND $1 || $2 || $3 <> ''`,
		"the login is in the runtime group":                     `SELECT pg_has_role($4, $3, 'MEMBER') AND NOT pg_has_role($4, $2, 'MEMBER') AND $1 <> ''`,
		"the login works with rows":                             `SELECT has_table_privilege($4, quote_ident($1) || '.notes', 'SELECT') AND has_table_privilege($4, quote_ident($1) || '.notes', 'INSERT') AND has_sequence_privilege($4, quote_ident($1) || '.notes_id_seq', 'USAGE') AND $2 || $3 <> ''`,
		"the marker and the version table are only read":        `SELECT NOT has_table_privilege($4, quote_ident($1) || '.tenancy_marker', 'INSERT, UPDATE, DELETE, TRUNCATE') AND NOT has_table_privilege($4, quote_ident($1) || '.goose_db_version', 'INSERT, UPDATE, DELETE, TRUNCATE') AND $2 || $3 <> ''`,
		"no role has rights of the server's":                    `SELECT NOT bool_or(rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls OR rolreplication) FROM pg_roles WHERE rolname IN ($2, $3, $4) AND $1 <> ''`,
		"the schema is open to the owner and the group alone":   `SELECT count(DISTINCT grantee) = 2 FROM pg_namespace, aclexplode(nspacl) WHERE nspname = $1 AND $2 || $3 || $4 <> ''`,
		"nothing of the tenant may connect to another database": `SELECT NOT has_database_privilege($4, replace(current_database(), '_tenants', '_primary'), 'CONNECT') AND $1 || $2 || $3 <> ''`,
	} {
		if !scan[bool](t, admin, ok, p.Schema, p.Owner, p.Runtime, p.Login) {
			t.Errorf("it is not so that %s%s", what, n)
		}
	}
	if members, err := tn.Catalog().TenantsOf(t.Context(), "admin"); err != nil || len(members) != 0 {
		t.Errorf("a membership nobody asked for: %v, %v", members, err)
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.memberships`); n != 0 {
		t.Errorf("%d memberships nobody asked for", n)
	}
}

func TestCreateMakesTheFirstAdministrator(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", DisplayName: " Acme & Söhne ", Admin: "alice@acme.test",
		Domains: []string{"Acme.Example."}, MaxUsers: 1, Attributes: map[string]any{"plan": "gold"}})
	if err != nil {
		t.Fatal(err)
	}
	if made.DisplayName != "Acme & Söhne" {
		t.Errorf("display name %q", made.DisplayName)
	}
	got, err := tn.Catalog().TenantsOf(t.Context(), "alice@acme.test")
	want := []tenancy.Membership{{User: "alice@acme.test", Tenant: made.ID, Role: tenancy.RoleAdmin, Default: true}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("memberships %+v, %v; want %+v", got, err, want)
	}
	admin := f.Admin(t, "primary")
	if got := scan[string](t, admin, `SELECT string_agg(domain, ',') FROM tenancy.domains WHERE tenant = $1`, made.ID); got != "acme.example" {
		t.Errorf("domains %q", got)
	}
	if got := scan[string](t, admin, `SELECT attributes->>'plan' FROM tenancy.tenants WHERE id = $1`, made.ID); got != "gold" {
		t.Errorf("attributes: plan %q", got)
	}
	if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "bob", Tenant: made.ID}); !errors.Is(err, tenancy.ErrUserLimit) {
		t.Errorf("the administrator does not count: %v", err)
	}
	// Domains belong to one tenant, also while it is being made.
	_, err = tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex", Domains: []string{"acme.example"}})
	wantError(t, err, tenancy.ErrTenantExists, "acme.example")
	if _, err := tn.Catalog().TenantByName(t.Context(), "globex"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("a refused Create left its intent: %v", err)
	}
}

func TestCreateRefusesATakenName(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	create(t, f, tn, "acme")
	for _, n := range []tenancy.NewTenant{{Name: "acme"}, {Name: "acme", DisplayName: "Another"}} {
		_, err := tn.Catalog().Create(t.Context(), n)
		wantError(t, err, tenancy.ErrTenantExists, `"acme"`)
	}
	assertNoOrphans(t, f, 1)
}

func TestADifferentRequestDoesNotJoinAnUnfinishedCreate(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_bad.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}})
	if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", Admin: "alice"}); sqlState(err) != "22012" {
		t.Fatal(err)
	}
	good := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	for _, n := range []tenancy.NewTenant{{Name: "acme"}, {Name: "acme", Admin: "mallory"}, {Name: "acme", Admin: "alice", MaxUsers: 5}} {
		_, err := good.Catalog().Create(t.Context(), n)
		wantError(t, err, tenancy.ErrTenantExists)
	}
	if members, err := good.Catalog().TenantsOf(t.Context(), "mallory"); err != nil || len(members) != 0 {
		t.Errorf("another request took over the tenant: %v, %v", members, err)
	}
	if got, err := good.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", Admin: "alice"}); err != nil || got.State != tenancy.StateActive {
		t.Errorf("the same request: %+v, %v", got, err)
	}
}

func TestTheSameCreateOnTwoNodesMakesOneTenant(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	nodes := []*tenancy.Tenancy{f.Open(t, tenancy.Config{Migrations: noteMigrations}), f.Open(t, tenancy.Config{Migrations: noteMigrations})}
	for _, name := range []string{"acme", "globex", "initech"} {
		got := make([]tenancy.Tenant, 2*len(nodes))
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				var err error
				if got[i], err = nodes[i%len(nodes)].Catalog().Create(t.Context(), tenancy.NewTenant{Name: name}); err != nil && !errors.Is(err, tenancy.ErrTenantExists) {
					t.Error(err) // who comes after it became active hears that it exists
				}
			})
		}
		wg.Wait()
		made, err := nodes[0].Catalog().TenantByName(t.Context(), name)
		if err != nil || made.State != tenancy.StateActive {
			t.Fatalf("%+v, %v", made, err)
		}
		for _, g := range got {
			if g != (tenancy.Tenant{}) && g.ID != made.ID {
				t.Errorf("two tenants of one name: %+v and %+v", g, made)
			}
		}
	}
	assertNoOrphans(t, f, 3)
}

// assertNoOrphans checks that the tenants' database has the schemas and roles of the primary's places, and no other,
// and that tenants of them are not purged.
func assertNoOrphans(t *testing.T, f *tenancytest.Fleet, tenants int) {
	t.Helper()
	listed := scan[[]string](t, f.Admin(t, "primary"), `SELECT coalesce(array_agg(schema ORDER BY schema), '{}') FROM tenancy.data_sources WHERE state <> 'dropped'`)
	admin := f.Admin(t, "tenants")
	for what, sql := range map[string]string{
		"schema": `SELECT coalesce(array_agg(nspname::text), '{}') FROM pg_namespace WHERE nspname LIKE 't\_%'`,
		"role": `SELECT coalesce(array_agg(DISTINCT regexp_replace(rolname, '_[^_]*$', '')), '{}') FROM pg_roles WHERE oid IN
			(SELECT roleid FROM pg_auth_members WHERE member = (SELECT datdba FROM pg_database WHERE datname = current_database())
			UNION SELECT member FROM pg_auth_members JOIN pg_roles g ON g.oid = roleid WHERE g.rolname = current_database() || '_tenants') AND rolname LIKE 't\_%'`,
	} {
		for _, found := range scan[[]string](t, admin, sql) {
			if !slices.Contains(listed, found) {
				t.Errorf("%s %s is in the tenants' database and not in the primary", what, found)
			}
		}
	}
	if len(listed) != tenants {
		t.Errorf("%d places are listed, want %d", len(listed), tenants)
	}
	if open := scan[int](t, admin, `SELECT count(*) FROM pg_authid WHERE rolname ~ '^t_[0-9a-f]{20}_o$' AND rolcanlogin AND pg_has_role((SELECT datdba FROM pg_database WHERE datname = current_database()), oid, 'MEMBER')`); open != 0 {
		t.Errorf("%d owners can still log in", open)
	}
}

// TestCreateResumesWhereverItDied cancels at random moments, which is how a node dies that is told to, and then
// cuts the server's sessions, which is how one dies that is not.
func TestCreateResumesWhereverItDied(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	start := time.Now()
	create(t, f, tn, "measure")
	whole := time.Since(start)
	rng := rand.New(rand.NewPCG(1, 2))
	died, tried, super := 0, 0, f.Admin(t, "tenants")
	for ; died < 24 && tried < 100; tried++ {
		i := tried
		n := tenancy.NewTenant{Name: fmt.Sprintf("tenant-%d", i), Admin: "alice"}
		after := time.Duration(rng.Int64N(int64(whole)))
		ctx, cancel := context.WithTimeout(t.Context(), after)
		if i%3 == 2 { // without a word
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(after, func() {
				conn, err := pgx.Connect(context.Background(), f.AdminURL)
				if err != nil {
					return
				}
				defer conn.Close(context.Background())
				_, _ = conn.Exec(context.Background(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND application_name LIKE 'tenancy%' AND usename <> current_user`, super.Config().Database)
			})
		}
		_, err := tn.Catalog().Create(ctx, n)
		cancel()
		if err == nil {
			whole = whole * 9 / 10 // it was over before: aim earlier
		} else {
			died++
			_, err := tn.Catalog().Create(t.Context(), n)
			if errors.Is(err, tenancy.ErrTenantExists) && mustTenant(t, tn, n.Name).State == tenancy.StateActive {
				err = nil // it died between its last commit and the answer
			}
			if err != nil {
				t.Fatalf("%s died after %v and does not resume: %v", n.Name, after, err)
			}
		}
		ctx, err = tn.Enter(t.Context(), mustTenant(t, tn, n.Name).ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tn.DB().Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, $1)`, n.Name); err != nil {
			t.Fatalf("%s does not work: %v", n.Name, err)
		}
	}
	if died < 20 {
		t.Errorf("only %d of %d died on the way: the moments are chosen badly", died, tried)
	}
	assertNoOrphans(t, f, tried+1)
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.tenants WHERE state <> 'active'`); n != 0 {
		t.Errorf("%d tenants are stuck", n)
	}
}

func mustTenant(tb testing.TB, tn *tenancy.Tenancy, name string) tenancy.Tenant {
	tb.Helper()
	t, err := tn.Catalog().TenantByName(tb.Context(), name)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func TestCreateWithoutMigrationsSaysWhatToDo(t *testing.T) {
	t.Parallel()
	tn := tenancytest.Open(t, tenancy.Config{})
	_, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	wantError(t, err, tenancy.ErrNoMigrations)
	const want = `tenancy: create: tenant "acme": no migrations are configured: set Config.Migrations to the service's goose files, for example: //go:embed migrations/*.sql and var migrations embed.FS`
	if err.Error() != want {
		t.Errorf("the text is %q, want %q", err, want)
	}
	if _, err := tn.Catalog().TenantByName(t.Context(), "acme"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("an intent was written: %v", err)
	}
}

func TestAFailedMigrationIsNamedAndResumed(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	files := func(second string) fstest.MapFS {
		return fstest.MapFS{
			"00001_notes.sql": {Data: []byte("-- +goose Up\nCREATE TABLE notes (id int);\n")},
			"00002_more.sql":  {Data: []byte("-- +goose Up\nCREATE TABLE more (id int);\n" + second)},
		}
	}
	broken := f.Open(t, tenancy.Config{Migrations: files("SELECT * FROM nowhere;\n")})
	_, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	if sqlState(err) != "42P01" || !strings.Contains(err.Error(), "migration 2") || !strings.Contains(err.Error(), `"acme"`) {
		t.Errorf("got %v, want 42P01 with the version and the tenant", err)
	}
	made := mustTenant(t, broken, "acme")
	if made.State != tenancy.StateProvisioning {
		t.Errorf("state %s", made.State)
	}
	for op, err := range map[string]error{
		"enter":   second(broken.Enter(t.Context(), made.ID)),
		"suspend": broken.Catalog().Suspend(t.Context(), made.ID, tenancy.Suspension{}),
		"resume":  broken.Catalog().Resume(t.Context(), made.ID),
	} {
		if !errors.Is(err, tenancy.ErrTenantNotReady) {
			t.Errorf("%s: %v, want ErrTenantNotReady", op, err)
		}
	}
	mended := f.Open(t, tenancy.Config{Migrations: files("")})
	if got, err := mended.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); err != nil || got.State != tenancy.StateActive || got.ID != made.ID {
		t.Errorf("%+v, %v", got, err)
	}
	assertNoOrphans(t, f, 1)
}

func second[T any](_ T, err error) error { return err }

func TestAnUnfinishedTenantCanBeDeletedAndPurged(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_bad.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}})
	if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); err == nil {
		t.Fatal("a broken migration passed")
	}
	id := mustTenant(t, broken, "acme").ID
	if err := broken.Catalog().Delete(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := broken.Catalog().Restore(t.Context(), id); !errors.Is(err, tenancy.ErrTenantNotReady) {
		t.Errorf("restore: %v, want ErrTenantNotReady", err)
	}
	mended := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	if got, err := mended.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); err != nil || got.ID != id {
		t.Errorf("the same request after Restore: %+v, %v", got, err)
	}
	must(t, login(t, mended, id), `INSERT INTO notes (tenant, title) VALUES ('acme', 'acme')`)
	if _, err := broken.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex"}); err == nil {
		t.Fatal("a broken migration passed")
	}
	for _, name := range []string{"acme", "globex"} {
		id := mustTenant(t, broken, name).ID
		if err := broken.Catalog().Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if _, err := broken.Catalog().PurgeNow(t.Context(), id, name); err != nil {
			t.Fatal(err)
		}
	}
	assertNoOrphans(t, f, 0)
}

func TestMaxUsersHoldsForTenAtOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	nodes := []*tenancy.Tenancy{f.Open(t, tenancy.Config{Migrations: noteMigrations}), f.Open(t, tenancy.Config{})}
	made, err := nodes[0].Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", MaxUsers: 3, Admin: "alice"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	added, refused := 0, 0
	for i := range 10 {
		wg.Go(func() {
			err := nodes[i%2].Catalog().AddMember(t.Context(), tenancy.Membership{User: tenancy.UserKey(fmt.Sprint("user-", i)), Tenant: made.ID})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				added++
			case errors.Is(err, tenancy.ErrUserLimit):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if added != 2 || refused != 8 {
		t.Errorf("%d added and %d refused beside the administrator, want 2 and 8", added, refused)
	}
	// One who is in may be changed, and one who leaves makes room.
	c := nodes[0].Catalog()
	if err := c.AddMember(t.Context(), tenancy.Membership{User: "alice", Tenant: made.ID, Role: tenancy.RoleMember}); err != nil {
		t.Error(err)
	}
	if err := c.RemoveMember(t.Context(), made.ID, "alice"); err != nil {
		t.Error(err)
	}
	if err := c.AddMember(t.Context(), tenancy.Membership{User: "bob", Tenant: made.ID}); err != nil {
		t.Error(err)
	}
}

func TestMembersAndDefaults(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	a, b := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	c, ctx := tn.Catalog(), t.Context()
	for _, m := range []tenancy.Membership{{User: "carol", Tenant: a.ID}, {User: "carol", Tenant: b.ID, Source: "ldap"}, {User: "Carol", Tenant: b.ID}} {
		if err := c.AddMember(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	defaultOf := func() (id tenancy.ID) {
		list, err := c.TenantsOf(ctx, "carol")
		if err != nil || len(list) != 2 {
			t.Fatalf("%+v, %v", list, err)
		}
		for _, m := range list {
			if m.Default {
				if id != 0 {
					t.Error("two defaults")
				}
				id = m.Tenant
			}
		}
		return id
	}
	if id := defaultOf(); id != a.ID {
		t.Errorf("the first membership is not the default: %d", id)
	}
	if err := c.SetDefault(ctx, "carol", b.ID); err != nil || defaultOf() != b.ID {
		t.Errorf("default %d, %v", defaultOf(), err)
	}
	if err := c.SetDefault(ctx, "Carol", a.ID); !errors.Is(err, tenancy.ErrForbidden) {
		t.Errorf("a default outside of the user's tenants: %v", err)
	}
	var users []tenancy.UserKey
	for m, err := range c.Members(ctx, b.ID) {
		if err != nil {
			t.Fatal(err)
		}
		users = append(users, m.User)
	}
	if len(users) != 2 {
		t.Errorf("members of globex: %q", users)
	}
	if err := c.RemoveMember(ctx, b.ID, "nobody"); err != nil {
		t.Errorf("removing one who is not in: %v", err)
	}
	if err := c.AddMember(ctx, tenancy.Membership{User: "carol", Tenant: 999}); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("a member of no tenant: %v", err)
	}
}

func TestNamesAndDomainsAreReservedUntilThePurge(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	a, b := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	if err := c.AddDomain(ctx, a.ID, "Notes.Acme.Test"); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.AddDomain(ctx, b.ID, "notes.acme.test."), tenancy.ErrTenantExists, "notes.acme.test")
	if err := c.AddDomain(ctx, a.ID, "notes.acme.test"); err != nil {
		t.Errorf("the same domain again: %v", err)
	}
	wantError(t, c.Rename(ctx, b.ID, "acme"), tenancy.ErrTenantExists)
	wantError(t, c.Rename(ctx, b.ID, "Globex"), tenancy.ErrInvalid, "name")
	wantError(t, c.Rename(ctx, 999, "fine"), tenancy.ErrTenantNotFound)
	if err := c.Rename(ctx, b.ID, "globex-2"); err != nil || mustTenant(t, tn, "globex-2").ID != b.ID {
		t.Errorf("rename: %v", err)
	}
	if _, err := c.TenantByName(ctx, "globex"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("the old name: %v", err)
	}

	taken := func(when string) {
		t.Helper()
		_, err := c.Create(ctx, tenancy.NewTenant{Name: "acme"})
		if !errors.Is(err, tenancy.ErrTenantExists) {
			t.Errorf("%s: create: %v", when, err)
		}
		if err := c.Rename(ctx, b.ID, "acme"); !errors.Is(err, tenancy.ErrTenantExists) {
			t.Errorf("%s: rename: %v", when, err)
		}
	}
	if err := c.Delete(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	taken("deleted")
	wantError(t, c.AddDomain(ctx, b.ID, "notes.acme.test"), tenancy.ErrTenantExists)
	wantError(t, c.AddMember(ctx, tenancy.Membership{User: "late", Tenant: a.ID}), tenancy.ErrTenantGone)
	if _, err := c.PurgeNow(ctx, a.ID, "acme"); err != nil {
		t.Fatal(err)
	}
	if anew, err := c.Create(ctx, tenancy.NewTenant{Name: "acme"}); err != nil || anew.ID == a.ID || anew.UID == a.UID {
		t.Errorf("a purged tenant's name is free: %+v, %v", anew, err)
	}
	if err := c.AddDomain(ctx, b.ID, "notes.acme.test"); err != nil {
		t.Errorf("a purged tenant's domain is free: %v", err)
	}
	if err := c.RemoveDomain(ctx, "notes.acme.test"); err != nil {
		t.Error(err)
	}
	if err := c.RemoveDomain(ctx, "notes.acme.test"); err != nil {
		t.Errorf("removing it again: %v", err)
	}
	wantError(t, c.Rename(ctx, a.ID, "anew"), tenancy.ErrTenantGone)
}

func TestSuspendEndsWhatRunsAtTheServer(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	a, b := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	sleeper, bystander := login(t, tn, a.ID), login(t, tn, b.ID)
	ended := make(chan error, 1)
	go func() {
		_, err := sleeper.Exec(context.WithoutCancel(t.Context()), `SELECT pg_sleep(60)`)
		ended <- err
	}()
	admin := f.Admin(t, "tenants")
	until(t, 5*time.Second, "1", func() string {
		return scan[string](t, admin, `SELECT count(*)::text FROM pg_stat_activity WHERE usename = $1 AND query LIKE '%pg_sleep%'`, placeOf(t, f, a.ID).Login)
	})
	if err := tn.Catalog().Suspend(t.Context(), a.ID, tenancy.Suspension{Message: "unpaid", Drain: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, placeOf(t, f, a.ID).Login); n != 0 {
		t.Errorf("%d sessions are left when Suspend has returned", n)
	}
	if err := <-ended; sqlState(err) != "57P01" {
		t.Errorf("the running statement ended with %v", err)
	}
	if _, err := tryLogin(t, tn, a.ID); sqlState(err) != "28000" {
		t.Errorf("a new login: %v, want 28000", err)
	}
	if _, err := tn.Enter(t.Context(), a.ID); !errors.Is(err, tenancy.ErrTenantSuspended) {
		t.Errorf("enter: %v", err)
	}
	must(t, bystander, `SELECT 1`)
	if err := tn.Catalog().Suspend(t.Context(), a.ID, tenancy.Suspension{Maintenance: true, Message: "back soon"}); err != nil {
		t.Errorf("from suspended to maintenance: %v", err)
	}
	if _, err := tn.Enter(t.Context(), a.ID); !errors.Is(err, tenancy.ErrTenantMaintenance) {
		t.Errorf("enter: %v", err)
	}
	for range 2 { // twice is as once
		if err := tn.Catalog().Resume(t.Context(), a.ID); err != nil {
			t.Fatal(err)
		}
	}
	must(t, login(t, tn, a.ID), `INSERT INTO notes (tenant, title) VALUES ('acme', 'again')`)
	wantError(t, tn.Catalog().Suspend(t.Context(), a.ID, tenancy.Suspension{Message: strings.Repeat("x", 501)}), tenancy.ErrInvalid, "message")
	wantError(t, tn.Catalog().Suspend(t.Context(), 999, tenancy.Suspension{}), tenancy.ErrTenantNotFound)
	wantError(t, tn.Catalog().Resume(t.Context(), 999), tenancy.ErrTenantNotFound)
}

func TestDeleteIsAQuarantineAndPurgeLeavesNothing(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	a, err := c.Create(ctx, tenancy.NewTenant{Name: "acme", DisplayName: "Acme", Admin: "alice@acme.test", Domains: []string{"acme.test"}})
	if err != nil {
		t.Fatal(err)
	}
	b := create(t, f, tn, "globex")
	conn := login(t, tn, a.ID)
	must(t, conn, `INSERT INTO notes (tenant, title) VALUES ('acme', 'kept')`)
	must(t, conn, `SELECT lo_from_bytea(0, 'large')`)
	must(t, conn, `ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC`)
	admin, p := f.Admin(t, "tenants"), placeOf(t, f, a.ID)

	if _, err := c.PurgeNow(ctx, a.ID, "acme"); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("purging a living tenant: %v", err)
	}
	for range 2 {
		if err := c.Delete(ctx, a.ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tn.Enter(ctx, a.ID); !errors.Is(err, tenancy.ErrTenantGone) {
		t.Errorf("enter a deleted tenant: %v", err)
	}
	for op, err := range map[string]error{"resume": c.Resume(ctx, a.ID), "suspend": c.Suspend(ctx, a.ID, tenancy.Suspension{}), "migrate": second(tn.Migrator().Tenant(ctx, a.ID))} {
		if !errors.Is(err, tenancy.ErrTenantGone) {
			t.Errorf("%s of a deleted tenant: %v", op, err)
		}
	}
	if err := c.Restore(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	if got := scan[string](t, login(t, tn, a.ID), `SELECT title FROM notes`); got != "kept" {
		t.Errorf("after Restore the row is %q", got)
	}
	if err := c.Delete(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "globex", "ACME", "acme "} {
		if _, err := c.PurgeNow(ctx, a.ID, name); !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "name") {
			t.Errorf("purge by the name %q: %v", name, err)
		}
	}
	receipt, err := c.PurgeNow(ctx, a.ID, "acme")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(receipt.Roles)
	roles := []string{p.Login, p.Owner, p.Runtime}
	slices.Sort(roles)
	if receipt.Tenant != a.ID || receipt.UID != a.UID || receipt.Name != "acme" || receipt.Tables < 3 || !slices.Equal(receipt.Roles, roles) || receipt.Members != 1 {
		t.Errorf("receipt %+v", receipt)
	}
	for what, sql := range map[string]string{
		"schemas":            `SELECT count(*) FROM pg_namespace WHERE nspname = $1 || substr($2, 1, 0)`,
		"roles":              `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1) AND $2 <> ''`,
		"large objects":      `SELECT count(*) FROM pg_largeobject_metadata WHERE $1 || $2 <> ''`,
		"memberships":        `SELECT count(*) FROM pg_auth_members WHERE (roleid::regrole::text LIKE $1 || '%' OR member::regrole::text LIKE $1 || '%') AND $2 <> ''`,
		"default privileges": `SELECT count(*) FROM pg_default_acl a WHERE NOT EXISTS (SELECT FROM pg_roles WHERE oid = defaclrole) AND $1 || $2 <> ''`,
	} {
		if n := scan[int](t, admin, sql, p.Schema, p.Owner); n != 0 {
			t.Errorf("%d %s are left", n, what)
		}
	}
	assertNoOrphans(t, f, 1)
	primary := f.Admin(t, "primary")
	if left := scan[string](t, primary, `SELECT concat_ws(' ', t.state, t.display_name, t.attributes, octet_length(d.sealed), d.state,
		(SELECT count(*) FROM tenancy.memberships m WHERE m.tenant = t.id), (SELECT count(*) FROM tenancy.domains m WHERE m.tenant = t.id),
		(SELECT count(*) FROM tenancy.audit WHERE detail::text LIKE '%alice%'))
		FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1`, a.ID); left != "purged  {} 0 dropped 0 0 0" {
		t.Errorf("the tombstone is %q", left)
	}
	for op, err := range map[string]error{"purge": second(c.PurgeNow(ctx, a.ID, "acme")), "restore": c.Restore(ctx, a.ID), "resume": c.Resume(ctx, a.ID), "delete": c.Delete(ctx, a.ID), "enter": second(tn.Enter(ctx, a.ID))} {
		if !errors.Is(err, tenancy.ErrTenantGone) {
			t.Errorf("%s of a purged tenant: %v", op, err)
		}
	}
	if _, err := c.PurgeNow(ctx, 999, "acme"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Error(err)
	}
	if got := scan[string](t, login(t, tn, b.ID), `SELECT title FROM notes`); got != "globex" {
		t.Errorf("the other tenant's row is %q", got)
	}
	list := []tenancy.ID{}
	for got, err := range c.Tenants(ctx, tenancy.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, got.ID)
	}
	if !slices.Equal(list, []tenancy.ID{b.ID}) {
		t.Errorf("the list is %v", list)
	}
}

// TestATenantOfThousandsOfTablesIsPurged runs on a server with so few locks that one statement cannot drop the schema:
// those of a server as it is installed for 5,000 tables (TENANCY_LONG=1), and in proportion for 1,200.
func TestATenantOfThousandsOfTablesIsPurged(t *testing.T) {
	t.Parallel()
	tables, settings := 1200, map[string]string{"max_locks_per_transaction": "10", "max_connections": "40"}
	if os.Getenv("TENANCY_LONG") == "1" {
		tables, settings = 5000, map[string]string{"max_locks_per_transaction": "64", "max_connections": "100"}
	}
	server, err := pgembed.Start(t.Context(), pgembed.Options{Settings: settings})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	if server.External() {
		t.Skip("the locks of the server of TENANCY_TEST_URL are as they are")
	}
	super := connectURL(t, server.URL())
	at := func(login, database string) string {
		cc := super.Config()
		return fmt.Sprintf("postgres://%s:secret@%s:%d/%s?sslmode=disable", login, cc.Host, cc.Port, database)
	}
	cfg := tenancy.Config{PrimaryURL: at("catalog", "fleet_primary"), Keys: otherKeys(t)}
	if err := tenancy.Init(t.Context(), tenancy.AdminConfig{AdminURL: server.URL(), PrimaryURL: cfg.PrimaryURL, Keys: cfg.Keys,
		Server: tenancy.ServerConfig{URL: at("provisioner", "fleet_tenants")}}); err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{"00001_parts.sql": {Data: []byte("-- +goose Up\nCREATE TABLE parts (id bigint, title text) PARTITION BY LIST (id);\n")}}
	for i := 2; i <= tables/20+1; i++ { // in steps, as a service grows
		files[fmt.Sprintf("%05d_tables.sql", i)] = &fstest.MapFile{Data: fmt.Appendf(nil, `-- +goose Up
-- +goose StatementBegin
DO $$ BEGIN
FOR i IN 1..16 LOOP EXECUTE format('CREATE TABLE t_%[1]d_%%s (id bigint PRIMARY KEY, title text)', i); END LOOP;
FOR i IN 1..4 LOOP EXECUTE format('CREATE TABLE parts_%[1]d_%%s PARTITION OF parts FOR VALUES IN (%%s)', i, %[1]d * 4 + i); END LOOP;
END $$;
-- +goose StatementEnd
`, i)}
	}
	cfg.Migrations = files
	tn, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	made := tenancytest.Create(t, tn, "acme")
	d, err := tn.Catalog().DataSource(t.Context(), made.ID)
	if err != nil {
		t.Fatal(err)
	}
	cc := super.Config()
	cc.Database = d.Database
	inTenants, err := pgx.ConnectConfig(t.Context(), cc)
	if err != nil {
		t.Fatal(err)
	}
	defer inTenants.Close(t.Context())
	if _, err := inTenants.Exec(t.Context(), "DROP SCHEMA "+d.Schema+" CASCADE"); sqlState(err) != "53200" {
		t.Fatalf("one statement drops it all (%v): this server has too many locks to show anything", err)
	}
	if err := tn.Catalog().Delete(t.Context(), made.ID); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	receipt, err := tn.Catalog().PurgeNow(t.Context(), made.ID, "acme")
	t.Logf("%d relations were dropped in %v", receipt.Tables, time.Since(began).Round(time.Millisecond))
	if err != nil || receipt.Tables < tables {
		t.Fatalf("%d tables, %v", receipt.Tables, err)
	}
	if n := scan[int](t, inTenants, `SELECT count(*) FROM pg_namespace WHERE nspname = $1`, d.Schema); n != 0 {
		t.Error("the schema is still there")
	}
}

// secondServer makes another tenants' database, with a provisioner of its own, and registers it.
func secondServer(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy) (url string) {
	t.Helper()
	name := fleetName(t, f)
	a := uninitialised(t, f)
	a.PrimaryURL, a.Server.Name = f.PrimaryURL, "second"
	if err := tenancy.Init(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().AddServer(t.Context(), a.Server); err != nil { // Init did: known by its address, it stays one
		t.Fatal(err)
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.servers`); n != 2 {
		t.Fatalf("%d servers are registered, want two (%s)", n, name)
	}
	return a.Server.URL
}

func TestATenantMovesToAPlacePreparedForIt(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn, node := f.Open(t, tenancy.Config{Migrations: noteMigrations}), f.Open(t, tenancy.Config{})
	a, b := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	url := secondServer(t, f, tn)
	c, ctx := tn.Catalog(), t.Context()
	forA, err := c.Prepare(ctx, a.ID, "second")
	if err != nil {
		t.Fatal(err)
	}
	forB, err := c.Prepare(ctx, b.ID, "second")
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, c.SetDataSource(ctx, a.ID, forB), tenancy.ErrIdentity, "another tenant")
	stranger := forA
	stranger.Schema = "t_nowhere"
	wantError(t, c.SetDataSource(ctx, a.ID, stranger), tenancy.ErrInvalid, "Prepare")
	wrong := forA
	wrong.Password = "wrong"
	if err := c.SetDataSource(ctx, a.ID, wrong); sqlState(err) != "28P01" {
		t.Errorf("with a wrong password: %v", err)
	}
	wantError(t, c.SetDataSource(ctx, 999, forA), tenancy.ErrTenantNotFound)
	wantError(t, c.SetDataSource(ctx, a.ID, tenancy.DataSource{}), tenancy.ErrInvalid)

	atA := tenancytest.Context(t, node, "acme")
	titles := func() (s string) {
		if err := node.DB().QueryRow(atA, `SELECT coalesce(string_agg(title, ','), '-') FROM notes`).Scan(&s); err != nil {
			s = err.Error()
		}
		return s
	}
	if got := titles(); got != "acme" {
		t.Fatalf("before the move: %q", got)
	}
	if err := c.SetDataSource(ctx, a.ID, forA); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "-", titles) // the new place is empty: the operator fills it
	if after := mustTenant(t, tn, "acme"); after.Generation <= a.Generation || after.UID != a.UID {
		t.Errorf("before %+v, after %+v", a, after)
	}
	if shown, err := c.DataSource(ctx, a.ID); err != nil || shown.Password != "" || !strings.Contains(url, shown.Database) {
		t.Errorf("the data source reads %v, %v", shown, err)
	}
	if err := c.Delete(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	if receipt, err := c.PurgeNow(ctx, a.ID, "acme"); err != nil || len(receipt.Roles) != 6 {
		t.Errorf("both places are purged: %+v, %v", receipt, err)
	}
}

func TestCreateTakesAPreparedPlaceOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	d, err := c.Prepare(ctx, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	made, err := c.Create(ctx, tenancy.NewTenant{Name: "acme", DataSource: &d})
	if err != nil {
		t.Fatal(err)
	}
	if p := placeOf(t, f, made.ID); p.Schema != d.Schema {
		t.Errorf("it lives in %s, not in %s", p.Schema, d.Schema)
	}
	must(t, login(t, tn, made.ID), `INSERT INTO notes (tenant, title) VALUES ('acme', 'mine')`)
	if got, err := c.Create(ctx, tenancy.NewTenant{Name: "globex", DataSource: &d}); err == nil {
		t.Errorf("a second tenant on the same place: %+v", got)
	} else {
		wantError(t, err, tenancy.ErrInvalid, "data source", "another tenant")
	}
	owned, err := c.Prepare(ctx, made.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Create(ctx, tenancy.NewTenant{Name: "initech", DataSource: &owned}); err == nil {
		t.Errorf("a new tenant on a place prepared for another: %+v", got)
	} else {
		wantError(t, err, tenancy.ErrInvalid, "data source", "another tenant")
	}
	foreign := d
	foreign.Schema, foreign.User = "t_foreign", "t_foreign_l1"
	_, err = c.Create(ctx, tenancy.NewTenant{Name: "hooli", DataSource: &foreign})
	wantError(t, err, tenancy.ErrInvalid, "Prepare")
	_, err = c.Prepare(ctx, 999, "")
	wantError(t, err, tenancy.ErrTenantNotFound)
	_, err = c.Prepare(ctx, 0, "nowhere")
	wantError(t, err, tenancy.ErrInvalid, `server: "nowhere"`)
	_, err = c.Create(ctx, tenancy.NewTenant{Name: "piper", Server: "nowhere"})
	wantError(t, err, tenancy.ErrInvalid, `server: "nowhere"`)
}

func TestANodeWithoutAProvisionerServesAndDoesNotCreate(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	a := create(t, f, tn, "acme")
	must(t, f.Admin(t, "primary"), `UPDATE tenancy.servers SET provisioner = NULL`)
	c, ctx := tn.Catalog(), t.Context()
	for op, err := range map[string]error{
		"create":         second(c.Create(ctx, tenancy.NewTenant{Name: "globex"})),
		"create_on_name": second(c.Create(ctx, tenancy.NewTenant{Name: "initech", Server: "main"})),
		"prepare":        second(c.Prepare(ctx, 0, "main")),
		"migrate":        second(tn.Migrator().Tenant(ctx, a.ID)),
	} {
		if !errors.Is(err, tenancy.ErrNoProvisioner) {
			t.Errorf("%s: %v, want ErrNoProvisioner", op, err)
		}
	}
	var n int
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT count(*) FROM notes`).Scan(&n); err != nil || n != 1 {
		t.Errorf("it does not serve: %d, %v", n, err)
	}
	wantError(t, c.Suspend(ctx, a.ID, tenancy.Suspension{}), tenancy.ErrNoProvisioner, "sessions at")
	if _, err := tn.Enter(ctx, a.ID); !errors.Is(err, tenancy.ErrTenantSuspended) {
		t.Errorf("the catalog does not refuse it: %v", err)
	}
}

func TestEveryWriteIsNumberedAnnouncedAndAudited(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	primary, listener := f.Admin(t, "primary"), f.Admin(t, "primary")
	must(t, listener, `LISTEN tenancy`)
	c, ctx := tn.Catalog(), t.Context()
	a := create(t, f, tn, "acme")
	d, err := c.Prepare(ctx, a.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	read := func() (epoch, audits int64) {
		return scan[int64](t, primary, `SELECT epoch FROM tenancy.epoch`), scan[int64](t, primary, `SELECT count(*) FROM tenancy.audit`)
	}
	for _, w := range []struct {
		name, audit string
		write       func() error
	}{
		{"create", "create", func() error { return second(c.Create(ctx, tenancy.NewTenant{Name: "globex"})) }},
		{"rename", "rename", func() error { return c.Rename(ctx, a.ID, "acme-2") }},
		{"add_member", "add member", func() error { return c.AddMember(ctx, tenancy.Membership{User: "bob", Tenant: a.ID}) }},
		{"set_default", "", func() error { return c.SetDefault(ctx, "bob", a.ID) }},
		{"take_default", "", func() error { return c.SetDefault(ctx, "bob", 0) }},
		{"sync_members", "sync members", func() error {
			return second(c.SyncMembers(ctx, "ldap", []tenancy.Membership{{User: "carol", Tenant: a.ID}}))
		}},
		{"remove_member", "remove member", func() error { return c.RemoveMember(ctx, a.ID, "bob") }},
		{"add_domain", "add domain", func() error { return c.AddDomain(ctx, a.ID, "acme.test") }},
		{"add_another_domain", "add domain", func() error { return c.AddDomain(ctx, a.ID, "acme.example") }},
		{"set_primary_domain", "set primary domain", func() error { return c.SetPrimaryDomain(ctx, a.ID, "acme.example") }},
		{"remove_domain", "remove domain", func() error { return c.RemoveDomain(ctx, "acme.example") }},
		{"add_server", "register server", func() error { return c.AddServer(ctx, tenancy.ServerConfig{URL: f.ServerURL}) }},
		{"set_data_source", "set data source", func() error { return c.SetDataSource(ctx, a.ID, d) }},
		{"suspend", "suspend", func() error { return c.Suspend(ctx, a.ID, tenancy.Suspension{}) }},
		{"resume", "resume", func() error { return c.Resume(ctx, a.ID) }},
		{"delete", "delete", func() error { return c.Delete(ctx, a.ID) }},
		{"restore", "restore", func() error { return c.Restore(ctx, a.ID) }},
		{"delete_again", "delete", func() error { return c.Delete(ctx, a.ID) }},
		{"purge", "purge", func() error { return second(c.PurgeNow(ctx, a.ID, "acme-2")) }},
	} {
		epoch, audits := read()
		if err := w.write(); err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		after, audited := read()
		if after <= epoch {
			t.Errorf("%s: the epoch stays %d", w.name, epoch)
		}
		if n := scan[int64](t, primary, `SELECT count(*) FROM tenancy.changes WHERE epoch > $1`, epoch); n != after-epoch {
			t.Errorf("%s: %d changes for %d numbers", w.name, n, after-epoch)
		}
		for got := ""; got != fmt.Sprint(after); {
			wait, cancel := context.WithTimeout(ctx, 5*time.Second)
			n, err := listener.WaitForNotification(wait)
			cancel()
			if err != nil {
				t.Fatalf("%s: no notification of %d: %v", w.name, after, err)
			}
			got = n.Payload
		}
		if w.audit == "" {
			continue
		}
		if audited <= audits || scan[string](t, primary, `SELECT action FROM tenancy.audit ORDER BY id DESC LIMIT 1`) != w.audit {
			t.Errorf("%s: no audit record %q", w.name, w.audit)
		}
	}
}

// TestTheValidityJobDropsNoPlaceThatIsBeingMade has a Prepare take longer than an hour, by the primary's clock.
func TestTheValidityJobDropsNoPlaceThatIsBeingMade(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_slow.sql": {Data: []byte("-- +goose Up\nSELECT pg_advisory_xact_lock(4711);\nCREATE TABLE notes (id bigint PRIMARY KEY);\n")}}})
	c, admin := tn.Catalog(), f.Admin(t, "tenants")
	acme := tenancytest.Create(t, tn, "acme")
	for _, id := range []tenancy.ID{acme.ID, 0} {
		must(t, admin, `SELECT pg_advisory_lock(4711)`)
		type result struct {
			d   tenancy.DataSource
			err error
		}
		prepared := make(chan result, 1)
		go func() {
			d, err := c.Prepare(t.Context(), id, "")
			prepared <- result{d, err}
		}()
		until(t, 10*time.Second, "1", func() string {
			return fmt.Sprint(scan[int](t, admin, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`))
		})
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Error(err)
		}
		must(t, admin, `SELECT pg_advisory_unlock(4711)`)
		r := <-prepared
		if r.err != nil {
			t.Errorf("tenant %d: %v", id, r.err)
			continue
		}
		wantOpen(t, admin, r.d.User)
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Error(err)
		}
		if err := c.DropPlace(t.Context(), r.d); err != nil {
			t.Errorf("tenant %d: %v", id, err)
		}
	}
}
