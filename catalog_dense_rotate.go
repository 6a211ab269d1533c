package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

const opRotateDense = "rotate shared login"

// RotateDense gives the pools that tenants of the server share new logins with new passwords, and drops those that they had: what [Catalog.RotatePassword] does
// for a tenant's own. server is its name; "" is "main". Its tenants go on being served; calls and transactions in flight have Config.DrainTimeout to finish on the old
// login. It does nothing where no tenant has ever shared a pool.
//
// One that died is finished by the next, or by the validity job. With [ErrNotClosed] the pools have their new logins, and an old one is still to be dropped. The other
// errors are [ErrInvalid] (no such server), [ErrNoProvisioner], [ErrIdentity], [ErrSetup], [ErrInProgress], [ErrPrimaryUnavailable] or that of the server.
func (c *Catalog) RotateDense(ctx context.Context, server string) error {
	fail := func(err error) error { return &Error{Op: opRotateDense, Err: err} }
	def(&server, "main")
	ctx, err := begin(ctx)
	if err != nil {
		return fail(err)
	}
	var id int64
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT id FROM tenancy.servers WHERE name = $1`, server).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return fail(invalid(fmt.Errorf("server: %q is not registered", server)))
	} else if err != nil {
		return fail(unavailable(opRotateDense, err))
	}
	ctx, release, err := c.tn.primary.await(ctx, lockOf{"dense", id}, func() {}, func() (context.Context, func(), error) { return c.tn.primary.lock(ctx, 0, tryDense, id) })
	if err != nil {
		return fail(err)
	}
	defer release()
	for _, isolation := range []Isolation{IsolationSchema, IsolationShared} {
		l, err := c.denseLogin(ctx, id, isolation)
		if errors.Is(err, pgx.ErrNoRows) {
			continue
		}
		if err == nil {
			err = c.dropOldDense(ctx, l) // there are never three
		}
		if err == nil {
			err = c.rotateDense(ctx, l)
		}
		if err != nil {
			return fail(err)
		}
	}
	return nil
}

// denseLock is held by whoever gives logins of a server's shared pools roles, or other logins. It comes after a tenant's lock.
const denseLock = `SELECT pg_advisory_lock(hashtextextended('tenancy dense ' || $1::bigint, 0))::text IS NOT NULL`

const tryDense = `SELECT pg_try_advisory_lock(hashtextextended('tenancy dense ' || $1::bigint, 0))`

// lockDense is that lock for who has a tenant's, with the last of a verb's connections, as lockArea.
func (c *Catalog) lockDense(ctx context.Context, p *place) (held context.Context, release func(), err error) {
	select {
	case c.tn.areas <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	return c.tn.primary.hold(ctx, p.tenant.ID, denseLock, p.server, func() { <-c.tn.areas })
}

// poolLogin is the login of a shared pool, with what is known of it while it is rotated.
type poolLogin struct {
	denseSource
	next       DataSource // "" as its user: none
	nextLogin  string     // "": none
	nextSealed []byte
	old        string // "": none
	at         place  // for its server's provisioner
}

// denseLogin reads a pool's login; pgx.ErrNoRows when the server has no such pool.
func (c *Catalog) denseLogin(ctx context.Context, server int64, isolation Isolation) (*poolLogin, error) {
	db := c.tn.primary
	l := poolLogin{denseSource: denseSource{server: server, isolation: isolation}}
	var sealed, provisioner []byte
	err := db.pool.QueryRow(ctx, `SELECT l.generation, l.sealed, l.next_login, l.next_sealed, l.old_login, s.provisioner
		FROM tenancy.dense_logins l JOIN tenancy.servers s ON s.id = l.server WHERE l.server = $1 AND l.isolation = $2`, server, isolation).
		Scan(&l.generation, &sealed, &l.nextLogin, &l.nextSealed, &l.old, &provisioner)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	} else if err != nil {
		return nil, unavailable(opRotateDense, err)
	}
	if l.source, err = db.openSource(UID(db.realm.Value()), "dense_login", sealed); err != nil {
		return nil, err
	}
	if l.nextSealed != nil { // sealed under a key that was taken out since, another password is as good
		l.next, _ = db.openSource(UID(db.realm.Value()), "dense_login", l.nextSealed)
	}
	l.at = place{source: l.source, server: server, isolation: isolation}
	return &l, c.openProvisioner(&l.at, provisioner)
}

// rotateDense makes the next login, with the roles that the present one may take, proves it and takes it. The lock of the server's pools is held.
func (c *Catalog) rotateDense(ctx context.Context, l *poolLogin) error {
	if err := c.intendNextDense(ctx, l); err != nil {
		return err
	}
	conn, err := l.at.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := makeDenseLogin(ctx, conn, l.next); err != nil {
		return err
	}
	if err := copyRoles(ctx, conn, l.source.User, l.next.User); err != nil {
		return err
	}
	next := l.denseSource
	next.source = l.next
	proof, err := c.connectDense(ctx, next)
	if err != nil {
		return err
	}
	closeConn(proof)
	if err := c.takeNextDense(ctx, l); err != nil {
		return err
	}
	if err := c.dropOldDense(ctx, l); err != nil {
		return fmt.Errorf("%w: %s is the shared pool's login, and the one before was not dropped: %w", ErrNotClosed, l.source.User, err)
	}
	return nil
}

func (c *Catalog) intendNextDense(ctx context.Context, l *poolLogin) error {
	if l.next.User != "" {
		return nil
	}
	db := c.tn.primary
	password, err := scram.Password()
	if err != nil {
		return err
	}
	l.next = l.source
	def(&l.nextLogin, ident.NewPlace()+"_d") // one that may be made already is taken again, with another password
	l.next.User, l.next.Password = l.nextLogin, Secret(password)
	if l.nextSealed, err = db.sealSource(UID(db.realm.Value()), "dense_login", l.next); err != nil {
		return err
	}
	_, err = db.pool.Exec(ctx, `UPDATE tenancy.dense_logins SET next_login = $3, next_sealed = $4, updated = now() WHERE server = $1 AND isolation = $2`,
		l.server, l.isolation, l.next.User, l.nextSealed)
	return unavailable(opRotateDense, err)
}

// copyRoles lets one login take the roles that another one may take.
func copyRoles(ctx context.Context, conn *pgx.Conn, from, to string) error {
	rows, _ := conn.Query(ctx, `SELECT DISTINCT r.rolname::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid JOIN pg_roles l ON l.oid = m.member WHERE l.rolname = $1`, from)
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for some := range slices.Chunk(roles, 500) {
		for i := range some {
			some[i] = ident.Quote(some[i])
		}
		if err := execAll(ctx, conn, opRotateDense, []string{takeRole(conn, strings.Join(some, ", "), to)}); err != nil {
			return err
		}
	}
	return nil
}

// takeNextDense makes the next login the pool's, and moves its tenants to a new generation.
func (c *Catalog) takeNextDense(ctx context.Context, l *poolLogin) error {
	err := c.tn.primary.transact(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `SELECT t.id FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source
			WHERE t.dense AND d.server = $1 AND d.isolation = $2 ORDER BY t.id FOR NO KEY UPDATE OF t`, l.server, l.isolation)
		ids, err := pgx.CollectRows(rows, pgx.RowTo[ID])
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.dense_logins SET old_login = login, login = next_login, sealed = next_sealed, next_login = '', next_sealed = NULL,
			generation = generation + 1, updated = now() WHERE server = $1 AND isolation = $2 AND next_sealed = $3`, l.server, l.isolation, l.nextSealed)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET generation = generation + 1, updated = now() WHERE id = ANY($1)`, ids); err != nil {
			return err
		}
		if err := audit(ctx, tx, opRotateDense, 0, map[string]any{"server": l.server, "isolation": l.isolation}); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `SELECT count(tenancy.changed('tenant', id, NULL)) FROM unnest($1::bigint[]) id`, ids)
		return err
	})
	if err != nil {
		return refusal(opRotateDense, err)
	}
	l.old, l.source, l.next, l.nextLogin = l.source.User, l.next, DataSource{}, ""
	l.generation++
	c.tn.feed.catchUp(ctx)
	return nil
}

// dropOldDense waits until the old login's sessions have ended, and drops it.
func (c *Catalog) dropOldDense(ctx context.Context, l *poolLogin) error {
	if l.old == "" {
		return nil
	}
	ctx, cancel := c.whileLeaving(ctx)
	defer cancel()
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	conn, err := l.at.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := closeLogins(ctx, conn, []string{l.old}, nil, anySession, c.tn.cfg.DrainTimeout); err != nil {
		return err
	}
	if err := dropRoles(ctx, conn, l.old); err != nil {
		return err
	}
	if _, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.dense_logins SET old_login = '', updated = now() WHERE server = $1 AND isolation = $2 AND old_login = $3`, l.server, l.isolation, l.old); err != nil {
		return unavailable(opRotateDense, err)
	}
	l.old = ""
	return nil
}

// finishDense finishes the rotations of shared pools' logins that were cut off.
func (c *Catalog) finishDense(ctx context.Context) error {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT l.server, l.isolation FROM tenancy.dense_logins l JOIN tenancy.servers s ON s.id = l.server
		WHERE (l.next_login <> '' OR l.old_login <> '') AND s.provisioner IS NOT NULL AND l.updated < now() - interval '30 s' ORDER BY random() LIMIT 10`)
	type unfinished struct {
		Server    int64
		Isolation Isolation
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[unfinished])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, list, func(u unfinished) error {
		if err := c.finishDenseLogin(ctx, u.Server, u.Isolation); err != nil {
			return &Error{Op: "finish shared login", Err: err}
		}
		return nil
	})
}

func (c *Catalog) finishDenseLogin(ctx context.Context, server int64, isolation Isolation) error {
	ctx, cancel := context.WithTimeout(ctx, c.tn.cfg.DrainTimeout+finishTimeout)
	defer cancel()
	ctx, release, err := c.tn.primary.lock(ctx, 0, tryDense, server)
	if errors.Is(err, errLocked) {
		return nil
	} else if err != nil {
		return err
	}
	defer release()
	l, err := c.denseLogin(ctx, server, isolation)
	if err != nil {
		return err
	}
	if err := c.dropOldDense(ctx, l); err != nil || l.nextSealed == nil {
		return err
	}
	return c.rotateDense(ctx, l)
}
