package tenancytest

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"github.com/msmt-go/tenancy"
)

// Store is a [tenancy.Store] in memory, for tests that want to say who belongs where without writing to the primary, or what happens
// when the store is down. The tenants themselves must be in the primary, under the same IDs. It is safe for concurrent use;
// the zero Store is empty.
type Store struct {
	mu      sync.Mutex
	tenants map[tenancy.ID]tenancy.Tenant
	domains map[string]tenancy.ID
	members map[tenancy.UserKey][]tenancy.Membership
	down    error
}

var _ tenancy.Store = (*Store)(nil)

// PutTenant adds a tenant with its domains, or replaces the one with its ID.
func (s *Store) PutTenant(t tenancy.Tenant, domains ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tenants == nil {
		s.tenants, s.domains = map[tenancy.ID]tenancy.Tenant{}, map[string]tenancy.ID{}
	}
	s.tenants[t.ID] = t
	for domain, id := range s.domains {
		if id == t.ID {
			delete(s.domains, domain)
		}
	}
	for _, domain := range domains {
		s.domains[domain] = t.ID
	}
}

// PutMember adds a membership, or replaces the user's in that tenant. A default takes the place of another.
func (s *Store) PutMember(m tenancy.Membership) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.members == nil {
		s.members = map[tenancy.UserKey][]tenancy.Membership{}
	}
	m.Role = cmp.Or(m.Role, tenancy.RoleMember)
	list := without(s.members[m.User], m.Tenant)
	if m.Default {
		for i := range list {
			list[i].Default = false
		}
	}
	list = append(list, m)
	slices.SortFunc(list, func(a, b tenancy.Membership) int { return cmp.Compare(a.Tenant, b.Tenant) })
	s.members[m.User] = list
}

// RemoveMember takes a user out of a tenant.
func (s *Store) RemoveMember(id tenancy.ID, user tenancy.UserKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.members[user] = without(s.members[user], id)
}

// without returns a copy: lists that were handed out stay as they are.
func without(list []tenancy.Membership, id tenancy.ID) []tenancy.Membership {
	return slices.DeleteFunc(slices.Clone(list), func(m tenancy.Membership) bool { return m.Tenant == id })
}

// Fail lets every call fail with err, until Fail(nil).
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = err
}

// Tenant implements [tenancy.Store].
func (s *Store) Tenant(_ context.Context, id tenancy.ID) (tenancy.Tenant, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tenantLocked(id)
}

func (s *Store) tenantLocked(id tenancy.ID) (tenancy.Tenant, error) {
	if s.down != nil {
		return tenancy.Tenant{}, s.down
	}
	t, ok := s.tenants[id]
	if !ok {
		return tenancy.Tenant{}, tenancy.ErrTenantNotFound
	}
	return t, nil
}

// TenantByName implements [tenancy.Store].
func (s *Store) TenantByName(_ context.Context, name string) (tenancy.Tenant, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var id tenancy.ID
	for _, t := range s.tenants {
		if t.Name == name {
			id = t.ID
		}
	}
	return s.tenantLocked(id)
}

// TenantByDomain implements [tenancy.Store].
func (s *Store) TenantByDomain(_ context.Context, domain string) (tenancy.Tenant, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tenantLocked(s.domains[domain])
}

// TenantsOf implements [tenancy.Store].
func (s *Store) TenantsOf(_ context.Context, user tenancy.UserKey) ([]tenancy.Membership, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down != nil {
		return nil, s.down
	}
	return slices.Clone(s.members[user]), nil
}
