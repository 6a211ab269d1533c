package tenancy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/rowsec"
)

const (
	whyWall   = "the wall between tenants is open: one may read or write what is another's"
	whySecond = "one wall fewer is between tenants: the next mistake opens the data"
	whyServed = "the tenant's calls fail"
)

// role is one that a place of the server has.
type role struct {
	kind   string       // owner, runtime, login, dense role, dense login, reader
	place  *doctorPlace // nil: of several
	server *doctorServer
}

// roles are all roles of the server's places, by name.
func (s *doctorServer) roles() map[string]role {
	roles := map[string]role{}
	for _, p := range s.places {
		if p.state != "made" {
			continue // its verb may be at work
		}
		if p.isolation != IsolationShared {
			roles[p.owner], roles[p.runtime] = role{"owner", p, s}, role{"runtime", p, s}
		}
		for _, login := range p.logins() {
			roles[login] = role{"login", p, s}
		}
		for _, name := range p.denseRoles() {
			roles[name] = role{"dense role", p, s}
		}
	}
	for _, a := range s.areas {
		if a.state == "made" {
			roles[a.owner], roles[a.runtime] = role{"owner", nil, s}, role{"runtime", nil, s}
		}
	}
	for _, l := range s.dense {
		for _, login := range l.logins {
			roles[login] = role{"dense login", nil, s}
		}
	}
	if s.reader != "" {
		roles[s.reader] = role{"reader", nil, s}
	}
	return roles
}

// of tells a finding at a role.
func (w *ward) of(r role, level Level, what, why, mend string) {
	if r.place != nil {
		w.ofPlace(r.place, level, what, why, mend)
		return
	}
	w.find(level, what, why, mend)
}

func roleNames(roles map[string]role) []string {
	list := make([]string, 0, len(roles))
	for name := range roles {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}

// checkServer asks what Open and AddServer ask.
func checkServer(ctx context.Context, w *ward) error {
	const why = "tenants cannot be made there, or are open to roles that have no business there"
	extensions := w.tn.cfg.Extensions
	err := ask(ctx, w.conn, serverChecks(w.server.provisioner, w.server.tablespace, extensions))
	w.server.open = err != nil
	if err := w.missing(err, why); err != nil {
		return err
	}
	own := w.tn.cfg.Isolation == IsolationDatabase || slices.ContainsFunc(w.server.places, func(p *doctorPlace) bool { return p.isolation == IsolationDatabase })
	if own {
		if err := w.missing(verifyDatabases(ctx, w.tn.servers, w.conn, w.server.provisioner, extensions), why); err != nil {
			return err
		}
	}
	if w.server.reader != "" {
		return w.missing(ask(ctx, w.conn, readerChecks(w.server.reader)), "the reader reads all tenants, and must do nothing else")
	}
	return nil
}

// checkRoles looks at what each role is and may do at the server.
func checkRoles(ctx context.Context, w *ward) error {
	roles := w.server.roles()
	rows, _ := w.conn.Query(ctx, `SELECT r.rolname::text, rolcanlogin, rolinherit, array_remove(ARRAY[CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END, CASE WHEN rolcreatedb THEN 'CREATEDB' END,
			CASE WHEN rolreplication THEN 'REPLICATION' END, CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL), rolconnlimit, coalesce(rolvaliduntil > now() + $2::interval, true), coalesce(rolvaliduntil <= now(), false), coalesce(s.n, 0)
		FROM pg_roles r LEFT JOIN (SELECT usesysid, count(*) AS n FROM pg_stat_activity GROUP BY 1) s ON s.usesysid = r.oid WHERE rolname = ANY($1) ORDER BY 1`, roleNames(roles), ownerLease.String())
	type seen struct {
		name           string
		login, inherit bool
		rights         []string
		limit          int
		lasting, ended bool
		sessions       int
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s seen, err error) {
		return s, row.Scan(&s.name, &s.login, &s.inherit, &s.rights, &s.limit, &s.lasting, &s.ended, &s.sessions)
	})
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, s := range list {
		there[s.name] = true
		r, quoted := roles[s.name], ident.Quote(s.name)
		if len(s.rights) > 0 {
			w.of(r, LevelFailure, fmt.Sprintf("the %s %s has %s", r.kind, s.name, strings.Join(s.rights, ", ")), whyWall, withoutRights(s.name))
		}
		switch r.kind {
		case "owner":
			if s.login && s.lasting {
				w.of(r, LevelFailure, fmt.Sprintf("the owner %s may log in, for longer than a migration lasts", s.name), "who owns the schema needs no grant, and is behind no policy", "ALTER ROLE "+quoted+" NOLOGIN PASSWORD NULL;")
			} else if s.login && s.ended {
				w.of(r, LevelNote, fmt.Sprintf("the owner %s has a login that has expired", s.name), "a migration has died; nobody can use it", "ALTER ROLE "+quoted+" NOLOGIN PASSWORD NULL;")
			}
		case "runtime", "dense role":
			if s.login {
				w.of(r, LevelFailure, fmt.Sprintf("the %s %s may log in", r.kind, s.name), "it is no login: who has a password of it is no login that is fenced", "ALTER ROLE "+quoted+" NOLOGIN PASSWORD NULL;")
			}
		case "login":
			w.checkLogin(r.place, s.name, s.login, s.ended, s.limit, s.sessions)
		case "dense login":
			if s.ended {
				w.of(r, LevelFailure, fmt.Sprintf("the password of the shared pool's login %s has expired", s.name), "calls of all tenants of the pool fail", unending(s.name))
			}
			w.server.pools = w.server.pools || s.inherit || len(s.rights) > 0
			if !s.login {
				w.of(r, LevelFailure, fmt.Sprintf("the shared pool's login %s may not log in", s.name), "calls of all tenants of the pool fail", "ALTER ROLE "+quoted+" LOGIN;")
			}
			if s.inherit {
				w.of(r, LevelFailure, fmt.Sprintf("the shared pool's login %s inherits", s.name), "a call that is bound to no tenant, or a role that it is granted, has the rights of all of them", "ALTER ROLE "+quoted+" NOINHERIT;")
			}
		}
	}
	for _, name := range roleNames(roles) {
		if r := roles[name]; !there[name] && (r.place == nil || r.place.current) && (r.kind != "login" || name == r.place.source.User) {
			mend := "restore it from the server's roles (pg_dumpall --roles-only), with its memberships and grants"
			switch r.kind {
			case "login":
				mend = "call Catalog.RotatePassword"
			case "dense role":
				mend = "call Catalog.SetDense for the tenant, with false and then with true"
			case "reader":
				mend = "call Catalog.AddReader"
			}
			w.of(r, LevelFailure, fmt.Sprintf("the %s %s is missing", r.kind, name), whyServed, mend)
		}
	}
	if err := w.checkRoleSettings(ctx, roles); err != nil {
		return err
	}
	return w.checkParameters(ctx)
}

// unending is the statement that lets a role's password be valid for good, as the library makes it.
func unending(role string) string {
	return "ALTER ROLE " + ident.Quote(role) + " VALID UNTIL 'infinity';"
}

// checkLogin looks at a login of a place: whether it is open as its tenant's state wants it.
func (w *ward) checkLogin(p *doctorPlace, name string, open, ended bool, limit, sessions int) {
	if !p.current || name != p.source.User {
		return
	}
	quoted := ident.Quote(name)
	switch p.tenant.State {
	case StateActive:
		if !open {
			w.ofPlace(p, LevelFailure, fmt.Sprintf("the login %s of a tenant in service may not log in", name), whyServed, "ALTER ROLE "+quoted+" LOGIN;")
		}
		if ended {
			w.ofPlace(p, LevelFailure, fmt.Sprintf("the password of the login %s of a tenant in service has expired", name), whyServed, unending(name))
		}
	case StateSuspended, StateMaintenance, StateDeleted:
		was := w.check
		w.check = "fence"
		if p.fenced && open {
			w.ofPlace(p, LevelFailure, fmt.Sprintf("the tenant is %s, and its login %s may log in", p.tenant.State, name), "who has its password is served, and so is a node that hears nothing", "ALTER ROLE "+quoted+" NOLOGIN;")
		}
		if p.fenced && sessions > 0 {
			w.ofPlace(p, LevelFailure, fmt.Sprintf("the tenant is %s, and its login %s has %d sessions", p.tenant.State, name, sessions), "it is served to whoever has them",
				"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = "+ident.Literal(name)+";")
		}
		w.check = was
	}
	l := w.tn.cfg.Limits
	if least := int64(l.Nodes) * int64(l.TenantConns); limit >= 0 && int64(limit) < least {
		w.ofPlace(p, LevelWarning, fmt.Sprintf("the login %s has CONNECTION LIMIT %d, and Limits.Nodes times TenantConns is %d", name, limit, least), "at full load its connections are refused", "ALTER ROLE "+quoted+" CONNECTION LIMIT "+fmt.Sprint(2*least)+";")
	}
}

// checkMemberships compares who is a member of whom with what the library makes.
func checkMemberships(ctx context.Context, w *ward) error {
	roles := w.server.roles()
	provisioner, group := w.server.provisioner.User, tenantsRole(w.server.provisioner.Database)
	type edge struct{ of, member string }
	wanted, needed := map[edge]bool{}, map[edge]*doctorPlace{}
	for name := range roles {
		wanted[edge{name, provisioner}] = true
	}
	for _, a := range w.server.areas {
		wanted[edge{group, a.owner}] = true
	}
	for _, p := range w.server.places {
		served := p.current && p.state == "made" && p.tenant.State == StateActive
		want := func(e edge, need bool) {
			wanted[e] = true
			if need && served {
				needed[e] = p
			}
		}
		for _, login := range p.logins() {
			now := login == p.source.User
			want(edge{p.runtime, login}, now)
			if p.isolation == IsolationSchema {
				want(edge{group, login}, now)
			}
		}
		if p.isolation == IsolationSchema {
			want(edge{group, p.owner}, true)
		}
		if p.isolation != IsolationShared { // while the login is rotated, the next one owns what it does
			want(edge{p.source.User, p.nextLogin}, false)
			want(edge{p.oldLogin, p.source.User}, false)
		}
		for _, name := range p.denseRoles() {
			want(edge{p.runtime, name}, p.dense)
			for _, l := range w.server.dense {
				for i, login := range l.logins {
					if l.isolation == p.isolation {
						want(edge{name, login}, p.dense && i == 0)
					}
				}
			}
		}
	}
	rows, _ := w.conn.Query(ctx, `SELECT r.rolname::text, m.rolname::text, CASE WHEN current_setting('server_version_num')::int >= 160000 THEN coalesce(g.rolname::text, '') ELSE '' END,
			coalesce((to_jsonb(a) ->> 'inherit_option')::boolean, m.rolinherit), m.rolsuper
		FROM pg_auth_members a JOIN pg_roles r ON r.oid = a.roleid JOIN pg_roles m ON m.oid = a.member LEFT JOIN pg_roles g ON g.oid = a.grantor
		WHERE r.rolname = ANY($1) OR m.rolname = ANY($1) OR m.rolname = $2 ORDER BY 1, 2`, roleNames(roles), group) // the group of all tenants is a member of nothing
	var e edge
	var grantor string
	var inherits, super bool
	_, err := pgx.ForEachRow(rows, []any{&e.of, &e.member, &grantor, &inherits, &super}, func() error {
		by := ""
		if grantor != "" {
			by = " GRANTED BY " + ident.Quote(grantor)
		}
		delete(needed, e)
		member, known := roles[e.member]
		if wanted[e] {
			if known && member.kind == "dense login" && inherits && grantor != "" { // before PostgreSQL 16 it is the login that inherits, or not
				w.of(roles[e.of], LevelFailure, fmt.Sprintf("the shared pool's login %s inherits the rights of %s", e.member, e.of), "a call that is bound to no tenant has them",
					"GRANT "+ident.Quote(e.of)+" TO "+ident.Quote(e.member)+" WITH INHERIT FALSE"+by+";")
			}
			return nil
		}
		at, exposed := roles[e.of] // whose data is open
		if !exposed || at.place == nil {
			at = member
			if !known {
				at = roles[e.of]
			}
		}
		level := LevelFailure
		if super {
			level = LevelNote // who is a superuser needs no membership
		}
		w.of(at, level, fmt.Sprintf("%s is a member of %s, which the library has not made it", e.member, e.of), "it may become that role, with all that the role may", "REVOKE "+ident.Quote(e.of)+" FROM "+ident.Quote(e.member)+by+";")
		return nil
	})
	if err != nil {
		return err
	}
	for e, p := range needed {
		if p.suspect { // a role that is missing is no member either
			continue
		}
		grant := "GRANT " + ident.Quote(e.of) + " TO " + ident.Quote(e.member)
		if e.of == p.denseRole {
			grant = takeRole(w.conn, ident.Quote(e.of), e.member)
		}
		w.ofPlace(p, LevelFailure, fmt.Sprintf("%s is no member of %s", e.member, e.of), whyServed, grant+";")
	}
	return nil
}

// checkDatabases looks for who may connect to a database of tenants, and is not of it.
func checkDatabases(ctx context.Context, w *ward) error {
	by := map[string]*doctorPlace{}
	own := w.server.provisioner
	allowed := map[string]bool{own.User: true, tenantsRole(own.Database): true}
	allowed[w.server.reader], allowed[""] = true, true // checkServer asks for PUBLIC
	for _, p := range w.server.places {
		if p.isolation == IsolationDatabase && p.state == "made" {
			by[p.source.Database] = p
		}
	}
	for _, a := range w.server.areas {
		allowed[a.runtime] = true
	}
	for _, l := range w.server.dense {
		for _, login := range l.logins {
			allowed[login] = true
		}
	}
	databases := append(schemaNames(by), own.Database)
	rows, _ := w.conn.Query(ctx, `SELECT d.datname::text, coalesce(r.rolname::text, ''), string_agg(acl.privilege_type, ', ' ORDER BY acl.privilege_type), has_database_privilege('public', d.oid, 'CONNECT')
		FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) acl LEFT JOIN pg_roles r ON r.oid = acl.grantee
		WHERE d.datname = ANY($1) AND NOT coalesce(r.rolsuper, false) GROUP BY 1, 2, 4 ORDER BY 1, 2`, databases)
	var database, grantee, rights string
	var public bool
	_, err := pgx.ForEachRow(rows, []any{&database, &grantee, &rights, &public}, func() error {
		p := by[database]
		if p == nil && allowed[grantee] {
			return nil
		}
		if p != nil && (grantee == own.User || grantee == p.owner || grantee == p.runtime || grantee != "" && grantee == w.server.reader) {
			return nil
		}
		who, to := "role "+grantee, ident.Quote(grantee)
		if grantee == "" {
			who, to = "PUBLIC", "PUBLIC"
		}
		what, mend := fmt.Sprintf("%s has %s on database %s", who, rights, database), "REVOKE ALL ON DATABASE "+ident.Quote(database)+" FROM "+to+";"
		if p == nil {
			w.find(LevelWarning, what, whySecond, mend)
		} else {
			w.ofPlace(p, LevelFailure, what, whyWall, mend)
		}
		w.server.open = true
		return nil
	})
	return err
}

// checkOrphans looks for what has a name of the library's and is of this server's own, and no place of the primary has. Roles are those of all databases of the PostgreSQL server, of which others
// can be another service's: a role is of this one where the provisioner is a member of it, as it is from PostgreSQL 16 on of what it made, or where it is one of the tenants, or owns or may use something in the database.
func checkOrphans(ctx context.Context, w *ward) error {
	groups := []string{tenantsRole(w.server.provisioner.Database)}
	for _, a := range w.server.areas {
		groups = append(groups, a.runtime)
	}
	rows, _ := w.conn.Query(ctx, `SELECT 'schema', nspname::text FROM pg_namespace WHERE nspname ~ '^t_[0-9a-f]{20}$'
		UNION ALL SELECT 'database', datname::text FROM pg_database WHERE datname ~ '^t_[0-9a-f]{20}$' AND pg_get_userbyid(datdba) = current_user
		UNION ALL SELECT 'role', r.rolname::text FROM pg_roles r WHERE r.rolname ~ '^t_[0-9a-f]{20}' AND (EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles me ON me.oid = m.member WHERE m.roleid = r.oid AND me.rolname = current_user)
			OR EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid AND g.rolname = ANY($1))
			OR EXISTS (SELECT FROM pg_shdepend s WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())))
		ORDER BY 1, 2`, groups)
	type thing struct{ Kind, Name string }
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[thing])
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(t thing) bool { return w.known[t.Name] })
	if len(all) == 0 {
		return nil
	}
	candidates := make([]string, len(all))
	for i, t := range all {
		candidates[i] = t.Name
	}
	// What a verb has begun since the places were read is in the primary by now: its row comes first.
	rows, _ = w.tn.primary.pool.Query(ctx, `SELECT name FROM (
			SELECT unnest(ARRAY[schema, database, owner, runtime, login, next_login, old_login, dense_role]) FROM tenancy.data_sources WHERE state <> 'dropped'
			UNION ALL SELECT unnest(ARRAY[schema, owner, runtime]) FROM tenancy.shared_areas
			UNION ALL SELECT unnest(ARRAY[login, next_login, old_login]) FROM tenancy.dense_logins
			UNION ALL SELECT role FROM tenancy.readers) names (name) WHERE name = ANY($1)`, candidates)
	since, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return unavailable("read places", err)
	}
	for _, t := range all {
		if slices.Contains(since, t.Name) {
			continue
		}
		quoted := ident.Quote(t.Name)
		mend := map[string]string{"schema": "DROP SCHEMA " + quoted + " CASCADE;", "database": "DROP DATABASE " + quoted + ";", "role": "DROP ROLE " + quoted + ";"}[t.Kind]
		if t.Kind == "role" {
			mend = "DROP OWNED BY " + quoted + "; " + mend
		}
		w.find(LevelWarning, fmt.Sprintf("%s %s is of no place in the primary", t.Kind, t.Name), "a crash has left it, or the primary was restored: it takes up room, and may be data that nobody knows of any more",
			w.within(mend)+", after a look at what is in it")
	}
	return nil
}

// inDatabase is a finding at a database: its tenant's, where it has only one.
func (w *ward) inDatabase(level Level, what, why, mend string) {
	if len(w.places) == 1 && w.places[0].isolation == IsolationDatabase {
		w.ofPlace(w.places[0], level, what, why, mend)
		return
	}
	w.find(level, what+" in database "+w.address.Database, why, mend)
}

// schemas are those of the ward's places that are made, and of the shared one, with whose they are.
func (w *ward) schemas() map[string]*doctorPlace {
	by := map[string]*doctorPlace{}
	for _, p := range w.places {
		if p.state == "made" && p.isolation != IsolationShared {
			by[p.source.Schema] = p
		}
	}
	if w.address.Database != w.server.provisioner.Database {
		return by
	}
	for _, a := range w.server.areas {
		if a.state == "made" { // no tenant's alone
			p := &doctorPlace{place: place{state: a.state, isolation: IsolationShared, owner: a.owner, runtime: a.runtime, source: DataSource{Schema: a.schema, Database: w.address.Database}}}
			by[a.schema] = p
		}
	}
	return by
}

func schemaNames(by map[string]*doctorPlace) []string {
	list := make([]string, 0, len(by))
	for name := range by {
		list = append(list, name)
	}
	return list
}

// at tells a finding at a schema: a shared one is no place's.
func (w *ward) at(p *doctorPlace, level Level, what, why, mend string) {
	if p.isolation != IsolationShared {
		w.ofPlace(p, level, what, why, mend)
		return
	}
	w.find(level, what, why, mend)
	for _, p := range w.places {
		p.suspect = p.suspect || p.isolation == IsolationShared && w.check == "place"
	}
}

// checkPlaces looks whether the schemas are there, with what the library keeps in them, and whose they are.
func checkPlaces(ctx context.Context, w *ward) error {
	by := w.schemas()
	rows, _ := w.conn.Query(ctx, `SELECT n.nspname::text, pg_get_userbyid(n.nspowner)::text, array_agg(c.relname::text) FILTER (WHERE c.relname IS NOT NULL)
		FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname IN ($2, $3) AND c.relkind IN ('r', 'v') WHERE n.nspname = ANY($1) GROUP BY 1, 2 ORDER BY 1`, schemaNames(by), markerTable, versionTable)
	var name, owner string
	var tables []string
	there := map[string]bool{}
	if _, err := pgx.ForEachRow(rows, []any{&name, &owner, &tables}, func() error {
		p := by[name]
		there[name] = true
		if owner != p.owner {
			w.at(p, LevelFailure, fmt.Sprintf("schema %s belongs to %s, and not to %s", name, owner, p.owner), "its owner may do anything there, and migrations fail", w.within("ALTER SCHEMA "+ident.Quote(name)+" OWNER TO "+ident.Quote(p.owner)+";"))
		}
		for _, table := range []string{markerTable, versionTable} {
			if !slices.Contains(tables, table) {
				w.at(p, LevelFailure, fmt.Sprintf("schema %s has no %s", name, table), "no connection proves that it is the tenant's, or no migration knows where it stands", "restore it from a backup of the schema")
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for name, p := range by {
		if !there[name] {
			w.at(p, LevelFailure, fmt.Sprintf("schema %s is missing", name), whyServed, "restore the schema from a backup")
		}
	}
	if w.address.Database == w.server.provisioner.Database {
		return nil
	}
	return w.missingInDatabase(ctx)
}

// missingInDatabase asks of a database of a tenant's own what is asked of the template that it was copied from.
func (w *ward) missingInDatabase(ctx context.Context) error {
	d := w.server.provisioner
	d.Database = w.address.Database
	failed, err := failing(ctx, w.conn, sharedChecks(d, everyone, w.tn.cfg.Extensions))
	for _, c := range failed {
		w.inDatabase(LevelFailure, c.what, "the database is not as those of other tenants are: calls fail, or what nobody should make can be made", c.fix)
	}
	return err
}

// grants are what others than their owner have, on schemas $1, on what is in them, and by default on what will be.
const grants = `WITH schema AS (SELECT oid, nspname, nspowner, nspacl FROM pg_namespace WHERE nspname = ANY($1)), acl AS (
		SELECT nspname, 'schema' AS kind, '' AS owner, acl.grantee FROM schema, aclexplode(nspacl) acl WHERE acl.grantee <> nspowner
		UNION ALL SELECT nspname, CASE c.relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, '', acl.grantee FROM schema JOIN pg_class c ON c.relnamespace = schema.oid, aclexplode(c.relacl) acl WHERE acl.grantee <> c.relowner
		UNION ALL SELECT nspname, 'table', '', acl.grantee FROM schema JOIN pg_class c ON c.relnamespace = schema.oid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attacl IS NOT NULL, aclexplode(a.attacl) acl WHERE acl.grantee <> c.relowner
		UNION ALL SELECT nspname, CASE d.defaclobjtype WHEN 'S' THEN 'sequences to come' ELSE 'tables to come' END || CASE d.defaclnamespace WHEN 0 THEN ' anywhere' ELSE '' END, pg_get_userbyid(d.defaclrole)::text, acl.grantee
			FROM schema JOIN pg_default_acl d ON (d.defaclnamespace = schema.oid OR d.defaclnamespace = 0 AND d.defaclrole = schema.nspowner) AND d.defaclobjtype IN ('r', 'S'), aclexplode(d.defaclacl) acl WHERE acl.grantee <> d.defaclrole)
	SELECT nspname::text, kind, owner, coalesce(r.rolname::text, ''), coalesce(r.rolsuper, false), count(*) FROM acl LEFT JOIN pg_roles r ON r.oid = acl.grantee GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4`

// checkPrivileges looks for what was granted to whom the library grants nothing.
func checkPrivileges(ctx context.Context, w *ward) error {
	by, roles := w.schemas(), w.server.roles()
	rows, _ := w.conn.Query(ctx, grants, schemaNames(by))
	var schema, kind, owner, grantee string
	var super bool
	var n int
	_, err := pgx.ForEachRow(rows, []any{&schema, &kind, &owner, &grantee, &super, &n}, func() error {
		p := by[schema]
		r, known := roles[grantee]
		own := grantee == p.owner || grantee == p.runtime || slices.Contains(p.logins(), grantee) || grantee != "" && grantee == p.denseRole
		open := p.isolation == IsolationShared && grantee == "" && strings.HasPrefix(kind, "sequence") // see internal/rowsec
		if own || open || super || grantee == w.server.provisioner.User || grantee != "" && grantee == w.server.reader {
			return nil
		}
		level, who, why := LevelNote, "role "+grantee, "the library knows nothing of that role"
		switch {
		case grantee == "" && kind == "schema", known, grantee == tenantsRole(w.server.provisioner.Database):
			level, why = LevelFailure, whyWall
		case grantee == "":
			level, why = LevelWarning, whySecond
		}
		to := ident.Quote(grantee)
		if grantee == "" {
			who, to = "PUBLIC", "PUBLIC"
		}
		if known && r.place != nil && r.place.tenant.ID != 0 {
			who += " of tenant " + r.place.tenant.Name
		}
		in := " IN SCHEMA " + ident.Quote(schema)
		what, mend := fmt.Sprintf("%s has rights on %ss of schema %s", who, kind, schema), ""
		switch kind {
		case "schema":
			what, mend = fmt.Sprintf("%s has rights on schema %s", who, schema), "REVOKE ALL ON SCHEMA "+ident.Quote(schema)+" FROM "+to+";"
		case "table", "sequence":
			mend = "REVOKE ALL ON ALL " + strings.ToUpper(kind) + "S" + in + " FROM " + to + ";"
		default:
			of, _, _ := strings.Cut(kind, " ")
			what = fmt.Sprintf("%s will have rights on %s of %s in schema %s", who, kind, owner, schema)
			if strings.HasSuffix(kind, " anywhere") { // they are of no schema
				in = ""
			}
			mend = "ALTER DEFAULT PRIVILEGES FOR ROLE " + ident.Quote(owner) + in + " REVOKE ALL ON " + strings.ToUpper(of) + " FROM " + to + ";"
		}
		w.at(p, level, what, why, w.within(mend))
		return nil
	})
	if err != nil {
		return err
	}
	return w.checkLargeObjects(ctx)
}

// checkOwners looks for what in a schema is not its owner's.
func checkOwners(ctx context.Context, w *ward) error {
	by, roles := w.schemas(), w.server.roles()
	schemas := schemaNames(by)
	owners := make([]string, len(schemas))
	for i, name := range schemas {
		owners[i] = by[name].owner
	}
	rows, _ := w.conn.Query(ctx, `SELECT n.nspname::text, pg_get_userbyid(o.owner)::text, count(*), (array_agg(o.what ORDER BY o.what))[1:20] FROM unnest($1::text[], $2::text[]) place (schema, owner) JOIN pg_namespace n ON n.nspname = place.schema JOIN (
			SELECT relnamespace AS namespace, 'pg_class'::regclass AS class, oid, relowner AS owner, format('TABLE %s', oid::regclass) AS what FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
			UNION ALL SELECT pronamespace, 'pg_proc'::regclass, oid, proowner, format('ROUTINE %s', oid::regprocedure) FROM pg_proc) o ON o.namespace = n.oid
		WHERE pg_get_userbyid(o.owner) <> place.owner
		AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = o.class AND d.objid = o.oid AND d.deptype IN ('a', 'i', 'e')) -- a column's sequence, and what is an extension's
		GROUP BY 1, 2 ORDER BY 1, 2`, schemas, owners)
	var schema, owner string
	var n int
	var what []string
	_, err := pgx.ForEachRow(rows, []any{&schema, &owner, &n, &what}, func() error {
		p := by[schema]
		level, why := LevelWarning, "migrations cannot change it, and what it does it does with that role's rights"
		if _, known := roles[owner]; known {
			level, why = LevelFailure, whyWall
		}
		var mend strings.Builder
		for _, one := range what {
			mend.WriteString("ALTER " + one + " OWNER TO " + ident.Quote(p.owner) + "; ")
		}
		w.at(p, level, fmt.Sprintf("%d objects in schema %s belong to %s, such as %s", n, schema, owner, what[0]), why, w.within(strings.TrimSpace(mend.String())))
		return nil
	})
	return err
}

// checkRows asks the walls of a shared schema what stands open.
func checkRows(ctx context.Context, w *ward) error {
	for _, p := range w.schemas() {
		if p.isolation != IsolationShared {
			continue
		}
		holes, err := rowsec.Shared{Schema: p.source.Schema, Owner: p.owner, Runtime: p.runtime}.Holes(ctx, w.conn)
		if err != nil {
			return err
		}
		for _, h := range holes {
			w.find(LevelFailure, fmt.Sprintf("in the shared schema %s: %s", p.source.Schema, h.What), whyWall, w.within(h.Mend))
		}
	}
	return nil
}

// placesAtOnce is of how many places one statement asks.
const placesAtOnce = 25

// checkIsolation asks of each place what the library asks when it makes one. Where something was found already, that comes first.
func checkIsolation(ctx context.Context, w *ward) error {
	var places []*doctorPlace
	for _, p := range w.places {
		if p.state == "made" && p.current && !p.suspect {
			places = append(places, p)
		}
	}
	said := map[string]bool{} // one mend mends it for all
	for some := range slices.Chunk(places, placesAtOnce) {
		err := w.askPlaces(ctx, some, said)
		if err == nil {
			continue
		}
		for _, p := range some { // one of them has lost a role, or was dropped meanwhile
			if err := w.askPlaces(ctx, []*doctorPlace{p}, said); err != nil {
				if ctx.Err() != nil {
					return err
				}
				w.ofPlace(p, LevelFailure, "the check could not be made: "+err.Error(), "what it looks for may be there", "see what it says, and call Doctor again")
			}
		}
	}
	return nil
}

// askPlaces asks of all these places in one statement.
func (w *ward) askPlaces(ctx context.Context, places []*doctorPlace, said map[string]bool) error {
	var checks []check
	var of []*doctorPlace
	for _, p := range places {
		one := loginChecks(&p.place, p.source.User)
		if p.dense && p.denseRole != "" && p.denseLogin != "" && p.tenant.State == StateActive && !w.server.pools {
			one = append(one, denseChecks(&p.place)...)
		}
		for _, c := range one {
			checks, of = append(checks, c), append(of, p)
		}
	}
	yes, err := answers(ctx, w.conn, checks)
	if err != nil {
		return err
	}
	for i, c := range checks {
		// What opens a database was told at that.
		if yes[i] || said[c.fix] || w.server.open && (c.what == openElsewhere || c.what == openHere) {
			continue
		}
		said[c.fix] = true
		w.ofPlace(of[i], LevelFailure, c.what, whyWall+"; or its calls fail", c.fix)
	}
	return nil
}
