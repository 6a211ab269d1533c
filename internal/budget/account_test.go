package budget_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

const ms = time.Millisecond

func TestACallIsServedByWhateverComesFirst(t *testing.T) {
	t.Run("a_connection_that_comes_back", func(t *testing.T) {
		in(t, 1, func(t *testing.T, w *world) {
			p := w.pool(1, 4)
			held := w.take(p)
			next := w.call(p)
			time.Sleep(100 * ms)
			p.give(held)
			if d := next.wait(); d != 100*ms || next.conn != held {
				t.Errorf("served after %v, want the moment of the return, 100ms", d)
			}
			next.give()
		})
	})
	t.Run("one_that_comes_back_while_another_is_made", func(t *testing.T) {
		in(t, 4, func(t *testing.T, w *world) {
			p := w.pool(1, 4)
			held := w.take(p)
			w.b.slow(3*time.Second, 0)
			next := w.call(p)
			time.Sleep(100 * ms)
			p.give(held)
			if d := next.wait(); d != 100*ms {
				t.Errorf("served after %v, want 100ms although a connect takes 3s", d)
			}
			next.give()
			time.Sleep(3 * time.Second)
			if u := p.account.Usage(); u.Conns != 2 || u.Busy != 0 || p.idleConns() != 2 {
				t.Errorf("afterwards %+v with %d idle, want 2 idle", u, p.idleConns())
			}
		})
	})
	t.Run("a_new_one", func(t *testing.T) {
		in(t, 4, func(t *testing.T, w *world) {
			p := w.pool(1, 4)
			held := w.take(p)
			w.b.slow(30*ms, 0)
			next := w.call(p)
			if d := next.wait(); d != 30*ms {
				t.Errorf("served after %v, want the 30ms of a connect", d)
			}
			next.give()
			p.give(held)
		})
	})
	t.Run("one_that_was_idle_all_along", func(t *testing.T) { // the attempt dials nothing, and its permit is free again
		in(t, 4, func(t *testing.T, w *world) {
			p := w.pool(1, 4)
			p.give(w.take(p))
			if err := p.account.Enter(t.Context(), time.Now().Add(time.Second), 2); err != nil {
				t.Fatal(err)
			}
			p.account.Leave()
			if u, s := p.account.Usage(), w.Snapshot(); u.Conns != 1 || u.Busy != 0 || s.Used != 1 || p.dialled() != 1 {
				t.Errorf("%+v of %+v, %d dials", u, s, p.dialled())
			}
		})
	})
}

func TestCallersOfAnAccountAreServedInTheirOrder(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		held := w.take(p)
		var order []int
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				c, err := p.take(t.Context(), time.Minute)
				if err != nil {
					t.Error(err)
					return
				}
				order = append(order, i)
				time.Sleep(ms)
				p.give(c)
			})
			synctest.Wait()
		}
		p.give(held)
		wg.Wait()
		if !slices.IsSorted(order) || len(order) != 10 {
			t.Errorf("served in the order %v", order)
		}
	})
}

// Who was called and found nothing has waited already.
func TestACallerWhoFoundNothingKeepsItsPlace(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		p.give(w.take(p))
		p.hidden.Store(true)
		first := w.call(p)
		second := w.call(p)
		time.Sleep(50 * ms)
		p.hidden.Store(false)
		first.wait()
		time.Sleep(ms)
		if second.served() {
			t.Error("the second caller was served before the first one was done")
		}
		first.give()
		second.give()
	})
}

// starved says whether err is that of a caller who waited in vain for want of a permit, and of nothing else.
func starved(err error) bool {
	return errors.Is(err, budget.ErrTimeout) && errors.Is(err, budget.ErrNoPermit) && !errors.Is(err, errRefused)
}

func TestEnterEndsAtTheDeadline(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		held := w.take(p)
		began := time.Now()
		_, err := p.take(t.Context(), 70*ms)
		if !starved(err) || time.Since(began) != 70*ms {
			t.Errorf("%v after %v, want ErrTimeout for want of a permit after 70ms", err, time.Since(began))
		}
		if u := p.account.Usage(); u.Waiting != 0 || u.Waits != 2 || u.Waited != 70*ms {
			t.Errorf("%+v", u)
		}
		p.give(held)
		w.take(p)
		p.give(held) // the line is open again
	})
}

func TestEachCallerEndsAtItsOwnDeadline(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		held := w.take(p)
		var wg sync.WaitGroup
		for _, d := range []time.Duration{70 * ms, 300 * ms, 20 * ms, 150 * ms, 70 * ms} { // one timer serves all
			wg.Go(func() {
				began := time.Now()
				if _, err := p.take(context.Background(), d); !starved(err) || time.Since(began) != d {
					t.Errorf("%v after %v, want ErrTimeout after %v", err, time.Since(began), d)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		p.give(held)
	})
}

func TestWhoWaitsNoMoreIsNotHungry(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		hog, held := w.hog(1)
		p := w.pool(1, 4)
		hungry := func(want int) {
			t.Helper()
			synctest.Wait()
			if s := w.Snapshot(); s.Hungry != want {
				t.Errorf("%d are hungry, want %d", s.Hungry, want)
			}
		}
		if _, err := p.take(t.Context(), ms); !starved(err) {
			t.Fatal(err)
		}
		hungry(0)
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error)
		take := func(ctx context.Context) { _, err := p.take(ctx, time.Minute); errs <- err }
		go take(ctx)
		hungry(1)
		cancel()
		if err := <-errs; err != context.Canceled {
			t.Fatal(err)
		}
		hungry(0)
		go take(t.Context())
		hungry(1)
		p.account.Close()
		if err := <-errs; err != budget.ErrClosed {
			t.Fatal(err)
		}
		hungry(0)
		if p.account.Expires() {
			t.Error("a timer keeps the closed account")
		}
		hog.give(held[0])
	})
}

// One who knew better and holds up the others is called at its deadline.
func TestACallerWhoFoundNothingHidesNoIdleConnectionAfterItsDeadline(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		p.give(w.take(p))
		p.hidden.Store(true)
		go func() {
			if err := p.account.Enter(context.Background(), time.Now().Add(12*ms), 2); !starved(err) {
				t.Errorf("Enter: %v", err)
			}
		}()
		synctest.Wait()
		next := w.call(p)
		time.Sleep(11 * ms)
		p.hidden.Store(false)
		if d := next.wait(); d != 12*ms {
			t.Errorf("served after %v, want the other's deadline", d)
		}
		next.give()
	})
}

func TestEnterOfAContextThatHasEndedConnectsToNothing(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		err := p.account.Enter(ctx, time.Now().Add(time.Minute), 0)
		if u := p.account.Usage(); err != context.Canceled || u.Waits != 0 || p.dialled() != 0 {
			t.Errorf("%v, %+v, %d dials", err, u, p.dialled())
		}
	})
}

func TestAFailureToConnectIsNobodysBesideAConnectionThatMayComeBack(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		w.patient = time.Second
		p := w.pool(1, 4)
		held := w.take(p)
		w.b.refuse(errRefused)
		next := w.call(p)
		time.Sleep(150 * ms)
		p.give(held)
		if d := next.wait(); d != 150*ms {
			t.Errorf("served after %v, want the return of the other connection", d)
		}
		began := time.Now()
		if _, err := p.take(t.Context(), time.Minute); err != errRefused || time.Since(began) != time.Second {
			t.Errorf("%v after %v, want the refusal after the patience", err, time.Since(began))
		}
		next.conn.Doom() // it comes back no more
		w.b.refuse(nil)
		unproved, err := p.account.Route(p.dial).Dial(t.Context(), "tcp", "db:5432") // and this one may never come
		if err != nil {
			t.Fatal(err)
		}
		defer unproved.Close()
		w.b.refuse(errRefused)
		began = time.Now()
		if _, err := p.take(t.Context(), time.Minute); err != errRefused || time.Since(began) != 0 {
			t.Errorf("%v after %v, want the refusal at once", err, time.Since(began))
		}
		p.drop(next.conn)
		w.b.refuse(nil)
	})
}

func TestEnterEndsWithItsContext(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		held := w.take(p)
		ctx, cancel := context.WithTimeout(t.Context(), 30*ms)
		defer cancel()
		began := time.Now()
		if _, err := p.take(ctx, time.Minute); err != context.DeadlineExceeded || time.Since(began) != 30*ms {
			t.Errorf("%v after %v, want the context's end after 30ms", err, time.Since(began))
		}
		if _, err := p.take(ctx, time.Minute); err != context.DeadlineExceeded {
			t.Errorf("with a context that has ended: %v", err)
		}
		p.give(held)
	})
}

// A caller who is called while it gives up passes its place on.
func TestACallerWhoGivesUpAsItIsCalledPassesItOn(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		for range 1000 {
			held := w.take(p)
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				if c, err := p.take(ctx, time.Minute); err == nil {
					p.give(c)
				}
			}()
			synctest.Wait()
			next := w.call(p)
			cancel()
			p.give(held)
			if d := next.wait(); d != 0 {
				t.Fatalf("the next one waited %v", d)
			}
			next.give()
		}
	})
}

func TestTimeoutTellsOfTheLastConnect(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		var calls []time.Duration
		began, err := time.Now(), errors.New("53300")
		p.connect = func(context.Context) (time.Duration, error) {
			calls = append(calls, time.Since(began))
			return 50 * ms, err
		}
		_, got := p.take(t.Context(), 120*ms)
		if !errors.Is(got, budget.ErrTimeout) || !errors.Is(got, err) || time.Since(began) != 120*ms {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		time.Sleep(time.Second)
		if want := []time.Duration{0, 50 * ms, 100 * ms}; !slices.Equal(calls, want) {
			t.Errorf("Connect was called after %v, want %v", calls, want)
		}
		// An hour later it is no reason any more.
		p.connect = nil
		var held []*budget.Conn
		for range 4 {
			held = append(held, w.take(p))
		}
		if _, got := p.take(t.Context(), 10*ms); got != budget.ErrTimeout {
			t.Errorf("with everything in use: %v", got)
		}
		for _, c := range held {
			p.give(c)
		}
	})
}

func TestAFailureIsForgottenWithTheLineThatSawIt(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p, other := w.pool(1, 4), w.pool(1, 4)
		w.b.refuse(errRefused)
		if _, err := p.take(t.Context(), time.Second); err != errRefused {
			t.Fatal(err)
		}
		w.b.refuse(nil)
		held := w.take(other)
		if _, err := p.take(t.Context(), time.Second); !starved(err) {
			t.Errorf("without a permit: %v", err)
		}
		other.give(held)
	})
}

func TestAFailureToConnectIsOneCallers(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		w.b.slow(10*ms, 0)
		w.b.refuse(errRefused)
		errs := make(chan error)
		for range 3 {
			go func() {
				c, err := p.take(t.Context(), time.Minute)
				if err == nil {
					p.give(c)
				}
				errs <- err
			}()
		}
		if err := <-errs; err != errRefused {
			t.Errorf("the first: %v", err)
		}
		w.b.refuse(nil)
		for range 2 {
			if err := <-errs; err != nil {
				t.Errorf("another: %v", err)
			}
		}
	})
}

func TestAPanicOfConnectIsTheCallersError(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		p.connect = func(context.Context) (time.Duration, error) { panic("hook") }
		if _, err := p.take(t.Context(), time.Second); err == nil || !strings.Contains(err.Error(), "panicked: hook") {
			t.Errorf("panic: %v", err)
		}
		p.connect = func(context.Context) (time.Duration, error) { runtime.Goexit(); return 0, nil }
		if _, err := p.take(t.Context(), time.Second); err == nil || !strings.Contains(err.Error(), "ended its goroutine") {
			t.Errorf("Goexit: %v", err)
		}
		p.connect = nil
		p.give(w.take(p))
	})
}

// within fails the test when fn has not returned for a long time: then it waits for a lock.
func within(t *testing.T, what string, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { fn(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal(what + " waits for the server's mutex")
	}
}

func TestEnterOfAFullLineFailsAtOnceAndTakesNoLock(t *testing.T) {
	w := newWorld(t, 1)
	p := w.pool(1, 4)
	held := w.take(p)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			c, err := p.take(t.Context(), time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			p.give(c)
		})
	}
	for p.account.Usage().Waiting < 100 {
		runtime.Gosched()
	}
	unlock := w.Lock()
	within(t, "Enter", func() {
		if err := p.account.Enter(t.Context(), time.Now().Add(time.Minute), 0); err != budget.ErrFull {
			t.Errorf("Enter: %v", err)
		}
	})
	unlock()
	if u := p.account.Usage(); u.Waiting != 100 {
		t.Errorf("%+v", u)
	}
	p.give(held)
	wg.Wait()
	w.closeAll()
}

func TestACallWithAnIdleConnectionTakesNoLock(t *testing.T) {
	w := newWorld(t, 4)
	a, b := w.pool(1, 4), w.pool(1, 4)
	a.give(w.take(a))
	b.give(w.take(b))
	unlock := w.Lock()
	within(t, "TryEnter or Leave", func() {
		if !b.account.TryEnter() {
			t.Error("TryEnter failed beside an idle connection")
			return
		}
		if b.account.TryEnter() {
			t.Error("two have entered for one connection")
		}
		b.account.Leave()
		if err := b.account.Enter(t.Context(), time.Now(), 0); err != nil {
			t.Errorf("Enter: %v", err)
		}
		b.account.Leave()
	})
	unlock()
	w.closeAll()
}

func TestCloseRefusesEverybodyWhoWaitsAndWhoWouldHaveTo(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		held := w.take(p)
		errs := make(chan error)
		for range 3 {
			go func() {
				_, err := p.take(t.Context(), time.Minute)
				errs <- err
			}()
		}
		synctest.Wait()
		p.account.Close()
		for range 3 {
			if err := <-errs; err != budget.ErrClosed {
				t.Errorf("a waiter: %v", err)
			}
		}
		p.account.Close()
		if _, err := p.take(t.Context(), time.Minute); err != budget.ErrClosed {
			t.Errorf("afterwards: %v", err)
		}
		if open, _ := w.b.counts(); open != 1 {
			t.Errorf("%d sockets are open, want the one in use", open)
		}
		p.drop(held)
	})
}

func TestWhoWasCalledInVainComesFirstAndIsNeverTooMany(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		held := w.take(p)
		line := make([]*call, 100) // as many as may wait
		for i := range line {
			line[i] = w.call(p)
		}
		again := make(chan error)
		go func() { again <- p.account.Enter(context.Background(), time.Now().Add(time.Minute), 1) }()
		synctest.Wait()
		p.give(held)
		synctest.Wait()
		select {
		case err := <-again:
			if err != nil {
				t.Errorf("Enter: %v", err)
			}
		default:
			t.Error("somebody else was called before")
		}
		p.account.Leave()
		for _, c := range line {
			c.give()
		}
	})
}

func TestBrokenConnectionsThatTheServerKeepsAreNotReplacedForEver(t *testing.T) {
	in(t, 20, func(t *testing.T, w *world) {
		p := w.pool(1, 2)
		w.b.slow(0, 4*time.Second)
		for range 4 {
			p.drop(w.take(p))
		}
		if open, _ := w.b.counts(); open != 4 {
			t.Fatalf("%d sockets are open, want twice the ceiling", open)
		}
		began := time.Now()
		c := w.call(p)
		if c.served() {
			t.Fatal("a fifth socket was opened")
		}
		if _, err := p.account.Route(p.dial).Dial(t.Context(), "tcp", "db:5432"); err != budget.ErrNoPermit {
			t.Errorf("a dial of nobody's: %v", err)
		}
		if d := c.wait(); d < 3*time.Second || time.Since(began) > 5*time.Second {
			t.Errorf("served after %v, want as soon as the first is gone", d)
		}
		c.give()
	})
}
