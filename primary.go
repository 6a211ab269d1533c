package tenancy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"
	"unique"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy/primary"
)

// primaryDB is the primary database with the catalog login: the pool, the realm and the keys.
type primaryDB struct {
	pool   *pgxpool.Pool
	follow *pgxpool.Pool   // the feed's: look-ups that hang must not keep it from hearing the primary
	listen *pgx.ConnConfig // the feed's, past any pooler
	direct *pgx.ConnConfig // for what is done one by one, past any pooler
	verbs  chan struct{}   // a slot for each verb that may hold connections
	turns  turns           // before the slots
	keys   Keyring
	realm  realm
}

// querier is what a pool, a connection and a transaction have in common.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// openPrimary connects, brings the primary's own schema up to date (or checks it) and proves that the keys fit.
func openPrimary(ctx context.Context, cfg Config, servers *servers) (*primaryDB, error) {
	pc, err := primaryConfig(cfg.PrimaryURL, cfg.Limits.ConnectTimeout)
	if err != nil {
		return nil, fmt.Errorf("Config.PrimaryURL: %w", err)
	}
	pc.MaxConns = cfg.Limits.PrimaryConns
	pc.MaxConnLifetime, pc.MaxConnLifetimeJitter = time.Hour, 10*time.Minute
	pc.PingTimeout = cfg.Limits.PingTimeout
	direct, err := primaryConfig(cfg.ListenURL, cfg.Limits.ConnectTimeout)
	if err != nil {
		return nil, fmt.Errorf("Config.ListenURL: %w", err)
	}
	servers.setAside(pc.ConnConfig, int(cfg.Limits.PrimaryConns)+feedConns-1)
	servers.setAside(direct.ConnConfig, 1)
	if err := servers.check(); err != nil {
		return nil, err
	}
	listen := direct.ConnConfig.Copy()
	servers.ownPool(pc.ConnConfig)
	servers.ownPool(listen)
	servers.single(direct.ConnConfig)
	if cfg.ListenURL != cfg.PrimaryURL {
		if err := sameDatabase(ctx, pc.ConnConfig, direct.ConnConfig); err != nil {
			return nil, err
		}
	}
	if err := preparePrimary(ctx, cfg, direct.ConnConfig); err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, unavailable("open the primary", err)
	}
	fc := pc.Copy()
	fc.MaxConns = feedConns - 1 // one, and another while pgx waits for a broken one to end
	follow, err := pgxpool.NewWithConfig(ctx, fc)
	if err != nil {
		pool.Close()
		return nil, unavailable("open the primary", err)
	}
	p := &primaryDB{pool: pool, follow: follow, listen: listen, direct: direct.ConnConfig, keys: cfg.Keys,
		verbs: make(chan struct{}, servers.verbs(direct.ConnConfig))}
	if err := p.checkRealm(ctx); err != nil {
		pool.Close()
		follow.Close()
		return nil, err
	}
	return p, nil
}

// primaryConfig parses the URL of the primary. The parser's own error can hold the password, so it is not passed on.
func primaryConfig(url string, connectTimeout time.Duration) (*pgxpool.Config, error) {
	pc, err := pgxpool.ParseConfig(url)
	if err != nil || !isURL(url) {
		return nil, invalid(errors.New("not a PostgreSQL URL: postgres://user:password@host:port/database"))
	}
	if severalHosts(pc.ConnConfig) {
		return nil, invalid(errors.New("it names several hosts: one of them could be a standby that lags behind; give the one address of the primary"))
	}
	pc.ConnConfig.RuntimeParams["search_path"] = "pg_catalog"
	pc.ConnConfig.RuntimeParams["application_name"] = "tenancy"
	pc.ConnConfig.ConnectTimeout = connectTimeout
	pc.ConnConfig.DialFunc = dialer().DialContext
	return pc, nil
}

func severalHosts(cc *pgx.ConnConfig) bool {
	for _, f := range cc.Fallbacks { // the same host may be there twice, with and without TLS
		if f.Host != cc.Host || f.Port != cc.Port {
			return true
		}
	}
	return false
}

// sameDatabase refuses a ListenURL that leads elsewhere, where locks and notifications would be in vain.
func sameDatabase(ctx context.Context, ccs ...*pgx.ConnConfig) error {
	seen := map[string]bool{}
	for _, cc := range ccs {
		conn, err := pgx.ConnectConfig(ctx, cc)
		if err != nil {
			return unavailable("open the primary", err)
		}
		var identity string
		err = conn.QueryRow(ctx, `SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database()) FROM pg_control_system()`).Scan(&identity)
		closeConn(conn)
		if err != nil {
			return unavailable("open the primary", err)
		}
		seen[identity] = true
	}
	if len(seen) > 1 {
		return invalid(errors.New("Config.ListenURL leads to another database than Config.PrimaryURL"))
	}
	return nil
}

// preparePrimary migrates or checks the schema tenancy, alone among all processes that open this primary.
func preparePrimary(ctx context.Context, cfg Config, cc *pgx.ConnConfig) error {
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return unavailable("open the primary", err)
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtextextended('tenancy primary', 0))`); err != nil {
		return unavailable("open the primary", err)
	}
	var there, mayCreate bool
	err = conn.QueryRow(ctx, `SELECT to_regnamespace('tenancy') IS NOT NULL,
		has_database_privilege(current_database(), 'CREATE')`).Scan(&there, &mayCreate)
	switch {
	case err != nil:
		return unavailable("open the primary", err)
	case !there && (cfg.CheckPrimaryOnly || !mayCreate):
		return &SetupError{Missing: []Finding{missing(
			fmt.Sprintf("database %q has no schema tenancy, and login %q may not make it", cc.Database, cc.User),
			fmt.Sprintf("CREATE SCHEMA tenancy AUTHORIZATION %s; -- in database %s, or run tenancy.Init", pgx.Identifier{cc.User}.Sanitize(), pgx.Identifier{cc.Database}.Sanitize()),
		)}}
	case !there:
		if _, err := conn.Exec(ctx, `CREATE SCHEMA tenancy`); err != nil {
			return unavailable("open the primary", err)
		}
	}
	db := stdlib.OpenDB(*cc)
	defer db.Close()
	m, err := newRun(db, primary.Schema, migrations{files: primary.Migrations()})
	if err != nil {
		return err
	}
	version, err := m.version(ctx)
	if err != nil {
		return unavailable("open the primary", err)
	}
	switch {
	case version > primary.Version:
		return hinted(ErrPrimaryNewer, "its schema is at version %d, this release knows %d: deploy the newer release on this node", version, primary.Version)
	case version == primary.Version:
		return nil
	case cfg.CheckPrimaryOnly:
		return &SetupError{Missing: []Finding{missing(
			fmt.Sprintf("the primary's schema is at version %d and this release needs %d", version, primary.Version),
			"open it once without Config.CheckPrimaryOnly, with a login that owns schema tenancy",
		)}}
	}
	if _, err := m.up(ctx, math.MaxInt64); err != nil {
		return fmt.Errorf("tenancy: migrate the primary: %w", err)
	}
	return nil
}

const sentinelText = "tenancy"

// checkRealm reads, and on the very first open writes, the identity of the primary and the record that proves the keys.
func (p *primaryDB) checkRealm(ctx context.Context) error {
	var id [16]byte
	var sentinel []byte
	read := func() error {
		return p.pool.QueryRow(ctx, `SELECT realm, sentinel FROM tenancy.realm`).Scan(&id, &sentinel)
	}
	err := read()
	if errors.Is(err, pgx.ErrNoRows) {
		fresh := newUID()
		p.realm = unique.Make([16]byte(fresh))
		sealed, err := p.seal(fresh, "sentinel", []byte(sentinelText))
		if err != nil {
			return err
		}
		if _, err := p.pool.Exec(ctx, `INSERT INTO tenancy.realm (realm, sentinel) VALUES ($1, $2) ON CONFLICT DO NOTHING`, fresh, sealed); err != nil {
			return unavailable("open the primary", err)
		}
		err = read()
		if err != nil {
			return unavailable("open the primary", err)
		}
	} else if err != nil {
		return unavailable("open the primary", err)
	}
	p.realm = unique.Make(id)
	if text, err := p.open(UID(id), "sentinel", sentinel); err != nil || string(text) != sentinelText {
		return hinted(ErrWrongKey, "Config.Keys cannot open the primary's sentinel (%v): give the keyring that the primary was set up with, old keys after the new one", err)
	}
	return nil
}

// seal encrypts a value for one column of one row. What it is bound to cannot be moved to another row, column or primary.
func (p *primaryDB) seal(uid UID, column string, plain []byte) ([]byte, error) {
	realm := p.realm.Value()
	return p.keys.ring.Seal(plain, string(realm[:]), string(uid[:]), column)
}

func (p *primaryDB) open(uid UID, column string, sealed []byte) ([]byte, error) {
	realm := p.realm.Value()
	return p.keys.ring.Open(sealed, string(realm[:]), string(uid[:]), column)
}

// sealedSource is the stored form of a DataSource: one record, so that its fields cannot be mixed.
type sealedSource struct {
	Host     string `json:"host"`
	Port     uint16 `json:"port"`
	Database string `json:"database"`
	Schema   string `json:"schema"`
	User     string `json:"user"`
	Password string `json:"password"`
	TLS      string `json:"tls"`
	// A release that does not know these two goes past the pooler, which works: it sends its search_path itself.
	Pooler    string `json:"pooler,omitempty"`
	PoolerTLS string `json:"pooler_tls,omitempty"`
}

func (p *primaryDB) sealSource(uid UID, column string, d DataSource) ([]byte, error) {
	plain, err := json.Marshal(sealedSource{d.Host, d.Port, d.Database, d.Schema, d.User, d.Password.Reveal(), d.TLS, d.Pooler, d.PoolerTLS})
	if err != nil {
		return nil, err
	}
	return p.seal(uid, column, plain)
}

func (p *primaryDB) openSource(uid UID, column string, sealed []byte) (DataSource, error) {
	plain, err := p.open(uid, column, sealed)
	if err != nil {
		return DataSource{}, fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	var s sealedSource
	if err := json.Unmarshal(plain, &s); err != nil {
		return DataSource{}, fmt.Errorf("%w: the record is not one of ours", ErrWrongKey)
	}
	return DataSource{s.Host, s.Port, s.Database, s.Schema, s.User, Secret(s.Password), s.TLS, s.Pooler, s.PoolerTLS}, nil
}

const tenantColumns = `t.id, t.uid, t.name, t.display_name, t.state, t.isolation, t.dense, t.generation`

func (p *primaryDB) scanTenant(row pgx.Row, more ...any) (Tenant, error) {
	t := Tenant{realm: p.realm}
	err := row.Scan(append([]any{&t.ID, &t.UID, &t.Name, &t.DisplayName, &t.State, &t.Isolation, &t.Dense, &t.Generation}, more...)...)
	if t.State == StateActive {
		t.State = StateActive // the constant, which a comparison need not read; what was scanned has memory of its own
	}
	return t, err
}

// record reads one tenant with the way to its data; pgx.ErrNoRows when there is none. A data
// source that cannot be opened is that tenant's trouble alone and does not fail the read.
func (p *primaryDB) record(ctx context.Context, q querier, id ID) (*record, error) {
	var r record
	var seconds int
	var sealed, shared []byte
	var dense denseSource
	t, err := p.scanTenant(q.QueryRow(ctx, `SELECT `+tenantColumns+`, t.message, t.retry_after, d.sealed,
		coalesce(d.dense_role, ''), coalesce(d.server, 0), coalesce(l.generation, 0), l.sealed,
		coalesce((SELECT a.version FROM tenancy.shared_areas a WHERE d.isolation = 'shared' AND a.server = d.server), d.version, 0)
		FROM tenancy.tenants t LEFT JOIN tenancy.data_sources d ON d.id = t.data_source
		LEFT JOIN tenancy.dense_logins l ON t.dense AND d.dense AND d.dense_role <> '' AND l.server = d.server AND l.isolation = d.isolation WHERE t.id = $1`, id),
		&r.message, &seconds, &sealed, &r.denseRole, &dense.server, &dense.generation, &shared, &r.version)
	if err != nil {
		return nil, err
	}
	r.tenant, r.retryAfter = t, time.Duration(seconds)*time.Second
	if t.State != StatePurged {
		r.source, r.sourceErr = p.openSource(t.UID, "data_source", sealed)
	}
	if t.Dense && shared != nil && r.sourceErr == nil {
		dense.isolation = t.Isolation
		dense.source, r.sourceErr = p.openSource(UID(p.realm.Value()), "dense_login", shared)
		r.dense = &dense
	}
	return &r, nil
}

// changed numbers a change and announces it, in the transaction that made it. It comes last in
// a transaction: its lock makes writers queue.
func changed(ctx context.Context, tx pgx.Tx, kind string, tenant ID, key string) error {
	_, err := tx.Exec(ctx, `SELECT tenancy.changed($1, nullif($2::bigint, 0), nullif($3, ''))`, kind, tenant, key)
	return err
}

// audit records who did what. The actor is the user of ctx's session, "" for the service itself; one on a visit is recorded with its reason.
func audit(ctx context.Context, tx pgx.Tx, action string, tenant ID, detail map[string]any) error {
	var actor UserKey
	if detail == nil {
		detail = map[string]any{}
	}
	if s := sessionOf(ctx); s != nil {
		actor = s.user
		if s.visit != nil {
			detail["visit"] = s.visit.Reason
		}
	}
	_, err := tx.Exec(ctx, `INSERT INTO tenancy.audit (actor, action, tenant, detail) VALUES ($1, $2, nullif($3::bigint, 0), $4)`, actor, action, tenant, detail)
	return err
}

// lockTenant makes this process the only one that works on the tenant's place, until release.
// The lock is held by a connection of its own: it ends with the process, however that ends, and
// no tenant can hold it, because tenants cannot connect to the primary.
//
// The returned context ends when the lock is lost: what goes on then could meet another node's work on the same tenant.
func (p *primaryDB) lockTenant(ctx context.Context, id ID) (held context.Context, release func(), err error) {
	if ctx, err = begin(ctx); err != nil {
		return nil, nil, err
	}
	return p.await(ctx, tenantLock(id), func() {}, func() (context.Context, func(), error) { return p.tryLockTenant(ctx, id) })
}

func tenantLock(id ID) lockOf { return lockOf{"tenant", int64(id)} }

const tryTenant = `SELECT pg_try_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`

// tryLockTenant is lockTenant for who has other things to do: it is errLocked at once when a verb has the lock.
func (p *primaryDB) tryLockTenant(ctx context.Context, id ID) (held context.Context, release func(), err error) {
	return p.lock(ctx, id, tryTenant, id)
}

// tryLockUID is tryLockTenant for a UID that is to be a tenant's.
func (p *primaryDB) tryLockUID(ctx context.Context, uid UID) (held context.Context, release func(), err error) {
	return p.lock(ctx, 0, `SELECT pg_try_advisory_lock(hashtextextended('tenancy uid ' || $1::uuid, 0))`, uid)
}

var errLocked = hinted(ErrInProgress, "another verb is at work on the tenant")

// lock runs take on a connection of its own, which answers at once whether the lock was free.
func (p *primaryDB) lock(ctx context.Context, id ID, take string, key any) (held context.Context, release func(), err error) {
	if ctx, err = begin(ctx); err != nil {
		return nil, nil, err
	}
	done, err := p.verb(ctx)
	if err != nil {
		return nil, nil, err
	}
	return p.hold(ctx, id, take, key, done)
}

// hold is lock for who has a place among the verbs. done is called when the lock is given up, or was not had.
func (p *primaryDB) hold(ctx context.Context, id ID, take string, key any, done func()) (held context.Context, release func(), err error) {
	conn, err := pgx.ConnectConfig(ctx, p.direct)
	if err != nil {
		done()
		return nil, nil, unavailable("lock", err)
	}
	return p.holdOn(ctx, conn, id, take, key, func() {
		closeConn(conn)
		done()
	})
}

// holdOn is hold on a connection that is there. done gives up what was taken on it.
func (p *primaryDB) holdOn(ctx context.Context, conn *pgx.Conn, id ID, take string, key any, done func()) (held context.Context, release func(), err error) {
	taken := false
	if err := conn.QueryRow(ctx, take, key).Scan(&taken); err != nil || !taken {
		done()
		switch {
		case err == nil:
			return nil, nil, errLocked
		case ctx.Err() != nil:
			return nil, nil, fmt.Errorf("%w: a lock that it needs was not free in time: %w", ErrInProgress, ctx.Err())
		}
		return nil, nil, unavailable("lock", err)
	}
	lock, lost := context.WithCancelCause(context.WithoutCancel(ctx))
	held, end := context.WithCancelCause(context.WithValue(ctx, lockKey{}, lock))
	watch, stop := context.WithCancel(context.WithoutCancel(ctx))
	watched := make(chan struct{})
	go func() { // nothing is ever notified here: the wait ends with the connection, or with the work
		defer close(watched)
		_, err := conn.WaitForNotification(watch)
		if watch.Err() == nil {
			err := &Error{Op: "lock", Tenant: id, Err: fmt.Errorf("%w: the lock was lost: %w", ErrPrimaryUnavailable, err)}
			lost(err)
			end(err)
		}
	}()
	return held, func() {
		stop()
		<-watched
		lost(nil)
		end(nil)
		done()
	}, nil
}

// lockKey is where what lockTenant returns carries a context that ends with the lock alone.
type lockKey struct{}

// afterwards is for the clean-up of a verb that ctx was held for: it outlives the verb's caller, but not the tenant's lock, after
// which the tenant can be in another verb's hands, and not timeout.
func afterwards(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	lock, held := ctx.Value(lockKey{}).(context.Context)
	if !held {
		lock = context.WithoutCancel(ctx)
	}
	return context.WithTimeout(lock, timeout)
}

// verb waits for a place among the verbs that hold connections. One that has its place waits for no other's.
func (p *primaryDB) verb(ctx context.Context) (done func(), err error) {
	select {
	case p.verbs <- struct{}{}:
		return func() { <-p.verbs }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: as many verbs are at work as this node's budget allows (Limits.ServerConns): %w", ErrBusy, ctx.Err())
	}
}

// closeConn says goodbye within a bound; a server that does not answer is left.
func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}
