package tenancy

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Config is what Open needs. PrimaryURL and Keys are required, Migrations where tenants are
// created; every other field has a default. Open copies it.
type Config struct {
	// PrimaryURL is the primary database with the catalog login that Init made:
	// postgres://user:password@host:port/database. Required.
	PrimaryURL string
	// ListenURL is a direct way to the same database, for what needs a session of its own
	// (notifications, locks, migrations of the primary), when PrimaryURL is a pooler. Default: PrimaryURL.
	ListenURL string
	// HostURL is the host's own database, reached through Tenancy.Host. Default: none.
	HostURL string
	// Server is where tenants live. It is registered in the primary when none is there yet.
	// Default: the servers that the primary lists.
	Server *ServerConfig
	// Keys seal passwords in the primary. The first one seals, all of them open. Required.
	Keys Keyring

	// Migrations holds the service's goose files, at its root or in one subdirectory (as
	// go:embed makes it). Default: none, and Create refuses.
	Migrations fs.FS
	// GoMigrations are migrations in code, beside the files. Default: none.
	GoMigrations []GoMigration
	// MinVersion is the migration that this node's code needs. A tenant that is recorded to be below it is refused here with [ErrSchemaBehind], until somebody has migrated it; no restart is needed then. It is one of those in
	// Migrations or GoMigrations. Default: 0, every tenant is served.
	MinVersion int64

	// Isolation of tenants that Create makes and whose NewTenant.Isolation says nothing. Those that exist keep theirs. With IsolationDatabase, Open
	// checks that the servers can make databases. Default: IsolationSchema.
	Isolation Isolation
	// Dense has Create put new tenants with IsolationSchema and IsolationShared into the pool that such tenants of their server share; see
	// [Catalog.SetDense]. Those that exist, and those with a server behind a pooler, keep their own. Default: false.
	Dense bool
	// Stock is how many places are kept ready for tenants that Create makes with Isolation and without a DataSource: migrated, each for a tenant that is not there yet, so that a
	// sign-up waits for no migration. All nodes together keep so many; give each the same number. They count as the server's places. Not with IsolationShared. Default: 0; at most 100.
	Stock int
	// HostManagers are users of the host: they may work without a tenant. Default: none.
	HostManagers []UserKey
	// SingleTenant is the name of the one tenant that everything is: every user that the service authenticates is in it, with the role of
	// their membership or else RoleMember, and what requests say about their tenant means nothing, a claim
	// that names another apart. So an installation for one customer runs the same code. Open creates the tenant in a primary that has none, and
	// refuses one that has others: their users would all be in it. Default: off.
	SingleTenant string
	// OnlyTenants names the tenants that this node serves. Every other one is refused with a [*NotServedError], and no pool is opened
	// and no job run for it here. A tenant that is renamed is served where its new name is listed. Default: all.
	OnlyTenants []string
	// NodeAddress is where the callers of this node's tenants are sent by nodes that do not serve them, such as
	// "10.0.0.7:8080". It is shown to callers. Default: none, and this node is not named.
	NodeAddress string
	// ValidityCron is when the validity job re-reads what this node holds and finishes what a process that died has left: five cron fields or
	// "@every 10m". The latter it does one to two minutes after Open, too. No zone prefix: fields are in UTC. Default: "@every 10m".
	ValidityCron string
	// Lookups bounds the caches of the request path.
	Lookups LookupConfig
	// Limits bounds what this node opens.
	Limits Limits
	// DrainTimeout is how long Close, Suspend, Delete, SetDataSource and RotatePassword wait for work in flight. Default: 10 s.
	DrainTimeout time.Duration
	// Quarantine is how long Catalog.Purge refuses to drop a tenant after Delete, so that Restore can take back what was deleted by mistake. It is written down
	// by the Delete: another setting later, or on another node, counts for what is deleted then. Default: 30 days. From 1 ms to 10 years.
	Quarantine time.Duration
	// CheckPrimaryOnly makes Open refuse a primary whose own schema is behind, where the
	// default is to bring it up to date.
	CheckPrimaryOnly bool
	// Extensions puts tenancy_ext, the schema for extensions, on every tenant's search_path.
	Extensions bool
	// ReferenceTables puts tenancy_ref, read-only tables shared by all tenants, on every tenant's search_path.
	ReferenceTables bool
	// Logger receives what an operator should know. Default: slog.Default().
	Logger *slog.Logger

	// Seed fills a new tenant with the rows that it begins with. Create runs it after the migrations and before the tenant is served, with a transaction of the
	// tenant's own login: it can reach what the tenant's calls can, and nothing of another tenant's. ctx has no tenant, and tx is the way to the data.
	// Its error, or panic, rolls all of it back and fails Create, and the same Create tries again. It can run again after a commit, where the process died or
	// its connection broke before the tenant was recorded as active: write with ON CONFLICT. It must not end tx. Default: none.
	Seed func(ctx context.Context, t Tenant, tx pgx.Tx) error

	// Store tells of names, domains, memberships and suspensions in the primary's place. Default: the primary.
	Store Store
	// WrapResolver replaces the default resolver, or wraps it. Default: the default resolver.
	WrapResolver func(next TenantResolver) TenantResolver
	// PoolBuilder makes a tenant's pool from a finished configuration. Default: pgxpool.NewWithConfig.
	PoolBuilder PoolBuilder
	// PoolConfig may change a tenant's pool settings (tracers, limits, types). What pins the pool
	// to its tenant is set again afterwards and cannot be changed here. Of a pool that tenants share it is called for each connection, with a Tenant whose ID is 0. Default: none.
	PoolConfig func(ctx context.Context, t Tenant, cfg *pgxpool.Config) error
}

// Format writes what can be shown, whatever the verb: URLs hold passwords.
func (c Config) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenancy.Config{PrimaryURL: %s, Keys: %v, Isolation: %q, ValidityCron: %q}", redactURL(c.PrimaryURL), c.Keys, c.Isolation, c.ValidityCron)
}

// MarshalText is Format for JSON and log/slog.
func (c Config) MarshalText() ([]byte, error) { return fmt.Append(nil, c), nil }

// redactURL keeps scheme, address and database of a URL, and nothing of what cannot be read as one.
func redactURL(raw string) string {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User == nil || strings.Contains(u.Path, "@") {
		return redacted // a password with a slash, a hash or a question mark in it ends the host for the parser
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// GoMigration is a migration in code, run inside a transaction as the tenant's owner.
type GoMigration struct {
	Version  int64
	Up, Down func(ctx context.Context, tx *sql.Tx) error
}

// LookupConfig bounds the caches between a user key and its tenant.
type LookupConfig struct {
	// Size is the number of users, and of tenants, that are remembered. Default: 100,000.
	Size int
	// NegativeSize is the number of unknown keys that are remembered. Default: 10,000.
	NegativeSize int
	// NegativeTTL is how long an unknown key stays unknown without asking again. Default: 5 s.
	NegativeTTL time.Duration
	// StaleGrace is how long known users are served while the primary cannot be reached.
	// Default: 60 s. At least 5 s.
	StaleGrace time.Duration
	// StoreTTL is how long an answer of Config.Store is believed. Default: 5 s. From 100 ms to 1 h.
	StoreTTL time.Duration
	// PollPeriod is how often the change feed is read without a notification. Default: 1 s.
	// From 100 ms to 4 s: who closes a login waits 5 s for a node to hear of it.
	PollPeriod time.Duration
	// Timeout of one look-up in the primary. Default: 5 s.
	Timeout time.Duration
}

// Limits bounds what is opened, and how long anything may take.
type Limits struct {
	// ServerConns is the number of connections that all nodes together may have open at one server (a host and port), the library's own
	// among them. A node has ServerConns/Nodes of them, which its tenants share: an idle connection makes room for one that
	// is needed. It is one number for all servers. Default: 80, for PostgreSQL's own default of 100. Give max_connections less what else connects: "How many
	// connections" in docs/operations.md counts it out.
	//
	// Of a node's part 2 are for cancel requests and 3 are kept for verbs, and where the primary is on the same server PrimaryConns + 5 are for the library's own pools: with
	// the defaults one node's tenants have 62. For several nodes the default is small: with 3 of them each has 8 for its tenants, and with 4 Open refuses it.
	ServerConns int
	// Nodes is the number of processes that are expected to run at once, those of a rolling deployment included. Each has ServerConns/Nodes, whether the others run or not, and
	// nothing holds more processes back from taking as much: give each node the same number. Default: 1, for which several nodes open several times ServerConns.
	Nodes int
	// TenantConns is the most connections of one tenant on one node. Default: 4. At most 10,000. Logins are made with a CONNECTION LIMIT of twice
	// Nodes times this, and keep it when these are raised, until Catalog.RotatePassword.
	TenantConns int32
	// TenantFloor is the number of connections that a tenant gets before any other tenant gets more of them, and keeps against those while it is at work. Default: 1. At most TenantConns.
	TenantFloor int32
	// TenantWaiters is the number of calls that may wait for a connection of one tenant on one node; the next one
	// is [ErrBusy] at once. Default: 100.
	TenantWaiters int
	// PrimaryConns is the size of the pool to the primary; the feed has up to three connections besides. Default: 8. At least 3.
	PrimaryConns int32
	// DenseConns is the most connections of a shared pool ([Catalog.SetDense]) on one node: of each server, and of each isolation there. A
	// tenant uses TenantConns of them at most. Default: 8. At most 1,000.
	DenseConns int32
	// DenseTenants is how many tenants a connection of a shared pool serves before it is replaced, because PostgreSQL keeps some 0.25 MB in a session for each
	// tenant with a dozen tables. Default: 400.
	DenseTenants int
	// TenantIdle is how long an unused tenant keeps its pool. Default: 1 min.
	TenantIdle time.Duration
	// ConnIdle is how long an unused connection is kept. Default: 1 min.
	ConnIdle time.Duration
	// AcquireTimeout is how long a call waits for a connection; a shorter ctx ends it before. Default: 10 s.
	AcquireTimeout time.Duration
	// ConnectTimeout of one connection. Default: 5 s.
	ConnectTimeout time.Duration
	// PingTimeout of the question whether a connection that was unused for a second is still alive. Default: 1 s. At most half of AcquireTimeout is used of it.
	PingTimeout time.Duration
	// StatementTimeout is the server's statement_timeout of a tenant's connections; SET LOCAL gives one transaction another.
	// Default: 30 s. Below 0: the server's own.
	StatementTimeout time.Duration
	// Provisions is the number of tenants created or migrated at once by this node. Default: 2.
	Provisions int
}

// FromEnv returns a Config made of TENANCY_PRIMARY_URL, TENANCY_LISTEN_URL, TENANCY_HOST_URL,
// TENANCY_KEYS, TENANCY_ISOLATION, TENANCY_DENSE, TENANCY_EXTENSIONS and TENANCY_REFERENCE_TABLES (true or false), TENANCY_VALIDITY_CRON, TENANCY_SINGLE_TENANT, TENANCY_NODE_ADDRESS, TENANCY_SERVER_CONNS and TENANCY_NODES (numbers), and of
// TENANCY_HOST_MANAGERS and TENANCY_ONLY_TENANTS (both comma separated). Variables that are not set
// leave the default. An error names the variable, never its value.
func FromEnv() (Config, error) {
	c := Config{
		PrimaryURL:   os.Getenv("TENANCY_PRIMARY_URL"),
		ListenURL:    os.Getenv("TENANCY_LISTEN_URL"),
		HostURL:      os.Getenv("TENANCY_HOST_URL"),
		Isolation:    Isolation(os.Getenv("TENANCY_ISOLATION")),
		ValidityCron: os.Getenv("TENANCY_VALIDITY_CRON"),
		SingleTenant: os.Getenv("TENANCY_SINGLE_TENANT"),
		NodeAddress:  os.Getenv("TENANCY_NODE_ADDRESS"),
		OnlyTenants:  listOf(os.Getenv("TENANCY_ONLY_TENANTS")),
	}
	if c.PrimaryURL == "" {
		return Config{}, invalid(errors.New("TENANCY_PRIMARY_URL is not set"))
	}
	keys, err := ParseKeyring(os.Getenv("TENANCY_KEYS"))
	if err != nil {
		return Config{}, fmt.Errorf("TENANCY_KEYS: %w", err)
	}
	c.Keys = keys
	for _, m := range listOf(os.Getenv("TENANCY_HOST_MANAGERS")) {
		c.HostManagers = append(c.HostManagers, UserKey(m))
	}
	if c.Dense, err = boolFrom("TENANCY_DENSE"); err != nil {
		return Config{}, err
	}
	if c.Extensions, err = boolFrom("TENANCY_EXTENSIONS"); err != nil {
		return Config{}, err
	}
	if c.ReferenceTables, err = boolFrom("TENANCY_REFERENCE_TABLES"); err != nil {
		return Config{}, err
	}
	return c, errors.Join(numberFrom("TENANCY_SERVER_CONNS", &c.Limits.ServerConns), numberFrom("TENANCY_NODES", &c.Limits.Nodes))
}

// boolFrom reads true or false, as strconv.ParseBool does; a variable that is not set is false.
func boolFrom(name string) (bool, error) {
	text := os.Getenv(name)
	if text == "" {
		return false, nil
	}
	on, err := strconv.ParseBool(text)
	if err != nil {
		return false, invalid(errors.New(name + " is neither true nor false"))
	}
	return on, nil
}

// numberFrom reads a number above 0 into field; a variable that is not set leaves it.
func numberFrom(name string, field *int) error {
	text := os.Getenv(name)
	if text == "" {
		return nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return invalid(errors.New(name + " is not a number above 0"))
	}
	*field = n
	return nil
}

func listOf(commaSeparated string) (list []string) {
	for s := range strings.SplitSeq(commaSeparated, ",") {
		if s = strings.TrimSpace(s); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// withDefaults returns a copy of c with every default filled in.
func (c Config) withDefaults() Config {
	def(&c.ListenURL, c.PrimaryURL)
	def(&c.Isolation, IsolationSchema)
	def(&c.ValidityCron, "@every 10m")
	def(&c.Lookups.Size, 100_000)
	def(&c.Lookups.NegativeSize, 10_000)
	def(&c.Lookups.NegativeTTL, 5*time.Second)
	def(&c.Lookups.StaleGrace, 60*time.Second)
	def(&c.Lookups.PollPeriod, time.Second)
	def(&c.Lookups.StoreTTL, 5*time.Second)
	def(&c.Lookups.Timeout, 5*time.Second)
	def(&c.Limits.ServerConns, 80)
	def(&c.Limits.Nodes, 1)
	def(&c.Limits.TenantConns, 4)
	def(&c.Limits.TenantFloor, 1)
	def(&c.Limits.TenantWaiters, 100)
	def(&c.Limits.PrimaryConns, 8)
	def(&c.Limits.DenseConns, 8)
	def(&c.Limits.DenseTenants, 400)
	def(&c.Limits.TenantIdle, time.Minute)
	def(&c.Limits.ConnIdle, time.Minute)
	def(&c.Limits.AcquireTimeout, 10*time.Second)
	def(&c.Limits.ConnectTimeout, 5*time.Second)
	def(&c.Limits.PingTimeout, time.Second)
	def(&c.Limits.StatementTimeout, 30*time.Second)
	def(&c.Limits.Provisions, 2)
	def(&c.DrainTimeout, 10*time.Second)
	def(&c.Quarantine, 30*24*time.Hour)
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.HostManagers = slices.Clone(c.HostManagers)
	c.OnlyTenants = slices.Clone(c.OnlyTenants)
	c.GoMigrations = slices.Clone(c.GoMigrations)
	return c
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// validate names the first field that cannot be used, and the rule it breaks.
func (c Config) validate() error {
	if c.PrimaryURL == "" {
		return invalid(errors.New("Config.PrimaryURL is required: postgres://user:password@host:port/database"))
	}
	if c.Keys.IsZero() {
		return invalid(errors.New("Config.Keys is required: make a key with tenancy.NewKey and read it with tenancy.ParseKeyring"))
	}
	if err := c.Isolation.check(); err != nil {
		return invalid(fmt.Errorf("Config.Isolation: %w", err))
	}
	for i, m := range c.HostManagers {
		if err := ident.UserKey(string(m)); err != nil {
			return invalid(fmt.Errorf("Config.HostManagers[%d]: %w", i, err))
		}
	}
	if c.Stock < 0 || c.Stock > 100 || c.Stock > 0 && (c.Isolation == IsolationShared || c.SingleTenant != "") {
		return invalid(errors.New("Config.Stock: from 0 to 100, and 0 with IsolationShared, whose tenants wait for no migration, and with SingleTenant"))
	}
	if err := c.validateNode(); err != nil {
		return err
	}
	if _, err := parseCron(c.ValidityCron); err != nil {
		return invalid(fmt.Errorf("Config.ValidityCron: %w", err))
	}
	if c.MinVersion < 0 {
		return invalid(fmt.Errorf("Config.MinVersion is %d: at least 0", c.MinVersion))
	}
	seen := map[int64]bool{}
	for _, m := range c.GoMigrations {
		if m.Version <= 0 || m.Up == nil || seen[m.Version] {
			return invalid(fmt.Errorf("Config.GoMigrations: version %d needs a number above 0 of its own and an Up", m.Version))
		}
		seen[m.Version] = true
	}
	l := c.Lookups
	return errors.Join(
		atLeast("Lookups.Size", l.Size, 1), atLeast("Lookups.NegativeSize", l.NegativeSize, 1),
		within("Lookups.NegativeTTL", l.NegativeTTL, time.Millisecond, time.Hour),
		within("Lookups.StaleGrace", l.StaleGrace, 5*time.Second, 24*time.Hour),
		within("Lookups.StoreTTL", l.StoreTTL, 100*time.Millisecond, time.Hour),
		within("Lookups.PollPeriod", l.PollPeriod, 100*time.Millisecond, slowestPoll),
		within("Lookups.Timeout", l.Timeout, 10*time.Millisecond, time.Minute),
		c.Limits.validate(),
		within("DrainTimeout", c.DrainTimeout, time.Millisecond, time.Hour),
		within("Quarantine", c.Quarantine, time.Millisecond, 10*365*24*time.Hour),
	)
}

func (l Limits) validate() error {
	errs := []error{
		atLeast("Limits.ServerConns", l.ServerConns, 1), atLeast("Limits.Nodes", l.Nodes, 1),
		atLeast("Limits.TenantConns", l.TenantConns, 1), atMost("Limits.TenantConns", l.TenantConns, 10_000),
		atLeast("Limits.DenseConns", l.DenseConns, 1), atMost("Limits.DenseConns", l.DenseConns, 1000), atLeast("Limits.DenseTenants", l.DenseTenants, 1),
		atLeast("Limits.TenantFloor", l.TenantFloor, 1), atMost("Limits.TenantFloor", l.TenantFloor, max(1, l.TenantConns)),
		atLeast("Limits.TenantWaiters", l.TenantWaiters, 1), atLeast("Limits.PrimaryConns", l.PrimaryConns, 3),
		within("Limits.TenantIdle", l.TenantIdle, time.Second, 24*time.Hour),
		within("Limits.ConnIdle", l.ConnIdle, time.Second, 24*time.Hour),
		within("Limits.AcquireTimeout", l.AcquireTimeout, time.Millisecond, time.Hour),
		within("Limits.ConnectTimeout", l.ConnectTimeout, 10*time.Millisecond, time.Minute),
		within("Limits.PingTimeout", l.PingTimeout, 10*time.Millisecond, time.Minute),
		atLeast("Limits.Provisions", l.Provisions, 1),
	}
	if l.StatementTimeout > 0 {
		errs = append(errs, within("Limits.StatementTimeout", l.StatementTimeout, time.Millisecond, 24*time.Hour))
	}
	return errors.Join(errs...)
}

// serves returns the names of the tenants that this node serves, nil for all.
func (c Config) serves() []string {
	if c.SingleTenant != "" {
		return []string{c.SingleTenant}
	}
	if len(c.OnlyTenants) == 0 {
		return nil
	}
	return c.OnlyTenants
}

// validateNode checks what this node serves and how it is called.
func (c Config) validateNode() error {
	for i, name := range c.OnlyTenants {
		if err := ident.Slug(name); err != nil {
			return invalid(fmt.Errorf("Config.OnlyTenants[%d]: %w", i, err))
		}
	}
	if c.SingleTenant != "" {
		if err := ident.Slug(c.SingleTenant); err != nil {
			return invalid(fmt.Errorf("Config.SingleTenant: %w", err))
		}
		if len(c.OnlyTenants) > 0 {
			return invalid(errors.New("Config.SingleTenant and Config.OnlyTenants: give one of them"))
		}
	}
	if len(c.NodeAddress) > 255 || strings.ContainsFunc(c.NodeAddress, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' || r == '"' }) {
		return invalid(errors.New("Config.NodeAddress: at most 255 printable ASCII characters, without spaces, commas and quotes: it is sent in a header"))
	}
	return nil
}

func atLeast[T int | int32](field string, value, low T) error {
	if value < low {
		return invalid(fmt.Errorf("Config.%s is %d: at least %d", field, value, low))
	}
	return nil
}

func atMost[T int | int32](field string, value, high T) error {
	if value > high {
		return invalid(fmt.Errorf("Config.%s is %d: at most %d", field, value, high))
	}
	return nil
}

func within(field string, value, low, high time.Duration) error {
	if value < low || value > high {
		return invalid(fmt.Errorf("Config.%s is %v: from %v to %v", field, value, low, high))
	}
	return nil
}
