package tenancy_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
)

// What many tenants cost on few connections, and the library beside pools that are not its own. How to run and read these is in
// docs/performance.md.

// BenchmarkRatioApart is BenchmarkRatio with pools that are made by hand, where BenchmarkRatio's are made by the library: without its proofs,
// its budget and its hooks. Each of {map, tenancy, map again} has connections of its own, as many as the others, so that
// all use the server's processes equally often.
func BenchmarkRatioApart(b *testing.B) {
	f := newBulkFleet(b, 100, 400)
	for _, shape := range []struct {
		tenants int
		conns   int32
	}{{1, 4}, {10, 4}, {100, 1}} {
		b.Run(fmt.Sprintf("tenants=%d", shape.tenants), func(b *testing.B) {
			tn, tenants := f.node(b, shape.tenants, shape.conns)
			reference, second := byHand(b, tn, tenants, shape.conns), byHand(b, tn, tenants, shape.conns)
			for _, clients := range []int{1, 8, 32} {
				b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
					benchCompare(b, tn.DB(), tenants, clients, reference, second)
				})
			}
		})
	}
}

// byHand makes a pool for each tenant, with what pgx does by default, and fills it.
func byHand(b *testing.B, tn *tenancy.Tenancy, tenants []benchTenant, conns int32) pinned {
	b.Helper()
	pools := pinned{}
	for _, t := range tenants {
		d, err := tn.Catalog().SourceForTest(b.Context(), t.id)
		if err != nil {
			b.Fatal(err)
		}
		cfg, err := pgxpool.ParseConfig(fmt.Sprintf("postgres://%s:%s@%s:%d/%s?sslmode=disable&search_path=%s", d.User, d.Password.Reveal(), d.Host, d.Port, d.Database, d.Schema))
		if err != nil {
			b.Fatal("a tenant's URL cannot be parsed")
		}
		cfg.MaxConns, cfg.MaxConnIdleTime = conns, time.Hour
		pool, err := pgxpool.NewWithConfig(b.Context(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(pool.Close)
		if err := fill(b.Context(), pool, t.name, conns); err != nil {
			b.Fatal(err)
		}
		pools[t.id] = pool
	}
	return pools
}

const (
	fleetSecond  = time.Second
	fleetSeconds = 5
	fleetHead    = 10 // so many tenants are hot: they are asked all the time, and never lose their connections for long
)

// BenchmarkFleet has clients ask 5,000 tenants, few of them often and most of them seldom (zipf, 1.1), on a budget of 100
// connections, the library's own among them. Each tenant has a login of its own, so that whoever was not asked for a while has to log in again, and
// another tenant's connection is closed for it.
//
// One iteration is a second of load; at least 5 are made, and -benchtime=30x makes 30. Reported are the time of a call by percentiles; of
// cold calls (the connection was new) their share in percent and their median; the median of warm calls of the ten hottest tenants (head-p50-us) beside
// that of the same tenants alone, before, when nothing has to make room (calm-p50-us); connections closed to make room; and the most connections that the
// server has had, by 500 looks a second. A failed call fails the benchmark, and so does one connection more than the budget.
func BenchmarkFleet(b *testing.B) {
	const tenants, budget = 5000, 100
	f := newBulkFleet(b, tenants, 200)
	for _, clients := range []int{8, 32} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			tn := f.Open(b, tenancy.Config{Limits: tenancy.Limits{ServerConns: budget}})
			calm := fleetRun(b, zipfLoad(tn, f.tenants[:fleetHead]), clients, 2*fleetSecond)
			l := zipfLoad(tn, f.tenants)
			fleetRun(b, l, clients, 2*fleetSecond) // the node fills up
			conns := countConns(b, f.AdminURL)
			before := evictions(tn)
			var all []reply
			seconds := 0
			second := func() {
				all = append(all, fleetRun(b, l, clients, fleetSecond)...)
				seconds++
			}
			for b.Loop() {
				second()
			}
			for seconds < fleetSeconds {
				second()
			}
			evicted := evictions(tn) - before
			most, looks := conns.stop()
			if most > budget || looks < 50*seconds {
				b.Errorf("the server had %d connections in %d looks, the budget is %d", most, looks, budget)
			}
			cold := func(r reply) bool { return r.cold }
			head := func(r reply) bool { return !r.cold && r.tenant < fleetHead }
			n := 0
			for _, r := range all {
				if r.cold {
					n++
				}
			}
			us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
			b.ReportMetric(0, "ns/op") // of a second: says nothing
			b.ReportMetric(float64(len(all))/float64(seconds), "calls/s")
			b.ReportMetric(us(percentile(all, 0.50, nil)), "p50-us")
			b.ReportMetric(us(percentile(all, 0.95, nil)), "p95-us")
			b.ReportMetric(us(percentile(all, 0.99, nil)), "p99-us")
			b.ReportMetric(us(percentile(all, 0.50, cold)), "cold-p50-us")
			b.ReportMetric(us(percentile(all, 0.50, head)), "head-p50-us")
			b.ReportMetric(us(percentile(calm, 0.50, head)), "calm-p50-us")
			b.ReportMetric(100*float64(n)/float64(len(all)), "cold-%")
			b.ReportMetric(float64(evicted)/float64(seconds), "evictions/s")
			b.ReportMetric(float64(most), "conns-max")
		})
	}
}

// fleetRun is fleetLoad.run for a benchmark, which a failed call ends.
func fleetRun(b *testing.B, l *fleetLoad, clients int, d time.Duration) []reply {
	b.Helper()
	all, failed := l.run(context.WithoutCancel(b.Context()), clients, d)
	for _, err := range failed[:min(3, len(failed))] {
		b.Error(err)
	}
	if len(failed) > 0 {
		b.Fatalf("%d of %d calls failed", len(failed), len(failed)+len(all))
	}
	return all
}

// evictions returns how many idle connections were closed to make room, since Open.
func evictions(tn *tenancy.Tenancy) (n int64) {
	for s := range tn.Servers() {
		n += s.Evicted
	}
	return n
}
