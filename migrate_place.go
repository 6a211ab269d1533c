package tenancy

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/rowsec"
)

// migratePlace brings a made place to the version that is asked for, and records the one that it has.
func (c *Catalog) migratePlace(ctx context.Context, p *place, e *errand) (applied []int64, err error) {
	if p.isolation == IsolationShared {
		return c.readyArea(ctx, p, e)
	}
	was := p.version
	if !e.look && p.migrating == 0 && was >= p.upTo(e.to) { // another run came first
		return nil, nil
	}
	err = c.lendOwner(ctx, p, e.worker, func(ctx context.Context, cc *pgx.ConnConfig) (err error) {
		applied, err = c.migrateAs(ctx, cc, p, e)
		return err
	})
	if len(applied) > 0 || p.version != was || p.marked {
		err = errors.Join(err, c.recordVersion(context.WithoutCancel(ctx), p))
		if e.worker == nil { // a run does it at its end
			c.tn.feed.catchUp(ctx)
		}
	}
	return applied, err
}

// recordVersion writes the version to the catalog, and moves the tenant that is in the place to a new generation:
// pools that cached plans of the old tables are replaced. Whoever calls it has this node's feed catch up.
func (c *Catalog) recordVersion(ctx context.Context, p *place) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return refusal("record version", c.tn.primary.transact(ctx, func(tx pgx.Tx) error {
		// Both rows first: what changed locks comes last in a transaction.
		_, err := tx.Exec(ctx, `WITH place AS (UPDATE tenancy.data_sources SET version = $2, migrating = nullif($3::bigint, 0), updated = now() WHERE id = $1 RETURNING id),
			tenant AS (UPDATE tenancy.tenants SET generation = generation + 1, updated = now() WHERE id = $4 AND data_source = $1 RETURNING id)
			SELECT tenancy.changed('tenant', tenant.id, NULL) FROM place, tenant`, p.id, p.version, p.migrating, p.tenant.ID)
		return err
	}))
}

// errand is what is asked of the migration of one place.
type errand struct {
	to       int64         // the newest version that is wanted
	patience time.Duration // for the locks of others
	look     bool          // at the schema, whatever version is recorded
	worker   *worker       // of the run; nil: none
	crowded  bool          // its run has a bound of its own on how many there are at once
	area     error         // out: that of the shared schema, which is that of all its tenants
}

// newest is the errand of who makes a place.
func (tn *Tenancy) newest() *errand {
	return &errand{to: tn.migrations.newest(), patience: lockPatience}
}

// upTo is the version that the place may go to when that one is wanted.
func (p *place) upTo(version int64) int64 {
	if p.pinned > 0 {
		return min(version, p.pinned)
	}
	return version
}

// lockPause lets the tenant's own calls pass between two tries for a lock, behind which they wait.
const lockPause = 500 * time.Millisecond

// migrateAs applies what is pending in the place. What waits for a lock of somebody's has lockTimeout, so that who comes behind is not held up for longer, and is tried again
// until the patience ends.
func (c *Catalog) migrateAs(ctx context.Context, cc *pgx.ConnConfig, p *place, e *errand) (applied []int64, err error) {
	if c.tn.migrations.empty() {
		return nil, errNoMigrations
	}
	err = untilFree(ctx, e.patience, func() error {
		more, err := c.migrateOnce(ctx, cc, p, e)
		applied = append(applied, more...)
		return err
	})
	if e := c.showReader(ctx, p, func(role string) error { return readAsOwner(ctx, cc, p, role) }); err == nil {
		err = e
	}
	return applied, err
}

// untilFree tries again what others' locks were in the way of, or a deadlock with them, unless it has left something half done.
func untilFree(ctx context.Context, patience time.Duration, try func() error) error {
	for began := time.Now(); ; {
		err := try()
		if !isState(err, lockNotAvailable, "40P01") || errors.Is(err, ErrMigrationDirty) || ctx.Err() != nil {
			return err
		}
		if time.Since(began) >= patience {
			return fmt.Errorf("transactions of others have kept a table locked, tried for %v; see pg_locks, and call it again: %w", time.Since(began).Round(time.Millisecond), err)
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(lockPause):
		}
	}
}

// migrateOnce goes from one migration without a transaction to the next.
func (c *Catalog) migrateOnce(ctx context.Context, cc *pgx.ConnConfig, p *place, e *errand) (applied []int64, err error) {
	for {
		var alone int64
		err := c.withGoose(ctx, cc, p, true, lockTimeout, func(r *run) error {
			if err := c.settle(ctx, r, p); err != nil {
				return err
			}
			more, next, err := r.upBefore(ctx, p.upTo(e.to), c.tn.migrations.alone())
			applied, alone = append(applied, more...), next
			return err
		})
		if err != nil || alone == 0 {
			return applied, err
		}
		if err := c.migrateAlone(ctx, cc, p, e.patience, alone, func(r *run) error {
			more, err := r.up(ctx, alone)
			applied = append(applied, more...)
			return err
		}); err != nil {
			return applied, err
		}
	}
}

// migrateAlone runs a migration that nothing rolls back when it dies, below 0 the way back, with a mark of it in the primary. It waits for locks all the
// patience at once: tried again it would find what it has left.
func (c *Catalog) migrateAlone(ctx context.Context, cc *pgx.ConnConfig, p *place, patience time.Duration, version int64, fn func(r *run) error) error {
	if err := c.mark(ctx, p, version); err != nil {
		return err
	}
	err := c.withGoose(ctx, cc, p, false, max(patience, lockTimeout), fn)
	if _, begun := errors.AsType[*stepError](err); begun {
		return fmt.Errorf("%w: %w", c.dirty(p), err)
	}
	p.migrating = 0 // the primary learns it with the version
	return err
}

// mark says in the primary what could die half-way from now on.
func (c *Catalog) mark(ctx context.Context, p *place, version int64) error {
	sql, key := `UPDATE tenancy.data_sources SET migrating = $2, updated = now() WHERE id = $1`, p.id
	if p.isolation == IsolationShared {
		sql, key = `UPDATE tenancy.shared_areas SET migrating = $2, updated = now() WHERE server = $1`, p.server
	}
	if _, err := c.tn.primary.pool.Exec(ctx, sql, key, version); err != nil {
		return unavailable("mark migration", err)
	}
	p.migrating, p.marked = version, true
	return nil
}

// settle finds out what became of a migration that is marked: whether it ended, goose knows, and one with a transaction is whole either way.
func (c *Catalog) settle(ctx context.Context, r *run, p *place) error {
	if p.migrating == 0 {
		return nil
	}
	version, up := p.marks()
	applied, err := r.applied(ctx, version)
	if err != nil {
		return err
	}
	if applied != up && slices.Contains(c.tn.migrations.alone(), version) {
		return c.dirty(p)
	}
	p.migrating, p.marked = 0, true
	return nil
}

// marks is the version that is marked, and whether it was on its way up.
func (p *place) marks() (version int64, up bool) {
	return max(p.migrating, -p.migrating), p.migrating > 0
}

func (c *Catalog) dirty(p *place) error {
	version, up := p.marks()
	what := "was being applied"
	if !up {
		what = "was being taken back"
	}
	return hinted(ErrMigrationDirty, "version %d, which says NO TRANSACTION, %s in schema %s: finish it there by hand or undo it, then call Migrator.Resolve(ctx, %d, %d, true) if it is applied now, and with false if it is not",
		version, what, p.source.Schema, p.tenant.ID, version)
}

// withGoose runs fn with goose on the place's schema, and looks at the version that came of it. inTx is that all that fn applies has a transaction.
func (c *Catalog) withGoose(ctx context.Context, cc *pgx.ConnConfig, p *place, inTx bool, lockTimeout time.Duration, fn func(r *run) error) error {
	m := c.tn.migrations
	m.guard = markerTable
	cc = cc.Copy()
	cc.RuntimeParams["lock_timeout"] = strconv.FormatInt(lockTimeout.Milliseconds(), 10)
	var db *sql.DB
	if m.each = inTx; inTx {
		db = openLocked(*cc, ident.Quote(p.source.Schema, m.guard))
	} else {
		db = stdlib.OpenDB(*cc)
		db.SetMaxOpenConns(2) // goose holds one, its lock another
	}
	defer db.Close()
	if p.isolation != IsolationShared {
		m.reader = p.runtime
		calls := func(f Migration) bool { return f.Version > p.version && f.calls }
		if p.state == "intent" || slices.ContainsFunc(m.list, calls) { // they have been there since it was made, and can be an older release's
			if err := installFunctions(ctx, db, p); err != nil {
				return err
			}
		}
	}
	r, err := newRun(db, p.source.Schema, m)
	if err != nil {
		return err
	}
	err = fn(r)
	look, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if version, e := r.version(look); e == nil {
		p.version = version
	}
	return err
}

// installFunctions makes the functions that migrations call for the sake of shared schemas, where the schema is one tenant's.
func installFunctions(ctx context.Context, db *sql.DB, p *place) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return withoutSecrets(err)
	}
	defer conn.Close()
	return conn.Raw(func(driver any) error {
		if locked, ok := driver.(lockedConn); ok {
			driver = locked.Conn
		}
		return rowsec.InstallSchemaModel(ctx, driver.(*stdlib.Conn).Conn(), p.source.Schema, p.owner, p.number())
	})
}

var errNoMigrations = hinted(ErrNoMigrations, "set Config.Migrations to the service's goose files, for example: //go:embed migrations/*.sql and var migrations embed.FS")
