package budget_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// used waits until the permits in use are so many, and returns how long that took.
func (w *world) used(n int) time.Duration {
	w.t.Helper()
	began := time.Now()
	for synctest.Wait(); w.Snapshot().Used != n; synctest.Wait() {
		time.Sleep(ms)
		if time.Since(began) > time.Minute {
			w.t.Fatalf("after a minute %+v, want %d permits used", w.Snapshot(), n)
		}
	}
	return time.Since(began)
}

func TestAPermitIsGivenBackWhenTheServerHasClosedItsEnd(t *testing.T) {
	for _, c := range []struct {
		name     string
		close    time.Duration // that the server takes
		oneSided bool
		want     time.Duration
	}{
		{"at_once", 0, false, 0},
		{"when_the_server_has_noticed", 300 * ms, false, 300 * ms},
		{"after_a_bound", time.Minute, false, budget.LingerTimeout},
		{"after_a_shorter_one_where_the_server_cannot_be_told", time.Minute, true, budget.LingerOneSided},
	} {
		t.Run(c.name, func(t *testing.T) {
			in(t, 1, func(t *testing.T, w *world) {
				w.b.oneSided = c.oneSided
				w.b.limit = 2 // after a bound the server may still have it
				p := w.pool(1, 4)
				conn := w.take(p)
				w.b.slow(0, c.close)
				p.drop(conn)
				synctest.Wait()
				if u := p.account.Usage(); u.Conns != 0 || u.Busy != 0 {
					t.Errorf("the account still counts it: %+v", u)
				}
				if got := w.used(0); got != c.want {
					t.Errorf("after %v, want %v", got, c.want)
				}
				if err := conn.Close(); !errors.Is(err, net.ErrClosed) {
					t.Errorf("Close again: %v", err)
				}
				conn.Doom()
				conn.Abort()
				w.take(p)
				p.account.Leave()
				if s := w.Snapshot(); s.Used != 1 || s.Closing != 0 {
					t.Errorf("afterwards %+v", s)
				}
				w.b.slow(0, 0)
				p.account.Cut()
			})
		})
	}
}

func TestAbortGivesThePermitBackAtOnce(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		w.b.slow(0, time.Minute)
		p := w.pool(1, 4)
		for _, before := range []func(*budget.Conn){
			func(*budget.Conn) {},
			func(c *budget.Conn) { c.Doom() },
			func(c *budget.Conn) { c.Close(); time.Sleep(time.Second) }, // it lingers
		} {
			c := w.take(p)
			before(c)
			abort(c)
			if got := w.used(0); got != 0 {
				t.Errorf("after %v", got)
			}
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("the socket is open")
			}
			if err := c.Close(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Close: %v", err)
			}
			p.account.Leave()
		}
	})
}

// What was broken is replaced before the server has let it go, where there is a permit.
func TestADoomedConnectionIsReplaced(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		c := w.take(p)
		next := w.call(p)
		c.Doom()
		if d := next.wait(); d != 0 {
			t.Errorf("after %v", d)
		}
		if s := w.Snapshot(); s.Used != 2 || s.Closing != 1 {
			t.Errorf("%+v", s)
		}
		p.drop(c)
		next.give()
	})
}

// A connection in use by somebody who has broken it hides none that comes back.
func TestAConnectionComesBackBesideABrokenOne(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		broken, healthy := w.take(p), w.take(p)
		w.b.slow(time.Minute, 0)
		broken.Doom()
		next := w.call(p)
		time.Sleep(100 * ms)
		p.give(healthy)
		if d := next.wait(); d != 100*ms {
			t.Errorf("served after %v, want the moment of the return", d)
		}
		p.drop(broken)
		next.give()
	})
}

// One permit that does not come back does not stand for another one that could.
func TestASlowCloseIsNotCountedOnForLong(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		slow, idle := w.pool(1, 4), w.pool(1, 4)
		c := w.take(slow)
		hold := w.take(idle)
		time.Sleep(time.Second)
		w.b.slow(0, 4*time.Second)
		slow.drop(c)
		synctest.Wait()
		w.b.slow(0, 0)
		idle.give(hold)
		next := w.call(w.pool(1, 4))
		if d := next.wait(); d != budget.LingerUsual {
			t.Errorf("served after %v, want %v: an idle connection could make room", d, budget.LingerUsual)
		}
		if s := w.Snapshot(); s.Closing != 1 || s.Used != 2 {
			t.Errorf("%+v", s)
		}
		next.give()
	})
}

// Once it has come back it is counted on no more, and the next one is again.
func TestASlowCloseIsForgottenWhenItIsOver(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		slow, idle := w.pool(1, 4), w.pool(1, 4)
		idle.give(w.take(idle))
		c := w.take(slow)
		w.b.slow(0, time.Second)
		slow.drop(c)
		time.Sleep(2 * time.Second)
		c = w.take(slow)
		w.b.slow(0, 10*ms)
		slow.drop(c)
		synctest.Wait()
		next := w.call(w.pool(1, 4))
		if d := next.wait(); d != 10*ms || idle.evicts.Load() != 0 {
			t.Errorf("served after %v, while %d others made room that was on its way", d, idle.evicts.Load())
		}
		next.give()
	})
}

func TestDeadlinesAreIgnoredAfterClose(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		w.b.slow(0, 300*ms)
		p := w.pool(1, 4)
		c := w.take(p)
		began := time.Now()
		if err := c.SetDeadline(began.Add(ms)); err != nil {
			t.Error(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != ms {
			t.Errorf("a deadline before Close: %v after %v", err, time.Since(began))
		}
		p.drop(c)
		synctest.Wait()
		for _, set := range []func(time.Time) error{c.SetDeadline, c.SetReadDeadline, c.SetWriteDeadline} {
			if err := set(time.Now()); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		}
		if got := w.used(0); got != 300*ms {
			t.Errorf("the permit came back after %v, want the server's 300ms", got)
		}
		if _, err := c.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
	})
}

// expiring fails its first reads as if somebody had set a deadline that moment.
type expiring struct {
	halved
	left atomic.Int32
}

func (e *expiring) Read(b []byte) (int, error) {
	if e.left.Add(-1) >= 0 {
		return 0, os.ErrDeadlineExceeded
	}
	return e.halved.Read(b)
}

func TestADeadlineSetWhileClosingIsNotTheServersEnd(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		w.b.slow(0, 300*ms)
		c, err := w.Dialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := w.b.dial(ctx, network, addr)
			e := &expiring{halved: c.(halved)}
			e.left.Store(3)
			return e, err
		})(t.Context(), "tcp", "db:5432")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if got := w.used(0); got != 300*ms {
			t.Errorf("the permit came back after %v, want 300ms", got)
		}
	})
}

// tcpServer accepts, and closes its end so long after the client did.
func tcpServer(t *testing.T, late time.Duration) (addr string, open *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	open = &atomic.Int64{}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open.Add(1)
			wg.Go(func() {
				_, _ = io.Copy(io.Discard, c)
				time.Sleep(late)
				open.Add(-1)
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String(), open
}

func TestCloseWakesWhoReads(t *testing.T) {
	addr, _ := tcpServer(t, time.Second)
	w := newWorld(t, 10)
	dial := w.Dialer((&net.Dialer{}).DialContext)
	var wg sync.WaitGroup
	var conns []net.Conn
	for range 10 {
		c, err := dial(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		wg.Go(func() {
			_, err := c.Read(make([]byte, 1))
			if s := w.Snapshot(); err == nil || s.Used != 10 {
				t.Errorf("%v, when the server had closed: %+v", err, s)
			}
		})
	}
	time.Sleep(20 * ms) // they sleep by now: who does not is not tested, and does not fail
	for _, c := range conns {
		c.Close()
	}
	wg.Wait()
	w.closeAll()
}

func TestOverTCPTheServerNeverSeesMoreSocketsThanPermits(t *testing.T) {
	addr, open := tcpServer(t, 3*ms)
	w := newWorld(t, 5)
	stop := make(chan struct{})
	var wg, watch sync.WaitGroup
	var most int64
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				most = max(most, open.Load())
			}
		}
	})
	tcp := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}
	for range 10 {
		p := w.pool(1, 2)
		p.tcp = tcp
		for range 3 {
			wg.Go(func() {
				for i := range 20 {
					c := w.take(p)
					if i%4 == 0 {
						p.drop(c)
					} else {
						p.give(c)
					}
				}
			})
		}
	}
	wg.Wait()
	w.closeAll()
	close(stop)
	watch.Wait()
	if most > 5 || most == 0 || open.Load() != 0 {
		t.Errorf("the server had %d sockets open, and has %d", most, open.Load())
	}
}

func TestCutBreaksWhatIsOpenAndWhatIsBeingDialled(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		c := w.take(p)
		w.b.slow(30*ms, time.Minute)
		errs := make(chan error)
		go func() {
			_, err := p.take(t.Context(), time.Minute)
			errs <- err
		}()
		synctest.Wait()
		reading := make(chan error)
		go func() {
			_, err := c.Read(make([]byte, 1))
			reading <- err
		}()
		synctest.Wait()
		p.cut.Store(true)
		p.account.Cut()
		if err := <-errs; err != budget.ErrClosed {
			t.Errorf("who waited: %v", err)
		}
		if err := <-reading; err == nil {
			t.Error("a socket outlived Cut")
		}
		p.account.Leave()
		time.Sleep(40 * ms)
		if s := w.Snapshot(); s.Used != 0 {
			t.Errorf("%+v: what was being dialled is open", s)
		}
	})
}

func TestCancelRequestsHaveTwoPermitsOfTheirOwnAndWait(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		c := w.take(p) // the last permit
		w.cancels.slow(0, 30*ms)
		var requests []net.Conn
		for range budget.Cancels {
			r, err := p.cancel(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			requests = append(requests, r)
		}
		if s := w.Snapshot(); s.Cancels != budget.Cancels || s.Used != 1 || p.account.Usage().Conns != 1 {
			t.Errorf("%+v", s)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
		defer cancel()
		if _, err := p.cancel(ctx, c); err != context.DeadlineExceeded {
			t.Errorf("one more: %v", err)
		}
		began := time.Now()
		for _, r := range requests {
			r.Close()
		}
		r, err := p.cancel(t.Context(), c)
		if err != nil || time.Since(began) != 30*ms {
			t.Errorf("%v after %v, want the moment when the server lets one go", err, time.Since(began))
		}
		r.Close()
		w.cancels.refuse(errRefused)
		for range 2 * budget.Cancels {
			if _, err := p.cancel(t.Context(), c); err != errRefused {
				t.Errorf("refused: %v", err)
			}
		}
		p.give(c)
	})
}

func TestACancelRequestOfAClosedAccountHasAMomentLeft(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		c := w.take(p)
		p.account.Close()
		w.cancels.slow(0, time.Minute)
		r, err := p.cancel(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != budget.LastWords {
			t.Errorf("%v after %v, want the deadline", err, time.Since(began))
		}
		r.Close()
		p.give(c)
	})
}

func TestAConnectionThatWasNeverEstablishedHasNothingToCancel(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		route := p.account.Route(p.dial)
		c, err := route.Dial(t.Context(), "tcp", "db:5432")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := route.Dial(t.Context(), "tcp", "db:5432"); err == nil || !strings.Contains(err.Error(), "nothing to cancel") {
			t.Errorf("a cancel request: %v", err)
		}
		if u := p.account.Usage(); u.Conns != 1 || p.dialled() != 1 {
			t.Errorf("%+v, %d dials", u, p.dialled())
		}
		c.Close()
	})
}

// The library's own connections run no statement of a tenant's, whom it would pay to wait for.
func TestAnOwnConnectionIsNotWaitedForForLong(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		w.own.limit = 2 // after a bound the server may still have it
		dial := w.OwnDialer(w.own.dial)
		c, err := dial(t.Context(), "tcp", "db:5432")
		if err != nil {
			t.Fatal(err)
		}
		w.own.slow(0, time.Minute)
		c.Close()
		began := time.Now()
		if c, err = dial(t.Context(), "tcp", "db:5432"); err != nil || time.Since(began) != budget.LingerOneSided {
			t.Errorf("%v after %v, want %v", err, time.Since(began), budget.LingerOneSided)
		}
		c.Close()
	})
}

// A dial of nobody's: its caller is gone.
func TestADialThatOutlivesItsConnect(t *testing.T) {
	t.Run("and_fails", func(t *testing.T) {
		in(t, 1, func(t *testing.T, w *world) {
			p := w.pool(1, 1)
			p.patient = 10 * ms
			w.b.slow(time.Second, 0)
			w.b.refuse(errRefused)
			if _, err := p.take(t.Context(), time.Minute); err != context.DeadlineExceeded {
				t.Errorf("who waited for it: %v", err)
			}
			time.Sleep(2 * time.Second)
			if w.Accounts() != 0 {
				t.Error("the account is remembered without a connection")
			}
			_, _ = p.take(t.Context(), time.Minute)
			p.patient = time.Minute
			next := w.call(p) // the ceiling is reached
			time.Sleep(995 * ms)
			w.b.refuse(nil)
			if d := next.wait(); d > 3*time.Second {
				t.Errorf("the next one was served after %v", d)
			}
			next.give()
		})
	})
	t.Run("and_succeeds", func(t *testing.T) {
		in(t, 1, func(t *testing.T, w *world) {
			p := w.pool(1, 1)
			p.patient = 10 * ms
			w.b.slow(time.Second, 0)
			go func() { _, _ = p.take(context.Background(), time.Minute) }()
			synctest.Wait()
			next := w.call(p)
			if d := next.wait(); d > time.Second+5*ms || d < time.Second {
				t.Errorf("the next one was served after %v", d)
			}
			next.give()
		})
	})
	t.Run("of_a_call", func(t *testing.T) { // a free permit, and a connection that is not there
		in(t, 2, func(t *testing.T, w *world) {
			p := w.pool(1, 2)
			p.give(w.take(p))
			p.hidden.Store(true)
			w.b.slow(time.Second, 0)
			w.b.refuse(errRefused)
			ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
			defer cancel()
			if _, err := p.take(ctx, time.Minute); err != context.DeadlineExceeded {
				t.Errorf("%v", err)
			}
			time.Sleep(time.Second)
			p.hidden.Store(false)
			if u, s := p.account.Usage(), w.Snapshot(); u.Conns != 1 || u.Busy != 0 || s.Used != 1 {
				t.Errorf("%+v of %+v", u, s)
			}
		})
	})
}

// Of two attempts one finds an idle connection while the other dials: its permit is not needed by either.
func TestAnAttemptThatNeedsNoSocketGivesItsPermitBackAtOnce(t *testing.T) {
	in(t, 3, func(t *testing.T, w *world) {
		p := w.pool(1, 3)
		held := w.take(p)
		w.b.slow(time.Second, 0)
		first := w.call(p) // dials
		release := make(chan struct{})
		p.connect = func(context.Context) (time.Duration, error) {
			<-release
			return 0, nil // found one
		}
		second := w.call(p)
		p.give(held)
		first.wait()
		first.give()
		second.wait()
		close(release)
		synctest.Wait()
		if u, s := p.account.Usage(), w.Snapshot(); s.Used != 2 || u.Conns != 2 {
			t.Errorf("%d permits are used for a connection and a dial; %+v", s.Used, u)
		}
		second.give()
	})
}

// The pool has nothing although the account believes so, and there is no permit: they wait, and do not call one another.
func TestCallersWhoFindNothingDoNotSpin(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		var held []*budget.Conn
		for range 4 {
			held = append(held, w.take(p))
		}
		for _, c := range held {
			p.give(c)
		}
		p.hidden.Store(true)
		var calls []*call
		for range 8 {
			calls = append(calls, &call{p: p, done: make(chan struct{})})
		}
		for _, c := range calls { // at the same time
			go func() {
				defer close(c.done)
				c.conn, _ = p.take(context.Background(), time.Minute)
				if c.conn != nil {
					time.Sleep(ms)
					p.give(c.conn)
				}
			}()
		}
		time.Sleep(time.Second)
		if n := p.misses.Load(); n > 20 {
			t.Errorf("8 callers found nothing %d times", n)
		}
		p.hidden.Store(false)
		began := time.Now()
		for _, c := range calls {
			<-c.done
		}
		if d := time.Since(began); d > 20*ms {
			t.Errorf("when the connections had come back it took %v", d)
		}
	})
}

// Who stands behind a caller that knew better is called when that one leaves.
func TestACallerWhoFoundNothingHidesNoIdleConnectionWhenItGivesUp(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		p.give(w.take(p))
		p.hidden.Store(true)
		ctx, cancel := context.WithTimeout(t.Context(), 12*ms)
		defer cancel()
		go func() { _, _ = p.take(ctx, time.Minute) }()
		synctest.Wait()
		next := w.call(p)
		time.Sleep(11 * ms)
		p.hidden.Store(false)
		if d := next.wait(); d > 15*ms {
			t.Errorf("served after %v", d)
		}
		next.give()

		// And so is another account.
		p.hidden.Store(true)
		ctx, cancel = context.WithTimeout(t.Context(), 32*ms)
		defer cancel()
		go func() { _, _ = p.take(ctx, time.Minute) }()
		synctest.Wait()
		next = w.call(w.pool(1, 4))
		time.Sleep(31 * ms)
		p.hidden.Store(false)
		if d := next.wait(); d > 35*ms {
			t.Errorf("another account was served after %v", d)
		}
		next.give()
	})
}

// An account whose last socket ended while it dialled the next one still makes room.
func TestAnAccountThatDialsIsNotForgotten(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		c := w.take(p)
		w.b.slow(10*ms, 0)
		next := w.call(p)
		p.drop(c)
		next.give()
		time.Sleep(time.Minute)
		hog, held := w.hog(1)
		last := w.call(w.pool(1, 4))
		if d := last.wait(); d != 10*ms {
			t.Errorf("beside an idle connection it took %v", d)
		}
		last.give()
		hog.give(held[0])
	})
}

func TestAnUnseenPoolIsNotBounded(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		p.connect = func(context.Context) (time.Duration, error) {
			time.Sleep(10 * ms)
			p.account.Unseen()
			p.account.Unseen()
			return 0, nil
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				began := time.Now()
				if err := p.account.Enter(t.Context(), time.Now().Add(time.Minute), 0); err != nil || time.Since(began) != 10*ms {
					t.Errorf("Enter: %v after %v", err, time.Since(began))
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if u, s := p.account.Usage(), w.Snapshot(); u.Busy != 50 || u.Conns != 50 || s.Used != 0 {
			t.Errorf("%+v of %+v", u, s)
		}
		for range 1000 {
			if !p.account.TryEnter() {
				t.Fatal("somebody had to wait")
			}
		}
		other := w.call(w.pool(1, 1)) // and nothing is asked of it
		other.give()
		time.Sleep(100 * ms)
		other = w.call(w.pool(1, 1)) // nor waited for: it is nobody above its floor
		if d := other.wait(); d != 0 {
			t.Errorf("served after %v", d)
		}
		other.give()
		w.pools = append(w.pools[:1], other.p)
		held := w.take(other.p)
		if _, err := w.pools[1].take(t.Context(), time.Second); err != budget.ErrTimeout || p.evicts.Load() != 0 {
			t.Errorf("%v, asked %d times", err, p.evicts.Load())
		}
		other.p.give(held)
		for range 1050 {
			p.account.Leave()
		}
		w.pools = w.pools[1:] // it has unbounded connections for ever
	})
}

func TestAPoolThatWasSeenStaysBounded(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		c := w.take(p)
		p.account.Unseen()
		if p.account.TryEnter() {
			t.Error("a second caller has entered for one connection")
		}
		p.give(c)
	})
}

func TestOfFindsTheConnUnderTLS(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		p := w.pool(1, 1)
		c := w.take(p)
		if budget.Of(c) != c || budget.Of(wrapped{c}) != c || budget.Of(c.Conn) != nil {
			t.Error("Of")
		}
		p.give(c)
	})
}

type wrapped struct{ net.Conn }

func (w wrapped) NetConn() net.Conn { return w.Conn }

func TestAnotherAddressOfTheSameNameIsTriedWithTheSamePermit(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) { // one permit: none is free beside the attempt's
		p := w.pool(1, 1)
		w.b.slow(0, 20*ms)
		p.connect = func(making context.Context) (time.Duration, error) {
			route := p.account.Route(p.dial)
			first, err := route.Dial(making, "tcp", "one:5432")
			if err != nil || !budget.Dialled(making) {
				return 0, errors.Join(errors.New("the first address"), err)
			}
			first.Close() // it spoke no PostgreSQL
			second, err := route.Dial(making, "tcp", "two:5432")
			if err != nil {
				return 0, err
			}
			c := second.(*budget.Conn)
			c.Established()
			p.put(c)
			return 0, nil
		}
		first := w.call(p)
		hungry := w.call(w.pool(1, 1)) // would have the permit if it came free
		if took := first.wait(); took < 20*ms || took > 30*ms {
			t.Errorf("served after %v, want the 20ms in which the first server lets go", took)
		}
		if u := p.account.Usage(); u.Conns != 1 || u.Busy != 1 {
			t.Errorf("%+v", u)
		}
		first.give()
		hungry.give()
	})
}

func TestHangUpKeepsThePermitsUntilTheServerHasLetGo(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p := w.pool(1, 4)
		c := w.take(p)
		w.b.slow(0, time.Second)
		began := time.Now()
		p.account.HangUp()
		if _, err := c.Read(make([]byte, 1)); err == nil || time.Since(began) > 10*ms {
			t.Errorf("its user reads on: %v after %v", err, time.Since(began))
		}
		if s := w.Snapshot(); s.Used != 1 {
			t.Errorf("the permit is free although the server has the socket: %+v", s)
		}
		time.Sleep(1100 * ms)
		if s := w.Snapshot(); s.Used != 0 {
			t.Errorf("the permit is not free although the server has let go: %+v", s)
		}
		p.account.Leave()
		if err := p.account.Enter(t.Context(), time.Now().Add(time.Second), 0); err != budget.ErrClosed {
			t.Errorf("Enter: %v", err)
		}
	})
}

func TestAPermitThatWaitsForItsSocketIsNoRoomForAnother(t *testing.T) {
	in(t, 20, func(t *testing.T, w *world) {
		p := w.pool(1, 2)
		held := w.take(p)
		w.b.slow(0, 20*ms)
		p.connect = func(making context.Context) (time.Duration, error) {
			route := p.account.Route(p.dial)
			first, err := route.Dial(making, "tcp", "one:5432")
			if err != nil {
				return 0, err
			}
			first.Close() // and those who wait must not have another one made meanwhile
			second, err := route.Dial(making, "tcp", "two:5432")
			if err != nil {
				return 0, err
			}
			c := second.(*budget.Conn)
			c.Established()
			p.put(c)
			return 0, nil
		}
		var line []*call
		for range 6 {
			line = append(line, w.call(p))
		}
		time.Sleep(time.Second)
		if u := p.account.Usage(); u.Conns != 2 {
			t.Errorf("%d connections, the ceiling is 2", u.Conns)
		}
		p.give(held)
		for _, c := range line {
			c.give()
		}
	})
}

func TestAnAttemptThatFailsAtEachAddressLeavesNothingBehind(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		p := w.pool(1, 2)
		w.b.slow(0, 20*ms)
		refused := errors.New("it speaks no PostgreSQL")
		p.connect = func(making context.Context) (time.Duration, error) {
			route := p.account.Route(p.dial)
			for _, addr := range []string{"one:5432", "two:5432"} {
				c, err := route.Dial(making, "tcp", addr)
				if err != nil {
					return 0, err
				}
				c.Close()
			}
			return 0, refused
		}
		if _, err := p.take(t.Context(), time.Second); !errors.Is(err, refused) {
			t.Errorf("take: %v", err)
		}
		if u := p.account.Usage(); u.Conns != 0 || u.Busy != 0 {
			t.Errorf("%+v", u)
		}
	})
}

// twoAddresses is a Connect for a name with two addresses, of which the first speaks no PostgreSQL.
func (p *pool) twoAddresses(making context.Context, dial budget.DialFunc) (time.Duration, error) {
	route := p.account.Route(dial)
	for _, addr := range []string{"one:5432", "two:5432"} {
		conn, err := route.Dial(making, "tcp", addr)
		switch {
		case errors.Is(err, budget.ErrNoPermit):
			return 5 * ms, err
		case err != nil:
			return 0, err
		case addr == "one:5432":
			conn.Close()
			continue
		}
		c := conn.(*budget.Conn)
		c.Established()
		p.mu.Lock()
		p.routes[c] = route
		p.mu.Unlock()
		p.put(c)
	}
	return 0, nil
}

// Who had counted on it needs another one.
func TestAPermitThatGoesBackToItsAttemptHasAnotherMakeRoom(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		idle, p := w.pool(1, 1), w.pool(1, 1)
		idle.give(w.take(idle))
		time.Sleep(100 * ms)
		w.b.slow(0, 10*ms)
		p.connect = func(making context.Context) (time.Duration, error) {
			return p.twoAddresses(making, func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "two:5432" {
					time.Sleep(500 * ms)
				}
				return p.dial(ctx, network, addr)
			})
		}
		first := w.call(p)
		second := w.call(w.pool(1, 1))
		if d := second.wait(); d > 2*10*ms {
			t.Errorf("served after %v beside an idle connection", d)
		}
		second.give()
		first.give()
	})
}

// Another attempt of the same account begins as the permit comes back from the first address.
func TestTheSecondAddressKeepsItsPermit(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		p, other := w.pool(1, 2), w.pool(1, 2)
		w.b.slow(0, 12*ms)
		began, reached := time.Now(), make(chan time.Duration, 1)
		p.connect = func(making context.Context) (time.Duration, error) {
			defer func() { reached <- time.Since(began) }()
			return p.twoAddresses(making, p.dial)
		}
		held := w.take(other)
		first := w.call(p)
		time.Sleep(12*ms + ms/4)
		p.connect = nil
		abort(held)
		other.account.Leave()
		time.Sleep(ms / 4) // released, and not looked at before 15 ms
		second := w.call(p)
		third := w.call(other)
		if d := <-reached; d != 15*ms {
			t.Errorf("the second address was reached after %v", d)
		}
		first.give()
		second.give()
		third.give()
	})
}

// What was never logged in is waited for by the next address for a moment only.
func TestAFirstAddressThatIsFrozenDoesNotKeepThePermit(t *testing.T) {
	in(t, 1, func(t *testing.T, w *world) {
		w.b.limit = 2 // after a bound the first one may still have it
		p := w.pool(1, 1)
		w.b.slow(0, time.Minute)
		p.connect = func(making context.Context) (time.Duration, error) { return p.twoAddresses(making, p.dial) }
		first := w.call(p)
		if d := first.wait(); d != budget.LingerOneSided {
			t.Errorf("served after %v, want %v", d, budget.LingerOneSided)
		}
		if s := w.Snapshot(); s.Used != 1 || s.Closing != 0 {
			t.Errorf("%+v", s)
		}
		w.b.slow(0, 0)
		first.give()
	})
}

// A hook of the pool that uses another account with the context of an attempt: that is not the attempt's.
func TestADialOfAnotherAccountIsNotTheAttempts(t *testing.T) {
	in(t, 4, func(t *testing.T, w *world) {
		p, other := w.pool(1, 2), w.pool(1, 2)
		w.b.slow(0, 20*ms)
		p.connect = func(making context.Context) (time.Duration, error) {
			first, err := p.account.Route(p.dial).Dial(making, "tcp", "one:5432")
			if err != nil {
				return 0, err
			}
			first.Close()
			began := time.Now()
			c, err := other.account.Route(other.dial).Dial(making, "tcp", "db:5432")
			if err != nil || time.Since(began) != 0 {
				return 0, fmt.Errorf("%v after %v", err, time.Since(began))
			}
			c.Close()
			return 0, errRefused
		}
		if _, err := p.take(t.Context(), time.Second); err != errRefused {
			t.Error(err)
		}
	})
}
