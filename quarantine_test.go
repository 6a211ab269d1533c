package tenancy_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// wait lets so much of a deleted tenant's quarantine go by.
func wait(t *testing.T, primary *pgx.Conn, id tenancy.ID, hours int) {
	t.Helper()
	must(t, primary, `UPDATE tenancy.tenants SET deleted = deleted - make_interval(hours => $2) WHERE id = $1`, id, hours)
}

func TestAPurgeWaitsForTheQuarantineThatTheDeleteWroteDown(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{Quarantine: 48 * time.Hour})
	impatient := f.Open(t, tenancy.Config{Quarantine: time.Hour}).Catalog()
	c, ctx, primary := tn.Catalog(), t.Context(), f.Admin(t, "primary")
	profile := func(id tenancy.ID) tenancy.Profile {
		t.Helper()
		p, err := c.Profile(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if p := profile(acme.ID); !p.Deleted.IsZero() || !p.PurgeAfter.IsZero() {
		t.Errorf("a living tenant was deleted at %v and is purged after %v", p.Deleted, p.PurgeAfter)
	}
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	ends := profile(acme.ID).PurgeAfter
	if kept := ends.Sub(profile(acme.ID).Deleted); kept != 48*time.Hour {
		t.Errorf("it is kept for %v", kept)
	}
	if err := impatient.Delete(ctx, acme.ID); err != nil || !profile(acme.ID).PurgeAfter.Equal(ends) {
		t.Errorf("deleted again by another node: %v, until %v and not %v", err, profile(acme.ID).PurgeAfter, ends)
	}
	for node, c := range map[string]*tenancy.Catalog{"a patient node": c, "an impatient one": impatient} {
		_, err := c.Purge(ctx, acme.ID, "acme")
		wantError(t, err, tenancy.ErrQuarantined, ends.UTC().Format(time.RFC3339), "PurgeNow", "Restore")
		if errors.Is(err, tenancy.ErrPrimaryUnavailable) {
			t.Errorf("%s: %v", node, err)
		}
	}
	wait(t, primary, acme.ID, 47)
	wantError(t, second(c.Purge(ctx, acme.ID, "acme")), tenancy.ErrQuarantined)
	if err := c.Restore(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if kept := scan[string](t, primary, `SELECT quarantine::text FROM tenancy.tenants WHERE id = $1`, acme.ID); kept != "720:00:00" {
		t.Errorf("the release before would keep a restored tenant for %s", kept)
	}
	if p := profile(acme.ID); !p.PurgeAfter.IsZero() || !p.Deleted.IsZero() {
		t.Errorf("a restored tenant is purged after %v", p.PurgeAfter)
	}

	// What a node of the release before deletes has the default, also after a Delete of this one was taken back by it.
	old := func(state string) {
		must(t, primary, `UPDATE tenancy.tenants SET state = $2, deleted = CASE WHEN $2 = 'deleted' THEN now() END, fenced = NULL WHERE id = $1`, globex.ID, state)
	}
	old("deleted")
	if p := profile(globex.ID); p.PurgeAfter.Sub(p.Deleted) != 30*24*time.Hour {
		t.Errorf("the release before keeps it until %v", p.PurgeAfter)
	}
	for _, next := range []struct {
		node *tenancy.Catalog
		kept time.Duration
	}{{c, 48 * time.Hour}, {impatient, time.Hour}} { // a new Delete has its own node's setting
		old("active")
		if err := next.node.Delete(ctx, globex.ID); err != nil {
			t.Fatal(err)
		}
		if p := profile(globex.ID); p.PurgeAfter.Sub(p.Deleted) != next.kept {
			t.Errorf("kept until %v, want %v", p.PurgeAfter, next.kept)
		}
	}
	wait(t, primary, globex.ID, 1)
	if _, err := c.Purge(ctx, globex.ID, "globex"); err != nil {
		t.Errorf("after the quarantine: %v", err)
	}
	if p := profile(globex.ID); p.Deleted.IsZero() || !p.PurgeAfter.IsZero() {
		t.Errorf("a purged tenant was deleted at %v and is purged after %v", p.Deleted, p.PurgeAfter)
	}
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.PurgeNow(ctx, acme.ID, "acme"); err != nil {
		t.Errorf("PurgeNow: %v", err)
	}
}

func TestADeletedTenantKeepsItsNameUntilItIsReleased(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn, node := f.Open(t, tenancy.Config{Migrations: noteMigrations}), f.Open(t, tenancy.Config{})
	c, ctx := tn.Catalog(), t.Context()
	acme, err := c.Create(ctx, tenancy.NewTenant{Name: "acme", Admin: "alice", Domains: []string{"acme.test"}})
	if err != nil {
		t.Fatal(err)
	}
	globex := create(t, f, tn, "globex")
	byDomain := tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "acme.test"}
	visit := func() (string, error) { // by a guest of the domain, at another node
		ctx, err := node.Resolve(ctx, tenancy.Query{Hints: []tenancy.Hint{byDomain}})
		if err != nil {
			return "", err
		}
		return tenantIn(t, ctx), nil
	}
	if name, err := visit(); name != "acme" {
		t.Fatalf("the domain leads to %q, %v", name, err)
	}
	wantError(t, c.ReleaseName(ctx, acme.ID), tenancy.ErrInvalid, "active")
	wantError(t, c.RestoreAs(ctx, acme.ID, "acme-2"), tenancy.ErrInvalid, "active")
	wantError(t, c.ReleaseName(ctx, 999), tenancy.ErrTenantNotFound)
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	// Its members are refused, and are members still.
	_, err = tn.Resolve(ctx, tenancy.Query{User: "alice"})
	wantError(t, err, tenancy.ErrTenantGone)
	if list, err := c.TenantsOf(ctx, "alice"); err != nil || len(list) != 1 || list[0].Tenant != acme.ID {
		t.Errorf("alice's tenants: %v, %v", list, err)
	}
	taken := func() (refused int) {
		for _, err := range []error{second(c.Create(ctx, tenancy.NewTenant{Name: "acme"})), second(c.Create(ctx, tenancy.NewTenant{Name: "other", Domains: []string{"acme.test"}})),
			c.AddDomain(ctx, globex.ID, "acme.test"), c.Rename(ctx, globex.ID, "acme")} {
			if errors.Is(err, tenancy.ErrTenantExists) {
				refused++
			} else {
				t.Errorf("of a deleted tenant: %v", err)
			}
		}
		return refused
	}
	if n := taken(); n != 4 {
		t.Errorf("%d of 4 verbs were refused", n)
	}
	for range 2 {
		if err := c.ReleaseName(ctx, acme.ID); err != nil {
			t.Fatal(err)
		}
	}
	tombstone := fmt.Sprintf("#%d", acme.ID)
	if got, err := c.Tenant(ctx, acme.ID); err != nil || got.Name != tombstone || got.State != tenancy.StateDeleted {
		t.Errorf("released: %+v, %v", got, err)
	}
	heir, err := c.Create(ctx, tenancy.NewTenant{Name: "acme", Domains: []string{"acme.test"}})
	if err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, fmt.Sprint("acme ", heir.ID), func() string {
		ctx, err := node.Resolve(ctx, tenancy.Query{Hints: []tenancy.Hint{byDomain}})
		if err != nil {
			return err.Error()
		}
		got, _ := tenancy.TenantFrom(ctx)
		return fmt.Sprint(got.Name, " ", got.ID)
	})
	wantError(t, c.Restore(ctx, acme.ID), tenancy.ErrInvalid, "RestoreAs")
	wantError(t, c.RestoreAs(ctx, acme.ID, "acme"), tenancy.ErrTenantExists)
	wantError(t, c.RestoreAs(ctx, acme.ID, "#5"), tenancy.ErrInvalid, "name")
	if got, err := c.Tenant(ctx, acme.ID); err != nil || got.Name != tombstone || got.State != tenancy.StateDeleted {
		t.Errorf("after refused restores: %+v, %v", got, err)
	}
	if _, err := tryLogin(t, tn, acme.ID); sqlState(err) != "28000" {
		t.Errorf("a refused restore opened the login: %v", err)
	}
	if err := c.RestoreAs(ctx, acme.ID, "acme-old"); err != nil {
		t.Fatal(err)
	}
	if got := mustTenant(t, tn, "acme-old"); got.ID != acme.ID || got.State != tenancy.StateActive {
		t.Errorf("restored: %+v", got)
	}
	if got := tenantIn(t, resolved(t, tn, "alice")); got != "acme-old" {
		t.Errorf("alice is in %q", got)
	}

	// A purge asks for the name that the tenant has.
	if err := errors.Join(c.Delete(ctx, acme.ID), c.ReleaseName(ctx, acme.ID)); err != nil {
		t.Fatal(err)
	}
	wantError(t, second(c.PurgeNow(ctx, acme.ID, "acme-old")), tenancy.ErrInvalid, "name")
	if _, err := c.PurgeNow(ctx, acme.ID, tombstone); err != nil {
		t.Error(err)
	}
	wantError(t, c.ReleaseName(ctx, acme.ID), tenancy.ErrTenantGone)
	wantError(t, c.RestoreAs(ctx, acme.ID, "anew"), tenancy.ErrTenantGone)
	if name, err := visit(); name != "acme" {
		t.Errorf("the heir's domain leads to %q, %v", name, err)
	}
}

// TestNothingOfAPurgedTenantNamesIt looks at every row of the primary for what a person could be known by.
func TestNothingOfAPurgedTenantNamesIt(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn, node := f.Open(t, tenancy.Config{Migrations: noteMigrations, HostManagers: []tenancy.UserKey{"boss"}}), f.Open(t, tenancy.Config{})
	c, ctx, primary := tn.Catalog(), t.Context(), f.Admin(t, "primary")
	jane, err := c.Create(ctx, tenancy.NewTenant{Name: "jane-doe", DisplayName: "Jane Doe", Admin: "jane@doe.test", Domains: []string{"janedoe.test"}, Attributes: map[string]any{"for": "Jane"}})
	if err != nil {
		t.Fatal(err)
	}
	globex := create(t, f, tn, "globex")
	byDomain := []tenancy.Hint{{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "janesmith.test"}}
	boss := resolved(t, tn, "boss")
	visit, err := tn.Impersonate(boss, jane.ID, tenancy.Visit{Reason: "Jane called", Until: time.Now().Add(time.Hour), Role: tenancy.RoleAdmin})
	if err != nil {
		t.Fatal(err)
	}
	asJane := resolved(t, tn, "jane@doe.test")
	if err := c.AddMember(asJane, tenancy.Membership{User: "former-jane", Tenant: jane.ID}); err != nil {
		t.Fatal(err)
	}
	former := resolved(t, tn, "former-jane")
	if err := errors.Join(
		c.SetProfile(former, jane.ID, tenancy.Profile{DisplayName: "Jane"}), c.RemoveMember(asJane, jane.ID, "former-jane"),
		c.AddMember(visit, tenancy.Membership{User: "late-jane", Tenant: jane.ID}),
		c.Rename(ctx, jane.ID, "jane-smith"), c.AddDomain(ctx, jane.ID, "janesmith.test"), c.RemoveDomain(ctx, "janedoe.test"), c.AddDomain(ctx, globex.ID, "globex.test"),
		second(tn.Resolve(ctx, tenancy.Query{Hints: byDomain})), // the node knows it now
		c.Suspend(ctx, jane.ID, tenancy.Suspension{Message: "Jane is away", Drain: 1}), c.Delete(ctx, jane.ID),
	); err != nil {
		t.Fatal(err)
	}
	named := func() (found []string) {
		t.Helper()
		tables := scan[[]string](t, primary, `SELECT array_agg(relname::text) FROM pg_class WHERE relnamespace = 'tenancy'::regnamespace AND relkind = 'r'`)
		for _, table := range tables {
			if n := scan[int](t, primary, `SELECT count(*) FROM tenancy.`+table+` r WHERE r::text ~* 'jane'`); n > 0 {
				found = append(found, table)
			}
		}
		slices.Sort(found)
		return found
	}
	if got, want := named(), []string{"audit", "changes", "domains", "memberships", "tenants"}; !slices.Equal(got, want) {
		t.Fatalf("before the purge it is named in %q, want %q: this test looks in the wrong place", got, want)
	}
	if _, err := c.PurgeNow(boss, jane.ID, "jane-smith"); err != nil {
		t.Fatal(err)
	}
	if got := named(); len(got) > 0 {
		t.Errorf("after the purge it is named in %q", got)
	}
	if n := scan[int](t, primary, `SELECT octet_length(intent) FROM tenancy.tenants WHERE id = $1`, jane.ID); n > 0 {
		t.Error("a hash of its name is left")
	}
	if actor := scan[string](t, primary, `SELECT actor FROM tenancy.audit WHERE tenant = $1 AND action = 'purge'`, jane.ID); actor != "boss" {
		t.Errorf("it was purged by %q", actor)
	}
	if n := scan[int](t, primary, `SELECT count(*) FROM tenancy.audit WHERE tenant = $1 AND detail->>'domain' = 'globex.test'`, globex.ID); n != 1 {
		t.Error("the other tenant's trail was changed")
	}
	// The node knows that the domain is nobody's: who asks for it is not written down as one who asked for her. The second is, and comes after.
	for _, hint := range []tenancy.Hint{byDomain[0], {Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "globex"}} {
		wantError(t, second(tn.Resolve(ctx, tenancy.Query{User: "mallory", Hints: []tenancy.Hint{hint}})), tenancy.ErrForbidden)
	}
	until(t, 5*time.Second, fmt.Sprintf("[%d]", globex.ID), func() string {
		return fmt.Sprint(scan[[]tenancy.ID](t, primary, `SELECT coalesce(array_agg(tenant ORDER BY id), '{}') FROM tenancy.audit WHERE actor = 'mallory'`))
	})
	// And it takes the next owner.
	if err := c.AddDomain(ctx, globex.ID, "janesmith.test"); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "globex", func() string {
		ctx, err := node.Resolve(ctx, tenancy.Query{Hints: byDomain})
		if err != nil {
			return err.Error()
		}
		return tenantIn(t, ctx)
	})
}

// TestAReceiptIsOfAllCallsTogether has a purge die before each of its steps.
func TestAReceiptIsOfAllCallsTogether(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, ctx := tn.Catalog(), t.Context()
	place, admin, primary := placeOf(t, f, acme.ID), f.Admin(t, "tenants"), f.Admin(t, "primary")
	if err := c.AddMember(ctx, tenancy.Membership{User: "alice", Tenant: acme.ID}); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	wantError(t, second(c.Receipt(ctx, acme.ID)), tenancy.ErrInvalid, "has begun")
	wantError(t, second(c.Receipt(ctx, 999)), tenancy.ErrTenantNotFound)
	tables := scan[int](t, admin, `SELECT count(*) FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind IN ('r', 'S')`, place.Schema)

	// An object of the host's that is in the way of the last role lets everything but that be dropped.
	must(t, admin, `CREATE TABLE public.kept (id bigint)`)
	must(t, admin, `GRANT SELECT ON public.kept TO `+place.Owner)
	if _, err := c.PurgeNow(ctx, acme.ID, "acme"); err == nil {
		t.Fatal("the purge did not die")
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_namespace WHERE nspname = $1`, place.Schema); n != 0 {
		t.Fatal("the purge died before it dropped the schema: this test shows nothing")
	}
	begun, err := c.Receipt(ctx, acme.ID)
	if err != nil || begun.Tables != tables || len(begun.Roles) != 3 || !begun.Purged.IsZero() || begun.Deleted.IsZero() {
		t.Errorf("of the purge that died: %+v, %v", begun, err)
	}
	for op, err := range map[string]error{"restore": c.Restore(ctx, acme.ID), "restore as": c.RestoreAs(ctx, acme.ID, "anew"), "export": second(c.Export(ctx, acme.ID, new(strings.Builder)))} {
		if !errors.Is(err, tenancy.ErrTenantGone) || !strings.Contains(err.Error(), "call Purge again") {
			t.Errorf("%s of what is left: %v", op, err)
		}
	}
	if name := scan[string](t, primary, `SELECT name FROM tenancy.tenants WHERE id = $1`, acme.ID); name != "acme" {
		t.Errorf("a refused restore left the name %q", name)
	}
	must(t, admin, `DROP TABLE public.kept`)
	r, err := c.Purge(ctx, acme.ID, "acme") // it has begun: there is nothing to wait for
	if err != nil {
		t.Fatal(err)
	}
	if r.Tables != tables || len(r.Roles) != 3 || r.Members != 2 || r.Name != "acme" || r.UID != acme.UID || r.Purged.Before(r.Deleted) {
		t.Errorf("receipt %+v, want %d tables", r, tables)
	}
	kept, err := c.Receipt(ctx, acme.ID)
	r.Name = ""
	if err != nil || fmt.Sprint(kept) != fmt.Sprint(r) {
		t.Errorf("kept is %+v, %v, and returned was %+v", kept, err, r)
	}
	must(t, login(t, tn, globex.ID), `INSERT INTO notes (tenant, title) VALUES ('globex', 'lives')`)
}
