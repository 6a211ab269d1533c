package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

// tenants are the tenants, and the one thing in which they differ.
var tenants = []struct {
	name      string
	isolation tenancy.Isolation
	dense     bool // shares the pool of its isolation
	moves     bool // from a pool of its own to the shared one, and back
}{
	{name: "acme", isolation: tenancy.IsolationSchema},
	{name: "globex", isolation: tenancy.IsolationDatabase},
	{name: "initech", isolation: tenancy.IsolationShared},
	{name: "hooli", isolation: tenancy.IsolationSchema, dense: true},
	{name: "pied-piper", isolation: tenancy.IsolationShared, dense: true},
	{name: "rover", isolation: tenancy.IsolationSchema, moves: true},
}

// fleet is a PostgreSQL that ends with the program, and a node of a service.
type fleet struct {
	server *pgembed.Server
	node   *tenancy.Tenancy
	rover  tenancy.ID
}

// openFleet starts PostgreSQL, sets the library up on it and opens the node.
func openFleet(ctx context.Context) (*fleet, error) {
	server, err := pgembed.Start(ctx, pgembed.Options{Download: true, Own: true})
	if err != nil {
		return nil, err
	}
	f := &fleet{server: server}
	if err := f.open(ctx); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func (f *fleet) open(ctx context.Context) error {
	key, err := tenancy.NewKey("hybrid")
	if err != nil {
		return err
	}
	cfg := tenancy.Config{PrimaryURL: f.loginURL("hybrid_catalog", "hybrid_primary"), Migrations: migrations}
	if cfg.Keys, err = tenancy.ParseKeyring(key); err != nil {
		return err
	}
	if err := tenancy.Init(ctx, tenancy.AdminConfig{AdminURL: f.server.URL(), PrimaryURL: cfg.PrimaryURL, Keys: cfg.Keys, TenantDatabases: true,
		Server: tenancy.ServerConfig{URL: f.loginURL("hybrid_provisioner", "hybrid_tenants")}}); err != nil {
		return err
	}
	f.node, err = tenancy.Open(ctx, cfg)
	return err
}

// loginURL is the way of a login, with a new password, to a database of the server.
func (f *fleet) loginURL(login, database string) string {
	u, err := url.Parse(f.server.URL())
	if err != nil {
		panic("the server's own URL cannot be parsed")
	}
	u.User, u.Path = url.UserPassword(login, rand.Text()), "/"+database
	return u.String()
}

// provision makes the tenants, each with its isolation. A user who is named as the tenant belongs to it.
func (f *fleet) provision(ctx context.Context, out io.Writer) error {
	for _, t := range tenants {
		began := time.Now()
		made, err := f.node.Catalog().Create(ctx, tenancy.NewTenant{Name: t.name, Isolation: t.isolation, Admin: tenancy.UserKey(t.name)})
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%-10s  %-8s  created in %v", t.name, t.isolation, time.Since(began).Round(time.Millisecond))
		if t.dense {
			began = time.Now()
			if err := f.node.Catalog().SetDense(ctx, made.ID, true); err != nil {
				return err
			}
			fmt.Fprintf(out, ", in the shared pool after %v", time.Since(began).Round(time.Millisecond))
		}
		fmt.Fprintln(out)
		if t.moves {
			f.rover = made.ID
		}
	}
	return nil
}

// move has the rover change its pool until ctx ends. A move that has begun is finished.
func (f *fleet) move(ctx context.Context, out io.Writer) error {
	for dense := true; ; dense = !dense {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(300 * time.Millisecond):
		}
		to, began := "to the shared pool", time.Now()
		if !dense {
			to = "to a pool of its own"
		}
		if err := f.node.Catalog().SetDense(context.WithoutCancel(ctx), f.rover, dense); err != nil {
			return err
		}
		fmt.Fprintf(out, "rover       moved %s in %v\n", to, time.Since(began).Round(time.Millisecond))
	}
}

// sessions are those of each login, as PostgreSQL lists them.
func (f *fleet) sessions(ctx context.Context) (map[string]int, error) {
	admin, err := pgx.Connect(ctx, f.server.URL())
	if err != nil {
		return nil, err
	}
	defer func() { _ = admin.Close(context.WithoutCancel(ctx)) }()
	rows, _ := admin.Query(ctx, `SELECT usename, count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' GROUP BY usename`)
	of := map[string]int{}
	var login string
	var n int
	_, err = pgx.ForEachRow(rows, []any{&login, &n}, func() error { of[login] = n; return nil })
	return of, err
}

// close ends the node and the server. Nothing is left.
func (f *fleet) close() error {
	var err error
	if f.node != nil {
		err = f.node.Close()
	}
	return errors.Join(err, f.server.Stop())
}
