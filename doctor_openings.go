package tenancy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// callers are the roles that act for tenants: all but the reader. What one of them or PUBLIC is granted, a tenant has.
func (s *doctorServer) callers() []string {
	names := []string{tenantsRole(s.provisioner.Database)}
	for name, r := range s.roles() {
		if r.kind != "reader" {
			names = append(names, name)
		}
	}
	return names
}

// openings are what, in a database, gives the callers $1 more than the places' schemas $2 do, with the rights of the places' roles $3, of the provisioner $4, or of who is above all of them. What came with an extension is not told, and $5
// is false in a tenant's own database, where what is of the tenant's roles, or of its schema, opens nothing of others.
const openings = `WITH RECURSIVE caller AS (SELECT oid, quote_ident(rolname) AS name FROM pg_roles WHERE rolname = ANY($1) UNION ALL SELECT 0, 'PUBLIC'),
	extended AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
	routine AS ( -- that callers may call
		SELECT p.oid, p.proowner AS owner, p.pronamespace AS namespace, p.prosecdef AS definer, caller.oid AS grantee, caller.name
			FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) acl JOIN caller ON caller.oid = acl.grantee
			WHERE acl.grantee <> p.proowner AND (p.prosecdef OR p.oid IN (SELECT objoid FROM pg_init_privs WHERE classoid = 'pg_proc'::regclass))),
	relation AS ( -- that callers have rights on, of the whole or of columns
		SELECT c.oid, c.relnamespace AS namespace, n.nspname, c.relkind, c.reloptions, a.part, acl.privilege_type AS privilege, caller.oid AS grantee, caller.name
			FROM (SELECT oid, 0 AS part, relacl AS acl FROM pg_class UNION ALL SELECT attrelid, attnum, attacl FROM pg_attribute WHERE attacl IS NOT NULL) a
			JOIN pg_class c ON c.oid = a.oid JOIN pg_namespace n ON n.oid = c.relnamespace, aclexplode(a.acl) acl JOIN caller ON caller.oid = acl.grantee WHERE acl.grantee <> c.relowner AND c.relpersistence <> 't'),
	reach (oid, target) AS ( -- what a view, or a rule, leads to with its owner's rights
		SELECT r.ev_class, d.refobjid FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class WHERE r.ev_class >= 16384
		UNION SELECT reach.oid, d.refobjid FROM reach JOIN pg_rewrite r ON r.ev_class = reach.target JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class)
	SELECT 2, format('extension %s is there', extname), 'its functions open connections, or files, as the server''s own user: a tenant may reach what has nothing to do with the service', format('DROP EXTENSION %I;', extname)
		FROM pg_extension WHERE extname IN ('dblink', 'postgres_fdw', 'file_fdw', 'adminpack')
	UNION ALL SELECT 1, format('language %s is not trusted', lanname), 'what is written in it does what the server''s own user can do; only a superuser can write it', format('DROP LANGUAGE %I;', lanname)
		FROM pg_language WHERE lanispl AND NOT lanpltrusted
	UNION ALL SELECT 2, format('event trigger %s is there', evtname), 'it runs in sessions of the provisioner and of tenants'' owners, with their rights', format('DROP EVENT TRIGGER %I;', evtname)
		FROM pg_event_trigger t WHERE evtenabled <> 'D' AND ('pg_event_trigger'::regclass, t.oid) NOT IN (SELECT classid, objid FROM extended)
	UNION ALL SELECT CASE WHEN r.above THEN 2 ELSE 3 END, format('%s may call %s, which works with the rights of %s', (array_agg(p.name ORDER BY p.grantee))[1], p.oid::regprocedure, r.called),
			CASE WHEN r.above THEN 'a mistake in it opens all tenants, or the server' ELSE 'what it does it does with the data of the tenant whose role that is' END, format('REVOKE ALL ON ROUTINE %s FROM %s;', p.oid::regprocedure, string_agg(DISTINCT p.name, ', '))
		FROM routine p JOIN pg_namespace n ON n.oid = p.namespace JOIN (SELECT oid, rolname, rolsuper OR rolname <> ALL ($3) AND (rolbypassrls OR rolname = $4 OR pg_has_role(oid, 'pg_read_all_data', 'MEMBER')) AS above,
			CASE WHEN rolsuper THEN 'the superuser ' WHEN rolname = $4 THEN 'the provisioner ' ELSE '' END || rolname AS called FROM pg_roles) r ON r.oid = p.owner
		WHERE p.definer AND (r.above OR $5 AND r.rolname = ANY($3) AND n.nspowner <> p.owner) AND ('pg_proc'::regclass, p.oid) NOT IN (SELECT classid, objid FROM extended) GROUP BY p.oid, r.above, r.called
	UNION ALL SELECT CASE i.privtype WHEN 'i' THEN 3 ELSE 2 END, format('%s may call %s, which nobody may by default', (array_agg(p.name ORDER BY p.grantee))[1], p.oid::regprocedure), 'what it does is for superusers: it may reach files, connections or sessions of the server''s',
			format('REVOKE ALL ON ROUTINE %s FROM %s;', p.oid::regprocedure, string_agg(DISTINCT p.name, ', '))
		FROM routine p JOIN pg_init_privs i ON i.classoid = 'pg_proc'::regclass AND i.objoid = p.oid WHERE NOT EXISTS (SELECT FROM aclexplode(i.initprivs) was WHERE was.grantee IN (0, p.grantee)) GROUP BY p.oid, i.privtype
	UNION ALL SELECT 3, format('%s has %s on the system''s %s', (array_agg(c.name ORDER BY c.grantee))[1], string_agg(DISTINCT c.privilege, ', '), c.oid::regclass), 'the server''s catalogs hold passwords, samples of all tenants'' rows, and who may do what',
			format('REVOKE %s ON TABLE %s FROM %s;', string_agg(DISTINCT c.privilege, ', '), c.oid::regclass, string_agg(DISTINCT c.name, ', '))
		FROM relation c WHERE c.nspname = 'pg_catalog' AND NOT EXISTS (SELECT FROM pg_init_privs i, aclexplode(i.initprivs) was
			WHERE i.classoid = 'pg_class'::regclass AND i.objoid = c.oid AND i.objsubid = c.part AND was.grantee IN (0, c.grantee) AND was.privilege_type = c.privilege) GROUP BY c.oid
	UNION ALL SELECT 3, format('%s may use %s, which shows %s with its owner''s rights', (array_agg(c.name ORDER BY c.grantee))[1], c.oid::regclass, min(t.oid::regclass::text)), 'whoever may use it has what is a tenant''s, of another schema than its own',
			format('REVOKE ALL ON TABLE %s FROM %s;', c.oid::regclass, string_agg(DISTINCT c.name, ', '))
		FROM reach JOIN relation c ON c.oid = reach.oid JOIN pg_class t ON t.oid = reach.target JOIN pg_namespace n ON n.oid = t.relnamespace
		WHERE $5 AND n.nspname = ANY($2) AND n.oid <> c.namespace AND NOT coalesce(c.reloptions && ARRAY['security_invoker=true', 'security_invoker=on', 'security_invoker=1', 'security_invoker=yes'], false) AND ('pg_class'::regclass, c.oid) NOT IN (SELECT classid, objid FROM extended) GROUP BY c.oid
	UNION ALL SELECT 2, format('%s has %s on %s', (array_agg(c.name ORDER BY c.grantee))[1], string_agg(DISTINCT c.privilege, ', '), c.oid::regclass), 'a tenant writes what others read',
			format('REVOKE %s ON TABLE %s FROM %s;', string_agg(DISTINCT c.privilege, ', '), c.oid::regclass, string_agg(DISTINCT c.name, ', '))
		FROM relation c WHERE $5 AND c.oid >= 16384 AND c.relkind IN ('r', 'p', 'v', 'f') AND c.privilege IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER') AND c.nspname <> ALL ($2) AND c.nspname !~ '^t_[0-9a-f]{20}$'
		AND ('pg_class'::regclass, c.oid) NOT IN (SELECT classid, objid FROM extended) GROUP BY c.oid
	ORDER BY 2`

// checkExtensions looks at what, in a database of tenants, leads out of it or runs with more rights than who calls it.
func checkExtensions(ctx context.Context, w *ward) error {
	rows, _ := w.conn.Query(ctx, openings, w.server.callers(), schemaNames(w.schemas()), roleNames(w.server.roles()), w.server.provisioner.User, w.address.Database == w.server.provisioner.Database)
	var level Level
	var what, why, mend string
	_, err := pgx.ForEachRow(rows, []any{&level, &what, &why, &mend}, func() error {
		w.inDatabase(level, what, why, w.within(mend))
		return nil
	})
	return err
}

// checkLargeObjects looks for those that others than their owner's tenant may reach. A tenant may make and grant its own.
func (w *ward) checkLargeObjects(ctx context.Context) error {
	if w.address.Database != w.server.provisioner.Database { // nobody but the tenant's own roles is there
		return nil
	}
	roles := w.server.roles()
	rows, _ := w.conn.Query(ctx, `SELECT pg_get_userbyid(l.lomowner)::text, coalesce(r.rolname::text, ''), count(DISTINCT l.oid), ((array_agg(DISTINCT l.oid::text))[1:20])
		FROM pg_largeobject_metadata l, aclexplode(l.lomacl) acl LEFT JOIN pg_roles r ON r.oid = acl.grantee
		WHERE acl.grantee <> l.lomowner AND (acl.grantee = 0 OR r.rolname = ANY($1)) GROUP BY 1, 2 ORDER BY 1, 2`, w.server.callers())
	var owner, grantee string
	var n int
	var some []string
	_, err := pgx.ForEachRow(rows, []any{&owner, &grantee, &n, &some}, func() error {
		r := roles[owner]
		if other := roles[grantee]; r.place != nil && r.place == other.place {
			return nil
		}
		who, to := "role "+grantee, ident.Quote(grantee)
		if grantee == "" {
			who, to = "PUBLIC", "PUBLIC"
		}
		w.of(r, LevelFailure, fmt.Sprintf("%s has rights on %d large objects of %s", who, n, owner), whyWall, w.within("REVOKE ALL ON LARGE OBJECT "+strings.Join(some, ", ")+" FROM "+to+";"))
		return nil
	})
	return err
}

// roleSettings are those that, kept with a role or a database, change what its sessions may do or whose they are.
var roleSettings = map[string]struct {
	harmless []string // values, in lower case
	level    Level
	why      string
}{
	"lo_compat_privileges":      {[]string{"off", "false", "no", "0"}, LevelFailure, "a tenant may read and write the large objects of the others"},
	"row_security":              {[]string{"on", "true", "yes", "1"}, LevelWarning, "statements on tables behind a wall fail"},
	"session_replication_role":  {[]string{"origin"}, LevelWarning, "triggers and foreign keys are not asked"},
	"session_preload_libraries": {[]string{"", `""`}, LevelWarning, "what they load runs in each session, with the rights of the server's own user"},
	"local_preload_libraries":   {[]string{"", `""`}, LevelWarning, "what they load runs in each session, with the rights of the server's own user"},
	"role":                      {[]string{"none"}, LevelFailure, "its sessions are another role's from their start"},
	"search_path":               {nil, LevelFailure, "a name without a schema leads to what is not the tenant's"},
}

// checkRoleSettings looks at what the server sets in sessions of the places' roles, and in all of their databases. A login may set its own.
func (w *ward) checkRoleSettings(ctx context.Context, roles map[string]role) error {
	databases := []string{w.server.provisioner.Database}
	for _, p := range w.server.places {
		databases = append(databases, p.source.Database)
	}
	rows, _ := w.conn.Query(ctx, `SELECT coalesce(r.rolname::text, ''), coalesce(d.datname::text, ''), split_part(c, '=', 1), substring(c FROM position('=' IN c) + 1)
		FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase, unnest(s.setconfig) c
		WHERE (s.setrole = 0 OR r.rolname = ANY($1)) AND (s.setdatabase = 0 OR d.datname = ANY($2)) ORDER BY 1, 2, 3`, roleNames(roles), databases)
	var name, database, setting, value string
	_, err := pgx.ForEachRow(rows, []any{&name, &database, &setting, &value}, func() error {
		s, known := roleSettings[setting]
		if !known || slices.Contains(s.harmless, strings.ToLower(value)) {
			return nil
		}
		r, level := roles[name], s.level
		if setting == "search_path" {
			first, _, _ := strings.Cut(value, ",") // Catalog sets it where calls go through a pooler
			if r.kind != "login" || strings.Trim(first, `" `) == r.place.source.Schema {
				return nil
			}
		}
		alter, of := "ALTER ROLE ALL", "all roles"
		if name == "" && strings.HasSuffix(setting, "_preload_libraries") {
			level = LevelNote // of the operator's own, most likely
		}
		switch {
		case name != "":
			alter, of = "ALTER ROLE "+ident.Quote(name), "the "+r.kind+" "+name
			if database != "" {
				alter, of = alter+" IN DATABASE "+ident.Quote(database), of+" in database "+database
			}
		case database != "":
			alter, of = "ALTER DATABASE "+ident.Quote(database), "database "+database
		}
		w.of(r, level, fmt.Sprintf("%s has %s set to %s", of, setting, value), s.why, alter+" RESET "+setting+";")
		return nil
	})
	return err
}

// checkParameters looks for who may set what the server keeps for superusers.
func (w *ward) checkParameters(ctx context.Context) error {
	if err := w.readSettings(ctx); err != nil || w.number("server_version_num") < 150_000 { // nobody can be granted one before
		return err
	}
	rows, _ := w.conn.Query(ctx, `SELECT p.parname, CASE acl.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END, string_agg(acl.privilege_type, ', ' ORDER BY acl.privilege_type), bool_or(acl.privilege_type = 'ALTER SYSTEM')
		FROM pg_parameter_acl p, aclexplode(p.paracl) acl LEFT JOIN pg_roles r ON r.oid = acl.grantee WHERE acl.grantee = 0 OR r.rolname = ANY($1) GROUP BY 1, 2 ORDER BY 1, 2`, w.server.callers())
	var name, grantee, rights string
	var everywhere bool
	_, err := pgx.ForEachRow(rows, []any{&name, &grantee, &rights, &everywhere}, func() error {
		level, why := LevelWarning, whySecond
		if everywhere {
			level, why = LevelFailure, "it sets it for the whole server"
		}
		w.find(level, fmt.Sprintf("%s has %s on the server's parameter %s", grantee, rights, name), why, "REVOKE "+rights+" ON PARAMETER "+name+" FROM "+grantee+";")
		return nil
	})
	return err
}
