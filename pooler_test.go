package tenancy_test

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/internal/scram"
	"github.com/msmt-go/tenancy/tenancytest"
)

// recipe returns the block of docs/poolers.md in the language: what the tests run is what operators are told.
func recipe(tb testing.TB, language string) string {
	tb.Helper()
	text, err := os.ReadFile("docs/poolers.md")
	if err != nil {
		tb.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(blocks) != 1 {
		tb.Fatalf("docs/poolers.md has %d blocks of %s, not one", len(blocks), language)
	}
	return blocks[0][1]
}

// bouncer is a PgBouncer before a fleet's tenants, set up as docs/poolers.md says.
type bouncer struct {
	*pgembed.Bouncer
	admin    *pgx.Conn // of the tenants' database, past it
	database string
}

// address is what ServerConfig.Pooler wants.
func (b bouncer) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(b.Port())) }

// newBouncer starts one. settings are lines of [pgbouncer], and database is added to the line of the tenants' database.
func newBouncer(tb testing.TB, f *tenancytest.Fleet, database string, settings ...string) bouncer {
	tb.Helper()
	b := bouncer{admin: f.Admin(tb, "tenants")}
	b.database = scan[string](tb, b.admin, "SELECT current_database()")
	role := b.database + "_pgbouncer"
	password, err := scram.Password()
	if err != nil {
		tb.Fatal(err)
	}
	b.setUp(tb, role, password)
	u, err := url.Parse(f.AdminURL)
	if err != nil {
		tb.Fatal("the test server's URL cannot be parsed")
	}
	lines := recipe(tb, "ini")
	for _, tls := range []string{"client_tls", "server_tls"} { // there is none on the loopback
		lines = regexp.MustCompile("(?m)^"+tls+".*\n").ReplaceAllString(lines, "")
	}
	lines = regexp.MustCompile("(?m)^app_tenants = .*").ReplaceAllString(lines, fmt.Sprintf("%s = host=%s port=%s %s", b.database, u.Hostname(), u.Port(), database))
	lines = strings.ReplaceAll(lines, "auth_user = pgbouncer", "auth_user = "+role)
	lines += strings.Join(settings, "\n")
	b.Bouncer, err = pgembed.StartBouncer(tb.Context(), lines, fmt.Sprintf("%q %q\n", role, password))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			log, _ := b.Log()
			tb.Logf("PgBouncer's log:\n%s", log)
		}
		if err := b.Stop(); err != nil {
			tb.Error(err)
		}
	})
	return b
}

// setUp runs the statements of docs/poolers.md, once for each fleet.
func (b bouncer) setUp(tb testing.TB, role, password string) {
	tb.Helper()
	verifier, err := scram.RandomVerifier(password)
	if err != nil {
		tb.Fatal(err)
	}
	if scan[bool](tb, b.admin, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role) {
		must(tb, b.admin, "ALTER ROLE "+role+" PASSWORD '"+verifier+"'")
		return
	}
	sql := strings.NewReplacer("ROLE pgbouncer", "ROLE "+role, "TO pgbouncer", "TO "+role, "app_tenants", b.database, "'secret'", "'"+verifier+"'").Replace(recipe(tb, "sql"))
	sql = regexp.MustCompile(`(?m)^\\connect.*`).ReplaceAllString(sql, "")
	must(tb, b.admin, sql)
	tb.Cleanup(func() { // before the fleet is dropped, and after PgBouncer has stopped
		ctx := context.WithoutCancel(tb.Context())
		admin := b.admin
		for _, sql := range []string{"DROP SCHEMA pgbouncer CASCADE", "DROP OWNED BY " + role, "DROP ROLE " + role} {
			if _, err := admin.Exec(ctx, sql); err != nil {
				tb.Errorf("%s: %v", sql, err)
			}
		}
	})
}

// endSessions ends what PgBouncer keeps open for a login, so that its next sessions are new.
func (b bouncer) endSessions(tb testing.TB, login string) {
	tb.Helper()
	must(tb, b.admin, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = $1", login)
}

func (b bouncer) sessions(tb testing.TB, login string) int {
	tb.Helper()
	return scan[int](tb, b.admin, "SELECT count(*) FROM pg_stat_activity WHERE usename = $1", login)
}

// pooledIsolations are those whose tenants are in one database, which PgBouncer is told of once.
var pooledIsolations = []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationShared}

// pooledFleet is a fleet whose tenants' calls go through a PgBouncer, with one node and two tenants. Unless cfg says otherwise, each has a schema.
func pooledFleet(t *testing.T, cfg tenancy.Config, database string, settings ...string) (f *tenancytest.Fleet, b bouncer, tn *tenancy.Tenancy, acme, globex tenancy.Tenant) {
	t.Helper()
	f = tenancytest.NewFleet(t)
	b = newBouncer(t, f, database, settings...)
	cfg.Migrations = noteMigrations
	cfg.Isolation = cmp.Or(cfg.Isolation, tenancy.IsolationSchema)
	tn = f.Open(t, cfg)
	register(t, f, tn, b.address())
	return f, b, tn, createIn(t, tn, "acme", cfg.Isolation), createIn(t, tn, "globex", cfg.Isolation)
}

func register(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy, pooler string) {
	t.Helper()
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{URL: f.ServerURL, Pooler: pooler}); err != nil {
		t.Fatal(err)
	}
}

// titles reads whose rows the context's tenant sees.
func titles(ctx context.Context, tn *tenancy.Tenancy) ([]string, error) {
	rows, _ := tn.DB().Query(ctx, "SELECT tenant FROM notes ORDER BY id LIMIT $1", 10)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func wantTitles(t *testing.T, tn *tenancy.Tenancy, name string) {
	t.Helper()
	if got, err := titles(tenancytest.Context(t, tn, name), tn); err != nil || len(got) != 1 || got[0] != name {
		t.Errorf("%s reads %v, %v", name, got, err)
	}
}

// wantRefused checks that a node that has no connections yet gets none that is the tenant's.
func wantRefused(t *testing.T, f *tenancytest.Fleet, cfg tenancy.Config, name string, class error, texts ...string) {
	t.Helper()
	node := f.Open(t, cfg)
	got, err := titles(tenancytest.Context(t, node, name), node)
	wantError(t, err, class, texts...)
	if len(got) > 0 {
		t.Errorf("%s reads %v", name, got)
	}
}

// viaPooler says whether the tenant's calls meet another backend than the one that answered the dial.
func viaPooler(t *testing.T, tn *tenancy.Tenancy, name string) (pooled bool) {
	t.Helper()
	err := tn.DB().InTx(tenancytest.Context(t, tn, name), pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		var pid uint32
		err := tx.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&pid)
		pooled = pid != tx.Conn().PgConn().PID()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pooled
}

func TestTenantsBehindPgBouncerReadTheirOwnRowsAlone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		mode string
		as   tenancy.Isolation
	}{{"transaction", tenancy.IsolationSchema}, {"session", tenancy.IsolationSchema}, {"transaction", tenancy.IsolationShared}, {"session", tenancy.IsolationShared}} {
		t.Run(c.mode+"_"+string(c.as), func(t *testing.T) {
			t.Parallel()
			mode := c.mode
			// In transaction mode four connections of the library's share two sessions. A session has to be left to its client.
			size := map[string]int{"transaction": 2, "session": 8}[mode]
			f, b, tn, acme, globex := pooledFleet(t, tenancy.Config{Extensions: true, Isolation: c.as}, "", "pool_mode = "+mode, fmt.Sprintf("default_pool_size = %d", size))
			var work sync.WaitGroup
			for _, name := range []string{"acme", "globex"} {
				ctx := tenancytest.Context(t, tn, name)
				for range 6 {
					work.Go(func() {
						for i := range 50 {
							if err := reads(ctx, tn, name, i); err != nil {
								t.Errorf("%s: %v", name, err)
								return
							}
						}
					})
				}
			}
			work.Wait()
			for _, at := range []struct {
				name  string
				own   placeRow
				notID tenancy.ID
				not   placeRow
			}{{"acme", placeOf(t, f, acme.ID), globex.ID, placeOf(t, f, globex.ID)}, {"globex", placeOf(t, f, globex.ID), acme.ID, placeOf(t, f, acme.ID)}} {
				if !viaPooler(t, tn, at.name) {
					t.Errorf("%s's calls do not go through PgBouncer: the test shows nothing", at.name)
				}
				if n := b.sessions(t, at.own.Login); n < 1 || mode == "transaction" && n > size {
					t.Errorf("%s has %d sessions", at.name, n)
				}
				wantNoReach(t, tn, at.name, at.notID, at.not)
				var timeout string
				if err := tn.DB().QueryRow(tenancytest.Context(t, tn, at.name), "SHOW statement_timeout").Scan(&timeout); err != nil || timeout != "30s" {
					t.Errorf("%s has the statement_timeout %q, %v", at.name, timeout, err)
				}
			}
		})
	}
}

// wantNoReach tries to read and to write what is another tenant's, by its name. In a shared schema its table is the tenant's too.
func wantNoReach(t *testing.T, tn *tenancy.Tenancy, name string, id tenancy.ID, other placeRow) {
	t.Helper()
	ctx := tenancytest.Context(t, tn, name)
	var schema string
	if err := tn.DB().QueryRow(ctx, "SELECT current_schema()").Scan(&schema); err != nil {
		t.Fatal(err)
	}
	if schema != other.Schema {
		if _, err := tn.DB().Exec(ctx, "SELECT * FROM "+other.table("notes")); sqlState(err) != "42501" {
			t.Errorf("%s reaches for the other one: %v", name, err)
		}
		return
	}
	for _, sql := range []string{"SELECT 1 FROM notes WHERE tenant <> $1", "UPDATE notes SET title = 'taken' WHERE tenant <> $1", "DELETE FROM notes WHERE tenant <> $1"} {
		if tag, err := tn.DB().Exec(ctx, sql, name); err != nil || tag.RowsAffected() != 0 {
			t.Errorf("%s reaches for the other one: %v, %v", name, tag, err)
		}
	}
	_, err := tn.DB().Exec(ctx, "INSERT INTO notes (tenant, title, tenant_id) VALUES ($1, 'given', $2)", name, id)
	if sqlState(err) != "42501" {
		t.Errorf("%s writes a row of the other one: %v", name, err)
	}
	if _, err := tn.DB().Exec(ctx, "SET ROLE "+other.Login); sqlState(err) != "42501" {
		t.Errorf("%s becomes the other one: %v", name, err)
	}
}

// reads does one of several things that a service does, and says when a row is another tenant's.
func reads(ctx context.Context, tn *tenancy.Tenancy, name string, i int) error {
	var got []string
	var err error
	switch i % 4 {
	case 0:
		got, err = titles(ctx, tn)
	case 1:
		err = tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			rows, _ := tx.Query(ctx, "SELECT tenant FROM notes WHERE id > $1", 0)
			got, err = pgx.CollectRows(rows, pgx.RowTo[string])
			return err
		})
	case 2:
		b := &pgx.Batch{}
		b.Queue("SELECT tenant FROM notes WHERE id < $1", 1000).Query(func(rows pgx.Rows) error {
			got, err = pgx.CollectRows(rows, pgx.RowTo[string])
			return err
		})
		err = tn.DB().SendBatch(ctx, b).Close()
	case 3: // another worker may see the row, or take it out
		got = []string{name}
		if _, err = tn.DB().CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, pgx.CopyFromRows([][]any{{name, "copied"}})); err == nil {
			_, err = tn.DB().Exec(ctx, "DELETE FROM notes WHERE title = $1", "copied")
		}
	}
	if err != nil {
		return fmt.Errorf("%d: %w", i%4, err)
	}
	if len(got) == 0 {
		return fmt.Errorf("%d: no rows", i%4)
	}
	for _, tenant := range got {
		if tenant != name {
			return fmt.Errorf("%d: a row of %s", i%4, tenant)
		}
	}
	return nil
}

// undeclared has the pools of a node dial a pooler, once it is there, where they think to dial PostgreSQL.
type undeclared struct{ address atomic.Pointer[string] }

func (u *undeclared) config() tenancy.Config {
	return tenancy.Config{Migrations: noteMigrations, PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error {
		cfg.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			if pooler := u.address.Load(); pooler != nil {
				address = *pooler
			}
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		return nil
	}}
}

func TestAPoolerThatNobodyDeclaredIsRefused(t *testing.T) {
	t.Parallel()
	var way undeclared
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, way.config())
	acme := create(t, f, tn, "acme")
	create(t, f, tn, "globex")
	source, err := tn.Catalog().SourceForTest(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	// What a service without schemas has left, or an operator has opened: rows in public that are nobody's.
	admin := f.Admin(t, "tenants")
	must(t, admin, `CREATE TABLE public.notes (id bigint, tenant text); INSERT INTO public.notes VALUES (1, 'wrong');
		GRANT USAGE ON SCHEMA public TO PUBLIC; GRANT SELECT ON public.notes TO PUBLIC`)
	for _, c := range []struct {
		name, mode, ignore string
		silent             bool
		says               []string
	}{
		{"transaction_ignoring_parameters", "transaction", "search_path, statement_timeout", true, []string{"we dialled backend", "ServerConfig.Pooler"}},
		{"session_ignoring_parameters", "session", "search_path, statement_timeout", true, []string{"we dialled backend", "ServerConfig.Pooler"}},
		{"default", "transaction", "extra_float_digits", false, []string{"unsupported startup parameter", "PgBouncer", "directly", "ServerConfig.Pooler"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBouncer(t, f, "", "pool_mode = "+c.mode, "ignore_startup_parameters = "+c.ignore)
			address := b.address()
			// A bare pool with the same settings: what this library stands before.
			cfg, err := pgxpool.ParseConfig("postgres://" + address + "/" + source.Database + "?sslmode=disable&default_query_exec_mode=exec")
			if err != nil {
				t.Fatal(err)
			}
			cfg.ConnConfig.User, cfg.ConnConfig.Password = source.User, source.Password.Reveal()
			cfg.ConnConfig.RuntimeParams = map[string]string{"search_path": pgx.Identifier{source.Schema}.Sanitize(), "statement_timeout": "30000"}
			bare, err := pgxpool.NewWithConfig(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer bare.Close()
			var got string
			err = bare.QueryRow(t.Context(), "SELECT tenant FROM notes").Scan(&got)
			if c.silent && (err != nil || got != "wrong") {
				t.Errorf("a bare pool reads %q, %v: the guard guards nothing", got, err)
			}
			if !c.silent && sqlState(err) != "08P01" {
				t.Errorf("a bare pool is refused with %v", err)
			}

			way.address.Store(&address)
			defer way.address.Store(nil)
			for _, name := range []string{"acme", "globex"} {
				wantRefused(t, f, way.config(), name, tenancy.ErrPooler, c.says...)
			}
		})
	}
	wantTitles(t, tn, "acme")
}

func TestALoginWithoutItsSearchPathIsRefusedBehindAPooler(t *testing.T) {
	t.Parallel()
	cfg := tenancy.Config{Migrations: noteMigrations}
	f, b, tn, acme, globex := pooledFleet(t, cfg, "")
	at, other := placeOf(t, f, acme.ID), placeOf(t, f, globex.ID)
	must(t, b.admin, `CREATE TABLE public.notes (id bigint, tenant text); INSERT INTO public.notes VALUES (1, 'wrong');
		GRANT USAGE ON SCHEMA public TO PUBLIC; GRANT SELECT ON public.notes TO PUBLIC`)
	alter := "ALTER ROLE " + at.Login + " IN DATABASE " + b.database
	for name, sql := range map[string]string{
		"missing":             alter + " RESET search_path",
		"public":              alter + " SET search_path = public",
		"more":                alter + " SET search_path = " + at.Schema + ", public",
		"of_the_other_tenant": alter + " SET search_path = " + other.Schema,
		"pg_temp_first":       alter + " SET search_path = pg_temp, " + at.Schema,
	} {
		t.Run(name, func(t *testing.T) {
			must(t, b.admin, sql)
			b.endSessions(t, at.Login)
			wantRefused(t, f, cfg, "acme", tenancy.ErrIdentity, "search_path", "RotatePassword")
			wantTitles(t, tn, "globex")
		})
	}
	t.Run("right_with_the_marker_of_another", func(t *testing.T) {
		mend(t, f, b, tn, acme.ID)
		marker := at.table("tenancy_marker")
		was := scan[string](t, b.admin, "SELECT tenant FROM "+marker)
		must(t, b.admin, "UPDATE "+marker+" SET tenant = (SELECT tenant FROM "+other.table("tenancy_marker")+")")
		wantRefused(t, f, cfg, "acme", tenancy.ErrIdentity, "marker")
		must(t, b.admin, "UPDATE "+marker+" SET tenant = $1", was)
		wantTitles(t, f.Open(t, cfg), "acme")
	})
	t.Run("by_the_tenants_own_sql", func(t *testing.T) {
		mend(t, f, b, tn, acme.ID)
		wantTitles(t, tn, "acme")
		if _, err := tn.DB().Exec(tenancytest.Context(t, tn, "acme"), "ALTER ROLE CURRENT_USER IN DATABASE "+b.database+" SET search_path = public"); err != nil {
			t.Fatal(err)
		}
		b.endSessions(t, at.Login)
		wantRefused(t, f, cfg, "acme", tenancy.ErrIdentity, "search_path is public")
		wantTitles(t, tn, "globex")
	})
	mend(t, f, b, tn, acme.ID)
	node := f.Open(t, cfg)
	wantTitles(t, node, "acme")
	must(t, b.admin, alter+" RESET search_path")
	if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil { // no session of the new login is older than its settings
		t.Fatal(err)
	}
	wantTitles(t, tn, "acme")
}

// mend sets the login's settings anew, as docs/poolers.md says.
func mend(t *testing.T, f *tenancytest.Fleet, b bouncer, tn *tenancy.Tenancy, id tenancy.ID) {
	t.Helper()
	b.endSessions(t, placeOf(t, f, id).Login)
	d, err := tn.Catalog().DataSource(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().SetDataSource(t.Context(), id, d); err != nil {
		t.Fatal(err)
	}
}

func TestAPoolerThatIsNotTheTenantsOwnWayIsRefused(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	acme, globex := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	other, err := tn.Catalog().SourceForTest(t.Context(), globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	super, err := url.Parse(f.AdminURL)
	if err != nil {
		t.Fatal("the test server's URL cannot be parsed")
	}
	password, _ := super.User.Password()
	asSuper := fmt.Sprintf("user=%s password=%s", super.User.Username(), password)
	login, schema := placeOf(t, f, acme.ID).Login, placeOf(t, f, acme.ID).Schema
	path := "SET search_path = " + schema
	// A marker that the tenant has turned into a trap for superusers: whoever reads it before knowing who reads it springs it.
	must(t, f.Admin(t, "tenants"), strings.ReplaceAll(`ALTER TABLE {}.tenancy_marker RENAME TO kept;
		CREATE FUNCTION {}.trap() RETURNS boolean LANGUAGE plpgsql AS $$
		BEGIN IF current_setting('is_superuser') = 'on' THEN RAISE 'the trap was sprung'; END IF; RETURN true; END $$;
		CREATE VIEW {}.tenancy_marker AS SELECT realm, tenant FROM {}.kept WHERE {}.trap();
		GRANT SELECT ON {}.tenancy_marker TO `, "{}", schema)+placeOf(t, f, acme.ID).Runtime)
	// With scram-sha-256, PgBouncer 1.18 hands the client's own proof on also where user= names another.
	const trust = "auth_type = trust"
	for name, c := range map[string]struct {
		database, setting string
		class             error
		says              string
	}{
		"login_of_another":            {database: fmt.Sprintf("user=%s password=%s", other.User, other.Password.Reveal()), setting: trust, class: tenancy.ErrIdentity, says: "logged in as"},
		"superuser":                   {database: asSuper, setting: trust, class: tenancy.ErrIdentity, says: "superuser"},
		"superuser_who_took_the_name": {database: asSuper + " connect_query='SET SESSION AUTHORIZATION " + login + "; " + path + "'", setting: trust, class: tenancy.ErrIdentity, says: "the pooler has logged in as"},
		"superuser_who_took_the_role": {database: asSuper + " connect_query='SET ROLE " + login + "; " + path + "'", setting: trust, class: tenancy.ErrIdentity, says: "logged in as"},
		"path_set_by_the_pooler":      {database: "connect_query='SET search_path = public'", class: tenancy.ErrIdentity, says: "search_path is public"},
		"statement_mode":              {setting: "pool_mode = statement", class: tenancy.ErrTenantUnavailable, says: "statement pooling"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBouncer(t, f, c.database, c.setting)
			register(t, f, tn, b.address())
			d, err := tn.Catalog().SourceForTest(t.Context(), acme.ID)
			if err != nil {
				t.Fatal(err)
			}
			d.Pooler = b.address()
			err = tn.Catalog().SetDataSource(t.Context(), acme.ID, d)
			if c.class == tenancy.ErrTenantUnavailable { // that of a call; a verb says what the server said
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want %q", err, c.says)
				}
			} else {
				wantError(t, err, c.class, c.says)
			}
			if err != nil && strings.Contains(err.Error(), password) {
				t.Error("the error tells a password")
			}
			wantTitles(t, tn, "acme") // which has not moved
		})
	}
}

func TestAFenceHoldsBehindAPooler(t *testing.T) {
	t.Parallel()
	for _, as := range pooledIsolations {
		t.Run(string(as), func(t *testing.T) { testFenceBehindAPooler(t, as) })
	}
}

func testFenceBehindAPooler(t *testing.T, isolation tenancy.Isolation) {
	f, b, tn, acme, _ := pooledFleet(t, tenancy.Config{Isolation: isolation}, "", "query_wait_timeout = 1")
	c, login := tn.Catalog(), placeOf(t, f, acme.ID).Login
	wantTitles(t, tn, "acme")
	if b.sessions(t, login) == 0 {
		t.Fatal("PgBouncer keeps no session: the test shows nothing")
	}
	source, err := c.SourceForTest(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	through := func() (*pgx.Conn, error) { // as anyone could who stole the password
		d := source
		d.Host, d.Port, d.Schema = "127.0.0.1", uint16(b.Port()), ""
		return connectTo(t, d)
	}
	stolen, err := through()
	if err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, stolen, "SELECT count(*) FROM notes"); n != 1 {
		t.Errorf("the stolen password reads %d rows: the test shows nothing", n)
	}

	as := tenancytest.Context(t, tn, "acme")
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if n := b.sessions(t, login); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
	_, err = titles(as, tn)
	wantError(t, err, tenancy.ErrTenantSuspended)
	if _, err := stolen.Exec(t.Context(), "SELECT count(*) FROM notes"); sqlState(err) != "08P01" { // PgBouncer's own: it gets no session
		t.Errorf("a connection to PgBouncer that was open before: %v", err)
	}
	if _, err := through(); err == nil {
		t.Error("PgBouncer lets the closed login in")
	}
	if n := b.sessions(t, login); n != 0 {
		t.Errorf("%d sessions are back", n)
	}
	wantTitles(t, tn, "globex")

	until(t, 20*time.Second, "nil", func() string { // PgBouncer tries a login that was refused again after server_login_retry
		return errString(c.Resume(t.Context(), acme.ID))
	})
	wantTitles(t, tn, "acme")
}

func errString(err error) string {
	if err == nil {
		return "nil"
	}
	return err.Error()
}

func TestRotationsBehindAPoolerFailNoRequest(t *testing.T) {
	t.Parallel()
	for _, as := range pooledIsolations {
		t.Run(string(as), func(t *testing.T) { testRotationsBehindAPooler(t, as) })
	}
}

func testRotationsBehindAPooler(t *testing.T, as tenancy.Isolation) {
	f, b, tn, acme, _ := pooledFleet(t, tenancy.Config{Isolation: as}, "")
	stop, began := make(chan struct{}), make(chan struct{})
	var work sync.WaitGroup
	var calls atomic.Int64
	for _, name := range []string{"acme", "acme", "globex"} {
		ctx := tenancytest.Context(t, tn, name)
		work.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := reads(ctx, tn, name, i); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				if calls.Add(1) == 20 {
					close(began)
				}
			}
		})
	}
	<-began
	for range 2 {
		old := placeOf(t, f, acme.ID).Login
		start := time.Now()
		if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > 9*time.Second { // DrainTimeout is 10 s
			t.Errorf("the rotation waited %v for sessions that PgBouncer keeps for nobody", took)
		}
		if n := b.sessions(t, old); n != 0 {
			t.Errorf("%d sessions of the old login are left", n)
		}
	}
	close(stop)
	work.Wait()
	if !viaPooler(t, tn, "acme") {
		t.Error("after a rotation the calls do not go through PgBouncer any more")
	}
	if as == tenancy.IsolationSchema { // which its login's name begins with
		wantOneLogin(t, f, tn, acme.ID, true)
	}
}

// TestANewPasswordIsReadWhenAPoolerRefusesTheOldOne: the catalog has a newer generation of which this node has not heard. No call fails.
func TestANewPasswordIsReadWhenAPoolerRefusesTheOldOne(t *testing.T) {
	t.Parallel()
	f, b, setup, acme, globex := pooledFleet(t, tenancy.Config{}, "")
	w, tn := watchedNode(t, f, tenancy.Config{Lookups: tenancy.LookupConfig{PollPeriod: 4 * time.Second}})
	w.deafen()
	ctx, other := tenancytest.Context(t, tn, acme.Name), tenancytest.Context(t, tn, globex.Name)
	d := sourceOf(t, setup, acme.ID)
	must(t, b.admin, `ALTER ROLE `+d.User+` PASSWORD 'another'`)
	d.Password = "another"
	if err := setup.Catalog().SetDataSource(t.Context(), acme.ID, d); err != nil {
		t.Fatal(err)
	}
	asked := w.asked("tenant")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				for _, ctx := range []context.Context{ctx, other} {
					if _, err := titles(ctx, tn); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if n := w.asked("tenant") - asked; n != 1 {
		t.Errorf("the primary was asked %d times, want once", n)
	}
}

// TestAPoolerThatLogsInAsAnotherIsRefusedInASharedSchema is the mistake that row-level security cannot see: PgBouncer's sessions are all of one tenant's login.
func TestAPoolerThatLogsInAsAnotherIsRefusedInASharedSchema(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationShared})
	acme, globex := createIn(t, tn, "acme", tenancy.IsolationShared), createIn(t, tn, "globex", tenancy.IsolationShared)
	other := sourceOf(t, tn, globex.ID)
	b := newBouncer(t, f, fmt.Sprintf("user=%s password=%s", other.User, other.Password.Reveal()), "auth_type = trust")
	register(t, f, tn, b.address())
	other.Pooler = b.address()
	if err := tn.Catalog().SetDataSource(t.Context(), globex.ID, other); err != nil { // whose way it is, with the settings that a proof wants
		t.Fatal(err)
	}
	d := sourceOf(t, tn, acme.ID)
	d.Pooler = b.address()
	wantError(t, tn.Catalog().SetDataSource(t.Context(), acme.ID, d), tenancy.ErrIdentity, "logged in as")
	wantTitles(t, tn, "acme") // which has not moved
	wantTitles(t, tn, "globex")
}

// TestTenantsWithADatabaseBehindPgBouncer runs what PgBouncer 1.18 can be told of databases whose names nobody knows before. Whether a client may come in it
// asks of the client's own database, as its auth_user, and who may connect there are the tenant's own roles alone.
func TestTenantsWithADatabaseBehindPgBouncer(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	cfg := tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationDatabase}
	tn := f.Open(t, cfg)
	u, err := url.Parse(f.AdminURL)
	if err != nil {
		t.Fatal("the test server's URL cannot be parsed")
	}
	all := fmt.Sprintf("\n* = host=%s port=%s", u.Hostname(), u.Port())
	for _, c := range []struct{ name, databases, says, logs string }{
		{"not-listed", "", "SASL authentication failed", "no such user"},
		{"all-listed", all, "timeout", "permission denied for database"}, // it tries again and again, and the client waits
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBouncer(t, f, c.databases)
			register(t, f, tn, b.address())
			made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: c.name})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("made %v: %v, want %q", made, err, c.says)
			}
			if log, err := b.Log(); err != nil || !strings.Contains(log, c.logs) {
				t.Errorf("%v; PgBouncer does not log %q:\n%s", err, c.logs, log)
			}
			if got, err := tn.Catalog().TenantByName(t.Context(), c.name); err != nil || got.State != tenancy.StateProvisioning {
				t.Errorf("it is %+v, %v", got, err)
			}
			register(t, f, tn, "")
			tenancytest.Create(t, tn, c.name) // finished past the pooler
			if viaPooler(t, f.Open(t, cfg), c.name) {
				t.Error("its calls go through the pooler, which the server is registered without")
			}
		})
	}
	t.Run("a_superuser_asks", func(t *testing.T) {
		b := newBouncer(t, f, all, "server_idle_timeout = 1", "auth_query = SELECT rolname, rolpassword FROM pg_authid WHERE rolname = $1 AND rolcanlogin AND NOT rolsuper AND rolname ~ '^t_[0-9a-f]{20}_l[0-9]+$'")
		must(t, b.admin, "ALTER ROLE "+b.database+"_pgbouncer SUPERUSER")
		register(t, f, tn, b.address())
		acme, globex := createIn(t, tn, "acme", tenancy.IsolationDatabase), createIn(t, tn, "globex", tenancy.IsolationDatabase)
		for _, at := range []struct {
			name string
			own  tenancy.ID
		}{{"acme", acme.ID}, {"globex", globex.ID}} {
			wantTitles(t, tn, at.name)
			if !viaPooler(t, tn, at.name) {
				t.Errorf("%s's calls do not go through PgBouncer: the test shows nothing", at.name)
			}
			for i := range 8 {
				if err := reads(tenancytest.Context(t, tn, at.name), tn, at.name, i); err != nil {
					t.Errorf("%s: %v", at.name, err)
				}
			}
			if err := tn.Catalog().RotatePassword(t.Context(), at.own); err != nil {
				t.Error(err)
			}
			wantTitles(t, tn, at.name)
		}
		// Its own sessions in a tenant's database are in the way of Purge, until they have been idle for server_idle_timeout.
		if err := tn.Catalog().Delete(t.Context(), acme.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := tn.Catalog().PurgeNow(t.Context(), acme.ID, "acme"); err != nil {
			t.Error(err)
		}
		wantTitles(t, tn, "globex")
	})
}

func TestAFleetIsMovedBehindAPoolerAndBack(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	acme, globex := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	where := func(what string, acmes, globexs bool) {
		t.Helper()
		for name, want := range map[string]bool{"acme": acmes, "globex": globexs} {
			if got := viaPooler(t, tn, name); got != want {
				t.Errorf("%s: %s goes through the pooler: %t, want %t", what, name, got, want)
			}
			wantTitles(t, tn, name)
		}
	}
	b := newBouncer(t, f, "")
	d, err := c.DataSource(ctx, acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	d.Pooler = b.address()
	wantError(t, c.SetDataSource(ctx, acme.ID, d), tenancy.ErrInvalid, "pooler", "AddServer")
	register(t, f, tn, b.address())
	where("registered", false, false)
	if err := c.SetDataSource(ctx, acme.ID, d); err != nil {
		t.Fatal(err)
	}
	where("the first tenant by its data source", true, false)
	if err := c.RotatePassword(ctx, globex.ID); err != nil {
		t.Fatal(err)
	}
	where("the second one with a new login", true, true)
	if got, err := c.DataSource(ctx, globex.ID); err != nil || got.Pooler != b.address() {
		t.Errorf("the catalog says %v, %v", got, err)
	}
	if _, err := tn.Migrator().Tenant(ctx, acme.ID); err != nil {
		t.Errorf("a migration: %v", err)
	}

	register(t, f, tn, "")
	where("registered without", true, true)
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := c.RotatePassword(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	where("with new logins", false, false)

	// A place that was left remembers a pooler that is gone.
	former, err := c.DataSource(ctx, acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	register(t, f, tn, b.address())
	if err := c.RotatePassword(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(ctx, acme.ID, prepare(t, tn, acme.ID, "")); err != nil {
		t.Fatal(err)
	}
	register(t, f, tn, "")
	if err := c.SetDataSource(ctx, acme.ID, former); err != nil {
		t.Fatal(err)
	}
	where("back by a login of before", false, false)
}

func TestBehindAPoolerNobodyGetsASession(t *testing.T) {
	t.Parallel()
	_, _, tn, _, _ := pooledFleet(t, tenancy.Config{}, "")
	err := tn.DB().WithConn(tenancytest.Context(t, tn, "acme"), func(context.Context, *pgx.Conn) error {
		t.Error("it was given one")
		return nil
	})
	wantError(t, err, tenancy.ErrSessionPooled)
	wantTitles(t, tn, "acme")
}

func TestAPoolersAddressIsChecked(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	for address, says := range map[string]string{"pooler": "host:port", "pooler:0": "port", "pooler:x": "port", "pooler:65536": "port", ":6432": "host is missing",
		"/run/pgbouncer:6432": "socket", "a:1,b:2": "host:port", "::1:6432": "host:port", "0.0.0.0:6432": "one server", "po oler:6432": "letters"} {
		wantError(t, tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{URL: f.ServerURL, Pooler: address}), tenancy.ErrInvalid, "ServerConfig.Pooler", says)
	}
	for _, s := range []tenancy.ServerConfig{{URL: f.ServerURL, PoolerTLS: "disable"}, {URL: f.ServerURL, Pooler: "pooler:6432", PoolerTLS: "prefer"}} {
		wantError(t, tn.Catalog().AddServer(t.Context(), s), tenancy.ErrInvalid, "ServerConfig.Pooler")
	}
	d := tenancy.DataSource{Host: "db.example.com", Port: 5432, Database: "d", User: "u", Password: "canary", Pooler: "[::1]:6432"}
	if err := d.Validate(); err != nil {
		t.Error(err)
	}
	if text := fmt.Sprintf("%v %+v %#v", d, d, d); !strings.Contains(text, "[::1]:6432") || strings.Contains(text, "canary") {
		t.Errorf("it prints as %s", text)
	}
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{URL: f.ServerURL, Pooler: "[::1]:6432", PoolerTLS: "require"}); err != nil {
		t.Error(err)
	}
}
