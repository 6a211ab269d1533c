// Quickstart is a small notes service in which every tenant has notes of its own.
//
//	go run ./examples/quickstart -addr 127.0.0.1:8080
//
// Each tenant has a schema, with -isolation database a database, or with -isolation shared its rows in one schema. The service is the same.
//
// This file is what the library asks of a service, notes.go is the service, and database.go
// stands in for the PostgreSQL and the secret store that a service has anyway.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"embed"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

//go:embed migrations/*.sql
var migrations embed.FS

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`host:port` to listen on")
	url := flag.String("database", "", "administrator's `URL` of a PostgreSQL to use; default: a throw-away one of its own")
	isolation := flag.String("isolation", string(tenancy.IsolationSchema), "what each tenant has of its own: schema, database, or shared for rows in one schema")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, *addr, *url, tenancy.Isolation(*isolation))
	if err == nil || ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return
	}
	fmt.Fprintln(os.Stderr, "quickstart:", err)
	if errors.Is(err, errUsage) {
		os.Exit(2)
	}
	os.Exit(1)
}

func run(ctx context.Context, addr, adminURL string, isolation tenancy.Isolation) (err error) {
	listener, err := net.Listen("tcp", addr) // first: a taken address is found out before anything is made
	if err != nil {
		return err
	}
	defer listener.Close()
	db, err := openDatabase(ctx, adminURL, isolation)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.stop()) }()

	tn, err := tenancy.Open(ctx, tenancy.Config{PrimaryURL: db.primaryURL, Keys: db.keys, Migrations: migrations, Isolation: isolation})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tn.Close()) }()
	if err := prepareTenants(ctx, tn); err != nil {
		return err
	}
	handler, err := newHandler(tn)
	if err != nil {
		return err
	}
	return serve(ctx, listener, handler, func() { greet(listener.Addr(), db) })
}

// prepareTenants creates the tenants of the demo. In a real service this is a sign-up or an operator.
func prepareTenants(ctx context.Context, tn *tenancy.Tenancy) error {
	const carol = "carol@both.test"
	c := tn.Catalog()
	for _, n := range []tenancy.NewTenant{{Name: "acme", Admin: "alice@acme.test"}, {Name: "globex", Admin: "bob@globex.test"}} {
		// Create finishes what an earlier start left half-made; what exists is not touched.
		_, err := c.Create(ctx, n)
		if err != nil && !errors.Is(err, tenancy.ErrTenantExists) {
			return err
		}
		t, err := c.TenantByName(ctx, n.Name)
		if err != nil {
			return err
		}
		if err := c.AddMember(ctx, tenancy.Membership{User: carol, Tenant: t.ID}); err != nil {
			return err
		}
	}
	if err := c.SetDefault(ctx, carol, 0); err != nil { // she has to say for which of hers a request is
		return err
	}
	// Open never migrates tenants: the service says when. With many tenants that is a step of the deployment.
	_, err := tn.Migrator().All(ctx)
	return err
}

func newHandler(tn *tenancy.Tenancy) (http.Handler, error) {
	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(basicAuth), tenantmw.WithChallenge(`Basic realm="notes", charset="UTF-8"`),
		tenantmw.WithContributors(tenantmw.Subdomain("{tenant}.localhost"), tenantmw.Header("X-Tenant")))
	if err != nil {
		return nil, err
	}
	n := notes{db: tn.DB(), fail: mw.Error}
	r := chi.NewRouter()
	r.Use(mw.Tenant, mw.RequireTenant) // from here on, every request has a user and a tenant
	r.Get("/notes", n.list)
	r.Post("/notes", n.add)
	r.Get("/whoami", whoami)
	return r, nil
}

// basicAuth stands in for the service's own authentication: every user's password is "demo".
func basicAuth(r *http.Request) (tenancy.UserKey, error) {
	user, password, ok := r.BasicAuth()
	if !ok {
		return "", nil // nobody yet, which RequireTenant refuses
	}
	given, want := sha256.Sum256([]byte(password)), sha256.Sum256([]byte("demo"))
	if subtle.ConstantTimeCompare(given[:], want[:]) != 1 {
		return "", errors.New("wrong password")
	}
	return tenancy.UserKey(strings.ToLower(user)), nil // keys are compared byte by byte
}

// serve answers requests until ctx ends, then lets those under way finish.
func serve(ctx context.Context, l net.Listener, h http.Handler, ready func()) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	ready()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(server.Shutdown(drain), server.Close())
}
