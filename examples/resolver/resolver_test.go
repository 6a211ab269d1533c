//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"go.uber.org/goleak"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func Example() {
	ctx, keys := context.Background(), apiKeys{}
	d := demo.Must(demo.Open(ctx, tenancy.Config{WrapResolver: keys.wrap}))
	defer d.Close()
	h := demo.Must(keys.newHandler(d))
	key := demo.Header("X-Api-Key", "acme-secret")

	fmt.Println(demo.Get(h, "/notes", key))
	fmt.Println(demo.Get(h, "/notes", demo.As("bob@globex.test")))
	fmt.Println(demo.Get(h, "/notes", key, demo.Header("X-Tenant", "globex")))
	err := d.Catalog().Suspend(ctx, keys[userOfKey("acme-secret")], tenancy.Suspension{})
	fmt.Println("suspended:", err)
	fmt.Println(demo.Get(h, "/notes", key)) // the resolver names acme as before
	fmt.Println(demo.Get(h, "/notes", demo.As("bob@globex.test")))
	// Output:
	// 200 ["note of acme"]
	// 200 ["note of globex"]
	// 403 Forbidden
	// suspended: <nil>
	// 403 Tenant is suspended
	// 200 ["note of globex"]
}

// TestAcmeReadsNothingOfGlobex asks for globex's notes with acme's credentials, in every way that the program offers.
func TestAcmeReadsNothingOfGlobex(t *testing.T) {
	keys := apiKeys{}
	d := demo.Must(demo.Open(t.Context(), tenancy.Config{WrapResolver: keys.wrap}))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	h := demo.Must(keys.newHandler(d))
	globex := demo.Must(d.Catalog().TenantByName(t.Context(), "globex"))
	keys[userOfKey("globex-secret")] = globex.ID
	key := demo.Header("X-Api-Key", "acme-secret")
	named := func(name string) func(*http.Request) { return demo.Header("X-Tenant", name) }
	alice, bob := demo.As("alice@acme.test"), demo.As("bob@globex.test")
	if got := demo.Get(h, "/notes", demo.Header("X-Api-Key", "globex-secret")); got != `200 ["note of globex"]` {
		t.Fatalf("the key of globex gets %s", got)
	}
	for name, c := range map[string]struct{ got, want string }{
		"key_that_names_a_foreign_tenant": {demo.Get(h, "/notes", key, named("globex")), "403 Forbidden"},
		"key_that_names_a_missing_tenant": {demo.Get(h, "/notes", key, named("nosuch")), "403 Forbidden"},
		"two_keys":                        {demo.Get(h, "/notes", key, demo.Header("X-Api-Key", "globex-secret")), "401 Unauthorized"},
		"key_and_password":                {demo.Get(h, "/notes", key, bob), "401 Unauthorized"},
		"unknown_key":                     {demo.Get(h, "/notes", demo.Header("X-Api-Key", "guess")), "401 Unauthorized"},
		"empty_key":                       {demo.Get(h, "/notes", demo.Header("X-Api-Key", "")), "401 Unauthorized"},
		"person_whose_name_is_a_key":      {demo.Get(h, "/notes", demo.As(string(userOfKey("globex-secret")))), "401 Unauthorized"},
		"person_who_names_a_foreign_one":  {demo.Get(h, "/notes", alice, named("globex")), "403 Forbidden"},
		"person_without_a_key_as_before":  {demo.Get(h, "/notes", alice), `200 ["note of acme"]`},
		"nobody_who_names_a_tenant":       {demo.Get(h, "/notes", named("globex")), "401 Unauthorized"},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", name, c.got, c.want)
		}
	}

	// Outside HTTP the same rules hold, and a stream of a key that was taken out of the table ends.
	if _, err := d.Resolve(t.Context(), tenancy.Query{User: keyUser + "guess"}); !errors.Is(err, tenancy.ErrForbidden) {
		t.Errorf("an unknown key: got %v", err)
	}
	ctx := demo.Must(d.Resolve(t.Context(), tenancy.Query{User: userOfKey("acme-secret")}))
	if s, _ := tenancy.FromContext(ctx); s.Role() != tenancy.RoleMember || s.Source() != "API key" {
		t.Errorf("a key's session: %v", s)
	}
	if err := d.Check(ctx); err != nil {
		t.Errorf("a key's session goes on: got %v", err)
	}
	delete(keys, userOfKey("acme-secret"))
	if err := d.Check(ctx); !errors.Is(err, tenancy.ErrForbidden) {
		t.Errorf("the key is gone: got %v", err)
	}
}
