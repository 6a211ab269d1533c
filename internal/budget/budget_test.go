package budget_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// hog takes n connections, which nobody gives back but the test.
func (w *world) hog(n int) (p *pool, held []*budget.Conn) {
	w.t.Helper()
	p = w.pool(1, n)
	for range n {
		held = append(held, w.take(p))
	}
	return p, held
}

// loop takes, uses for d and gives back, until stop is closed; it reports the longest wait.
func (w *world) loop(p *pool, d time.Duration, stop <-chan struct{}) (longest time.Duration, calls int) {
	for {
		select {
		case <-stop:
			return longest, calls
		default:
		}
		began := time.Now()
		c, err := p.take(context.Background(), time.Minute)
		if err != nil {
			w.t.Errorf("take: %v", err)
			return longest, calls
		}
		longest = max(longest, time.Since(began))
		calls++
		time.Sleep(d)
		p.give(c)
	}
}

func TestTheDialerNeverWaits(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		began := time.Now()
		p := w.pool(1, 2)
		dial := func(ctx context.Context) error {
			c, err := p.account.Route(p.dial).Dial(ctx, "tcp", "db:5432")
			if err == nil {
				c.Close()
			}
			return err
		}
		var ended context.Context // of an attempt that is over
		p.connect = func(making context.Context) (time.Duration, error) { ended = making; return 0, errRefused }
		if _, err := p.take(t.Context(), time.Second); err != errRefused {
			t.Fatal(err)
		}
		p.connect = nil
		if err := errors.Join(dial(t.Context()), dial(ended)); err != nil {
			t.Errorf("with free permits: %v", err)
		}
		synctest.Wait()
		hog, held := w.hog(1)
		p.put(w.take(p))
		if err := dial(t.Context()); err != budget.ErrNoPermit {
			t.Errorf("without a permit: %v", err)
		}
		if err := dial(ended); err != budget.ErrNoPermit {
			t.Errorf("of an attempt that is over: %v", err)
		}
		if time.Since(began) != 0 {
			t.Errorf("it took %v", time.Since(began))
		}
		p.account.Leave()
		hog.give(held[0])
	})
}

func TestADialTakesNoPermitOverTheCeilingOrFromWhoWaits(t *testing.T) {
	in(t, 3, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		p.give(w.take(p))
		if _, err := p.account.Route(p.dial).Dial(t.Context(), "tcp", "db:5432"); err != budget.ErrNoPermit {
			t.Errorf("over the ceiling: %v", err)
		}
	})
	in(t, 20, func(t *testing.T, w *world) { // 18 for those above their floor
		hog, held := w.hog(18)
		waiting := w.pool(1, 4)
		c := w.take(waiting) // the 19th
		next := w.call(waiting)
		p := w.pool(1, 4)
		if _, err := p.account.Route(p.dial).Dial(t.Context(), "tcp", "db:5432"); err != budget.ErrNoPermit {
			t.Errorf("beside an account that waits: %v", err)
		}
		waiting.give(c)
		next.give()
		for _, c := range held {
			hog.give(c)
		}
	})
}

func TestAccountsTakeTurns(t *testing.T) {
	in(t, 6, func(t *testing.T, w *world) {
		hog, held := w.hog(4)
		a, b := w.pool(1, 3), w.pool(1, 3)
		ca, cb := w.take(a), w.take(b) // they have their floor
		w.b.slow(ms, ms)
		var calls []*call
		for _, p := range []*pool{a, a, b, b} { // all of a's callers came first
			calls = append(calls, w.call(p))
			time.Sleep(ms)
		}
		for i, want := range [][2]int{{2, 1}, {2, 2}, {3, 2}, {3, 3}} {
			hog.drop(held[i])
			time.Sleep(5 * ms)
			if got := [2]int{a.dialled(), b.dialled()}; got != want {
				t.Errorf("after %d permits the accounts have dialled %v times, want %v", i+1, got, want)
			}
		}
		for _, c := range calls {
			c.give()
		}
		a.give(ca)
		b.give(cb)
	})
}

func TestWhoIsBelowItsFloorComesFirst(t *testing.T) {
	in(t, 3, func(t *testing.T, w *world) {
		hog, held := w.hog(2)
		rich, poor := w.pool(1, 4), w.pool(1, 4)
		c := w.take(rich)
		more := w.call(rich)
		time.Sleep(time.Second)
		first := w.call(poor)
		hog.drop(held[0])
		if d := first.wait(); d != 0 {
			t.Errorf("the account below its floor waited %v", d)
		}
		if more.served() {
			t.Error("the account above its floor was served as well")
		}
		hog.drop(held[1])
		more.wait()
		first.give()
		more.give()
		rich.give(c)
	})
}

func TestTheLastTenthIsForWhoIsBelowItsFloor(t *testing.T) {
	in(t, 20, func(t *testing.T, w *world) {
		hog := w.pool(2, 100)
		var calls []*call
		for range 30 {
			calls = append(calls, w.call(hog))
		}
		if s := w.Snapshot(); s.Used != 18 || s.Hungry != 1 {
			t.Errorf("one account alone has %d of 20 permits, %d hungry", s.Used, s.Hungry)
		}
		a, b := w.pool(1, 4), w.pool(1, 4)
		began := time.Now()
		ca, cb := w.take(a), w.take(b)
		if s := w.Snapshot(); s.Used != 20 || time.Since(began) != 0 {
			t.Errorf("%d permits are used, after %v", s.Used, time.Since(began))
		}
		a.drop(ca) // nothing of the tenth is for the hog
		time.Sleep(time.Second)
		if s := w.Snapshot(); s.Used != 19 {
			t.Errorf("%d permits are used", s.Used)
		}
		b.drop(cb)
		for _, c := range calls {
			c.give()
		}
	})
}

func TestAnEndlessLineGivesWayToWhoHasNothing(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog, p := w.pool(1, 4), w.pool(1, 4)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { w.loop(hog, 2*ms, stop) })
		}
		time.Sleep(time.Second)
		w.b.slow(4*ms, ms)
		for range 5 {
			next := w.call(p)
			if d := next.wait(); d < budget.Patience || d > budget.Patience+3*2*ms+5*ms {
				t.Errorf("served after %v, want patience, one call of the other's, and a connect", d)
			}
			next.give()
			time.Sleep(100 * ms)
		}
		close(stop)
		wg.Wait()
	})
}

// The one that holds everything may itself be below its floor, and first in the line.
func TestAnEndlessLineBelowItsFloorGivesWayToWhoHasNothing(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog, p := w.pool(2, 4), w.pool(2, 4)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { w.loop(hog, 2*ms, stop) })
		}
		time.Sleep(time.Second)
		next := w.call(p)
		time.Sleep(time.Second)
		if !next.served() {
			t.Error("not served within a second")
		}
		close(stop)
		next.give()
		wg.Wait()
	})
}

func TestAConnectionChangesHandsOnlyTowardsWhoHasLess(t *testing.T) {
	for _, ceiling := range []int{6, 10} { // with 10 who has all is in line too, and first
		testChangingHands(t, ceiling)
	}
}

func testChangingHands(t *testing.T, ceiling int) {
	in(t, 6, func(t *testing.T, w *world) {
		w.b.slow(4*ms, ms)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		a, b := w.pool(1, ceiling), w.pool(1, ceiling)
		busy := func(p *pool) {
			for range 20 {
				wg.Go(func() { w.loop(p, 2*ms, stop) })
			}
			time.Sleep(time.Second)
		}
		busy(a)
		if u := a.account.Usage(); u.Conns != 6 {
			t.Errorf("alone it has %+v", u)
		}
		busy(b)
		if ua, ub := a.account.Usage(), b.account.Usage(); ua.Conns != 3 || ub.Conns != 3 {
			t.Errorf("of 6 permits the two have %d and %d", ua.Conns, ub.Conns)
		}
		_, before := w.b.counts()
		time.Sleep(10 * time.Second)
		if _, after := w.b.counts(); after != before {
			t.Errorf("%d connects more, although both have as many as the other", after-before)
		}
		close(stop)
		wg.Wait()
	})
}

func TestNobodyStarves(t *testing.T) {
	in(t, 10, func(t *testing.T, w *world) {
		w.b.slow(4*ms, ms)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for i := range 50 {
			p := w.pool(1+i%2, 4)
			for range 1 + i%4 { // some are alone, and each of their connections is idle for a moment
				wg.Go(func() {
					if longest, calls := w.loop(p, 2*ms, stop); longest > time.Second || calls < 50 {
						t.Errorf("pool %d: %d calls, the longest waited %v", i, calls, longest)
					}
				})
			}
		}
		time.Sleep(10 * time.Second)
		close(stop)
		wg.Wait()
		calls := 0
		for _, p := range w.pools {
			calls += int(p.account.Usage().Waits)
		}
		if _, dials := w.b.counts(); dials*4 > calls {
			t.Errorf("%d connects for about %d calls", dials, calls)
		}
	})
}

func TestTheColdestIdleConnectionMakesRoom(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		var pools []*pool
		for range 3 {
			p := w.pool(1, 4)
			p.give(w.take(p))
			pools = append(pools, p)
			time.Sleep(time.Minute)
		}
		hog, held := w.hog(1)
		pools[0].give(w.take(pools[0])) // used again
		want := [][]int64{{0, 1, 0}, {0, 1, 1}, {1, 1, 1}}
		var others []func()
		for _, evicts := range want {
			p := w.pool(1, 4)
			began := time.Now()
			c := w.take(p)
			if got := []int64{pools[0].evicts.Load(), pools[1].evicts.Load(), pools[2].evicts.Load()}; !slices.Equal(got, evicts) || time.Since(began) != 0 {
				t.Errorf("room was made by %v after %v, want %v", got, time.Since(began), evicts)
			}
			others = append(others, func() { p.give(c) })
		}
		if s := w.Snapshot(); s.Evicted != 3 {
			t.Errorf("%+v", s)
		}
		p := w.pool(1, 4) // everything is in use
		if _, err := p.take(t.Context(), time.Second); !starved(err) || hog.evicts.Load() != 0 {
			t.Errorf("%v, and a connection in use was asked for %d times", err, hog.evicts.Load())
		}
		for _, give := range others {
			give()
		}
		hog.give(held[0])
	})
}

// Also when nothing is opened or closed for long.
func TestTheColdestIsTheOneLeastRecentlyUsed(t *testing.T) {
	for _, apart := range []time.Duration{0, budget.Rest + ms} {
		testTheColdest(t, apart)
	}
}

func testTheColdest(t *testing.T, apart time.Duration) {
	in(t, 11, func(t *testing.T, w *world) {
		var pools []*pool
		for range 10 {
			p := w.pool(1, 4)
			p.give(w.take(p))
			pools = append(pools, p)
		}
		other := w.pool(1, 4)
		held := w.take(other)
		time.Sleep(budget.Rest)
		for i := range pools {
			for _, later := range pools[i:] {
				later.give(w.take(later))
			}
			if time.Sleep(apart); apart == 0 { // in the same second, with a connection made in between
				other.drop(held)
				synctest.Wait()
				held = w.take(other)
			}
		}
		defer func() { other.give(held) }()
		for i, p := range pools {
			next := w.call(w.pool(1, 1))
			if p.evicts.Load() != 1 {
				t.Errorf("room for the %dth was not made by the one that is unused for the longest time", i+1)
			}
			next.wait()
			defer next.give()
		}
	})
}

// As many make room as is needed, however long that takes.
func TestNoMoreMakeRoomThanAreNeeded(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		var idle []*pool
		for range 4 {
			p := w.pool(1, 1)
			p.evictBy = 10 * ms
			p.give(w.take(p))
			idle = append(idle, p)
		}
		time.Sleep(time.Minute)
		evicts := func() (n int64) {
			for _, p := range idle {
				n += p.evicts.Load()
			}
			return n
		}
		var calls []*call
		for range 3 {
			calls = append(calls, w.call(w.pool(1, 1)))
			time.Sleep(ms)
		}
		for _, c := range calls {
			if d := c.wait(); d != 10*ms {
				t.Errorf("served after %v", d)
			}
			c.give()
		}
		if n := evicts(); n != 3 {
			t.Errorf("%d connections were closed for 3", n)
		}
	})
}

// A connection is counted twice while it is closed for another one and on its way out: who came meanwhile is not forgotten.
func TestWhoComesWhileRoomIsMadeHasSomeMadeToo(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		var idle []*pool
		for range 2 {
			p := w.pool(1, 1)
			p.evicted = 20 * ms
			p.give(w.take(p))
			idle = append(idle, p)
			time.Sleep(time.Minute)
		}
		w.b.slow(0, 50*ms)
		first := w.call(w.pool(1, 1))
		time.Sleep(ms)
		second := w.call(w.pool(1, 1))
		time.Sleep(20 * ms)
		synctest.Wait()
		if idle[0].evicts.Load() != 1 || idle[1].evicts.Load() != 1 {
			t.Error("the second one has nobody making room")
		}
		w.b.slow(0, 0)
		first.give()
		second.give()
	})
}

// A permit of the last tenth is none for who is above its floor: it takes more than one.
func TestRoomIsMadeUntilThePermitIsEnough(t *testing.T) {
	in(t, 20, func(t *testing.T, w *world) { // two are for those below their floor
		for range 19 {
			p := w.pool(1, 1)
			p.give(w.take(p))
		}
		p := w.pool(1, 4)
		held := w.take(p)
		time.Sleep(2 * budget.Rest)
		next := w.call(p)
		if d := next.wait(); d != 0 {
			t.Errorf("served after %v", d)
		}
		if s := w.Snapshot(); s.Evicted != 3 {
			t.Errorf("%d connections were closed, want that of the two permits, and one more", s.Evicted)
		}
		next.give()
		p.give(held)
	})
}

func TestAccountsLeavePermitsToTheLibrarysOwnDial(t *testing.T) {
	in(t, 5, func(t *testing.T, w *world) {
		w.Server = budget.NewServer(budget.Limits{Total: 5 + 1 + budget.Cancels, Own: 1, Work: 2})
		hog, held := w.hog(3)
		hungry := w.call(w.pool(1, 4))
		dial := w.Dialer(w.b.dial)
		var work []net.Conn
		began := time.Now()
		for range 2 {
			c, err := dial(t.Context(), "tcp", "db:5432")
			if err != nil {
				t.Fatal(err)
			}
			work = append(work, c)
		}
		if time.Since(began) != 0 {
			t.Errorf("it took %v", time.Since(began))
		}
		for _, c := range work { // they are kept for the next ones
			c.Close()
		}
		synctest.Wait()
		if hungry.served() {
			t.Error("an account has one of the permits that are kept")
		}
		hog.drop(held[0])
		hungry.give()
		hog.give(held[1])
		hog.give(held[2])
	})
}

func TestTheLibrarysOwnDialHasIdleConnectionsMakeRoom(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		p.give(w.take(p))
		time.Sleep(100 * ms) // it is at work
		began := time.Now()
		c, err := w.Dialer(w.b.dial)(t.Context(), "tcp", "db:5432")
		if err != nil || time.Since(began) != 0 {
			t.Fatalf("%v after %v beside an idle connection", err, time.Since(began))
		}
		c.Close()
	})
}

// leaving is a context that ends when somebody waits for its end.
type leaving struct {
	context.Context
	just func()
}

func (l leaving) Done() <-chan struct{} {
	l.just()
	ended := make(chan struct{})
	close(ended)
	return ended
}

func (l leaving) Err() error { return context.DeadlineExceeded }

func TestAnOwnDialThatGivesUpAsItIsCalledPassesItsPermitOn(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		for name, dial := range map[string]budget.DialFunc{"shared": w.Dialer(w.b.dial), "own": w.OwnDialer(w.own.dial)} {
			late := 0
			for range 50 { // of two things that have happened either may be seen first
				held, err := dial(t.Context(), "tcp", "db:5432")
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				c, err := dial(leaving{t.Context(), func() { abort(held.(*budget.Conn)) }}, "tcp", "db:5432")
				switch {
				case err == nil:
					abort(c.(*budget.Conn))
				case errors.Is(err, budget.ErrTimeout):
					late++
				case err != context.DeadlineExceeded: // of the dial itself
					t.Fatalf("%s: %v", name, err)
				}
				if s := w.Snapshot(); s.Used != 0 || s.OwnUsed != 0 {
					t.Fatalf("%s: nobody has a connection: %+v", name, s)
				}
			}
			if late == 0 {
				t.Errorf("%s: it never came late", name)
			}
		}
	})
}

func TestAnOwnDialTellsWhyItGaveUp(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog, held := w.hog(1)
		dial := w.Dialer(w.b.dial)
		ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
		defer cancel()
		_, err := dial(ctx, "tcp", "db:5432")
		// Of an error of the network's that is a timeout pgconn keeps nothing else.
		if network, ok := errors.AsType[net.Error](err); !errors.Is(err, budget.ErrTimeout) || ok {
			t.Errorf("without a permit: %v, of the network: %v", err, network)
		}
		ctx, leave := context.WithCancel(t.Context())
		time.AfterFunc(10*ms, leave)
		if _, err := dial(ctx, "tcp", "db:5432"); err != context.Canceled {
			t.Errorf("a caller who left: %v", err)
		}
		hog.give(held[0])
	})
}

func TestOwnDialsAreServedInTheirOrder(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		for name, dial := range map[string]budget.DialFunc{"shared": w.Dialer(w.b.dial), "own": w.OwnDialer(w.own.dial)} {
			held, err := dial(t.Context(), "tcp", "db:5432")
			if err != nil {
				t.Fatal(err)
			}
			var order []int
			var wg sync.WaitGroup
			for i := range 5 {
				wg.Go(func() {
					c, err := dial(t.Context(), "tcp", "db:5432")
					if err != nil {
						t.Error(err)
						return
					}
					order = append(order, i)
					time.Sleep(ms)
					c.Close()
				})
				synctest.Wait()
			}
			held.Close()
			wg.Wait()
			synctest.Wait()
			if !slices.IsSorted(order) || len(order) != 5 {
				t.Errorf("%s: served in the order %v", name, order)
			}
		}
	})
}

// A connection that comes back while somebody needs one makes room too.
func TestAConnectionThatBecomesIdleMakesRoom(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog, held := w.hog(1)
		time.Sleep(time.Minute)
		p := w.pool(1, 4)
		next := w.call(p)
		time.Sleep(100 * ms)
		hog.give(held[0])
		if d := next.wait(); d != 100*ms {
			t.Errorf("served after %v", d)
		}
		next.give()
	})
}

func TestANewConnectionIsKeptForAMoment(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		a, b := w.pool(1, 4), w.pool(1, 4)
		a.give(w.take(a))
		next := w.call(b)
		if d := next.wait(); d != budget.Patience {
			t.Errorf("a connection that is new made room after %v, want %v", d, budget.Patience)
		}
		next.give()
	})
}

func TestAFailingEvictIsAskedAgainButDoesNotSpin(t *testing.T) {
	for _, panics := range []bool{false, true} {
		in(t, 1, func(t *testing.T, w *world) {
			deaf := w.pool(1, 4)
			deaf.give(w.take(deaf))
			time.Sleep(time.Minute)
			deaf.hidden.Store(true)
			deaf.panics.Store(panics)
			p := w.pool(1, 4)
			next := w.call(p)
			time.Sleep(time.Second)
			if n := deaf.evicts.Load(); n < 2 || n > int64(time.Second/budget.Patience)+1 {
				t.Errorf("Evict was called %d times in a second", n)
			}
			deaf.hidden.Store(false)
			deaf.panics.Store(false)
			if d := next.wait(); d > time.Second+budget.Patience {
				t.Errorf("served %v after there was an idle connection", d-time.Second)
			}
			next.give()
		})
	}
}

func TestShrinkClosesOneIdleConnection(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		c := w.take(p)
		p.give(w.take(p))
		p.give(c)
		time.Sleep(time.Minute)
		p.account.Shrink()
		synctest.Wait()
		if u := p.account.Usage(); u.Conns != 1 || u.Busy != 0 {
			t.Errorf("%+v", u)
		}
	})
}

func TestTheLibrarysOwnDialComesBeforeAllAccounts(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		dial := w.Dialer(w.b.dial)
		hog, held := w.hog(2)
		time.Sleep(time.Minute)
		p := w.pool(1, 4)
		next := w.call(p)
		work := make(chan net.Conn, 2)
		for range 2 {
			go func() {
				c, err := dial(context.Background(), "tcp", "db:5432")
				if err != nil {
					t.Error(err)
				}
				work <- c
			}()
			synctest.Wait()
		}
		hog.drop(held[0])
		first := <-work
		hog.give(held[1]) // idle: it makes room
		second := <-work
		if s := w.Snapshot(); next.served() || s.Used != 2 || s.Hungry != 1 {
			t.Errorf("%+v; an account was served first: %v", s, next.served())
		}
		time.Sleep(time.Second)
		first.Close()
		if d := next.wait(); d != time.Second {
			t.Errorf("the account was served after %v", d)
		}
		second.Close()
		next.give()
	})
}

func TestTheLibrarysOwnDialTakesFromBetweenTwoCallersAtOnce(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog := w.pool(1, 4)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { w.loop(hog, 2*ms, stop) })
		}
		time.Sleep(time.Second + ms)
		began := time.Now()
		c, err := w.Dialer(w.b.dial)(t.Context(), "tcp", "db:5432")
		if err != nil || time.Since(began) > 2*ms {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		c.Close()
		close(stop)
		wg.Wait()
	})
}

func TestAnOwnDialThatGivesUpLeavesNothingBehind(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		for _, kind := range []struct {
			name string
			dial budget.DialFunc
			b    *backend
		}{
			{"shared", w.Dialer(w.b.dial), w.b},
			{"own", w.OwnDialer(w.own.dial), w.own},
		} {
			held, err := kind.dial(t.Context(), "tcp", "db:5432")
			if err != nil {
				t.Fatalf("%s: %v", kind.name, err)
			}
			for i := range 100 {
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan net.Conn, 1)
				go func() {
					c, err := kind.dial(ctx, "tcp", "db:5432")
					if err != nil && !errors.Is(err, context.Canceled) {
						t.Errorf("%s: %v", kind.name, err)
					}
					done <- c
				}()
				synctest.Wait()
				if i%2 == 0 { // called as it gives up
					held.Close()
					time.Sleep(0)
				}
				cancel()
				if c := <-done; c != nil {
					c.Close()
				}
				synctest.Wait()
				if i%2 == 0 {
					if held, err = kind.dial(t.Context(), "tcp", "db:5432"); err != nil {
						t.Fatalf("%s: %v", kind.name, err)
					}
				}
			}
			held.Close()
			kind.b.refuse(errRefused)
			for range 3 {
				if _, err := kind.dial(t.Context(), "tcp", "db:5432"); err != errRefused {
					t.Errorf("%s: %v", kind.name, err)
				}
			}
			kind.b.refuse(nil)
		}
	})
}

func TestOwnPoolsHavePermitsOfTheirOwn(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog, held := w.hog(1)
		dial := w.OwnDialer(w.own.dial)
		c, err := dial(t.Context(), "tcp", "db:5432")
		if err != nil {
			t.Fatal(err)
		}
		if s := w.Snapshot(); s.Used != 1 || s.OwnUsed != 1 {
			t.Errorf("%+v", s)
		}
		w.own.slow(0, 30*ms)
		c.Close()
		began := time.Now()
		if c, err = dial(t.Context(), "tcp", "db:5432"); err != nil || time.Since(began) != 30*ms {
			t.Errorf("%v after %v, want the moment when the server lets go", err, time.Since(began))
		}
		c.Close()
		hog.give(held[0])
	})
}
