package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

const (
	opAddReader  = "add reader"
	opDropReader = "drop reader"
	// readerConns is how many sessions of a server's reader there can be. The budget does not count them.
	readerConns = 5
)

// AddReader makes a login that reads the rows of all tenants of a registered server, those that are made later included, and writes none: for reports
// over tenants. Nothing in the library uses it. A server has none until AddReader is called, and one at most.
//
// What it returns is the only copy of the password, with the server's own database; a tenant's own database is reached by its name with the same
// login. Called again it gives the login a new password and grants anew what is missing, also where an earlier call has failed.
//
// The login may SELECT from the tables and views in all tenants' places, of those out of service, too, and from the shared schema the rows of all tenants. It owns nothing, is no member of any
// role, and may neither write nor create anything, temporary tables included, nor run the routines and sequences that migrations make: those are open to the tenants' own roles from then on,
// and to PUBLIC no more. Its transactions are read-only, its statements end after 5 minutes, and it has 5 sessions at most. Protected tables of the shared schema are locked while their policies change.
//
// The error is [ErrInvalid] (no such server), [ErrNoProvisioner], [ErrSetup], [ErrInProgress], [ErrPrimaryUnavailable] or the server's. With an error call it again, or DropReader.
func (c *Catalog) AddReader(ctx context.Context, server string) (DataSource, error) {
	fail := func(err error) (DataSource, error) {
		return DataSource{}, &Error{Op: opAddReader, Err: fmt.Errorf("server %q: %w", server, err)}
	}
	r, ctx, release, err := c.lockReader(ctx, server)
	if err != nil {
		return fail(err)
	}
	defer release()
	err = pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `INSERT INTO tenancy.readers (server, role) VALUES ($1, $2) ON CONFLICT (server) DO NOTHING`, r.server, ident.NewPlace()+readerSuffix); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, `SELECT role FROM tenancy.readers WHERE server = $1`, r.server).Scan(&r.role); err != nil {
			return err
		}
		return audit(ctx, tx, opAddReader, 0, map[string]any{"server": server, "role": r.role})
	})
	if err != nil {
		return fail(refusal(opAddReader, err))
	}
	d, err := c.makeReader(ctx, r)
	if err != nil {
		return fail(err)
	}
	// From here on whoever makes or migrates a place lets it be read. What was there before is let be read below.
	if _, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.readers SET state = 'made', updated = now() WHERE server = $1`, r.server); err != nil {
		return fail(unavailable(opAddReader, err))
	}
	places, err := c.readable(ctx, r)
	if err != nil {
		return fail(err)
	}
	for _, p := range places {
		if err := c.openToReader(ctx, p, r.role); err != nil {
			return fail(fmt.Errorf("schema %s: %w", p.source.Schema, err))
		}
	}
	if err := c.verifyReader(ctx, r); err != nil {
		return fail(err)
	}
	return d, nil
}

// DropReader drops the server's reader: its sessions end, and no right of it is left. A DropReader that died is finished by the next one.
// The errors are those of AddReader, and [ErrInvalid] for a server without a reader.
func (c *Catalog) DropReader(ctx context.Context, server string) error {
	fail := func(err error) error {
		return &Error{Op: opDropReader, Err: fmt.Errorf("server %q: %w", server, err)}
	}
	r, ctx, release, err := c.lockReader(ctx, server)
	if err != nil {
		return fail(err)
	}
	defer release()
	// From here on nobody lets it read anything more.
	err = c.tn.primary.pool.QueryRow(ctx, `UPDATE tenancy.readers SET state = 'intent', updated = now() WHERE server = $1 RETURNING role`, r.server).Scan(&r.role)
	if errors.Is(err, pgx.ErrNoRows) {
		return fail(invalid(errors.New("server: it has no reader")))
	} else if err != nil {
		return fail(unavailable(opDropReader, err))
	}
	if err := c.dropReader(ctx, r); err != nil {
		return fail(err)
	}
	err = pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `DELETE FROM tenancy.readers WHERE server = $1`, r.server); err != nil {
			return err
		}
		return audit(ctx, tx, opDropReader, 0, map[string]any{"server": server, "role": r.role})
	})
	if err != nil {
		return fail(unavailable(opDropReader, err))
	}
	return nil
}

// readerSuffix ends the name of a reader, by which whoever drops a database knows it.
const readerSuffix = "_reader"

// reader is the login that may read all tenants of a server, with the way to make it.
type reader struct {
	server      int64
	role        string
	provisioner DataSource
}

// Format keeps the provisioner's login from being printed.
func (r reader) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "reader %s of server %d", r.role, r.server)
}

// conn opens a session of the provisioner in a database of the server.
func (r reader) conn(ctx context.Context, servers *servers, database string) (*pgx.Conn, error) {
	d := r.provisioner
	d.Database = database
	return connectProvisioner(ctx, servers, d)
}

// lockReader finds the server, and makes this process the only one that works on its reader until release.
func (c *Catalog) lockReader(ctx context.Context, server string) (r reader, held context.Context, release func(), err error) {
	db := c.tn.primary
	var sealed []byte
	if ctx, err = begin(ctx); err != nil {
		return r, nil, nil, err
	}
	err = db.pool.QueryRow(ctx, `SELECT id, provisioner FROM tenancy.servers WHERE name = $1`, server).Scan(&r.server, &sealed)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return r, nil, nil, invalid(errors.New("server: it is not registered"))
	case err != nil:
		return r, nil, nil, unavailable("read servers", err)
	case sealed == nil:
		return r, nil, nil, errNoProvisioner
	}
	if r.provisioner, err = db.openSource(UID(db.realm.Value()), "provisioner", sealed); err != nil {
		return r, nil, nil, err
	}
	held, release, err = db.await(ctx, lockOf{"reader", r.server}, func() {}, func() (context.Context, func(), error) {
		return db.lock(ctx, 0, `SELECT pg_try_advisory_lock(hashtextextended('tenancy reader ' || $1::bigint, 0))`, r.server)
	})
	return r, held, release, err
}

// makeReader makes the role, and returns its login.
func (c *Catalog) makeReader(ctx context.Context, r reader) (d DataSource, err error) {
	password, err := scram.Password()
	if err != nil {
		return d, err
	}
	verifier, err := scram.RandomVerifier(password)
	if err != nil {
		return d, err
	}
	conn, err := r.conn(ctx, c.tn.servers, r.provisioner.Database)
	if err != nil {
		return d, err
	}
	defer closeConn(conn)
	rights := fmt.Sprintf("LOGIN NOINHERIT NOCREATEDB NOCREATEROLE CONNECTION LIMIT %d PASSWORD %s", readerConns, ident.Literal(verifier))
	if err := makeRole(ctx, conn, r.role, rights); err != nil {
		return d, err
	}
	role := ident.Quote(r.role)
	steps := []string{"GRANT CONNECT ON DATABASE " + ident.Quote(r.provisioner.Database) + " TO " + role}
	// A second wall: the login can take it down for itself, and has no right to write behind it. The last of them keep vacuum and migrations from waiting for it.
	for _, setting := range []string{"default_transaction_read_only = on", "search_path = pg_catalog", "application_name = 'tenancy reader'",
		"statement_timeout = '5min'", "idle_in_transaction_session_timeout = '1min'"} {
		steps = append(steps, "ALTER ROLE "+role+" SET "+setting)
	}
	for _, schema := range []string{extSchema, refSchema} {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, schema).Scan(&there); err != nil {
			return d, err
		}
		if there {
			steps = append(steps, "GRANT USAGE ON SCHEMA "+schema+" TO "+role)
		}
	}
	if err := execAll(ctx, conn, "provision", steps); err != nil {
		return d, err
	}
	d = r.provisioner
	d.User, d.Password = r.role, Secret(password)
	return d, nil
}

// verifyReader asks the server's own database what the reader may do there.
func (c *Catalog) verifyReader(ctx context.Context, r reader) error {
	conn, err := r.conn(ctx, c.tn.servers, r.provisioner.Database)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return ask(ctx, conn, readerChecks(r.role))
}

// readerChecks are what has to be true of a reader, asked in each database that it may read.
func readerChecks(role string) []check {
	const mend = "call AddReader again; if it stays, a right or membership was granted by hand"
	name := ident.Literal(role)
	return []check{
		{`SELECT NOT (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls) FROM pg_roles WHERE rolname = ` + name, "the reader has rights of the server's", mend},
		{`NOT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = ` + name + `)`, "the reader is a member of a role", mend},
		{`has_database_privilege(` + name + `, current_database(), 'CONNECT')`, "the reader may not connect", mend},
		{`NOT has_database_privilege(` + name + `, current_database(), 'CREATE, TEMPORARY')`, "the reader may create schemas or temporary objects", mend},
		{`NOT EXISTS (SELECT FROM pg_namespace WHERE has_schema_privilege(` + name + `, oid, 'CREATE'))`, "the reader may create in a schema", mend},
		{`NOT EXISTS (SELECT FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND relnamespace <> 'pg_catalog'::regnamespace
			AND (has_table_privilege(` + name + `, oid, 'INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER') OR has_any_column_privilege(` + name + `, oid, 'INSERT, UPDATE, REFERENCES')))`,
			"the reader may write to a table", mend},
	}
}

// readable lists what of a server is or will be there to be read: the places with a schema of their own, and the shared schema, also where no tenant is in it.
func (c *Catalog) readable(ctx context.Context, r reader) ([]*place, error) {
	db := c.tn.primary.pool
	rows, _ := db.Query(ctx, `SELECT id FROM tenancy.data_sources WHERE server = $1 AND state <> 'dropped' AND isolation <> 'shared' ORDER BY id`, r.server)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, unavailable("read places", err)
	}
	places := make([]*place, len(ids))
	for i, id := range ids {
		if places[i], err = c.placeByID(ctx, id); err != nil {
			return nil, err
		}
	}
	a, err := readArea(ctx, db, r.server)
	if errors.Is(err, pgx.ErrNoRows) {
		return places, nil
	} else if err != nil {
		return nil, unavailable("read area", err)
	}
	at := &place{isolation: IsolationShared, server: r.server, source: r.provisioner, owner: a.owner, runtime: a.runtime,
		servers: c.tn.servers, provisioner: r.provisioner, hasProvisioner: true}
	at.source.Schema = a.schema
	return append(places, at), nil
}

// openToReader lets the reader read a place that is there. One that is not will be opened by who makes it.
func (c *Catalog) openToReader(ctx context.Context, p *place, role string) error {
	if p.isolation == IsolationShared {
		held, release, err := c.lockArea(ctx, p)
		if err != nil {
			return err
		}
		defer release()
		ctx = held
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer func() { closeConn(conn) }()
	if p.isolation == IsolationDatabase {
		if there, err := connectToReader(ctx, conn, p, role); err != nil || !there {
			return err
		}
		closeConn(conn) // before the other, so that a verb has no more connections than with a schema
		if conn, err = p.insideConn(ctx); err != nil {
			return err
		}
	}
	var there bool
	err = conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_namespace WHERE nspname = $1 AND pg_get_userbyid(nspowner) = $2`, p.source.Schema, p.owner).Scan(&there)
	if err != nil || !there {
		return err
	}
	if p.isolation == IsolationShared { // the functions of its schema are called, which is for its owner
		return c.asOwner(ctx, conn, p, func(ctx context.Context, cc *pgx.ConnConfig) error { return readAsOwner(ctx, cc, p, role) })
	}
	if err := actOnce(ctx, conn, []string{p.owner}, func() error { return grantReader(ctx, conn, p, role) }); err != nil || p.isolation != IsolationDatabase {
		return err
	}
	return ask(ctx, conn, readerChecks(role))
}

// connectToReader lets the reader connect to a database of the place's own, and says whether it is there.
func connectToReader(ctx context.Context, conn *pgx.Conn, p *place, role string) (there bool, err error) {
	err = conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_database WHERE datname = $1 AND datallowconn AND pg_get_userbyid(datdba) = current_user`, p.source.Database).Scan(&there)
	if err != nil || !there {
		return false, err
	}
	return true, execDDL(ctx, conn, "GRANT CONNECT ON DATABASE "+ident.Quote(p.source.Database)+" TO "+ident.Quote(role))
}

// showReader lets the server's reader, where there is one, read what was just made or migrated. It comes after that: an AddReader that has not been
// seen here finds the place itself. One that is dropped meanwhile is none, and one that has come in its stead meanwhile finds the place, too.
func (c *Catalog) showReader(ctx context.Context, p *place, show func(role string) error) error {
	role, err := c.readerOf(ctx, p.server)
	if err != nil || role == "" {
		return err
	}
	if err = show(role); isState(err, "42704") {
		if now, e := c.readerOf(ctx, p.server); e == nil && now != role {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("let %s read: %w", role, err)
	}
	return nil
}

// readerOf is the role that reads all tenants of the server, "" for none.
func (c *Catalog) readerOf(ctx context.Context, server int64) (role string, err error) {
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT role FROM tenancy.readers WHERE server = $1 AND state = 'made'`, server).Scan(&role)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	return role, unavailable("read readers", err)
}

// readAsOwner lets the reader read the place, on a session of its owner, in which names are the system's alone.
func readAsOwner(ctx context.Context, cc *pgx.ConnConfig, p *place, role string) error {
	return asOwnerAlone(ctx, cc, func(owner *pgx.Conn) error {
		if p.isolation == IsolationShared {
			if there, err := readShared(ctx, owner, p, role); err != nil || !there {
				return err
			}
		}
		return grantReader(ctx, owner, p, role)
	})
}

func asOwnerAlone(ctx context.Context, cc *pgx.ConnConfig, fn func(owner *pgx.Conn) error) error {
	cc = cc.Copy()
	cc.RuntimeParams["search_path"] = "pg_catalog"
	cc.RuntimeParams["lock_timeout"] = strconv.FormatInt(lockTimeout.Milliseconds(), 10)
	return asArea(ctx, cc, fn)
}

// readShared opens the walls of a shared schema to the reader, and says whether it has been furnished.
func readShared(ctx context.Context, owner *pgx.Conn, p *place, role string) (there bool, err error) {
	readers := ident.Quote(p.source.Schema, "tenancy_readers")
	if err := owner.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, readers).Scan(&there); err != nil || !there {
		return false, err
	}
	var done bool // each policy that is made anew locks its table
	if err := owner.QueryRow(ctx, `SELECT count(*) > 0 FROM `+readers+` WHERE role = $1 AND has_function_privilege($1, $2, 'EXECUTE')`,
		role, ident.Quote(p.source.Schema, "tenancy_tenant")+"(name)").Scan(&done); err != nil || done {
		return true, err
	}
	return true, patiently(ctx, func() error { return p.wall().Reader(ctx, owner, role) })
}

// grantReader lets the reader read the tables of the place that are there and that will be, and takes from PUBLIC what it could write by: routines, which may work with
// their owner's rights, and sequences. conn is the owner's, or of a member of it.
func grantReader(ctx context.Context, conn *pgx.Conn, p *place, role string) error {
	schema, reader, runtime := ident.Quote(p.source.Schema), ident.Quote(role), ident.Quote(p.runtime)
	steps := []string{
		"GRANT USAGE ON SCHEMA " + schema + " TO " + reader,
		"ALTER DEFAULT PRIVILEGES FOR ROLE " + ident.Quote(p.owner) + " IN SCHEMA " + schema + " GRANT SELECT ON TABLES TO " + reader,
	}
	for _, of := range []struct{ list, grant, revoke string }{
		// The library's own tables in a shared schema say which login is whose.
		{`SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
			WHERE n.nspname = $1 AND pg_get_userbyid(c.relowner) = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
			AND NOT ($4::boolean AND c.relname LIKE 'tenancy\_%') AND NOT has_table_privilege($3::name, c.oid, 'SELECT')`,
			"GRANT SELECT ON TABLE %s TO " + reader, ""},
		{`SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
			WHERE n.nspname = $1 AND pg_get_userbyid(c.relowner) = $2 AND NOT ($4::boolean AND c.relname LIKE 'tenancy\_%')
			AND CASE WHEN c.relkind = 'S' THEN has_sequence_privilege($3::name, c.oid, 'USAGE, UPDATE, SELECT') END`,
			"GRANT USAGE ON SEQUENCE %s TO " + runtime, "REVOKE ALL ON SEQUENCE %s FROM PUBLIC"},
		{`SELECT f.oid::regprocedure::text FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace
			WHERE n.nspname = $1 AND pg_get_userbyid(f.proowner) = $2 AND NOT ($4::boolean AND f.proname LIKE 'tenancy\_%') AND has_function_privilege($3::name, f.oid, 'EXECUTE')`,
			"GRANT EXECUTE ON ROUTINE %s TO " + runtime, "REVOKE ALL ON ROUTINE %s FROM PUBLIC"},
	} {
		rows, _ := conn.Query(ctx, of.list, p.source.Schema, p.owner, role, p.isolation == IsolationShared)
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		for some := range slices.Chunk(names, 500) {
			for _, sql := range []string{of.grant, of.revoke} {
				if sql != "" {
					steps = append(steps, fmt.Sprintf(sql, strings.Join(some, ", ")))
				}
			}
		}
	}
	return execAll(ctx, conn, "provision", steps)
}

// dropReader ends the reader's sessions, takes back what it was given in each place, and drops it.
func (c *Catalog) dropReader(ctx context.Context, r reader) error {
	databases, err := c.closeReader(ctx, r)
	if err != nil {
		return err
	}
	places, err := c.readable(ctx, r)
	if err != nil {
		return err
	}
	for _, p := range places {
		if p.isolation == IsolationShared {
			if err := c.closeArea(ctx, p, r.role); err != nil {
				return fmt.Errorf("schema %s: %w", p.source.Schema, err)
			}
		}
	}
	for _, database := range append(databases, r.provisioner.Database) {
		if err := c.disown(ctx, r, database); err != nil {
			return fmt.Errorf("database %s: %w", database, err)
		}
	}
	conn, err := r.conn(ctx, c.tn.servers, r.provisioner.Database)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return dropRoles(ctx, conn, r.role)
}

// closeReader closes the login and ends its sessions, and lists the tenants' own databases in which it has rights. Not those that it may connect to: a DROP OWNED BY in one of
// them takes back CONNECT on all, and a DropReader that died after it is finished by the next.
func (c *Catalog) closeReader(ctx context.Context, r reader) (databases []string, err error) {
	conn, err := r.conn(ctx, c.tn.servers, r.provisioner.Database)
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	if err := closeLogins(ctx, conn, []string{r.role}, nil, atWork, 0); err != nil {
		return nil, err
	}
	rows, _ := conn.Query(ctx, `SELECT DISTINCT d.datname FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid JOIN pg_roles r ON r.oid = s.refobjid
		WHERE s.refclassid = 'pg_authid'::regclass AND r.rolname = $1 AND d.datallowconn AND d.datname <> current_database() ORDER BY 1`, r.role)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// closeArea takes the reader out of the walls of a shared schema.
func (c *Catalog) closeArea(ctx context.Context, p *place, role string) error {
	ctx, release, err := c.lockArea(ctx, p)
	if err != nil {
		return err
	}
	defer release()
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	var there bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relname = 'tenancy_readers'`, p.source.Schema).Scan(&there); err != nil || !there {
		return err
	}
	return c.asOwner(ctx, conn, p, func(ctx context.Context, cc *pgx.ConnConfig) error {
		return asOwnerAlone(ctx, cc, func(owner *pgx.Conn) error {
			return patiently(ctx, func() error { return p.wall().NoReader(ctx, owner, role) })
		})
	})
}

// disown takes back all that the reader was given in a database, by the tenants' owners.
func (c *Catalog) disown(ctx context.Context, r reader, database string) error {
	conn, err := r.conn(ctx, c.tn.servers, database)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	owners, err := readerOwners(ctx, conn, r.role, `'pg_namespace'::regclass`)
	if err != nil {
		return err
	}
	for some := range slices.Chunk(owners, leftAtOnce) {
		if err := actOnce(ctx, conn, some, func() error { return ungrantReader(ctx, conn, some, r.role) }); err != nil {
			return err
		}
	}
	// What is left was given by hand, or is a shared schema's.
	if owners, err = readerOwners(ctx, conn, r.role, `s.classid`); err != nil {
		return err
	}
	return actOnce(ctx, conn, owners, func() error {
		var there bool // it was dropped by a DropReader that died afterwards
		if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, r.role).Scan(&there); err != nil || !there {
			return err
		}
		return execDDL(ctx, conn, "DROP OWNED BY "+ident.Quote(r.role)+" CASCADE")
	})
}

// readerOwners are the tenants' owners whose objects of a class the reader has rights on, in the session's database.
func readerOwners(ctx context.Context, conn *pgx.Conn, role, class string) (owners []string, err error) {
	err = conn.QueryRow(ctx, `SELECT coalesce(array_agg(DISTINCT o.rolname::text), '{}') FROM pg_shdepend s JOIN pg_roles r ON r.oid = s.refobjid JOIN pg_roles o ON o.oid = CASE s.classid
			WHEN 'pg_namespace'::regclass THEN (SELECT nspowner FROM pg_namespace WHERE oid = s.objid)
			WHEN 'pg_default_acl'::regclass THEN (SELECT defaclrole FROM pg_default_acl WHERE oid = s.objid)
			WHEN 'pg_class'::regclass THEN (SELECT relowner FROM pg_class WHERE oid = s.objid)
			WHEN 'pg_proc'::regclass THEN (SELECT proowner FROM pg_proc WHERE oid = s.objid)
			WHEN 'pg_type'::regclass THEN (SELECT typowner FROM pg_type WHERE oid = s.objid) END
		WHERE s.refclassid = 'pg_authid'::regclass AND r.rolname = $1 AND s.classid = `+class+` AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND o.rolname ~ '^t_[0-9a-f]{20}_o$'`, role).Scan(&owners)
	return owners, err
}

// ungrantReader takes back what grantReader has given in the schemas of the owners, for which conn acts.
func ungrantReader(ctx context.Context, conn *pgx.Conn, owners []string, role string) error {
	reader := ident.Quote(role)
	rows, _ := conn.Query(ctx, `SELECT format('%I', n.nspname), format('%I', o.rolname), ARRAY(SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c
			WHERE c.relnamespace = n.oid AND c.relowner = n.nspowner AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.grantee = r.oid))
		FROM pg_roles r, pg_namespace n JOIN pg_roles o ON o.oid = n.nspowner WHERE r.rolname = $1 AND o.rolname = ANY($2)`, role, owners)
	var steps, tables []string
	var schema, owner string
	if _, err := pgx.ForEachRow(rows, []any{&schema, &owner, &tables}, func() error {
		steps = append(steps, "ALTER DEFAULT PRIVILEGES FOR ROLE "+owner+" IN SCHEMA "+schema+" REVOKE ALL ON TABLES FROM "+reader)
		for some := range slices.Chunk(tables, 500) {
			steps = append(steps, "REVOKE ALL ON TABLE "+strings.Join(some, ", ")+" FROM "+reader)
		}
		steps = append(steps, "REVOKE ALL ON SCHEMA "+schema+" FROM "+reader)
		return nil
	}); err != nil {
		return err
	}
	return execAll(ctx, conn, "drop reader", steps)
}
