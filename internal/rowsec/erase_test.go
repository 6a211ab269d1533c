package rowsec_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/rowsec"
)

// tangle are tables that refer to each other in every way.
const tangle = `
	CREATE TABLE people (id int, tenant_id bigint, boss int, team int, PRIMARY KEY (tenant_id, id), FOREIGN KEY (tenant_id, boss) REFERENCES people (tenant_id, id));
	CREATE TABLE teams (id int, tenant_id bigint, lead int NOT NULL, PRIMARY KEY (tenant_id, id), FOREIGN KEY (tenant_id, lead) REFERENCES people (tenant_id, id) DEFERRABLE);
	ALTER TABLE people ADD FOREIGN KEY (tenant_id, team) REFERENCES teams (tenant_id, id);
	CREATE TABLE leaves (tenant_id bigint, person int, FOREIGN KEY (tenant_id, person) REFERENCES people (tenant_id, id) ON DELETE RESTRICT);
	SELECT tenancy_must('people'), tenancy_must('teams'), tenancy_must('leaves')`

// fillTangle gives the login a chain of 6 people, the first and the last in a circle with a team, and a leave for each.
const fillTangle = `
	INSERT INTO people (id, boss) SELECT i, nullif(i - 1, 0) FROM generate_series(1, 6) i;
	INSERT INTO teams (id, lead) VALUES (1, 1), (2, 6);
	UPDATE people SET team = 1 WHERE id = 1;
	UPDATE people SET boss = 6 WHERE id = 6;
	INSERT INTO leaves (person) SELECT id FROM people`

func TestEraseDeletesOneTenantsRowsAndSaysHowMany(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, tangle)
	for _, login := range []string{h.a, h.b} {
		must(t, h.as(login), fillTangle)
	}
	must(t, h.as(h.a), "INSERT INTO events SELECT '2026-05-05', 'x' FROM generate_series(1, 23)")
	before := h.foreign() + tangled(h)
	if _, err := h.Erase(t.Context(), h.prov, idA, 5); !errors.Is(err, rowsec.ErrAdmitted) {
		t.Fatalf("a tenant with a login: got %v", err)
	}
	if err := h.Dismiss(t.Context(), h.prov, h.a); err != nil {
		t.Fatal(err)
	}
	want := "[{comments 1} {counted 1} {events 25} {footers 1} {leaves 6} {notes 1} {pages 1} {people 6} {plans 1} {teams 2}]"
	for range 2 {
		receipt, err := h.Erase(t.Context(), h.prov, idA, 5)
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(receipt) != want {
			t.Errorf("got  %v\nwant %s", receipt, want)
		}
	}
	for _, table := range []string{"notes", "pages", "comments", "footers", "plans", "events", "counted", "people", "teams", "leaves", "tenancy_roster"} {
		column := "tenant_id"
		if table == "tenancy_roster" {
			column = "id"
		}
		if n := scan[int](t, h.super, "SELECT count(*) FROM "+h.Schema+"."+table+" WHERE "+column+" = 7"); n != 0 {
			t.Errorf("%d rows of %s are left", n, table)
		}
	}
	must(t, h.super, "DELETE FROM "+h.Schema+".tenancy_receipts")
	must(t, h.super, "INSERT INTO "+h.Schema+".tenancy_roster VALUES (7, $1, $2); ", realm, tenant[idA].UID)
	must(t, h.super, "INSERT INTO "+h.Schema+".tenancy_map VALUES ($1, 7, $2, $3)", h.a, realm, tenant[idA].UID)
	if after := h.foreign() + tangled(h); after != before {
		t.Errorf("others' rows changed:\n%s\nbefore:\n%s", after, before)
	}
	if _, err := h.Erase(t.Context(), h.prov, 9, 0); !errors.Is(err, rowsec.ErrUnknown) {
		t.Errorf("a tenant that never was: got %v", err)
	}
}

func tangled(h *house) string {
	var b strings.Builder
	for _, table := range []string{"people", "teams", "leaves"} {
		b.WriteString(scan[string](h.t, h.super, `SELECT string_agg(r::text, E'\n' ORDER BY r::text) FROM `+h.Schema+`.`+table+` r WHERE tenant_id IS DISTINCT FROM 7`))
	}
	return b.String()
}

func TestEraseThatStoppedIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	h := newService(t)
	// A row of B's on A's note, which the key does not keep out, and this one stands in the way.
	must(t, h.owner, "BEGIN; ALTER TABLE notes NO FORCE ROW LEVEL SECURITY; ALTER TABLE comments NO FORCE ROW LEVEL SECURITY; "+
		"ALTER TABLE comments DROP CONSTRAINT comments_note_fkey, ADD FOREIGN KEY (note) REFERENCES notes; ALTER TABLE comments FORCE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY; COMMIT")
	b := h.as(h.b)
	must(t, b, "INSERT INTO comments (note, text) VALUES (1, 'on the note of A')")
	if err := h.Dismiss(t.Context(), h.prov, h.a); err != nil {
		t.Fatal(err)
	}
	_, err := h.Erase(t.Context(), h.prov, idA, 1)
	if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.Code != "23503" {
		t.Fatalf("got %v", err)
	}
	if n := scan[int](t, h.super, "SELECT count(*) FROM "+h.Schema+".comments WHERE tenant_id = 7"); n != 0 {
		t.Errorf("%d comments are left: it did not come that far", n)
	}
	var out bytes.Buffer
	if _, err := h.Export(t.Context(), h.prov, idA, &out); !errors.Is(err, rowsec.ErrErasing) || out.Len() > 0 {
		t.Errorf("an export of what is left: %v: %s", err, out.String())
	}
	if _, err := h.Export(t.Context(), h.prov, idB, &out); err != nil {
		t.Errorf("an export of another: %v", err)
	}
	must(t, b, "DELETE FROM comments WHERE note = 1")
	// A trigger that keeps rows is found out, and no loop.
	must(t, h.owner, `CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER keep BEFORE DELETE ON plans FOR EACH ROW EXECUTE FUNCTION keep()`)
	if _, err := h.Erase(t.Context(), h.prov, idA, 1); !errors.Is(err, rowsec.ErrLeft) || !strings.Contains(err.Error(), "plans") {
		t.Fatalf("got %v", err)
	}
	must(t, h.owner, "DROP TRIGGER keep ON plans")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Erase(ctx, h.prov, idA, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	receipt, err := h.Erase(t.Context(), h.owner, idA, 1)
	if want := "[{comments 1} {counted 1} {events 2} {footers 1} {notes 1} {pages 1} {plans 1}]"; err != nil || fmt.Sprint(receipt) != want {
		t.Errorf("over all calls: %v, %v", receipt, err)
	}
}

// interfering runs a function at the first write.
type interfering struct {
	bytes.Buffer
	once func()
}

func (w *interfering) Write(p []byte) (int, error) {
	if w.once != nil {
		w.once()
		w.once = nil
	}
	return w.Buffer.Write(p)
}

func TestExportIsOneTenantAsOfOneMoment(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, `CREATE TABLE papers (id int, tenant_id bigint, raw json, at timestamptz, PRIMARY KEY (tenant_id, id)); SELECT tenancy_must('papers');
		CREATE TABLE prints (tenant_id bigint, paper int, copy int, FOREIGN KEY (tenant_id, paper) REFERENCES papers (tenant_id, id)); SELECT tenancy_must('prints')`)
	a := h.as(h.a)
	must(t, a, `INSERT INTO papers (id, raw, at) SELECT i, E'{"a":\n"b"}', '2026-05-05 12:00+02' FROM generate_series(1, 500) i; INSERT INTO prints (paper, copy) SELECT id, 1 FROM papers`)
	var w interfering
	w.once = func() { must(t, a, "INSERT INTO prints (paper, copy) VALUES (1, 2)") }
	counts, err := h.Export(t.Context(), h.prov, idA, &w)
	if err != nil {
		t.Fatal(err)
	}
	if w.once != nil || scan[int](t, a, "SELECT count(*) FROM prints") != 501 {
		t.Error("nothing was written while the export ran")
	}
	out := w.String()
	for _, text := range []string{"b-secret", "free"} {
		if strings.Contains(out, text) {
			t.Errorf("it holds %q", text)
		}
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	seen, first := map[string]int64{}, map[string]int{}
	for i, line := range lines[:len(lines)-1] {
		var row struct {
			Table string
			Row   struct {
				Tenant int64 `json:"tenant_id"`
				At     string
			}
		}
		if err := json.Unmarshal([]byte(line), &row); err != nil || row.Row.Tenant != idA {
			t.Fatalf("line %d: %v: %s", i, err, line)
		}
		if row.Table == "papers" && row.Row.At != "2026-05-05T10:00:00+00:00" {
			t.Fatalf("time %s", row.Row.At)
		}
		if seen[row.Table]++; seen[row.Table] == 1 {
			first[row.Table] = i
		}
	}
	var end struct{ End []rowsec.Count }
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &end); err != nil || fmt.Sprint(end.End) != fmt.Sprint(counts) || len(counts) != 9 {
		t.Errorf("the end says %s, %v, and we %v", lines[len(lines)-1], err, counts)
	}
	for _, c := range counts {
		if seen[c.Table] != c.Rows {
			t.Errorf("%s: %d lines, %d counted", c.Table, seen[c.Table], c.Rows)
		}
	}
	if seen["prints"] != 500 || first["prints"] < first["papers"] || first["comments"] < first["notes"] || first["footers"] < first["pages"] {
		t.Errorf("counts %v, first lines %v", seen, first)
	}
	if _, err := h.Export(t.Context(), h.prov, 9, &w); !errors.Is(err, rowsec.ErrUnknown) {
		t.Errorf("got %v", err)
	}
	broken := errors.New("disk full")
	if _, err := h.Export(t.Context(), h.prov, idA, failing{broken}); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if _, err := h.Export(t.Context(), h.super, idA, &bytes.Buffer{}); err != nil { // a superuser, whom no policy stops, gets the same
		t.Errorf("got %v", err)
	}
}

// Through the tenant's own login it is the same, and no other login's.
func TestATenantExportsItsOwn(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, "SELECT tenancy_enter_host(); INSERT INTO plans (name) VALUES ('host-secret')")
	a := h.as(h.a)
	var out, own bytes.Buffer
	counts, err := h.Export(t.Context(), h.prov, idA, &out)
	if err != nil {
		t.Fatal(err)
	}
	mine, err := h.ExportOwn(t.Context(), a, idA, &own)
	if err != nil || fmt.Sprint(mine) != fmt.Sprint(counts) || own.String() != out.String() {
		t.Errorf("got %v, %v, want %v:\n%s", mine, err, counts, own.String())
	}
	for _, text := range []string{"b-secret", "host-secret"} {
		if strings.Contains(own.String(), text) {
			t.Errorf("it holds %q", text)
		}
	}
	out.Reset()
	if _, err := h.ExportOwn(t.Context(), a, idB, &out); !errors.Is(err, rowsec.ErrUnknown) || out.Len() > 0 {
		t.Errorf("another's: %v: %s", err, out.String())
	}
}

type failing struct{ err error }

func (w failing) Write([]byte) (int, error) { return 0, w.err }

func TestATenantCanNeitherEraseNorExport(t *testing.T) {
	t.Parallel()
	h := newService(t)
	a := h.as(h.a)
	if err := h.Dismiss(t.Context(), h.prov, h.b); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := h.Export(t.Context(), a, idB, &out); err == nil || out.Len() > 0 {
		t.Errorf("got %v: %s", err, out.String())
	}
	if _, err := h.Erase(t.Context(), a, idB, 0); err == nil {
		t.Error("A erased B")
	}
	if n := scan[int](t, h.super, "SELECT count(*) FROM "+h.Schema+".notes"); n != 2 {
		t.Errorf("%d notes are left", n)
	}
}
