package lease_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/lease"
)

func TestCallersOfOneKeyShareOneBuild(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Build = f.slowly(time.Second)
	in(t, cfg, func(t *testing.T, tab *table) {
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { use(t, tab, "a", 1) })
		}
		wg.Wait()
		f.want(t, 1, 0)
	})
}

func TestCancellingEndsTheWaitAndNotTheBuild(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		time.Sleep(20 * time.Second)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return f.build(ctx, key, generation)
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		var wg sync.WaitGroup
		wg.Go(func() { use(t, tab, "a", 1) }) // the innocent
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := tab.Acquire(ctx, "a", 1); err != context.DeadlineExceeded || time.Since(start) != time.Second {
			t.Errorf("error %v after %v, want that of ctx after a second", err, time.Since(start))
		}
		wg.Wait()
		f.want(t, 1, 0)
		l, err := tab.Acquire(ctx, "a", 1)
		if err != nil {
			t.Fatalf("live value, cancelled ctx: %v", err)
		}
		l.Release()
		if _, err := tab.Acquire(ctx, "b", 1); err != context.DeadlineExceeded {
			t.Errorf("no live value, cancelled ctx: %v", err)
		}
		f.want(t, 1, 0)
	})
}

func TestBuildSeesNothingOfItsCallers(t *testing.T) {
	type secret struct{}
	f := &factory{}
	cfg := f.config()
	cfg.BuildTimeout = 7 * time.Second
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		if ctx.Value(secret{}) != nil {
			t.Error("a value of the caller reached Build")
		}
		if d, ok := ctx.Deadline(); !ok || time.Until(d) != 7*time.Second {
			t.Errorf("deadline in %v", time.Until(d))
		}
		return f.build(ctx, key, generation)
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), secret{}, 1), time.Second)
		defer cancel()
		l, err := tab.Acquire(ctx, "a", 1)
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
	})
}

func TestBuildTimeoutIsThirtySeconds(t *testing.T) {
	cfg := (&factory{}).config()
	cfg.Build = func(ctx context.Context, _ string, _ int64) (*conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		start := time.Now()
		_, err := tab.Acquire(t.Context(), "a", 1)
		if err != context.DeadlineExceeded || time.Since(start) != 30*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestFailedBuildIsDeliveredAndNotRemembered(t *testing.T) {
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		fail func() error
		is   func(error) bool
	}{
		"error":          {func() error { return broken }, func(err error) bool { return err == broken }},
		"panic_of_error": {func() error { panic(broken) }, func(err error) bool { return errors.Is(err, broken) }},
		"goexit": {
			func() error { runtime.Goexit(); return nil },
			func(err error) bool { return strings.Contains(err.Error(), "Goexit") },
		},
		"panic": {func() error { panic("ouch") }, func(err error) bool {
			p, ok := errors.AsType[*lease.PanicError](err)
			return ok && p.Callback == "Build" && p.Value == "ouch" && strings.Contains(string(p.Stack), "build_test") &&
				strings.Contains(err.Error(), "ouch") && !strings.Contains(err.Error(), "goroutine")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := &factory{}
			var fails atomic.Bool
			cfg := f.config()
			cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
				time.Sleep(time.Second)
				if fails.Load() {
					return &conn{}, tc.fail() // the conn is dropped, not closed
				}
				return f.build(ctx, key, generation)
			}
			in(t, cfg, func(t *testing.T, tab *table) {
				use(t, tab, "a", 1)
				fails.Store(true)
				var wg sync.WaitGroup
				for range 10 {
					wg.Go(func() {
						if _, err := tab.Acquire(t.Context(), "a", 2); err == nil || !tc.is(err) {
							t.Errorf("error %v", err)
						}
					})
				}
				wg.Wait()
				f.want(t, 1, 0)
				if l := acquire(t, tab, "a", 1); l.Generation() != 1 {
					t.Error("the older value must stay current")
				} else {
					l.Release()
				}
				fails.Store(false)
				use(t, tab, "a", 2)
				f.want(t, 2, 1)
			})
		})
	}
}

func TestRetireDuringABuildLeavesItToItsWaiters(t *testing.T) {
	for name, retire := range map[string]func(*table){
		"Retire":       func(tab *table) { tab.Retire("a", math.MaxInt64) },
		"Retire_below": func(tab *table) { tab.Retire("a", 2) },
		"RetireAll":    func(tab *table) { tab.RetireAll() },
	} {
		t.Run(name, func(t *testing.T) {
			f := &factory{}
			cfg := f.config()
			cfg.Build = f.slowly(time.Second)
			in(t, cfg, func(t *testing.T, tab *table) {
				var wg sync.WaitGroup
				seen := make(chan *conn, 2)
				for range 2 {
					wg.Go(func() {
						l := acquire(t, tab, "a", 1)
						seen <- l.Value()
						time.Sleep(time.Minute)
						if l.Value().closed.Load() {
							t.Error("closed under a lease")
						}
						l.Release()
					})
				}
				synctest.Wait()
				retire(tab)
				after := acquire(t, tab, "a", 1)
				if a, b := <-seen, <-seen; a != b || after.Value() == a {
					t.Error("waiters share the old build, later callers get a new one")
				}
				wg.Wait()
				f.want(t, 2, 1)
				after.Release()
			})
		})
	}
}

func TestRetireOfAnOlderGenerationLeavesANewerBuild(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Build = f.slowly(time.Second)
	in(t, cfg, func(t *testing.T, tab *table) {
		go use(t, tab, "a", 2)
		synctest.Wait()
		tab.Retire("a", 2)
		use(t, tab, "a", 2)
		f.want(t, 1, 0)
	})
}

func TestBuildOvertakenByANewerGenerationServesItsWaiters(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		time.Sleep(time.Duration(10/generation) * time.Second) // the older one is the slower
		return f.build(ctx, key, generation)
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		var wg sync.WaitGroup
		wg.Go(func() {
			l := acquire(t, tab, "a", 1)
			defer l.Release()
			if l.Generation() != 1 {
				t.Errorf("generation %d, want that of its own build", l.Generation())
			}
		})
		synctest.Wait()
		go use(t, tab, "a", 2)
		synctest.Wait()
		if l := acquire(t, tab, "a", 1); l.Generation() != 2 {
			t.Error("who comes after a newer build began shares it")
		} else {
			l.Release()
		}
		wg.Wait()
		f.want(t, 2, 1)
		if l := acquire(t, tab, "a", 0); l.Generation() != 2 {
			t.Error("the late, older build became current")
		} else {
			l.Release()
		}
	})
}

func TestBuildThatNobodyCanGetIsCancelled(t *testing.T) {
	var cancelled atomic.Int32
	cfg := (&factory{}).config()
	cfg.Build = func(ctx context.Context, _ string, _ int64) (*conn, error) {
		<-ctx.Done()
		if ctx.Err() == context.Canceled {
			cancelled.Add(1)
		}
		return nil, ctx.Err()
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		visit := func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_, _ = tab.Acquire(ctx, "a", 1)
		}
		want := func(n int32, why string) {
			t.Helper()
			synctest.Wait()
			if got := cancelled.Load(); got != n {
				t.Errorf("%d builds cancelled, want %d: %s", got, n, why)
			}
		}
		visit()
		want(0, "leaving alone cancels nothing")
		tab.RetireAll()
		want(1, "retired, and nobody waits")
		go visit()
		synctest.Wait()
		tab.RetireAll()
		want(1, "retired, but one waits")
		time.Sleep(2 * time.Second)
		want(2, "the last waiter of a retired build left")
	})
}

func TestReentrantBuildIsAnErrorAndNotADeadlock(t *testing.T) {
	type call struct {
		key        string
		generation int64
	}
	for name, calls := range map[string]map[string]call{
		"same_key":              {"a": {"a", 1}},
		"newer_generation":      {"a": {"a", 2}},
		"through_other_keys":    {"a": {"b", 1}, "b": {"c", 1}, "c": {"a", 1}},
		"older_through_another": {"a": {"b", 1}, "b": {"a", 0}},
	} {
		for _, closeFirst := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/close_first_%v", name, closeFirst), func(t *testing.T) {
				f := &factory{}
				var tab *table
				cfg := f.config()
				cfg.CloseFirst = closeFirst
				cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
					if c, ok := calls[key]; ok {
						l, err := tab.Acquire(ctx, c.key, c.generation)
						if err != nil {
							return nil, fmt.Errorf("needs %s: %w", c.key, err)
						}
						defer l.Release()
					}
					return f.build(ctx, key, generation)
				}
				in(t, cfg, func(t *testing.T, made *table) {
					tab = made
					start := time.Now()
					if _, err := tab.Acquire(t.Context(), "a", 1); !errors.Is(err, lease.ErrReentrant) {
						t.Errorf("error %v", err)
					}
					if time.Since(start) != 0 {
						t.Errorf("took %v", time.Since(start))
					}
				})
			})
		}
	}
}

// Here neither build was started by the other, and still each would wait for the other. With
// CloseFirst and newer generations the circle goes through a build that waits for its predecessor.
func TestCircleOfIndependentBuildsIsAnError(t *testing.T) {
	for _, generation := range []int64{1, 2} {
		f := &factory{}
		var tab *table
		cfg := f.config()
		cfg.CloseFirst = generation == 2
		cfg.Build = func(ctx context.Context, key string, g int64) (*conn, error) {
			time.Sleep(time.Second)
			l, err := tab.Acquire(ctx, map[string]string{"a": "b", "b": "a"}[key], generation)
			if err != nil {
				return nil, err
			}
			defer l.Release()
			return f.build(ctx, key, g)
		}
		in(t, cfg, func(t *testing.T, made *table) {
			tab = made
			var wg sync.WaitGroup
			var reentrant atomic.Bool
			start := time.Now()
			for _, key := range []string{"a", "b"} {
				wg.Go(func() {
					l, err := tab.Acquire(context.Background(), key, 1)
					if err == nil {
						l.Release()
					} else if errors.Is(err, lease.ErrReentrant) {
						reentrant.Store(true)
					}
				})
			}
			wg.Wait()
			if !reentrant.Load() || time.Since(start) >= 30*time.Second {
				t.Errorf("generation %d: reentrant %v after %v", generation, reentrant.Load(), time.Since(start))
			}
		})
	}
}

func TestBuildMayLeaseOtherKeysAndKeepItsContext(t *testing.T) {
	f := &factory{}
	var tab *table
	var kept context.Context
	cfg := f.config()
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		if key == "a" {
			l, err := tab.Acquire(ctx, "b", 1)
			if err != nil {
				return nil, err
			}
			defer l.Release()
			kept = context.WithoutCancel(ctx)
		}
		return f.build(ctx, key, generation)
	}
	in(t, cfg, func(t *testing.T, made *table) {
		tab = made
		use(t, tab, "a", 1)
		l, err := tab.Acquire(kept, "a", 2) // that build is over: no circle
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
	})
}

func TestCloseFirstEndsTheOldValueBeforeTheNewIsBuilt(t *testing.T) {
	f := &factory{}
	var running atomic.Int32
	cfg := f.config()
	cfg.CloseFirst = true
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		if running.Add(1) != 1 {
			t.Error("two at once")
		}
		time.Sleep(time.Second)
		return f.build(ctx, key, generation)
	}
	cfg.Close = func(c *conn) {
		time.Sleep(time.Second)
		f.close(c)
		running.Add(-1)
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		var wg sync.WaitGroup
		hold := func(generation int64, d time.Duration) {
			wg.Go(func() {
				l := acquire(t, tab, "a", generation)
				time.Sleep(d)
				l.Release()
			})
			synctest.Wait()
		}
		hold(1, 2*time.Second) // leased when the next one comes
		hold(2, 0)             // overtaken, while it waits, by the next one
		hold(3, time.Second)
		wg.Wait()
		f.want(t, 3, 2)

		held := acquire(t, tab, "a", 1)
		held.Discard()
		start := time.Now()
		_, err := tab.Acquire(t.Context(), "a", 3)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 30*time.Second {
			t.Errorf("%v after %v, want an error after BuildTimeout", err, time.Since(start))
		}
		held.Release()
		use(t, tab, "a", 3)
		tab.Retire("a", 4)
		use(t, tab, "a", 3) // waits for a Close that began before anybody asked
		f.want(t, 5, 4)
	})
}
