package rowsec_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/rowsec"
)

// controls take one guard away and repeat an attack, which then has to succeed: else the attack shows nothing.
var controls = []struct{ name, remove, attack, finds string }{
	{"row_level_security", `ALTER TABLE notes DISABLE ROW LEVEL SECURITY`, `SELECT * FROM notes`, "b-secret"},
	{"row_level_security_and_update", `ALTER TABLE notes DISABLE ROW LEVEL SECURITY`, `UPDATE notes SET title = 'stolen' WHERE tenant_id = 8 RETURNING title || tenant_id`, "stolen8"},
	{"forced_for_the_owners_view", `ALTER TABLE notes NO FORCE ROW LEVEL SECURITY`, `TABLE owners_titles`, "b-secret"},
	{"forced_for_the_owners_function", `ALTER TABLE notes NO FORCE ROW LEVEL SECURITY`, `SELECT definer_titles()`, "b-secret"},
	{"restrictive", `CREATE POLICY theirs ON notes USING (true); DROP POLICY tenancy_wall ON notes`, `SELECT * FROM notes`, "b-secret"},
	{"check_of_insert", `DROP POLICY tenancy_wall_insert ON notes`, `INSERT INTO notes (id, tenant_id, title) VALUES (90, 8, 'x'); SELECT 'inserted'`, "inserted"},
	{"check_of_update", `DROP POLICY tenancy_wall_update ON notes`, `UPDATE notes SET tenant_id = 8; SELECT 'given away'`, "given away"},
	{"check_of_the_hosts_insert", `DROP POLICY tenancy_wall_insert ON plans`, `INSERT INTO plans (tenant_id, name) VALUES (NULL, 'x'); SELECT 'inserted'`, "inserted"},
	{"check_of_the_hosts_update", `DROP POLICY tenancy_wall_update ON plans`, `UPDATE plans SET name = 'changed' WHERE tenant_id IS NULL RETURNING name`, "changed"},
	{"check_of_the_hosts_delete", `DROP POLICY tenancy_wall_delete ON plans`, `DELETE FROM plans WHERE tenant_id IS NULL RETURNING name`, "free"},
	{"wall_of_all", `ALTER POLICY tenancy_open ON notes USING (true); ALTER POLICY tenancy_wall ON notes USING (tenant_id = (SELECT tenancy_tenant()) OR true)`, `SELECT * FROM notes`, "b-secret"},
	{"check_of_some_more", `ALTER POLICY tenancy_wall_insert ON notes WITH CHECK (tenant_id = (SELECT tenancy_tenant()) OR tenant_id = 8)`, `INSERT INTO notes (id, tenant_id, title) VALUES (90, 8, 'x'); SELECT 'inserted'`, "inserted"},
	{"no_rights_on_what_nobody_protects", `GRANT SELECT ON forgotten TO {runtime}`, `SELECT * FROM forgotten`, "b-secret"},
	{"no_rights_on_partitions", `GRANT SELECT ON events_2027 TO {runtime}`, `SELECT * FROM events_2027`, "b-secret"},
	{"no_rights_on_the_map", `GRANT SELECT ON tenancy_map TO {runtime}`, `SELECT 'id ' || id FROM tenancy_map`, "id 8"},
	{"no_right_to_truncate", `GRANT TRUNCATE ON events TO {runtime}`, `TRUNCATE events; SELECT 'truncated'`, "truncated"},
	{"no_temporary_objects", `GRANT TEMPORARY ON DATABASE {database} TO {runtime}`, `CREATE TEMP TABLE notes (title text); INSERT INTO pg_temp.notes VALUES ('mine'); GRANT ALL ON pg_temp.notes TO PUBLIC;
		CREATE FUNCTION pg_temp.trojan() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'ALTER TABLE {schema}.comments DISABLE ROW LEVEL SECURITY'; RETURN NEW; END $$;
		CREATE TRIGGER trojan BEFORE UPDATE ON pg_temp.notes FOR EACH ROW EXECUTE FUNCTION pg_temp.trojan(); SELECT definer_update(); SELECT * FROM comments`, "b-secret"},
	{"no_temporary_objects_for_a_cascade", `GRANT TEMPORARY ON DATABASE {database} TO {runtime}; CREATE FUNCTION mark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN UPDATE pages SET title = title; RETURN OLD; END';
		CREATE TRIGGER mark BEFORE DELETE ON comments FOR EACH ROW EXECUTE FUNCTION mark()`, `CREATE TEMP TABLE pages (title text); INSERT INTO pg_temp.pages VALUES ('mine'); GRANT ALL ON pg_temp.pages TO PUBLIC;
		CREATE FUNCTION pg_temp.trojan() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'ALTER TABLE {schema}.footers DISABLE ROW LEVEL SECURITY'; RETURN NEW; END $$;
		CREATE TRIGGER trojan BEFORE UPDATE ON pg_temp.pages FOR EACH ROW EXECUTE FUNCTION pg_temp.trojan(); DELETE FROM notes; SELECT * FROM footers`, "b-secret"},
	{"barrier_of_the_marker", `GRANT TEMPORARY ON DATABASE {database} TO {runtime}; ALTER VIEW tenancy_marker RESET (security_barrier)`, `SET enable_indexscan = off; SET enable_bitmapscan = off; CREATE FUNCTION pg_temp.leak(uuid) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
		'BEGIN IF $1::text LIKE ''bb%'' THEN RAISE EXCEPTION ''b-secret''; END IF; RETURN true; END'; SELECT * FROM tenancy_marker WHERE pg_temp.leak(tenant)`, "b-secret"},
	{"asking_for_another", `DO $do$ BEGIN EXECUTE replace(pg_get_functiondef('tenancy_tenant(name)'::regprocedure), $$pg_has_role(session_user, m.login, 'MEMBER')$$, 'true'); END $do$`,
		`SELECT 'b is ' || tenancy_tenant('{b}')`, "b is 8"},
	{"entering_is_for_who_may_be_the_owner", `DO $do$ BEGIN EXECUTE replace(pg_get_functiondef('tenancy_tenant(name)'::regprocedure), $$pg_has_role(session_user, current_user, 'MEMBER')$$, 'true'); END $do$`,
		`SET tenancy.entered = '8'; SELECT definer_titles()`, "b-secret"},
	{"view_that_reads_what_is_closed", `CREATE VIEW closed AS SELECT * FROM forgotten; ALTER VIEW closed OWNER TO {owner}; GRANT SELECT ON closed TO {runtime}`, `TABLE closed`, "b-secret"},
	{"select_on_a_sequence", `GRANT SELECT ON counted_id_seq TO {runtime}`, `SELECT 'counted to ' || last_value FROM counted_id_seq`, "counted to 2"},
	{"column_right", `GRANT SELECT (secret) ON forgotten TO {runtime}`, `SELECT secret FROM forgotten`, "b-secret"},
	{"reader_among_the_tenants", `GRANT USAGE ON SCHEMA {schema} TO {a}; INSERT INTO tenancy_readers VALUES ('{a}'); SELECT tenancy_read('notes', false)`, `SELECT * FROM notes`, "b-secret"},
	{"a_superuser_owns_it", `ALTER ROLE {owner} BYPASSRLS`, `TABLE owners_titles`, "b-secret"},
	{"right_to_create", `GRANT CREATE ON SCHEMA {schema} TO {runtime}`, `CREATE TABLE {schema}.trap (); SELECT 'created'`, "created"},
}

// Each guard is needed, and its absence is seen: by an attack that gets through, and, where a migration could have taken it away, by Verify.
func TestWithoutEachGuardTheAttackSucceeds(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, "REVOKE ALL ON owners_titles FROM "+h.Runtime)
	if err := h.Verify(t.Context(), h.prov); err != nil {
		t.Fatal(err)
	}
	must(t, h.owner, "GRANT SELECT ON owners_titles TO "+h.Runtime)
	unseen := map[string]bool{ // Verify looks at tables, views and roles, and not into functions
		"asking_for_another": true, "entering_is_for_who_may_be_the_owner": true, "select_on_a_sequence": true,
	}
	for _, c := range controls {
		t.Run(c.name, func(t *testing.T) {
			// In transactions that are rolled back neither would see the other: the guard comes off a copy of the house.
			h := newService(t)
			attack := h.fill(c.attack)
			if out, _ := run(t, h.as(h.a), "BEGIN; "+attack+"; ROLLBACK"); strings.Contains(out, c.finds) {
				t.Fatalf("it succeeds with the guard: %s", out)
			}
			must(t, h.super, "SET search_path = "+h.Schema+"; "+h.fill(c.remove))
			if out, state := run(t, h.as(h.a), attack); !strings.Contains(out, c.finds) {
				t.Errorf("without the guard it finds SQLSTATE %q and %q", state, out)
			}
			must(t, h.owner, "REVOKE ALL ON owners_titles FROM "+h.Runtime)
			if err := h.Verify(t.Context(), h.prov); (err == nil) != unseen[c.name] {
				t.Errorf("Verify says %v", err)
			}
		})
	}
}

// What a tenant holds is looked at all the same.
func TestVerifyWaitsForNoTenant(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, "REVOKE ALL ON owners_titles FROM "+h.Runtime+"; ALTER TABLE notes NO FORCE ROW LEVEL SECURITY")
	must(t, h.prov, "SET lock_timeout = '100ms'")
	must(t, h.as(h.a), "BEGIN; LOCK TABLE notes, pages IN ACCESS EXCLUSIVE MODE")
	if err := h.Verify(t.Context(), h.prov); !errors.Is(err, rowsec.ErrUnsafe) || !strings.Contains(err.Error(), "notes has a wall that is not forced") {
		t.Errorf("Verify says %v", err)
	}
}

func TestAFurtherPolicyDoesNotWidenWhatATenantSees(t *testing.T) {
	t.Parallel()
	h := newService(t)
	must(t, h.owner, `CREATE POLICY theirs ON notes USING (true) WITH CHECK (true)`)
	if out, _ := run(t, h.as(h.a), `SELECT * FROM notes; INSERT INTO notes (id, tenant_id, title) VALUES (90, 8, 'x')`); strings.Contains(out, "b-secret") || !strings.Contains(out, "row-level security") {
		t.Error(out)
	}
}

func TestPoliciesOfTheGroupWouldBeGoneAfterDropOwned(t *testing.T) {
	t.Parallel()
	h := newService(t)
	for _, policy := range []string{"tenancy_open", "tenancy_wall"} {
		must(t, h.owner, "ALTER POLICY "+policy+" ON notes TO "+h.Runtime)
	}
	b := h.as(h.b)
	for table, want := range map[string]int{"notes": 1, "pages": 1} {
		if n := scan[int](t, b, "SELECT count(*) FROM "+table); n != want {
			t.Errorf("B sees %d rows of %s", n, table)
		}
	}
	must(t, h.as(h.a), "DROP OWNED BY "+h.Runtime)
	if scan[bool](t, h.super, "SELECT count(*) > 0 FROM pg_policies WHERE schemaname = $1 AND tablename = 'notes' AND policyname = 'tenancy_open'", h.Schema) {
		t.Skip("this server leaves the policies to their table's owner, as 15.18 does not")
	}
	for table, want := range map[string]int{"notes": 0, "pages": 1} {
		if n := scan[int](t, b, "SELECT count(*) FROM "+table); n != want {
			t.Errorf("after A's DROP OWNED B sees %d rows of %s, want %d", n, table, want)
		}
	}
	must(t, b, "INSERT INTO counted (title) VALUES ('x')") // and the right to the sequence is there
	must(t, h.owner, "CREATE TABLE later (id serial); SELECT tenancy_must('later')")
	must(t, b, "INSERT INTO later DEFAULT VALUES") // and to later ones
}

func TestTheLibrarysFunctionsLookNothingUpInTheCallersPath(t *testing.T) {
	t.Parallel()
	h := newService(t)
	if got := column(t, h.super, `SELECT proname::text FROM pg_proc WHERE pronamespace = $1::text::regnamespace AND proname LIKE 'tenancy\_%'
		AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)`, h.Schema); len(got) > 0 {
		t.Errorf("without a path of their own: %q", got)
	}
	// Somebody gave A a schema, and A has put a function there.
	must(t, h.super, "CREATE SCHEMA evil AUTHORIZATION "+h.a)
	a := h.as(h.a)
	must(t, a, "GRANT USAGE ON SCHEMA evil TO PUBLIC; CREATE FUNCTION evil.pg_has_role(name, name, text) RETURNS boolean LANGUAGE sql AS 'SELECT $1 <> $2'")
	attack := h.fill("SET search_path = evil, pg_catalog, {schema}; SELECT 'b is ' || tenancy_tenant('{b}')")
	if out, _ := run(t, a, attack); strings.Contains(out, "b is 8") {
		t.Error("A's function was asked")
	}
	must(t, h.super, h.fill("ALTER FUNCTION {schema}.tenancy_tenant RESET search_path"))
	if out, _ := run(t, h.as(h.a), attack); !strings.Contains(out, "b is 8") {
		t.Errorf("without a path of its own it answers %q", out)
	}
}
