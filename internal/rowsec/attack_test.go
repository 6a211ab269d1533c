package rowsec_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// service is a schema as a service's migrations make it, with the mistakes that they make.
const service = `
	CREATE TABLE notes (id bigint PRIMARY KEY, title text NOT NULL, body text);
	SELECT tenancy_must('notes');
	CREATE TABLE pages (id bigint, tenant_id bigint, title text NOT NULL, PRIMARY KEY (tenant_id, id));
	SELECT tenancy_must('pages');
	CREATE TABLE comments (note bigint NOT NULL REFERENCES notes ON DELETE CASCADE, text text);
	SELECT tenancy_must('comments');
	CREATE TABLE footers (tenant_id bigint, page bigint NOT NULL, text text, FOREIGN KEY (tenant_id, page) REFERENCES pages (tenant_id, id));
	SELECT tenancy_must('footers');
	CREATE TABLE plans (id int GENERATED ALWAYS AS IDENTITY, name text NOT NULL);
	SELECT tenancy_may('plans');
	CREATE TABLE events (at date NOT NULL, what text) PARTITION BY RANGE (at);
	CREATE TABLE events_2026 PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
	SELECT tenancy_must('events');
	CREATE TABLE events_2027 PARTITION OF events FOR VALUES FROM ('2027-01-01') TO ('2028-01-01'); -- and not a word about it
	CREATE TABLE counted (id serial, title text);
	SELECT tenancy_must('counted');
	CREATE TABLE forgotten (secret text);
	INSERT INTO forgotten VALUES ('b-secret');
	CREATE TABLE countries (code text PRIMARY KEY);
	INSERT INTO countries VALUES ('at');
	SELECT tenancy_common('countries');
	CREATE VIEW titles AS SELECT title FROM notes;
	SELECT tenancy_view('titles');
	CREATE VIEW owners_titles AS SELECT title FROM notes; -- opened by hand: it asks as the owner
	GRANT SELECT, INSERT, UPDATE, DELETE ON owners_titles TO %[1]s;
	CREATE FUNCTION definer_titles() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER AS 'SELECT title FROM notes';
	CREATE FUNCTION definer_update() RETURNS void LANGUAGE sql SECURITY DEFINER AS $$ UPDATE notes SET title = title || '!' $$;
	CREATE MATERIALIZED VIEW filled AS SELECT title FROM notes WITH NO DATA;
`

// newService is a house with the tables of a service and a row of each tenant in each, B's with the word b-secret in it.
func newService(t *testing.T) *house {
	t.Helper()
	h := newHouse(t)
	must(t, h.owner, strings.ReplaceAll(service, "%[1]s", h.Runtime))
	must(t, h.owner, `BEGIN; SELECT tenancy_enter_host(); INSERT INTO plans (name) VALUES ('free'); COMMIT`)
	for i, login := range []string{h.a, h.b} {
		word := []string{"a-word", "b-secret"}[i]
		must(t, h.as(login), strings.NewReplacer("%d", fmt.Sprint(i+1), "%s", word).Replace(`
			INSERT INTO notes (id, title, body) VALUES (%d, '%s', '%s');
			INSERT INTO pages (id, title) VALUES (1, '%s');
			INSERT INTO comments (note, text) VALUES (%d, '%s');
			INSERT INTO footers (page, text) VALUES (1, '%s');
			INSERT INTO plans (name) VALUES ('%s');
			INSERT INTO events (at, what) VALUES ('2026-05-05', '%s'), ('2027-05-05', '%s');
			INSERT INTO counted (title) VALUES ('%s')`))
	}
	return h
}

// run sends sql as the simple protocol does, several statements at once, and returns all that came back as text and the code of the error.
func run(t *testing.T, conn *pgx.Conn, sql string) (out, state string) {
	t.Helper()
	var b strings.Builder
	results, err := conn.PgConn().Exec(t.Context(), sql).ReadAll()
	for _, r := range results {
		for _, row := range r.Rows {
			for _, v := range row {
				b.Write(v)
				b.WriteByte('\n')
			}
		}
	}
	if err != nil {
		pg, ok := errors.AsType[*pgconn.PgError](err)
		if !ok {
			t.Fatalf("%s: %v", sql, err)
		}
		state = pg.Code
		b.WriteString(pg.Message + " " + pg.Detail)
	}
	return b.String(), state
}

// foreign is all that A must not change: what is B's, the host's or nobody's.
func (h *house) foreign() string {
	h.t.Helper()
	var b strings.Builder
	for _, table := range []string{"notes", "pages", "comments", "footers", "plans", "events", "counted"} {
		b.WriteString(scan[string](h.t, h.super, `SELECT coalesce(string_agg(r::text, E'\n' ORDER BY r::text), '') FROM `+h.Schema+`.`+table+` r WHERE tenant_id IS DISTINCT FROM 7`))
	}
	for _, table := range []string{"forgotten", "countries", "tenancy_map", "tenancy_roster", "tenancy_readers", "tenancy_receipts"} {
		b.WriteString(scan[string](h.t, h.super, `SELECT coalesce(string_agg(r::text, E'\n' ORDER BY r::text), '') FROM `+h.Schema+`.`+table+` r`))
	}
	return b.String()
}

// attacks are A's, with any SQL. {a}, {b}, {owner}, {runtime} and {schema} stand for the names. state is the code of the refusal; "" is
// a statement that runs and finds or changes nothing of B's.
var attacks = []struct{ name, sql, state string }{
	{"read", `SELECT * FROM notes; SELECT * FROM pages; SELECT * FROM comments; SELECT * FROM plans; SELECT * FROM events; SELECT * FROM counted; TABLE titles`, ""},
	{"read_by_id", `SELECT * FROM notes WHERE id = 2`, ""},
	{"read_by_tenant", `SELECT * FROM notes WHERE tenant_id = 8`, ""},
	{"count", `SELECT 'b-secret' FROM (SELECT count(*) n FROM notes) c WHERE n > 1`, ""},
	{"or_true", `SELECT * FROM notes WHERE id = 1 OR true`, ""},
	{"union", `SELECT title FROM notes WHERE false UNION ALL SELECT body FROM notes UNION ALL SELECT what FROM events`, ""},
	{"lock", `SELECT * FROM notes WHERE tenant_id = 8 FOR UPDATE`, ""},
	{"update", `UPDATE notes SET title = 'x' WHERE tenant_id = 8 RETURNING *`, ""},
	{"delete", `DELETE FROM notes WHERE id = 2 RETURNING *`, ""},
	{"delete_all", `DELETE FROM comments; DELETE FROM events RETURNING *`, ""},
	{"insert_for_another", `INSERT INTO notes (id, tenant_id, title) VALUES (90, 8, 'x')`, "42501"},
	{"insert_for_nobody", `INSERT INTO notes (id, tenant_id, title) VALUES (91, NULL, 'x')`, "42501"},
	{"insert_for_the_host", `INSERT INTO plans (tenant_id, name) VALUES (NULL, 'x')`, "42501"},
	{"give_away", `UPDATE notes SET tenant_id = 8`, "42501"},
	{"give_to_the_host", `UPDATE plans SET tenant_id = NULL WHERE tenant_id = 7`, "42501"},
	{"update_the_hosts", `UPDATE plans SET name = 'x' WHERE tenant_id IS NULL`, ""},
	{"take_the_hosts", `UPDATE plans SET tenant_id = 7 WHERE tenant_id IS NULL`, ""},
	{"delete_the_hosts", `DELETE FROM plans WHERE tenant_id IS NULL`, ""},
	{"upsert_over_anothers", `INSERT INTO notes (id, title) VALUES (2, 'x') ON CONFLICT (id) DO UPDATE SET title = 'x'`, "42501"},
	{"upsert_and_return_anothers", `INSERT INTO notes (id, title) VALUES (2, 'x') ON CONFLICT (id) DO UPDATE SET title = notes.title RETURNING *`, "42501"},
	{"insert_select", `INSERT INTO pages (id, title) SELECT id + 100, title FROM notes WHERE tenant_id = 8 RETURNING *`, ""},
	{"cursor", `BEGIN; DECLARE c CURSOR FOR SELECT * FROM notes; FETCH ALL c; UPDATE notes SET title = 'x' WHERE id = 2; COMMIT`, ""},
	{"prepared_and_generic", `SET plan_cache_mode = force_generic_plan; PREPARE p AS SELECT * FROM notes WHERE tenant_id = $1; EXECUTE p (8)`, ""},
	{"parallel", `SET min_parallel_table_scan_size = 0; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET max_parallel_workers_per_gather = 2; SELECT * FROM notes; SELECT * FROM events`, ""},
	{"system_columns", `SELECT ctid, xmin, * FROM notes WHERE ctid IN ('(0,1)', '(0,2)')`, ""},
	{"query_to_xml", `SELECT query_to_xml('SELECT * FROM ' || quote_ident('{schema}') || '.notes', true, true, '')`, ""},
	{"table_to_xml", `SELECT table_to_xml('notes', true, true, '')`, ""},
	{"copy_table", `COPY notes TO STDOUT`, ""},
	{"copy_query", `COPY (SELECT * FROM notes) TO STDOUT`, ""},
	{"copy_partition", `COPY events_2027 TO STDOUT`, "42501"},
	{"copy_in", `COPY notes (id, tenant_id, title) FROM STDIN`, "0A000"},
	{"truncate", `TRUNCATE notes CASCADE`, "42501"},
	{"row_security_off", `SET row_security = off; SELECT * FROM notes`, "42501"},
	{"disable", `ALTER TABLE notes DISABLE ROW LEVEL SECURITY`, "42501"},
	{"no_force", `ALTER TABLE notes NO FORCE ROW LEVEL SECURITY`, "42501"},
	{"drop_policy", `DROP POLICY tenancy_wall ON notes`, "42501"},
	{"alter_policy", `ALTER POLICY tenancy_wall ON notes USING (true)`, "42501"},
	{"new_policy", `CREATE POLICY x ON notes USING (true)`, "42501"},
	{"trigger", `CREATE TRIGGER x BEFORE INSERT ON notes EXECUTE FUNCTION suppress_redundant_updates_trigger()`, "42501"},
	{"rule", `CREATE RULE x AS ON INSERT TO notes DO INSTEAD NOTHING`, "42501"},
	{"refer", `CREATE TEMP TABLE t (id bigint REFERENCES notes)`, "42P16"},
	{"inherit", `CREATE TEMP TABLE t () INHERITS (notes)`, "42501"},
	{"create", `CREATE TABLE {schema}.x ()`, "42501"},
	{"create_function", `CREATE FUNCTION {schema}.tenancy_tenant() RETURNS bigint LANGUAGE sql AS 'SELECT 8::bigint'`, "42501"},
	{"replace_function", `CREATE OR REPLACE FUNCTION {schema}.tenancy_tenant(who name DEFAULT current_user) RETURNS bigint LANGUAGE sql AS 'SELECT 8::bigint'`, "42501"},
	{"alter_function", `ALTER FUNCTION {schema}.tenancy_tenant SECURITY INVOKER`, "42501"},
	{"partition", `SELECT * FROM events_2026`, "42501"},
	{"partition_attached_later", `SELECT * FROM events_2027`, "42501"},
	{"write_partition", `INSERT INTO events_2027 (at, what, tenant_id) VALUES ('2027-01-01', 'x', 8)`, "42501"},
	{"forgotten_table", `SELECT * FROM forgotten`, "42501"},
	{"write_common", `INSERT INTO countries VALUES ('x')`, "42501"},
	{"materialized_view", `SELECT * FROM filled`, "42501"},
	{"refresh", `REFRESH MATERIALIZED VIEW filled`, "42501"},
	{"map", `SELECT * FROM tenancy_map`, "42501"},
	{"roster", `SELECT * FROM tenancy_roster`, "42501"},
	{"write_map", `INSERT INTO tenancy_map VALUES ('{a}', 8, gen_random_uuid(), gen_random_uuid())`, "42501"},
	{"update_map", `UPDATE tenancy_map SET id = 8`, "42501"},
	{"readers", `INSERT INTO tenancy_readers VALUES ('{a}')`, "42501"},
	{"write_marker", `UPDATE tenancy_marker SET tenant = gen_random_uuid()`, "42501"},
	{"ask_for_another", `SELECT 'b-secret' WHERE tenancy_tenant('{b}') = 8`, ""},
	{"ask_as_the_owner", `SELECT 'b-secret' WHERE tenancy_tenant('{owner}') = 8`, ""},
	{"ask_for_the_group", `SELECT 'b-secret' WHERE tenancy_tenant('{runtime}') IS NOT NULL`, ""},
	{"tenants", `SELECT * FROM tenancy_tenants()`, "42501"},
	{"enter", `SELECT tenancy_enter(8)`, "42501"},
	{"enter_by_hand", `SET tenancy.entered = '8'; SELECT * FROM notes; SELECT definer_titles(); TABLE owners_titles`, ""},
	{"enter_the_host", `SELECT tenancy_enter_host()`, "42501"},
	{"host_by_hand", `SET tenancy.entered = 'host'; SELECT * FROM notes; UPDATE plans SET name = 'x' WHERE tenant_id IS NULL; INSERT INTO plans (tenant_id, name) VALUES (NULL, 'x')`, "42501"},
	{"protect", `SELECT tenancy_must('notes')`, "42501"},
	{"protect_own", `CREATE TEMP TABLE t (); SELECT tenancy_must('t')`, "42501"},
	{"set_role_another", `SET ROLE {b}`, "42501"},
	{"set_role_owner", `SET ROLE {owner}`, "42501"},
	{"set_role_group", `SET ROLE {runtime}; SELECT title FROM notes; SELECT title FROM pages; SELECT title FROM titles; SELECT title FROM owners_titles; SELECT definer_titles(); TABLE tenancy_marker; UPDATE notes SET title = 'x'`, ""},
	{"set_role_group_and_insert", `SET ROLE {runtime}; INSERT INTO notes (id, title) VALUES (92, 'x')`, "42501"},
	{"set_session_authorization", `SET SESSION AUTHORIZATION {b}`, "42501"},
	{"role_in_settings", `SELECT set_config('role', '{b}', false)`, "42501"},
	{"session_authorization_in_settings", `SELECT set_config('session_authorization', '{b}', false)`, "42501"},
	{"owners_view", `TABLE owners_titles; UPDATE owners_titles SET title = 'x' WHERE title LIKE 'b%' RETURNING *`, ""},
	{"owners_view_and_insert", `SELECT * FROM owners_titles WHERE title = 'b-secret'; DELETE FROM owners_titles WHERE title = 'b-secret' RETURNING *`, ""},
	{"definer", `SELECT definer_titles(); SELECT definer_update()`, ""},
	{"shadow_the_map", `CREATE TEMP TABLE tenancy_map (login name, id bigint); INSERT INTO tenancy_map VALUES ('{a}', 8); SELECT * FROM notes`, ""},
	{"shadow_the_function", `CREATE FUNCTION pg_temp.tenancy_tenant(who name DEFAULT current_user) RETURNS bigint LANGUAGE sql AS 'SELECT 8::bigint'; SET search_path = pg_temp, {schema}; SELECT * FROM notes; INSERT INTO notes (id, title) VALUES (93, 'x')`, ""},
	{"shadow_an_operator", `CREATE FUNCTION pg_temp.yes(name, name) RETURNS boolean LANGUAGE sql AS 'SELECT true'; CREATE OPERATOR pg_temp.= (LEFTARG = name, RIGHTARG = name, FUNCTION = pg_temp.yes); SET search_path = pg_temp, {schema}, pg_catalog; SELECT * FROM notes`, ""},
	{"shadow_pg_has_role", `CREATE FUNCTION pg_temp.pg_has_role(name, name, text) RETURNS boolean LANGUAGE sql AS 'SELECT true'; SET search_path = pg_temp, {schema}, pg_catalog; SELECT 'b-secret' WHERE tenancy_tenant('{b}') = 8; SELECT * FROM notes`, ""},
	{"leaky_predicate", `SET enable_indexscan = off; SET enable_bitmapscan = off; CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS 'BEGIN RAISE EXCEPTION ''%'', $1; END'; DELETE FROM notes; SELECT * FROM notes WHERE pg_temp.leak(title)`, ""},
	{"leaky_predicate_on_marker", `SET enable_indexscan = off; SET enable_bitmapscan = off; CREATE FUNCTION pg_temp.leak(uuid) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS 'BEGIN IF $1::text LIKE ''bb%'' THEN RAISE EXCEPTION ''b-secret''; END IF; RETURN true; END'; SELECT * FROM tenancy_marker WHERE pg_temp.leak(tenant)`, ""},
	{"leaky_cast", `DELETE FROM notes; SELECT * FROM notes WHERE title::int = 1; SELECT * FROM owners_titles WHERE title::int = 1; SELECT * FROM titles WHERE title::int = 1`, ""},
	{"leaky_division", `SELECT * FROM notes WHERE 1 / (id - 2) < 5`, ""},
	{"leakproof_function", `CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE sql LEAKPROOF AS 'SELECT true'`, "42501"},
	{"statistics", `SELECT most_common_vals::text, histogram_bounds::text FROM pg_stats WHERE schemaname = '{schema}' AND tablename <> 'countries'`, ""},
	{"statistics_by_plan", `EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM notes WHERE title LIKE 'b%'`, ""},
	{"raw_statistics", `SELECT stavalues1::text FROM pg_statistic`, "42501"},
	{"index_expression", `CREATE INDEX ON notes (title)`, "42501"},
	{"comment", `COMMENT ON TABLE notes IS 'x'`, "42501"},
	{"grant", `GRANT SELECT ON notes TO PUBLIC`, ""},
	{"drop_owned_by_group", `DROP OWNED BY {runtime} CASCADE`, ""},
	{"reassign_owned", `REASSIGN OWNED BY {runtime} TO {a}`, ""},
	{"alter_group", `ALTER ROLE {runtime} BYPASSRLS`, "42501"},
	{"alter_self", `ALTER ROLE {a} BYPASSRLS`, "42501"},
	{"alter_self_role", `ALTER ROLE {a} SET role = '{b}'`, ""},
	{"settings_of_the_group", `SET ROLE {runtime}; ALTER ROLE {runtime} SET search_path = pg_catalog; ALTER ROLE {runtime} SET default_transaction_read_only = on`, ""},
	{"password_of_the_group", `SET ROLE {runtime}; ALTER ROLE {runtime} PASSWORD 'x'`, ""},
	{"group_that_logs_in", `SET ROLE {runtime}; ALTER ROLE {runtime} LOGIN`, "42501"},
	{"default_privileges_of_the_group", `ALTER DEFAULT PRIVILEGES FOR ROLE {runtime} GRANT ALL ON TABLES TO PUBLIC`, ""},
	{"default_privileges_of_the_owner", `ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA {schema} GRANT ALL ON TABLES TO PUBLIC`, "42501"},
	{"end_sessions", `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{b}'`, "42501"},
	{"see_statements", `SELECT query FROM pg_stat_activity WHERE usename = '{b}'`, ""},
	{"see_prepared_statements", `SELECT statement FROM pg_prepared_statements; SELECT statement FROM pg_cursors`, ""},
	{"copy_to_program", `COPY notes TO PROGRAM 'cat'`, "42501"},
	{"copy_to_file", `COPY notes TO '/tmp/x'`, "42501"},
	{"add_member", `GRANT {runtime} TO {b}`, "42501"},
	{"rename_group", `ALTER ROLE {runtime} RENAME TO {runtime}_x`, "42501"},
	{"sequence_state", `SELECT last_value FROM counted_id_seq`, "42501"},
	{"sequence_reset", `SELECT setval('counted_id_seq', 1)`, "42501"},
	{"read_file", `SELECT pg_read_file('postgresql.conf')`, "42501"},
	{"page_of_the_table", `CREATE EXTENSION pageinspect`, "42501"},
	{"large_object", `SELECT lo_get(4711)`, "42704"},
	{"temporary_view", `CREATE TEMP VIEW v AS SELECT * FROM notes; TABLE v; CREATE TEMP TABLE c AS SELECT * FROM notes; TABLE c`, ""},
	{"lateral", `SELECT n.* FROM pages p, LATERAL (SELECT * FROM notes WHERE tenant_id <> p.tenant_id) n`, ""},
	{"recursive", `WITH RECURSIVE r AS (SELECT id, title FROM notes UNION SELECT n.id, n.title FROM notes n JOIN r ON n.id <> r.id) SELECT * FROM r`, ""},
	{"merge", `MERGE INTO notes n USING (VALUES (2)) v (id) ON n.id = v.id WHEN MATCHED THEN UPDATE SET title = 'x'`, ""},
	{"merge_and_insert", `MERGE INTO notes n USING (VALUES (2)) v (id) ON n.id = v.id WHEN NOT MATCHED THEN INSERT (id, tenant_id, title) VALUES (94, 8, 'x')`, "42501"},
	{"tablesample", `SELECT * FROM notes TABLESAMPLE SYSTEM (100)`, ""},
	{"only", `SELECT * FROM ONLY notes`, ""},
	{"whole_row", `SELECT n::text, to_json(n) FROM notes n`, ""},
}

func TestATenantWithAnySQLReachesNothingOfAnothers(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.super, "ANALYZE")
	// Objects of their own make tenants stronger than they are allowed to be: with them, functions can be planted in a query.
	must(t, h.prov, "GRANT TEMPORARY ON DATABASE "+h.base.Database+" TO "+h.Runtime)
	found := fmt.Sprint(h.Verify(t.Context(), h.prov))
	if found != "rowsec: unsafe: tenants may create temporary objects, or schemas; view owners_titles asks with its owner's rights" {
		t.Error(found)
	}
	open := h.as(h.b)
	must(t, open, "SELECT 'b-secret'")
	for _, attack := range attacks {
		t.Run(attack.name, func(t *testing.T) {
			if server.Major() < 15 && strings.HasPrefix(attack.name, "merge") {
				t.Skip("MERGE is of 15")
			}
			before := h.foreign()
			conn := h.as(h.a)
			defer conn.Close(context.Background())
			// In a transaction that is rolled back, so that each attack finds the same; what it did to others is seen before.
			must(t, conn, "BEGIN")
			sql := h.fill(attack.sql)
			own := strings.Contains(sql, "COMMIT")
			out, state := run(t, conn, sql)
			if state != attack.state {
				t.Errorf("got SQLSTATE %q, want %q: %s", state, attack.state, out)
			}
			if strings.Contains(out, "b-secret") {
				t.Errorf("it got at B's rows:\n%s", out)
			}
			if state == "" && !own {
				if out, _ := run(t, conn, "COMMIT"); out != "" {
					t.Error(out)
				}
			}
			next := h.as(h.a)
			defer next.Close(context.Background())
			if out, state := run(t, next, "SELECT title FROM notes"); state != "" || strings.Contains(out, "b-secret") {
				t.Errorf("the next connection has SQLSTATE %q: %s", state, out)
			}
			theirs := h.as(h.b)
			defer theirs.Close(context.Background())
			if out, state := run(t, theirs, "INSERT INTO counted (title) VALUES ('x'); DELETE FROM counted WHERE title = 'x'; SELECT title FROM notes"); out != "b-secret\n" {
				t.Errorf("B, SQLSTATE %q, sees %q", state, out)
			}
			if after := h.foreign(); after != before {
				t.Errorf("it changed what is not A's:\n%s\nbefore:\n%s", after, before)
			}
			if now := fmt.Sprint(h.Verify(t.Context(), h.prov)); now != found {
				t.Errorf("it opened something: %s", now)
			}
			h.restore()
		})
	}
	if got := column(t, open, "SELECT title FROM notes UNION ALL SELECT title FROM titles"); len(got) != 2 {
		t.Errorf("after all attacks B sees %q", got)
	}
}

// restore gives A its rows back.
func (h *house) restore() {
	h.t.Helper()
	must(h.t, h.super, `ALTER ROLE `+h.a+` RESET ALL; SET search_path = `+h.Schema+`;
		DELETE FROM comments WHERE tenant_id = 7; DELETE FROM notes WHERE tenant_id = 7; DELETE FROM events WHERE tenant_id = 7; DELETE FROM plans WHERE tenant_id = 7;
		INSERT INTO notes (id, tenant_id, title, body) VALUES (1, 7, 'a-word', 'a-word'); INSERT INTO comments (tenant_id, note, text) VALUES (7, 1, 'a-word');
		INSERT INTO plans (tenant_id, name) VALUES (7, 'a-word'); INSERT INTO events (tenant_id, at, what) VALUES (7, '2026-05-05', 'a-word'), (7, '2027-05-05', 'a-word');
		RESET search_path`)
}

func (h *house) fill(sql string) string {
	return strings.NewReplacer("{a}", h.a, "{b}", h.b, "{owner}", h.Owner, "{runtime}", h.Runtime, "{schema}", h.Schema, "{database}", h.base.Database).Replace(sql)
}
