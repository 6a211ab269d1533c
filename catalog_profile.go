package tenancy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Profile is what the catalog keeps of a tenant beside what decides on its requests.
type Profile struct {
	DisplayName string         // free text of at most 200 bytes
	MaxUsers    int            // refused beyond when a member is added; 0: no limit
	Attributes  map[string]any // the service's own, JSON of at most 64 KB

	// By the primary's clock; SetProfile does not look at them. Deleted is zero for a tenant that is not, and PurgeAfter, the end of the quarantine, for one that is in none.
	Created, Updated, Deleted, PurgeAfter time.Time
}

func (p *Profile) check() (err error) {
	if p.DisplayName, err = ident.DisplayName(p.DisplayName); err != nil {
		return invalid(fmt.Errorf("display name: %w", err))
	}
	if p.MaxUsers < 0 || p.MaxUsers > 1<<31-1 {
		return invalid(fmt.Errorf("max users: %d is not from 0 to %d", p.MaxUsers, 1<<31-1))
	}
	if p.Attributes == nil {
		p.Attributes = map[string]any{}
	}
	if text, err := json.Marshal(p.Attributes); err != nil || len(text) > 64<<10 {
		return invalid(errors.New("attributes: JSON of at most 64 KB"))
	}
	return nil
}

// Profile returns the tenant's profile. The error is [ErrTenantNotFound] or [ErrPrimaryUnavailable].
func (c *Catalog) Profile(ctx context.Context, id ID) (p Profile, err error) {
	var deleted, after *time.Time
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT display_name, coalesce(max_users, 0), attributes, created, updated, deleted, CASE WHEN state = 'deleted' THEN deleted + quarantine END
		FROM tenancy.tenants WHERE id = $1`, id).Scan(&p.DisplayName, &p.MaxUsers, &p.Attributes, &p.Created, &p.Updated, &deleted, &after)
	if deleted != nil {
		p.Deleted = *deleted
	}
	if after != nil {
		p.PurgeAfter = *after
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return p, &Error{Op: "read profile", Tenant: id, Err: ErrTenantNotFound}
	}
	return p, unavailable("read profile", err)
}

// SetProfile replaces the tenant's profile. A MaxUsers below the number of members removes nobody. The error is
// [ErrInvalid], [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) SetProfile(ctx context.Context, id ID, p Profile) error {
	const op = "set profile"
	if err := p.check(); err != nil {
		return &Error{Op: op, Tenant: id, Err: err}
	}
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		if _, err := lockRow(ctx, tx, id); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET display_name = $2, max_users = nullif($3::integer, 0), attributes = $4, updated = now() WHERE id = $1`,
			id, p.DisplayName, p.MaxUsers, p.Attributes); err != nil {
			return err
		}
		if err := audit(ctx, tx, op, id, nil); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}
