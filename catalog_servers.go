package tenancy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// ServerConfig is a database in which tenants live, with its provisioner: the login that makes
// schemas and roles there (LOGIN, CREATEROLE, owner of the database, not a superuser), and, with CREATEDB, databases of tenants' own beside it.
//
// [Init] and [Catalog.AddServer] write Weight, Capacity and Tablespace each time; Config.Server is registered by the first [Open] alone.
type ServerConfig struct {
	// Name of the server in the catalog. Default: "main".
	Name string
	// URL with the provisioner's login: postgres://user:password@host:port/database. Required.
	URL string
	// Weight is the server's share of the new places that name no server: each goes to the server with the fewest places for its weight. Below 0: it
	// gets those alone that name it. Default: 1. At most 1,000,000.
	Weight int
	// Capacity is the number of tenants' places that the server may have; one that is full is left out, and one more that names it is [ErrNoRoom]. Places that are
	// prepared, being made, or left and not dropped, count too. What is there when it is lowered stays. Default: 0, no limit.
	Capacity int
	// Tablespace is where the tables and indexes of tenants are kept that are made from now on, and a database of a tenant's own as a whole. An administrator has made it; [Init] gives
	// the right to create in it to the role of all tenants and the provisioner. A place keeps its own, whatever is set later: its new tables go where its others are, and a tenant that
	// takes a prepared place, or one of the stock, has that place's. An adopted schema stays where it is. Default: "", the database's own.
	Tablespace string
	// Pooler is host:port of a pooler such as PgBouncer that calls of this server's tenants go through; see docs/poolers.md. The provisioner,
	// migrations and fences go to URL's address, always. Places that are made from now on have it; those that exist keep theirs until
	// Catalog.RotatePassword or Catalog.SetDataSource. Default: none.
	Pooler string
	// PoolerTLS is the connections' protection as in [DataSource].TLS. Default: "verify-full", and "disable" for localhost and loopback addresses.
	PoolerTLS string
}

// Format writes what can be shown, whatever the verb: the URL holds a password.
func (s ServerConfig) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenancy.ServerConfig{Name: %q, URL: %s, Weight: %d, Capacity: %d", s.Name, redactURL(s.URL), s.Weight, s.Capacity)
	if s.Tablespace != "" {
		fmt.Fprintf(f, ", Tablespace: %q", s.Tablespace)
	}
	if s.Pooler != "" {
		fmt.Fprintf(f, ", Pooler: %q", s.Pooler)
	}
	_, _ = io.WriteString(f, "}")
}

// MarshalText is Format for JSON and log/slog.
func (s ServerConfig) MarshalText() ([]byte, error) { return fmt.Append(nil, s), nil }

// parse fills in the defaults, and reads the URL: the provisioner's login, with the pooler that its tenants' calls go through.
func (s ServerConfig) parse() (ServerConfig, DataSource, error) {
	def(&s.Name, "main")
	def(&s.Weight, 1)
	if err := ident.Slug(s.Name); err != nil {
		return s, DataSource{}, invalid(fmt.Errorf("ServerConfig.Name: %w", err))
	}
	d, err := ParseDataSource(s.URL)
	if err != nil {
		return s, DataSource{}, fmt.Errorf("ServerConfig.URL: %w", err)
	}
	if err := errors.Join(ident.Schema(d.Database), ident.Schema(d.User)); err != nil {
		return s, DataSource{}, invalid(fmt.Errorf("ServerConfig.URL: database and user: %w", err))
	}
	if s.Weight > 1_000_000 {
		return s, DataSource{}, invalid(fmt.Errorf("ServerConfig.Weight is %d: at most 1,000,000", s.Weight))
	}
	if s.Capacity < 0 || s.Capacity > math.MaxInt32 {
		return s, DataSource{}, invalid(fmt.Errorf("ServerConfig.Capacity is %d: from 0 to %d", s.Capacity, math.MaxInt32))
	}
	if s.Tablespace != "" {
		if err := ident.Tablespace(s.Tablespace); err != nil {
			return s, DataSource{}, invalid(fmt.Errorf("ServerConfig.Tablespace: %w", err))
		}
	}
	d.Pooler, d.PoolerTLS = s.Pooler, s.PoolerTLS
	if err := d.validatePooler(); err != nil {
		return s, DataSource{}, invalid(fmt.Errorf("ServerConfig.Pooler: %w", err))
	}
	s.Weight = max(s.Weight, -1) // each below 0 means the same
	return s, d, nil
}

// AddServer registers a further database in which tenants can live, set up with [Init]. Known
// by its address, it gets the new provisioner login, weight and capacity, and the tablespace and the pooler or none; its name stays.
//
// The error is [ErrInvalid], a [*SetupError], [ErrPrimaryUnavailable] or the server's.
func (c *Catalog) AddServer(ctx context.Context, s ServerConfig) error {
	s, d, err := s.parse()
	if err != nil {
		return err
	}
	if ctx, err = begin(ctx); err != nil {
		return &Error{Op: "add server", Err: err}
	}
	if err := c.tn.primary.sameProvisioner(ctx, d); err != nil {
		return err
	}
	if err := verifyServer(ctx, c.tn.servers, d, s.Tablespace, c.tn.cfg.Extensions, c.tn.cfg.Isolation == IsolationDatabase); err != nil {
		return fmt.Errorf("tenancy: add server %q: %w", s.Name, err)
	}
	if err := c.tn.primary.registerServer(ctx, s, d); err != nil {
		return err
	}
	c.tn.feed.catchUp(ctx)
	return nil
}

// Server is a registered server, as the primary has it.
type Server struct {
	Name        string
	Address     string // host:port/database
	Weight      int    // as in [ServerConfig]
	Capacity    int
	Places      int    // of tenants, those included that are prepared, being made, or left and not dropped
	Tablespace  string // of the places that are made from now on
	Pooler      string
	Provisioner bool // its login is known
}

// Servers returns the registered servers, the oldest first. The error is [ErrPrimaryUnavailable].
func (c *Catalog) Servers(ctx context.Context) ([]Server, error) {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT s.name, s.host, s.port, s.database, s.weight, s.capacity, s.tablespace, s.pooler, s.provisioner IS NOT NULL,
		(SELECT count(*) FROM tenancy.data_sources d WHERE d.server = s.id AND d.state <> 'dropped') FROM tenancy.servers s ORDER BY s.id`)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s Server, err error) {
		var d DataSource
		err = row.Scan(&s.Name, &d.Host, &d.Port, &d.Database, &s.Weight, &s.Capacity, &s.Tablespace, &s.Pooler, &s.Provisioner, &s.Places)
		s.Address = d.Address()
		return s, err
	})
	return list, unavailable("read servers", err)
}

// sameProvisioner refuses another provisioner for a server that has one: the roles of the tenants there belong to the first.
func (p *primaryDB) sameProvisioner(ctx context.Context, d DataSource) error {
	var sealed []byte
	err := p.pool.QueryRow(ctx, `SELECT provisioner FROM tenancy.servers WHERE host = $1 AND port = $2 AND database = $3`, d.Host, d.Port, d.Database).Scan(&sealed)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && sealed == nil {
		return nil
	} else if err != nil {
		return unavailable("read servers", err)
	}
	now, err := p.openSource(UID(p.realm.Value()), "provisioner", sealed)
	if err != nil {
		return err
	}
	if now.User != d.User {
		return invalid(fmt.Errorf("server %s has the provisioner %q, which holds the roles of its tenants: only its password can change, %q is another login", d.Address(), now.User, d.User))
	}
	return nil
}

// registerServer adds the server to the catalog, or renews its provisioner's password, weight, capacity, tablespace and pooler.
func (p *primaryDB) registerServer(ctx context.Context, s ServerConfig, d DataSource) error {
	err := pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		login := d
		login.Pooler, login.PoolerTLS = "", "" // the provisioner goes past it
		sealed, err := p.sealSource(UID(p.realm.Value()), "provisioner", login)
		if err != nil {
			return err
		}
		// Two nodes that register one server meet in two unique constraints, and only one can be the conflict's.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('tenancy servers', 0))`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `INSERT INTO tenancy.servers (name, host, port, database, tls, provisioner, weight, capacity, tablespace, pooler, pooler_tls)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
			ON CONFLICT (host, port, database) DO UPDATE SET provisioner = excluded.provisioner, tls = excluded.tls,
				weight = excluded.weight, capacity = excluded.capacity, tablespace = excluded.tablespace, pooler = excluded.pooler, pooler_tls = excluded.pooler_tls, updated = now()`,
			s.Name, d.Host, d.Port, d.Database, d.TLS, sealed, s.Weight, s.Capacity, s.Tablespace, d.Pooler, d.PoolerTLS); isState(err, "23505") {
			return invalid(fmt.Errorf("server: the name %q belongs to another address", s.Name))
		} else if err != nil {
			return err
		}
		if err := audit(ctx, tx, "register server", 0, map[string]any{"server": s.Name, "address": d.Address(), "weight": s.Weight, "capacity": s.Capacity, "tablespace": s.Tablespace, "pooler": d.Pooler}); err != nil {
			return err
		}
		return changed(ctx, tx, "server", 0, s.Name)
	})
	return refusal("register server", err)
}

// chosen is a server that a place can be made on.
type chosen struct {
	id          int64
	address     DataSource // without a login
	tablespace  string
	provisioner []byte // sealed; nil: none is known
}

// chooseServer chooses the server of a new place, and keeps it from being filled by another until tx ends.
func chooseServer(ctx context.Context, tx pgx.Tx, server string) (chosen, error) {
	if err := lockServers(ctx, tx, server); err != nil {
		return chosen{}, err
	}
	return roomiest(ctx, tx, server)
}

// lockServers keeps the server that is named, or all that places are made on, from being filled by another until tx ends. It is a statement of its own: the next one
// counts the places of who had them before.
func lockServers(ctx context.Context, tx pgx.Tx, server string) error {
	_, err := tx.Exec(ctx, `SELECT FROM tenancy.servers s WHERE `+eligible+` ORDER BY id FOR NO KEY UPDATE`, server)
	return err
}

// eligible is the condition on a server s: it is the one that $1 names, or there is a way to make places on it.
const eligible = `(s.name = $1 OR $1 = '' AND s.provisioner IS NOT NULL)`

// roomiest returns the server that is named, or else the one with the fewest places for its weight, the heavier of two that have as many. A place of the stock
// fills none: takeStock looks for room when it becomes a tenant's.
// The error is ErrInvalid, ErrNoProvisioner, ErrNoRoom or that of the query.
func roomiest(ctx context.Context, q querier, server string) (chosen, error) {
	var s chosen
	var taken, full bool // taken: by tenants that name it alone
	d := &s.address
	err := q.QueryRow(ctx, `SELECT s.id, s.host, s.port, s.database, s.tls, s.pooler, s.pooler_tls, s.tablespace, s.provisioner,
		s.weight < 0 AND $1 = '' AS taken, s.capacity > 0 AND p.used >= s.capacity AS is_full
		FROM tenancy.servers s, LATERAL (SELECT count(*) AS places, count(*) FILTER (WHERE NOT d.stocked) AS used FROM tenancy.data_sources d WHERE d.server = s.id AND d.state <> 'dropped') p
		WHERE `+eligible+` ORDER BY taken, is_full, s.capacity > 0 AND p.places >= s.capacity, p.places::float8 / s.weight, s.weight DESC, s.id LIMIT 1`, server).
		Scan(&s.id, &d.Host, &d.Port, &d.Database, &d.TLS, &d.Pooler, &d.PoolerTLS, &s.tablespace, &s.provisioner, &taken, &full)
	switch {
	case errors.Is(err, pgx.ErrNoRows) && server != "":
		return chosen{}, invalid(fmt.Errorf("server: %q is not registered", server))
	case errors.Is(err, pgx.ErrNoRows):
		return chosen{}, hinted(ErrNoProvisioner, "no server is registered: run tenancy.Init, or set Config.Server")
	case err != nil:
		return chosen{}, err
	case taken:
		return chosen{}, hinted(ErrNoRoom, "each server takes only tenants that name it (ServerConfig.Weight is below 0)")
	case full && server != "":
		return chosen{}, hinted(ErrNoRoom, "server %q has as many places as its ServerConfig.Capacity", server)
	case full:
		return chosen{}, hinted(ErrNoRoom, "each server has as many places as its ServerConfig.Capacity: raise one, or add a server with Catalog.AddServer")
	}
	return s, nil
}

// verifiable is what a registered server is verified by.
type verifiable struct {
	provisioner DataSource
	tablespace  string
}

// provisioned returns the registered servers whose provisioner is known.
func (p *primaryDB) provisioned(ctx context.Context) ([]verifiable, error) {
	rows, err := p.pool.Query(ctx, `SELECT tablespace, provisioner FROM tenancy.servers WHERE provisioner IS NOT NULL ORDER BY id`)
	if err != nil {
		return nil, unavailable("read servers", err)
	}
	defer rows.Close()
	var list []verifiable
	for rows.Next() {
		var s verifiable
		var sealed []byte
		if err := rows.Scan(&s.tablespace, &sealed); err != nil {
			return nil, unavailable("read servers", err)
		}
		if s.provisioner, err = p.openSource(UID(p.realm.Value()), "provisioner", sealed); err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, unavailable("read servers", rows.Err())
}
