package middleware_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/seal"
	tenantmw "github.com/msmt-go/tenancy/middleware"
	"github.com/msmt-go/tenancy/tenancytest"
)

const (
	benchTenants = 1000
	benchUsers   = 10_000
)

// BenchmarkTenant compares a warm request through Tenant with bare chi and with a hand-written middleware of the same job: one
// golang-lru look-up and one context value. 10,000 users of 1,000 tenants come in random order.
//
// The ratios are what counts. They are of slices that take turns in one run, because a machine's speed moves by more than what is measured
// here; hand/hand is the hand-written one against itself, and so the noise.
func BenchmarkTenant(b *testing.B) {
	requests := benchRequests()
	bare, hand, tenant := chiRouter(nil, ignoreTenant), chiRouter(byHand(), handTenant), chiRouter(openBench(b), ourTenant)
	other := chiRouter(byHand(), handTenant) // with a cache of its own, which the processor has not just seen
	for _, r := range requests {             // warm
		hand.ServeHTTP(&discard{}, r)
		other.ServeHTTP(&discard{}, r)
		tenant.ServeHTTP(&discard{}, r)
	}
	for _, c := range []struct {
		name string
		h    http.Handler
	}{{"chi", bare}, {"hand", hand}, {"tenancy", tenant}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			w, n := &discard{}, 0
			for b.Loop() {
				c.h.ServeHTTP(w, requests[n%benchUsers])
				n++
			}
		})
	}
	b.Run("ratio", func(b *testing.B) {
		// A slice is shorter than what a scheduler gives at once, and there are many: a busy machine spoils some, and not the median.
		const rounds, size = 1001, 500
		for b.Loop() {
			var byHand, ours, again []float64
			for n := range rounds {
				window := requests[n*size%benchUsers:][:size]
				slice(bare, window) // whoever comes first must not pay for fetching the requests
				order := []http.Handler{hand, tenant, other}
				took := make([]time.Duration, len(order))
				for i := range order {
					i = (i + n) % len(order) // nobody is always first
					took[i] = slice(order[i], window)
				}
				byHand, ours, again = append(byHand, took[0].Seconds()), append(ours, took[1].Seconds()), append(again, took[2].Seconds())
			}
			b.ReportMetric(median(ours)/median(byHand), "tenancy/hand")
			b.ReportMetric(median(again)/median(byHand), "hand/hand")
		}
		b.ReportMetric(0, "ns/op") // one loop is many requests
	})
}

// slice sends each request once and returns the time that all took.
func slice(h http.Handler, requests []*http.Request) time.Duration {
	w, began := &discard{}, time.Now()
	for _, r := range requests {
		h.ServeHTTP(w, r)
	}
	return time.Since(began)
}

func median(list []float64) float64 {
	slices.Sort(list)
	return list[len(list)/2]
}

func chiRouter(mw func(http.Handler) http.Handler, h http.HandlerFunc) http.Handler {
	r := chi.NewRouter()
	if mw != nil {
		r.Use(mw)
	}
	r.Get("/notes", h)
	return r
}

func ignoreTenant(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusOK) }

func ourTenant(w http.ResponseWriter, r *http.Request) {
	if _, err := tenancy.TenantFrom(r.Context()); err != nil {
		w.WriteHeader(http.StatusInternalServerError)
	}
}

// tenantByHand is what a service without the library would keep per tenant.
type tenantByHand struct {
	id   int64
	name string
}

type handKey struct{}

func handTenant(w http.ResponseWriter, r *http.Request) {
	if t, ok := r.Context().Value(handKey{}).(*tenantByHand); !ok || t.id == 0 {
		w.WriteHeader(http.StatusInternalServerError)
	}
}

// byHand is the middleware that a service would write for itself.
func byHand() func(http.Handler) http.Handler {
	cache, err := lru.New[string, *tenantByHand](100_000)
	if err != nil {
		panic(err)
	}
	for n := range benchUsers {
		cache.Add(benchUser(n), &tenantByHand{int64(n%benchTenants + 1), benchTenant(n % benchTenants)})
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			t, ok := cache.Get(r.Header.Get("User"))
			if !ok {
				http.Error(w, "forbidden", http.StatusForbidden)
				return
			}
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), handKey{}, t)))
		})
	}
}

// discard is a ResponseWriter that costs nothing and fails on anything but 200.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header {
	if d.header == nil {
		d.header = http.Header{}
	}
	return d.header
}

func (d *discard) Write(p []byte) (int, error) { return len(p), nil }

func (d *discard) WriteHeader(status int) {
	if status != http.StatusOK {
		panic(fmt.Sprintf("status %d", status))
	}
}

func benchUser(n int) string   { return fmt.Sprintf("user-%d@example.test", n) }
func benchTenant(n int) string { return fmt.Sprintf("tenant-%d", n) }

// benchRequests has one request of each user, in an order that no cache line likes.
func benchRequests() []*http.Request {
	list := make([]*http.Request, benchUsers)
	for n := range list {
		list[n] = httptest.NewRequest(http.MethodGet, "/notes", nil)
		list[n].Header.Set("User", benchUser(n*7919%benchUsers)) // 7919 is prime to it: each comes once
	}
	return list
}

// openBench opens a fleet that is filled by SQL: creating 1,000 tenants would take minutes. Their
// places do not exist, and no request of the benchmark goes there.
func openBench(tb testing.TB) func(http.Handler) http.Handler {
	tb.Helper()
	fleet := tenancytest.NewFleet(tb)
	conn, err := pgx.Connect(tb.Context(), fleet.PrimaryURL)
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close(tb.Context())
	fill(tb, fleet, conn)
	tn := fleet.Open(tb, tenancy.Config{Logger: silent})
	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(userOf))
	if err != nil {
		tb.Fatal(err)
	}
	return mw.Tenant
}

func fill(tb testing.TB, fleet *tenancytest.Fleet, conn *pgx.Conn) {
	tb.Helper()
	var realm [16]byte
	var server int64
	if err := conn.QueryRow(tb.Context(), `SELECT realm, (SELECT min(id) FROM tenancy.servers) FROM tenancy.realm`).Scan(&realm, &server); err != nil {
		tb.Fatal(err)
	}
	id, text, _ := strings.Cut(fleet.KeyText, ":")
	key := seal.Key{ID: id}
	if _, err := base64.StdEncoding.Decode(key.Bytes[:], []byte(text)); err != nil {
		tb.Fatal(err)
	}
	ring, err := seal.NewRing(key)
	if err != nil {
		tb.Fatal(err)
	}
	var places, tenants, members [][]any
	for n := range benchTenants {
		uid := [16]byte{byte(n >> 8), byte(n), 1}
		name := "t_" + benchTenant(n)
		plain, err := json.Marshal(map[string]any{"host": "127.0.0.1", "port": 5432, "database": "d", "schema": name, "user": name, "password": "p", "tls": "disable"})
		if err != nil {
			tb.Fatal(err)
		}
		sealed, err := ring.Seal(plain, string(realm[:]), string(uid[:]), "data_source")
		if err != nil {
			tb.Fatal(err)
		}
		places = append(places, []any{uid, server, name, name, name, name, sealed, "made"})
		tenants = append(tenants, []any{uid, benchTenant(n), "active", "schema", []byte{}})
	}
	for n := range benchUsers {
		members = append(members, []any{benchUser(n), int64(n%benchTenants + 1), "member", true})
	}
	copyRows(tb, conn, "data_sources", []string{"uid", "server", "schema", "owner", "runtime", "login", "sealed", "state"}, places)
	copyRows(tb, conn, "tenants", []string{"uid", "name", "state", "isolation", "intent"}, tenants)
	if _, err := conn.Exec(tb.Context(), `UPDATE tenancy.tenants t SET data_source = d.id FROM tenancy.data_sources d WHERE d.uid = t.uid`); err != nil {
		tb.Fatal(err)
	}
	copyRows(tb, conn, "memberships", []string{"user_key", "tenant", "role", "is_default"}, members)
}

func copyRows(tb testing.TB, conn *pgx.Conn, table string, columns []string, rows [][]any) {
	tb.Helper()
	if _, err := conn.CopyFrom(tb.Context(), pgx.Identifier{"tenancy", table}, columns, pgx.CopyFromRows(rows)); err != nil {
		tb.Fatal(err)
	}
}
