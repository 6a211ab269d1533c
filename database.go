package tenancy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// templateOf names the database that tenants' own databases at a server are copied from. It holds what takes an administrator to
// make (extensions), and nobody works in it: one who is connected keeps copies from being made.
func templateOf(database string) string { return database + "_template" }

// makeDatabase makes the place's own database, as a copy of the server's template, and opens it to the place's roles alone. conn is in another
// database. It never uses IF NOT EXISTS, which CREATE DATABASE has not: a database of that name that is not the provisioner's is another's.
func makeDatabase(ctx context.Context, conn *pgx.Conn, p *place) error {
	found, err := findDatabase(ctx, conn, p)
	if err != nil {
		return err
	}
	name := ident.Quote(p.source.Database)
	if !found.there {
		in := ""
		if p.tablespace != "" {
			in = " TABLESPACE " + ident.Quote(p.tablespace)
		}
		// Nobody can connect before the grants below are made: to a new database PUBLIC may.
		err := execUnused(ctx, conn, "CREATE DATABASE "+name+" TEMPLATE "+ident.Quote(templateOf(p.provisioner.Database))+in+" ALLOW_CONNECTIONS false")
		if isState(err, "42P04", "23505") { // a call that was cut off was still at it
			_, err = findDatabase(ctx, conn, p)
		}
		if err != nil {
			return err
		}
	}
	return execAll(ctx, conn, "provision", []string{
		"REVOKE ALL ON DATABASE " + name + " FROM PUBLIC",
		"GRANT CONNECT, TEMPORARY ON DATABASE " + name + " TO " + ident.Quote(p.owner) + ", " + ident.Quote(p.runtime),
		"ALTER DATABASE " + name + " ALLOW_CONNECTIONS true",
	})
}

// dropDatabase drops the place's own database, if it is there. The place's logins are closed and their sessions ended before.
//
// Without FORCE: that refuses a provisioner where an autovacuum is at work, which DROP DATABASE alone sends away.
func dropDatabase(ctx context.Context, conn *pgx.Conn, p *place) error {
	found, err := findDatabase(ctx, conn, p)
	if err != nil || !found.there {
		return err
	}
	name := ident.Quote(p.source.Database)
	if !found.broken {
		if err := execDDL(ctx, conn, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS false"); err != nil {
			return err
		}
	}
	// A node that died can have left a session of the provisioner's; and a reader can be at work there.
	if _, err := conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1
		AND (usename = current_user OR usename ~ ('^t_[0-9a-f]{20}' || $2 || '$') AND pg_has_role(usename, 'MEMBER'))`, p.source.Database, readerSuffix); err != nil {
		return fmt.Errorf("end sessions: %w", err)
	}
	err = execUnused(ctx, conn, "DROP DATABASE "+name)
	if isState(err, objectInUse) {
		err = fmt.Errorf("sessions that are not the tenant's are in it, see pg_stat_activity: %w", err)
	}
	return err
}

// foundDatabase is what the server says of a place's own database. One that is broken was being dropped when the server or the session
// ended: it can be dropped, and nothing else.
type foundDatabase struct{ there, broken bool }

// findDatabase looks for the place's own database, and refuses one that is not the provisioner's.
func findDatabase(ctx context.Context, conn *pgx.Conn, p *place) (foundDatabase, error) {
	var owner string
	var broken bool
	err := conn.QueryRow(ctx, `SELECT pg_get_userbyid(datdba), datconnlimit = -2 FROM pg_database WHERE datname = $1`, p.source.Database).Scan(&owner, &broken)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return foundDatabase{}, nil
	case err != nil:
		return foundDatabase{}, err
	case owner != p.provisioner.User:
		return foundDatabase{}, fmt.Errorf("database %s belongs to role %s and not to %s: it was not touched", p.source.Database, owner, p.provisioner.User)
	}
	return foundDatabase{there: true, broken: broken}, nil
}

// objectInUse is what CREATE and DROP DATABASE say when somebody is connected to the template, or to what is to be dropped. They had no effect.
const objectInUse = "55006"

// execUnused runs a CREATE or DROP DATABASE that others' sessions may be in the way of, for lockPatience. The server waits for 5 s by itself, but not
// for everything.
func execUnused(ctx context.Context, conn *pgx.Conn, sql string) error {
	for end := time.Now().Add(lockPatience); ; {
		err := execDDL(ctx, conn, sql)
		if !isState(err, objectInUse) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// databaseChecks are what has to be true of a server, asked in its own database, that is to make databases of tenants.
func databaseChecks(d DataSource) []check {
	login, template := ident.Quote(d.User), templateOf(d.Database)
	of := `SELECT %s FROM pg_database WHERE datname = ` + ident.Literal(template)
	return []check{
		{`SELECT rolcreatedb FROM pg_roles WHERE rolname = current_user`,
			fmt.Sprintf("the provisioner %q lacks CREATEDB, which a database of a tenant's own needs", d.User),
			"ALTER ROLE " + login + " CREATEDB;"},
		{fmt.Sprintf(of, "true"), fmt.Sprintf("the template %q of tenants' databases is missing", template),
			fmt.Sprintf("CREATE DATABASE %s OWNER %s; -- or run tenancy.Init with AdminConfig.TenantDatabases, which fills it too", ident.Quote(template), login)},
		{fmt.Sprintf(of, "pg_get_userbyid(datdba) = current_user"), fmt.Sprintf("the provisioner %q does not own the template %q of tenants' databases", d.User, template),
			"ALTER DATABASE " + ident.Quote(template) + " OWNER TO " + login + ";"},
		{fmt.Sprintf(of, "NOT has_database_privilege('public', oid, 'CONNECT')"), fmt.Sprintf("every role may connect to the template %q of tenants' databases", template),
			"REVOKE ALL ON DATABASE " + ident.Quote(template) + " FROM PUBLIC;"},
	}
}

// verifyDatabases checks that the server of conn, a session of its provisioner, can make databases of tenants, and the template that they are copied from.
func verifyDatabases(ctx context.Context, servers *servers, conn *pgx.Conn, d DataSource, extensions bool) error {
	if err := ask(ctx, conn, databaseChecks(d)); err != nil {
		return err
	}
	d.Database = templateOf(d.Database)
	template, err := connectProvisioner(ctx, servers, d)
	if err != nil {
		return err
	}
	defer closeConn(template)
	return ask(ctx, template, sharedChecks(d, everyone, extensions))
}

const (
	openHere      = "every role may connect to the database"
	openElsewhere = "the login may connect to a database of other tenants"
)

// apartChecks are what keeps the databases of a server's tenants apart, asked in the place's as its server's provisioner. One that cannot be connected
// to is on its way, and not opened yet.
func apartChecks(p *place, login string) []check {
	group, server := ident.Literal(tenantsRole(p.provisioner.Database)), p.provisioner.Database
	checks := []check{
		{`NOT has_database_privilege('public', current_database(), 'CONNECT')`, openHere, "REVOKE ALL ON DATABASE " + ident.Quote(p.source.Database) + " FROM PUBLIC;"},
		{`SELECT count(*) = 0 FROM pg_database d WHERE d.datname <> current_database() AND d.datallowconn AND has_database_privilege(` + login + `, d.oid, 'CONNECT')
			AND (d.datname IN (` + ident.Literal(server) + `, ` + ident.Literal(templateOf(server)) + `)
				OR d.datname ~ '^t_[0-9a-f]{20}$' AND pg_get_userbyid(d.datdba) = current_user)`, openElsewhere, "REVOKE CONNECT on it that was granted by hand, or the membership that gives it; see \\l and \\drg"},
	}
	if p.isolation == IsolationDatabase {
		checks = append(checks, check{`NOT has_database_privilege(` + group + `, current_database(), 'CONNECT')`, "the tenants of the server's own database may connect to this one",
			"REVOKE CONNECT ON DATABASE " + ident.Quote(p.source.Database) + " FROM " + ident.Quote(tenantsRole(server)) + ";"})
	}
	return checks
}

// checkServer asks the server that a new place would be made on whether it can make a database, where the place is to have one. It
// changes nothing anywhere. Which server it is can be another one a moment later, and the making of the place asks again.
func (c *Catalog) checkServer(ctx context.Context, server string, isolation Isolation) error {
	if isolation != IsolationDatabase {
		return nil
	}
	s, err := roomiest(ctx, c.tn.primary.pool, server)
	if err != nil {
		return refusal("choose server", err)
	}
	var p place
	if err := c.openProvisioner(&p, s.provisioner); err != nil {
		return err
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return ask(ctx, conn, databaseChecks(p.provisioner))
}
