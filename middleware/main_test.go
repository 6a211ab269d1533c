package middleware_test

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestMain(m *testing.M) {
	// This repository's own tests may fetch a PostgreSQL; those of its users ask first.
	if os.Getenv("TENANCY_PG_DOWNLOAD") == "" {
		if err := os.Setenv("TENANCY_PG_DOWNLOAD", "on"); err != nil {
			panic(err)
		}
	}
	tenancytest.Main(m)
}

var (
	silent     = slog.New(slog.DiscardHandler)
	migrations = fstest.MapFS{"00001_notes.sql": {Data: []byte("-- +goose Up\nCREATE TABLE notes (title text NOT NULL);\nSELECT tenancy_must('notes');\n")}}
)

// world is a fleet with two tenants, each with an administrator and a note that names it.
type world struct {
	fleet        *tenancytest.Fleet
	tn           *tenancy.Tenancy
	acme, globex tenancy.Tenant
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{fleet: tenancytest.NewFleet(t)}
	w.tn = w.fleet.Open(t, tenancy.Config{Migrations: migrations, HostManagers: []tenancy.UserKey{"root"}, Logger: silent})
	w.acme, w.globex = w.create(t, "acme", "alice"), w.create(t, "globex", "bob")
	return w
}

func (w *world) create(t *testing.T, name string, admin tenancy.UserKey) tenancy.Tenant {
	t.Helper()
	tenant, err := w.tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Admin: admin, Domains: []string{name + ".test"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.tn.DB().Exec(tenancytest.Context(t, w.tn, name), `INSERT INTO notes VALUES ($1)`, "of "+name); err != nil {
		t.Fatal(err)
	}
	return tenant
}

// serve is a service on a chi router. Its authentication believes the header User, which no service should.
func (w *world) serve(t *testing.T, opts ...tenantmw.Option) http.Handler {
	t.Helper()
	mw, err := tenantmw.New(w.tn, tenantmw.UserKeyFunc(userOf), append(opts, tenantmw.WithLogger(silent))...)
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	r.Use(mw.Tenant)
	r.Get("/open", ok)
	r.With(mw.RequireTenant).Get("/notes", func(rw http.ResponseWriter, r *http.Request) {
		rows, _ := w.tn.DB().Query(r.Context(), `SELECT title FROM notes`)
		titles, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			mw.Error(rw, r, err)
			return
		}
		io.WriteString(rw, strings.Join(titles, ","))
	})
	r.With(mw.RequireHostUser).Get("/host", ok)
	r.With(mw.RequireRole(tenancy.RoleAdmin)).Get("/admin", ok)
	r.With(mw.RequireRole(tenancy.RoleMember)).Get("/member", ok)
	return r
}

func ok(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") }

func userOf(r *http.Request) (tenancy.UserKey, error) {
	return tenancy.UserKey(r.Header.Get("User")), nil
}

// byHeader and byDomain are the least that a contributor can be.
var (
	byHeader = tenantmw.ContributorFunc(func(r *http.Request) (tenancy.Hint, error) {
		return tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: r.Header.Get("Tenant")}, nil
	})
	byDomain = tenantmw.ContributorFunc(func(r *http.Request) (tenancy.Hint, error) {
		return tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: r.Host}, nil
	})
)

// get sends a request of user, "" for nobody, with headers in pairs; Host is the request's host.
func get(h http.Handler, path, user string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, path, nil)
	r.Host = ""
	if user != "" {
		r.Header.Set("User", user)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			r.Host = headers[i+1]
		} else {
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func wantBody(t *testing.T, w *httptest.ResponseRecorder, body string) {
	t.Helper()
	if w.Code != http.StatusOK || w.Body.String() != body {
		t.Errorf("got %d %q, want 200 %q", w.Code, w.Body, body)
	}
}

// wantProblem checks what every problem has, and returns it.
func wantProblem(t *testing.T, w *httptest.ResponseRecorder, status int) tenantmw.Problem {
	t.Helper()
	var p tenantmw.Problem
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
		t.Errorf("the body is no JSON: %v: %q", err, w.Body)
	}
	if w.Code != status || p.Status != status {
		t.Errorf("got %d (%d in the body), want %d: %q", w.Code, p.Status, status, w.Body)
	}
	if p.Title == "" || p.Type == "" {
		t.Errorf("type and title must be told: %q", w.Body)
	}
	for name, value := range map[string]string{"Content-Type": "application/problem+json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} {
		if got := w.Header().Get(name); got != value {
			t.Errorf("%s: got %q, want %q", name, got, value)
		}
	}
	if strings.Contains(w.Body.String(), "tenancy: ") {
		t.Errorf("the body holds an error's text: %q", w.Body)
	}
	return p
}
