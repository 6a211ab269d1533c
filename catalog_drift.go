package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/shape"
)

const opDrift = "drift"

// Drift is what [Catalog.Drift] says of one tenant's schema. It is as it should be where Err is nil, Version is Wants and there are no Differences.
type Drift struct {
	Tenant Tenant
	// Version is that of the service's migrations, as the primary has it, and Wants that of the reference. Where they differ, nothing was compared: see [Migrator].
	Version, Wants int64
	// Fingerprint is a hash of all that was compared: tenants of one server have the same one when nothing differs. "" where nothing was read.
	Fingerprint string
	Differences []Difference // sorted by kind and object
	Err         error        // why the tenant was not compared; nil: it was
}

// Difference is one object of a schema that is not as the reference has it.
type Difference struct {
	Kind   string // table, column, check, foreign key, index, view, function, trigger, policy, grant, owner, comment and so on
	Object string // such as notes.title; the tenant's own schema and roles are {schema}, {owner}, {runtime}, {login}
	Has    string // the definition in the tenant's schema; "": it is missing there
	Wants  string // in the reference; "": it should not be there
}

// String says it in words, on one line. Definitions are quoted: people of the tenant may have written them.
func (d Difference) String() string { return shape.Difference(d).String() }

// Drift compares the schemas of all tenants that are in service, suspended or under maintenance with a reference, and tells where somebody has
// changed one by hand. The reference is a tenant, or, where none is named, a new place that Drift makes with the service's migrations at each server, reads, and drops.
//
// Compared are tables, columns, constraints, indexes, views, rules, functions, triggers, policies, sequences, types, statistics, owners, grants and
// comments of the tenant's schema, in a database of its own too. The tenant's own names do not count, nor do rows, the order of columns, tablespaces, what a reader was granted, and
// what is in other schemas. Servers of different major versions print some definitions differently, which a new place at each server has no part in.
//
// A tenant at another version of the migrations than the reference is told as such, and is not compared. Tenants with [IsolationShared] have one schema together and are not in
// the result: the migrations of it check their wall.
//
// It reads the server's catalogs as the provisioner: no table, and no code of a tenant's, and nothing is locked for long. What looks different is read once more with
// the tenant's lock held, so that a migration at work is no drift ([ErrInProgress]). It runs Limits.Provisions at a time and changes nothing. A new place is written in the audit
// trail, and needs room at the server; one that a crash leaves, the validity job drops.
//
// The result is in order of ID. A tenant's own error, or that of its server ([ErrNoProvisioner], [ErrNoRoom]), is in its Err and stops no other. The error is [ErrNoMigrations] (name a
// reference), [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady] or [ErrInvalid] (the reference), that of reading the reference, ctx.Err() or [ErrPrimaryUnavailable].
func (c *Catalog) Drift(ctx context.Context, reference ...ID) ([]Drift, error) {
	fail := func(id ID, err error) ([]Drift, error) {
		return nil, &Error{Op: opDrift, Tenant: id, Err: err}
	}
	if len(reference) > 1 {
		return fail(0, invalid(errors.New("reference: give one")))
	}
	ctx, err := begin(ctx)
	if err != nil {
		return fail(0, err)
	}
	s := survey{c: c, templates: map[int64]template{}}
	if err := s.list(ctx); err != nil {
		return fail(0, err)
	}
	if len(reference) == 1 {
		if err := s.takeTenant(ctx, reference[0]); err != nil {
			return fail(reference[0], err)
		}
	} else if c.tn.migrations.empty() {
		return fail(0, errNoMigrations)
	} else {
		s.makeTemplates(ctx)
	}
	s.compare(ctx)
	if err := ctx.Err(); err != nil {
		return fail(0, err)
	}
	drifts := make([]Drift, len(s.tenants))
	for i, t := range s.tenants {
		drifts[i] = t.drift
	}
	return drifts, nil
}

// survey is one run of Drift.
type survey struct {
	c         *Catalog
	tenants   []*surveyed // in order of ID
	templates map[int64]template
}

// surveyed is one tenant with its place, of which no password is read.
type surveyed struct {
	drift       Drift
	server      int64
	database    string
	provisioner DataSource
	at          shape.Place
}

// template is what the tenants of a server are compared with.
type template struct {
	shape   shape.Shape
	version int64
	err     error
}

func (s *survey) list(ctx context.Context) error {
	all, err := s.c.surveyed(ctx, `t.state IN ('active', 'suspended', 'maintenance') AND d.isolation <> 'shared'`)
	s.tenants = all
	return err
}

// surveyed reads the places of some tenants.
func (c *Catalog) surveyed(ctx context.Context, where string, args ...any) ([]*surveyed, error) {
	db := c.tn.primary
	rows, _ := db.pool.Query(ctx, `SELECT `+tenantColumns+`, d.version, d.server, coalesce(nullif(d.database, ''), s.database), s.database, d.schema, d.owner, d.runtime, d.login, d.next_login, d.old_login,
			d.dense_role, coalesce(d.promised, t.id), s.provisioner, coalesce(r.role, '')
		FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source JOIN tenancy.servers s ON s.id = d.server LEFT JOIN tenancy.readers r ON r.server = s.id
		WHERE d.state = 'made' AND `+where+` ORDER BY t.id`, args...)
	opened := map[int64]place{} // what is sealed of a server, once
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*surveyed, error) {
		var t surveyed
		var serverDatabase, owner, runtime, login, next, old, dense, reader string
		var sealed []byte
		var err error
		t.drift.Tenant, err = db.scanTenant(row, &t.drift.Version, &t.server, &t.database, &serverDatabase, &t.at.Schema, &owner, &runtime, &login, &next, &old, &dense, &t.at.Number, &sealed, &reader)
		if err != nil {
			return nil, err
		}
		of, known := opened[t.server]
		if !known {
			if err := c.openProvisioner(&of, sealed); err != nil {
				return nil, err
			}
			opened[t.server] = of
		}
		if t.provisioner = of.provisioner; !of.hasProvisioner {
			t.drift.Err = t.wrap(errNoProvisioner)
		}
		t.at = ownNames(&place{owner: owner, runtime: runtime, source: DataSource{Schema: t.at.Schema, User: login}, nextLogin: next, oldLogin: old, denseRole: dense,
			provisioner: DataSource{User: of.provisioner.User, Database: serverDatabase}, promised: &t.at.Number}, reader)
		return &t, nil
	})
	if errors.Is(err, ErrWrongKey) {
		return nil, err
	}
	return all, unavailable("list places", err)
}

// ownNames are the names of the place that differ from tenant to tenant, and from server to server.
func ownNames(p *place, reader string) shape.Place {
	roles := map[string]string{p.owner: "{owner}", p.runtime: "{runtime}", p.provisioner.User: "{provisioner}", tenantsRole(p.provisioner.Database): "{tenants}"}
	for _, login := range p.logins() {
		roles[login] = "{login}"
	}
	for _, role := range p.denseRoles() {
		roles[role] = "{dense role}"
	}
	delete(roles, "")
	at := shape.Place{Schema: p.source.Schema, Roles: roles, Runtime: "{runtime}", Number: p.number()}
	if reader != "" {
		at.Without = []string{reader}
	}
	return at
}

func (t *surveyed) wrap(err error) error {
	return &Error{Op: opDrift, Tenant: t.drift.Tenant.ID, Name: t.drift.Tenant.Name, Err: err}
}

// takeTenant makes a tenant the reference of all.
func (s *survey) takeTenant(ctx context.Context, id ID) error {
	i := slices.IndexFunc(s.tenants, func(t *surveyed) bool { return t.drift.Tenant.ID == id })
	if i < 0 {
		t, err := s.c.Tenant(ctx, id)
		switch {
		case err != nil:
			return err
		case t.State != StateActive && t.State != StateSuspended && t.State != StateMaintenance:
			return settled(t.State)
		}
		return invalid(fmt.Errorf("reference: a tenant with %q has no schema of its own", t.Isolation))
	}
	t := s.tenants[i]
	if t.drift.Err != nil {
		return errNoProvisioner
	}
	shapes, err := s.read(ctx, []*surveyed{t})
	if err != nil {
		return err
	}
	if len(shapes[0].Objects()) == 0 {
		return fmt.Errorf("its schema %s is not there", t.at.Schema)
	}
	for _, of := range s.tenants {
		s.templates[of.server] = template{shape: shapes[0], version: t.drift.Version}
	}
	return nil
}

// makeTemplates makes a place at each server of a tenant's, reads it, and drops it.
func (s *survey) makeTemplates(ctx context.Context) {
	for _, t := range s.tenants {
		if _, done := s.templates[t.server]; !done && t.drift.Err == nil && ctx.Err() == nil {
			made, err := s.c.makeTemplate(ctx, t.server)
			if err != nil {
				made.err = fmt.Errorf("make a place to compare with: %w", err)
			}
			s.templates[t.server] = made
		}
	}
}

// dropTemplateTimeout bounds the drop of what was compared with, also when the caller has given up. The validity job drops what is left.
const dropTemplateTimeout = 30 * time.Second

func (c *Catalog) makeTemplate(ctx context.Context, server int64) (made template, err error) {
	db := c.tn.primary
	var name, reader string
	if err := db.pool.QueryRow(ctx, `SELECT s.name, coalesce(r.role, '') FROM tenancy.servers s LEFT JOIN tenancy.readers r ON r.server = s.id WHERE s.id = $1`, server).Scan(&name, &reader); err != nil {
		return made, unavailable("read servers", err)
	}
	uid := newUID()
	ctx, release, err := db.tryLockUID(ctx, uid) // or the validity job could take the place for one that a crash has left
	if err != nil {
		return made, err
	}
	defer release()
	var id int64
	err = pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) (err error) {
		if id, err = c.intendPlace(ctx, tx, uid, 0, name, IsolationSchema); err != nil {
			return err
		}
		return audit(ctx, tx, opDrift, 0, map[string]any{"server": name})
	})
	if err != nil {
		return made, refusal(opDrift, err)
	}
	p, err := c.placeByID(ctx, id)
	if err != nil {
		return made, err
	}
	done, err := c.tn.slot(ctx)
	if err != nil {
		return made, err
	}
	defer done()
	defer func() { // it is in state intent for good, so that no tenant takes it
		ctx, cancel := afterwards(ctx, dropTemplateTimeout)
		defer cancel()
		if e := c.dropUnused(ctx, p); e != nil {
			c.tn.cfg.Logger.Warn("tenancy: a place that was compared with is still to be dropped, by the validity job", "schema", p.source.Schema, "error", e)
		}
	}()
	if err := c.make(ctx, p); err != nil {
		return made, err
	}
	conn, err := p.insideConn(ctx)
	if err != nil {
		return made, err
	}
	defer closeConn(conn)
	shapes, err := shape.Read(ctx, conn, []shape.Place{ownNames(p, reader)})
	if err != nil {
		return made, err
	}
	return template{shape: shapes[0], version: p.version}, nil
}

// driftBatch is how many schemas of a database are read at once: enough that a query for each kind of object costs little, and few enough for memory.
const driftBatch = 100

// compare reads the tenants that are to be compared, and once more those that differ.
func (s *survey) compare(ctx context.Context) {
	type database struct {
		server int64
		name   string
	}
	by := map[database][]*surveyed{}
	for _, t := range s.tenants {
		of := s.templates[t.server]
		t.drift.Wants = of.version
		switch {
		case t.drift.Err != nil:
		case of.err != nil:
			t.drift.Err = t.wrap(of.err)
		case t.drift.Version == of.version:
			d := database{t.server, t.database}
			by[d] = append(by[d], t)
		}
	}
	var batches [][]*surveyed
	for _, tenants := range by {
		batches = slices.AppendSeq(batches, slices.Chunk(tenants, driftBatch))
	}
	s.each(ctx, batches, s.look)
	var differ [][]*surveyed
	for _, batch := range batches {
		for _, t := range batch {
			if refused := errors.As(t.drift.Err, new(*pgconn.PgError)); refused || len(t.drift.Differences) > 0 { // a server that is down is not asked for each tenant
				differ = append(differ, []*surveyed{t})
			}
		}
	}
	s.each(ctx, differ, func(ctx context.Context, one []*surveyed) { s.lookAgain(ctx, one[0]) })
}

// each runs fn for the batches, as many at a time as verbs may be at work.
func (s *survey) each(ctx context.Context, batches [][]*surveyed, fn func(context.Context, []*surveyed)) {
	todo := make(chan []*surveyed)
	var wg sync.WaitGroup
	for range min(len(batches), cap(s.c.tn.provisions)) {
		wg.Go(func() {
			for batch := range todo {
				fn(ctx, batch)
			}
		})
	}
	for _, batch := range batches {
		if ctx.Err() != nil {
			break
		}
		todo <- batch
	}
	close(todo)
	wg.Wait()
}

// look compares the tenants of one database. Where they cannot be read together, each says why by itself.
func (s *survey) look(ctx context.Context, tenants []*surveyed) {
	shapes, err := s.read(ctx, tenants)
	for i, t := range tenants {
		if err != nil {
			t.drift.Err = t.wrap(err) // it is looked at again
			continue
		}
		s.judge(t, shapes[i])
	}
}

func (s *survey) judge(t *surveyed, is shape.Shape) {
	t.drift.Differences = nil
	t.drift.Fingerprint = is.Fingerprint()
	for _, d := range shape.Compare(is, s.templates[t.server].shape) {
		t.drift.Differences = append(t.drift.Differences, Difference(d))
	}
}

// lookAgain compares a tenant on which no verb is at work.
func (s *survey) lookAgain(ctx context.Context, t *surveyed) {
	err := func() error {
		ctx, release, err := s.c.tn.primary.tryLockTenant(ctx, t.drift.Tenant.ID)
		if err != nil {
			return err
		}
		defer release()
		now, err := s.c.surveyed(ctx, `t.id = $1`, t.drift.Tenant.ID)
		if err != nil {
			return err
		}
		if len(now) == 0 || now[0].server != t.server {
			return hinted(ErrInProgress, "it has moved or was deleted meanwhile")
		}
		wants := t.drift.Wants
		*t = *now[0]
		t.drift.Wants = wants
		if t.drift.Err != nil || t.drift.Version != wants {
			return t.drift.Err
		}
		shapes, err := s.read(ctx, []*surveyed{t})
		if err == nil {
			s.judge(t, shapes[0])
		}
		return err
	}()
	t.drift.Err = nil
	if err != nil {
		t.drift.Fingerprint, t.drift.Differences = "", nil
		t.drift.Err = err
		if !errors.As(err, new(*Error)) {
			t.drift.Err = t.wrap(err)
		}
	}
}

// read returns the shapes of tenants of one database.
func (s *survey) read(ctx context.Context, tenants []*surveyed) ([]shape.Shape, error) {
	done, err := s.c.tn.slot(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	d := tenants[0].provisioner
	d.Database = tenants[0].database
	conn, err := connectProvisioner(ctx, s.c.tn.servers, d)
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	places := make([]shape.Place, len(tenants))
	for i, t := range tenants {
		places[i] = t.at
	}
	return shape.Read(ctx, conn, places)
}
