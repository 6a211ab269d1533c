package tenancy_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// newCitus is a fleet whose second server, "citus", is the coordinator of a Citus cluster: TENANCY_TEST_CITUS_URL is a superuser's, of a database with the
// extension, two workers and citus.enable_schema_based_sharding; see docs/citus.md. The tests take the database over, one at a time, and leave it as it was.
func newCitus(t *testing.T) *battle {
	t.Helper()
	adminURL := os.Getenv("TENANCY_TEST_CITUS_URL")
	if adminURL == "" {
		t.Skip("TENANCY_TEST_CITUS_URL names no coordinator of a Citus cluster")
	}
	u, err := url.Parse(adminURL)
	if err != nil {
		t.Fatal("TENANCY_TEST_CITUS_URL cannot be parsed")
	}
	w := &battle{f: tenancytest.NewFleet(t), admin: connectURL(t, adminURL)}
	must(t, w.admin, `SET search_path = ''`)
	provisioner := "citus_" + strings.ToLower(rand.Text()) + "_provisioner"
	t.Cleanup(func() { clearCitus(t, adminURL, provisioner) })
	u.User = url.UserPassword(provisioner, rand.Text())
	admin := w.f.AdminConfig()
	w.f.ServerURL = u.String()
	admin.ServerAdminURL = adminURL
	admin.Server = tenancy.ServerConfig{Name: "citus", URL: w.f.ServerURL, Weight: -1}
	if err := tenancy.Init(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	w.tn = w.f.Open(t, tenancy.Config{Migrations: noteMigrations})
	w.a, w.b = createCitus(t, w, "acme"), createCitus(t, w, "globex")
	w.A, w.B = placeOf(t, w.f, w.a.ID), placeOf(t, w.f, w.b.ID)
	database := w.admin.Config().Database
	w.names = strings.NewReplacer("{A}", w.A.Schema, "{Ao}", w.A.Owner, "{Ar}", w.A.Runtime, "{Al}", w.A.Login,
		"{B}", w.B.Schema, "{Bo}", w.B.Owner, "{Br}", w.B.Runtime, "{Bl}", w.B.Login,
		"{DB}", database, "{G}", database+"_tenants", "{P}", provisioner, "{S}", w.admin.Config().User,
		"{C}", w.admin.Config().User, "{PRIMARY}", "postgres") // the primary is on another server
	return w
}

func createCitus(t *testing.T, w *battle, name string) tenancy.Tenant {
	t.Helper()
	made, err := w.tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Server: "citus"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.tn.DB().Exec(tenancytest.Context(t, w.tn, name), `INSERT INTO notes (tenant, title) VALUES ($1, $1)`, name); err != nil {
		t.Fatal(err)
	}
	return made
}

// clearCitus gives the database back: tests have one after the other.
func clearCitus(t *testing.T, adminURL, provisioner string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, adminURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	list := func(sql string) []string {
		rows, _ := conn.Query(ctx, sql, provisioner)
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Errorf("clear: %s: %v", sql, err)
		}
		return names
	}
	roles := list(`SELECT rolname::text FROM pg_roles WHERE rolname = $1 OR rolname = current_database() || '_tenants'
		OR oid IN (SELECT roleid FROM pg_auth_members WHERE member::regrole::text = $1)`)
	for _, schema := range list(`SELECT nspname::text FROM pg_namespace WHERE nspname IN ('tenancy_ext', 'tenancy_ref') OR pg_get_userbyid(nspowner) IN
		(SELECT roleid::regrole::text FROM pg_auth_members WHERE member::regrole::text = $1)`) {
		if _, err := conn.Exec(ctx, `DROP SCHEMA `+pgx.Identifier{schema}.Sanitize()+` CASCADE`); err != nil {
			t.Errorf("clear: %v", err)
		}
	}
	steps := []string{`ALTER DATABASE ` + pgx.Identifier{conn.Config().Database}.Sanitize() + ` OWNER TO ` + pgx.Identifier{conn.Config().User}.Sanitize()}
	for _, verb := range []string{`DROP OWNED BY `, `DROP ROLE `} {
		for _, role := range roles {
			steps = append(steps, verb+pgx.Identifier{role}.Sanitize())
		}
	}
	for _, sql := range steps {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Errorf("clear: %s: %v", sql, err)
		}
	}
}

// citusNode is a node of the cluster that takes tenants, as pg_dist_node names it.
type citusNode struct {
	host string
	port uint16
}

// workerOf is where the tenant's rows are, and another worker.
func (w *battle) workerOf(t *testing.T, p placeRow) (at, other citusNode) {
	t.Helper()
	err := w.admin.QueryRow(t.Context(), `SELECT s.nodename, s.nodeport, n.nodename, n.nodeport FROM pg_catalog.citus_shards s
		JOIN pg_catalog.pg_dist_node n ON n.shouldhaveshards AND (n.nodename, n.nodeport) <> (s.nodename, s.nodeport) WHERE s.table_name = $1::text::regclass ORDER BY n.nodeid LIMIT 1`,
		p.table("notes")).Scan(&at.host, &at.port, &other.host, &other.port)
	if err != nil {
		t.Fatal(err)
	}
	return at, other
}

// onAll asks each node of the cluster one question, and returns the different answers.
func (w *battle) onAll(t *testing.T, sql string) string {
	t.Helper()
	return scan[string](t, w.admin, `SELECT string_agg(DISTINCT result, ' | ') FROM run_command_on_all_nodes($1)`, sql)
}

// citusAttacks go the ways that Citus adds. {shard} is the table of B's rows where they are.
func citusAttacks() []attack {
	return []attack{
		{"schema_move", "42501", sql(`SELECT citus_schema_move('{B}', 'localhost', 1)`), false},
		{"own_schema_move", "42501", sql(`SELECT citus_schema_move('{A}', 'localhost', 1)`), false},
		{"schema_undistribute", "42501", sql(`SELECT citus_schema_undistribute('{B}')`), false},
		{"undistribute_table", "42501", sql(`SELECT undistribute_table('{B}.notes')`), false},
		{"remove_node", "42501", sql(`SELECT citus_remove_node(nodename, nodeport) FROM pg_dist_node WHERE shouldhaveshards LIMIT 1`), false},
		{"nodes_logins", "42501", sql(`SELECT * FROM pg_dist_authinfo`), false},
		{"nodes_metadata", "42501", sql(`DELETE FROM pg_dist_node`), false},
		{"shards_metadata", "42501", sql(`UPDATE pg_dist_placement SET groupid = 0`), false},
		{"end_its_session_by_global_pid", "", sql(`SELECT pg_terminate_backend({Bgpid})`), false}, // answered with false; the session is looked at in the end
		{"its_running_query_on_any_node", "", sql(`SELECT query FROM citus_stat_activity WHERE usename = '{Bl}'`), true},
		{"its_locks", "", sql(`SELECT blocked_statement FROM citus_lock_waits`), true},
		{"tenants_statistics", "42501", sql(`SELECT * FROM citus_stat_tenants`), false},
		{"shard_here", "42501", sql(`SET citus.override_table_visibility = off`, `SELECT title FROM {B}.{shard}`), false},
	}
}

// TestCitusStopsTheAttacks is TestRuntimeLoginReachesNoOtherTenant on Citus.
func TestCitusStopsTheAttacks(t *testing.T) {
	w := newCitus(t)
	victim := login(t, w.tn, w.b.ID)
	must(t, victim, `INSERT INTO notes (tenant, title) SELECT 'globex', '`+treasure+`' FROM generate_series(1, 50)`)
	gpid := scan[int64](t, victim, `SELECT citus_backend_gpid()`)
	lo := scan[uint32](t, victim, `SELECT lo_from_bytea(0, convert_to('`+treasure+`', 'UTF8'))`)
	must(t, connectURL(t, w.f.ServerURL), `CREATE TABLE tenancy_ref.countries (code text)`)
	shard := scan[string](t, w.admin, `SELECT 'notes_' || shardid FROM pg_catalog.citus_shards WHERE table_name = $1::text::regclass`, w.B.table("notes"))
	names, late := w.names, strings.NewReplacer("{Blo}", fmt.Sprint(lo), "{Bpid}", fmt.Sprint(victim.PgConn().PID()), "{Bgpid}", fmt.Sprint(gpid), "{shard}", shard)
	d, err := w.tn.Catalog().SourceForTest(t.Context(), w.a.ID)
	if err != nil {
		t.Fatal(err)
	}
	const everyRole = `SELECT md5(string_agg(r::text, ',' ORDER BY rolname)) FROM pg_authid r`
	rolesBefore := w.onAll(t, everyRole)
	elsewhere := map[string]string{"update_marker": "0A000"} // refused before the right is looked at: the function is volatile
	for _, a := range append(attacks(), citusAttacks()...) {
		t.Run(a.name, func(t *testing.T) {
			for i := range a.sql {
				a.sql[i] = late.Replace(a.sql[i])
			}
			conn, err := connectTo(t, d)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(t.Context())
			want := a.state
			if other, ok := elsewhere[a.name]; ok {
				want = other
			}
			state, leaked, err := w.run(t.Context(), conn, a)
			if state != want {
				t.Errorf("the server answered %q (%v), want %q", state, err, want)
			}
			if leaked {
				t.Error("the other tenant's row was read")
			}
		})
	}
	// With a session of A's on each worker, and as whoever A says that it is there.
	for _, reach := range []string{`SELECT title FROM {B}.` + shard, `SET ROLE {Bo}`, `SET ROLE {P}`, `UPDATE {B}.` + shard + ` SET title = 'evil'`, `CREATE TABLE public.evil ()`, `CREATE TABLE {B}.evil ()`} {
		conn, err := connectTo(t, d)
		if err != nil {
			t.Fatal(err)
		}
		rows, _ := conn.Query(t.Context(), `SELECT success, result FROM run_command_on_workers($1)`, names.Replace(reach))
		var ok bool
		var result string
		if _, err := pgx.ForEachRow(rows, []any{&ok, &result}, func() error {
			if ok || strings.Contains(result, treasure) {
				t.Errorf("on a worker %q was answered with %q", reach, result)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	if roles := w.onAll(t, everyRole); roles != rolesBefore {
		t.Errorf("roles have changed: %s, were %s", roles, rolesBefore)
	}
	if got := scan[string](t, victim, `SELECT count(*) || ' ' || min(title) || ' ' || max(title) FROM notes`); got != "51 globex "+treasure {
		t.Errorf("the rows of B are %q", got)
	}
	if got := scan[string](t, victim, `SELECT string_agg(tenant::text, ',') FROM tenancy_marker`); got != w.b.UID.String() {
		t.Errorf("the marker of B is %q", got)
	}
	// The attacks have teeth: a superuser reads by them.
	for _, a := range append(attacks(), attack{name: "on_a_worker", sql: sql(`SELECT result FROM run_command_on_workers('SELECT max(title) FROM {B}.` + shard + `')`)}) {
		if a.name == "qualified_name" || a.name == "copy_out" || a.name == "on_a_worker" {
			if state, leaked, err := w.run(t.Context(), w.admin, a); !leaked {
				t.Errorf("%s as a superuser: the row was not found: %s %v", a.name, state, err)
			}
		}
	}
}

// TestCitusTenantsLive takes a tenant through its life; another one is beside it.
func TestCitusTenantsLive(t *testing.T) {
	w := newCitus(t)
	c := w.tn.Catalog()
	acme, globex := tenancytest.Context(t, w.tn, "acme"), tenancytest.Context(t, w.tn, "globex")
	reads := func(ctx context.Context, want string) {
		t.Helper()
		var got string
		if err := w.tn.DB().QueryRow(ctx, `SELECT string_agg(DISTINCT tenant, ',') FROM notes`).Scan(&got); err != nil || got != want {
			t.Errorf("read %q, %v; want %q", got, err, want)
		}
	}
	reads(acme, "acme")
	reads(globex, "globex")
	if groups := scan[int](t, w.admin, `SELECT count(DISTINCT colocationid) FROM pg_catalog.pg_dist_schema WHERE schemaid::regnamespace::text = ANY($1)`, []string{w.A.Schema, w.B.Schema}); groups != 2 {
		t.Errorf("the tenants have %d shard groups", groups)
	}
	if n := scan[int](t, w.admin, `SELECT count(*) FROM pg_catalog.pg_dist_schema WHERE schemaid::regnamespace::text LIKE 'tenancy%'`); n != 0 {
		t.Errorf("%d of the schemas that all share are a tenant's", n)
	}
	err := w.tn.DB().InTx(acme, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		for range 2 {
			if _, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ('acme', 'in a transaction')`); err != nil {
				return err
			}
		}
		return errors.New("taken back")
	})
	if err == nil || scanDB[int](t, w.tn, acme, `SELECT count(*) FROM notes`) != 1 {
		t.Errorf("a transaction was not taken back: %v", err)
	}

	later := w.f.Open(t, tenancy.Config{Migrations: fstest.MapFS{
		"00001_notes.sql": {Data: []byte("-- +goose Up\nSELECT 1;\n")},
		"00002_tags.sql": {Data: []byte("-- +goose Up\nCREATE TABLE tags (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note bigint NOT NULL REFERENCES notes (id));\n" +
			"ALTER TABLE notes ADD COLUMN done boolean NOT NULL DEFAULT false;\nCREATE INDEX ON notes (done);\nCREATE VIEW open_notes AS SELECT * FROM notes WHERE NOT done;\n")},
	}})
	if _, err := later.Migrator().All(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tn.DB().Exec(acme, `INSERT INTO tags (note) SELECT id FROM open_notes`); err != nil {
		t.Error(err)
	}

	before := w.A.Login
	if err := c.RotatePassword(t.Context(), w.a.ID); err != nil {
		t.Fatal(err)
	}
	reads(acme, "acme")
	w.A = placeOf(t, w.f, w.a.ID)
	if w.A.Login == before || w.onAll(t, `SELECT count(*) FROM pg_roles WHERE rolname = '`+before+`'`) != "0" {
		t.Errorf("login %s is left after %s", before, w.A.Login)
	}

	stolen := login(t, w.tn, w.a.ID)
	if err := c.Suspend(t.Context(), w.a.ID, tenancy.Suspension{Drain: 1}); err != nil {
		t.Fatal(err)
	}
	if err := stolen.Ping(t.Context()); err == nil {
		t.Error("a session outlived the suspension")
	}
	if _, err := tryLogin(t, w.tn, w.a.ID); sqlState(err) != "28000" {
		t.Errorf("the login of a suspended tenant: %v, want 28000", err)
	}
	if got := w.onAll(t, `SELECT rolcanlogin FROM pg_roles WHERE rolname = '`+w.A.Login+`'`); got != "f" {
		t.Errorf("the login may log in at the nodes: %s", got)
	}
	if got := w.onAll(t, `SELECT count(*) FROM pg_stat_activity WHERE usename LIKE '`+w.A.Schema+`%'`); got != "0" {
		t.Errorf("sessions of a suspended tenant at the nodes: %s", got)
	}
	reads(globex, "globex")
	if err := c.Resume(t.Context(), w.a.ID); err != nil {
		t.Fatal(err)
	}
	reads(tenancytest.Context(t, w.tn, "acme"), "acme")

	if err := c.Delete(t.Context(), w.a.ID); err != nil {
		t.Fatal(err)
	}
	receipt, err := c.PurgeNow(t.Context(), w.a.ID, "acme")
	if err != nil {
		t.Fatal(err)
	}
	if len(receipt.Roles) != 3 || receipt.Tables == 0 {
		t.Errorf("the receipt says %+v", receipt)
	}
	if got := w.onAll(t, `SELECT (SELECT count(*) FROM pg_roles WHERE rolname LIKE '`+w.A.Schema+`%') + (SELECT count(*) FROM pg_namespace WHERE nspname = '`+w.A.Schema+`')`); got != "0" {
		t.Errorf("roles and schemas of a purged tenant at the nodes: %s", got)
	}
	reads(globex, "globex")
}

func scanDB[T any](t *testing.T, tn *tenancy.Tenancy, ctx context.Context, sql string) (v T) {
	t.Helper()
	if err := tn.DB().QueryRow(ctx, sql).Scan(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// owner lets the tenant's owner log in, as a migration does for its time.
func (w *battle) owner(t *testing.T, id tenancy.ID, p placeRow) *pgx.Conn {
	t.Helper()
	d, err := w.tn.Catalog().SourceForTest(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	d.User, d.Password = p.Owner, tenancy.Secret(rand.Text())
	must(t, w.admin, `ALTER ROLE `+p.Owner+` LOGIN PASSWORD '`+d.Password.Reveal()+`' VALID UNTIL 'infinity'`)
	t.Cleanup(func() {
		_, _ = w.admin.Exec(context.Background(), `ALTER ROLE `+p.Owner+` NOLOGIN PASSWORD NULL`)
	})
	conn, err := connectTo(t, d)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestMoveToWorkerServesTheTenantMeanwhile(t *testing.T) {
	w := newCitus(t)
	c := w.tn.Catalog()
	acme := tenancytest.Context(t, w.tn, "acme")
	if _, err := w.tn.DB().Exec(acme, `INSERT INTO notes (tenant, title) SELECT 'acme', repeat('x', 100) FROM generate_series(1, 100000)`); err != nil {
		t.Fatal(err)
	}
	_, to := w.workerOf(t, w.A)
	beside, _ := w.workerOf(t, w.B)
	stop, stopped := make(chan struct{}), make(chan struct{})
	var written atomic.Int64
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := w.tn.DB().Exec(acme, `INSERT INTO notes (tenant, title) VALUES ('acme', 'meanwhile')`); err != nil {
				t.Errorf("a write during the move: %v", err)
				return
			}
			written.Add(1)
		}
	}()
	before := written.Load()
	err := c.MoveToWorker(t.Context(), w.a.ID, to.host, to.port)
	during := written.Load() - before
	close(stop)
	<-stopped
	if err != nil {
		t.Fatal(err)
	}
	if during < 5 {
		t.Errorf("only %d writes during the move", during)
	}
	if at, _ := w.workerOf(t, w.A); at != to {
		t.Errorf("the tenant is at %v, not %v", at, to)
	}
	if at, _ := w.workerOf(t, w.B); at != beside {
		t.Errorf("the other tenant has moved to %v", at)
	}
	if n := scanDB[int64](t, w.tn, acme, `SELECT count(*) FROM notes`); n != 100001+written.Load() {
		t.Errorf("%d rows after the move, want %d", n, 100001+written.Load())
	}
	if err := c.MoveToWorker(t.Context(), w.a.ID, to.host, to.port); err != nil {
		t.Errorf("to where it is: %v", err)
	}
	if got := w.onAll(t, `SELECT rolcanlogin FROM pg_roles WHERE rolname = '`+w.A.Owner+`'`); got != "f" {
		t.Errorf("the owner may log in after the move: %s", got)
	}
	// The walls have moved along.
	attacker := login(t, w.tn, w.b.ID)
	if _, err := attacker.Exec(t.Context(), `SELECT FROM `+w.A.table("notes")); sqlState(err) != "42501" {
		t.Errorf("the other tenant reads the rows that have moved: %v", err)
	}
	shard := scan[string](t, w.admin, `SELECT 'notes_' || shardid FROM pg_catalog.citus_shards WHERE table_name = $1::text::regclass`, w.A.table("notes"))
	if n := scan[int](t, attacker, `SELECT count(*) FROM run_command_on_workers($1) WHERE success`, `SELECT FROM `+w.A.table(shard)); n != 0 {
		t.Error("the other tenant reads them at a worker")
	}
	if n := scan[int](t, w.f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.audit WHERE action = 'move to worker' AND tenant = $1 AND detail ->> 'worker' = $2`, w.a.ID, net.JoinHostPort(to.host, fmt.Sprint(to.port))); n != 1 {
		t.Errorf("%d audit records", n)
	}
	if err := c.MoveToWorker(t.Context(), w.a.ID, to.host, 1); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("to a worker that is not there: %v", err)
	}
}

// TestMoveToWorkerGivesTheTenantsCodeNoOthersRights plants a CHECK that passes for the tenant's own roles alone. The server calls it where the rows are copied to.
func TestMoveToWorkerGivesTheTenantsCodeNoOthersRights(t *testing.T) {
	w := newCitus(t)
	owner := w.owner(t, w.a.ID, w.A)
	must(t, owner, `CREATE FUNCTION whose(text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
		IF session_user NOT IN ('`+w.A.Owner+`', '`+w.A.Login+`') THEN RAISE EXCEPTION 'the tenant has the rights of %', session_user; END IF; RETURN true; END $$`)
	must(t, owner, w.names.Replace(`ALTER TABLE notes ADD CHECK ({A}.whose(title))`))
	_, to := w.workerOf(t, w.A)
	if err := w.tn.Catalog().MoveToWorker(t.Context(), w.a.ID, to.host, to.port); err != nil {
		t.Error(err)
	}
	// The trap is one: what a superuser calls by hand runs into it.
	_, back := w.workerOf(t, w.A)
	must(t, w.admin, `ALTER ROLE `+w.A.Owner+` LOGIN`)
	if _, err := w.admin.Exec(t.Context(), `SELECT citus_schema_move($1::text::regnamespace, $2, $3, 'block_writes')`, w.A.Schema, back.host, int32(back.port)); err == nil || !strings.Contains(err.Error(), "has the rights of") {
		t.Errorf("a superuser's move did not run the tenant's code: %v", err)
	}
}

func TestMoveToWorkerOfTablesWithoutAKey(t *testing.T) {
	w := newCitus(t)
	c := w.tn.Catalog()
	must(t, w.owner(t, w.a.ID, w.A), `CREATE TABLE bare (note text)`)
	from, to := w.workerOf(t, w.A)
	wantError(t, c.MoveToWorker(t.Context(), w.a.ID, to.host, to.port), tenancy.ErrInvalid, "rows of bare cannot change")
	if err := c.Suspend(t.Context(), w.a.ID, tenancy.Suspension{Maintenance: true, Drain: 1}); err != nil {
		t.Fatal(err)
	}
	if err := c.MoveToWorker(t.Context(), w.a.ID, to.host, to.port); err != nil {
		t.Fatal(err)
	}
	if at, _ := w.workerOf(t, w.A); at != to || at == from {
		t.Errorf("the tenant is at %v, not %v", at, to)
	}
	if _, err := tryLogin(t, w.tn, w.a.ID); sqlState(err) != "28000" {
		t.Errorf("the login of a tenant under maintenance: %v, want 28000", err)
	}
	if err := c.Resume(t.Context(), w.a.ID); err != nil {
		t.Fatal(err)
	}
	if n := scanDB[int](t, w.tn, tenancytest.Context(t, w.tn, "acme"), `SELECT count(*) FROM notes`); n != 1 {
		t.Errorf("%d rows after the move", n)
	}
}

// TestMoveToWorkerGivesUp cancels a move, and then keeps a transaction open that began while the rows were copied.
func TestMoveToWorkerGivesUp(t *testing.T) {
	w := newCitus(t)
	acme := tenancytest.Context(t, w.tn, "acme")
	if _, err := w.tn.DB().Exec(acme, `INSERT INTO notes (tenant, title) SELECT 'acme', repeat('x', 100) FROM generate_series(1, 400000)`); err != nil {
		t.Fatal(err)
	}
	node := w.f.Open(t, tenancy.Config{Migrations: noteMigrations, DrainTimeout: time.Second})
	from, to := w.workerOf(t, w.A)
	stays := func(rows int) {
		t.Helper()
		if at, _ := w.workerOf(t, w.A); at != from {
			t.Errorf("the tenant is at %v, not %v", at, from)
		}
		if n := scanDB[int](t, w.tn, acme, `SELECT count(*) FROM notes`); n != rows {
			t.Errorf("%d rows, want %d", n, rows)
		}
		if got := w.onAll(t, `SELECT rolcanlogin FROM pg_roles WHERE rolname = '`+w.A.Owner+`'`); got != "f" {
			t.Errorf("the owner may log in after a move that failed: %s", got)
		}
	}
	const slots = `SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'citus_shard_move%'`
	copying := func(ctx context.Context) <-chan error {
		t.Helper()
		moved := make(chan error, 1)
		go func() { moved <- node.Catalog().MoveToWorker(ctx, w.a.ID, to.host, to.port) }()
		for scan[int](t, w.admin, `SELECT count(*) FROM run_command_on_workers($1) WHERE result <> '0'`, slots) == 0 {
			select {
			case err := <-moved:
				t.Fatalf("the move ended before it copied: %v", err)
			case <-time.After(5 * time.Millisecond):
			}
		}
		return moved
	}
	ends := func(moved <-chan error) error {
		t.Helper()
		select {
		case err := <-moved:
			return err
		case <-time.After(30 * time.Second):
			t.Fatal("the move does not end")
			return nil
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	moved := copying(ctx)
	cancel()
	if err := ends(moved); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled move ended with %v", err)
	}
	stays(400001)
	for end := time.Now().Add(30 * time.Second); w.onAll(t, slots) != "0"; time.Sleep(50 * time.Millisecond) { // which Citus drops by itself
		if time.Now().After(end) {
			t.Fatal("a replication slot is left")
		}
	}

	moved = copying(t.Context())
	tx, err := w.tn.DB().Begin(acme)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(acme, `INSERT INTO notes (tenant, title) VALUES ('acme', 'open')`); err != nil {
		t.Fatal(err)
	}
	if err := ends(moved); sqlState(err) != "55P03" {
		t.Errorf("a move that met an open transaction ended with %v, want 55P03", err)
	}
	if err := tx.Commit(acme); err != nil {
		t.Error(err)
	}
	stays(400002)
	if err := w.tn.Catalog().MoveToWorker(t.Context(), w.a.ID, to.host, to.port); err != nil {
		t.Errorf("the next move: %v", err)
	}
}

// TestMoveToWorkerIsRefusedWithoutCitus needs none.
func TestMoveToWorkerIsRefusedWithoutCitus(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	for isolation, says := range map[tenancy.Isolation]string{tenancy.IsolationSchema: "no extension citus", tenancy.IsolationShared: "a schema of its own alone"} {
		made := createIn(t, tn, "in-"+string(isolation), isolation)
		wantError(t, tn.Catalog().MoveToWorker(t.Context(), made.ID, "127.0.0.1", 5432), tenancy.ErrInvalid, says)
	}
	wantError(t, tn.Catalog().MoveToWorker(t.Context(), 4711, "127.0.0.1", 5432), tenancy.ErrTenantNotFound)
}
