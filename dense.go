package tenancy

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/lease"
)

// denseSource is how the pool that tenants of one server and isolation share is reached.
type denseSource struct {
	server     int64
	isolation  Isolation
	generation int64
	source     DataSource
}

// slotKey is one of the connections of such a pool. A tenant's calls go over the same one where that is free, so that a session knows the
// tables and the statements of its own tenants and not of all: PostgreSQL keeps what it has looked up for as long as a session lives.
type slotKey struct {
	server    int64
	isolation Isolation
	n         int32
}

// binding is what makes a session of a shared pool one tenant's, for one generation. Safe for concurrent use.
type binding struct {
	tenant Tenant
	role   string
	bind   string   // the statement that binds a session
	want   identity // what a bound session says
	from   denseSource
	home   int32
	slots  int32
	cut    func() // cuts the shared connections

	inUse    chan struct{} // one for each connection that the tenant has
	waiting  atomic.Int32
	outdated atomic.Int32 // times that a prepared statement turned out to be older than a migration
	refused  atomic.Int64 // calls
	waits    atomic.Int64 // calls
	waited   atomic.Int64 // ns
}

var slotSeed = maphash.MakeSeed()

// newDense returns what stands for a pool of the tenant's own.
func (tn *Tenancy) newDense(r *record) (*tenantPool, error) {
	from := *r.dense
	tn.knowDense(from)
	b := &binding{tenant: r.tenant, role: r.denseRole, from: from, slots: tn.cfg.Limits.DenseConns, cut: tn.cutSlots, inUse: make(chan struct{}, tn.cfg.Limits.TenantConns)}
	b.bind = denseMark(b.role) + "SET ROLE " + ident.Quote(b.role)
	b.home = int32(maphash.String(slotSeed, b.role) % uint64(b.slots))
	b.want = tn.identity(r.tenant.UID, r.source)
	b.want.user, b.want.question = b.role, boundQuestion(r.source.Schema)
	return &tenantPool{tenant: r.tenant, limits: tn.cfg.Limits, dense: b}, nil
}

// knowDense remembers how a shared pool is reached. The connections of a login that it had before are used no more.
func (tn *Tenancy) knowDense(from denseSource) {
	key := slotKey{server: from.server, isolation: from.isolation}
	for {
		stored, known := tn.denseSources.LoadOrStore(key, from)
		if !known || stored.(denseSource).generation >= from.generation {
			return
		}
		if tn.denseSources.CompareAndSwap(key, stored, from) {
			break
		}
	}
	for n := range tn.cfg.Limits.DenseConns {
		tn.slots.Retire(slotKey{from.server, from.isolation, n}, from.generation)
	}
}

// denseMark begins each statement of a role in a shared pool: statements of two tenants are never one, and the server's pg_stat_activity tells whose each is.
func denseMark(role string) string { return "/* " + role + " */ " }

// newSlots returns the connections that tenants share, each a pool of one.
func (tn *Tenancy) newSlots(m *poolMaker) *lease.Table[slotKey, *tenantPool] {
	return lease.New(lease.Config[slotKey, *tenantPool]{
		Build:     m.buildSlot,
		Close:     m.close,
		Cut:       (*tenantPool).cut,
		IdleAfter: tn.cfg.Limits.TenantIdle,
	})
}

// cutSlots interrupts whoever uses a shared connection. It is for the end of everything.
func (tn *Tenancy) cutSlots() {
	tn.slots.Each(func(_ slotKey, _ int64, p *tenantPool, _ int) { p.cut() })
}

func (m *poolMaker) buildSlot(ctx context.Context, key slotKey, generation int64) (*tenantPool, error) {
	stored, _ := m.tn.denseSources.Load(slotKey{server: key.server, isolation: key.isolation})
	from, ok := stored.(denseSource)
	if !ok || from.generation < generation {
		return nil, fmt.Errorf("tenancy: the shared pool of server %d is not known in generation %d", key.server, generation)
	}
	name := Tenant{Name: fmt.Sprintf("shared pool of server %d, %s", key.server, key.isolation), realm: m.tn.realm}
	p := &tenantPool{tenant: name, limits: m.tn.cfg.Limits, slot: true,
		server: m.tn.servers.of(from.source.Host, from.source.Port), breaker: newBreaker(m.tn.cfg.Logger, name)}
	p.want = m.tn.slotIdentity(from)
	return p, m.fill(ctx, p, from.source)
}

// slotSchemas are those on the search_path of a shared pool. "$user" is the schema that is named as the role: with a tenant's role it is the tenant's
// schema, and without one there is none.
func (tn *Tenancy) slotSchemas(from denseSource) []string {
	own := "$user"
	if from.isolation == IsolationShared {
		own = from.source.Schema
	}
	return schemasOf(own, tn.cfg.Extensions, tn.cfg.ReferenceTables)
}

// slotIdentity is what a connection of a shared pool says that is bound to nobody.
func (tn *Tenancy) slotIdentity(from denseSource) identity {
	return identity{user: from.source.User, database: from.source.Database, schemas: tn.slotSchemas(from), question: loginQuestion, unbound: true}
}

const (
	// homePatience is how long a call waits for its tenant's usual connection before it looks at the others: those do not know the tenant's tables yet,
	// and most statements take less.
	homePatience = 5 * time.Millisecond
	// awayPatience is the wait from the second time on.
	awayPatience = 50 * time.Millisecond
)

// errNoSlot says that none of the connections looked at was free.
var errNoSlot = errors.New("tenancy: no connection of the shared pool is free")

// acquireDense takes a connection of the shared pool, for the tenant of c.pool. After an error c holds nothing more than before.
func (tn *Tenancy) acquireDense(ctx context.Context, c *checkout) error {
	b := c.pool.dense
	entered := false
	defer func() {
		if entered && c.conn == nil { // also when a hook of the service panics
			<-b.inUse
		}
	}()
	select {
	case b.inUse <- struct{}{}:
		entered = true
		if err := tn.trySlot(ctx, c, b.home, time.Time{}); !errors.Is(err, errNoSlot) {
			return err
		}
	default:
	}
	if n := b.waiting.Add(1); int(n) > c.pool.limits.TenantWaiters {
		b.waiting.Add(-1)
		b.refused.Add(1)
		return hinted(ErrBusy, "%d calls wait for a connection of the shared pool already", c.pool.limits.TenantWaiters)
	}
	began := time.Now()
	b.waits.Add(1)
	defer func() {
		b.waiting.Add(-1)
		b.waited.Add(int64(time.Since(began)))
	}()
	deadline := began.Add(c.pool.limits.AcquireTimeout)
	if !entered {
		timer := time.NewTimer(time.Until(deadline))
		defer timer.Stop()
		select {
		case b.inUse <- struct{}{}:
			entered = true
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			b.refused.Add(1)
			return hinted(ErrBusy, "none of the tenant's %d connections of the shared pool became free within %v", cap(b.inUse), c.pool.limits.AcquireTimeout)
		}
	}
	for patience := homePatience; ; patience = awayPatience {
		until := time.Now().Add(patience)
		if until.After(deadline) || b.slots == 1 { // there is none to look at
			until = deadline
		}
		if err := tn.trySlot(ctx, c, b.home, until); !errors.Is(err, errNoSlot) {
			return err
		}
		if err := tn.tryOthers(ctx, c, deadline); !errors.Is(err, errNoSlot) {
			return err
		}
		if !time.Now().Before(deadline) {
			b.refused.Add(1)
			return hinted(ErrBusy, "no connection of the shared pool became free within %v", c.pool.limits.AcquireTimeout)
		}
	}
}

// tryOthers looks for a connection away from the tenant's usual one: one that is idle, or else one that is not open yet.
func (tn *Tenancy) tryOthers(ctx context.Context, c *checkout, deadline time.Time) error {
	b := c.pool.dense
	closed := int32(-1)
	for i := int32(1); i < b.slots; i++ {
		n := (b.home + i) % b.slots
		if err := tn.trySlot(ctx, c, n, time.Time{}); !errors.Is(err, errNoSlot) {
			return err
		}
		if closed < 0 && !tn.slotOpen(n, b) {
			closed = n
		}
	}
	if closed < 0 {
		return errNoSlot
	}
	return tn.trySlot(ctx, c, closed, deadline)
}

func (tn *Tenancy) slotOpen(n int32, b *binding) (open bool) {
	l, err := tn.slots.Acquire(context.Background(), slotKey{b.from.server, b.from.isolation, n}, b.from.generation)
	if err != nil {
		return true // the next look tells why
	}
	defer l.Release()
	return l.Value().account.HasConns()
}

// trySlot takes the n-th connection if it is free by then; with a zero time only if it is idle now. Otherwise the error is errNoSlot.
func (tn *Tenancy) trySlot(ctx context.Context, c *checkout, n int32, until time.Time) error {
	b := c.pool.dense
	l, err := tn.slots.Acquire(ctx, slotKey{b.from.server, b.from.isolation, n}, b.from.generation)
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		if !kept {
			l.Release()
		}
	}()
	slot := l.Value()
	for again := false; ; again = true {
		conn, err := slot.acquireBy(ctx, func() time.Time { return until })
		if err != nil {
			if poolClosed(err) {
				l.Discard()
			}
			if errors.Is(err, ErrBusy) {
				return errNoSlot
			}
			return err
		}
		session, err := ready(ctx, conn, b)
		if err == nil {
			kept = true
			c.conn, c.dense, c.slot = conn, session, l
			return nil
		}
		gone := conn.Conn().IsClosed() // while it was idle, most likely: nothing of the call was sent
		slot.discard(ctx, conn)
		if !gone || again || ctx.Err() != nil {
			return err
		}
		if until.IsZero() { // its successor is not there yet
			return errNoSlot
		}
	}
}

// ready makes a connection of a shared pool fit for the tenant: what another one has left in it is gone, and its first use for the tenant proves that
// the tenant is whom it is bound to.
func ready(ctx context.Context, conn *pgxpool.Conn, b *binding) (*denseSession, error) {
	s := denseSessionOf(conn.Conn())
	s.to = b
	if s.spoiled && s.last != b {
		if err := s.reset(ctx); err != nil {
			return nil, err
		}
	}
	if _, proved := s.proved[b]; !proved {
		if err := s.prove(ctx); err != nil {
			return nil, err
		}
	}
	s.last = b
	return s, nil
}

// releaseDense gives back what acquireDense took. A session that has seen enough is replaced by a new one.
func (c *checkout) releaseDense(conn *pgxpool.Conn) {
	if c.dense.full(c.pool.limits.DenseTenants) {
		c.discardDense(context.Background(), conn)
		return
	}
	c.dense.end()
	c.slot.Value().release(conn)
	c.leaveDense()
}

// discardDense is releaseDense for a connection that nobody may use again.
func (c *checkout) discardDense(ctx context.Context, conn *pgxpool.Conn) {
	c.slot.Value().discard(ctx, conn)
	c.leaveDense()
}

func (c *checkout) leaveDense() {
	c.slot.Release()
	<-c.pool.dense.inUse
}

// denseStats are those of a tenant in a shared pool.
func (p *tenantPool) denseStats() TenantStats {
	b := p.dense
	busy := len(b.inUse)
	return TenantStats{Name: p.tenant.Name, Generation: p.tenant.Generation, Dense: true, Conns: busy, Busy: busy, Waiting: int(b.waiting.Load()), Breaker: "closed",
		Waits: b.waits.Load(), WaitTime: time.Duration(b.waited.Load()), Refused: b.refused.Load()}
}

// errUnbound is a session that could not be made the tenant's: its role may have changed, or was closed, and the catalog knows more.
var errUnbound = errors.New("tenancy: the shared pool may not work for the tenant")

// unboundError is the failure to bind a session, as the failure to connect that it stands for.
func unboundError(err error) error {
	if refused, ok := errors.AsType[*pgconn.PgError](err); ok {
		return &connectFailure{text: "taking the tenant's role: " + refused.Message, cause: fmt.Errorf("%w: %w", errUnbound, refused)}
	}
	return unanswered(err)
}

// mark begins the tenant's statements. What was prepared before a migration is never met again: a session knows statements of earlier generations too.
func (b *binding) mark() string {
	return denseMark(b.role + " " + strconv.FormatInt(b.tenant.Generation, 10) + "." + strconv.Itoa(int(b.outdated.Load())))
}
