// Package demo is what the example programs share and what is not their idea: a throw-away PostgreSQL with two
// tenants on it, a service's authentication, and a server that ends cleanly.
//
// Tenant acme has the member alice@acme.test, globex has bob@globex.test, and carol@both.test belongs to both, without
// a default. Each tenant has one note, which names it. Every user's password is "demo".
package demo

import (
	"context"
	"crypto/rand"
	"embed"
	"errors"
	"fmt"
	"net/url"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Demo is the library at work on a PostgreSQL of its own. It is made by [Open] and ended by [Demo.Close].
type Demo struct {
	*tenancy.Tenancy
	URL string // where the program is served, such as http://127.0.0.1:8080; set before its handler is made

	server *pgembed.Server
}

// Open starts PostgreSQL, sets the library up on it and makes the two tenants. Where the library is found is filled into cfg.
func Open(ctx context.Context, cfg tenancy.Config) (*Demo, error) {
	server, err := pgembed.Start(ctx, pgembed.Options{Download: true, Own: true})
	if err != nil {
		return nil, err
	}
	d := &Demo{server: server}
	if err := d.open(ctx, cfg); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Demo) open(ctx context.Context, cfg tenancy.Config) error {
	key, err := tenancy.NewKey("demo")
	if err != nil {
		return err
	}
	if cfg.Keys, err = tenancy.ParseKeyring(key); err != nil {
		return err
	}
	cfg.PrimaryURL, cfg.Migrations = d.loginURL("demo_catalog", "demo_primary"), migrations
	err = tenancy.Init(ctx, tenancy.AdminConfig{AdminURL: d.server.URL(), PrimaryURL: cfg.PrimaryURL, Keys: cfg.Keys,
		Server: tenancy.ServerConfig{URL: d.loginURL("demo_provisioner", "demo_tenants")}})
	if err != nil {
		return err
	}
	if d.Tenancy, err = tenancy.Open(ctx, cfg); err != nil {
		return err
	}
	return errors.Join(d.tenant(ctx, "acme", "alice@acme.test"), d.tenant(ctx, "globex", "bob@globex.test"),
		d.Join(ctx, "carol@both.test", "acme", "globex"))
}

// loginURL is the way of a login, with a new password, to a database of the server.
func (d *Demo) loginURL(login, database string) string {
	u, err := url.Parse(d.server.URL())
	if err != nil {
		panic("the server's own URL cannot be parsed")
	}
	u.User, u.Path = url.UserPassword(login, rand.Text()), "/"+database
	return u.String()
}

func (d *Demo) tenant(ctx context.Context, name string, member tenancy.UserKey) error {
	t, err := d.Catalog().Create(ctx, tenancy.NewTenant{Name: name, Admin: member})
	if err != nil {
		return err
	}
	if ctx, err = d.Enter(ctx, t.ID); err != nil {
		return err
	}
	_, err = d.DB().Exec(ctx, `INSERT INTO notes VALUES ($1)`, "note of "+name)
	return err
}

// Join makes the user a member of the named tenants, without a default: in several, each request has to say which one it means.
func (d *Demo) Join(ctx context.Context, user tenancy.UserKey, names ...string) error {
	for _, name := range names {
		t, err := d.Catalog().TenantByName(ctx, name)
		if err != nil {
			return err
		}
		if err := d.Catalog().AddMember(ctx, tenancy.Membership{User: user, Tenant: t.ID}); err != nil {
			return err
		}
	}
	return d.Catalog().SetDefault(ctx, user, 0) // a user's first membership became it
}

// Close ends the library and the server. It may be called again.
func (d *Demo) Close() error {
	var err error
	if d.Tenancy != nil {
		err = d.Tenancy.Close()
	}
	return errors.Join(err, d.server.Stop())
}

// Must returns v, or panics: Example functions have no testing.T to fail with.
func Must[T any](v T, err error) T {
	if err != nil {
		panic(fmt.Sprintf("demo: %v", err))
	}
	return v
}
