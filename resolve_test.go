package tenancy_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// twoTenants makes acme with alice, globex with bob, and carol in both.
func twoTenants(t *testing.T, cfg tenancy.Config) (f *tenancytest.Fleet, tn *tenancy.Tenancy, acme, globex tenancy.Tenant) {
	t.Helper()
	f = tenancytest.NewFleet(t)
	cfg.Migrations = noteMigrations
	tn = f.Open(t, cfg)
	for name, user := range map[string]tenancy.UserKey{"acme": "alice@acme.test", "globex": "bob@globex.test"} {
		made, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Admin: user, Domains: []string{name + ".example.com"}})
		if err != nil {
			t.Fatal(err)
		}
		if name == "acme" {
			acme = made
		} else {
			globex = made
		}
	}
	return f, tn, acme, globex
}

func TestResolveFollowsTheRules(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss"}})
	c := tn.Catalog()
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := c.AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: id}); err != nil {
			t.Fatal(err)
		}
		if err := c.AddMember(t.Context(), tenancy.Membership{User: "dave", Tenant: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.SetDefault(t.Context(), "carol", globex.ID); err != nil {
		t.Fatal(err)
	}
	place := func(name string) tenancy.Hint {
		return tenancy.Hint{Source: "path", Trust: tenancy.Place, By: tenancy.ByName, Value: name}
	}
	choice := func(name string) tenancy.Hint {
		return tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: name}
	}
	domain := func(name string) tenancy.Hint {
		return tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: name}
	}
	for name, tt := range map[string]struct {
		user  tenancy.UserKey
		hints []tenancy.Hint
		want  string // tenant's name, "host", or
		err   error
	}{
		"a_member_gets_the_default_membership":           {"alice@acme.test", nil, "acme", nil},
		"another_member_gets_another_tenant":             {"bob@globex.test", nil, "globex", nil},
		"a_default_decides_among_several":                {"carol", nil, "globex", nil},
		"a_first_membership_is_the_default":              {"dave", nil, "acme", nil},
		"a_stranger_is_refused":                          {"eve", nil, "", tenancy.ErrForbidden},
		"a_host_manager_is_the_host":                     {"boss", nil, "host", nil},
		"keys_are_compared_byte_by_byte":                 {"Alice@acme.test", nil, "", tenancy.ErrForbidden},
		"a_choice_chooses_among_the_users_own":           {"carol", []tenancy.Hint{choice("acme")}, "acme", nil},
		"a_choice_opens_no_foreign_tenant":               {"alice@acme.test", []tenancy.Hint{choice("globex")}, "", tenancy.ErrForbidden},
		"a_place_opens_no_foreign_tenant":                {"alice@acme.test", []tenancy.Hint{domain("globex.example.com")}, "", tenancy.ErrForbidden},
		"a_missing_tenant_looks_like_a_foreign_one":      {"alice@acme.test", []tenancy.Hint{choice("nowhere")}, "", tenancy.ErrForbidden},
		"hints_that_disagree_are_refused":                {"carol", []tenancy.Hint{place("acme"), choice("globex")}, "", tenancy.ErrForbidden},
		"hints_that_agree_are_one":                       {"carol", []tenancy.Hint{domain("acme.example.com"), choice("acme")}, "acme", nil},
		"a_host_manager_does_not_slip_in":                {"boss", []tenancy.Hint{choice("acme")}, "", tenancy.ErrForbidden},
		"nobody_without_a_place_is_the_host":             {"", nil, "host", nil},
		"nobody_at_a_place_gets_its_tenant":              {"", []tenancy.Hint{domain("ACME.example.com.")}, "acme", nil},
		"nobody_at_an_unknown_place_is_not_found":        {"", []tenancy.Hint{domain("nowhere.example.com")}, "", tenancy.ErrTenantNotFound},
		"nobody_may_choose":                              {"", []tenancy.Hint{choice("acme")}, "host", nil},
		"nobody_has_no_identity":                         {"", []tenancy.Hint{{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByName, Value: "acme"}}, "host", nil},
		"a_key_that_is_too_long_is_refused":              {tenancy.UserKey(strings.Repeat("x", 257)), nil, "", tenancy.ErrInvalid},
		"a_key_with_a_control_character_is_refused":      {"a\x00b", nil, "", tenancy.ErrInvalid},
		"an_id_of_another_tenant_is_refused":             {"alice@acme.test", []tenancy.Hint{{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByID, Value: "999999"}}, "", tenancy.ErrForbidden},
		"an_empty_hint_is_no_opinion":                    {"alice@acme.test", []tenancy.Hint{choice("")}, "acme", nil},
		"a_name_that_cannot_exist_is_like_a_missing_one": {"alice@acme.test", []tenancy.Hint{choice("../x")}, "", tenancy.ErrForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, err := tn.Resolve(t.Context(), tenancy.Query{User: tt.user, Hints: tt.hints})
			if !errors.Is(err, tt.err) {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			s, ok := tenancy.FromContext(ctx)
			if !ok || s.User() != tt.user {
				t.Fatalf("session %v, of user %q", ok, s.User())
			}
			got := "host"
			if tenant, ok := s.Tenant(); ok {
				got = tenant.Name
			}
			if got != tt.want || s.IsHost() != (tt.want == "host") {
				t.Errorf("got %s (host %v), want %s", got, s.IsHost(), tt.want)
			}
			if s.IsHost() {
				if _, err := tn.DB().Exec(ctx, `SELECT 1`); !errors.Is(err, tenancy.ErrNoTenant) {
					t.Errorf("tenant data under a host session: %v, want ErrNoTenant", err)
				}
			}
		})
	}
	// Without a default a user of several tenants is told which.
	if err := c.RemoveMember(t.Context(), acme.ID, "dave"); err != nil {
		t.Fatal(err)
	}
	if err := c.AddMember(t.Context(), tenancy.Membership{User: "dave", Tenant: acme.ID}); err != nil {
		t.Fatal(err)
	}
	_, err := tn.Resolve(t.Context(), tenancy.Query{User: "dave"})
	var ambiguous *tenancy.AmbiguousError
	if !errors.As(err, &ambiguous) || len(ambiguous.Tenants) != 2 || !errors.Is(err, tenancy.ErrAmbiguousTenant) {
		t.Errorf("two tenants and no default: %v", err)
	}
}

func TestAForgottenMiddlewareIsToldSo(t *testing.T) {
	t.Parallel()
	_, tn, _, _ := twoTenants(t, tenancy.Config{})
	_, err := tn.DB().Exec(context.Background(), `SELECT 1`)
	const want = `tenancy: exec: no tenant on the context: no session: the request did not pass middleware.Tenant, or the context is not the request's (context.Background() in a goroutine: pass tenancy.Detach(r.Context()) instead; in jobs use tn.Enter)`
	if !errors.Is(err, tenancy.ErrNoTenant) || err.Error() != want {
		t.Errorf("got  %v\nwant %v", err, want)
	}
}

func TestWrapResolverReplacesAndWraps(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	_, tn, acme, _ := twoTenants(t, tenancy.Config{WrapResolver: func(next tenancy.TenantResolver) tenancy.TenantResolver {
		return tenancy.TenantResolverFunc(func(ctx context.Context, q tenancy.Query) (tenancy.Resolution, error) {
			calls.Add(1)
			switch q.User {
			case "nobody": // a zero answer is no way in
				return tenancy.Resolution{}, nil
			case "ghost": // a tenant that does not exist
				return tenancy.Resolution{Tenant: 4711}, nil
			}
			return next.ResolveTenant(ctx, q)
		})
	}})
	if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "nobody"}); !errors.Is(err, tenancy.ErrForbidden) {
		t.Errorf("zero resolution: %v, want ErrForbidden", err)
	}
	if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "ghost"}); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("missing tenant: %v, want ErrTenantNotFound", err)
	}
	ctx, err := tn.Resolve(t.Context(), tenancy.Query{User: "alice@acme.test"})
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := tenancy.TenantFrom(ctx); got.ID != acme.ID || calls.Load() != 3 {
		t.Errorf("tenant %d after %d calls", got.ID, calls.Load())
	}
}

// TestTwoPrimariesInOneProcessNeverMix: both fleets have a tenant 1, and neither opens the other's.
func TestTwoPrimariesInOneProcessNeverMix(t *testing.T) {
	t.Parallel()
	_, a, _, _ := twoTenants(t, tenancy.Config{})
	_, b, _, _ := twoTenants(t, tenancy.Config{})
	ctx, err := a.Enter(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.DB().Exec(ctx, `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	if _, err := b.DB().Exec(ctx, `SELECT 1`); !errors.Is(err, tenancy.ErrTenantMismatch) {
		t.Errorf("tenant 1 of one primary at another: %v, want ErrTenantMismatch", err)
	}
	one, err := tenancy.TenantFrom(ctx)
	if err != nil {
		t.Fatal(err)
	}
	other, err := b.Catalog().Tenant(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if one == other {
		t.Error("tenants of two primaries are equal")
	}
}

func TestTheSessionSaysWhoAndTheCatalogWhether(t *testing.T) {
	t.Parallel()
	_, tn, acme, _ := twoTenants(t, tenancy.Config{})
	ctx, err := tn.Resolve(t.Context(), tenancy.Query{User: "alice@acme.test"})
	if err != nil {
		t.Fatal(err)
	}
	detached := tenancy.Detach(ctx)
	if _, err := tn.DB().Exec(detached, `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{Maintenance: true, Message: "back at noon"}); err != nil {
		t.Fatal(err)
	}
	_, err = tn.DB().Exec(detached, `SELECT 1`)
	var e *tenancy.Error
	if !errors.Is(err, tenancy.ErrTenantMaintenance) || !errors.As(err, &e) || e.Message != "back at noon" || e.RetryAfter == 0 {
		t.Errorf("a detached job of a tenant under maintenance: %v", err)
	}
	if _, err := tn.Enter(t.Context(), acme.ID); !errors.Is(err, tenancy.ErrTenantMaintenance) {
		t.Errorf("entering it: %v", err)
	}
	host := tenancy.AsHost(ctx)
	if s, _ := tenancy.FromContext(host); !s.IsHost() || s.User() != "alice@acme.test" {
		t.Error("AsHost keeps the user and removes the tenant")
	}
	if _, err := tn.Host().Exec(host, `SELECT 1`); !errors.Is(err, tenancy.ErrNoHostData) {
		t.Errorf("host data without HostURL: %v", err)
	}
}

func TestHostDataIsReachedThroughHostAlone(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, HostURL: f.AdminURL})
	acme := tenancytest.Create(t, tn, "acme")
	var host, tenant string
	if err := tn.Host().QueryRow(t.Context(), `SELECT current_user`).Scan(&host); err != nil {
		t.Fatal(err)
	}
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := tn.DB().QueryRow(ctx, `SELECT current_user`).Scan(&tenant); err != nil {
		t.Fatal(err)
	}
	if host == tenant || !strings.HasPrefix(tenant, "t_") {
		t.Errorf("host %q, tenant %q", host, tenant)
	}
}

// TestAThousandMissesOfOneUserAreOneLookUp counts at the server.
func TestAThousandMissesOfOneUserAreOneLookUp(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	_, tn, _, _ := twoTenants(t, tenancy.Config{WrapResolver: func(next tenancy.TenantResolver) tenancy.TenantResolver {
		return tenancy.TenantResolverFunc(func(ctx context.Context, q tenancy.Query) (tenancy.Resolution, error) {
			asked.Add(1)
			return next.ResolveTenant(ctx, q)
		})
	}})
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "alice@acme.test"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if loads := tenancy.UserLoads(tn); asked.Load() != 1000 || loads != 1 {
		t.Errorf("%d resolutions were %d look-ups, want 1", asked.Load(), loads)
	}
}

func TestRowsOfTwoTenantsStayApart(t *testing.T) {
	t.Parallel()
	_, tn, _, _ := twoTenants(t, tenancy.Config{})
	tenancytest.NoCrossing(t, tn, func(ctx context.Context) error {
		tenant, err := tenancy.TenantFrom(ctx)
		if err != nil {
			return err
		}
		if _, err := tn.DB().Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'hello')`, tenant.Name); err != nil {
			return err
		}
		rows, _ := tn.DB().Query(ctx, `SELECT DISTINCT tenant FROM notes`)
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if !slices.Equal(names, []string{tenant.Name}) {
			return errors.New("rows of " + strings.Join(names, ", ") + " show in " + tenant.Name)
		}
		return nil
	})
}
