package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// SetupError lists what [Init] would have made and is missing. It matches [ErrSetup].
type SetupError struct{ Missing []Finding }

func (e *SetupError) Error() string {
	var b strings.Builder
	b.WriteString(ErrSetup.Error())
	for i, f := range e.Missing {
		if i == 0 {
			b.WriteString(": ")
		} else {
			b.WriteString("\n\t")
		}
		b.WriteString(f.What + "; mend it with: " + f.Mend)
	}
	return b.String()
}

func (e *SetupError) Unwrap() error { return ErrSetup }

// check is one question to a server whose answer must be yes.
type check struct{ sql, what, fix string }

func ask(ctx context.Context, q querier, checks []check) error {
	failed, err := failing(ctx, q, checks)
	if err != nil || len(failed) == 0 {
		return err
	}
	var e SetupError
	for _, c := range failed {
		e.Missing = append(e.Missing, missing(c.what, c.fix))
	}
	return &e
}

// failing returns the checks whose answer is not yes.
func failing(ctx context.Context, q querier, checks []check) (failed []check, err error) {
	yes, err := answers(ctx, q, checks)
	for i, c := range checks {
		if err == nil && !yes[i] {
			failed = append(failed, c)
		}
	}
	return failed, err
}

// answers asks all checks in one statement.
func answers(ctx context.Context, q querier, checks []check) (yes []bool, err error) {
	questions := make([]string, len(checks))
	for i, c := range checks {
		questions[i] = `coalesce((` + c.sql + `), false)`
	}
	err = q.QueryRow(ctx, `SELECT ARRAY[`+strings.Join(questions, ",\n")+`]::boolean[]`, pgx.QueryExecModeExec).Scan(&yes)
	return yes, err
}

// missing is a finding of a set-up that cannot be worked with.
func missing(what, mend string) Finding {
	return Finding{Check: "setup", Level: LevelFailure, What: what, Why: "the library does not begin without it", Mend: mend}
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

// verifyServer checks the provisioner and the tenants' database, asked as the provisioner, and with databases what tenants with a database of their own need.
func verifyServer(ctx context.Context, servers *servers, d DataSource, tablespace string, extensions, databases bool) error {
	conn, err := connectProvisioner(ctx, servers, d)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	err = ask(ctx, conn, serverChecks(d, tablespace, extensions))
	if !databases {
		return err
	}
	own := verifyDatabases(ctx, servers, conn, d, extensions)
	var missing, more *SetupError
	if errors.As(err, &missing) && errors.As(own, &more) {
		return &SetupError{Missing: append(missing.Missing, more.Missing...)}
	}
	if err == nil {
		err = own
	}
	return err
}

// serverChecks are what has to be true of the provisioner and of the tenants' database, asked there as the provisioner.
func serverChecks(d DataSource, tablespace string, extensions bool) []check {
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
	return slices.Concat(checks, tablespaceChecks(d, tablespace), sharedChecks(d, group, extensions))
}

// tablespaceChecks are what has to be true of the tablespace that tables of tenants are to be in, asked as the server's provisioner d; none of "".
func tablespaceChecks(d DataSource, tablespace string) []check {
	if tablespace == "" {
		return nil
	}
	name, group := ident.Literal(tablespace), tenantsRole(d.Database)
	return []check{
		{`SELECT count(*) = 1 FROM pg_tablespace WHERE spcname = ` + name, fmt.Sprintf("the tablespace %q is missing", tablespace),
			"CREATE TABLESPACE " + ident.Quote(tablespace) + " LOCATION '...'; -- an empty directory of the server's"},
		{`SELECT has_tablespace_privilege(r.oid, t.oid, 'CREATE') AND has_tablespace_privilege(t.oid, 'CREATE') FROM pg_tablespace t, pg_roles r WHERE spcname = ` + name + ` AND rolname = ` + ident.Literal(group),
			fmt.Sprintf("the role %q of all tenants, or the provisioner %q, may not create in the tablespace %q", group, d.User, tablespace), grantTablespace(d, tablespace) + ";"},
	}
}

// grantTablespace is the statement by which tables and databases of tenants can be in the tablespace. It is given to all tenants once: parallel grants on one tablespace lose each other.
func grantTablespace(d DataSource, tablespace string) string {
	return "GRANT CREATE ON TABLESPACE " + ident.Quote(tablespace) + " TO " + ident.Quote(tenantsRole(d.Database)) + ", " + ident.Quote(d.User)
}

// everyone stands for PUBLIC, where a role is asked about.
const everyone = "public"

// sharedChecks are what has to be true, in the database d, of what its tenants share. who are they: the role of all tenants, or everyone who may connect.
func sharedChecks(d DataSource, who string, extensions bool) []check {
	login, database := ident.Quote(d.User), ident.Quote(d.Database)
	role, grantee, from := `(SELECT oid FROM pg_roles WHERE rolname = `+ident.Literal(who)+`)`, ident.Quote(who), "PUBLIC, "+ident.Quote(who)
	if who == everyone {
		role, grantee, from = `'public'::name`, "PUBLIC", "PUBLIC"
	}
	checks := []check{{`NOT has_schema_privilege('public', 'public', 'CREATE')`,
		fmt.Sprintf("every role may create in schema public of %q", d.Database),
		"REVOKE ALL ON SCHEMA public FROM PUBLIC; -- in database " + database}}
	for _, schema := range []string{extSchema, refSchema} {
		if schema == extSchema && !extensions {
			continue
		}
		of := `SELECT %s FROM pg_namespace n WHERE nspname = ` + ident.Literal(schema)
		checks = append(checks,
			check{fmt.Sprintf(`to_regnamespace(%s) IS NOT NULL`, ident.Literal(schema)),
				fmt.Sprintf("schema %s is missing in %q", schema, d.Database),
				fmt.Sprintf("CREATE SCHEMA %s AUTHORIZATION %s; -- in database %s", schema, login, database)},
			check{fmt.Sprintf(of, `has_schema_privilege(`+role+`, n.oid, 'USAGE')`),
				fmt.Sprintf("tenants may not use schema %s of %q", schema, d.Database),
				fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO %s; -- in database %s", schema, grantee, database)},
			check{fmt.Sprintf(of, `NOT has_schema_privilege(`+role+`, n.oid, 'CREATE')`),
				fmt.Sprintf("tenants may create in schema %s of %q", schema, d.Database),
				fmt.Sprintf("REVOKE CREATE ON SCHEMA %s FROM %s; -- in database %s", schema, from, database)},
		)
	}
	return checks
}
