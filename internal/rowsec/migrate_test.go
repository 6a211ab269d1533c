package rowsec_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/rowsec"
)

// A data migration, as one file for both models.
const dataMigration = `
	DO $$ DECLARE t bigint; BEGIN
		FOR t IN SELECT tenancy_tenants() LOOP
			PERFORM tenancy_enter(t);
			UPDATE notes SET title = title || ' of ' || tenant_id;
		END LOOP;
		PERFORM tenancy_enter_host();
		INSERT INTO plans (tenant_id, name) VALUES (NULL, 'pro');
	END $$`

func TestTheOwnerSaysWhoseRowsAMigrationIsAfter(t *testing.T) {
	t.Parallel()
	h := newService(t)
	for _, sql := range []string{`SELECT * FROM notes`, `UPDATE notes SET title = 'x'`, `DELETE FROM plans`, `INSERT INTO notes (id, title) VALUES (50, 'x')`, `TABLE owners_titles`, `COPY notes TO STDOUT`} {
		if pg := refused(t, h.owner, "42501", sql); !strings.Contains(pg.Hint, "tenancy_enter") {
			t.Errorf("%s: no word of what to do: %s %s", sql, pg.Message, pg.Hint)
		}
	}
	if err := h.Dismiss(t.Context(), h.prov, h.b); err != nil { // one that is out of service is migrated like the others
		t.Fatal(err)
	}
	must(t, h.owner, dataMigration)
	h.admit(h.b, idB)
	for login, want := range map[string]string{h.a: "a-word of 7", h.b: "b-secret of 8"} {
		conn := h.as(login)
		if got := column(t, conn, "SELECT title FROM notes"); !slices.Equal(got, []string{want}) {
			t.Errorf("%s sees %q", login, got)
		}
		if got := column(t, conn, "SELECT name FROM plans WHERE tenant_id IS NULL ORDER BY id"); !slices.Equal(got, []string{"free", "pro"}) {
			t.Errorf("%s sees the host's plans %q", login, got)
		}
	}
	// Nothing of it outlives the transaction.
	refused(t, h.owner, "42501", `SELECT * FROM notes`)
	must(t, h.owner, `SELECT tenancy_enter(7)`)
	refused(t, h.owner, "42501", `SELECT * FROM notes`)
	refused(t, h.owner, "22023", `SELECT tenancy_enter(9)`)
	refused(t, h.owner, "22023", `SELECT tenancy_enter(NULL)`)
}

func TestOneEnteredTenantIsAllThatTheOwnerSees(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, "BEGIN; SELECT tenancy_enter(7)")
	if got := column(t, h.owner, "SELECT title FROM notes UNION ALL SELECT what FROM events UNION ALL SELECT title FROM owners_titles"); strings.Contains(fmt.Sprint(got), "b-secret") || len(got) != 4 {
		t.Errorf("entered A, the owner sees %q", got)
	}
	must(t, h.owner, "SAVEPOINT s")
	refused(t, h.owner, "42501", `INSERT INTO notes (id, tenant_id, title) VALUES (50, 8, 'x')`)
	must(t, h.owner, "ROLLBACK TO s")
	refused(t, h.owner, "42501", `UPDATE notes SET tenant_id = 8`)
	must(t, h.owner, "ROLLBACK; BEGIN; SELECT tenancy_enter_host()")
	if got := column(t, h.owner, "SELECT title FROM notes UNION ALL SELECT name FROM plans"); !slices.Equal(got, []string{"free"}) {
		t.Errorf("entered the host, the owner sees %q", got)
	}
	refused(t, h.owner, "42501", `INSERT INTO notes (id, title) VALUES (50, 'x')`)
	must(t, h.owner, "ROLLBACK")
	// A later partition has no wall of its own: the owner's view over it is closed to the tenants by having no right, and an earlier one is closed to the owner too.
	if got := column(t, h.owner, "SELECT what FROM events_2026"); len(got) != 0 {
		t.Errorf("the partition shows %q", got)
	}
}

func TestAForeignKeyOnFilledTablesIsCheckedForAllTenants(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	must(t, h.owner, `CREATE TABLE notes (id bigint, tenant_id bigint, PRIMARY KEY (tenant_id, id)); CREATE TABLE tags (tenant_id bigint, note bigint); SELECT tenancy_must('notes'), tenancy_must('tags')`)
	for _, login := range []string{h.a, h.b} {
		must(t, h.as(login), "INSERT INTO notes VALUES (1); INSERT INTO tags (note) VALUES (1)")
	}
	must(t, h.as(h.b), "INSERT INTO tags (note) VALUES (2)")
	const (
		add  = `ALTER TABLE tags ADD FOREIGN KEY (tenant_id, note) REFERENCES notes (tenant_id, id)`
		off  = `ALTER TABLE notes NO FORCE ROW LEVEL SECURITY; ALTER TABLE tags NO FORCE ROW LEVEL SECURITY; `
		on   = `ALTER TABLE notes FORCE ROW LEVEL SECURITY; ALTER TABLE tags FORCE ROW LEVEL SECURITY; `
		drop = `ALTER TABLE tags DROP CONSTRAINT tags_tenant_id_note_fkey; `
	)
	refused(t, h.owner, "42501", add)
	must(t, h.owner, "BEGIN; SELECT tenancy_enter(7); "+add+"; ROLLBACK") // B's row went unseen: this is why it is not said to be the way
	refused(t, h.owner, "23503", "BEGIN; "+off+add)
	must(t, h.owner, "ROLLBACK")
	must(t, h.as(h.b), "DELETE FROM tags WHERE note = 2")
	must(t, h.owner, "BEGIN; "+off+add+"; "+on+"COMMIT")
	if err := h.Verify(t.Context(), h.prov); err != nil {
		t.Error(err)
	}
	must(t, h.owner, drop+off+add)
	if err := h.Verify(t.Context(), h.prov); !errors.Is(err, rowsec.ErrUnsafe) || !strings.Contains(err.Error(), "notes has a wall that is not forced") {
		t.Errorf("forgotten: got %v", err)
	}
}

func TestProtectRefusesWhatItCannotProtect(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.super, `CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.x (); GRANT ALL ON SCHEMA elsewhere TO `+h.Owner+`;
		CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; CREATE FOREIGN TABLE `+h.Schema+`.far (line text) SERVER files OPTIONS (filename '/dev/null');
		ALTER FOREIGN TABLE `+h.Schema+`.far OWNER TO `+h.Owner+`; CREATE TABLE `+h.Schema+`.another ()`)
	must(t, h.prov, "GRANT TEMPORARY ON DATABASE "+h.base.Database+" TO "+h.Owner)
	must(t, h.owner, `CREATE TEMP TABLE brief (); CREATE TABLE odd (tenant_id text); CREATE TABLE made (id bigint, tenant_id bigint GENERATED ALWAYS AS (id) STORED);
		CREATE TABLE full_one (id bigint); INSERT INTO full_one VALUES (1)`)
	for relation, want := range map[string]struct{ state, says string }{
		"titles":         {"42809", "it is a view"},
		"filled":         {"42809", "materialized view"},
		"far":            {"42809", "foreign table"},
		"brief":          {"42809", "temporary"},
		"elsewhere.x":    {"3F000", "it is not in schema"},
		"pg_class":       {"3F000", "it is not in schema"},
		"another":        {"42501", "belongs to postgres"},
		"events_2026":    {"42809", "partition"},
		"tenancy_map":    {"42809", "the library's"},
		"counted_id_seq": {"42809", "no table"},
		"odd":            {"42804", "bigint"},
		"made":           {"42804", "generated"},
	} {
		for _, form := range []string{"tenancy_must", "tenancy_may"} {
			if pg := refused(t, h.owner, want.state, "SELECT "+form+"('"+relation+"')"); !strings.Contains(pg.Message, want.says) || !strings.Contains(pg.Message, "refused") {
				t.Errorf("%s(%s): %s", form, relation, pg.Message)
			}
		}
	}
	refused(t, h.owner, "22004", "SELECT tenancy_must(to_regclass('typo'))")
	if pg := refused(t, h.owner, "23502", "SELECT tenancy_must('full_one')"); !strings.Contains(pg.Message, "rows of no tenant") {
		t.Error(pg.Message)
	}
	refused(t, h.owner, "42809", "SELECT tenancy_common('notes')")
	refused(t, h.owner, "42809", "SELECT tenancy_common('filled')")
	if pg := refused(t, h.owner, "42809", "SELECT tenancy_view('notes')"); !strings.Contains(pg.Message, "refused: it is a table and no view") {
		t.Error(pg.Message)
	}
	must(t, h.owner, "CREATE VIEW leak AS SELECT * FROM forgotten")
	if pg := refused(t, h.owner, "42501", "SELECT tenancy_view('leak')"); !strings.Contains(pg.Message, "may not read") {
		t.Error(pg.Message)
	}
	if server.Major() >= 15 {
		if got := scan[bool](t, h.super, "SELECT 'security_invoker=true' = ANY (reloptions) FROM pg_class WHERE relname = 'titles'"); !got {
			t.Error("a view asks with its owner's rights")
		}
	}
}

func TestProtectingAgainChangesNothing(t *testing.T) {
	t.Parallel()
	h := newService(t)
	state := func() string {
		return scan[string](t, h.super, `SELECT string_agg(r, E'\n' ORDER BY r) FROM (
			SELECT format('%s %s %s %s', tablename, policyname, qual, with_check) FROM pg_policies
			UNION ALL SELECT format('%s %s', relname, p) FROM pg_class, unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) p
				WHERE relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p', 'v', 'm') AND has_table_privilege($2, oid, p)
			UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = $1::text) s (r)`, h.Schema, h.Runtime)
	}
	before := state()
	must(t, h.owner, "SELECT tenancy_must('notes'), tenancy_may('plans'), tenancy_must('events'), tenancy_must('pages'), tenancy_common('countries'), tenancy_view('titles')")
	if err := h.Install(t.Context(), h.owner); err != nil && !strings.Contains(err.Error(), "owners_titles") {
		t.Fatal(err)
	}
	after := state()
	if after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if strings.Contains(after, "pages_tenant_id_idx") {
		t.Error("a table whose key begins with tenant_id got an index more")
	}
}

// One set of files and one set of statements serve the schema model too.
func TestTheSameMigrationsAndStatementsServeBothModels(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	alone := h.Schema + "_alone"
	must(t, h.prov, "CREATE SCHEMA "+alone+" AUTHORIZATION "+h.Owner)
	for range 2 {
		if err := rowsec.InstallSchemaModel(t.Context(), h.prov, alone, h.Owner, idA); err != nil {
			t.Fatal(err)
		}
	}
	must(t, h.owner, `ALTER DEFAULT PRIVILEGES IN SCHEMA `+alone+` GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO `+h.Runtime+`;
		GRANT USAGE ON SCHEMA `+alone+` TO `+h.Runtime)
	migrations := []string{`
		CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY, tenant_id bigint, slug text, title text NOT NULL, PRIMARY KEY (tenant_id, id), UNIQUE (tenant_id, slug));
		CREATE TABLE tags (tenant_id bigint, note bigint, tag text, FOREIGN KEY (tenant_id, note) REFERENCES notes (tenant_id, id));
		CREATE TABLE plans (name text);
		CREATE TABLE events (at date, what text) PARTITION BY RANGE (at);
		CREATE TABLE events_2026 PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
		CREATE TABLE countries (code text);
		INSERT INTO countries VALUES ('at');
		CREATE VIEW slugs AS SELECT slug FROM notes;
		SELECT tenancy_must('notes'), tenancy_must('tags'), tenancy_may('plans'), tenancy_must('events'), tenancy_common('countries'), tenancy_view('slugs')`,
		dataMigration}
	statements := []string{`INSERT INTO notes (slug, title) VALUES ('s', 'one') ON CONFLICT (tenant_id, slug) DO UPDATE SET title = excluded.title`,
		`INSERT INTO notes (slug, title) VALUES ('s', 'two') ON CONFLICT (tenant_id, slug) DO UPDATE SET title = excluded.title`,
		`INSERT INTO tags (note, tag) SELECT id, 'blue' FROM notes`, `INSERT INTO events VALUES ('2026-05-05', 'x')`, `INSERT INTO plans (name) VALUES ('own')`}
	seen := map[string]string{}
	for _, schema := range []string{h.Schema, alone} {
		must(t, h.owner, "SET search_path = "+schema)
		for _, sql := range migrations {
			must(t, h.owner, sql)
		}
		a := h.as(h.a)
		must(t, a, "SET search_path = "+schema)
		for _, sql := range statements {
			must(t, a, sql)
		}
		out, state := run(t, a, `SELECT * FROM notes; SELECT tag FROM tags JOIN notes ON note = id; SELECT * FROM plans ORDER BY name; SELECT * FROM events; SELECT * FROM countries; SELECT * FROM slugs`)
		if state != "" || !strings.Contains(out, "two") {
			t.Errorf("%s: SQLSTATE %q: %s", schema, state, out)
		}
		seen[schema] = out
	}
	if seen[alone] != seen[h.Schema] {
		t.Errorf("shared:\n%s\nalone:\n%s", seen[h.Schema], seen[alone])
	}
	must(t, h.owner, `CREATE TABLE old (id bigint); INSERT INTO old VALUES (1); SELECT tenancy_must('old')`)
	if got := scan[int64](t, h.owner, "SELECT tenant_id FROM old"); got != idA {
		t.Errorf("rows that were there before are of %d", got)
	}
	refused(t, h.owner, "22023", "SELECT tenancy_enter(8)")
	refused(t, h.owner, "42809", "SELECT tenancy_must('slugs')")
	refused(t, h.owner, "22004", "SELECT tenancy_must(to_regclass('typo'))")
}

func TestKeysWithoutTheTenantTellOfOthersAndAreListed(t *testing.T) {
	t.Parallel()
	h := newService(t)
	a, b := h.as(h.a), h.as(h.b)
	// A leak: the server looks for a duplicate, and for what is referred to, past the policies.
	refused(t, a, "23505", `INSERT INTO notes (id, title) VALUES (2, 'x')`)
	must(t, a, `INSERT INTO comments (note, text) VALUES (2, 'on the note of B')`)
	refused(t, a, "23503", `INSERT INTO comments (note, text) VALUES (99, 'x')`)
	// And a row of A's goes with B's.
	must(t, b, `DELETE FROM notes WHERE id = 2`)
	if n := scan[int](t, a, `SELECT count(*) FROM comments WHERE text = 'on the note of B'`); n != 0 {
		t.Errorf("%d comments are left", n)
	}
	// With the tenant in the keys B's page is as if it were not there.
	must(t, b, `INSERT INTO pages (id, title) VALUES (2, 'b-secret')`)
	refused(t, a, "23503", `INSERT INTO footers (page, text) VALUES (2, 'x')`)
	must(t, a, `INSERT INTO pages (id, title) VALUES (2, 'x')`)

	tables, err := h.Tables(t.Context(), h.prov)
	if err != nil {
		t.Fatal(err)
	}
	want := []rowsec.Table{
		{Name: "comments", Unique: []string{}, References: []string{"comments_note_fkey"}},
		{Name: "counted", Unique: []string{}, References: []string{}},
		{Name: "events", Unique: []string{}, References: []string{}},
		{Name: "footers", Unique: []string{}, References: []string{}},
		{Name: "notes", Unique: []string{"notes_pkey"}, References: []string{}},
		{Name: "pages", Unique: []string{}, References: []string{}},
		{Name: "plans", Host: true, Unique: []string{}, References: []string{}},
	}
	if fmt.Sprintf("%+v", tables) != fmt.Sprintf("%+v", want) {
		t.Errorf("got %+v\nwant %+v", tables, want)
	}
}

// What is shared, and what does not work, is said in the package's comment.
func TestWhatTenantsShareIsAsTheCommentSays(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.super, "ANALYZE")
	a := h.as(h.a)
	if n := scan[int](t, a, `SELECT nextval('counted_id_seq')`); n != 3 {
		t.Errorf("the sequence is at %d for A, after a row of each", n)
	}
	if n := scan[float64](t, a, `SELECT reltuples FROM pg_class WHERE oid = 'notes'::regclass`); n != 2 {
		t.Errorf("the catalog shows %v rows", n)
	}
	must(t, h.super, `INSERT INTO `+h.Schema+`.pages (id, tenant_id, title) SELECT i, 8, 'common' FROM generate_series(10, 1009) i; ANALYZE`)
	estimate := func(title string) string {
		return column(t, a, "EXPLAIN SELECT * FROM pages WHERE title = '"+title+"'")[0]
	}
	if common, rare := estimate("common"), estimate("rare"); common == rare {
		t.Errorf("the estimate for a value of B's is as for any other: %s", common)
	}
	b := h.as(h.b)
	must(t, b, "SET lock_timeout = '10ms'")
	must(t, a, "BEGIN; LOCK TABLE notes")
	refused(t, b, "55P03", "SELECT title FROM notes")
	must(t, a, "ROLLBACK")
	_, err := a.CopyFrom(t.Context(), []string{"notes"}, []string{"id", "title"}, pgx.CopyFromRows([][]any{{3, "x"}}))
	if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.Code != "0A000" {
		t.Errorf("COPY FROM: %v", err)
	}
}

func TestTheConditionIsAskedOnceAndFindsTheIndex(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.super, `INSERT INTO `+h.Schema+`.pages (id, tenant_id, title) SELECT i, 7 + i % 200, 'x' FROM generate_series(10, 20009) i;
		INSERT INTO `+h.Schema+`.plans (tenant_id, name) SELECT 7 + i % 200, 'x' FROM generate_series(1, 20000) i;
		INSERT INTO `+h.Schema+`.events (tenant_id, at, what) SELECT 7 + i % 200, '2026-01-01', 'x' FROM generate_series(1, 20000) i; ANALYZE;
		ALTER ROLE `+h.a+` SET track_functions = 'pl'`)
	reader := h.Schema + "_reader"
	h.role(reader, "LOGIN")
	t.Cleanup(func() { must(t, h.super, "DROP OWNED BY "+reader+"; DROP ROLE "+reader) })
	for _, readers := range []int{0, 1} {
		if readers == 1 {
			if err := h.Reader(t.Context(), h.prov, reader); err != nil {
				t.Fatal(err)
			}
		}
		a := h.as(h.a)
		for table, stored := range map[string]string{"pages": "pages", "plans": "plans", "events": "events_2026"} {
			for _, sql := range []string{"SELECT * FROM " + table, "UPDATE " + table + " SET tenant_id = tenant_id WHERE true", "DELETE FROM " + table} {
				plan := strings.Join(column(t, a, "EXPLAIN "+sql), "\n")
				if !strings.Contains(plan, "Index Cond: (tenant_id = ") || strings.Contains(plan, "Seq Scan on "+stored+" ") {
					t.Errorf("with %d readers, %s does not use the index:\n%s", readers, sql, plan)
				}
			}
			const calls = "SELECT coalesce(sum(calls), 0) FROM pg_stat_xact_user_functions WHERE funcname = 'tenancy_tenant'"
			must(t, a, "BEGIN")
			before := scan[int](t, a, calls)
			rows := scan[int](t, a, "SELECT count(*) FROM "+table)
			if n := scan[int](t, a, calls) - before; rows < 100 || n < 1 || n > 1+readers {
				t.Errorf("with %d readers, %d rows of %s took %d calls", readers, rows, table, n)
			}
			must(t, a, "ROLLBACK")
		}
	}
}

func TestInstallRefusesAnOwnerOrASchemaThatIsNotItsOwn(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	other := h.Shared
	other.Owner = h.Runtime
	if err := other.Install(t.Context(), h.prov); !errors.Is(err, rowsec.ErrUnsafe) || !strings.Contains(err.Error(), "not touched") {
		t.Errorf("got %v", err)
	}
	for _, name := range []string{`x"; DROP`, "public", "pg_catalog", "$tenancy$", "tenancy_x", ""} {
		other = h.Shared
		other.Runtime = name
		if err := other.Install(t.Context(), h.prov); err == nil {
			t.Errorf("runtime group %q is accepted", name)
		}
	}
	must(t, h.super, "ALTER ROLE "+h.Owner+" BYPASSRLS")
	if err := h.Install(t.Context(), h.prov); !errors.Is(err, rowsec.ErrUnsafe) {
		t.Errorf("an owner that bypasses: got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Install(ctx, h.prov); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
