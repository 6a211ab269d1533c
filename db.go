package tenancy

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/internal/lease"
)

// TenantAwareDB is a database that is a different one for each context: every call goes to the
// tenant that its context carries, over a connection that has proved to be that tenant's own. Its
// methods that run statements are those of [pgxpool.Pool], so code written for pgx, sqlc or scany takes it as it is.
//
// It decides anew at each call: a context without a tenant is [ErrNoTenant], one of another
// primary [ErrTenantMismatch], and a tenant that is not served now one of [ErrTenantSuspended],
// [ErrTenantMaintenance], [ErrTenantGone], [ErrTenantNotReady], [ErrSchemaBehind] and [ErrTenantNotFound], whatever it
// was when the context was made. When the primary has been silent for too long the error is
// [ErrPrimaryUnavailable], and when the tenant's own server cannot be reached
// [ErrTenantUnavailable]; when its connections are all in use and as many calls wait as may, or one has waited for
// [Limits].AcquireTimeout, [ErrBusy]; a connection that is not the tenant's is [ErrIdentity] or [ErrPooler] (docs/poolers.md);
// after [Tenancy.Close] it is [ErrClosed]. Errors of a statement are those of pgx, and the one of its ctx where the end of that broke the connection;
// pgconn.SafeToRetry calls none safe whose statement may have been done (what a batch's callbacks get is pgx's own).
//
// Cancelling a call's ctx ends its wait for a connection, or breaks the connection that runs its
// statement, as in pgx.
//
// A statement that was never sent, or (known on Linux alone) cannot have arrived, is sent once more, over another connection; so is, outside a
// transaction, one that the server refused because its plan was older than a migration. Nothing else is ever repeated, and no batch.
//
// [Tenancy.Host] returns the same type over the host's own database: then the tenant of a
// context does not matter, and the error without such a database is [ErrNoHostData].
//
// Safe for concurrent use. It needs no Close: [Tenancy.Close] ends it.
type TenantAwareDB struct {
	tn   *Tenancy
	host bool
}

const closeTimeout = time.Second // for the good-bye on a connection that is given up

// Exec runs sql and returns its command tag. The connection is given back before it returns.
func (db *TenantAwareDB) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	for again := false; ; again = true {
		c, err := db.checkoutFor(ctx, "exec", again)
		if err != nil {
			return pgconn.CommandTag{}, err
		}
		tag, harmless, err := c.exec(ctx, sql, arguments)
		if again || !harmless {
			return tag, err
		}
	}
}

// exec also says whether the statement may be sent once more.
func (c *checkout) exec(ctx context.Context, sql string, arguments []any) (tag pgconn.CommandTag, harmless bool, err error) {
	defer c.release() // also when an argument's Value method panics
	if tag, err = c.on().Exec(ctx, sql, arguments...); err == nil {
		return tag, false, nil
	}
	conn := c.conn.Conn()
	return tag, mayRepeat(ctx, conn, err, execsOne(ctx, conn, sql, arguments)), told(ctx, err, conn.IsClosed())
}

// Query runs sql and returns its rows. They hold a connection until they are closed, read to the
// end, or a Scan fails. args must not be changed before the first Next: the statement may be sent a second time then.
//
// The rows are never nil: after an error they are empty and their Err is that error, so it may be
// ignored where [pgx.CollectRows] and its like follow. What their Conn returns is pgx's own, and only
// theirs until they end.
func (db *TenantAwareDB) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	for again := false; ; again = true {
		c, err := db.checkoutFor(ctx, "query", again)
		if err != nil {
			return errRows{err}, err
		}
		r, harmless, err := c.query(ctx, sql, args)
		if err == nil {
			return &leasedRows{Rows: r, c: c, ctx: ctx, db: db, sql: sql, args: args, begun: again}, nil
		}
		if again || !harmless {
			return errRows{err}, err
		}
	}
}

// query keeps the connection for the rows. After an error it says whether the statement may be sent once more.
func (c *checkout) query(ctx context.Context, sql string, args []any) (r pgx.Rows, harmless bool, err error) {
	kept := false
	defer func() { // an argument's Value method may panic
		if !kept {
			c.release()
		}
	}()
	if r, err = c.on().Query(ctx, sql, args...); err == nil {
		kept = true
		return r, false, nil
	}
	conn := c.conn.Conn()
	return r, mayRepeat(ctx, conn, err, queriesOne(conn, args)), told(ctx, err, conn.IsClosed())
}

// QueryRow runs sql for its first row. The connection is held until Scan, which also gives the
// error; [pgx.ErrNoRows] when there is no row.
func (db *TenantAwareDB) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return errRow{err}
	}
	return (*leasedRow)(rows.(*leasedRows))
}

// SendBatch sends the queries of b at once. The connection is held until the results are closed
// or, after [pgx.Batch.BeginTx], until that transaction is committed or rolled back.
//
// The transaction is guarded like that of [TenantAwareDB.BeginTx], but for its CommitQuery, which is taken for a plain COMMIT.
func (db *TenantAwareDB) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	c, err := db.checkoutFor(ctx, "send batch", true)
	if err != nil {
		return failedBatch{BatchResults: pgx.FailedBatchResults(b, err), err: err}
	}
	kept := false
	defer func() {
		if !kept {
			c.release()
		}
	}()
	br := c.on().SendBatch(ctx, b)
	kept = true
	if inner := br.Tx(); inner != nil {
		return &leasedBatch{toldBatch: toldBatch{br, ctx}, tx: &guardedTx{Tx: inner, pool: c.pool, visit: visitOf(ctx), c: c}}
	}
	return &leasedBatch{toldBatch: toldBatch{br, ctx}, c: c}
}

// CopyFrom copies rows into a table and returns their number, as [pgx.Conn.CopyFrom] does. tableName needs no schema: an
// unqualified one is the tenant's.
//
// For a tenant with [IsolationShared], whose tables PostgreSQL does not copy into, the rows are inserted in batches instead, all of them or none; triggers of
// statements then run for each row. A pgx.Conn that [TenantAwareDB.WithConn] or a transaction's Conn gives is refused by the server (0A000).
func (db *TenantAwareDB) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	src := &watchedSource{CopyFromSource: rowSrc}
	for again := false; ; again = true {
		c, err := db.checkoutFor(ctx, "copy", true) // its rows are asked for at once, and then it cannot begin anew
		if err != nil {
			return 0, err
		}
		n, harmless, err := c.copyFrom(ctx, tableName, columnNames, src)
		if again || !harmless {
			return n, err
		}
	}
}

// copyFrom also says whether the copy may be tried once more.
func (c *checkout) copyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, src *watchedSource) (n int64, harmless bool, err error) {
	defer c.release()
	if c.pool.copies() {
		n, err = c.on().CopyFrom(ctx, tableName, columnNames, src)
	} else {
		n, err = insertRows(ctx, c.on(), c.commit, tableName, columnNames, src)
	}
	if err == nil {
		return n, false, nil
	}
	conn := c.conn.Conn()
	return n, !src.asked.Load() && mayRepeat(ctx, conn, err, true), ended(ctx, told(ctx, err, conn.IsClosed()))
}

// watchedSource remembers whether a row was asked for: then the copy cannot begin anew.
type watchedSource struct {
	pgx.CopyFromSource
	asked atomic.Bool
}

func (s *watchedSource) Next() bool {
	s.asked.Store(true)
	return s.CopyFromSource.Next()
}

// Begin starts a transaction with the server's default modes. See [TenantAwareDB.BeginTx].
func (db *TenantAwareDB) Begin(ctx context.Context) (pgx.Tx, error) {
	return db.BeginTx(ctx, pgx.TxOptions{})
}

// BeginTx starts a transaction. It holds a connection until Commit or Rollback, one of which must
// be called: cancelling ctx does not end it. [TenantAwareDB.InTx] does that by itself.
//
// The transaction stays its tenant's: a statement on it needs a context of the same tenant or of none,
// and with another tenant's is refused with [ErrTenantMismatch]. Commit and Rollback never refuse. What
// its Conn and LargeObjects return is pgx's own and not guarded so: it works on the tenant's data
// whatever the context says.
func (db *TenantAwareDB) BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error) {
	for again := false; ; again = true {
		c, err := db.checkoutFor(ctx, "begin", again)
		if err != nil {
			return nil, err
		}
		conn := c.conn.Conn()
		inner, err := c.on().BeginTx(ctx, txOptions)
		if err == nil {
			return &guardedTx{Tx: inner, pool: c.pool, visit: visitOf(ctx), c: c, commitsMore: txOptions.CommitQuery != ""}, nil
		}
		// What began on a connection that is gone is gone with it, unless BeginQuery did more.
		plain := txOptions.BeginQuery == ""
		lost := conn.IsClosed() && plain && ctx.Err() == nil
		harmless := lost || mayRepeat(ctx, conn, err, plain)
		err = told(ctx, err, conn.IsClosed())
		c.release()
		if again || !harmless {
			return nil, err
		}
	}
}

// InTx runs fn in a transaction and commits it when fn returns nil. When fn returns an error or
// panics, or ctx has ended before the commit, it is rolled back; the rollback has 5 s, and 50 ms from the end of
// ctx on, and then the connection is closed. fn gets ctx, which carries the session.
//
// Inside fn nobody can switch: with its ctx [Tenancy.Enter], [Tenancy.Impersonate] and [Tenancy.Resolve] into another tenant, and
// all work on what [AsHost] returns, are refused with [ErrTenantMismatch].
//
// The error is that of the begin, of fn unchanged, or of the commit: [pgx.ErrTxCommitRollback] when
// fn ignored a failed statement, [pgx.ErrTxClosed] when it ended the transaction itself. fn is run once.
func (db *TenantAwareDB) InTx(ctx context.Context, o pgx.TxOptions, fn func(ctx context.Context, tx pgx.Tx) error) error {
	t, err := db.BeginTx(ctx, o)
	if err != nil {
		return err
	}
	ended := false
	defer func() { // also for a panic, which goes on afterwards, and for runtime.Goexit
		if !ended {
			rollback(ctx, t)
		}
	}()
	if err := fn(withTx(ctx, txOwner{db.tn.realm, t.(*guardedTx).tenant()}), t); err != nil {
		return err
	}
	err = t.Commit(ctx)
	ended = true
	return err
}

// WithConn runs fn with one connection, for what needs a session: LISTEN, temporary tables, advisory
// locks, SET. The connection is closed afterwards, so each call costs a new one and nothing that fn
// does to it can reach another call. It is not guarded against another tenant's context: it works on
// the tenant's data whatever ctx says. fn must not keep it.
//
// Behind a pooler ([ServerConfig].Pooler) there is no session to be had: the error is [ErrSessionPooled] then, and fn is not run. Otherwise it
// is that of the checkout or of fn.
func (db *TenantAwareDB) WithConn(ctx context.Context, fn func(ctx context.Context, conn *pgx.Conn) error) error {
	c, err := db.checkoutFor(ctx, "with conn", true)
	if err != nil {
		return err
	}
	if c.pool != nil && c.pool.want.pooled {
		err := &Error{Op: "with conn", Tenant: c.pool.tenant.ID, Name: c.pool.tenant.Name, Err: ErrSessionPooled}
		c.release()
		return err
	}
	// Closed always, not reset and proved again: the server's state can be reset in one round trip, but a
	// pointer that fn has kept, a changed type map or a goroutine still reading cannot be taken back.
	// A call that can afford a session can afford the 3 ms of a new connection.
	defer c.destroy(ctx)
	if c.dense != nil {
		if err := c.dense.lend(ctx); err != nil {
			return err
		}
	}
	return fn(ctx, c.conn.Conn())
}

// checkout is a connection on loan: what is given back when a call, its rows or its transaction end.
type checkout struct {
	conn  *pgxpool.Conn // nil once given back
	pool  *tenantPool   // nil: the host's
	lease lease.Lease[ID, *tenantPool]

	dense *denseSession                     // what the tenant's calls go through where it shares a pool; nil: conn itself
	slot  lease.Lease[slotKey, *tenantPool] // of the shared pool, with dense
}

// on is what the tenant's statements are run on.
func (c *checkout) on() runner {
	if c.dense != nil {
		return c.dense
	}
	return c.conn
}

// checkout finds the tenant of ctx, its pool, and in it a connection that has proved itself.
func (db *TenantAwareDB) checkout(ctx context.Context, op string) (checkout, error) {
	if db.host {
		return db.checkoutHost(ctx, op)
	}
	r, err := db.tn.current(ctx, op)
	if err != nil {
		return checkout{}, err
	}
	c, err := db.tn.acquire(ctx, r)
	if err != nil && poolClosed(err) {
		// Somebody else closed the pool. Nothing was sent, and the next lease is a new pool's.
		c, err = db.tn.acquire(ctx, r)
	}
	if err != nil && (loginRefused(c.pool, err) || errors.Is(err, errUnbound)) {
		// It may have been another for a moment, which the feed has not told us yet.
		c, err = db.tn.acquireAnew(ctx, r, c.pool, err)
	}
	if err != nil {
		c.pool.sentAway(err)
		return checkout{}, db.tn.checkoutFailure(op, r.tenant, err)
	}
	return c, nil
}

// checkoutFor is checkout. With alive it looks at the connection's socket first and takes no dead one: for what is never sent again.
func (db *TenantAwareDB) checkoutFor(ctx context.Context, op string, alive bool) (checkout, error) {
	for {
		c, err := db.checkout(ctx, op)
		if err != nil || !alive || !c.dead() {
			return c, err
		}
		c.destroy(ctx)
	}
}

// dead says whether the server has said good-bye, which it only does of itself.
func (c *checkout) dead() bool {
	conn := budget.Of(c.conn.Conn().PgConn().Conn())
	return conn != nil && conn.Stirs()
}

// acquireAnew reads the tenant's configuration once more and tries again if it is a newer one. p is the pool whose login was refused.
func (tn *Tenancy) acquireAnew(ctx context.Context, r *record, p *tenantPool, refused error) (checkout, error) {
	if p == nil { // it could not even be built
		tn.view.doubt(ctx, r.tenant.ID)
	} else {
		p.doubtLogin(ctx, tn.view)
	}
	now, err := tn.view.record(ctx, r.tenant.ID)
	if err == nil {
		err = now.served("connect")
	}
	if err != nil {
		return checkout{}, err
	}
	if now.tenant.Generation <= r.tenant.Generation {
		return checkout{}, refused
	}
	return tn.acquire(ctx, now)
}

// acquire leases the tenant's pool and takes a connection out of it. After an error the checkout holds nothing, and names the pool that failed.
func (tn *Tenancy) acquire(ctx context.Context, r *record) (checkout, error) {
	l, err := tn.pools.Acquire(ctx, r.tenant.ID, r.tenant.Generation)
	if err != nil {
		return checkout{}, err
	}
	kept := false
	defer func() { // also when a hook of the service panics
		if !kept {
			l.Release()
		}
	}()
	c := checkout{pool: l.Value(), lease: l}
	if c.pool.dense != nil {
		err = tn.acquireDense(ctx, &c)
	} else if c.conn, err = c.pool.acquire(ctx); poolClosed(err) {
		l.Discard()
	}
	if err != nil {
		return checkout{pool: c.pool}, err
	}
	kept = true
	return c, nil
}

func (db *TenantAwareDB) checkoutHost(ctx context.Context, op string) (checkout, error) {
	if s := sessionOf(ctx); s != nil && s.refused {
		return checkout{}, &Error{Op: op, Name: "host", Err: errSwitchInTx}
	}
	if err := visitOver(ctx); err != nil {
		return checkout{}, &Error{Op: op, Name: "host", Err: err}
	}
	if db.tn.hostPool == nil {
		return checkout{}, hinted(ErrNoHostData, "set Config.HostURL")
	}
	wait, cancel := context.WithTimeout(ctx, db.tn.cfg.Limits.AcquireTimeout)
	defer cancel()
	conn, err := db.tn.hostPool.Acquire(wait)
	if err != nil && ctx.Err() == nil && wait.Err() != nil {
		return checkout{}, &Error{Op: op, Name: "host", RetryAfter: busyRetryAfter, Err: hinted(ErrBusy, "no connection to the host's database within %v", db.tn.cfg.Limits.AcquireTimeout)}
	}
	if poolClosed(err) {
		err = ErrClosed
	}
	if err != nil {
		return checkout{}, &Error{Op: op, Name: "host", Err: withoutSecrets(err)}
	}
	return checkout{conn: conn}, nil
}

func (tn *Tenancy) checkoutFailure(op string, t Tenant, err error) error {
	if e, ok := err.(*Error); ok {
		return e // the look-up's own, with its RetryAfter
	}
	tn.logPanic(t, err)
	e := &Error{Op: op, Tenant: t.ID, Name: t.Name, Err: err}
	_, connecting := errors.AsType[*connectFailure](err)
	if _, ok := errors.AsType[*refusedAttempt](err); ok {
		connecting = true
	}
	switch {
	case errors.Is(err, lease.ErrClosed), errors.Is(err, budget.ErrClosed):
		e.Err = ErrClosed
	case errors.Is(err, ErrBusy):
		e.RetryAfter = busyRetryAfter
	case errors.Is(err, ErrIdentity), errors.Is(err, ErrPooler):
		// Nothing was read over it. Whoever is on call should still hear of it from more than one request's error.
		tn.cfg.Logger.Error("tenancy: a connection was refused because it is not its tenant's", "tenant", t.ID, "name", t.Name, "error", err)
	case connecting && !errors.Is(err, context.Canceled):
		e.Err, e.RetryAfter = fmt.Errorf("%w: %w", ErrTenantUnavailable, err), time.Second
		if refused, ok := errors.AsType[*refusedAttempt](err); ok {
			e.RetryAfter = max(e.RetryAfter, refused.after)
		}
	}
	return e
}

// busyRetryAfter is a guess: how long calls take is the service's to know.
const busyRetryAfter = time.Second

// release gives the connection and the lease back, once.
func (c *checkout) release() {
	conn := c.conn
	if conn == nil {
		return
	}
	c.conn = nil
	switch {
	case c.pool == nil:
		conn.Release()
		return
	case c.dense != nil:
		c.releaseDense(conn)
	default:
		c.pool.release(conn)
	}
	c.lease.Release()
}

// destroy is release for a connection that nobody may use again.
func (c *checkout) destroy(ctx context.Context) {
	conn := c.conn
	c.conn = nil
	switch {
	case c.pool == nil:
		destroy(ctx, conn)
		return
	case c.dense != nil:
		c.discardDense(ctx, conn)
	default:
		c.pool.discard(ctx, conn)
	}
	c.lease.Release()
}
