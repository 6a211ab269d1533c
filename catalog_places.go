package tenancy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Prepare makes an empty, migrated place on a registered server and returns its data source,
// with the password. With an ID the place is for that tenant to move to, by
// [Catalog.SetDataSource]; with 0 it is for a new one, by [NewTenant.DataSource]. Nothing uses it before.
//
// server is the one to make it on, "" for that with most room. isolation, at most one, is that of the place, and becomes the tenant's when it moves
// there; without, it is the tenant's own, and Config.Isolation for a new one.
// The error is as that of Create, and [ErrInvalid] for a tenant with [IsolationShared], or a place of that kind: such tenants do not move.
func (c *Catalog) Prepare(ctx context.Context, id ID, server string, isolation ...Isolation) (DataSource, error) {
	fail := func(err error) (DataSource, error) {
		return DataSource{}, &Error{Op: "prepare", Tenant: id, Err: err}
	}
	if c.tn.migrations.empty() {
		return fail(errNoMigrations)
	}
	as, err := onlyIsolation(isolation)
	if err != nil {
		return fail(err)
	}
	if ctx, err = begin(ctx); err != nil {
		return fail(err)
	}
	uid := newUID()
	if id != 0 {
		held, release, err := c.tn.primary.lockTenant(ctx, id)
		if err != nil {
			return fail(err)
		}
		defer release()
		ctx = held
		t, err := c.Tenant(ctx, id)
		if err != nil {
			return fail(err)
		}
		if t.State == StateDeleted || t.State == StatePurged {
			return fail(ErrTenantGone)
		}
		if err := sharedStays(t.Isolation); err != nil {
			return fail(err)
		}
		uid = t.UID
		def(&as, t.Isolation)
	} else { // or the validity job could take the place for one that a crash has left
		held, release, err := c.tn.primary.tryLockUID(ctx, uid)
		if err != nil {
			return fail(err)
		}
		defer release()
		ctx = held
	}
	def(&as, c.tn.cfg.Isolation)
	if err := sharedStays(as); err != nil {
		return fail(err)
	}
	if err := c.checkServer(ctx, server, as); err != nil {
		return fail(err)
	}
	p, err := c.preparePlace(ctx, "prepare", uid, id, server, as)
	if err != nil {
		return fail(err)
	}
	tag, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'made', version = $2, migrating = NULL, updated = now() WHERE id = $1 AND state = 'intent'`, p.id, p.version)
	if err != nil {
		return fail(unavailable("prepare", err))
	}
	if tag.RowsAffected() == 0 {
		return fail(errOvertaken)
	}
	return p.source, nil
}

// preparePlace makes a place that stays in state intent. With an error it is what was begun of it, nil: nothing was.
func (c *Catalog) preparePlace(ctx context.Context, op string, uid UID, id ID, server string, as Isolation) (*place, error) {
	var source int64
	err := pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) (err error) {
		if source, err = c.intendPlace(ctx, tx, uid, id, server, as); err != nil {
			return err
		}
		return audit(ctx, tx, op, id, map[string]any{"server": server, "isolation": as})
	})
	if err != nil {
		return nil, refusal(op, err)
	}
	p, err := c.placeByID(ctx, source)
	if err != nil {
		return nil, err
	}
	done, err := c.tn.slot(ctx)
	if err != nil {
		return p, err
	}
	defer done()
	return p, c.make(ctx, p)
}

// onlyIsolation is the one that was given, "" for none.
func onlyIsolation(given []Isolation) (Isolation, error) {
	switch len(given) {
	case 0:
		return "", nil
	case 1:
		if err := given[0].check(); err != nil {
			return "", invalid(fmt.Errorf("isolation: %w", err))
		}
		return given[0], nil
	}
	return "", invalid(errors.New("isolation: give one"))
}

// SetDataSource moves the tenant to another place, which [Catalog.Prepare] made for it and the
// operator filled; one that it has left before will do, too. The tenant goes on being served. The place is proved to be the tenant's own before
// anything moves; then every node opens new pools there, and the old place is closed at its server: nobody logs in, calls and
// transactions in flight end where they began and have Config.DrainTimeout for it, and no session is left, also of
// a node that hears nothing. The old place's data stays, until [Catalog.DropPlace].
//
// With d.Pooler the tenant's calls go through the pooler that the place's server is registered with, without it past that; the place that the
// tenant is in will do. An empty password, as [Catalog.DataSource] answers it, means the one that the primary has of the place. With the place that the tenant is in,
// SetDataSource tells the catalog of a password that was changed by hand; of a place that it has left, an earlier login will do, and then what the primary has
// counts, with whatever password.
//
// A place that is behind the tenant's version is migrated up to it first, as [Migrator.Tenant] does, while the tenant is served from where it is, and has the version recorded
// also where nothing comes of the move. Where that cannot be, the tenant does not move: this node's Config.Migrations do not have the version, the tenant is pinned below it, or
// a migration without a transaction has died in the place. Nor does it move beyond the version that it is pinned to.
//
// A tenant with [IsolationShared] does not move ([ErrInvalid]).
//
// With [ErrNotClosed] the tenant has moved, and the old place is still to be closed, by the validity job: closing it has Config.DrainTimeout and a minute. With any other error it has not moved:
// [ErrInvalid], [ErrIdentity] (the place is another tenant's), [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady], [ErrNoProvisioner], [ErrNoMigrations], [ErrMigrationDirty], [ErrInProgress],
// [ErrPrimaryUnavailable] (whose answer to the last write may be lost, also when ctx was cancelled: see Catalog.DataSource) or that of the new place's server or of a migration.
func (c *Catalog) SetDataSource(ctx context.Context, id ID, d DataSource) (err error) {
	const op = "set data source"
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	given := d
	if given.Password == "" {
		given.Password = "that of the place" // which is valid
	}
	if err := given.validate(); err != nil {
		return fail(invalid(fmt.Errorf("data source: %w", err)))
	}
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	now, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if err := settled(now.tenant.State); err != nil {
		return fail(err)
	}
	uid, source, err := c.prepared(ctx, c.tn.primary.pool, d)
	if err != nil {
		return fail(refusal(op, err))
	}
	if uid != now.tenant.UID {
		return fail(hinted(ErrIdentity, "the place was prepared for another tenant; nothing was moved"))
	}
	to, err := c.placeByID(ctx, source)
	if err != nil {
		return fail(err)
	}
	to.tenant = now.tenant
	if to.id != now.id {
		if err := sharedStays(now.isolation, to.isolation); err != nil {
			return fail(err)
		}
	}
	if d.Pooler != "" && (d.Pooler != to.pooler || d.PoolerTLS != to.poolerTLS) {
		return fail(invalid(fmt.Errorf("data source: the place's server is registered with the pooler %q and TLS %q: see Catalog.AddServer", to.pooler, to.poolerTLS)))
	}
	if to.source.Pooler != "" { // which may have gone since, where the place's own data source counts
		to.source.Pooler, to.source.PoolerTLS = to.pooler, to.poolerTLS
	}
	switch {
	case d.User == to.source.User: // prove the login as given; where it was rotated since, what is known of it
		def(&d.Password, to.source.Password)
		to.source = d
	case to.id == now.id:
		return fail(invalid(fmt.Errorf("data source: the tenant is in this place with login %q, and not %q", to.source.User, d.User)))
	}
	if to.id != now.id {
		if err := c.bringUp(ctx, now, to); err != nil {
			return fail(err)
		}
	}
	if now.tenant.State != StateActive { // the place is opened to be proved, and closed again
		if err := c.unfence(ctx, id); err != nil {
			return fail(err)
		}
		defer func() {
			if err = c.closeAgain(ctx, to, now.fenced, err); errors.Is(err, ErrNotClosed) && !errors.As(err, new(*Error)) {
				err = fail(err)
			}
		}()
	}
	if err := c.enterPlace(ctx, now, to); err != nil {
		return fail(err)
	}
	if err := c.move(ctx, op, now, to); err != nil {
		return err
	}
	if to.id == now.id {
		return nil
	}
	if err := c.leavePlace(ctx, now); err != nil {
		return fail(fmt.Errorf("%w: the tenant has moved, the place at %s that it left was not closed: %w", ErrNotClosed, now.source.Address(), err))
	}
	return nil
}

// bringUp migrates a place that the tenant moves to and that is behind up to the tenant's version. The tenant stays where it is meanwhile.
func (c *Catalog) bringUp(ctx context.Context, now, to *place) error {
	if to.migrating != 0 || to.version < now.version {
		done, err := c.tn.slot(ctx)
		if err != nil {
			return err
		}
		defer done()
		_, err = c.migratePlace(ctx, to, &errand{to: now.version, patience: lockPatience})
		switch {
		case errors.Is(err, ErrMigrationDirty): // Migrator.Resolve is for where the tenant is
			return hinted(ErrMigrationDirty, "version %d, which says NO TRANSACTION, has died half-way in schema %s; the tenant stays where it is: drop that place (Catalog.DropPlace) and have another one prepared", max(to.migrating, -to.migrating), to.source.Schema)
		case err != nil:
			return fmt.Errorf("migrate the place to version %d, at which the tenant is: %w", now.version, err)
		}
	}
	switch {
	case to.version < now.version && now.pinned > 0 && now.pinned < now.version:
		return invalid(fmt.Errorf("data source: the place is at version %d, and the tenant at %d and pinned at %d, beyond which nothing is migrated: call Migrator.Pin with %d first", to.version, now.version, now.pinned, now.version))
	case to.version < now.version:
		return invalid(fmt.Errorf("data source: the place is at version %d and the tenant at %d, which this node's Config.Migrations do not have: call it on a node of the release that has it", to.version, now.version))
	case now.pinned > 0 && to.version > max(now.pinned, now.version):
		return invalid(fmt.Errorf("data source: the place is at version %d, and the tenant pinned at %d: call Migrator.Unpin first, or have another place prepared", to.version, now.pinned))
	}
	return nil
}

// closeAgainTimeout bounds closeAgain, whose caller's own bound may be over. The end of a tenant's sessions alone has 15 s of it.
const closeAgainTimeout = 20 * time.Second

// closeAgain closes a place of a tenant that is out of service, which was opened to be proved. The validity job does it where this
// fails, and where the tenant's lock was lost or the verb was overtaken: another node may have resumed the tenant since. fenced says whether the tenant's other places
// were closed before p was opened, so that all are.
func (c *Catalog) closeAgain(ctx context.Context, p *place, fenced bool, err error) error {
	if errors.Is(err, errOvertaken) { // whether it is to be closed is another's to know by now, see fenceOvertaken
		return err
	}
	ctx, cancel := afterwards(ctx, closeAgainTimeout)
	defer cancel()
	failed := context.Cause(ctx)
	if failed == nil {
		failed = fencePlace(ctx, p, atWork, 0)
	}
	if failed == nil && fenced {
		_ = c.writeFenced(ctx, p.tenant.ID) // the place is closed all the same, and the job closes it again
	}
	switch {
	case failed == nil:
		return err
	case err == nil:
		return fmt.Errorf("%w: the tenant is out of service, and its place at %s was not closed again: %w", ErrNotClosed, p.source.Address(), failed)
	}
	return errors.Join(err, failed)
}

// settled refuses the states in which a tenant has no place of its own to speak of: it is being made, or was deleted.
func settled(s State) error {
	switch s {
	case StateDeleted, StatePurged:
		return ErrTenantGone
	case StateProvisioning:
		return hinted(ErrTenantNotReady, "its place was never finished: call Create again")
	}
	return nil
}

// enterPlace opens the place that the tenant moves to, and proves it. One that was closed is closed again if nothing comes of the
// move, which is written before it is opened; one that was prepared and never used stays open for the operator, who fills it.
func (c *Catalog) enterPlace(ctx context.Context, now, to *place) error {
	if to.id == now.id {
		return c.openPlace(ctx, to)
	}
	closed, err := isClosed(ctx, to)
	if err != nil {
		return err
	}
	if closed {
		if _, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET leaving = now(), updated = now() WHERE id = $1`, to.id); err != nil {
			return unavailable("open place", err)
		}
	}
	if err := c.openPlace(ctx, to); err != nil {
		if closed {
			err = errors.Join(err, c.leavePlace(ctx, to))
		}
		return err
	}
	return nil
}

// move writes the tenant's new place, and that the one before is to be closed: a crash from here on is finished by the validity job.
func (c *Catalog) move(ctx context.Context, op string, now, to *place) error {
	id, d := now.tenant.ID, to.source
	err := c.write(ctx, op, id, func(tx pgx.Tx) error {
		state, err := lockRow(ctx, tx, id)
		if err != nil {
			return err
		}
		if state != now.tenant.State {
			return errOvertaken
		}
		sealed, err := c.tn.primary.sealSource(to.tenant.UID, "data_source", d)
		if err != nil {
			return err
		}
		if to.id != now.id {
			if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET leaving = now(), updated = now() WHERE id = $1`, now.id); err != nil {
				return err
			}
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET sealed = $2, leaving = NULL, updated = now() WHERE id = $1 AND state = 'made'`, to.id, sealed)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 { // DropPlace came before
			return errOvertaken
		}
		tag, err = tx.Exec(ctx, `UPDATE tenancy.tenants SET data_source = $2, isolation = $4, dense = $5, generation = generation + 1, updated = now()
			WHERE id = $1 AND generation = $3`, id, to.id, now.tenant.Generation, to.isolation, to.dense)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if err := audit(ctx, tx, op, id, map[string]any{"address": d.Address(), "schema": d.Schema, "isolation": to.isolation}); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	c.fenceOvertaken(ctx, id, err)
	return err
}

// fenceOvertaken has the validity job fence the tenant again, if it is out of service, when the verb that has opened a login was overtaken: that may have been by the fence.
func (c *Catalog) fenceOvertaken(ctx context.Context, id ID, err error) {
	if !errors.Is(err, errOvertaken) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_ = c.unfence(ctx, id)
}

// whileLeaving bounds the closing of what the nodes have left, when the verb has done what it was called for: a server that freezes keeps neither the verb nor the tenant's lock.
func (c *Catalog) whileLeaving(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, c.tn.cfg.DrainTimeout+c.tn.leaveTime)
}

// leavePlace waits for the nodes, closes a place that the tenant is not in and writes that it is closed. The tenant's lock is held.
func (c *Catalog) leavePlace(ctx context.Context, p *place) error {
	ctx, cancel := c.whileLeaving(ctx)
	defer cancel()
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	// As late as can be: the lock may be lost since, and the tenant back by another verb.
	var used bool
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM tenancy.tenants WHERE data_source = $1)`, p.id).Scan(&used); err != nil {
		return unavailable("leave place", err)
	} else if used {
		return errOvertaken
	}
	if err := fencePlace(ctx, p, leaving(p.source.Pooler != ""), c.tn.cfg.DrainTimeout); err != nil {
		return err
	}
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET leaving = NULL, updated = now() WHERE id = $1`, p.id)
	return unavailable("leave place", err)
}

// DropPlace drops a place that no tenant uses, for good: one that [Catalog.Prepare] made and nobody took, or one that a
// tenant has moved away from. A DropPlace that died is finished by the next one, or by the validity job. A place in use is [ErrInvalid], as is one that
// is not known. Other errors are [ErrInProgress], [ErrNoProvisioner] and [ErrPrimaryUnavailable].
func (c *Catalog) DropPlace(ctx context.Context, d DataSource) error {
	fail := func(err error) error { return &Error{Op: "drop place", Err: err} }
	_, source, err := c.findPlace(ctx, c.tn.primary.pool, d, "made", "intent")
	if err != nil {
		return fail(refusal("drop place", err))
	}
	p, err := c.placeByID(ctx, source)
	if err != nil {
		return fail(err)
	}
	ctx, p, release, err := c.lockUnused(ctx, p) // it may be on its way, and who ends memberships keeps off
	if err != nil {
		return fail(err)
	}
	defer release()
	// Marked before it is dropped: from here on no tenant can take it, and the validity job finishes what a crash leaves.
	err = pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error {
		// The row is locked by a statement of its own: the next one sees the tenant that a move has just brought here.
		if _, err := tx.Exec(ctx, `SELECT FROM tenancy.data_sources WHERE id = $1 FOR UPDATE`, source); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.data_sources d SET state = 'intent', stocked = false, updated = now()
			WHERE id = $1 AND state IN ('made', 'intent') AND NOT EXISTS (SELECT FROM tenancy.tenants t WHERE t.data_source = d.id)`, source)
		if err == nil && tag.RowsAffected() == 0 {
			err = invalid(errors.New("data source: a tenant uses this place"))
		}
		return err
	})
	if err != nil {
		return fail(refusal("drop place", err))
	}
	if err := c.dropUnused(ctx, p); err != nil {
		return fail(err)
	}
	return nil
}

// lockUnused locks the place as the Prepare that makes it does: errLocked says that one is at work. The place is read again.
func (c *Catalog) lockUnused(ctx context.Context, p *place) (held context.Context, locked *place, release func(), err error) {
	var id ID
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT id FROM tenancy.tenants WHERE uid = $1`, p.tenant.UID).Scan(&id)
	switch {
	case err == nil:
		held, release, err = c.tn.primary.tryLockTenant(ctx, id)
	case errors.Is(err, pgx.ErrNoRows):
		held, release, err = c.tn.primary.tryLockUID(ctx, p.tenant.UID)
	default:
		err = unavailable("lock place", err)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	if locked, err = c.placeByID(held, p.id); err != nil {
		release()
		return nil, nil, nil, err
	}
	return held, locked, release, nil
}

// dropUnused drops a place in state intent. Sessions there would keep its tables, and go on without a role.
func (c *Catalog) dropUnused(ctx context.Context, p *place) error {
	if err := fencePlace(ctx, p, atWork, 0); err != nil {
		return err
	}
	if err := c.dropPlace(ctx, p, nil); err != nil {
		return err
	}
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET `+placeGone+` WHERE id = $1 AND state = 'intent'`, p.id)
	return unavailable("drop place", err)
}

// placeGone is what is written of a place that was dropped.
const placeGone = `state = 'dropped', stocked = false, sealed = '', next_login = '', next_sealed = NULL, old_login = '', leaving = NULL, dense = false, dense_role = '', updated = now()`

// prepared finds the place that d names among those that Prepare made.
func (c *Catalog) prepared(ctx context.Context, q querier, d DataSource) (uid UID, source int64, err error) {
	return c.findPlace(ctx, q, d, "made")
}

// findPlace finds the place that d names, in one of the states.
func (c *Catalog) findPlace(ctx context.Context, q querier, d DataSource, states ...string) (uid UID, source int64, err error) {
	err = q.QueryRow(ctx, `SELECT d.uid, d.id FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
		WHERE s.host = $1 AND s.port = $2 AND coalesce(nullif(d.database, ''), s.database) = $3 AND d.schema = $4 AND (d.login = $5 OR $5 LIKE d.schema || '\_l%') AND d.state = ANY($6)`,
		d.Host, d.Port, d.Database, d.Schema, d.User, states).Scan(&uid, &source)
	if errors.Is(err, pgx.ErrNoRows) {
		return uid, 0, invalid(fmt.Errorf("data source: %s schema %q with login %q is not a place that Catalog.Prepare made", d.Address(), d.Schema, d.User))
	}
	return uid, source, err
}

// placeByID reads a place that no tenant needs to use.
func (c *Catalog) placeByID(ctx context.Context, id int64) (*place, error) {
	p := place{id: id}
	var sealed, provisioner []byte
	db := c.tn.primary
	err := db.pool.QueryRow(ctx, `SELECT d.uid, d.state, d.isolation, d.version, d.server, d.owner, d.runtime, d.tablespace, d.sealed,
		d.next_login, d.next_sealed, d.old_login, d.promised, d.dense, d.dense_role, coalesce(l.login, ''), s.pooler, s.pooler_tls, s.provisioner,
		coalesce(d.migrating, 0), coalesce((SELECT t.pinned FROM tenancy.tenants t WHERE t.uid = d.uid), 0), `+nodesThatJoin+`
		FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
		LEFT JOIN tenancy.dense_logins l ON l.server = d.server AND l.isolation = d.isolation WHERE d.id = $1`, id).
		Scan(&p.tenant.UID, &p.state, &p.isolation, &p.version, &p.server, &p.owner, &p.runtime, &p.tablespace, &sealed,
			&p.nextLogin, &p.nextSealed, &p.oldLogin, &p.promised, &p.dense, &p.denseRole, &p.denseLogin, &p.pooler, &p.poolerTLS, &provisioner, &p.migrating, &p.pinned, &p.joined)
	if err != nil {
		return nil, unavailable("read place", err)
	}
	p.tenant.realm = db.realm
	if p.state != "dropped" {
		if p.source, err = db.openSource(p.tenant.UID, "data_source", sealed); err != nil {
			return nil, err
		}
	}
	return &p, c.openProvisioner(&p, provisioner)
}

// placesOf returns every place that was made for the tenant: where it is first, then those that it has moved away from.
func (c *Catalog) placesOf(ctx context.Context, t Tenant) ([]*place, error) {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT id FROM tenancy.data_sources WHERE uid = $1 AND state <> 'dropped'
		ORDER BY id = (SELECT data_source FROM tenancy.tenants WHERE uid = $1) DESC, id`, t.UID)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, unavailable("read places", err)
	}
	places := make([]*place, len(ids))
	for i, id := range ids {
		if places[i], err = c.placeByID(ctx, id); err != nil {
			return nil, err
		}
		places[i].tenant = t
	}
	return places, nil
}

// openPlace lets the place's login in again after a fence, and proves it.
func (c *Catalog) openPlace(ctx context.Context, p *place) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := execDDL(ctx, conn, "ALTER ROLE "+ident.Quote(p.source.User)+" "+c.tn.mayLogin()); err != nil {
		return err
	}
	if err := c.tn.setLogin(ctx, conn, p.source); err != nil {
		return err
	}
	if p.dense {
		if err := c.openDense(ctx, conn, p); err != nil {
			return err
		}
	}
	return c.tn.proveLogin(ctx, p)
}

// isClosed asks the server whether the place's login was closed.
func isClosed(ctx context.Context, p *place) (closed bool, err error) {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return false, err
	}
	defer closeConn(conn)
	err = conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1 AND NOT rolcanlogin`, p.source.User).Scan(&closed)
	return closed, err
}

// fencePlace fences one place as its server's provisioner. One that was never made has nothing to fence.
func fencePlace(ctx context.Context, p *place, wait inUse, drain time.Duration) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return fence(ctx, conn, p, wait, drain)
}
