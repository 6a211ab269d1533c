package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/rowsec"
)

// area is the one schema at a server of its tenants with [IsolationShared]. Its roles are in each place's row, too.
type area struct {
	schema, owner, runtime string
	tablespace             string // as that of a place
	state                  string // intent, made
	version                int64  // of the service's migrations
	migrating              int64  // as that of a place
}

// intendArea writes the area that is to be made at the server, or finds the one that is written. Nothing takes it back.
func intendArea(ctx context.Context, tx pgx.Tx, server int64, tablespace string) (a area, err error) {
	base := ident.NewPlace()
	if _, err := tx.Exec(ctx, `INSERT INTO tenancy.shared_areas (server, schema, owner, runtime, tablespace) VALUES ($1, $2, $3, $4, $5) ON CONFLICT (server) DO NOTHING`, server, base, base+"_o", base+"_r", tablespace); err != nil {
		return a, err
	}
	return readArea(ctx, tx, server)
}

func readArea(ctx context.Context, q querier, server int64) (a area, err error) {
	err = q.QueryRow(ctx, `SELECT schema, owner, runtime, tablespace, state, version, coalesce(migrating, 0) FROM tenancy.shared_areas WHERE server = $1`, server).
		Scan(&a.schema, &a.owner, &a.runtime, &a.tablespace, &a.state, &a.version, &a.migrating)
	return a, err
}

// wall keeps the rows of the area's tenants apart.
func (p *place) wall() rowsec.Shared {
	return rowsec.Shared{Schema: p.source.Schema, Owner: p.owner, Runtime: p.runtime}
}

// lockArea makes this process the only one that works on the area as its owner, until release. It is taken after the tenant's lock and its slot,
// always, and by one verb of a node at a time: it has the last of a verb's connections, and waits for none.
func (c *Catalog) lockArea(ctx context.Context, p *place) (held context.Context, release func(), err error) {
	select {
	case c.tn.areas <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	done := func() { <-c.tn.areas }
	return c.tn.primary.hold(ctx, p.tenant.ID, `SELECT pg_advisory_lock(hashtextextended('tenancy area ' || $1::bigint, 0))::text IS NOT NULL`, p.server, done)
}

// makeShared is make for a place in an area: what is the tenant's own there is its login, and who that is.
func (c *Catalog) makeShared(ctx context.Context, p *place) error {
	if _, err := c.readyArea(ctx, p, c.tn.newest()); err != nil {
		return err
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := c.tn.makeLogin(ctx, conn, p, p.source); err != nil {
		return fmt.Errorf("make login: %w", err)
	}
	if err := c.tn.setLogin(ctx, conn, p.source); err != nil {
		return err
	}
	if err := c.admit(ctx, conn, p, p.source.User); err != nil {
		return err
	}
	if err := verifyPlace(ctx, conn, p); err != nil {
		return err
	}
	return c.tn.proveLogin(ctx, p)
}

// admit makes the login the tenant's in its area.
func (c *Catalog) admit(ctx context.Context, conn *pgx.Conn, p *place, login string) error {
	return p.wall().Admit(ctx, conn, login, rowsec.Tenant{ID: int64(p.tenant.ID), UID: p.tenant.UID, Realm: c.tn.realm.Value()})
}

// readyArea brings the area of the place to the version: all that is to be made there the first time, the pending migrations later. Each step
// looks before it acts, so that a run that died anywhere is finished by the next one.
func (c *Catalog) readyArea(ctx context.Context, p *place, e *errand) (applied []int64, err error) {
	if c.tn.migrations.empty() {
		return nil, errNoMigrations
	}
	ready := func() (area, bool, error) {
		a, err := readArea(ctx, c.tn.primary.pool, p.server)
		if err != nil {
			return a, false, unavailable("read area", err)
		}
		p.version, p.migrating = a.version, a.migrating
		return a, a.state == "made" && a.version >= e.to && a.migrating == 0 && !e.look, nil
	}
	if _, done, err := ready(); err != nil || done {
		return nil, err
	}
	ctx, release, err := c.lockArea(ctx, p)
	if err != nil {
		return nil, err
	}
	defer release()
	a, done, err := ready()
	if err != nil || done {
		return nil, err
	}
	made := false
	defer func() {
		if e := c.recordArea(context.WithoutCancel(ctx), p, a, made); e != nil {
			err = errors.Join(err, e)
		}
		e.area = err
	}()
	conn, end, err := e.worker.provisionerOf(ctx, p)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := makeArea(ctx, conn, p); err != nil {
		return nil, fmt.Errorf("make shared schema: %w", err)
	}
	err = c.asOwner(ctx, conn, p, func(ctx context.Context, cc *pgx.ConnConfig) (err error) {
		if err := asArea(ctx, cc, func(owner *pgx.Conn) error { return install(ctx, owner, p.wall()) }); err != nil {
			return fmt.Errorf("furnish shared schema: %w", err)
		}
		applied, err = c.migrateAs(ctx, cc, p, e)
		return err
	})
	if err == nil {
		err = p.wall().Verify(ctx, conn)
	}
	made = err == nil
	return applied, err
}

// install is patient: whoever connects to the area waits behind it, and what is in the way can be a tenant's transaction that has read its marker.
func install(ctx context.Context, owner *pgx.Conn, wall rowsec.Shared) error {
	if _, err := owner.Exec(ctx, "SET lock_timeout = "+strconv.FormatInt(lockTimeout.Milliseconds(), 10)); err != nil {
		return err
	}
	return patiently(ctx, func() error { return wall.Install(ctx, owner) })
}

// patiently tries what takes many locks for lockPatience, and each for lockTimeout at a time: who comes behind waits too.
func patiently(ctx context.Context, try func() error) error {
	for end := time.Now().Add(lockPatience); ; {
		err := try()
		if !isState(err, lockNotAvailable) || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
	}
}

// asArea runs fn on a session of the area's owner.
func asArea(ctx context.Context, cc *pgx.ConnConfig, fn func(owner *pgx.Conn) error) error {
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return withoutSecrets(err)
	}
	defer closeConn(conn)
	return fn(conn)
}

// makeArea makes the area's roles and its schema. The owner is one of those that may connect to the server's database; the group is not, because they
// may make temporary objects.
func makeArea(ctx context.Context, conn *pgx.Conn, p *place) error {
	if err := ask(ctx, conn, tablespaceChecks(p.provisioner, p.tablespace)); err != nil {
		return err
	}
	for _, role := range []string{p.owner, p.runtime} {
		if err := makeRole(ctx, conn, role, "NOLOGIN"); err != nil {
			return err
		}
	}
	database, runtime := ident.Quote(p.source.Database), ident.Quote(p.runtime)
	steps := []string{
		"GRANT " + ident.Quote(tenantsRole(p.source.Database)) + " TO " + ident.Quote(p.owner),
		"GRANT CONNECT ON DATABASE " + database + " TO " + runtime,
	}
	more, err := mayUse(ctx, conn, p.runtime)
	if err != nil {
		return err
	}
	if err := execAll(ctx, conn, "provision", append(steps, more...)); err != nil {
		return err
	}
	return makeSchema(ctx, conn, p)
}

// recordArea writes to the catalog what became of the area. One that is not as it must be is not made, whatever it was, so that the next verb looks again. With another version all tenants of it move to a new generation:
// pools that cached plans of the old tables are replaced.
func (c *Catalog) recordArea(ctx context.Context, p *place, was area, made bool) error {
	if p.version == was.version && made == (was.state == "made") && !p.marked {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := c.tn.primary.transact(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE tenancy.shared_areas SET version = $2, state = CASE WHEN $3 THEN 'made' ELSE 'intent' END, migrating = nullif($4::bigint, 0), updated = now() WHERE server = $1`,
			p.server, p.version, made, p.migrating); err != nil {
			return err
		}
		if p.version == was.version {
			return nil
		}
		rows, _ := tx.Query(ctx, `SELECT t.id FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source
			WHERE d.server = $1 AND d.isolation = 'shared' AND d.state = 'made' ORDER BY t.id FOR NO KEY UPDATE OF t`, p.server)
		ids, err := pgx.CollectRows(rows, pgx.RowTo[ID])
		if err != nil || len(ids) == 0 {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET version = $2, updated = now() WHERE server = $1 AND isolation = 'shared' AND state = 'made'`, p.server, p.version); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET generation = generation + 1, updated = now() WHERE id = ANY($1)`, ids); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `SELECT count(tenancy.changed('tenant', id, NULL)) FROM unnest($1::bigint[]) id`, ids)
		return err
	})
	if err != nil {
		return refusal("record version", err)
	}
	c.tn.feed.catchUp(ctx)
	return nil
}

// ErasedRows is how many rows of a table [Catalog.Purge] has deleted.
type ErasedRows struct {
	Table string
	Rows  int64
}

// erase deletes the tenant's rows from its area, and returns how many, all calls together; nil where it never had any. The tenant's logins are closed.
//
// It is the owner who deletes, in a session of its own: on the provisioner's, what the service's triggers run would have the provisioner's rights.
func (c *Catalog) erase(ctx context.Context, p *place) (erased []ErasedRows, err error) {
	ctx, release, err := c.lockArea(ctx, p)
	if err != nil {
		return nil, err
	}
	defer release()
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	var there bool
	err = conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'tenancy_marker'`, p.source.Schema).Scan(&there)
	if err != nil || !there { // nobody was admitted
		return nil, err
	}
	err = c.asOwner(ctx, conn, p, func(ctx context.Context, cc *pgx.ConnConfig) error {
		return asArea(ctx, cc, func(owner *pgx.Conn) error {
			wall := p.wall()
			for _, login := range append(p.logins(), p.denseRoles()...) {
				if err := wall.Dismiss(ctx, owner, login); err != nil {
					return err
				}
			}
			rows, err := wall.Erase(ctx, owner, int64(p.tenant.ID), 0)
			if errors.Is(err, rowsec.ErrUnknown) { // its Create died before
				return nil
			}
			for _, count := range rows {
				erased = append(erased, ErasedRows{count.Table, count.Rows})
			}
			return err
		})
	})
	return erased, err
}

// errSharedStays refuses what this release cannot do with a tenant of an area.
var errSharedStays = invalid(fmt.Errorf("isolation: a tenant with %q stays where it is, and no other tenant moves there: make a tenant anew, and move its rows by the service", IsolationShared))

// sharedStays refuses a move from or to an area.
func sharedStays(isolations ...Isolation) error {
	if slices.Contains(isolations, IsolationShared) {
		return errSharedStays
	}
	return nil
}

// mayUse returns the statements that let a role, which is not of the tenants' group, use the schemas that all tenants share, where they are there.
func mayUse(ctx context.Context, conn *pgx.Conn, role string) (steps []string, err error) {
	for _, schema := range []string{extSchema, refSchema} {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, schema).Scan(&there); err != nil {
			return nil, err
		}
		if there {
			steps = append(steps, "GRANT USAGE ON SCHEMA "+schema+" TO "+ident.Quote(role))
		}
	}
	return steps, nil
}
