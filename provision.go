package tenancy

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/rowsec"
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
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, fmt.Errorf("provisioner at %s: %w", d.Address(), connectError(err))
	}
	return conn, nil
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

// ownerLease is how long a password of an owner is valid; it is renewed while the run lasts.
const ownerLease = 10 * time.Minute

// asOwner lends fn a login as the place's owner. The password is made for this run: it expires
// by itself when the run dies, and is taken back when the run ends.
func (c *Catalog) asOwner(ctx context.Context, provisioner *pgx.Conn, p *place, fn func(ctx context.Context, cc *pgx.ConnConfig) error) (err error) {
	password, err := scram.Password()
	if err != nil {
		return err
	}
	verifier, err := scram.RandomVerifier(password)
	if err != nil {
		return err
	}
	owner := ident.Quote(p.owner)
	lend := func(ctx context.Context, rights string) error {
		var until string
		if err := provisioner.QueryRow(ctx, `SELECT (now() + $1::interval)::text`, ownerLease.String()).Scan(&until); err != nil {
			return err
		}
		return execDDL(ctx, provisioner, "ALTER ROLE "+owner+rights+" VALID UNTIL "+ident.Literal(until))
	}
	back := func(ctx context.Context) error {
		ctx, done := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer done()
		return takeBack(ctx, provisioner, p)
	}
	if err := lend(ctx, " LOGIN PASSWORD "+ident.Literal(verifier)); err != nil {
		if ctx.Err() != nil || provisioner.IsClosed() { // the server may have done it
			err = errors.Join(err, back(ctx))
		}
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	renewed := make(chan struct{})
	var opened *pgx.Conn // in the place of a provisioner's session that has ended; nil: none
	go func() {
		defer close(renewed)
		tick := time.NewTicker(ownerLease / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				err := lend(ctx, "")
				if err != nil && ctx.Err() == nil && provisioner.IsClosed() { // it had ended since: the migration goes on
					if fresh, e := p.provisionerConn(ctx); e == nil {
						opened, provisioner = fresh, fresh
						err = lend(ctx, "")
					}
				}
				if err != nil && ctx.Err() == nil {
					cancel(fmt.Errorf("renew the owner's password: %w", err))
				}
			}
		}
	}()
	defer func() {
		cancel(nil)
		<-renewed
		err = errors.Join(err, back(ctx))
		if opened != nil {
			closeConn(opened)
		}
	}()
	d := p.source
	d.User, d.Password = p.owner, Secret(password)
	cc, err := d.connConfig()
	if err != nil {
		return err
	}
	cc.RuntimeParams["search_path"] = searchPath(p.source.Schema, c.tn.cfg.Extensions, c.tn.cfg.ReferenceTables)
	cc.RuntimeParams["application_name"] = "tenancy migration"
	if err := p.setTablespace(ctx, provisioner, cc); err != nil {
		return err
	}
	c.tn.servers.single(cc)
	return fn(ctx, cc)
}

// setTablespace has what is made in a session of the owner's be in the place's tablespace. Where that is the database's own nothing is set, with which partitioned tables could
// not be made. provisioner is in the place's database, which has its tablespace itself where it is the tenant's own.
func (p *place) setTablespace(ctx context.Context, provisioner *pgx.Conn, cc *pgx.ConnConfig) error {
	if p.tablespace == "" || p.isolation == IsolationDatabase {
		return nil
	}
	var own bool
	if err := provisioner.QueryRow(ctx, `SELECT t.spcname = $1 FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE d.datname = current_database()`, p.tablespace).Scan(&own); err != nil {
		return err
	}
	if !own {
		cc.RuntimeParams["default_tablespace"] = p.tablespace
	}
	return nil
}

// takeBack ends the owner's right to log in, and its sessions.
func takeBack(ctx context.Context, provisioner *pgx.Conn, p *place) error {
	if !provisioner.IsClosed() {
		if err := takeBackOn(ctx, provisioner, p); err == nil || !provisioner.IsClosed() {
			return err
		}
	}
	// A cancelled statement closed it, or it had ended while the owner was at work.
	fresh, err := p.provisionerConn(ctx)
	if err != nil {
		return fmt.Errorf("take back the owner's login (it expires by itself in %v): %w", ownerLease, err)
	}
	defer closeConn(fresh)
	return takeBackOn(ctx, fresh, p)
}

func takeBackOn(ctx context.Context, provisioner *pgx.Conn, p *place) error {
	if err := execDDL(ctx, provisioner, "ALTER ROLE "+ident.Quote(p.owner)+" NOLOGIN PASSWORD NULL"); err != nil {
		return fmt.Errorf("take back the owner's login: %w", err)
	}
	// Nobody but this process has known the password, so that nobody is on the way in: when none is seen, none is left.
	for end := time.Now().Add(ownersGoodbye); ; {
		var left bool
		if err := provisioner.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_stat_activity WHERE usename = $1`, p.owner).Scan(&left); err != nil || !left {
			return err
		}
		if time.Now().After(end) {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	done, err := p.act(ctx, provisioner, p.owner)
	if err != nil {
		return err
	}
	defer done()
	return endListed(ctx, provisioner, []string{p.owner}, 1)
}

// ownersGoodbye is how long sessions that were closed have to go by themselves, for which nobody has to be a member.
const ownersGoodbye = time.Second

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

// migratePlace brings a made place to the version that is asked for, and records the one that it has.
func (c *Catalog) migratePlace(ctx context.Context, p *place, e *errand) (applied []int64, err error) {
	if p.isolation == IsolationShared {
		return c.readyArea(ctx, p, e)
	}
	was := p.version
	if !e.look && p.migrating == 0 && was >= p.upTo(e.to) { // another run came first
		return nil, nil
	}
	err = c.lendOwner(ctx, p, e.worker, func(ctx context.Context, cc *pgx.ConnConfig) (err error) {
		applied, err = c.migrateAs(ctx, cc, p, e)
		return err
	})
	if len(applied) > 0 || p.version != was || p.marked {
		err = errors.Join(err, c.recordVersion(context.WithoutCancel(ctx), p))
		if e.worker == nil { // a run does it at its end
			c.tn.feed.catchUp(ctx)
		}
	}
	return applied, err
}

// lendOwner is asOwner on the worker's session of the provisioner's, or on one that is opened for it.
func (c *Catalog) lendOwner(ctx context.Context, p *place, w *worker, fn func(ctx context.Context, cc *pgx.ConnConfig) error) error {
	conn, done, err := w.provisionerOf(ctx, p)
	if err != nil {
		return err
	}
	defer done()
	return c.asOwner(ctx, conn, p, fn)
}

// recordVersion writes the version to the catalog, and moves the tenant to a new generation:
// pools that cached plans of the old tables are replaced. Whoever calls it has this node's feed catch up.
func (c *Catalog) recordVersion(ctx context.Context, p *place) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return refusal("record version", c.tn.primary.transact(ctx, func(tx pgx.Tx) error {
		// Both rows first: what changed locks comes last in a transaction.
		_, err := tx.Exec(ctx, `WITH place AS (UPDATE tenancy.data_sources SET version = $2, migrating = nullif($3::bigint, 0), updated = now() WHERE id = $1 RETURNING id),
			tenant AS (UPDATE tenancy.tenants SET generation = generation + 1, updated = now() WHERE id = $4 RETURNING id)
			SELECT tenancy.changed('tenant', tenant.id, NULL) FROM place, tenant`, p.id, p.version, p.migrating, p.tenant.ID)
		return err
	}))
}

// errand is what is asked of the migration of one place.
type errand struct {
	to       int64         // the newest version that is wanted
	patience time.Duration // for the locks of others
	look     bool          // at the schema, whatever version is recorded
	worker   *worker       // of the run; nil: none
	crowded  bool          // its run has a bound of its own on how many there are at once
	area     error         // out: that of the shared schema, which is that of all its tenants
}

// newest is the errand of who makes a place.
func (tn *Tenancy) newest() *errand {
	return &errand{to: tn.migrations.newest(), patience: lockPatience}
}

// upTo is the version that the place may go to when that one is wanted.
func (p *place) upTo(version int64) int64 {
	if p.pinned > 0 {
		return min(version, p.pinned)
	}
	return version
}

// lockPause lets the tenant's own calls pass between two tries for a lock, behind which they wait.
const lockPause = 500 * time.Millisecond

// migrateAs applies what is pending in the place. What waits for a lock of somebody's has lockTimeout, so that who comes behind is not held up for longer, and is tried again
// until the patience ends.
func (c *Catalog) migrateAs(ctx context.Context, cc *pgx.ConnConfig, p *place, e *errand) (applied []int64, err error) {
	if c.tn.migrations.empty() {
		return nil, errNoMigrations
	}
	err = untilFree(ctx, e.patience, func() error {
		more, err := c.migrateOnce(ctx, cc, p, e)
		applied = append(applied, more...)
		return err
	})
	if e := c.showReader(ctx, p, func(role string) error { return readAsOwner(ctx, cc, p, role) }); err == nil {
		err = e
	}
	return applied, err
}

// untilFree tries again what others' locks were in the way of, or a deadlock with them, unless it has left something half done.
func untilFree(ctx context.Context, patience time.Duration, try func() error) error {
	for began := time.Now(); ; {
		err := try()
		if !isState(err, lockNotAvailable, "40P01") || errors.Is(err, ErrMigrationDirty) || ctx.Err() != nil {
			return err
		}
		if time.Since(began) >= patience {
			return fmt.Errorf("transactions of others have kept a table locked, tried for %v; see pg_locks, and call it again: %w", time.Since(began).Round(time.Millisecond), err)
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(lockPause):
		}
	}
}

// migrateOnce goes from one migration without a transaction to the next.
func (c *Catalog) migrateOnce(ctx context.Context, cc *pgx.ConnConfig, p *place, e *errand) (applied []int64, err error) {
	for {
		var alone int64
		err := c.withGoose(ctx, cc, p, true, lockTimeout, func(r *run) error {
			if err := c.settle(ctx, r, p); err != nil {
				return err
			}
			more, next, err := r.upBefore(ctx, p.upTo(e.to), c.tn.migrations.alone())
			applied, alone = append(applied, more...), next
			return err
		})
		if err != nil || alone == 0 {
			return applied, err
		}
		if err := c.migrateAlone(ctx, cc, p, e.patience, alone, func(r *run) error {
			more, err := r.up(ctx, alone)
			applied = append(applied, more...)
			return err
		}); err != nil {
			return applied, err
		}
	}
}

// migrateAlone runs a migration that nothing rolls back when it dies, below 0 the way back, with a mark of it in the primary. It waits for locks all the
// patience at once: tried again it would find what it has left.
func (c *Catalog) migrateAlone(ctx context.Context, cc *pgx.ConnConfig, p *place, patience time.Duration, version int64, fn func(r *run) error) error {
	if err := c.mark(ctx, p, version); err != nil {
		return err
	}
	err := c.withGoose(ctx, cc, p, false, max(patience, lockTimeout), fn)
	if _, begun := errors.AsType[*stepError](err); begun {
		return fmt.Errorf("%w: %w", c.dirty(p), err)
	}
	p.migrating = 0 // the primary learns it with the version
	return err
}

// mark says in the primary what could die half-way from now on.
func (c *Catalog) mark(ctx context.Context, p *place, version int64) error {
	sql, key := `UPDATE tenancy.data_sources SET migrating = $2, updated = now() WHERE id = $1`, p.id
	if p.isolation == IsolationShared {
		sql, key = `UPDATE tenancy.shared_areas SET migrating = $2, updated = now() WHERE server = $1`, p.server
	}
	if _, err := c.tn.primary.pool.Exec(ctx, sql, key, version); err != nil {
		return unavailable("mark migration", err)
	}
	p.migrating, p.marked = version, true
	return nil
}

// settle finds out what became of a migration that is marked: whether it ended, goose knows, and one with a transaction is whole either way.
func (c *Catalog) settle(ctx context.Context, r *run, p *place) error {
	if p.migrating == 0 {
		return nil
	}
	version, up := p.marks()
	applied, err := r.applied(ctx, version)
	if err != nil {
		return err
	}
	if applied != up && slices.Contains(c.tn.migrations.alone(), version) {
		return c.dirty(p)
	}
	p.migrating, p.marked = 0, true
	return nil
}

// marks is the version that is marked, and whether it was on its way up.
func (p *place) marks() (version int64, up bool) {
	return max(p.migrating, -p.migrating), p.migrating > 0
}

func (c *Catalog) dirty(p *place) error {
	version, up := p.marks()
	what := "was being applied"
	if !up {
		what = "was being taken back"
	}
	return hinted(ErrMigrationDirty, "version %d, which says NO TRANSACTION, %s in schema %s: finish it there by hand or undo it, then call Migrator.Resolve(ctx, %d, %d, true) if it is applied now, and with false if it is not",
		version, what, p.source.Schema, p.tenant.ID, version)
}

// withGoose runs fn with goose on the place's schema, and looks at the version that came of it. inTx is that all that fn applies has a transaction.
func (c *Catalog) withGoose(ctx context.Context, cc *pgx.ConnConfig, p *place, inTx bool, lockTimeout time.Duration, fn func(r *run) error) error {
	m := c.tn.migrations
	m.guard = markerTable
	cc = cc.Copy()
	cc.RuntimeParams["lock_timeout"] = strconv.FormatInt(lockTimeout.Milliseconds(), 10)
	var db *sql.DB
	if m.each = inTx; inTx {
		db = openLocked(*cc, ident.Quote(p.source.Schema, m.guard))
	} else {
		db = stdlib.OpenDB(*cc)
		db.SetMaxOpenConns(2) // goose holds one, its lock another
	}
	defer db.Close()
	if p.isolation != IsolationShared {
		m.reader = p.runtime
		calls := func(f Migration) bool { return f.Version > p.version && f.calls }
		if p.state == "intent" || slices.ContainsFunc(m.list, calls) { // they have been there since it was made, and can be an older release's
			if err := installFunctions(ctx, db, p); err != nil {
				return err
			}
		}
	}
	r, err := newRun(db, p.source.Schema, m)
	if err != nil {
		return err
	}
	err = fn(r)
	look, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if version, e := r.version(look); e == nil {
		p.version = version
	}
	return err
}

// installFunctions makes the functions that migrations call for the sake of shared schemas, where the schema is one tenant's.
func installFunctions(ctx context.Context, db *sql.DB, p *place) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return withoutSecrets(err)
	}
	defer conn.Close()
	return conn.Raw(func(driver any) error {
		if locked, ok := driver.(lockedConn); ok {
			driver = locked.Conn
		}
		return rowsec.InstallSchemaModel(ctx, driver.(*stdlib.Conn).Conn(), p.source.Schema, p.owner, p.number())
	})
}

// number is the tenant's in the rows of its place.
func (p *place) number() int64 {
	if p.promised != nil {
		return *p.promised
	}
	return int64(p.tenant.ID)
}

var errNoMigrations = hinted(ErrNoMigrations, "set Config.Migrations to the service's goose files, for example: //go:embed migrations/*.sql and var migrations embed.FS")

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

// inUse says which sessions a fence waits for, before it ends them all.
type inUse string

const (
	// atWork are those in a statement or a transaction: for a tenant that goes out of service.
	atWork inUse = "state <> 'idle'"
	// anySession is for a login that a node leaves for another one: its sessions end by themselves when its pool is closed, after the
	// last call. One that looks idle can be a call's that has sent nothing yet.
	anySession inUse = "true"
	// lately is anySession where a pooler keeps sessions that nobody uses any more: those that were in use within the last second.
	lately inUse = "(state <> 'idle' OR state_change > clock_timestamp() - interval '1 second')"
)

// leaving returns which sessions to wait for when nodes leave a login for another one.
func leaving(pooled bool) inUse {
	if pooled {
		return lately
	}
	return anySession
}

// fence makes the server refuse the tenant, whatever any node believes: its logins may not log in, what
// they are at has the drain's time to finish, and then their sessions end. A node that is paused or cut off is not asked.
func fence(ctx context.Context, conn *pgx.Conn, p *place, wait inUse, drain time.Duration) error {
	others := []string{p.owner}
	if p.isolation == IsolationShared { // who works for the others, too
		others = nil
	}
	// Before anything that can wait for somebody: whatever comes after it, nobody logs in any more.
	made, err := rolesThere(ctx, conn, p.logins())
	if err != nil {
		return err
	}
	if _, err := closeSome(ctx, conn, made); err != nil {
		return err
	}
	done, err := p.act(ctx, conn, slices.Concat(p.logins(), others, p.denseRoles())...)
	if err != nil {
		return err
	}
	defer done()
	return errors.Join(closeLogins(ctx, conn, p.logins(), others, wait, drain), closeDense(ctx, conn, p, wait, drain))
}

// closeLogins is fence for some logins of a place. The sessions of others end with theirs.
func closeLogins(ctx context.Context, conn *pgx.Conn, logins, others []string, wait inUse, drain time.Duration) error {
	rows, _ := conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE rolname = ANY($1)`, logins)
	made, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(made) == 0 { // what was never made has nothing to close
		return err
	}
	// A login may change its own password, so a transaction of the tenant's can keep the role's row. It has the drain's time like any other.
	kept, err := closeSome(ctx, conn, made)
	if err != nil {
		return err
	}
	roles := append(made, others...)
	for end, quiet := time.Now().Add(drain), 0; time.Now().Before(end); {
		var busy int
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity WHERE usename = ANY($1) AND `+string(wait), roles).Scan(&busy); err != nil {
			return fmt.Errorf("drain: %w", err)
		}
		if quiet++; busy > 0 {
			quiet = 0
		} else if quiet == quietLooks {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drain: %d sessions are at work: %w", busy, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := closeKept(ctx, conn, kept, roles); err != nil {
		return err
	}
	return endSessions(ctx, conn, roles)
}

// closeSome closes the logins, and returns those whose row somebody keeps.
func closeSome(ctx context.Context, conn *pgx.Conn, logins []string) (kept []string, err error) {
	for _, login := range logins {
		err := execShared(ctx, conn, "ALTER ROLE "+ident.Quote(login)+" NOLOGIN")
		if isState(err, lockNotAvailable) || overtaken(err) {
			kept = append(kept, login)
		} else if err != nil {
			return nil, err
		}
	}
	return kept, nil
}

// closeTries is how often sessions are ended to close a login whose row they keep.
const closeTries = 5

// closeKept ends the sessions of the roles to get at the rows of the logins that they keep. Each try ends them all and is in line for the row at
// once, before one that logs in meanwhile; sessions that are not of the roles can outlast all tries.
func closeKept(ctx context.Context, conn *pgx.Conn, kept, roles []string) (err error) {
	for range closeTries {
		if len(kept) == 0 {
			return nil
		}
		if _, err := terminate(ctx, conn, roles); err != nil {
			return fmt.Errorf("end sessions: %w", err)
		}
		if kept, err = closeSome(ctx, conn, kept); err != nil {
			return err
		}
	}
	if len(kept) > 0 {
		return fmt.Errorf("close login %s: a session that is not the tenant's keeps its row in pg_authid locked; see pg_locks", kept[0])
	}
	return nil
}

const (
	// endTimeout bounds the end of a tenant's sessions, which the server's processes come to within milliseconds.
	endTimeout = 15 * time.Second
	// quietLooks is how often in a row no session has to be seen: one that passed the login a moment before it was closed is not listed yet.
	quietLooks = 5
)

// endSessions ends the sessions of the roles and returns when none is left.
func endSessions(ctx context.Context, conn *pgx.Conn, roles []string) error {
	return endListed(ctx, conn, roles, quietLooks)
}

// endListed is endSessions that is content when so many looks in a row have seen none.
func endListed(ctx context.Context, conn *pgx.Conn, roles []string, looks int) error {
	return untilQuiet(ctx, looks, func(ctx context.Context) (int, error) { return terminate(ctx, conn, roles) })
}

// untilQuiet ends sessions until so many looks in a row have seen none.
func untilQuiet(ctx context.Context, looks int, end func(ctx context.Context) (int, error)) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	for quiet, pause := 0, time.Millisecond; ; pause = min(2*pause, 10*time.Millisecond) {
		left, err := end(ctx)
		if err != nil {
			return fmt.Errorf("end sessions: %w", err)
		}
		if quiet++; left > 0 {
			quiet = 0
		} else if quiet == looks {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end sessions: %d are left: %w", left, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// terminate tells the sessions of the roles to end, and returns how many there are.
func terminate(ctx context.Context, conn *pgx.Conn, roles []string) (sessions int, err error) {
	err = conn.QueryRow(ctx, `SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY($1)) s`, roles).Scan(&sessions)
	return sessions, err
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
