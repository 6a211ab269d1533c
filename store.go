package tenancy

import (
	"context"
	"errors"
	"fmt"
)

// Store is the reading side of the catalog that resolution needs: which tenants there are, under which names and
// domains, and who belongs to them. The primary is the default one ([*Catalog] is a Store); Config.Store puts another in
// its place, such as a company's directory.
//
// A tenant's data is reached through the primary all the same: its ID, UID, state and data source must be there, and a tenant
// is served only where the store and the primary both say so. The ID that a store answers is the primary's.
//
// A store is asked on a miss alone, concurrently, with a ctx that ends after Lookups.Timeout and that it must heed: others wait for it. What it answers is
// believed for Lookups.StoreTTL, because it announces no changes. What does not exist is [ErrTenantNotFound], and a
// user without memberships an empty list; every other error is 503 for the request and is never remembered.
// tenancytest.TestStore checks an implementation.
type Store interface {
	// Tenant returns the tenant; its ID, Name and State count, and its UID where it has one. Names are unique.
	Tenant(ctx context.Context, id ID) (Tenant, error)
	// TenantByName returns the tenant of a name, compared byte by byte.
	TenantByName(ctx context.Context, name string) (Tenant, error)
	// TenantByDomain returns the tenant of a domain: lower case, no trailing dot, no port.
	TenantByDomain(ctx context.Context, domain string) (Tenant, error)
	// TenantsOf returns the user's memberships, each with its User, at most one per tenant and at most one default. Keys are compared byte by byte.
	TenantsOf(ctx context.Context, user UserKey) ([]Membership, error)
}

var _ Store = (*Catalog)(nil)

// heed makes the record say what the store says of the tenant, where that is stricter.
func (r *record) heed(t Tenant, err error) error {
	switch {
	case errors.Is(err, ErrTenantNotFound):
		r.tenant.State = StateDeleted
		return nil
	case err != nil:
		return fmt.Errorf("Config.Store: %w", err)
	case t.ID != r.tenant.ID || t.UID != UID{} && t.UID != r.tenant.UID:
		return fmt.Errorf("Config.Store: asked for tenant id %d, it answered with id %d or another UID", r.tenant.ID, t.ID)
	}
	if t.Name != "" {
		r.tenant.Name = t.Name
	}
	if r.tenant.State == StateActive && t.State != StateActive {
		r.tenant.State = t.State
	}
	return nil
}

// known tells a store's "no such tenant" from its failure.
func known(t Tenant, err error) (ID, bool, error) {
	switch {
	case errors.Is(err, ErrTenantNotFound):
		return 0, false, nil
	case err != nil:
		return 0, false, fmt.Errorf("Config.Store: %w", err)
	}
	return t.ID, t.ID > 0, nil
}

// membersOf takes a store's memberships, and refuses a list that would decide by its order.
func membersOf(user UserKey, list []Membership, err error) ([]*member, bool, error) {
	if err != nil {
		return nil, false, fmt.Errorf("Config.Store: %w", err)
	}
	seen, defaults := map[ID]bool{}, 0
	members := make([]*member, 0, len(list))
	for _, m := range list {
		if m.Default {
			defaults++
		}
		if m.User != user || m.Tenant <= 0 || seen[m.Tenant] || defaults > 1 || m.check() != nil {
			return nil, false, fmt.Errorf("Config.Store: a user's memberships are not valid: that in tenant id %d is another user's, is named twice, is a second default or has an unknown role", m.Tenant)
		}
		seen[m.Tenant] = true
		members = append(members, &member{tenant: m.Tenant, role: m.Role, isDefault: m.Default})
	}
	return members, len(members) > 0, nil
}
