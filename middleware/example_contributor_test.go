package middleware_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"

	"github.com/go-chi/chi/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// say prints what a contributor reads from a request. A service gives contributors to
// [tenantmw.WithContributors], and [tenantmw.Middleware.Tenant] asks them.
func say(c tenantmw.Contributor, r *http.Request) {
	hint, err := c.Hint(r)
	switch {
	case err != nil:
		fmt.Println("refused:", err)
	case hint.Value == "":
		fmt.Println("no opinion")
	default:
		fmt.Println(hint.Source, hint.Value)
	}
}

func request(url string) *http.Request { return httptest.NewRequest(http.MethodGet, url, nil) }

// Tenants live at hosts below the service's own or at a domain they brought, and users of the API choose with a
// header.
func ExampleWithContributors() {
	cfg, err := tenancy.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	tn, err := tenancy.Open(context.Background(), cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer tn.Close()
	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(userOf), tenantmw.WithContributors(
		tenantmw.Subdomain("{tenant}.example.com"),
		tenantmw.Domain("example.com", "*.example.com"),
		tenantmw.Header("X-Tenant"),
	))
	if err != nil {
		log.Fatal(err)
	}
	r := chi.NewRouter()
	r.Use(authenticate, mw.Tenant)
	log.Fatal(http.ListenAndServe("127.0.0.1:8080", r))
}

func ExampleSubdomain() {
	c := tenantmw.Subdomain("{tenant}.example.com", "{tenant}.localhost")
	say(c, request("https://acme.example.com/notes"))
	say(c, request("http://acme.localhost:8080/notes"))
	say(c, request("https://www.example.com/"))
	say(c, request("https://acme.example.com.evil.test/"))
	// Output:
	// subdomain acme
	// subdomain acme
	// no opinion
	// no opinion
}

func ExampleDomain() {
	c := tenantmw.Domain("example.com", "127.0.0.1") // the service's own: its site, and what probes ask
	say(c, request("https://www.acme.test/notes"))
	say(c, request("https://Example.com/"))
	say(c, request("http://127.0.0.1:8080/health"))
	say(c, request("http://192.0.2.7/"))
	// Output:
	// domain www.acme.test
	// no opinion
	// no opinion
	// refused: domain: Host is an IP address: if callers such as probes use it, name it in Domain as one of the service's own
}

func ExamplePath() {
	c := tenantmw.Path("tenant")
	r := chi.NewRouter()
	r.Route("/t/{tenant}", func(r chi.Router) {
		r.Use(func(next http.Handler) http.Handler { // where a service says r.Use(mw.Tenant)
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				say(c, r)
				next.ServeHTTP(w, r)
			})
		})
		r.Get("/notes", func(http.ResponseWriter, *http.Request) {})
	})
	r.ServeHTTP(httptest.NewRecorder(), request("/t/acme/notes"))
	r.ServeHTTP(httptest.NewRecorder(), request("/t/acme%2fglobex/notes"))
	// Output:
	// path acme
	// refused: path tenant: not the name of a tenant
}

func ExampleHeader() {
	c := tenantmw.Header("X-Tenant")
	r := request("/notes")
	say(c, r)
	r.Header.Set("X-Tenant", "acme")
	say(c, r)
	r.Header.Add("X-Tenant", "globex")
	say(c, r)
	// Output:
	// no opinion
	// header acme
	// refused: header X-Tenant: given more than once
}

func ExampleCookie() {
	c := tenantmw.Cookie("__Host-tenant") // the prefix keeps sister hosts from setting it
	r := request("/notes")
	r.AddCookie(&http.Cookie{Name: "__Host-tenant", Value: "acme"})
	say(c, r)
	// Output: cookie acme
}

func ExampleQueryParam() {
	c := tenantmw.QueryParam("tenant")
	say(c, request("/notes?tenant=acme"))
	say(c, request("/notes?tenant=acme&tenant=globex"))
	say(c, request("/notes?tenant="))
	// Output:
	// query acme
	// refused: query tenant: given more than once
	// refused: query tenant: not the name of a tenant
}

type claimsKey struct{}

func ExampleClaim() {
	c := tenantmw.Claim(func(r *http.Request) (any, bool) {
		claims, _ := r.Context().Value(claimsKey{}).(map[string]any) // left by the service's authentication
		v, present := claims["tenant"]
		return v, present
	})
	for _, claims := range []map[string]any{{"tenant": "acme"}, {}, {"tenant": nil}, {"tenant": []any{"acme", "globex"}}} {
		say(c, request("/notes").WithContext(context.WithValue(context.Background(), claimsKey{}, claims)))
	}
	// Output:
	// claim acme
	// no opinion
	// refused: tenancy/middleware: not authenticated: claim: a <nil> and no string
	// refused: tenancy/middleware: not authenticated: claim: a []interface {} and no string
}

// A contributor of the service's own: the tenant's ID that its authentication left on the context.
func ExampleContributorFunc() {
	c := tenantmw.ContributorFunc(func(r *http.Request) (tenancy.Hint, error) {
		id, _ := r.Context().Value(claimsKey{}).(string)
		return tenancy.Hint{Source: "token", Trust: tenancy.Identity, By: tenancy.ByID, Value: id}, nil
	})
	say(c, request("/notes").WithContext(context.WithValue(context.Background(), claimsKey{}, "42")))
	// Output: token 42
}
