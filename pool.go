package tenancy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/internal/lease"
)

// PoolBuilder makes the pool of one tenant. cfg is finished: address, login, search_path and the
// proof of identity are in it, and a builder mostly changes a little and calls [pgxpool.NewWithConfig].
//
// The pool belongs to the library, which closes it: a builder returns a new one at each call, and
// the same pool for two tenants is refused with [ErrIdentity]. One made from other settings than cfg
// works, but each of its connections has to prove at its first use that it is the tenant's own, no budget
// counts them, and a forced [Tenancy.Close] cannot cut its sockets. cfg holds the tenant's password, and its MaxConns
// is twice the tenant's, because what is broken keeps its place for a while: what bounds a tenant stands before its pool. A pool of
// less than the tenant's own lowers that too.
//
// ctx ends with the building, carries nothing of the caller who needed the pool first, and bounds
// nothing afterwards. Calls for different tenants run at the same time.
//
// Of a pool that tenants share ([Catalog.SetDense]) each connection is a pool of its own here, and t is nobody's: its ID is 0.
type PoolBuilder interface {
	BuildPool(ctx context.Context, t Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error)
}

// PoolBuilderFunc is a function as a [PoolBuilder].
type PoolBuilderFunc func(ctx context.Context, t Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error)

// BuildPool calls f.
func (f PoolBuilderFunc) BuildPool(ctx context.Context, t Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
	return f(ctx, t, cfg)
}

const (
	// markerTable holds, in every tenant's schema, exactly one row: the realm and the UID it belongs to.
	markerTable = "tenancy_marker"
	// extSchema holds extensions, for all tenants of a database.
	extSchema = "tenancy_ext"
	// refSchema holds read-only tables, for all tenants of a database.
	refSchema = "tenancy_ref"
)

const (
	connLifetime       = time.Hour
	connLifetimeJitter = 10 * time.Minute // so that a fleet of pools does not reconnect as one
	healthCheckPeriod  = time.Minute
)

// tenantPool is one tenant's pool, for one generation. Safe for concurrent use.
type tenantPool struct {
	tenant  Tenant
	limits  Limits
	want    identity
	pool    *pgxpool.Pool
	account *budget.Account // admits callers before the pool is asked
	server  *server
	breaker *breaker
	built   atomic.Bool  // pool is set: a builder may have had it connect before
	doubtMu sync.Mutex   // guards doubted
	doubted time.Time    // when the login was last refused, and the catalog asked
	crowded atomic.Int32 // attempts to connect in a row that the server had no connection left for
	refused atomic.Int64 // calls that were ErrBusy

	afterRelease func(*pgx.Conn) bool // the service's hook; nil: none

	canceled atomic.Int64 // calls whose ctx ended while they waited in line

	dense *binding // the tenant has no pool of its own, and of the fields above tenant, limits, server and canceled alone; nil: it has
	slot  int32    // connections of a group that tenants share, and nobody's in particular; 0: it is a tenant's pool
}

// newPools returns the pools of all tenants: each is built at its first use, replaced when the
// tenant's generation rises, and closed after its last lease.
func (tn *Tenancy) newPools(m *poolMaker) *lease.Table[ID, *tenantPool] {
	return lease.New(lease.Config[ID, *tenantPool]{
		Build:     m.build,
		Close:     m.close,
		Cut:       (*tenantPool).cut,
		IdleAfter: tn.cfg.Limits.TenantIdle,
	})
}

func newPoolMaker(tn *Tenancy) *poolMaker { return &poolMaker{tn: tn, live: map[*pgxpool.Pool]ID{}} }

// poolMaker builds pools and remembers which are open.
type poolMaker struct {
	tn *Tenancy

	mu   sync.Mutex // guards live
	live map[*pgxpool.Pool]ID
}

func (m *poolMaker) build(ctx context.Context, id ID, generation int64) (*tenantPool, error) {
	r, err := m.tn.view.recordAt(ctx, id, generation)
	if err != nil {
		return nil, err
	}
	if r.dense != nil {
		p, err := m.tn.newDense(r)
		if err == nil {
			m.tn.enterPool(p.dense)
		}
		return p, err
	}
	source, err := r.source.viaPooler()
	if err != nil {
		return nil, err
	}
	p := &tenantPool{tenant: r.tenant, limits: m.tn.cfg.Limits, want: m.tn.identity(r.tenant.UID, source),
		server: m.tn.servers.of(source.Host, source.Port), breaker: newBreaker(m.tn.cfg.Logger, r.tenant)}
	return p, m.fill(ctx, p, source)
}

// fill makes the pool itself.
func (m *poolMaker) fill(ctx context.Context, p *tenantPool, source DataSource) error {
	cfg, err := m.tn.poolConfig(ctx, p, source)
	if err != nil {
		return withoutSecrets(err)
	}
	builder := m.tn.cfg.PoolBuilder
	if builder == nil {
		builder = PoolBuilderFunc(newPool)
	}
	if p.pool, err = builder.BuildPool(ctx, p.tenant, cfg); err != nil {
		return withoutSecrets(err)
	}
	if err := m.claim(p); err != nil {
		return err
	}
	p.account.Lower(int(p.pool.Stat().MaxConns()))
	p.built.Store(true)
	return nil
}

func newPool(ctx context.Context, _ Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
	return pgxpool.NewWithConfig(ctx, cfg)
}

// claim refuses a pool that another tenant, or an older generation, has already. That pool stays open.
func (m *poolMaker) claim(p *tenantPool) error {
	if p.pool == nil {
		return errors.New("tenancy: PoolBuilder returned neither a pool nor an error")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if owner, ok := m.live[p.pool]; ok {
		return hinted(ErrIdentity, "PoolBuilder returned the open pool of tenant id %d; every call needs a new one", owner)
	}
	m.live[p.pool] = p.tenant.ID
	return nil
}

// close blocks until every connection has come back, so it is called in the background.
func (m *poolMaker) close(p *tenantPool) {
	if p.dense != nil {
		p.dense.pool.tenants.Add(-1)
		return
	}
	p.account.Close()
	// Nobody uses what is open. What has not said good-bye soon hangs: pgx waits for a broken connection, and for its cancel request, for 15 s.
	timer := time.AfterFunc(closeTimeout, p.account.HangUp)
	defer timer.Stop()
	p.pool.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.live, p.pool)
}

// cut breaks the connections under the hands of those who use them, who then give them back.
func (p *tenantPool) cut() {
	if p.dense != nil {
		p.dense.cut()
		return
	}
	p.account.Cut()
}

// newPoolDefaults returns what all tenants' pools begin with. pgxpool insists on having parsed it, which takes longer than all the rest of a
// pool, so it is done once.
func newPoolDefaults(l Limits) (cfg *pgxpool.Config, err error) {
	err = withoutEnvironment(func(settings string) (err error) {
		cfg, err = pgxpool.ParseConfig(settings)
		return err
	})
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = l.TenantConns
	cfg.MinConns, cfg.MinIdleConns = 0, 0
	cfg.MaxConnIdleTime = l.ConnIdle
	cfg.MaxConnLifetime = connLifetime
	cfg.MaxConnLifetimeJitter = connLifetimeJitter
	cfg.PingTimeout = l.PingTimeout
	cfg.HealthCheckPeriod = healthCheckPeriod
	return cfg, nil
}

// poolConfig returns the settings of the tenant's pool: our defaults, then the user's hook, then
// the pins again.
func (tn *Tenancy) poolConfig(ctx context.Context, p *tenantPool, source DataSource) (*pgxpool.Config, error) {
	c := tn.cfg
	cfg := tn.poolDefaults.Copy()
	conn := cfg.ConnConfig
	if err := source.fill(conn); err != nil {
		return nil, err
	}
	conn.ConnectTimeout = c.Limits.ConnectTimeout
	if source.Pooler != "" {
		conn.DefaultQueryExecMode = pgx.QueryExecModeExec // the next transaction is another session's, which has not prepared anything
	} else if c.Limits.StatementTimeout > 0 {
		conn.RuntimeParams["statement_timeout"] = strconv.FormatInt(c.Limits.StatementTimeout.Milliseconds(), 10)
	}
	pins := tn.pins(conn, source)
	waiters, ceiling := c.Limits.TenantWaiters, c.Limits.TenantConns
	if p.slot > 0 {
		conn.DefaultQueryExecMode, conn.StatementCacheCapacity = pgx.QueryExecModeDescribeExec, 0 // a session prepares each tenant's own
		pins.searchPath = quotedPath(p.want.schemas)
		waiters, ceiling = math.MaxInt32, p.slot // each tenant's are counted
		cfg.MaxConns = p.slot
	}
	pins.set(conn)

	if c.PoolConfig != nil {
		if err := c.PoolConfig(ctx, p.tenant, cfg); err != nil {
			return nil, fmt.Errorf("Config.PoolConfig: %w", err)
		}
		switch { // each of these would panic later, where nobody can catch it
		case cfg.ConnConfig != conn:
			return nil, invalid(errors.New("Config.PoolConfig replaced ConnConfig: set its fields instead"))
		case cfg.MaxConns < 1 || cfg.MaxConns > ceiling: // more, and the login's CONNECTION LIMIT would refuse them
			return nil, invalid(fmt.Errorf("Config.PoolConfig set MaxConns to %d: from 1 to %d (Limits.TenantConns, or what a group of a shared pool has)", cfg.MaxConns, ceiling))
		case cfg.HealthCheckPeriod <= 0:
			return nil, invalid(fmt.Errorf("Config.PoolConfig set HealthCheckPeriod to %v: above 0", cfg.HealthCheckPeriod))
		}
	}
	cfg = cfg.Copy() // a hook that kept cfg cannot change it any more
	p.account = p.server.NewAccount(budget.AccountConfig{
		Floor: int(c.Limits.TenantFloor), Ceiling: int(cfg.MaxConns), Waiters: waiters, Inner: p.slot > 0, Patience: c.Limits.PingTimeout,
		Connect: p.connect, Evict: p.evict, Idle: func() bool { return p.built.Load() && p.pool.Stat().IdleConns() > 0 },
	})
	p.guard(cfg, pins)
	return cfg, nil
}

// guard puts the pins, the budget and the proof behind whatever the user's hook has set.
func (p *tenantPool) guard(cfg *pgxpool.Config, pins pins) {
	if cfg.ConnConfig.DialFunc == nil {
		cfg.ConnConfig.DialFunc = pins.conn.DialFunc
	}
	pins.set(cfg.ConnConfig)
	p.guardDials(cfg, pins)
	p.guardErrors(cfg.ConnConfig)

	// The account bounds the tenant. A connection that is broken stays in the pool until the server has let it go, and what
	// stands in for it must not wait for that.
	cfg.MaxConns *= 2
	if cfg.PingTimeout > 0 {
		p.limits.PingTimeout = cfg.PingTimeout
	}
	ping := cfg.ShouldPing
	cfg.ShouldPing = func(ctx context.Context, params pgxpool.ShouldPingParams) bool {
		doubtful := params.IdleDuration > time.Second
		if ping != nil {
			doubtful = ping(ctx, params)
		}
		if !doubtful && budget.TellsUnheard { // as nearly always
			return false
		}
		mark, _ := proofOf(params.Conn.PgConn()).(*proof)
		if mark == nil {
			return doubtful
		}
		mark.rested = params.IdleDuration > 20*time.Microsecond
		mark.doubtful = mark.doubtful || doubtful // check asks, within bounds that the pool has not
		return false
	}
	// The pool calls it in the background, where nobody would hear of the connection's return.
	p.afterRelease, cfg.AfterRelease = cfg.AfterRelease, nil

	user := cfg.AfterConnect
	cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) (err error) {
		established(conn.PgConn())
		defer func() {
			if err != nil { // pgx may go on closing it for seconds, and it would count as idle until then
				doom(conn)
			}
		}()
		// pgxpool takes the caller's cancellation away here and has no bound of its own.
		ctx, cancel := context.WithTimeout(ctx, p.limits.ConnectTimeout)
		defer cancel()
		if user != nil {
			if err := user(ctx, conn); err != nil {
				return err
			}
		}
		if err := p.prove(ctx, conn); err != nil { // last, so that it judges what the hook has left
			return err
		}
		p.server.Totals.Connects.Add(1)
		return nil
	}
}

// guardDials gives each connection a route of its own, by which the budget sees it.
func (p *tenantPool) guardDials(cfg *pgxpool.Config, pins pins) {
	user := cfg.BeforeConnect
	cfg.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		// Connections are made for the account. A caller who dialled would wait for that one alone, and past the breaker.
		if ctx.Value(idleOnly{}) != nil || sessionOf(ctx) != nil && p.built.Load() && p.account.Bounds() {
			return budget.ErrNoPermit
		}
		dial := cc.DialFunc
		if user != nil {
			if err := user(ctx, cc); err != nil {
				return err
			}
			if cc.DialFunc == nil {
				cc.DialFunc = dial
			}
			pins.set(cc)
		}
		cc.DialFunc = p.account.Route(cc.DialFunc).Dial
		if wrap := cc.AfterNetConnect; wrap != nil {
			cc.AfterNetConnect = func(ctx context.Context, cfg *pgconn.Config, conn net.Conn) (net.Conn, error) {
				over, err := wrap(ctx, cfg, conn)
				if err != nil || budget.Of(over) != nil { // pgx looks for TLS under no wrapper of ours
					return over, err
				}
				return wrapped{Conn: over, under: conn}, nil
			}
		}
		return nil
	}
}

// wrapped is a connection of the service's own making, under which the budget still finds its own.
type wrapped struct {
	net.Conn
	under net.Conn
}

// NetConn returns the connection that was wrapped.
func (w wrapped) NetConn() net.Conn { return w.under }

// guardErrors has the pool drop its idle connections when the server says that they are worth nothing any more.
func (p *tenantPool) guardErrors(cc *pgx.ConnConfig) {
	user := p.server.heed(cc.OnPgError)
	cc.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		if c := budget.Of(conn.Conn()); c != nil && fatal(err) {
			c.LastWords() // pgx closes it next, and TLS says good-bye of its own
		}
		s, shared := conn.CustomData()[denseKey].(*denseSession)
		if shared && err.Code == "26000" { // a statement that we believe in is gone: somebody has dropped all
			s.lent = true
		}
		if shared && outdatedPlan(err) {
			s.to.outdated.Add(1) // of the others that share the pool it says nothing
		} else if p.built.Load() && outdates(conn, err) {
			p.pool.Reset()
		}
		return user(conn, err)
	}
}

// pins are the settings that tie a connection to its tenant.
type pins struct {
	conn       *pgx.ConnConfig // never handed out
	searchPath string          // "": through a pooler, where it is the login's own setting
}

// pins keeps its own copy of conn.
func (tn *Tenancy) pins(conn *pgx.ConnConfig, source DataSource) pins {
	own := conn.Copy()
	if own.TLSConfig != nil {
		own.TLSConfig = own.TLSConfig.Clone()
	}
	if source.Pooler != "" {
		return pins{conn: own}
	}
	return pins{conn: own, searchPath: searchPath(source.Schema, tn.cfg.Extensions, tn.cfg.ReferenceTables)}
}

// unpinning are startup parameters that would change who a connection is or where it looks. The
// server compares names of settings without regard to case.
var unpinning = []string{"search_path", "role", "session_authorization", "options", "user", "database", "replication"}

// set ties cc to the tenant.
func (p pins) set(cc *pgx.ConnConfig) {
	cc.Host, cc.Port = p.conn.Host, p.conn.Port
	cc.Database, cc.User, cc.Password = p.conn.Database, p.conn.User, p.conn.Password
	cc.TLSConfig = p.conn.TLSConfig
	if cc.TLSConfig != nil {
		cc.TLSConfig = cc.TLSConfig.Clone() // a hook that keeps the pointer changes its copy
	}
	cc.Fallbacks = nil // a fallback is another address, or the same one without TLS
	cc.SSLNegotiation, cc.SSLCertMode = p.conn.SSLNegotiation, p.conn.SSLCertMode
	cc.ChannelBinding, cc.RequireAuth = p.conn.ChannelBinding, p.conn.RequireAuth
	cc.KerberosSrvName, cc.KerberosSpn = p.conn.KerberosSrvName, p.conn.KerberosSpn
	cc.OAuthTokenProvider = p.conn.OAuthTokenProvider

	params := maps.Clone(cc.RuntimeParams)
	if params == nil {
		params = map[string]string{}
	}
	maps.DeleteFunc(params, func(name, _ string) bool {
		return slices.ContainsFunc(unpinning, func(u string) bool { return strings.EqualFold(u, name) })
	})
	if p.searchPath != "" {
		params["search_path"] = p.searchPath
	}
	cc.RuntimeParams = params
}
