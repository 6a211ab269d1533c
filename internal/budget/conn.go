package budget

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// DialFunc is how a socket is opened, as in pgconn.
type DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

const (
	lingerTimeout  = 5 * time.Second        // a process of the server that is at work notices late that its client left
	lingerOneSided = 250 * time.Millisecond // where the socket cannot be closed by halves, nothing more is said to the server
)

// Conn is a socket that holds a permit until the server has closed its end: only then is the connection gone there too.
type Conn struct {
	net.Conn
	account *Account // nil: not an account's
	route   *Route   // nil likewise
	server  *Server
	shared  bool   // the permit is of the shared part
	free    func() // gives the permit back; called once, under server.mu

	doomed atomic.Bool // no longer counted among the account's connections
	closed atomic.Bool
	freed  sync.Once
}

// Doom says that the connection will be closed and serves nobody any more.
func (c *Conn) Doom() {
	if c.doomed.Swap(true) {
		return
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if c.shared {
		c.server.closing++
	}
	if c.account != nil {
		c.account.add(-oneConn)
		c.account.growLocked()
	}
}

// Close says good-bye and returns; the rest happens in the background.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	c.Doom()
	_ = c.Conn.SetDeadline(time.Unix(1, 0)) // whoever reads is woken
	go c.linger()
	return nil
}

// linger waits until the server has closed its end.
func (c *Conn) linger() {
	defer c.release()
	bound := lingerTimeout
	if half, ok := c.Conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		bound = lingerOneSided
	}
	// Not a deadline: who had the connection may set one at this moment.
	timer := time.AfterFunc(bound, func() { c.Conn.Close() })
	defer timer.Stop()
	_ = c.Conn.SetDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, c.Conn)
}

// Abort closes the socket at once, under the hands of whoever uses it.
func (c *Conn) Abort() {
	c.Doom()
	c.closed.Store(true)
	c.release()
}

func (c *Conn) release() {
	c.freed.Do(func() {
		c.Conn.Close()
		c.server.mu.Lock()
		defer c.server.mu.Unlock()
		if c.shared {
			c.server.closing--
		}
		if c.account != nil {
			delete(c.account.open, c)
			c.account.settleLocked()
		}
		c.free()
	})
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

// Of returns the Conn under c, which may be TLS over it; nil when there is none.
func Of(c net.Conn) *Conn {
	if over, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = over.NetConn()
	}
	conn, _ := c.(*Conn)
	return conn
}

// Route is the way of one connection to its server: a dialer for it, and, once it is established, for its cancel requests.
type Route struct {
	account     *Account
	dial        DialFunc
	established atomic.Bool
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
		return a.server.dialCancel(ctx, r.dial, network, addr)
	}
	reserved, err := a.claim(ctx.Value(making{}) != nil)
	if err != nil {
		return nil, err
	}
	inner, err := r.dial(ctx, network, addr)
	if err != nil {
		a.unclaim(reserved)
		return nil, err
	}
	c := &Conn{Conn: inner, account: a, route: r, server: a.server, shared: true, free: a.server.freeLocked}
	if !a.enter(c) {
		c.Abort()
		return nil, ErrClosed
	}
	return c, nil
}

// making is the key of Making.
type making struct{}

// Making returns the context for a dial of AccountConfig.Connect: it alone takes the permit that is reserved for it.
func Making(ctx context.Context) context.Context { return context.WithValue(ctx, making{}, true) }

// claim takes a permit that was reserved, or a free one.
func (a *Account) claim(making bool) (reserved bool, err error) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if making && a.reserved > 0 {
		a.reserved--
		return true, nil
	}
	if connsOf(a.state.Load()) >= a.cfg.Ceiling || !s.mayGrowLocked(a) || s.poor.len()+s.rest.len() > 0 {
		return false, ErrNoPermit
	}
	s.used++
	s.clock.Add(1)
	s.accounts[a] = struct{}{}
	a.add(oneConn)
	return false, nil
}

func (a *Account) unclaim(reserved bool) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if reserved {
		a.reserved++ // for another address, or for connected to give back
		return
	}
	a.add(-oneConn)
	a.settleLocked()
	s.freeLocked()
}

// enter writes c into the book, unless Cut came first.
func (a *Account) enter(c *Conn) bool {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	if a.open == nil {
		a.open = map[*Conn]struct{}{}
	}
	a.open[c] = struct{}{}
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
	a.server.mu.Unlock()
	for _, c := range open {
		c.Abort()
	}
}

func (s *Server) dialCancel(ctx context.Context, dial DialFunc, network, addr string) (net.Conn, error) {
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
	return &Conn{Conn: inner, server: s, free: func() { <-s.cancels }}, nil
}

// Dialer returns dial for connections that the library makes one by one, which are in no pool: it waits for a permit, before all accounts.
func (s *Server) Dialer(dial DialFunc) DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if err := s.take(ctx); err != nil {
			return nil, err
		}
		return s.dialOwn(ctx, dial, network, addr, true, s.freeLocked)
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
	return &Conn{Conn: inner, server: s, shared: shared, free: free}, nil
}
