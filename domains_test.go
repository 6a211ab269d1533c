package tenancy_test

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/primary"
	"github.com/msmt-go/tenancy/tenancytest"
)

func wantDomains(tb testing.TB, tn *tenancy.Tenancy, id tenancy.ID, want ...string) {
	tb.Helper()
	if got, err := tn.Catalog().Domains(tb.Context(), id); err != nil || !slices.Equal(got, want) {
		tb.Errorf("domains of %d are %q, %v; want %q", id, got, err, want)
	}
}

// onePrimary checks that every tenant with domains has one primary domain.
func onePrimary(tb testing.TB, admin *pgx.Conn) {
	tb.Helper()
	if bad := scan[string](tb, admin, `SELECT coalesce(string_agg(concat_ws(' ', tenant, domains, primaries), '; '), '') FROM
		(SELECT tenant, count(*) AS domains, count(*) FILTER (WHERE is_primary) AS primaries FROM tenancy.domains GROUP BY tenant) d WHERE primaries <> 1`); bad != "" {
		tb.Errorf("tenant, domains and primary ones of them: %s", bad)
	}
}

func TestATenantHasOnePrimaryDomain(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "primary")
	add := func(id tenancy.ID, domain string) {
		t.Helper()
		if err := c.AddDomain(ctx, id, domain); err != nil {
			t.Fatal(err)
		}
	}
	add(b, "globex.test")
	for _, d := range []string{"one.test", "Zwei.test.", "three.test", "a.test"} {
		add(a, d)
	}
	wantDomains(t, tn, a, "one.test", "a.test", "three.test", "zwei.test")
	// What changes nothing says nothing.
	before := recorded(t, admin)
	add(a, "ZWEI.test")
	if err := c.SetPrimaryDomain(ctx, a, "One.test."); err != nil {
		t.Fatal(err)
	}
	if after := recorded(t, admin); after != before {
		t.Errorf("epoch and audit went from %v to %v", before, after)
	}
	if err := c.SetPrimaryDomain(ctx, a, "Three.Test"); err != nil {
		t.Fatal(err)
	}
	wantDomains(t, tn, a, "three.test", "a.test", "one.test", "zwei.test")
	if got := scan[string](t, admin, `SELECT detail::text FROM tenancy.audit WHERE action = 'set primary domain' AND tenant = $1`, a); got != `{"domain": "three.test"}` {
		t.Errorf("the audit says %s", got)
	}
	// The oldest follows the primary one; another one goes without a trace.
	for _, step := range [][]string{{"three.test", "one.test", "a.test", "zwei.test"}, {"one.test", "zwei.test", "a.test"}, {"a.test", "zwei.test"}, {"zwei.test"}} {
		if err := c.RemoveDomain(ctx, step[0]); err != nil {
			t.Fatal(err)
		}
		wantDomains(t, tn, a, step[1:]...)
		onePrimary(t, admin)
	}
	add(a, "again.test")
	onePrimary(t, admin)
	wantDomains(t, tn, b, "globex.test")

	if err := c.Delete(ctx, b); err != nil {
		t.Fatal(err)
	}
	if _, err := c.PurgeNow(ctx, b, "globex"); err != nil {
		t.Fatal(err)
	}
	wantDomains(t, tn, b)
	for rule, r := range map[string]struct {
		id     tenancy.ID
		domain string
		class  error
		says   string
	}{
		"no_domain":            {a, "a b", tenancy.ErrInvalid, "domain: domain must be made of"},
		"nobodys":              {a, "nobodys.test", tenancy.ErrInvalid, "domain: nobodys.test is not one of the tenant's"},
		"of_an_unknown_tenant": {999, "again.test", tenancy.ErrTenantNotFound, "tenant id 999"},
		"of_a_purged_tenant":   {b, "again.test", tenancy.ErrTenantGone, ""},
	} {
		t.Run(rule, func(t *testing.T) { wantError(t, c.SetPrimaryDomain(ctx, r.id, r.domain), r.class, r.says) })
	}
}

func TestAnotherTenantsDomainIsNeitherTakenNorPreferred(t *testing.T) {
	t.Parallel()
	_, tn, a, b := syncFleet(t)
	c, ctx := tn.Catalog(), t.Context()
	for id, list := range map[tenancy.ID][]string{a: {"a1.test", "a2.test"}, b: {"b1.test", "b2.test"}} {
		for _, d := range list {
			if err := c.AddDomain(ctx, id, d); err != nil {
				t.Fatal(err)
			}
		}
	}
	wantError(t, c.AddDomain(ctx, a, "b2.test"), tenancy.ErrTenantExists, "b2.test")
	wantError(t, c.SetPrimaryDomain(ctx, a, "b2.test"), tenancy.ErrInvalid)
	if err := c.RemoveDomain(ctx, "b1.test"); err != nil {
		t.Fatal(err)
	}
	wantDomains(t, tn, a, "a1.test", "a2.test")
	wantDomains(t, tn, b, "b2.test")
}

func TestCreateTakesTheFirstDomainAsThePrimaryOne(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	n := tenancy.NewTenant{Name: "acme", Domains: []string{"www.acme.test", "b.acme.test", "WWW.acme.test.", "a.acme.test"}}
	acme, err := tn.Catalog().Create(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	globex, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex", Domains: []string{"globex.test"}})
	if err != nil {
		t.Fatal(err)
	}
	wantDomains(t, tn, acme.ID, "www.acme.test", "a.acme.test", "b.acme.test")
	wantDomains(t, tn, globex.ID, "globex.test")
	onePrimary(t, f.Admin(t, "primary"))
}

// TestDomainsAtOnceLeaveOnePrimary adds and removes from two nodes, with few domains, so that a tenant's first and last meet.
func TestDomainsAtOnceLeaveOnePrimary(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	nodes := []*tenancy.Catalog{tn.Catalog(), f.Open(t, tenancy.Config{}).Catalog()}
	admin, ctx := f.Admin(t, "primary"), t.Context()
	at := func(fns ...func() error) {
		t.Helper()
		var wg sync.WaitGroup
		for _, fn := range fns {
			wg.Go(func() {
				if err := fn(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		onePrimary(t, admin)
	}
	for i := range 25 {
		first, last := fmt.Sprintf("x%d.test", i), fmt.Sprintf("y%d.test", i)
		for _, id := range []tenancy.ID{a, b} {
			name := func(d string) string { return fmt.Sprintf("%d.%s", id, d) }
			at(func() error { return nodes[0].AddDomain(ctx, id, name(first)) },
				func() error { return nodes[1].AddDomain(ctx, id, name(last)) })
			at(func() error { return nodes[0].SetPrimaryDomain(ctx, id, name(first)) },
				func() error { return nodes[1].SetPrimaryDomain(ctx, id, name(last)) })
			at(func() error { return nodes[0].RemoveDomain(ctx, name(first)) },
				func() error { return nodes[1].AddDomain(ctx, id, name("third.test")) })
			at(func() error { return nodes[0].RemoveDomain(ctx, name(last)) },
				func() error { return nodes[1].RemoveDomain(ctx, name("third.test")) },
				func() error { return nodes[0].RemoveDomain(ctx, name("third.test")) },
				func() error { return nodes[1].AddDomain(ctx, id, name("stays.test")) })
		}
		if t.Failed() {
			return
		}
	}
}

// TestARemovalAndAnAdditionWait holds a removal up after it has deleted the primary domain: an addition must not take the deleted one
// for the primary.
func TestARemovalAndAnAdditionWait(t *testing.T) {
	t.Parallel()
	f, tn, a, _ := syncFleet(t)
	c, ctx, admin, holder := tn.Catalog(), t.Context(), f.Admin(t, "primary"), f.Admin(t, "primary")
	if err := c.AddDomain(ctx, a, "old.test"); err != nil {
		t.Fatal(err)
	}
	tx, err := holder.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, `SELECT FROM tenancy.epoch FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i, verb := range []func() error{
		func() error { return c.RemoveDomain(ctx, "old.test") },
		func() error { return c.AddDomain(ctx, a, "new.test") },
	} {
		wg.Go(func() {
			if err := verb(); err != nil {
				t.Error(err)
			}
		})
		blockedOn(t, admin, i+1)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	wantDomains(t, tn, a, "new.test")
	onePrimary(t, admin)
}

func TestATenantIsFoundByItsDomain(t *testing.T) {
	t.Parallel()
	_, tn, a, b := syncFleet(t)
	c, ctx := tn.Catalog(), t.Context()
	for domain, id := range map[string]tenancy.ID{"acme.test": a, "www.acme.test": a, "globex.test": b} {
		if err := c.AddDomain(ctx, id, domain); err != nil {
			t.Fatal(err)
		}
	}
	for domain, id := range map[string]tenancy.ID{"acme.test": a, "WWW.Acme.Test.": a, "globex.test": b} {
		want, err := c.Tenant(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.TenantByDomain(ctx, domain); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", domain, got, err, want)
		}
	}
	for domain, class := range map[string]error{"test": tenancy.ErrTenantNotFound, "nobodys.test": tenancy.ErrTenantNotFound, "": tenancy.ErrInvalid,
		"acme.test:443": tenancy.ErrInvalid, "127.0.0.1": tenancy.ErrInvalid, "a\x00b": tenancy.ErrInvalid, "a\xff": tenancy.ErrInvalid, strings.Repeat("x", 1<<16): tenancy.ErrInvalid} {
		got, err := c.TenantByDomain(ctx, domain)
		if !errors.Is(err, class) || got != (tenancy.Tenant{}) {
			t.Errorf("%.20q: %+v, %v; want %v", domain, got, err, class)
		}
	}
}

// backToVersion1 takes the later versions of the primary's schema back, the newest first, as their migration files say.
func backToVersion1(tb testing.TB, admin *pgx.Conn) {
	tb.Helper()
	files, err := fs.Glob(primary.Migrations(), "*.sql")
	if err != nil || len(files) == 0 || !strings.HasPrefix(files[len(files)-1], fmt.Sprintf("%05d_", primary.Version)) {
		tb.Fatalf("the migrations are %q, %v", files, err)
	}
	for _, file := range slices.Backward(files[1:]) {
		text, err := fs.ReadFile(primary.Migrations(), file)
		if err != nil {
			tb.Fatal(err)
		}
		_, down, _ := strings.Cut(string(text), "-- +goose Down")
		if _, err := admin.Exec(tb.Context(), down); err != nil {
			tb.Fatal(err)
		}
	}
	must(tb, admin, `DELETE FROM tenancy.goose_db_version WHERE version_id > 1`)
	for _, column := range []string{"domains.is_primary", "nodes.address", "data_sources.old_login", "data_sources.leaving", "servers.pooler"} {
		table, name, _ := strings.Cut(column, ".")
		if n := scan[int](tb, admin, `SELECT count(*) FROM information_schema.columns WHERE table_schema = 'tenancy' AND table_name = $1 AND column_name = $2`, table, name); n != 0 {
			tb.Fatalf("%s is still there", column)
		}
	}
}

func TestAPrimaryOfTheFirstVersionIsBroughtToTheSecond(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	admin := f.Admin(t, "primary")
	open := func(only bool) (*tenancy.Tenancy, error) {
		return tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Migrations: noteMigrations, CheckPrimaryOnly: only})
	}
	tn, err := open(false)
	if err != nil {
		t.Fatal(err)
	}
	acme, globex, none := create(t, f, tn, "acme"), create(t, f, tn, "globex"), create(t, f, tn, "none")
	mustAdd(t, tn, tenancy.Membership{User: "carol", Tenant: acme.ID, Source: "ldap"}, tenancy.Membership{User: "carol", Tenant: globex.ID})
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	backToVersion1(t, admin)
	// As the first version wrote them, the oldest not the first in order; where two are of one age, their order decides.
	must(t, admin, `INSERT INTO tenancy.domains (domain, tenant, created) VALUES ('a.acme.test', $1, now()), ('z.acme.test', $1, now() - interval '1 day'),
		('z.globex.test', $2, now()), ('y.globex.test', $2, now())`, acme.ID, globex.ID)
	members := allMembers(t, admin)

	wantError(t, second(open(true)), tenancy.ErrSetup, "version 1", fmt.Sprintf("needs %d", primary.Version), "without Config.CheckPrimaryOnly")
	if n := scan[int](t, admin, `SELECT max(version_id) FROM tenancy.goose_db_version`); n != 1 {
		t.Fatalf("CheckPrimaryOnly has changed the version to %d", n)
	}
	tn = f.Open(t, tenancy.Config{Migrations: noteMigrations})
	if n := scan[int](t, admin, `SELECT max(version_id) FROM tenancy.goose_db_version`); n != primary.Version {
		t.Errorf("the primary is at version %d, the code at %d", n, primary.Version)
	}
	wantDomains(t, tn, acme.ID, "z.acme.test", "a.acme.test")
	wantDomains(t, tn, globex.ID, "y.globex.test", "z.globex.test")
	wantDomains(t, tn, none.ID)
	onePrimary(t, admin)
	if _, err := admin.Exec(t.Context(), `UPDATE tenancy.domains SET is_primary = true WHERE tenant = $1`, acme.ID); sqlState(err) != "23505" {
		t.Errorf("two primary domains of one tenant: %v, want a violation of the index", err)
	}
	if got := allMembers(t, admin); got != members {
		t.Errorf("members were\n%s\nand are\n%s", members, got)
	}
	for _, name := range []string{"acme", "globex"} { // each reads its own
		var titles []string
		rows, err := tn.DB().Query(tenancytest.Context(t, tn, name), `SELECT title FROM notes`)
		if err == nil {
			titles, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		if err != nil || !slices.Equal(titles, []string{name}) {
			t.Errorf("%s reads %q, %v", name, titles, err)
		}
	}
	must(t, admin, `UPDATE tenancy.nodes SET address = address || 'x'`)
	checked, err := open(true)
	if err != nil {
		t.Fatal(err)
	}
	if err := checked.Close(); err != nil {
		t.Error(err)
	}
}

// TestTheFirstReleaseWorksOnTheSecondVersion runs the statements of a release without primary domains, as a deployment from node to node does.
func TestTheFirstReleaseWorksOnTheSecondVersion(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "primary")
	old := connectURL(t, f.PrimaryURL)
	add := func(id tenancy.ID, domain string) {
		t.Helper()
		if holder := scan[tenancy.ID](t, old, `INSERT INTO tenancy.domains AS d (domain, tenant) VALUES ($1, $2)
			ON CONFLICT (domain) DO UPDATE SET tenant = d.tenant RETURNING tenant`, domain, id); holder != id {
			t.Errorf("%s belongs to %d", domain, holder)
		}
	}
	add(a, "b.test")
	add(a, "a.test")
	add(a, "a.test")
	must(t, old, `INSERT INTO tenancy.nodes (id, name, epoch) VALUES (gen_random_uuid(), 'old', 1) ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch, seen = now()`)
	if id := scan[tenancy.ID](t, old, `SELECT tenant FROM tenancy.domains WHERE domain = $1`, "a.test"); id != a {
		t.Errorf("a.test is of %d", id)
	}
	wantDomains(t, tn, a, "a.test", "b.test")
	// The next change by this release finds a tenant without a primary domain.
	if err := c.AddDomain(ctx, a, "c.test"); err != nil {
		t.Fatal(err)
	}
	onePrimary(t, admin)
	wantDomains(t, tn, a, "b.test", "a.test", "c.test")
	if id := scan[tenancy.ID](t, old, `DELETE FROM tenancy.domains WHERE domain = $1 RETURNING tenant`, "b.test"); id != a {
		t.Errorf("b.test was of %d", id)
	}
	if err := c.RemoveDomain(ctx, "c.test"); err != nil {
		t.Fatal(err)
	}
	onePrimary(t, admin)
	wantDomains(t, tn, a, "a.test")
	wantDomains(t, tn, b)
}
