package tenancytest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// Fleet is a primary and a tenants' database of their own on the test server, as [tenancy.Init]
// makes them: the provisioner is no superuser. Several nodes can be opened on one fleet.
type Fleet struct {
	AdminURL   string // a superuser, for looking past the library
	PrimaryURL string
	ServerURL  string // the tenants' database with the provisioner
	Keys       tenancy.Keyring
	KeyText    string // Keys for another process, as ParseKeyring reads it

	prefix     string
	extensions []string
	pooler     string // host:port; "": none
}

// NewFleet makes a fleet that is dropped when the test ends. extensions are created in tenancy_ext.
func NewFleet(tb testing.TB, extensions ...string) *Fleet {
	tb.Helper()
	s := start(tb)
	f := &Fleet{AdminURL: s.URL(), prefix: "t" + random(6), extensions: extensions, pooler: pooler(tb)}
	f.PrimaryURL, f.ServerURL = f.url(tb, "catalog", "primary"), f.url(tb, "provisioner", "tenants")
	var err error
	if f.KeyText, err = tenancy.NewKey("test"); err != nil {
		tb.Fatal(err)
	}
	if f.Keys, err = tenancy.ParseKeyring(f.KeyText); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.drop(tb) })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := tenancy.Init(ctx, f.AdminConfig(extensions...)); err != nil {
		tb.Fatal(err)
	}
	return f
}

// AdminConfig is what Init was called with.
func (f *Fleet) AdminConfig(extensions ...string) tenancy.AdminConfig {
	return tenancy.AdminConfig{AdminURL: f.AdminURL, PrimaryURL: f.PrimaryURL, Server: tenancy.ServerConfig{URL: f.ServerURL, Pooler: f.pooler}, Keys: f.Keys, Extensions: extensions}
}

// AllowDatabases has the fleet's server make tenants with a database of their own, as Open does by itself where cfg.Isolation is [tenancy.IsolationDatabase].
func (f *Fleet) AllowDatabases(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	admin := f.AdminConfig(f.extensions...)
	admin.TenantDatabases = true
	if err := tenancy.Init(ctx, admin); err != nil {
		tb.Fatal(err)
	}
}

// Open opens a node on the fleet; it is closed when the test ends. Where cfg.Isolation says nothing, the
// environment's TENANCY_TEST_ISOLATION counts, and TENANCY_TEST_DENSE=true for cfg.Dense, so that a service's tests can be run once for each.
func (f *Fleet) Open(tb testing.TB, cfg tenancy.Config) *tenancy.Tenancy {
	tb.Helper()
	if cfg.Isolation == "" {
		cfg.Isolation = tenancy.Isolation(os.Getenv("TENANCY_TEST_ISOLATION"))
	}
	cfg.Dense = cfg.Dense || os.Getenv("TENANCY_TEST_DENSE") == "true"
	if cfg.Isolation == tenancy.IsolationDatabase {
		f.AllowDatabases(tb)
	}
	cfg.PrimaryURL, cfg.ListenURL, cfg.Keys = f.PrimaryURL, "", f.Keys
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tn, err := tenancy.Open(ctx, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := tn.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return tn
}

// Admin connects to one of the fleet's databases, "primary" or "tenants", as a superuser with an empty search_path.
func (f *Fleet) Admin(tb testing.TB, database string) *pgx.Conn {
	tb.Helper()
	cc, err := pgx.ParseConfig(f.AdminURL)
	if err != nil {
		tb.Fatal("the test server's URL cannot be parsed")
	}
	cc.Database = f.prefix + "_" + database
	cc.RuntimeParams["search_path"] = ""
	conn, err := pgx.ConnectConfig(context.Background(), cc)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (f *Fleet) url(tb testing.TB, login, database string) string {
	u, err := url.Parse(f.AdminURL)
	if err != nil {
		tb.Fatal("the test server's URL cannot be parsed")
	}
	u.User = url.UserPassword(f.prefix+"_"+login, random(16))
	u.Path = "/" + f.prefix + "_" + database
	u.RawQuery = ""
	if mode := mustQuery(f.AdminURL).Get("sslmode"); mode != "" {
		u.RawQuery = "sslmode=" + mode
	}
	return u.String()
}

func mustQuery(raw string) url.Values {
	u, err := url.Parse(raw)
	if err != nil {
		return nil
	}
	return u.Query()
}

// drop removes what the fleet left on the server: databases first, then every role of its tenants.
func (f *Fleet) drop(tb testing.TB) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, f.AdminURL)
	if err != nil {
		tb.Logf("drop fleet: %v", err)
		return
	}
	defer conn.Close(ctx)
	// The tenants' roles: those that may connect or own something in a database of the fleet's, and what is of one place with them.
	rows, _ := conn.Query(ctx, `WITH RECURSIVE found AS (
			SELECT m.member role FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE g.rolname = $1 || '_tenants_tenants'
			UNION SELECT m.roleid FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.member WHERE g.rolname = $1 || '_provisioner'
			UNION SELECT s.refobjid FROM pg_shdepend s JOIN pg_database d ON d.oid IN (s.dbid, CASE WHEN s.dbid = 0 AND s.classid = 'pg_database'::regclass THEN s.objid END) JOIN pg_roles o ON o.oid = d.datdba
				WHERE s.refclassid = 'pg_authid'::regclass AND o.rolname = $1 || '_provisioner'
			UNION SELECT CASE WHEN m.roleid = f.role THEN m.member ELSE m.roleid END FROM found f JOIN pg_auth_members m ON f.role IN (m.roleid, m.member) JOIN pg_roles r ON r.oid = f.role AND r.rolname ~ '^t_')
		SELECT quote_ident(rolname) FROM found JOIN pg_roles ON oid = role WHERE rolname ~ '^t_[0-9a-f]{20}'`, f.prefix)
	members, _ := pgx.CollectRows(rows, pgx.RowTo[string])
	steps := []string{fmt.Sprintf("DROP DATABASE IF EXISTS %s_primary WITH (FORCE)", f.prefix)}
	rows, _ = conn.Query(ctx, `SELECT quote_ident(datname) FROM pg_database WHERE pg_get_userbyid(datdba) = $1`, f.prefix+"_provisioner")
	databases, _ := pgx.CollectRows(rows, pgx.RowTo[string]) // of all tenants, the template, and of one tenant each
	for _, name := range databases {
		steps = append(steps, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
	}
	for _, role := range members {
		steps = append(steps, "DROP ROLE IF EXISTS "+role)
	}
	for _, role := range []string{"_tenants_tenants", "_provisioner", "_catalog"} {
		steps = append(steps, "DROP ROLE IF EXISTS "+f.prefix+role)
	}
	for _, sql := range steps {
		if _, err := conn.Exec(ctx, sql); err != nil {
			tb.Logf("drop fleet: %s: %v", sql, err)
		}
	}
}

func random(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
