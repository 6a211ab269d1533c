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

// Delete takes a tenant into quarantine: as Suspend with the default drain, and for good. Its data, name and domains are kept until
// [Catalog.Purge]; [Catalog.Restore] takes it back. It may be called again.
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
			deleted = CASE WHEN $2 = 'deleted' THEN coalesce(deleted, now()) END WHERE id = $1`,
			id, to, s.Message, int(s.RetryAfter/time.Second)); err != nil {
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
	return c.reopen(ctx, "resume", id, StateSuspended, StateMaintenance)
}

// Restore takes a deleted tenant out of quarantine and back into service. The errors are those of Resume, and
// [ErrInvalid] for a tenant that is suspended; a purged one is [ErrTenantGone].
func (c *Catalog) Restore(ctx context.Context, id ID) error {
	return c.reopen(ctx, "restore", id, StateDeleted)
}

// reopen opens the login first: a tenant is never active in the catalog and closed at the server.
func (c *Catalog) reopen(ctx context.Context, op string, id ID, from ...State) error {
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
	switch s := p.tenant.State; {
	case s == StateActive:
		return nil
	case slices.Contains(from, s):
		if p.state == "intent" {
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
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'active', message = '', retry_after = 0, fenced = NULL, deleted = NULL,
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
}

// unfence says, before a place is opened, that the tenant is no longer fenced: if what follows dies, the validity job fences it again.
func (c *Catalog) unfence(ctx context.Context, id ID) error {
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.tenants SET fenced = NULL, updated = now() WHERE id = $1`, id)
	return unavailable("unfence", err)
}

// unfinish takes a tenant that was deleted before it was ever made back to where Create goes on.
func (c *Catalog) unfinish(ctx context.Context, id ID) error {
	err := c.write(ctx, "restore", id, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'provisioning', deleted = NULL, fenced = NULL, updated = now() WHERE id = $1 AND state = 'deleted'`, id); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return err
	}
	return &Error{Op: "restore", Tenant: id, Err: hinted(ErrTenantNotReady, "its place was never finished: call Create again")}
}
