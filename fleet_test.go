package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/tenancytest"
)

// Many tenants on few connections. By default a stated part runs; TENANCY_LONG=1 runs the whole.

// TestAFleetIsServedWithinItsBudget: no call fails, and the server never has one connection more than the budget, the library's own included.
func TestAFleetIsServedWithinItsBudget(t *testing.T) {
	t.Parallel()
	tenants, clients, least, limits := 200, 16, 3*time.Second, tenancy.Limits{ServerConns: 20, PrimaryConns: 3}
	if os.Getenv("TENANCY_LONG") == "1" {
		tenants, clients, least, limits = 5000, 32, 30*time.Second, tenancy.Limits{ServerConns: 100}
	}
	f := newBulkFleet(t, tenants, 200)
	tn := f.Open(t, tenancy.Config{Limits: limits})
	conns := countConns(t, f.AdminURL)
	l := zipfLoad(tn, f.tenants)
	var asked []reply
	var failed []error
	for began := time.Now(); time.Since(began) < least || len(asked) < 200 && len(failed) == 0 && time.Since(began) < time.Minute; { // a machine can be slow
		replies, errs := l.run(t.Context(), clients, time.Second)
		asked, failed = append(asked, replies...), append(failed, errs...)
	}
	for _, err := range failed[:min(5, len(failed))] {
		t.Error(err)
	}
	most, looks := conns.stop()
	evicted := evictions(tn)
	cold := len(slices.DeleteFunc(slices.Clone(asked), func(r reply) bool { return !r.cold }))
	t.Logf("%d tenants, %d answers, %d of them over a new connection, %d errors, %d evictions; at most %d connections in %d looks",
		tenants, len(asked), cold, len(failed), evicted, most, looks)
	if most > limits.ServerConns {
		t.Errorf("the server had %d connections, the budget is %d", most, limits.ServerConns)
	}
	if len(failed) > 0 {
		t.Errorf("%d of %d calls failed", len(failed), len(asked)+len(failed))
	}
	if evicted == 0 || cold < limits.ServerConns || looks < 50 {
		t.Errorf("%d evictions, %d new connections and %d looks show nothing", evicted, cold, looks)
	}
}

// TestTenantsAreMadeWithinTheBudget makes several at a time beside calls for others that want all of it: each takes five connections.
func TestTenantsAreMadeWithinTheBudget(t *testing.T) {
	t.Parallel()
	const budget, makers, each = 60, 9, 2
	f := newBulkFleet(t, 100, 200)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Limits: tenancy.Limits{ServerConns: budget, PrimaryConns: 3, Provisions: makers}})
	conns := countConns(t, f.AdminURL)
	ctx, made := context.WithCancel(t.Context())
	defer made()
	var calls sync.WaitGroup
	calls.Go(func() {
		l := zipfLoad(tn, f.tenants)
		for ctx.Err() == nil {
			if _, failed := l.run(t.Context(), 80, time.Second); len(failed) > 0 {
				t.Errorf("%d calls failed, the first with %v", len(failed), failed[0])
			}
		}
	})
	var wg sync.WaitGroup
	for m := range makers {
		wg.Go(func() {
			for i := range each {
				if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("made-%d-%d", m, i)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	made()
	calls.Wait()
	if most, looks := conns.stop(); most > budget || most < budget/2 {
		t.Errorf("the server had %d connections in %d looks, the budget is %d", most, looks, budget)
	}
}

// TestATenantThatIsNotInUseCostsNoGoroutineAndAKilobyte uses each tenant once, and looks when their pools have been closed.
// Not parallel: it counts the whole process's memory.
func TestATenantThatIsNotInUseCostsNoGoroutineAndAKilobyte(t *testing.T) {
	tenants, together := 200, 100
	if os.Getenv("TENANCY_LONG") == "1" {
		tenants, together = 5000, 500
	}
	f := newBulkFleet(t, together+tenants, 100)
	tn := f.Open(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 60, PrimaryConns: 3, TenantIdle: time.Second}})
	use := func(some []tenancy.Tenant) {
		if _, failed := (&fleetLoad{tn: tn, tenants: some}).each(t.Context(), 8); len(failed) > 0 {
			t.Fatal(errors.Join(failed...))
		}
		untilTrue(t, "the pools of unused tenants are closed", func() bool { return len(tenancy.PooledTenants(tn)) == 0 })
	}
	measure := func() (heap, goroutines int) {
		var m runtime.MemStats
		for range 3 { // the last pools' goroutines are still on their way out
			time.Sleep(100 * time.Millisecond)
			runtime.GC()
		}
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc), runtime.NumGoroutine()
	}
	// What a node needs for so many at once, it keeps: connections to the primary, and Go's own records of goroutines that were.
	use(f.tenants[:together])
	heap, goroutines := measure()
	for some := range slices.Chunk(f.tenants[together:], together) {
		use(some)
	}
	heapAfter, goroutinesAfter := measure()
	runtime.KeepAlive(f) // its list of tenants is in both figures
	each, more := (heapAfter-heap)/tenants, goroutinesAfter-goroutines
	t.Logf("%d tenants: %d B each, %d goroutines more", tenants, each, more)
	if each > 1024 {
		t.Errorf("a tenant that is not in use costs %d B, want 1024 at most", each)
	}
	if more > 5 { // the primary's pool may have a connection more than before, or one less
		t.Errorf("%d goroutines are left of %d tenants that are not in use", more, tenants)
	}
}

// TestATenantMadeInBulkIsAsCreateMakesIt compares all that the server's catalogs and the primary have to say of two places.
func TestATenantMadeInBulkIsAsCreateMakesIt(t *testing.T) {
	t.Parallel()
	f := newBulkFleet(t, 1, 100)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Limits: bulkLimits})
	created := tenancytest.Create(t, tn, "tenant-0001")
	server, primary := superuser(t, f.AdminURL, bulkTenants), superuser(t, f.AdminURL, bulkPrimary)
	must(t, server, "INSERT INTO "+bulkPlaceOf(t, primary, created.ID).table("notes")+" (tenant, title) VALUES ('tenant-0001', 'bulk')")
	want, got := describePlace(t, primary, server, created), describePlace(t, primary, server, f.tenants[0])
	for i := range max(len(want), len(got)) {
		if i >= len(want) || i >= len(got) || want[i] != got[i] {
			t.Fatalf("they differ from line %d on:\ncreated %q\nin bulk %q", i, want[min(i, len(want)):], got[min(i, len(got)):])
		}
	}
	if len(want) < 40 {
		t.Errorf("%d lines describe too little: %q", len(want), want)
	}
}

// describePlace returns what there is to say of a tenant's place, without what is every tenant's own.
func describePlace(tb testing.TB, primary, server *pgx.Conn, tenant tenancy.Tenant) []string {
	tb.Helper()
	p := bulkPlaceOf(tb, primary, tenant.ID)
	// The roles' names begin with that of the schema, which is 20 hexadecimal digits.
	names := strings.NewReplacer(p.Schema, "{place}", tenant.UID.String(), "{uid}", tenant.Name, "{name}")
	var all []string
	for _, part := range []struct {
		conn *pgx.Conn
		sql  string
		arg  any
	}{
		{primary, `SELECT to_jsonb(t) - '{id,intent,data_source,created,updated}'::text[] FROM tenancy.tenants t WHERE id = $1`, tenant.ID},
		{primary, `SELECT to_jsonb(d) - '{id,sealed,promised,created,updated}'::text[] FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.id = $1`, tenant.ID},
		{primary, `SELECT to_jsonb(a) - '{id,at,tenant}'::text[] FROM tenancy.audit a WHERE tenant = $1`, tenant.ID},
		{primary, `SELECT to_jsonb(c) - '{epoch,tenant,stamp,at}'::text[] FROM tenancy.changes c WHERE tenant = $1`, tenant.ID},
		// The owner's last password has a day of expiry, and it has none any more.
		{server, `SELECT to_jsonb(r) - '{oid,rolpassword,rolvaliduntil}'::text[] || jsonb_build_object('password', split_part(rolpassword, ':', 1)) FROM pg_authid r WHERE starts_with(rolname, $1)`, p.Schema},
		{server, `SELECT jsonb_build_array(a.rolname, b.rolname, pg_has_role(a.oid, b.oid, 'MEMBER'), pg_has_role(a.oid, b.oid, 'USAGE'), pg_has_role(a.oid, b.oid, 'MEMBER WITH ADMIN OPTION'))
			FROM pg_roles a, pg_roles b WHERE NOT a.rolsuper AND a.oid > 16383 AND b.oid > 16383 AND (starts_with(a.rolname, $1) OR starts_with(b.rolname, $1)) AND pg_has_role(a.oid, b.oid, 'MEMBER')`, p.Schema},
		{server, `SELECT jsonb_build_array(nspname, nspowner::regrole, nspacl::text) FROM pg_namespace WHERE nspname = $1`, p.Schema},
		{server, `SELECT jsonb_build_array(defaclrole::regrole, defaclobjtype, defaclacl::text) FROM pg_default_acl WHERE defaclnamespace = to_regnamespace($1)`, p.Schema},
		{server, `SELECT jsonb_build_array(relname, relkind, relowner::regrole, relacl::text, relpersistence, reloptions) FROM pg_class WHERE relnamespace = to_regnamespace($1)`, p.Schema},
		{server, `SELECT to_jsonb(c) - 'table_catalog' FROM information_schema.columns c WHERE table_schema = $1`, p.Schema},
		{server, `SELECT jsonb_build_array(conrelid::regclass, conname, pg_get_constraintdef(oid)) FROM pg_constraint WHERE connamespace = to_regnamespace($1)`, p.Schema},
		{server, `SELECT jsonb_build_array(sequencename, start_value, increment_by, last_value) FROM pg_sequences WHERE schemaname = $1`, p.Schema},
		{server, `SELECT jsonb_build_array(proname) FROM pg_proc WHERE pronamespace = to_regnamespace($1)`, p.Schema},
		{server, `SELECT to_jsonb(m) || to_jsonb($1::text) FROM ` + p.table("tenancy_marker") + ` m`, p.Schema},
		{server, `SELECT to_jsonb(v) - 'tstamp' || to_jsonb($1::text) FROM ` + p.table("goose_db_version") + ` v`, p.Schema},
		{server, `SELECT to_jsonb(n) - '{title,tenant_id}'::text[] || to_jsonb($1::text) FROM ` + p.table("notes") + ` n`, p.Schema},
	} {
		rows, _ := part.conn.Query(tb.Context(), `SELECT line::text FROM (`+part.sql+`) AS of_it (line)`, part.arg)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			tb.Fatalf("%s: %v", part.sql, err)
		}
		for i := range lines {
			lines[i] = names.Replace(lines[i])
		}
		slices.Sort(lines)
		all = append(all, lines...)
	}
	return all
}

const (
	bulkPrimary     = "fleet_primary"
	bulkTenants     = "fleet_tenants"
	bulkProvisioner = "fleet_provisioner"
)

// bulkLimits are those under which logins are made: twice TenantConns is the server's own ceiling, under which a benchmark's pools by hand
// come beside the library's.
var bulkLimits = tenancy.Limits{TenantConns: 8}

// newBulkFleet makes n active tenants with a row in each, on a server of its own with that many connections: to drop the roles of
// thousands of tenants takes longer than to make them, and this server ends with the test. A tenant takes some milliseconds, where
// [tenancy.Catalog.Create] takes fifty and more; what it makes is the same.
func newBulkFleet(tb testing.TB, n, connections int) *benchFleet {
	tb.Helper()
	server, err := pgembed.Start(tb.Context(), pgembed.Options{Settings: map[string]string{
		"max_connections": fmt.Sprint(connections), "max_locks_per_transaction": "64",
	}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := server.Stop(); err != nil {
			tb.Error(err)
		}
	})
	if server.External() {
		tb.Skip("the server of TENANCY_TEST_URL has the connections that it has, and thousands of roles are not made there")
	}
	admin, err := url.Parse(server.URL())
	if err != nil {
		tb.Fatal("the test server's URL cannot be parsed")
	}
	at := func(login, database string) string {
		u := *admin
		u.User, u.Path = url.UserPassword(login, "secret"), "/"+database
		return u.String()
	}
	f := &benchFleet{tenants: make([]tenancy.Tenant, n), Fleet: &tenancytest.Fleet{
		AdminURL: server.URL(), PrimaryURL: at("fleet_catalog", bulkPrimary), ServerURL: at(bulkProvisioner, bulkTenants), Keys: otherKeys(tb),
	}}
	if err := tenancy.Init(tb.Context(), f.AdminConfig()); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tn, err := tenancy.Open(ctx, tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Limits: bulkLimits})
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { // its pools go before the nodes that are measured open theirs
		if err := tn.Close(); err != nil {
			tb.Error(err)
		}
	}()
	script := bulkScript(tb, server.Major())
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		conn := superuser(tb, f.AdminURL, bulkTenants)
		wg.Go(func() {
			defer conn.Close(context.Background())
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				var err error
				if f.tenants[i], err = tn.Catalog().CreateInBulk(tb.Context(), fmt.Sprintf("tenant-%04d", i), 1, func(p tenancy.BulkPlace) error {
					_, err := conn.Exec(tb.Context(), script(p))
					return err
				}); err != nil {
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
	return f
}

// bulkScript returns what Create does to a place with the migrations of the tests' service, as one transaction of a superuser.
func bulkScript(tb testing.TB, major int) func(tenancy.BulkPlace) string {
	tb.Helper()
	migration, err := os.ReadFile("testdata/migrations/00001_notes.sql")
	if err != nil {
		tb.Fatal(err)
	}
	functions, err := os.ReadFile("internal/rowsec/schema.sql")
	if err != nil {
		tb.Fatal(err)
	}
	up, _, _ := strings.Cut(string(migration), "-- +goose Down")
	admin := ""
	if major >= 16 {
		admin = "GRANT {owner}, {runtime}, {login} TO " + bulkProvisioner + " WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;\n" // what a role's maker has
	}
	script := `BEGIN;
CREATE ROLE {owner} NOLOGIN;
CREATE ROLE {runtime} NOLOGIN;
CREATE ROLE {login} {may} PASSWORD {verifier};
` + admin + `GRANT {runtime} TO {login};
GRANT {group} TO {owner}, {login};
CREATE SCHEMA {schema} AUTHORIZATION {owner};
SET LOCAL ROLE {owner};
SET LOCAL search_path = {schema};
CREATE TABLE tenancy_marker (realm uuid NOT NULL, tenant uuid NOT NULL);
GRANT SELECT ON TABLE tenancy_marker TO {runtime};
GRANT USAGE ON SCHEMA {schema} TO {runtime};
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {runtime};
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT USAGE, SELECT ON SEQUENCES TO {runtime};
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT EXECUTE ON ROUTINES TO {runtime};
ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT USAGE ON TYPES TO {runtime};
INSERT INTO tenancy_marker (realm, tenant) VALUES ({realm}, {uid});
` + strings.NewReplacer("@schema@", "{schema}", "@name@", "{schemaname}", "@id@", "{id}").Replace(string(functions)) + `
CREATE TABLE goose_db_version (
	id integer PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
	version_id bigint NOT NULL,
	is_applied boolean NOT NULL,
	tstamp timestamp NOT NULL DEFAULT now()
);
REVOKE ALL ON TABLE goose_db_version FROM {runtime};
GRANT SELECT ON TABLE goose_db_version TO {runtime};
REVOKE ALL ON SEQUENCE goose_db_version_id_seq FROM {runtime};
INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, true), (1, true);
` + up + `
INSERT INTO notes (tenant, title) VALUES ({name}, 'bulk');
COMMIT`
	return func(p tenancy.BulkPlace) string {
		return strings.NewReplacer("{group}", p.Group, "{owner}", p.Owner, "{runtime}", p.Runtime, "{login}", p.Login, "{schema}", p.Schema,
			"{may}", p.MayLogin, "{verifier}", p.Verifier, "{name}", p.Name, "{realm}", p.Realm, "{uid}", p.UID, "{id}", p.ID, "{schemaname}", p.SchemaName).Replace(script)
	}
}

// superuser connects to one database of the administrator's server, with an empty search_path.
func superuser(tb testing.TB, adminURL, database string) *pgx.Conn {
	tb.Helper()
	cc, err := pgx.ParseConfig(adminURL)
	if err != nil {
		tb.Fatal("the test server's URL cannot be parsed")
	}
	cc.Database, cc.RuntimeParams["search_path"] = database, ""
	conn, err := pgx.ConnectConfig(context.Background(), cc)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func bulkPlaceOf(tb testing.TB, primary *pgx.Conn, id tenancy.ID) (p placeRow) {
	tb.Helper()
	err := primary.QueryRow(tb.Context(), `SELECT d.schema, d.owner, d.runtime, d.login
		FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1`, id).Scan(&p.Schema, &p.Owner, &p.Runtime, &p.Login)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// connCounter looks again and again how many connections a server has.
type connCounter struct{ stop func() (most, looks int) }

// countConns counts those of everybody but superusers, in two ways: by the server's own list, every 2 ms, in which a session is when it has
// logged in; and, where processes can be looked at, by the server's processes, every 10 ms, one of which is there from before the log-in until after the good-bye.
func countConns(tb testing.TB, adminURL string) connCounter {
	tb.Helper()
	conn := superuser(tb, adminURL, "postgres")
	var dir string
	if err := conn.QueryRow(tb.Context(), `SHOW data_directory`).Scan(&dir); err != nil {
		tb.Fatal(err)
	}
	processes := backendsOf(tb, dir, conn.Config().User)
	ctx, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	look := func(every time.Duration, count func() (int, error), most, looks *int) {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for ctx.Err() == nil {
			n, err := count()
			if err != nil {
				tb.Error(err)
				return
			}
			*most, *looks = max(*most, n), *looks+1
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	}
	var listed, ran, looks, also int
	wg.Go(func() {
		look(2*time.Millisecond, func() (n int, err error) {
			err = conn.QueryRow(context.Background(), `SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND usename IS DISTINCT FROM current_user`).Scan(&n)
			return n, err
		}, &listed, &looks)
	})
	wg.Go(func() { look(10*time.Millisecond, processes, &ran, &also) })
	stop := sync.OnceValues(func() (int, int) {
		end()
		wg.Wait()
		tb.Logf("at most %d sessions in %d looks, %d processes in %d", listed, looks, ran, also)
		return max(listed, ran), looks
	})
	tb.Cleanup(func() { stop() })
	return connCounter{stop}
}

// backendsOf returns what counts the processes of a server that work for clients, but for those of one user. Where there is no /proc they are none.
func backendsOf(tb testing.TB, dataDir, but string) func() (int, error) {
	tb.Helper()
	file, err := os.ReadFile(filepath.Join(dataDir, "postmaster.pid"))
	if err != nil {
		tb.Fatal(err)
	}
	pid, _, _ := strings.Cut(string(file), "\n")
	children := filepath.Join("/proc", pid, "task", pid, "children")
	if _, err := os.Stat(children); err != nil {
		return func() (int, error) { return 0, nil }
	}
	return func() (n int, err error) {
		list, err := os.ReadFile(children)
		if err != nil {
			return 0, err
		}
		for _, child := range strings.Fields(string(list)) {
			title, _ := os.ReadFile(filepath.Join("/proc", child, "cmdline")) // it may have ended
			// A client's has its address in the title: user, database, 127.0.0.1(port), what it does.
			who, client, ok := strings.Cut(strings.TrimPrefix(string(title), "postgres: "), "(")
			if ok && client != "" && !strings.HasPrefix(who, but+" ") {
				n++
			}
		}
		return n, nil
	}
}

// fleetLoad is what clients do who ask one tenant's row after the other.
type fleetLoad struct {
	tn      *tenancy.Tenancy
	tenants []tenancy.Tenant
	pick    func(r *rand.Rand) func() int // makes one client's choice of a tenant
	seen    sync.Map                      // of backend: those that have answered
}

// backend is a process of the server that works for a tenant.
type backend struct {
	tenant int
	pid    uint32
}

// reply is one call.
type reply struct {
	tenant int
	took   time.Duration
	cold   bool // the connection was new
}

const zipfExponent = 1.1

// zipfLoad asks few tenants often and many seldom: the k-th is asked k^1.1 times more seldom than the first. The first ones are the hottest.
func zipfLoad(tn *tenancy.Tenancy, tenants []tenancy.Tenant) *fleetLoad {
	return &fleetLoad{tn: tn, tenants: tenants, pick: func(r *rand.Rand) func() int {
		z := rand.NewZipf(r, zipfExponent, 1, uint64(len(tenants)-1))
		return func() int { return int(z.Uint64()) }
	}}
}

// run has the clients ask for that long, each as fast as it is answered.
func (l *fleetLoad) run(ctx context.Context, clients int, d time.Duration) ([]reply, []error) {
	var stop atomic.Bool
	defer time.AfterFunc(d, func() { stop.Store(true) }).Stop()
	return l.clients(clients, func(c int, keep func(reply, error)) {
		pick := l.pick(rand.New(rand.NewPCG(uint64(c), rand.Uint64())))
		for !stop.Load() {
			keep(l.ask(ctx, pick()))
		}
	})
}

// each has every tenant asked once.
func (l *fleetLoad) each(ctx context.Context, clients int) ([]reply, []error) {
	var next atomic.Int64
	return l.clients(clients, func(_ int, keep func(reply, error)) {
		for i := int(next.Add(1)) - 1; i < len(l.tenants); i = int(next.Add(1)) - 1 {
			keep(l.ask(ctx, i))
		}
	})
}

func (l *fleetLoad) clients(n int, client func(c int, keep func(reply, error))) (answers []reply, failed []error) {
	var mu sync.Mutex // guards answers and failed
	var wg sync.WaitGroup
	for c := range n {
		wg.Go(func() {
			var mine []reply
			var errs []error
			client(c, func(a reply, err error) {
				if err != nil {
					errs = append(errs, err)
					return
				}
				mine = append(mine, a)
			})
			mu.Lock()
			defer mu.Unlock()
			answers, failed = append(answers, mine...), append(failed, errs...)
		})
	}
	wg.Wait()
	return answers, failed
}

// ask reads a tenant's row as a request does that has nothing but the tenant's ID, and checks whose it is.
func (l *fleetLoad) ask(ctx context.Context, i int) (reply, error) {
	t := &l.tenants[i]
	began := time.Now()
	ctx, err := l.tn.Enter(ctx, t.ID)
	if err != nil {
		return reply{}, err
	}
	var name string
	by := backend{tenant: i}
	if err := l.tn.DB().QueryRow(ctx, `SELECT tenant, pg_backend_pid() FROM notes WHERE id = $1`, 1).Scan(&name, &by.pid); err != nil {
		return reply{}, err
	}
	if name != t.Name {
		return reply{}, fmt.Errorf("asked as %s, answered by %s", t.Name, name)
	}
	took := time.Since(began)
	_, warm := l.seen.LoadOrStore(by, nil)
	return reply{tenant: i, took: took, cold: !warm}, nil
}

// percentile returns the time within which that share of the answers came, 0 without any.
func percentile(answers []reply, share float64, of func(reply) bool) time.Duration {
	var took []time.Duration
	for _, a := range answers {
		if of == nil || of(a) {
			took = append(took, a.took)
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return took[min(len(took)-1, int(share*float64(len(took))))]
}
