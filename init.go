package tenancy

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

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
	// Extensions are created in tenancy_ext of the tenants' database, and of the template. Default: none.
	Extensions []string
	// TenantDatabases is for tenants with [IsolationDatabase]: the provisioner gets CREATEDB, and the template is made that their
	// databases are copied from, named after the tenants' database with _template behind it. Default: false, and the provisioner has no CREATEDB, nor keeps one.
	TenantDatabases bool
}

// Format writes what can be shown, whatever the verb: URLs hold passwords.
func (a AdminConfig) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenancy.AdminConfig{AdminURL: %s, PrimaryURL: %s, Server: %v, Keys: %v, TenantDatabases: %t}", redactURL(a.AdminURL), redactURL(a.PrimaryURL), a.Server, a.Keys, a.TenantDatabases)
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
	registered, server, err := admin.Server.parse()
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
	if err := initDatabase(ctx, "AdminURL", admin.AdminURL, catalog, "", ""); err != nil {
		return err
	}
	cfg := Config{PrimaryURL: admin.PrimaryURL, Keys: admin.Keys}.withDefaults()
	servers := newServers(cfg)
	p, err := openPrimary(ctx, cfg, servers)
	if err != nil {
		return err
	}
	defer p.pool.Close()
	defer p.follow.Close()
	if err := p.sameProvisioner(ctx, server); err != nil {
		return err
	}
	rights := "NOCREATEDB CREATEROLE"
	if admin.TenantDatabases {
		rights = "CREATEDB CREATEROLE"
	}
	if err := initDatabase(ctx, "ServerAdminURL", admin.ServerAdminURL, server, rights, registered.Tablespace); err != nil {
		return err
	}
	if err := initTenants(ctx, admin.ServerAdminURL, server, ident.Quote(tenantsRole(server.Database)), admin.Extensions); err != nil {
		return err
	}
	if admin.TenantDatabases {
		if err := initTemplate(ctx, admin.ServerAdminURL, server, admin.Extensions); err != nil {
			return err
		}
	}
	if err := p.registerServer(ctx, registered, server); err != nil {
		return err
	}
	return errors.Join(p.verify(ctx), verifyServer(ctx, servers, server, registered.Tablespace, len(admin.Extensions) > 0, admin.TenantDatabases))
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

// initDatabase makes a database and the login that owns it. rights are those of a provisioner, "" of the catalog login. tablespace is that of tenants, "" none.
func initDatabase(ctx context.Context, field, adminURL string, d DataSource, rights, tablespace string) error {
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
	verb, provisioner := "CREATE", rights != ""
	if exists {
		verb = "ALTER"
	}
	def(&rights, "NOCREATEDB NOCREATEROLE")
	login, database := ident.Quote(d.User), ident.Quote(d.Database)
	steps := []string{
		verb + " ROLE " + login + " LOGIN " + rights + " PASSWORD " + ident.Literal(verifier),
	}
	var mine bool
	if err := conn.QueryRow(ctx, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&mine); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	if !mine { // only a member may give a database away
		steps = append(steps, grantMembership(conn, d.User, conn.Config().User))
	}
	own, err := ownDatabase(ctx, conn, d.Database, d.User)
	if err != nil {
		return err
	}
	steps = append(steps, own...)
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
		if tablespace != "" {
			steps = append(steps, grantTablespace(d, tablespace))
		}
	}
	return execAll(ctx, conn, "init", steps)
}

// ownDatabase are the statements that make a database, or give it to its owner, and close it to all others.
func ownDatabase(ctx context.Context, conn *pgx.Conn, name, owner string) ([]string, error) {
	var there bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_database WHERE datname = $1`, name).Scan(&there); err != nil {
		return nil, fmt.Errorf("tenancy: init: %w", err)
	}
	database := ident.Quote(name)
	own := "CREATE DATABASE " + database + " OWNER " + ident.Quote(owner)
	if there {
		own = "ALTER DATABASE " + database + " OWNER TO " + ident.Quote(owner)
	}
	return []string{own, "REVOKE ALL ON DATABASE " + database + " FROM PUBLIC"}, nil
}

// initTemplate makes the database that tenants' own ones are copied from. What they share is open to everyone in it, which is whoever
// may connect to the copy: its tenant.
func initTemplate(ctx context.Context, adminURL string, d DataSource, extensions []string) error {
	conn, err := connectAdmin(ctx, "ServerAdminURL", adminURL, "")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtextextended('tenancy init', 0))`); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	d.Database = templateOf(d.Database)
	steps, err := ownDatabase(ctx, conn, d.Database, d.User)
	if err != nil {
		return err
	}
	if err := execAll(ctx, conn, "init", steps); err != nil {
		return err
	}
	return initTenants(ctx, adminURL, d, "PUBLIC", extensions)
}

// initTenants closes the tenants' database but for what every tenant may share.
func initTenants(ctx context.Context, adminURL string, d DataSource, tenants string, extensions []string) error {
	conn, err := connectAdmin(ctx, "ServerAdminURL", adminURL, d.Database)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtextextended('tenancy init', 0))`); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	// On Citus each schema that is made becomes a tenant's, on one worker. Those that all share do not.
	if _, err := conn.Exec(ctx, `SELECT set_config(name, 'off', false) FROM pg_settings WHERE name = 'citus.enable_schema_based_sharding'`); err != nil {
		return fmt.Errorf("tenancy: init: %w", err)
	}
	provisioner := ident.Quote(d.User)
	steps := []string{"REVOKE ALL ON SCHEMA public FROM PUBLIC"}
	for _, schema := range []string{extSchema, refSchema} {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, schema).Scan(&there); err != nil {
			return fmt.Errorf("tenancy: init: %w", err)
		}
		if !there {
			steps = append(steps, "CREATE SCHEMA "+schema+" AUTHORIZATION "+provisioner)
		}
		steps = append(steps, "REVOKE ALL ON SCHEMA "+schema+" FROM PUBLIC", "GRANT USAGE ON SCHEMA "+schema+" TO "+tenants)
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
