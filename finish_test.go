package tenancy_test

import (
	"context"
	"errors"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestAStockedCreateThatFailedIsFinishedAsItBegan lets Creates fail in their seeds, and has nodes with other settings, and Restore, come to what they left.
func TestAStockedCreateThatFailedIsFinishedAsItBegan(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	broken := errors.New("the template is broken")
	seed := func(context.Context, tenancy.Tenant, pgx.Tx) error { return broken }
	later := fstest.MapFS{"00001_notes.sql": seedMigrations["00001_notes.sql"], "00002_more.sql": {Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN more int;\n")}}
	cfg := tenancy.Config{Migrations: seedMigrations, Isolation: tenancy.IsolationSchema, Stock: 2, ValidityCron: "@every 10h"}
	failing := cfg
	failing.Seed = seed
	one := f.Open(t, failing)
	awaitStock(t, f, 2)
	c := one.Catalog()
	var ids []tenancy.ID
	for _, name := range []string{"acme", "globex"} {
		_, err := c.Create(t.Context(), tenancy.NewTenant{Name: name})
		wantError(t, err, broken)
		ids = append(ids, mustTenant(t, one, name).ID)
	}
	primary := f.Admin(t, "primary")
	refresh := func(cfg tenancy.Config) error {
		cfg.Stock = 0
		tn := f.Open(t, cfg)
		must(t, primary, `UPDATE tenancy.tenants SET updated = updated - interval '1 hour'`)
		return tn.Refresh(t.Context())
	}
	state := func(name string, want tenancy.State) {
		t.Helper()
		if got := mustTenant(t, one, name).State; got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}

	// A node that has no seed would leave it out.
	if err := refresh(cfg); err != nil {
		t.Fatal(err)
	}
	state("acme", tenancy.StateProvisioning)
	// What was never in service is not restored.
	if err := c.Delete(t.Context(), ids[1]); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.Restore(t.Context(), ids[1]), tenancy.ErrTenantNotReady)
	state("globex", tenancy.StateProvisioning)
	// A newer release finishes both, at its own version.
	newer := cfg
	newer.Migrations, newer.Seed = later, firstNote
	if err := refresh(newer); err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"acme", "globex"} {
		state(name, tenancy.StateActive)
		if got := versionIn(t, f, ids[i]); got != 2 {
			t.Errorf("%s is at version %d", name, got)
		}
		if n := scan[int](t, f.Admin(t, "tenants"), "SELECT count(*) FROM "+placeBriefly(t, f, ids[i]).table("notes")); n != 1 {
			t.Errorf("%s begins with %d rows", name, n)
		}
	}
}

// TestAnAdoptedTenantIsNotSeeded, and takes no place of the stock.
func TestAnAdoptedTenantIsNotSeeded(t *testing.T) {
	t.Parallel()
	s := newOldService(t, 1)
	tn := s.Open(t, tenancy.Config{Migrations: shopMigrations(later), Isolation: tenancy.IsolationSchema, Extensions: true,
		Seed: func(context.Context, tenancy.Tenant, pgx.Tx) error {
			return errors.New("the customer's data was seeded")
		}})
	prepare(t, s.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema}), 0, "")
	status, err := tn.Migrator().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	must(t, s.Admin(t, "primary"), `UPDATE tenancy.data_sources SET stocked = true, version = $1`, status.Newest) // as if it were ready
	acme, err := tn.Catalog().Adopt(t.Context(), s.adoption("acme"))
	if err != nil {
		t.Fatal(err)
	}
	if n := scan[int](t, s.Admin(t, "primary"), `SELECT count(*) FROM tenancy.data_sources WHERE stocked AND state = 'made'`); n != 1 || acme.State != tenancy.StateActive {
		t.Errorf("%d places are in the stock, and the tenant is %s", n, acme.State)
	}
}

// TestAnOldReceiptPurgesNobody: it stays where somebody has brought a tenant back by hand.
func TestAnOldReceiptPurgesNobody(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	primary := f.Admin(t, "primary")
	must(t, primary, `UPDATE tenancy.tenants SET receipt = '{}' WHERE id = $1`, acme.ID)
	if err := tn.Catalog().Delete(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	must(t, primary, `UPDATE tenancy.tenants SET updated = updated - interval '1 hour'`)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := mustTenant(t, tn, "acme").State; got != tenancy.StateDeleted {
		t.Errorf("the tenant is %s", got)
	}
}

// TestAPurgeThatDiedIsFinishedByTheJob, in its quarantine too: what is left is not all of the tenant.
func TestAPurgeThatDiedIsFinishedByTheJob(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	primary, c := f.Admin(t, "primary"), tn.Catalog()
	place := placeOf(t, f, acme.ID)
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := c.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	must(t, f.Admin(t, "tenants"), "DROP TABLE "+place.table("notes"))
	must(t, primary, `UPDATE tenancy.tenants SET receipt = '{"tables": {"1": 1}}' WHERE id = $1`, acme.ID)
	must(t, primary, `UPDATE tenancy.tenants SET updated = updated - interval '1 hour'`)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[tenancy.ID]tenancy.State{acme.ID: tenancy.StatePurged, globex.ID: tenancy.StateDeleted} {
		if got, err := c.Tenant(t.Context(), id); err != nil || got.State != want {
			t.Errorf("tenant %d is %s, want %s, %v", id, got.State, want, err)
		}
	}
	until(t, 5*time.Second, "0", func() string {
		return ask[string](t, f, "tenants", `SELECT count(*)::text FROM pg_roles WHERE starts_with(rolname, $1)`, place.Schema)
	})
}
