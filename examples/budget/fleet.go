package main

import (
	"context"
	"crypto/rand"
	"embed"
	"errors"
	"fmt"
	"net/url"
	"sync"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

//go:embed migrations/*.sql
var migrations embed.FS

// fleet is a PostgreSQL that ends with the program, a node of a service, and tenants.
type fleet struct {
	server  *pgembed.Server
	cfg     tenancy.Config
	node    *tenancy.Tenancy
	tenants []tenancy.ID // the one that is asked most comes first
}

// openFleet starts PostgreSQL, sets the library up on it and opens the node, which may have conns connections there.
func openFleet(ctx context.Context, conns int) (*fleet, error) {
	server, err := pgembed.Start(ctx, pgembed.Options{Download: true, Own: true, Settings: map[string]string{"max_connections": fmt.Sprint(conns + 150)}})
	if err != nil {
		return nil, err
	}
	f := &fleet{server: server}
	if err := f.open(ctx, conns); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func (f *fleet) open(ctx context.Context, conns int) error {
	key, err := tenancy.NewKey("budget")
	if err != nil {
		return err
	}
	f.cfg = tenancy.Config{
		PrimaryURL: f.loginURL("budget_catalog", "budget_primary"), Migrations: migrations,
		Limits: tenancy.Limits{ServerConns: conns, PrimaryConns: 3}, // by default eight for the primary, of 80
	}
	if f.cfg.Keys, err = tenancy.ParseKeyring(key); err != nil {
		return err
	}
	if err := tenancy.Init(ctx, tenancy.AdminConfig{AdminURL: f.server.URL(), PrimaryURL: f.cfg.PrimaryURL, Keys: f.cfg.Keys,
		Server: tenancy.ServerConfig{URL: f.loginURL("budget_provisioner", "budget_tenants")}}); err != nil {
		return err
	}
	f.node, err = tenancy.Open(ctx, f.cfg)
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

// provision makes n tenants, eight at a time, as an operator's program would that has a budget of its own. The node hears of each.
func (f *fleet) provision(ctx context.Context, n int, made func(done int)) (err error) {
	cfg := f.cfg
	cfg.Limits = tenancy.Limits{ServerConns: 100, Provisions: 8}
	operator, err := tenancy.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, operator.Close()) }()
	f.tenants = make([]tenancy.ID, n)
	var mu sync.Mutex // guards what follows
	var failed error
	var done int
	var wg sync.WaitGroup
	for next := range cfg.Limits.Provisions {
		wg.Go(func() {
			for i := next; i < n; i += cfg.Limits.Provisions {
				t, err := operator.Catalog().Create(ctx, tenancy.NewTenant{Name: fmt.Sprintf("tenant-%04d", i+1)})
				mu.Lock()
				if failed = errors.Join(failed, err); failed == nil {
					f.tenants[i] = t.ID
					done++
					made(done)
				}
				stop := failed != nil
				mu.Unlock()
				if stop {
					return
				}
			}
		})
	}
	wg.Wait()
	return failed
}

// close ends the node and the server. Nothing is left.
func (f *fleet) close() error {
	var err error
	if f.node != nil {
		err = f.node.Close()
	}
	return errors.Join(err, f.server.Stop())
}
