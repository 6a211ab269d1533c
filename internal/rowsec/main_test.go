package rowsec_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/internal/rowsec"
	"go.uber.org/goleak"
)

var server *pgembed.Server

func TestMain(m *testing.M) {
	var err error
	if server, err = pgembed.Start(context.Background(), pgembed.Options{Download: true}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := server.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, "goroutines are left after all tests:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// house is a database with one shared schema and two tenants, a and b, each with a login. The provisioner owns the
// database, made the roles and is no superuser.
type house struct {
	rowsec.Shared
	t        *testing.T
	base     *pgx.ConnConfig // to the database, without a user
	password string
	super    *pgx.Conn
	prov     *pgx.Conn
	owner    *pgx.Conn // logged in as for a migration
	a, b     string
}

var (
	realm  = [16]byte{0xee, 1}
	idA    = int64(7)
	idB    = int64(8)
	tenant = map[int64]rowsec.Tenant{7: {ID: 7, UID: [16]byte{0xaa, 7}, Realm: realm}, 8: {ID: 8, UID: [16]byte{0xbb, 8}, Realm: realm}}
)

// newHouse makes the roles and installs the schema. The tenants are admitted, and there is no table yet.
func newHouse(t *testing.T) *house {
	t.Helper()
	cc, err := pgx.ParseConfig(server.URL())
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	prefix := "rs" + random(4)
	h := &house{t: t, base: cc, password: random(16), a: prefix + "_a", b: prefix + "_b",
		Shared: rowsec.Shared{Schema: prefix + "_shared", Owner: prefix + "_owner", Runtime: prefix + "_runtime"}}
	admin := h.dial(cc)
	prov, database := prefix+"_prov", prefix
	must(t, admin, "CREATE ROLE "+prov+" LOGIN CREATEROLE PASSWORD '"+h.password+"'")
	must(t, admin, "CREATE DATABASE "+database+" OWNER "+prov)
	t.Cleanup(func() {
		must(t, admin, "DROP DATABASE "+database+" WITH (FORCE)")
		rows, _ := admin.Query(context.Background(), "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1) ORDER BY rolname = $2", prefix, prov) // the provisioner made the others' memberships
		roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Error(err)
		}
		for _, role := range roles {
			must(t, admin, "DROP ROLE "+role)
		}
	})
	must(t, admin, "REVOKE ALL ON DATABASE "+database+" FROM PUBLIC")
	h.base = cc.Copy()
	h.base.Database = database
	h.super = h.dial(h.base)
	h.prov = h.as(prov)
	h.role(h.Owner, "LOGIN")
	h.role(h.Runtime, "NOLOGIN")
	for _, login := range []string{h.a, h.b} {
		h.role(login, "LOGIN")
		must(t, h.prov, "GRANT "+h.Runtime+" TO "+login)
	}
	if err := h.Install(t.Context(), h.prov); err != nil {
		t.Fatal(err)
	}
	h.owner = h.as(h.Owner)
	h.admit(h.a, idA)
	h.admit(h.b, idB)
	return h
}

func (h *house) admit(login string, id int64) {
	h.t.Helper()
	if err := h.Admit(h.t.Context(), h.prov, login, tenant[id]); err != nil {
		h.t.Fatal(err)
	}
}

// role makes a role as the provisioner, who can become it.
func (h *house) role(name, rights string) {
	h.t.Helper()
	must(h.t, h.prov, "CREATE ROLE "+name+" "+rights+" PASSWORD '"+h.password+"'")
	set := ""
	if server.Major() >= 16 {
		set = " WITH INHERIT TRUE, SET TRUE"
	}
	must(h.t, h.prov, "GRANT CONNECT ON DATABASE "+h.base.Database+" TO "+name)
	must(h.t, h.prov, "GRANT "+name+" TO "+strings.TrimSuffix(h.Schema, "_shared")+"_prov"+set)
}

// as connects as the role, the way a pool does.
func (h *house) as(role string) *pgx.Conn {
	h.t.Helper()
	cc := h.base.Copy()
	cc.User, cc.Password = role, h.password
	cc.RuntimeParams["search_path"] = pgx.Identifier{h.Schema}.Sanitize()
	return h.dial(cc)
}

func (h *house) dial(cc *pgx.ConnConfig) *pgx.Conn {
	h.t.Helper()
	conn, err := pgx.ConnectConfig(h.t.Context(), cc)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func random(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func must(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(context.WithoutCancel(t.Context()), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// refused runs a statement that the server has to refuse with this code.
func refused(t *testing.T, conn *pgx.Conn, state, sql string, args ...any) *pgconn.PgError {
	t.Helper()
	_, err := conn.Exec(t.Context(), sql, args...)
	pg, ok := errors.AsType[*pgconn.PgError](err)
	if !ok || pg.Code != state {
		t.Fatalf("%s: got %v, want SQLSTATE %s", sql, err, state)
	}
	return pg
}

func scan[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var v T
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func column(t *testing.T, conn *pgx.Conn, sql string, args ...any) []string {
	t.Helper()
	rows, _ := conn.Query(t.Context(), sql, args...)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return all
}
