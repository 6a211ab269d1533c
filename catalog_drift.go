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
// the tenant's lock held, so that a migration at work is no drift ([ErrInProgress]). It takes one session at a time of each server and changes nothing. A new place is written in the audit
// trail, and needs room at the server; one that a crash leaves, the validity job drops.
//
// The result is in order of ID. A tenant's own error, or that of its server ([ErrNoProvisioner], [ErrNoRoom]), is in its Err and stops no other. The error is [ErrNoMigrations] (name a
// reference), [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady] or [ErrInvalid] (the reference), that of reading the reference, ctx.Err() or [ErrPrimaryUnavailable].
func (c *Catalog) Drift(ctx context.Context, reference ...ID) ([]Drift, error) {
	fail := func(id ID, err error) ([]Drift, error) {
		return nil, &Error{Op: opDrift, Tenant: id, Err: err}
	}
	switch {
	case len(reference) > 1:
		return fail(0, invalid(errors.New("reference: give one")))
	case len(reference) == 0 && c.tn.migrations.empty():
		return fail(0, errNoMigrations)
	}
	ctx, err := begin(ctx)
	if err != nil {
		return fail(0, err)
	}
	tenants, err := c.surveyed(ctx, `t.state IN ('active', 'suspended', 'maintenance') AND d.isolation <> 'shared'`)
	if err != nil {
		return fail(0, err)
	}
	var wants *template
	for _, id := range reference {
		if wants, err = c.templateOf(ctx, tenants, id); err != nil {
			return fail(id, err)
		}
	}
	at := map[int64][]*surveyed{}
	for _, t := range tenants {
		at[t.in.server] = append(at[t.in.server], t)
	}
	var wg sync.WaitGroup
	for server, tenants := range at {
		wg.Go(func() { c.survey(ctx, server, tenants, wants) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return fail(0, err)
	}
	drifts := make([]Drift, len(tenants))
	for i, t := range tenants {
		drifts[i] = t.drift
	}
	return drifts, nil
}

// surveyed is one tenant with its place, of which no password is read.
type surveyed struct {
	drift Drift
	in    province
	at    shape.Place
}

func (t *surveyed) fail(err error) {
	t.drift.Fingerprint, t.drift.Differences = "", nil
	if t.drift.Err = err; !errors.As(err, new(*Error)) {
		t.drift.Err = &Error{Op: opDrift, Tenant: t.drift.Tenant.ID, Name: t.drift.Tenant.Name, Err: err}
	}
}

// surveyed reads the places of some tenants, in order of ID.
func (c *Catalog) surveyed(ctx context.Context, where string, args ...any) ([]*surveyed, error) {
	db := c.tn.primary
	rows, _ := db.pool.Query(ctx, `SELECT `+tenantColumns+`, d.version, d.server, d.database, d.schema, d.owner, d.runtime, d.login, d.next_login, d.old_login, d.dense_role, d.promised, coalesce(r.role, '')
		FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source LEFT JOIN tenancy.readers r ON r.server = d.server
		WHERE d.state = 'made' AND `+where+` ORDER BY t.id`, args...)
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*surveyed, error) {
		var t surveyed
		var p place
		var reader string
		var err error
		p.tenant, err = db.scanTenant(row, &t.drift.Version, &t.in.server, &t.in.database, &p.source.Schema, &p.owner, &p.runtime, &p.source.User, &p.nextLogin, &p.oldLogin, &p.denseRole, &p.promised, &reader)
		t.drift.Tenant, t.at = p.tenant, ownNames(&p, reader)
		return &t, err
	})
	return all, unavailable("read places", err)
}

// ownNames are the names of the place that differ from tenant to tenant. A reader has grants where one was made and none elsewhere.
func ownNames(p *place, reader string) shape.Place {
	roles := map[string]string{p.owner: "{owner}", p.runtime: shape.Runtime}
	for _, login := range p.logins() {
		roles[login] = "{login}"
	}
	for _, role := range p.denseRoles() {
		roles[role] = "{dense role}"
	}
	return shape.Place{Schema: p.source.Schema, Roles: roles, Without: reader, Number: p.number()}
}

// template is what tenants are compared with.
type template struct {
	shape   shape.Shape
	version int64
}

// templateOf makes a tenant the reference of all.
func (c *Catalog) templateOf(ctx context.Context, tenants []*surveyed, id ID) (*template, error) {
	i := slices.IndexFunc(tenants, func(t *surveyed) bool { return t.drift.Tenant.ID == id })
	if i < 0 {
		t, err := c.Tenant(ctx, id)
		if err == nil {
			err = settled(t.State)
		}
		if err == nil {
			err = invalid(fmt.Errorf("reference: a tenant with %q has no schema of its own", t.Isolation))
		}
		return nil, err
	}
	t := tenants[i]
	shapes, err := c.readShapes(ctx, t.in, t.at)
	if err == nil && len(shapes[0].Objects()) == 0 {
		err = fmt.Errorf("its schema %s is not there", t.at.Schema)
	}
	if err != nil {
		return nil, err
	}
	return &template{shapes[0], t.drift.Version}, nil
}

// dropTemplateTimeout bounds the drop of what was compared with, also when the caller has given up. The validity job drops what is left.
const dropTemplateTimeout = 30 * time.Second

// makeTemplate makes a place at the server, reads it, and drops it. The place is in state intent for good, so that no tenant takes it.
func (c *Catalog) makeTemplate(ctx context.Context, server int64) (*template, error) {
	db := c.tn.primary
	var name, reader string
	if err := db.pool.QueryRow(ctx, `SELECT s.name, coalesce(r.role, '') FROM tenancy.servers s LEFT JOIN tenancy.readers r ON r.server = s.id WHERE s.id = $1`, server).Scan(&name, &reader); err != nil {
		return nil, unavailable("read servers", err)
	}
	uid := newUID()
	ctx, release, err := db.tryLockUID(ctx, uid) // or the validity job could take the place for one that a crash has left
	if err != nil {
		return nil, err
	}
	defer release()
	p, err := c.preparePlace(ctx, opDrift, uid, 0, name, IsolationSchema)
	if p != nil {
		defer func() {
			ctx, cancel := afterwards(ctx, dropTemplateTimeout)
			defer cancel()
			if err := c.dropUnused(ctx, p); err != nil {
				c.tn.cfg.Logger.Warn("tenancy: a place that was compared with is still to be dropped, by the validity job", "schema", p.source.Schema, "error", err)
			}
		}()
	}
	if err != nil {
		return nil, err
	}
	shapes, err := c.readShapes(ctx, province{server: server}, ownNames(p, reader))
	if err != nil {
		return nil, err
	}
	return &template{shapes[0], p.version}, nil
}

// survey compares the tenants of one server, those first that share a database. Those that differ are read once more.
func (c *Catalog) survey(ctx context.Context, server int64, tenants []*surveyed, wants *template) {
	if wants == nil {
		made, err := c.makeTemplate(ctx, server)
		if err != nil {
			for _, t := range tenants {
				t.fail(fmt.Errorf("make a place to compare with: %w", err))
			}
			return
		}
		wants = made
	}
	in := map[province][]*surveyed{}
	for _, t := range tenants {
		if t.drift.Wants = wants.version; t.drift.Version == wants.version {
			in[t.in] = append(in[t.in], t)
		}
	}
	var down error // a server that does not answer is not asked for each of its databases
	for _, tenants := range in {
		for some := range slices.Chunk(tenants, schemasAtOnce) {
			err := down
			if err == nil {
				err = c.look(ctx, wants, some...)
			}
			refused := errors.As(err, new(*pgconn.PgError)) // one schema can be why all of them are not read
			if err != nil && !refused {
				down = err
			}
			for _, t := range some {
				switch {
				case refused || len(t.drift.Differences) > 0:
					c.lookAgain(ctx, wants, t)
				case err != nil:
					t.fail(err)
				}
			}
		}
	}
}

// look compares tenants of one database.
func (c *Catalog) look(ctx context.Context, wants *template, tenants ...*surveyed) error {
	places := make([]shape.Place, len(tenants))
	for i, t := range tenants {
		places[i] = t.at
	}
	shapes, err := c.readShapes(ctx, tenants[0].in, places...)
	if err != nil {
		return err
	}
	for i, t := range tenants {
		t.drift.Fingerprint = shapes[i].Fingerprint()
		for _, d := range shape.Compare(shapes[i], wants.shape) {
			t.drift.Differences = append(t.drift.Differences, Difference(d))
		}
	}
	return nil
}

// lookAgain compares a tenant on which no verb is at work.
func (c *Catalog) lookAgain(ctx context.Context, wants *template, t *surveyed) {
	ctx, release, err := c.tn.primary.tryLockTenant(ctx, t.drift.Tenant.ID)
	if err != nil {
		t.fail(err)
		return
	}
	defer release()
	now, err := c.surveyed(ctx, `t.id = $1`, t.drift.Tenant.ID)
	if err == nil && (len(now) == 0 || now[0].in.server != t.in.server) {
		err = hinted(ErrInProgress, "it has moved or was deleted meanwhile")
	}
	if err != nil {
		t.fail(err)
		return
	}
	*t = *now[0]
	if t.drift.Wants = wants.version; t.drift.Version != wants.version {
		return
	}
	if err := c.look(ctx, wants, t); err != nil {
		t.fail(err)
	}
}

// readShapes reads schemas of one database.
func (c *Catalog) readShapes(ctx context.Context, in province, places ...shape.Place) ([]shape.Shape, error) {
	done, err := c.tn.slot(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	conn, err := c.tn.Migrator().provisionerOf(ctx, in)
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	return shape.Read(ctx, conn, places)
}
