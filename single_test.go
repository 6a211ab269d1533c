package tenancy_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestSingleTenantIsEverything: an installation for one customer runs the code of many.
func TestSingleTenantIsEverything(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	cfg := tenancy.Config{Migrations: noteMigrations, SingleTenant: "main", HostManagers: []tenancy.UserKey{"boss"}}
	tn := f.Open(t, cfg)
	main, err := tn.Catalog().TenantByName(t.Context(), "main")
	if err != nil || main.State != tenancy.StateActive {
		t.Fatalf("Open made %+v, %v", main, err)
	}
	if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "alice", Tenant: main.ID, Role: tenancy.RoleAdmin}); err != nil {
		t.Fatal(err)
	}
	header := tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "acme"}
	domain := tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "notes.customer.test"}
	for _, tt := range []struct {
		name   string
		query  tenancy.Query
		role   tenancy.Role
		caller tenancy.Caller
	}{
		{"a_member_has_the_role", tenancy.Query{User: "alice"}, tenancy.RoleAdmin, tenancy.TenantUser},
		{"every_user_is_in", tenancy.Query{User: "eve"}, tenancy.RoleMember, tenancy.TenantUser},
		{"a_manager_too", tenancy.Query{User: "boss"}, tenancy.RoleMember, tenancy.TenantUser},
		{"nobody_is_a_guest", tenancy.Query{}, "", tenancy.TenantGuest},
		{"hints_mean_nothing", tenancy.Query{User: "eve", Hints: []tenancy.Hint{header, domain}}, tenancy.RoleMember, tenancy.TenantUser},
		{"a_guests_neither", tenancy.Query{Hints: []tenancy.Hint{domain}}, "", tenancy.TenantGuest},
		{"a_claim_may_name_it", tenancy.Query{User: "eve", Hints: []tenancy.Hint{{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByName, Value: "main"}}}, tenancy.RoleMember, tenancy.TenantUser},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, err := tn.Resolve(t.Context(), tt.query)
			if err != nil {
				t.Fatal(err)
			}
			s := sessionIn(t, ctx)
			if tenantIn(t, ctx) != "main" || s.Role() != tt.role || s.Caller() != tt.caller {
				t.Errorf("got %v, %v", s, s.Caller())
			}
			if err := errors.Join(tn.DB().QueryRow(ctx, `SELECT 1`).Scan(new(int)), tn.Check(ctx)); err != nil {
				t.Error(err)
			}
		})
	}
	foreign := tenancy.Query{User: "eve", Hints: []tenancy.Hint{{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByName, Value: "acme"}}}
	if _, err := tn.Resolve(t.Context(), foreign); !errors.Is(err, tenancy.ErrForbidden) {
		t.Errorf("a claim of another tenant: %v", err)
	}
	if _, err := tn.DB().Exec(context.Background(), `SELECT 1`); !errors.Is(err, tenancy.ErrNoTenant) {
		t.Errorf("without a session: %v, want ErrNoTenant here too", err)
	}
	// It is still a tenant: its state counts.
	if err := tn.Catalog().Suspend(t.Context(), main.ID, tenancy.Suspension{Maintenance: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "eve"}); !errors.Is(err, tenancy.ErrTenantMaintenance) {
		t.Errorf("under maintenance: %v", err)
	}
	// A new name in the configuration, or in the catalog, must not open an empty tenant.
	cfg.SingleTenant, cfg.PrimaryURL, cfg.Keys = "other", f.PrimaryURL, f.Keys
	if _, err := tenancy.Open(t.Context(), cfg); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("another name: %v, want ErrInvalid", err)
	}
	// What would end the service at its next start is refused here, and elsewhere found out at that start.
	wantError(t, tn.Catalog().Rename(t.Context(), main.ID, "renamed"), tenancy.ErrInvalid, "the next start")
	_, err = tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "second"})
	wantError(t, err, tenancy.ErrInvalid, "there is no other")
	if err := f.Open(t, tenancy.Config{}).Catalog().Rename(t.Context(), main.ID, "renamed"); err != nil {
		t.Fatal(err)
	}
	cfg.SingleTenant = "main"
	if _, err := tenancy.Open(t.Context(), cfg); !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("its old name: %v, want ErrInvalid", err)
	}
}

// TestSingleTenantIsRefusedAmongOthers: a setting that came to the wrong fleet would let everybody into one tenant.
func TestSingleTenantIsRefusedAmongOthers(t *testing.T) {
	t.Parallel()
	f, _, _, _ := twoTenants(t, tenancy.Config{})
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, SingleTenant: "acme"})
	wantError(t, err, tenancy.ErrInvalid, "1 others")
}

// TestASingleTenantThatIsHalfMadeIsNotOpened: the call that began it has to finish it.
func TestASingleTenantThatIsHalfMadeIsNotOpened(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: fstest.MapFS{"00001_x.sql": {Data: []byte("-- +goose Up\nSELECT 1/0;\n")}}})
	if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "main", Admin: "alice"}); err == nil {
		t.Fatal("the migration did not fail")
	}
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Migrations: noteMigrations, SingleTenant: "main"})
	wantError(t, err, tenancy.ErrTenantNotReady, "call that again")
}

func TestNodesThatStartAtOnceMakeOneSingleTenant(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, Migrations: noteMigrations, SingleTenant: "main"})
			if err != nil {
				t.Error(err)
				return
			}
			if err := tn.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.tenants`); n != 1 {
		t.Errorf("%d tenants, want 1", n)
	}
}
