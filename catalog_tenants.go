package tenancy

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

// NewTenant is what Create is asked for. Only Name is required.
type NewTenant struct {
	Name        string         // unique: lower-case letters, digits and hyphens, a letter first, at most 40 bytes
	DisplayName string         // free text of at most 200 bytes; default ""
	MaxUsers    int            // refused beyond when a member is added; 0: no limit
	Attributes  map[string]any // the service's own, kept as JSON of at most 64 KB; default {}
	Admin       UserKey        // the first administrator; "": none. No password is made for anyone
	Domains     []string       // host names that stand for the tenant; default none
	Server      string         // where it lives; default: the server with the fewest tenants
	// DataSource is a place that Catalog.Prepare made, on any registered server; default: a new place.
	DataSource *DataSource
}

func (n *NewTenant) check() error {
	if err := ident.Slug(n.Name); err != nil {
		return invalid(fmt.Errorf("name: %w", err))
	}
	profile := Profile{DisplayName: n.DisplayName, MaxUsers: n.MaxUsers, Attributes: n.Attributes}
	if err := profile.check(); err != nil {
		return err
	}
	n.DisplayName, n.Attributes = profile.DisplayName, profile.Attributes
	if n.Admin != "" {
		if err := ident.UserKey(string(n.Admin)); err != nil {
			return invalid(fmt.Errorf("admin: %w", err))
		}
	}
	domains := make([]string, len(n.Domains))
	for i, d := range n.Domains {
		canonical, err := ident.Domain(d)
		if err != nil {
			return invalid(fmt.Errorf("domains[%d]: %w", i, err))
		}
		domains[i] = canonical
	}
	slices.Sort(domains) // two requests lock them in one order
	n.Domains = slices.Compact(domains)
	if n.DataSource != nil {
		if n.Server != "" {
			return invalid(errors.New("server: a data source says where it lives; give one of the two"))
		}
		if err := n.DataSource.validate(); err != nil {
			return invalid(fmt.Errorf("data source: %w", err))
		}
	}
	return nil
}

// intent identifies the request: the same one again resumes or joins, another one of the same name is refused.
func (n *NewTenant) intent() []byte {
	address := ""
	if n.DataSource != nil {
		address = n.DataSource.Address() + "/" + n.DataSource.Schema
	}
	text, _ := json.Marshal([]any{n.Name, n.DisplayName, n.MaxUsers, n.Attributes, n.Admin, n.Domains, n.Server, address}) // checked before
	sum := sha256.Sum256(text)
	return sum[:]
}

// Create makes a tenant: roles, schema, marker row, grants and the service's migrations, and
// returns it once it is active. Every node serves it from then on.
//
// It blocks until the tenant is active. The same call again, on any node, resumes one that died
// half-way and joins one that is running; for a name that is taken by anything else, also by a Create of the
// same request that has ended before, the error is [ErrTenantExists]. Cancelling ctx ends the work between two steps; what was made is found by the next call.
//
// The error is [ErrInvalid], [ErrTenantExists], [ErrNoMigrations], [ErrNoProvisioner], [ErrInProgress],
// [ErrPrimaryUnavailable] or that of the server or a migration.
func (c *Catalog) Create(ctx context.Context, n NewTenant) (Tenant, error) {
	const op = "create"
	fail := func(id ID, err error) (Tenant, error) {
		return Tenant{}, &Error{Op: op, Tenant: id, Name: n.Name, Err: err}
	}
	if err := n.check(); err != nil {
		return fail(0, err)
	}
	if c.tn.migrations.empty() {
		return fail(0, errNoMigrations)
	}
	id, err := c.declare(ctx, &n)
	if err != nil {
		return fail(id, err)
	}
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(id, err)
	}
	defer release()
	done, err := c.tn.slot(ctx)
	if err != nil {
		return fail(id, err)
	}
	defer done()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(id, err)
	}
	switch p.tenant.State {
	case StateActive: // another caller of the same request finished it
		c.tn.feed.catchUp(ctx)
		return p.tenant, nil
	case StateProvisioning:
	default:
		return fail(id, ErrTenantExists)
	}
	if p.state == "intent" {
		if err := c.make(ctx, p); err != nil {
			return fail(id, err)
		}
	} else if err := c.tn.proveLogin(ctx, p); err != nil {
		return fail(id, err)
	}
	if err := c.activate(ctx, p); err != nil {
		return fail(id, err)
	}
	t, err := c.Tenant(ctx, id)
	if err != nil {
		return fail(id, err)
	}
	return t, nil
}

// declare writes the intent: the tenant, its place, first member and domains, in one
// transaction before anything is made. It returns the ID of the same intent written before.
func (c *Catalog) declare(ctx context.Context, n *NewTenant) (id ID, err error) {
	intent := n.intent()
	err = c.tn.primary.transact(ctx, func(tx pgx.Tx) (err error) {
		var uid UID
		var source int64
		if n.DataSource == nil {
			uid = newUID()
		} else if uid, source, err = c.prepared(ctx, tx, *n.DataSource); err != nil {
			return err
		}
		var maxUsers *int
		if n.MaxUsers > 0 {
			maxUsers = &n.MaxUsers
		}
		err = tx.QueryRow(ctx, `INSERT INTO tenancy.tenants (uid, name, display_name, state, isolation, intent, max_users, attributes)
			VALUES ($1, $2, $3, 'provisioning', $4, $5, $6, $7) ON CONFLICT (name) DO NOTHING RETURNING id`,
			uid, n.Name, n.DisplayName, c.tn.cfg.Isolation, intent, maxUsers, n.Attributes).Scan(&id)
		if isState(err, "23505") { // of the UID: the name has its own answer
			return invalid(errors.New("data source: another tenant has this place"))
		} else if errors.Is(err, pgx.ErrNoRows) {
			return c.declared(ctx, tx, n, intent, &id)
		} else if err != nil {
			return err
		}
		if n.DataSource == nil {
			if source, err = c.intendPlace(ctx, tx, uid, n.Server); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET data_source = $2 WHERE id = $1`, id, source); err != nil {
			return err
		}
		for _, d := range n.Domains {
			if err := addDomain(ctx, tx, id, d); err != nil {
				return err
			}
		}
		if n.Admin != "" {
			if err := addMember(ctx, tx, Membership{User: n.Admin, Tenant: id, Role: RoleAdmin}); err != nil {
				return err
			}
		}
		if err := audit(ctx, tx, "create", id, map[string]any{"name": n.Name}); err != nil {
			return err
		}
		for _, d := range n.Domains {
			if err := changed(ctx, tx, "domain", id, d); err != nil {
				return err
			}
		}
		if n.Admin != "" {
			if err := changed(ctx, tx, "member", id, string(n.Admin)); err != nil {
				return err
			}
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return id, refusal("create", err)
	}
	return id, nil
}

// declared finds the intent that already has the name.
func (c *Catalog) declared(ctx context.Context, tx pgx.Tx, n *NewTenant, intent []byte, id *ID) error {
	var same bool
	err := tx.QueryRow(ctx, `SELECT id, state = 'provisioning' AND intent = $2 FROM tenancy.tenants WHERE name = $1`, n.Name, intent).Scan(id, &same)
	if err != nil {
		return err
	}
	if !same {
		return ErrTenantExists
	}
	return nil
}

// intendPlace chooses a server and writes the place that is to be made there, with a password of its own.
func (c *Catalog) intendPlace(ctx context.Context, tx pgx.Tx, uid UID, server string) (int64, error) {
	var id int64
	var d DataSource
	err := tx.QueryRow(ctx, `SELECT id, host, port, database, tls FROM tenancy.servers s
		WHERE ($1 = '' AND provisioner IS NOT NULL) OR name = $1
		ORDER BY (SELECT count(*) FROM tenancy.data_sources d WHERE d.server = s.id AND d.state <> 'dropped'), id LIMIT 1`, server).
		Scan(&id, &d.Host, &d.Port, &d.Database, &d.TLS)
	if errors.Is(err, pgx.ErrNoRows) {
		if server != "" {
			return 0, invalid(fmt.Errorf("server: %q is not registered", server))
		}
		return 0, hinted(ErrNoProvisioner, "no server is registered: run tenancy.Init, or set Config.Server")
	} else if err != nil {
		return 0, err
	}
	password, err := scram.Password()
	if err != nil {
		return 0, err
	}
	base := ident.NewPlace()
	d.Schema, d.User, d.Password = base, base+"_l1", Secret(password)
	sealed, err := c.tn.primary.sealSource(uid, "data_source", d)
	if err != nil {
		return 0, err
	}
	var source int64
	err = tx.QueryRow(ctx, `INSERT INTO tenancy.data_sources (uid, server, schema, owner, runtime, login, sealed, state)
		VALUES ($1, $2, $3, $4, $5, $6, $7, 'intent') RETURNING id`, uid, id, d.Schema, base+"_o", base+"_r", d.User, sealed).Scan(&source)
	return source, err
}

// activate makes the tenant visible, as the last step.
func (c *Catalog) activate(ctx context.Context, p *place) error {
	return c.write(ctx, "activate", p.tenant.ID, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'made', version = $2, updated = now() WHERE id = $1`, p.id, p.version); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'active', updated = now() WHERE id = $1 AND state = 'provisioning'`, p.tenant.ID)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		return changed(ctx, tx, "tenant", p.tenant.ID, "")
	})
}

// errOvertaken ends a verb that found the tenant changed under its hands, which only a lost lock allows.
var errOvertaken = hinted(ErrInProgress, "another verb has changed the tenant meanwhile; look at its state and call again")

// slot waits for one of the places to make or migrate a tenant. It is taken after the tenant's lock, always.
func (tn *Tenancy) slot(ctx context.Context) (done func(), err error) {
	select {
	case tn.provisions <- struct{}{}:
		return func() { <-tn.provisions }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Prepare makes an empty, migrated place on a registered server and returns its data source,
// with the password. With an ID the place is for that tenant to move to, by
// [Catalog.SetDataSource]; with 0 it is for a new one, by [NewTenant.DataSource]. Nothing uses it before.
// The error is as that of Create.
func (c *Catalog) Prepare(ctx context.Context, id ID, server string) (DataSource, error) {
	fail := func(err error) (DataSource, error) {
		return DataSource{}, &Error{Op: "prepare", Tenant: id, Err: err}
	}
	if c.tn.migrations.empty() {
		return fail(errNoMigrations)
	}
	uid := newUID()
	if id != 0 {
		held, release, err := c.tn.primary.lockTenant(ctx, id)
		if err != nil {
			return fail(err)
		}
		defer release()
		ctx = held
		t, err := c.Tenant(ctx, id)
		if err != nil {
			return fail(err)
		}
		if t.State == StateDeleted || t.State == StatePurged {
			return fail(ErrTenantGone)
		}
		uid = t.UID
	}
	var source int64
	err := pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) (err error) {
		if source, err = c.intendPlace(ctx, tx, uid, server); err != nil {
			return err
		}
		return audit(ctx, tx, "prepare", id, map[string]any{"server": server})
	})
	if err != nil {
		return fail(refusal("prepare", err))
	}
	p, err := c.placeByID(ctx, source)
	if err != nil {
		return fail(err)
	}
	done, err := c.tn.slot(ctx)
	if err != nil {
		return fail(err)
	}
	defer done()
	if err := c.make(ctx, p); err != nil {
		return fail(err)
	}
	tag, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'made', version = $2, updated = now() WHERE id = $1 AND state = 'intent'`, p.id, p.version)
	if err != nil {
		return fail(unavailable("prepare", err))
	}
	if tag.RowsAffected() == 0 {
		return fail(errOvertaken)
	}
	return p.source, nil
}

// placeByID reads a place that no tenant needs to use.
func (c *Catalog) placeByID(ctx context.Context, id int64) (*place, error) {
	p := place{id: id}
	var sealed, provisioner []byte
	db := c.tn.primary
	err := db.pool.QueryRow(ctx, `SELECT d.uid, d.state, d.version, d.server, d.owner, d.runtime, d.sealed, s.provisioner
		FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE d.id = $1`, id).
		Scan(&p.tenant.UID, &p.state, &p.version, &p.server, &p.owner, &p.runtime, &sealed, &provisioner)
	if err != nil {
		return nil, unavailable("read place", err)
	}
	p.tenant.realm = db.realm
	if p.source, err = db.openSource(p.tenant.UID, "data_source", sealed); err != nil {
		return nil, err
	}
	return &p, c.openProvisioner(&p, provisioner)
}

// prepared finds the place that d names among those that Prepare made.
func (c *Catalog) prepared(ctx context.Context, q querier, d DataSource) (uid UID, source int64, err error) {
	err = q.QueryRow(ctx, `SELECT d.uid, d.id FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
		WHERE s.host = $1 AND s.port = $2 AND s.database = $3 AND d.schema = $4 AND d.login = $5 AND d.state = 'made'`,
		d.Host, d.Port, d.Database, d.Schema, d.User).Scan(&uid, &source)
	if errors.Is(err, pgx.ErrNoRows) {
		return uid, 0, invalid(fmt.Errorf("data source: %s schema %q with login %q is not a place that Catalog.Prepare made", d.Address(), d.Schema, d.User))
	}
	return uid, source, err
}

// DropPlace drops a place that no tenant uses, for good: one that [Catalog.Prepare] made and nobody took, or one that a
// tenant has moved away from. A place in use is [ErrInvalid], as is one that is not known. Other errors are [ErrNoProvisioner] and [ErrPrimaryUnavailable].
func (c *Catalog) DropPlace(ctx context.Context, d DataSource) error {
	fail := func(err error) error { return &Error{Op: "drop place", Err: err} }
	_, source, err := c.prepared(ctx, c.tn.primary.pool, d)
	if err != nil {
		return fail(refusal("drop place", err))
	}
	p, err := c.placeByID(ctx, source)
	if err != nil {
		return fail(err)
	}
	// Marked before it is dropped: from here on no tenant can take it, and the validity job finishes what a crash leaves.
	tag, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources d SET state = 'intent', updated = now()
		WHERE id = $1 AND state = 'made' AND NOT EXISTS (SELECT FROM tenancy.tenants t WHERE t.data_source = d.id)`, source)
	if err != nil {
		return fail(unavailable("drop place", err))
	}
	if tag.RowsAffected() == 0 {
		return fail(invalid(errors.New("data source: a tenant uses this place")))
	}
	if err := c.dropUnused(ctx, p); err != nil {
		return fail(err)
	}
	return nil
}

// dropUnused drops a place in state intent.
func (c *Catalog) dropUnused(ctx context.Context, p *place) error {
	if err := dropPlace(ctx, p, &Receipt{}); err != nil {
		return err
	}
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'dropped', sealed = '', updated = now() WHERE id = $1 AND state = 'intent'`, p.id)
	return unavailable("drop place", err)
}

// SetDataSource moves the tenant to another place, which [Catalog.Prepare] made for it and the
// operator filled. The place is proved to be the tenant's own before anything moves; every node
// then opens new pools and lets the old ones drain. The old place stays as it is.
//
// The error is [ErrInvalid], [ErrIdentity] (the place is another tenant's), [ErrTenantNotFound], [ErrTenantGone], [ErrInProgress] or [ErrPrimaryUnavailable].
func (c *Catalog) SetDataSource(ctx context.Context, id ID, d DataSource) (err error) {
	const op = "set data source"
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	if err := d.validate(); err != nil {
		return fail(invalid(fmt.Errorf("data source: %w", err)))
	}
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	now, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	uid, source, err := c.prepared(ctx, c.tn.primary.pool, d)
	if err != nil {
		return fail(refusal(op, err))
	}
	if uid != now.tenant.UID {
		return fail(hinted(ErrIdentity, "the place was prepared for another tenant; nothing was moved"))
	}
	to, err := c.placeByID(ctx, source)
	if err != nil {
		return fail(err)
	}
	to.tenant, to.source = now.tenant, d // prove the login as given
	if err := c.openPlace(ctx, to); err != nil {
		return fail(err)
	}
	if now.tenant.State != StateActive { // the place was opened to be proved
		defer func() { err = errors.Join(err, fencePlace(context.WithoutCancel(ctx), to)) }()
	}
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		state, err := lockRow(ctx, tx, id)
		if err != nil {
			return err
		}
		if state == StateDeleted {
			return ErrTenantGone
		}
		sealed, err := c.tn.primary.sealSource(uid, "data_source", d)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET sealed = $2, updated = now() WHERE id = $1`, source, sealed); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET data_source = $2, generation = generation + 1, updated = now()
			WHERE id = $1 AND generation = $3`, id, source, now.tenant.Generation)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if err := audit(ctx, tx, op, id, map[string]any{"address": d.Address(), "schema": d.Schema}); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}

// Suspend takes a tenant out of service on every node and at the server: new work is refused,
// work in flight gets until every node has heard (5 s at most), then the tenant's logins are
// closed and its sessions ended, also those of a node that hears nothing. Data stays.
//
// When it returns nil, no session of the tenant is left. With [ErrNoProvisioner] the catalog and the nodes refuse the tenant,
// and sessions at the server were not ended. Other errors: [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady], [ErrInvalid], [ErrPrimaryUnavailable].
func (c *Catalog) Suspend(ctx context.Context, id ID, s Suspension) error {
	state := StateSuspended
	if s.Maintenance {
		state = StateMaintenance
		def(&s.RetryAfter, time.Minute)
	}
	if len(s.Message) > 500 || !utf8.ValidString(s.Message) || strings.ContainsRune(s.Message, 0) {
		return &Error{Op: "suspend", Tenant: id, Err: invalid(errors.New("message: at most 500 bytes of UTF-8"))}
	}
	if s.RetryAfter < 0 || s.RetryAfter > 30*24*time.Hour {
		return &Error{Op: "suspend", Tenant: id, Err: invalid(errors.New("retry after: from 0 to 30 days"))}
	}
	return c.withdraw(ctx, "suspend", id, state, s)
}

// Delete takes a tenant into quarantine: as Suspend, and for good. Its data, name and domains are kept until
// [Catalog.Purge]; [Catalog.Restore] takes it back. It may be called again.
// The errors are those of Suspend.
func (c *Catalog) Delete(ctx context.Context, id ID) error {
	return c.withdraw(ctx, "delete", id, StateDeleted, Suspension{})
}

// withdraw changes the state first (no node hands out a connection any more), then waits for the nodes, then fences at the server.
func (c *Catalog) withdraw(ctx context.Context, op string, id ID, to State, s Suspension) error {
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	err = c.write(ctx, op, id, func(tx pgx.Tx) error {
		from, err := lockRow(ctx, tx, id)
		switch {
		case err != nil:
			return err
		case from == StateDeleted && to != StateDeleted:
			return ErrTenantGone
		case from == StateProvisioning && to != StateDeleted:
			return ErrTenantNotReady
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = $2, message = $3, retry_after = $4, fenced = NULL, updated = now(),
			deleted = CASE WHEN $2 = 'deleted' THEN coalesce(deleted, now()) END WHERE id = $1`,
			id, to, s.Message, int(s.RetryAfter/time.Second)); err != nil {
			return err
		}
		if err := audit(ctx, tx, op, id, nil); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return err
	}
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if err := c.fenceTenant(ctx, p); err != nil {
		return fail(err)
	}
	return nil
}

// fenceTenant waits for the nodes, fences at the server and says so in the catalog, where the
// validity job looks for fences that a crash left out.
func (c *Catalog) fenceTenant(ctx context.Context, p *place) error {
	if err := c.tn.feed.awaitNodes(ctx); err != nil {
		return err
	}
	places, err := c.placesOf(ctx, p.tenant)
	if err != nil {
		return err
	}
	var errs []error
	for _, at := range places { // one that cannot be reached keeps no other one open
		if err := fencePlace(ctx, at); err != nil {
			errs = append(errs, fmt.Errorf("the nodes refuse the tenant, its sessions at %s were not ended: %w", at.source.Address(), err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	_, err = c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.tenants SET fenced = now() WHERE id = $1 AND state IN ('suspended', 'maintenance', 'deleted')`, p.tenant.ID)
	return unavailable("fence", err)
}

// placesOf returns every place that was made for the tenant: where it is first, then those that it has moved away from.
func (c *Catalog) placesOf(ctx context.Context, t Tenant) ([]*place, error) {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT id FROM tenancy.data_sources WHERE uid = $1 AND state <> 'dropped'
		ORDER BY id = (SELECT data_source FROM tenancy.tenants WHERE uid = $1) DESC, id`, t.UID)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, unavailable("read places", err)
	}
	places := make([]*place, len(ids))
	for i, id := range ids {
		if places[i], err = c.placeByID(ctx, id); err != nil {
			return nil, err
		}
		places[i].tenant = t
	}
	return places, nil
}

// fencePlace fences one place as its server's provisioner. One that was never made has nothing to fence.
func fencePlace(ctx context.Context, p *place) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	var made bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, p.source.User).Scan(&made); err != nil || !made {
		return err
	}
	return fence(ctx, conn, p)
}

// Resume brings a suspended tenant back into service on every node.
// The error is [ErrTenantNotFound], [ErrTenantGone] (deleted: see Restore), [ErrTenantNotReady], [ErrNoProvisioner] or [ErrPrimaryUnavailable].
func (c *Catalog) Resume(ctx context.Context, id ID) error {
	return c.reopen(ctx, "resume", id, StateSuspended, StateMaintenance)
}

// Restore takes a deleted tenant out of quarantine and back into service. The errors are those of Resume; a
// purged tenant is [ErrTenantGone].
func (c *Catalog) Restore(ctx context.Context, id ID) error {
	return c.reopen(ctx, "restore", id, StateDeleted)
}

// reopen opens the login first: a tenant is never active in the catalog and closed at the server.
func (c *Catalog) reopen(ctx context.Context, op string, id ID, from ...State) error {
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	switch s := p.tenant.State; {
	case s == StateActive:
		return nil
	case s == StateProvisioning:
		return fail(hinted(ErrTenantNotReady, "its place was never finished: call Create again"))
	case s == StateDeleted && op == "restore" && p.state == "intent":
		return c.unfinish(ctx, id)
	case s == StatePurged || s == StateDeleted && op == "resume":
		return fail(ErrTenantGone)
	}
	if err := c.openPlace(ctx, p); err != nil {
		return fail(err)
	}
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'active', message = '', retry_after = 0, fenced = NULL, deleted = NULL,
			generation = generation + 1, updated = now() WHERE id = $1 AND state = $2 AND generation = $3`, id, p.tenant.State, p.tenant.Generation)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errOvertaken
		}
		if err := audit(ctx, tx, op, id, nil); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}

// unfinish takes a tenant that was deleted before it was ever made back to where Create goes on.
func (c *Catalog) unfinish(ctx context.Context, id ID) error {
	err := c.write(ctx, "restore", id, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'provisioning', deleted = NULL, fenced = NULL, updated = now() WHERE id = $1 AND state = 'deleted'`, id); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return err
	}
	return &Error{Op: "restore", Tenant: id, Err: hinted(ErrTenantNotReady, "its place was never finished: call Create again")}
}

// openPlace lets the place's login in again after a fence, and proves it.
func (c *Catalog) openPlace(ctx context.Context, p *place) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := execDDL(ctx, conn, "ALTER ROLE "+ident.Quote(p.source.User)+" LOGIN"); err != nil {
		return err
	}
	return c.tn.proveLogin(ctx, p)
}

// Receipt says what Purge dropped.
type Receipt struct {
	Tenant  ID
	UID     UID
	Name    string
	Tables  int      // relations dropped one by one
	Roles   []string // roles dropped
	Members int      // memberships erased
}

// Purge drops a deleted tenant's data, roles, memberships and domains, for good. It asks for the name again, so that a
// wrong ID cannot do it. What stays is a tombstone: ID, UID, name and dates, which are never used again. A Purge that died is finished by the next one.
//
// The error is [ErrInvalid] when the name is not the tenant's or the tenant is not deleted, [ErrTenantNotFound],
// [ErrTenantGone] when it was purged before, [ErrNoProvisioner] or [ErrPrimaryUnavailable].
func (c *Catalog) Purge(ctx context.Context, id ID, name string) (Receipt, error) {
	fail := func(err error) (Receipt, error) { return Receipt{}, &Error{Op: "purge", Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	switch {
	case err != nil:
		return fail(err)
	case p.tenant.Name != name:
		return fail(invalid(errors.New("name: it is not this tenant's")))
	case p.tenant.State == StatePurged:
		return fail(ErrTenantGone)
	case p.tenant.State != StateDeleted:
		return fail(invalid(fmt.Errorf("state: the tenant is %s, only a deleted one can be purged", p.tenant.State)))
	}
	if err := c.fenceTenant(ctx, p); err != nil {
		return fail(err)
	}
	places, err := c.placesOf(ctx, p.tenant)
	if err != nil {
		return fail(err)
	}
	r := Receipt{Tenant: id, UID: p.tenant.UID, Name: name}
	var dropped []int64
	for _, at := range places {
		if err := dropPlace(ctx, at, &r); err != nil {
			return fail(err)
		}
		dropped = append(dropped, at.id)
	}
	err = c.write(ctx, "purge", id, func(tx pgx.Tx) error {
		if state, err := lockRow(ctx, tx, id); err != nil {
			return err
		} else if state != StateDeleted {
			return errOvertaken
		}
		rows, _ := tx.Query(ctx, `DELETE FROM tenancy.memberships WHERE tenant = $1 RETURNING user_key`, id)
		users, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		r.Members = len(users)
		rows, _ = tx.Query(ctx, `DELETE FROM tenancy.domains WHERE tenant = $1 RETURNING domain`, id)
		domains, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'purged', display_name = '', attributes = '{}', message = '', updated = now() WHERE id = $1`, id); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'dropped', sealed = '', updated = now() WHERE id = ANY($1)`, dropped); err != nil {
			return err
		}
		// What is kept of a purged tenant names none of its members.
		if _, err := tx.Exec(ctx, `UPDATE tenancy.audit SET detail = detail - 'user', actor = CASE WHEN actor = ANY($2) THEN '' ELSE actor END WHERE tenant = $1`, id, users); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.changes SET key = NULL WHERE tenant = $1 AND kind = 'member'`, id); err != nil {
			return err
		}
		if err := audit(ctx, tx, "purge", id, map[string]any{"tables": r.Tables, "members": r.Members}); err != nil {
			return err
		}
		if len(users) > 0 { // without a key: every node forgets all users' look-ups
			if err := changed(ctx, tx, "member", id, ""); err != nil {
				return err
			}
		}
		for _, domain := range domains {
			if err := changed(ctx, tx, "domain", id, domain); err != nil {
				return err
			}
		}
		return changed(ctx, tx, "tenant", id, "")
	})
	if err != nil {
		return Receipt{}, err
	}
	return r, nil
}

// dropPlace drops the schema, then what its roles own elsewhere, then the roles.
func dropPlace(ctx context.Context, p *place, r *Receipt) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	tables, err := dropSchema(ctx, conn, p)
	r.Tables += tables
	if err != nil {
		return fmt.Errorf("drop schema %s: %w", p.source.Schema, err)
	}
	roles, err := dropRoles(ctx, conn, p.source.User, p.runtime, p.owner)
	r.Roles = append(r.Roles, roles...)
	if err != nil {
		return fmt.Errorf("drop roles of %s: %w", p.source.Schema, err)
	}
	return nil
}

// dropSchema drops relation by relation: one statement for thousands of tables runs out of the server's lock table.
func dropSchema(ctx context.Context, conn *pgx.Conn, p *place) (dropped int, err error) {
	kinds := map[string]string{"r": "TABLE", "p": "TABLE", "v": "VIEW", "m": "MATERIALIZED VIEW", "f": "FOREIGN TABLE", "S": "SEQUENCE"}
	rows, _ := conn.Query(ctx, `SELECT c.relname, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND pg_get_userbyid(n.nspowner) = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
		ORDER BY c.relkind = 'S', c.oid`, p.source.Schema, p.owner)
	type relation struct{ Name, Kind string }
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[relation])
	if err != nil {
		return 0, err
	}
	for _, r := range list {
		if err := execDDL(ctx, conn, "DROP "+kinds[r.Kind]+" IF EXISTS "+ident.Quote(p.source.Schema, r.Name)+" CASCADE"); err != nil {
			return dropped, err
		}
		dropped++
	}
	return dropped, execDDL(ctx, conn, "DROP SCHEMA IF EXISTS "+ident.Quote(p.source.Schema)+" CASCADE")
}

// dropRoles drops what the roles own outside the schema (large objects, default privileges) and then the roles.
func dropRoles(ctx context.Context, conn *pgx.Conn, roles ...string) (dropped []string, err error) {
	for _, role := range roles {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, role).Scan(&there); err != nil {
			return dropped, err
		}
		if !there {
			continue
		}
		if err := execDDL(ctx, conn, "DROP OWNED BY "+ident.Quote(role)+" CASCADE"); err != nil {
			return dropped, err
		}
		if err := execDDL(ctx, conn, "DROP ROLE "+ident.Quote(role)); err != nil {
			return dropped, err
		}
		dropped = append(dropped, role)
	}
	return dropped, nil
}
