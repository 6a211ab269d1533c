// Package budget bounds the connections that a process has open at one server, over all its pools.
//
// A [Server] has a number of permits; an open socket holds one, from before it is dialled until the server has closed
// its end. An [Account] is one pool's share. Whoever wants a connection enters the account first: at once while one
// of its connections is idle, else in a queue, from which it is called when a connection comes back or when a new one
// was made, whichever is first. New connections are made for the account and not for a caller, and only with a
// permit, so that nobody ever waits for a permit inside a pool or a dialer, where a connection that comes back would not be seen.
//
// When no permit is left, the idle connection of the coldest account makes room. Accounts get permits by turns; those below
// their floor come first, and the last tenth is for them alone. A connection in use is never closed, and who is at work keeps its floor
// against all but those who have less.
//
// # Concurrency
//
// Entering an account that has an idle connection, and leaving it, are one atomic operation each, on the account's own word. Everything else
// happens under one mutex per server that is held for bookkeeping only.
package budget

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

var (
	// ErrFull is the error of Enter when as many wait as may.
	ErrFull = errors.New("budget: too many are waiting for a connection")
	// ErrTimeout is the error of Enter when no connection came in time. It is joined with what the last attempt to make one failed of, and with
	// [ErrNoPermit] when there was no permit for another one.
	ErrTimeout = errors.New("budget: no connection became free in time")
	// ErrNoPermit is the error of a dial for which nobody has a permit.
	ErrNoPermit = errors.New("budget: no permit for a new connection")
	// ErrClosed is the error after Close.
	ErrClosed = errors.New("budget: closed")
)

const (
	// Cancels is the number of cancel requests that may be under way at once at one server, out of Limits.Total.
	Cancels = 2
	// patience is how long an account waits before another one's connection is taken from between two of its callers, unless it is below its floor and that one
	// above, and how long a new connection is kept for the account that it was made for: changing hands costs a connect.
	patience = 20 * time.Millisecond
	// rest is how long an account is unused before its floor makes room for those who have theirs. It may take up to twice as long.
	rest = 100 * time.Millisecond
)

// Limits of one server.
type Limits struct {
	Total int // permits, all included
	Own   int // of them, set aside for the pools of the library itself
	Work  int // of the shared ones, kept for [Server.Dialer]: accounts leave so many to it
}

// Shared returns how many permits are left for accounts and for [Server.Dialer].
func (l Limits) Shared() int { return l.Total - l.Own - Cancels }

// Server is the budget of one server. It is safe for concurrent use, and needs no end.
type Server struct {
	Totals Totals

	limits  Limits
	spare   int // permits that only an account below its floor gets
	cancels chan struct{}

	hungry atomic.Int32  // accounts and works that wait for a permit: who leaves an account looks here
	clock  atomic.Uint64 // the time by which the coldest account is found: it counts connections that are made, and rests

	waiters sync.Pool // of those who wait no more

	mu       sync.Mutex // guards everything below, and the fields of accounts that say so
	used     int        // permits of the shared part
	working  int        // of them, those of Dialer
	own      int        // permits of the own part
	closing  int        // used permits of sockets that are on their way out
	late     int        // of them, those that nobody counts on any more
	evicting int        // idle connections that are about to be
	looking  bool       // a timer will look for idle connections
	rich     int        // accounts above their floor
	accounts map[*Account]struct{}
	ticking  bool    // a timer will count the next rest; while there are accounts
	ticked   uint64  // the clock at the last one
	rested   uint64  // at the one before: who was left earlier has been unused for a rest
	poor     queue   // accounts below their floor that want a permit
	rest     queue   // others that do
	works    []*work // connections of the library's own, before all accounts
	owns     []*work // of its pools
	evicted  int64   // idle connections that have made room
}

// work is a dial of the library's own that waits for a permit.
type work struct{ ready chan struct{} }

// NewServer returns a budget of which nothing is used. Limits.Shared has to be at least 1.
func NewServer(l Limits) *Server {
	return &Server{limits: l, spare: (l.Shared() - l.Work) / 10, cancels: make(chan struct{}, Cancels), accounts: map[*Account]struct{}{},
		waiters: sync.Pool{New: newWaiter}}
}

// Snapshot is a server's budget at one moment.
type Snapshot struct {
	Limits
	Used    int   // permits in use, of the shared part
	Closing int   // of them, of connections that the server has not let go yet
	OwnUsed int   // permits in use, of the own part
	Cancels int   // cancel requests under way
	Hungry  int   // accounts that wait for a permit
	Evicted int64 // idle connections that have made room, ever

	Accounts int // of the shared part, what all accounts together can have now
}

// Snapshot returns where the budget stands.
func (s *Server) Snapshot() Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Snapshot{Limits: s.limits, Used: s.used, Closing: s.closing, OwnUsed: s.own, Cancels: len(s.cancels),
		Hungry: s.poor.len() + s.rest.len() + len(s.works), Evicted: s.evicted, Accounts: s.accountsLocked()}
}

// mayGrowLocked says whether a permit is there for a.
func (s *Server) mayGrowLocked(a *Account) bool {
	free := s.limits.Shared() - max(s.limits.Work, s.working) - (s.used - s.working)
	if a.belowFloor() {
		return free > 0
	}
	return free > s.spare
}

// freeLocked takes a permit back and gives it on.
func (s *Server) freeLocked() {
	s.used--
	s.serveLocked()
}

// holdLocked has a be among those that are asked for room, and time go on.
func (s *Server) holdLocked(a *Account) {
	s.accounts[a] = struct{}{}
	if !s.ticking {
		s.ticking = true
		time.AfterFunc(rest, s.tick)
	}
}

// tick counts a rest.
func (s *Server) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rested, s.ticked = s.ticked, s.clock.Add(1)
	if s.ticking = len(s.accounts) > 0; s.ticking {
		time.AfterFunc(rest, s.tick)
	}
	s.makeRoomLocked() // those that have rested do now
}

// serveLocked gives free permits to those who wait for one.
func (s *Server) serveLocked() {
	for len(s.works) > 0 && s.used < s.limits.Shared() {
		s.used++
		s.working++
		close(s.works[0].ready)
		s.works = s.works[1:]
	}
	for {
		a := s.poor.first()
		if a == nil || !s.mayGrowLocked(a) {
			if a = s.rest.first(); a == nil || !s.mayGrowLocked(a) {
				break
			}
		}
		a.dequeueLocked()
		a.growLocked() // queues again when it wants more than one
	}
	s.countHungryLocked()
	s.makeRoomLocked()
}

func (s *Server) countHungryLocked() {
	n := int32(s.poor.len() + s.rest.len() + len(s.works))
	if s.hungry.Load() != n {
		s.hungry.Store(n)
	}
}

// comingLocked is the number of permits that are on their way.
func (s *Server) comingLocked() int { return s.closing - s.late + s.evicting }

// shortLocked is the number of permits that are wanted and not on their way.
func (s *Server) shortLocked() int {
	return s.poor.len() + s.rest.len() + len(s.works) - s.comingLocked()
}

// makeRoomLocked has idle connections closed, of the coldest accounts first, until as many are on their way as are wanted.
// It looks at every account, so it is for when something is wanted; who becomes idle later offers itself.
func (s *Server) makeRoomLocked() {
	for range s.shortLocked() {
		if !s.evictColdestLocked(s.takesFloorLocked) {
			return
		}
	}
}

// evictColdestLocked closes an idle connection of the coldest account: of one that needs it for its floor only when no other has any, and takes
// allows it. It says whether there was one.
func (s *Server) evictColdestLocked(takes func(*Account) bool) bool {
	now, later := time.Now(), time.Duration(0)
	var coldest, needed *Account
	for a := range s.accounts {
		if !a.idleLocked() {
			continue
		}
		if wait := a.spared.Sub(now); wait > 0 {
			if later == 0 || wait < later {
				later = wait
			}
			continue
		}
		best := &coldest
		if a.needsFloorLocked() {
			if coldest != nil || !takes(a) {
				continue
			}
			best = &needed
		}
		if *best == nil || a.used.Load() < (*best).used.Load() {
			*best = a
		}
	}
	if coldest == nil {
		coldest = needed
	}
	if coldest == nil {
		if later > 0 {
			s.lookLocked(later)
		}
		return false
	}
	if coldest.tryEnter() { // else somebody was quicker, and offers it when it leaves
		coldest.evictLocked()
	}
	return true
}

// takesFloorLocked says whether somebody may have a connection that a needs for its floor: a work, or an account below its own that has nothing, or would not
// have more than a afterwards. Where others are above their floor it waits for theirs first. Who is at its floor never may.
func (s *Server) takesFloorLocked(a *Account) bool {
	coming := s.comingLocked()
	if len(s.works) > coming {
		return true
	}
	b := s.poor.firstBut(a)
	for n := s.poor.len(); n > 1 && b != nil && !b.mayTakeFrom(a); n-- {
		s.poor.remove(b)
		s.poor.push(b)
		b = s.poor.firstBut(a)
	}
	if b == nil || len(s.works)+s.poor.len() <= coming || !b.mayTakeFrom(a) {
		return false
	}
	if wait := patience - time.Since(b.since); s.rich > 0 && wait >= 0 {
		s.lookLocked(wait + 1)
		return false
	}
	return true
}

// lookLocked has room made after a while, when no account is spared any more that was.
func (s *Server) lookLocked(after time.Duration) {
	if s.looking {
		return
	}
	s.looking = true
	time.AfterFunc(after, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.looking = false
		s.makeRoomLocked()
	})
}

// take waits for a permit of the shared part, before all accounts.
func (s *Server) take(ctx context.Context) error {
	return s.waitFor(ctx, &s.works, func() bool {
		if s.used >= s.limits.Shared() {
			return false
		}
		s.used++
		s.working++
		return true
	}, s.freeWorkLocked)
}

func (s *Server) freeWorkLocked() {
	s.working--
	s.freeLocked()
}

// takeOwn waits for a permit of the own part. It is as large as the pools that use it, so who waits waits for the server to let go of a connection.
func (s *Server) takeOwn(ctx context.Context) error {
	return s.waitFor(ctx, &s.owns, func() bool {
		if s.own >= s.limits.Own {
			return false
		}
		s.own++
		return true
	}, s.freeOwnLocked)
}

func (s *Server) freeOwnLocked() {
	if len(s.owns) > 0 {
		close(s.owns[0].ready)
		s.owns = s.owns[1:]
		return
	}
	s.own--
}

// waitFor calls try under mu, and waits in line when it fails; free gives back what came too late.
func (s *Server) waitFor(ctx context.Context, line *[]*work, try func() bool, free func()) error {
	s.mu.Lock()
	if try() {
		s.mu.Unlock()
		return nil
	}
	w := &work{ready: make(chan struct{})}
	*line = append(*line, w)
	s.countHungryLocked()
	s.makeRoomLocked()
	s.mu.Unlock()

	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(*line, w); i >= 0 {
		*line = slices.Delete(*line, i, i+1)
		s.countHungryLocked()
	} else {
		free()
	}
	if ctx.Err() == context.Canceled {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %v", ErrTimeout, ctx.Err()) // not wrapped: pgconn makes a timeout of the network's of it, and the rest is lost
}
