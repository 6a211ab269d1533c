package tenancytest_test

import (
	"errors"
	"testing"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestTheStoreInMemoryIsAStore(t *testing.T) {
	tenancytest.TestStore(t, func(t *testing.T, p tenancytest.Population) tenancy.Store {
		s := &tenancytest.Store{}
		for n, in := range p.Tenants {
			id := tenancy.ID(n + 1)
			s.PutTenant(tenancy.Tenant{ID: id, Name: in.Name, State: in.State}, in.Domains...)
			for _, m := range in.Members {
				m.Tenant = id
				s.PutMember(m)
			}
		}
		return s
	})
}

func TestTheStoreInMemoryChangesAndFails(t *testing.T) {
	var s tenancytest.Store
	if _, err := s.TenantByName(t.Context(), ""); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("the zero store: %v", err)
	}
	s.PutTenant(tenancy.Tenant{ID: 1, Name: "acme"}, "old.test")
	s.PutTenant(tenancy.Tenant{ID: 1, Name: "acme"}, "new.test")
	if _, err := s.TenantByDomain(t.Context(), "old.test"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("a domain that was taken away: %v", err)
	}
	s.PutMember(tenancy.Membership{User: "u", Tenant: 1, Default: true})
	s.PutMember(tenancy.Membership{User: "u", Tenant: 2, Default: true})
	list, err := s.TenantsOf(t.Context(), "u")
	if err != nil || len(list) != 2 || list[0].Default || !list[1].Default {
		t.Errorf("two defaults: %+v, %v", list, err)
	}
	s.RemoveMember(1, "u")
	if len(list) != 2 || list[0].Tenant != 1 {
		t.Error("a list that was handed out has changed")
	}
	down := errors.New("down")
	s.Fail(down)
	if _, err := s.TenantsOf(t.Context(), "u"); !errors.Is(err, down) {
		t.Errorf("a failing store: %v", err)
	}
}
