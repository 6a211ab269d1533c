package tenancy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// pageMigrations are of a service with two tables, one of which refers to the other.
var pageMigrations = fstest.MapFS{"00001_pages.sql": {Data: []byte(`-- +goose Up
CREATE TABLE pages (tenant_id bigint, id bigint GENERATED ALWAYS AS IDENTITY, title text NOT NULL, at timestamptz NOT NULL DEFAULT '2026-05-05 12:00+02', PRIMARY KEY (tenant_id, id));
CREATE TABLE footers (tenant_id bigint, page bigint, words text NOT NULL, FOREIGN KEY (tenant_id, page) REFERENCES pages (tenant_id, id));
SELECT tenancy_must('pages');
SELECT tenancy_must('footers');
CREATE VIEW titles AS SELECT title FROM pages;
SELECT tenancy_view('titles');
`)}}

// pageFleet is a node with two tenants of each isolation. Each has three pages and two footers with its name in them.
func pageFleet(t *testing.T) (f *tenancytest.Fleet, tn *tenancy.Tenancy, tenants []tenancy.Tenant) {
	t.Helper()
	f = tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	tn = f.Open(t, tenancy.Config{Migrations: pageMigrations, Isolation: tenancy.IsolationSchema})
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase, tenancy.IsolationShared} {
		for _, name := range []string{"acme", "globex"} {
			tenants = append(tenants, withPages(t, tn, name+"-"+string(isolation), isolation))
		}
	}
	return f, tn, tenants
}

func withPages(t *testing.T, tn *tenancy.Tenancy, name string, isolation tenancy.Isolation) tenancy.Tenant {
	t.Helper()
	made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Isolation: isolation})
	if err != nil {
		t.Fatal(err)
	}
	own := login(t, tn, made.ID)
	must(t, own, `INSERT INTO pages (title) SELECT $1 || ' ' || i FROM generate_series(1, 3) i`, name)
	must(t, own, `INSERT INTO footers (page, words) SELECT id, $1 FROM pages ORDER BY id LIMIT 2`, name)
	_ = own.Close(t.Context())
	return made
}

func TestExportIsAllOfOneTenantAndNothingOfAnother(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	primary := f.Admin(t, "primary")
	for _, service := range []string{"active", "suspended", "deleted"} {
		for i, tenant := range tenants {
			var out bytes.Buffer
			rows, err := tn.Catalog().Export(t.Context(), tenant.ID, &out)
			if want := []tenancy.ExportedRows{{Table: "pages", Rows: 3}, {Table: "footers", Rows: 2}}; err != nil || !slices.Equal(rows, want) {
				t.Errorf("%s, %s: exported %v, %v; want %v", tenant.Name, service, rows, err, want)
				continue
			}
			checkExport(t, tenant, out.String())
			for j, other := range tenants {
				if i != j && strings.Contains(out.String(), other.Name) {
					t.Errorf("%s, %s: it holds a row of %s", tenant.Name, service, other.Name)
				}
			}
			for _, role := range []string{placeOf(t, f, tenant.ID).Owner, placeOf(t, f, tenant.ID).Login} {
				closed := service != "active" || strings.HasSuffix(role, "_o")
				if can := scan[bool](t, primary, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, role); can == closed {
					t.Errorf("%s, %s: %s may log in: %t", tenant.Name, service, role, can)
				}
			}
			wantActions(t, primary, tenant.ID, "export", "exported")
			must(t, primary, `DELETE FROM tenancy.audit WHERE action LIKE 'export%'`)
		}
		for _, tenant := range tenants {
			next := tn.Catalog().Delete
			if service == "active" {
				next = func(ctx context.Context, id tenancy.ID) error {
					return tn.Catalog().Suspend(ctx, id, tenancy.Suspension{Drain: 1})
				}
			}
			if err := next(t.Context(), tenant.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := tn.Catalog().PurgeNow(t.Context(), tenants[0].ID, tenants[0].Name); err != nil {
		t.Fatal(err)
	}
	wantError(t, second(tn.Catalog().Export(t.Context(), tenants[0].ID, new(bytes.Buffer))), tenancy.ErrTenantGone)
	wantError(t, second(tn.Catalog().Export(t.Context(), 4711, new(bytes.Buffer))), tenancy.ErrTenantNotFound)
}

// wantActions checks what the audit trail's last rows of the tenant say.
func wantActions(t *testing.T, primary *pgx.Conn, id tenancy.ID, want ...string) {
	t.Helper()
	got := scan[[]string](t, primary, `SELECT array_agg(action ORDER BY id) FROM (SELECT * FROM tenancy.audit WHERE tenant = $1 ORDER BY id DESC LIMIT $2) a`, id, len(want))
	if !slices.Equal(got, want) {
		t.Errorf("the audit trail of %d has %q, want %q", id, got, want)
	}
}

func checkExport(t *testing.T, tenant tenancy.Tenant, text string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != 7 {
		t.Fatalf("%s: %d lines: %s", tenant.Name, len(lines), text)
	}
	var line struct {
		Tenant struct {
			UID, Name, Isolation string
			Version              int64
			Begun                time.Time
		}
		Table string
		Row   map[string]any
		End   []struct {
			Table string
			Rows  int64
		}
	}
	for i, want := range []string{"", "pages", "pages", "pages", "footers", "footers", ""} {
		line.Table = ""
		if err := json.Unmarshal([]byte(lines[i]), &line); err != nil || line.Table != want {
			t.Errorf("%s: line %d is %s, %v; want one of %q", tenant.Name, i, lines[i], err, want)
		}
		if want == "pages" && (line.Row["at"] != "2026-05-05T10:00:00+00:00" || line.Row["tenant_id"] != float64(tenant.ID)) {
			t.Errorf("%s: row %v", tenant.Name, line.Row)
		}
	}
	if head := line.Tenant; head.UID != tenant.UID.String() || head.Name != tenant.Name || head.Isolation != string(tenant.Isolation) || head.Version != 1 || time.Since(head.Begun) > time.Minute {
		t.Errorf("%s: the head says %+v", tenant.Name, head)
	}
	if len(line.End) != 2 || line.End[0].Rows != 3 {
		t.Errorf("%s: the end says %+v", tenant.Name, line.End)
	}
}

// stopping calls stop with its first write of more than a line, which is the first with rows.
type stopping struct {
	written int
	stop    func() error
}

func (w *stopping) Write(p []byte) (int, error) {
	if w.written += len(p); w.written > 4096 && w.stop != nil {
		stop := w.stop
		w.stop = nil
		if err := stop(); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func TestAnExportThatEndsEarlyLeavesNoSession(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	admin := f.Admin(t, "tenants")
	for _, service := range []string{"active", "suspended"} {
		for i, tenant := range tenants {
			if i%2 == 1 { // of each isolation the other one is there to be left alone
				continue
			}
			if service == "active" {
				must(t, login(t, tn, tenant.ID), `INSERT INTO pages (title) SELECT repeat('x', 1000) FROM generate_series(1, 20000)`)
			} else if err := tn.Catalog().Suspend(t.Context(), tenant.ID, tenancy.Suspension{Drain: 1}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			broken := errors.New("disk full")
			for what, w := range map[string]*stopping{
				"cancelled":           {stop: func() error { cancel(); return nil }},
				"not writing anymore": {stop: func() error { return broken }},
			} {
				with, want := t.Context(), broken
				if what == "cancelled" {
					with, want = ctx, context.Canceled
				}
				if rows, err := tn.Catalog().Export(with, tenant.ID, w); !errors.Is(err, want) {
					t.Errorf("%s, %s, %s: %v, %v", tenant.Name, service, what, rows, err)
				}
				noSession(t, admin, fmt.Sprintf("%s, %s, %s", tenant.Name, service, what), placeOf(t, f, tenant.ID).Schema)
			}
			wantActions(t, f.Admin(t, "primary"), tenant.ID, "export", "export")
		}
	}
}

// noSession waits until no export is at work on the schema's roles, nor its owner at all.
func noSession(t *testing.T, admin *pgx.Conn, what, schema string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		n := scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1 || '_o' OR application_name = 'tenancy export' AND starts_with(usename, $1)`, schema)
		if n == 0 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("%s: %d sessions are left", what, n)
			break
		}
	}
	if scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1 || '_o'`, schema) {
		t.Errorf("%s: the owner may log in", what)
	}
}

// What is exported is asked for as the tenant: a table that it may not read is not quietly left out, and what is another's is not there.
func TestExportOfATenantInServiceStaysBehindItsWall(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	admin := f.Admin(t, "tenants")
	a, shared := tenants[0], tenants[4]
	place := placeOf(t, f, a.ID)
	must(t, admin, `CREATE TABLE `+place.table("closed")+` (); ALTER TABLE `+place.table("closed")+` OWNER TO `+place.Owner)
	if _, err := tn.Catalog().Export(t.Context(), a.ID, new(bytes.Buffer)); sqlState(err) != "42501" || !strings.Contains(err.Error(), "table closed") {
		t.Errorf("a table that it may not read: %v", err)
	}
	must(t, admin, `DROP TABLE `+place.table("closed"))
	// Nor are rows that a policy of the service's own hides.
	must(t, admin, `ALTER TABLE `+place.table("footers")+` ENABLE ROW LEVEL SECURITY`)
	if _, err := tn.Catalog().Export(t.Context(), a.ID, new(bytes.Buffer)); sqlState(err) != "42501" || !strings.Contains(err.Error(), "table footers") {
		t.Errorf("a table with a policy: %v", err)
	}
	must(t, admin, `ALTER TABLE `+place.table("footers")+` DISABLE ROW LEVEL SECURITY`)
	// A row of the other's that the condition lets by, and the wall does not.
	area := placeOf(t, f, shared.ID)
	must(t, admin, `UPDATE `+area.table("tenancy_map")+` SET login = 'nobody' WHERE login = $1`, area.Login)
	if _, err := tn.Catalog().Export(t.Context(), shared.ID, new(bytes.Buffer)); !errors.Is(err, tenancy.ErrIdentity) {
		t.Errorf("a login that is nobody's: %v", err)
	}
	// A place with another's marker.
	must(t, admin, `UPDATE `+place.table("tenancy_marker")+` SET tenant = $1`, tenants[1].UID)
	wantError(t, second(tn.Catalog().Export(t.Context(), a.ID, new(bytes.Buffer))), tenancy.ErrIdentity)
	if err := tn.Catalog().Suspend(t.Context(), a.ID, tenancy.Suspension{Drain: 1}); err != nil {
		t.Fatal(err)
	}
	wantError(t, second(tn.Catalog().Export(t.Context(), a.ID, new(bytes.Buffer))), tenancy.ErrIdentity)
}

// What a login has set for itself is not seen in its export.
func TestExportIsWrittenTheSameWhateverIsSet(t *testing.T) {
	t.Parallel()
	f, tn, tenants := pageFleet(t)
	admin := f.Admin(t, "tenants")
	for _, tenant := range []tenancy.Tenant{tenants[0], tenants[1], tenants[4], tenants[5]} {
		place := placeOf(t, f, tenant.ID)
		if tenant.ID != tenants[5].ID { // it is in the schema of the one before
			must(t, admin, `ALTER TABLE `+place.table("pages")+` ADD raw bytea DEFAULT '\x00ff', ADD part float8 DEFAULT 0.1::float8 + 0.2, ADD span interval DEFAULT '1 day 2 hours'`)
		}
		for _, setting := range []string{`bytea_output = 'escape'`, `extra_float_digits = 0`, `IntervalStyle = 'iso_8601'`} {
			must(t, admin, `ALTER ROLE `+place.Login+` SET `+setting)
		}
		var out bytes.Buffer
		if _, err := tn.Catalog().Export(t.Context(), tenant.ID, &out); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(out.String(), `"raw":"\\x00ff","part":0.30000000000000004,"span":"1 day 02:00:00"`); n != 3 {
			t.Errorf("%s: %d of 3 rows: %s", tenant.Name, n, out.String())
		}
	}
}
