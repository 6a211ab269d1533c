package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

// ServerConfig is a database in which tenants live, with its provisioner: the login that makes
// schemas and roles there (LOGIN, CREATEROLE, owner of the database, not a superuser).
type ServerConfig struct {
	// Name of the server in the catalog. Default: "main".
	Name string
	// URL with the provisioner's login: postgres://user:password@host:port/database. Required.
	URL string
}

// Format writes what can be shown, whatever the verb: the URL holds a password.
func (s ServerConfig) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenancy.ServerConfig{Name: %q, URL: %s}", s.Name, redactURL(s.URL))
}

// MarshalText is Format for JSON and log/slog.
func (s ServerConfig) MarshalText() ([]byte, error) { return fmt.Append(nil, s), nil }

func (s ServerConfig) parse() (string, DataSource, error) {
	name := s.Name
	def(&name, "main")
	if err := ident.Slug(name); err != nil {
		return "", DataSource{}, invalid(fmt.Errorf("ServerConfig.Name: %w", err))
	}
	d, err := ParseDataSource(s.URL)
	if err != nil {
		return "", DataSource{}, fmt.Errorf("ServerConfig.URL: %w", err)
	}
	if err := errors.Join(ident.Schema(d.Database), ident.Schema(d.User)); err != nil {
		return "", DataSource{}, invalid(fmt.Errorf("ServerConfig.URL: database and user: %w", err))
	}
	return name, d, nil
}

// AdminConfig is what Init needs: an administrator, and the names and passwords of what it is to make.
type AdminConfig struct {
	// AdminURL is a superuser, or a login with CREATEDB and CREATEROLE, on the server of both databases. Required.
	// It is used by Init alone and stored nowhere.
	AdminURL string
	// PrimaryURL names the primary database and the catalog login, as in Config.PrimaryURL. Required.
	PrimaryURL string
	// Server names the tenants' database and the provisioner. Required.
	Server ServerConfig
	// ServerAdminURL is the administrator of Server where that is another PostgreSQL. Default: AdminURL.
	ServerAdminURL string
	// Keys seal the provisioner's password in the primary, as in Config.Keys. Required.
	Keys Keyring
	// Extensions are created in tenancy_ext of the tenants' database. Default: none.
	Extensions []string
}

// Format writes what can be shown, whatever the verb: URLs hold passwords.
func (a AdminConfig) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenancy.AdminConfig{AdminURL: %s, PrimaryURL: %s, Server: %v, Keys: %v}", redactURL(a.AdminURL), redactURL(a.PrimaryURL), a.Server, a.Keys)
}

// MarshalText is Format for JSON and log/slog.
func (a AdminConfig) MarshalText() ([]byte, error) { return fmt.Append(nil, a), nil }

// Init makes what a fleet needs before the first Open: the two databases, the catalog login, the
// provisioner, their privileges and the primary's own schema, and registers the server. It may be
// called again: what exists is checked, privileges and the two passwords are set once more.
//
// Every privilege is verified with PostgreSQL's own has_*_privilege functions, because some refusals are warnings only.
// The error is [ErrInvalid], [ErrWrongKey], [ErrPrimaryUnavailable], a [*SetupError] or the server's.
func Init(ctx context.Context, admin AdminConfig) error {
	def(&admin.ServerAdminURL, admin.AdminURL)
	name, server, err := admin.Server.parse()
	if err != nil {
		return err
	}
	catalog, err := ParseDataSource(admin.PrimaryURL)
	if err != nil {
		return fmt.Errorf("AdminConfig.PrimaryURL: %w", err)
	}
	if err := errors.Join(ident.Schema(catalog.Database), ident.Schema(catalog.User)); err != nil {
		return invalid(fmt.Errorf("AdminConfig.PrimaryURL: database and user: %w", err))
	}
	if err := apart(ctx, admin, catalog, server); err != nil {
		return err
	}
	if catalog.User == server.User {
		return invalid(errors.New("AdminConfig: the catalog login and the provisioner must not be one"))
	}
	if admin.AdminURL == "" { // pgx would take the environment's, or the nearest server
		return invalid(errors.New("AdminConfig.AdminURL is required"))
	}
	if admin.Keys.IsZero() {
		return invalid(errors.New("AdminConfig.Keys is required"))
	}
	if err := initDatabase(ctx, "AdminURL", admin.AdminURL, catalog, false); err != nil {
		return err
	}
	cfg := Config{PrimaryURL: admin.PrimaryURL, Keys: admin.Keys}.withDefaults()
	p, err := openPrimary(ctx, cfg)
	if err != nil {
		return err
	}
	defer p.pool.Close()
	if err := p.sameProvisioner(ctx, server); err != nil {
		return err
	}
	if err := initDatabase(ctx, "ServerAdminURL", admin.ServerAdminURL, server, true); err != nil {
		return err
	}
	if err := initTenants(ctx, admin.ServerAdminURL, server, admin.Extensions); err != nil {
		return err
	}
	if err := p.registerServer(ctx, name, server); err != nil {
		return err
	}
	return errors.Join(p.verify(ctx), verifyServer(ctx, server, len(admin.Extensions) > 0))
}

// apart refuses one database for the primary and the tenants, under whatever address.
func apart(ctx context.Context, admin AdminConfig, catalog, server DataSource) error {
	if catalog.Database != server.Database {
		return nil
	}
	var systems [2]string
	for i, a := range []struct{ field, url string }{{"AdminURL", admin.AdminURL}, {"ServerAdminURL", admin.ServerAdminURL}} {
		conn, err := connectAdmin(ctx, a.field, a.url, "")
		if err != nil {
			return err
		}
		err = conn.QueryRow(ctx, `SELECT system_identifier::text FROM pg_control_system()`).Scan(&systems[i])
		closeConn(conn)
		if err != nil {
			return fmt.Errorf("tenancy: init: AdminConfig.%s: %w", a.field, err)
		}
	}
	if systems[0] == systems[1] {
		return invalid(errors.New("AdminConfig: the primary and the tenants need databases of their own"))
	}
	return nil
}

// initDatabase makes a database and the login that owns it.
func initDatabase(ctx context.Context, field, adminURL string, d DataSource, provisioner bool) error {
	conn, err := connectAdmin(ctx, field, adminURL, "")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtextextended('tenancy init', 0))`); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	verifier, err := scram.Verifier(d.Password.Reveal(), 0)
	if err != nil {
		return invalid(fmt.Errorf("password of login %q: %w", d.User, err))
	}
	var exists, super bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0, coalesce(bool_or(rolsuper), false) FROM pg_roles WHERE rolname = $1`, d.User).Scan(&exists, &super); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	if super {
		return invalid(fmt.Errorf("login %q is a superuser: name another one, which Init makes", d.User))
	}
	verb, rights := "CREATE", "NOCREATEROLE"
	if exists {
		verb = "ALTER"
	}
	if provisioner {
		rights = "CREATEROLE"
	}
	login, database := ident.Quote(d.User), ident.Quote(d.Database)
	steps := []string{
		verb + " ROLE " + login + " LOGIN NOCREATEDB " + rights + " PASSWORD " + ident.Literal(verifier),
	}
	var there, mine bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_database WHERE datname = $1`, d.Database).Scan(&there); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	if err := conn.QueryRow(ctx, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&mine); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	if !mine { // only a member may give a database away
		steps = append(steps, grantMembership(conn, d.User, conn.Config().User))
	}
	if !there {
		steps = append(steps, "CREATE DATABASE "+database+" OWNER "+login)
	} else {
		steps = append(steps, "ALTER DATABASE "+database+" OWNER TO "+login)
	}
	steps = append(steps, "REVOKE ALL ON DATABASE "+database+" FROM PUBLIC")
	if provisioner {
		group := ident.Quote(tenantsRole(d.Database))
		var made bool
		if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, tenantsRole(d.Database)).Scan(&made); err != nil {
			return fmt.Errorf("tenancy: init: %w", err)
		}
		if !made {
			steps = append(steps, "CREATE ROLE "+group+" NOLOGIN")
		}
		steps = append(steps,
			"GRANT CONNECT, TEMPORARY ON DATABASE "+database+" TO "+group,
			"GRANT "+group+" TO "+login+" WITH ADMIN OPTION")
	}
	return execAll(ctx, conn, "init", steps)
}

// initTenants closes the tenants' database but for what every tenant may share.
func initTenants(ctx context.Context, adminURL string, d DataSource, extensions []string) error {
	conn, err := connectAdmin(ctx, "ServerAdminURL", adminURL, d.Database)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtextextended('tenancy init', 0))`); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	group, provisioner := ident.Quote(tenantsRole(d.Database)), ident.Quote(d.User)
	steps := []string{"REVOKE ALL ON SCHEMA public FROM PUBLIC"}
	for _, schema := range []string{extSchema, refSchema} {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, schema).Scan(&there); err != nil {
			return fmt.Errorf("tenancy: init: %w", err)
		}
		if !there {
			steps = append(steps, "CREATE SCHEMA "+schema+" AUTHORIZATION "+provisioner)
		}
		steps = append(steps, "REVOKE ALL ON SCHEMA "+schema+" FROM PUBLIC", "GRANT USAGE ON SCHEMA "+schema+" TO "+group)
	}
	// To PUBLIC, which USAGE of the schema narrows down to the tenants: a default privilege of the group
	// is gone after DROP OWNED BY group, which PostgreSQL allows to each of its members.
	steps = append(steps, "ALTER DEFAULT PRIVILEGES FOR ROLE "+provisioner+" IN SCHEMA "+refSchema+" GRANT SELECT ON TABLES TO PUBLIC")
	for _, extension := range extensions {
		steps = append(steps, "CREATE EXTENSION IF NOT EXISTS "+ident.Quote(extension)+" SCHEMA "+extSchema)
	}
	return execAll(ctx, conn, "init", steps)
}

// tenantsRole names the role that may connect to a tenants' database. Every tenant's roles are
// members: CONNECT is granted once, because parallel grants on one database lose each other.
func tenantsRole(database string) string { return database + "_tenants" }

// grantMembership returns the statement that lets member act for role. From PostgreSQL 16 on a
// creator has ADMIN on a role and neither SET nor INHERIT.
func grantMembership(conn *pgx.Conn, role, member string) string {
	s := "GRANT " + ident.Quote(role) + " TO " + ident.Quote(member)
	if serverMajor(conn) >= 16 {
		s += " WITH INHERIT TRUE, SET TRUE"
	}
	return s
}

// serverMajor returns the major version that the server told at login.
func serverMajor(conn *pgx.Conn) int {
	var major int
	_, _ = fmt.Sscanf(conn.PgConn().ParameterStatus("server_version"), "%d", &major)
	return major
}

func execAll(ctx context.Context, conn *pgx.Conn, op string, steps []string) error {
	for _, sql := range steps {
		if err := execDDL(ctx, conn, sql); err != nil {
			return fmt.Errorf("tenancy: %s: %s: %w", op, withoutPassword(sql), err)
		}
	}
	return nil
}

// withoutPassword cuts a role statement before its password. What is cut is a verifier and not
// the password, and still does not belong into a log.
func withoutPassword(sql string) string {
	before, _, cut := strings.Cut(sql, " PASSWORD ")
	if cut {
		before += " PASSWORD ..."
	}
	return before
}

// isURL refuses what pgx reads as key=value settings: a jdbc: URL is one, and would go with its
// password to the nearest socket.
func isURL(s string) bool {
	return strings.HasPrefix(s, "postgres://") || strings.HasPrefix(s, "postgresql://")
}

func connectAdmin(ctx context.Context, field, url, database string) (*pgx.Conn, error) {
	cc, err := pgx.ParseConfig(url)
	if err != nil || !isURL(url) {
		return nil, invalid(fmt.Errorf("AdminConfig.%s: not a PostgreSQL URL", field))
	}
	if database != "" {
		cc.Database = database
	}
	cc.RuntimeParams["search_path"] = "pg_catalog"
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, fmt.Errorf("tenancy: init: AdminConfig.%s: %w", field, withoutSecrets(err))
	}
	return conn, nil
}

// Finding is one thing that is missing, and the statement that mends it.
type Finding struct{ What, Fix string }

// SetupError lists what [Init] would have made and is missing. It matches [ErrSetup].
type SetupError struct{ Missing []Finding }

func (e *SetupError) Error() string {
	var b strings.Builder
	b.WriteString(ErrSetup.Error())
	for _, f := range e.Missing {
		b.WriteString(": " + f.What + "; mend it with: " + f.Fix)
	}
	return b.String()
}

func (e *SetupError) Unwrap() error { return ErrSetup }

// check is one question to a server whose answer must be yes.
type check struct{ sql, what, fix string }

func ask(ctx context.Context, q querier, checks []check) error {
	var e SetupError
	for _, c := range checks {
		var ok bool
		if err := q.QueryRow(ctx, `SELECT coalesce((`+c.sql+`), false)`).Scan(&ok); err != nil {
			return err
		}
		if !ok {
			e.Missing = append(e.Missing, Finding{c.what, c.fix})
		}
	}
	if len(e.Missing) > 0 {
		return &e
	}
	return nil
}

// verify checks the primary's own privileges.
func (p *primaryDB) verify(ctx context.Context) error {
	database := p.pool.Config().ConnConfig.Database
	err := ask(ctx, p.pool, []check{
		{`NOT has_database_privilege('public', current_database(), 'CONNECT')`,
			fmt.Sprintf("every role may connect to the primary %q", database),
			fmt.Sprintf("REVOKE ALL ON DATABASE %s FROM PUBLIC;", ident.Quote(database))},
		{`NOT has_schema_privilege('public', 'tenancy', 'USAGE')`,
			"every role may use schema tenancy of the primary",
			"REVOKE ALL ON SCHEMA tenancy FROM PUBLIC;"},
	})
	if err != nil && !errors.Is(err, ErrSetup) {
		return unavailable("verify the primary", err)
	}
	return err
}

// verifyServer checks the provisioner and the tenants' database, asked as the provisioner.
func verifyServer(ctx context.Context, d DataSource, extensions bool) error {
	conn, err := connectProvisioner(ctx, d)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	login, database, group := ident.Quote(d.User), ident.Quote(d.Database), tenantsRole(d.Database)
	me := `SELECT %s FROM pg_roles WHERE rolname = current_user`
	checks := []check{
		{fmt.Sprintf(me, "rolcreaterole"), fmt.Sprintf("the provisioner %q lacks CREATEROLE", d.User),
			"ALTER ROLE " + login + " CREATEROLE;"},
		{fmt.Sprintf(me, "NOT rolsuper AND NOT rolbypassrls AND NOT rolreplication"), fmt.Sprintf("the provisioner %q is a superuser, or may bypass row-level security or replicate", d.User),
			"ALTER ROLE " + login + " NOSUPERUSER NOBYPASSRLS NOREPLICATION;"},
		{`SELECT pg_get_userbyid(datdba) = current_user FROM pg_database WHERE datname = current_database()`,
			fmt.Sprintf("the provisioner %q does not own the tenants' database %q", d.User, d.Database),
			"ALTER DATABASE " + database + " OWNER TO " + login + ";"},
		{`NOT has_database_privilege('public', current_database(), 'CONNECT')`,
			fmt.Sprintf("every role may connect to the tenants' database %q", d.Database),
			"REVOKE ALL ON DATABASE " + database + " FROM PUBLIC;"},
		{`NOT has_schema_privilege('public', 'public', 'CREATE')`,
			"every role may create in schema public of the tenants' database",
			"REVOKE ALL ON SCHEMA public FROM PUBLIC; -- in database " + database},
		{fmt.Sprintf(`SELECT count(*) = 1 FROM pg_roles WHERE rolname = %s`, ident.Literal(group)),
			fmt.Sprintf("the role %q of all tenants is missing", group),
			fmt.Sprintf("CREATE ROLE %s NOLOGIN;", ident.Quote(group))},
		{fmt.Sprintf(`SELECT has_database_privilege(oid, current_database(), 'CONNECT') FROM pg_roles WHERE rolname = %s`, ident.Literal(group)),
			fmt.Sprintf("the role %q of all tenants may not connect to the tenants' database %q", group, d.Database),
			fmt.Sprintf("GRANT CONNECT, TEMPORARY ON DATABASE %s TO %s;", database, ident.Quote(group))},
		{fmt.Sprintf(`SELECT pg_has_role(current_user, oid, 'MEMBER WITH ADMIN OPTION') FROM pg_roles WHERE rolname = %s`, ident.Literal(group)),
			fmt.Sprintf("the provisioner %q may not grant the role %q of all tenants", d.User, group),
			fmt.Sprintf("GRANT %s TO %s WITH ADMIN OPTION;", ident.Quote(group), login)},
	}
	for _, schema := range []string{extSchema, refSchema} {
		if schema == extSchema && !extensions {
			continue
		}
		of := `SELECT %s FROM pg_namespace n JOIN pg_roles r ON r.rolname = ` + ident.Literal(group) + ` WHERE nspname = ` + ident.Literal(schema)
		checks = append(checks,
			check{fmt.Sprintf(`to_regnamespace(%s) IS NOT NULL`, ident.Literal(schema)),
				fmt.Sprintf("schema %s is missing in %q", schema, d.Database),
				fmt.Sprintf("CREATE SCHEMA %s AUTHORIZATION %s; -- in database %s", schema, login, database)},
			check{fmt.Sprintf(of, `has_schema_privilege(r.oid, n.oid, 'USAGE')`),
				fmt.Sprintf("tenants may not use schema %s of %q", schema, d.Database),
				fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO %s; -- in database %s", schema, ident.Quote(group), database)},
			check{fmt.Sprintf(of, `NOT has_schema_privilege(r.oid, n.oid, 'CREATE')`),
				fmt.Sprintf("tenants may create in schema %s of %q", schema, d.Database),
				fmt.Sprintf("REVOKE CREATE ON SCHEMA %s FROM PUBLIC, %s; -- in database %s", schema, ident.Quote(group), database)},
		)
	}
	return ask(ctx, conn, slices.Clip(checks))
}

// sameProvisioner refuses another provisioner for a server that has one: the roles of the tenants there belong to the first.
func (p *primaryDB) sameProvisioner(ctx context.Context, d DataSource) error {
	var sealed []byte
	err := p.pool.QueryRow(ctx, `SELECT provisioner FROM tenancy.servers WHERE host = $1 AND port = $2 AND database = $3`, d.Host, d.Port, d.Database).Scan(&sealed)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && sealed == nil {
		return nil
	} else if err != nil {
		return unavailable("read servers", err)
	}
	now, err := p.openSource(UID(p.realm.Value()), "provisioner", sealed)
	if err != nil {
		return err
	}
	if now.User != d.User {
		return invalid(fmt.Errorf("server %s has the provisioner %q, which holds the roles of its tenants: only its password can change, %q is another login", d.Address(), now.User, d.User))
	}
	return nil
}

// registerServer adds the server to the catalog, or renews its provisioner's password.
func (p *primaryDB) registerServer(ctx context.Context, name string, d DataSource) error {
	err := pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		sealed, err := p.sealSource(UID(p.realm.Value()), "provisioner", d)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `INSERT INTO tenancy.servers (name, host, port, database, tls, provisioner) VALUES ($1, $2, $3, $4, $5, $6)
			ON CONFLICT (host, port, database) DO UPDATE SET provisioner = excluded.provisioner, tls = excluded.tls, updated = now()`,
			name, d.Host, d.Port, d.Database, d.TLS, sealed); err != nil {
			return err
		}
		if err := audit(ctx, tx, "register server", 0, map[string]any{"server": name, "address": d.Address()}); err != nil {
			return err
		}
		return changed(ctx, tx, "server", 0, name)
	})
	return unavailable("register server", err)
}
