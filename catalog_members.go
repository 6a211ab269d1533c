package tenancy

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Membership says that a user belongs to a tenant.
type Membership struct {
	User    UserKey
	Tenant  ID
	Role    Role   // default RoleMember
	Source  string // who says so, such as "ldap", in at most 64 bytes; default "", by hand
	Default bool   // the tenant for requests of this user that name none; at most one per user
}

// check names the field and the rule that a membership breaks, and fills the defaults in.
func (m *Membership) check() error {
	def(&m.Role, RoleMember)
	if err := ident.UserKey(string(m.User)); err != nil {
		return fmt.Errorf("user key: %w", err)
	}
	if m.Role != RoleMember && m.Role != RoleAdmin {
		return fmt.Errorf("role: %q is neither member nor admin", m.Role)
	}
	return checkSource(m.Source)
}

func checkSource(source string) error {
	if len(source) > 64 || !utf8.ValidString(source) || strings.ContainsRune(source, 0) {
		return errors.New("source: at most 64 bytes of UTF-8")
	}
	return nil
}

// AddMember lets a user into a tenant, or changes the role and source of one who is in. A user's first membership
// becomes the default one, and with Default this one does in any case.
//
// Of two sources the last call wins. Without a Source it takes a directory's membership over by hand: [Catalog.SyncMembers]
// leaves it alone from then on. With one it hands a membership to that source, whose next sync removes it unless its set has it.
//
// The error is [ErrInvalid], [ErrUserLimit], [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) AddMember(ctx context.Context, m Membership) error {
	if err := m.check(); err != nil {
		return &Error{Op: "add member", Tenant: m.Tenant, Err: invalid(err)}
	}
	return c.write(ctx, "add member", m.Tenant, func(tx pgx.Tx) error {
		if state, err := lockRow(ctx, tx, m.Tenant); err != nil {
			return err
		} else if state == StateDeleted {
			return ErrTenantGone
		}
		if err := addMember(ctx, tx, m); err != nil {
			return err
		}
		return changed(ctx, tx, "member", m.Tenant, string(m.User))
	})
}

// addMember runs under the lock of the tenant's row, so that two at once cannot pass the limit together. Who calls it
// says so with changed, as the last of all statements: its lock comes after every other one.
func addMember(ctx context.Context, tx pgx.Tx, m Membership) error {
	var full bool
	err := tx.QueryRow(ctx, `SELECT t.max_users IS NOT NULL
			AND NOT EXISTS (SELECT FROM tenancy.memberships m WHERE m.tenant = t.id AND m.user_key = $2)
			AND (SELECT count(*) FROM tenancy.memberships m WHERE m.tenant = t.id) >= t.max_users
		FROM tenancy.tenants t WHERE t.id = $1`, m.Tenant, m.User).Scan(&full)
	if err != nil {
		return err
	}
	if full {
		return ErrUserLimit
	}
	if err := lockUser(ctx, tx, m.User); err != nil {
		return err
	}
	if m.Default {
		if _, err := takeDefault(ctx, tx, m.User); err != nil {
			return err
		}
	}
	if _, err := tx.Exec(ctx, `INSERT INTO tenancy.memberships AS m (user_key, tenant, role, source, is_default)
		VALUES ($1, $2, $3, $4, $5 OR NOT EXISTS (SELECT FROM tenancy.memberships WHERE user_key = $1))
		ON CONFLICT (user_key, tenant) DO UPDATE SET role = excluded.role, source = excluded.source, is_default = m.is_default OR $5`,
		m.User, m.Tenant, m.Role, m.Source, m.Default); err != nil {
		return err
	}
	return audit(ctx, tx, "add member", m.Tenant, map[string]any{"user": m.User, "role": m.Role})
}

// lockUser lets one transaction at a time change a user's memberships: the default must stay single.
func lockUser(ctx context.Context, tx pgx.Tx, user UserKey) error {
	_, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('tenancy user ' || $1, 0))`, user)
	return err
}

// takeDefault leaves the user without a default and returns the tenant that was it, 0 when none was.
func takeDefault(ctx context.Context, tx pgx.Tx, user UserKey) (was ID, err error) {
	err = tx.QueryRow(ctx, `UPDATE tenancy.memberships SET is_default = false WHERE user_key = $1 AND is_default RETURNING tenant`, user).Scan(&was)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	}
	return was, err
}

// RemoveMember takes a user out of a tenant; one who is not in is no error. The next request of the
// user is refused on every node. A user whose default membership it was is left without one; a membership that
// the set of [Catalog.SyncMembers] still has is back at the next sync.
// The error is [ErrPrimaryUnavailable].
func (c *Catalog) RemoveMember(ctx context.Context, id ID, user UserKey) error {
	return c.write(ctx, "remove member", id, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `DELETE FROM tenancy.memberships WHERE tenant = $1 AND user_key = $2`, id, user)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		if err := audit(ctx, tx, "remove member", id, map[string]any{"user": user}); err != nil {
			return err
		}
		return changed(ctx, tx, "member", id, string(user))
	})
}

// SetDefault makes one of the user's tenants the one for requests that name none. With id 0 it takes the default away:
// a user of several tenants then gets [ErrAmbiguousTenant] until a request names one; a user of one is in that one all the same.
// The error is [ErrForbidden] when the user does not belong to the tenant, or [ErrPrimaryUnavailable].
func (c *Catalog) SetDefault(ctx context.Context, user UserKey, id ID) error {
	return c.write(ctx, "set default", id, func(tx pgx.Tx) error {
		if err := lockUser(ctx, tx, user); err != nil {
			return err
		}
		was, err := takeDefault(ctx, tx, user)
		switch {
		case err != nil:
			return err
		case id == 0 && was == 0:
			return nil
		case id == 0: // with its tenant, whose purge takes the user's key out of the changes
			return changed(ctx, tx, "member", was, string(user))
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.memberships SET is_default = true WHERE user_key = $1 AND tenant = $2`, user, id)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return ErrForbidden
		}
		return changed(ctx, tx, "member", id, string(user))
	})
}

// Members iterates over a tenant's members in order of their keys.
func (c *Catalog) Members(ctx context.Context, id ID) iter.Seq2[Membership, error] {
	return func(yield func(Membership, error) bool) {
		list, err := c.memberships(ctx, `tenant = $1`, id)
		if err != nil {
			yield(Membership{}, err)
			return
		}
		for _, m := range list {
			if !yield(m, nil) {
				return
			}
		}
	}
}

// TenantsOf returns the memberships of a user in order of tenant ID, those in tenants out of service and in deleted ones included; none is no error.
func (c *Catalog) TenantsOf(ctx context.Context, user UserKey) ([]Membership, error) {
	return c.memberships(ctx, `user_key = $1`, user)
}

func (c *Catalog) memberships(ctx context.Context, where string, arg any) ([]Membership, error) {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT user_key, tenant, role, source, is_default
		FROM tenancy.memberships WHERE `+where+` ORDER BY user_key, tenant`, arg)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Membership])
	return list, refusal("read memberships", err)
}
