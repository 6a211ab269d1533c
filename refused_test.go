package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
)

// TestARefusedHintIsOnTheRecordIfTheTenantExists: who tried is written down, and the answer does not say so.
func TestARefusedHintIsOnTheRecordIfTheTenantExists(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: id}); err != nil {
			t.Fatal(err)
		}
	}
	hint := func(source string, trust tenancy.Trust, by tenancy.By, value string) tenancy.Hint {
		return tenancy.Hint{Source: source, Trust: trust, By: by, Value: value}
	}
	toAcme, toGlobex := hint("header", tenancy.Choice, tenancy.ByName, "acme"), hint("header", tenancy.Choice, tenancy.ByName, "globex")
	texts := map[string]bool{}
	for _, tt := range []struct {
		user  tenancy.UserKey
		hints []tenancy.Hint
	}{
		{"bob@globex.test", []tenancy.Hint{toAcme}},
		{"bob@globex.test", []tenancy.Hint{toAcme}}, // once a minute is enough
		{"bob@globex.test", []tenancy.Hint{hint("header", tenancy.Choice, tenancy.ByName, "nosuch")}},
		{"bob@globex.test", []tenancy.Hint{hint("domain", tenancy.Place, tenancy.ByDomain, "acme.example.com")}},
		{"mallory", []tenancy.Hint{hint("claim", tenancy.Identity, tenancy.ByID, fmt.Sprint(acme.ID))}},
		{"mallory", []tenancy.Hint{hint("claim", tenancy.Identity, tenancy.ByName, "acme'; DROP TABLE tenancy.audit; --")}},
		{"carol", []tenancy.Hint{toAcme, hint("claim", tenancy.Identity, tenancy.ByName, "globex")}},
		// One own tenant by two sources, and a missing one, is nobody's business.
		{"alice@acme.test", []tenancy.Hint{toAcme, hint("claim", tenancy.Identity, tenancy.ByName, "acme"), hint("cookie", tenancy.Choice, tenancy.ByName, "nosuch")}},
	} {
		_, err := tn.Resolve(t.Context(), tenancy.Query{User: tt.user, Hints: tt.hints})
		if !errors.Is(err, tenancy.ErrForbidden) {
			t.Fatalf("%s: %v, want ErrForbidden", tt.user, err)
		}
		if tt.user != "carol" {
			texts[err.Error()] = true
		}
	}
	if len(texts) != 1 {
		t.Errorf("a foreign and a missing tenant differ: %v", texts)
	}
	if _, err := tn.Resolve(t.Context(), tenancy.Query{User: "carol", Hints: []tenancy.Hint{toGlobex}}); err != nil {
		t.Fatal(err)
	}
	primary := f.Admin(t, "primary")
	want := fmt.Sprintf("bob@globex.test domain %[1]d, bob@globex.test header %[1]d, carol claim %[2]d, carol header %[1]d, mallory claim %[1]d", acme.ID, globex.ID)
	until(t, 2*time.Second, want, func() string {
		return scan[string](t, primary, `SELECT coalesce(string_agg(actor || ' ' || (detail->>'source') || ' ' || tenant, ', ' ORDER BY actor, detail->>'source'), '') FROM tenancy.audit WHERE action = 'refused hint'`)
	})
}

// TestARefusalOfTheServicesResolverIsOnTheRecord: who replaces the rules keeps the trail.
func TestARefusalOfTheServicesResolverIsOnTheRecord(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{WrapResolver: func(tenancy.TenantResolver) tenancy.TenantResolver {
		return tenancy.TenantResolverFunc(func(context.Context, tenancy.Query) (tenancy.Resolution, error) {
			return tenancy.Resolution{}, tenancy.ErrForbidden
		})
	}})
	q := tenancy.Query{User: "robot", Hints: []tenancy.Hint{{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "acme"}}}
	if _, err := tn.Resolve(t.Context(), q); !errors.Is(err, tenancy.ErrForbidden) {
		t.Fatal(err)
	}
	q.Hints[0].Value = "globex" // the slice is the caller's to use again
	primary := f.Admin(t, "primary")
	until(t, 2*time.Second, fmt.Sprintf("robot %d", acme.ID), func() string {
		return scan[string](t, primary, `SELECT coalesce(string_agg(actor || ' ' || tenant, ', '), '') FROM tenancy.audit WHERE action = 'refused hint'`)
	})
}

// TestAFloodOfRefusalsIsBounded: neither requests nor the primary nor memory grow with it, and what is in the queue is written at the end.
func TestAFloodOfRefusalsIsBounded(t *testing.T) {
	t.Parallel()
	f, tn, _, _ := twoTenants(t, tenancy.Config{})
	refuse := func(user tenancy.UserKey, value string) {
		t.Helper()
		_, err := tn.Resolve(t.Context(), tenancy.Query{User: user, Hints: []tenancy.Hint{{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: value}}})
		if !errors.Is(err, tenancy.ErrForbidden) {
			t.Fatal(err)
		}
	}
	for n := range 20_000 {
		refuse("bob@globex.test", fmt.Sprint("made-up-", n))
	}
	// One who makes up names does not hide another.
	primary := f.Admin(t, "primary")
	until(t, 5*time.Second, "1", func() string {
		refuse("alice@acme.test", "globex") // again while the queue is full
		return scan[string](t, primary, `SELECT count(*)::text FROM tenancy.audit WHERE action = 'refused hint' AND actor = 'alice@acme.test'`)
	})
	for n := range 20_000 {
		refuse(tenancy.UserKey(fmt.Sprint("user-", n)), "acme")
	}
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	rows := scan[int](t, primary, `SELECT count(*) FROM tenancy.audit WHERE action = 'refused hint'`)
	if rows < 1 || rows > 8192 {
		t.Errorf("%d rows on the record, want 1 to 8192", rows)
	}
}
