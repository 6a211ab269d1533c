package tenancy_test

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy"
)

func TestAProfileIsKeptAndReplaced(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c := tn.Catalog()
	want := tenancy.Profile{DisplayName: "Acme & Söhne", MaxUsers: 2, Attributes: map[string]any{"plan": "gold", "seats": 3.0}}
	if err := c.SetProfile(t.Context(), acme.ID, want); err != nil {
		t.Fatal(err)
	}
	got, err := c.Profile(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got.DisplayName != want.DisplayName || got.MaxUsers != 2 || !maps.Equal(got.Attributes, want.Attributes) || !got.Updated.After(got.Created) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if other, err := c.Profile(t.Context(), globex.ID); err != nil || other.DisplayName != "" || len(other.Attributes) != 0 {
		t.Errorf("another tenant's profile: %+v, %v", other, err)
	}
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if now, _ := tenancy.TenantFrom(ctx); now.DisplayName != want.DisplayName {
		t.Errorf("sessions still show %q", now.DisplayName)
	}
	if err := c.AddMember(t.Context(), tenancy.Membership{User: "bob", Tenant: acme.ID}); err != nil {
		t.Fatal(err)
	}
	if err := c.AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: acme.ID}); !errors.Is(err, tenancy.ErrUserLimit) {
		t.Errorf("a third user of two: %v", err)
	}
	for name, bad := range map[string]tenancy.Profile{
		"negative_limit":  {MaxUsers: -1},
		"huge_attributes": {Attributes: map[string]any{"x": strings.Repeat("x", 65<<10)}},
		"not_json":        {Attributes: map[string]any{"x": func() {}}},
		"nul":             {Attributes: map[string]any{"x": "a\x00b"}},
		"control":         {DisplayName: "a\nb"},
	} {
		if err := c.SetProfile(t.Context(), acme.ID, bad); !errors.Is(err, tenancy.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := c.Profile(t.Context(), 4711); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("a missing tenant: %v", err)
	}
	if domains, err := c.Domains(t.Context(), acme.ID); err != nil || !slices.Equal(domains, []string{"acme.example.com"}) {
		t.Errorf("domains %v, %v", domains, err)
	}
}
