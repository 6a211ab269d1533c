package budget

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"
)

// AccountConfig is one pool's share of a server's budget, and what the budget asks of the pool. Everything is required.
type AccountConfig struct {
	Floor   int // connections that the account gets before another gets more than its own floor
	Ceiling int // the most that it has
	Waiters int // the most callers that wait in Enter
	// Connect makes a connection, or finds an idle one, and gives it to the pool. It runs in a goroutine of its own with a permit that
	// a dial with the context of [Making] takes. With retry above 0 the callers go on waiting, and it is called again after that time; otherwise
	// err is the error of the caller for whom it was called.
	Connect func() (retry time.Duration, err error)
	// Evict closes one idle connection, and says whether there was one. It must not dial. It runs in a goroutine of its own.
	Evict func() bool
	// Idle says whether the pool has an idle connection. It is asked when the account was wrong about that.
	Idle func() bool
}

// Account is one pool's share. It is safe for concurrent use. Who makes it calls Close.
type Account struct {
	cfg    AccountConfig
	server *Server

	// state is three numbers in one word, so that the common case is one operation: connections that are there or being made
	// (conns), callers that have entered and attempts to connect (busy), and whether somebody waits. While nobody
	// waits, conns less busy are idle.
	state   atomic.Uint64
	used    atomic.Uint64 // the server's clock when it was last left
	waiting atomic.Int32

	waits   atomic.Int64 // callers who had to wait
	waited  atomic.Int64 // for how long, in ns
	starved atomic.Int64 // times that a permit had to be waited for
	refused atomic.Int64 // callers who found too many waiting, or waited in vain

	// Guarded by server.mu.
	waiters  []*waiter
	reserved int       // permits that no socket has taken yet
	making   int       // calls of Connect under way
	line     *queue    // where it waits for a permit; nil: nowhere
	since    time.Time // since when
	paused   bool      // Connect asked to be called later
	failed   error     // of the last Connect, nil when it succeeded
	doubted  uint64    // the state in which Evict found nothing; 0: none
	open     map[*Conn]struct{}
	closed   bool
}

type waiter struct {
	ready chan error // holds one
}

const (
	oneBusy   = 1
	oneConn   = 1 << 32
	queued    = 1 << 63
	busyMask  = oneConn - 1
	connsMask = queued - oneConn
	// unbounded is the number of connections of a pool that the budget does not see.
	unbounded = 1 << 20
)

func busyOf(state uint64) int  { return int(state & busyMask) }
func connsOf(state uint64) int { return int(state & connsMask / oneConn) }

// NewAccount returns an account without connections.
func (s *Server) NewAccount(cfg AccountConfig) *Account {
	a := &Account{cfg: cfg, server: s}
	a.used.Store(s.clock.Load())
	return a
}

// tryEnter enters if a connection is idle and nobody waits.
func (a *Account) tryEnter() bool {
	for {
		s := a.state.Load()
		if s&queued != 0 || busyOf(s) >= connsOf(s) {
			return false
		}
		if a.state.CompareAndSwap(s, s+oneBusy) {
			return true
		}
	}
}

// TryEnter admits the caller if a connection is idle. Who was admitted calls Leave.
func (a *Account) TryEnter() bool { return a.tryEnter() }

// Enter admits the caller to a connection of the pool, which is idle then; who was admitted calls Leave. It waits until a
// connection comes back or was made, until ctx ends, or until the deadline, and then the error is [ErrTimeout].
// Other errors are [ErrFull], at once, [ErrClosed], ctx.Err() and that of AccountConfig.Connect.
//
// Now and then the pool turns out to have no idle connection after all, because one has just broken, and
// no permit for a new one. Then the caller leaves, and enters again with stale set: a connection is made
// for it even if one seems to be idle.
func (a *Account) Enter(ctx context.Context, deadline time.Time, stale bool) error {
	if !stale && a.tryEnter() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if int(a.waiting.Add(1)) > a.cfg.Waiters {
		a.waiting.Add(-1)
		a.refused.Add(1)
		return ErrFull
	}
	defer a.waiting.Add(-1)
	w := &waiter{ready: make(chan error, 1)}
	admitted, err := a.enqueue(w, stale)
	if admitted || err != nil {
		return err
	}
	began := time.Now()
	a.waits.Add(1)
	defer func() { a.waited.Add(int64(time.Since(began))) }()
	return a.await(ctx, w, deadline, stale)
}

// staleWait is how often a caller looks who found the pool without the idle connection that the account believed in: one that
// a hook of the pool held back comes without a word.
const staleWait = 5 * time.Millisecond

// await waits until w is called.
func (a *Account) await(ctx context.Context, w *waiter, deadline time.Time, stale bool) error {
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	var look <-chan time.Time
	if stale {
		ticker := time.NewTicker(staleWait)
		defer ticker.Stop()
		look = ticker.C
	}
	for {
		select {
		case err := <-w.ready:
			return err
		case <-ctx.Done():
			return a.giveUp(w, ctx.Err())
		case <-timer.C:
			a.refused.Add(1)
			return a.giveUp(w, ErrTimeout)
		case <-look:
			if a.cfg.Idle() {
				return a.giveUp(w, nil)
			}
		}
	}
}

// enqueue puts w in line, unless a connection is idle after all.
func (a *Account) enqueue(w *waiter, stale bool) (admitted bool, err error) {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	if a.closed {
		return false, ErrClosed
	}
	for {
		s := a.state.Load()
		if !stale && s&queued == 0 && busyOf(s) < connsOf(s) {
			if a.state.CompareAndSwap(s, s+oneBusy) {
				return true, nil
			}
		} else if a.state.CompareAndSwap(s, s|queued) {
			break
		}
	}
	a.waiters = append(a.waiters, w)
	a.growLocked()
	return false, nil
}

// giveUp takes w out of the line and returns err. Without one it admits w.
func (a *Account) giveUp(w *waiter, err error) error {
	s := a.server
	s.mu.Lock()
	i := slices.Index(a.waiters, w)
	if i < 0 { // it was called at the same moment
		s.mu.Unlock()
		called := <-w.ready
		if err == nil || called != nil {
			return called
		}
		a.Leave()
		return err
	}
	defer s.mu.Unlock()
	a.waiters = slices.Delete(a.waiters, i, i+1)
	a.calmLocked()
	switch {
	case err == nil:
		a.add(oneBusy)
	case errors.Is(err, ErrTimeout) && a.failed != nil:
		return errors.Join(err, a.failed)
	}
	return err
}

// calmLocked clears the mark of those who wait when nobody does.
func (a *Account) calmLocked() {
	if len(a.waiters) > 0 {
		return
	}
	a.dequeueLocked()
	for {
		s := a.state.Load()
		if a.state.CompareAndSwap(s, s&^queued) {
			return
		}
	}
}

func (a *Account) add(n int64) { a.state.Add(uint64(n)) }

// Leave ends what Enter began, after the connection is back in the pool, or closed.
func (a *Account) Leave() {
	if now := a.server.clock.Load(); a.used.Load() != now { // mostly equal, and then the line stays shared
		a.used.Store(now)
	}
	for {
		s := a.state.Load()
		if s&queued != 0 {
			a.leaveSlow()
			return
		}
		if a.state.CompareAndSwap(s, s-oneBusy) {
			break
		}
	}
	if a.server.hungry.Load() != 0 {
		a.server.makeRoom()
	}
}

// leaveSlow gives the connection to who waits for it: the account's own caller, or, when others have been
// patient for long enough, one of theirs.
func (a *Account) leaveSlow() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	state := a.state.Load()
	if busyOf(state) > connsOf(state) { // the connection was closed: there is nothing to give
		a.add(-oneBusy)
		a.growLocked()
		return
	}
	if s.shortLocked() > 0 && s.overdueLocked(a) {
		a.evictLocked()
		return
	}
	a.handOverLocked()
}

// handOverLocked gives what the caller has entered for to the first who waits.
func (a *Account) handOverLocked() {
	if len(a.waiters) == 0 {
		a.add(-oneBusy)
		a.calmLocked()
		a.server.makeRoomLocked(a.server.shortLocked())
		return
	}
	w := a.waiters[0]
	a.waiters = a.waiters[1:]
	w.ready <- nil
	a.calmLocked()
}

// overdueLocked says whether somebody else has waited for so long that a connection of a is theirs.
func (s *Server) overdueLocked(a *Account) bool {
	if len(s.works) > 0 {
		return true
	}
	for _, q := range []*queue{&s.poor, &s.rest} {
		if first := q.first(); first != nil && first != a {
			return time.Since(first.since) > patience
		}
	}
	return false
}

func (a *Account) belowFloor() bool { return connsOf(a.state.Load()) < a.cfg.Floor }

// growLocked has connections made for those who wait, as many as there are permits for, and waits in line for the others.
func (a *Account) growLocked() {
	s := a.server
	for !a.closed && !a.paused && len(a.waiters) > a.making && connsOf(a.state.Load()) < a.cfg.Ceiling {
		if !s.mayGrowLocked(a) {
			a.queueLocked()
			s.makeRoomLocked(s.shortLocked())
			return
		}
		s.used++
		s.clock.Add(1)
		s.accounts[a] = struct{}{}
		a.reserved++
		a.making++
		a.add(oneConn + oneBusy)
		go a.connect()
	}
	a.dequeueLocked()
}

// connect calls Connect and tells who waits of the outcome.
func (a *Account) connect() {
	retry, err := time.Duration(0), errors.New("budget: Connect panicked")
	defer func() { a.connected(retry, err) }()
	retry, err = a.cfg.Connect()
}

func (a *Account) connected(retry time.Duration, err error) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.making--
	a.failed = err
	if a.reserved > a.making { // it needed no socket, or got none
		a.reserved--
		a.add(-oneConn)
		a.settleLocked()
		defer s.freeLocked()
	}
	a.used.Store(s.clock.Load())
	if err == nil {
		a.handOverLocked()
		return
	}
	a.add(-oneBusy)
	if retry > 0 {
		a.paused = true
		time.AfterFunc(retry, a.resume)
		return
	}
	if len(a.waiters) > 0 {
		w := a.waiters[0]
		a.waiters = a.waiters[1:]
		w.ready <- err
		a.calmLocked()
	}
	a.growLocked()
}

func (a *Account) resume() {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	a.paused = false
	a.growLocked()
	a.server.countHungryLocked()
}

// settleLocked forgets a when it holds no permit.
func (a *Account) settleLocked() {
	if len(a.open) == 0 && a.reserved == 0 {
		delete(a.server.accounts, a)
	}
}

// idleLocked says whether a connection of a can make room.
func (a *Account) idleLocked() bool {
	s := a.state.Load()
	return s&queued == 0 && busyOf(s) < connsOf(s) && s != a.doubted && connsOf(s) < unbounded
}

// evictLocked closes one of a's idle connections. The caller has entered for it.
func (a *Account) evictLocked() {
	s := a.server
	s.evicting++
	go func() {
		done := a.cfg.Evict()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.evicting--
		if done {
			s.evicted++
			a.add(-oneBusy)
			a.growLocked()
		} else {
			a.handOverLocked()
			a.doubted = a.state.Load()
		}
		s.makeRoomLocked(s.shortLocked())
	}()
}

// queueLocked lines a up for a permit.
func (a *Account) queueLocked() {
	s := a.server
	line := &s.rest
	if a.belowFloor() {
		line = &s.poor
	}
	if a.line == line {
		return
	}
	if a.line == nil {
		a.since = time.Now()
		a.starved.Add(1)
	} else {
		a.line.remove(a)
	}
	a.line = line
	line.push(a)
	s.countHungryLocked()
}

func (a *Account) dequeueLocked() {
	if a.line == nil {
		return
	}
	a.line.remove(a)
	a.line = nil
	a.server.countHungryLocked()
}

// Unseen tells that the pool's connections are not dialled by the account: then it bounds nothing and makes nobody wait.
func (a *Account) Unseen() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if connsOf(a.state.Load()) >= unbounded {
		return
	}
	a.add(unbounded * oneConn)
	for _, w := range a.waiters {
		a.add(oneBusy)
		w.ready <- nil
	}
	a.waiters = nil
	a.calmLocked()
}

// Close refuses everybody who waits and who comes. What is open stays so.
func (a *Account) Close() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.closed = true
	for _, w := range a.waiters {
		w.ready <- ErrClosed
	}
	a.waiters = nil
	a.calmLocked()
}

// Usage is an account at one moment.
type Usage struct {
	Conns, Busy, Waiting int
	Waits                int64         // callers who waited for a connection, ever
	Waited               time.Duration // the sum of their waits
	Starved              int64         // times that the account had to wait for a permit
	Refused              int64         // callers who were sent away
}

// Usage returns where the account stands. It takes no lock.
func (a *Account) Usage() Usage {
	s := a.state.Load()
	u := Usage{Conns: connsOf(s), Busy: busyOf(s), Waiting: int(a.waiting.Load()), Waits: a.waits.Load(),
		Waited: time.Duration(a.waited.Load()), Starved: a.starved.Load(), Refused: a.refused.Load()}
	if u.Conns >= unbounded {
		u.Conns = u.Busy
	}
	return u
}

// queue holds accounts in the order in which they came.
type queue struct{ list []*Account }

func (q *queue) len() int { return len(q.list) }

func (q *queue) first() *Account {
	if len(q.list) == 0 {
		return nil
	}
	return q.list[0]
}

func (q *queue) push(a *Account) { q.list = append(q.list, a) }

func (q *queue) remove(a *Account) {
	if i := slices.Index(q.list, a); i >= 0 {
		q.list = slices.Delete(q.list, i, i+1)
	}
}
