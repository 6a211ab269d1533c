package tenancy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

// SetDense moves the tenant's calls to the pool that tenants of its server and isolation share, or back to a pool of its own. The tenant goes on being
// served, on every node: calls and transactions in flight end where they began.
//
// A shared pool has few connections for very many tenants ([Limits].DenseConns), and one login, which takes a role of the tenant's for each of its
// calls. That stops mistakes and not injected SQL, which can take another role: see docs/guarantees.md, and docs/models.md for whom it is. In such a pool a statement
// outside a transaction is in one all the same (no VACUUM, no procedure that commits), there are no temporary tables, and types of the tenant's own schema cannot be registered on a connection.
//
// It is the place's: a tenant that moves to a new one has a pool of its own there. The same call again finishes one that died; so does the validity job, which closes the role. With [ErrNotClosed] the tenant has
// its own pool again, and the role is still to be closed. The other errors are [ErrInvalid] (for [IsolationDatabase], behind a pooler, or into the pool while the tenant is out of service), [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady],
// [ErrNoProvisioner], [ErrIdentity] and [ErrSetup] (the role is not what it should be), [ErrInProgress], [ErrPrimaryUnavailable] or that of the server.
func (c *Catalog) SetDense(ctx context.Context, id ID, dense bool) error {
	fail := func(err error) error { return &Error{Op: opDense, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if err := settled(p.tenant.State); err != nil {
		return fail(err)
	}
	if !p.hasProvisioner {
		return fail(errNoProvisioner)
	}
	if dense {
		err = c.enterDense(ctx, p)
	} else {
		err = c.exitDense(ctx, p)
	}
	if _, told := err.(*Error); err != nil && !told {
		err = fail(err)
	}
	return err
}

const opDense = "set dense"

func (c *Catalog) enterDense(ctx context.Context, p *place) error {
	switch {
	case p.dense:
		return c.settleDense(ctx, p)
	case p.isolation == IsolationDatabase:
		return invalid(fmt.Errorf("isolation: a tenant with %q shares no pool: a session cannot change its database", p.isolation))
	case p.source.Pooler != "":
		return invalid(errors.New("data source: the tenant's calls go through a pooler, whose sessions cannot take a role and keep it"))
	case p.tenant.State != StateActive:
		return invalid(fmt.Errorf("state: the tenant is %s, and its role cannot be proved; see Catalog.Resume", p.tenant.State))
	}
	if err := c.prepareDense(ctx, p); err != nil {
		return err
	}
	if err := c.writeDense(ctx, p, true); err != nil {
		return err
	}
	return c.settleDense(ctx, p)
}

// prepareDense makes what the tenant needs in the shared pool, and proves it.
func (c *Catalog) prepareDense(ctx context.Context, p *place) error {
	ctx, release, err := c.lockDense(ctx, p)
	if err != nil {
		return err
	}
	defer release()
	login, err := c.intendDense(ctx, p)
	if err != nil {
		return err
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := c.makeDense(ctx, conn, p, login.source); err != nil {
		return err
	}
	return c.proveDense(ctx, p, login)
}

// settleDense gives the place's role what the login owns, when every node has left that.
func (c *Catalog) settleDense(ctx context.Context, p *place) error {
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	return giveToDense(ctx, p)
}

// giveToDense gives what the place's login owns to the role that the tenant's calls take.
func giveToDense(ctx context.Context, p *place) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	done, err := p.act(ctx, conn, p.source.User, p.denseRole)
	if err != nil {
		return err
	}
	defer done()
	return giveObjects(ctx, conn, p.source.User, p.denseRole)
}

// giveObjects gives what a role owns, which is its large objects, to another one. A role that is not there has nothing. The provisioner acts for both.
func giveObjects(ctx context.Context, conn *pgx.Conn, from, to string) error {
	var there bool
	if err := conn.QueryRow(ctx, `SELECT count(*) = 2 FROM pg_roles WHERE rolname IN ($1, $2)`, from, to).Scan(&there); err != nil || !there {
		return err
	}
	return execDDL(ctx, conn, "REASSIGN OWNED BY "+ident.Quote(from)+" TO "+ident.Quote(to))
}

// exitDense gives the tenant its own pool back first, and closes the role when every node knows.
func (c *Catalog) exitDense(ctx context.Context, p *place) error {
	if p.dense {
		if err := c.writeDense(ctx, p, false); err != nil {
			return err
		}
	}
	if p.denseRole == "" {
		return nil
	}
	if err := c.leaveDense(ctx, p); err != nil {
		return fmt.Errorf("%w: the tenant has its own pool, and role %s was not closed: %w", ErrNotClosed, p.denseRole, err)
	}
	return nil
}

// intendDense writes the pool's login, where the server has none, and the place's role, before either is made.
func (c *Catalog) intendDense(ctx context.Context, p *place) (login denseSource, err error) {
	db := c.tn.primary
	password, err := scram.Password()
	if err != nil {
		return login, err
	}
	d := p.source
	d.User, d.Password = ident.NewPlace()+"_d", Secret(password)
	if p.isolation == IsolationSchema {
		d.Schema = ""
	}
	sealed, err := db.sealSource(UID(db.realm.Value()), "dense_login", d)
	if err != nil {
		return login, err
	}
	role := p.source.Schema // so that "$user" finds it
	if p.isolation == IsolationShared {
		role = p.base() + "_d"
	}
	login = denseSource{server: p.server, isolation: p.isolation}
	err = pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `INSERT INTO tenancy.dense_logins (server, isolation, login, sealed) VALUES ($1, $2, $3, $4) ON CONFLICT (server, isolation) DO NOTHING`, p.server, p.isolation, d.User, sealed); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, `SELECT generation, sealed FROM tenancy.dense_logins WHERE server = $1 AND isolation = $2`, p.server, p.isolation).Scan(&login.generation, &sealed); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET dense_role = $2, updated = now() WHERE id = $1`, p.id, role)
		return err
	})
	if err != nil {
		return login, unavailable(opDense, err)
	}
	if login.source, err = db.openSource(UID(db.realm.Value()), "dense_login", sealed); err != nil {
		return login, err
	}
	p.denseRole, p.denseLogin = role, login.source.User
	return login, nil
}

// makeDense makes the pool's login and the place's role, each where it is missing, and asks the server whether they are as they must be. The login has
// no rights but to connect, and inherits none: what it may is what the role that it takes may.
func (c *Catalog) makeDense(ctx context.Context, conn *pgx.Conn, p *place, login DataSource) error {
	if err := makeDenseLogin(ctx, conn, login); err != nil {
		return err
	}
	if err := p.makeRole(ctx, conn, p.denseRole, "NOLOGIN"); err != nil {
		return err
	}
	return c.giveDense(ctx, conn, p)
}

func makeDenseLogin(ctx context.Context, conn *pgx.Conn, login DataSource) error {
	verifier, err := scram.RandomVerifier(login.Password.Reveal())
	if err != nil {
		return err
	}
	if err := makeRole(ctx, conn, login.User, "LOGIN NOINHERIT PASSWORD "+ident.Literal(verifier)); err != nil {
		return err
	}
	steps, err := mayUse(ctx, conn, login.User) // for types that a pool's hook registers
	if err != nil {
		return err
	}
	return execAll(ctx, conn, opDense, append(steps, "GRANT CONNECT ON DATABASE "+ident.Quote(login.Database)+" TO "+ident.Quote(login.User)))
}

// openDense gives a role that was closed its rights again.
func (c *Catalog) openDense(ctx context.Context, conn *pgx.Conn, p *place) error {
	ctx, release, err := c.lockDense(ctx, p)
	if err != nil {
		return err
	}
	defer release()
	l, err := c.denseLogin(ctx, p.server, p.isolation) // it may have been rotated since p was read
	if err != nil {
		return err
	}
	p.denseLogin = l.source.User
	if err := c.giveDense(ctx, conn, p); err != nil {
		return err
	}
	end, err := p.act(ctx, conn, p.source.User, p.denseRole)
	if err != nil {
		return err
	}
	defer end()
	return giveObjects(ctx, conn, p.source.User, p.denseRole)
}

// giveDense gives the place's role its rights, and the pool's login the role. The lock of the server's pools is held.
func (c *Catalog) giveDense(ctx context.Context, conn *pgx.Conn, p *place) error {
	steps, err := mayUse(ctx, conn, p.denseRole)
	if err != nil {
		return err
	}
	if err := execAll(ctx, conn, opDense, append(steps, "GRANT "+ident.Quote(p.runtime)+" TO "+ident.Quote(p.denseRole), takeRole(conn, ident.Quote(p.denseRole), p.denseLogin))); err != nil {
		return err
	}
	if p.isolation == IsolationShared {
		if err := c.admit(ctx, conn, p, p.denseRole); err != nil {
			return err
		}
	}
	return ask(ctx, conn, denseChecks(p))
}

// takeRole returns the statement that lets a pool's login take roles, and inherit nothing of them.
func takeRole(conn *pgx.Conn, quoted, login string) string {
	s := "GRANT " + quoted + " TO " + ident.Quote(login)
	if serverMajor(conn) >= 16 {
		s += " WITH INHERIT FALSE, SET TRUE"
	}
	return s
}

// denseChecks are what has to be true of the place's role and of the login that takes it.
func denseChecks(p *place) []check {
	role, login, schema := ident.Literal(p.denseRole), ident.Literal(p.denseLogin), ident.Literal(p.source.Schema)
	roles, here := ident.Quote(p.denseRole)+", "+ident.Quote(p.denseLogin), "; -- in database "+ident.Quote(p.source.Database)
	checks := []check{
		{`has_schema_privilege(` + role + `, ` + schema + `, 'USAGE')`, "the tenant's role may not use its schema", "GRANT " + ident.Quote(p.runtime) + " TO " + ident.Quote(p.denseRole) + ";"},
		{`NOT has_database_privilege(` + role + `, current_database(), 'TEMPORARY, CREATE')`, "the tenant's role may make temporary objects or schemas", "REVOKE TEMPORARY, CREATE ON DATABASE " + ident.Quote(p.source.Database) + " FROM PUBLIC, " + ident.Quote(p.runtime) + ", " + roles + ";"},
		{`SELECT NOT (rolcanlogin OR rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls) FROM pg_roles WHERE rolname = ` + role, "the tenant's role may log in, or has rights of the server's", "ALTER ROLE " + ident.Quote(p.denseRole) + " NOLOGIN; " + withoutRights(p.denseRole)},
		{`NOT has_schema_privilege(` + login + `, ` + schema + `, 'USAGE')`, "the shared pool's login may use the schema without the tenant's role", "REVOKE ALL ON SCHEMA " + ident.Quote(p.source.Schema) + " FROM PUBLIC, " + ident.Quote(p.denseLogin) + here},
		{`pg_has_role(` + login + `, ` + role + `, 'MEMBER')`, "the shared pool's login may not take the tenant's role", "call Catalog.SetDense for the tenant again, with true"},
	}
	for _, name := range []string{p.denseRole, p.denseLogin} {
		who := ident.Literal(name)
		checks = append(checks,
			check{`NOT has_schema_privilege(` + who + `, ` + schema + `, 'CREATE')`, "the shared pool may create in the schema", "REVOKE CREATE ON SCHEMA " + ident.Quote(p.source.Schema) + " FROM PUBLIC, " + ident.Quote(p.runtime) + ", " + roles + here},
			check{`NOT pg_has_role(` + who + `, ` + ident.Literal(p.owner) + `, 'MEMBER')`, "the shared pool may become the owner", "REVOKE " + ident.Quote(p.owner) + " FROM " + roles + ";"},
			check{`SELECT NOT (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls) FROM pg_roles WHERE rolname = ` + who, "the shared pool has rights of the server's", withoutRights(name)})
	}
	return checks
}

// proveDense connects once as the pool's login, takes the place's role and asks who that is.
func (c *Catalog) proveDense(ctx context.Context, p *place, login denseSource) error {
	r := record{tenant: p.tenant, source: p.source, dense: &login, denseRole: p.denseRole}
	dense, err := c.tn.newDense(&r)
	if err != nil {
		return err
	}
	conn, err := c.connectDense(ctx, login)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	s := denseSessionOf(conn)
	s.to = dense.dense
	return s.prove(ctx)
}

// connectDense connects as the login of a shared pool, on the same terms as the pool. Whoever gets the connection closes it.
func (c *Catalog) connectDense(ctx context.Context, login denseSource) (*pgx.Conn, error) {
	cc, err := login.source.connConfig()
	if err != nil {
		return nil, err
	}
	cc.ConnectTimeout = c.tn.cfg.Limits.ConnectTimeout
	pins := c.tn.pins(cc, login.source)
	pins.searchPath = quotedPath(c.tn.slotSchemas(login))
	pins.set(cc)
	c.tn.servers.single(cc)
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, connectError(err)
	}
	one := tenantPool{limits: c.tn.cfg.Limits, want: c.tn.slotIdentity(login)}
	if err := one.proveWithin(ctx, conn); err != nil {
		closeConn(conn)
		return nil, err
	}
	return conn, nil
}

// writeDense is the moment from which nodes send the tenant's calls the other way.
func (c *Catalog) writeDense(ctx context.Context, p *place, dense bool) error {
	err := c.write(ctx, opDense, p.tenant.ID, func(tx pgx.Tx) error {
		if state, err := lockRow(ctx, tx, p.tenant.ID); err != nil {
			return err
		} else if state != p.tenant.State {
			return errOvertaken
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET dense = $2, updated = now() WHERE id = $1 AND state = 'made'`, p.id, dense)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET dense = $2, generation = generation + 1, updated = now() WHERE id = $1`, p.tenant.ID, dense); err != nil {
			return err
		}
		if err := audit(ctx, tx, opDense, p.tenant.ID, map[string]any{"dense": dense}); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", p.tenant.ID, "")
	})
	if err == nil {
		p.dense = dense
	}
	return err
}

// leaveDense closes the role that no node uses any more, drops it and writes that it is gone. The tenant's lock is held.
func (c *Catalog) leaveDense(ctx context.Context, p *place) error {
	ctx, cancel := c.whileLeaving(ctx)
	defer cancel()
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	done, err := p.act(ctx, conn, p.source.User, p.denseRole, p.owner) // the owner: as in dropLogin
	if err != nil {
		return err
	}
	defer done()
	if err := closeDense(ctx, conn, p, anySession, c.tn.cfg.DrainTimeout); err != nil {
		return err
	}
	if err := giveObjects(ctx, conn, p.denseRole, p.source.User); err != nil {
		return err
	}
	if p.isolation == IsolationShared {
		if err := p.wall().Dismiss(ctx, conn, p.denseRole); err != nil {
			return err
		}
	}
	if err := dropRoles(ctx, conn, p.denseRole); err != nil {
		return err
	}
	_, err = c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET dense_role = '', updated = now() WHERE id = $1 AND NOT dense`, p.id)
	return unavailable(opDense, err)
}

// denseRoles is the place's role in a shared pool, if there is one.
func (p *place) denseRoles() []string {
	if p.denseRole == "" {
		return nil
	}
	return []string{p.denseRole}
}

// leavingQuiet is how long nothing has to be at work for a role that its tenant leaves, and that a call can have which has sent nothing yet.
const leavingQuiet = time.Second

// closeDense is fence for the place's role in a shared pool. A session that has taken the role keeps it, and whoever has that session: the role loses
// its rights, for a node that hears nothing too, and transactions that are still open under it end with their sessions.
func closeDense(ctx context.Context, conn *pgx.Conn, p *place, wait inUse, drain time.Duration) error {
	if p.denseRole == "" || p.denseLogin == "" {
		return nil
	}
	var there bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, p.denseRole).Scan(&there); err != nil || !there {
		return err
	}
	rows, _ := conn.Query(ctx, `SELECT l.rolname::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid JOIN pg_roles l ON l.oid = m.member
		WHERE r.rolname = $1 AND l.rolcanlogin AND NOT l.rolcreaterole`, p.denseRole) // not the provisioner
	logins, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	logins = append(logins, p.denseLogin) // a fence that died has taken the role from it
	quiet := leavingQuiet
	if wait == atWork { // who comes now is refused
		quiet = quietLooks * drainLook
	}
	if err := drainDense(ctx, conn, p, logins, quiet, drain); err != nil {
		return err
	}
	if err := execAll(ctx, conn, "fence", []string{"REVOKE " + ident.Quote(p.runtime) + " FROM " + ident.Quote(p.denseRole)}); err != nil {
		return err
	}
	if err := endDense(ctx, conn, p, logins); err != nil {
		return err
	}
	// Last: to the policies of a shared schema a session of a login that may not take the role is nobody's, and what is running would find no rows and hear of no error.
	if err := execAll(ctx, conn, "fence", []string{"REVOKE " + ident.Quote(p.denseRole) + " FROM " + quotedPath(logins)}); err != nil {
		return err
	}
	return giveObjects(ctx, conn, p.denseRole, p.source.User) // large objects ask for no right in the schema
}

const drainLook = 10 * time.Millisecond

// denseMarked tells the role's sessions from those of others that share the pool, by the text of their last statement: see denseMark.
func (p *place) denseMarked() string { return "/* " + p.denseRole + " " }

// denseOwn is true of a session a that is the role's by its mark $2, by its name $3 when it was lent, or by the table in schema $4 that it copies into: a COPY is pgx's own
// text. denseTold is true of one that says whose it is.
const (
	denseOwn  = `(starts_with(a.query, $2) OR a.application_name = $3 OR a.pid IN (SELECT c.pid FROM pg_stat_progress_copy c JOIN pg_class k ON k.oid = c.relid WHERE k.relnamespace = to_regnamespace($4)))`
	denseTold = `(starts_with(a.query, '/* t_') OR starts_with(a.application_name, 't_') OR a.pid IN (SELECT c.pid FROM pg_stat_progress_copy c WHERE c.relid <> 0))`
)

func (p *place) denseWho(logins []string) []any {
	return []any{logins, p.denseMarked(), p.denseRole, ident.Quote(p.source.Schema)}
}

// drainDense waits until nothing has been at work for the role for some time.
func drainDense(ctx context.Context, conn *pgx.Conn, p *place, logins []string, quiet, drain time.Duration) error {
	now := time.Now()
	for end, since := now.Add(drain), now; now.Before(end); now = time.Now() {
		var busy int
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity a WHERE usename = ANY($1) AND (state <> 'idle' OR application_name = $3) AND `+denseOwn,
			p.denseWho(logins)...).Scan(&busy); err != nil {
			return fmt.Errorf("drain: %w", err)
		}
		if busy > 0 {
			since = time.Now()
		} else if time.Since(since) >= quiet {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drain: %d sessions are at work: %w", busy, ctx.Err())
		case <-time.After(drainLook):
		}
	}
	return nil
}

// untoldPatience is how long a transaction may go on that does not say whose it is: its last text is pgx's own, as after a COPY that has ended or a large object.
const untoldPatience = time.Second

// endDense ends the role's transactions, and returns when none is left. One that began after the role had lost its rights has none; one that began before
// may go on with those that it knew, so each of them ends, or is seen to be another's.
func endDense(ctx context.Context, conn *pgx.Conn, p *place, logins []string) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	var since time.Time
	if err := conn.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&since); err != nil {
		return fmt.Errorf("end sessions: %w", err)
	}
	type transaction struct {
		pid   int32
		began time.Time
	}
	others := map[transaction]bool{}
	for patience := time.Now().Add(untoldPatience); ; {
		rows, _ := conn.Query(ctx, `SELECT pid, coalesce(xact_start, backend_start), `+denseOwn+`, `+denseTold+`
			FROM pg_stat_activity a WHERE usename = ANY($1) AND (xact_start <= $5 OR application_name = $3)`, append(p.denseWho(logins), since)...)
		var x transaction
		var own, told bool
		var end []int32 // processes
		waits := 0
		_, err := pgx.ForEachRow(rows, []any{&x.pid, &x.began, &own, &told}, func() error {
			switch {
			case own, !told && !others[x] && time.Now().After(patience):
				end = append(end, x.pid)
			case told:
				others[x] = true
			case !others[x]:
				waits++
			}
			return nil
		})
		if err == nil && len(end) > 0 {
			_, err = conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY($1) AND usename = ANY($2) AND (xact_start <= $3 OR application_name = $4)`, end, logins, since, p.denseRole)
		}
		if err != nil {
			return fmt.Errorf("end sessions: %w", err)
		}
		if len(end)+waits == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end sessions: %d of role %s are left: %w", len(end)+waits, p.denseRole, ctx.Err())
		case <-time.After(drainLook):
		}
	}
}
