package budget_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// A permit outlives its socket at the server, whatever happens to the connection, and everything comes back in the end.
func TestStressTheServerNeverSeesMoreSocketsThanPermits(t *testing.T) {
	for range rounds {
		synctest.Test(t, func(t *testing.T) {
			work := rand.IntN(4)
			shared := work + 2 + rand.IntN(16)
			w := newWorld(t, shared)
			w.Server = budget.NewServer(budget.Limits{Total: shared + 1 + budget.Cancels, Own: 1, Work: work})
			for _, b := range []*backend{w.b, w.own, w.cancels} {
				b.jitter = true
				b.slow(rand.N(5*time.Millisecond), rand.N(20*time.Millisecond))
			}
			st := &storm{world: w, until: time.Now().Add(2 * time.Second)}
			for range 2 + rand.IntN(30) {
				p := w.pool(1+rand.IntN(2), 1+rand.IntN(8))
				p.patient, p.proof = rand.N(20*time.Millisecond)+1, rand.N(2*time.Millisecond)
				if rand.IntN(3) > 0 {
					p.patient = time.Minute
				}
				if rand.IntN(3) == 0 {
					p.patient = time.Minute
					p.connect = func(making context.Context) (time.Duration, error) {
						if c := p.pop(); c != nil {
							p.put(c)
							return 0, nil
						}
						return p.twoAddresses(making, p.dial)
					}
				}
				for range 1 + rand.IntN(8) {
					st.Go(func() { st.caller(p) })
				}
				st.Go(func() { st.background(p) })
			}
			st.Go(st.others)
			st.watch()
			st.Wait()
			w.end()
			if st.served.Load() == 0 {
				t.Error("nobody was served")
			}
		})
		if t.Failed() {
			return
		}
	}
}

var rounds = 20

// storm is what happens to a world at random.
type storm struct {
	*world
	sync.WaitGroup
	until  time.Time
	served atomic.Int64
}

func (st *storm) lasts() bool { return time.Now().Before(st.until) }

// watch looks whether somebody is stuck, at moments when nothing runs, until the storm is over. For a moment somebody may be: what becomes idle on its
// way to somebody else is offered when that one leaves.
func (st *storm) watch() {
	var what string
	var since time.Time
	for st.lasts() {
		time.Sleep(rand.N(3 * time.Millisecond))
		synctest.Wait()
		now := st.Stuck()
		if now != what {
			what, since = now, time.Now()
		}
		if what != "" && time.Since(since) > 30*time.Millisecond {
			st.t.Errorf("for %v %s", time.Since(since), what)
			return
		}
	}
}

func (st *storm) caller(p *pool) {
	for st.lasts() {
		ctx, cancel := context.Background(), context.CancelFunc(func() {})
		hurried := rand.IntN(4) == 0
		if hurried {
			ctx, cancel = context.WithTimeout(ctx, rand.N(10*time.Millisecond))
		}
		c, err := p.take(ctx, 10*time.Second)
		cancel()
		switch {
		case err == nil:
			st.served.Add(1)
			st.use(p, c)
		case errors.Is(err, budget.ErrClosed) && p.cut.Load():
			return
		case hurried && errors.Is(err, context.DeadlineExceeded), errors.Is(err, errRefused), p.patient < time.Minute && errors.Is(err, context.DeadlineExceeded):
		default:
			st.t.Errorf("take: %v", err)
			return
		}
		if rand.IntN(4) == 0 {
			time.Sleep(rand.N(30 * time.Millisecond))
		}
	}
}

func (st *storm) use(p *pool, c *budget.Conn) {
	time.Sleep(rand.N(5 * time.Millisecond))
	switch rand.IntN(20) {
	case 6:
		ctx, cancel := context.WithTimeout(context.Background(), rand.N(20*time.Millisecond))
		defer cancel()
		if request, err := p.cancel(ctx, c); err == nil {
			time.Sleep(rand.N(time.Millisecond))
			request.Close()
		}
		p.drop(c)
	case 0:
		p.drop(c)
	case 1: // broken, and held for a while
		c.Doom()
		time.Sleep(rand.N(5 * time.Millisecond))
		p.drop(c)
	case 2: // the pool closes it later
		c.Doom()
		p.account.Leave()
		time.Sleep(rand.N(5 * time.Millisecond))
		c.Close()
	case 3: // closed behind the account's back
		p.account.Leave()
		time.Sleep(rand.N(time.Millisecond))
		c.Close()
	case 4:
		abort(c)
		p.account.Leave()
	case 5: // all at once
		c.Conn.(halved).cut.Store(true)
		var wg sync.WaitGroup
		wg.Go(c.Abort)
		wg.Go(func() { c.Close() })
		wg.Go(c.Doom)
		wg.Go(p.account.Leave)
		wg.Wait()
	default:
		p.give(c)
	}
}

// background is what a pool does without a word, and what befalls it.
func (st *storm) background(p *pool) {
	for st.lasts() {
		time.Sleep(rand.N(50 * time.Millisecond))
		switch rand.IntN(30) {
		case 0, 1, 2, 3: // an idle connection has come of age
			if c := p.pop(); c != nil {
				time.Sleep(rand.N(time.Millisecond))
				c.Close()
			}
		case 4, 5: // idle ones are looked at
			p.hidden.Store(true)
			time.Sleep(rand.N(time.Millisecond))
			p.hidden.Store(false)
		case 6:
			p.cut.Store(true)
			p.account.Cut()
			return
		}
	}
}

// others are the library's own connections, cancel requests, and a server that refuses now and then.
func (st *storm) others() {
	work, own := st.Dialer(st.b.dial), st.OwnDialer(st.own.dial)
	for st.lasts() {
		time.Sleep(rand.N(20 * time.Millisecond))
		ctx, cancel := context.WithTimeout(context.Background(), rand.N(100*time.Millisecond))
		dial := work
		switch rand.IntN(6) {
		case 0:
			dial = own
		case 1:
			st.pools[0].account.Shrink()
		case 2:
			st.b.refuse(errRefused)
			time.Sleep(rand.N(10 * time.Millisecond))
			st.b.refuse(nil)
		}
		st.Go(func() {
			defer cancel()
			if c, err := dial(ctx, "tcp", "db:5432"); err == nil {
				time.Sleep(rand.N(10 * time.Millisecond))
				c.Close()
			}
		})
	}
}
