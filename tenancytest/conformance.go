package tenancytest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/msmt-go/tenancy"
)

// Population is what a store holds for [TestStore].
type Population struct {
	Tenants []Inhabited
}

// Inhabited is one tenant of a [Population].
type Inhabited struct {
	Name    string
	State   tenancy.State // StateActive or StateSuspended
	Domains []string
	Members []tenancy.Membership // their Tenant is 0: it is this one
}

// TestStore checks an implementation of [tenancy.Store]. open returns a store that holds exactly p, under IDs of its own.
func TestStore(t *testing.T, open func(t *testing.T, p Population) tenancy.Store) {
	t.Helper()
	store := open(t, Population{Tenants: []Inhabited{
		{Name: "acme", State: tenancy.StateActive, Domains: []string{"acme.example.com", "www.acme.test"}, Members: []tenancy.Membership{
			{User: "alice", Role: tenancy.RoleAdmin, Default: true}, {User: "carol", Role: tenancy.RoleMember}}},
		{Name: "globex", State: tenancy.StateActive, Domains: []string{"globex.example.com"}, Members: []tenancy.Membership{
			{User: "bob", Role: tenancy.RoleMember, Default: true}, {User: "carol", Role: tenancy.RoleAdmin, Default: true}}},
		{Name: "initech", State: tenancy.StateSuspended},
	}})
	ids := map[string]tenancy.ID{}
	t.Run("names", func(t *testing.T) {
		for _, name := range []string{"acme", "globex", "initech"} {
			byName, err := store.TenantByName(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			if byName.Name != name || byName.ID <= 0 {
				t.Errorf("TenantByName(%q): got %q, id %d", name, byName.Name, byName.ID)
			}
			byID, err := store.Tenant(t.Context(), byName.ID)
			if err != nil || byID.ID != byName.ID || byID.Name != name {
				t.Errorf("Tenant(%d): got %q, id %d, %v", byName.ID, byID.Name, byID.ID, err)
			}
			ids[name] = byName.ID
		}
		if ids["acme"] == ids["globex"] || ids["globex"] == ids["initech"] {
			t.Errorf("tenants share an ID: %v", ids)
		}
	})
	t.Run("states", func(t *testing.T) {
		for name, want := range map[string]tenancy.State{"acme": tenancy.StateActive, "initech": tenancy.StateSuspended} {
			if got, err := store.Tenant(t.Context(), ids[name]); err != nil || got.State != want {
				t.Errorf("%s: got state %q, %v; want %q", name, got.State, err, want)
			}
		}
	})
	t.Run("domains", func(t *testing.T) {
		for domain, name := range map[string]string{"acme.example.com": "acme", "www.acme.test": "acme", "globex.example.com": "globex"} {
			if got, err := store.TenantByDomain(t.Context(), domain); err != nil || got.ID != ids[name] {
				t.Errorf("%s: got tenant id %d, %v; want %d", domain, got.ID, err, ids[name])
			}
		}
	})
	t.Run("what_does_not_exist_is_ErrTenantNotFound", func(t *testing.T) {
		missing := func(what string, got tenancy.Tenant, err error) {
			t.Helper()
			if !errors.Is(err, tenancy.ErrTenantNotFound) {
				t.Errorf("%s: got tenant id %d, %v; want tenancy.ErrTenantNotFound", what, got.ID, err)
			}
		}
		for _, name := range []string{"nosuch", "ACME", "acm", "acme "} {
			got, err := store.TenantByName(t.Context(), name)
			missing("name "+name, got, err)
		}
		for _, domain := range []string{"nosuch.example.com", "example.com", "acme.example.co"} {
			got, err := store.TenantByDomain(t.Context(), domain)
			missing("domain "+domain, got, err)
		}
		for _, id := range []tenancy.ID{0, -1, 1 << 62} {
			got, err := store.Tenant(t.Context(), id)
			missing("id", got, err)
		}
	})
	t.Run("memberships", func(t *testing.T) {
		for user, want := range map[tenancy.UserKey][]tenancy.Membership{
			"alice":  {{Tenant: ids["acme"], Role: tenancy.RoleAdmin, Default: true}},
			"bob":    {{Tenant: ids["globex"], Role: tenancy.RoleMember, Default: true}},
			"carol":  {{Tenant: ids["acme"], Role: tenancy.RoleMember}, {Tenant: ids["globex"], Role: tenancy.RoleAdmin, Default: true}},
			"nobody": nil, "Alice": nil, "ali": nil, "alice ": nil,
		} {
			got, err := store.TenantsOf(t.Context(), user)
			if err != nil {
				t.Errorf("%q: %v", user, err)
				continue
			}
			for i := range got {
				if got[i].User != user {
					t.Errorf("%q: got a membership of %q", user, got[i].User)
				}
				got[i].User, got[i].Source = "", ""
			}
			slices.SortFunc(got, func(a, b tenancy.Membership) int { return int(a.Tenant - b.Tenant) })
			slices.SortFunc(want, func(a, b tenancy.Membership) int { return int(a.Tenant - b.Tenant) })
			if !slices.Equal(got, want) {
				t.Errorf("%q: got %+v, want %+v", user, got, want)
			}
		}
	})
	t.Run("an_ended_context_is_no_answer", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := store.TenantByName(ctx, "acme"); errors.Is(err, tenancy.ErrTenantNotFound) {
			t.Error("a cancelled look-up says that the tenant does not exist")
		}
		if list, err := store.TenantsOf(ctx, "alice"); err == nil && len(list) == 0 {
			t.Error("a cancelled look-up says that the user belongs nowhere")
		}
	})
	t.Run("many_at_once", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range 20 {
					if list, err := store.TenantsOf(t.Context(), "carol"); err != nil || len(list) != 2 {
						t.Errorf("got %d memberships, %v", len(list), err)
					}
					if got, err := store.TenantByName(t.Context(), "globex"); err != nil || got.ID != ids["globex"] {
						t.Errorf("got tenant id %d, %v", got.ID, err)
					}
				}
			})
		}
		wg.Wait()
	})
}
