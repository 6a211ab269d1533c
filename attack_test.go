package tenancy_test

import (
	"bytes"
	"context"
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

// treasure stands in a row of the tenant that is attacked. Wherever else it shows, a wall has fallen.
const treasure = "globex-treasure"

// attack is SQL by which one tenant, A, reaches for another, B. Names in braces are replaced by those of the fleet.
type attack struct {
	name  string
	state string // the server's answer to the last statement; "": accepted, and without effect on anyone else
	sql   []string
	reads bool // run by one whom no wall stops, the last statement returns the treasure
}

func sql(statements ...string) []string { return statements }

// attacks are those of a runtime login, which is what an SQL injection in the service has.
func attacks() []attack {
	list := []attack{
		// Reading.
		{"qualified_name", "42501", sql(`SELECT title FROM {B}.notes`), true},
		{"set_search_path", "42P01", sql(`SET search_path = {B}`, `SELECT title FROM notes`), false},
		{"set_config_search_path", "42P01", sql(`SELECT set_config('search_path', '{B}', false)`, `SELECT title FROM notes`), false},
		{"reset_search_path", "42501", sql(`RESET search_path`, `SELECT title FROM {B}.notes`), true},
		{"regclass", "42501", sql(`SELECT '{B}.notes'::regclass`), false},
		{"copy_out", "42501", sql(`COPY {B}.notes TO STDOUT`), true},
		{"copy_to_program", "42501", sql(`COPY notes TO PROGRAM 'true'`), false},
		{"copy_to_file", "42501", sql(`COPY notes TO '/tmp/tenancy-never-written'`), false},
		{"one_select_with_role", "42501", sql(`SELECT set_config('role', '{Bo}', false), query_to_xml($1, true, false, '')`), true},
		{"one_select_with_search_path", "42501", sql(`SELECT set_config('search_path', '{B}', false), query_to_xml($1, true, false, '')`), true},
		{"table_by_oid_to_xml", "42501", sql(`SELECT table_to_xml((SELECT oid FROM pg_class WHERE relname = 'notes' AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = '{B}')), true, false, '')`), true},
		{"schema_to_xml", "42501", sql(`SELECT schema_to_xml('{B}', true, false, '')`), true},
		{"cursor", "42501", sql(`BEGIN`, `DECLARE c CURSOR FOR SELECT title FROM {B}.notes`, `FETCH ALL FROM c`), true},
		{"prepared_statement", "42501", sql(`PREPARE p AS SELECT title FROM {B}.notes`, `EXECUTE p`), true},
		{"explain_analyze", "42501", sql(`EXPLAIN ANALYZE SELECT title FROM {B}.notes`), false},
		{"temporary_view", "42501", sql(`CREATE TEMP VIEW v AS SELECT title FROM {B}.notes`, `SELECT title FROM v`), true},
		{"temporary_function", "42501", sql(`CREATE FUNCTION pg_temp.f() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER BEGIN ATOMIC SELECT title FROM {B}.notes; END`, `SELECT pg_temp.f()`), true},
		{"temporary_function_late", "42501", sql(`CREATE FUNCTION pg_temp.f() RETURNS SETOF text LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN RETURN QUERY EXECUTE 'SELECT title FROM {B}.notes'; END $$`, `SELECT pg_temp.f()`), true},
		{"inherit_from_it", "42501", sql(`CREATE TEMP TABLE c () INHERITS ({B}.notes)`), false},
		{"like_it", "42501", sql(`CREATE TEMP TABLE c (LIKE {B}.notes)`), false},
		{"its_marker", "42501", sql(`SELECT tenant FROM {B}.tenancy_marker`), false},
		{"its_version_table", "42501", sql(`SELECT version_id FROM {B}.goose_db_version`), false},
		{"its_sequence", "42501", sql(`SELECT nextval('{B}.notes_id_seq')`), false},
		{"its_sequence_by_oid", "42501", sql(`SELECT nextval((SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = '{B}' AND relname = 'notes_id_seq'))`), false},
		{"its_statistics", "", sql(`SELECT most_common_vals::text, histogram_bounds::text FROM pg_stats WHERE schemaname = '{B}' AND attname = 'title'`), true},
		{"its_statistics_raw", "42501", sql(`SELECT * FROM pg_statistic`), false},
		{"its_large_object", "42501", sql(`SELECT convert_from(lo_get({Blo}), 'UTF8')`), true},
		{"its_large_object_raw", "42501", sql(`SELECT data FROM pg_largeobject`), true},
		{"its_running_query", "", sql(`SELECT query FROM pg_stat_activity WHERE usename = '{Bl}'`), true},

		// Becoming someone else.
		{"reset_role", "42501", sql(`RESET ROLE`, `SELECT title FROM {B}.notes`), true},
		{"role_none", "42501", sql(`SELECT set_config('role', 'none', false)`, `SELECT title FROM {B}.notes`), true},
		{"own_runtime_group_has_no_more", "42501", sql(`SET ROLE {Ar}`, `SELECT title FROM {B}.notes`), false},
		{"tenants_group_has_no_more", "42501", sql(`SET ROLE {G}`, `SELECT title FROM {B}.notes`), false},
		{"tenants_group_cannot_create", "42501", sql(`SET ROLE {G}`, `CREATE TABLE tenancy_ref.evil ()`), false},
		{"session_authorization_default", "42501", sql(`SET SESSION AUTHORIZATION DEFAULT`, `SELECT title FROM {B}.notes`), true},
		{"role_in_a_block", "42501", sql(`DO $$ BEGIN EXECUTE 'SET ROLE {Bo}'; END $$`, `SELECT title FROM {B}.notes`), true},

		// Writing.
		{"insert", "42501", sql(`INSERT INTO {B}.notes (tenant, title) VALUES ('acme', 'evil')`), false},
		{"update", "42501", sql(`UPDATE {B}.notes SET title = 'evil'`), false},
		{"delete", "42501", sql(`DELETE FROM {B}.notes`), false},
		{"truncate", "42501", sql(`TRUNCATE {B}.notes`), false},
		{"merge", "42501", sql(`MERGE INTO {B}.notes n USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE`), false},
		{"copy_in_from_program", "42501", sql(`COPY notes FROM PROGRAM 'true'`), false},
		{"lock", "42501", sql(`BEGIN`, `LOCK TABLE {B}.notes`), false},
		{"lock_its_marker", "42501", sql(`BEGIN`, `LOCK TABLE {B}.tenancy_marker`), false},
		{"lock_own_marker", "42501", sql(`BEGIN`, `LOCK TABLE tenancy_marker`), false},
		{"analyze", "42501", sql(`ANALYZE {B}.notes`), false},
		{"foreign_key_to_it", "42501", sql(`CREATE TEMP TABLE c (id bigint REFERENCES {B}.notes)`), false},
		{"write_its_large_object", "42501", sql(`SELECT lo_put({Blo}, 0, 'evil')`), false},
		{"unlink_its_large_object", "42501", sql(`SELECT lo_unlink({Blo})`), false},
		{"comment", "42501", sql(`COMMENT ON SCHEMA {B} IS 'evil'`), false},

		// The library's own tables in A's schema.
		{"insert_marker", "42501", sql(`INSERT INTO tenancy_marker VALUES (gen_random_uuid(), gen_random_uuid())`), false},
		{"update_marker", "42501", sql(`UPDATE tenancy_marker SET tenant = gen_random_uuid()`), false},
		{"delete_marker", "42501", sql(`DELETE FROM tenancy_marker`), false},
		{"truncate_marker", "42501", sql(`TRUNCATE tenancy_marker`), false},
		{"drop_marker", "42501", sql(`DROP TABLE tenancy_marker`), false},
		{"insert_version", "42501", sql(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, true)`), false},
		{"update_version", "42501", sql(`UPDATE goose_db_version SET version_id = 99`), false},
		{"delete_version", "42501", sql(`DELETE FROM goose_db_version`), false},
		{"truncate_version", "42501", sql(`TRUNCATE goose_db_version`), false},
		{"nextval_of_version", "42501", sql(`SELECT nextval('goose_db_version_id_seq')`), false},
		{"setval_of_version", "42501", sql(`SELECT setval('goose_db_version_id_seq', 99)`), false},

		// Making things, and changing what was made.
		{"create_schema", "42501", sql(`CREATE SCHEMA evil`), false},
		{"create_schema_for_it", "42501", sql(`CREATE SCHEMA evil AUTHORIZATION {Al}`), false},
		{"security_definer", "42501", sql(`CREATE FUNCTION f() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'`), false},
		{"trigger", "42501", sql(`CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'`, `CREATE TRIGGER evil BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION pg_temp.f()`), false},
		{"rule", "42501", sql(`CREATE RULE evil AS ON INSERT TO notes DO INSTEAD NOTHING`), false},
		{"policy", "42501", sql(`CREATE POLICY evil ON notes USING (true)`), false},
		{"index", "42501", sql(`CREATE INDEX evil ON notes (title)`), false},
		{"alter_table", "42501", sql(`ALTER TABLE notes ADD COLUMN evil int`), false},
		{"alter_owner", "42501", sql(`ALTER TABLE notes OWNER TO {Al}`), false},
		{"alter_schema_owner", "42501", sql(`ALTER SCHEMA {A} OWNER TO {Al}`), false},
		{"rename_schema", "42501", sql(`ALTER SCHEMA {A} RENAME TO evil`), false},
		{"rename_its_schema", "42501", sql(`ALTER SCHEMA {B} RENAME TO evil`), false},
		{"drop_table", "42501", sql(`DROP TABLE notes`), false},
		{"drop_its_table", "42501", sql(`DROP TABLE {B}.notes`), false},
		{"drop_its_schema", "42501", sql(`DROP SCHEMA {B} CASCADE`), false},
		{"truncate_own", "42501", sql(`TRUNCATE notes`), false},
		{"disable_triggers", "42501", sql(`ALTER TABLE notes DISABLE TRIGGER ALL`), false},
		{"replication_role", "42501", sql(`SET session_replication_role = replica`), false},
		{"default_privileges_of_the_owner", "42501", sql(`ALTER DEFAULT PRIVILEGES FOR ROLE {Ao} GRANT ALL ON TABLES TO PUBLIC`), false},
		{"default_privileges_of_another_owner", "42501", sql(`ALTER DEFAULT PRIVILEGES FOR ROLE {Bo} GRANT ALL ON TABLES TO {Al}`), false},
		{"own_default_privileges_in_its_schema", "", sql(`ALTER DEFAULT PRIVILEGES IN SCHEMA {B} GRANT ALL ON TABLES TO {Al}`), false}, // for what A would make there
		{"default_privileges_of_the_provisioner", "42501", sql(`ALTER DEFAULT PRIVILEGES FOR ROLE {P} GRANT ALL ON TABLES TO {Al}`), false},

		// Giving away, and taking. Some are answered with a warning alone: then nothing may have changed.
		{"write_reference_table", "42501", sql(`INSERT INTO tenancy_ref.countries VALUES ('evil')`), false},
		{"close_reference_table", "", sql(`REVOKE SELECT ON tenancy_ref.countries FROM PUBLIC, {G}`), false},
		{"open_schema_to_all", "", sql(`GRANT USAGE ON SCHEMA {A} TO PUBLIC`), false},
		{"open_schema_to_it", "", sql(`GRANT USAGE ON SCHEMA {A} TO {Bl}`), false},
		{"open_table_to_all", "", sql(`GRANT SELECT ON notes TO PUBLIC`), false},
		{"open_database_to_all", "", sql(`GRANT CONNECT ON DATABASE {DB} TO PUBLIC`), false},
		{"close_database_to_all", "", sql(`REVOKE CONNECT ON DATABASE {DB} FROM {G}`), false},
		{"close_extensions_to_all", "", sql(`REVOKE USAGE ON SCHEMA tenancy_ext FROM {G}`), false},
		{"take_its_schema", "42501", sql(`GRANT USAGE ON SCHEMA {B} TO {Al}`), false},
		{"take_its_table", "42501", sql(`GRANT SELECT ON {B}.notes TO {Al}`), false},
		{"drop_owned_by_the_group", "", sql(`DROP OWNED BY {G}`), false},
		{"reassign_owned_by_the_group", "", sql(`REASSIGN OWNED BY {G} TO {Al}`), false},
		{"drop_owned_by_it", "42501", sql(`DROP OWNED BY {Bl}`), false},
		{"reassign_owned_by_it", "42501", sql(`REASSIGN OWNED BY {Bo} TO {Al}`), false},

		// The server.
		{"create_role", "42501", sql(`CREATE ROLE evil_{DB}`), false},
		{"drop_role", "42501", sql(`DROP ROLE {Bl}`), false},
		{"rename_role", "0A000", sql(`ALTER ROLE {Al} RENAME TO evil_{DB}`), false},
		{"rename_its_role", "42501", sql(`ALTER ROLE {Bl} RENAME TO evil_{DB}`), false},
		{"its_password", "42501", sql(`ALTER ROLE {Bl} PASSWORD 'evil'`), false},
		{"its_login", "42501", sql(`ALTER ROLE {Bl} NOLOGIN`), false},
		{"its_settings", "42501", sql(`ALTER ROLE {Bl} SET search_path = {A}`), false},
		{"the_provisioners_password", "42501", sql(`ALTER ROLE {P} PASSWORD 'evil'`), false},
		{"settings_of_all", "42501", sql(`ALTER ROLE ALL SET search_path = {A}`), false},
		{"settings_of_the_database", "42501", sql(`ALTER DATABASE {DB} SET search_path = {A}`), false},
		{"settings_of_the_server", "42501", sql(`ALTER SYSTEM SET work_mem = '1GB'`), false},
		{"own_the_database", "42501", sql(`ALTER DATABASE {DB} OWNER TO {Al}`), false},
		{"create_database", "42501", sql(`CREATE DATABASE evil_{DB}`), false},
		{"drop_database", "42501", sql(`DROP DATABASE {PRIMARY}`), false},
		{"extension_dblink", "42501", sql(`CREATE EXTENSION dblink SCHEMA {A}`), false},
		{"extension_postgres_fdw", "42501", sql(`CREATE EXTENSION postgres_fdw SCHEMA {A}`), false},
		{"trusted_extension", "42501", sql(`CREATE EXTENSION hstore SCHEMA {A}`), false},
		{"foreign_data_wrapper", "42501", sql(`CREATE FOREIGN DATA WRAPPER evil`), false},
		{"event_trigger", "42501", sql(`CREATE FUNCTION pg_temp.e() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'`, `CREATE EVENT TRIGGER evil ON ddl_command_start EXECUTE FUNCTION pg_temp.e()`), false},
		{"publication", "42501", sql(`CREATE PUBLICATION evil`), false},
		{"load_a_library", "42501", sql(`LOAD 'dblink'`), false},
		{"end_its_session", "42501", sql(`SELECT pg_terminate_backend({Bpid})`), false},
		{"cancel_its_query", "42501", sql(`SELECT pg_cancel_backend({Bpid})`), false},
		{"reload", "42501", sql(`SELECT pg_reload_conf()`), false},
		{"passwords", "42501", sql(`SELECT rolpassword FROM pg_authid`), false},
		{"passwords_by_view", "42501", sql(`SELECT passwd FROM pg_shadow`), false},
		{"read_a_file", "42501", sql(`SELECT pg_read_file('PG_VERSION')`), false},
		{"list_files", "42501", sql(`SELECT pg_ls_dir('.')`), false},
		{"import_a_file", "42501", sql(`SELECT lo_import('PG_VERSION')`), false},
		{"hba_rules", "42501", sql(`SELECT * FROM pg_hba_file_rules`), false},
	}
	for _, who := range []string{"{Bo}", "{Br}", "{Bl}", "{Ao}", "{P}", "{C}", "{S}"} {
		list = append(list,
			attack{"set_role_" + who, "42501", sql(`SET ROLE ` + who), false},
			attack{"set_local_role_" + who, "42501", sql(`BEGIN`, `SET LOCAL ROLE `+who), false},
			attack{"set_config_role_" + who, "42501", sql(`SELECT set_config('role', '` + who + `', false)`), false},
			attack{"session_authorization_" + who, "42501", sql(`SET SESSION AUTHORIZATION ` + who), false},
			attack{"membership_in_" + who, "42501", sql(`GRANT ` + who + ` TO {Al}`), false},
		)
	}
	for _, schema := range []string{"public", "{B}", "tenancy_ext", "tenancy_ref", "{A}", "pg_catalog"} {
		list = append(list,
			attack{"create_table_in_" + schema, "42501", sql(`CREATE TABLE ` + schema + `.evil ()`), false},
			attack{"create_view_in_" + schema, "42501", sql(`CREATE VIEW ` + schema + `.evil AS SELECT 1`), false},
			attack{"create_function_in_" + schema, "42501", sql(`CREATE FUNCTION ` + schema + `.evil() RETURNS int LANGUAGE sql AS 'SELECT 1'`), false},
		)
	}
	for _, right := range []string{"SUPERUSER", "CREATEROLE", "CREATEDB", "BYPASSRLS", "REPLICATION", "CONNECTION LIMIT 1000", "VALID UNTIL 'infinity'"} {
		list = append(list, attack{"own_" + strings.ToLower(strings.Fields(right)[0]), "42501", sql(`ALTER ROLE {Al} ` + right), false})
	}
	return list
}

// ownersAttacks are those of the role that migrations run as. What it owns it may change; the rest is as closed to it.
func ownersAttacks() (list []attack) {
	own := map[string]bool{ // within its own schema the owner is free
		"security_definer": true, "trigger": true, "rule": true, "policy": true, "index": true, "alter_table": true, "alter_owner": true,
		"alter_schema_owner": true, "rename_schema": true, "drop_table": true, "truncate_own": true, "disable_triggers": true,
		"default_privileges_of_the_owner": true, "set_role_{Ao}": true, "set_local_role_{Ao}": true, "set_config_role_{Ao}": true,
		"create_table_in_{A}": true, "create_view_in_{A}": true, "create_function_in_{A}": true, "session_authorization_{Ao}": true,
		"open_schema_to_all": true, "open_schema_to_it": true, "open_table_to_all": true, "lock_own_marker": true,
		"insert_marker": true, "update_marker": true, "delete_marker": true, "truncate_marker": true, "drop_marker": true,
		"insert_version": true, "update_version": true, "delete_version": true, "truncate_version": true,
		"nextval_of_version": true, "setval_of_version": true,
		"own_runtime_group_has_no_more": true,
	}
	for _, a := range attacks() {
		if !own[a.name] {
			for i, s := range a.sql {
				a.sql[i] = strings.ReplaceAll(s, "{Al}", "{Ao}")
			}
			list = append(list, a)
		}
	}
	return append(list,
		attack{"login_joins_the_owner", "42501", sql(`GRANT {Ao} TO {Al}`), false},
		attack{"login_becomes_superuser", "42501", sql(`ALTER ROLE {Al} SUPERUSER`), false},
		attack{"logins_password", "42501", sql(`ALTER ROLE {Al} PASSWORD 'evil'`), false},
		attack{"become_the_runtime_group", "42501", sql(`SET ROLE {Ar}`), false},
		attack{"give_a_table_to_the_provisioner", "42501", sql(`ALTER TABLE notes OWNER TO {P}`), false},
		attack{"view_on_its_table", "42501", sql(`CREATE VIEW evil AS SELECT title FROM {B}.notes`, `SELECT title FROM evil`), true},
		attack{"function_that_becomes_it", "42501", sql(`BEGIN`, `CREATE FUNCTION evil() RETURNS SETOF text LANGUAGE plpgsql AS $$ BEGIN RESET ROLE; SET ROLE {Bo}; RETURN QUERY EXECUTE 'SELECT title FROM {B}.notes'; END $$`, `SELECT evil()`), false},
	)
}

// battle is a fleet with two tenants: A attacks, B has the treasure.
type battle struct {
	f     *tenancytest.Fleet
	tn    *tenancy.Tenancy
	a, b  tenancy.Tenant
	A, B  placeRow
	admin *pgx.Conn // on the tenants' database
	names *strings.Replacer
}

func newBattle(t *testing.T) *battle {
	t.Helper()
	f := tenancytest.NewFleet(t)
	w := &battle{f: f, tn: f.Open(t, tenancy.Config{Migrations: noteMigrations}), admin: f.Admin(t, "tenants")}
	w.a, w.b = create(t, f, w.tn, "acme"), create(t, f, w.tn, "globex")
	w.A, w.B = placeOf(t, f, w.a.ID), placeOf(t, f, w.b.ID)

	victim := login(t, w.tn, w.b.ID) // stays connected: a session to be seen, cancelled and ended
	must(t, victim, `INSERT INTO notes (tenant, title) SELECT 'globex', '`+treasure+`' FROM generate_series(1, 50)`)
	lo := scan[uint32](t, victim, `SELECT lo_from_bytea(0, convert_to('`+treasure+`', 'UTF8'))`)
	must(t, w.admin, "ANALYZE "+w.B.table("notes"))
	provisioner := connectURL(t, f.ServerURL)
	must(t, provisioner, `CREATE TABLE tenancy_ref.countries (code text)`)
	database := w.admin.Config().Database
	fleet := strings.TrimSuffix(database, "_tenants")
	w.names = strings.NewReplacer(
		"{A}", w.A.Schema, "{Ao}", w.A.Owner, "{Ar}", w.A.Runtime, "{Al}", w.A.Login,
		"{B}", w.B.Schema, "{Bo}", w.B.Owner, "{Br}", w.B.Runtime, "{Bl}", w.B.Login,
		"{Blo}", fmt.Sprint(lo), "{Bpid}", fmt.Sprint(victim.PgConn().PID()),
		"{DB}", database, "{PRIMARY}", fleet+"_primary", "{G}", database+"_tenants",
		"{P}", fleet+"_provisioner", "{C}", fleet+"_catalog", "{S}", w.admin.Config().User)
	t.Cleanup(func() {
		if victim.IsClosed() || victim.Ping(context.Background()) != nil {
			t.Error("the session of tenant B has ended")
		}
	})
	return w
}

// run runs the attack on conn and returns the code of the first refusal, and whether the treasure was seen.
func (w *battle) run(ctx context.Context, conn *pgx.Conn, a attack) (state string, leaked bool, err error) {
	for _, s := range a.sql {
		var out bytes.Buffer
		s = w.names.Replace(s)
		if strings.HasPrefix(s, "COPY") && strings.HasSuffix(s, "STDOUT") {
			_, err = conn.PgConn().CopyTo(ctx, &out, s)
		} else {
			var args []any
			if strings.Contains(s, "$1") {
				args = append(args, w.names.Replace(`SELECT title FROM {B}.notes WHERE title <> tenant`))
			}
			rows, _ := conn.Query(ctx, s, args...)
			for rows.Next() {
				for _, v := range rows.RawValues() {
					out.Write(v)
				}
			}
			err = rows.Err()
		}
		leaked = leaked || strings.Contains(out.String(), treasure)
		if err != nil {
			return sqlState(err), leaked, err
		}
	}
	return "", leaked, nil
}

// world is everything an attack could change for someone else, a line each, as a superuser sees it. A's own default
// privileges and settings are its own affair.
func (w *battle) world(t *testing.T) []string {
	t.Helper()
	rows, err := w.admin.Query(t.Context(), `
		WITH fleet AS (SELECT r.* FROM pg_authid r WHERE r.rolname = $1 OR r.rolname = (SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database())
				OR r.oid IN (SELECT member FROM pg_auth_members m JOIN pg_authid g ON g.oid = m.roleid WHERE g.rolname = $1) OR r.rolname LIKE 'evil%'
				OR r.rolname IN ($2 || '_r', $3 || '_r')),
			relation AS (SELECT c.*, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname !~ '^pg_(temp|toast)' AND n.nspname <> 'information_schema')
		SELECT concat_ws(' ', 'role', rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit, rolvaliduntil, rolpassword) FROM fleet
		UNION ALL SELECT concat_ws(' ', 'member', roleid::regrole, member::regrole, admin_option) FROM pg_auth_members WHERE roleid IN (SELECT oid FROM fleet) OR member IN (SELECT oid FROM fleet)
		UNION ALL SELECT concat_ws(' ', 'database', datname, pg_get_userbyid(datdba), datacl) FROM pg_database WHERE datname LIKE split_part(current_database(), '_', 1) || '%' OR datname LIKE 'evil%'
		UNION ALL SELECT concat_ws(' ', 'schema', nspname, pg_get_userbyid(nspowner), nspacl) FROM pg_namespace WHERE nspname !~ '^pg_(temp|toast)'
		UNION ALL SELECT concat_ws(' ', 'relation', nspname, relname, relkind, pg_get_userbyid(relowner), relacl, relhasrules, relrowsecurity, relnatts) FROM relation
		UNION ALL SELECT concat_ws(' ', 'trigger', tgrelid::regclass, tgname, tgenabled) FROM pg_trigger
		UNION ALL SELECT concat_ws(' ', 'routine', p.oid::regprocedure, p.proacl) FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname !~ '^pg_temp' AND (nspname NOT IN ('pg_catalog', 'information_schema') OR p.oid > 16383)
		UNION ALL SELECT concat_ws(' ', 'extension', extname) FROM pg_extension
		UNION ALL SELECT concat_ws(' ', 'default', defaclrole::regrole, defaclnamespace::regnamespace, defaclobjtype, defaclacl) FROM pg_default_acl WHERE defaclrole NOT IN (SELECT oid FROM pg_roles WHERE rolname IN ($2 || '_o', $2 || '_l1'))
		UNION ALL SELECT concat_ws(' ', 'setting', s.*) FROM pg_db_role_setting s WHERE setrole NOT IN (SELECT oid FROM pg_roles WHERE rolname IN ($2 || '_o', $2 || '_l1'))
			AND (setrole IN (0, 10) OR setrole IN (SELECT oid FROM fleet) OR setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()))
			AND (setrole IN (SELECT oid FROM fleet) OR setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))) -- other tests' databases have their own
			AND setrole NOT IN (SELECT oid FROM pg_roles WHERE rolname LIKE 't\_%\_reader') -- and their readers
		UNION ALL SELECT concat_ws(' ', 'large object', oid, pg_get_userbyid(lomowner), lomacl) FROM pg_largeobject_metadata
		UNION ALL SELECT concat_ws(' ', 'large object page', loid, pageno, data) FROM pg_largeobject
		UNION ALL SELECT concat_ws(' ', 'note', n.*) FROM `+w.B.table("notes")+` n
		UNION ALL SELECT concat_ws(' ', 'note of A', n.*) FROM `+w.A.table("notes")+` n
		UNION ALL SELECT concat_ws(' ', 'marker', n.*) FROM `+w.B.table("tenancy_marker")+` n
		UNION ALL SELECT concat_ws(' ', 'marker of A', n.*) FROM `+w.A.table("tenancy_marker")+` n
		UNION ALL SELECT concat_ws(' ', 'version of A', n.*) FROM `+w.A.table("goose_db_version")+` n
		UNION ALL SELECT concat_ws(' ', 'sequence', last_value) FROM `+w.B.table("notes_id_seq"),
		w.admin.Config().Database+"_tenants", w.A.Schema, w.B.Schema)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

// difference lists the lines that only one of the two has.
func difference(before, after []string) (d []string) {
	for _, l := range before {
		if !slices.Contains(after, l) {
			d = append(d, "- "+l)
		}
	}
	for _, l := range after {
		if !slices.Contains(before, l) {
			d = append(d, "+ "+l)
		}
	}
	return d
}

// repel runs the attacks, each on a connection of its own, and checks the server's answer and the world after it.
func (w *battle) repel(t *testing.T, list []attack, with func(fn func(conn *pgx.Conn)) error) {
	before := w.world(t)
	for _, a := range list {
		t.Run(a.name, func(t *testing.T) {
			err := with(func(conn *pgx.Conn) {
				state, leaked, err := w.run(t.Context(), conn, a)
				if state != a.state {
					t.Errorf("the server answered %q (%v), want %q", state, err, a.state)
				}
				if leaked {
					t.Error("the other tenant's row was read")
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			after := w.world(t)
			if d := difference(before, after); len(d) > 0 {
				t.Errorf("it has changed:\n%s", strings.Join(d, "\n"))
			}
			before = after
		})
	}
}

func TestRuntimeLoginReachesNoOtherTenant(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	d, err := w.tn.Catalog().SourceForTest(t.Context(), w.a.ID)
	if err != nil {
		t.Fatal(err)
	}
	w.repel(t, attacks(), func(fn func(*pgx.Conn)) error {
		conn, err := connectTo(t, d)
		if err != nil {
			return err
		}
		defer conn.Close(t.Context())
		fn(conn)
		return nil
	})
}

func TestSQLThroughDBReachesNoOtherTenant(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	ctx, other := tenancytest.Context(t, w.tn, "acme"), tenancytest.Context(t, w.tn, "globex")
	w.repel(t, attacks(), func(fn func(*pgx.Conn)) error {
		return w.tn.DB().WithConn(ctx, func(_ context.Context, conn *pgx.Conn) error { fn(conn); return nil })
	})
	// What the attacks left on connections has poisoned none of them.
	for range 20 {
		for ctx, name := range map[context.Context]string{ctx: "acme", other: "globex"} {
			var got string
			if err := w.tn.DB().QueryRow(ctx, `SELECT string_agg(DISTINCT tenant, ',') FROM notes`).Scan(&got); err != nil || got != name {
				t.Fatalf("%s reads the rows of %q: %v", name, got, err)
			}
		}
	}
}

func TestOwnerReachesNoOtherTenant(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	d := w.lendOwner(t)
	w.repel(t, ownersAttacks(), func(fn func(*pgx.Conn)) error {
		conn, err := connectTo(t, d)
		if err != nil {
			return err
		}
		defer conn.Close(t.Context())
		fn(conn)
		return nil
	})
}

// lendOwner lets A's owner log in, as a migration does for its time.
func (w *battle) lendOwner(t *testing.T) tenancy.DataSource {
	t.Helper()
	d, err := w.tn.Catalog().SourceForTest(t.Context(), w.a.ID)
	if err != nil {
		t.Fatal(err)
	}
	d.User = w.A.Owner
	must(t, w.admin, w.names.Replace(`ALTER ROLE {Ao} LOGIN VALID UNTIL 'infinity' PASSWORD '`)+d.Password.Reveal()+`'`)
	return d
}

// TestAttacksFindWhatNoWallProtects shows that the attacks have teeth: where the wall is taken away, they get the row.
func TestAttacksFindWhatNoWallProtects(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	w.lendOwner(t)
	shared, err := w.tn.Catalog().SourceForTest(t.Context(), w.a.ID)
	if err != nil {
		t.Fatal(err)
	}
	// The weak model: one login for all, which is a member of every owner.
	must(t, w.admin, w.names.Replace(`GRANT {Ao}, {Bo} TO {Al}`))
	asShared := map[string]bool{"qualified_name": true, "copy_out": true, "one_select_with_role": true, "reset_role": true, "role_in_a_block": true,
		"temporary_view": true, "table_by_oid_to_xml": true, "session_authorization_default": true}
	tried := 0
	for _, a := range attacks() {
		if !a.reads {
			continue
		}
		tried++
		t.Run("superuser/"+a.name, func(t *testing.T) {
			admin := w.f.Admin(t, "tenants")
			if state, leaked, err := w.run(t.Context(), admin, a); !leaked {
				t.Errorf("the row was not found: %s %v", state, err)
			}
		})
		if asShared[a.name] {
			t.Run("shared_login/"+a.name, func(t *testing.T) {
				conn, err := connectTo(t, shared)
				if err != nil {
					t.Fatal(err)
				}
				must(t, conn, w.names.Replace(`SET ROLE {Ar}`))
				must(t, conn, `RESET ROLE`) // what an injected statement can always do
				if state, leaked, err := w.run(t.Context(), conn, a); !leaked {
					t.Errorf("the row was not found: %s %v", state, err)
				}
			})
		}
	}
	if tried < 15 {
		t.Errorf("only %d attacks read", tried)
	}
	before := w.world(t)
	must(t, w.admin, w.names.Replace(`UPDATE {B}.notes SET title = 'evil' WHERE id = 1`))
	must(t, w.admin, w.names.Replace(`GRANT USAGE ON SCHEMA {B} TO PUBLIC`))
	if d := difference(before, w.world(t)); len(d) != 4 {
		t.Errorf("a changed row and a changed grant look like %q", d)
	}
}

func TestTenantLoginsCannotConnectElsewhere(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	other := tenancytest.NewFleet(t)
	for _, database := range []string{w.f.Admin(t, "primary").Config().Database, other.Admin(t, "tenants").Config().Database, other.Admin(t, "primary").Config().Database} {
		d, err := w.tn.Catalog().SourceForTest(t.Context(), w.a.ID)
		if err != nil {
			t.Fatal(err)
		}
		d.Database, d.Schema = database, ""
		if _, err := connectTo(t, d); sqlState(err) != "42501" {
			t.Errorf("connecting to %s: %v, want 42501", database, err)
		}
		d.User = w.A.Owner
		if _, err := connectTo(t, d); sqlState(err) != "28P01" && sqlState(err) != "28000" {
			t.Errorf("the owner connecting to %s: %v, want a refused login", database, err)
		}
	}
}

// trojan is what a tenant plants where a migration will step on it: every way up, and none of them aborts the migration.
const trojan = `CREATE FUNCTION trojan() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE way text;
BEGIN
	FOREACH way IN ARRAY ARRAY['ALTER ROLE {Al} SUPERUSER', 'ALTER ROLE {Al} CREATEROLE', 'ALTER ROLE {Ao} SUPERUSER', 'ALTER ROLE {Ao} CREATEROLE', 'GRANT {Bo} TO {Al}', 'GRANT {Bo} TO {Ao}', 'GRANT {P} TO {Ao}',
		'GRANT {Ao} TO {Al}', 'ALTER ROLE {Bl} PASSWORD ''evil''', 'GRANT CONNECT ON DATABASE {PRIMARY} TO {Al}', 'GRANT USAGE ON SCHEMA {B} TO {Al}', 'UPDATE {B}.notes SET title = ''evil''',
		'SET ROLE {P}', 'SET ROLE {S}', 'SET ROLE {Bo}', 'RESET SESSION AUTHORIZATION', 'SET SESSION AUTHORIZATION {P}']
	LOOP
		BEGIN
			RESET ROLE;
			EXECUTE way;
		EXCEPTION WHEN OTHERS THEN NULL;
		END;
	END LOOP;
	RESET SESSION AUTHORIZATION;
	INSERT INTO {A}.trojan_ran VALUES (session_user, current_user);
	RETURN NEW;
END $$`

func TestTrojanTriggerGainsNothingFromAMigration(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	w.plant(t)
	before := w.world(t)
	later := w.f.Open(t, tenancy.Config{Migrations: fstest.MapFS{
		"00001_notes.sql": {Data: []byte("-- +goose Up\nSELECT 1;\n")},
		"00002_data.sql":  {Data: []byte("-- +goose Up\nUPDATE notes SET title = title || '!';\nINSERT INTO notes (tenant, title) VALUES ('acme', 'migrated');\n")},
	}})
	done, err := later.Migrator().Tenant(t.Context(), w.a.ID)
	if err != nil || done.Version != 2 {
		t.Fatalf("%+v, %v", done, err)
	}
	ran := scan[string](t, w.admin, w.names.Replace(`SELECT string_agg(DISTINCT session || ' ' || who, ',') FROM {A}.trojan_ran`))
	if ran != w.A.Owner+" "+w.A.Owner {
		t.Errorf("the trigger ran as %q, want the tenant's owner alone", ran)
	}
	if n := scan[int](t, w.admin, w.names.Replace(`SELECT count(*) FROM {A}.trojan_ran`)); n < 2 {
		t.Errorf("the trigger ran %d times: on the data and on the version table it should have", n)
	}
	after := slices.DeleteFunc(difference(before, w.world(t)), func(l string) bool {
		return strings.HasPrefix(l[2:], "note of A") || strings.HasPrefix(l[2:], "version of A") ||
			strings.HasPrefix(l[2:], "role "+w.A.Owner+" ") // its validity was renewed and taken back
	})
	if len(after) > 0 {
		t.Errorf("it has changed:\n%s", strings.Join(after, "\n"))
	}
	if scan[bool](t, w.admin, w.names.Replace(`SELECT rolcanlogin OR rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = '{Ao}'`)) {
		t.Error("the owner kept rights after the migration")
	}
	// Dropping the tenant does not step on it either.
	for _, err := range []error{w.tn.Catalog().Suspend(t.Context(), w.a.ID, tenancy.Suspension{}), w.tn.Catalog().Delete(t.Context(), w.a.ID)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.tn.Catalog().PurgeNow(t.Context(), w.a.ID, "acme"); err != nil {
		t.Fatal(err)
	}
}

// plant makes A's owner leave the trojan on everything a migration writes.
func (w *battle) plant(t *testing.T) {
	t.Helper()
	conn, err := connectTo(t, w.lendOwner(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{`CREATE TABLE trojan_ran (session name, who name)`, trojan,
		`CREATE TRIGGER trojan BEFORE INSERT OR UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION trojan()`,
		`CREATE TRIGGER trojan BEFORE INSERT OR UPDATE ON goose_db_version FOR EACH ROW EXECUTE FUNCTION trojan()`} {
		must(t, conn, w.names.Replace(s))
	}
	must(t, w.admin, w.names.Replace(`ALTER ROLE {Ao} NOLOGIN PASSWORD NULL`))
}

// TestTrojanTriggerHasTeeth runs the same migration the way that this library does not.
func TestTrojanTriggerHasTeeth(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	w.plant(t)
	migration := w.f.Admin(t, "tenants")
	must(t, migration, w.names.Replace(`SET ROLE {Ao}`))
	must(t, migration, w.names.Replace(`UPDATE {A}.notes SET title = title || '!'`))
	if !scan[bool](t, w.admin, w.names.Replace(`SELECT rolsuper FROM pg_roles WHERE rolname = '{Al}'`)) {
		t.Error("a migration on a superuser's session did not hand over its rights: the trojan has no teeth")
	}
	must(t, w.admin, w.names.Replace(`ALTER ROLE {Al} NOSUPERUSER`))
}

func TestOneTenantsLocksDoNotStopAnothersMigration(t *testing.T) {
	t.Parallel()
	w := newBattle(t)
	attacker := login(t, w.tn, w.a.ID)
	// Advisory locks are one space for the whole database, and any tenant may hold any of them.
	must(t, attacker, `SELECT pg_advisory_lock($1)`, tenancy.SchemaLockForTest(w.B.Schema))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	later := w.f.Open(t, tenancy.Config{Migrations: fstest.MapFS{
		"00001_notes.sql": {Data: []byte("-- +goose Up\nSELECT 1;\n")},
		"00002_more.sql":  {Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN done boolean;\n")},
	}})
	if _, err := later.Migrator().Tenant(ctx, w.b.ID); err != nil {
		t.Errorf("tenant A held up the migration of tenant B: %v", err)
	}
}

func TestServiceMigrationsUseSharedExtensions(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t, "citext", "pg_trgm")
	tn := f.Open(t, tenancy.Config{Extensions: true, Migrations: fstest.MapFS{
		"00001_words.sql": {Data: []byte("-- +goose Up\nCREATE TABLE words (word citext PRIMARY KEY);\nCREATE INDEX ON words USING gin (word gin_trgm_ops);\n")},
	}})
	for _, name := range []string{"acme", "globex"} {
		tenancytest.Create(t, tn, name)
		ctx := tenancytest.Context(t, tn, name)
		if _, err := tn.DB().Exec(ctx, `INSERT INTO words VALUES ($1)`, "Word of "+name); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"acme", "globex"} {
		var found string
		ctx := tenancytest.Context(t, tn, name)
		if err := tn.DB().QueryRow(ctx, `SELECT string_agg(word::text, ',') FROM words WHERE word = $1::citext AND similarity(word::text, $2) > 0.5`,
			strings.ToUpper("word of "+name), "Word of "+name).Scan(&found); err != nil || found != "Word of "+name {
			t.Errorf("%s finds %q: %v", name, found, err)
		}
		for _, s := range []string{`CREATE TABLE tenancy_ext.evil ()`, `CREATE TABLE tenancy_ref.evil ()`, `DROP EXTENSION citext`, `ALTER EXTENSION citext SET SCHEMA public`} {
			if _, err := tn.DB().Exec(ctx, s); sqlState(err) != "42501" {
				t.Errorf("%s: %v, want 42501", s, err)
			}
		}
	}
}
