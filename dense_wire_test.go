package tenancy_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// newDenseStrait is a densePair whose server is beyond a strait.
func newDenseStrait(t *testing.T, cfg tenancy.Config, isolation tenancy.Isolation) (densePair, *strait) {
	t.Helper()
	f := tenancytest.NewFleet(t)
	way := newStrait(t, f.ServerURL)
	cfg.Migrations = noteMigrations
	if cfg.Limits.DenseConns == 0 {
		cfg.Limits.DenseConns = 1
	}
	tn := f.Open(t, cfg)
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{Name: "far", URL: way.url}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"acme", "globex"} {
		made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Server: "far", Isolation: isolation})
		if err != nil {
			t.Fatal(err)
		}
		if err := tn.Catalog().SetDense(t.Context(), made.ID, true); err != nil {
			t.Fatal(err)
		}
		if _, err := tn.DB().Exec(tenancytest.Context(t, tn, name), `INSERT INTO notes (tenant, title) VALUES ($1, $1)`, name); err != nil {
			t.Fatal(err)
		}
	}
	return densePair{fleet: f, tn: tn, db: tn.DB(), acme: tenancytest.Context(t, tn, "acme"), globex: tenancytest.Context(t, tn, "globex")}, way
}

// wireCalls are acme's calls, of each kind that sends something of its own.
func (p *densePair) wireCalls() map[string]func(ctx context.Context) error {
	const insert = `INSERT INTO notes (tenant, title) VALUES ('acme', $1)`
	return map[string]func(ctx context.Context) error{
		"exec":      func(ctx context.Context) error { return second(p.db.Exec(ctx, insert, "wire")) },
		"exec_bare": func(ctx context.Context) error { return second(p.db.Exec(ctx, `UPDATE notes SET title = title`)) },
		"read": func(ctx context.Context) error {
			return p.db.QueryRow(ctx, `SELECT min(title) FROM notes WHERE id > $1`, 0).Scan(new(string))
		},
		"rows": func(ctx context.Context) error {
			rows, _ := p.db.Query(ctx, `SELECT tenant FROM notes`)
			all, err := pgx.CollectRows(rows, pgx.RowTo[string])
			for _, tenant := range all {
				if tenant != "acme" {
					return errCrossed
				}
			}
			return err
		},
		"batch": func(ctx context.Context) error {
			var b pgx.Batch
			b.Queue(insert, "wire")
			b.Queue(`SELECT 1`)
			return p.db.SendBatch(ctx, &b).Close()
		},
		"copy": func(ctx context.Context) error {
			return second(p.db.CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, pgx.CopyFromRows([][]any{{"acme", "wire"}})))
		},
		"transaction": func(ctx context.Context) error {
			return p.db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
				return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return second(tx.Exec(ctx, insert, "wire")) })
			})
		},
		"rolled_back": func(ctx context.Context) error {
			err := p.db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
				return errors.Join(second(tx.Exec(ctx, insert, "undone")), errUndo)
			})
			if err != nil && err.Error() == errUndo.Error() {
				return nil
			}
			return err
		},
	}
}

var errCrossed = errors.New("it reads another tenant's rows")

// TestACallOfASharedSessionIsBrokenOffAtEachPiece ends a call, by its context or by its connection, at each piece that is on the wire for it.
// What comes next on the connection, or on its successor, is the tenant's whose call it is.
func TestACallOfASharedSessionIsBrokenOffAtEachPiece(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		p, way := newDenseStrait(t, tenancy.Config{}, isolation)
		broken := 0
		for name, call := range p.wireCalls() {
			for how, end := range map[string]func(cancel func()){"cancelled": func(cancel func()) { cancel() }, "dropped": func(func()) { go way.drop() }} {
				for _, before := range []string{`SELECT max(tenant) FROM notes WHERE id > $1`, `UPDATE notes SET title = title WHERE id > $1`} { // leaves nothing, leaves something
					for n := 1; n < 40; n++ {
						if err := p.db.QueryRow(p.globex, before+map[bool]string{true: " RETURNING tenant"}[strings.HasPrefix(before, "UPDATE")], 0).Scan(new(string)); err != nil {
							t.Fatal(err)
						}
						ctx, cancel := context.WithTimeout(p.acme, 10*time.Second)
						passed := way.passed()
						way.before(n, func() { end(cancel) })
						err := call(ctx)
						through := way.passed() < passed+n
						cancel()
						way.calm()
						if errors.Is(err, errCrossed) {
							t.Errorf("%s, %s at piece %d: %v", name, how, n, err)
						}
						if err != nil {
							broken++
						}
						for _, want := range []string{"globex", "acme", "globex"}[n%2:] {
							ctx := p.acme
							if want == "globex" {
								ctx = p.globex
							}
							if err := eventually(func() error { // the connection may be broken when its call is through
								got, err := p.reads(ctx)
								if err == nil && got != want {
									t.Errorf("%s, %s at piece %d: %s reads the rows of %q", name, how, n, want, got)
								}
								return err
							}, func(err error) bool { return err == nil }); err != nil {
								t.Fatalf("%s, %s at piece %d: %s: %v", name, how, n, want, err)
							}
						}
						if through {
							break
						}
					}
				}
			}
		}
		t.Logf("%d calls were broken off", broken)
		if broken < 20 {
			t.Error("too few calls were broken off: nothing was shown")
		}
	})
}

// TestASharedSessionThatTheServerEndedIsReplacedUnseen ends the session while nobody uses it. The next call may have to clean it up or to prove it first.
func TestASharedSessionThatTheServerEndedIsReplacedUnseen(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		p := newDensePair(t, tenancy.Config{}, isolation)
		if err := p.tn.Catalog().SetDense(t.Context(), createIn(t, p.tn, "initech", isolation).ID, true); err != nil {
			t.Fatal(err)
		}
		admin := p.fleet.Admin(t, "tenants")
		for i, next := range []string{"globex", "acme", "initech", "globex"} { // whom the connection knows, who had it last, whom it has never seen
			ctx := tenancytest.Context(t, p.tn, next)
			if _, err := p.db.Exec(p.acme, `UPDATE notes SET title = title WHERE id > $1`, 0); err != nil {
				t.Fatal(err)
			}
			pid := p.pid(t, p.acme)
			must(t, admin, `SELECT pg_terminate_backend($1, 5000)`, pid)
			if i%2 == 0 {
				p.wantOwnFrom(t, ctx, next)
			} else if err := p.db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
				return second(tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'after')`, next))
			}); err != nil {
				t.Errorf("%s: %v", next, err)
			}
		}
	})
}

func TestTheServerOfASharedPoolIsAwayAndBack(t *testing.T) {
	eachDense(t, func(t *testing.T, isolation tenancy.Isolation) {
		for _, conns := range []int32{1, 3} {
			limits := tenancy.Limits{DenseConns: conns, AcquireTimeout: 2 * time.Second, ConnectTimeout: 500 * time.Millisecond}
			p, way := newDenseStrait(t, tenancy.Config{Limits: limits}, isolation)
			for name, spoil := range map[string]func(){"cut": way.cut, "frozen": func() { way.drop(); way.freeze() }} {
				spoil()
				for range 4 {
					ctx, cancel := context.WithTimeout(p.acme, 5*time.Second)
					_, err := p.db.Exec(ctx, `UPDATE notes SET title = title WHERE id > $1`, 0)
					cancel()
					// What a frozen server does not let go keeps the place of its successor, so there it may be that none could be tried.
					if !errors.Is(err, tenancy.ErrTenantUnavailable) && (name == "cut" || !errors.Is(err, tenancy.ErrBusy)) {
						t.Errorf("%d connections, %s: got %v, want ErrTenantUnavailable", conns, name, err)
					}
				}
				way.calm()
				for want, ctx := range map[string]context.Context{"acme": p.acme, "globex": p.globex} {
					if err := eventually(func() error { _, err := p.reads(ctx); return err }, func(err error) bool { return err == nil }); err != nil {
						t.Errorf("%d connections, %s: %s is not back: %v", conns, name, want, err)
					}
				}
				p.wantOwn(t)
			}
		}
	})
}

// TestOpenConnectionsOfASharedPoolAreUsedWhileNoNewOneIs to be had, of the tenant's group and of others. When none is open, nobody waits for one.
func TestOpenConnectionsOfASharedPoolAreUsedWhileNoNewOneIs(t *testing.T) {
	t.Parallel()
	const callers = 10
	p, way := newDenseStrait(t, tenancy.Config{Limits: tenancy.Limits{DenseConns: 4, DenseTenants: 2, TenantConns: callers + 1, PingTimeout: 15 * time.Second, AcquireTimeout: 18 * time.Second}}, tenancy.IsolationSchema)
	var acme tenancy.ID
	for id, s := range p.tn.Stats() {
		if s.Name == "acme" {
			acme = id
		}
	}
	for name, holder := range map[string]context.Context{"its_own": p.acme, "anothers": p.globex} {
		t.Run(name, func(t *testing.T) {
			way.calm()
			way.drop()
			var held pgx.Tx
			untilTrue(t, "a connection is held", func() (ok bool) {
				var err error
				held, err = p.db.Begin(holder)
				return err == nil
			})
			way.refuse()
			errs := make(chan error, callers)
			for range callers {
				go func() { errs <- second(p.db.Exec(p.acme, `SELECT 1`)) }()
			}
			untilTrue(t, "all wait, and no new connection is to be had", func() bool {
				s := statsOf(p.tn, acme)
				return len(errs) > 0 || s.Waiting == callers && s.Breaker != "closed"
			})
			if err := held.Rollback(t.Context()); err != nil {
				t.Error(err)
			}
			for range callers {
				if err := <-errs; err != nil {
					t.Errorf("beside a connection that came back: %v", err)
				}
			}
		})
	}
	way.cut()
	for range 8 {
		began := time.Now()
		wantError(t, second(p.db.Exec(p.acme, `SELECT 1`)), tenancy.ErrTenantUnavailable)
		if took := time.Since(began); took > 10*time.Second {
			t.Fatalf("with none open a call took %v to fail", took)
		}
	}
}

// TestStatsOfTenantsThatShareAPoolTellOfItsBreaker: it is not theirs, and it is what refuses them.
func TestStatsOfTenantsThatShareAPoolTellOfItsBreaker(t *testing.T) {
	t.Parallel()
	p, way := newDenseStrait(t, tenancy.Config{}, tenancy.IsolationSchema)
	apart := createIn(t, p.tn, "apart", tenancy.IsolationSchema)
	if _, err := p.db.Exec(tenancytest.Context(t, p.tn, "apart"), `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	breakers := func(want string) func() bool {
		return func() bool {
			p.db.Exec(p.acme, `SELECT 1`)
			for id, s := range p.tn.Stats() {
				if id == apart.ID && s.Breaker != "closed" {
					t.Fatalf("of a tenant with a pool of its own: %+v", s)
				}
				if id != apart.ID && s.Breaker != want {
					return false
				}
			}
			return true
		}
	}
	way.cut()
	untilTrue(t, "open for both", breakers("open"))
	way.calm()
	untilTrue(t, "closed for both", breakers("closed"))
}
