package lease_test

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/lease"
)

func TestAcquireSharesOneLiveValuePerKey(t *testing.T) {
	f := &factory{}
	in(t, f.config(), func(t *testing.T, tab *table) {
		a, b, other := acquire(t, tab, "a", 1), acquire(t, tab, "a", 1), acquire(t, tab, "b", 1)
		if a.Value() != b.Value() || a.Value() == other.Value() {
			t.Error("want one value per key")
		}
		a.Release()
		b.Release()
		other.Release()
		f.want(t, 2, 0)
		if tab.Len() != 2 {
			t.Errorf("Len = %d, want 2", tab.Len())
		}
	})
	if c := f.closed.Load(); c != 2 {
		t.Errorf("closed %d, want 2", c)
	}
}

func TestNewerGenerationReplacesAndOlderSharesTheNewer(t *testing.T) {
	f := &factory{}
	in(t, f.config(), func(t *testing.T, tab *table) {
		old := acquire(t, tab, "a", 1)
		renewed := acquire(t, tab, "a", 2)
		late := acquire(t, tab, "a", 1)
		if late.Generation() != 2 || late.Value() != renewed.Value() {
			t.Errorf("generation %d given, want the live 2", late.Generation())
		}
		f.want(t, 2, 0) // the old one is leased
		old.Release()
		f.want(t, 2, 1)
		if !old.Value().closed.Load() || renewed.Value().closed.Load() {
			t.Error("the wrong value was closed")
		}
		renewed.Release()
		late.Release()
		f.want(t, 2, 1)
	})
}

func TestKeysNeverWaitForEachOther(t *testing.T) {
	f := &factory{}
	var hold chan struct{}
	cfg := f.config()
	cfg.Build = func(ctx context.Context, key string, generation int64) (*conn, error) {
		if key == "slow" {
			<-hold
		}
		return f.build(ctx, key, generation)
	}
	cfg.Close = func(c *conn) {
		if c.key == "stuck" {
			<-hold
		}
		f.close(c)
	}
	in(t, cfg, func(t *testing.T, tab *table) {
		hold = make(chan struct{})
		go use(t, tab, "slow", 1)
		use(t, tab, "stuck", 1)
		tab.Retire("stuck", math.MaxInt64)
		synctest.Wait()

		use(t, tab, "a", 1)
		use(t, tab, "stuck", 1) // not even its own closing holds a key up
		tab.Retire("a", 2)
		f.want(t, 3, 1)
		close(hold)
	})
}

func TestRetireUnlinksOlderGenerationsOnly(t *testing.T) {
	f := &factory{}
	in(t, f.config(), func(t *testing.T, tab *table) {
		held := acquire(t, tab, "a", 5)
		tab.Retire("a", 5)
		tab.Retire("unknown", 5)
		if tab.Len() != 1 {
			t.Error("a value of the same generation was retired")
		}
		tab.Retire("a", 6)
		if tab.Len() != 0 {
			t.Error("an older value is still current")
		}
		f.want(t, 1, 0) // leased
		again := acquire(t, tab, "a", 5)
		if again.Value() == held.Value() {
			t.Error("a retired value was given")
		}
		held.Release()
		f.want(t, 2, 1)
		again.Release()
		tab.Retire("a", math.MaxInt64)
		f.want(t, 2, 2)
		use(t, tab, "a", math.MaxInt64)
		tab.Retire("a", math.MaxInt64) // any generation, also this one
		f.want(t, 3, 3)
		use(t, tab, "a", 1)
		use(t, tab, "b", 1)
		tab.RetireAll()
		f.want(t, 5, 5)
	})
}

func TestDiscardRetiresThisVeryValue(t *testing.T) {
	f := &factory{}
	in(t, f.config(), func(t *testing.T, tab *table) {
		broken := acquire(t, tab, "a", 1)
		broken.Discard()
		f.want(t, 1, 0) // still leased
		fresh := acquire(t, tab, "a", 1)
		broken.Discard() // no longer current: touches nothing
		again := acquire(t, tab, "a", 1)
		if again.Value() != fresh.Value() || fresh.Value() == broken.Value() {
			t.Error("Discard of an old value touched the new one")
		}
		again.Release()
		broken.Release()
		fresh.Release()
		f.want(t, 2, 1)
	})
}

func TestReleaseTwicePanicsWhereNobodyElseHoldsALease(t *testing.T) {
	f := &factory{}
	panics := func(l lease.Lease[string, *conn]) (did bool) {
		defer func() { did = recover() != nil }()
		l.Release()
		return false
	}
	in(t, f.config(), func(t *testing.T, tab *table) {
		other := acquire(t, tab, "b", 1)
		l := acquire(t, tab, "a", 1)
		l.Release()
		if !panics(l) {
			t.Error("live value: no panic")
		}
		use(t, tab, "a", 1) // the count is right again
		f.want(t, 2, 0)
		tab.Retire("a", 2)
		f.want(t, 2, 1)
		if !panics(l) {
			t.Error("closed value: no panic")
		}
		f.want(t, 2, 1) // closed once, and the other key never noticed
		other.Release()
	})
}

func TestIdleValueEndsAtMostAQuarterLate(t *testing.T) {
	for _, offset := range []time.Duration{0, time.Minute, 14*time.Minute + 59*time.Second} {
		t.Run(offset.String(), func(t *testing.T) {
			f := &factory{}
			cfg := f.config()
			cfg.IdleAfter = time.Hour
			in(t, cfg, func(t *testing.T, tab *table) {
				held := acquire(t, tab, "held", 1)
				for range 20 {
					use(t, tab, "used", 1)
					time.Sleep(50 * time.Minute)
				}
				time.Sleep(offset / 2)
				f.want(t, 2, 0)
				use(t, tab, "used", 1)
				time.Sleep(time.Hour - 1)
				f.want(t, 2, 0)
				time.Sleep(15*time.Minute + 2)
				f.want(t, 2, 1)
				time.Sleep(offset)
				held.Release() // its idle time begins here
				time.Sleep(time.Hour - 1)
				f.want(t, 2, 1)
				time.Sleep(15*time.Minute + 2)
				f.want(t, 2, 2)
				if tab.Len() != 0 {
					t.Error("an idle value is still current")
				}
				time.Sleep(24 * time.Hour)
				use(t, tab, "used", 1) // the janitor starts again
				time.Sleep(75 * time.Minute)
				f.want(t, 3, 3)
				use(t, tab, "used", 1) // and Close stops it
			})
		})
	}
}

func TestUnusedValueHasItsWholeIdleTime(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.IdleAfter = time.Hour
	cfg.Build = f.slowly(10 * time.Second)
	in(t, cfg, func(t *testing.T, tab *table) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = tab.Acquire(ctx, "a", 1) // left before the value was there
		time.Sleep(time.Hour)
		f.want(t, 1, 0)
		time.Sleep(20 * time.Minute)
		f.want(t, 1, 1)
	})
}

func TestValuesStayForEverWithoutIdleAfter(t *testing.T) {
	f := &factory{}
	in(t, f.config(), func(t *testing.T, tab *table) {
		use(t, tab, "a", 1)
		time.Sleep(10_000 * time.Hour)
		f.want(t, 1, 0)
	})
}

func TestShortIdleAfterIsFourMilliseconds(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.IdleAfter = 1
	in(t, cfg, func(t *testing.T, tab *table) {
		use(t, tab, "a", 1)
		time.Sleep(4*time.Millisecond - 1)
		f.want(t, 1, 0)
		time.Sleep(time.Millisecond + 1)
		f.want(t, 1, 1)
	})
}

func TestEachShowsCurrentValuesWithoutUsingThem(t *testing.T) {
	f := &factory{}
	cfg := f.config()
	cfg.IdleAfter = time.Hour
	in(t, cfg, func(t *testing.T, tab *table) {
		a, retired := acquire(t, tab, "a", 1), acquire(t, tab, "c", 1)
		use(t, tab, "b", 7)
		tab.Retire("c", 2)
		var got []string
		tab.Each(func(key string, generation int64, value *conn, leases int) {
			got = append(got, fmt.Sprint(key, generation, value.key, leases))
			tab.Retire(key, math.MaxInt64) // not under the lock
			synctest.Wait()
			if value.closed.Load() {
				t.Error("a value ended while it was looked at")
			}
		})
		slices.Sort(got)
		if want := []string{"a1a1", "b7b0"}; !slices.Equal(got, want) {
			t.Errorf("Each = %v, want %v", got, want)
		}
		a.Release()
		retired.Release()
		f.want(t, 3, 3)

		use(t, tab, "d", 1)
		use(t, tab, "e", 1)
		n := 0
		tab.Each(func(string, int64, *conn, int) { n++; tab.RetireAll(); synctest.Wait() })
		if n != 1 {
			t.Errorf("%d values shown, want the one that had not ended", n)
		}

		use(t, tab, "f", 1)
		for range 8 {
			time.Sleep(10 * time.Minute)
			tab.Each(func(string, int64, *conn, int) {})
		}
		f.want(t, 6, 6) // looking did not keep it alive
	})
}

func TestNewPanicsWithoutBuild(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	lease.New(lease.Config[string, *conn]{})
}

func TestTableWithoutCloseAndCut(t *testing.T) {
	f := &factory{}
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(lease.Config[string, *conn]{Build: f.build})
		l := acquire(t, tab, "a", 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if cut, err := tab.Close(ctx); !slices.Equal(cut, []string{"a"}) || err == nil {
			t.Errorf("Close = %v, %v", cut, err)
		}
		l.Release()
	})
}

func TestAcquireOfALiveValueAllocatesNothing(t *testing.T) {
	tab := lease.New(lease.Config[int64, int]{Build: func(context.Context, int64, int64) (int, error) { return 1, nil }})
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() {
		l, err := tab.Acquire(ctx, 1<<40, 1)
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if _, err := tab.Close(ctx); err != nil {
		t.Error(err)
	}
}

func benchmarkHit[K comparable](b *testing.B, keys []K, parallel bool) {
	tab := lease.New(lease.Config[K, int]{
		Build:     func(context.Context, K, int64) (int, error) { return 1, nil },
		IdleAfter: time.Second,
	})
	ctx := context.Background()
	hit := func(key K) {
		l, err := tab.Acquire(ctx, key, 1)
		if err != nil {
			b.Error(err)
		}
		l.Release()
	}
	for _, key := range keys {
		hit(key)
	}
	b.ReportAllocs()
	if parallel {
		var mu sync.Mutex
		next := 0
		b.RunParallel(func(pb *testing.PB) {
			mu.Lock()
			i := next
			next += len(keys) / 2
			mu.Unlock()
			for ; pb.Next(); i++ {
				hit(keys[i%len(keys)])
			}
		})
	} else {
		i := 0
		for b.Loop() {
			if i++; i == len(keys) {
				i = 0
			}
			hit(keys[i])
		}
	}
	if _, err := tab.Close(ctx); err != nil {
		b.Error(err)
	}
}

func BenchmarkHit(b *testing.B) {
	ids, names := make([]int64, 4096), make([]string, 4096)
	for i := range ids {
		ids[i], names[i] = int64(i)<<20, fmt.Sprintf("tenant-%d", i)
	}
	for _, parallel := range []bool{false, true} {
		name := map[bool]string{false: "serial", true: "parallel"}[parallel]
		b.Run(name+"/one_id", func(b *testing.B) { benchmarkHit(b, ids[:1], parallel) })
		b.Run(name+"/4096_ids", func(b *testing.B) { benchmarkHit(b, ids, parallel) })
		b.Run(name+"/4096_names", func(b *testing.B) { benchmarkHit(b, names, parallel) })
	}
}
