package lease_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/lease"
)

// oracle keeps its own books, apart from the table: what is open, and how often.
type oracle struct {
	t     *testing.T
	alone bool // CloseFirst: never two of one key

	mu    sync.Mutex
	open  map[string]int
	built atomic.Int64
	ended atomic.Int64
}

func (o *oracle) build(ctx context.Context, key string, generation int64) (*conn, error) {
	o.mu.Lock()
	o.open[key]++
	if o.alone && o.open[key] != 1 {
		o.t.Errorf("%d of %s open at once", o.open[key], key)
	}
	o.mu.Unlock()
	for range rand.IntN(20) {
		runtime.Gosched()
	}
	if rand.IntN(10) == 0 {
		o.gone(key)
		if rand.IntN(2) == 0 {
			panic("stress")
		}
		return nil, errStress
	}
	o.built.Add(1)
	return &conn{key: key, generation: generation}, nil
}

func (o *oracle) close(c *conn) {
	if c.closed.Swap(true) {
		o.t.Error("closed twice")
	}
	for range rand.IntN(20) {
		runtime.Gosched()
	}
	o.ended.Add(1)
	o.gone(c.key)
}

func (o *oracle) gone(key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.open[key]--
}

var errStress = errors.New("stress")

func TestStressNothingIsUsedAfterItsCloseAndEverythingIsClosed(t *testing.T) {
	for _, closeFirst := range []bool{false, true} {
		t.Run(fmt.Sprintf("close_first_%v", closeFirst), func(t *testing.T) {
			o := &oracle{t: t, alone: closeFirst, open: map[string]int{}}
			tab := lease.New(lease.Config[string, *conn]{
				Build: o.build, Close: o.close, CloseFirst: closeFirst, IdleAfter: 1, // as eager as it gets
			})
			var generation, sure atomic.Int64
			var wg sync.WaitGroup
			for range 32 {
				wg.Go(func() {
					for range 3000 {
						if !o.step(tab, &generation, &sure) {
							return
						}
					}
				})
			}
			wg.Go(func() { // sometimes everything is closed under the callers' feet
				time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
				if cut, err := tab.Close(context.Background()); cut != nil || err != nil {
					t.Errorf("Close = %v, %v", cut, err)
				}
				if b, e := o.built.Load(), o.ended.Load(); b != e {
					t.Errorf("after Close: built %d, ended %d", b, e)
				}
			})
			wg.Wait()
			if b, e := o.built.Load(), o.ended.Load(); b == 0 || b != e {
				t.Errorf("built %d, ended %d", b, e)
			}
			for key, n := range o.open {
				if n != 0 {
					t.Errorf("%s: %d open at the end", key, n)
				}
			}
			t.Logf("%d values", o.built.Load())
		})
	}
}

// step is one random act of one caller. It reports false once the table is closed.
func (o *oracle) step(tab *table, generation, retired *atomic.Int64) bool {
	key := string(rune('a' + rand.IntN(5)))
	switch rand.IntN(100) {
	case 0:
		generation.Add(1)
	case 1:
		tab.Retire(key, math.MaxInt64)
	case 2:
		g := generation.Load()
		for k := 'a'; k < 'a'+5; k++ {
			tab.Retire(string(k), g)
		}
		for old := retired.Load(); old < g && !retired.CompareAndSwap(old, g); old = retired.Load() {
		}
	case 3:
		tab.Each(func(key string, _ int64, c *conn, _ int) {
			if c.closed.Load() || c.key != key {
				o.t.Error("Each showed a closed value or a wrong key")
			}
		})
	case 4:
		time.Sleep(time.Duration(rand.IntN(8)) * time.Millisecond) // long enough for the janitor
	default:
		ctx, cancel := context.Background(), context.CancelFunc(func() {})
		if rand.IntN(10) == 0 {
			ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(100))*time.Microsecond)
		}
		defer cancel()
		want := max(generation.Load()-rand.Int64N(2), retired.Load())
		l, err := tab.Acquire(ctx, key, want)
		if p := (*lease.PanicError)(nil); errors.Is(err, lease.ErrClosed) {
			return false
		} else if errors.Is(err, errStress) || errors.As(err, &p) || ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return true
		}
		if err != nil {
			o.t.Errorf("Acquire: %v", err)
			return false
		}
		defer l.Release()
		for range rand.IntN(10) {
			if c := l.Value(); c.closed.Load() || c.key != key || c.generation < want {
				o.t.Errorf("leased %s of %d, want %s of %d, closed %v", c.key, c.generation, key, want, c.closed.Load())
			}
			runtime.Gosched()
		}
		if rand.IntN(50) == 0 {
			l.Discard()
		}
	}
	return true
}

// Build first: of one key and generation there is never a second build while the first one may
// still become, or is, the current value.
func TestStressOneBuildPerKeyAndGeneration(t *testing.T) {
	type id struct {
		key        string
		generation int64
	}
	var mu sync.Mutex
	builds := map[id]int{}
	tab := lease.New(lease.Config[string, *conn]{
		Build: func(_ context.Context, key string, generation int64) (*conn, error) {
			mu.Lock()
			defer mu.Unlock()
			builds[id{key, generation}]++
			return &conn{key: key, generation: generation}, nil
		},
	})
	var generation atomic.Int64
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 2000 {
				if rand.IntN(200) == 0 {
					generation.Add(1)
				}
				key := string(rune('a' + rand.IntN(5)))
				use(t, tab, key, generation.Load())
			}
		})
	}
	wg.Wait()
	closeTable(t, tab)
	for id, n := range builds {
		if n != 1 {
			t.Errorf("%v was built %d times", id, n)
		}
	}
}
