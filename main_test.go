package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// This repository's own tests may fetch a PostgreSQL; those of its users ask first.
	if os.Getenv("TENANCY_PG_DOWNLOAD") == "" {
		if err := os.Setenv("TENANCY_PG_DOWNLOAD", "on"); err != nil {
			panic(err)
		}
	}
	tenancy.SetSoonAfterOpen(24 * time.Hour) // tests make loose ends to look at them
	tenancytest.Main(leakChecked{m})
}

// leakChecked fails the run when a goroutine outlives the tests.
type leakChecked struct{ *testing.M }

func (m leakChecked) Run() int {
	code := m.M.Run()
	// The server still runs: waiting for its process is the one goroutine that may be there.
	server := goleak.IgnoreAnyFunction("github.com/msmt-go/tenancy/internal/pgembed.(*cluster).fork.func1")
	if err := goleak.Find(server); err != nil {
		fmt.Fprintln(os.Stderr, "goroutines are left after all tests:", err)
		code = max(code, 1)
	}
	return code
}

// noteMigrations are the migrations of the tests' service: one table, notes, whose rows say whose they are.
var noteMigrations = os.DirFS("testdata/migrations")

// create makes an active tenant whose table notes holds one row of its own.
func create(tb testing.TB, f *tenancytest.Fleet, tn *tenancy.Tenancy, name string) tenancy.Tenant {
	tb.Helper()
	t := tenancytest.Create(tb, tn, name)
	must(tb, f.Admin(tb, "tenants"), "INSERT INTO "+placeOf(tb, f, t.ID).table("notes")+" (tenant, title) VALUES ($1, $1)", name)
	return t
}

// placeRow is where a tenant lives, read past the library.
type placeRow struct{ Schema, Owner, Runtime, Login string }

func (p placeRow) table(name string) string { return pgx.Identifier{p.Schema, name}.Sanitize() }

func placeOf(tb testing.TB, f *tenancytest.Fleet, id tenancy.ID) placeRow {
	tb.Helper()
	var p placeRow
	err := f.Admin(tb, "primary").QueryRow(tb.Context(), `SELECT d.schema, d.owner, d.runtime, d.login
		FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1`, id).Scan(&p.Schema, &p.Owner, &p.Runtime, &p.Login)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// login connects as the tenant's runtime login, as anyone could who stole its password.
func login(tb testing.TB, tn *tenancy.Tenancy, id tenancy.ID) *pgx.Conn {
	tb.Helper()
	conn, err := tryLogin(tb, tn, id)
	if err != nil {
		tb.Fatal(err)
	}
	return conn
}

func tryLogin(tb testing.TB, tn *tenancy.Tenancy, id tenancy.ID) (*pgx.Conn, error) {
	tb.Helper()
	d, err := tn.Catalog().SourceForTest(tb.Context(), id)
	if err != nil {
		tb.Fatal(err)
	}
	return connectTo(tb, d)
}

func connectTo(tb testing.TB, d tenancy.DataSource) (*pgx.Conn, error) {
	tb.Helper()
	cc, err := d.ConnConfig()
	if err != nil {
		tb.Fatal(err)
	}
	if d.Schema != "" {
		cc.RuntimeParams["search_path"] = pgx.Identifier{d.Schema}.Sanitize()
	}
	conn, err := pgx.ConnectConfig(tb.Context(), cc)
	if err == nil {
		tb.Cleanup(func() { _ = conn.Close(context.Background()) })
	}
	return conn, err
}

func connectURL(tb testing.TB, url string) *pgx.Conn {
	tb.Helper()
	conn, err := pgx.Connect(tb.Context(), url)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// must runs a statement that has to succeed.
func must(tb testing.TB, conn *pgx.Conn, sql string, args ...any) {
	tb.Helper()
	if _, err := conn.Exec(tb.Context(), sql, args...); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
}

// scan reads the one value that a query answers.
func scan[T any](tb testing.TB, conn *pgx.Conn, sql string, args ...any) T {
	tb.Helper()
	var v T
	if err := conn.QueryRow(tb.Context(), sql, args...).Scan(&v); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
	return v
}

// sqlState is the server's code for err: "" for nil, "?" for an error that is not the server's.
func sqlState(err error) string {
	if err == nil {
		return ""
	}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pg.Code
	}
	return "?"
}

// wantError checks that err is of the class and says all of texts.
func wantError(tb testing.TB, err, class error, texts ...string) {
	tb.Helper()
	if !errors.Is(err, class) {
		tb.Errorf("got %v, want %v", err, class)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			tb.Errorf("error %q does not say %q", err, text)
		}
	}
}
