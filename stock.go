package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// stockLock orders who adds a place to the stock, so that all nodes together keep no more of them than one is told to.
const stockLock = `SELECT pg_advisory_xact_lock(hashtextextended('tenancy stock', 0))`

// unclaimed is the condition on a place d that no tenant has it or had it made.
const unclaimed = `NOT EXISTS (SELECT FROM tenancy.tenants t WHERE t.data_source = d.id) AND NOT EXISTS (SELECT FROM tenancy.tenants t WHERE t.uid = d.uid)`

// stockReady is the condition on a place d of the stock that a new tenant with isolation $1 can have it, to which version $3 is the newest. One that a newer release has
// migrated cannot be, but in a shared schema, which has one version for all.
const stockReady = `d.stocked AND d.state = 'made' AND d.isolation = $1 AND (d.version = $3 OR d.isolation = 'shared' AND d.version > $3) AND d.migrating IS NULL AND ` + unclaimed

// stockCount counts the places that are ready, and those that are on their way, apart from those with the ids $4 and those at servers $5. $2 is Config.Stock.
const stockCount = `(SELECT count(*) FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE s.weight > 0 AND d.id <> ALL($4::bigint[])
	AND (` + stockReady + ` OR d.stocked AND d.state = 'intent' AND d.isolation = $1 AND d.updated > now() - interval '1 hour' AND d.server <> ALL($5::bigint[]) AND ` + unclaimed + `))`

// fillStock brings the stock to Config.Stock places, each migrated to the newest version: it finishes what a crash has left, migrates what is behind and makes
// what is missing. Nodes that do it at once share the work. What is more than Config.Stock is not dropped: Create uses it up. Places at a server that takes only tenants which
// name it do not count, and neither do those that a newer release has migrated. What cannot be made is left to the next run, and others are made.
func (c *Catalog) fillStock(ctx context.Context) error {
	if c.tn.cfg.Stock == 0 || c.tn.migrations.empty() {
		return nil
	}
	// One that is behind is taken out first: nobody claims it while it is migrated. No more than are missing: nodes of the release before have use for the others.
	pool, isolation := c.tn.primary.pool, c.tn.cfg.Isolation
	failed, down := []int64{}, []int64{} // places, servers
	if _, err := pool.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'intent', updated = now() WHERE stocked AND state = 'made' AND id IN (SELECT d.id FROM tenancy.data_sources d
		WHERE d.stocked AND d.state = 'made' AND d.isolation = $1 AND d.version < $3 AND `+unclaimed+` ORDER BY d.id LIMIT greatest(0, $2 - `+stockCount+`))`,
		isolation, c.tn.cfg.Stock, c.tn.migrations.newest(), failed, down); err != nil {
		return unavailable(opStock, err)
	}
	rows, _ := pool.Query(ctx, `SELECT d.id, d.server FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
		WHERE d.stocked AND d.state = 'intent' AND d.isolation = $1 AND s.provisioner IS NOT NULL AND `+unclaimed+` ORDER BY d.id`, isolation)
	type begun struct{ ID, Server int64 }
	unfinished, err := pgx.CollectRows(rows, pgx.RowToStructByPos[begun])
	if err != nil {
		return unavailable(opStock, err)
	}
	var errs []error
	for _, b := range unfinished {
		if slices.Contains(down, b.Server) {
			failed = append(failed, b.ID)
		} else if err := c.finishStock(ctx, b.ID); err != nil {
			errs, failed = append(errs, &Error{Op: opStock, Err: err}), append(failed, b.ID)
			if silent(err) {
				down = append(down, b.Server)
			}
		}
	}
	for made := 0; made < c.tn.cfg.Stock; {
		server, err := c.addStock(ctx, failed, down)
		if err != nil {
			errs, down = append(errs, &Error{Op: opStock, Err: err}), append(down, server)
		} else {
			made++
		}
		if server == 0 || ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

const opStock = "fill the stock"

// silent says whether err is of a server that nobody reaches.
func silent(err error) bool {
	_, connect := errors.AsType[*connectFailure](err)
	_, answered := errors.AsType[*pgconn.PgError](err)
	return connect && !answered
}

// stockServer is where the stock gets its next place, 0 where it is short of none, no server has room, or only those that are down. A server at which more than
// Config.Stock places were never finished gets no others.
func (c *Catalog) stockServer(ctx context.Context, q querier, failed, down []int64) (id int64, name string, err error) {
	err = q.QueryRow(ctx, `SELECT s.id, s.name FROM tenancy.servers s, LATERAL (SELECT count(*) AS places, count(*) FILTER (WHERE d.stocked AND d.state = 'intent') AS unfinished
			FROM tenancy.data_sources d WHERE d.server = s.id AND d.state <> 'dropped') p
		WHERE `+stockCount+` < $2 AND s.provisioner IS NOT NULL AND s.weight > 0 AND (s.capacity = 0 OR p.places < s.capacity) AND p.unfinished <= $2 AND s.id <> ALL($5::bigint[])
		ORDER BY p.places::float8 / s.weight, s.weight DESC, s.id LIMIT 1`,
		c.tn.cfg.Isolation, c.tn.cfg.Stock, c.tn.migrations.newest(), failed, down).Scan(&id, &name)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, "", nil
	}
	return id, name, err
}

// addStock makes one place where the stock is short of one, and says at which server it was or failed, 0: at none. The places that have failed do not count, and a server that is
// down gets none.
func (c *Catalog) addStock(ctx context.Context, failed, down []int64) (server int64, err error) {
	uid, isolation := newUID(), c.tn.cfg.Isolation
	server, name, err := c.stockServer(ctx, c.tn.primary.pool, failed, down)
	if err != nil || server == 0 {
		return 0, unavailable(opStock, err)
	}
	ctx, release, err := c.tn.primary.tryLockUID(ctx, uid) // as a Prepare
	if err != nil {
		return 0, err
	}
	defer release()
	if err := c.checkServer(ctx, name, isolation); err != nil {
		return full(server, name, err)
	}
	var source int64
	err = pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) (err error) {
		if _, err := tx.Exec(ctx, stockLock); err != nil {
			return err
		}
		if server, name, err = c.stockServer(ctx, tx, failed, down); err != nil || server == 0 {
			return err
		}
		if source, err = c.intendPlace(ctx, tx, uid, 0, name, isolation); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET stocked = true WHERE id = $1`, source); err != nil {
			return err
		}
		return audit(ctx, tx, "stock", 0, map[string]any{"isolation": isolation})
	})
	if err != nil || server == 0 {
		return full(0, name, refusal(opStock, err))
	}
	return full(server, name, c.makeStock(ctx, source))
}

// full is what became of a place at a server: one that has got no room any more is no error.
func full(server int64, name string, err error) (int64, error) {
	switch {
	case errors.Is(err, ErrNoRoom):
		return 0, nil
	case err != nil && server != 0:
		err = fmt.Errorf("server %q: %w", name, err)
	}
	return server, err
}

// finishStock makes a place of the stock that was begun, unless somebody is at it.
func (c *Catalog) finishStock(ctx context.Context, id int64) error {
	p, err := c.placeByID(ctx, id)
	if err != nil {
		return err
	}
	ctx, p, release, err := c.lockUnused(ctx, p)
	switch {
	case errors.Is(err, errLocked):
		return nil
	case err != nil:
		return err
	}
	defer release()
	var still bool
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT d.stocked AND d.state = 'intent' AND `+unclaimed+` FROM tenancy.data_sources d WHERE d.id = $1`, id).Scan(&still); err != nil || !still {
		return unavailable(opStock, err)
	}
	if err := c.reroute(ctx, p); err != nil {
		return err
	}
	return c.makeStock(ctx, id)
}

// makeStock makes the place, whose UID is locked, and puts it into the stock.
func (c *Catalog) makeStock(ctx context.Context, id int64) error {
	p, err := c.placeByID(ctx, id)
	if err != nil {
		return err
	}
	done, err := c.tn.slot(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := c.make(ctx, p); err != nil {
		return err
	}
	_, err = c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'made', version = $2, migrating = NULL, updated = now() WHERE id = $1 AND stocked AND state = 'intent'`, p.id, p.version)
	return unavailable(opStock, err)
}

// stockFor is stockReady at server s, where server $2 is asked for, with room for one more in use.
const stockFor = stockReady + ` AND (s.name = $2 OR $2 = '' AND s.weight > 0)
	AND (s.capacity = 0 OR s.capacity > (SELECT count(*) FROM tenancy.data_sources o WHERE o.server = s.id AND o.state <> 'dropped' AND NOT o.stocked))`

// stocked is a place of the stock.
type stocked struct {
	source   int64 // 0: none
	uid      UID
	promised *int64
}

// takeStock keeps a place of the stock for tx, where there is one.
func (c *Catalog) takeStock(ctx context.Context, tx pgx.Tx, server string, isolation Isolation) (s stocked, err error) {
	if err := lockServers(ctx, tx, server); err != nil {
		return s, err
	}
	err = tx.QueryRow(ctx, `SELECT d.id, d.uid, d.promised FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE `+stockFor+` AND d.promised IS NOT NULL
		ORDER BY d.id LIMIT 1 FOR UPDATE OF d SKIP LOCKED`, isolation, server, c.tn.migrations.newest()).Scan(&s.source, &s.uid, &s.promised)
	if errors.Is(err, pgx.ErrNoRows) {
		return stocked{}, nil
	}
	return s, err
}

// routeStock gives the login of a place from the stock the pooler that its server is registered with since.
func (c *Catalog) routeStock(ctx context.Context, p *place) error {
	was := p.source
	if err := c.reroute(ctx, p); err != nil || p.source == was {
		return err
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return c.tn.setLogin(ctx, conn, p.source)
}

// kickStock has the stock filled soon, where this node keeps one.
func (f *feed) kickStock() {
	select {
	case f.stock <- struct{}{}:
	default:
	}
}

// keepStock fills the stock at each kick.
func (f *feed) keepStock() {
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.stock:
		}
		if err := f.tn.catalog.fillStock(f.ctx); err != nil && f.ctx.Err() == nil {
			f.log.Warn("tenancy: the stock of places was not filled; the validity job tries again, and tenants are made without", "error", err)
		}
	}
}
