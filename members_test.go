package tenancy_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
)

func TestAUserWithoutADefaultIsAsked(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	c, ctx, admin, other := tn.Catalog(), t.Context(), f.Admin(t, "primary"), startNode(t, f)
	mustAdd(t, tn, tenancy.Membership{User: "carol", Tenant: a}, tenancy.Membership{User: "carol", Tenant: b},
		tenancy.Membership{User: "dave", Tenant: a}, tenancy.Membership{User: "erin", Tenant: a}, tenancy.Membership{User: "erin", Tenant: b})
	resolve := func(user tenancy.UserKey, hints ...tenancy.Hint) string {
		ctx, err := tn.Resolve(ctx, tenancy.Query{User: user, Hints: hints})
		if err != nil {
			return refused(errors.New(class(err)))
		}
		tenant, _ := tenancy.TenantFrom(ctx)
		return tenant.Name
	}
	until(t, 2*time.Second, "acme", func() string { return other.ask("resolve", "carol") })
	for _, user := range []tenancy.UserKey{"carol", "dave"} {
		if err := c.SetDefault(ctx, user, 0); err != nil {
			t.Fatal(err)
		}
	}
	_, err := tn.Resolve(ctx, tenancy.Query{User: "carol"})
	if e, ok := errors.AsType[*tenancy.AmbiguousError](err); !ok || len(e.Tenants) != 2 {
		t.Errorf("a user of two tenants without a default: %v, want the two", err)
	}
	until(t, 2*time.Second, refused(tenancy.ErrAmbiguousTenant), func() string { return other.ask("resolve", "carol") })
	for user, want := range map[tenancy.UserKey]string{"dave": "acme", "erin": "acme"} { // of one tenant; of nobody's business
		if got := resolve(user); got != want {
			t.Errorf("%s: %q, want %q", user, got, want)
		}
	}
	named := tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "globex"}
	if got := resolve("carol", named); got != "globex" {
		t.Errorf("a request that names one: %q", got)
	}
	// There is nothing to take away: nothing is said.
	before := recorded(t, admin)
	for _, user := range []tenancy.UserKey{"carol", "nobody", ""} {
		if err := c.SetDefault(ctx, user, 0); err != nil {
			t.Errorf("%q: %v", user, err)
		}
	}
	if after := recorded(t, admin); after != before {
		t.Errorf("epoch and audit went from %v to %v", before, after)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM tenancy.changes WHERE kind = 'member' AND tenant IS NULL`); n != 0 {
		t.Errorf("%d changes name a user whom no purge takes out", n)
	}
	// It stays so until somebody says otherwise.
	mustAdd(t, tn, tenancy.Membership{User: "carol", Tenant: b, Role: tenancy.RoleAdmin})
	if got := resolve("carol"); got != refused(tenancy.ErrAmbiguousTenant) {
		t.Errorf("another role makes a default: %q", got)
	}
	if err := c.SetDefault(ctx, "carol", b); err != nil {
		t.Fatal(err)
	}
	if got := resolve("carol"); got != "globex" {
		t.Errorf("the new default: %q", got)
	}
	wantError(t, c.SetDefault(ctx, "dave", b), tenancy.ErrForbidden)
	if got, want := allMembers(t, admin), lines(
		"carol 1 member hand", "carol 2 admin hand default", "dave 1 member hand", "erin 1 member hand default", "erin 2 member hand"); got != want {
		t.Errorf("members are\n%s\nwant\n%s", got, want)
	}
}

func TestMembershipsTellTheirSource(t *testing.T) {
	t.Parallel()
	_, tn, a, b := syncFleet(t)
	c := tn.Catalog()
	mustAdd(t, tn, tenancy.Membership{User: "carol", Tenant: a}, tenancy.Membership{User: "carol", Tenant: b, Source: "scim"})
	mustSync(t, tn, []tenancy.Membership{{User: "dave", Tenant: a, Role: tenancy.RoleAdmin}}, tenancy.Synced{Added: 1})
	want := map[tenancy.ID][]tenancy.Membership{
		a: {{User: "carol", Tenant: a, Role: tenancy.RoleMember, Default: true}, {User: "dave", Tenant: a, Role: tenancy.RoleAdmin, Source: "ldap", Default: true}},
		b: {{User: "carol", Tenant: b, Role: tenancy.RoleMember, Source: "scim"}},
	}
	for id, list := range want {
		var got []tenancy.Membership
		for m, err := range c.Members(t.Context(), id) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, m)
		}
		if !slices.Equal(got, list) {
			t.Errorf("members of %d are %+v, want %+v", id, got, list)
		}
	}
	for user, list := range map[tenancy.UserKey][]tenancy.Membership{"carol": {want[a][0], want[b][0]}, "dave": {want[a][1]}} {
		if got, err := c.TenantsOf(t.Context(), user); err != nil || !slices.Equal(got, list) {
			t.Errorf("tenants of %s are %+v, %v; want %+v", user, got, err, list)
		}
	}
}

func TestAMembershipGoesToWhoSpeaksLast(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	admin := f.Admin(t, "primary")
	set := []tenancy.Membership{{User: "carol", Tenant: a}, {User: "dave", Tenant: a}, {User: "carol", Tenant: b}}
	mustSync(t, tn, set, tenancy.Synced{Added: 3})
	// By hand over the directory: it is nobody else's from then on, whether the directory has it or not.
	mustAdd(t, tn, tenancy.Membership{User: "carol", Tenant: a, Role: tenancy.RoleAdmin})
	want := lines("carol 1 admin hand default", "carol 2 member ldap", "dave 1 member ldap default")
	for _, step := range []struct {
		set  []tenancy.Membership
		want tenancy.Synced
	}{{set, tenancy.Synced{Kept: 1}}, {set[1:], tenancy.Synced{}}} {
		mustSync(t, tn, step.set, step.want)
		if got := allMembers(t, admin); got != want {
			t.Errorf("members are\n%s\nwant\n%s", got, want)
		}
	}
	// And back: the directory has it again, and its next set counts.
	mustAdd(t, tn, tenancy.Membership{User: "carol", Tenant: a, Source: "ldap"})
	mustSync(t, tn, set, tenancy.Synced{})
	mustSync(t, tn, set[1:], tenancy.Synced{Removed: 1})
	if got, want := allMembers(t, admin), lines("carol 2 member ldap", "dave 1 member ldap default"); got != want {
		t.Errorf("members are\n%s\nwant\n%s", got, want)
	}
}
