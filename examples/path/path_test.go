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

	fmt.Println(demo.Get(h, "/health"))
	fmt.Println(demo.Get(h, "/t/acme/notes", demo.As("alice@acme.test")))
	fmt.Println(demo.Get(h, "/t/globex/notes", demo.As("alice@acme.test")))
	fmt.Println(demo.Get(h, "/t/acme/notes"))
	fmt.Println(demo.Get(h, "/t/nosuch/notes"))
	// Output:
	// 200 well
	// 200 ["note of acme"]
	// 403 Forbidden
	// 401 Unauthorized
	// 404 No such tenant
}

// TestAliceReadsNothingOfGlobex asks for globex's notes in every way that the program offers, and in some that it does not.
func TestAliceReadsNothingOfGlobex(t *testing.T) {
	d := demo.Must(demo.Open(t.Context(), tenancy.Config{}))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	h := demo.Must(newHandler(d))
	alice, bob, carol := demo.As("alice@acme.test"), demo.As("bob@globex.test"), demo.As("carol@both.test")
	if got := demo.Get(h, "/t/globex/notes", bob); got != `200 ["note of globex"]` {
		t.Fatalf("bob gets %s", got)
	}
	for name, c := range map[string]struct{ got, want string }{
		"foreign_path":                 {demo.Get(h, "/t/globex/notes", alice), "403 Forbidden"},
		"missing_tenant_is_as_foreign": {demo.Get(h, "/t/nosuch/notes", alice), "403 Forbidden"},
		"capitals_are_another_name":    {demo.Get(h, "/t/GLOBEX/notes", alice), "403 Forbidden"},
		"escaped_letter":               {demo.Get(h, "/t/%67lobex/notes", alice), "400 Bad Request"},
		"escaped_slashes":              {demo.Get(h, "/t/acme%2F..%2Fglobex/notes", alice), "400 Bad Request"},
		"dots":                         {demo.Get(h, "/t/acme/../globex/notes", alice), "404 404 page not found"},
		"no_name":                      {demo.Get(h, "/t//notes", alice), "400 Bad Request"},
		"no_tenant_outside":            {demo.Get(h, "/notes", alice), "404 404 page not found"},
		"header_is_not_read":           {demo.Get(h, "/t/acme/notes", alice, demo.Header("X-Tenant", "globex")), `200 ["note of acme"]`},
		"query_is_not_read":            {demo.Get(h, "/t/acme/notes?tenant=globex", alice), `200 ["note of acme"]`},
		"host_is_not_read":             {demo.Get(h, "http://globex.localhost/t/acme/notes", alice), `200 ["note of acme"]`},
		"guest":                        {demo.Get(h, "/t/globex/notes"), "401 Unauthorized"},
		"both_at_acme":                 {demo.Get(h, "/t/acme/notes", carol), `200 ["note of acme"]`},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", name, c.got, c.want)
		}
	}
}
