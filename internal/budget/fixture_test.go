package budget_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// backend is a database server that counts the sockets which it has open: from the dial until it has closed its own end.
type backend struct {
	t        testing.TB
	limit    int  // more is an error
	oneSided bool // sockets cannot be closed by halves

	mu        sync.Mutex    // guards what follows
	dialTime  time.Duration // of one dial
	closeTime time.Duration // from when the client leaves until the server has noticed
	jitter    bool          // both times are random, up to twice as long
	err       error         // of every dial
	open      int
	dials     int
}

var errRefused = errors.New("connection refused")

// slow sets how long a dial takes, and a close.
func (b *backend) slow(dial, close time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dialTime, b.closeTime = dial, close
}

func (b *backend) times() (dial, close time.Duration, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	dial, close = b.dialTime, b.closeTime
	if b.jitter {
		dial, close = rand.N(2*dial+1), rand.N(2*close+1)
	}
	return dial, close, b.err
}

// refuse has every dial fail with err, until it is nil.
func (b *backend) refuse(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
}

func (b *backend) count(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open += n
	if n > 0 {
		b.dials++
	}
	if b.open > b.limit {
		b.t.Errorf("the server has %d sockets open, %d are allowed", b.open, b.limit)
	}
}

func (b *backend) counts() (open, dials int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open, b.dials
}

// dial is a budget.DialFunc.
func (b *backend) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return b.dialFor(ctx, nil)
}

func (b *backend) dialFor(ctx context.Context, p *pool) (net.Conn, error) {
	d, _, _ := b.times()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if _, _, err := b.times(); err != nil {
		return nil, err
	}
	near, far := net.Pipe()
	s := &socket{Conn: near, far: far, b: b, p: p, left: make(chan struct{})}
	b.count(1)
	go func() {
		<-s.left
		_, d, _ := b.times()
		time.Sleep(d)
		s.end()
	}()
	if b.oneSided {
		return s, nil
	}
	return halved{s}, nil
}

// socket is the client's end.
type socket struct {
	net.Conn
	far  net.Conn
	b    *backend
	p    *pool
	left chan struct{} // closed when the client has said good-bye
	bye  sync.Once
	gone sync.Once
	cut  atomic.Bool // the client does not wait for the server, which notices at once
}

func (s *socket) leave() { s.bye.Do(func() { close(s.left) }) }

// end is the server's close.
func (s *socket) end() {
	s.gone.Do(func() { s.b.count(-1) })
	s.far.Close()
}

func (s *socket) Close() error {
	if s.cut.Load() || s.p != nil && s.p.cut.Load() {
		s.end()
	}
	s.leave()
	return s.Conn.Close()
}

// halved is a socket that can be closed by halves.
type halved struct{ *socket }

func (h halved) CloseWrite() error {
	h.leave()
	return nil
}

// abort is c.Abort, of which the server learns at once.
func abort(c *budget.Conn) {
	c.Conn.(halved).cut.Store(true)
	c.Abort()
}

// pool does behind an account what pgxpool does, as far as the account can see it.
type pool struct {
	account *budget.Account
	w       *world
	connect func(making context.Context) (time.Duration, error) // instead of connectOne
	tcp     budget.DialFunc                                     // instead of the backend's
	patient time.Duration                                       // of connectOne
	proof   time.Duration                                       // from a dial until the pool has the connection
	hidden  atomic.Bool                                         // a hook has the idle connections: nobody finds them
	panics  atomic.Bool                                         // evict does
	cut     atomic.Bool
	evicts  atomic.Int64
	evictBy time.Duration // evict takes so long before it closes a connection
	evicted time.Duration // and so long afterwards
	misses  atomic.Int64  // acquires that found no idle connection, and no permit

	mu     sync.Mutex // guards what follows
	idle   []*budget.Conn
	routes map[*budget.Conn]*budget.Route
	dials  []time.Time // when it began to dial
}

func (p *pool) idleConns() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hidden.Load() {
		return 0
	}
	return len(p.idle)
}

// pop returns nil when no connection is idle.
func (p *pool) pop() *budget.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 || p.hidden.Load() {
		return nil
	}
	c := p.idle[n-1]
	p.idle = p.idle[:n-1]
	return c
}

func (p *pool) put(c *budget.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle = append(p.idle, c)
}

// cancelling is the key of a context with which p.dial is a cancel request's.
type cancelling struct{}

func (p *pool) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if ctx.Value(cancelling{}) != nil {
		return p.w.cancels.dialFor(ctx, nil)
	}
	p.mu.Lock()
	p.dials = append(p.dials, time.Now())
	p.mu.Unlock()
	if p.tcp != nil {
		return p.tcp(ctx, network, addr)
	}
	return p.w.b.dialFor(ctx, p)
}

// cancel opens the socket of a cancel request.
func (p *pool) cancel(ctx context.Context, c *budget.Conn) (net.Conn, error) {
	p.mu.Lock()
	route := p.routes[c]
	p.mu.Unlock()
	return route.Dial(context.WithValue(ctx, cancelling{}, true), "tcp", "db:5432")
}

func (p *pool) dialled() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.dials)
}

// acquire takes an idle connection or dials. As in puddle, a dial goes on when ctx ends, and its connection is idle then.
func (p *pool) acquire(ctx context.Context) (*budget.Conn, error) {
	if c := p.pop(); c != nil {
		return c, nil
	}
	type result struct {
		c   *budget.Conn
		err error
	}
	done := make(chan result)
	go func() {
		route := p.account.Route(p.dial)
		conn, err := route.Dial(context.WithoutCancel(ctx), "tcp", "db:5432")
		c, _ := conn.(*budget.Conn)
		if err == nil {
			c.Established()
			time.Sleep(p.proof)
			p.mu.Lock()
			p.routes[c] = route
			p.mu.Unlock()
		}
		select {
		case done <- result{c, err}:
		case <-ctx.Done():
			if err == nil {
				p.put(c)
			}
		}
	}()
	select {
	case r := <-done:
		return r.c, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pool) connectOne(making context.Context) (time.Duration, error) {
	if p.connect != nil {
		return p.connect(making)
	}
	ctx, cancel := context.WithTimeout(making, p.patient)
	defer cancel()
	c, err := p.acquire(ctx)
	switch {
	case errors.Is(err, budget.ErrNoPermit):
		return 5 * time.Millisecond, err
	case err != nil:
		return 0, err
	}
	p.put(c)
	return 0, nil
}

func (p *pool) evict() bool {
	p.evicts.Add(1)
	if p.panics.Load() {
		panic("hook")
	}
	time.Sleep(p.evictBy)
	c := p.pop()
	if c == nil {
		return false
	}
	c.Close()
	time.Sleep(p.evicted)
	return true
}

// take admits the caller and gives it a connection, as the root package does.
func (p *pool) take(ctx context.Context, wait time.Duration) (*budget.Conn, error) {
	deadline := time.Now().Add(wait)
	for missed := 0; ; missed++ {
		if missed > 1 || !p.account.TryEnter() {
			if err := p.account.Enter(ctx, deadline, missed); err != nil {
				return nil, err
			}
		}
		c, err := p.acquire(ctx)
		if err == nil {
			return c, nil
		}
		p.account.Leave()
		if !errors.Is(err, budget.ErrNoPermit) {
			return nil, err
		}
		p.misses.Add(1)
	}
}

// give is the end of take.
func (p *pool) give(c *budget.Conn) {
	p.put(c)
	p.account.Leave()
}

// drop is the end of take for a broken connection.
func (p *pool) drop(c *budget.Conn) {
	c.Close()
	p.account.Leave()
}

// world is a server, its budget and its pools.
type world struct {
	*budget.Server
	t       *testing.T
	b       *backend // the server, for what takes a shared permit
	own     *backend // for the library's own pools
	cancels *backend
	pools   []*pool
	patient time.Duration // of callers of pools that are made from here on
}

// newWorld has a budget of so many shared permits, and one of its own.
func newWorld(t *testing.T, shared int) *world {
	return &world{Server: budget.NewServer(budget.Limits{Total: shared + 1 + budget.Cancels, Own: 1}), t: t,
		b: &backend{t: t, limit: shared}, own: &backend{t: t, limit: 1}, cancels: &backend{t: t, limit: budget.Cancels}}
}

func (w *world) pool(floor, ceiling int) *pool {
	p := &pool{w: w, patient: 10 * time.Second, routes: map[*budget.Conn]*budget.Route{}}
	p.account = w.NewAccount(budget.AccountConfig{
		Floor: floor, Ceiling: ceiling, Waiters: 100, Patience: w.patient,
		Connect: p.connectOne, Evict: p.evict, Idle: func() bool { return p.idleConns() > 0 },
	})
	w.pools = append(w.pools, p)
	return p
}

// take is pool.take of one that has to succeed at once.
func (w *world) take(p *pool) *budget.Conn {
	w.t.Helper()
	c, err := p.take(context.Background(), time.Second)
	if err != nil {
		w.t.Fatalf("take: %v", err)
	}
	return c
}

// call is a take in the background.
type call struct {
	p    *pool
	took time.Duration // guarded by done
	conn *budget.Conn  // likewise
	done chan struct{}
}

// call starts one, and returns when it waits or was served.
func (w *world) call(p *pool) *call {
	c, began := &call{p: p, done: make(chan struct{})}, time.Now()
	go func() {
		defer close(c.done)
		var err error
		if c.conn, err = p.take(context.Background(), time.Minute); err != nil {
			w.t.Errorf("take: %v", err)
		}
		c.took = time.Since(began)
	}()
	synctest.Wait()
	return c
}

// wait returns how long it took.
func (c *call) wait() time.Duration {
	<-c.done
	return c.took
}

func (c *call) served() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *call) give() {
	<-c.done
	c.p.give(c.conn)
}

// end closes what is idle and checks that nothing is left of anything.
func (w *world) end() {
	w.t.Helper()
	time.Sleep(3 * time.Minute) // for dials that nobody waits for
	for _, p := range w.pools {
		p.hidden.Store(false)
		for p.evict() {
		}
	}
	time.Sleep(3 * time.Minute) // no server takes longer to notice
	synctest.Wait()
	if s := w.Snapshot(); s.Used != 0 || s.OwnUsed != 0 || s.Closing != 0 || s.Cancels != 0 || s.Hungry != 0 {
		w.t.Errorf("at the end: %+v", s)
	}
	if n := w.Accounts(); n != 0 || w.Ticking() {
		w.t.Errorf("%d accounts without a connection are remembered at the end; time goes on: %v", n, w.Ticking())
	}
	for i, p := range w.pools {
		u := p.account.Usage()
		if unclaimed, making, open := p.account.Books(); u.Conns != 0 || u.Busy != 0 || u.Waiting != 0 || unclaimed != 0 || making != 0 || open != 0 {
			w.t.Errorf("pool %d at the end: %+v, %d permits unclaimed, %d attempts, %d open", i, u, unclaimed, making, open)
		}
	}
	for _, b := range []*backend{w.b, w.own, w.cancels} {
		if open, _ := b.counts(); open != 0 {
			w.t.Errorf("%d sockets are open at the end", open)
		}
	}
}

// closeAll is end outside a bubble.
func (w *world) closeAll() {
	w.t.Helper()
	for began := time.Now(); w.Snapshot().Used > 0; time.Sleep(time.Millisecond) {
		for _, p := range w.pools {
			p.evict()
		}
		if time.Since(began) > 10*time.Second {
			w.t.Fatalf("permits are in use for ever: %+v", w.Snapshot())
		}
	}
}

// in runs a test in a bubble. The bubble fails it when a goroutine is left.
func in(t *testing.T, shared int, test func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shared)
		test(t, w)
		w.end()
	})
}
