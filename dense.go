package tenancy

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
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

// poolKey names a shared pool.
type poolKey struct {
	server    int64
	isolation Isolation
}

// sharedPool is what this node knows of a shared pool. PostgreSQL keeps what a session has looked up for as long as it lives, so a session must not know too many
// tenants. Few of them have all connections together, of which those that were used last are used first; more are parted into groups, by hash, each with its part of the connections.
type sharedPool struct {
	source  atomic.Pointer[denseSource]
	tenants atomic.Int64 // in use on this node
	groups  atomic.Int32 // a power of two; it never falls
}

// slotKey is one of the groups of a shared pool.
type slotKey struct {
	poolKey
	groups, n int32
}

// binding is what makes a session of a shared pool one tenant's, for one generation. Safe for concurrent use.
type binding struct {
	tenant Tenant
	serial int64 // of all in this process: a session knows statements of earlier ones too
	role   string
	bind   string   // the statement that binds a session
	want   identity // what a bound session says
	from   denseSource
	pool   *sharedPool
	hash   uint64
	cut    func() // cuts the shared connections

	inUse    chan struct{} // one for each connection that the tenant has
	waiting  atomic.Int32
	outdated atomic.Int32 // times that a prepared statement turned out to be older than a migration
	refused  atomic.Int64 // calls
	waits    atomic.Int64 // calls
	waited   atomic.Int64 // ns
}

var slotSeed = maphash.MakeSeed()

var bindings atomic.Int64 // that were made in this process

// newDense returns what stands for a pool of the tenant's own.
func (tn *Tenancy) newDense(r *record) (*tenantPool, error) {
	from := *r.dense
	b := &binding{tenant: r.tenant, serial: bindings.Add(1), role: r.denseRole, from: from, pool: tn.sharedPool(from), hash: maphash.String(slotSeed, r.denseRole),
		cut: tn.cutSlots, inUse: make(chan struct{}, tn.cfg.Limits.TenantConns)}
	b.bind = denseMark(b.role) + "SET ROLE " + ident.Quote(b.role)
	b.want = tn.identity(r.tenant.UID, r.source)
	b.want.user, b.want.question = b.role, boundQuestion(r.source.Schema)
	return &tenantPool{tenant: r.tenant, limits: tn.cfg.Limits, server: tn.servers.of(from.source.Host, from.source.Port), dense: b}, nil
}

// enterPool counts the tenant among those of its pool, which is parted further when they have become too many.
func (tn *Tenancy) enterPool(b *binding) {
	tenants := b.pool.tenants.Add(1)
	for {
		groups := b.pool.groups.Load()
		// Hashing gives a group a tenth more than another; a quarter is left for it.
		if 4*tenants <= 3*int64(tn.cfg.Limits.DenseTenants)*int64(groups) || 2*groups > tn.cfg.Limits.DenseConns {
			return
		}
		if b.pool.groups.CompareAndSwap(groups, 2*groups) {
			tn.retireSlots(b.from, groups, math.MaxInt64)
		}
	}
}

// sharedPool returns what is known of a shared pool. The connections of a login that it had before are used no more.
func (tn *Tenancy) sharedPool(from denseSource) *sharedPool {
	stored, known := tn.densePools.Load(from.key())
	if !known {
		fresh := &sharedPool{}
		fresh.groups.Store(1)
		fresh.source.Store(&from)
		stored, _ = tn.densePools.LoadOrStore(from.key(), fresh)
	}
	pool := stored.(*sharedPool)
	for {
		before := pool.source.Load()
		if before.generation >= from.generation {
			return pool
		}
		if pool.source.CompareAndSwap(before, &from) {
			tn.retireSlots(from, pool.groups.Load(), from.generation)
			return pool
		}
	}
}

func (d denseSource) key() poolKey { return poolKey{d.server, d.isolation} }

func (tn *Tenancy) retireSlots(of denseSource, groups int32, below int64) {
	for n := range groups {
		tn.slots.Retire(slotKey{of.key(), groups, n}, below)
	}
}

// denseMark begins each statement of a role in a shared pool: statements of two tenants are never one, and the server's pg_stat_activity tells whose each is.
func denseMark(role string) string { return "/* " + role + " */ " }

// newSlots returns the connections that tenants share, a pool for each group.
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
	stored, known := m.tn.densePools.Load(key.poolKey)
	if !known {
		return nil, fmt.Errorf("tenancy: the shared pool of server %d is not known", key.server)
	}
	from := *stored.(*sharedPool).source.Load()
	if from.generation < generation {
		return nil, fmt.Errorf("tenancy: generation %d of the shared pool of server %d was asked for, and %d is known", generation, key.server, from.generation)
	}
	conns := m.tn.cfg.Limits.DenseConns / key.groups
	if key.n < m.tn.cfg.Limits.DenseConns%key.groups {
		conns++
	}
	name := Tenant{Name: fmt.Sprintf("shared pool of server %d, %s", key.server, key.isolation), realm: m.tn.realm}
	p := &tenantPool{tenant: name, limits: m.tn.cfg.Limits, slot: conns,
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
	// homePatience is how long a call waits for a connection of its tenant's group before it looks at the others: those do not know the tenant's tables yet,
	// and most statements take less.
	homePatience = 5 * time.Millisecond
	// awayPatience is the wait from the second time on.
	awayPatience = 50 * time.Millisecond
)

// errNotReset is a session that keeps what its last tenant left, such as a statement_timeout in which no reset is possible.
var errNotReset = errors.New("tenancy: the session cannot be reset")

// errNoSlot says that none of the connections looked at was free.
var errNoSlot = errors.New("tenancy: no connection of the shared pool is free")

// acquireDense takes a connection of the shared pool, for the tenant of c.pool. After an error c holds nothing more than before.
func (tn *Tenancy) acquireDense(ctx context.Context, c *checkout) (err error) {
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
		if more, err := tn.trySlot(ctx, c, b.home(0), time.Time{}); !more {
			return err
		}
	default:
	}
	if err := ctx.Err(); err != nil { // it does not even begin to wait
		return err
	}
	if n := b.waiting.Add(1); int(n) > c.pool.limits.TenantWaiters {
		b.waiting.Add(-1)
		b.refused.Add(1)
		return hinted(ErrBusy, "%d calls wait for a connection of the shared pool already (Limits.TenantWaiters)", c.pool.limits.TenantWaiters)
	}
	began := time.Now()
	b.waits.Add(1)
	c.pool.server.Totals.Waits.Add(1)
	defer func() {
		b.waiting.Add(-1)
		b.waited.Add(int64(time.Since(began)))
		c.pool.server.Totals.Waited.Add(int64(time.Since(began)))
		if err != nil && err == ctx.Err() {
			err = &leftLine{err}
		}
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
			return hinted(ErrBusy, "none of the tenant's %d connections of the shared pool became free within %v: look for slow statements and transactions that stay open, or raise Limits.TenantConns", cap(b.inUse), c.pool.limits.AcquireTimeout)
		}
	}
	patient := time.Now().Add(c.pool.limits.PingTimeout)
	for patience := homePatience; ; patience = awayPatience {
		until := time.Now().Add(patience)
		home := b.home(0)
		if until.After(deadline) || home.groups == 1 { // there is no other to look at
			until = deadline
		}
		more, err := tn.trySlot(ctx, c, home, until)
		if !more {
			return err
		}
		busy := errors.Is(err, ErrBusy) // else no new connection is to be had
		if more, err := tn.tryOthers(ctx, c, deadline, busy); !more {
			return err
		}
		switch now := time.Now(); {
		case busy && !now.Before(deadline):
			b.refused.Add(1)
			return err
		case !busy && (home.groups == 1 || now.After(patient) || !now.Before(deadline) || !tn.anyOpen(b)):
			return err
		}
	}
}

// home is the group of the tenant, or one that is some groups away from it.
func (b *binding) home(away int32) slotKey {
	groups := b.pool.groups.Load()
	return slotKey{b.from.key(), groups, int32(b.hash+uint64(away)) & (groups - 1)}
}

// tryOthers looks for a connection away from the tenant's group: one that is idle, or else one that is not open yet; where no new one is to be had, one that
// is open and may come back. It returns as trySlot.
func (tn *Tenancy) tryOthers(ctx context.Context, c *checkout, deadline time.Time, dial bool) (more bool, err error) {
	b := c.pool.dense
	var turn *slotKey
	for away := int32(1); away < b.pool.groups.Load(); away++ {
		key := b.home(away)
		if more, err := tn.trySlot(ctx, c, key, time.Time{}); !more {
			return false, err
		}
		if turn == nil && (dial && !tn.ofSlot(key, b, hasConns) || !dial && tn.ofSlot(key, b, isOpen)) {
			turn = &key
		}
	}
	if turn == nil {
		return true, errNoSlot
	}
	if until := time.Now().Add(awayPatience); until.Before(deadline) { // its own group may be free before
		deadline = until
	}
	return tn.trySlot(ctx, c, *turn, deadline)
}

// anyOpen says whether a connection of any group is open.
func (tn *Tenancy) anyOpen(b *binding) bool {
	for away := range b.pool.groups.Load() {
		if tn.ofSlot(b.home(away), b, isOpen) {
			return true
		}
	}
	return false
}

// hasConns says whether a connection is open, or being opened.
func hasConns(slot *tenantPool) bool { return slot.account.HasConns() }

// isOpen says whether a connection is open, and may come back.
func isOpen(slot *tenantPool) bool {
	making, _ := slot.account.Making()
	return slot.account.Usage().Conns > making
}

// ofSlot asks something of a group's connections. Of one that cannot be reached it is true: the next look tells why.
func (tn *Tenancy) ofSlot(key slotKey, b *binding, is func(slot *tenantPool) bool) bool {
	l, err := tn.slots.Acquire(context.Background(), key, b.from.generation)
	if err != nil {
		return true
	}
	defer l.Release()
	return is(l.Value())
}

// trySlot takes a connection of the group if one is free by then; with a zero time only if one is idle now. After an error there may be more to be had
// elsewhere, or later: the group is busy, or no connection could be opened.
func (tn *Tenancy) trySlot(ctx context.Context, c *checkout, key slotKey, until time.Time) (more bool, err error) {
	b := c.pool.dense
	l, err := tn.slots.Acquire(ctx, key, b.from.generation)
	if err != nil {
		return false, err
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
			return ctx.Err() == nil && (errors.Is(err, errNoSlot) || errors.Is(err, ErrBusy) || connecting(err)), err
		}
		session, err := ready(ctx, conn, b)
		if err == nil {
			kept = true
			c.conn, c.dense, c.slot = conn, session, l
			return false, nil
		}
		gone := conn.Conn().IsClosed() || errors.Is(err, errNotReset) // while it was idle, most likely: nothing of the call was sent
		slot.discard(ctx, conn)
		if !gone || again || ctx.Err() != nil {
			return false, err
		}
		if until.IsZero() { // its successor is not there yet
			return true, errNoSlot
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
			return nil, fmt.Errorf("%w: %w", errNotReset, err)
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

// slotStats are of all groups of a shared pool.
type slotStats struct {
	breaker breakerState // the worst
	starved int64        // the sum
}

// slotStats returns those of all shared pools that have connections.
func (tn *Tenancy) slotStats() map[poolKey]slotStats {
	all := map[poolKey]slotStats{}
	tn.slots.Each(func(key slotKey, _ int64, p *tenantPool, _ int) {
		s := all[key.poolKey]
		s.breaker = max(s.breaker, p.breaker.state())
		s.starved += p.account.Usage().Starved
		all[key.poolKey] = s
	})
	return all
}

// denseStats are those of a tenant in a shared pool.
func (p *tenantPool) denseStats(of slotStats) TenantStats {
	b := p.dense
	busy := len(b.inUse)
	return TenantStats{Name: p.tenant.Name, Generation: p.tenant.Generation, Dense: true, Conns: busy, Busy: busy, Waiting: int(b.waiting.Load()), Breaker: of.breaker.String(),
		Waits: b.waits.Load(), WaitTime: time.Duration(b.waited.Load()), Starved: of.starved, Refused: b.refused.Load()}
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
	return denseMark(b.role + " " + strconv.FormatInt(b.serial, 10) + "." + strconv.Itoa(int(b.outdated.Load())))
}
