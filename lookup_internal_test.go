package tenancy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func mustLookup[K comparable, V any](t testing.TB, cfg lookupConfig, load loader[K, V]) *lookup[K, V] {
	t.Helper()
	l, err := newLookup(cfg, load)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// source is a primary of one table.
type source struct {
	mu    sync.Mutex
	rows  map[string]string
	loads atomic.Int64
}

func (s *source) set(key, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rows[key] = value
}

func (s *source) load(_ context.Context, key string) (string, bool, error) {
	s.loads.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	value, found := s.rows[key]
	return value, found, nil
}

// slowly is load whose answer takes a second to arrive.
func (s *source) slowly(ctx context.Context, key string) (string, bool, error) {
	value, found, err := s.load(ctx, key)
	time.Sleep(time.Second)
	return value, found, err
}

func (s *source) wantLoads(t *testing.T, want int64) {
	t.Helper()
	if n := s.loads.Load(); n != want {
		t.Errorf("%d loads, want %d", n, want)
	}
}

func wantLookup(t *testing.T, l *lookup[string, string], key, want string, wantFound bool) {
	t.Helper()
	if value, found, err := l.get(context.Background(), key); value != want || found != wantFound || err != nil {
		t.Errorf("get(%q) = %q, %v, %v, want %q, %v", key, value, found, err, want, wantFound)
	}
}

// smallLookup runs a test in a bubble, which fails it when a goroutine is left after close.
func smallLookup(t *testing.T, cfg lookupConfig, load loader[string, string], test func(t *testing.T, l *lookup[string, string])) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := mustLookup(t, cfg, load)
		defer l.close(context.Background())
		test(t, l)
	})
}

var small = lookupConfig{size: 10, negativeSize: 10, negativeTTL: 5 * time.Second, loadTimeout: 10 * time.Second}

func TestLookupFoundNeverExpiresAndMissingDoes(t *testing.T) {
	s := &source{rows: map[string]string{"a": "1"}}
	smallLookup(t, small, s.load, func(t *testing.T, l *lookup[string, string]) {
		wantLookup(t, l, "a", "1", true)
		wantLookup(t, l, "b", "", false)
		s.set("a", "2")
		s.set("b", "2")
		time.Sleep(5*time.Second - 1)
		wantLookup(t, l, "b", "", false)
		s.wantLoads(t, 2)
		time.Sleep(time.Nanosecond)
		wantLookup(t, l, "b", "2", true)
		s.wantLoads(t, 3)
		time.Sleep(10_000 * time.Hour)
		wantLookup(t, l, "a", "1", true)
		if value, ok := l.peek("b"); value != "2" || !ok {
			t.Errorf("peek = %q, %v", value, ok)
		}
		if _, ok := l.peek("unknown"); ok {
			t.Error("peek made something up")
		}
		s.wantLoads(t, 3)
		if got, want := l.stats(), (lookupStats{hits: 1, misses: 3, negativeHits: 1, loads: 3}); got != want {
			t.Errorf("stats = %+v, want %+v", got, want)
		}
	})
}

// peek looks at what is remembered as found, without a load.
func (l *lookup[K, V]) peek(key K) (V, bool) { return l.positives.Load().Peek(key) }

func TestLookupKeepsNothingMissingWhenToldSo(t *testing.T) {
	for _, cfg := range []lookupConfig{{size: 1, negativeSize: 5}, {size: 1, negativeTTL: time.Hour}} {
		s := &source{rows: map[string]string{}}
		smallLookup(t, cfg, s.load, func(t *testing.T, l *lookup[string, string]) {
			wantLookup(t, l, "a", "", false)
			wantLookup(t, l, "a", "", false)
			l.forget("a")
			l.forgetAll()
			s.wantLoads(t, 2)
		})
	}
}

func TestLookupOfAColdKeyByTenThousandIsOneLoad(t *testing.T) {
	for _, leaving := range []int{0, 200} { // 2 %
		s := &source{rows: map[string]string{"a": "1"}}
		load := func(ctx context.Context, key string) (string, bool, error) {
			value, found, err := s.slowly(ctx, key)
			return value, found, errors.Join(err, ctx.Err())
		}
		smallLookup(t, small, load, func(t *testing.T, l *lookup[string, string]) {
			var wg sync.WaitGroup
			var failures atomic.Int64
			for i := range 10_000 {
				wg.Go(func() {
					ctx, cancel := context.WithCancel(context.Background())
					defer cancel()
					if i < leaving { // the first of all among them
						time.AfterFunc(100*time.Millisecond, cancel)
					}
					value, found, err := l.get(ctx, "a")
					if i < leaving {
						if err != context.Canceled {
							t.Errorf("a leaving caller got %v", err)
						}
					} else if value != "1" || !found || err != nil {
						failures.Add(1)
					}
				})
				if i == 0 {
					synctest.Wait()
				}
			}
			wg.Wait()
			if n := failures.Load(); n != 0 {
				t.Errorf("%d innocent failures", n)
			}
			s.wantLoads(t, 1)
			if got := l.stats(); got.loads != 1 || got.misses != 10_000 {
				t.Errorf("stats = %+v", got)
			}
		})
	}
}

func TestLookupIsNotMovedByAFloodOfUnknownKeys(t *testing.T) {
	var loads atomic.Int64
	l := mustLookup(t, lookupConfig{size: 1000, negativeSize: 500, negativeTTL: time.Hour},
		func(_ context.Context, key uint64) (uint64, bool, error) {
			loads.Add(1)
			return key, key < 1000, nil
		})
	defer l.close(context.Background())
	known := func() {
		for key := range uint64(1000) {
			if value, found, err := l.get(t.Context(), key); value != key || !found || err != nil {
				t.Errorf("get(%d) = %d, %v, %v", key, value, found, err)
			}
		}
	}
	known()
	before := l.stats()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25_000 {
				if _, found, err := l.get(t.Context(), 1000+rand.Uint64N(1<<60)); found || err != nil {
					t.Errorf("unknown key: %v, %v", found, err)
				}
			}
		})
	}
	for range 20 {
		known()
	}
	wg.Wait()
	known()
	after := l.stats()
	if hits := after.hits - before.hits; hits != 21_000 {
		t.Errorf("%d hits of 21000", hits)
	}
	if p, n := l.positives.Load().Len(), l.negatives.Load().Len(); p != 1000 || n != 500 {
		t.Errorf("%d found and %d missing remembered", p, n)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.flights) != 0 || l.line.Len() != 0 || l.running != 0 {
		t.Errorf("left: %d flights, %d in line, %d running", len(l.flights), l.line.Len(), l.running)
	}
}

func TestLookupLoadThatBeganBeforeAForgetIsNotRemembered(t *testing.T) {
	for name, forget := range map[string]func(*lookup[string, string]){
		"forget":    func(l *lookup[string, string]) { l.forget("a"); l.forget("b") },
		"forgetAll": func(l *lookup[string, string]) { l.forgetAll() },
	} {
		t.Run(name, func(t *testing.T) {
			s := &source{rows: map[string]string{"a": "old"}}
			smallLookup(t, small, s.slowly, func(t *testing.T, l *lookup[string, string]) {
				var wg sync.WaitGroup
				wg.Go(func() { wantLookup(t, l, "a", "old", true) })
				wg.Go(func() { wantLookup(t, l, "b", "", false) })
				time.Sleep(500 * time.Millisecond)
				s.set("a", "new")
				s.set("b", "new")
				forget(l)
				wg.Go(func() { wantLookup(t, l, "a", "new", true) })
				wg.Go(func() { wantLookup(t, l, "b", "new", true) })
				time.Sleep(750 * time.Millisecond) // the old loads have ended, the new ones have not
				if _, ok := l.peek("a"); ok {
					t.Error("the overtaken load was remembered")
				}
				wantLookup(t, l, "b", "new", true) // shares the new load
				wg.Wait()
				wantLookup(t, l, "a", "new", true)
				s.wantLoads(t, 4)
			})
		})
	}
}

func TestLookupForgets(t *testing.T) {
	s := &source{rows: map[string]string{"a": "1", "b": "1"}}
	smallLookup(t, small, s.load, func(t *testing.T, l *lookup[string, string]) {
		all := func(want int64) {
			t.Helper()
			for _, key := range []string{"a", "b"} {
				wantLookup(t, l, key, "1", true)
			}
			for _, key := range []string{"x", "y"} {
				wantLookup(t, l, key, "", false)
			}
			s.wantLoads(t, want)
		}
		all(4)
		l.forget("a")
		l.forget("x")
		all(6)
		l.forgetAll()
		all(10)
		all(10)
	})
}

func TestLookupErrorsAreNotRemembered(t *testing.T) {
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		fail func() error
		is   func(error) bool
	}{
		"error":          {func() error { return broken }, func(err error) bool { return err == broken }},
		"panic_of_error": {func() error { panic(broken) }, func(err error) bool { return errors.Is(err, broken) }},
		"goexit":         {func() error { runtime.Goexit(); return nil }, func(err error) bool { return err != nil }},
		"panic": {func() error { panic("ouch") }, func(err error) bool {
			p, ok := errors.AsType[*loadPanic](err)
			return ok && strings.Contains(string(p.stack), "lookup_internal_test") &&
				strings.Contains(err.Error(), "ouch") && !strings.Contains(err.Error(), "goroutine")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			fails := true
			cfg := small
			cfg.parallel = 1 // a permit must survive a failure
			load := func(context.Context, string) (string, bool, error) {
				time.Sleep(time.Second)
				if fails {
					return "rubbish", true, tc.fail()
				}
				return "1", true, nil
			}
			smallLookup(t, cfg, load, func(t *testing.T, l *lookup[string, string]) {
				var wg sync.WaitGroup
				for i := range 10 {
					wg.Go(func() {
						if value, found, err := l.get(t.Context(), fmt.Sprint(i%2)); value != "" || found || !tc.is(err) {
							t.Errorf("get = %q, %v, %v", value, found, err)
						}
					})
				}
				wg.Wait()
				fails = false
				wantLookup(t, l, "0", "1", true)
				if got := l.stats(); got.loads != 3 || got.loadErrors != 2 {
					t.Errorf("stats = %+v", got)
				}
			})
		})
	}
}

func TestLookupLoadSeesNothingOfItsCaller(t *testing.T) {
	type secret struct{}
	load := func(ctx context.Context, _ string) (string, bool, error) {
		if ctx.Value(secret{}) != nil {
			t.Error("a value of the caller reached the load")
		}
		<-ctx.Done()
		return "", false, ctx.Err()
	}
	smallLookup(t, small, load, func(t *testing.T, l *lookup[string, string]) {
		start := time.Now()
		if _, _, err := l.get(context.WithValue(t.Context(), secret{}, 1), "a"); err != context.DeadlineExceeded {
			t.Errorf("error %v", err)
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("load ended after %v, want loadTimeout", d)
		}
	})
}

func TestLookupKeepsTheResultOfALoadWhoseCallerLeft(t *testing.T) {
	s := &source{rows: map[string]string{"a": "1"}}
	smallLookup(t, small, s.slowly, func(t *testing.T, l *lookup[string, string]) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, _, err := l.get(ctx, "a"); err != context.DeadlineExceeded {
			t.Errorf("error %v", err)
		}
		time.Sleep(2 * time.Second)
		if value, found, err := l.get(ctx, "a"); value != "1" || !found || err != nil {
			t.Errorf("what is known, cancelled ctx: %q, %v, %v", value, found, err)
		}
		if _, _, err := l.get(ctx, "b"); err != context.DeadlineExceeded {
			t.Errorf("what is not known, cancelled ctx: %v", err)
		}
		s.wantLoads(t, 1)
	})
}

func TestLookupBoundsLoadsAtOnceAndTheLine(t *testing.T) {
	for want, parallel := range map[int64]int{3: 3, 64: 0} {
		var now, peak, total atomic.Int64
		cfg := lookupConfig{size: 1000, parallel: parallel, loadTimeout: 2 * time.Minute}
		load := func(ctx context.Context, key string) (string, bool, error) {
			peak.Store(max(peak.Load(), now.Add(1)))
			defer now.Add(-1)
			total.Add(1)
			time.Sleep(time.Second)
			return key, true, ctx.Err()
		}
		smallLookup(t, cfg, load, func(t *testing.T, l *lookup[string, string]) {
			var wg sync.WaitGroup
			for i := range 192 {
				wg.Go(func() { wantLookup(t, l, fmt.Sprint(i), fmt.Sprint(i), true) })
			}
			synctest.Wait()
			for i := range 100 { // these give up in the line, and are never loaded
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
					defer cancel()
					if _, _, err := l.get(ctx, fmt.Sprint("gone", i/2)); err != context.DeadlineExceeded {
						t.Errorf("error %v", err)
					}
				})
			}
			time.Sleep(2 * time.Millisecond)
			l.mu.Lock()
			if n := int64(l.line.Len()); n != 192-want {
				t.Errorf("%d in line, want %d", n, 192-want)
			}
			l.mu.Unlock()
			start := time.Now()
			wg.Wait()
			if peak.Load() != want || total.Load() != 192 {
				t.Errorf("%d at once, %d in all, want %d and 192", peak.Load(), total.Load(), want)
			}
			if d := time.Since(start).Round(time.Second); d != time.Duration(192/want)*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

// TestLookupCountsTheLineToTheTimeout: whoever stands behind loads that hang is told so as soon as who waits for them.
func TestLookupCountsTheLineToTheTimeout(t *testing.T) {
	cfg := lookupConfig{size: 1000, parallel: 3, loadTimeout: 2 * time.Second}
	hang := func(ctx context.Context, key string) (string, bool, error) {
		<-ctx.Done()
		return "", false, ctx.Err()
	}
	smallLookup(t, cfg, hang, func(t *testing.T, l *lookup[string, string]) {
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 192 {
			wg.Go(func() {
				if _, _, err := l.get(context.Background(), fmt.Sprint(i)); err != context.DeadlineExceeded {
					t.Errorf("error %v", err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("took %v, want 2s", d)
		}
	})
}

// A load that waits for its permit has read nothing yet: forgetting its key does not cost a second one.
func TestLookupForgetLeavesTheLineAlone(t *testing.T) {
	for name, forget := range map[string]func(*lookup[string, string]){
		"forget":    func(l *lookup[string, string]) { l.forget("a") },
		"forgetAll": func(l *lookup[string, string]) { l.forgetAll() },
	} {
		t.Run(name, func(t *testing.T) {
			s := &source{rows: map[string]string{"a": "old", "first": "1"}}
			cfg := small
			cfg.parallel = 1
			smallLookup(t, cfg, s.slowly, func(t *testing.T, l *lookup[string, string]) {
				var wg sync.WaitGroup
				wg.Go(func() { wantLookup(t, l, "first", "1", true) })
				synctest.Wait()
				wg.Go(func() { wantLookup(t, l, "a", "new", true) })
				synctest.Wait()
				s.set("a", "new")
				forget(l)
				wg.Go(func() { wantLookup(t, l, "a", "new", true) })
				wg.Wait()
				wantLookup(t, l, "a", "new", true)
				s.wantLoads(t, 2)
			})
		})
	}
}

func TestLookupGetWithUsesTheLoadOfTheFirstCaller(t *testing.T) {
	smallLookup(t, small, nil, func(t *testing.T, l *lookup[string, string]) {
		var wg sync.WaitGroup
		for _, answer := range []string{"first", "second"} {
			wg.Go(func() {
				value, found, err := l.getWith(t.Context(), "a", func(context.Context, string) (string, bool, error) {
					time.Sleep(time.Second)
					return answer, true, nil
				})
				if value != "first" || !found || err != nil {
					t.Errorf("getWith = %q, %v, %v", value, found, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
	})
}

func TestLookupCloseWaitsForLoadsAndFailsEverybody(t *testing.T) {
	ended := 0
	cfg := small
	cfg.parallel = 1
	load := func(ctx context.Context, key string) (string, bool, error) {
		if key == "known" {
			return "1", true, nil
		}
		<-ctx.Done()
		time.Sleep(3 * time.Second)
		ended++
		return "", false, ctx.Err()
	}
	smallLookup(t, cfg, load, func(t *testing.T, l *lookup[string, string]) {
		wantLookup(t, l, "known", "1", true)
		var wg sync.WaitGroup
		for _, key := range []string{"loading", "loading", "in line", "in line"} {
			wg.Go(func() {
				if _, _, err := l.get(t.Context(), key); err != ErrClosed {
					t.Errorf("waiter of %s: %v", key, err)
				}
			})
			synctest.Wait()
		}
		start := time.Now()
		for range 2 {
			wg.Go(func() {
				l.close(context.Background())
				if d := time.Since(start); d != 3*time.Second {
					t.Errorf("close took %v", d)
				}
			})
		}
		wg.Wait()
		if ended != 1 {
			t.Errorf("%d loads ended, want the one that had begun", ended)
		}
		for _, key := range []string{"known", "loading", "other"} {
			if _, _, err := l.get(t.Context(), key); err != ErrClosed {
				t.Errorf("get(%s) after close: %v", key, err)
			}
		}
		if _, ok := l.peek("known"); ok {
			t.Error("peek after close")
		}
		l.forget("known")
		l.forgetAll()
	})
}

func TestLookupRefusesImpossibleBounds(t *testing.T) {
	for field, cfg := range map[string]lookupConfig{
		"look-up size":           {},
		"look-up negative size":  {size: 1, negativeSize: -1},
		"look-up negative TTL":   {size: 1, negativeTTL: -1},
		"look-up load timeout":   {size: 1, loadTimeout: -1},
		"look-up parallel loads": {size: 1, parallel: -1},
	} {
		if _, err := newLookup[int, int](cfg, nil); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: error %v", field, err)
		}
	}
}

// Writers change a row and then forget it, as the feed does. Whoever asks after that must never get an
// older row, whatever loads are under way.
func TestLookupStressNeverGivesWhatWasForgottenBefore(t *testing.T) {
	var rows, forgotten [8]atomic.Int64
	l := mustLookup(t, lookupConfig{size: 4, negativeSize: 4, negativeTTL: time.Hour, parallel: 4},
		func(_ context.Context, key int) (int64, bool, error) {
			n := rows[key].Load()
			for range rand.IntN(20) {
				runtime.Gosched()
			}
			return n, n%3 != 0, nil // every third version is a missing row
		})
	defer l.close(context.Background())
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for range 3000 {
				key := rand.IntN(4)*2 + w // one writer per row
				n := rows[key].Add(1)
				switch {
				case rand.IntN(4) == 0:
					l.forgetAll()
				default:
					l.forget(key)
				}
				forgotten[key].Store(n)
				runtime.Gosched()
			}
		})
	}
	for range 16 {
		wg.Go(func() {
			for range 5000 {
				key := rand.IntN(8)
				atLeast := forgotten[key].Load()
				ctx, cancel := context.Background(), context.CancelFunc(func() {})
				if rand.IntN(20) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Microsecond)
				}
				n, found, err := l.get(ctx, key)
				cancel()
				switch {
				case err != nil && !errors.Is(err, ctx.Err()):
					t.Errorf("get: %v", err)
				case err == nil && found && n < atLeast:
					t.Errorf("version %d given after %d was announced", n, atLeast)
				}
			}
		})
	}
	wg.Wait()
	for key := range rows { // at rest the cache and the rows agree
		want := rows[key].Load()
		for range 2 {
			n, found, err := l.get(t.Context(), key)
			if err != nil || found != (want%3 != 0) || found && n != want {
				t.Errorf("row %d: %d, %v, %v, want %d", key, n, found, err, want)
			}
		}
	}
}

func TestLookupHitAllocatesNothing(t *testing.T) {
	l := mustLookup(t, small, (&source{rows: map[string]string{"a": "1"}}).load)
	defer l.close(context.Background())
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() { _, _, _ = l.get(ctx, "a") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkLookupHit(b *testing.B) {
	l := mustLookup(b, lookupConfig{size: 4096}, func(_ context.Context, key int64) (int64, bool, error) { return key, true, nil })
	defer l.close(context.Background())
	ctx := context.Background()
	for key := range int64(4096) {
		_, _, _ = l.get(ctx, key)
	}
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		key := int64(0)
		for b.Loop() {
			key = (key + 1) & 4095
			if _, found, _ := l.get(ctx, key); !found {
				b.Fatal("miss")
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for key := rand.Int64(); pb.Next(); key++ {
				if _, found, _ := l.get(ctx, key&4095); !found {
					b.Error("miss")
				}
			}
		})
	})
}

func TestLookupReloadKeepsWhatIsKnownUntilItKnowsBetter(t *testing.T) {
	s := &source{rows: map[string]string{"a": "old"}}
	var down atomic.Bool
	load := func(ctx context.Context, key string) (string, bool, error) {
		value, found, err := s.slowly(ctx, key)
		if down.Load() {
			return "", false, errors.New("down")
		}
		return value, found, err
	}
	smallLookup(t, small, load, func(t *testing.T, l *lookup[string, string]) {
		wantLookup(t, l, "a", "old", true)
		s.set("a", "new")
		done := l.reload("a", load)
		wantLookup(t, l, "a", "old", true)
		if l.reloading("a") != done {
			t.Error("who comes meanwhile does not wait for the same load")
		}
		<-done
		wantLookup(t, l, "a", "new", true)
		<-l.reloading("a")
		s.wantLoads(t, 2)

		down.Store(true)
		<-l.reload("a", load)
		wantLookup(t, l, "a", "new", true)
		down.Store(false)
		s.wantLoads(t, 3)

		// A load that began before is not the one that is wanted.
		l.forget("a")
		go l.get(t.Context(), "a")
		synctest.Wait()
		s.set("a", "newer")
		<-l.reload("a", load)
		wantLookup(t, l, "a", "newer", true)

		s.mu.Lock()
		delete(s.rows, "a")
		s.mu.Unlock()
		<-l.reload("a", load)
		wantLookup(t, l, "a", "", false)
		s.wantLoads(t, 6)
	})
	l := mustLookup(t, small, load)
	l.close(t.Context())
	<-l.reload("a", load)
}
