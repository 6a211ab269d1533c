package tenancy_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestThePrimaryIsAStore runs what every store must pass on the one that is used by default.
func TestThePrimaryIsAStore(t *testing.T) {
	t.Parallel()
	tenancytest.TestStore(t, func(t *testing.T, p tenancytest.Population) tenancy.Store {
		tn := tenancytest.NewFleet(t).Open(t, tenancy.Config{Migrations: noteMigrations})
		c := tn.Catalog()
		for _, in := range p.Tenants {
			made, err := c.Create(t.Context(), tenancy.NewTenant{Name: in.Name, Domains: in.Domains})
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range in.Members {
				m.Tenant = made.ID
				if err := c.AddMember(t.Context(), m); err != nil {
					t.Fatal(err)
				}
			}
			if in.State == tenancy.StateSuspended {
				if err := c.Suspend(t.Context(), made.ID, tenancy.Suspension{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		return c
	})
}

// TestAStoreTellsWhoBelongsWhere: memberships, domains and suspensions come from it, data from the primary's tenants alone.
func TestAStoreTellsWhoBelongsWhere(t *testing.T) {
	t.Parallel()
	store := &tenancytest.Store{}
	_, tn, acme, globex := twoTenants(t, tenancy.Config{Store: store, Lookups: tenancy.LookupConfig{StoreTTL: 100 * time.Millisecond, PollPeriod: 100 * time.Millisecond}})
	store.PutTenant(acme, "acme.test")
	store.PutTenant(globex)
	store.PutMember(tenancy.Membership{User: "zoe", Tenant: acme.ID, Role: tenancy.RoleAdmin, Default: true})
	at := func(domain string) tenancy.Query {
		return tenancy.Query{Hints: []tenancy.Hint{{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: domain}}}
	}
	outcome := func(q tenancy.Query) func() string {
		return func() string {
			ctx, err := tn.Resolve(t.Context(), q)
			if err == nil {
				err = tn.DB().QueryRow(ctx, `SELECT 1`).Scan(new(int))
			}
			if err != nil {
				return class(err)
			}
			return tenantIn(t, ctx)
		}
	}
	zoe, alice := outcome(tenancy.Query{User: "zoe"}), outcome(tenancy.Query{User: "alice@acme.test"})
	until(t, 2*time.Second, "acme", zoe)                        // the first look-ups may have come before the store was filled
	until(t, 2*time.Second, class(tenancy.ErrForbidden), alice) // whom the primary knows, and the store does not
	until(t, 2*time.Second, "acme", outcome(at("acme.test")))
	until(t, 2*time.Second, class(tenancy.ErrTenantNotFound), outcome(at("acme.example.com")))

	suspended := acme
	suspended.State = tenancy.StateSuspended
	store.PutTenant(suspended)
	until(t, 2*time.Second, class(tenancy.ErrTenantSuspended), zoe)
	store.PutTenant(acme)
	until(t, 2*time.Second, "acme", zoe)

	// The store cannot open what the primary has closed.
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if got := zoe(); got != class(tenancy.ErrTenantSuspended) {
		t.Errorf("suspended in the primary: %s", got)
	}
	if err := tn.Catalog().Resume(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}

	// A failure is not an answer.
	store.Fail(errors.New("the directory is down"))
	until(t, 2*time.Second, class(tenancy.ErrPrimaryUnavailable), zoe)
	store.Fail(nil)
	until(t, 2*time.Second, "acme", zoe)

	store.RemoveMember(acme.ID, "zoe")
	until(t, 2*time.Second, class(tenancy.ErrForbidden), zoe)

	// One that answers for somebody else is not believed.
	store.PutMember(tenancy.Membership{User: "ALICE", Tenant: acme.ID, Role: tenancy.RoleAdmin})
	folding := foldingStore{store}
	_, tn2, acme2, _ := twoTenants(t, tenancy.Config{Store: folding})
	store.PutTenant(acme2)
	_, err := tn2.Resolve(t.Context(), tenancy.Query{User: "alice"})
	wantError(t, err, tenancy.ErrPrimaryUnavailable, "another user's")

	// Nor is a list that would decide by its order.
	store.PutMember(tenancy.Membership{User: "two", Tenant: acme.ID, Role: "king"})
	until(t, 2*time.Second, class(tenancy.ErrPrimaryUnavailable), outcome(tenancy.Query{User: "two"}))
}

// foldingStore takes two users for one.
type foldingStore struct{ tenancy.Store }

func (s foldingStore) TenantsOf(ctx context.Context, user tenancy.UserKey) ([]tenancy.Membership, error) {
	return s.Store.TenantsOf(ctx, tenancy.UserKey(strings.ToUpper(string(user))))
}

// TestAnotherPrimarysCatalogIsNoStore: its tenant 1 is not ours.
func TestAnotherPrimarysCatalogIsNoStore(t *testing.T) {
	t.Parallel()
	_, other, _, _ := twoTenants(t, tenancy.Config{})
	_, tn, _, _ := twoTenants(t, tenancy.Config{Store: other.Catalog()})
	_, err := tn.Resolve(t.Context(), tenancy.Query{User: "alice@acme.test"})
	wantError(t, err, tenancy.ErrPrimaryUnavailable, "another UID")
}

// TestAnOutageOfThePrimaryIsSurvivedWithAStoreToo: the store's answers are asked again, the primary's are kept.
func TestAnOutageOfThePrimaryIsSurvivedWithAStoreToo(t *testing.T) {
	t.Parallel()
	store := &tenancytest.Store{}
	f, _, acme, _ := twoTenants(t, tenancy.Config{})
	store.PutTenant(acme)
	store.PutMember(tenancy.Membership{User: "zoe", Tenant: acme.ID, Default: true})
	p := startProxy(t, f.PrimaryURL)
	cfg := tenancy.Config{PrimaryURL: p.url, Keys: f.Keys, Store: store, Logger: slog.New(slog.DiscardHandler),
		Lookups: tenancy.LookupConfig{StoreTTL: 100 * time.Millisecond, PollPeriod: 100 * time.Millisecond, StaleGrace: time.Minute, Timeout: time.Second}}
	node, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = node.Close() })
	ask := func() error {
		ctx, err := node.Resolve(t.Context(), tenancy.Query{User: "zoe"})
		if err != nil {
			return err
		}
		return node.DB().QueryRow(ctx, `SELECT 1`).Scan(new(int))
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	p.cut()
	defer p.mend()
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err := ask(); err != nil {
			t.Fatalf("a user that was known: %v", err)
		}
	}
}
