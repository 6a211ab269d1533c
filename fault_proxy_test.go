package tenancy_test

import (
	"bytes"
	"maps"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"
)

// strait is a way to a server that a test can spoil while it is in use. What is spoiled stays so until [strait.calm].
//
// It forwards what it reads in pieces. A message of the protocol that is small, as those of these tests are, is one piece.
type strait struct {
	url      string
	target   string
	listener net.Listener
	closing  chan struct{}
	done     sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	changed  chan struct{}
	passages map[*passage]struct{}
	refusing bool // new connections are closed at once
	abrupt   bool // with a reset, and not with a good-bye
	held     [2]bool
	delay    time.Duration
	dialled  int
	left     int // connections that the server has closed, and the client knows
	pieces   int
	at       int    // the piece before which fn is called
	fn       func() // nil: none
	losing   []byte // the answer to what holds it is lost, and the connection with it; nil: none
	lost     chan struct{}
	freezing []byte // what holds it freezes the strait; nil: nothing
	frozen   chan struct{}
	marking  []byte // what holds it marks its connection; nil: nothing
	muted    bool   // the marked ones are held, in both directions
}

// passage is one connection through a strait.
type passage struct {
	client, server *net.TCPConn
	ended          chan struct{} // closed when it was cut
	gone           chan struct{} // closed when its sockets are: a read that is under way puts that off
	once           sync.Once
	losing         bool // guarded by strait.mu, as is the next: its next answer is lost
	marked         bool
}

// The directions of a passage.
const (
	toServer = 0
	toClient = 1
)

// newStrait opens a way to the server of a URL; its own url is the same with another address.
func newStrait(tb testing.TB, to string) *strait {
	tb.Helper()
	u, err := url.Parse(to)
	if err != nil {
		tb.Fatal("the server's URL cannot be parsed")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s := &strait{target: u.Host, listener: l, closing: make(chan struct{}), changed: make(chan struct{}), passages: map[*passage]struct{}{}}
	u.Host = l.Addr().String()
	q := u.Query()
	q.Set("sslmode", "disable") // or there is nothing to read
	u.RawQuery = q.Encode()
	s.url = u.String()
	s.done.Go(s.accept)
	tb.Cleanup(func() {
		l.Close()
		close(s.closing)
		s.cut()
		s.done.Wait()
	})
	return s
}

// set changes what is spoiled and wakes whoever waits for a change.
func (s *strait) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	close(s.changed)
	s.changed = make(chan struct{})
}

// calm ends everything else. Connections that were cut stay so; what was held goes on.
func (s *strait) calm() {
	s.set(func() {
		s.refusing, s.abrupt, s.held, s.delay, s.losing, s.fn, s.freezing, s.muted = false, false, [2]bool{}, 0, nil, nil, nil, false
	})
}

// cut ends all connections and refuses new ones.
func (s *strait) cut() { s.end(true, false) }

// refuse closes new connections and leaves those that there are.
func (s *strait) refuse() { s.set(func() { s.refusing = true }) }

// reset is cut without a good-bye: both ends see a reset.
func (s *strait) reset() { s.end(true, true) }

// drop ends the connections that there are, and returns when they are closed: nothing that is sent then has arrived. New ones pass.
func (s *strait) drop() {
	s.mu.Lock()
	dropped := slices.Collect(maps.Keys(s.passages))
	s.mu.Unlock()
	s.end(false, false)
	for _, p := range dropped {
		<-p.gone
	}
}

func (s *strait) end(refusing, abrupt bool) {
	s.set(func() {
		s.refusing, s.abrupt = refusing, abrupt
		for p := range s.passages {
			p.end(abrupt)
		}
		clear(s.passages)
	})
}

// freeze holds everything and closes nothing: what is sent is taken, and no answer comes.
func (s *strait) freeze() { s.set(func() { s.held = [2]bool{toServer: true, toClient: true} }) }

// hold holds one direction.
func (s *strait) hold(direction int) { s.set(func() { s.held[direction] = true }) }

// slow lets new connections wait for d before they reach the server.
func (s *strait) slow(d time.Duration) { s.set(func() { s.delay = d }) }

// loseAnswer waits for a piece to the server that holds text. The server gets it, and when its answer is there, which it is when
// the server has done what it was told, the connection is cut. The channel is closed then.
func (s *strait) loseAnswer(text string) (lost <-chan struct{}) {
	s.set(func() { s.losing, s.lost = []byte(text), make(chan struct{}) })
	return s.lost
}

// freezeAt freezes when a piece to the server holds text. The server gets that one. The channel is closed then.
func (s *strait) freezeAt(text string) (frozen <-chan struct{}) {
	s.set(func() { s.freezing, s.frozen = []byte(text), make(chan struct{}) })
	return s.frozen
}

// mark marks each connection over which the server is sent text from now on.
func (s *strait) mark(text string) { s.set(func() { s.marking = []byte(text) }) }

// mute is freeze for the marked connections that there are, and lets all others pass.
func (s *strait) mute() { s.set(func() { s.muted, s.marking = true, nil }) }

// before has fn called before the nth piece from now on goes on, in whichever direction. An attempt to connect is a piece too.
func (s *strait) before(n int, fn func()) {
	s.set(func() { s.at, s.fn = s.pieces+n, fn })
}

// dials returns how many connections were attempted.
func (s *strait) dials() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dialled
}

// passed returns how many pieces came by.
func (s *strait) passed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pieces
}

// leftBy returns how many connections the server has closed.
func (s *strait) leftBy() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.left
}

// count counts a piece and does what was planned for it.
func (s *strait) count() {
	s.mu.Lock()
	s.pieces++
	fn := s.fn
	if s.pieces != s.at {
		fn = nil
	}
	s.mu.Unlock()
	if fn != nil {
		fn()
	}
}

func (s *strait) accept() {
	for {
		client, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.dialled++
		refusing, abrupt := s.refusing, s.abrupt
		p := &passage{client: client.(*net.TCPConn), ended: make(chan struct{}), gone: make(chan struct{})}
		if !refusing {
			s.passages[p] = struct{}{}
			s.done.Go(func() { s.pass(p) })
		}
		s.mu.Unlock()
		if refusing {
			p.end(abrupt)
		}
	}
}

// pass joins a client with the server and forwards until both have ended.
func (s *strait) pass(p *passage) {
	defer close(p.gone)
	defer func() {
		s.mu.Lock()
		delete(s.passages, p)
		s.mu.Unlock()
		p.end(false)
	}()
	s.count()
	s.mu.Lock()
	delay := s.delay
	s.mu.Unlock()
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-p.ended:
			return
		}
	}
	if !s.wait(p, toServer) {
		return
	}
	server, err := net.Dial("tcp", s.target)
	if err != nil {
		return
	}
	s.mu.Lock()
	_, there := s.passages[p]
	p.server = server.(*net.TCPConn)
	s.mu.Unlock()
	if !there { // cut since
		server.Close()
		return
	}
	var both sync.WaitGroup
	both.Go(func() { s.forward(p, toServer) })
	both.Go(func() { s.forward(p, toClient) })
	both.Wait()
}

func (s *strait) forward(p *passage, direction int) {
	from, to := p.client, p.server
	if direction == toClient {
		from, to = to, from
	}
	piece := make([]byte, 64<<10)
	for {
		n, err := from.Read(piece)
		if n > 0 {
			s.count()
			if !s.wait(p, direction) || s.loses(p, direction, piece[:n]) {
				return
			}
			if _, err := to.Write(piece[:n]); err != nil {
				p.end(false)
				return
			}
		}
		if err != nil {
			if !s.wait(p, direction) {
				return
			}
			to.CloseWrite()
			if direction == toClient {
				s.mu.Lock()
				s.left++
				s.mu.Unlock()
			}
			return
		}
	}
}

// wait returns when the direction is not held, or false when p was cut.
func (s *strait) wait(p *passage, direction int) bool {
	for {
		s.mu.Lock()
		held, changed := s.held[direction] || s.muted && p.marked, s.changed
		s.mu.Unlock()
		if !held {
			return true
		}
		select {
		case <-changed:
		case <-p.ended:
			return false
		}
	}
}

// loses cuts p when the piece is the answer that is to be lost.
func (s *strait) loses(p *passage, direction int, piece []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if direction == toServer {
		if s.freezing != nil && bytes.Contains(piece, s.freezing) {
			s.held, s.freezing = [2]bool{toServer: true, toClient: true}, nil
			close(s.frozen)
		}
		if s.marking != nil && bytes.Contains(piece, s.marking) {
			p.marked = true
		}
		if s.losing != nil && bytes.Contains(piece, s.losing) {
			p.losing, s.losing = true, nil
		}
		return false
	}
	if p.losing {
		p.end(false)
		close(s.lost)
	}
	return p.losing
}

// end closes both ends.
func (p *passage) end(abrupt bool) {
	p.once.Do(func() {
		close(p.ended)
		for _, c := range []*net.TCPConn{p.client, p.server} {
			if c != nil {
				if abrupt {
					c.SetLinger(0)
				}
				c.Close()
			}
		}
	})
}
