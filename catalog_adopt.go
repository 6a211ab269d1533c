package tenancy

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Adoption is what Adopt is asked for: to make the tables of a service that has had one customer the schema of a tenant. Name and Login are required; what
// is not explained is as in [NewTenant].
type Adoption struct {
	Name        string
	DisplayName string
	MaxUsers    int
	Attributes  map[string]any
	Admin       UserKey
	Domains     []string
	// Server is the registered server whose tenants' database is that of the service. Default: the only one.
	Server string
	// Schema is where the tables are. Default: "public".
	Schema string
	// Login is the service's, which owns all that is in the schema; no superuser. It is left and not dropped: it owns nothing there any more, may not connect to the
	// database, and is NOLOGIN, which holds for every database of the server.
	Login string
}

// AdoptionPlan is what Adopt would do, and what it found. Nothing stands in the way where there are no Obstacles.
type AdoptionPlan struct {
	// Steps are in order. {schema}, {owner}, {runtime} and {login} stand for names that Adopt makes.
	Steps []AdoptionStep
	// Obstacles each keep Adopt from beginning.
	Obstacles []Finding
	// Warnings are what somebody should have seen before.
	Warnings []Finding
	// Version is that of the service's migrations which the tables have, and Wants the one that Adopt brings them to.
	Version, Wants int64
}

// AdoptionStep is one step in words, with its statements, if it has any of its own.
type AdoptionStep struct {
	What string
	SQL  []string
}

// String writes the plan for people to read.
func (p AdoptionPlan) String() string {
	var b strings.Builder
	for _, list := range []struct {
		of       string
		findings []Finding
	}{{"obstacle", p.Obstacles}, {"warning", p.Warnings}} {
		for _, f := range list.findings {
			fmt.Fprintf(&b, "%s: %s\n\t%s\n", list.of, f.What, f.Mend)
		}
	}
	for i, s := range p.Steps {
		fmt.Fprintf(&b, "%d. %s\n", i+1, s.What)
		for _, sql := range s.SQL {
			fmt.Fprintf(&b, "\t%s;\n", sql)
		}
	}
	return b.String()
}

// origin is what a place is adopted from.
type origin struct{ schema, login string }

var placeName = regexp.MustCompile(`^t_[0-9a-f]{20}`)

// check also fills in the defaults.
func (a *Adoption) check() (NewTenant, error) {
	def(&a.Schema, "public")
	n := NewTenant{Name: a.Name, DisplayName: a.DisplayName, MaxUsers: a.MaxUsers, Attributes: a.Attributes, Admin: a.Admin, Domains: a.Domains, Server: a.Server, Isolation: IsolationSchema}
	if err := n.check(); err != nil {
		return n, err
	}
	if err := ident.Schema(a.Schema); err != nil && a.Schema != "public" {
		return n, invalid(err)
	}
	if placeName.MatchString(a.Schema) || placeName.MatchString(a.Login) {
		return n, invalid(errors.New("schema and login: they are those of a tenant already"))
	}
	if a.Login == "" || len(a.Login) > 63 || strings.ContainsRune(a.Login, 0) {
		return n, invalid(errors.New("login: 1 to 63 bytes, the name of the service's role"))
	}
	return n, nil
}

// PlanAdoption tells what [Catalog.Adopt] would do with a, and what stands in its way, each with what mends it. It reads the server's catalogs and the table of versions, and changes nothing.
//
// The error is [ErrInvalid], [ErrNoMigrations], [ErrNoProvisioner], [ErrNoRoom], [ErrPrimaryUnavailable] or the server's.
func (c *Catalog) PlanAdoption(ctx context.Context, a Adoption) (AdoptionPlan, error) {
	fail := func(err error) (AdoptionPlan, error) {
		return AdoptionPlan{}, &Error{Op: "plan adoption", Name: a.Name, Err: err}
	}
	n, err := a.check()
	if err != nil {
		return fail(err)
	}
	if c.tn.migrations.empty() {
		return fail(errNoMigrations)
	}
	if ctx, err = begin(ctx); err != nil {
		return fail(err)
	}
	if err := c.onlyServer(ctx, &n); err != nil {
		return fail(err)
	}
	plan, err := c.planAdoption(ctx, &n, origin{a.Schema, a.Login})
	if err != nil {
		return fail(err)
	}
	var taken bool
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT count(*) > 0 FROM tenancy.tenants WHERE name = $1`, n.Name).Scan(&taken); err != nil {
		return fail(unavailable("plan adoption", err))
	}
	if taken {
		plan.Obstacles = append(plan.Obstacles, obstacle(fmt.Sprintf("the name %q is taken", n.Name), "choose another; an adoption that was begun under it is finished by Catalog.Adopt"))
	}
	return plan, nil
}

// onlyServer names the server where the caller did not, and there is one.
func (c *Catalog) onlyServer(ctx context.Context, n *NewTenant) error {
	if n.Server != "" {
		return nil
	}
	var servers int
	var name string
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT count(*), coalesce(min(name), '') FROM tenancy.servers`).Scan(&servers, &name); err != nil {
		return unavailable("read servers", err)
	}
	if servers > 1 {
		return invalid(errors.New("server: there are several; name the one whose database has the tables"))
	}
	n.Server = name
	return nil
}

func (c *Catalog) planAdoption(ctx context.Context, n *NewTenant, from origin) (AdoptionPlan, error) {
	s, err := roomiest(ctx, c.tn.primary.pool, n.Server)
	if err != nil {
		return AdoptionPlan{}, refusal("choose server", err)
	}
	p := place{isolation: IsolationSchema, source: s.address, owner: "{owner}", runtime: "{runtime}", from: &from}
	p.source.Schema, p.source.User = "{schema}", "{login}"
	if err := c.openProvisioner(&p, s.provisioner); err != nil {
		return AdoptionPlan{}, err
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return AdoptionPlan{}, err
	}
	defer closeConn(conn)
	var f found
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		f, err = c.surveyService(ctx, tx, &p, serverMajor(conn))
		return err
	})
	if err != nil {
		return AdoptionPlan{}, err
	}
	plan := AdoptionPlan{Obstacles: f.obstacles, Warnings: f.warnings, Version: f.version, Wants: max(f.version, c.tn.migrations.newest())}
	if f.there {
		plan.Steps = c.adoptionSteps(&p, &f)
	}
	return plan, nil
}

// adoptionSteps are all that Adopt does.
func (c *Catalog) adoptionSteps(p *place, f *found) []AdoptionStep {
	steps := append([]AdoptionStep{{"Write the intent in the primary, and make the roles that every tenant has.", []string{
		"CREATE ROLE " + ident.Quote(p.owner) + " NOLOGIN",
		"CREATE ROLE " + ident.Quote(p.runtime) + " NOLOGIN",
		"CREATE ROLE " + ident.Quote(p.source.User) + " " + c.tn.mayLogin() + " PASSWORD ...",
		"GRANT " + ident.Quote(p.runtime) + " TO " + ident.Quote(p.source.User),
		joinTenants(p, p.owner)[0],
		joinTenants(p, p.source.User)[0],
	}}}, f.takeOver(p)...)
	steps = append(steps,
		AdoptionStep{fmt.Sprintf("After the commit, end the sessions of %s in this database.", p.from.login), nil},
		AdoptionStep{"As {owner}: the marker that says whose schema it is, and the rights on what is made later.", furnishing(p)})
	pending := c.tn.migrations.between(f.version, c.tn.migrations.newest())
	if len(pending) > 0 {
		last := AdoptionStep{What: "As {owner}: the pending migrations"}
		for _, m := range pending {
			last.What += fmt.Sprintf(" %d", m.Version)
		}
		last.What += "."
		steps = append(steps, last)
	}
	steps = append(steps, AdoptionStep{"Ask the server whether the privileges are those of a created tenant, log in as {login}, and activate the tenant.", nil})
	for i := range steps {
		for j, sql := range steps[i].SQL {
			steps[i].SQL[j] = unquoteNames.Replace(sql)
		}
	}
	return steps
}

var unquoteNames = strings.NewReplacer(`"{schema}"`, "{schema}", `"{owner}"`, "{owner}", `"{runtime}"`, "{runtime}", `"{login}"`, "{login}")

// Adopt makes the tables of a service that has had one customer the schema of a tenant, and returns it once it is active: the schema gets the tenant's name, owner,
// rights and marker as one that Create made, in the same database, and a new, empty one takes its place. No row moves. The service's login is
// closed and its sessions end; migrations that are pending are applied. The tenant has [IsolationSchema]: a schema is not kept under the login
// that it had.
//
// What [Catalog.PlanAdoption] finds in the way is a [*SetupError], and nothing was made. The change at the server is one transaction: what fails or dies before its commit leaves the
// service as it was but for sessions that were ended, and what dies after it is finished by the same call again, on any node.
// Waits for locks are short, and are tried again for 30 s. Cancelling ctx ends the work between two steps.
//
// Until [Catalog.ConfirmAdoption], [Catalog.Unadopt] takes it back.
//
// The error is [ErrInvalid], [ErrTenantExists], [ErrNoMigrations], [ErrNoProvisioner], [ErrNoRoom], [ErrSetup], [ErrInProgress], [ErrPrimaryUnavailable] or that of the server or a migration.
func (c *Catalog) Adopt(ctx context.Context, a Adoption) (Tenant, error) {
	fail := func(id ID, err error) (Tenant, error) {
		return Tenant{}, &Error{Op: opAdopt, Tenant: id, Name: a.Name, Err: err}
	}
	n, err := a.check()
	if err != nil {
		return fail(0, err)
	}
	if c.tn.migrations.empty() {
		return fail(0, errNoMigrations)
	}
	if single := c.tn.cfg.SingleTenant; single != "" && n.Name != single {
		return fail(0, invalid(fmt.Errorf("Config.SingleTenant is %q: there is no other", single)))
	}
	if ctx, err = begin(ctx); err != nil {
		return fail(0, err)
	}
	if err := c.onlyServer(ctx, &n); err != nil {
		return fail(0, err)
	}
	var declared bool
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT count(*) > 0 FROM tenancy.tenants WHERE name = $1`, n.Name).Scan(&declared); err != nil {
		return fail(0, unavailable(opAdopt, err))
	}
	from := origin{a.Schema, a.Login}
	if !declared { // or it was begun, or is another's
		plan, err := c.planAdoption(ctx, &n, from)
		if err != nil {
			return fail(0, err)
		}
		if len(plan.Obstacles) > 0 {
			return fail(0, &SetupError{plan.Obstacles})
		}
	}
	id, err := c.declare(ctx, &n, &from)
	if err != nil {
		return fail(id, err)
	}
	t, err := c.finish(ctx, id, &from, false)
	if err != nil {
		return fail(id, err)
	}
	return t, nil
}

const opAdopt = "adopt"

// adoptSchema makes the service's schema the place's. It looks before it acts, as makeSchema does.
func (c *Catalog) adoptSchema(ctx context.Context, conn *pgx.Conn, p *place) error {
	owner, err := schemaOwner(ctx, conn, p.source.Schema)
	switch {
	case err != nil:
		return err
	case owner == "":
		done, err := p.act(ctx, conn, p.owner)
		if err != nil {
			return err
		}
		defer done()
		if err := untilFree(ctx, lockPatience, func() (err error) {
			for range 10 {
				if err = c.takeOver(ctx, conn, p); !overtaken(err) {
					break
				}
			}
			return err
		}); err != nil {
			return err
		}
	case owner != p.owner:
		return fmt.Errorf("schema %s belongs to role %s and not to %s: it was not touched", p.source.Schema, owner, p.owner)
	}
	return endHere(ctx, conn, p.from.login)
}

// schemaOwner returns whose the schema is, "" where there is none.
func schemaOwner(ctx context.Context, q querier, schema string) (owner string, err error) {
	err = q.QueryRow(ctx, `SELECT coalesce(min(pg_get_userbyid(nspowner)), '') FROM pg_namespace WHERE nspname = $1`, schema).Scan(&owner)
	return owner, err
}

// takeOver is the one transaction of an adoption at the server. What it needs to be taken back is written first.
func (c *Catalog) takeOver(ctx context.Context, conn *pgx.Conn, p *place) error {
	f, err := c.surveyService(ctx, conn, p, serverMajor(conn))
	if err != nil {
		return err
	}
	if len(f.obstacles) > 0 {
		return &SetupError{f.obstacles}
	}
	tag, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.adoptions SET owner = $2, extensions = $3, undo = $4, updated = now() WHERE data_source = $1`, p.id, f.owner, f.extensions, f.undo(p))
	if err != nil {
		return unavailable(opAdopt, err)
	}
	if tag.RowsAffected() == 0 {
		return errOvertaken
	}
	if _, err := terminateHere(ctx, conn, p.from.login); err != nil { // what it is at would be in the way; it may come back until the commit
		return err
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		for _, step := range f.takeOver(p) {
			for _, sql := range step.SQL {
				if _, err := tx.Exec(ctx, sql); err != nil {
					return fmt.Errorf("%s: %w", sql, err)
				}
			}
		}
		return verifyAdopted(ctx, tx, p)
	})
}

// verifyAdopted asks, before the commit, for what verifyPlace does not: whether anything is left to those who had it.
func verifyAdopted(ctx context.Context, tx pgx.Tx, p *place) error {
	schema, login := ident.Literal(p.source.Schema), ident.Literal(p.from.login)
	const mend = "nothing was changed; call it again: somebody was at work on the schema meanwhile"
	return ask(ctx, tx, []check{
		{strings.ReplaceAll(`SELECT count(*) = 0 FROM (`+objectsSQL+`) o WHERE o.owner <> `+ident.Literal(p.owner), "$1", schema), "something in the schema belongs to others", mend},
		{strings.ReplaceAll(`SELECT count(*) = 0 FROM (`+grantsSQL+`) g WHERE NOT g.usual AND g.grantee <> `+ident.Literal(p.runtime), "$1", schema), "somebody has rights in the schema", mend},
		{`NOT has_database_privilege(` + login + `, current_database(), 'CONNECT')`, "the login may connect still", mend},
		{`SELECT NOT rolcanlogin FROM pg_roles WHERE rolname = ` + login, "the login may log in still", mend},
		{`NOT has_schema_privilege('public', 'public', 'CREATE')`, "every role may create in the new schema public", mend},
	})
}

// terminateHere tells the login's sessions in this database to end.
func terminateHere(ctx context.Context, conn *pgx.Conn, login string) (sessions int, err error) {
	err = conn.QueryRow(ctx, `SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND datname = current_database() AND pid <> pg_backend_pid()) s`, login).Scan(&sessions)
	return sessions, err
}

// endHere ends the login's sessions in this database, and returns when none is left.
func endHere(ctx context.Context, conn *pgx.Conn, login string) error {
	return untilQuiet(ctx, quietLooks, func(ctx context.Context) (int, error) { return terminateHere(ctx, conn, login) })
}

// ConfirmAdoption ends the time in which [Catalog.Unadopt] takes an adoption back. The service's old login can be dropped then. It may be called again.
// The error is [ErrInvalid] for a tenant that was not adopted, [ErrTenantNotReady] (call Adopt again), [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) ConfirmAdoption(ctx context.Context, id ID) error {
	const op = "confirm adoption"
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return &Error{Op: op, Tenant: id, Err: err}
	}
	defer release()
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		state, err := lockRow(ctx, tx, id)
		if err != nil {
			return err
		}
		if state == StateProvisioning {
			return hinted(ErrTenantNotReady, "its adoption was never finished: call Adopt again")
		}
		tag, err := tx.Exec(ctx, `DELETE FROM tenancy.adoptions a USING tenancy.data_sources d, tenancy.tenants t WHERE d.id = a.data_source AND d.uid = t.uid AND t.id = $1`, id)
		if err != nil {
			return err
		}
		if tag.RowsAffected() > 0 {
			return audit(ctx, tx, op, id, nil)
		}
		var adopted bool
		if err := tx.QueryRow(ctx, `SELECT count(*) > 0 FROM tenancy.audit WHERE tenant = $1 AND action = $2`, id, op).Scan(&adopted); err != nil {
			return err
		}
		if !adopted {
			return errNotAdopted
		}
		return nil
	})
}

var errNotAdopted = hinted(ErrInvalid, "the tenant was not adopted, or that was confirmed")

// adopted is what the primary keeps of an adoption until it is confirmed.
type adopted struct {
	origin
	owner            string
	extensions, undo []string
}

func (c *Catalog) readAdopted(ctx context.Context, p *place) (a adopted, err error) {
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT schema, login, owner, extensions, undo FROM tenancy.adoptions WHERE data_source = $1`, p.id).Scan(&a.schema, &a.login, &a.owner, &a.extensions, &a.undo)
	if errors.Is(err, pgx.ErrNoRows) {
		return a, errNotAdopted
	}
	return a, unavailable("read adoption", err)
}

// Unadopt takes an adoption back that is not confirmed, also one that was never finished. The tenant ends as if it were purged, and nothing of its data is dropped: the schema has its name, owner and rights again, all that
// is in it belongs to the service's login, which may log in, and extensions are back, unless other tenants live at the server: then the login is shown tenancy_ext. What migrations and the
// tenant's calls have changed meanwhile stays. An Unadopt that died is finished by the next one, or, where the tenant is deleted and nothing else was done, undone by [Catalog.Restore].
//
// The error is [ErrInvalid] (the tenant was not adopted, that was confirmed, or it has moved away), [ErrTenantNotFound], [ErrTenantGone], [ErrNoProvisioner], [ErrPrimaryUnavailable] or the server's.
func (c *Catalog) Unadopt(ctx context.Context, id ID) error {
	const op = "unadopt"
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, err := begin(ctx)
	if err != nil {
		return fail(err)
	}
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if p.tenant.State == StatePurged {
		return fail(ErrTenantGone)
	}
	if _, err := c.readAdopted(ctx, p); err != nil {
		return fail(err)
	}
	if err := c.withdraw(ctx, op, id, StateDeleted, Suspension{Drain: c.tn.cfg.DrainTimeout}); err != nil {
		return err
	}
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	if p, err = c.place(ctx, id); err != nil {
		return fail(err)
	}
	if p.tenant.State != StateDeleted {
		return fail(errOvertaken)
	}
	a, err := c.readAdopted(ctx, p)
	if err != nil {
		return fail(err)
	}
	var places, others int
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT count(*) FILTER (WHERE uid = $2), count(*) FILTER (WHERE server = $1 AND uid <> $2) FROM tenancy.data_sources WHERE state <> 'dropped'`,
		p.server, p.tenant.UID).Scan(&places, &others)
	if err != nil {
		return fail(unavailable(op, err))
	}
	if places > 1 {
		return fail(invalid(errors.New("the tenant has other places: drop them with Catalog.DropPlace")))
	}
	roles, err := c.giveBack(ctx, p, &a, others > 0)
	if err != nil {
		return fail(err)
	}
	return c.entomb(ctx, op, []int64{p.id}, &dropped{Roles: roles}, &Receipt{Tenant: id})
}

// giveBack is takeOver the other way round, and drops the roles.
func (c *Catalog) giveBack(ctx context.Context, p *place, a *adopted, shared bool) (gone []string, err error) {
	conn, err := p.insideConn(ctx)
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	roles := append(append(p.logins(), p.denseRoles()...), p.runtime, p.owner)
	done, err := p.act(ctx, conn, roles...)
	if err != nil {
		return nil, err
	}
	defer done()
	owner, err := schemaOwner(ctx, conn, p.source.Schema)
	if err != nil {
		return nil, err
	}
	if owner != "" {
		if owner != p.owner {
			return nil, fmt.Errorf("schema %s belongs to role %s and not to %s: it was not touched", p.source.Schema, owner, p.owner)
		}
		if err := untilFree(ctx, lockPatience, func() (err error) {
			for range 10 {
				if err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error { return restore(ctx, tx, p, a, roles, shared) }); !overtaken(err) {
					break
				}
			}
			return err
		}); err != nil {
			return nil, err
		}
	}
	// What they own is dropped with them: there must be nothing but default privileges.
	var left int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_shdepend s JOIN pg_roles r ON r.oid = s.refobjid WHERE s.refclassid = 'pg_authid'::regclass AND s.deptype = 'o'
		AND s.classid <> 'pg_default_acl'::regclass AND r.rolname = ANY($1)`, roles).Scan(&left); err != nil {
		return nil, err
	}
	if gone, err = rolesThere(ctx, conn, roles); err != nil {
		return nil, err
	}
	if left > 0 {
		return nil, fmt.Errorf("the roles of %s own %d objects still: they were not dropped", p.source.Schema, left)
	}
	return gone, dropRoles(ctx, conn, roles...)
}

func restore(ctx context.Context, tx pgx.Tx, p *place, a *adopted, roles []string, shared bool) error {
	schema, login, was := ident.Quote(p.source.Schema), ident.Quote(a.login), ident.Quote(a.schema)
	exec := func(statements ...string) error {
		for _, sql := range statements {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return fmt.Errorf("%s: %w", sql, err)
			}
		}
		return nil
	}
	made, err := rolesThere(ctx, tx, roles)
	if err != nil {
		return err
	}
	if err := exec(
		"DROP TABLE IF EXISTS "+ident.Quote(p.source.Schema, markerTable),
		"ALTER SCHEMA "+schema+" OWNER TO "+login, // before what is in it, whose new owner has to have CREATE there
		"REASSIGN OWNED BY "+quotedPath(made)+" TO "+login,
	); err != nil {
		return err
	}
	functions, err := collect(ctx, tx, `SELECT 'DROP ROUTINE ' || oid::regprocedure FROM pg_proc WHERE pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = $1) AND proname ~ '^tenancy_' ORDER BY oid`, p.source.Schema)
	if err != nil {
		return err
	}
	for _, sql := range functions { // one that a migration has used stays
		if err := tolerate(ctx, tx, sql, "2BP01"); err != nil {
			return err
		}
	}
	g, err := readGrants(ctx, tx, p.source.Schema)
	if err != nil {
		return err
	}
	if err := exec(revocations(g)...); err != nil {
		return err
	}
	if a.schema == "public" {
		if err := exec("DROP SCHEMA public"); err != nil {
			return fmt.Errorf("somebody has made something in the new schema public: move it away: %w", err)
		}
	}
	if err := exec("ALTER SCHEMA "+schema+" RENAME TO "+was, "ALTER SCHEMA "+was+" OWNER TO "+ident.Quote(a.owner)); err != nil {
		return err
	}
	for _, sql := range a.undo { // not on what a migration has dropped
		if err := tolerate(ctx, tx, sql, "42P01", "42883", "42704", "42703"); err != nil {
			return err
		}
	}
	for _, name := range a.extensions {
		if !shared {
			if err := exec("ALTER EXTENSION " + ident.Quote(name) + " SET SCHEMA " + was); err != nil {
				return err
			}
		}
	}
	if shared && len(a.extensions) > 0 {
		if err := exec("GRANT USAGE ON SCHEMA "+extSchema+" TO "+login,
			"ALTER ROLE "+login+" IN DATABASE "+ident.Quote(p.source.Database)+` SET search_path = "$user", `+was+", "+extSchema); err != nil {
			return err
		}
	}
	return exec("ALTER ROLE " + login + " LOGIN")
}

// tolerate runs a statement that may fail in these ways, and has no effect then.
func tolerate(ctx context.Context, tx pgx.Tx, sql string, states ...string) error {
	err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, sql)
		return err
	})
	if err != nil && !isState(err, states...) {
		return fmt.Errorf("%s: %w", sql, err)
	}
	return nil
}
