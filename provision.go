package tenancy

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

// place is where a tenant's data lives, with the roles around it: owner (holds the schema,
// migrates), runtime (NOLOGIN, holds the grants) and source.User (the login, a member of runtime).
type place struct {
	tenant     Tenant // zero but for the UID when no tenant was created on it yet
	id         int64
	state      string // intent, made, dropped
	isolation  Isolation
	version    int64
	migrating  int64 // the migration that was begun and may have died half-way, below 0: that was being taken back; 0: none
	marked     bool  // the primary has another migrating than this, or has to be told of it again
	pinned     int64 // the version that the tenant does not go beyond; 0: none
	server     int64
	source     DataSource
	owner      string
	runtime    string
	tablespace string // of its tables and indexes; "": the database's own
	fenced     bool
	joined     bool   // its server's provisioner stays a member of its roles, for nodes of the release before
	promised   *int64 // the tenant's ID, also where there is none yet; nil: the place was made before there were promises

	dense      bool   // its tenant's calls go through a shared pool
	denseRole  string // that the pool's sessions take; "": none was made
	denseLogin string // of the pool; "": the server has none

	nextLogin  string // while a password is rotated; "": none
	nextSealed []byte
	next       DataSource // that nextSealed holds; read by intendLogin
	oldLogin   string     // that nextLogin came after, until it is dropped; "": none
	oldPooled  bool       // it went through a pooler; false also where a crash has forgotten that

	from *origin // what it is to be adopted from; nil: it is made

	pooler, poolerTLS string // that the server is registered with now; source has its own

	servers        *servers // by whose budgets it is connected to
	provisioner    DataSource
	hasProvisioner bool
}

// logins are all that the place has: whoever closes it or drops it has to think of each.
func (p *place) logins() []string {
	return slices.DeleteFunc([]string{p.source.User, p.nextLogin, p.oldLogin}, func(login string) bool { return login == "" })
}

// Format keeps the logins inside from being printed by a stray %+v.
func (p *place) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "place %s of tenant %d", p.source.Schema, p.tenant.ID)
}

// place reads the tenant's place. The error is ErrTenantNotFound, ErrPrimaryUnavailable or ErrWrongKey.
func (c *Catalog) place(ctx context.Context, id ID) (*place, error) {
	return c.readPlace(ctx, `t.id = $1`, id)
}

func (c *Catalog) readPlace(ctx context.Context, where string, arg any) (*place, error) {
	p := place{}
	var sealed, provisioner []byte
	db := c.tn.primary
	t, err := db.scanTenant(db.pool.QueryRow(ctx, `SELECT `+tenantColumns+`, d.id, d.state, d.isolation, d.version, d.server, d.owner, d.runtime, d.tablespace, d.sealed,
		d.next_login, d.next_sealed, d.old_login, d.promised, d.dense, d.dense_role, coalesce(l.login, ''), t.fenced IS NOT NULL, s.pooler, s.pooler_tls, s.provisioner,
		coalesce(d.migrating, 0), coalesce(t.pinned, 0), `+nodesThatJoin+`
		FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source JOIN tenancy.servers s ON s.id = d.server
		LEFT JOIN tenancy.dense_logins l ON l.server = d.server AND l.isolation = d.isolation
		WHERE `+where, arg), &p.id, &p.state, &p.isolation, &p.version, &p.server, &p.owner, &p.runtime, &p.tablespace, &sealed,
		&p.nextLogin, &p.nextSealed, &p.oldLogin, &p.promised, &p.dense, &p.denseRole, &p.denseLogin, &p.fenced, &p.pooler, &p.poolerTLS, &provisioner, &p.migrating, &p.pinned, &p.joined)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, ErrTenantNotFound
	}
	if err != nil {
		return nil, unavailable("read place", err)
	}
	p.tenant = t
	if p.state != "dropped" {
		if p.source, err = db.openSource(t.UID, "data_source", sealed); err != nil {
			return nil, err
		}
	}
	return &p, c.openProvisioner(&p, provisioner)
}

func (c *Catalog) openProvisioner(p *place, sealed []byte) (err error) {
	p.servers = c.tn.servers
	if sealed == nil {
		return nil
	}
	db := c.tn.primary
	p.provisioner, err = db.openSource(UID(db.realm.Value()), "provisioner", sealed)
	p.hasProvisioner = err == nil
	return err
}

// provisionerConn opens a session of the server's provisioner, in the server's own database: for roles, sessions and databases. It runs
// no tenant's code: its search_path is the system's alone, and it never touches rows of a tenant's tables.
func (p *place) provisionerConn(ctx context.Context) (*pgx.Conn, error) {
	if !p.hasProvisioner {
		return nil, errNoProvisioner
	}
	return connectProvisioner(ctx, p.servers, p.provisioner)
}

// insideConn is provisionerConn in the database where the place's schema is, which has to be there.
func (p *place) insideConn(ctx context.Context) (*pgx.Conn, error) {
	if !p.hasProvisioner {
		return nil, errNoProvisioner
	}
	d := p.provisioner
	d.Database = p.source.Database
	return connectProvisioner(ctx, p.servers, d)
}

const (
	// lockTimeout bounds each wait for a lock: whose login it is can keep a role's row for as long as a transaction lives. It is longer than the
	// server's deadlock_timeout by default, after which an autovacuum that is in the way of a statement gives in.
	lockTimeout = 2 * time.Second
	// lockPatience bounds the waits of one statement. What is in the way is somebody's work: the verb gives up, and is called again.
	lockPatience = 30 * time.Second
)

var errNoProvisioner = hinted(ErrNoProvisioner, "register it with Catalog.AddServer or tenancy.Init")

func connectProvisioner(ctx context.Context, servers *servers, d DataSource) (*pgx.Conn, error) {
	cc, err := d.connConfig()
	if err != nil {
		return nil, err
	}
	cc.RuntimeParams["search_path"] = "pg_catalog"
	cc.RuntimeParams["application_name"] = "tenancy provisioner"
	cc.RuntimeParams["lock_timeout"] = strconv.FormatInt(lockTimeout.Milliseconds(), 10)
	servers.single(cc)
	return unlessSilent(ctx, serverKey(cc.Host, cc.Port), func() (*pgx.Conn, error) {
		conn, err := pgx.ConnectConfig(ctx, cc)
		if err != nil {
			return nil, fmt.Errorf("provisioner at %s: %w", d.Address(), connectError(err))
		}
		return conn, nil
	})
}

// make brings the place into being. Each step looks before it acts, so that a run that died
// anywhere is finished by the next one.
func (c *Catalog) make(ctx context.Context, p *place) error {
	if p.isolation == IsolationShared {
		return c.makeShared(ctx, p)
	}
	conn, err := c.tn.prepareServer(ctx, p)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if p.from != nil {
		if err := c.adoptSchema(ctx, conn, p); err != nil {
			return fmt.Errorf("adopt schema %s: %w", p.from.schema, err)
		}
	} else if err := makeSchema(ctx, conn, p); err != nil {
		return fmt.Errorf("make schema: %w", err)
	}
	err = c.asOwner(ctx, conn, p, func(ctx context.Context, cc *pgx.ConnConfig) error {
		if err := c.furnish(ctx, cc, p); err != nil {
			return fmt.Errorf("furnish schema: %w", err)
		}
		_, err := c.migrateAs(ctx, cc, p, c.tn.newest())
		return err
	})
	if err != nil {
		return err
	}
	if p.isolation == IsolationDatabase {
		if err := c.showReader(ctx, p, func(role string) error { _, err := connectToReader(ctx, conn, p, role); return err }); err != nil {
			return err
		}
	}
	if err := verifyPlace(ctx, conn, p); err != nil {
		return err
	}
	return c.tn.proveLogin(ctx, p)
}

// prepareServer makes what the place's schema needs at the server, its roles and where it has one its database, and returns a
// session of the provisioner where the schema is to be.
func (tn *Tenancy) prepareServer(ctx context.Context, p *place) (*pgx.Conn, error) {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return nil, err
	}
	if err := tn.makeAround(ctx, conn, p); err != nil {
		closeConn(conn)
		return nil, err
	}
	if p.isolation != IsolationDatabase {
		return conn, nil
	}
	closeConn(conn) // before the other: a verb has no more connections than with a schema
	return p.insideConn(ctx)
}

// makeAround makes what is around the place's schema.
func (tn *Tenancy) makeAround(ctx context.Context, conn *pgx.Conn, p *place) error {
	own := p.isolation == IsolationDatabase
	if own { // before anything is made
		found, err := findDatabase(ctx, conn, p)
		if err == nil && !found.there {
			err = ask(ctx, conn, databaseChecks(p.provisioner))
		}
		if err != nil {
			return err
		}
	}
	if err := ask(ctx, conn, tablespaceChecks(p.provisioner, p.tablespace)); err != nil {
		return err
	}
	if err := tn.makeRoles(ctx, conn, p); err != nil {
		return fmt.Errorf("make roles: %w", err)
	}
	if own {
		if err := makeDatabase(ctx, conn, p); err != nil {
			return fmt.Errorf("make database: %w", err)
		}
	}
	return tn.setLogin(ctx, conn, p.source)
}

func (tn *Tenancy) makeRoles(ctx context.Context, conn *pgx.Conn, p *place) error {
	for _, role := range []string{p.owner, p.runtime} {
		if err := p.makeRole(ctx, conn, role, "NOLOGIN"); err != nil {
			return err
		}
	}
	if err := tn.makeLogin(ctx, conn, p, p.source); err != nil {
		return err
	}
	return execAll(ctx, conn, "provision", joinTenants(p, p.owner))
}

// joinTenants makes the role one of those that may connect to the server's database. Those of a place with a database of its own may not, and
// a login in a shared schema may connect by its group.
func joinTenants(p *place, role string) []string {
	if p.isolation != IsolationSchema {
		return nil
	}
	return []string{"GRANT " + ident.Quote(tenantsRole(p.source.Database)) + " TO " + ident.Quote(role)}
}

// makeLogin makes d's user a login of the place: it gets its rights from the groups that it is a member of.
func (tn *Tenancy) makeLogin(ctx context.Context, conn *pgx.Conn, p *place, d DataSource) error {
	verifier, err := scram.RandomVerifier(d.Password.Reveal())
	if err != nil {
		return err
	}
	if err := p.makeRole(ctx, conn, d.User, tn.mayLogin()+" PASSWORD "+ident.Literal(verifier)); err != nil {
		return err
	}
	return execAll(ctx, conn, "provision", append(joinTenants(p, d.User), "GRANT "+ident.Quote(p.runtime)+" TO "+ident.Quote(d.User)))
}

// setLogin gives a login that goes through a pooler the settings that a direct one sends when it connects. Whether it has them is asked of a
// session, in its proof. The database has to be there.
func (tn *Tenancy) setLogin(ctx context.Context, conn *pgx.Conn, d DataSource) error {
	if d.Pooler == "" {
		return nil
	}
	alter := "ALTER ROLE " + ident.Quote(d.User) + " IN DATABASE " + ident.Quote(d.Database)
	timeout := " RESET statement_timeout"
	if t := tn.cfg.Limits.StatementTimeout; t > 0 {
		timeout = " SET statement_timeout = " + strconv.FormatInt(t.Milliseconds(), 10)
	}
	return execAll(ctx, conn, "provision", []string{
		alter + " SET search_path = " + searchPath(d.Schema, tn.cfg.Extensions, tn.cfg.ReferenceTables),
		alter + timeout,
	})
}

// makeRole makes a role of the server's own, or gives the one that is there these rights. The provisioner is a member of it.
func makeRole(ctx context.Context, conn *pgx.Conn, name, rights string) error {
	if err := makeBareRole(ctx, conn, name, rights); err != nil {
		return err
	}
	return execAll(ctx, conn, "provision", []string{grantMembership(conn, name, conn.Config().User)})
}

// makeRole makes a role of the place's: see place.act.
func (p *place) makeRole(ctx context.Context, conn *pgx.Conn, name, rights string) error {
	if p.joined {
		return makeRole(ctx, conn, name, rights)
	}
	return makeBareRole(ctx, conn, name, rights)
}

func makeBareRole(ctx context.Context, conn *pgx.Conn, name, rights string) error {
	var there bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, name).Scan(&there); err != nil {
		return err
	}
	verb := "CREATE"
	if there {
		verb = "ALTER"
	}
	return execAll(ctx, conn, "provision", []string{verb + " ROLE " + ident.Quote(name) + " " + rights})
}

// mayLogin are the rights of a tenant's login that is open. The server's own ceiling on its connections holds for a node that is
// wrong about its share, and for whoever stole the password. It is twice what the nodes' pools open: while a tenant moves or is migrated
// an older pool drains beside the new one, and so do the nodes of two releases during a deployment.
func (tn *Tenancy) mayLogin() string {
	l := tn.cfg.Limits
	ceiling := math.MaxInt32 // of the server's own column
	if nodes := int64(l.Nodes); nodes <= math.MaxInt32/2/int64(l.TenantConns) {
		ceiling = int(2 * nodes * int64(l.TenantConns))
	}
	return fmt.Sprintf("LOGIN CONNECTION LIMIT %d", ceiling)
}

// makeSchema never uses IF NOT EXISTS: a schema of that name that is not the owner's is another's.
func makeSchema(ctx context.Context, conn *pgx.Conn, p *place) error {
	var owner string
	err := conn.QueryRow(ctx, `SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = $1`, p.source.Schema).Scan(&owner)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		sql := "CREATE SCHEMA " + ident.Quote(p.source.Schema) + " AUTHORIZATION " + ident.Quote(p.owner)
		if p.isolation != IsolationShared && !p.joined { // in one transaction, so that no crash leaves a member
			sql = grantMemberships(conn, []string{p.owner}) + "; " + sql + "; REVOKE " + ident.Quote(p.owner) + " FROM " + ident.Quote(conn.Config().User)
		}
		return execDDL(ctx, conn, sql)
	case err != nil:
		return err
	case owner != p.owner:
		return fmt.Errorf("schema %s belongs to role %s and not to %s: it was not touched", p.source.Schema, owner, p.owner)
	}
	return nil
}

// furnish puts into the schema what the library needs there, as its owner: the marker row that
// names the tenant, and the runtime role's grants. The marker is made before the default
// privileges, so the runtime role can read it and not write it.
func (c *Catalog) furnish(ctx context.Context, cc *pgx.ConnConfig, p *place) error {
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return withoutSecrets(err)
	}
	defer closeConn(conn)
	marker := ident.Quote(p.source.Schema, markerTable)
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		for _, sql := range furnishing(p) {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		realm := c.tn.realm.Value()
		_, err := tx.Exec(ctx, "INSERT INTO "+marker+" (realm, tenant) SELECT $1::uuid, $2::uuid WHERE NOT EXISTS (SELECT FROM "+marker+")", realm, p.tenant.UID)
		return err
	})
}

// furnishing are the statements of furnish, without the marker's row.
func furnishing(p *place) []string {
	schema, marker, runtime := ident.Quote(p.source.Schema), ident.Quote(p.source.Schema, markerTable), ident.Quote(p.runtime)
	return []string{
		// Without an index, which every new connection would open for the one row, at a tenth of its first request: that it is one, the reader checks.
		"CREATE TABLE IF NOT EXISTS " + marker + " (realm uuid NOT NULL, tenant uuid NOT NULL)",
		"REVOKE ALL ON TABLE " + marker + " FROM " + runtime,
		"GRANT SELECT ON TABLE " + marker + " TO " + runtime,
		"GRANT USAGE ON SCHEMA " + schema + " TO " + runtime,
		"ALTER DEFAULT PRIVILEGES IN SCHEMA " + schema + " GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO " + runtime,
		"ALTER DEFAULT PRIVILEGES IN SCHEMA " + schema + " GRANT USAGE, SELECT ON SEQUENCES TO " + runtime,
		"ALTER DEFAULT PRIVILEGES IN SCHEMA " + schema + " GRANT EXECUTE ON ROUTINES TO " + runtime,
		"ALTER DEFAULT PRIVILEGES IN SCHEMA " + schema + " GRANT USAGE ON TYPES TO " + runtime,
	}
}

// number is the tenant's in the rows of its place.
func (p *place) number() int64 {
	if p.promised != nil {
		return *p.promised
	}
	return int64(p.tenant.ID)
}

// verifyPlace asks the server whether the privileges are as they must be: what was granted and
// refused along the way proves nothing, because some refusals are warnings.
func verifyPlace(ctx context.Context, conn *pgx.Conn, p *place) error {
	checks := loginChecks(p, p.source.User)
	if p.isolation == IsolationShared { // whose owner may be at work for another tenant
		return ask(ctx, conn, checks)
	}
	return ask(ctx, conn, append(checks,
		check{`SELECT NOT rolcanlogin FROM pg_roles WHERE rolname = ` + ident.Literal(p.owner), "the owner may still log in", "ALTER ROLE " + ident.Quote(p.owner) + " NOLOGIN PASSWORD NULL;"}))
}

// loginChecks are what has to be true of a login of the place.
func loginChecks(p *place, user string) []check {
	login := ident.Literal(user)
	name := ident.Literal(p.source.Schema)
	schema, runtime, here := ident.Quote(p.source.Schema), ident.Quote(p.runtime), "; -- in database "+ident.Quote(p.source.Database)
	from := " FROM PUBLIC, " + runtime + ", " + ident.Quote(user) + here
	connect := "GRANT CONNECT ON DATABASE " + ident.Quote(p.source.Database) + " TO " + runtime + ";"
	if p.isolation == IsolationSchema {
		connect = "GRANT " + ident.Quote(tenantsRole(p.source.Database)) + " TO " + ident.Quote(user) + ";"
	}
	checks := []check{
		{`has_schema_privilege(` + login + `, ` + name + `, 'USAGE')`, "the login may not use its schema", "GRANT USAGE ON SCHEMA " + schema + " TO " + runtime + here},
		{`NOT has_schema_privilege(` + login + `, ` + name + `, 'CREATE')`, "the login may create in its schema", "REVOKE CREATE ON SCHEMA " + schema + from},
		{`NOT has_schema_privilege('public', ` + name + `, 'USAGE')`, "every role may use the schema", "REVOKE ALL ON SCHEMA " + schema + " FROM PUBLIC" + here},
		{`has_database_privilege(` + login + `, current_database(), 'CONNECT')`, "the login may not connect", connect},
		{`NOT has_database_privilege(` + login + `, current_database(), 'CREATE')`, "the login may create schemas", "REVOKE CREATE ON DATABASE " + ident.Quote(p.source.Database) + from},
		{`NOT pg_has_role(` + login + `, ` + ident.Literal(p.owner) + `, 'MEMBER')`, "the login is a member of the owner", "REVOKE " + ident.Quote(p.owner) + " FROM " + ident.Quote(user) + ";"},
		{`SELECT NOT (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls) FROM pg_roles WHERE rolname = ` + login, "the login has rights of the server's", withoutRights(user)},
	}
	checks = append(checks, apartChecks(p, login)...)
	if p.isolation == IsolationShared {
		checks = append(checks,
			check{`NOT has_database_privilege(` + login + `, current_database(), 'TEMPORARY')`, "the login may make temporary objects", "REVOKE TEMPORARY ON DATABASE " + ident.Quote(p.source.Database) + from},
			check{`NOT has_any_column_privilege(` + login + `::name, ` + p.tableOID(versionTable) + `, 'SELECT, INSERT, UPDATE')`, "the login may read or change " + versionTable, "REVOKE ALL ON TABLE " + ident.Quote(p.source.Schema, versionTable) + from},
			check{`has_table_privilege(` + login + `::name, ` + p.tableOID(markerTable) + `, 'SELECT')`, "the login may not read " + markerTable, "GRANT SELECT ON TABLE " + ident.Quote(p.source.Schema, markerTable) + " TO " + runtime + here})
		return checks
	}
	for _, name := range []string{markerTable, versionTable} {
		quoted := ident.Quote(p.source.Schema, name)
		table, grant := p.tableOID(name), "GRANT SELECT ON TABLE "+quoted+" TO "+runtime+here
		checks = append(checks,
			check{`has_table_privilege(` + login + `::name, ` + table + `, 'SELECT')`, "the login may not read " + name, grant},
			check{`NOT has_table_privilege(` + login + `::name, ` + table + `, 'INSERT, UPDATE, DELETE, TRUNCATE, TRIGGER, REFERENCES')`, "the login may change " + name,
				"REVOKE ALL ON TABLE " + quoted + " FROM PUBLIC, " + runtime + ", " + ident.Quote(user) + "; " + grant})
	}
	return checks
}

// tableOID finds a table in the place's schema for who may not use that, NULL where there is none.
func (p *place) tableOID(name string) string {
	return `(SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ` + ident.Literal(p.source.Schema) + ` AND c.relname = ` + ident.Literal(name) + `)`
}

// withoutRights is the statement that takes the server's rights from a role.
func withoutRights(role string) string {
	return "ALTER ROLE " + ident.Quote(role) + " NOSUPERUSER NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS;"
}

// lockNotAvailable is what a statement that has waited for lockTimeout says. It had no effect.
const lockNotAvailable = "55P03"

// overtaken is what a statement says that another session's on the same row came before. It had no effect.
func overtaken(err error) bool { return isState(err, "XX000", "40001", "40P01") }

// execDDL runs a statement that others' locks may be in the way of, for lockPatience.
func execDDL(ctx context.Context, conn *pgx.Conn, sql string) error {
	for end := time.Now().Add(lockPatience); ; {
		err := execShared(ctx, conn, sql)
		if !isState(err, lockNotAvailable) || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
	}
}

// execShared runs a statement on shared catalog rows, which PostgreSQL refuses when another node
// wrote the same row at the same moment; what was refused had no effect and is sent again.
func execShared(ctx context.Context, conn *pgx.Conn, sql string) error {
	for try := 1; ; try++ {
		_, err := conn.Exec(ctx, sql)
		if err == nil || try == 10 || !overtaken(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(try) * 5 * time.Millisecond):
		}
	}
}
