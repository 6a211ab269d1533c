package tenancy

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// stockLock orders who adds a place to the stock, so that all nodes together keep no more of them than one is told to.
const stockLock = `SELECT pg_advisory_xact_lock(hashtextextended('tenancy stock', 0))`

// fillStock brings the stock to Config.Stock places, each migrated to the newest version: it finishes what a crash has left, migrates what is behind and makes
// what is missing. Nodes that do it at once share the work. What is more than Config.Stock is not dropped: Create uses it up. Places at a server that takes only tenants which
// name it do not count.
func (c *Catalog) fillStock(ctx context.Context) error {
	if c.tn.cfg.Stock == 0 || c.tn.migrations.empty() {
		return nil
	}
	// One that is behind is taken out first: nobody claims it while it is migrated.
	pool, isolation := c.tn.primary.pool, c.tn.cfg.Isolation
	if _, err := pool.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'intent', updated = now() WHERE stocked AND state = 'made' AND isolation = $1 AND version < $2`,
		isolation, c.tn.migrations.newest()); err != nil {
		return unavailable(opStock, err)
	}
	rows, _ := pool.Query(ctx, `SELECT d.id FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
		WHERE d.stocked AND d.state = 'intent' AND d.isolation = $1 AND s.provisioner IS NOT NULL ORDER BY d.id`, isolation)
	unfinished, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return unavailable(opStock, err)
	}
	var errs []error
	for _, id := range unfinished {
		if err := c.finishStock(ctx, id); err != nil {
			errs = append(errs, &Error{Op: opStock, Err: err})
		}
	}
	for len(errs) == 0 {
		more, err := c.addStock(ctx)
		if err != nil {
			errs = append(errs, &Error{Op: opStock, Err: err})
		} else if !more {
			break
		}
	}
	return errors.Join(errs...)
}

const opStock = "fill the stock"

// addStock makes one place where the stock is short of one, and says whether it was.
func (c *Catalog) addStock(ctx context.Context) (more bool, err error) {
	uid, isolation := newUID(), c.tn.cfg.Isolation
	short := func(q querier) (short bool, err error) {
		err = q.QueryRow(ctx, `SELECT count(*) < $2 FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
			WHERE d.stocked AND d.state <> 'dropped' AND d.isolation = $1 AND s.weight > 0`, isolation, c.tn.cfg.Stock).Scan(&short)
		return short, err
	}
	if some, err := short(c.tn.primary.pool); err != nil || !some {
		return false, unavailable(opStock, err)
	}
	ctx, release, err := c.tn.primary.tryLockUID(ctx, uid) // as a Prepare
	if err != nil {
		return false, err
	}
	defer release()
	if err := c.checkServer(ctx, "", isolation); err != nil {
		return false, err
	}
	var source int64
	err = pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) (err error) {
		if _, err := tx.Exec(ctx, stockLock); err != nil {
			return err
		}
		if more, err = short(tx); err != nil || !more {
			return err
		}
		if source, err = c.intendPlace(ctx, tx, uid, 0, "", isolation); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET stocked = true WHERE id = $1`, source); err != nil {
			return err
		}
		return audit(ctx, tx, "stock", 0, map[string]any{"isolation": isolation})
	})
	if err != nil {
		return false, refusal(opStock, err)
	}
	if !more {
		return false, nil
	}
	return true, c.makeStock(ctx, source)
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
	if p.state != "intent" {
		return nil
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

// stockFor is the condition on a place d, at server s, of the stock for a new tenant with isolation $1, of which server $2 is asked, and to which version $3 is the newest.
const stockFor = `d.stocked AND d.state = 'made' AND d.isolation = $1 AND d.version = $3 AND d.migrating IS NULL AND (s.name = $2 OR $2 = '' AND s.weight > 0)`

// stocked is a place of the stock.
type stocked struct {
	source   int64 // 0: none
	uid      UID
	promised *int64
}

// takeStock keeps a place of the stock for tx, where there is one.
func (c *Catalog) takeStock(ctx context.Context, tx pgx.Tx, server string, isolation Isolation) (s stocked, err error) {
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
