package tenancy_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// seedMigrations are noteMigrations with a key that a seed can meet again.
var seedMigrations = fstest.MapFS{"00001_notes.sql": {Data: []byte(`-- +goose Up
CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL, title text NOT NULL, file oid, UNIQUE (tenant, title));
SELECT tenancy_must('notes');
`)}}

// firstNote is a seed that writes one row.
func firstNote(ctx context.Context, t tenancy.Tenant, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'first') ON CONFLICT DO NOTHING`, t.Name)
	return err
}

// TestASeedFillsItsOwnTenantAlone makes two tenants of each model. The seed of the second tries to reach what the first has.
func TestASeedFillsItsOwnTenantAlone(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	var tn *tenancy.Tenancy
	var seeded []string // the creations are one after the other
	var first tenancy.Tenant
	seed := func(ctx context.Context, made tenancy.Tenant, tx pgx.Tx) error {
		seeded = append(seeded, made.Name)
		if made.State != tenancy.StateProvisioning {
			t.Errorf("%s is seeded when it is %s", made.Name, made.State)
		}
		var rows int
		var user string
		if err := tx.QueryRow(ctx, `SELECT count(*), current_user FROM notes`).Scan(&rows, &user); err != nil || rows != 0 {
			t.Errorf("%s begins with %d rows, %v", made.Name, rows, err)
		}
		if place := placeOf(t, f, made.ID); user != place.Login {
			t.Errorf("the seed of %s is %s, want its login %s", made.Name, user, place.Login)
		}
		if _, err := tn.DB().Exec(ctx, `SELECT 1`); !errors.Is(err, tenancy.ErrNoTenant) {
			t.Errorf("the context of a seed: %v, want ErrNoTenant", err)
		}
		refused := func(sql string, args ...any) {
			t.Helper()
			err := pgx.BeginFunc(ctx, tx, func(inner pgx.Tx) error { _, err := inner.Exec(ctx, sql, args...); return err })
			if sqlState(err) != "42501" && sqlState(err) != "42P01" && sqlState(err) != "428C9" {
				t.Errorf("%s: %s: %v", made.Name, sql, err)
			}
		}
		refused(`CREATE TABLE mine (id bigint)`)
		if first.ID != 0 {
			other := placeOf(t, f, first.ID)
			refused(`SET ROLE ` + other.Login)
			if made.Isolation == tenancy.IsolationShared {
				refused(`INSERT INTO notes (tenant_id, tenant, title) VALUES ($1, 'x', 'x')`, first.ID)
			} else {
				refused(`SELECT FROM ` + other.table("notes"))
				refused(`INSERT INTO ` + other.table("notes") + ` (tenant, title) VALUES ('x', 'x')`)
			}
		}
		_, err := tx.Exec(ctx, `INSERT INTO notes (tenant, title, file) VALUES ($1, 'first', lo_from_bytea(0, 'large'))`, made.Name)
		return err
	}
	tn = f.Open(t, tenancy.Config{Migrations: seedMigrations, Seed: seed})
	dense := f.Open(t, tenancy.Config{Migrations: seedMigrations, Seed: seed, Dense: true})
	models := []struct {
		name      string
		node      *tenancy.Tenancy
		isolation tenancy.Isolation
	}{{"schema", tn, tenancy.IsolationSchema}, {"database", tn, tenancy.IsolationDatabase}, {"shared", tn, tenancy.IsolationShared},
		{"dense-schema", dense, tenancy.IsolationSchema}, {"dense-shared", dense, tenancy.IsolationShared}}
	for _, m := range models {
		first = tenancy.Tenant{}
		ctx := t.Context()
		for _, name := range []string{"acme-" + m.name, "globex-" + m.name} {
			made, err := m.node.Catalog().Create(ctx, tenancy.NewTenant{Name: name, Isolation: m.isolation})
			if err != nil {
				t.Fatal(err)
			}
			if made.Dense != (m.node == dense) {
				t.Errorf("%s: dense is %t", name, made.Dense)
			}
			if _, err := m.node.Catalog().Create(ctx, tenancy.NewTenant{Name: name, Isolation: m.isolation}); !errors.Is(err, tenancy.ErrTenantExists) {
				t.Errorf("%s again: %v", name, err)
			}
			first = made
			ctx = tenancytest.Context(t, m.node, name) // the second is made by somebody who is in the first
		}
		for _, name := range []string{"acme-" + m.name, "globex-" + m.name} {
			var got, file string
			err := m.node.DB().QueryRow(tenancytest.Context(t, m.node, name), `SELECT string_agg(tenant, ','), string_agg(convert_from(lo_get(file), 'UTF8'), ',') FROM notes`).Scan(&got, &file)
			if err != nil || got != name || file != "large" {
				t.Errorf("%s reads the rows of %q and the file %q, %v", name, got, file, err)
			}
		}
	}
	if len(seeded) != 2*len(models) {
		t.Errorf("seeds ran for %q", seeded)
	}
}

// TestASeedThatFailsIsTriedAgain has it fail in each way; after each the tenant is not served and has no row.
func TestASeedThatFailsIsTriedAgain(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := errors.New("no such template")
	started := make(chan struct{})
	var fail func(ctx context.Context, tx pgx.Tx) error
	runs := 0
	tn := f.Open(t, tenancy.Config{Migrations: seedMigrations, Seed: func(ctx context.Context, made tenancy.Tenant, tx pgx.Tx) error {
		runs++
		if err := firstNote(ctx, made, tx); err != nil || fail == nil {
			return err
		}
		return fail(ctx, tx)
	}})
	c, primary := tn.Catalog(), f.Admin(t, "primary")
	create(t, f, tn, "globex")
	rows := func(id tenancy.ID) int {
		return scan[int](t, f.Admin(t, "tenants"), `SELECT count(*) FROM `+placeOf(t, f, id).table("notes"))
	}
	ctx, cancel := context.WithCancel(t.Context())
	ways := []struct {
		name string
		fail func(ctx context.Context, tx pgx.Tx) error
		ok   func(err error) bool
	}{
		{"an_error", func(context.Context, pgx.Tx) error { return broken }, func(err error) bool { return errors.Is(err, broken) }},
		{"of_the_server", func(ctx context.Context, tx pgx.Tx) error { _, err := tx.Exec(ctx, `SELECT 1 / 0`); return err }, func(err error) bool { return sqlState(err) == "22012" }},
		{"a_panic", func(context.Context, pgx.Tx) error { panic(broken) }, func(err error) bool { return errors.Is(err, broken) }},
		{"a_broken_connection", func(ctx context.Context, tx pgx.Tx) error { return tx.Conn().Close(ctx) }, func(err error) bool { return err != nil }},
		{"a_caller_who_leaves", func(ctx context.Context, tx pgx.Tx) error {
			close(started)
			_, err := tx.Exec(ctx, `SELECT pg_sleep(60)`)
			return err
		}, func(err error) bool { return errors.Is(err, context.Canceled) }},
	}
	go func() { <-started; cancel() }()
	for _, way := range ways {
		fail = way.fail
		_, err := c.Create(ctx, tenancy.NewTenant{Name: "acme"})
		if !way.ok(err) {
			t.Errorf("%s: %v", way.name, err)
		}
		made := mustTenant(t, tn, "acme")
		if made.State != tenancy.StateProvisioning || rows(made.ID) != 0 {
			t.Errorf("%s: it is %s and has %d rows", way.name, made.State, rows(made.ID))
		}
		wantError(t, second(tn.Enter(t.Context(), made.ID)), tenancy.ErrTenantNotReady)
	}

	// The process dies between the commit and the record of it: the primary does not take the record.
	fail = nil
	must(t, primary, `CREATE FUNCTION public.die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'died'; END $$`)
	must(t, primary, `CREATE TRIGGER die BEFORE UPDATE ON tenancy.tenants FOR EACH ROW WHEN (NEW.state = 'active') EXECUTE FUNCTION public.die()`)
	if _, err := c.Create(t.Context(), tenancy.NewTenant{Name: "acme"}); sqlState(err) != "P0001" {
		t.Fatalf("the record was written: %v", err)
	}
	id, before := mustTenant(t, tn, "acme").ID, runs
	if rows(id) != 1 {
		t.Fatalf("%d rows are committed: this test shows nothing", rows(id))
	}
	must(t, primary, `DROP FUNCTION public.die() CASCADE`)
	if _, err := c.Create(t.Context(), tenancy.NewTenant{Name: "acme"}); err != nil || runs != before+1 || rows(id) != 1 {
		t.Errorf("%v; it ran %d times more and there are %d rows", err, runs-before, rows(id))
	}
}

// TestASeedIsTheTenantsAndNotThePlaces: a place is made without it, and filled when a tenant is made on it; one to move to is not filled.
func TestASeedIsTheTenantsAndNotThePlaces(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	var seeded []string
	cfg := tenancy.Config{Migrations: seedMigrations, Seed: func(ctx context.Context, made tenancy.Tenant, tx pgx.Tx) error {
		seeded = append(seeded, made.Name)
		return firstNote(ctx, made, tx)
	}}
	tn := f.Open(t, cfg)
	c, ctx := tn.Catalog(), t.Context()
	d, err := c.Prepare(ctx, 0, "")
	if err != nil || len(seeded) != 0 {
		t.Fatalf("%v, and seeded were %q", err, seeded)
	}
	acme, err := c.Create(ctx, tenancy.NewTenant{Name: "acme", DataSource: &d})
	if err != nil {
		t.Fatal(err)
	}
	conn := login(t, tn, acme.ID)
	if got := scan[string](t, conn, `SELECT tenant FROM notes`); got != "acme" {
		t.Errorf("the row is of %q", got)
	}
	_ = conn.Close(ctx) // or the move would wait for it
	to, err := c.Prepare(ctx, acme.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(ctx, acme.ID, to); err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, login(t, tn, acme.ID), `SELECT count(*) FROM notes`); n != 0 {
		t.Errorf("%d rows are in the place that it moved to", n)
	}
	if _, err := tn.Migrator().Tenant(ctx, acme.ID); err != nil || !slices.Equal(seeded, []string{"acme"}) {
		t.Errorf("%v; seeds ran for %q", err, seeded)
	}

	alone := tenancytest.NewFleet(t)
	cfg.SingleTenant = "main"
	single := alone.Open(t, cfg)
	if got := scan[string](t, login(t, single, mustTenant(t, single, "main").ID), `SELECT tenant FROM notes`); got != "main" {
		t.Errorf("the single tenant's row is of %q", got)
	}
}
