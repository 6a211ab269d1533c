package budget_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// crowd has so many callers of p at work, each for d at a time, until the returned function is called.
func (w *world) crowd(p *pool, callers int, d time.Duration) (leave func()) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() { w.loop(p, d, stop) })
	}
	return func() {
		close(stop)
		wg.Wait()
	}
}

// working is one caller that is at work for 1 ms of every 2, and so has an idle connection for the other. It reports the longest wait.
func (w *world) working(p *pool, d time.Duration) (longest time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		began := time.Now()
		c := w.take(p)
		longest = max(longest, time.Since(began))
		time.Sleep(ms)
		p.give(c)
		time.Sleep(ms)
	}
	return longest
}

func TestAFloodTakesTheFloorOfNobodyAtWork(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		flooded, b := w.pool(1, 4), w.pool(1, 1)
		b.give(w.take(b))
		w.b.slow(3*ms, ms)
		leave := w.crowd(flooded, 50, 5*ms)
		defer leave()
		if longest := w.working(b, 10*time.Second); longest != 0 || b.evicts.Load() != 0 || b.account.Usage().Starved != 0 {
			t.Errorf("it waited %v, and lost its connection %d times", longest, b.evicts.Load())
		}
		if n := flooded.account.Usage().Conns; n != 3 {
			t.Errorf("the other has %d connections, want the other 3", n)
		}
		time.Sleep(budget.Rest - 10*ms)
		if b.evicts.Load() != 0 {
			t.Error("it lost its connection before it was unused for long")
		}
		time.Sleep(budget.Rest + 20*ms)
		if n := flooded.account.Usage().Conns; n != 4 {
			t.Errorf("the other has %d connections beside one that is not used any more, want 4", n)
		}
		began := time.Now()
		c := w.take(b)
		if d := time.Since(began); d > 5*ms+5*ms {
			t.Errorf("when it came back it waited %v, want one call of the other's and a connect", d)
		}
		b.give(c)
	})
}

// Neither while callers of its own wait.
func TestAFloodTakesNoLargerFloorThanItsOwn(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		a, flooded := w.pool(3, 3), w.pool(1, 4)
		leave := []func(){w.crowd(a, 10, 5*ms)}
		time.Sleep(100 * ms)
		leave = append(leave, w.crowd(flooded, 50, 5*ms))
		time.Sleep(time.Second)
		if a.evicts.Load() != 0 {
			t.Errorf("%d connections of its floor were taken", a.evicts.Load())
		}
		for _, f := range leave {
			f()
		}
	})
}

// Of several idle connections those above the floor make room, and no more.
func TestAnAccountGivesUpWhatItHasAboveItsFloor(t *testing.T) {
	in(t, 7, func(t *testing.T, w *world) {
		a := w.pool(2, 4)
		a.evictBy = 5 * ms
		var held []*budget.Conn
		for range 4 {
			held = append(held, w.take(a))
		}
		var others []*pool
		var conns []*budget.Conn
		for range 3 {
			p := w.pool(1, 2)
			others, conns = append(others, p), append(conns, w.take(p))
		}
		time.Sleep(100 * ms)
		var more []*call
		for _, p := range others {
			more = append(more, w.call(p))
		}
		for _, c := range held { // all idle at the same time
			a.put(c)
		}
		for range held {
			a.account.Leave()
		}
		for range 100 { // and at work
			time.Sleep(ms)
			if !a.account.TryEnter() {
				t.Fatal("its last connections are gone")
			}
			a.account.Leave()
		}
		if u := a.account.Usage(); u.Conns != 2 || !more[0].served() || !more[1].served() || more[2].served() {
			t.Errorf("%+v, want the two of the floor", u)
		}
		more[0].give()
		for i, c := range more {
			if i > 0 {
				c.give()
			}
			others[i].give(conns[i])
		}
	})
}

// What is on its way to who has nothing is not taken from who is at its floor a second time, for somebody who has enough.
func TestTheFloorIsNotTakenForWhoComesLater(t *testing.T) {
	in(t, 3, func(t *testing.T, w *world) {
		gone, rich, b := w.pool(1, 1), w.pool(1, 2), w.pool(1, 1)
		c, held := w.take(gone), w.take(rich)
		b.give(w.take(b))
		time.Sleep(100 * ms)
		w.b.slow(0, 50*ms)
		gone.drop(c)
		synctest.Wait()
		poor := w.call(w.pool(1, 1))
		more := w.call(rich)
		w.working(b, 45*ms)
		if b.evicts.Load() != 0 {
			t.Error("it lost its connection")
		}
		w.b.slow(0, 0)
		poor.give()
		rich.give(held)
		more.give()
	})
}

func TestWhoHasNothingTakesFromThoseAboveTheirFloorFirst(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		flooded, b, c := w.pool(1, 3), w.pool(1, 1), w.pool(1, 1)
		b.give(w.take(b))
		leave := w.crowd(flooded, 50, 5*ms)
		w.working(b, time.Second)
		next := w.call(c)
		w.working(b, 100*ms)
		if d := next.wait(); d > 5*ms || b.evicts.Load() != 0 {
			t.Errorf("served after %v; the one at work lost its connection %d times", d, b.evicts.Load())
		}
		next.give()
		leave()
	})
	in(t, 3, func(t *testing.T, w *world) { // also where one of theirs is idle, and was used later
		rich, b := w.pool(1, 2), w.pool(1, 1)
		held := []*budget.Conn{w.take(rich), w.take(rich)}
		b.give(w.take(b))
		time.Sleep(100 * ms)
		rich.give(held[0])
		next := w.call(w.pool(1, 1))
		if d := next.wait(); d != 0 || b.evicts.Load() != 0 {
			t.Errorf("served after %v; the one at its floor lost its connection %d times", d, b.evicts.Load())
		}
		next.give()
		rich.give(held[1])
	})
}

// Nobody starves beside those who are above their floor and give nothing back.
func TestWhoHasNothingWaitsForThoseAboveTheirFloorInVain(t *testing.T) {
	for _, idle := range []bool{false, true} { // it becomes idle all the time, or is
		in(t, 3, func(t *testing.T, w *world) {
			rich, b := w.pool(1, 2), w.pool(1, 1)
			held := []*budget.Conn{w.take(rich), w.take(rich)}
			b.give(w.take(b))
			time.Sleep(100 * ms)
			next := w.call(w.pool(1, 1))
			if !idle {
				w.working(b, budget.Patience+2*ms)
			}
			if d := next.wait(); d <= budget.Patience || d > budget.Patience+2*ms {
				t.Errorf("served after %v, want the patience", d)
			}
			next.give()
			for _, c := range held {
				rich.give(c)
			}
		})
	}
}

func TestWhoHasNothingIsServedByThoseAtTheirFloor(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		a, b := w.pool(1, 4), w.pool(1, 4)
		first, second := w.take(a), w.take(a)
		a.drop(first) // it is above its floor no more
		a.give(second)
		leave := []func(){w.crowd(a, 1, 2*ms), w.crowd(b, 1, 2*ms)}
		time.Sleep(100 * ms)
		next := w.call(w.pool(1, 4))
		if d := next.wait(); d > 2*ms {
			t.Errorf("served after %v, want the end of a call: nobody is above the floor", d)
		}
		next.give()
		for _, f := range leave {
			f()
		}
	})
}

// One that has something and wants its whole floor takes nobody's only connection, and stands in the way of nobody who has none.
func TestWhoIsBelowItsFloorTakesOnlyFromWhoHasMore(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		a, b := w.pool(2, 4), w.pool(2, 4)
		leave := []func(){w.crowd(a, 1, 2*ms)}
		time.Sleep(ms)
		held := w.take(b)
		more := w.call(b)
		time.Sleep(time.Second)
		if more.served() || a.evicts.Load() != 0 {
			t.Errorf("another's only connection was taken for a second one, %d times", a.evicts.Load())
		}
		next := w.call(w.pool(2, 4))
		if d := next.wait(); d > 4*ms {
			t.Errorf("who has none waited %v behind one that is below its floor", d)
		}
		next.give()
		b.give(held)
		more.give()
		for _, f := range leave {
			f()
		}
	})
}

func TestShrinkTakesTheFloorOfWhoIsAtWorkOnlyForWhoHasLess(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p, other := w.pool(1, 4), w.pool(1, 4)
		other.give(w.take(other))
		time.Sleep(100 * ms)
		held := w.take(p)
		attempt := func(want int64) {
			t.Helper()
			before := other.evicts.Load()
			p.connect = func(context.Context) (time.Duration, error) { p.account.Shrink(); return 0, errRefused }
			if _, err := p.take(t.Context(), time.Second); err != errRefused {
				t.Fatal(err)
			}
			synctest.Wait()
			if got := other.evicts.Load() - before; got != want {
				t.Errorf("%d connections of another's floor were closed, want %d", got, want)
			}
		}
		attempt(0)
		p.drop(held)
		attempt(1)
	})
}

// TestQuietTenantsDoNotKeepTheirFloorFromWhoIsBusy: each has a call a second, and its connection is idle between them.
func TestQuietTenantsDoNotKeepTheirFloorFromWhoIsBusy(t *testing.T) {
	in(t, 10, func(t *testing.T, w *world) {
		stop := make(chan struct{})
		var quiet sync.WaitGroup
		for range 8 {
			q := w.pool(1, 1)
			quiet.Go(func() {
				for {
					c, err := q.take(context.Background(), time.Minute)
					if err != nil {
						t.Error(err)
						return
					}
					time.Sleep(ms)
					q.give(c)
					select {
					case <-stop:
						return
					case <-time.After(900 * ms):
					}
				}
			})
		}
		time.Sleep(100 * ms)
		busy := w.pool(1, 8)
		leave := w.crowd(busy, 50, 5*ms)
		time.Sleep(10 * time.Second)
		if u := busy.account.Usage(); u.Waits < 6000 { // one connection serves 2,000 in that time, eight 16,000
			t.Errorf("beside eight that are nearly always idle %d of its calls were served", u.Waits)
		}
		close(stop)
		quiet.Wait()
		leave()
	})
}
