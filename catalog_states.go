package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// Suspension says why a tenant is not served, to its members and to the operator.
type Suspension struct {
	Message     string        // shown to the tenant's members; at most 500 bytes; "" shows none
	Maintenance bool          // true: StateMaintenance, 503 with RetryAfter; false: StateSuspended, 403
	RetryAfter  time.Duration // for maintenance; 0 means 60 s
	Drain       time.Duration // what work in flight has to finish; 0 means Config.DrainTimeout, 1 ns is at once
}

// Suspend takes a tenant out of service on every node and at the server: new work is refused
// once every node has heard (5 s at most), then the tenant's logins are closed, statements and
// transactions in flight have s.Drain to finish, and all sessions end, also those of a node that hears nothing. Data stays.
//
// When it returns nil, no session of the tenant is left. With [ErrNoProvisioner] the catalog and the nodes refuse the tenant,
// and sessions at the server were not ended. Other errors: [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady], [ErrInvalid], [ErrPrimaryUnavailable].
func (c *Catalog) Suspend(ctx context.Context, id ID, s Suspension) error {
	state := StateSuspended
	def(&s.Drain, c.tn.cfg.DrainTimeout)
	if s.Maintenance {
		state = StateMaintenance
		def(&s.RetryAfter, time.Minute)
	}
	if len(s.Message) > 500 || !utf8.ValidString(s.Message) || strings.ContainsRune(s.Message, 0) {
		return &Error{Op: "suspend", Tenant: id, Err: invalid(errors.New("message: at most 500 bytes of UTF-8"))}
	}
	if s.RetryAfter < 0 || s.RetryAfter > 30*24*time.Hour {
		return &Error{Op: "suspend", Tenant: id, Err: invalid(errors.New("retry after: from 0 to 30 days"))}
	}
	if s.Drain < 0 || s.Drain > time.Hour {
		return &Error{Op: "suspend", Tenant: id, Err: invalid(errors.New("drain: from 0 to 1 hour"))}
	}
	return c.withdraw(ctx, "suspend", id, state, s)
}

// Delete takes a tenant into quarantine: as Suspend with the default drain, and for good. Its data, name, domains and memberships are kept until
// [Catalog.Purge], which waits for Config.Quarantine; [Catalog.Restore] takes it back. Its members are refused with [ErrTenantGone], and TenantsOf goes on
// listing the membership. It may be called again, and the quarantine ends when it would have.
// The errors are those of Suspend.
func (c *Catalog) Delete(ctx context.Context, id ID) error {
	return c.withdraw(ctx, "delete", id, StateDeleted, Suspension{Drain: c.tn.cfg.DrainTimeout})
}

// withdraw changes the state first (no node hands out a connection any more), then waits for the nodes, then fences at the server.
func (c *Catalog) withdraw(ctx context.Context, op string, id ID, to State, s Suspension) error {
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	err = c.write(ctx, op, id, func(tx pgx.Tx) error {
		from, err := lockRow(ctx, tx, id)
		switch {
		case err != nil:
			return err
		case from == StateDeleted && to != StateDeleted:
			return ErrTenantGone
		case from == StateProvisioning && to != StateDeleted:
			return ErrTenantNotReady
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = $2, message = $3, retry_after = $4, fenced = NULL, updated = now(),
			quarantine = CASE WHEN $2 = 'deleted' AND deleted IS NULL THEN $5 ELSE quarantine END,
			receipt = CASE WHEN $2 = 'deleted' AND deleted IS NULL THEN NULL ELSE receipt END,
			deleted = CASE WHEN $2 = 'deleted' THEN coalesce(deleted, now()) END WHERE id = $1`,
			id, to, s.Message, int(s.RetryAfter/time.Second), c.tn.cfg.Quarantine); err != nil {
			return err
		}
		if err := audit(ctx, tx, op, id, nil); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return err
	}
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if err := c.fenceTenant(ctx, p, s.Drain); err != nil {
		return fail(err)
	}
	return nil
}

// fenceTenant waits for the nodes, fences at the server and says so in the catalog, where the
// validity job looks for fences that a crash left out.
func (c *Catalog) fenceTenant(ctx context.Context, p *place, drain time.Duration) error {
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	places, err := c.placesOf(ctx, p.tenant)
	if err != nil {
		return err
	}
	var errs []error
	for _, at := range places { // one that cannot be reached keeps no other one open
		if err := fencePlace(ctx, at, atWork, drain); err != nil {
			errs = append(errs, fmt.Errorf("the nodes refuse the tenant, its sessions at %s were not ended: %w", at.source.Address(), err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	return c.writeFenced(ctx, p.tenant.ID)
}

// writeFenced says that all places of a tenant that is out of service are closed.
func (c *Catalog) writeFenced(ctx context.Context, id ID) error {
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.tenants SET fenced = now() WHERE id = $1 AND state IN ('suspended', 'maintenance', 'deleted')`, id)
	return unavailable("fence", err)
}

// Resume brings a suspended tenant back into service on every node.
// The error is [ErrTenantNotFound], [ErrTenantGone] (deleted: see Restore), [ErrTenantNotReady], [ErrNoProvisioner] or [ErrPrimaryUnavailable].
func (c *Catalog) Resume(ctx context.Context, id ID) error {
	const op = "resume"
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	return c.reopen(ctx, op, p, StateSuspended, StateMaintenance)
}

// Restore takes a deleted tenant out of quarantine and back into service. The errors are those of Resume, and
// [ErrInvalid] for a tenant that is suspended, or whose name was released; one that is purged, or whose purge has begun, is [ErrTenantGone].
func (c *Catalog) Restore(ctx context.Context, id ID) error {
	return c.restore(ctx, "restore", id, "")
}

// RestoreAs is Restore under another name, which is the tenant's from then on: for one whose name was released ([Catalog.ReleaseName]), and for any other
// deleted one. A domain that it had is added again by [Catalog.AddDomain]. It is [ErrTenantExists] when the name is taken, and nothing is changed then.
// If it dies half-way the tenant has the name and is deleted: Restore goes on.
func (c *Catalog) RestoreAs(ctx context.Context, id ID, name string) error {
	const op = "restore"
	if err := c.checkName(name); err != nil {
		return &Error{Op: op, Tenant: id, Err: err}
	}
	return c.restore(ctx, op, id, name)
}

// restore is reopen for a deleted tenant, after it was given the name; "" leaves it what it has.
func (c *Catalog) restore(ctx context.Context, op string, id ID, name string) error {
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if p.tenant.State == StateDeleted {
		_, begun, err := c.readReceipt(ctx, id)
		switch {
		case err != nil:
			return fail(err)
		case begun:
			return fail(errHalfPurged)
		case name == "" && isTombstone(p.tenant.Name):
			return fail(invalid(errors.New("name: it was released: Catalog.RestoreAs gives the tenant another one")))
		}
	}
	if name != "" && name != p.tenant.Name {
		err := c.write(ctx, op, id, func(tx pgx.Tx) error {
			switch state, err := lockRow(ctx, tx, id); {
			case err != nil:
				return err
			case state != StateDeleted:
				return invalid(fmt.Errorf("state: the tenant is %s, and not deleted; see Rename", state))
			}
			return rename(ctx, tx, "rename", id, name)
		})
		if err != nil {
			return err
		}
	}
	return c.reopen(ctx, op, p, StateDeleted)
}

// ReleaseName frees the name and the domains of a deleted tenant for others at once, where they are kept for it until its purge otherwise. Its name is "#" and its ID
// from then on, which Purge asks for, and only [Catalog.RestoreAs] takes it back. Calling it again changes nothing.
//
// The error is [ErrInvalid] when the tenant is not deleted, [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) ReleaseName(ctx context.Context, id ID) error {
	const op = "release name"
	ctx, release, err := c.tn.primary.lockTenant(ctx, id) // or a Restore could be at work
	if err != nil {
		return &Error{Op: op, Tenant: id, Err: err}
	}
	defer release()
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		switch state, err := lockRow(ctx, tx, id); {
		case err != nil:
			return err
		case state != StateDeleted:
			return invalid(fmt.Errorf("state: the tenant is %s, only a deleted one has no need of its name", state))
		}
		rows, _ := tx.Query(ctx, `DELETE FROM tenancy.domains WHERE tenant = $1 RETURNING domain`, id)
		domains, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET name = '#' || id, updated = now() WHERE id = $1 AND name <> '#' || id`, id)
		if err != nil || tag.RowsAffected() == 0 && len(domains) == 0 {
			return err
		}
		if err := audit(ctx, tx, op, id, nil); err != nil {
			return err
		}
		for _, domain := range domains {
			if err := changed(ctx, tx, "domain", id, domain); err != nil {
				return err
			}
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}

// isTombstone says whether a name is that of a tenant whose own one is free: no tenant can have such a name.
func isTombstone(name string) bool { return strings.HasPrefix(name, "#") }

// reopen opens the login first: a tenant is never active in the catalog and closed at the server. The tenant's lock is held.
func (c *Catalog) reopen(ctx context.Context, op string, p *place, from ...State) error {
	id := p.tenant.ID
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	switch s := p.tenant.State; {
	case s == StateActive:
		return nil
	case slices.Contains(from, s):
		var activated bool
		if err := c.tn.primary.pool.QueryRow(ctx, `SELECT activated FROM tenancy.tenants WHERE id = $1`, id).Scan(&activated); err != nil {
			return fail(unavailable(op, err))
		}
		if p.state == "made" && !activated { // its Create goes on where it was
			if err := c.openPlace(ctx, p); err != nil {
				return fail(err)
			}
		}
		if p.state == "intent" || !activated {
			return c.unfinish(ctx, id)
		}
	case s == StateProvisioning:
		return fail(hinted(ErrTenantNotReady, "its place was never finished: call Create again"))
	case s == StateDeleted, s == StatePurged:
		return fail(ErrTenantGone)
	default:
		return fail(invalid(fmt.Errorf("state: the tenant is %s; see Resume", s)))
	}
	if err := c.unfence(ctx, id); err != nil {
		return fail(err)
	}
	if err := c.openPlace(ctx, p); err != nil {
		return fail(err)
	}
	err := c.write(ctx, op, id, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'active', message = '', retry_after = 0, fenced = NULL, deleted = NULL, quarantine = DEFAULT,
			generation = generation + 1, updated = now() WHERE id = $1 AND state = $2 AND generation = $3`, id, p.tenant.State, p.tenant.Generation)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if err := audit(ctx, tx, op, id, nil); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	c.fenceOvertaken(ctx, id, err)
	return err
}

// unfence says, before a place is opened, that the tenant is no longer fenced: if what follows dies, the validity job fences it again.
func (c *Catalog) unfence(ctx context.Context, id ID) error {
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.tenants SET fenced = NULL, updated = now() WHERE id = $1`, id)
	return unavailable("unfence", err)
}

// unfinish takes a tenant that was deleted before it was ever made back to where Create goes on.
func (c *Catalog) unfinish(ctx context.Context, id ID) error {
	err := c.write(ctx, "restore", id, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'provisioning', deleted = NULL, quarantine = DEFAULT, fenced = NULL, updated = now() WHERE id = $1 AND state = 'deleted'`, id); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return err
	}
	return &Error{Op: "restore", Tenant: id, Err: hinted(ErrTenantNotReady, "its place was never finished: call Create again")}
}
