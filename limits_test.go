package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// What meets the limits, and what a service's own hooks make of them.

// limited opens a node with tenant acme and returns acme's context.
func limited(t *testing.T, cfg tenancy.Config) (*tenancytest.Fleet, *tenancy.Tenancy, context.Context, tenancy.ID) {
	t.Helper()
	t.Parallel()
	f := tenancytest.NewFleet(t)
	cfg.Migrations = noteMigrations
	tn := f.Open(t, cfg)
	acme := tenancytest.Create(t, tn, "acme")
	return f, tn, entered(t, tn, acme.ID), acme.ID
}

func entered(t *testing.T, tn *tenancy.Tenancy, id tenancy.ID) context.Context {
	t.Helper()
	ctx, err := tn.Enter(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return ctx
}

// TestATenantThatUsesUpTheBudgetCanBeSuspended: verbs have connections that tenants leave to them.
func TestATenantThatUsesUpTheBudgetCanBeSuspended(t *testing.T) {
	_, tn, ctx, id := limited(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 18, PrimaryConns: 3, TenantConns: 10, AcquireTimeout: 300 * time.Millisecond}})
	for held := 0; ; held++ {
		tx, err := tn.DB().Begin(ctx)
		if errors.Is(err, tenancy.ErrBusy) && held > 0 {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.Background())
	}
	if err := tn.Catalog().Suspend(t.Context(), id, tenancy.Suspension{Drain: time.Nanosecond}); err != nil {
		t.Error(err)
	}
}

// TestAFloodOfAUsedUpBudgetTakesNobodysLastConnection: it is idle between any two calls of the other tenant, and callers of the flooded one wait for a permit.
func TestAFloodOfAUsedUpBudgetTakesNobodysLastConnection(t *testing.T) {
	_, tn, flooded, acme := limited(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 18, PrimaryConns: 3, TenantConns: 10}})
	globex := tenancytest.Create(t, tn, "globex")
	other := entered(t, tn, globex.ID)
	work := func() {
		if _, err := tn.DB().Exec(other, "SELECT 1"); err != nil {
			t.Error(err)
		}
	}
	stats := func(of tenancy.ID) (found tenancy.TenantStats) {
		for id, s := range tn.Stats() {
			if id == of {
				found = s
			}
		}
		return found
	}
	work() // it has its connection
	before := stats(globex.ID)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	for range 50 {
		flood.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := tn.DB().Exec(flooded, "SELECT pg_sleep(0.005)"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	defer flood.Wait()
	defer close(stop)
	still, last := int64(0), time.Now()
	for calls := 0; calls < 300 || stats(acme).Starved == 0; calls++ {
		work()
		time.Sleep(2 * time.Millisecond)
		if time.Since(last) >= 80*time.Millisecond { // after 100 it is not at work any more, and keeps nothing
			still++
		}
		last = time.Now()
		if t.Failed() {
			return
		}
	}
	if s := stats(globex.ID); s.Starved > still || s.Waits > before.Waits+still || s.Conns != 1 {
		t.Errorf("the other tenant, whose calls stood still %d times: %+v, before %+v", still, s, before)
	}
	for s := range tn.Servers() {
		if s.Hungry == 0 {
			t.Errorf("nobody waits for a permit: %+v", s)
		}
	}
}

// TestCallersInLineAtARotationAreServed: the first of them find the old login closed, and open the breaker before the others.
func TestCallersInLineAtARotationAreServed(t *testing.T) {
	f, tn, ctx, id := limited(t, tenancy.Config{Limits: tenancy.Limits{TenantConns: 1}})
	admin := f.Admin(t, "tenants")
	held, let := make(chan struct{}), make(chan struct{})
	go tn.DB().WithConn(ctx, func(context.Context, *pgx.Conn) error { close(held); <-let; return nil })
	<-held
	old := sourceOf(t, tn, id).User
	const callers = 10
	errs := make(chan error, callers)
	for range callers {
		go func() { _, err := tn.DB().Exec(ctx, "SELECT 1"); errs <- err }()
	}
	untilTrue(t, "all wait in line", func() bool {
		for _, s := range tn.Stats() {
			if s.Waiting == callers {
				return true
			}
		}
		return false
	})
	rotated := make(chan error, 1)
	go func() { rotated <- tn.Catalog().RotatePassword(context.WithoutCancel(ctx), id) }()
	untilTrue(t, "the old login is closed", func() bool { return !scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, old) })
	close(let)
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if err := <-rotated; err != nil {
		t.Error(err)
	}
}

// TestABuilderMayConnect: what it opens counts, and makes no room before the pool is the tenant's.
func TestABuilderMayConnect(t *testing.T) {
	pinged, built := make(chan struct{}), make(chan struct{})
	_, tn, ctx, _ := limited(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 18, PrimaryConns: 3, TenantConns: 10, AcquireTimeout: 300 * time.Millisecond},
		PoolBuilder: tenancy.PoolBuilderFunc(func(ctx context.Context, who tenancy.Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
			pool, err := pgxpool.NewWithConfig(ctx, cfg)
			if err != nil || who.Name != "globex" {
				return pool, err
			}
			if err := pool.Ping(ctx); err != nil {
				return nil, err
			}
			close(pinged)
			<-built
			return pool, nil
		})})
	globex, third := tenancytest.Create(t, tn, "globex"), tenancytest.Create(t, tn, "third")
	served := make(chan error, 1)
	go func() { _, err := tn.DB().Exec(entered(t, tn, globex.ID), "SELECT 1"); served <- err }()
	<-pinged
	for { // the rest of the budget is in use
		tx, err := tn.DB().Begin(ctx)
		if err != nil {
			break
		}
		defer tx.Rollback(context.Background())
	}
	if _, err := tn.DB().Exec(entered(t, tn, third.ID), "SELECT 1"); err != nil && !errors.Is(err, tenancy.ErrBusy) {
		t.Errorf("beside a builder at work: %v", err)
	}
	close(built)
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestABuilderThatLowersMaxConnsIsHeeded: what its pool has not is not asked of it, and is no outage.
func TestABuilderThatLowersMaxConnsIsHeeded(t *testing.T) {
	_, tn, ctx, id := limited(t, tenancy.Config{Limits: tenancy.Limits{AcquireTimeout: 500 * time.Millisecond},
		PoolBuilder: tenancy.PoolBuilderFunc(func(ctx context.Context, who tenancy.Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
			if who.Name == "acme" {
				cfg.MaxConns = 1
			}
			return pgxpool.NewWithConfig(ctx, cfg)
		})})
	globex := tenancytest.Create(t, tn, "globex")
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		_, err := tn.DB().Exec(ctx, "SELECT 1")
		wantError(t, err, tenancy.ErrBusy, "none of its 1 connections", "MaxConns")
	}
	if s := statsOf(tn, id); s.Breaker != "closed" || s.Conns != 1 {
		t.Errorf("beside its one connection in use: %+v", s)
	}
	for range 2 { // the other tenant has what the limits say
		tx, err := tn.DB().Begin(entered(t, tn, globex.ID))
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.Background())
	}
	tx.Rollback(ctx)
	if _, err := tn.DB().Exec(ctx, "SELECT 1"); err != nil {
		t.Error(err)
	}
}

func statsOf(tn *tenancy.Tenancy, id tenancy.ID) tenancy.TenantStats {
	for i, s := range tn.Stats() {
		if i == id {
			return s
		}
	}
	return tenancy.TenantStats{}
}

// TestABusyCallIsToldWhichBoundWasMet: the tenant's own, or that of the node's budget of the server.
func TestABusyCallIsToldWhichBoundWasMet(t *testing.T) {
	_, tn, ctx, _ := limited(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 18, PrimaryConns: 3, TenantConns: 3, TenantWaiters: 1, AcquireTimeout: 300 * time.Millisecond}})
	globex, third := tenancytest.Create(t, tn, "globex"), tenancytest.Create(t, tn, "third")
	used := func(ctx context.Context) (held int, err error) {
		for ; held < 4; held++ {
			tx, err := tn.DB().Begin(ctx)
			if err != nil {
				return held, err
			}
			t.Cleanup(func() { tx.Rollback(context.Background()) })
		}
		return held, nil
	}
	held, err := used(ctx)
	wantError(t, err, tenancy.ErrBusy, "none of its 3 connections became free", "slow statements", "raise Limits.TenantConns")
	if held != 3 {
		t.Errorf("acme has %d", held)
	}
	untilTrue(t, "one of those who come together is told how many wait", func() (told bool) {
		errs := make(chan error, 4)
		for range cap(errs) {
			go func() { _, err := tn.DB().Exec(ctx, "SELECT 1"); errs <- err }()
		}
		for range cap(errs) {
			err := <-errs
			wantError(t, err, tenancy.ErrBusy)
			told = told || strings.Contains(err.Error(), "1 calls wait for one of its connections already (Limits.TenantWaiters)")
		}
		return told
	})
	starved := 0
	for _, other := range []tenancy.ID{globex.ID, third.ID} {
		held, err := used(entered(t, tn, other))
		if held == 3 {
			continue // the next one finds the budget used up
		}
		starved++
		wantError(t, err, tenancy.ErrBusy, fmt.Sprintf("beside the %d of 3", held), "this node's budget of the server is used up", "raise Limits.ServerConns")
		if s := statsOf(tn, other); s.Starved == 0 {
			t.Errorf("tenant %d: %+v", other, s)
		}
	}
	if starved == 0 {
		t.Error("the budget was not used up: nothing was shown")
	}
}

type wrappedConn struct{ net.Conn }

// TestAWrappedSocketIsCounted: AfterNetConnect hides ours under another.
func TestAWrappedSocketIsCounted(t *testing.T) {
	_, tn, ctx, _ := limited(t, tenancy.Config{Limits: tenancy.Limits{AcquireTimeout: 2 * time.Second},
		PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error {
			cfg.ConnConfig.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, c net.Conn) (net.Conn, error) { return wrappedConn{c}, nil }
			return nil
		}})
	for range 3 {
		tx, err := tn.DB().Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.Background())
	}
	for _, s := range tn.Stats() {
		if s.Conns != 3 || s.Busy != 3 {
			t.Errorf("%d connections, %d in use, want 3 and 3", s.Conns, s.Busy)
		}
	}
}

// TestAFullLoginCostsNobodyElse: no other tenant's connection would help it.
func TestAFullLoginCostsNobodyElse(t *testing.T) {
	f, tn, ctx, id := limited(t, tenancy.Config{Limits: tenancy.Limits{AcquireTimeout: time.Second}})
	globex := tenancytest.Create(t, tn, "globex")
	must(t, f.Admin(t, "tenants"), `ALTER ROLE `+sourceOf(t, tn, id).User+` CONNECTION LIMIT 1`)
	if _, err := tn.DB().Exec(entered(t, tn, globex.ID), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	_, err = tn.DB().Exec(ctx, "SELECT 1")
	wantError(t, err, tenancy.ErrBusy, "CONNECTION LIMIT")
	for other, s := range tn.Stats() {
		if other == globex.ID && s.Conns == 0 {
			t.Error("globex has lost its idle connection")
		}
	}
}

// TestAHookRaisesNoCeiling: logins are made for Limits.TenantConns.
func TestAHookRaisesNoCeiling(t *testing.T) {
	_, tn, ctx, _ := limited(t, tenancy.Config{PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error { cfg.MaxConns = 5; return nil }})
	_, err := tn.DB().Exec(ctx, "SELECT 1")
	wantError(t, err, tenancy.ErrInvalid, "MaxConns", "TenantConns")
}

type unsent struct{}

func (unsent) Error() string     { return "a question of the scanner's own was never sent" }
func (unsent) SafeToRetry() bool { return true }

type failingDest struct{}

func (failingDest) Scan(any) error { return unsent{} }

// TestNothingIsDoneTwice: errors that look like "never sent" and like an outdated plan, after something was done.
func TestNothingIsDoneTwice(t *testing.T) {
	f, tn, ctx, id := limited(t, tenancy.Config{})
	admin := f.Admin(t, "tenants")
	wantRows := func(what string, want int) {
		t.Helper()
		if n := scan[int](t, admin, `SELECT count(*) FROM `+tableOf(sourceOf(t, tn, id))); n != want {
			t.Errorf("%s: %d rows, want %d", what, n, want)
		}
	}
	if err := tn.DB().QueryRow(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'x') RETURNING title`, "acme").Scan(&failingDest{}); err == nil {
		t.Error("the destination's error was lost")
	}
	wantRows("a destination that fails", 1)
	outdated := func() { // p, on the one connection that there is
		t.Helper()
		if _, err := tn.DB().Exec(ctx, `DEALLOCATE ALL; DROP TABLE IF EXISTS tt; CREATE TEMP TABLE tt (a int); PREPARE p AS SELECT * FROM tt; EXECUTE p; ALTER TABLE tt ADD b int`); err != nil {
			t.Fatal(err)
		}
	}
	outdated()
	if _, err := tn.DB().Exec(ctx, `BEGIN; INSERT INTO notes (tenant, title) VALUES ('acme', 'x'); COMMIT; EXECUTE p`); err == nil {
		t.Error("the plan was not outdated")
	}
	wantRows("several statements", 2)

	// What pgx takes off before the arguments is none of them.
	const several = `BEGIN; INSERT INTO notes (tenant, title) VALUES ('acme', 'x'); COMMIT; EXECUTE p`
	exec := func(sql string, args ...any) func() error {
		return func() error { _, err := tn.DB().Exec(ctx, sql, args...); return err }
	}
	query := func(sql string, args ...any) func() error {
		return func() error {
			rows, _ := tn.DB().Query(ctx, sql, args...)
			rows.Close()
			return rows.Err()
		}
	}
	onlyRow := func(sql string, args ...any) func() error {
		return func() error { return tn.DB().QueryRow(ctx, sql, args...).Scan(new(string)) }
	}
	withArgument := strings.Replace(several, `'acme'`, `$1`, 1)
	want := 2
	for name, call := range map[string]func() error{
		"a_mode":                        exec(several, pgx.QueryExecModeExec),
		"two_modes":                     exec(withArgument, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol, "acme"),
		"a_mode_and_an_argument":        exec(withArgument, pgx.QueryExecModeSimpleProtocol, "acme"),
		"no_named_arguments":            exec(several, pgx.NamedArgs{}),
		"named_arguments_of_no_use":     exec(several, pgx.NamedArgs{"tenant": "acme"}),
		"no_strictly_named_arguments":   exec(several, pgx.StrictNamedArgs{}),
		"another_rewriter":              exec(several, rewriter{}),
		"a_query_with_two_modes":        query(withArgument, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol, "acme"),
		"a_query_with_formats_first":    query(withArgument, pgx.QueryResultFormats{0}, pgx.QueryExecModeSimpleProtocol, "acme"),
		"a_row_of_a_query_of_two_modes": onlyRow(withArgument, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol, "acme"),
		"the_beginning_of_a_transaction": func() error {
			tx, err := tn.DB().BeginTx(ctx, pgx.TxOptions{BeginQuery: several})
			if err == nil {
				err = tx.Rollback(ctx)
			}
			return err
		},
	} {
		outdated()
		if err := call(); err == nil {
			t.Errorf("%s: no error", name)
		}
		want++
		wantRows(name, want)
	}
	// And one statement with arguments is sent once more, whatever stands before them.
	for i, args := range [][]any{{pgx.NamedArgs{"tenant": "acme"}}, {pgx.QueryExecModeCacheStatement, pgx.StrictNamedArgs{"tenant": "acme"}}} {
		const list = `SELECT * FROM notes WHERE tenant = @tenant`
		if err := errors.Join(exec(list, args...)(), query(list, args...)()); err != nil {
			t.Fatal(err)
		}
		must(t, admin, fmt.Sprintf(`ALTER TABLE %s ADD COLUMN more_%d int`, tableOf(sourceOf(t, tn, id)), i))
		if err := errors.Join(exec(list, args...)(), query(list, args...)()); err != nil {
			t.Errorf("%v: %v", args, err)
		}
	}
}

// rewriter leaves everything as it is.
type rewriter struct{}

func (rewriter) RewriteQuery(_ context.Context, _ *pgx.Conn, sql string, args []any) (string, []any, error) {
	return sql, args, nil
}

// TestASessionThatEndedBeforeTheCommitIsNoDoubt: the server ended it while nobody asked for anything.
func TestASessionThatEndedBeforeTheCommitIsNoDoubt(t *testing.T) {
	f, tn, ctx, id := limited(t, tenancy.Config{})
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, `SET LOCAL idle_in_transaction_session_timeout = 100`); err != nil {
		t.Fatal(err)
	}
	admin, login := f.Admin(t, "tenants"), sourceOf(t, tn, id).User
	untilTrue(t, "the session has ended", func() bool {
		return scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, login) == 0
	})
	if err := tx.Commit(ctx); err == nil || errors.Is(err, tenancy.ErrCommitUnknown) {
		t.Errorf("commit: %v", err)
	}
}

// TestAPlaceThatWasLeftIsKnownByItsFirstLogin: after a rotation nobody knows its password.
func TestAPlaceThatWasLeftIsKnownByItsFirstLogin(t *testing.T) {
	_, tn, ctx, id := limited(t, tenancy.Config{})
	c := tn.Catalog()
	place := func() tenancy.DataSource {
		t.Helper()
		d, err := c.Prepare(t.Context(), id, "")
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	move := func(d tenancy.DataSource) {
		t.Helper()
		if err := c.SetDataSource(t.Context(), id, d); err != nil {
			t.Fatal(err)
		}
	}
	first, second := place(), place()
	move(first)
	if err := c.RotatePassword(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	move(second)
	move(first) // with the login that Prepare told
	if _, err := tn.DB().Exec(ctx, "SELECT 1"); err != nil {
		t.Error(err)
	}
	move(second)
	if err := c.DropPlace(t.Context(), first); err != nil {
		t.Error(err)
	}
}
