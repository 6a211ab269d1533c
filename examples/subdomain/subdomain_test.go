//go:build unix

package main

import (
	"context"
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func Example() {
	d := demo.Must(demo.Open(context.Background(), tenancy.Config{}))
	defer d.Close()
	h := demo.Must(newHandler(d))

	fmt.Println(demo.Get(h, "http://localhost/"))
	fmt.Println(demo.Get(h, "http://acme.localhost/"))
	fmt.Println(demo.Get(h, "http://acme.localhost/", demo.As("alice@acme.test")))
	fmt.Println(demo.Get(h, "http://globex.localhost/", demo.As("alice@acme.test")))
	fmt.Println(demo.Get(h, "http://nosuch.localhost/"))
	// Output:
	// 200 welcome: each customer has an address here
	// 401 log in to acme
	// 200 ["note of acme"]
	// 403 Forbidden
	// 404 No such tenant
}

// TestAliceReadsNothingOfGlobex asks for globex's page in every way that the program offers, and in some that it does not.
func TestAliceReadsNothingOfGlobex(t *testing.T) {
	d := demo.Must(demo.Open(t.Context(), tenancy.Config{}))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	h := demo.Must(newHandler(d))
	const acme, globex = "http://acme.localhost/", "http://globex.localhost/"
	alice, bob, carol := demo.As("alice@acme.test"), demo.As("bob@globex.test"), demo.As("carol@both.test")
	if got := demo.Get(h, globex, bob); got != `200 ["note of globex"]` {
		t.Fatalf("bob gets %s", got)
	}
	for name, c := range map[string]struct{ got, want string }{
		"foreign_address":               {demo.Get(h, globex, alice), "403 Forbidden"},
		"foreign_address_with_port":     {demo.Get(h, "http://globex.localhost:8080/", alice), "403 Forbidden"},
		"foreign_address_in_capitals":   {demo.Get(h, "http://GLOBEX.LOCALHOST/", alice), "403 Forbidden"},
		"foreign_address_with_dot":      {demo.Get(h, "http://globex.localhost./", alice), "403 Forbidden"},
		"missing_tenant_is_as_foreign":  {demo.Get(h, "http://nosuch.localhost/", alice), "403 Forbidden"},
		"forwarded_host_is_not_read":    {demo.Get(h, acme, alice, demo.Header("X-Forwarded-Host", "globex.localhost")), `200 ["note of acme"]`},
		"forwarded_is_not_read":         {demo.Get(h, acme, alice, demo.Header("Forwarded", "host=globex.localhost")), `200 ["note of acme"]`},
		"header_is_not_read":            {demo.Get(h, acme, alice, demo.Header("X-Tenant", "globex")), `200 ["note of acme"]`},
		"query_is_not_read":             {demo.Get(h, acme+"?tenant=globex", alice), `200 ["note of acme"]`},
		"host_page_is_her_own":          {demo.Get(h, "http://localhost/", alice), `200 ["note of acme"]`},
		"deeper_address_is_no_tenant's": {demo.Get(h, "http://x.globex.localhost/", alice), `200 ["note of acme"]`},
		"guest_gets_the_login_page":     {demo.Get(h, globex), "401 log in to globex"},
		"wrong_password":                {demo.Get(h, globex, demo.Header("Authorization", "Basic Ym9iQGdsb2JleC50ZXN0Omd1ZXNz")), "401 Unauthorized"},
		"both_and_no_address":           {demo.Get(h, "http://localhost/", carol), "409 Which tenant? acme, globex"},
		"both_at_acme":                  {demo.Get(h, acme, carol), `200 ["note of acme"]`},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", name, c.got, c.want)
		}
	}
}
