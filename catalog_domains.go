package tenancy

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// AddDomain lets a host name stand for a tenant. It is stored in its canonical form: lower case, no trailing dot, no port.
// The error is [ErrInvalid], [ErrTenantExists] (another tenant has the domain), [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) AddDomain(ctx context.Context, id ID, domain string) error {
	canonical, err := ident.Domain(domain)
	if err != nil {
		return &Error{Op: "add domain", Tenant: id, Err: invalid(fmt.Errorf("domain: %w", err))}
	}
	return c.write(ctx, "add domain", id, func(tx pgx.Tx) error {
		if _, err := lockRow(ctx, tx, id); err != nil {
			return err
		}
		if err := addDomain(ctx, tx, id, canonical); err != nil {
			return err
		}
		return changed(ctx, tx, "domain", id, canonical)
	})
}

func addDomain(ctx context.Context, tx pgx.Tx, id ID, domain string) error {
	var holder ID
	err := tx.QueryRow(ctx, `INSERT INTO tenancy.domains AS d (domain, tenant) VALUES ($1, $2)
		ON CONFLICT (domain) DO UPDATE SET tenant = d.tenant RETURNING tenant`, domain, id).Scan(&holder)
	if err != nil {
		return err
	}
	if holder != id {
		return hinted(ErrTenantExists, "the domain %s belongs to another tenant", domain)
	}
	return audit(ctx, tx, "add domain", id, map[string]any{"domain": domain})
}

// Domains returns the tenant's domains in order; none is no error.
func (c *Catalog) Domains(ctx context.Context, id ID) ([]string, error) {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT domain FROM tenancy.domains WHERE tenant = $1 ORDER BY domain`, id)
	domains, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return domains, unavailable("read domains", err)
}

// RemoveDomain frees a domain; one that no tenant has is no error.
func (c *Catalog) RemoveDomain(ctx context.Context, domain string) error {
	canonical, err := ident.Domain(domain)
	if err != nil {
		return &Error{Op: "remove domain", Err: invalid(fmt.Errorf("domain: %w", err))}
	}
	return c.write(ctx, "remove domain", 0, func(tx pgx.Tx) error {
		var id ID
		err := tx.QueryRow(ctx, `DELETE FROM tenancy.domains WHERE domain = $1 RETURNING tenant`, canonical).Scan(&id)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		} else if err != nil {
			return err
		}
		if err := audit(ctx, tx, "remove domain", id, map[string]any{"domain": canonical}); err != nil {
			return err
		}
		return changed(ctx, tx, "domain", id, canonical)
	})
}

// TenantByDomain returns the tenant of a domain.
func (c *Catalog) TenantByDomain(ctx context.Context, domain string) (Tenant, error) {
	return c.tenant(ctx, `t.id = (SELECT d.tenant FROM tenancy.domains d WHERE d.domain = $1)`, domain)
}
