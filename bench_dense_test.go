package tenancy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
)

// What tenants cost that share a pool, beside one pool with one tenant, which knows nothing of tenants, and beside what one writes by hand: SET
// search_path at each acquire. How to run and read these is in docs/performance.md.

const (
	denseConns = 8
	// denseJoin is of five tables, and dear to plan.
	denseJoin = `SELECT c.name FROM customers c JOIN orders o ON o.customer = c.id JOIN lines l ON l.of_order = o.id
		JOIN products p ON p.id = l.product JOIN makers m ON m.id = p.maker WHERE c.id = $1 AND m.name <> 'x' ORDER BY o.id LIMIT 1`
)

// denseTables are eleven more tables of a tenant, with the rows of the join.
var denseTables = `CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL); CREATE TABLE makers (id int PRIMARY KEY, name text NOT NULL);
	CREATE TABLE products (id int PRIMARY KEY, maker int NOT NULL REFERENCES makers); CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL REFERENCES customers);
	CREATE TABLE lines (of_order int NOT NULL REFERENCES orders, product int NOT NULL REFERENCES products, PRIMARY KEY (of_order, product));
	INSERT INTO customers VALUES (1, {name}); INSERT INTO makers VALUES (1, 'm'); INSERT INTO products VALUES (1, 1); INSERT INTO orders VALUES (1, 1); INSERT INTO lines VALUES (1, 1);` +
	func() (sql string) {
		for i := range 6 {
			sql += fmt.Sprintf("CREATE TABLE more%d (id int PRIMARY KEY, a text, b timestamptz, c numeric, d jsonb);", i)
		}
		return sql
	}()

// newDenseFleet makes n tenants of twelve tables that share a pool. The first becomes one of them by SetDense, which makes the pool's login; the others by what it does.
func newDenseFleet(b *testing.B, n int) *benchFleet {
	b.Helper()
	f := newBulkFleet(b, n, 200)
	tn := f.Open(b, tenancy.Config{})
	if err := tn.Catalog().SetDense(b.Context(), f.tenants[0].ID, true); err != nil {
		b.Fatal(err)
	}
	if err := tn.Close(); err != nil {
		b.Fatal(err)
	}
	primary, server := superuser(b, f.AdminURL, bulkPrimary), superuser(b, f.AdminURL, bulkTenants)
	login := scan[string](b, primary, `SELECT login FROM tenancy.dense_logins`)
	for i, t := range f.tenants {
		p := bulkPlaceOf(b, primary, t.ID)
		q := pgx.Identifier{p.Schema}.Sanitize()
		sql := "BEGIN; SET LOCAL ROLE " + pgx.Identifier{p.Owner}.Sanitize() + "; SET LOCAL search_path = " + q + ";" + strings.ReplaceAll(denseTables, "{name}", "'"+t.Name+"'") + "COMMIT;"
		if i > 0 {
			sql += "CREATE ROLE " + q + " NOLOGIN; GRANT " + pgx.Identifier{p.Runtime}.Sanitize() + " TO " + q + "; GRANT " + q + " TO " + pgx.Identifier{login}.Sanitize()
		}
		must(b, server, sql)
	}
	must(b, primary, `UPDATE tenancy.data_sources SET dense = true, dense_role = schema`)
	must(b, primary, `UPDATE tenancy.tenants SET dense = true`)
	must(b, server, `VACUUM ANALYZE pg_class, pg_attribute, pg_auth_members, pg_authid`)
	return f
}

// denseNode opens a node and returns a context for each of the first n tenants.
func (f *benchFleet) denseNode(b *testing.B, n int, limits tenancy.Limits) (*tenancy.TenantAwareDB, []benchTenant) {
	b.Helper()
	limits.ServerConns, limits.TenantConns, limits.TenantIdle, limits.ConnIdle = 100, denseConns, time.Hour, time.Hour
	tn := f.Open(b, tenancy.Config{Limits: limits})
	tenants := make([]benchTenant, n)
	for i, t := range f.tenants[:n] {
		ctx, err := tn.Enter(b.Context(), t.ID)
		if err != nil {
			b.Fatal(err)
		}
		tenants[i] = benchTenant{id: t.ID, name: t.Name, ctx: ctx}
		for range 3 { // until its connection knows it
			if err := benchAsk(ctx, tn.DB(), t.Name); err != nil {
				b.Fatal(err)
			}
		}
	}
	return tn.DB(), tenants
}

// onePool is a pool by hand with what pgx does by default; without a schema it finds none.
func (f *benchFleet) onePool(b *testing.B, schema string) *pgxpool.Pool {
	b.Helper()
	cfg, err := pgxpool.ParseConfig(f.AdminURL)
	if err != nil {
		b.Fatal("the test server's URL cannot be parsed")
	}
	cfg.ConnConfig.Database, cfg.ConnConfig.RuntimeParams["search_path"] = bulkTenants, schema
	cfg.MaxConns, cfg.MaxConnIdleTime = denseConns, time.Hour
	pool, err := pgxpool.NewWithConfig(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(pool.Close)
	return pool
}

// benchSide is one of those that are compared: a call for one tenant, which checks the answer.
type benchSide struct {
	name string
	call func(t *benchTenant) error
}

// denseSlice is how long a side has the machine for itself. It is not cut into turns as in BenchmarkRatio: what sessions know of a hundred tenants is more than the
// processor's caches keep while others run, and a turn of 15 ms would measure how it comes back.
const denseSlice = 400 * time.Millisecond

// compareSides reports each side's throughput over that of the first, which is the last again: one iteration is a slice for each, in a new order.
func compareSides(b *testing.B, clients int, pick func() *benchTenant, sides ...benchSide) {
	sides = append(sides, benchSide{"again", sides[0].call})
	ratios := make([][]float64, len(sides))
	total, rounds := 0.0, 0
	run := func(side benchSide) float64 {
		var total atomic.Int64
		var stop atomic.Bool
		var wg sync.WaitGroup
		start := time.Now()
		timer := time.AfterFunc(denseSlice, func() { stop.Store(true) })
		defer timer.Stop()
		for range clients {
			wg.Go(func() {
				n := 0
				for !stop.Load() {
					if err := side.call(pick()); err != nil {
						b.Errorf("%s: %v", side.name, err)
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
		return float64(total.Load()) / time.Since(start).Seconds()
	}
	round := func(keep bool) {
		rates := make([]float64, len(sides))
		for _, who := range rand.Perm(len(sides)) {
			rates[who] = run(sides[who])
		}
		if keep {
			total += rates[0]
			rounds++
		}
		for i := range sides[1:] {
			if keep {
				ratios[i+1] = append(ratios[i+1], rates[i+1]/rates[0])
			}
		}
	}
	for range 2 {
		round(false)
	}
	for b.Loop() {
		round(true)
	}
	for len(ratios[1]) < benchRounds {
		round(true)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(total/float64(rounds), sides[0].name+"/s")
	for i, side := range sides[1:] {
		low, mid, high := medianInterval(ratios[i+1])
		b.ReportMetric(mid, side.name)
		b.ReportMetric(low, side.name+"-low")
		b.ReportMetric(high, side.name+"-high")
	}
}

// BenchmarkDense compares tenants that share a pool of 8 connections with one pool of 8 connections and one tenant (raw), and with a pool
// on which SET search_path comes before each call (set).
func BenchmarkDense(b *testing.B) {
	f := newDenseFleet(b, 1000)
	schemas := map[tenancy.ID]string{}
	primary := superuser(b, f.AdminURL, bulkPrimary)
	for _, t := range f.tenants {
		schemas[t.ID] = pgx.Identifier{bulkPlaceOf(b, primary, t.ID).Schema}.Sanitize()
	}
	raw, byHand := f.onePool(b, schemas[f.tenants[0].ID]), f.onePool(b, "")
	ctx, first := b.Context(), f.tenants[0].Name
	ask := func(on benchQuerier, ctx context.Context, sql, name string) error {
		var got string
		if err := on.QueryRow(ctx, sql, 1).Scan(&got); err != nil {
			return err
		}
		if got != name {
			return fmt.Errorf("asked as %s, answered by %s", name, got)
		}
		return nil
	}
	set := func(sql string) benchSide {
		return benchSide{"set", func(t *benchTenant) error {
			conn, err := byHand.Acquire(ctx)
			if err != nil {
				return err
			}
			defer conn.Release()
			if _, err := conn.Exec(ctx, "SET search_path = "+schemas[t.id]); err != nil {
				return err
			}
			return ask(conn, ctx, sql, t.name)
		}}
	}
	three := func(tx pgx.Tx, ctx context.Context, name string) error {
		for range 3 {
			if err := ask(tx, ctx, benchSelect, name); err != nil {
				return err
			}
		}
		return nil
	}
	for _, shape := range []struct {
		name    string
		tenants int
		zipf    bool
		sql     string // "": the transaction
		set     bool
	}{
		{"tenants=1", 1, false, benchSelect, false},
		{"tenants=100", 100, false, benchSelect, true},
		{"join/tenants=100", 100, false, denseJoin, true},
		{"transaction/tenants=100", 100, false, "", false},
		{"tenants=1000", 1000, false, benchSelect, false},
		{"tenants=1000/zipf", 1000, true, benchSelect, false},
	} {
		b.Run(shape.name, func(b *testing.B) {
			db, tenants := f.denseNode(b, shape.tenants, tenancy.Limits{DenseConns: denseConns})
			sides := []benchSide{
				{"raw", func(*benchTenant) error { return ask(raw, ctx, shape.sql, first) }},
				{"dense", func(t *benchTenant) error { return ask(db, t.ctx, shape.sql, t.name) }},
			}
			if shape.sql == "" {
				sides[0].call = func(*benchTenant) error {
					return pgx.BeginFunc(ctx, raw, func(tx pgx.Tx) error { return three(tx, ctx, first) })
				}
				sides[1].call = func(t *benchTenant) error {
					return db.InTx(t.ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error { return three(tx, ctx, t.name) })
				}
			}
			if shape.set {
				sides = append(sides, set(shape.sql))
			}
			for _, clients := range []int{1, 8, 32} {
				b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
					compareSides(b, clients, picker(tenants, shape.zipf), sides...)
				})
			}
		})
	}
}

// picker picks a tenant for each call: each as often as the others, or the k-th k^1.1 times more seldom than the first.
func picker(tenants []benchTenant, zipf bool) func() *benchTenant {
	if !zipf {
		return func() *benchTenant { return &tenants[rand.IntN(len(tenants))] }
	}
	var mu sync.Mutex
	z := rand.NewZipf(rand.New(rand.NewPCG(1, 1)), 1.1, 1, uint64(len(tenants)-1))
	return func() *benchTenant {
		mu.Lock()
		defer mu.Unlock()
		return &tenants[z.Uint64()]
	}
}

// BenchmarkDenseMemory reports the memory of the server's processes behind a shared pool after each of 1,000 tenants has used its twelve tables: the
// private part of the largest, in MB. Linux.
func BenchmarkDenseMemory(b *testing.B) {
	f := newDenseFleet(b, 1000)
	server := superuser(b, f.AdminURL, bulkTenants)
	for _, conns := range []int32{1, denseConns} {
		b.Run(fmt.Sprintf("connections=%d", conns), func(b *testing.B) {
			db, tenants := f.denseNode(b, len(f.tenants), tenancy.Limits{DenseConns: conns})
			largest, pids := 0, map[uint32]bool{}
			for b.Loop() {
				for i := range tenants {
					t := &tenants[i]
					if err := visit(t.ctx, db); err != nil {
						b.Fatal(err)
					}
					if i%50 < 45 && i < len(tenants)-5 {
						continue
					}
					rows, _ := server.Query(b.Context(), `SELECT pid FROM pg_stat_activity WHERE usename LIKE 't\_%\_d'`)
					list, err := pgx.CollectRows(rows, pgx.RowTo[uint32])
					if err != nil {
						b.Fatal(err)
					}
					for _, pid := range list {
						pids[pid] = true
						largest = max(largest, privateKB(b, pid))
					}
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(largest)/1024, "MB-private")
			b.ReportMetric(float64(len(pids)), "processes-seen")
		})
	}
}

// visit reads all twelve tables of a tenant.
func visit(ctx context.Context, db *tenancy.TenantAwareDB) error {
	tables := []string{"notes", "customers", "makers", "products", "orders", "lines"}
	for i := range 6 {
		tables = append(tables, "more"+strconv.Itoa(i))
	}
	for _, table := range tables {
		var n int
		if err := db.QueryRow(ctx, "SELECT count(*) FROM "+table+" WHERE $1", true).Scan(&n); err != nil {
			return err
		}
	}
	return nil
}

// privateKB is what a process has for itself; 0 when it has ended.
func privateKB(b *testing.B, pid uint32) (kb int) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if os.IsNotExist(err) {
		return 0
	}
	if err != nil {
		b.Skip(err)
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) == 3 && strings.HasPrefix(fields[0], "Private_") {
			n, _ := strconv.Atoi(fields[1])
			kb += n
		}
	}
	return kb
}
