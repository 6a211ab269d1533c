package tenancy_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// What many callers at once cost the primary, and what they cost each other. By default a stated part runs; TENANCY_LONG=1 runs the whole.
//
// Questions are counted on the wire, by a proxy that reads the protocol: it is the same from PostgreSQL 14 to 18, exact at
// once, and tells the keys. The statistics views are neither: other backends report to them when they like, and a
// small table is scanned by its index or not as the planner likes.

// TestMissesOfOneUserAreOneQueryAtThePrimary holds the query at the wire until all callers have missed.
func TestMissesOfOneUserAreOneQueryAtThePrimary(t *testing.T) {
	t.Parallel()
	w, tn := floodedNode(t, 1, tenancy.Config{})
	const callers = 1000
	release := w.hold("user")
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() { wantServed(t, tn, "known-1") })
	}
	untilTrue(t, "every caller has missed", func() bool { return tenancy.UserMisses(tn) == callers })
	release()
	wg.Wait()
	if users, tenants := w.asked("user"), w.asked("tenant"); users != 1 || tenants != 1 {
		t.Errorf("%d callers were %d queries for the user and %d for the tenant, want 1 and 1", callers, users, tenants)
	}
}

// TestMissesOfManyUsersAreOneQueryEach: and no more of them at once than Limits.PrimaryConns, here fewer than pgx would open.
func TestMissesOfManyUsersAreOneQueryEach(t *testing.T) {
	t.Parallel()
	const users, conns = 1000, 3
	w, tn := floodedNode(t, users, tenancy.Config{Limits: tenancy.Limits{PrimaryConns: conns}})
	release := w.hold("user")
	var wg sync.WaitGroup
	for i := range 3 * users {
		wg.Go(func() { wantServed(t, tn, known(i%users)) })
	}
	untilTrue(t, "every caller has missed", func() bool { return tenancy.UserMisses(tn) == 3*users })
	release()
	wg.Wait()
	if total, most := w.asked("user"), w.most("user"); total != users || most != 1 {
		t.Errorf("%d users were %d queries, and one of them %d", users, total, most)
	}
	if peak := w.peakOf("user"); peak > conns {
		t.Errorf("%d queries at once, want at most %d", peak, conns)
	}
}

// TestWhoLeavesASharedMissHurtsNobody: 2 % of the callers give up while the query is under way, who began it among them.
func TestWhoLeavesASharedMissHurtsNobody(t *testing.T) {
	t.Parallel()
	w, tn := floodedNode(t, 1, tenancy.Config{})
	const callers, leaving = 10_000, 200
	release := w.hold("user")
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var stayed, left sync.WaitGroup
	var innocent atomic.Int64
	call := func(i int) {
		if i < leaving {
			left.Go(func() {
				if _, err := tn.Resolve(ctx, tenancy.Query{User: "known-1"}); !errors.Is(err, context.Canceled) {
					t.Errorf("a caller who left: %v", err)
				}
			})
			return
		}
		stayed.Go(func() {
			if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "known-1"}); err != nil {
				innocent.Add(1)
			}
		})
	}
	call(0)
	untilTrue(t, "the first caller's query is at the wire", func() bool { return w.asked("user") == 1 })
	for i := 1; i < callers; i++ {
		call(i)
	}
	untilTrue(t, "every caller has missed", func() bool { return tenancy.UserMisses(tn) == callers })
	leave()
	left.Wait() // nobody has been answered yet: they did not wait for it
	release()
	stayed.Wait()
	if n := innocent.Load(); n != 0 {
		t.Errorf("%d of %d who stayed failed", n, callers-leaving)
	}
	if n := w.asked("user"); n != 1 {
		t.Errorf("%d queries, want 1", n)
	}
}

// TestAFloodOfUnknownKeysMovesNoKnownOne: made-up users, names and domains, each of them new, while known ones go on. Not parallel: it
// looks at the heap of the process.
func TestAFloodOfUnknownKeysMovesNoKnownOne(t *testing.T) {
	flood := 50_000
	if os.Getenv("TENANCY_LONG") == "1" {
		flood = 1_000_000
	}
	// As many are remembered as are known: one unknown key among them would push out a known one.
	const users = 1000
	w, tn := floodedNode(t, users, tenancy.Config{Lookups: tenancy.LookupConfig{Size: users}})
	for _, tt := range []struct {
		kind    string
		n       int
		every   int // unknown keys to a known one
		known   func(i int) tenancy.Query
		unknown func(i int) tenancy.Query
		refused error
	}{
		{"user", flood * 8 / 10, 1,
			func(i int) tenancy.Query { return tenancy.Query{User: known(i % users)} },
			func(i int) tenancy.Query { return tenancy.Query{User: tenancy.UserKey(madeUp(i) + "@flood.test")} },
			tenancy.ErrForbidden},
		{"name", flood / 10, 2 * users, // there are two names: each must have the time to be pushed out
			func(i int) tenancy.Query {
				return atPlace(tenancy.ByName, []string{"acme", "globex"}[i%2])
			},
			func(i int) tenancy.Query { return atPlace(tenancy.ByName, madeUp(i)) },
			tenancy.ErrTenantNotFound},
		{"domain", flood / 10, 2 * users,
			func(i int) tenancy.Query {
				return atPlace(tenancy.ByDomain, []string{"acme.example.com", "globex.example.com"}[i%2])
			},
			func(i int) tenancy.Query { return atPlace(tenancy.ByDomain, madeUp(i)+".example.com") },
			tenancy.ErrTenantNotFound},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			var calls atomic.Int64
			askKnown := func() {
				if _, err := tn.Resolve(t.Context(), tt.known(int(calls.Add(1)))); err != nil {
					t.Error(err)
				}
			}
			// phase returns the hit rate of the known, in percent: what did not become a query.
			phase := func(run func()) float64 {
				asked, before := w.askedKnown(tt.kind), calls.Load()
				run()
				return 100 * (1 - float64(w.askedKnown(tt.kind)-asked)/float64(calls.Load()-before))
			}
			quiet := func() {
				for range 2 * users {
					askKnown()
				}
			}
			quiet() // warm
			before, heapBefore := phase(quiet), heap()
			asked, began := w.asked(tt.kind)-w.askedKnown(tt.kind), time.Now()
			var next atomic.Int64
			var heapDuring float64
			during := phase(func() {
				var wg sync.WaitGroup
				for range 16 {
					wg.Go(func() {
						for i := int(next.Add(1)); i <= tt.n && !t.Failed(); i = int(next.Add(1)) {
							if _, err := tn.Resolve(t.Context(), tt.unknown(i)); !errors.Is(err, tt.refused) {
								t.Errorf("an unknown key: %v, want %v", err, tt.refused)
							}
							if i%tt.every == 0 {
								askKnown()
							}
							if i == tt.n/2 {
								heapDuring = heap()
							}
						}
					})
				}
				wg.Wait()
			})
			took := time.Since(began)
			after, heapAfter := phase(quiet), heap()
			t.Logf("%d unknown keys in %v (%.0f/s); hit rate of known ones before, during, after: %.3f %.3f %.3f %%; heap: %.1f %.1f %.1f MB",
				tt.n, took.Round(time.Millisecond), float64(tt.n)/took.Seconds(), before, during, after, heapBefore, heapDuring, heapAfter)
			if before != 100 || during != 100 || after != 100 {
				t.Errorf("hit rate of the known before, during and after: %v, %v, %v %%, want 100", before, during, after)
			}
			if n := w.asked(tt.kind) - w.askedKnown(tt.kind) - asked; n != tt.n {
				t.Errorf("%d unknown keys were %d queries", tt.n, n)
			}
			if grown := heapAfter - heapBefore; grown > 5 {
				t.Errorf("the heap has grown by %.1f MB", grown)
			}
		})
	}
}

// TestAnUnknownKeyIsOneQueryInItsTTL, however many ask.
func TestAnUnknownKeyIsOneQueryInItsTTL(t *testing.T) {
	t.Parallel()
	const ttl = time.Second
	w, tn := floodedNode(t, 1, tenancy.Config{Lookups: tenancy.LookupConfig{NegativeTTL: ttl}})
	queries := map[string]tenancy.Query{"user": {User: "nobody"}, "name": atPlace(tenancy.ByName, "nowhere"), "domain": atPlace(tenancy.ByDomain, "nowhere.example.com"),
		"tenant": atPlace(tenancy.ByID, "4711")}
	ask := func() {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 250 {
					for kind, q := range queries {
						if _, err := tn.Resolve(t.Context(), q); !errors.Is(err, tenancy.ErrForbidden) && !errors.Is(err, tenancy.ErrTenantNotFound) {
							t.Errorf("%s: %v", kind, err)
						}
					}
				}
			})
		}
		wg.Wait()
	}
	began := time.Now()
	ask()
	allowed := 1 + int(time.Since(began)/ttl) // 1, unless this machine stood still
	for kind := range queries {
		if n := w.asked(kind); n < 1 || n > allowed {
			t.Errorf("2000 callers of one unknown %s were %d queries, want %d", kind, n, allowed)
		}
	}
	time.Sleep(ttl) // real time: PostgreSQL has no other
	before := map[string]int{}
	for kind := range queries {
		before[kind] = w.asked(kind)
	}
	began = time.Now()
	ask()
	allowed = 1 + int(time.Since(began)/ttl)
	for kind := range queries {
		if n := w.asked(kind) - before[kind]; n < 1 || n > allowed {
			t.Errorf("after its TTL an unknown %s was %d queries, want %d", kind, n, allowed)
		}
	}
}

// TestWhatAUserMakesUpCostsTheRequestNoQuery: look-ups are held at the wire, and nobody waits for them.
func TestWhatAUserMakesUpCostsTheRequestNoQuery(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		kind string
		hint func(i int) tenancy.Hint
	}{
		{"name", func(i int) tenancy.Hint {
			return tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: madeUp(i)}
		}},
		{"tenant", func(i int) tenancy.Hint {
			return tenancy.Hint{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByID, Value: fmt.Sprint(1_000_000 + i)}
		}},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			t.Parallel()
			w, tn := floodedNode(t, 1, tenancy.Config{})
			wantServed(t, tn, "known-1")
			before := w.asked("")
			release := w.hold(tt.kind)
			const requests = 20_000
			for i := range requests {
				if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "known-1", Hints: []tenancy.Hint{tt.hint(i)}}); !errors.Is(err, tenancy.ErrForbidden) {
					t.Fatal(err)
				}
			}
			untilTrue(t, "the first one is looked up behind the requests", func() bool { return w.asked("") > before })
			if n := w.asked("") - before; n != 1 {
				t.Errorf("%d look-ups behind the requests at once, want 1", n)
			}
			release()
			if err := tn.Close(); err != nil { // looks into what the queue holds
				t.Fatal(err)
			}
			if n, peak := w.asked("")-before, w.peakOf(tt.kind); n > requests/10 || peak != 1 {
				t.Errorf("%d requests were %d look-ups, %d at once; want what the queue holds, one at a time", requests, n, peak)
			}
		})
	}
}

// TestARemovedUserIsRefusedWithinTwoSeconds, by other processes, whether they hear notifications or not. Not parallel: it is about
// time, and a process is told its ListenURL by the environment.
func TestARemovedUserIsRefusedWithinTwoSeconds(t *testing.T) {
	removals := 20
	if os.Getenv("TENANCY_LONG") == "1" {
		removals = 200
	}
	f, tn, acme := floodedFleet(t, removals)
	ways := []struct {
		name string
		cut  func(w *wire)
	}{
		{"notified", func(*wire) {}},
		{"connection refused", (*wire).cut},
		{"notifications lost", (*wire).deafen}, // and the process does not know: its pings are answered
	}
	var ask []func(i int) string
	for _, way := range ways {
		w := startWire(t, f.PrimaryURL)
		t.Setenv("TENANCY_LISTEN_URL", w.url)
		other := startNode(t, f)
		way.cut(w)
		ask = append(ask, func(i int) string { return other.ask("resolve", string(known(i))) })
	}
	for n, took := range removeAll(t, removals, func(i int) error { return tn.Catalog().RemoveMember(t.Context(), acme, known(i)) }, ask...) {
		wantWithin(t, ways[n].name, 2*time.Second, took)
	}
}

// removeAll removes n users one after the other, at moments that hit the poll at every point of its period, and asks every node for them
// until it refuses them. A time is from the beginning of the removal to the first refusal.
func removeAll(t *testing.T, n int, remove func(i int) error, nodes ...func(i int) string) [][]time.Duration {
	t.Helper()
	for _, ask := range nodes {
		for i := range n {
			if got := ask(i); got != "acme" {
				t.Fatalf("before the removal: %q", got)
			}
		}
	}
	base := time.Now()
	began := make([]atomic.Int64, n) // after base; 0: not yet
	took := make([][]time.Duration, len(nodes))
	var wg sync.WaitGroup
	for node, ask := range nodes {
		took[node] = make([]time.Duration, n)
		wg.Go(func() { awaitRefusals(t, base, began, took[node], ask) })
	}
	for i := 0; i < n && !t.Failed(); i++ {
		began[i].Store(int64(time.Since(base)))
		if err := remove(i); err != nil {
			t.Error(err)
		}
		time.Sleep(rand.N(100 * time.Millisecond))
	}
	wg.Wait()
	return took
}

func awaitRefusals(t *testing.T, base time.Time, began []atomic.Int64, took []time.Duration, ask func(i int) string) {
	for open := len(took); open > 0 && !t.Failed(); time.Sleep(200 * time.Microsecond) {
		for i := range took {
			at := time.Duration(began[i].Load())
			if at == 0 || took[i] != 0 {
				continue
			}
			got, since := ask(i), time.Since(base)-at
			switch {
			case got == refused(tenancy.ErrForbidden):
				took[i] = since
				open--
			case got != "acme" || since > 10*time.Second:
				t.Errorf("a removed user, after %v: %q", since, got)
				return
			}
		}
	}
}

// wantWithin checks the slowest, and tells the others.
func wantWithin(t *testing.T, what string, limit time.Duration, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	n := len(took)
	p99 := took[(n*99+99)/100-1] // the 198th of 200
	t.Logf("%s: %d removals, refused after: p50 %v, p99 %v, slowest %v", what, n, took[n/2].Round(10*time.Microsecond), p99.Round(10*time.Microsecond), took[n-1].Round(10*time.Microsecond))
	if took[n-1] > limit {
		t.Errorf("%s: the slowest took %v, promised are %v", what, took[n-1], limit)
	}
}

// TestARemovedUserIsRefusedInAFlood: the feed reads the changes over the connections that a flood of unknown users wants too. Not parallel: it
// is about time.
func TestARemovedUserIsRefusedInAFlood(t *testing.T) {
	const removals = 20
	f, tn, acme := floodedFleet(t, removals)
	w, flooded := watchedNode(t, f, tenancy.Config{})
	w.deafen() // the poll alone
	var flood sync.WaitGroup
	defer flood.Wait()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var unknown atomic.Int64
	for range 128 { // twice as many as may be loaded at once
		flood.Go(func() {
			for ctx.Err() == nil {
				_, err := flooded.Resolve(ctx, tenancy.Query{User: tenancy.UserKey(madeUp(int(unknown.Add(1))))})
				if !errors.Is(err, tenancy.ErrForbidden) && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	took := removeAll(t, removals, func(i int) error { return tn.Catalog().RemoveMember(t.Context(), acme, known(i)) }, func(i int) string {
		if _, err := flooded.Resolve(t.Context(), tenancy.Query{User: known(i)}); err != nil {
			return refused(errors.New(class(err)))
		}
		return "acme"
	})
	wantWithin(t, "flooded", 2*time.Second, took[0])
	t.Log("unknown users meanwhile:", unknown.Load())
}

// TestAnOutageIsNoFloodOfItsOwn: while the primary is away, crowds of unknown callers pile nothing up and are never told that they do
// not exist, and known ones do not notice them. Not parallel: it counts the goroutines of the process.
func TestAnOutageIsNoFloodOfItsOwn(t *testing.T) {
	const knownUsers = 100
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		away    func(w *wire)
		within  time.Duration // for each unknown caller
	}{
		{"connection_refused", 5 * time.Second, (*wire).cut, 5 * time.Second},
		{"silent", 100 * time.Millisecond, (*wire).silence, time.Minute}, // those in the line wait for those before them
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, tn := floodedNode(t, knownUsers, tenancy.Config{Lookups: tenancy.LookupConfig{Timeout: tt.timeout}})
			place := atPlace(tenancy.ByDomain, "acme.example.com")
			for i := range knownUsers {
				wantServed(t, tn, known(i))
			}
			if _, err := tn.Resolve(t.Context(), place); err != nil {
				t.Fatal(err)
			}
			tt.away(w)
			defer w.mend()
			before := runtime.NumGoroutine()
			peak, calls := 0, 0
			for wave, patience := range []time.Duration{time.Minute, 20 * time.Millisecond, 20 * time.Millisecond} {
				c := startCrowd(t, tn, wave, patience, tt.within)
				for ; c.left.Load() > 0; calls++ {
					// With an ended context whoever had to wait for anything would fail.
					ended, end := context.WithCancel(t.Context())
					end()
					for _, q := range []tenancy.Query{{User: known(calls % knownUsers)}, place} {
						if _, err := tn.Resolve(ended, q); err != nil {
							t.Errorf("a known caller during the outage: %v", err)
						}
					}
					callers := int(c.left.Load()) // first: those who are answered in between must not count as the library's
					peak = max(peak, runtime.NumGoroutine()-callers-before)
					time.Sleep(100 * time.Microsecond)
				}
				c.wait()
				t.Logf("crowd %d: the slowest was answered after %v", wave, time.Duration(c.slowest.Load()).Round(time.Millisecond))
			}
			t.Logf("%d calls of known users; %d goroutines more than before, the callers apart", calls, peak)
			// 64 loads at once of each of three kinds, and what pgx and the wire have for eight connections.
			if bound := 3*64 + 8*32; peak > bound {
				t.Errorf("%d goroutines, want at most %d", peak, bound)
			}
			untilTrue(t, "no look-up goes on without its callers", func() bool { return !strings.Contains(stacks(), "tenancy.(*lookup[") })
			w.mend()
			until(t, 20*time.Second, refused(tenancy.ErrForbidden), func() string {
				_, err := tn.Resolve(t.Context(), tenancy.Query{User: "unknown"})
				return refused(errors.New(class(err)))
			})
			wantServed(t, tn, "known-1")
		})
	}
}

// crowd is a thousand unknown callers at once.
type crowd struct {
	left, slowest atomic.Int64
	wait          func()
}

func startCrowd(t *testing.T, tn *tenancy.Tenancy, wave int, patience, within time.Duration) *crowd {
	ctx, leave := context.WithTimeout(t.Context(), patience)
	c := &crowd{}
	var wg sync.WaitGroup
	c.wait = func() { wg.Wait(); leave() }
	const callers = 1000
	c.left.Store(callers)
	for i := range callers {
		wg.Go(func() {
			defer c.left.Add(-1)
			name := fmt.Sprintf("unknown-%d-%d", wave, i)
			q := tenancy.Query{User: tenancy.UserKey(name)}
			switch i % 10 {
			case 8:
				q = atPlace(tenancy.ByName, name)
			case 9:
				q = atPlace(tenancy.ByDomain, name+".example.com")
			}
			began := time.Now()
			_, err := tn.Resolve(ctx, q)
			took := time.Since(began)
			for s := c.slowest.Load(); int64(took) > s && !c.slowest.CompareAndSwap(s, int64(took)); s = c.slowest.Load() {
			}
			switch {
			case ctx.Err() != nil && errors.Is(err, ctx.Err()):
			case !errors.Is(err, tenancy.ErrPrimaryUnavailable):
				t.Errorf("an unknown caller during an outage: %v, want ErrPrimaryUnavailable", err)
			case took > within:
				t.Errorf("an unknown caller was answered after %v", took)
			}
		})
	}
	return c
}

// stacks returns those of all goroutines.
func stacks() string {
	buf := make([]byte, 8<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// atPlace is an anonymous caller.
func atPlace(by tenancy.By, value string) tenancy.Query {
	return tenancy.Query{Hints: []tenancy.Hint{{Source: "test", Trust: tenancy.Place, By: by, Value: value}}}
}

func known(i int) tenancy.UserKey { return tenancy.UserKey(fmt.Sprint("known-", i)) }

// madeUp is a tenant's name that nobody has, another one for each i and each call.
func madeUp(i int) string { return fmt.Sprintf("n%d-%012x", i, rand.Uint64N(1<<48)) }

// heap returns the megabytes in use.
func heap() float64 {
	runtime.GC()
	runtime.GC() // the first one may have been under way
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

func wantServed(t *testing.T, tn *tenancy.Tenancy, user tenancy.UserKey) {
	t.Helper()
	if _, err := tn.Resolve(t.Context(), tenancy.Query{User: user}); err != nil {
		t.Errorf("%s: %v", user, err)
	}
}

func untilTrue(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not in 20 s: " + what)
		}
	}
}

// floodedFleet has two tenants, with a domain each. known-0 and so on are members of the first one.
func floodedFleet(t *testing.T, users int) (*tenancytest.Fleet, *tenancy.Tenancy, tenancy.ID) {
	t.Helper()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	must(t, f.Admin(t, "primary"), `INSERT INTO tenancy.memberships (user_key, tenant, role, is_default) SELECT 'known-' || n, $1, 'member', true FROM generate_series(0, $2) n`, acme.ID, users)
	return f, tn, acme.ID
}

// floodedNode is a node of such a fleet whose way to the primary is watched. No other node is up.
func floodedNode(t *testing.T, users int, cfg tenancy.Config) (*wire, *tenancy.Tenancy) {
	t.Helper()
	f, setup, _ := floodedFleet(t, users)
	if err := setup.Close(); err != nil {
		t.Fatal(err)
	}
	return watchedNode(t, f, cfg)
}

func watchedNode(t *testing.T, f *tenancytest.Fleet, cfg tenancy.Config) (*wire, *tenancy.Tenancy) {
	t.Helper()
	w := startWire(t, f.PrimaryURL)
	watched := *f
	watched.PrimaryURL = w.url
	return w, watched.Open(t, cfg)
}

// wire is a way to the primary that reads along. It counts look-ups by what they look up (a user, a name, a domain, a tenant) and by key, and it can hold
// one kind back, drop notifications, fall silent, or refuse connections.
type wire struct {
	url, target string
	listener    net.Listener
	closing     chan struct{}
	done        sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	down    bool
	deaf    bool
	silent  chan struct{} // closed when it speaks again; nil: it speaks
	held    map[string]chan struct{}
	conns   map[net.Conn]bool
	total   map[string]int
	keys    map[string]map[string]int // of the keys that tests know; a million others would show in the heap
	running map[string]int
	peak    map[string]int
}

// session is what a wire knows of one connection. Guarded by wire.mu.
type session struct {
	prepared map[string]string // the statement's name -> what it looks up
	asking   string            // what the running statement looks up; "": something else, or none runs
}

func startWire(tb testing.TB, primary string) *wire {
	tb.Helper()
	u, err := url.Parse(primary)
	if err != nil {
		tb.Fatal("the primary's URL cannot be parsed")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	w := &wire{target: u.Host, listener: l, closing: make(chan struct{}), held: map[string]chan struct{}{}, conns: map[net.Conn]bool{},
		total: map[string]int{}, keys: map[string]map[string]int{}, running: map[string]int{}, peak: map[string]int{}}
	u.Host = l.Addr().String()
	q := u.Query()
	q.Set("sslmode", "disable") // or there is nothing to read
	u.RawQuery = q.Encode()
	w.url = u.String()
	w.done.Go(w.accept)
	tb.Cleanup(func() {
		l.Close()
		close(w.closing)
		w.cut()
		w.done.Wait()
	})
	return w
}

// asked returns how many look-ups of the kind were sent; "" is all kinds, the feed's reading of the changes apart.
func (w *wire) asked(kind string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for k, of := range w.total {
		if k == kind || kind == "" && k != "changes" {
			n += of
		}
	}
	return n
}

// askedKnown is asked for the keys that tests know.
func (w *wire) askedKnown(kind string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, of := range w.keys[kind] {
		n += of
	}
	return n
}

// most returns how many there were for the known key that was asked for most.
func (w *wire) most(kind string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, of := range w.keys[kind] {
		n = max(n, of)
	}
	return n
}

// peakOf returns how many were on their way at once.
func (w *wire) peakOf(kind string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.peak[kind]
}

// hold keeps look-ups of the kind from reaching the server; they count as sent.
func (w *wire) hold(kind string) (release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	gate := make(chan struct{})
	w.held[kind] = gate
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.held, kind)
		close(gate)
	}
}

// deafen drops every notification.
func (w *wire) deafen() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deaf = true
}

// silence lets nothing through and closes nothing.
func (w *wire) silence() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.silent = make(chan struct{})
}

// cut closes the connections, and new ones.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = true
	for c := range w.conns {
		c.Close()
	}
	clear(w.conns)
}

// mend ends cut and silence.
func (w *wire) mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = false
	if w.silent != nil {
		close(w.silent)
		w.silent = nil
	}
}

func (w *wire) accept() {
	for {
		client, err := w.listener.Accept()
		if err != nil {
			return
		}
		server, err := w.dial()
		if err != nil {
			client.Close()
			continue
		}
		w.mu.Lock()
		if w.down { // since
			client.Close()
			server.Close()
		} else {
			w.conns[client], w.conns[server] = true, true
			s := &session{prepared: map[string]string{}}
			w.done.Go(func() {
				w.forward(server, client, true, func(kind byte, body []byte) bool { return w.question(s, kind, body) })
			})
			w.done.Go(func() { w.forward(client, server, false, func(kind byte, _ []byte) bool { return w.answer(s, kind) }) })
		}
		w.mu.Unlock()
	}
}

func (w *wire) dial() (net.Conn, error) {
	w.mu.Lock()
	down := w.down
	w.mu.Unlock()
	if down {
		return nil, net.ErrClosed
	}
	return net.Dial("tcp", w.target)
}

// forward passes messages on as long as both sides live. pass may wait, and says whether the message goes on.
func (w *wire) forward(to, from net.Conn, startup bool, pass func(kind byte, body []byte) bool) {
	defer func() {
		to.Close()
		from.Close()
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.conns, to)
		delete(w.conns, from)
	}()
	in, out := bufio.NewReaderSize(from, 16<<10), bufio.NewWriterSize(to, 16<<10)
	var message []byte
	for {
		head := 5 // the kind, and the length of the rest with itself
		if startup {
			head = 4 // what opens a connection, or cancels a query on another one, has no kind
		}
		message = slices.Grow(message[:0], head)[:head]
		if _, err := io.ReadFull(in, message); err != nil {
			return
		}
		size := int(binary.BigEndian.Uint32(message[head-4:])) - 4
		message = slices.Grow(message, size)[:head+size]
		if _, err := io.ReadFull(in, message[head:]); err != nil {
			return
		}
		w.waitWhileSilent()
		if startup || pass(message[0], message[head:]) {
			_, _ = out.Write(message) // Flush has its error too
		}
		startup = false
		if in.Buffered() == 0 && out.Flush() != nil {
			return
		}
	}
}

func (w *wire) waitWhileSilent() {
	w.mu.Lock()
	silent := w.silent
	w.mu.Unlock()
	if silent != nil {
		select {
		case <-silent:
		case <-w.closing:
		}
	}
}

// question reads what a client sends: Parse names a statement, Bind runs one with its parameters.
func (w *wire) question(s *session, kind byte, body []byte) bool {
	switch kind {
	case 'P':
		name, rest, _ := bytes.Cut(body, []byte{0})
		sql, _, _ := bytes.Cut(rest, []byte{0})
		w.mu.Lock()
		defer w.mu.Unlock()
		s.prepared[string(name)] = lookUp(string(sql))
	case 'B':
		_, rest, _ := bytes.Cut(body, []byte{0}) // the portal
		name, rest, _ := bytes.Cut(rest, []byte{0})
		w.mu.Lock()
		what := s.prepared[string(name)]
		if what == "" {
			w.mu.Unlock()
			return true
		}
		s.asking = what
		w.total[what]++
		w.running[what]++
		w.peak[what] = max(w.peak[what], w.running[what])
		if key := firstParameter(rest); strings.HasPrefix(key, "known-") || strings.HasPrefix(key, "acme") || strings.HasPrefix(key, "globex") {
			if w.keys[what] == nil {
				w.keys[what] = map[string]int{}
			}
			w.keys[what][key]++
		}
		gate := w.held[what]
		w.mu.Unlock()
		if gate != nil {
			select {
			case <-gate:
			case <-w.closing:
			}
		}
	}
	return true
}

// answer reads what the server sends: ReadyForQuery ends a statement, NotificationResponse may be dropped.
func (w *wire) answer(s *session, kind byte) bool {
	if kind != 'Z' && kind != 'A' {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if kind == 'Z' && s.asking != "" {
		w.running[s.asking]--
		s.asking = ""
	}
	return kind != 'A' || !w.deaf
}

// lookUp says what the library looks up with a statement, "" for every other one.
func lookUp(sql string) string {
	switch {
	case !strings.HasPrefix(sql, "SELECT"):
		return ""
	case strings.Contains(sql, "FROM tenancy.memberships WHERE user_key"):
		return "user"
	case strings.Contains(sql, "FROM tenancy.tenants WHERE name"):
		return "name"
	case strings.Contains(sql, "FROM tenancy.domains WHERE domain"):
		return "domain"
	case strings.Contains(sql, "FROM tenancy.tenants t") && strings.Contains(sql, "WHERE t.id"):
		return "tenant"
	case strings.Contains(sql, "LEFT JOIN tenancy.changes c ON"):
		return "changes"
	}
	return ""
}

// firstParameter reads on in a Bind, after the statement's name: formats, then parameters.
func firstParameter(b []byte) string {
	formats := int(binary.BigEndian.Uint16(b))
	b = b[2+2*formats:]
	if binary.BigEndian.Uint16(b) == 0 {
		return ""
	}
	size := int32(binary.BigEndian.Uint32(b[2:]))
	return string(b[6 : 6+max(size, 0)]) // -1 is NULL
}
