package tenancy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

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
	Domains     []string       // host names that stand for the tenant, the primary one first; default none
	Server      string         // where it lives; default: the server with most room, see ServerConfig.Weight
	Isolation   Isolation      // how its data is kept apart; default: Config.Isolation
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
	domains := make([]string, 0, len(n.Domains))
	for i, d := range n.Domains {
		canonical, err := ident.Domain(d)
		if err != nil {
			return invalid(fmt.Errorf("domains[%d]: %w", i, err))
		}
		if !slices.Contains(domains, canonical) {
			domains = append(domains, canonical)
		}
	}
	n.Domains = domains
	if n.Isolation != "" {
		if err := n.Isolation.check(); err != nil {
			return invalid(fmt.Errorf("isolation: %w", err))
		}
	}
	if n.DataSource != nil {
		if n.Server != "" {
			return invalid(errors.New("server: a data source says where it lives; give one of the two"))
		}
		if n.Isolation != "" {
			return invalid(errors.New("isolation: a data source is of a place that has one; give one of the two"))
		}
		if err := n.DataSource.validate(); err != nil {
			return invalid(fmt.Errorf("data source: %w", err))
		}
	}
	return nil
}

// intent identifies the request: the same one again resumes or joins, another one of the same name is refused.
func (n *NewTenant) intent(from *origin) []byte {
	address := ""
	if n.DataSource != nil {
		address = n.DataSource.Address() + "/" + n.DataSource.Schema
	}
	request := []any{n.Name, n.DisplayName, n.MaxUsers, n.Attributes, n.Admin, n.Domains, n.Server, address}
	if n.Isolation != "" { // one that says nothing is the same request as that of a release which did not ask
		request = append(request, n.Isolation)
	}
	if from != nil {
		request = append(request, from.schema, from.login)
	}
	text, _ := json.Marshal(request) // checked before
	sum := sha256.Sum256(text)
	return sum[:]
}

// Create makes a tenant: roles, schema or database, marker row, grants and the service's migrations, or a login in a shared schema, has Config.Seed fill it, and
// returns it once it is active. Every node serves it from then on. With Config.Stock it takes a place that was made before, while there is one.
//
// It blocks until the tenant is active. The same call again, on any node, resumes one that died or failed
// half-way and joins one that is running, and the validity job resumes one that nobody calls again: [Catalog.Delete] ends it. For a name that is taken by anything else, also by a Create of the
// same request that has ended before, the error is [ErrTenantExists]. Cancelling ctx ends the work between two steps; what was made is found by the next call.
//
// The error is [ErrInvalid], [ErrTenantExists], [ErrNoMigrations], [ErrNoProvisioner], [ErrNoRoom], [ErrSetup] (a [*SetupError]: the server cannot
// make databases; the text says what mends it, and nothing was made), [ErrInProgress], [ErrPrimaryUnavailable] or that of the server, a migration or Config.Seed.
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
	if single := c.tn.cfg.SingleTenant; single != "" && n.Name != single {
		return fail(0, invalid(fmt.Errorf("Config.SingleTenant is %q: there is no other", single)))
	}
	ctx, err := begin(ctx)
	if err != nil {
		return fail(0, err)
	}
	if err := c.checkNew(ctx, &n); err != nil {
		return fail(0, err)
	}
	id, err := c.declare(ctx, &n, nil)
	if err != nil {
		return fail(id, err)
	}
	t, err := c.finish(ctx, id, nil, n.DataSource == nil)
	if err != nil {
		return fail(id, err)
	}
	return t, nil
}

// finish makes a tenant that was declared, or adopts it, and activates it. With stock a place that is made already is from there.
func (c *Catalog) finish(ctx context.Context, id ID, from *origin, stock bool) (Tenant, error) {
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return Tenant{}, err
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return Tenant{}, err
	}
	p.from = from
	switch p.tenant.State {
	case StateActive: // another caller of the same request finished it
		c.tn.feed.catchUp(ctx)
		return p.tenant, nil
	case StateProvisioning:
	default:
		return Tenant{}, ErrTenantExists
	}
	if err := c.complete(ctx, p, stock); err != nil {
		return Tenant{}, err
	}
	c.tn.feed.kickStock()
	return c.Tenant(ctx, id)
}

// complete makes what is missing of a tenant that was declared and whose lock is held, and activates it. With stock a place that is made already is from there.
func (c *Catalog) complete(ctx context.Context, p *place, stock bool) error {
	if err := c.ready(ctx, p, stock); err != nil {
		return err
	}
	if c.tn.cfg.Dense && p.isolation != IsolationDatabase && p.source.Pooler == "" {
		if err := c.prepareDense(ctx, p); err != nil {
			return err
		}
		p.dense = true
	}
	if p.from == nil { // an adopted one has its rows
		if err := c.seed(ctx, p); err != nil {
			return err
		}
	}
	return c.activate(ctx, p)
}

// ready makes the place, or brings one that is made to the service's version, and proves its login.
func (c *Catalog) ready(ctx context.Context, p *place, stock bool) error {
	if p.state == "intent" || p.version < c.tn.migrations.newest() {
		done, err := c.tn.slot(ctx)
		if err != nil {
			return err
		}
		defer done()
	}
	if p.state == "intent" {
		if err := c.reroute(ctx, p); err != nil {
			return err
		}
		return c.make(ctx, p)
	}
	if stock {
		if err := c.routeStock(ctx, p); err != nil {
			return err
		}
	}
	if _, err := c.migratePlace(ctx, p, c.tn.newest()); err != nil { // nothing, where it has the version
		return err
	}
	return c.tn.proveLogin(ctx, p)
}

// recipe is what this node's Config adds to a new tenant.
func (c Config) recipe() string {
	var adds []string
	if c.Dense {
		adds = append(adds, "dense")
	}
	if c.Seed != nil {
		adds = append(adds, "seed")
	}
	return strings.Join(adds, " ")
}

// checkNew is checkServer for a tenant that is not declared yet, and for which no place is in the stock. One that is has its server.
func (c *Catalog) checkNew(ctx context.Context, n *NewTenant) error {
	isolation := cmp.Or(n.Isolation, c.tn.cfg.Isolation)
	if n.DataSource != nil || isolation != IsolationDatabase {
		return nil
	}
	var declared bool
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM tenancy.tenants WHERE name = $4)
		OR EXISTS (SELECT FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE `+stockFor+`)`, isolation, n.Server, c.tn.migrations.newest(), n.Name).Scan(&declared); err != nil || declared {
		return unavailable("create", err)
	}
	return c.checkServer(ctx, n.Server, isolation)
}

// declare writes the intent: the tenant, its place, first member and domains, in one
// transaction before anything is made. It returns the ID of the same intent written before.
func (c *Catalog) declare(ctx context.Context, n *NewTenant, from *origin) (id ID, err error) {
	intent, op := n.intent(from), "create"
	if from != nil {
		op = opAdopt
	}
	err = c.tn.primary.transact(ctx, func(tx pgx.Tx) (err error) {
		var uid UID
		var source int64
		var promised *int64
		isolation := cmp.Or(n.Isolation, c.tn.cfg.Isolation)
		var ready stocked
		if n.DataSource == nil {
			if from == nil {
				if ready, err = c.takeStock(ctx, tx, n.Server, isolation); err != nil {
					return err
				}
			}
			uid, source, promised = ready.uid, ready.source, ready.promised
			if source == 0 {
				uid = newUID()
			}
		} else if uid, source, err = c.prepared(ctx, tx, *n.DataSource); err != nil {
			return err
		} else if err := tx.QueryRow(ctx, `SELECT isolation, promised FROM tenancy.data_sources WHERE id = $1`, source).Scan(&isolation, &promised); err != nil {
			return err
		}
		var maxUsers *int
		if n.MaxUsers > 0 {
			maxUsers = &n.MaxUsers
		}
		err = tx.QueryRow(ctx, `INSERT INTO tenancy.tenants (id, uid, name, display_name, state, isolation, intent, max_users, attributes, activated, recipe) OVERRIDING SYSTEM VALUE
			VALUES (coalesce($8, `+nextID+`), $1, $2, $3, 'provisioning', $4, $5, $6, $7, false, $9) ON CONFLICT (name) DO NOTHING RETURNING id`,
			uid, n.Name, n.DisplayName, isolation, intent, maxUsers, n.Attributes, promised, c.tn.cfg.recipe()).Scan(&id)
		if isState(err, "23505") { // of the UID: the name has its own answer
			return invalid(errors.New("data source: another tenant has this place"))
		} else if errors.Is(err, pgx.ErrNoRows) {
			return c.declared(ctx, tx, n, intent, &id)
		} else if err != nil {
			return err
		}
		if source == 0 {
			if source, err = c.intendPlace(ctx, tx, uid, id, n.Server, isolation); err != nil {
				return err
			}
		} else if tag, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET stocked = false, updated = now() WHERE id = $1 AND state = 'made'`, source); err != nil {
			return err
		} else if tag.RowsAffected() == 0 { // DropPlace came before, or who migrates the stock
			return errOvertaken
		}
		if from != nil {
			if _, err := tx.Exec(ctx, `INSERT INTO tenancy.adoptions (data_source, schema, login) VALUES ($1, $2, $3)`, source, from.schema, from.login); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET tablespace = '' WHERE id = $1`, source); err != nil { // its tables are where they are
				return err
			}
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET data_source = $2 WHERE id = $1`, id, source); err != nil {
			return err
		}
		for _, d := range slices.Sorted(slices.Values(n.Domains)) { // two requests lock them in one order
			if _, err := addDomain(ctx, tx, id, d); err != nil {
				return err
			}
		}
		if len(n.Domains) > 0 {
			if _, err := setPrimary(ctx, tx, id, n.Domains[0]); err != nil {
				return err
			}
		}
		if n.Admin != "" {
			if err := addMember(ctx, tx, Membership{User: n.Admin, Tenant: id, Role: RoleAdmin}); err != nil {
				return err
			}
		}
		if err := audit(ctx, tx, op, id, map[string]any{"name": n.Name}); err != nil {
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
		return 0, refusal(op, err)
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

// nextID is the ID of a tenant that is new.
const nextID = `nextval(pg_get_serial_sequence('tenancy.tenants', 'id'))`

// intendPlace chooses a server and writes the place that is to be made there, with a password of its own. With ID 0 it is promised one, which
// the tenant will have that takes it: rows that its migrations make are of that tenant.
func (c *Catalog) intendPlace(ctx context.Context, tx pgx.Tx, uid UID, id ID, server string, isolation Isolation) (int64, error) {
	s, err := chooseServer(ctx, tx, server)
	if err != nil {
		return 0, err
	}
	d := s.address
	password, err := scram.Password()
	if err != nil {
		return 0, err
	}
	base, database := ident.NewPlace(), ""
	if isolation == IsolationDatabase {
		d.Database, database = base, base
	}
	owner, runtime := base+"_o", base+"_r"
	d.Schema, d.User, d.Password = base, base+"_l1", Secret(password)
	if isolation == IsolationShared {
		a, err := intendArea(ctx, tx, s.id, s.tablespace)
		if err != nil {
			return 0, err
		}
		d.Schema, owner, runtime, s.tablespace = a.schema, a.owner, a.runtime, a.tablespace
	}
	sealed, err := c.tn.primary.sealSource(uid, "data_source", d)
	if err != nil {
		return 0, err
	}
	var source int64
	err = tx.QueryRow(ctx, `INSERT INTO tenancy.data_sources (uid, server, isolation, database, schema, owner, runtime, tablespace, login, sealed, state, promised)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'intent', coalesce(nullif($11::bigint, 0), `+nextID+`)) RETURNING id`, uid, s.id, isolation, database, d.Schema, owner, runtime, s.tablespace, d.User, sealed, id).Scan(&source)
	return source, err
}

// reroute gives a place that no tenant has used yet the way that its server is registered with now: the pooler that it was begun with may have never worked.
func (c *Catalog) reroute(ctx context.Context, p *place) error {
	d := p.source
	d.Pooler, d.PoolerTLS = p.pooler, p.poolerTLS
	if d == p.source {
		return nil
	}
	sealed, err := c.tn.primary.sealSource(p.tenant.UID, "data_source", d)
	if err != nil {
		return err
	}
	if _, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.data_sources SET sealed = $2, updated = now() WHERE id = $1 AND state = $3`, p.id, sealed, p.state); err != nil {
		return unavailable("reroute", err)
	}
	p.source = d
	return nil
}

// activate makes the tenant visible, as the last step.
func (c *Catalog) activate(ctx context.Context, p *place) error {
	return c.write(ctx, "activate", p.tenant.ID, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET state = 'made', version = $2, migrating = NULL, dense = $3, updated = now() WHERE id = $1`, p.id, p.version, p.dense); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'active', activated = true, dense = $2, updated = now() WHERE id = $1 AND state = 'provisioning'`, p.tenant.ID, p.dense)
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
