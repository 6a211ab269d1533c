package budget

import (
	"fmt"
	"slices"
)

// What tests measure against.
const (
	Patience       = patience
	LingerTimeout  = lingerTimeout
	LingerOneSided = lingerOneSided
	LingerUsual    = lingerUsual
	Rest           = rest
	LastWords      = lastWords
)

// Lock holds the server's mutex until the returned function is called.
func (s *Server) Lock() (unlock func()) {
	s.mu.Lock()
	return s.mu.Unlock
}

// Accounts returns how many accounts are asked for room.
func (s *Server) Accounts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.accounts)
}

// Ticking says whether a timer counts the next rest.
func (s *Server) Ticking() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ticking
}

// Expires says whether a timer will go off at a waiter's deadline. It stops it.
func (a *Account) Expires() bool {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	return a.expiry != nil && a.expiry.Stop()
}

// Books returns how many permits the account has that no socket has taken, its calls of Connect under way, and its sockets.
func (a *Account) Books() (unclaimed, making, open int) {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	return len(a.unclaimed), a.making, len(a.open)
}

// Give has the account hold n permits, of idle connections that do not exist.
func Give(a *Account, n int) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.addConnLocked(int64(n))
	s.used += n
	if n > 0 {
		s.holdLocked(a)
	}
}

// Starve has each account wait for a permit, of which none is left.
func Starve(all []*Account) {
	for _, a := range all {
		a.enqueue(&waiter{ready: make(chan error, 1)})
	}
}

// Stuck says what ought to have happened and has not, at a moment when nothing runs; "" for nothing.
func (s *Server) Stuck() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.works) > 0 && s.used < s.limits.Shared(), len(s.owns) > 0 && s.own < s.limits.Own:
		return "the library's own dial waits beside a free permit"
	case int(s.hungry.Load()) != s.poor.len()+s.rest.len()+len(s.works):
		return "the count of those who wait is wrong"
	case s.evicting < 0 || s.closing < s.late || s.late < 0 || s.working < 0 || s.used < s.working || s.used > s.limits.Shared():
		return "a count is below nothing, or above everything"
	}
	rich := 0
	for a := range s.accounts {
		if a.aboveFloor() {
			rich++
		}
		if why := a.stuckLocked(); why != "" {
			return why
		}
		if !s.looking && s.shortLocked() > 0 && a.idleLocked() && (!a.needsFloorLocked() || s.takesFloorLocked(a)) {
			return fmt.Sprintf("%d are wanted beside an idle connection: %d closing, %d of them late, %d about to be", s.shortLocked(), s.closing, s.late, s.evicting)
		}
	}
	if rich != s.rich {
		return "the count of those above their floor is wrong"
	}
	for _, q := range []*queue{&s.poor, &s.rest} {
		for _, a := range q.list {
			switch {
			case s.mayGrowLocked(a):
				return "an account waits beside a free permit"
			case len(a.waiters) == 0:
				return "an account is in line for nobody"
			case (q == &s.poor) != a.belowFloor():
				return "an account is in the wrong line"
			}
		}
	}
	return ""
}

func (a *Account) stuckLocked() string {
	state := a.state.Load()
	switch {
	case (len(a.waiters) > 0) != (state&queued != 0):
		return "the mark of those who wait is wrong"
	case len(a.waiters) > 0 && !slices.ContainsFunc(a.waiters, (*waiter).stale) && busyOf(state) < connsOf(state):
		return "a caller waits beside an idle connection of its own"
	case len(a.waiters) > 0 && a.making == 0 && a.line == nil && !a.closed && !a.paused && connsOf(state) < a.cfg.Ceiling && a.roomyLocked() && a.server.evicting == 0:
		return "a caller waits and its account in no line"
	}
	return ""
}
