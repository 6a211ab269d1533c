package budget

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// AccountConfig is one pool's share of a server's budget, and what the budget asks of the pool. Everything but Inner is required.
type AccountConfig struct {
	Floor   int // connections that the account gets before another gets more than its own floor, and keeps while it uses them; at least 1
	Ceiling int // the most that it has; of sockets it has twice as many, those that broke and are not gone yet included
	Waiters int // the most callers that wait in Enter
	// Inner says that each wait is part of a longer one, which somebody else counts: the server's Totals leave it out.
	Inner bool
	// Patience is how long a caller goes on waiting after a failure of Connect while other connections are open, one
	// of which may come back.
	Patience time.Duration
	// Connect makes a connection, or finds an idle one, and gives it to the pool. It runs in a goroutine of its own with a permit that
	// a dial with ctx takes. With retry above 0 the callers go on waiting, and it is called again after that time; otherwise
	// err is the error of the caller for whom it was called. A panic is such an error: no caller's goroutine would meet it.
	Connect func(ctx context.Context) (retry time.Duration, err error)
	// Evict closes one idle connection, and says whether there was one. It must not dial. It runs in a goroutine of its own.
	Evict func() bool
	// Idle says whether the pool has an idle connection. It is asked when the account may be wrong about that.
	Idle func() bool
}

// Account is one pool's share. It is safe for concurrent use. Who makes it calls Close.
type Account struct {
	cfg    AccountConfig
	server *Server
	totals *Totals // for Waits and Waited alone

	// state is three numbers in one word, so that the common case is one operation: connections that are there or being made
	// (conns), callers that have entered and attempts to connect (busy), and whether somebody waits. While nobody
	// waits, conns less busy are idle.
	state   atomic.Uint64
	used    atomic.Uint64 // the server's clock when it was last left
	waiting atomic.Int32

	waits   atomic.Int64 // callers who had to wait
	waited  atomic.Int64 // for how long, in ns
	starved atomic.Int64 // times that a permit had to be waited for, and callers who waited for one in vain

	// Guarded by server.mu.
	waiters    []*waiter          // in the order in which they are called
	expiry     *time.Timer        // tells those whose deadline has passed; nil: was never needed
	expires    time.Time          // when expiry goes off; zero: it is not set
	making     int                // calls of Connect under way
	unclaimed  []*attempt         // those of them whose permit no socket has
	evicting   int                // idle connections of it that are about to make room
	line       *queue             // where it waits for a permit; nil: nowhere
	since      time.Time          // since when
	spared     time.Time          // until when no connection of it makes room
	paused     bool               // Connect asked to be called later
	failed     error              // of the last Connect, nil when it succeeded or nobody waits any more
	cancelling map[*Conn]struct{} // sockets of cancel requests
	dialled    bool               // the budget has seen a socket of it
	open       map[*Conn]struct{}
	closed     bool
}

// waiter is one caller in line. It is used again once its caller has gone on.
type waiter struct {
	since    time.Time
	deadline time.Time
	ready    chan error // holds one; whoever takes the waiter out of the line sends it, and nobody else
	missed   int        // as of Enter
}

func newWaiter() any { return &waiter{ready: make(chan error, 1)} }

// stale says that the pool had no connection for it although the account believed so.
func (w *waiter) stale() bool { return w.missed > 1 }

// attempt is one call of Connect, and its permit.
type attempt struct {
	account *Account
	dialled atomic.Bool // a socket of it was dialled, or is being

	// Guarded by server.mu.
	over   bool
	parked int // sockets of it that came to nothing and are not gone yet; its permit is theirs
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
	a := &Account{cfg: cfg, server: s, totals: s.totalsOf(cfg)}
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
// Now and then the pool turns out to have no idle connection after all, because one has just broken, or somebody
// was quicker. Then the caller leaves, and enters again with the number of times that it has missed: it comes before all others, and from the
// second time on a connection is made for it even if one seems to be idle.
func (a *Account) Enter(ctx context.Context, deadline time.Time, missed int) error {
	if missed < 2 && a.tryEnter() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if n := a.waiting.Add(1); int(n) > a.cfg.Waiters && missed == 0 {
		a.waiting.Add(-1)
		return ErrFull
	}
	w := a.server.waiters.Get().(*waiter)
	w.since, w.deadline, w.missed = time.Now(), deadline, missed
	admitted, err := a.enqueue(w)
	if !admitted && err == nil {
		a.waits.Add(1)
		a.totals.Waits.Add(1)
		err = a.await(ctx, w)
		took := int64(time.Since(w.since))
		a.waited.Add(took)
		a.totals.Waited.Add(took)
	}
	a.waiting.Add(-1)
	a.server.waiters.Put(w)
	return err
}

// failedPause is the time between attempts to connect for callers who have patience.
const failedPause = 100 * time.Millisecond

// staleWait is how often a caller looks who found the pool without the idle connection that the account believed in: one that
// a hook of the pool held back comes without a word.
const staleWait = 5 * time.Millisecond

// await waits until w is called.
func (a *Account) await(ctx context.Context, w *waiter) error {
	if w.stale() {
		return a.awaitStale(ctx, w)
	}
	select {
	case err := <-w.ready:
		return err
	case <-ctx.Done():
		return a.giveUp(w, ctx.Err())
	}
}

func (a *Account) awaitStale(ctx context.Context, w *waiter) error {
	look := time.NewTicker(staleWait)
	defer look.Stop()
	for {
		select {
		case err := <-w.ready:
			return err
		case <-ctx.Done():
			return a.giveUp(w, ctx.Err())
		case <-look.C:
			if a.cfg.Idle() {
				return a.giveUp(w, nil)
			}
		}
	}
}

// enqueue puts w in line, unless a connection is idle after all. Who has missed was called already, and comes first.
func (a *Account) enqueue(w *waiter) (admitted bool, err error) {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	if a.closed {
		return false, ErrClosed
	}
	for {
		s := a.state.Load()
		if !w.stale() && s&queued == 0 && busyOf(s) < connsOf(s) {
			if a.state.CompareAndSwap(s, s+oneBusy) {
				return true, nil
			}
		} else if a.state.CompareAndSwap(s, s|queued) {
			break
		}
	}
	if w.missed > 0 {
		a.waiters = slices.Insert(a.waiters, 0, w)
	} else {
		a.waiters = append(a.waiters, w)
	}
	a.expireLocked(w.deadline)
	a.growLocked()
	return false, nil
}

// expireLocked has expire called at the deadline, or before. One timer serves all who wait, and stays set when they are
// served: nearly all are, long before, and setting one for each would cost them as much as the rest of their wait.
func (a *Account) expireLocked(deadline time.Time) {
	switch {
	case !a.expires.IsZero() && !deadline.Before(a.expires):
		return
	case a.expiry == nil:
		a.expiry = time.AfterFunc(time.Until(deadline), a.expire)
	default:
		a.expiry.Reset(time.Until(deadline))
	}
	a.expires = deadline
}

// expire tells those who have waited until their deadline.
func (a *Account) expire() {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	a.expires = time.Time{}
	err := ErrTimeout
	if a.failed != nil {
		err = errors.Join(err, a.failed)
	}
	if a.line != nil {
		err = errors.Join(err, ErrNoPermit)
	}
	now, before := time.Now(), len(a.waiters)
	a.waiters = slices.DeleteFunc(a.waiters, func(w *waiter) bool {
		if w.deadline.After(now) {
			a.expireLocked(w.deadline)
			return false
		}
		if a.line != nil {
			a.starved.Add(1)
			a.server.Totals.Starved.Add(1)
		}
		w.ready <- err
		return true
	})
	if len(a.waiters) < before {
		a.balanceLocked()
	}
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
	if err == nil {
		a.add(oneBusy)
	}
	a.balanceLocked()
	return err
}

// callLocked takes the first who waits out of the line.
func (a *Account) callLocked(err error) {
	w := a.waiters[0]
	a.waiters = slices.Delete(a.waiters, 0, 1)
	w.ready <- err
}

// balanceLocked brings everybody up to date after something has changed: who waits beside a connection that nobody uses
// is called, others have connections made, and when nobody waits the mark is cleared and room made for other accounts.
func (a *Account) balanceLocked() {
	// One who is stale knows better, looks by itself, and holds up the others: each of them is called in vain once at most.
	for s := a.state.Load(); len(a.waiters) > 0 && !a.waiters[0].stale() && busyOf(s) < connsOf(s); s = a.state.Load() {
		a.add(oneBusy)
		a.callLocked(nil)
	}
	a.calmLocked()
	a.growLocked()
	a.offerLocked()
}

// calmLocked clears the mark of those who wait when nobody does.
func (a *Account) calmLocked() {
	if len(a.waiters) > 0 {
		return
	}
	if !a.paused {
		a.failed = nil
	}
	a.dequeueLocked()
	for {
		s := a.state.Load()
		if s&queued == 0 || a.state.CompareAndSwap(s, s&^queued) {
			return
		}
	}
}

func (a *Account) add(n int64) { a.state.Add(uint64(n)) }

// addConnLocked counts connections, and who is above its floor.
func (a *Account) addConnLocked(n int64) {
	above := a.aboveFloor()
	a.add(n * oneConn)
	switch {
	case a.aboveFloor() == above:
	case above:
		a.server.rich--
	default:
		a.server.rich++
	}
}

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
		a.server.mu.Lock()
		defer a.server.mu.Unlock()
		a.offerLocked()
	}
}

// leaveSlow gives the connection to who waits for it: the account's own caller, or, when others have been
// patient for long enough, one of theirs.
func (a *Account) leaveSlow() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	idle := true
	if a.doubtfulLocked() {
		s.mu.Unlock()
		idle = a.cfg.Idle()
		s.mu.Lock()
	}
	switch {
	case !idle:
		a.add(-oneBusy)
	case s.shortLocked() > 0 && s.overdueLocked(a):
		a.dequeueLocked() // to the end: its turn would come first again
		a.evictLocked()
		return
	default:
		a.handOverLocked()
	}
	a.balanceLocked()
}

// doubtfulLocked says whether who leaves may leave nothing behind: the connection was closed, or, though another one's
// was, comes back; or the first who waits has been called in vain before, and would be again, and again.
func (a *Account) doubtfulLocked() bool {
	state := a.state.Load()
	return busyOf(state) > connsOf(state) || len(a.waiters) > 0 && a.waiters[0].stale()
}

// handOverLocked gives what the caller has entered for to the first who waits.
func (a *Account) handOverLocked() {
	if len(a.waiters) > 0 {
		a.callLocked(nil)
	} else {
		a.add(-oneBusy)
	}
}

// overdueLocked says whether somebody else has waited for so long that a connection of a is theirs, although callers of a's own wait for it.
func (s *Server) overdueLocked(a *Account) bool {
	now := time.Now()
	if a.spared.After(now) {
		return false
	}
	if len(s.works) > 0 {
		return true
	}
	above := a.aboveFloor()
	b, q := s.poor.firstBut(a), &s.poor
	if b == nil && above {
		b, q = s.rest.firstBut(a), &s.rest
	}
	if b == nil {
		return false
	}
	wait := patience
	if above && b.belowFloor() { // a will not take it back
		wait = 0
	}
	if now.Sub(b.since) <= wait {
		return false
	}
	if !b.mayTakeFrom(a) {
		q.postpone(b)
		return false
	}
	return true
}

func (a *Account) belowFloor() bool { return connsOf(a.state.Load()) < a.cfg.Floor }

func (a *Account) aboveFloor() bool {
	conns := connsOf(a.state.Load())
	return conns > a.cfg.Floor && conns < unbounded
}

// needsFloorLocked says whether a needs all its connections for its floor: it has no more, those that make room already aside, and was used
// lately.
func (a *Account) needsFloorLocked() bool {
	s := a.state.Load()
	return connsOf(s)-a.evicting <= a.cfg.Floor && (busyOf(s) > a.evicting || a.used.Load() >= a.server.rested)
}

// mayTakeFrom says whether a has nothing, or would have no more than b after a connection has changed hands. Otherwise the two would take it
// from each other for ever, at a connect each time.
func (a *Account) mayTakeFrom(b *Account) bool {
	has := connsOf(a.state.Load())
	return has == 0 || has+1 < connsOf(b.state.Load())
}

// growLocked has connections made for those who wait, as many as there are permits for, and waits in line for the others.
func (a *Account) growLocked() {
	s := a.server
	for !a.closed && !a.paused && len(a.waiters) > a.making && connsOf(a.state.Load()) < a.cfg.Ceiling && a.roomyLocked() {
		if !s.mayGrowLocked(a) {
			a.queueLocked()
			return
		}
		s.used++
		s.clock.Add(1)
		s.holdLocked(a)
		at := &attempt{account: a}
		a.unclaimed = append(a.unclaimed, at)
		a.making++
		a.add(oneBusy)
		a.addConnLocked(1)
		go a.connect(at)
	}
	a.dequeueLocked()
}

// roomyLocked says whether another socket may be opened. One that broke is no longer among the account's connections and still has a
// permit, and its place in the pool, until its server lets it go: what does not go must not be replaced for ever.
func (a *Account) roomyLocked() bool { return len(a.open)+len(a.unclaimed) < 2*a.cfg.Ceiling }

// connect calls Connect and tells who waits of the outcome.
func (a *Account) connect(at *attempt) {
	retry, err := time.Duration(0), errors.New("budget: Connect ended its goroutine")
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("budget: Connect panicked: %v", p)
		}
		a.connected(at, retry, err)
	}()
	retry, err = a.cfg.Connect(context.WithValue(context.Background(), making{}, at))
}

func (a *Account) connected(at *attempt, retry time.Duration, err error) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.making--
	a.failed = err
	at.over = true
	for ; at.parked > 0; at.parked-- { // they go by themselves, and are no connection any more
		a.addConnLocked(-1)
	}
	if i := slices.Index(a.unclaimed, at); i >= 0 { // it needed no socket, or got none
		a.unclaimed = slices.Delete(a.unclaimed, i, i+1)
		a.addConnLocked(-1)
		a.settleLocked()
		defer s.freeLocked()
	} else if err == nil {
		a.spareLocked()
	}
	if err != nil && retry == 0 && len(a.waiters) > 0 && a.servingLocked() {
		retry = min(a.cfg.Patience-time.Since(a.waiters[0].since), failedPause)
	}
	switch {
	case err == nil: // what it found idle may be on its way to somebody else; who misses it comes first the next time
		a.handOverLocked()
	case retry > 0:
		a.add(-oneBusy)
		a.paused = true
		time.AfterFunc(retry, a.resume)
	default:
		a.add(-oneBusy)
		if len(a.waiters) > 0 {
			a.callLocked(err)
		}
	}
	a.balanceLocked()
}

func (a *Account) resume() {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	a.paused = false
	a.balanceLocked()
}

// settleLocked forgets a when it holds no permit.
func (a *Account) settleLocked() {
	if len(a.open) == 0 && len(a.unclaimed) == 0 {
		delete(a.server.accounts, a)
	}
}

// idleLocked says whether a connection of a can make room.
func (a *Account) idleLocked() bool {
	s := a.state.Load()
	return s&queued == 0 && busyOf(s) < connsOf(s) && connsOf(s) < unbounded
}

// offerLocked makes room when a has become idle. Those that were idle before were asked when the need arose.
func (a *Account) offerLocked() {
	s := a.server
	for s.shortLocked() > 0 && a.idleLocked() {
		if wait := time.Until(a.spared); wait > 0 {
			s.lookLocked(wait)
			return
		}
		if a.needsFloorLocked() && !s.takesFloorLocked(a) {
			s.overdueLocked(a) // who may not have it makes way for others who wait
			return
		}
		if a.tryEnter() { // else somebody was quicker
			a.evictLocked()
		}
	}
}

// spareLocked keeps a's connections for a moment: a new one has not paid for itself, and where Evict found none it would again.
func (a *Account) spareLocked() { a.spared = time.Now().Add(patience) }

// evictLocked closes one of a's idle connections. The caller has entered for it.
func (a *Account) evictLocked() {
	a.server.evicting++
	a.evicting++
	go func() {
		done := false
		defer func() {
			_ = recover() // what panics here does so in Connect too, which tells of it
			a.evicted(done)
		}()
		done = a.cfg.Evict()
	}()
}

func (a *Account) evicted(done bool) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	s.evicting--
	a.evicting--
	if done {
		s.evicted++
	} else {
		a.spareLocked()
	}
	a.add(-oneBusy)
	a.balanceLocked()
	s.makeRoomLocked() // its permit may be somebody's already, who has been followed by others
}

// Shrink has an idle connection closed, for one that Connect was refused: the server has fewer left than the budget believes.
func (a *Account) Shrink() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	s.evictColdestLocked(func(*Account) bool { return !a.aboveFloor() }) // the attempt is counted
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
	if a.line != nil {
		a.line.remove(a)
		a.line = line
		line.push(a)
		return
	}
	a.since = time.Now()
	a.starved.Add(1)
	s.Totals.Starved.Add(1)
	a.line = line
	line.push(a)
	s.countHungryLocked()
	s.makeRoomLocked()
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
// A pool that has dialled with it goes on being counted: its Conn was only out of sight, under a wrapper.
func (a *Account) Unseen() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.dialled || connsOf(a.state.Load()) >= unbounded {
		return
	}
	a.addConnLocked(unbounded)
	for len(a.waiters) > 0 {
		a.add(oneBusy)
		a.callLocked(nil)
	}
	a.calmLocked()
}

// Bounds says whether the account bounds its pool: false once it is [Account.Unseen].
func (a *Account) Bounds() bool { return connsOf(a.state.Load()) < unbounded }

// Lower lowers the ceiling to that of a pool that turned out to be smaller; never below 1.
func (a *Account) Lower(ceiling int) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.cfg.Ceiling = max(1, min(a.cfg.Ceiling, ceiling))
}

// Making returns how many connections are being made at the moment, and the ceiling. It takes the lock: it is for who waited in vain.
func (a *Account) Making() (making, ceiling int) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	return a.making, a.cfg.Ceiling
}

// HasConns says whether a connection is there, or being made.
func (a *Account) HasConns() bool { return connsOf(a.state.Load()) > 0 }

// Close refuses everybody who waits, and who would have to. What is open stays so.
func (a *Account) Close() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.closed = true
	if a.expiry != nil { // it would keep the account, and all that is behind it, until then
		a.expiry.Stop()
	}
	for len(a.waiters) > 0 {
		a.callLocked(ErrClosed)
	}
	a.calmLocked()
}

// Usage is an account at one moment.
type Usage struct {
	Conns, Busy, Waiting int
	Waits                int64         // callers who waited for a connection, ever
	Waited               time.Duration // the sum of their waits
	Starved              int64         // times that the account had to wait for a permit
}

// Usage returns where the account stands. It takes no lock.
func (a *Account) Usage() Usage {
	s := a.state.Load()
	u := Usage{Conns: connsOf(s), Busy: busyOf(s), Waiting: int(a.waiting.Load()), Waits: a.waits.Load(),
		Waited: time.Duration(a.waited.Load()), Starved: a.starved.Load()}
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

// firstBut is the first that is not a.
func (q *queue) firstBut(a *Account) *Account {
	for _, b := range q.list {
		if b != a {
			return b
		}
	}
	return nil
}

func (q *queue) push(a *Account) { q.list = append(q.list, a) }

// postpone has a wait from now on, behind the others: they may have less.
func (q *queue) postpone(a *Account) {
	if len(q.list) == 1 {
		return
	}
	q.remove(a)
	q.push(a)
	a.since = time.Now()
}

func (q *queue) remove(a *Account) {
	if i := slices.Index(q.list, a); i >= 0 {
		q.list = slices.Delete(q.list, i, i+1)
	}
}
