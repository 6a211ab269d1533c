package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

const (
	coldTurns  = 12 // of each contender in a round
	coldRounds = 21
)

// BenchmarkCold compares the first request of a tenant that has no pool with a connection made by hand: TenantAwareDB.QueryRow,
// which builds the pool, connects and proves the connection, against pgx.ConnectConfig and QueryRow with the same settings.
// The connection by hand has a login like the tenant's whose password was set in the usual way, so that its verifier has the server's own number
// of iterations, 4096; ratio-same is against the tenant's own login, whose verifier has one: what the library costs without what it saves.
// With tenants=8 the first requests of eight tenants begin at once, and the time is that until the last one has its answer.
//
// One iteration is a round in which {bare, tenancy, bare again, bare with the same login} take 12 turns each, in a new order each time; at least 21 are made,
// and -benchtime=101x makes 101. After each turn its connections are closed, and the next one waits until the server has none left.
// Each round gives the ratios to bare of the median turns; reported are the medians of these, with the interval
// that holds the true median with at least 95 %, as in [BenchmarkRatio]. The tenancy's pool is closed later and by others, so ratio
// leaves Close out for both; ratio-closed counts it for the bare connection, whose caller waits for it.
//
// The target is a ratio of at most 1.10. It is not enforced: noise fails no test.
func BenchmarkCold(b *testing.B) {
	f := newBenchFleet(b, 8)
	tn := f.Open(b, tenancy.Config{Limits: tenancy.Limits{TenantIdle: time.Hour, ConnIdle: time.Hour}}) // nothing else closes a pool
	admin := f.Admin(b, "tenants")
	for _, tenants := range []int{1, 8} {
		b.Run(fmt.Sprintf("tenants=%d", tenants), func(b *testing.B) {
			benchCold(b, f.cold(b, tn, admin, tenants))
		})
	}
}

// coldTenants are the tenants that are asked at once.
type coldTenants struct {
	tn      *tenancy.Tenancy
	admin   *pgx.Conn
	tenants []coldTenant
	logins  []string
}

type coldTenant struct {
	tenancy.Tenant
	in    context.Context // with the session
	usual *pgx.ConnConfig // of a login like the tenant's
	same  *pgx.ConnConfig // of the tenant's own
}

func (f *benchFleet) cold(tb testing.TB, tn *tenancy.Tenancy, admin *pgx.Conn, n int) *coldTenants {
	tb.Helper()
	c := &coldTenants{tn: tn, admin: admin}
	for _, t := range f.tenants[:n] {
		in, err := tn.Enter(tb.Context(), t.ID)
		if err != nil {
			tb.Fatal(err)
		}
		d, err := tn.Catalog().SourceForTest(tb.Context(), t.ID)
		if err != nil {
			tb.Fatal(err)
		}
		cc, err := d.ConnConfig()
		if err != nil {
			tb.Fatal(err)
		}
		cc.RuntimeParams = sessionSettings(tb, in, tn.DB())
		conn, err := pgx.ConnectConfig(tb.Context(), cc)
		if err != nil {
			tb.Fatal(err)
		}
		bare := sessionSettings(tb, tb.Context(), conn)
		if err := conn.Close(tb.Context()); err != nil {
			tb.Fatal(err)
		}
		if !maps.Equal(bare, cc.RuntimeParams) {
			tb.Fatalf("settings of the bare connection: %v; of the pool's: %v", bare, cc.RuntimeParams)
		}
		usual := cc.Copy()
		usual.User, usual.Password = d.User+"_usual", "a password as people set it"
		for _, sql := range []string{
			"CREATE ROLE %[1]s LOGIN PASSWORD '%[2]s'",
			"GRANT %[3]s_r, %[4]s_tenants TO %[1]s", // what the tenant's login is a member of
		} {
			if _, err := admin.Exec(tb.Context(), fmt.Sprintf(sql, usual.User, usual.Password, d.Schema, d.Database)); err != nil {
				tb.Fatal(err)
			}
		}
		tb.Cleanup(func() {
			if _, err := admin.Exec(context.Background(), "DROP ROLE "+usual.User); err != nil {
				tb.Error(err)
			}
		})
		c.tenants, c.logins = append(c.tenants, coldTenant{t, in, usual, cc}), append(c.logins, d.User, usual.User)
	}
	c.retire()
	if err := c.settle(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	return c
}

// sessionSettings are those that a connection has from its client.
func sessionSettings(tb testing.TB, ctx context.Context, db interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}) map[string]string {
	tb.Helper()
	settings := map[string]string{}
	rows, _ := db.Query(ctx, `SELECT name, setting FROM pg_settings WHERE source IN ('client', 'session')`) // CollectRows and its like report Query's error too
	var name, setting string
	if _, err := pgx.ForEachRow(rows, []any{&name, &setting}, func() error {
		settings[name] = setting
		return nil
	}); err != nil {
		tb.Fatal(err)
	}
	if settings["search_path"] == "" {
		tb.Fatalf("no search_path is set: %v", settings)
	}
	return settings
}

// usual and same ask each tenant over a connection by hand.
func (c *coldTenants) usual(ctx context.Context) (asked, closed time.Duration, err error) {
	return c.bare(ctx, func(t coldTenant) *pgx.ConnConfig { return t.usual })
}

func (c *coldTenants) same(ctx context.Context) (asked, closed time.Duration, err error) {
	return c.bare(ctx, func(t coldTenant) *pgx.ConnConfig { return t.same })
}

func (c *coldTenants) bare(ctx context.Context, login func(coldTenant) *pgx.ConnConfig) (asked, closed time.Duration, err error) {
	conns := make([]*pgx.Conn, len(c.tenants))
	start := time.Now()
	err = c.each(func(i int, t coldTenant) (err error) {
		if conns[i], err = pgx.ConnectConfig(ctx, login(t)); err != nil {
			return err
		}
		return benchAsk(ctx, conns[i], t.Name)
	})
	asked = time.Since(start)
	err = errors.Join(err, c.each(func(i int, t coldTenant) error {
		if conns[i] == nil {
			return nil
		}
		return conns[i].Close(ctx)
	}))
	return asked, time.Since(start), err
}

// through asks each tenant, none of which has a pool.
func (c *coldTenants) through(context.Context) (asked, closed time.Duration, err error) {
	start := time.Now()
	err = c.each(func(_ int, t coldTenant) error { return benchAsk(t.in, c.tn.DB(), t.Name) })
	asked = time.Since(start)
	c.retire()
	return asked, asked, err
}

func (c *coldTenants) retire() {
	for _, t := range c.tenants {
		tenancy.RetirePool(c.tn, t.ID)
	}
}

// each calls fn for all tenants at once.
func (c *coldTenants) each(fn func(i int, t coldTenant) error) error {
	errs := make([]error, len(c.tenants))
	var wg sync.WaitGroup
	for i, t := range c.tenants {
		wg.Go(func() { errs[i] = fn(i, t) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// settle returns when the server has no session of the tenants left.
func (c *coldTenants) settle(ctx context.Context) error {
	for end := time.Now().Add(10 * time.Second); ; {
		var left int
		if err := c.admin.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity WHERE usename = ANY($1)`, c.logins).Scan(&left); err != nil || left == 0 {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d sessions of the tenants are still open: their pools were not closed", left)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

func benchCold(b *testing.B, c *coldTenants) {
	contenders := []func(context.Context) (asked, closed time.Duration, err error){c.usual, c.through, c.usual, c.same}
	turn := func(who int) (asked, closed float64) {
		a, z, err := contenders[who](b.Context())
		if err := errors.Join(err, c.settle(b.Context())); err != nil {
			b.Fatal(err)
		}
		return a.Seconds(), z.Seconds()
	}
	for who := range contenders {
		turn(who) // the first one after a pause is another machine's
	}
	var ratio, closedRatio, again, same []float64
	var total [4]float64
	round := func() {
		var asked, closed [4][]float64
		for range coldTurns {
			for _, who := range rand.Perm(len(contenders)) {
				a, z := turn(who)
				asked[who], closed[who] = append(asked[who], a), append(closed[who], z)
			}
		}
		var mid [4]float64
		for who := range contenders {
			mid[who] = middle(asked[who])
			total[who] += mid[who]
		}
		ratio, again, same = append(ratio, mid[1]/mid[0]), append(again, mid[2]/mid[0]), append(same, mid[1]/mid[3])
		closedRatio = append(closedRatio, mid[1]/middle(closed[0]))
	}
	for b.Loop() {
		round()
	}
	for len(ratio) < coldRounds {
		round()
	}
	rounds := float64(len(ratio))
	b.ReportMetric(0, "ns/op") // of a round: says nothing
	b.ReportMetric(rounds, "rounds")
	for name, values := range map[string][]float64{"ratio": ratio, "ratio-closed": closedRatio, "ratio-same": same, "again": again} {
		low, mid, high := medianInterval(values)
		b.ReportMetric(mid, name)
		b.ReportMetric(low, name+"-low")
		b.ReportMetric(high, name+"-high")
	}
	b.ReportMetric(total[0]/rounds*1e6, "bare-us")
	b.ReportMetric(total[1]/rounds*1e6, "tenancy-us")
	b.ReportMetric(total[3]/rounds*1e6, "same-us")
}

func middle(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}
