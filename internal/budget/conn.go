package budget

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// DialFunc is how a socket is opened, as in pgconn.
type DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

const (
	lastWords      = time.Second            // for a cancel request when the account is closed
	lingerTimeout  = 5 * time.Second        // a process of the server that is at work notices late that its client left
	lingerOneSided = 250 * time.Millisecond // where the socket cannot be closed by halves, nothing more is said to the server
	lingerUsual    = 100 * time.Millisecond // after which nobody counts on the permit any more, and another connection makes room
)

// Conn is a socket that holds a permit until the server has closed its end: only then is the connection gone there too.
type Conn struct {
	net.Conn
	Proof   any      // what its user knows of it, for whoever has the connection at the moment
	account *Account // nil: not an account's
	route   *Route   // nil likewise
	server  *Server
	shared  bool     // the permit is of the shared part
	attempt *attempt // for which it was dialled; nil: for none
	free    func()   // gives the permit back; called once, under server.mu
	stir    *stirrer // nil: there is no socket to look at

	closed atomic.Bool
	over   atomic.Bool  // it is known how it ended
	ended  atomic.Bool  // the server has closed its end, before what was written last had reached it
	owed   atomic.Bool  // what was written last had not reached the server when it said its last words
	inUse  sync.RWMutex // held for reading by every Read and Write
	freed  sync.Once

	// Guarded by server.mu.
	doomed bool // no longer counted among the account's connections
	parked bool // its attempt keeps its place there, and its permit, for the next address
	gone   bool // nor among the server's
	late   bool // nor among those that make room
}

// Doom says that the connection will be closed and serves nobody any more.
func (c *Conn) Doom() {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.doomLocked()
}

func (c *Conn) doomLocked() {
	if c.doomed {
		return
	}
	c.doomed = true
	if c.shared {
		c.server.closing++
		time.AfterFunc(lingerUsual, c.delayed)
	}
	switch {
	case c.account == nil:
	case c.attempt != nil && !c.attempt.over && !c.route.established.Load():
		c.parked = true
		c.attempt.parked++
	default:
		c.account.addConnLocked(-1)
		c.account.growLocked()
	}
}

// delayed has another connection make room when the server does not let this one go.
func (c *Conn) delayed() {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.gone {
		c.late = true
		s.late++
		s.makeRoomLocked()
	}
}

// Close says good-bye and returns; the rest happens in the background.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	c.Doom()
	_ = c.Conn.SetDeadline(time.Unix(1, 0)) // whoever reads or writes is woken
	go c.linger()
	return nil
}

// linger waits until the server has closed its end.
func (c *Conn) linger() {
	defer c.release()
	bound := lingerTimeout
	if half, ok := c.Conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil || c.account == nil && !c.shared {
		bound = lingerOneSided // for a cancel request too, and for the library's own: no statement of a tenant runs there
	}
	// Not a deadline: who had the connection may set one at this moment, and that is not the server's end.
	timer := time.AfterFunc(bound, func() { c.Conn.Close() })
	defer timer.Stop()
	c.inUse.Lock() // whoever was woken and finds the deadline gone goes on sleeping
	defer c.inUse.Unlock()
	for err := os.ErrDeadlineExceeded; errors.Is(err, os.ErrDeadlineExceeded); {
		_ = c.Conn.SetDeadline(time.Time{})
		_, err = io.Copy(io.Discard, c.Conn)
	}
}

// Abort closes the socket at once, under the hands of whoever uses it.
func (c *Conn) Abort() {
	c.closed.Store(true)
	c.release()
}

func (c *Conn) release() {
	c.freed.Do(func() {
		c.Conn.Close()
		c.server.mu.Lock()
		defer c.server.mu.Unlock()
		c.doomLocked()
		c.gone = true
		if c.shared {
			c.server.closing--
		}
		if c.late {
			c.server.late--
		}
		if c.account != nil {
			delete(c.account.open, c)
			c.account.settleLocked()
		}
		if c.parked && !c.attempt.over {
			c.attempt.parked--
			c.account.unclaimed = append(c.account.unclaimed, c.attempt)
			c.server.makeRoomLocked() // who counted on the permit needs another one
			return
		}
		c.free()
		if c.account != nil {
			c.account.growLocked() // it may have waited for the socket's end, not for a permit
		}
	})
}

func (c *Conn) Read(b []byte) (int, error) {
	if !c.begin() {
		return 0, net.ErrClosed
	}
	defer c.inUse.RUnlock()
	n, err := c.Conn.Read(b)
	// The first failure decides. After it pgx says good-bye and reads on in the background: the end that it meets then, after a reset too, has nothing to
	// do with what the service has written.
	if err != nil && !c.over.Swap(true) {
		c.ended.Store(err == io.EOF && c.owes())
	}
	return n, err
}

// LastWords tells that an error with which the server ends the session was read, before anything else is written.
func (c *Conn) LastWords() {
	if !c.over.Swap(true) {
		c.owed.Store(c.owes())
	}
}

// Unheard says of a connection that has failed whether the server cannot have heard what was written last, as far as this system can tell. lastWords says that the
// server's last words were read, of which [Conn.LastWords] was told. They, like the end of the stream, acknowledge how much of
// what was written has arrived where they come from; what has not by then is never read. An end without them (a reset) tells nothing.
func (c *Conn) Unheard(lastWords bool) bool { return c.ended.Load() || lastWords && c.owed.Load() }

func (c *Conn) Write(b []byte) (int, error) {
	if !c.begin() {
		return 0, net.ErrClosed
	}
	defer c.inUse.RUnlock()
	return c.Conn.Write(b)
}

// begin keeps linger off until the caller ends it with inUse.RUnlock. It fails after Close.
func (c *Conn) begin() bool {
	if !c.inUse.TryRLock() {
		return false
	}
	if c.closed.Load() {
		c.inUse.RUnlock()
		return false
	}
	return true
}

// SetDeadline, SetReadDeadline and SetWriteDeadline do nothing after Close.
func (c *Conn) SetDeadline(t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return c.Conn.SetDeadline(t)
}

// SetReadDeadline is as SetDeadline.
func (c *Conn) SetReadDeadline(t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return c.Conn.SetReadDeadline(t)
}

// SetWriteDeadline is as SetDeadline.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return c.Conn.SetWriteDeadline(t)
}

// Of returns the Conn under c, which may be TLS and others over it; nil when there is none.
func Of(c net.Conn) *Conn {
	for {
		if conn, ok := c.(*Conn); ok {
			return conn
		}
		over, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		c = over.NetConn()
	}
}

// Route is the way of one connection to its server: a dialer for it, and, once it is established, for its cancel requests.
type Route struct {
	account     *Account
	dial        DialFunc
	established atomic.Bool

	mu     sync.Mutex // guards opened
	opened []string   // addresses at which a socket was opened: a connection has one for each
}

// errNothingToCancel refuses a cancel request of a connection that was never established, which pgx sends when a server goes away while
// it logs in. Nothing runs there, and the socket would look like a connection of the account.
var errNothingToCancel = errors.New("budget: the connection was never established, there is nothing to cancel")

// again says whether a socket was opened at addr before.
func (r *Route) again(addr string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Contains(r.opened, addr)
}

func (r *Route) open(addr string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened = append(r.opened, addr)
}

// Route returns the way of one new connection.
func (a *Account) Route(dial DialFunc) *Route { return &Route{account: a, dial: dial} }

// Established says that every further dial is that of a cancel request.
func (c *Conn) Established() {
	if c.route != nil {
		c.route.established.Store(true)
	}
}

// Dial opens a socket. It never waits for a permit: without one the error is [ErrNoPermit].
func (r *Route) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	a := r.account
	if r.established.Load() {
		return a.dialCancel(ctx, r.dial, network, addr)
	}
	if r.again(addr) {
		return nil, errNothingToCancel
	}
	at, _ := ctx.Value(making{}).(*attempt)
	if at != nil && at.account != a { // a hook of its pool uses another one
		at = nil
	}
	if err := a.unpark(ctx, at); err != nil {
		return nil, err
	}
	at, err := a.claim(at)
	if err != nil {
		return nil, err
	}
	if at != nil {
		at.dialled.Store(true)
	}
	inner, err := r.dial(ctx, network, addr)
	if err != nil {
		a.unclaim(at)
		return nil, err
	}
	r.open(addr)
	c := &Conn{Conn: inner, account: a, route: r, server: a.server, shared: true, attempt: at, free: a.server.freeLocked, stir: newStirrer(inner)}
	if !a.enter(c) {
		c.Abort()
		return nil, ErrClosed
	}
	return c, nil
}

// making is the key of the attempt in the context of AccountConfig.Connect.
type making struct{}

// Dialled says of the context of AccountConfig.Connect whether a dial has taken its permit.
func Dialled(ctx context.Context) bool {
	at, ok := ctx.Value(making{}).(*attempt)
	return ok && at.dialled.Load()
}

// unpark waits while the permit of at is with a socket of the address before. After a while that is closed, whether its server has let it go or not: nobody has
// logged in there.
func (a *Account) unpark(ctx context.Context, at *attempt) error {
	for began := time.Now(); ; {
		parked := a.parked(at)
		switch {
		case len(parked) == 0:
			return nil
		case time.Since(began) >= lingerOneSided:
			for _, c := range parked {
				c.Abort()
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(staleWait):
		}
	}
}

// parked returns the sockets that have the permit of at.
func (a *Account) parked(at *attempt) (parked []*Conn) {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	if at == nil || at.over || at.parked == 0 {
		return nil
	}
	for c := range a.open {
		if c.attempt == at {
			parked = append(parked, c)
		}
	}
	return parked
}

// claim takes the permit of at, or a free one; then there is no attempt.
func (a *Account) claim(at *attempt) (*attempt, error) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(a.unclaimed, at); i >= 0 {
		a.unclaimed = slices.Delete(a.unclaimed, i, i+1)
		return at, nil
	}
	if connsOf(a.state.Load()) >= a.cfg.Ceiling || !a.roomyLocked() || !s.mayGrowLocked(a) || s.poor.len()+s.rest.len() > 0 {
		return nil, ErrNoPermit
	}
	s.used++
	a.addConnLocked(1)
	return nil, nil
}

func (a *Account) unclaim(at *attempt) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if at != nil && !at.over {
		a.unclaimed = append(a.unclaimed, at) // for another address, or for connected to give back
		return
	}
	a.addConnLocked(-1)
	a.settleLocked()
	a.growLocked()
	s.freeLocked()
}

// servingLocked says whether a connection is logged in and not on its way out.
func (a *Account) servingLocked() bool {
	for c := range a.open {
		if !c.doomed && c.route.established.Load() {
			return true
		}
	}
	return false
}

// enter writes c into the book, unless Cut came first.
func (a *Account) enter(c *Conn) bool {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.open == nil {
		a.open = map[*Conn]struct{}{}
	}
	a.open[c] = struct{}{}
	a.dialled = true
	s.holdLocked(a) // it may have been forgotten while this was dialled
	return !a.closed
}

// Cut closes every socket under the hands of who uses it, and lets no new one in.
func (a *Account) Cut() {
	a.Close()
	a.server.mu.Lock()
	open := make([]*Conn, 0, len(a.open))
	for c := range a.open {
		open = append(open, c)
	}
	for c := range a.cancelling { // who waits for its answer is woken, and closes it
		_ = c.Conn.SetDeadline(time.Unix(1, 0))
	}
	a.server.mu.Unlock()
	for _, c := range open {
		c.Abort()
	}
}

// HangUp closes every socket as its user would, with the permit kept until the server has closed its end, and lets no new one in. Cancel
// requests have a moment left.
func (a *Account) HangUp() {
	a.Close()
	a.server.mu.Lock()
	open := make([]*Conn, 0, len(a.open))
	for c := range a.open {
		open = append(open, c)
	}
	for c := range a.cancelling {
		_ = c.Conn.SetDeadline(time.Now().Add(lastWords))
	}
	a.server.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
}

// dialCancel opens the socket of a cancel request. It is in a book of its own, so that Cut reaches it.
func (a *Account) dialCancel(ctx context.Context, dial DialFunc, network, addr string) (net.Conn, error) {
	s := a.server
	select {
	case s.cancels <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	inner, err := dial(ctx, network, addr)
	if err != nil {
		<-s.cancels
		return nil, err
	}
	c := &Conn{Conn: inner, server: s}
	c.free = func() { delete(a.cancelling, c); <-s.cancels }
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.cancelling == nil {
		a.cancelling = map[*Conn]struct{}{}
	}
	a.cancelling[c] = struct{}{}
	if a.closed { // a statement was running when the account was
		_ = inner.SetDeadline(time.Now().Add(lastWords))
	}
	return c, nil
}

// Dialer returns dial for connections that the library makes one by one, which are in no pool: it waits for a permit, before all accounts.
func (s *Server) Dialer(dial DialFunc) DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if err := s.take(ctx); err != nil {
			return nil, err
		}
		return s.dialOwn(ctx, dial, network, addr, true, s.freeWorkLocked)
	}
}

// OwnDialer returns dial for the library's own pools, which have permits set aside.
func (s *Server) OwnDialer(dial DialFunc) DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if err := s.takeOwn(ctx); err != nil {
			return nil, err
		}
		return s.dialOwn(ctx, dial, network, addr, false, s.freeOwnLocked)
	}
}

func (s *Server) dialOwn(ctx context.Context, dial DialFunc, network, addr string, shared bool, free func()) (net.Conn, error) {
	inner, err := dial(ctx, network, addr)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		free()
		return nil, err
	}
	return &Conn{Conn: inner, server: s, shared: shared, free: free, stir: newStirrer(inner)}, nil
}
