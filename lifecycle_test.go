package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestAVerbEndsWithItsLock takes the lock's session away while a Resume waits for the server, lets another
// node delete the tenant, and checks that the Resume does not bring it back.
func TestAVerbEndsWithItsLock(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	other := f.Open(t, tenancy.Config{})
	c := tn.Catalog()
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	login := placeOf(t, f, acme.ID).Login
	tenants, primary := f.Admin(t, "tenants"), f.Admin(t, "primary")
	// Whoever holds the role's row makes the Resume wait in the middle.
	blocker, err := f.Admin(t, "tenants").Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blocker.Exec(t.Context(), `ALTER ROLE `+login+` CONNECTION LIMIT 50`); err != nil {
		t.Fatal(err)
	}
	resumed := make(chan error, 1)
	go func() { resumed <- c.Resume(t.Context(), acme.ID) }()
	until(t, 5*time.Second, "1", func() string {
		var n int
		if err := tenants.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tenancy provisioner' AND wait_event_type = 'Lock' AND datname = current_database()`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(n)
	})
	if _, err := primary.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`); err != nil {
		t.Fatal(err)
	}
	deleted := make(chan error, 1)
	go func() { deleted <- other.Catalog().Delete(t.Context(), acme.ID) }()
	if err := <-resumed; err == nil {
		t.Error("a Resume without its lock succeeded")
	}
	if err := blocker.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-deleted; err != nil {
		t.Fatal(err)
	}
	if got, err := c.Tenant(t.Context(), acme.ID); err != nil || got.State != tenancy.StateDeleted {
		t.Errorf("the tenant is %s, %v", got.State, err)
	}
}

// TestAVerbIsPatientWithALock: what it waits for longer than one statement may is asked for again.
func TestAVerbIsPatientWithALock(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c, tenants := tn.Catalog(), f.Admin(t, "tenants")
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	login := placeOf(t, f, acme.ID).Login
	blocker, err := f.Admin(t, "tenants").Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blocker.Exec(t.Context(), `ALTER ROLE `+login+` CONNECTION LIMIT 50`); err != nil {
		t.Fatal(err)
	}
	resumed := make(chan error, 1)
	go func() { resumed <- c.Resume(t.Context(), acme.ID) }()
	tries := map[time.Time]bool{}
	until(t, 10*time.Second, "2", func() string {
		rows, _ := tenants.Query(t.Context(), `SELECT query_start FROM pg_stat_activity WHERE application_name = 'tenancy provisioner' AND wait_event_type = 'Lock' AND datname = current_database()`)
		began, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range began {
			tries[at] = true
		}
		return fmt.Sprint(len(tries))
	})
	if err := blocker.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-resumed; err != nil {
		t.Error(err)
	}
	wantOpen(t, tenants, login)
}

// TestAFenceGoesOnPastADeadPlace: the place that a tenant has left belongs to a server nobody can reach any more.
func TestAFenceGoesOnPastADeadPlace(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c := tn.Catalog()
	old := placeOf(t, f, acme.ID)
	place, err := c.Prepare(t.Context(), acme.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(t.Context(), acme.ID, place); err != nil {
		t.Fatal(err)
	}
	must(t, f.Admin(t, "primary"), `WITH s AS (INSERT INTO tenancy.servers (name, host, port, database) VALUES ('dead', '127.0.0.1', 1, 'dead') RETURNING id)
		UPDATE tenancy.data_sources SET server = s.id FROM s WHERE schema = $1`, old.Schema)
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tn.DB().Exec(ctx, `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); !errors.Is(err, tenancy.ErrNoProvisioner) {
		t.Errorf("suspend: %v, want ErrNoProvisioner for the place that is out of reach", err)
	}
	var open bool
	var sessions int
	if err := f.Admin(t, "tenants").QueryRow(t.Context(), `SELECT rolcanlogin, (SELECT count(*) FROM pg_stat_activity WHERE usename = rolname) FROM pg_roles WHERE rolname = $1`, place.User).Scan(&open, &sessions); err != nil {
		t.Fatal(err)
	}
	if open || sessions > 0 {
		t.Errorf("the place in use was not fenced: login open %v, %d sessions", open, sessions)
	}
}

func TestAPreparedPlaceCanBeTakenAfterASuspensionOrDropped(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c := tn.Catalog()
	place, err := c.Prepare(t.Context(), acme.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(t.Context(), acme.ID, place); err != nil {
		t.Fatalf("moving a suspended tenant: %v", err)
	}
	if err := c.Resume(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	var schema string
	if err := tn.DB().QueryRow(ctx, `SELECT current_schema()`).Scan(&schema); err != nil || schema != place.Schema {
		t.Errorf("in schema %q, %v; want %q", schema, err, place.Schema)
	}
	if err := c.DropPlace(t.Context(), place); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("dropping a place in use: %v, want ErrInvalid", err)
	}
	unused, err := c.Prepare(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.DropPlace(t.Context(), unused); err != nil {
		t.Fatal(err)
	}
	var left int
	if err := f.Admin(t, "tenants").QueryRow(t.Context(), `SELECT (SELECT count(*) FROM pg_namespace WHERE nspname = $1) + (SELECT count(*) FROM pg_roles WHERE rolname LIKE $1 || '%')`, unused.Schema).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d things are left of a dropped place, %v", left, err)
	}
}

// TestVerbsDoNotDeadlock runs the verbs that lock rows, users and the epoch against each other.
func TestVerbsDoNotDeadlock(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Limits: tenancy.Limits{Provisions: 1}})
	c := tn.Catalog()
	first := tenancytest.Create(t, tn, "first")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.AddMember(ctx, tenancy.Membership{User: "alice", Tenant: first.ID}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	busy := func(verb func() error) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := verb(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	busy(func() error { return c.AddMember(ctx, tenancy.Membership{User: "alice", Tenant: first.ID}) })
	busy(func() error { return c.SetDefault(ctx, "alice", first.ID) })
	busy(func() error { _, err := tn.Migrator().All(ctx); return err })
	var made sync.WaitGroup
	for i := range 6 {
		made.Go(func() {
			name := fmt.Sprintf("t%d", i)
			n := tenancy.NewTenant{Name: name, Admin: "alice", Domains: []string{"b." + name + ".test", "a." + name + ".test"}}
			var both sync.WaitGroup
			for range 2 { // the same request twice, at once
				both.Go(func() {
					if _, err := c.Create(ctx, n); err != nil && !errors.Is(err, tenancy.ErrTenantExists) {
						t.Error(err)
					}
				})
			}
			both.Wait()
		})
	}
	made.Wait()
	close(stop)
	wg.Wait()
}

func TestAnOutageHidesNoChangeFromARegistry(t *testing.T) {
	t.Parallel()
	f, setup, acme, _ := twoTenants(t, tenancy.Config{})
	way := startProxy(t, f.PrimaryURL)
	cut := *f
	cut.PrimaryURL = way.url
	tn := cut.Open(t, tenancy.Config{Lookups: tenancy.LookupConfig{StaleGrace: 5 * time.Second}})
	r, live := newWorkers(t, tn, tenancy.BuildFirst)
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Use(ctx, func(*worker) error { return nil }); err != nil {
		t.Fatal(err)
	}
	way.cut()
	if err := setup.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "true", func() string {
		time.Sleep(20 * time.Millisecond)
		return fmt.Sprint(errors.Is(r.Use(ctx, func(*worker) error { return nil }), tenancy.ErrPrimaryUnavailable))
	})
	way.mend()
	until(t, 5*time.Second, "0", func() string { return fmt.Sprint(live.Load()) })
}

func TestNoNewSessionsWhileShuttingDown(t *testing.T) {
	t.Parallel()
	_, tn, acme, _ := twoTenants(t, tenancy.Config{})
	r, _ := newWorkers(t, tn, tenancy.BuildFirst)
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	l, err := r.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- tn.Close() }()
	until(t, 5*time.Second, "true", func() string {
		_, err := tn.Enter(t.Context(), acme.ID)
		return fmt.Sprint(errors.Is(err, tenancy.ErrClosed))
	})
	if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "alice@acme.test"}); !errors.Is(err, tenancy.ErrClosed) {
		t.Errorf("resolve during the drain: %v, want ErrClosed", err)
	}
	if _, err := tn.DB().Exec(ctx, `SELECT 1`); err != nil {
		t.Errorf("work of a session that exists, during the drain: %v", err)
	}
	l.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := tn.Catalog().Tenant(t.Context(), acme.ID); !errors.Is(err, tenancy.ErrClosed) || errors.Is(err, tenancy.ErrPrimaryUnavailable) {
		t.Errorf("a verb after Close: %v, want ErrClosed", err)
	}
}

func TestInitKeepsTheProvisionerAndThePrimaryApart(t *testing.T) {
	t.Parallel()
	f, _, _, _ := twoTenants(t, tenancy.Config{})
	a := f.AdminConfig()
	a.Server.URL = strings.Replace(f.ServerURL, "_provisioner:", "_other:", 1)
	if err := tenancy.Init(t.Context(), a); !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "only its password can change") {
		t.Errorf("another provisioner for a server with tenants: %v", err)
	}
	a = f.AdminConfig()
	a.Server.URL = strings.Replace(strings.Replace(f.ServerURL, "127.0.0.1", "localhost", 1), "_tenants", "_primary", 1)
	if err := tenancy.Init(t.Context(), a); !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "databases of their own") {
		t.Errorf("the primary as the tenants' database, by another address: %v", err)
	}
}

func TestASuspensionLetsATransactionFinish(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	suspended := make(chan error, 1)
	go func() { suspended <- tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}) }()
	admin := f.Admin(t, "tenants")
	until(t, 5*time.Second, "false", func() string { // the fence is up
		var open bool
		if err := admin.QueryRow(t.Context(), `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, placeOf(t, f, acme.ID).Login).Scan(&open); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(open)
	})
	if _, err := tn.DB().Exec(ctx, `SELECT 1`); !errors.Is(err, tenancy.ErrTenantSuspended) {
		t.Errorf("new work during the drain: %v", err)
	}
	if _, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ('acme', 'just in time')`); err != nil {
		t.Errorf("work in flight during the drain: %v", err)
	}
	if err := tx.Commit(ctx); err != nil {
		t.Errorf("its commit: %v", err)
	}
	if err := <-suspended; err != nil {
		t.Error(err)
	}
	var sessions int
	if err := admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, placeOf(t, f, acme.ID).Login).Scan(&sessions); err != nil || sessions != 0 {
		t.Errorf("%d sessions are left, %v", sessions, err)
	}
}

// TestAHalfDoneResumeIsFencedAgain dies after the login was opened, as a Resume whose last write fails does.
func TestAHalfDoneResumeIsFencedAgain(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().Restore(t.Context(), acme.ID); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("restoring a tenant that is suspended: %v", err)
	}
	primary := f.Admin(t, "primary")
	must(t, primary, `CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$`)
	must(t, primary, `CREATE TRIGGER refuse BEFORE UPDATE ON tenancy.tenants FOR EACH ROW WHEN (NEW.state = 'active') EXECUTE FUNCTION public.refuse()`)
	if err := tn.Catalog().Resume(t.Context(), acme.ID); err == nil {
		t.Fatal("the Resume succeeded")
	}
	open := func() (open bool) {
		if err := f.Admin(t, "tenants").QueryRow(t.Context(), `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, placeOf(t, f, acme.ID).Login).Scan(&open); err != nil {
			t.Fatal(err)
		}
		return open
	}
	if !open() {
		t.Fatal("the login was not opened: there is nothing to fence")
	}
	must(t, primary, `UPDATE tenancy.tenants SET updated = updated - interval '1 hour' WHERE state = 'suspended'`) // the job leaves fresh verbs alone
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if open() {
		t.Error("the validity job left the login open")
	}
}

func TestAServersNameIsItsOwn(t *testing.T) {
	t.Parallel()
	f, tn, _, _ := twoTenants(t, tenancy.Config{})
	other := tenancytest.NewFleet(t)
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{Name: "main", URL: other.ServerURL}); !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "belongs to another address") {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{Name: "second", URL: other.ServerURL}); err != nil {
		t.Errorf("a name of its own: %v", err)
	}
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{Name: "whatever", URL: f.ServerURL}); err != nil {
		t.Errorf("a server that is known by its address: %v", err)
	}
}

func TestAListenURLMustLeadToThePrimary(t *testing.T) {
	t.Parallel()
	one, other := tenancytest.NewFleet(t), tenancytest.NewFleet(t)
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: one.PrimaryURL, ListenURL: other.PrimaryURL, Keys: one.Keys})
	if !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "ListenURL") {
		t.Errorf("got %v", err)
	}
	tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: one.PrimaryURL, ListenURL: strings.Replace(one.PrimaryURL, "127.0.0.1", "localhost", 1), Keys: one.Keys})
	if err != nil {
		t.Fatal(err)
	}
	if err := tn.Close(); err != nil {
		t.Error(err)
	}
}

func TestConfigurationPrintsNoPassword(t *testing.T) {
	for _, url := range []string{
		"postgres://u:canary@h/db", "postgres://u:12/canary@h/db", "postgres://u:1#canary@h/db", "postgres://u:1?canary@h/db",
		"host=h password=canary", "postgres://u@h/db?password=canary", "//u:canary@h", "postgres://h/canary@x",
	} {
		for _, v := range []any{tenancy.Config{PrimaryURL: url}, tenancy.AdminConfig{AdminURL: url, PrimaryURL: url, Server: tenancy.ServerConfig{URL: url}}, &tenancy.ServerConfig{URL: url}} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
				if text := fmt.Sprintf(verb, v); strings.Contains(text, "canary") {
					t.Errorf("%s of %T with %s: %s", verb, v, url, text)
				}
			}
		}
	}
}
