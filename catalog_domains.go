package tenancy

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// AddDomain lets a host name stand for a tenant. It is stored in its canonical form: lower case, no trailing dot, no port.
// A tenant's first domain is its primary one. A domain that the tenant has already changes nothing.
// The error is [ErrInvalid], [ErrTenantExists] (another tenant has the domain), [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) AddDomain(ctx context.Context, id ID, domain string) error {
	const op = "add domain"
	canonical, err := ident.Domain(domain)
	if err != nil {
		return &Error{Op: op, Tenant: id, Err: invalid(fmt.Errorf("domain: %w", err))}
	}
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		if _, err := lockRow(ctx, tx, id); err != nil {
			return err
		}
		if added, err := addDomain(ctx, tx, id, canonical); err != nil || !added {
			return err
		}
		return changed(ctx, tx, "domain", id, canonical)
	})
}

// addDomain runs under the lock of the tenant's row, as everything that adds, removes or prefers one of its domains.
func addDomain(ctx context.Context, tx pgx.Tx, id ID, domain string) (added bool, err error) {
	var holder ID
	err = tx.QueryRow(ctx, `INSERT INTO tenancy.domains AS d (domain, tenant) VALUES ($1, $2)
		ON CONFLICT (domain) DO UPDATE SET tenant = d.tenant WHERE d.tenant <> excluded.tenant RETURNING tenant`, domain, id).Scan(&holder)
	switch {
	case errors.Is(err, pgx.ErrNoRows): // it is this tenant's already
		return false, nil
	case err != nil:
		return false, err
	case holder != id:
		return false, hinted(ErrTenantExists, "the domain %s belongs to another tenant", domain)
	}
	if err := promote(ctx, tx, id); err != nil {
		return false, err
	}
	return true, audit(ctx, tx, "add domain", id, map[string]any{"domain": domain})
}

// promote makes the oldest domain of a tenant that has no primary one the primary one: the first that is added, one
// that is left, and one that a node of a release without primary domains has left so.
func promote(ctx context.Context, tx pgx.Tx, id ID) error {
	_, err := tx.Exec(ctx, `UPDATE tenancy.domains SET is_primary = true
		WHERE domain = (SELECT domain FROM tenancy.domains WHERE tenant = $1 ORDER BY created, domain LIMIT 1)
			AND NOT EXISTS (SELECT FROM tenancy.domains WHERE tenant = $1 AND is_primary)`, id)
	return err
}

// SetPrimaryDomain makes one of the tenant's domains its primary one, in the place of another.
// The error is [ErrInvalid] (also for a domain that the tenant does not have), [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) SetPrimaryDomain(ctx context.Context, id ID, domain string) error {
	const op = "set primary domain"
	canonical, err := ident.Domain(domain)
	if err != nil {
		return &Error{Op: op, Tenant: id, Err: invalid(fmt.Errorf("domain: %w", err))}
	}
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		if _, err := lockRow(ctx, tx, id); err != nil {
			return err
		}
		if set, err := setPrimary(ctx, tx, id, canonical); err != nil || !set {
			return err
		}
		if err := audit(ctx, tx, op, id, map[string]any{"domain": canonical}); err != nil {
			return err
		}
		return changed(ctx, tx, "domain", id, canonical)
	})
}

// setPrimary reports false for a domain that is the primary one already.
func setPrimary(ctx context.Context, tx pgx.Tx, id ID, domain string) (set bool, err error) {
	var already bool
	err = tx.QueryRow(ctx, `SELECT is_primary FROM tenancy.domains WHERE tenant = $1 AND domain = $2`, id, domain).Scan(&already)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return false, hinted(ErrInvalid, "domain: %s is not one of the tenant's; add it first", domain)
	case err != nil || already:
		return false, err
	}
	// Two statements: the index that allows one primary domain looks at each row as it is written.
	if _, err := tx.Exec(ctx, `UPDATE tenancy.domains SET is_primary = false WHERE tenant = $1 AND is_primary`, id); err != nil {
		return false, err
	}
	_, err = tx.Exec(ctx, `UPDATE tenancy.domains SET is_primary = true WHERE tenant = $1 AND domain = $2`, id, domain)
	return true, err
}

// Domains returns the tenant's domains, the primary one first and the others in order; none is no error.
func (c *Catalog) Domains(ctx context.Context, id ID) ([]string, error) {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT domain FROM tenancy.domains WHERE tenant = $1 ORDER BY is_primary DESC, domain`, id)
	domains, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return domains, unavailable("read domains", err)
}

// TenantByDomain is [Catalog.Tenant] by one of the tenant's domains, in whatever spelling.
// The error is [ErrInvalid] for what is no domain, [ErrTenantNotFound] or [ErrPrimaryUnavailable].
func (c *Catalog) TenantByDomain(ctx context.Context, domain string) (Tenant, error) {
	canonical, err := ident.Domain(domain)
	if err != nil {
		return Tenant{}, &Error{Op: "read tenant", Err: invalid(fmt.Errorf("domain: %w", err))}
	}
	return c.tenant(ctx, `t.id = (SELECT d.tenant FROM tenancy.domains d WHERE d.domain = $1)`, canonical)
}

// RemoveDomain frees a domain; one that no tenant has is no error. When it was a tenant's primary one, the oldest of the
// tenant's others takes its place. The error is [ErrInvalid] or [ErrPrimaryUnavailable].
func (c *Catalog) RemoveDomain(ctx context.Context, domain string) error {
	const op = "remove domain"
	canonical, err := ident.Domain(domain)
	if err != nil {
		return &Error{Op: op, Err: invalid(fmt.Errorf("domain: %w", err))}
	}
	return c.write(ctx, op, 0, func(tx pgx.Tx) error {
		var id ID
		err := tx.QueryRow(ctx, `SELECT t.id FROM tenancy.tenants t JOIN tenancy.domains d ON d.tenant = t.id
			WHERE d.domain = $1 FOR NO KEY UPDATE OF t`, canonical).Scan(&id)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		} else if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `DELETE FROM tenancy.domains WHERE domain = $1 AND tenant = $2`, canonical, id)
		if err != nil || tag.RowsAffected() == 0 { // who held the lock before has removed it
			return err
		}
		if err := promote(ctx, tx, id); err != nil {
			return err
		}
		if err := audit(ctx, tx, op, id, map[string]any{"domain": canonical}); err != nil {
			return err
		}
		return changed(ctx, tx, "domain", id, canonical)
	})
}
