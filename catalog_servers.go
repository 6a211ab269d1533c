package tenancy

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// ServerConfig is a database in which tenants live, with its provisioner: the login that makes
// schemas and roles there (LOGIN, CREATEROLE, owner of the database, not a superuser).
type ServerConfig struct {
	// Name of the server in the catalog. Default: "main".
	Name string
	// URL with the provisioner's login: postgres://user:password@host:port/database. Required.
	URL string
	// Pooler is host:port of a pooler such as PgBouncer that calls of this server's tenants go through; see docs/poolers.md. The provisioner,
	// migrations and fences go to URL's address, always. Places that are made from now on have it; those that exist keep theirs until
	// Catalog.RotatePassword or Catalog.SetDataSource. Default: none.
	Pooler string
	// PoolerTLS is the connections' protection as in [DataSource].TLS. Default: "verify-full", and "disable" for localhost and loopback addresses.
	PoolerTLS string
}

// Format writes what can be shown, whatever the verb: the URL holds a password.
func (s ServerConfig) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenancy.ServerConfig{Name: %q, URL: %s", s.Name, redactURL(s.URL))
	if s.Pooler != "" {
		fmt.Fprintf(f, ", Pooler: %q", s.Pooler)
	}
	_, _ = io.WriteString(f, "}")
}

// MarshalText is Format for JSON and log/slog.
func (s ServerConfig) MarshalText() ([]byte, error) { return fmt.Append(nil, s), nil }

// parse returns the name, and the provisioner's login with the pooler that its tenants' calls go through.
func (s ServerConfig) parse() (string, DataSource, error) {
	name := s.Name
	def(&name, "main")
	if err := ident.Slug(name); err != nil {
		return "", DataSource{}, invalid(fmt.Errorf("ServerConfig.Name: %w", err))
	}
	d, err := ParseDataSource(s.URL)
	if err != nil {
		return "", DataSource{}, fmt.Errorf("ServerConfig.URL: %w", err)
	}
	if err := errors.Join(ident.Schema(d.Database), ident.Schema(d.User)); err != nil {
		return "", DataSource{}, invalid(fmt.Errorf("ServerConfig.URL: database and user: %w", err))
	}
	d.Pooler, d.PoolerTLS = s.Pooler, s.PoolerTLS
	if err := d.validatePooler(); err != nil {
		return "", DataSource{}, invalid(fmt.Errorf("ServerConfig.Pooler: %w", err))
	}
	return name, d, nil
}

// AddServer registers a further database in which tenants can live, set up with [Init]. Known
// by its address, it gets the new provisioner login, and the pooler or none; its name stays.
func (c *Catalog) AddServer(ctx context.Context, s ServerConfig) error {
	name, d, err := s.parse()
	if err != nil {
		return err
	}
	if ctx, err = begin(ctx); err != nil {
		return &Error{Op: "add server", Err: err}
	}
	if err := c.tn.primary.sameProvisioner(ctx, d); err != nil {
		return err
	}
	if err := verifyServer(ctx, c.tn.servers, d, c.tn.cfg.Extensions); err != nil {
		return fmt.Errorf("tenancy: add server %q: %w", name, err)
	}
	if err := c.tn.primary.registerServer(ctx, name, d); err != nil {
		return err
	}
	c.tn.feed.catchUp(ctx)
	return nil
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

// registerServer adds the server to the catalog, or renews its provisioner's password and its pooler.
func (p *primaryDB) registerServer(ctx context.Context, name string, d DataSource) error {
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
		if _, err := tx.Exec(ctx, `INSERT INTO tenancy.servers (name, host, port, database, tls, provisioner, pooler, pooler_tls) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
			ON CONFLICT (host, port, database) DO UPDATE SET provisioner = excluded.provisioner, tls = excluded.tls,
				pooler = excluded.pooler, pooler_tls = excluded.pooler_tls, updated = now()`,
			name, d.Host, d.Port, d.Database, d.TLS, sealed, d.Pooler, d.PoolerTLS); isState(err, "23505") {
			return invalid(fmt.Errorf("server: the name %q belongs to another address", name))
		} else if err != nil {
			return err
		}
		if err := audit(ctx, tx, "register server", 0, map[string]any{"server": name, "address": d.Address(), "pooler": d.Pooler}); err != nil {
			return err
		}
		return changed(ctx, tx, "server", 0, name)
	})
	return refusal("register server", err)
}

// provisioners returns the registered servers' provisioner logins.
func (p *primaryDB) provisioners(ctx context.Context) ([]DataSource, error) {
	rows, err := p.pool.Query(ctx, `SELECT provisioner FROM tenancy.servers WHERE provisioner IS NOT NULL ORDER BY id`)
	if err != nil {
		return nil, unavailable("read servers", err)
	}
	defer rows.Close()
	var list []DataSource
	for rows.Next() {
		var sealed []byte
		if err := rows.Scan(&sealed); err != nil {
			return nil, unavailable("read servers", err)
		}
		d, err := p.openSource(UID(p.realm.Value()), "provisioner", sealed)
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, unavailable("read servers", rows.Err())
}
