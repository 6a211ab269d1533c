// Package tenancy gives a web service on PostgreSQL one schema, or database, and one login per customer, and
// runs every query in the caller's own, while the service's code stays as it was.
//
// A query for tenant A never reads or writes tenant B's rows, not even through injected SQL:
// the server refuses it, because each tenant's connections are logged in as that tenant. A context without a
// tenant is an error, never a default. What tenants still share is the machine: processor, disk,
// the server's locks and its catalog of names (docs/guarantees.md has the whole list).
//
// The smallest program:
//
//	//go:embed migrations/*.sql
//	var migrations embed.FS
//
//	func main() {
//		cfg, err := tenancy.FromEnv() // TENANCY_PRIMARY_URL, TENANCY_KEYS
//		if err != nil {
//			log.Fatal(err)
//		}
//		cfg.Migrations = migrations
//		tn, err := tenancy.Open(context.Background(), cfg)
//		if err != nil {
//			log.Fatal(err)
//		}
//		defer tn.Close()
//		mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(userOfRequest))
//		if err != nil {
//			log.Fatal(err)
//		}
//		r := chi.NewRouter()
//		r.Use(authenticate, mw.Tenant, mw.RequireTenant)
//		r.Get("/notes", func(w http.ResponseWriter, r *http.Request) {
//			rows, err := tn.DB().Query(r.Context(), "SELECT id, title FROM notes")
//			...
//		})
//		log.Fatal(http.ListenAndServe(":8080", r))
//	}
//
// # The nouns, in the order of a request
//
// [Init] sets up databases and logins once; [Open] gives a [Tenancy]. Its [Catalog] creates tenants
// and members. [Tenancy.Resolve] (the middleware calls it) turns a [UserKey] and [Hint] values into a
// [Session] on the context. [TenantAwareDB] runs a call on the pool of the context's [Tenant]. [Registry] and [Cache]
// keep the service's own values per tenant. [Migrator] brings tenants' schemas up to date.
//
// # Concurrency and ends
//
// Everything but configuration values is safe for concurrent use, by several nodes too. [Open] starts
// goroutines; [Tenancy.Close] and [Tenancy.Shutdown] end them, the pools and the registries. Cancelling the ctx of a
// call ends that call's wait and never what others share.
//
// # Errors
//
// Errors match the sentinels of this package with errors.Is, from [ErrNoTenant] to [ErrClosed]; an [*Error] carries
// operation, tenant and time to retry. No error, log line or printed value holds a password or key.
package tenancy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/internal/lease"
)

// Tenancy is the library at work in one process, for one primary. It is made by [Open], is safe
// for concurrent use, and is ended by [Tenancy.Close] or [Tenancy.Shutdown].
type Tenancy struct {
	cfg        Config
	realm      realm
	primary    *primaryDB
	view       *view
	resolver   TenantResolver
	managers   map[UserKey]bool
	refused    *refusedHints
	feed       *feed
	migrations migrations
	servers    *servers
	pools      *lease.Table[ID, *tenantPool]
	slots      *lease.Table[slotKey, *tenantPool] // connections of the pools that tenants share
	densePools sync.Map                           // poolKey -> *sharedPool

	poolDefaults *pgxpool.Config // copied for each pool

	hostPool   *pgxpool.Pool // nil: no host data
	db, host   *TenantAwareDB
	catalog    *Catalog
	provisions chan struct{} // a slot for each tenant that may be made at once
	areas      chan struct{} // held by the verb that works as the owner of a shared schema
	closing    atomic.Bool   // no new sessions
	leaveTime  time.Duration // for closing what was left, the drain apart

	mu         sync.Mutex // guards the fields below
	followers  []follower
	registries []closer      // in order of creation
	ended      chan struct{} // closed when the first Shutdown is over; nil before one began
	endErr     error
}

// Format writes a name, whatever the verb: what a Tenancy points to holds logins and keys, and fmt would follow it.
// So have the other types that hold one.
func (tn *Tenancy) Format(f fmt.State, _ rune) { writeName(f, "tenancy.Tenancy") }

// Format writes a name, whatever the verb.
func (c *Catalog) Format(f fmt.State, _ rune) { writeName(f, "tenancy.Catalog") }

// Format writes a name, whatever the verb.
func (m *Migrator) Format(f fmt.State, _ rune) { writeName(f, "tenancy.Migrator") }

// Format writes a name, whatever the verb.
func (db *TenantAwareDB) Format(f fmt.State, _ rune) { writeName(f, "tenancy.TenantAwareDB") }

// Format writes a name, whatever the verb.
func (r *Registry[T]) Format(f fmt.State, _ rune) { writeName(f, "tenancy.Registry") }

// Format writes a name, whatever the verb.
func (c *Cache[K, V]) Format(f fmt.State, _ rune) { writeName(f, "tenancy.Cache") }

func writeName(w io.Writer, name string) { _, _ = io.WriteString(w, name) }

// closer is a registry that ends before the pools do.
type closer interface {
	Close(ctx context.Context) error
}

// Open connects to the primary, brings its own schema up to date, checks keys and set-up, and
// starts to follow its changes. It never migrates tenants. ctx bounds the opening only; what runs afterwards is ended by Close.
//
// The error is [ErrInvalid] (the text names the field), [ErrPrimaryUnavailable], [ErrWrongKey],
// [ErrPrimaryNewer] or a [*SetupError] that lists what is missing with the statements that mend it.
func Open(ctx context.Context, cfg Config) (*Tenancy, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	m, err := serviceMigrations(cfg.Migrations, cfg.GoMigrations)
	if err != nil {
		return nil, err
	}
	if _, known := m.find(cfg.MinVersion); cfg.MinVersion > 0 && !known {
		return nil, invalid(fmt.Errorf("Config.MinVersion is %d: Config.Migrations has no migration of that version; the newest is %d", cfg.MinVersion, m.newest()))
	}
	servers := newServers(cfg)
	host, err := hostConfig(cfg, servers)
	if err != nil {
		return nil, err
	}
	primary, err := openPrimary(ctx, cfg, servers)
	if err != nil {
		return nil, err
	}
	tn := &Tenancy{cfg: cfg, realm: primary.realm, primary: primary, servers: servers, migrations: m, provisions: make(chan struct{}, cfg.Limits.Provisions), areas: make(chan struct{}, 1), leaveTime: finishTimeout}
	tn.catalog = &Catalog{tn}
	tn.db, tn.host = &TenantAwareDB{tn: tn}, &TenantAwareDB{tn: tn, host: true}
	tn.managers = make(map[UserKey]bool, len(cfg.HostManagers))
	for _, m := range cfg.HostManagers {
		tn.managers[m] = true
	}
	tn.refused = newRefusedHints(tn)
	tn.feed = newFeed(tn)
	if err := tn.start(ctx, host); err != nil {
		tn.cfg.DrainTimeout = 0
		return nil, errors.Join(err, tn.Close())
	}
	return tn, nil
}

func (tn *Tenancy) start(ctx context.Context, host *pgxpool.Config) (err error) {
	if tn.view, err = newView(tn.primary, tn.cfg.Store, tn.cfg); err != nil {
		return err
	}
	if tn.poolDefaults, err = newPoolDefaults(tn.cfg.Limits); err != nil {
		return err
	}
	maker := newPoolMaker(tn)
	tn.pools, tn.slots = tn.newPools(maker), tn.newSlots(maker)
	tn.followers = append(tn.followers, tableFollower[*tenantPool]{tn.pools})
	if host != nil {
		if tn.hostPool, err = tn.openHost(ctx, host); err != nil {
			return err
		}
	}
	if err := tn.primary.verify(ctx); err != nil {
		return err
	}
	if err := tn.verifyServers(ctx); err != nil {
		return err
	}
	if err := tn.feed.start(ctx); err != nil {
		return err
	}
	return tn.chooseResolver(ctx)
}

// chooseResolver comes last: with Config.SingleTenant that tenant is there from here on.
func (tn *Tenancy) chooseResolver(ctx context.Context) error {
	tn.resolver = &defaultResolver{view: tn.view, managers: tn.managers}
	if name := tn.cfg.SingleTenant; name != "" {
		id, err := tn.singleTenant(ctx, name)
		if err != nil {
			return err
		}
		tn.resolver = &singleResolver{view: tn.view, tenant: id}
	}
	if wrap := tn.cfg.WrapResolver; wrap != nil {
		if tn.resolver = wrap(tn.resolver); tn.resolver == nil {
			return invalid(errors.New("Config.WrapResolver returned nil"))
		}
	}
	return nil
}

// singleTenant returns the one tenant, made if the primary has none at all. Where there are others, their users would all
// be in it, or a name that was changed would open an empty tenant that looks like lost data.
func (tn *Tenancy) singleTenant(ctx context.Context, name string) (ID, error) {
	fail := func(err error) (ID, error) {
		if _, ok := err.(*Error); !ok {
			err = &Error{Op: "open the single tenant", Name: name, Err: err}
		}
		return 0, err
	}
	var others int
	if err := tn.primary.pool.QueryRow(ctx, `SELECT count(*) FROM tenancy.tenants WHERE name <> $1 AND state <> 'purged'`, name).Scan(&others); err != nil {
		return fail(unavailable("open the single tenant", err))
	}
	if others > 0 {
		return fail(hinted(ErrInvalid, "Config.SingleTenant is for a primary with this tenant alone, and it has %d others", others))
	}
	t, err := tn.catalog.TenantByName(ctx, name)
	if err == nil && t.State != StateProvisioning {
		return t.ID, nil
	}
	if err != nil && !errors.Is(err, ErrTenantNotFound) {
		return fail(err)
	}
	t, err = tn.catalog.Create(ctx, NewTenant{Name: name})
	if errors.Is(err, ErrTenantExists) { // another node made it meanwhile, or somebody began with another request
		t, err = tn.catalog.TenantByName(ctx, name)
		if err == nil && t.State == StateProvisioning {
			err = hinted(ErrTenantNotReady, "a Create of it with more than its name is unfinished: call that again, with Config.SingleTenant off")
		}
	}
	if err != nil {
		return fail(err)
	}
	return t.ID, nil
}

// verifyServers registers Config.Server if no server is known and checks those with a
// provisioner. One that cannot be reached is logged: its tenants wait for it, the others do not.
func (tn *Tenancy) verifyServers(ctx context.Context) error {
	registered, err := tn.primary.provisioned(ctx)
	if err != nil {
		return err
	}
	databases := tn.cfg.Isolation == IsolationDatabase
	if len(registered) == 0 && tn.cfg.Server != nil {
		s, d, err := tn.cfg.Server.parse()
		if err != nil {
			return err
		}
		if err := verifyServer(ctx, tn.servers, d, s.Tablespace, tn.cfg.Extensions, databases); err != nil {
			return err
		}
		return tn.primary.registerServer(ctx, s, d)
	}
	for _, s := range registered {
		err := verifyServer(ctx, tn.servers, s.provisioner, s.tablespace, tn.cfg.Extensions, databases)
		if errors.Is(err, ErrSetup) {
			return err
		} else if err != nil {
			tn.cfg.Logger.Warn("tenancy: a server could not be checked", "server", s.provisioner.Address(), "error", err)
		}
	}
	return nil
}

// hostConfig returns the settings of the host's pool, nil without one.
func hostConfig(cfg Config, servers *servers) (*pgxpool.Config, error) {
	if cfg.HostURL == "" {
		return nil, nil
	}
	pc, err := pgxpool.ParseConfig(cfg.HostURL)
	if err != nil || !isURL(cfg.HostURL) {
		return nil, invalid(errors.New("Config.HostURL: not a PostgreSQL URL"))
	}
	if severalHosts(pc.ConnConfig) {
		return nil, invalid(errors.New("Config.HostURL: it must name one host: each has a budget of its own"))
	}
	pc.ConnConfig.ConnectTimeout = cfg.Limits.ConnectTimeout
	pc.ConnConfig.DialFunc = dialer().DialContext
	pc.PingTimeout = cfg.Limits.PingTimeout
	servers.setAside(pc.ConnConfig, int(pc.MaxConns))
	return pc, nil
}

// openHost makes the host's pool, which drops its idle connections when a tenant's would, see guardErrors.
func (tn *Tenancy) openHost(ctx context.Context, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
	tn.servers.ownPool(cfg.ConnConfig)
	var opened atomic.Pointer[pgxpool.Pool] // it may connect before it is returned
	judge := cfg.ConnConfig.OnPgError
	cfg.ConnConfig.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		if c := budget.Of(conn.Conn()); c != nil && fatal(err) {
			c.LastWords()
		}
		if pool := opened.Load(); pool != nil && outdates(conn, err) {
			pool.Reset()
		}
		return judge(conn, err)
	}
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, withoutSecrets(err)
	}
	opened.Store(pool)
	return pool, nil
}

// DB returns the database of the context's tenant: each call runs on the pool of the tenant in its
// own context, and without one it is [ErrNoTenant].
func (tn *Tenancy) DB() *TenantAwareDB { return tn.db }

// Host returns the database of the host, Config.HostURL. It asks for no tenant and no role: who
// may reach host data is for the service to say. Without HostURL every call is [ErrNoHostData].
func (tn *Tenancy) Host() *TenantAwareDB { return tn.host }

// Catalog returns the verbs of tenants' lives.
func (tn *Tenancy) Catalog() *Catalog { return tn.catalog }

// Migrator returns what migrates tenants.
func (tn *Tenancy) Migrator() *Migrator { return &Migrator{tn} }

// Refresh runs the validity job now: this node re-reads what it holds. Notifications and the
// poll make it unnecessary in ordinary operation.
func (tn *Tenancy) Refresh(ctx context.Context) error { return tn.feed.check(ctx) }

// Close is Shutdown with Config.DrainTimeout.
func (tn *Tenancy) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), tn.cfg.DrainTimeout)
	defer cancel()
	return tn.Shutdown(ctx)
}

// Shutdown ends everything that Open started: the service's registries in reverse order of
// creation, then the feed and its job, then the tenants' pools. Resolve and Enter are refused with [ErrClosed] at once, calls of
// sessions that exist once the registries have ended; work in flight has until ctx ends and is then cut: its connections are closed.
//
// The error names the tenants whose work was cut. Further calls wait for the first one and return its error.
func (tn *Tenancy) Shutdown(ctx context.Context) error {
	tn.mu.Lock()
	if ended := tn.ended; ended != nil {
		tn.mu.Unlock()
		<-ended
		return tn.endErr
	}
	tn.ended = make(chan struct{})
	registries := slices.Clone(tn.registries)
	tn.mu.Unlock()
	defer close(tn.ended)

	tn.closing.Store(true)
	var errs []error
	for _, r := range slices.Backward(registries) {
		errs = append(errs, r.Close(ctx))
	}
	tn.refused.close(ctx)
	tn.feed.close() // not before: what drains above is still told of every change
	if tn.pools != nil {
		cut, err := tn.pools.Close(ctx)
		if len(cut) > 0 {
			slices.Sort(cut)
			err = fmt.Errorf("tenancy: shutdown: the drain time ended with work in flight of tenants %v: it was cut", cut)
		}
		errs = append(errs, err)
		_, err = tn.slots.Close(ctx)
		errs = append(errs, err)
	}
	if tn.hostPool != nil {
		errs = append(errs, closePool(ctx, tn.hostPool, "host"))
	}
	if tn.view != nil {
		errs = append(errs, tn.view.close(ctx))
	}
	errs = append(errs, closePool(ctx, tn.primary.pool, "primary"), closePool(ctx, tn.primary.follow, "primary"))
	tn.endErr = errors.Join(errs...)
	return tn.endErr
}

// closePool closes a pool of ours within ctx and a second: pgx's own Close waits for ever for a connection that is not given back.
func closePool(ctx context.Context, pool *pgxpool.Pool, name string) error {
	closed := make(chan struct{})
	go func() { pool.Close(); close(closed) }()
	select {
	case <-closed:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-closed:
		return nil
	case <-time.After(time.Second): // an idle pool closes at once, also when nothing is left of ctx
		return fmt.Errorf("tenancy: shutdown: connections to the %s database are still in use", name)
	}
}

// closeLater has something of the service's ended by Shutdown, before the pools.
func (tn *Tenancy) closeLater(end func(context.Context) error) error {
	tn.mu.Lock()
	defer tn.mu.Unlock()
	if tn.ended != nil {
		return errors.Join(ErrClosed, end(context.Background()))
	}
	tn.registries = append(tn.registries, closerFunc(end))
	return nil
}

type closerFunc func(context.Context) error

func (f closerFunc) Close(ctx context.Context) error { return f(ctx) }

// watchers returns who holds values of tenants.
func (tn *Tenancy) watchers() []follower {
	tn.mu.Lock()
	defer tn.mu.Unlock()
	return slices.Clone(tn.followers)
}
