package tenancy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// What a call through TenantAwareDB costs above the same call on the tenant's own pool, found in a map as one writes it by hand. Both
// sides use the same pools and so the same server processes; only the library is between them. How to
// run and read these is in docs/performance.md.

const benchSelect = "SELECT tenant FROM notes WHERE id = $1" // every tenant has a row 1 with its own name

// benchQuerier is what a *pgxpool.Pool and a TenantAwareDB have in common here.
type benchQuerier interface {
	Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// benchFleet is a fleet with active tenants.
type benchFleet struct {
	*tenancytest.Fleet
	tenants []tenancy.Tenant
}

// newBenchFleet makes n tenants with a row in each.
func newBenchFleet(tb testing.TB, n int) *benchFleet {
	tb.Helper()
	f := &benchFleet{Fleet: tenancytest.NewFleet(tb), tenants: make([]tenancy.Tenant, n)}
	tn := f.Open(tb, tenancy.Config{Migrations: noteMigrations})
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 2 { // as many as Limits.Provisions lets run
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := f.create(tb.Context(), tn, i); err != nil {
					tb.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if tb.Failed() {
		tb.FailNow()
	}
	if err := tn.Close(); err != nil { // its pools go before the nodes that are measured open theirs
		tb.Fatal(err)
	}
	return f
}

func (f *benchFleet) create(ctx context.Context, tn *tenancy.Tenancy, i int) (err error) {
	name := fmt.Sprintf("tenant-%03d", i)
	if f.tenants[i], err = tn.Catalog().Create(ctx, tenancy.NewTenant{Name: name}); err != nil {
		return err
	}
	in, err := tn.Enter(ctx, f.tenants[i].ID)
	if err == nil {
		_, err = tn.DB().Exec(in, "INSERT INTO notes (tenant, title) VALUES ($1, 'bench')", name)
	}
	return err
}

// benchTenant is one tenant as a caller has it: its context, and its own pool for the comparison.
type benchTenant struct {
	id   tenancy.ID
	name string
	ctx  context.Context // with the session
	pool *pgxpool.Pool   // the one that the library uses
}

// pinned is what one writes by hand: a pool for each tenant, with its login and its search_path. It is only read, and needs no lock.
type pinned map[tenancy.ID]*pgxpool.Pool

// node opens a node whose pools have conns connections, and warms the first n tenants: every
// connection is open and proved, and has the statement prepared.
func (f *benchFleet) node(tb testing.TB, n int, conns int32) (*tenancy.Tenancy, []benchTenant) {
	tb.Helper()
	var mu sync.Mutex // guards pools
	pools := pinned{}
	tn := f.Open(tb, tenancy.Config{
		// Nothing is closed while it is measured, and nothing has to make room.
		Limits: tenancy.Limits{ServerConns: 40 + 2*n*int(conns), TenantConns: conns, TenantIdle: time.Hour, ConnIdle: time.Hour},
		PoolBuilder: tenancy.PoolBuilderFunc(func(ctx context.Context, t tenancy.Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
			cfg.MaxConns = conns // it is twice that, which who asks the pool past the library would use
			pool, err := pgxpool.NewWithConfig(ctx, cfg)
			mu.Lock()
			defer mu.Unlock()
			pools[t.ID] = pool
			return pool, err
		}),
	})
	warm := make([]benchTenant, n)
	for i, t := range f.tenants[:n] {
		ctx, err := tn.Enter(tb.Context(), t.ID)
		if err != nil {
			tb.Fatal(err)
		}
		if err := benchAsk(ctx, tn.DB(), t.Name); err != nil { // builds the pool
			tb.Fatal(err)
		}
		mu.Lock()
		warm[i] = benchTenant{id: t.ID, name: t.Name, ctx: ctx, pool: pools[t.ID]}
		mu.Unlock()
		if err := fill(tb.Context(), warm[i].pool, t.Name, conns); err != nil {
			tb.Fatal(err)
		}
	}
	return tn, warm
}

// fill opens all connections of a tenant's pool and uses each.
func fill(ctx context.Context, pool *pgxpool.Pool, name string, conns int32) error {
	for range conns {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		defer conn.Release()
		if err := benchAsk(ctx, conn, name); err != nil {
			return err
		}
	}
	return nil
}

// benchAsk reads the tenant's row and checks whose it is.
func benchAsk(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, name string) error {
	var got string
	if err := db.QueryRow(ctx, benchSelect, 1).Scan(&got); err != nil {
		return err
	}
	if got != name {
		return fmt.Errorf("asked as %s, answered by %s", name, got)
	}
	return nil
}

// BenchmarkQueryRow is one call at a time. For its ns/op alone use BenchmarkRatio: these two run
// one after the other, and a shared machine moves more between them than they differ.
func BenchmarkQueryRow(b *testing.B) {
	tn, tenants := newBenchFleet(b, 1).node(b, 1, 4)
	t := tenants[0]
	for _, bench := range []struct {
		name string
		ctx  context.Context
		db   benchQuerier
	}{
		{"pool", b.Context(), t.pool},
		{"tenancy", t.ctx, tn.DB()},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := benchAsk(bench.ctx, bench.db, t.name); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

const (
	benchTurn   = 15 * time.Millisecond
	benchSlice  = 10 * benchTurn
	benchRounds = 11
)

// BenchmarkRatio compares throughput: TenantAwareDB.QueryRow against a map of the tenants' own pools,
// by several clients that pick a tenant at random for each call and check every answer.
//
// One iteration is a round of three slices of 150 ms, {map, tenancy, map again}; at least 11 are
// made, and -benchtime=101x makes 101. The three take turns of 15 ms, in a new order each time,
// because a machine shared with others changes within a slice: whole slices one after the other gave
// intervals about twice as wide.
//
// Each round gives two ratios, tenancy/map and again/map: the second is the reference against
// itself, and what it is off 1 is the machine's noise. Reported are their medians, with the interval
// that holds the true median with at least 95 % (two of the sorted ratios, by the binomial
// distribution: it assumes nothing of how the noise is spread).
//
// margin is the lower end of the reference against itself less the lower end of tenancy against the
// reference. The target is at most 0.03. It is not enforced: noise fails no test.
func BenchmarkRatio(b *testing.B) {
	f := newBulkFleet(b, 1000, 1100)
	for _, shape := range []struct {
		tenants int
		conns   int32 // of each pool: 1,000 in all at most, each a process of the server
	}{{1, 4}, {10, 4}, {100, 2}, {1000, 1}} {
		b.Run(fmt.Sprintf("tenants=%d", shape.tenants), func(b *testing.B) {
			tn, tenants := f.node(b, shape.tenants, shape.conns)
			pools := pinned{}
			for _, t := range tenants {
				pools[t.id] = t.pool
			}
			for _, clients := range []int{1, 8, 32} {
				b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
					benchCompare(b, tn.DB(), tenants, clients, pools, pools)
				})
			}
		})
	}
}

// benchCompare compares the library with two maps by hand: the reference, and the reference again.
func benchCompare(b *testing.B, db *tenancy.TenantAwareDB, tenants []benchTenant, clients int, reference, second pinned) {
	plain := b.Context()
	by := func(m pinned) func(*benchTenant) error {
		return func(t *benchTenant) error { return benchAsk(plain, m[t.id], t.name) }
	}
	through := func(t *benchTenant) error { return benchAsk(t.ctx, db, t.name) }
	contenders := []func(*benchTenant) error{by(reference), through, by(second)}

	var ratio, again []float64
	var total float64
	round := func() {
		var calls, seconds [3]float64
		for range int(benchSlice / benchTurn) {
			for _, who := range rand.Perm(len(contenders)) {
				n, took := benchRun(b, tenants, clients, contenders[who])
				calls[who] += n
				seconds[who] += took
			}
		}
		reference := calls[0] / seconds[0]
		ratio = append(ratio, calls[1]/seconds[1]/reference)
		again = append(again, calls[2]/seconds[2]/reference)
		total += calls[1] / seconds[1]
	}
	benchRun(b, tenants, clients, through) // the first one after a pause is another machine's
	for b.Loop() {
		round()
	}
	for len(ratio) < benchRounds {
		round()
	}
	rounds := float64(len(ratio))
	low, mid, high := medianInterval(ratio)
	againLow, againMid, againHigh := medianInterval(again)
	b.ReportMetric(0, "ns/op") // of a round: says nothing
	b.ReportMetric(total/rounds, "calls/s")
	b.ReportMetric(rounds, "rounds")
	b.ReportMetric(mid, "ratio")
	b.ReportMetric(low, "ratio-low")
	b.ReportMetric(high, "ratio-high")
	b.ReportMetric(againMid, "again")
	b.ReportMetric(againLow, "again-low")
	b.ReportMetric(againHigh, "again-high")
	b.ReportMetric(againLow-low, "margin")
}

// benchRun lets the clients call for benchTurn and returns how many calls they made, and in how many seconds.
func benchRun(b *testing.B, tenants []benchTenant, clients int, call func(*benchTenant) error) (calls, seconds float64) {
	var total atomic.Int64
	var stop atomic.Bool
	var wg sync.WaitGroup
	start := time.Now()
	timer := time.AfterFunc(benchTurn, func() { stop.Store(true) })
	defer timer.Stop()
	for range clients {
		wg.Go(func() {
			n := 0
			for !stop.Load() {
				if err := call(&tenants[rand.IntN(len(tenants))]); err != nil {
					b.Error(err)
					return
				}
				n++
			}
			total.Add(int64(n))
		})
	}
	wg.Wait()
	if b.Failed() {
		b.FailNow()
	}
	return float64(total.Load()), time.Since(start).Seconds()
}

// medianInterval returns the median of values, and the narrowest pair of them with equal ranks from
// both ends that has the true median between them with at least 95 %: the chance that it is below
// the k-th smallest is that of fewer than k heads in n tosses. Of 11 these are the 2nd and the 10th.
func medianInterval(values []float64) (low, median, high float64) {
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	below := 1.0 // the chance of k heads or fewer, for k = 0; then in units of 2^-n
	for range n {
		below /= 2
	}
	k := 0 // v[k] is the (k+1)-th smallest
	for term := below; k+1 < n/2; k++ {
		term *= float64(n-k) / float64(k+1) // exactly k+1 heads
		if below+term > 0.025 {
			break
		}
		below += term
	}
	return v[k], (v[(n-1)/2] + v[n/2]) / 2, v[n-1-k]
}

func TestMedianIntervalHasTheRanksOfTheBinomialDistribution(t *testing.T) {
	for n, rank := range map[int]int{6: 1, 8: 1, 9: 2, 11: 2, 12: 3, 21: 6, 41: 14, 100: 40} { // as tables have them
		values := make([]float64, n)
		for i := range values {
			values[n-1-i] = float64(i + 1)
		}
		low, median, high := medianInterval(values)
		if low != float64(rank) || high != float64(n+1-rank) || median != float64(n+1)/2 {
			t.Errorf("n=%d: ranks %v and %v around %v, want rank %d", n, low, high, median, rank)
		}
	}
}

// BenchmarkOwnCPU is the library's own part of a call, without network and without pgx: the
// catalog's current word, the lease, the look at the proof, the row. The target is 1 us.
func BenchmarkOwnCPU(b *testing.B) {
	tn, tenants := newBenchFleet(b, 10).node(b, 10, 1)
	conns := make([]*pgxpool.Conn, len(tenants))
	for i, t := range tenants {
		var err error
		if conns[i], err = t.pool.Acquire(b.Context()); err != nil {
			b.Fatal(err)
		}
		defer conns[i].Release()
	}
	db := tn.DB()
	route := func(b *testing.B, i int) {
		if _, err := db.Route(tenants[i].ctx, conns[i]); err != nil {
			b.Error(err)
		}
	}
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			route(b, 0)
		}
	})
	b.Run("parallel", func(b *testing.B) { // all cores, one tenant: every shared line is contended
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				route(b, 0)
			}
		})
	})
	b.Run("parallel_10_tenants", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				route(b, rand.IntN(len(tenants)))
			}
		})
	})
}

func TestACallCostsAtMostOneAllocationMore(t *testing.T) { // not parallel: it counts the whole process's allocations
	tn, tenants := newBenchFleet(t, 1).node(t, 1, 4)
	own := tenants[0]
	for name, call := range map[string]func(ctx context.Context, db benchQuerier) error{
		"exec": func(ctx context.Context, db benchQuerier) error {
			_, err := db.Exec(ctx, benchSelect, 1)
			return err
		},
		"query": func(ctx context.Context, db benchQuerier) error {
			rows, err := db.Query(ctx, benchSelect, 1)
			if err != nil {
				return err
			}
			rows.Close() // reads to the end
			return rows.Err()
		},
		"query_row": func(ctx context.Context, db benchQuerier) error { return benchAsk(ctx, db, own.name) },
	} {
		t.Run(name, func(t *testing.T) {
			const calls = 200
			count := func(ctx context.Context, db benchQuerier) float64 {
				return testing.AllocsPerRun(5, func() {
					for range calls {
						if err := call(ctx, db); err != nil {
							t.Fatal(err)
						}
					}
				}) / calls
			}
			var more []float64
			var direct, through float64
			for range 5 {
				direct, through = count(t.Context(), own.pool), count(own.ctx, tn.DB())
				more = append(more, through-direct)
			}
			slices.Sort(more)
			t.Logf("the pool's %.2f, ours %.2f, median difference %.2f", direct, through, more[2])
			if more[2] > 1.1 { // a tenth for what runs in the background, as the feed's poll
				t.Errorf("%.2f allocations more than the pool's own call, want 1", more[2])
			}
		})
	}
}
