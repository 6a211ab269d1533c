//go:build !race

package middleware_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// TestContributorsAllocateNothing in the ordinary case: no opinion, or a name as it should be.
func TestContributorsAllocateNothing(t *testing.T) {
	silent := httptest.NewRequest("GET", "http://own.test:8080/notes?a=b&c=d", nil)
	silent.Header.Set("Cookie", "session=1; theme=dark")
	naming := httptest.NewRequest("GET", "http://acme.example.com:8080/notes?a=b&tenant=acme", nil)
	naming.Header.Set("Cookie", "session=1; tenant=acme; theme=dark")
	naming.Header.Set("X-Tenant", "acme")
	naming.SetPathValue("tenant", "acme")
	probe := httptest.NewRequest("GET", "http://127.0.0.1:8080/", nil)
	domain, subdomain := domainAndSubdomain()
	var claims any = "acme"
	for name, c := range map[string]tenantmw.Contributor{
		"domain": domain, "subdomain": subdomain, "path": tenantmw.Path("tenant"), "header": tenantmw.Header("x-tenant"),
		"cookie": tenantmw.Cookie("tenant"), "query": tenantmw.QueryParam("tenant"),
		"claim": tenantmw.Claim(func(r *http.Request) (any, bool) { return claims, r == naming }),
	} {
		requests := []*http.Request{silent, naming, probe}
		if name == "path" { // it has always something to say
			requests = requests[1:2]
		}
		for _, r := range requests {
			if n := testing.AllocsPerRun(100, func() {
				if _, err := c.Hint(r); err != nil {
					t.Fatal(err)
				}
			}); n > 0 {
				t.Errorf("%s of %s%s allocates %.0f times", name, r.Host, r.URL, n)
			}
		}
	}
}
