package middleware_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
	"github.com/msmt-go/tenancy/tenancytest"
)

// BenchmarkStranger compares the time of a refusal for a tenant that exists and is not the user's with that for one that does not
// exist: whoever could tell them apart by it could ask for every name.
//
// The slices take turns in one run, as in BenchmarkTenant; missing/missing is one kind against itself, and so the noise. Domains are public, and looked up: the ratio
// there is that of two caches, while both remember.
func BenchmarkStranger(b *testing.B) {
	h := strangerService(b)
	for _, by := range []struct {
		name string
		set  func(r *http.Request, tenant string)
	}{
		{"header", func(r *http.Request, tenant string) { r.Header.Set("X-Tenant", tenant) }},
		{"domain", func(r *http.Request, tenant string) { r.Host = tenant + ".test" }},
	} {
		b.Run(by.name, func(b *testing.B) {
			requests := func(prefix string) []*http.Request {
				list := make([]*http.Request, benchTenants)
				for n := range list {
					list[n] = httptest.NewRequest(http.MethodGet, "/notes", nil)
					list[n].Host = "service.test"
					list[n].Header.Set("User", benchUser(n))
					by.set(list[n], fmt.Sprintf("%s-%d", prefix, (n+1)%benchTenants))
				}
				return list
			}
			kinds := [][]*http.Request{requests("absent"), requests("tenant"), requests("vacant")} // of one length
			for _, kind := range kinds {
				refuse(h, kind) // warm
			}
			const rounds, size = 1001, 100
			for b.Loop() {
				took := make([][]float64, len(kinds))
				for n := range rounds {
					for _, i := range rand.Perm(len(kinds)) { // the trail that one leaves to be written must not always slow the same other one
						took[i] = append(took[i], refuse(h, kinds[i][n*size%benchTenants:][:size]).Seconds())
					}
				}
				missing, foreign, again := median(took[0]), median(took[1]), median(took[2])
				b.ReportMetric(foreign/missing, "foreign/missing")
				b.ReportMetric(again/missing, "missing/missing")
				b.ReportMetric(missing/size*1e9, "ns/refusal")
			}
			b.ReportMetric(0, "ns/op") // one loop is many requests
		})
	}
}

// refuse sends each request once and returns the time that all took.
func refuse(h http.Handler, requests []*http.Request) time.Duration {
	w, began := &refusals{}, time.Now()
	for _, r := range requests {
		h.ServeHTTP(w, r)
	}
	return time.Since(began)
}

// refusals is a discard that fails on anything but 403.
type refusals struct{ discard }

func (w *refusals) WriteHeader(status int) {
	if status != http.StatusForbidden {
		panic(fmt.Sprintf("status %d", status))
	}
}

func strangerService(b *testing.B) http.Handler {
	b.Helper()
	fleet := tenancytest.NewFleet(b)
	conn, err := pgx.Connect(b.Context(), fleet.PrimaryURL)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close(b.Context())
	fill(b, fleet, conn)
	if _, err := conn.Exec(b.Context(), `INSERT INTO tenancy.domains (domain, tenant) SELECT name || '.test', id FROM tenancy.tenants`); err != nil {
		b.Fatal(err)
	}
	mw, err := tenantmw.New(fleet.Open(b, tenancy.Config{Logger: silent}), tenantmw.UserKeyFunc(userOf), tenantmw.WithLogger(silent),
		tenantmw.WithContributors(tenantmw.Header("X-Tenant"), tenantmw.Domain("service.test")))
	if err != nil {
		b.Fatal(err)
	}
	return mw.Tenant(http.HandlerFunc(ok))
}
