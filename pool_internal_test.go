package tenancy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unique"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

// poolFixture is a server with two tenants, made by plain SQL, and a Tenancy with a view filled by hand.
type poolFixture struct {
	testing.TB
	tn    *Tenancy
	db    *TenantAwareDB
	admin *pgx.Conn
	super DataSource

	mu      sync.Mutex // guards records
	records map[ID]*record
}

const (
	acme   ID = 1
	globex ID = 2
)

func newPoolFixture(t testing.TB, cfg Config) *poolFixture {
	t.Helper()
	server, err := pgembed.Start(t.Context(), pgembed.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(u.Port())
	password, _ := u.User.Password()
	f := &poolFixture{TB: t, records: map[ID]*record{}, super: DataSource{
		Host: u.Hostname(), Port: uint16(port), Database: strings.TrimPrefix(u.Path, "/"),
		User: u.User.Username(), Password: Secret(password), TLS: "disable",
	}}
	if f.admin, err = pgx.Connect(t.Context(), server.URL()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeConn(f.admin) })

	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	cfg = cfg.withDefaults()
	f.tn = &Tenancy{cfg: cfg, realm: unique.Make([16]byte{0xfe}), servers: newServers(cfg)}
	records, err := newLookup(lookupConfig{size: 10, negativeSize: 10, negativeTTL: time.Second, loadTimeout: 5 * time.Second},
		func(_ context.Context, id ID) (*record, bool, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			r := f.records[id]
			return r, r != nil, nil
		})
	if err != nil {
		t.Fatal(err)
	}
	f.tn.view = &view{records: records}
	if f.tn.poolDefaults, err = newPoolDefaults(f.tn.cfg.Limits); err != nil {
		t.Fatal(err)
	}
	f.tn.pools = f.tn.newPools(newPoolMaker(f.tn))
	f.db = &TenantAwareDB{tn: f.tn}
	f.tn.db = f.db
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if cut, err := f.tn.pools.Close(ctx); err != nil || len(cut) > 0 {
			t.Errorf("pools were still in use: tenants %v, %v", cut, err)
		}
		records.close(context.Background())
	})
	f.place(acme, "t_a")
	f.place(globex, "t_b")
	return f
}

// place makes a tenant's schema, login, marker and one note.
func (f *poolFixture) place(id ID, name string) {
	f.Helper()
	r := &record{
		tenant: Tenant{ID: id, UID: UID{byte(id)}, Name: name, State: StateActive, Isolation: IsolationSchema, Generation: 1, realm: f.tn.realm},
		source: f.super,
	}
	r.source.Schema, r.source.User, r.source.Password = name, name, Secret("pw-of-"+name)
	f.sql(strings.NewReplacer("$s", name, "$realm", UID(f.tn.realm.Value()).String(), "$uid", r.tenant.UID.String()).Replace(`
		CREATE ROLE $s LOGIN PASSWORD 'pw-of-$s';
		CREATE SCHEMA $s;
		GRANT USAGE ON SCHEMA $s TO $s;
		CREATE TABLE $s.tenancy_marker (realm uuid NOT NULL, tenant uuid NOT NULL);
		INSERT INTO $s.tenancy_marker VALUES ('$realm', '$uid');
		GRANT SELECT ON $s.tenancy_marker TO $s;
		CREATE TABLE $s.notes (id int PRIMARY KEY, tenant text NOT NULL);
		INSERT INTO $s.notes VALUES (1, '$s');
		GRANT SELECT, INSERT, UPDATE, DELETE ON $s.notes TO $s`))
	f.set(id, func(o *record) { *o = *r })
}

// set changes a tenant's record, as the feed would.
func (f *poolFixture) set(id ID, change func(*record)) {
	f.mu.Lock()
	var r record
	if old := f.records[id]; old != nil {
		r = record{tenant: old.tenant, message: old.message, retryAfter: old.retryAfter, source: old.source, sourceErr: old.sourceErr} // not checked, which others write
	}
	change(&r)
	r.view = f.tn.view
	f.records[id] = &r
	f.mu.Unlock()
	f.tn.view.records.forget(id)
	f.tn.view.changes.Add(1)
}

func (f *poolFixture) sql(sql string) {
	f.Helper()
	if _, err := f.admin.Exec(f.Context(), sql); err != nil {
		f.Fatalf("%v\n%s", err, sql)
	}
}

// as returns a context of the tenant.
func (f *poolFixture) as(id ID) context.Context {
	f.mu.Lock()
	defer f.mu.Unlock()
	return withSession(f.Context(), Session{tenant: &f.records[id].tenant})
}

func (f *poolFixture) notes(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second) // a leaked connection is a failure, not a hang
	defer cancel()
	rows, _ := f.db.Query(ctx, "SELECT tenant FROM notes ORDER BY id")
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func (f *poolFixture) wantNotes(id ID, name string) {
	f.Helper()
	if got, err := f.notes(f.as(id)); err != nil || len(got) != 1 || got[0] != name {
		f.Errorf("tenant %d reads %v, %v; want %s", id, got, err, name)
	}
}

// refused checks that the tenant's calls end in class, read nothing and leave nothing.
func (f *poolFixture) refused(id ID, class error) {
	f.Helper()
	got, err := f.notes(f.as(id))
	if !errors.Is(err, class) || len(got) > 0 {
		f.Errorf("tenant %d reads %v, %v; want %v", id, got, err, class)
		return
	}
	for _, secret := range []string{"pw-of-t_a", "pw-of-t_b", f.super.Password.Reveal()} {
		if text := fmt.Sprintf("%v %+v %#v", err, err, err); strings.Contains(text, secret) {
			f.Errorf("the error tells a password: %s", text)
		}
	}
	f.idle()
}

// idle checks that no connection is on loan.
func (f *poolFixture) idle() {
	f.Helper()
	f.tn.pools.Each(func(id ID, _ int64, p *tenantPool, leases int) {
		// Destroying is asynchronous in pgxpool: what counts as acquired is gone in a moment.
		for end := time.Now().Add(2 * time.Second); p.pool.Stat().AcquiredConns() > 0 && time.Now().Before(end); {
			runtime.Gosched()
		}
		if n := p.pool.Stat().AcquiredConns(); n != 0 || leases != 0 {
			f.Errorf("tenant %d: %d connections and %d leases are still out", id, n, leases)
		}
	})
}

func TestEveryTenantReadsItsOwnRowsAndNoOthers(t *testing.T) {
	f := newPoolFixture(t, Config{})
	f.wantNotes(acme, "t_a")
	f.wantNotes(globex, "t_b")
	for _, sql := range []string{"SELECT tenant FROM t_b.notes", "SELECT tenant FROM t_b.tenancy_marker"} {
		var got string
		err := f.db.QueryRow(f.as(acme), sql).Scan(&got)
		if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.Code != "42501" {
			t.Errorf("%s: %q, %v", sql, got, err)
		}
	}
	f.idle()

	f.set(acme, func(r *record) { r.tenant.State = StateSuspended })
	f.refused(acme, ErrTenantSuspended)
	other := &Tenancy{realm: unique.Make([16]byte{0xff}), view: f.tn.view, pools: f.tn.pools}
	if _, err := (&TenantAwareDB{tn: other}).Exec(f.as(globex), "SELECT 1"); !errors.Is(err, ErrTenantMismatch) {
		t.Errorf("another realm's Tenancy: %v", err)
	}
}

// hasProved says whether conn carries p's proof.
func (p *tenantPool) hasProved(conn *pgx.Conn) bool {
	mark, _ := proofOf(conn.PgConn()).(*proof)
	return mark != nil && mark.pool == p
}

func TestTenantsDoNotMeetUnderLoad(t *testing.T) {
	f := newPoolFixture(t, Config{Limits: Limits{TenantConns: 2}})
	contexts := map[string]context.Context{"t_a": f.as(acme), "t_b": f.as(globex)}
	var work sync.WaitGroup
	for range 4 {
		for name, ctx := range contexts {
			work.Go(func() {
				for i := range 100 {
					ctx, cancel := context.WithTimeout(ctx, time.Duration(1+i%50)*200*time.Microsecond) // some end on the way
					if got, err := f.notes(ctx); err == nil && (len(got) != 1 || got[0] != name) {
						t.Errorf("%s reads %v", name, got)
					} else if err != nil && ctx.Err() == nil {
						t.Errorf("%s: %v", name, err)
					}
					cancel()
				}
			})
		}
	}
	for range 10 { // the pools are replaced under their hands
		f.set(acme, func(r *record) { r.tenant.Generation++ })
		f.wantNotes(acme, "t_a")
	}
	work.Wait()
	f.idle()
}

func TestAConnectionThatIsNotTheTenantsIsRefused(t *testing.T) {
	f := newPoolFixture(t, Config{})
	b := f.records[globex].source
	for name, c := range map[string]struct {
		sql, undo string
		change    func(*record)
	}{
		"marker_of_another_tenant": {sql: "UPDATE t_a.tenancy_marker SET tenant = gen_random_uuid()"},
		"marker_of_another_realm":  {sql: "UPDATE t_a.tenancy_marker SET realm = gen_random_uuid()"},
		"marker_twice":             {sql: "INSERT INTO t_a.tenancy_marker SELECT * FROM t_a.tenancy_marker"},
		"marker_empty":             {sql: "DELETE FROM t_a.tenancy_marker"},
		"marker_missing":           {sql: "ALTER TABLE t_a.tenancy_marker RENAME TO gone", undo: "ALTER TABLE t_a.gone RENAME TO tenancy_marker"},
		"marker_unreadable":        {sql: "REVOKE SELECT ON t_a.tenancy_marker FROM t_a", undo: "GRANT SELECT ON t_a.tenancy_marker TO t_a"},
		"schema_missing":           {change: func(r *record) { r.source.Schema = "t_none" }},
		"schema_without_usage":     {sql: "REVOKE USAGE ON SCHEMA t_a FROM t_a", undo: "GRANT USAGE ON SCHEMA t_a TO t_a"},
		"schema_of_another":        {change: func(r *record) { r.source.Schema = "t_b" }},
		"login_of_another":         {change: func(r *record) { r.source.User, r.source.Password = b.User, b.Password }},
		"source_of_another":        {change: func(r *record) { r.source = b }},
		"superuser":                {change: func(r *record) { r.source.User, r.source.Password = f.super.User, f.super.Password }},
		"role_by_default":          {sql: "CREATE ROLE other; GRANT other TO t_a; ALTER ROLE t_a SET role = other", undo: "ALTER ROLE t_a RESET role; DROP ROLE other"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &poolFixture{TB: t, tn: f.tn, db: f.db, admin: f.admin, super: f.super, records: f.records}
			good := *f.records[acme]
			if c.sql != "" {
				f.sql(c.sql)
			}
			f.set(acme, func(r *record) {
				if c.change != nil {
					c.change(r)
				}
				r.tenant.Generation++
			})
			f.refused(acme, ErrIdentity)
			f.wantNotes(globex, "t_b")
			if c.undo != "" {
				f.sql(c.undo)
			}
			f.sql("DELETE FROM t_a.tenancy_marker")
			f.sql(fmt.Sprintf("INSERT INTO t_a.tenancy_marker VALUES ('%s', '%s')", UID(f.tn.realm.Value()), good.tenant.UID))
			f.set(acme, func(r *record) { *r = good; r.tenant.Generation += 2 })
			f.wantNotes(acme, "t_a")
		})
	}
}

func TestTheSearchPathHoldsWhatIsConfigured(t *testing.T) {
	f := newPoolFixture(t, Config{Extensions: true, ReferenceTables: true})
	f.sql("CREATE SCHEMA tenancy_ext; GRANT USAGE ON SCHEMA tenancy_ext TO PUBLIC")
	f.refused(acme, ErrIdentity) // tenancy_ref is missing
	f.sql("CREATE SCHEMA tenancy_ref; GRANT USAGE ON SCHEMA tenancy_ref TO PUBLIC")
	var path string
	if err := f.db.QueryRow(f.as(acme), "SHOW search_path").Scan(&path); err != nil || path != `"t_a", "tenancy_ext", "tenancy_ref"` {
		t.Errorf("search_path %s, %v", path, err)
	}
	p := &place{tenant: Tenant{UID: f.records[acme].tenant.UID}, source: f.records[acme].source}
	if err := f.tn.proveLogin(t.Context(), p); err != nil {
		t.Errorf("proveLogin: %v", err)
	}
	p.tenant.UID = UID{9}
	if err := f.tn.proveLogin(t.Context(), p); !errors.Is(err, ErrIdentity) {
		t.Errorf("proveLogin for another tenant: %v", err)
	}
}

func TestAFailedConnectTellsNoSecret(t *testing.T) {
	f := newPoolFixture(t, Config{})
	f.set(acme, func(r *record) { r.source.Password = "pw-of-t_b" })
	_, err := f.db.Exec(f.as(acme), "SELECT 1")
	if _, leaks := errors.AsType[*pgconn.ConnectError](err); err == nil || leaks {
		t.Errorf("a wrong password: %v", err)
	}
	if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.Code != "28P01" {
		t.Errorf("the cause is lost: %v", err)
	}
	if e, ok := errors.AsType[*Error](err); !ok || e.Tenant != acme || e.Op != "exec" {
		t.Errorf("the tenant is lost: %#v", err)
	}
	f.idle()
}

func TestPoolConfigCannotUnpin(t *testing.T) {
	var f *poolFixture
	unpin := func(cc *pgx.ConnConfig) {
		b := f.records[globex].source
		cc.User, cc.Password, cc.Database = b.User, b.Password.Reveal(), "template1"
		cc.Host, cc.Port = "203.0.113.1", 1
		cc.Fallbacks = []*pgconn.FallbackConfig{{Host: b.Host, Port: b.Port}}
		cc.DialFunc = nil
		cc.RuntimeParams = map[string]string{"Search_Path": "t_b", "ROLE": "t_b", "options": "-c search_path=t_b", "Session_Authorization": "t_b",
			"user": "t_b", "database": "template1", "application_name": "kept"}
	}
	for name, hook := range map[string]func(*pgxpool.Config){
		"fields": func(cfg *pgxpool.Config) { unpin(cfg.ConnConfig) },
		"before_connect": func(cfg *pgxpool.Config) {
			cfg.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error { unpin(cc); return nil }
		},
	} {
		t.Run(name, func(t *testing.T) {
			f = newPoolFixture(t, Config{PoolConfig: func(_ context.Context, _ Tenant, cfg *pgxpool.Config) error { hook(cfg); return nil }})
			f.wantNotes(acme, "t_a")
			var app string
			if err := f.db.QueryRow(f.as(acme), "SHOW application_name").Scan(&app); err != nil || app != "kept" {
				t.Errorf("what does not unpin is the user's: application_name %q, %v", app, err)
			}
		})
	}
	t.Run("long_after", func(t *testing.T) {
		var kept *pgxpool.Config
		f = newPoolFixture(t, Config{PoolConfig: func(_ context.Context, _ Tenant, cfg *pgxpool.Config) error { kept = cfg; return nil }})
		f.wantNotes(acme, "t_a")
		unpin(kept.ConnConfig)
		if err := f.db.WithConn(f.as(acme), func(context.Context, *pgx.Conn) error { return nil }); err != nil {
			t.Error(err)
		}
		f.wantNotes(acme, "t_a") // on a new connection
	})
	for name, c := range map[string]struct {
		hook func(*pgxpool.Config) error
		want error
	}{
		"after_connect_sets_search_path": {func(cfg *pgxpool.Config) error {
			cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				_, err := conn.Exec(ctx, "SET search_path = pg_temp, t_b")
				return err
			}
			return nil
		}, ErrIdentity},
		"conn_config_replaced": {func(cfg *pgxpool.Config) error { cfg.ConnConfig = &pgx.ConnConfig{}; return nil }, ErrInvalid},
		"no_connections":       {func(cfg *pgxpool.Config) error { cfg.MaxConns = 0; return nil }, ErrInvalid},
		"no_health_check":      {func(cfg *pgxpool.Config) error { cfg.HealthCheckPeriod = 0; return nil }, ErrInvalid},
		"refused":              {func(*pgxpool.Config) error { return io.ErrUnexpectedEOF }, io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			f = newPoolFixture(t, Config{PoolConfig: func(_ context.Context, tenant Tenant, cfg *pgxpool.Config) error {
				if tenant.ID != acme {
					return nil
				}
				return c.hook(cfg)
			}})
			f.refused(acme, c.want)
			f.wantNotes(globex, "t_b")
		})
	}
}

// ownPool is a pool that a builder makes from nothing, with the given login and path.
func ownPool(ctx context.Context, d DataSource, path string) (*pgxpool.Pool, error) {
	u := url.URL{Scheme: "postgres", User: url.UserPassword(d.User, d.Password.Reveal()), Host: fmt.Sprintf("%s:%d", d.Host, d.Port), Path: d.Database,
		RawQuery: "sslmode=disable&search_path=" + url.QueryEscape(path)}
	return pgxpool.New(ctx, u.String())
}

func TestAPoolOfTheServicesOwnMakingProvesItselfAtCheckout(t *testing.T) {
	var f *poolFixture
	path := `"t_a"`
	f = newPoolFixture(t, Config{PoolBuilder: PoolBuilderFunc(func(ctx context.Context, tenant Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
		if tenant.ID != acme {
			return pgxpool.NewWithConfig(ctx, cfg)
		}
		return ownPool(ctx, f.records[acme].source, path)
	})})
	f.wantNotes(acme, "t_a")
	f.wantNotes(globex, "t_b")
	f.tn.pools.Each(func(_ ID, _ int64, p *tenantPool, _ int) {
		for _, conn := range p.pool.AcquireAllIdle(t.Context()) {
			if !p.hasProved(conn.Conn()) {
				t.Errorf("tenant %d: a connection in use carries no proof", p.tenant.ID)
			}
			conn.Release()
		}
	})
	for _, path = range []string{`"t_a",public`, `"t_a",none`, `none`, `public,"t_a"`} {
		f.set(acme, func(r *record) { r.tenant.Generation++ })
		f.refused(acme, ErrIdentity)
	}
}

func TestABuilderThatGivesOutAnotherTenantsPoolIsRefused(t *testing.T) {
	for name, pick := range map[string]func(f *poolFixture, theirs *pgxpool.Pool, cfg *pgxpool.Config) (*pgxpool.Pool, error){
		"the_same_pool": func(_ *poolFixture, theirs *pgxpool.Pool, _ *pgxpool.Config) (*pgxpool.Pool, error) {
			return theirs, nil
		},
		"their_settings_with_proof": func(f *poolFixture, theirs *pgxpool.Pool, _ *pgxpool.Config) (*pgxpool.Pool, error) {
			return pgxpool.NewWithConfig(f.Context(), theirs.Config())
		},
		"their_login_without_proof": func(f *poolFixture, _ *pgxpool.Pool, _ *pgxpool.Config) (*pgxpool.Pool, error) {
			return ownPool(f.Context(), f.records[globex].source, "t_b")
		},
		"a_superuser_without_proof": func(f *poolFixture, _ *pgxpool.Pool, _ *pgxpool.Config) (*pgxpool.Pool, error) {
			return ownPool(f.Context(), f.super, "t_a")
		},
		"our_settings_changed": func(f *poolFixture, _ *pgxpool.Pool, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
			cfg.ConnConfig.RuntimeParams["search_path"] = "t_b"
			return pgxpool.NewWithConfig(f.Context(), cfg)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var f *poolFixture
			var theirs *pgxpool.Pool
			f = newPoolFixture(t, Config{PoolBuilder: PoolBuilderFunc(func(ctx context.Context, tenant Tenant, cfg *pgxpool.Config) (pool *pgxpool.Pool, err error) {
				if tenant.ID == acme {
					return pick(f, theirs, cfg)
				}
				theirs, err = pgxpool.NewWithConfig(ctx, cfg)
				return theirs, err
			})})
			f.wantNotes(globex, "t_b")
			f.refused(acme, ErrIdentity)
			f.wantNotes(globex, "t_b") // their pool was not closed on the way
			if n := theirs.Stat().NewConnsCount(); n != 1 {
				t.Errorf("their pool has made %d connections, want the first alone", n)
			}
		})
	}
	t.Run("no_pool", func(t *testing.T) {
		f := newPoolFixture(t, Config{PoolBuilder: PoolBuilderFunc(func(context.Context, Tenant, *pgxpool.Config) (*pgxpool.Pool, error) { return nil, nil })})
		if _, err := f.db.Exec(f.as(acme), "SELECT 1"); err == nil {
			t.Error("a builder without a pool was believed")
		}
	})
}

func TestANewGenerationGetsANewPool(t *testing.T) {
	f := newPoolFixture(t, Config{})
	before, _ := f.db.Query(f.as(acme), "SELECT generate_series(1, 3)")
	f.sql("ALTER ROLE t_a PASSWORD 'other'")
	f.set(acme, func(r *record) { r.source.Password = "other"; r.tenant.Generation++ })
	f.wantNotes(acme, "t_a")
	if n, err := pgx.CollectRows(before, pgx.RowTo[int]); err != nil || len(n) != 3 {
		t.Errorf("rows of the old pool: %v, %v", n, err)
	}
	f.idle()
}

func TestAPoolClosedByOthersIsReplacedOnce(t *testing.T) {
	var pools []*pgxpool.Pool
	closed := false
	f := newPoolFixture(t, Config{PoolBuilder: PoolBuilderFunc(func(ctx context.Context, _ Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
		pool, err := pgxpool.NewWithConfig(ctx, cfg)
		pools = append(pools, pool)
		if closed {
			pool.Close()
		}
		return pool, err
	})})
	f.wantNotes(acme, "t_a")
	pools[0].Close()
	f.wantNotes(acme, "t_a")
	if len(pools) != 2 {
		t.Errorf("%d pools were built, want 2", len(pools))
	}
	closed = true
	pools[1].Close()
	if _, err := f.db.Exec(f.as(acme), "SELECT 1"); err == nil || len(pools) > 4 {
		t.Errorf("pools that are born closed: %v after %d", err, len(pools))
	}
	f.idle()
}

func TestConnectionsComeBackOnEveryPath(t *testing.T) {
	f := newPoolFixture(t, Config{Limits: Limits{TenantConns: 1}}) // a leak would block the next path
	boom := errors.New("boom")
	paths := map[string]func(ctx context.Context, db *TenantAwareDB) error{
		"exec": func(ctx context.Context, db *TenantAwareDB) error { _, err := db.Exec(ctx, "SELECT 1"); return err },
		"exec_error": func(ctx context.Context, db *TenantAwareDB) error {
			_, err := db.Exec(ctx, "SELECT 1/0")
			return due(err)
		},
		"rows_exhausted": func(ctx context.Context, db *TenantAwareDB) error {
			r, err := db.Query(ctx, "SELECT 1")
			for r.Next() {
			}
			return err
		},
		"rows_closed": func(ctx context.Context, db *TenantAwareDB) error {
			r, err := db.Query(ctx, "SELECT generate_series(1, 9)")
			r.Next()
			r.Close()
			r.Close()
			return err
		},
		"rows_error": func(ctx context.Context, db *TenantAwareDB) error {
			_, err := db.Query(ctx, "SELECT nonsense")
			return due(err)
		},
		"rows_late_error": func(ctx context.Context, db *TenantAwareDB) error {
			r, _ := db.Query(ctx, "SELECT 1/(2-n) FROM generate_series(1, 9) n")
			_, err := pgx.CollectRows(r, pgx.RowTo[int])
			return due(err)
		},
		"scan_error": func(ctx context.Context, db *TenantAwareDB) error {
			r, _ := db.Query(ctx, "SELECT 'x'")
			r.Next()
			return due(r.Scan(new(int)))
		},
		"row": func(ctx context.Context, db *TenantAwareDB) error { return db.QueryRow(ctx, "SELECT 1").Scan(new(int)) },
		"row_twice": func(ctx context.Context, db *TenantAwareDB) error {
			r := db.QueryRow(ctx, "SELECT 1")
			r.Scan(new(int))
			return due(r.Scan(new(int)))
		},
		"row_none": func(ctx context.Context, db *TenantAwareDB) error {
			return due(db.QueryRow(ctx, "SELECT 1 WHERE false").Scan(new(int)))
		},
		"row_of_panic": func(ctx context.Context, db *TenantAwareDB) error {
			return panics(func() { db.QueryRow(ctx, "SELECT 1").Scan(panicker{}) })
		},
		"argument_panics": func(ctx context.Context, db *TenantAwareDB) error {
			return errors.Join(panics(func() { db.Query(ctx, "SELECT $1", panicker{}) }), panics(func() { db.QueryRow(ctx, "SELECT $1", panicker{}) }),
				panics(func() { db.Exec(ctx, "SELECT $1", panicker{}) }))
		},
		"collect_panics": func(ctx context.Context, db *TenantAwareDB) error {
			return panics(func() {
				r, _ := db.Query(ctx, "SELECT generate_series(1, 9)")
				pgx.CollectRows(r, func(pgx.CollectableRow) (int, error) { panic(boom) })
			})
		},
		"cancelled": func(ctx context.Context, db *TenantAwareDB) error {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			_, err := db.Exec(ctx, "SELECT pg_sleep(5)")
			if !errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("cancelled: %w", err)
			}
			return nil
		},
		"cancelled_rows": func(ctx context.Context, db *TenantAwareDB) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			r, err := db.Query(ctx, "SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
			if err != nil {
				return err
			}
			r.Next()
			cancel()
			for r.Next() {
			}
			return due(r.Err())
		},
		"cancelled_before": func(ctx context.Context, db *TenantAwareDB) error {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			_, err := db.Exec(ctx, "SELECT 1")
			return due(err)
		},
		"copy": func(ctx context.Context, db *TenantAwareDB) error {
			n, err := db.CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"id", "tenant"}, pgx.CopyFromRows([][]any{{7, "t_a"}}))
			_, err2 := db.Exec(ctx, "DELETE FROM notes WHERE id = 7")
			if n != 1 {
				return fmt.Errorf("copied %d", n)
			}
			return errors.Join(err, err2)
		},
		"batch": func(ctx context.Context, db *TenantAwareDB) error {
			br := db.SendBatch(ctx, batchOf("SELECT 1", "SELECT 2"))
			return errors.Join(br.Close(), br.Close())
		},
		"batch_error": func(ctx context.Context, db *TenantAwareDB) error {
			return due(db.SendBatch(ctx, batchOf("SELECT 1", "SELECT 1/0")).Close())
		},
		"batch_panics": func(ctx context.Context, db *TenantAwareDB) error {
			b := batchOf("SELECT 1")
			b.QueuedQueries[0].Exec(func(pgconn.CommandTag) error { panic(boom) })
			return panics(func() { db.SendBatch(ctx, b).Close() })
		},
		"batch_tx": func(ctx context.Context, db *TenantAwareDB) error {
			b := &pgx.Batch{}
			b.BeginTx(pgx.TxOptions{})
			b.Queue("SELECT 1")
			br := db.SendBatch(ctx, b)
			defer br.Tx().Rollback(ctx)
			return errors.Join(br.Close(), br.Tx().Commit(ctx), br.Close())
		},
		"batch_tx_never_begun": func(ctx context.Context, db *TenantAwareDB) error {
			b := &pgx.Batch{}
			b.BeginTx(pgx.TxOptions{BeginQuery: "nonsense"})
			br := db.SendBatch(ctx, b)
			return due(br.Close()) // and nobody ends the transaction
		},
		"begin_error": func(ctx context.Context, db *TenantAwareDB) error {
			_, err := db.BeginTx(ctx, pgx.TxOptions{BeginQuery: "nonsense"})
			return due(err)
		},
		"commit": func(ctx context.Context, db *TenantAwareDB) error {
			tx, err := db.Begin(ctx)
			if err != nil {
				return err
			}
			if err := tx.Commit(ctx); err != nil {
				return err
			}
			if err := tx.Rollback(ctx); !errors.Is(err, pgx.ErrTxClosed) {
				return fmt.Errorf("second end: %w", err)
			}
			return nil
		},
		"rollback_with_open_rows": func(ctx context.Context, db *TenantAwareDB) error {
			tx, err := db.Begin(ctx)
			if err != nil {
				return err
			}
			tx.Query(ctx, "SELECT generate_series(1, 9)")
			return due(tx.Rollback(ctx))
		},
		"in_tx_error": func(ctx context.Context, db *TenantAwareDB) error {
			err := db.InTx(ctx, pgx.TxOptions{}, func(context.Context, pgx.Tx) error { return boom })
			if err != boom {
				return fmt.Errorf("not fn's error: %w", err)
			}
			return nil
		},
		"in_tx_panics": func(ctx context.Context, db *TenantAwareDB) error {
			return panics(func() { db.InTx(ctx, pgx.TxOptions{}, func(context.Context, pgx.Tx) error { panic(boom) }) })
		},
		"in_tx_goexit": func(ctx context.Context, db *TenantAwareDB) error {
			done := make(chan struct{})
			go func() {
				defer close(done)
				db.InTx(ctx, pgx.TxOptions{}, func(context.Context, pgx.Tx) error { runtime.Goexit(); return nil })
			}()
			<-done
			return nil
		},
		"with_conn": func(ctx context.Context, db *TenantAwareDB) error {
			return db.WithConn(ctx, func(ctx context.Context, c *pgx.Conn) error { return c.Ping(ctx) })
		},
		"with_conn_panics": func(ctx context.Context, db *TenantAwareDB) error {
			return panics(func() { db.WithConn(ctx, func(context.Context, *pgx.Conn) error { panic(boom) }) })
		},
	}
	host, err := ownPool(t.Context(), f.records[acme].source, "t_a") // the host's face takes the same paths
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	f.tn.hostPool = host
	for name, path := range paths {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(f.as(acme), 10*time.Second)
			defer cancel()
			if err := path(ctx, f.db); err != nil {
				t.Error(err)
			}
			f := &poolFixture{TB: t, tn: f.tn, db: f.db, records: f.records}
			f.idle()
			f.wantNotes(acme, "t_a")
			if err := path(f.as(globex), &TenantAwareDB{tn: f.tn, host: true}); err != nil {
				t.Errorf("host: %v", err)
			}
			for end := time.Now().Add(2 * time.Second); host.Stat().AcquiredConns() > 0 && time.Now().Before(end); {
				runtime.Gosched()
			}
			if n := host.Stat().AcquiredConns(); n != 0 {
				t.Errorf("host: %d connections are still out", n)
			}
		})
	}
}

func batchOf(sqls ...string) *pgx.Batch {
	b := &pgx.Batch{}
	for _, sql := range sqls {
		b.Queue(sql)
	}
	return b
}

// due is nil for an error and an error for nil.
func due(err error) error {
	if err == nil {
		return errors.New("no error where one was due")
	}
	return nil
}

func panics(fn func()) (err error) {
	defer func() {
		if recover() == nil {
			err = errors.New("no panic where one was due")
		}
	}()
	fn()
	return nil
}

// panicker panics as an argument and as a destination.
type panicker struct{}

func (panicker) Scan(any) error { panic("destination") }
func (panicker) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	panic("argument")
}

func TestATransactionIsRolledBackWhateverEndsIt(t *testing.T) {
	f := newPoolFixture(t, Config{})
	count := func() (n int) {
		if err := f.admin.QueryRow(t.Context(), "SELECT count(*) FROM t_a.notes WHERE id > 1").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	insert := func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "INSERT INTO notes VALUES (2, 't_a')")
		return err
	}
	ctx, cancel := context.WithCancel(f.as(acme))
	for name, fn := range map[string]func(context.Context, pgx.Tx) error{
		"error":   func(ctx context.Context, tx pgx.Tx) error { return errors.Join(insert(ctx, tx), io.EOF) },
		"ignored": func(ctx context.Context, tx pgx.Tx) error { insert(ctx, tx); tx.Exec(ctx, "SELECT 1/0"); return nil },
		"switch": func(ctx context.Context, tx pgx.Tx) error {
			return errors.Join(insert(ctx, tx), func() error { _, err := tx.Exec(f.as(globex), "SELECT 1"); return err }())
		},
	} {
		if err := f.db.InTx(ctx, pgx.TxOptions{}, fn); err == nil || count() != 0 {
			t.Errorf("%s: %v, %d rows", name, err, count())
		}
	}
	err := f.db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error { defer cancel(); return insert(ctx, tx) })
	if !errors.Is(err, context.Canceled) || count() != 0 {
		t.Errorf("cancelled before the commit: %v, %d rows", err, count())
	}
	err = f.db.InTx(f.as(acme), pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		if got, err := TenantFrom(ctx); err != nil || got.ID != acme {
			t.Errorf("fn's context: %v, %v", got, err)
		}
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			if _, err := tx.Exec(f.as(globex), "SELECT 1"); !errors.Is(err, ErrTenantMismatch) {
				t.Errorf("a savepoint takes another tenant's context: %v", err)
			}
			return insert(context.Background(), tx)
		})
	})
	if err != nil || count() != 1 {
		t.Errorf("committed: %v, %d rows", err, count())
	}
	b := &pgx.Batch{}
	b.BeginTx(pgx.TxOptions{})
	br := f.db.SendBatch(f.as(acme), b)
	if err := br.Close(); err != nil {
		t.Error(err)
	}
	if _, err := br.Tx().Exec(f.as(globex), "SELECT 1"); !errors.Is(err, ErrTenantMismatch) {
		t.Errorf("a batch's transaction takes another tenant's context: %v", err)
	}
	if err := br.Tx().Rollback(f.as(globex)); err != nil {
		t.Errorf("Rollback refused: %v", err)
	}
	f.idle()
}

func TestNothingDoneToAPinnedConnectionIsSeenAfterwards(t *testing.T) {
	f := newPoolFixture(t, Config{Limits: Limits{TenantConns: 1}})
	var kept *pgx.Conn
	var before, after uint32
	err := f.db.WithConn(f.as(acme), func(ctx context.Context, conn *pgx.Conn) error {
		kept, before = conn, conn.PgConn().PID()
		_, err := conn.Exec(ctx, "SET search_path = pg_catalog; CREATE TEMP TABLE notes (tenant text); SELECT pg_advisory_lock(1); LISTEN x")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f.wantNotes(acme, "t_a")
	err = f.db.WithConn(f.as(acme), func(ctx context.Context, conn *pgx.Conn) error { after = conn.PgConn().PID(); return nil })
	if err != nil || before == after || !kept.IsClosed() {
		t.Errorf("backend %d, then %d; closed %v; %v", before, after, kept.IsClosed(), err)
	}
	f.idle()
}

func TestClosingCutsWhatDoesNotEnd(t *testing.T) {
	f := newPoolFixture(t, Config{})
	started, ended := make(chan struct{}), make(chan error)
	go func() {
		ended <- f.db.WithConn(f.as(acme), func(ctx context.Context, conn *pgx.Conn) error {
			close(started)
			_, err := conn.Exec(ctx, "SELECT pg_sleep(30)")
			return err
		})
	}()
	<-started
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	begun := time.Now()
	pools := f.tn.pools
	f.tn.pools = f.tn.newPools(newPoolMaker(f.tn)) // for the fixture to close
	if cut, err := pools.Close(ctx); len(cut) != 1 || err == nil {
		t.Errorf("Close cut %v, %v", cut, err)
	}
	if err := <-ended; err == nil || time.Since(begun) > 10*time.Second {
		t.Errorf("the call ended with %v after %v", err, time.Since(begun))
	}
	closed := &Tenancy{realm: f.tn.realm, view: f.tn.view, pools: pools}
	if _, err := (&TenantAwareDB{tn: closed}).Exec(f.as(acme), "SELECT 1"); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// allocCases are the calls whose price is compared with the bare pool's, and what they may cost more.
var allocCases = []struct {
	name  string
	extra float64
	run   func(ctx context.Context, db sqlcDBTX) error
}{
	{"exec", 0, func(ctx context.Context, db sqlcDBTX) error {
		_, err := db.Exec(ctx, "SELECT tenant FROM notes WHERE id = $1", 1)
		return err
	}},
	{"query_row", 1, func(ctx context.Context, db sqlcDBTX) error {
		var s string
		return db.QueryRow(ctx, "SELECT tenant FROM notes WHERE id = $1", 1).Scan(&s)
	}},
	{"query", 1, func(ctx context.Context, db sqlcDBTX) error {
		var s string
		rows, err := db.Query(ctx, "SELECT tenant FROM notes WHERE id = $1", 1)
		for rows.Next() {
			err = rows.Scan(&s)
		}
		return errors.Join(err, rows.Err())
	}},
	{"tx", 0, func(ctx context.Context, db sqlcDBTX) error {
		tx, err := db.(beginner).Begin(ctx)
		if err != nil {
			return err
		}
		return tx.Commit(ctx)
	}},
	{"batch", 0, func(ctx context.Context, db sqlcDBTX) error {
		b := &pgx.Batch{}
		b.Queue("SELECT 1")
		return db.SendBatch(ctx, b).Close()
	}},
}

func TestACallCostsAtMostOneAllocationMoreThanTheBarePool(t *testing.T) {
	f := newPoolFixture(t, Config{})
	ctx := f.as(acme)
	f.wantNotes(acme, "t_a")
	var bare *pgxpool.Pool
	f.tn.pools.Each(func(_ ID, _ int64, p *tenantPool, _ int) { bare = p.pool })
	for _, c := range allocCases {
		measure := func(db sqlcDBTX) float64 {
			return testing.AllocsPerRun(300, func() {
				if err := c.run(ctx, db); err != nil {
					t.Fatal(err)
				}
			})
		}
		ours, theirs := measure(f.db), measure(bare)
		t.Logf("%-9s %v allocations, the bare pool %v", c.name, ours, theirs)
		if ours > theirs+c.extra {
			t.Errorf("%s: %v allocations, the bare pool %v", c.name, ours, theirs)
		}
	}
}

func BenchmarkCall(b *testing.B) {
	f := newPoolFixture(b, Config{})
	ctx := f.as(acme)
	f.wantNotes(acme, "t_a")
	var bare *pgxpool.Pool
	f.tn.pools.Each(func(_ ID, _ int64, p *tenantPool, _ int) { bare = p.pool })
	for _, c := range allocCases {
		for name, db := range map[string]sqlcDBTX{"tenant": f.db, "bare": bare} {
			b.Run(c.name+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := c.run(ctx, db); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	b.Run("checkout", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c, err := f.db.checkout(ctx, "bench")
			if err != nil {
				b.Fatal(err)
			}
			c.release()
		}
	})
	b.Run("checkout/bare", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c, err := bare.Acquire(ctx)
			if err != nil {
				b.Fatal(err)
			}
			c.Release()
		}
	})
}

// TestFindingAnIdleConnectionSaysNothingOfTheServer: the breaker hears of attempts that connect.
func TestFindingAnIdleConnectionSaysNothingOfTheServer(t *testing.T) {
	f := newPoolFixture(t, Config{})
	if _, err := f.db.Exec(f.as(acme), "SELECT 1"); err != nil { // one is idle from here on
		t.Fatal(err)
	}
	l, err := f.tn.pools.Acquire(t.Context(), acme, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	p := l.Value()
	refused := func() error { return &connectFailure{text: "refused"} }
	for range breakerFailures - 1 {
		p.breaker.do(refused)
	}
	if _, err := p.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.breaker.do(refused)
	if p.breaker.open() == nil {
		t.Error("an attempt that found an idle connection was taken for one that connected")
	}
}

// TestAPoolMakesNoRoomBeforeItIsTheTenants: what a builder has opened is its own until then.
func TestAPoolMakesNoRoomBeforeItIsTheTenants(t *testing.T) {
	if (&tenantPool{}).evict() {
		t.Error("a pool that is not there yet has made room")
	}
	f := newPoolFixture(t, Config{})
	f.wantNotes(acme, "t_a") // one is idle from here on
	l, err := f.tn.pools.Acquire(t.Context(), acme, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	p := l.Value()
	p.built.Store(false)
	if p.evict() || p.pool.Stat().IdleConns() != 1 {
		t.Error("a builder has lost its connection")
	}
	p.built.Store(true)
	if !p.evict() {
		t.Error("a pool that was built makes no room")
	}
}

// TestAVerbThatGotNoPermitIsBusy: pgconn gives its dialer ConnectTimeout, and makes an error of its own of a timeout.
func TestAVerbThatGotNoPermitIsBusy(t *testing.T) {
	s := newServers(Config{Limits: Limits{ServerConns: 8, Nodes: 1}, Logger: slog.New(slog.DiscardHandler)}.withDefaults())
	cc, err := pgx.ParseConfig("postgres://u:p@127.0.0.1:5/d?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	cc.ConnectTimeout = 50 * time.Millisecond
	dial := s.of(cc.Host, cc.Port).Dialer(func(context.Context, string, string) (net.Conn, error) { near, _ := net.Pipe(); return near, nil })
	for range (budget.Limits{Total: 8}).Shared() {
		c, err := dial(t.Context(), "tcp", "nowhere:5")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	s.single(cc)
	_, err = pgx.ConnectConfig(t.Context(), cc)
	for name, got := range map[string]error{"the primary": unavailable("lock", err), "a server": withoutSecrets(err)} {
		if !errors.Is(got, ErrBusy) || errors.Is(got, ErrPrimaryUnavailable) {
			t.Errorf("%s: %v", name, got)
		}
	}
}
