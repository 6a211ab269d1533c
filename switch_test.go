package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/tenancytest"
)

// liveTurns is how often a tenant is switched, or its password rotated, under load: 15 times, with TENANCY_LONG=1 100 times.
func liveTurns() int {
	if os.Getenv("TENANCY_LONG") == "1" {
		return 100
	}
	return 15
}

// killings is how many processes are killed at random moments: 6, with TENANCY_LONG=1 60.
func killings() int {
	if os.Getenv("TENANCY_LONG") == "1" {
		return 60
	}
	return 6
}

// load is work on tenants that goes on until it is stopped. Every failure counts.
type load struct {
	t      *testing.T
	each   func(ctx context.Context, db *tenancy.TenantAwareDB, name string, turn int) (written int, err error)
	stop   chan struct{}
	wg     sync.WaitGroup
	calls  atomic.Int64
	writes map[string]*atomic.Int64 // rows that were acknowledged, by tenant

	mu     sync.Mutex // guards failed
	failed []string
}

// startLoad has workers on each node work on each tenant.
func startLoad(t *testing.T, workers int, tenants []tenancy.Tenant, nodes ...*tenancy.Tenancy) *load {
	t.Helper()
	return startLoadOf(t, plainCall, workers, tenants, nodes...)
}

// startLoadOf is startLoad with calls of another kind, each of which answers how many rows it has written.
func startLoadOf(t *testing.T, each func(ctx context.Context, db *tenancy.TenantAwareDB, name string, turn int) (written int, err error), workers int, tenants []tenancy.Tenant, nodes ...*tenancy.Tenancy) *load {
	t.Helper()
	l := &load{t: t, each: each, stop: make(chan struct{}), writes: map[string]*atomic.Int64{}}
	t.Cleanup(l.end)
	for _, tenant := range tenants {
		l.writes[tenant.Name] = new(atomic.Int64)
		for _, tn := range nodes {
			// A node hears of a tenant that another one has made within milliseconds.
			ctx, err := tn.Enter(t.Context(), tenant.ID)
			for end := time.Now().Add(5 * time.Second); errors.Is(err, tenancy.ErrTenantNotReady) && time.Now().Before(end); {
				time.Sleep(5 * time.Millisecond)
				ctx, err = tn.Enter(t.Context(), tenant.ID)
			}
			if err != nil {
				t.Fatal(err)
			}
			for w := range workers {
				l.wg.Go(func() { l.work(ctx, tn.DB(), tenant.Name, w) })
			}
		}
	}
	return l
}

func (l *load) work(ctx context.Context, db *tenancy.TenantAwareDB, name string, turn int) {
	for ; ; turn++ {
		select {
		case <-l.stop:
			return
		default:
		}
		written, err := l.each(ctx, db, name, turn)
		if ctx.Err() != nil { // the test has failed elsewhere
			return
		}
		l.calls.Add(1)
		if err == nil {
			l.writes[name].Add(int64(written))
			continue
		}
		l.mu.Lock()
		l.failed = append(l.failed, fmt.Sprintf("%s, %d: %v", name, turn, err))
		l.mu.Unlock()
	}
}

const writeNote = `INSERT INTO notes (tenant, title) VALUES ($1, $2)`

// plainCall is a statement, a query or a transaction.
func plainCall(ctx context.Context, db *tenancy.TenantAwareDB, name string, turn int) (written int, err error) {
	switch turn % 3 {
	case 0:
		_, err = db.Exec(ctx, writeNote, name, "alone")
		return 1, err
	case 1:
		rows, _ := db.Query(ctx, `SELECT tenant FROM notes ORDER BY id DESC LIMIT 5`)
		found, err := pgx.CollectRows(rows, pgx.RowTo[string])
		for _, f := range found {
			if f != name {
				err = fmt.Errorf("%s reads a row of %s", name, f)
			}
		}
		return 0, err
	}
	return 2, db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		for range 2 {
			if _, err := tx.Exec(ctx, writeNote, name, "pair"); err != nil {
				return err
			}
		}
		return nil
	})
}

// end stops the work. It may be called again.
func (l *load) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.wg.Wait()
}

// wantNoFailure ends the work and checks that none of it failed, and that the tables, read past the library, hold
// every acknowledged row once and where it belongs. tables are those of each tenant.
func (l *load) wantNoFailure(admin *pgx.Conn, tables map[string][]string) {
	l.t.Helper()
	l.end()
	for i, f := range l.failed {
		if i < 10 {
			l.t.Errorf("failed: %s", f)
		}
	}
	l.t.Logf("%d of %d requests failed", len(l.failed), l.calls.Load())
	if len(l.failed) > 0 {
		l.t.Errorf("%d of %d requests failed, want none", len(l.failed), l.calls.Load())
	}
	for name, of := range tables {
		var rows, foreign, halves int64
		for _, table := range of {
			rows += scan[int64](l.t, admin, `SELECT count(*) FROM `+table+` WHERE title IN ('alone', 'pair')`)
			foreign += scan[int64](l.t, admin, `SELECT count(*) FROM `+table+` WHERE tenant <> $1`, name)
			halves += scan[int64](l.t, admin, `SELECT count(*) FROM `+table+` WHERE title = 'pair'`) % 2
		}
		if acknowledged := l.writes[name].Load(); rows != acknowledged || foreign != 0 || halves != 0 {
			l.t.Errorf("%s: %d rows for %d acknowledged, %d of others, %d halves of transactions", name, rows, acknowledged, foreign, halves)
		}
	}
}

// wantClosed checks past the library that a login is closed, or gone, and has no session.
func wantClosed(t *testing.T, admin *pgx.Conn, login string) {
	t.Helper()
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, login); n != 0 {
		t.Errorf("%d sessions of %s are left", n, login)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1 AND rolcanlogin`, login); n != 0 {
		t.Errorf("%s is open", login)
	}
}

// wantOpen checks past the library that a login is open, with the server's ceiling.
func wantOpen(t *testing.T, admin *pgx.Conn, login string) {
	t.Helper()
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE rolname = $1 AND rolcanlogin AND rolconnlimit > 0`, login); n != 1 {
		t.Errorf("%s is not open, or has no ceiling", login)
	}
}

// prepare makes another place for the tenant.
func prepare(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID, server string) tenancy.DataSource {
	t.Helper()
	d, err := tn.Catalog().Prepare(t.Context(), id, server)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// sourceOf is where the tenant is now, with the password.
func sourceOf(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID) tenancy.DataSource {
	t.Helper()
	d, err := tn.Catalog().SourceForTest(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func tableOf(d tenancy.DataSource) string { return pgx.Identifier{d.Schema, "notes"}.Sanitize() }

// current answers the schema that a call of the tenant works in.
func current(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID) string {
	t.Helper()
	ctx, err := tn.Enter(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	var schema string
	if err := tn.DB().QueryRow(ctx, `SELECT current_schema()`).Scan(&schema); err != nil {
		t.Fatal(err)
	}
	return schema
}

// ask reads one value as a superuser, over a connection that is closed at once: a long test would end with hundreds of them.
func ask[T any](t *testing.T, f *tenancytest.Fleet, database, sql string, args ...any) T {
	t.Helper()
	admin := f.Admin(t, database)
	defer admin.Close(context.Background())
	return scan[T](t, admin, sql, args...)
}

// change is ask for a statement that answers nothing.
func change(t *testing.T, f *tenancytest.Fleet, database, sql string, args ...any) {
	t.Helper()
	admin := f.Admin(t, database)
	defer admin.Close(context.Background())
	must(t, admin, sql, args...)
}

// schemaOf is where the primary says that the tenant is.
func schemaOf(t *testing.T, f *tenancytest.Fleet, id tenancy.ID) string {
	t.Helper()
	return ask[string](t, f, "primary", `SELECT d.schema FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1`, id)
}

// wantPlace checks where the primary says that the tenant is, and what it has to close.
func wantPlace(t *testing.T, f *tenancytest.Fleet, id tenancy.ID, d tenancy.DataSource, leaving ...tenancy.DataSource) {
	t.Helper()
	if schema := schemaOf(t, f, id); schema != d.Schema {
		t.Errorf("the tenant is in %s, want %s", schema, d.Schema)
	}
	due := ask[[]string](t, f, "primary", `SELECT coalesce(array_agg(schema ORDER BY schema), '{}') FROM tenancy.data_sources WHERE leaving IS NOT NULL`)
	var want []string
	for _, l := range leaving {
		want = append(want, l.Schema)
	}
	if strings.Join(due, " ") != strings.Join(want, " ") {
		t.Errorf("to be closed: %q, want %q", due, want)
	}
}

// age makes what a verb has left old enough for the validity job, which leaves fresh verbs alone.
func age(t *testing.T, f *tenancytest.Fleet) {
	t.Helper()
	change(t, f, "primary", `UPDATE tenancy.data_sources SET updated = updated - interval '1 hour'`)
	change(t, f, "primary", `UPDATE tenancy.tenants SET updated = updated - interval '1 hour'`)
}

// TestLiveSwitchesFailNoRequest moves a tenant to and fro while two nodes work on it and on another one.
func TestLiveSwitchesFailNoRequest(t *testing.T) {
	f := tenancytest.NewFleet(t)
	cfg := tenancy.Config{Migrations: noteMigrations, Limits: tenancy.Limits{Nodes: 2}}
	tn, second := f.Open(t, cfg), f.Open(t, cfg)
	acme, globex := tenancytest.Create(t, tn, "acme"), tenancytest.Create(t, tn, "globex")
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	admin := f.Admin(t, "tenants")
	l := startLoad(t, 4, []tenancy.Tenant{acme, globex}, tn, second)
	began, slowest := time.Now(), time.Duration(0)
	for i := range liveTurns() {
		start := time.Now()
		if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, there); err != nil {
			t.Fatalf("switch %d: %v", i, err)
		}
		slowest = max(slowest, time.Since(start))
		wantClosed(t, admin, here.User)
		wantOpen(t, admin, there.User)
		wantPlace(t, f, acme.ID, there)
		here, there = there, here
	}
	t.Logf("%d switches in %v, the slowest %v", liveTurns(), time.Since(began), slowest)
	l.wantNoFailure(admin, map[string][]string{"acme": {tableOf(here), tableOf(there)}, "globex": {tableOf(sourceOf(t, tn, globex.ID))}})
}

// TestLiveSwitchesBetweenServersFailNoRequest is the same with a place on a PostgreSQL of its own.
func TestLiveSwitchesBetweenServersFailNoRequest(t *testing.T) {
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	acme, globex := tenancytest.Create(t, tn, "acme"), tenancytest.Create(t, tn, "globex")
	server, err := pgembed.Start(t.Context(), pgembed.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	if server.External() {
		t.Skip("TENANCY_TEST_URL names one server; this needs another one")
	}
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal("the second server's URL cannot be parsed")
	}
	u.Path = "/far_tenants"
	super := u.String()
	at := func(user, database string) string {
		u.User, u.Path = url.UserPassword(user, "secret-of-"+user), "/"+database
		return u.String()
	}
	a := tenancy.AdminConfig{AdminURL: server.URL(), PrimaryURL: at("far_catalog", "far_primary"), Server: tenancy.ServerConfig{Name: "far", URL: at("far_provisioner", "far_tenants")}, Keys: f.Keys}
	if err := tenancy.Init(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().AddServer(t.Context(), a.Server); err != nil {
		t.Fatal(err)
	}
	near, far := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "far")
	atNear, atFar := f.Admin(t, "tenants"), connectURL(t, super)
	l := startLoad(t, 4, []tenancy.Tenant{acme, globex}, tn)
	for i := range (liveTurns() + 4) / 5 {
		if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, far); err != nil {
			t.Fatalf("switch %d: %v", i, err)
		}
		wantClosed(t, atNear, near.User)
		wantOpen(t, atFar, far.User)
		if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, near); err != nil {
			t.Fatalf("switch %d back: %v", i, err)
		}
		wantClosed(t, atFar, far.User)
		wantOpen(t, atNear, near.User)
	}
	l.end()
	there := scan[int64](t, atFar, `SELECT count(*) FROM `+tableOf(far)+` WHERE tenant = 'acme'`)
	if n := scan[int64](t, atFar, `SELECT count(*) FROM `+tableOf(far)); n != there || n == 0 {
		t.Errorf("%d rows at the second server, %d of them its own", n, there)
	}
	l.writes["acme"].Add(-there)
	l.wantNoFailure(atNear, map[string][]string{"acme": {tableOf(near)}, "globex": {tableOf(sourceOf(t, tn, globex.ID))}})
}

func TestATransactionEndsWhereItBegan(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	switched := make(chan error, 1)
	go func() { switched <- tn.Catalog().SetDataSource(t.Context(), acme.ID, there) }()
	admin := f.Admin(t, "tenants")
	until(t, 5*time.Second, "false", func() string { // the switch is made, and waits for the transaction
		return fmt.Sprint(scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, here.User))
	})
	if got := current(t, tn, acme.ID); got != there.Schema {
		t.Errorf("new work during the drain is in %s, want %s", got, there.Schema)
	}
	if got, want := current(t, tn, globex.ID), placeOf(t, f, globex.ID).Schema; got != want {
		t.Errorf("the other tenant is in %s, want %s", got, want)
	}
	if _, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ('acme', 'begun before')`); err != nil {
		t.Errorf("work in flight: %v", err)
	}
	select {
	case err := <-switched:
		t.Fatalf("the switch did not wait for the transaction: %v", err)
	default:
	}
	if err := tx.Commit(ctx); err != nil {
		t.Errorf("its commit: %v", err)
	}
	if err := <-switched; err != nil {
		t.Error(err)
	}
	wantClosed(t, admin, here.User)
	for d, want := range map[tenancy.DataSource]int{here: 1, there: 0} {
		if n := scan[int](t, admin, `SELECT count(*) FROM `+tableOf(d)+` WHERE title = 'begun before'`); n != want {
			t.Errorf("%d rows of the transaction in %s, want %d", n, d.Schema, want)
		}
	}
}

func TestATransactionThatDoesNotEndIsCut(t *testing.T) {
	t.Parallel()
	const drain = 400 * time.Millisecond
	f, tn, acme, _ := twoTenants(t, tenancy.Config{DrainTimeout: drain})
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	for name, leave := range leavers(t, tn, acme.ID, there) {
		from := sourceOf(t, tn, acme.ID)
		tx, err := tn.DB().Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := leave(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(start); took < drain || took > drain+5*time.Second {
			t.Errorf("%s: it waited %v for the transaction, want %v", name, took, drain)
		}
		wantClosed(t, f.Admin(t, "tenants"), from.User)
		if _, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ('acme', 'too late')`); err == nil {
			t.Errorf("%s: the transaction goes on", name)
		}
		if err := tx.Commit(ctx); err == nil {
			t.Errorf("%s: the transaction was committed", name)
		}
	}
	for _, d := range []tenancy.DataSource{here, there} {
		if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM `+tableOf(d)); n != 0 {
			t.Errorf("%d rows in %s", n, d.Schema)
		}
	}
}

// leavers are the verbs by which a tenant leaves a login.
func leavers(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID, to tenancy.DataSource) map[string]func() error {
	return map[string]func() error{
		"switch":   func() error { return tn.Catalog().SetDataSource(t.Context(), id, to) },
		"rotation": func() error { return tn.Catalog().RotatePassword(t.Context(), id) },
	}
}

// TestATransactionThatKeepsTheLoginsRowKeepsNoVerb: a login may change its own password, and the row of its role is its transaction's then.
func TestATransactionThatKeepsTheLoginsRowKeepsNoVerb(t *testing.T) {
	t.Parallel()
	const drain = 400 * time.Millisecond
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: drain})
	c, admin := tn.Catalog(), f.Admin(t, "tenants")
	verbs := leavers(t, tn, acme.ID, prepare(t, tn, acme.ID, ""))
	verbs["suspension"] = func() error {
		if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
			return err
		}
		wantClosed(t, admin, sourceOf(t, tn, acme.ID).User)
		return c.Resume(t.Context(), acme.ID)
	}
	for name, verb := range verbs {
		from := sourceOf(t, tn, acme.ID)
		var keepers sync.WaitGroup
		for range 2 { // one has the row, the other one waits for it
			session := login(t, tn, acme.ID)
			must(t, session, `BEGIN`)
			keepers.Go(func() { _, _ = session.Exec(t.Context(), `ALTER ROLE CURRENT_USER PASSWORD 'mine'`) }) // until its session is ended
		}
		until(t, 5*time.Second, "1", func() string {
			return fmt.Sprint(scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'`, from.User))
		})
		start := time.Now()
		if err := verb(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		keepers.Wait()
		if took := time.Since(start); took < drain || took > drain+15*time.Second {
			t.Errorf("%s: it took %v", name, took)
		}
		if name != "suspension" {
			wantClosed(t, admin, from.User)
		}
		if got := current(t, tn, globex.ID); got != placeOf(t, f, globex.ID).Schema {
			t.Errorf("%s: the other tenant is in %s", name, got)
		}
	}
}

// TestACallThatIsIdleIsInFlight: between two statements its session looks as if nobody used it.
func TestACallThatIsIdleIsInFlight(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	admin := f.Admin(t, "tenants")
	for name, leave := range leavers(t, tn, acme.ID, prepare(t, tn, acme.ID, "")) {
		from, left := sourceOf(t, tn, acme.ID), make(chan error, 1)
		err := tn.DB().WithConn(ctx, func(ctx context.Context, conn *pgx.Conn) error {
			go func() { left <- leave() }()
			until(t, 5*time.Second, "false", func() string {
				return fmt.Sprint(scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, from.User))
			})
			for range 20 { // longer than a look at the sessions takes
				time.Sleep(10 * time.Millisecond)
				if _, err := conn.Exec(ctx, `SELECT 1`); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-left; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantClosed(t, admin, from.User)
	}
}

// TestANodeThatHearsLateIsWaitedFor has a node that hears no notification work on through it: its poll tells it in time.
func TestANodeThatHearsLateIsWaitedFor(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{DrainTimeout: 200 * time.Millisecond, Limits: tenancy.Limits{Nodes: 2}})
	w, late := watchedNode(t, f, tenancy.Config{Lookups: tenancy.LookupConfig{PollPeriod: 4 * time.Second}}) // the slowest that there is
	w.deafen()
	verbs := leavers(t, tn, acme.ID, prepare(t, tn, acme.ID, ""))
	l := startLoad(t, 2, []tenancy.Tenant{acme}, late)
	for name, leave := range verbs {
		from := sourceOf(t, tn, acme.ID)
		if err := leave(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantClosed(t, f.Admin(t, "tenants"), from.User)
	}
	l.wantNoFailure(nil, nil)
}

// TestAPausedNodeCannotWriteToTheOldPlace stops a process that holds a connection there.
func TestAPausedNodeCannotWriteToTheOldPlace(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{DrainTimeout: 300 * time.Millisecond})
	other := startNode(t, f)
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	if got := other.ask("query", "alice@acme.test"); got != here.Schema {
		t.Fatalf("the second process is in %s", got)
	}
	admin := f.Admin(t, "tenants")
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, here.User); n == 0 {
		t.Fatal("the second process holds no connection: there is nothing to show")
	}
	if err := other.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, there); err != nil {
		t.Error(err)
	}
	wantClosed(t, admin, here.User)
	if err := other.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, there.Schema, func() string { return other.ask("query", "alice@acme.test") })
	wantClosed(t, admin, here.User)
}

func TestASwitchThatIsRefusedMovesNothing(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	far := tenancytest.NewFleet(t)
	way := startProxy(t, far.ServerURL)
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "tenants")
	if err := c.AddServer(ctx, tenancy.ServerConfig{Name: "far", URL: way.url}); err != nil {
		t.Fatal(err)
	}
	here, former, unreachable, foreign := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "main"), prepare(t, tn, acme.ID, "far"), prepare(t, tn, globex.ID, "main")
	for _, d := range []tenancy.DataSource{former, here} { // so that former is one that the tenant has left
		if err := c.SetDataSource(ctx, acme.ID, d); err != nil {
			t.Fatal(err)
		}
	}
	never := prepare(t, tn, acme.ID, "main")
	before := mustTenant(t, tn, "acme").Generation
	way.cut()
	with := func(d tenancy.DataSource, password tenancy.Secret) tenancy.DataSource {
		d.Password = password
		return d
	}
	for _, r := range []struct {
		name string
		to   tenancy.DataSource
		good func(error) bool
	}{
		{"an_unreachable_server", unreachable, func(err error) bool { return err != nil && strings.Contains(err.Error(), unreachable.Address()) }},
		{"another_tenants_prepared_place", foreign, func(err error) bool { return errors.Is(err, tenancy.ErrIdentity) }},
		{"another_tenants_own_place", sourceOf(t, tn, globex.ID), func(err error) bool { return errors.Is(err, tenancy.ErrIdentity) }},
		{"a_wrong_password", with(never, "wrong"), func(err error) bool { return sqlState(err) == "28P01" }},
		{"a_wrong_password_for_a_place_that_was_left", with(former, "wrong"), func(err error) bool { return sqlState(err) == "28P01" }},
	} {
		if err := c.SetDataSource(ctx, acme.ID, r.to); !r.good(err) || errors.Is(err, tenancy.ErrNotClosed) {
			t.Errorf("%s: %v", r.name, err)
		}
		wantPlace(t, f, acme.ID, here)
		if got := current(t, tn, acme.ID); got != here.Schema {
			t.Errorf("%s: work is done in %s", r.name, got)
		}
		wantOpen(t, admin, here.User)
		wantClosed(t, admin, former.User)
		wantOpen(t, admin, never.User) // the operator fills it
		wantOpen(t, admin, foreign.User)
	}
	if after := mustTenant(t, tn, "acme").Generation; after != before {
		t.Errorf("generation %d after %d", after, before)
	}
	way.mend()
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.SetDataSource(ctx, acme.ID, former), tenancy.ErrTenantGone)
	wantClosed(t, admin, former.User)
}

// TestAPlaceIsProvedBeforeATenantMoves: the primary says that the place is acme's, and what is there says that it is not.
func TestAPlaceIsProvedBeforeATenantMoves(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, admin := tn.Catalog(), f.Admin(t, "tenants")
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	marker := pgx.Identifier{there.Schema, "tenancy_marker"}.Sanitize()
	before := mustTenant(t, tn, "acme").Generation
	for column, value := range map[string]string{"tenant": globex.UID.String(), "realm": acme.UID.String()} {
		good := scan[string](t, admin, `SELECT `+column+`::text FROM `+marker)
		must(t, admin, `UPDATE `+marker+` SET `+column+` = $1`, value)
		wantError(t, c.SetDataSource(t.Context(), acme.ID, there), tenancy.ErrIdentity, "marker")
		wantPlace(t, f, acme.ID, here)
		wantOpen(t, admin, here.User)
		if after := mustTenant(t, tn, "acme").Generation; after != before {
			t.Errorf("%s: generation %d after %d", column, after, before)
		}
		for id, want := range map[tenancy.ID]string{acme.ID: here.Schema, globex.ID: placeOf(t, f, globex.ID).Schema} {
			if got := current(t, tn, id); got != want {
				t.Errorf("%s: work is done in %s, want %s", column, got, want)
			}
		}
		must(t, admin, `UPDATE `+marker+` SET `+column+` = $1`, good)
	}
	if err := c.SetDataSource(t.Context(), acme.ID, there); err != nil {
		t.Error(err)
	}
}

func TestAnOldPlaceOutOfReachIsClosedLater(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	far := tenancytest.NewFleet(t)
	way := startProxy(t, far.ServerURL)
	c, ctx, admin := tn.Catalog(), t.Context(), far.Admin(t, "tenants")
	if err := c.AddServer(ctx, tenancy.ServerConfig{Name: "far", URL: way.url}); err != nil {
		t.Fatal(err)
	}
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "far")
	if err := c.SetDataSource(ctx, acme.ID, there); err != nil {
		t.Fatal(err)
	}
	way.cut()
	wantError(t, c.SetDataSource(ctx, acme.ID, here), tenancy.ErrNotClosed, "has moved", there.Address())
	wantPlace(t, f, acme.ID, here, there)
	if got := current(t, tn, acme.ID); got != here.Schema {
		t.Errorf("work is done in %s, want %s", got, here.Schema)
	}
	if err := tn.Refresh(ctx); err != nil {
		t.Errorf("the validity job does not leave a fresh switch alone: %v", err)
	}
	age(t, f)
	if err := tn.Refresh(ctx); err == nil || !strings.Contains(err.Error(), there.Address()) {
		t.Errorf("the validity job says nothing of the server: %v", err)
	}
	wantPlace(t, f, acme.ID, here, there)
	way.mend()
	wantOpen(t, admin, there.User)
	age(t, f)
	if err := tn.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, admin, there.User)
	wantPlace(t, f, acme.ID, here)
	// And it can be taken again.
	if err := c.SetDataSource(ctx, acme.ID, there); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, admin, there.User)
	wantPlace(t, f, acme.ID, there)
}

// TestThePlaceInUseIsNeverClosedAsALeftOne moves back as a release does that knows nothing of what is to be closed.
func TestThePlaceInUseIsNeverClosedAsALeftOne(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	here := sourceOf(t, tn, acme.ID)
	must(t, f.Admin(t, "primary"), `UPDATE tenancy.data_sources SET leaving = now() - interval '1 hour', updated = now() - interval '1 hour' WHERE schema = $1`, here.Schema)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, f.Admin(t, "tenants"), here.User)
	if got := current(t, tn, acme.ID); got != here.Schema {
		t.Errorf("work is done in %s, want %s", got, here.Schema)
	}
}

// TestATenantMovesBackToWhereItWasMade does it as any caller can, who has never seen the password of that place.
func TestATenantMovesBackToWhereItWasMade(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, ctx := tn.Catalog(), t.Context()
	source := func(id tenancy.ID) tenancy.DataSource {
		t.Helper()
		d, err := c.DataSource(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	move := func(d tenancy.DataSource) {
		t.Helper()
		if err := c.SetDataSource(ctx, acme.ID, d); err != nil {
			t.Fatal(err)
		}
		if got := current(t, tn, acme.ID); got != d.Schema {
			t.Errorf("work is done in %s, want %s", got, d.Schema)
		}
	}
	made := source(acme.ID)
	there := prepare(t, tn, acme.ID, "")
	move(there)
	move(made)
	move(made) // nothing is new
	if err := c.RotatePassword(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	before := mustTenant(t, tn, "acme").Generation
	for _, password := range []tenancy.Secret{"", "wrong"} {
		made.Password = password
		wantError(t, c.SetDataSource(ctx, acme.ID, made), tenancy.ErrInvalid, made.User, source(acme.ID).User)
	}
	if after := mustTenant(t, tn, "acme").Generation; after != before {
		t.Errorf("generation %d after %d", after, before)
	}
	there.Password = ""
	move(there)
	made.Password = ""
	move(made) // by the login that it had when it was made
	wantError(t, c.SetDataSource(ctx, acme.ID, source(globex.ID)), tenancy.ErrIdentity)
}

func TestAPasswordThatWasChangedByHandIsTold(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	d, err := tn.Catalog().DataSource(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	must(t, f.Admin(t, "tenants"), `ALTER ROLE `+d.User+` PASSWORD 'by-hand'`)
	d.Password = "by-hand"
	if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, d); err != nil {
		t.Fatal(err)
	}
	wantPlace(t, f, acme.ID, d)
	wantOpen(t, f.Admin(t, "tenants"), d.User)
	if got := current(t, tn, acme.ID); got != d.Schema {
		t.Errorf("work is done in %s, want %s", got, d.Schema)
	}
}

// startVerb has another process move the tenant to the first place, to the second and so on in a circle, until it is killed. Without places it
// rotates the tenant's password.
func startVerb(t *testing.T, f *tenancytest.Fleet, id tenancy.ID, places ...tenancy.DataSource) *exec.Cmd {
	t.Helper()
	var urls []string
	for _, d := range places {
		urls = append(urls, fmt.Sprintf("postgres://%s:%s@%s?schema=%s", d.User, d.Password.Reveal(), d.Address(), d.Schema))
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestVerbProcess$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("TENANCY_TEST_TENANT=%d", id), "TENANCY_TEST_PLACES="+strings.Join(urls, " "), "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(cmd) })
	return cmd
}

// kill ends a process as a crash does. It may be called again.
func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// killAtWork is kill for a process that must not have ended before.
func killAtWork(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	kill(cmd)
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() {
		t.Errorf("the process had ended by itself: %v", cmd.ProcessState)
	}
}

// bury takes a node that was killed off the list, so that nobody waits for it.
func bury(t *testing.T, f *tenancytest.Fleet, cmd *exec.Cmd) {
	t.Helper()
	change(t, f, "primary", `DELETE FROM tenancy.nodes WHERE name LIKE '%/' || $1::text`, fmt.Sprint(cmd.Process.Pid))
}

// TestVerbProcess is the other process; without its environment it is nothing.
func TestVerbProcess(t *testing.T) {
	var id tenancy.ID
	if _, err := fmt.Sscan(os.Getenv("TENANCY_TEST_TENANT"), &id); err != nil {
		return
	}
	cfg, err := tenancy.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	tn, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	verbs := []func() error{func() error { return tn.Catalog().RotatePassword(t.Context(), id) }}
	if places := strings.Fields(os.Getenv("TENANCY_TEST_PLACES")); len(places) > 0 {
		verbs = nil
		for _, text := range places {
			d, err := tenancy.ParseDataSource(text)
			if err != nil {
				t.Fatal(err)
			}
			verbs = append(verbs, func() error { return tn.Catalog().SetDataSource(t.Context(), id, d) })
		}
	}
	for i := 0; ; i++ {
		if err := verbs[i%len(verbs)](); err != nil {
			t.Fatal(err)
		}
	}
}

// orphans ends the server's processes of a node that was killed: they would go on with the statement that they wait in.
func orphans(t *testing.T, admin *pgx.Conn) {
	t.Helper()
	must(t, admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'tenancy provisioner'`)
}

// waiting counts the statements of the application that wait for a row in admin's database.
func waiting(t *testing.T, admin *pgx.Conn, application string) string {
	t.Helper()
	return fmt.Sprint(scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1
		AND wait_event_type = 'Lock' AND wait_event <> 'advisory'`, application))
}

// TestASwitchThatWasKilledIsFinished kills the process that moves a tenant, each time at another step.
func TestASwitchThatWasKilledIsFinished(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: 300 * time.Millisecond})
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	admin, primary := f.Admin(t, "tenants"), f.Admin(t, "primary")
	finish := func(in, out tenancy.DataSource) {
		t.Helper()
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantPlace(t, f, acme.ID, in)
		wantOpen(t, admin, in.User)
		wantClosed(t, admin, out.User)
		for id, want := range map[tenancy.ID]string{acme.ID: in.Schema, globex.ID: placeOf(t, f, globex.ID).Schema} {
			if got := current(t, tn, id); got != want {
				t.Errorf("work is done in %s, want %s", got, want)
			}
		}
	}

	// Before the old place's login is closed.
	blocker, err := f.Admin(t, "tenants").Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blocker.Exec(t.Context(), `ALTER ROLE `+here.User+` CONNECTION LIMIT 50`); err != nil {
		t.Fatal(err)
	}
	verb := startVerb(t, f, acme.ID, there)
	until(t, 20*time.Second, "1", func() string { return waiting(t, admin, "tenancy provisioner") })
	kill(verb)
	bury(t, f, verb)
	orphans(t, admin)
	if err := blocker.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantPlace(t, f, acme.ID, there, here)
	wantOpen(t, admin, here.User)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, admin, here.User) // fresh verbs are left alone
	finish(there, here)

	// While a transaction drains.
	stolen, err := connectTo(t, there)
	if err != nil {
		t.Fatal(err)
	}
	must(t, stolen, `BEGIN`)
	verb = startVerb(t, f, acme.ID, here)
	until(t, 20*time.Second, "false", func() string {
		return fmt.Sprint(scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, there.User))
	})
	kill(verb)
	bury(t, f, verb)
	orphans(t, admin)
	wantPlace(t, f, acme.ID, here, there)
	if n := scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, there.User); n == 0 {
		t.Error("the session was ended: there is nothing to finish")
	}
	finish(here, there)

	// When the place that it moves back to is open, and the move is not written.
	blocker, err = f.Admin(t, "primary").Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blocker.Exec(t.Context(), `SELECT FROM tenancy.tenants WHERE id = $1 FOR UPDATE`, acme.ID); err != nil {
		t.Fatal(err)
	}
	verb = startVerb(t, f, acme.ID, there)
	until(t, 20*time.Second, "1", func() string { return waiting(t, primary, "tenancy") })
	kill(verb)
	bury(t, f, verb)
	if err := blocker.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantPlace(t, f, acme.ID, here, there)
	wantOpen(t, admin, there.User)
	finish(here, there)
}

// TestSwitchesKilledAnywhereAreFinished kills the process that moves a tenant to and fro at random moments.
func TestSwitchesKilledAnywhereAreFinished(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{Limits: tenancy.Limits{Nodes: 2}})
	places := []tenancy.DataSource{sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")}
	admin, rng := f.Admin(t, "tenants"), rand.New(rand.NewPCG(3, 4))
	if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, places[1]); err != nil { // one that was never used would be open
		t.Fatal(err)
	}
	l := startLoad(t, 1, []tenancy.Tenant{acme, globex}, tn)
	before := mustTenant(t, tn, "acme").Generation
	unfinished := 0
	for i := 0; i < killings() || unfinished == 0 && i < 10*killings(); i++ { // until one has died in the middle
		verb := startVerb(t, f, acme.ID, places...)
		time.Sleep(300*time.Millisecond + time.Duration(rng.Int64N(int64(600*time.Millisecond)))) // a moment that nothing waits for is the point
		killAtWork(t, verb)
		bury(t, f, verb)
		unfinished += ask[int](t, f, "primary", `SELECT count(*) FROM tenancy.data_sources WHERE leaving IS NOT NULL`)
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, d := range places {
			if schemaOf(t, f, acme.ID) == d.Schema {
				wantPlace(t, f, acme.ID, d)
				wantOpen(t, admin, d.User)
			} else {
				wantClosed(t, admin, d.User)
			}
		}
	}
	moves := mustTenant(t, tn, "acme").Generation - before
	t.Logf("%d moves; %d processes died with a place to close", moves, unfinished)
	if moves == 0 || unfinished == 0 {
		t.Error("nothing was killed in the middle: the test shows nothing")
	}
	l.wantNoFailure(admin, map[string][]string{"acme": {tableOf(places[0]), tableOf(places[1])}, "globex": {tableOf(sourceOf(t, tn, globex.ID))}})
}

func TestDroppingAPlaceEndsItsSessions(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	unused := prepare(t, tn, acme.ID, "")
	conn, err := connectTo(t, unused)
	if err != nil {
		t.Fatal(err)
	}
	must(t, conn, `BEGIN`)
	must(t, conn, `SELECT * FROM notes`) // a lock that would keep the table for as long as the session lives
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := tn.Catalog().DropPlace(ctx, unused); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, unused.Schema); n != 0 {
		t.Errorf("%d roles are left", n)
	}
}

// TestADropPlaceThatDiedIsFinishedByTheNext, each time with more of the place gone.
func TestADropPlaceThatDiedIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c, admin, primary := tn.Catalog(), f.Admin(t, "tenants"), f.Admin(t, "primary")
	for name, died := range map[string]func(d tenancy.DataSource){
		"marked":      func(tenancy.DataSource) {},
		"schema_gone": func(d tenancy.DataSource) { must(t, admin, `DROP SCHEMA `+d.Schema+` CASCADE`) },
		"no_login_left": func(d tenancy.DataSource) {
			must(t, admin, `DROP OWNED BY `+d.User)
			must(t, admin, `DROP ROLE `+d.User)
		},
	} {
		for _, id := range []tenancy.ID{acme.ID, 0} {
			d := prepare(t, tn, id, "")
			must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent' WHERE schema = $1`, d.Schema)
			died(d)
			if err := c.DropPlace(t.Context(), d); err != nil {
				t.Errorf("%s, for %d: %v", name, id, err)
			}
			if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, d.Schema); n != 0 {
				t.Errorf("%s, for %d: %d roles are left", name, id, n)
			}
			wantError(t, c.DropPlace(t.Context(), d), tenancy.ErrInvalid)
		}
	}
	// One that is being made is not what a DropPlace has left.
	d := prepare(t, tn, acme.ID, "")
	must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent' WHERE schema = $1`, d.Schema)
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`, acme.ID)
	wantError(t, c.DropPlace(t.Context(), d), tenancy.ErrInProgress)
	here := sourceOf(t, tn, acme.ID)
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent' WHERE schema = $1`, here.Schema)
	wantError(t, c.DropPlace(t.Context(), here), tenancy.ErrInvalid, "a tenant uses this place")
	wantOpen(t, admin, here.User)
}

// TestAPlaceIsNotDroppedUnderATenant lets a DropPlace and a move to the same place meet, either one first.
func TestAPlaceIsNotDroppedUnderATenant(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c, primary := tn.Catalog(), f.Admin(t, "primary")
	here, there := sourceOf(t, tn, acme.ID), prepare(t, tn, acme.ID, "")
	during := func(lock string, first, second func() error) (error, error) {
		t.Helper()
		blocker, err := f.Admin(t, "primary").Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := blocker.Exec(t.Context(), lock); err != nil {
			t.Fatal(err)
		}
		one, two := make(chan error, 1), make(chan error, 1)
		go func() { one <- first() }()
		until(t, 5*time.Second, "1", func() string { return waiting(t, primary, "tenancy") })
		go func() { two <- second() }()
		select {
		case err := <-two: // it need not wait
			two <- err
		case <-time.After(500 * time.Millisecond):
		}
		if err := blocker.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		return <-one, <-two
	}
	move := func() error { return c.SetDataSource(t.Context(), acme.ID, there) }
	drop := func() error { return c.DropPlace(t.Context(), there) }

	// The move has written everything but its number when the DropPlace looks.
	moved, dropped := during(`SELECT FROM tenancy.epoch FOR UPDATE`, move, drop)
	if moved != nil {
		t.Error(moved)
	}
	wantError(t, dropped, tenancy.ErrInProgress)
	wantError(t, drop(), tenancy.ErrInvalid, "a tenant uses this place")
	wantPlace(t, f, acme.ID, there)
	if got := current(t, tn, acme.ID); got != there.Schema {
		t.Errorf("work is done in %s, want %s", got, there.Schema)
	}
	if err := c.SetDataSource(t.Context(), acme.ID, here); err != nil {
		t.Fatal(err)
	}

	// The DropPlace was there before the move.
	dropped, moved = during(fmt.Sprintf(`SELECT FROM tenancy.data_sources WHERE schema = '%s' FOR UPDATE`, there.Schema), drop, move)
	if dropped != nil {
		t.Error(dropped)
	}
	wantError(t, moved, tenancy.ErrInvalid, "is not a place that Catalog.Prepare made")
	wantPlace(t, f, acme.ID, here)
	if got := current(t, tn, acme.ID); got != here.Schema {
		t.Errorf("work is done in %s, want %s", got, here.Schema)
	}
}
