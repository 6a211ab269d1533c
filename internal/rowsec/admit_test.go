package rowsec_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/rowsec"
)

func TestTheMarkerIsTheCallersOneRow(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	question := "SELECT realm, tenant FROM " + h.Schema + ".tenancy_marker LIMIT 2" // as a new connection asks
	for login, want := range map[string]string{h.a: "ee010000-0000-0000-0000-000000000000\naa070000-0000-0000-0000-000000000000\n",
		h.b: "ee010000-0000-0000-0000-000000000000\nbb080000-0000-0000-0000-000000000000\n"} {
		if out, state := run(t, h.as(login), question); out != want || state != "" {
			t.Errorf("%s: SQLSTATE %q, %q", login, state, out)
		}
	}
	if out, _ := run(t, h.owner, question); out != "" {
		t.Errorf("the owner is %q", out)
	}
	// The lock by which migrations keep off each other can be taken on it, and a tenant can take none that stands against it.
	must(t, h.owner, "BEGIN; LOCK TABLE tenancy_marker IN SHARE UPDATE EXCLUSIVE MODE")
	a := h.as(h.a)
	must(t, a, "BEGIN; LOCK TABLE tenancy_marker IN ACCESS SHARE MODE")
	refused(t, a, "42501", "LOCK TABLE tenancy_marker IN ROW EXCLUSIVE MODE")
	must(t, h.owner, "COMMIT")
}

func TestADismissedLoginSeesNothingFromItsNextStatementOn(t *testing.T) {
	t.Parallel()
	h := newService(t)
	second := strings.TrimSuffix(h.a, "_a") + "_a2"
	h.role(second, "LOGIN")
	must(t, h.prov, "GRANT "+h.Runtime+" TO "+second)
	open := h.as(second)
	if n := scan[int](t, open, "SELECT count(*) FROM notes"); n != 0 {
		t.Errorf("a login that was not admitted sees %d rows", n)
	}
	refused(t, open, "42501", "INSERT INTO pages (id, title) VALUES (9, 'x')")
	for range 2 {
		h.admit(second, idA)
	}
	if got := column(t, open, "SELECT title FROM notes"); !slices.Equal(got, []string{"a-word"}) {
		t.Errorf("the second login sees %q", got)
	}
	must(t, open, "BEGIN; SELECT 1")
	for range 2 {
		if err := h.Dismiss(t.Context(), h.prov, second); err != nil {
			t.Fatal(err)
		}
	}
	if out, state := run(t, open, "SELECT title FROM notes; UPDATE notes SET title = 'x' RETURNING title; TABLE tenancy_marker; SELECT definer_titles()"); out != "" || state != "" {
		t.Errorf("dismissed, it sees %q, SQLSTATE %q", out, state)
	}
	refused(t, open, "42501", "INSERT INTO pages (id, title) VALUES (9, 'x')")
	if got := column(t, h.as(h.a), "SELECT title FROM notes"); !slices.Equal(got, []string{"a-word"}) {
		t.Errorf("the first login sees %q", got)
	}
}

func TestAdmitRefusesWhomTheWallDoesNotStop(t *testing.T) {
	t.Parallel()
	h := newService(t)
	prefix := strings.TrimSuffix(h.a, "_a")
	reader := prefix + "_reader"
	h.role(reader, "LOGIN")
	if err := h.Reader(t.Context(), h.prov, reader); err != nil {
		t.Fatal(err)
	}
	n := 0
	refuse := func(why, says string, tenant rowsec.Tenant, steps ...string) {
		t.Helper()
		n++
		login := fmt.Sprintf("%s_x%d", prefix, n)
		h.role(login, "LOGIN")
		for _, sql := range steps {
			must(t, h.super, strings.ReplaceAll(sql, "{}", login))
		}
		err := h.Admit(t.Context(), h.prov, login, tenant)
		if !errors.Is(err, rowsec.ErrUnsafe) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v", why, err)
		}
		if scan[bool](t, h.super, "SELECT EXISTS (SELECT FROM "+h.Schema+".tenancy_map WHERE login = $1)", login) {
			t.Errorf("%s: it was admitted", why)
		}
	}
	member := "GRANT " + h.Runtime + " TO {}"
	refuse("no member", "rights of the group", tenant[idA])
	refuse("superuser", "rights of the server", tenant[idA], member, "ALTER ROLE {} SUPERUSER")
	refuse("bypasses", "rights of the server", tenant[idA], member, "ALTER ROLE {} BYPASSRLS")
	refuse("creates roles", "rights of the server", tenant[idA], member, "ALTER ROLE {} CREATEROLE")
	refuse("owner", "become the owner", tenant[idA], member, "GRANT "+h.Owner+" TO {}")
	refuse("owner, by way of another", "become the owner", tenant[idA], member, "CREATE ROLE {}_way", "GRANT "+h.Owner+" TO {}_way", "GRANT {}_way TO {}")
	refuse("reader", "reader of all", tenant[idA], member, "GRANT "+reader+" TO {}")
	refuse("another login", "another login", tenant[idA], member, "GRANT "+h.b+" TO {}")
	refuse("creates", "may create", tenant[idA], member, "GRANT CREATE ON SCHEMA "+h.Schema+" TO {}")
	refuse("temporary objects", "temporary", tenant[idA], member, "GRANT TEMPORARY ON DATABASE "+h.base.Database+" TO {}")
	refuse("schemas", "schemas", tenant[idA], member, "GRANT CREATE ON DATABASE "+h.base.Database+" TO {}")
	refuse("number of another", "another tenant's", rowsec.Tenant{ID: idA, UID: [16]byte{1}, Realm: realm}, member)
	refuse("UID of another", "another tenant's", rowsec.Tenant{ID: 9, UID: tenant[idA].UID, Realm: realm}, member)
	refuse("realm of another", "another tenant's", rowsec.Tenant{ID: idA, UID: tenant[idA].UID, Realm: [16]byte{9}}, member)
	if err := h.Admit(t.Context(), h.prov, h.a, tenant[idB]); !errors.Is(err, rowsec.ErrUnsafe) {
		t.Errorf("a login of A's as B: %v", err)
	}
	for name, tn := range map[string]rowsec.Tenant{h.Owner: tenant[idA], h.Runtime: tenant[idA], reader: tenant[idA]} {
		if err := h.Admit(t.Context(), h.prov, name, tn); !errors.Is(err, rowsec.ErrUnsafe) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := h.Admit(t.Context(), h.prov, prefix+"_nobody", tenant[idA]); err == nil {
		t.Error("a login that does not exist was admitted")
	}
	if err := h.Admit(t.Context(), h.as(h.a), h.a, tenant[idA]); err == nil {
		t.Error("a tenant admits")
	}
}

// A login that serves many tenants becomes one of them for a transaction. What it can do between them is its own: the wall is for who is bound.
func TestALoginForManyTenantsIsTheOneItHasBecome(t *testing.T) {
	t.Parallel()
	h := newService(t)
	dense := strings.TrimSuffix(h.a, "_a") + "_dense"
	h.role(dense, "LOGIN NOINHERIT")
	must(t, h.prov, "GRANT "+h.a+", "+h.b+" TO "+dense)
	conn := h.as(dense)
	refused(t, conn, "42501", "SELECT title FROM "+h.Schema+".notes")
	for login, want := range map[string]string{h.a: "a-word", h.b: "b-secret"} {
		must(t, conn, "BEGIN; SET LOCAL ROLE "+login)
		for _, sql := range []string{"SELECT title FROM notes", "SELECT title FROM titles", "SELECT title FROM owners_titles", "SELECT definer_titles()"} {
			if got := column(t, conn, sql); !slices.Equal(got, []string{want}) {
				t.Errorf("as %s, %s sees %q", login, sql, got)
			}
		}
		must(t, conn, "INSERT INTO pages (id, title) VALUES (5, 'mine')")
		must(t, conn, "COMMIT")
		refused(t, conn, "42501", "SELECT title FROM "+h.Schema+".notes")
	}
	if got := column(t, h.super, "SELECT tenant_id::text FROM "+h.Schema+".pages WHERE id = 5 ORDER BY 1"); !slices.Equal(got, []string{"7", "8"}) {
		t.Errorf("the pages are of %q", got)
	}
	// A statement that was prepared as one tenant is planned anew for the next.
	must(t, conn, "BEGIN; SET LOCAL ROLE "+h.a+"; PREPARE p AS SELECT title FROM notes WHERE tenant_id IS NOT NULL; COMMIT")
	for _, login := range []string{h.a, h.b, h.a, h.b, h.a, h.b, h.a} {
		must(t, conn, "BEGIN; SET LOCAL ROLE "+login)
		want := map[string]string{h.a: "a-word", h.b: "b-secret"}[login]
		if out, state := run(t, conn, "EXECUTE p"); out != want+"\n" {
			t.Errorf("as %s: %q, SQLSTATE %q", login, out, state)
		}
		must(t, conn, "COMMIT")
	}
}

func TestTheHostsReaderReadsAllAndWritesNothing(t *testing.T) {
	t.Parallel()
	h := newService(t)
	reader := strings.TrimSuffix(h.a, "_a") + "_reader"
	h.role(reader, "LOGIN")
	conn := h.as(reader)
	refused(t, conn, "42501", "SELECT * FROM "+h.Schema+".notes") // off by default
	for range 2 {
		if err := h.Reader(t.Context(), h.prov, reader); err != nil {
			t.Fatal(err)
		}
	}
	must(t, h.owner, "CREATE TABLE later (title text); SELECT tenancy_must('later'); REVOKE ALL ON owners_titles FROM "+h.Runtime)
	for login, title := range map[string]string{h.a: "a-word", h.b: "b-secret"} {
		must(t, h.as(login), "INSERT INTO later VALUES ($1)", title)
	}
	for table, want := range map[string]int{"notes": 2, "plans": 3, "events": 4, "later": 2} {
		if n := scan[int](t, conn, "SELECT count(*) FROM "+table); n != want {
			t.Errorf("the reader sees %d rows of %s, not %d", n, table, want)
		}
	}
	for _, sql := range []string{"INSERT INTO later VALUES ('x')", "UPDATE notes SET title = 'x'", "DELETE FROM plans", "TRUNCATE events", "SELECT * FROM notes FOR UPDATE",
		"SELECT * FROM tenancy_map", "SELECT * FROM forgotten", "SELECT tenancy_enter(7)", "SELECT * FROM events_2026", "SET ROLE " + h.a, "CREATE TABLE " + h.Schema + ".x ()"} {
		refused(t, conn, "42501", sql)
	}
	// The tenants see what they saw.
	for login, want := range map[string]string{h.a: "a-word", h.b: "b-secret"} {
		tenant := h.as(login)
		for _, sql := range []string{"SELECT title FROM notes", "SELECT title FROM titles", "SELECT title FROM later", "SELECT definer_titles()"} {
			if got := column(t, tenant, sql); !slices.Equal(got, []string{want}) {
				t.Errorf("%s: %s sees %q", login, sql, got)
			}
		}
		refused(t, tenant, "42501", "SET ROLE "+reader)
	}
	if err := h.Verify(t.Context(), h.prov); err != nil {
		t.Error(err)
	}
	must(t, h.super, "GRANT "+reader+" TO "+h.a) // by hand: still nothing, until it becomes the reader, and Verify sees it
	if got := column(t, h.as(h.a), "SELECT title FROM notes"); !slices.Equal(got, []string{"a-word"}) {
		t.Errorf("a member of the reader sees %q", got)
	}
	if err := h.Verify(t.Context(), h.prov); !errors.Is(err, rowsec.ErrUnsafe) || !strings.Contains(err.Error(), "may read as") {
		t.Errorf("got %v", err)
	}
	must(t, h.super, "REVOKE "+reader+" FROM "+h.a)
	for range 2 {
		if err := h.NoReader(t.Context(), h.prov, reader); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, conn, "42501", "SELECT * FROM "+h.Schema+".notes")
	if err := h.NoReader(t.Context(), h.prov, h.Runtime); err != nil {
		t.Fatal(err)
	}
	if got := column(t, h.as(h.a), "SELECT title FROM notes"); !slices.Equal(got, []string{"a-word"}) {
		t.Errorf("after taking from the group what it was never given, A sees %q", got)
	}
	for _, role := range []string{h.a, h.b, h.Owner, h.Runtime, "postgres"} {
		if err := h.Reader(t.Context(), h.prov, role); err == nil {
			t.Errorf("%s became a reader", role)
		}
	}
}
