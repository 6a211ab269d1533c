package tenancy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// found is what a service's schema is made of, before it is adopted.
type found struct {
	from                origin
	database            string
	there               bool   // the schema and the login are
	owner               string // of the schema
	objects             []object
	grants              []grant
	extensions          []string // in the schema, that go to tenancy_ext
	makeExt             bool     // tenancy_ext is missing
	rights              []string // of the login, on the database
	version             int64
	obstacles, warnings []Finding
}

// object is one of a schema that has an owner.
type object struct {
	Kind, Identity string // as in ALTER
	Owner          string // "": one that owns the system, too
	Linked         bool   // a sequence that goes with its column
}

// grant is one right of one role that does not own the object.
type grant struct {
	On, Columns string // as in GRANT; with columns, of a table
	Grantee     string // quoted, or PUBLIC
	Privilege   string
	Grantable   bool
	Usual       bool   // PUBLIC has it on every object of the kind
	Before      string // what comes before GRANT or REVOKE: of a default privilege
}

const notOfExtension = `NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = %[1]s AND e.objid = %[2]s AND e.refclassid = 'pg_extension'::regclass AND e.deptype = 'e')`

// objectsSQL are the objects in schema $1 that have an owner, apart from those of extensions and what a range type brings along. What depends on the schema by itself is all that can be named in it.
var objectsSQL = `SELECT i.type AS kind, i.identity, coalesce(pg_get_userbyid(o.refobjid), '') AS owner,
		d.classid = 'pg_class'::regclass AND EXISTS (SELECT FROM pg_depend s WHERE s.classid = d.classid AND s.objid = d.objid AND s.refclassid = d.classid
			AND s.refobjsubid > 0 AND s.deptype IN ('a', 'i')) AND i.type = 'sequence' AS linked
	FROM pg_depend d CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) i
	LEFT JOIN pg_shdepend o ON o.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND o.classid = d.classid AND o.objid = d.objid AND o.objsubid = 0
		AND o.refclassid = 'pg_authid'::regclass AND o.deptype = 'o'
	WHERE d.classid <> 'pg_extension'::regclass AND d.refclassid = 'pg_namespace'::regclass AND d.refobjid = (SELECT oid FROM pg_namespace WHERE nspname = $1) AND d.deptype = 'n' AND ` + fmt.Sprintf(notOfExtension, "d.classid", "d.objid") + `
		AND NOT (d.classid = 'pg_type'::regclass AND EXISTS (SELECT FROM pg_type m WHERE m.oid = d.objid AND m.typtype = 'm'))
		AND NOT (d.classid = 'pg_proc'::regclass AND EXISTS (SELECT FROM pg_depend r WHERE r.classid = d.classid AND r.objid = d.objid AND r.refclassid = 'pg_type'::regclass AND r.deptype = 'i'))
	ORDER BY d.classid, d.objid`

// grantsSQL are the rights in schema $1, and on it, of those who do not own what they are on.
var grantsSQL = `WITH n AS (SELECT * FROM pg_namespace WHERE nspname = $1), acls AS (
		SELECT 'SCHEMA ' || quote_ident(nspname) AS obj, '' AS columns, nspowner AS owner, nspacl AS acl, false AS open, '' AS before, 1 AS part, oid FROM n
		UNION ALL SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || format('%I.%I', nspname, relname), '', relowner, relacl, false, '', 2, c.oid
			FROM pg_class c JOIN n ON n.oid = relnamespace WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND ` + fmt.Sprintf(notOfExtension, "'pg_class'::regclass", "c.oid") + `
		UNION ALL SELECT 'TABLE ' || format('%I.%I', nspname, relname), quote_ident(attname), relowner, attacl, false, '', 3, c.oid
			FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN n ON n.oid = relnamespace WHERE attacl IS NOT NULL AND NOT attisdropped AND ` + fmt.Sprintf(notOfExtension, "'pg_class'::regclass", "c.oid") + `
		UNION ALL SELECT 'ROUTINE ' || p.oid::regprocedure, '', proowner, coalesce(proacl, acldefault('f', proowner)), true, '', 4, p.oid
			FROM pg_proc p JOIN n ON n.oid = pronamespace WHERE ` + fmt.Sprintf(notOfExtension, "'pg_proc'::regclass", "p.oid") + `
		UNION ALL SELECT 'TYPE ' || format('%I.%I', nspname, typname), '', typowner, coalesce(typacl, acldefault('T', typowner)), true, '', 5, t.oid
			FROM pg_type t JOIN n ON n.oid = typnamespace LEFT JOIN pg_class c ON c.oid = typrelid
			WHERE typtype <> 'm' AND coalesce(c.relkind = 'c', true) AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid) AND ` + fmt.Sprintf(notOfExtension, "'pg_type'::regclass", "t.oid") + `
	)
	SELECT a.obj, a.columns, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END AS grantee, x.privilege_type AS privilege, x.is_grantable,
		a.open AND x.grantee = 0 AS usual, a.before
	FROM acls a, aclexplode(a.acl) x WHERE x.grantee <> a.owner ORDER BY part, a.oid, columns, 3, 4`

// defaultsSQL are the default privileges in schema $1 of role $2.
const defaultsSQL = `SELECT CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'ROUTINES' ELSE 'TYPES' END, '',
		CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END, x.privilege_type, x.is_grantable, false,
		format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I ', pg_get_userbyid(defaclrole), n.nspname)
	FROM pg_default_acl JOIN pg_namespace n ON n.oid = defaclnamespace, aclexplode(defaclacl) x WHERE n.nspname = $1 AND pg_get_userbyid(defaclrole) = $2 ORDER BY 1, 3, 4`

func collect(ctx context.Context, q querier, sql string, args ...any) ([]string, error) {
	rows, _ := q.Query(ctx, sql, args...)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func readGrants(ctx context.Context, q querier, schema string) ([]grant, error) {
	rows, _ := q.Query(ctx, grantsSQL, schema)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[grant])
}

// revocations are the statements that take the rights away, but those that everyone has as a rule: the schema is closed to everyone.
func revocations(grants []grant) (statements []string) {
	for _, g := range grants {
		sql := g.Before + "REVOKE ALL ON " + g.On + " FROM " + g.Grantee
		if g.Before == "" {
			sql += " CASCADE" // and from whom they gave them to
		}
		if !g.Usual && !slices.Contains(statements, sql) {
			statements = append(statements, sql)
		}
	}
	return statements
}

// undo are the statements that give back what the adoption takes, once the objects have their names and owner again.
func (f *found) undo(p *place) (statements []string) {
	for _, g := range f.grants {
		sql := g.Before + "GRANT " + g.Privilege
		if g.Columns != "" {
			sql += " (" + g.Columns + ")"
		}
		sql += " ON " + g.On + " TO " + g.Grantee
		if g.Grantable {
			sql += " WITH GRANT OPTION"
		}
		statements = append(statements, sql)
	}
	for _, right := range f.rights {
		statements = append(statements, "GRANT "+right+" ON DATABASE "+ident.Quote(p.source.Database)+" TO "+ident.Quote(f.from.login))
	}
	return statements
}

// takeOver are the statements of the one transaction. Objects are named as they were until the last step.
func (f *found) takeOver(p *place) []AdoptionStep {
	was, schema, owner, runtime, login := ident.Quote(f.from.schema), ident.Quote(p.source.Schema), ident.Quote(p.owner), ident.Quote(p.runtime), ident.Quote(f.from.login)
	var steps []AdoptionStep
	if len(f.extensions) > 0 {
		s := AdoptionStep{What: "Begin. The extensions go where those of all tenants are."}
		if f.makeExt {
			s.SQL = append(s.SQL, "CREATE SCHEMA "+extSchema, "GRANT USAGE ON SCHEMA "+extSchema+" TO "+ident.Quote(tenantsRole(p.provisioner.Database)))
		}
		for _, name := range f.extensions {
			s.SQL = append(s.SQL, "ALTER EXTENSION "+ident.Quote(name)+" SET SCHEMA "+extSchema)
		}
		steps = append(steps, s)
	} else {
		steps = append(steps, AdoptionStep{What: "Begin."})
	}
	own := AdoptionStep{What: "The schema and all that is in it belong to {owner}.", SQL: []string{"ALTER SCHEMA " + was + " OWNER TO " + owner}}
	named := map[string][]string{}
	for _, o := range f.objects {
		if !o.Linked {
			own.SQL = append(own.SQL, "ALTER "+o.Kind+" "+o.Identity+" OWNER TO "+owner)
		}
		kind := o.Kind
		switch kind {
		case "VIEW", "MATERIALIZED VIEW", "FOREIGN TABLE":
			kind = "TABLE"
		}
		named[kind] = append(named[kind], o.Identity)
	}
	rights := AdoptionStep{What: "The rights of all others end, and {runtime} has those that it has in every tenant's schema.", SQL: revocations(f.grants)}
	for _, g := range []struct{ rights, kind string }{{"SELECT, INSERT, UPDATE, DELETE", "TABLE"}, {"USAGE, SELECT", "SEQUENCE"}, {"EXECUTE", "ROUTINE"}, {"USAGE", "TYPE"}} {
		if len(named[g.kind]) > 0 {
			rights.SQL = append(rights.SQL, "GRANT "+g.rights+" ON "+g.kind+" "+strings.Join(named[g.kind], ", ")+" TO "+runtime)
		}
	}
	version := ident.Quote(f.from.schema, versionTable)
	rights.SQL = append(rights.SQL, "REVOKE ALL ON TABLE "+version+" FROM "+runtime, "GRANT SELECT ON TABLE "+version+" TO "+runtime)
	if own := f.from.schema + "." + versionTable + "_id_seq"; slices.Contains(named["SEQUENCE"], own) {
		rights.SQL = append(rights.SQL, "REVOKE ALL ON SEQUENCE "+own+" FROM "+runtime)
	}
	rename := AdoptionStep{What: "The schema gets the tenant's name.", SQL: []string{"ALTER SCHEMA " + was + " RENAME TO " + schema}}
	if f.from.schema == "public" {
		rename.What = "The schema gets the tenant's name, and a new, empty public takes its place."
		rename.SQL = append(rename.SQL, "CREATE SCHEMA public", "REVOKE ALL ON SCHEMA public FROM PUBLIC")
	}
	return append(steps, own, rights, rename, AdoptionStep{What: "The service's login is closed. Commit.", SQL: []string{
		"REVOKE ALL ON DATABASE " + ident.Quote(p.source.Database) + " FROM " + login + " CASCADE",
		"ALTER ROLE " + login + " NOLOGIN",
	}})
}

const checkAdoption = "adoption"

func obstacle(what, mend string) Finding {
	return Finding{Check: checkAdoption, Level: LevelFailure, What: what, Why: "Adopt does not begin with it", Mend: mend}
}

func caution(what, mend string) Finding {
	return Finding{Check: checkAdoption, Level: LevelWarning, What: what, Why: "an adoption changes what it means", Mend: mend}
}

// surveyService looks at the schema and at what stands in the way.
func (c *Catalog) surveyService(ctx context.Context, q querier, p *place, major int) (found, error) {
	f := found{from: *p.from, database: p.source.Database}
	schema, login := f.from.schema, f.from.login
	// each runs a query of findings: what, and what mends it.
	each := func(to *[]Finding, found func(what, mend string) Finding, sql string, args ...any) error {
		rows, _ := q.Query(ctx, sql, args...)
		var what, mend string
		_, err := pgx.ForEachRow(rows, []any{&what, &mend}, func() error {
			*to = append(*to, found(what, mend))
			return nil
		})
		return err
	}
	owner, err := schemaOwner(ctx, q, schema)
	if err != nil {
		return f, err
	}
	f.owner = owner
	var role bool
	if err := q.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, login).Scan(&role); err != nil {
		return f, err
	}
	if owner == "" {
		f.obstacles = append(f.obstacles, obstacle(fmt.Sprintf("the server's database %q has no schema %q", f.database, schema), "name the server whose provisioner's database has the tables, and their schema"))
	}
	if !role {
		f.obstacles = append(f.obstacles, obstacle(fmt.Sprintf("there is no role %q", login), "name the login that the service has connected with"))
	}
	if f.there = owner != "" && role; !f.there {
		return f, nil
	}
	member, mend := `pg_has_role(current_user, $1, 'USAGE')`, `GRANT %I TO %I;`
	if major >= 16 {
		member = `pg_has_role(current_user, $1, 'USAGE') AND pg_has_role(current_user, $1, 'SET') AND pg_has_role(current_user, $1, 'MEMBER WITH ADMIN OPTION')`
		mend = `GRANT %I TO %I WITH ADMIN TRUE, INHERIT TRUE, SET TRUE;`
	}
	var may bool
	if err := q.QueryRow(ctx, `SELECT `+member, login).Scan(&may); err != nil {
		return f, err
	}
	for _, o := range []struct {
		sql  string
		args []any
	}{
		{`SELECT format('the login %I is a superuser, or may make roles, replicate or bypass row-level security', rolname),
			'make the service a login without such rights, and give it the tables (ALTER TABLE ... OWNER TO)' FROM pg_roles
			WHERE rolname = $1 AND (rolsuper OR rolcreaterole OR rolreplication OR rolbypassrls)`, []any{login}},
		{`SELECT format('the login %I is the provisioner', $1::text), 'make a provisioner of its own: see tenancy.Init' WHERE $1 = current_user`, []any{login}},
		{`SELECT format('the provisioner %I may not act for the login %I', current_user, $1::text), format('` + mend + `', $1::text, current_user) WHERE NOT (` + member + `)`, []any{login}},
		{`SELECT format('schema %I belongs to %I', nspname, pg_get_userbyid(nspowner)), format('ALTER SCHEMA %I OWNER TO %I;', nspname, current_user)
			FROM pg_namespace WHERE nspname = $1 AND NOT pg_has_role(current_user, nspowner, 'USAGE') AND pg_get_userbyid(nspowner) <> $2`, []any{schema, login}},
		{`SELECT format('%s %s is called as one of the library''s own', kind, identity), 'rename or drop it' FROM (` + objectsSQL + `) o WHERE identity ~ '^[^.]*\."?tenancy_'`, []any{schema}},
		{`SELECT format('%s %s belongs to %s', kind, identity, CASE owner WHEN '' THEN 'a superuser' ELSE quote_ident(owner) END),
			format('ALTER %s %s OWNER TO %I;', CASE kind WHEN 'statistics object' THEN 'STATISTICS' WHEN 'composite type' THEN 'TYPE' ELSE upper(kind) END, identity, $2::text)
			FROM (` + objectsSQL + `) o WHERE owner <> $2`, []any{schema, login}},
		{`SELECT format('extension %I cannot leave schema %I: it is not relocatable', extname, $1::text),
			format('DROP EXTENSION %I; CREATE EXTENSION %1$I SCHEMA ` + extSchema + `; -- as an administrator, where nothing depends on it', extname)
			FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE n.nspname = $1 AND NOT extrelocatable ORDER BY extname`, []any{schema}},
		{`SELECT format('extension %I is in schema %I, and the provisioner does not own all of it', extname, $1::text),
			format('GRANT USAGE ON SCHEMA ` + extSchema + ` TO %I; ALTER ROLE %1$I IN DATABASE %I SET search_path = "$user", %I, ` + extSchema + `; ALTER EXTENSION %I SET SCHEMA ` + extSchema + `; -- as an administrator; the service goes on', $2::text, current_database(), $1::text, extname)
			FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE n.nspname = $1 AND extrelocatable AND NOT (pg_has_role(current_user, extowner, 'USAGE') AND NOT EXISTS (
				SELECT FROM pg_depend d LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid LEFT JOIN pg_type t ON d.classid = 'pg_type'::regclass AND t.oid = d.objid
					LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid LEFT JOIN pg_operator o ON d.classid = 'pg_operator'::regclass AND o.oid = d.objid
					LEFT JOIN pg_opclass oc ON d.classid = 'pg_opclass'::regclass AND oc.oid = d.objid LEFT JOIN pg_opfamily f ON d.classid = 'pg_opfamily'::regclass AND f.oid = d.objid
				WHERE d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e' AND NOT pg_has_role(current_user, coalesce(proowner, typowner, relowner, oprowner, opcowner, opfowner, extowner), 'USAGE')))
			ORDER BY extname`, []any{schema, login}},
		{`SELECT format('the schema has extensions (%s), and Config.Extensions is off', string_agg(extname, ', ' ORDER BY extname)), 'set Config.Extensions, and name them in AdminConfig.Extensions'
			FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE n.nspname = $1 AND NOT $2 HAVING count(*) > 0`, []any{schema, c.tn.cfg.Extensions}},
		{`SELECT format('event trigger %I runs with every step', evtname), format('ALTER EVENT TRIGGER %I DISABLE;', evtname) FROM pg_event_trigger WHERE evtenabled <> 'D' ORDER BY evtname`, nil},
		{`SELECT format('publication %I sends tables away under their names', pubname), format('DROP PUBLICATION %I;', pubname) FROM pg_publication ORDER BY pubname`, nil},
		{`SELECT format('transaction %L is prepared and may hold locks', gid), format('ROLLBACK PREPARED %L; -- or COMMIT PREPARED', gid) FROM pg_prepared_xacts WHERE database = current_database() ORDER BY gid`, nil},
		{`SELECT format('the login %I may connect as a member of %I', $1::text, pg_get_userbyid(grantee)), format('REVOKE %I FROM %I;', pg_get_userbyid(grantee), $1::text)
			FROM pg_database, aclexplode(datacl) WHERE datname = current_database() AND privilege_type = 'CONNECT' AND grantee <> 0 AND pg_get_userbyid(grantee) <> $1
				AND pg_has_role($1, grantee, 'MEMBER') AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = $1) ORDER BY 1`, []any{login}},
		{`SELECT 'the database is a Citus cluster''s', 'move the tables to a new tenant instead: see Catalog.Prepare' WHERE to_regclass('pg_catalog.pg_dist_node') IS NOT NULL`, nil},
		{crossingSQL, []any{schema, schemasOf("pg_catalog", c.tn.cfg.Extensions, c.tn.cfg.ReferenceTables)}},
	} {
		if err := each(&f.obstacles, obstacle, o.sql, o.args...); err != nil {
			return f, err
		}
	}
	if err := c.surveyVersion(ctx, q, &f, may); err != nil {
		return f, err
	}
	for _, w := range []struct {
		sql  string
		args []any
	}{
		{`SELECT format('function %s has a search_path of its own', p.oid::regprocedure), format('ALTER ROUTINE %s RESET search_path; -- or what its body means is looked for there', p.oid::regprocedure)
			FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE n.nspname = $1 AND EXISTS (SELECT FROM unnest(proconfig) s WHERE s LIKE 'search\_path=%')
				AND ` + fmt.Sprintf(notOfExtension, "'pg_proc'::regclass", "p.oid") + ` ORDER BY p.oid`, []any{schema}},
		{`SELECT format('the body of function %s names the schema %I', p.oid::regprocedure, $1::text), 'replace it by one that names no schema, in a migration'
			FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND prosrc ~* ('(^|[^a-z0-9_$."])"?' || $1 || '"?\s*\.')
				AND ` + fmt.Sprintf(notOfExtension, "'pg_proc'::regclass", "p.oid") + ` ORDER BY p.oid`, []any{schema}},
		{`SELECT format('table %s has row-level security: it holds for the tenant''s login, which does not own the table', c.oid::regclass), 'look whether its policies let the login pass'
			FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE n.nspname = $1 AND relrowsecurity ORDER BY c.oid`, []any{schema}},
		{`SELECT format('%s large objects are in no schema: the tenant cannot read those of %I', count(*), $1::text), 'keep them in a bytea column'
			FROM pg_largeobject_metadata WHERE pg_get_userbyid(lomowner) = $1 HAVING count(*) > 0`, []any{login}},
		{`SELECT format('%s sessions of %I are open, and are ended', count(*), usename), 'stop the service before, or have it retry' FROM pg_stat_activity
			WHERE datname = current_database() AND usename = $1 GROUP BY usename`, []any{login}},
		{`SELECT format('%s sessions of %I are open, and can hold locks', count(*), usename), 'end them before' FROM pg_stat_activity
			WHERE datname = current_database() AND usename NOT IN ($1, current_user) AND backend_type = 'client backend' GROUP BY usename ORDER BY usename`, []any{login}},
		{`SELECT format('the rights of %s in the schema end', grantee), 'see Catalog.AddReader for one who reads' FROM (` + grantsSQL + `) g WHERE NOT usual AND grantee <> quote_ident($2) GROUP BY grantee ORDER BY grantee`, []any{schema, login}},
		{`SELECT format('the login %I has something in database %I too, and will not be able to log in there', $1::text, datname), 'make a login of its own for what uses that' FROM pg_database
			WHERE oid IN (SELECT dbid FROM pg_shdepend s JOIN pg_roles r ON r.oid = s.refobjid WHERE r.rolname = $1 AND s.refclassid = 'pg_authid'::regclass) AND datname <> current_database() ORDER BY datname`, []any{login}},
	} {
		if err := each(&f.warnings, caution, w.sql, w.args...); err != nil {
			return f, err
		}
	}
	return f, f.read(ctx, q)
}

// crossingSQL are dependencies between what is in schema $1 and what is in others, apart from $2.
var crossingSQL = `WITH homes AS (
		SELECT 'pg_class'::regclass AS class, oid, relnamespace AS home FROM pg_class
		UNION ALL SELECT 'pg_proc'::regclass, oid, pronamespace FROM pg_proc
		UNION ALL SELECT 'pg_type'::regclass, oid, typnamespace FROM pg_type
		UNION ALL SELECT 'pg_operator'::regclass, oid, oprnamespace FROM pg_operator
		UNION ALL SELECT 'pg_constraint'::regclass, oid, connamespace FROM pg_constraint
		UNION ALL SELECT 'pg_rewrite'::regclass, r.oid, relnamespace FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class
		UNION ALL SELECT 'pg_trigger'::regclass, t.oid, relnamespace FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
		UNION ALL SELECT 'pg_attrdef'::regclass, d.oid, relnamespace FROM pg_attrdef d JOIN pg_class c ON c.oid = adrelid
		UNION ALL SELECT 'pg_policy'::regclass, p.oid, relnamespace FROM pg_policy p JOIN pg_class c ON c.oid = polrelid
	)
	SELECT DISTINCT format('%s depends on %s', pg_describe_object(d.classid, d.objid, 0), pg_describe_object(d.refclassid, d.refobjid, 0)), 'drop one of the two, or bring both into one schema'
	FROM pg_depend d JOIN homes a ON a.class = d.classid AND a.oid = d.objid JOIN homes b ON b.class = d.refclassid AND b.oid = d.refobjid
		JOIN pg_namespace an ON an.oid = a.home JOIN pg_namespace bn ON bn.oid = b.home
	WHERE an.nspname <> bn.nspname AND 'pg_toast' NOT IN (an.nspname, bn.nspname) AND ` + fmt.Sprintf(notOfExtension, "d.classid", "d.objid") + `
		AND (an.nspname = $1 AND bn.nspname <> ALL ($2) OR bn.nspname = $1 AND ` + fmt.Sprintf(notOfExtension, "d.refclassid", "d.refobjid") + `) ORDER BY 1`

// surveyVersion reads what goose says of the schema.
func (c *Catalog) surveyVersion(ctx context.Context, q querier, f *found, may bool) error {
	table := ident.Quote(f.from.schema, versionTable)
	var plain bool
	if err := q.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_class WHERE oid = to_regclass($1) AND relkind = 'r' AND NOT relrowsecurity`, table).Scan(&plain); err != nil {
		return err
	}
	if !plain {
		f.obstacles = append(f.obstacles, obstacle(fmt.Sprintf("the schema has no table %s, which says at which version of Config.Migrations it is", versionTable),
			"apply the migrations with goose; where the tables were made without, make its table, with a row for each version that they have"))
		return nil
	}
	if !may { // what reads it belongs to the login
		return nil
	}
	// goose's own rule where an older release has left a row for the way down: the last one of a version counts.
	rows, _ := q.Query(ctx, `SELECT version_id FROM (SELECT DISTINCT ON (version_id) version_id, is_applied FROM `+table+` ORDER BY version_id, id DESC) v WHERE is_applied AND version_id > 0 ORDER BY 1`)
	applied, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return err
	}
	for _, v := range applied {
		f.version = v
		if _, known := c.tn.migrations.find(v); !known {
			f.obstacles = append(f.obstacles, obstacle(fmt.Sprintf("the schema is at version %d, which is not among Config.Migrations", v), "run a release of the service that has that migration"))
		}
	}
	for _, m := range c.tn.migrations.list {
		if m.Version < f.version && !slices.Contains(applied, m.Version) {
			f.obstacles = append(f.obstacles, obstacle(fmt.Sprintf("the schema is at version %d and has not version %d", f.version, m.Version), "apply it with goose up -allow-missing"))
		}
	}
	return nil
}

// read collects what the statements are made from.
func (f *found) read(ctx context.Context, q querier) (err error) {
	rows, _ := q.Query(ctx, objectsSQL, f.from.schema)
	if f.objects, err = pgx.CollectRows(rows, pgx.RowToStructByPos[object]); err != nil {
		return err
	}
	for i := range f.objects {
		o := &f.objects[i]
		switch o.Kind = strings.ToUpper(o.Kind); o.Kind {
		case "STATISTICS OBJECT":
			o.Kind = "STATISTICS"
		case "COMPOSITE TYPE":
			o.Kind = "TYPE"
		case "FUNCTION", "PROCEDURE", "AGGREGATE":
			o.Kind = "ROUTINE"
		}
	}
	if f.grants, err = readGrants(ctx, q, f.from.schema); err != nil {
		return err
	}
	rows, _ = q.Query(ctx, defaultsSQL, f.from.schema, f.from.login)
	defaults, err := pgx.CollectRows(rows, pgx.RowToStructByPos[grant])
	if err != nil {
		return err
	}
	f.grants = append(f.grants, defaults...)
	if f.extensions, err = collect(ctx, q, `SELECT extname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE n.nspname = $1 ORDER BY extname`, f.from.schema); err != nil {
		return err
	}
	if f.rights, err = collect(ctx, q, `SELECT privilege_type FROM pg_database, aclexplode(datacl) WHERE datname = current_database() AND pg_get_userbyid(grantee) = $1 ORDER BY 1`, f.from.login); err != nil {
		return err
	}
	return q.QueryRow(ctx, `SELECT to_regnamespace($1) IS NULL`, extSchema).Scan(&f.makeExt)
}
