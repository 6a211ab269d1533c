//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"go.uber.org/goleak"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func Example() {
	d := demo.Must(demo.Open(context.Background(), tenancy.Config{}))
	defer d.Close()
	server := listen(d)
	defer server.Close()
	h := server.Config.Handler
	billing, shop := demo.Token("billing-secret"), demo.Token("shop-secret")
	acme, globex := demo.Header("X-Tenant", "acme"), demo.Header("X-Tenant", "globex")

	fmt.Println(demo.Get(h, "/notes", billing))
	fmt.Println(demo.Get(h, "/notes", billing, acme))
	fmt.Println(demo.Get(h, "/notes", billing, globex))
	fmt.Println(demo.Get(h, "/notes", shop, globex))
	fmt.Println(demo.Get(h, "/notes", acme))
	fmt.Println("the tenant travels on:", demo.Get(h, "/report", billing, globex))
	// Output:
	// 409 Which tenant? acme, globex
	// 200 ["note of acme"]
	// 200 ["note of globex"]
	// 403 Forbidden
	// 401 Unauthorized
	// the tenant travels on: 200 ["note of globex"]
}

// listen serves the program on a port of its own, because it calls itself.
func listen(d *demo.Demo) *httptest.Server {
	server := httptest.NewUnstartedServer(nil)
	d.URL = "http://" + server.Listener.Addr().String()
	server.Config.Handler = demo.Must(newHandler(d))
	server.Start()
	return server
}

// TestShopReadsNothingOfGlobex asks for globex's notes with the token of a service that works for acme alone, in every way
// that the program offers.
func TestShopReadsNothingOfGlobex(t *testing.T) {
	d := demo.Must(demo.Open(t.Context(), tenancy.Config{}))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	server := listen(d)
	t.Cleanup(server.Close)
	h := server.Config.Handler
	shop, billing := demo.Token("shop-secret"), demo.Token("billing-secret")
	named := func(name string) func(*http.Request) { return demo.Header("X-Tenant", name) }
	for name, c := range map[string]struct{ got, want string }{
		"foreign_tenant":               {demo.Get(h, "/notes", shop, named("globex")), "403 Forbidden"},
		"missing_tenant_is_as_foreign": {demo.Get(h, "/notes", shop, named("nosuch")), "403 Forbidden"},
		"foreign_tenant_by_the_report": {demo.Get(h, "/report", shop, named("globex")), "403 Forbidden"},
		"own_tenant_by_the_report":     {demo.Get(h, "/report", shop), `200 ["note of acme"]`},
		"two_headers":                  {demo.Get(h, "/notes", shop, named("acme"), named("globex")), "400 Bad Request"},
		"list":                         {demo.Get(h, "/notes", shop, named("acme,globex")), "400 Bad Request"},
		"empty_header":                 {demo.Get(h, "/notes", billing, named("")), "400 Bad Request"},
		"host_is_not_read":             {demo.Get(h, "http://globex.localhost/notes", shop), `200 ["note of acme"]`},
		"query_is_not_read":            {demo.Get(h, "/notes?tenant=globex", shop), `200 ["note of acme"]`},
		"two_tokens":                   {demo.Get(h, "/notes", shop, billing, named("globex")), "401 Unauthorized"},
		"wrong_token":                  {demo.Get(h, "/notes", demo.Token("billing-secre"), named("globex")), "401 Unauthorized"},
		"password_instead_of_a_token":  {demo.Get(h, "/notes", demo.As("bob@globex.test"), named("globex")), "401 Unauthorized"},
		"no_token":                     {demo.Get(h, "/notes", named("globex")), "401 Unauthorized"},
		"both_and_no_tenant":           {demo.Get(h, "/report", billing), "409 Which tenant? acme, globex"},
		"both_and_acme_by_the_report":  {demo.Get(h, "/report", billing, named("acme")), `200 ["note of acme"]`},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", name, c.got, c.want)
		}
	}

	acme := demo.Must(d.Catalog().TenantByName(t.Context(), "acme"))
	inAcme := demo.Must(d.Enter(t.Context(), acme.ID))
	t.Run("outgoing", func(t *testing.T) { testOutgoing(t, inAcme) })
	t.Run("redirect", func(t *testing.T) { testRedirect(t, inAcme) })
}

// testOutgoing: what is sent is the context's tenant, whatever the request said before; without one nothing is sent.
func testOutgoing(t *testing.T, inAcme context.Context) {
	var sent []http.Header
	o := outgoing{"secret", roundTripper(func(r *http.Request) (*http.Response, error) {
		sent = append(sent, r.Header)
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
	})}
	r := demo.Must(http.NewRequestWithContext(inAcme, http.MethodGet, "http://next.test/", nil))
	r.Header.Set("X-Tenant", "globex")
	demo.Must(o.RoundTrip(r)).Body.Close()
	if len(sent) != 1 || sent[0].Get("X-Tenant") != "acme" || sent[0].Get("Authorization") != "Bearer secret" {
		t.Errorf("sent %v", sent)
	}
	if len(r.Header) != 1 || r.Header.Get("X-Tenant") != "globex" {
		t.Errorf("the caller's request was changed: %v", r.Header)
	}
	for name, ctx := range map[string]context.Context{"no_session": t.Context(), "host": tenancy.AsHost(inAcme)} {
		if res, err := o.RoundTrip(r.WithContext(ctx)); !errors.Is(err, tenancy.ErrNoTenant) || res != nil || len(sent) != 1 {
			t.Errorf("%s: got %v, %v, and %d requests were sent", name, res, err, len(sent)-1)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// testRedirect: the token stays with the service that it is for, also when that one redirects to another host.
func testRedirect(t *testing.T, inAcme context.Context) {
	asked := make(chan string, 1)
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.Header.Get("Authorization") }))
	defer other.Close()
	next := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusFound))
	defer next.Close()
	got := demo.Get(report(next.URL), "/report", func(r *http.Request) { *r = *r.WithContext(inAcme) })
	if got != "502 Bad Gateway" || len(asked) > 0 {
		t.Errorf("got %s, and the other host was asked %d times", got, len(asked))
	}
}
