package tenancy

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

const opRotate = "rotate password"

// RotatePassword gives the tenant a new login with a new password, and drops the one that it had. The tenant goes on being served: the
// new login is proved before anything changes, every node opens new pools with it, calls and transactions in flight
// have Config.DrainTimeout to finish on the old one, and no session of it is left. A tenant that is suspended or under maintenance stays so.
//
// The new login has the rights of the tenant's groups and owns what the old one did (large objects). What was given to the old login by hand in the tenant's schema goes
// with it: grant to the runtime role, and make settings (ALTER ROLE ... SET) again, for a login does not inherit its groups'. A right on what is not the tenant's
// keeps the old login, closed, until it is revoked.
// The new login goes through the pooler that the place's server is registered with, or past any that it has no more ([ServerConfig].Pooler).
// With [IsolationShared] the old login's large objects are the new one's when it has returned, and not before.
// A place that the tenant has left keeps its login, which is closed.
//
// A RotatePassword that died or failed on the way is finished by the next one, or by the validity job. With [ErrNotClosed] the tenant has its new
// login, and the old one is still to be dropped, by the validity job: dropping it has Config.DrainTimeout and a minute. The other errors are [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady],
// [ErrNoProvisioner], [ErrIdentity] and [ErrSetup] (the new login is not what it should be), [ErrInProgress], [ErrPrimaryUnavailable] (whose
// answer to the last write may be lost) or that of the server.
func (c *Catalog) RotatePassword(ctx context.Context, id ID) error {
	fail := func(err error) error { return &Error{Op: opRotate, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if err := settled(p.tenant.State); err != nil {
		return fail(err)
	}
	if !p.hasProvisioner {
		return fail(errNoProvisioner)
	}
	if err := c.dropOldLogin(ctx, p); err != nil { // there are never three
		return fail(fmt.Errorf("an earlier rotation has to be finished first: %w", err))
	}
	if err := c.rotate(ctx, p); err != nil {
		return fail(err)
	}
	return nil
}

// finishRotation goes on where a rotation of the tenant's place was cut off. The tenant's lock is held.
func (c *Catalog) finishRotation(ctx context.Context, p *place) error {
	if p.denseRole != "" && !p.dense {
		if err := c.leaveDense(ctx, p); err != nil {
			return err
		}
	}
	if p.nextLogin != "" {
		return c.rotate(ctx, p)
	}
	return c.dropOldLogin(ctx, p)
}

func (c *Catalog) rotate(ctx context.Context, p *place) (err error) {
	if p.tenant.State != StateActive { // the login is opened to be proved, and closed again
		defer func() { err = c.closeAgain(ctx, p, p.fenced, err) }()
	}
	for _, step := range c.rotation() {
		err := step(ctx, p)
		switch {
		case err == nil:
		case p.oldLogin != "":
			return fmt.Errorf("%w: %s is the tenant's login, and the one before was not dropped: %w", ErrNotClosed, p.source.User, err)
		default:
			return err
		}
	}
	return nil
}

// rotation is the steps of a rotation. Each looks before it acts, so that a run that died anywhere is finished by the next one.
func (c *Catalog) rotation() []func(context.Context, *place) error {
	return []func(context.Context, *place) error{c.intendLogin, c.makeNextLogin, c.takeNextLogin, c.dropOldLogin}
}

// intendLogin writes the login that is to be made, so that no crash leaves one that nobody knows. Who comes after a crash takes the same
// login and the same password: whoever it was that was cut off may still be at work.
func (c *Catalog) intendLogin(ctx context.Context, p *place) error {
	db := c.tn.primary
	if p.nextLogin != "" {
		d, err := db.openSource(p.tenant.UID, "next_login", p.nextSealed)
		if err == nil {
			p.next = d
			return nil
		}
		// Sealed under a key that was taken out since. Nobody has used the password yet: another one is as good.
	}
	password, err := scram.Password()
	if err != nil {
		return err
	}
	p.next = p.source
	p.next.Pooler, p.next.PoolerTLS = p.pooler, p.poolerTLS // as the server is registered now
	p.next.User, p.next.Password = nextLogin(p.base(), p.source.User), Secret(password)
	sealed, err := db.sealSource(p.tenant.UID, "next_login", p.next)
	if err != nil {
		return err
	}
	tag, err := db.pool.Exec(ctx, `UPDATE tenancy.data_sources SET next_login = $2, next_sealed = $3, updated = now()
		WHERE id = $1 AND login = $4 AND next_sealed IS NOT DISTINCT FROM $5 AND old_login = ''`, p.id, p.next.User, sealed, p.source.User, p.nextSealed)
	if err != nil {
		return unavailable(opRotate, err)
	}
	if tag.RowsAffected() == 0 {
		return errOvertaken
	}
	p.nextLogin, p.nextSealed = p.next.User, sealed
	return nil
}

// nextLogin counts on: a place's logins are its name with _l1, _l2 and so on behind it, so that one which was a place's does not come again.
// PostgreSQL's 63 bytes are far: a place's name has 22.
func nextLogin(place, login string) string {
	n, _ := strconv.Atoi(strings.TrimPrefix(login, place+"_l"))
	return place + "_l" + strconv.Itoa(n+1)
}

// base is what the place's logins are named after: its schema, unless that is also others'.
func (p *place) base() string {
	if p.isolation == IsolationShared {
		return p.source.User[:max(0, strings.LastIndex(p.source.User, "_l"))]
	}
	return p.source.Schema
}

// makeNextLogin makes the login at the server, asks whether it has the rights that it should, and logs in with it.
func (c *Catalog) makeNextLogin(ctx context.Context, p *place) error {
	conn, err := p.insideConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if p.tenant.State != StateActive {
		if err := c.unfence(ctx, p.tenant.ID); err != nil {
			return err
		}
	}
	if err := c.tn.makeLogin(ctx, conn, p, p.next); err != nil {
		return err
	}
	if err := c.tn.setLogin(ctx, conn, p.next); err != nil {
		return err
	}
	if p.isolation == IsolationShared { // where a login that may become another is refused
		if err := c.admit(ctx, conn, p, p.next.User); err != nil {
			return err
		}
	} else if err := execAll(ctx, conn, opRotate, []string{"GRANT " + ident.Quote(p.source.User) + " TO " + ident.Quote(p.next.User)}); err != nil {
		// What the old login owns is the new one's before it is given to it: both work at once for a while.
		return err
	}
	if err := ask(ctx, conn, loginChecks(p, p.next.User)); err != nil {
		return err
	}
	next := *p
	next.source = p.next
	return c.tn.proveLogin(ctx, &next)
}

// takeNextLogin makes the next login the tenant's.
func (c *Catalog) takeNextLogin(ctx context.Context, p *place) error {
	id := p.tenant.ID
	err := c.tn.primary.transact(ctx, func(tx pgx.Tx) error {
		if state, err := lockRow(ctx, tx, id); err != nil {
			return err
		} else if state != p.tenant.State {
			return errOvertaken
		}
		sealed, err := c.tn.primary.sealSource(p.tenant.UID, "data_source", p.next)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET old_login = login, login = next_login, sealed = $2, next_login = '', next_sealed = NULL, updated = now()
			WHERE id = $1 AND next_sealed = $3`, p.id, sealed, p.nextSealed)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		tag, err = tx.Exec(ctx, `UPDATE tenancy.tenants SET generation = generation + 1, updated = now()
			WHERE id = $1 AND data_source = $2 AND generation = $3`, id, p.id, p.tenant.Generation)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if err := audit(ctx, tx, opRotate, id, map[string]any{"login": p.next.User}); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		c.fenceOvertaken(ctx, id, err)
		return refusal(opRotate, err)
	}
	p.oldPooled = p.source.Pooler != ""
	p.oldLogin, p.source, p.nextLogin, p.nextSealed = p.source.User, p.next, "", nil
	c.tn.feed.catchUp(ctx)
	return nil
}

// dropOldLogin drops the login that a rotation has replaced.
func (c *Catalog) dropOldLogin(ctx context.Context, p *place) error {
	if p.oldLogin == "" {
		return nil
	}
	if err := c.dropLogin(ctx, p, p.oldLogin); err != nil {
		return err
	}
	if _, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET old_login = '', updated = now() WHERE id = $1 AND old_login = $2`, p.id, p.oldLogin); err != nil {
		return unavailable(opRotate, err)
	}
	p.oldLogin = ""
	return nil
}

// dropNextLogin gives up the rotation of a place that the tenant has left.
func (c *Catalog) dropNextLogin(ctx context.Context, p *place) error {
	if p.nextLogin == "" {
		return nil
	}
	if err := c.dropLogin(ctx, p, p.nextLogin); err != nil {
		return err
	}
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET next_login = '', next_sealed = NULL, updated = now() WHERE id = $1 AND next_login = $2`, p.id, p.nextLogin)
	return unavailable(opRotate, err)
}

// dropLogin waits for the nodes, closes one login of the place, gives what it owns to the place's own, and drops it. One that is not there was
// dropped before.
func (c *Catalog) dropLogin(ctx context.Context, p *place, login string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("drop login %s at %s: %w", login, p.source.Address(), err)
		}
	}()
	ctx, cancel := c.whileLeaving(ctx)
	defer cancel()
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	conn, err := p.insideConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	done, err := p.act(ctx, conn, login, p.source.User, p.owner) // the owner: only who gave a right takes it away
	if err != nil {
		return err
	}
	defer done()
	if err := closeLogins(ctx, conn, []string{login}, nil, leaving(login == p.oldLogin && p.oldPooled), c.tn.cfg.DrainTimeout); err != nil {
		return err
	}
	if p.isolation == IsolationShared {
		if err := p.wall().Dismiss(ctx, conn, login); err != nil {
			return err
		}
	}
	var there bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, login).Scan(&there); err != nil || !there {
		return err
	}
	return execAll(ctx, conn, opRotate, []string{
		grantMembership(conn, login, conn.Config().User), // a crash can have left a role that was made and not granted
		"REASSIGN OWNED BY " + ident.Quote(login) + " TO " + ident.Quote(p.source.User),
		"DROP OWNED BY " + ident.Quote(login),
		"DROP ROLE " + ident.Quote(login),
	})
}
