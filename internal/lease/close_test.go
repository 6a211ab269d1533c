package lease_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/lease"
)

func TestCloseRefusesNewLeasesAndWaitsForTheOldOnes(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Close = func(c *conn) {
		time.Sleep(time.Second)
		f.close(c)
	}
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		held := acquire(t, tab, "a", 1)
		use(t, tab, "b", 1)
		start := time.Now()
		var wg sync.WaitGroup
		for range 3 { // all calls wait for the same end
			wg.Go(func() {
				closeTable(t, tab)
				if time.Since(start) != 11*time.Second {
					t.Errorf("Close returned after %v", time.Since(start))
				}
			})
		}
		synctest.Wait()
		if _, err := tab.Acquire(t.Context(), "a", 1); err != lease.ErrClosed {
			t.Errorf("Acquire while closing: %v", err)
		}
		time.Sleep(time.Second)
		f.want(t, 2, 1) // the unused one ended at once
		time.Sleep(9 * time.Second)
		held.Release()
		wg.Wait()
		f.want(t, 2, 2)
		if _, err := tab.Acquire(t.Context(), "a", 1); err != lease.ErrClosed {
			t.Errorf("Acquire after Close: %v", err)
		}

		over, cancel := context.WithCancel(t.Context())
		cancel()
		if cut, err := tab.Close(over); cut != nil || err != nil {
			t.Errorf("Close again = %v, %v", cut, err)
		}
		tab.RetireAll()
		tab.Retire("a", 9)
		held.Discard()
		tab.Each(func(string, int64, *conn, int) { t.Error("Each after Close") })
	})
}

func TestCloseOfAnEmptyTableReturnsNilWhateverItsContext(t *testing.T) {
	tab := lease.New((&factory{}).config())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if cut, err := tab.Close(ctx); cut != nil || err != nil {
		t.Errorf("Close = %v, %v", cut, err)
	}
}

func TestCloseAtItsDeadlineCutsAndReports(t *testing.T) {
	f := &factory{}
	var obeys lease.Lease[string, *conn]
	var cuts atomic.Int32
	cfg := f.config()
	cfg.Cut = func(c *conn) {
		cuts.Add(1)
		if c == obeys.Value() {
			obeys.Release()
			synctest.Wait()
		}
		if c.closed.Load() {
			t.Error("Close before the end of Cut")
		}
	}
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		obeys = acquire(t, tab, "obeys", 1)
		deaf, retired := acquire(t, tab, "deaf", 1), acquire(t, tab, "deaf", 2)
		use(t, tab, "idle", 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		var wg sync.WaitGroup
		for _, ctx := range []context.Context{ctx, context.Background()} { // the first to end counts
			wg.Go(func() {
				keys, err := tab.Close(ctx)
				slices.Sort(keys)
				if !slices.Equal(keys, []string{"deaf", "obeys"}) || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Close = %v, %v", keys, err)
				}
				if time.Since(start) != time.Minute+time.Second {
					t.Errorf("Close returned after %v", time.Since(start))
				}
			})
		}
		wg.Wait()
		if n := cuts.Load(); n != 3 {
			t.Errorf("%d cut, want 3", n)
		}
		f.want(t, 4, 2)
		deaf.Release() // what is left ends by itself
		retired.Release()
		f.want(t, 4, 4)
		if keys, err := tab.Close(context.Background()); len(keys) != 2 || err == nil {
			t.Errorf("Close again = %v, %v, want the same", keys, err)
		}
	})
}

func TestCloseReturnsEarlyWhenEveryCutIsObeyed(t *testing.T) {
	f := &factory{}
	var l lease.Lease[string, *conn]
	cfg := f.config()
	cfg.Cut = func(*conn) { l.Release() }
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		l = acquire(t, tab, "a", 1)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		if keys, err := tab.Close(ctx); !slices.Equal(keys, []string{"a"}) || !errors.Is(err, context.Canceled) {
			t.Errorf("Close = %v, %v", keys, err)
		}
		if time.Since(start) != 0 {
			t.Errorf("Close returned after %v", time.Since(start))
		}
		f.want(t, 1, 1)
	})
}

func TestCloseDuringABuildServesItsWaiters(t *testing.T) {
	f := &factory{}
	var cancelled atomic.Int32
	cfg := f.config()
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		select {
		case <-time.After(10 * time.Second):
			return f.build(ctx, key, generation)
		case <-ctx.Done():
			cancelled.Add(1)
			return nil, ctx.Err()
		}
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		var wg sync.WaitGroup
		wg.Go(func() { use(t, tab, "waited", 1) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = tab.Acquire(ctx, "left", 1)
		closeTable(t, tab)
		wg.Wait()
		f.want(t, 1, 1)
		if n := cancelled.Load(); n != 1 {
			t.Errorf("%d builds cancelled, want the one without waiters", n)
		}
	})
}

func TestDeadlineOfCloseEndsBuildsAndTheirWaiters(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		<-ctx.Done()
		if key == "deaf" {
			time.Sleep(time.Hour)
			return f.build(ctx, key, generation)
		}
		return nil, ctx.Err()
	}
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		var wg sync.WaitGroup
		for _, key := range []string{"a", "b", "c", "d", "e", "deaf"} {
			wg.Go(func() {
				if _, err := tab.Acquire(context.Background(), key, 1); err != lease.ErrClosed {
					t.Errorf("waiter of %s: %v", key, err)
				}
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if keys, err := tab.Close(ctx); keys != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Close = %v, %v", keys, err)
		}
		wg.Wait()
		time.Sleep(2 * time.Hour)
		f.want(t, 1, 1) // the value that came too late was closed
	})
}

func TestPanicInCloseOrCutIsReportedByClose(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Close = func(c *conn) {
		f.close(c)
		if c.key == "goexit" {
			runtime.Goexit()
		}
		panic("close " + c.key)
	}
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		use(t, tab, "goexit", 1)
		use(t, tab, "a", 1)
		tab.Retire("a", 2)
		f.want(t, 2, 1)
		use(t, tab, "a", 1) // its key goes on
		cut, err := tab.Close(t.Context())
		if p, ok := errors.AsType[*lease.PanicError](err); cut != nil || !ok || p.Callback != "Close" || p.Value != "close a" {
			t.Errorf("Close = %v, %v", cut, err)
		}
		f.want(t, 3, 3)
	})

	cfg = (&factory{}).config()
	cfg.Cut = func(*conn) { panic("cut") }
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		l := acquire(t, tab, "a", 1)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		cut, err := tab.Close(ctx)
		if p, ok := errors.AsType[*lease.PanicError](err); len(cut) != 1 || !ok || p.Callback != "Cut" || !errors.Is(err, context.Canceled) {
			t.Errorf("Close = %v, %v", cut, err)
		}
		l.Release()
	})
}
