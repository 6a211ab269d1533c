package tenancy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/budget"
)

// markKey is where a connection that the budget has not dialled carries its proof.
const markKey = "github.com/msmt-go/tenancy.proof"

// proofOf returns what a connection carries as its proof; nil: nothing. It is asked for at each call.
func proofOf(pg *pgconn.PgConn) any {
	if c := budget.Of(pg.Conn()); c != nil {
		return c.Proof
	}
	return pg.CustomData()[markKey]
}

// carry has a connection carry its proof.
func (m *proof) carry(pg *pgconn.PgConn) {
	if m.conn = budget.Of(pg.Conn()); m.conn != nil {
		m.conn.Proof = m
		return
	}
	pg.CustomData()[markKey] = m
}

// proof says which pool a connection was proved for. A connection of another tenant, generation or realm is another pool's.
type proof struct {
	pool     *tenantPool
	conn     *budget.Conn // nil: the budget has not dialled it
	doubtful bool         // it was unused for so long that it is asked whether it lives; only who has the connection looks
	rested   bool         // it was unused for long enough to look at its socket first, where nothing tells afterwards what did not arrive
}

// stirs says whether the server has said something since the last answer, or is gone.
func (m *proof) stirs() bool { return m.conn != nil && m.conn.Stirs() }

// idleOnly is the key of a context in which the pool must not dial.
type idleOnly struct{}

// noPermitPause is the wait of an attempt to connect that found no permit.
const noPermitPause = 5 * time.Millisecond

// errFoundIdle is an attempt to connect that found an idle connection, which says nothing of the server.
var errFoundIdle = errors.New("tenancy: a connection was idle")

// errDead is a connection that was closed behind our back, or does not answer. Nothing was sent over it.
var errDead = errors.New("tenancy: the connection is dead")

// unansweredPing is errDead after a question that had no answer, and how long that took.
type unansweredPing struct {
	took  time.Duration
	cause error
}

func (u *unansweredPing) Error() string        { return errDead.Error() + ": " + u.cause.Error() }
func (u *unansweredPing) Unwrap() error        { return u.cause }
func (u *unansweredPing) Is(target error) bool { return target == errDead }

// acquire takes a connection that is proved to be the tenant's own, whatever built the pool. Whoever gets one calls release.
func (p *tenantPool) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	return p.acquireBy(ctx, func() time.Time { return time.Now().Add(p.limits.AcquireTimeout) })
}

// acquireBy is acquire for a caller whose patience ends at another time, which is asked for when it has to wait; a zero one is not to wait at all.
func (p *tenantPool) acquireBy(ctx context.Context, until func() time.Time) (*pgxpool.Conn, error) {
	var deadline time.Time
	for missed := 0; ; {
		if missed > 1 || !p.account.TryEnter() {
			if deadline.IsZero() {
				if deadline = until(); deadline.IsZero() {
					return nil, errNoSlot
				}
			}
			if err := p.enter(ctx, deadline, missed); err != nil {
				return nil, err
			}
		}
		conn, err := p.checkOut(ctx)
		if err == nil {
			return conn, nil
		}
		switch {
		case errors.Is(err, budget.ErrNoPermit): // what seemed to be idle was not; the first time somebody was just quicker
			missed++
		case errors.Is(err, errDead):
			p.pool.Reset() // the others are as old, and asking each of them would take as long
			missed = 1
			if ping, ok := errors.AsType[*unansweredPing](err); ok && deadline.IsZero() && p.slot == 0 { // it is of the time that the call waits
				if deadline = until(); !deadline.IsZero() {
					deadline = deadline.Add(-ping.took)
				}
			}
		default:
			return nil, connectError(err)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// doubtLogin has the tenant's configuration read again because its login was refused: once in a while, however many calls that fails. When
// it returns, what is remembered is no older than the refusal, or than that while, unless the primary did not answer or ctx has ended.
func (p *tenantPool) doubtLogin(ctx context.Context, v *view) {
	p.doubtMu.Lock()
	first := time.Since(p.doubted) > breakerPause
	var read <-chan struct{}
	if first {
		p.doubted = time.Now()
		read = v.reread(p.tenant.ID)
	} else {
		read = v.tenants().reloading(p.tenant.ID)
	}
	p.doubtMu.Unlock()
	if first {
		v.await(ctx, read)
		return
	}
	select { // whoever was first says that something may have changed
	case <-read:
	case <-ctx.Done():
	}
}

// enter waits in line. Where the data source is known to be out of reach, nobody waits.
func (p *tenantPool) enter(ctx context.Context, deadline time.Time, missed int) error {
	if !p.account.HasConns() {
		if err := p.breaker.open(); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil { // it does not even begin to wait
		return err
	}
	err := p.account.Enter(ctx, deadline, missed)
	switch {
	case err != nil && err == ctx.Err():
		return &leftLine{err}
	case errors.Is(err, budget.ErrFull):
		if err = p.breaker.trouble(); err == nil {
			err = hinted(ErrBusy, "%d calls wait for one of its connections already (Limits.TenantWaiters)", p.limits.TenantWaiters)
		}
	case errors.Is(err, budget.ErrTimeout):
		err = p.waitedInVain(err)
	}
	if errors.Is(err, ErrBusy) {
		p.refused.Add(1)
	}
	return err
}

// leftLine is the end of a call's ctx while the call waited for a connection. Nothing was sent.
type leftLine struct{ ended error }

func (l *leftLine) Error() string {
	return l.ended.Error() + " while the call waited in line for a connection"
}
func (l *leftLine) Unwrap() error { return l.ended }

// waitedInVain says why no connection came in time, and what to do about it.
func (p *tenantPool) waitedInVain(err error) error {
	if failure, ok := errors.AsType[*connectFailure](err); ok && !isFull(failure) {
		return failure
	}
	within, conns := p.limits.AcquireTimeout, p.account.Usage().Conns
	making, ceiling := p.account.Making()
	starved := errors.Is(err, budget.ErrNoPermit)
	switch {
	case ofLogin(err):
		return hinted(ErrBusy, "no connection could be opened within %v: its login's CONNECTION LIMIT is reached (is Limits.Nodes right? Catalog.RotatePassword makes a login with today's limit)", within)
	case isFull(err):
		return hinted(ErrBusy, "no connection could be opened within %v: the server has none left (its max_connections is below Limits.ServerConns and what else connects, or more nodes run than Limits.Nodes says)", within)
	case making > 0 && starved:
		return hinted(ErrBusy, "no connection could be opened within %v: %d are still being opened (does the server answer?), and this node's budget of it is used up (Limits.ServerConns)", within, making)
	case making > 0:
		return hinted(ErrBusy, "no connection could be opened within %v: %d are still being opened (does the server answer?), and %d are in use", within, making, max(0, conns-making))
	case starved:
		return hinted(ErrBusy, "no connection could be opened within %v beside the %d of %d that are: this node's budget of the server is used up (raise Limits.ServerConns, or have fewer nodes or tenants there)", within, conns, ceiling)
	case conns < ceiling:
		return hinted(ErrBusy, "no connection became free within %v, and none could be opened: the server may not have let go of those that broke", within)
	}
	switch {
	case p.slot > 0:
		return hinted(ErrBusy, "none of the %d connections of its part of the shared pool became free within %v: look for slow statements and transactions that stay open, or raise Limits.DenseConns", conns, within)
	case ceiling < int(p.limits.TenantConns):
		return hinted(ErrBusy, "none of its %d connections became free within %v: look for slow statements and transactions that stay open, or raise the MaxConns that Config.PoolConfig or PoolBuilder sets", conns, within)
	}
	return hinted(ErrBusy, "none of its %d connections became free within %v: look for slow statements and transactions that stay open, or raise Limits.TenantConns", conns, within)
}

// checkOut takes a connection out of the pool. The caller has been admitted: one is idle. Without one it has left again.
func (p *tenantPool) checkOut(ctx context.Context) (checked *pgxpool.Conn, err error) {
	defer func() {
		if checked == nil { // also when a hook of the service panics
			p.account.Leave()
		}
	}()
	conn, err := p.takeOut(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.check(ctx, conn.Conn()); err != nil {
		destroy(ctx, conn)
		return nil, err
	}
	return conn, nil
}

// takeOut asks the pool. One that a builder made from other settings bounds itself, and whoever finds it used up waits in it, not in line.
func (p *tenantPool) takeOut(ctx context.Context) (*pgxpool.Conn, error) {
	if p.account.Bounds() {
		return p.pool.Acquire(ctx)
	}
	bounded, cancel := context.WithTimeout(ctx, p.limits.AcquireTimeout)
	defer cancel()
	conn, err := p.pool.Acquire(bounded)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		p.refused.Add(1)
		err = hinted(ErrBusy, "the pool that Config.PoolBuilder made gave out no connection within %v", p.limits.AcquireTimeout)
	}
	return conn, err
}

// check looks at a connection's proof, and asks one that was unused for long whether it lives.
func (p *tenantPool) check(ctx context.Context, conn *pgx.Conn) error {
	data := proofOf(conn.PgConn())
	mark, ok := data.(*proof)
	switch {
	case data == nil:
		return p.proveWithin(ctx, conn)
	case !ok:
		return hinted(ErrIdentity, "the pool gave out a connection that was proved for another pool: it was marked by other code")
	case mark.pool != p:
		return hinted(ErrIdentity, "the pool gave out a connection that was proved for another pool: it was that of tenant id %d, generation %d",
			mark.pool.tenant.ID, mark.pool.tenant.Generation)
	case mark.doubtful || !budget.TellsUnheard && mark.rested && mark.stirs(): // a good-bye may be waiting to be read, and then what is sent now is lost
		began := time.Now()
		bounded, cancel := context.WithTimeout(ctx, min(p.limits.PingTimeout, p.limits.AcquireTimeout/2)) // the rest is for another connection
		defer cancel()
		if err := conn.Ping(bounded); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return &unansweredPing{time.Since(began), withoutSecrets(err)}
		}
		mark.doubtful = false
	case conn.IsClosed():
		return errDead
	}
	return nil
}

func (p *tenantPool) proveWithin(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, p.limits.ConnectTimeout)
	defer cancel()
	return p.prove(ctx, conn)
}

// release gives a connection back, and its place in the line to the next caller.
func (p *tenantPool) release(conn *pgxpool.Conn) {
	c := conn.Conn()
	if c.IsClosed() || c.PgConn().IsBusy() || c.PgConn().TxStatus() != 'I' { // the pool closes it
		doom(c)
	} else if p.afterRelease != nil {
		go func() {
			defer p.account.Leave()
			if !p.afterRelease(c) {
				destroy(context.Background(), conn)
				return
			}
			conn.Release()
		}()
		return
	}
	conn.Release()
	p.account.Leave()
}

// discard is release for a connection that nobody may use again.
func (p *tenantPool) discard(ctx context.Context, conn *pgxpool.Conn) {
	destroy(ctx, conn)
	p.account.Leave()
}

// destroy closes a connection and tells its pool.
func destroy(ctx context.Context, conn *pgxpool.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	doom(conn.Conn())      // one that broke is closed by pgx when its cancel request has ended, and would count as idle until then
	conn.Conn().Close(ctx) // an error changes nothing: the socket is closed either way
	conn.Release()
}

// doom tells the budget that the connection serves nobody any more.
func doom(conn *pgx.Conn) {
	if c := budget.Of(conn.PgConn().Conn()); c != nil {
		c.Doom()
	}
}

// connect has the pool make a connection, for whoever waits for one.
func (p *tenantPool) connect(making context.Context) (retry time.Duration, err error) {
	err = p.breaker.do(func() (err error) {
		defer func() { p.server.attempted(err) }()
		ctx, cancel := context.WithTimeout(making, 2*p.limits.ConnectTimeout) // to connect, and to prove
		defer cancel()
		conn, err := p.pool.Acquire(ctx)
		if ctx.Err() != nil && err != nil {
			return &connectFailure{text: fmt.Sprintf("no connection within %v", 2*p.limits.ConnectTimeout), cause: ctx.Err()}
		}
		if err != nil {
			return connectError(err)
		}
		defer conn.Release()
		switch {
		case budget.Of(conn.Conn().PgConn().Conn()) == nil:
			p.account.Unseen()
		case !budget.Dialled(making):
			return errFoundIdle
		}
		return nil
	})
	if errors.Is(err, errFoundIdle) {
		return 0, nil
	}
	if errors.Is(err, budget.ErrNoPermit) { // a hook of the service has dialled on its own account
		return noPermitPause, err
	}
	if !isFull(err) {
		p.crowded.Store(0)
		return 0, err
	}
	// The server, or the login, has no connection left: others than this process's budget have them. Room is made where it helps, and
	// whoever waits waits on.
	if !ofLogin(err) {
		p.account.Shrink()
	}
	wait := 25 * time.Millisecond << min(p.crowded.Add(1), 4)
	return wait/2 + rand.N(wait), err
}

// ofLogin says whether "too many connections" is about the login's CONNECTION LIMIT. The text is translated by the server; its origin is not.
func ofLogin(err error) bool {
	refused, ok := errors.AsType[*pgconn.PgError](err)
	return ok && refused.Routine == "InitializeSessionUserId"
}

// evict closes one idle connection to make room for another tenant's.
func (p *tenantPool) evict() bool {
	if !p.built.Load() { // what the builder has opened is still its own
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), idleOnly{}, true), closeTimeout)
	defer cancel()
	conn, err := p.pool.Acquire(ctx)
	if err != nil {
		return false
	}
	destroy(ctx, conn)
	return true
}

// outdates says whether an answer of the server means that the pool's other connections are worth nothing: the server goes
// away, has become read-only, or has plans of tables that are no longer so. See "A tenants' server restarts or fails over" in docs/operations.md.
func outdates(conn *pgconn.PgConn, err *pgconn.PgError) bool {
	switch err.Code {
	case "57P01", "57P02", "57P03":
		return true
	case "25006": // not where a transaction was begun read-only, which is its owner's business
		return conn.TxStatus() == 'I' || conn.ParameterStatus("in_hot_standby") == "on" || conn.ParameterStatus("default_transaction_read_only") == "on"
	}
	return outdatedPlan(err)
}

// outdatedPlan is what a statement says that was prepared before a migration. Its text is translated by the server; its origin is not.
func outdatedPlan(err *pgconn.PgError) bool {
	return err.Code == "0A000" && err.Routine == "RevalidateCachedQuery"
}
