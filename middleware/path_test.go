package middleware_test

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// heard answers with what c says of a request, in the place of a middleware.
func heard(c tenantmw.Contributor) func(http.Handler) http.Handler {
	return func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h, err := c.Hint(r)
			if err != nil {
				w.WriteHeader(http.StatusTeapot)
				h.Value = err.Error()
			}
			w.Header().Set("Heard", h.Value)
		})
	}
}

// routers has the parameter {tenant} in every way that a middleware can be put inside of its route.
func routers(mw func(http.Handler) http.Handler) map[string]http.Handler {
	route := chi.NewRouter()
	route.Route("/t/{tenant}", func(r chi.Router) {
		r.Use(mw)
		r.Get("/notes", ok)
		r.Get("/", ok)
	})
	mount, sub := chi.NewRouter(), chi.NewRouter()
	sub.Use(mw)
	sub.Get("/*", ok)
	mount.Mount("/t/{tenant}", sub)
	with := chi.NewRouter()
	with.With(mw).Get("/t/{tenant}/notes", ok)
	with.With(mw).Get("/t/{tenant}", ok)
	group := chi.NewRouter()
	group.Group(func(r chi.Router) {
		r.Use(mw)
		r.Get("/t/{tenant}/notes", ok)
		r.Get("/t/{tenant}", ok)
	})
	mux := http.NewServeMux()
	mux.Handle("/t/{tenant}/notes", mw(http.HandlerFunc(ok)))
	mux.Handle("/t/{tenant}", mw(http.HandlerFunc(ok)))
	muxTree := http.NewServeMux()
	muxTree.Handle("/t/{tenant}/", mw(http.HandlerFunc(ok)))
	return map[string]http.Handler{"chi_route": route, "chi_mount": mount, "chi_with": with, "chi_group": group, "mux": mux, "mux_tree": muxTree}
}

func TestPathNamesATenantInsideItsRoute(t *testing.T) {
	t.Parallel()
	c := tenantmw.Path("tenant")
	const elsewhere = "\x00elsewhere" // the router itself has another answer
	for name, h := range routers(heard(c)) {
		for _, p := range []struct{ path, chi, mux string }{
			{"/t/acme/notes", "acme", "acme"},
			{"/t/acme/notes?tenant=globex", "acme", "acme"},
			{"/t/acme-2/notes", "acme-2", "acme-2"},
			// No tenant has such a name: a missing one.
			{"/t/Acme/notes", "Acme", "Acme"},
			{"/t/7up/notes", "7up", "7up"},
			{"/t/a_b/notes", "a_b", "a_b"},
			{"/t/" + strings.Repeat("a", 64) + "/notes", strings.Repeat("a", 64), strings.Repeat("a", 64)},
			{"/t/" + strings.Repeat("a", 65) + "/notes", refused, refused},
			// chi routes by what was sent where that has needless escapes, ServeMux by what it means.
			{"/t/%61cme/notes", refused, "acme"},
			{"/t/%2561cme/notes", refused, refused},
			{"/t/acme%2fglobex/notes", refused, refused},
			{"/t/acme%2F..%2Fglobex/notes", refused, refused},
			{"/t/..%2fglobex/notes", refused, refused},
			{"/t/acme%5cglobex/notes", refused, refused},
			{"/t/acme%00/notes", refused, refused},
			{"/t/acme%20/notes", refused, refused},
			{"/t/%20acme/notes", refused, refused},
			{"/t/acme%0d%0a/notes", refused, refused},
			{"/t/acme+globex/notes", refused, refused},
			{"/t/acme,globex/notes", refused, refused},
			{"/t/acme;globex/notes", refused, refused},
			{"/t/acme.json/notes", refused, refused},
			{"/t/acme:globex/notes", refused, refused},
			{"/t/acme@globex/notes", refused, refused},
			{"/t/%D0%B0cme/notes", refused, refused},
			{"/t/%EF%BD%81cme/notes", refused, refused},
			{"/t/acme%ff/notes", refused, refused},
			{"/t/%7Btenant%7D/notes", refused, refused},
			{"/t/%2e%2e/notes", refused, refused},
			{"/t/%2e/notes", refused, refused},
			{"/t/../notes", refused, elsewhere}, // ServeMux cleans the path, and sends the caller there
			{"/t/./notes", refused, elsewhere},
			{"/t/...", refused, refused},
			{"/t//notes", refused, elsewhere},
		} {
			want := p.chi
			if strings.HasPrefix(name, "mux") {
				want = p.mux
			}
			if p.path == "/t/..." && name == "mux_tree" {
				want = elsewhere // redirects to /t/.../
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", p.path, nil))
			got := w.Header().Get("Heard")
			switch {
			case want == elsewhere && got != "":
				t.Errorf("%s, %s: heard %q, want the router's own answer", name, p.path, got)
			case want == refused && (w.Code != http.StatusTeapot || strings.Contains(got, "wired")):
				t.Errorf("%s, %s: heard %q, want a refusal that blames the caller", name, p.path, got)
			case want != elsewhere && want != refused && (w.Code != http.StatusOK || got != want):
				t.Errorf("%s, %s: heard %d %q, want %q", name, p.path, w.Code, got, want)
			}
		}
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.SetPathValue("tenant", "acme")
	if h, _ := c.Hint(r); h != (tenancy.Hint{Source: "path", Trust: tenancy.Place, By: tenancy.ByName, Value: "acme"}) {
		t.Errorf("got %+v", h)
	}
	r.SetPathValue("tenant", "acme/globex")
	if got := statusFor(t, c, r); got != http.StatusBadRequest {
		t.Errorf("got %d, want 400", got)
	}
}

// TestAnEmptyParameterIsTheCallersMistake: chi takes /t//notes for the route, with an empty parameter.
func TestAnEmptyParameterIsTheCallersMistake(t *testing.T) {
	t.Parallel()
	c := tenantmw.Path("tenant")
	for name, pattern := range map[string]string{"chi": "/t/{tenant}/notes", "chi_regexp": "/t/{tenant:.*}/notes", "mux": "/t/{tenant...}"} {
		var h http.Handler
		path := "/t//notes"
		if name == "mux" {
			mux := http.NewServeMux()
			mux.Handle(pattern, refusing(t, c).Tenant(http.HandlerFunc(ok)))
			h, path = mux, "/t/"
		} else {
			r := chi.NewRouter()
			r.With(refusing(t, c).Tenant).Get(pattern, ok)
			h = r
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != http.StatusBadRequest {
			t.Errorf("%s: got %d, want 400", name, w.Code)
		}
	}
	r := httptest.NewRequest("GET", "/", nil)
	for pattern, want := range map[string]int{
		"/t/{tenant}/*": 400, "/t/{tenant:[a-z]*}": 400, "GET /t/{tenant...}": 400,
		"": 500, "/notes": 500, "/t/{tenants}": 500, "/t/{xtenant}": 500, "/t/{id}/tenant": 500,
	} {
		r.Pattern = pattern
		if got := statusFor(t, c, r); got != want {
			t.Errorf("%q: got %d, want %d", pattern, got, want)
		}
	}
}

func TestPathOutsideOfItsRouteIsTheServicesMistake(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	mw, err := tenantmw.New(&tenancy.Tenancy{}, tenantmw.UserKeyFunc(userOf), tenantmw.WithContributors(tenantmw.Path("tenant")),
		tenantmw.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	root := chi.NewRouter()
	root.Use(mw.Tenant)
	root.Get("/t/{tenant}/notes", ok)
	other := chi.NewRouter()
	other.Route("/t/{id}", func(r chi.Router) {
		r.Use(mw.Tenant)
		r.Get("/notes", ok)
	})
	inner := chi.NewRouter() // the parameter belongs to a router below
	inner.Route("/t", func(r chi.Router) {
		r.Use(mw.Tenant)
		r.Get("/{tenant}/notes", ok)
	})
	mux := http.NewServeMux()
	mux.HandleFunc("/t/{tenant}/notes", ok)
	for name, h := range map[string]http.Handler{"chi_root": root, "other_parameter": other, "parameter_below": inner, "around_a_mux": mw.Tenant(mux)} {
		for _, user := range []string{"alice", ""} {
			log.Reset()
			w := get(h, "/t/acme/notes", user)
			wantProblem(t, w, http.StatusInternalServerError)
			if strings.Contains(w.Body.String(), "mw.Tenant") || !strings.Contains(log.String(), "put mw.Tenant inside the route that has it") ||
				!strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), `/t/{tenant}`) {
				t.Errorf("%s: body %q, log %q", name, w.Body, &log)
			}
			// An anonymous session of a middleware further out does not turn it into a 401.
			r := httptest.NewRequestWithContext(tenancy.AsHost(t.Context()), "GET", "/t/acme/notes", nil)
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, r)
			wantProblem(t, rec, http.StatusInternalServerError)
		}
	}
}

func TestPathReachesTheTenantItNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mw, err := tenantmw.New(w.tn, tenantmw.UserKeyFunc(userOf), tenantmw.WithContributors(tenantmw.Path("tenant")), tenantmw.WithLogger(silent))
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	r.Route("/t/{tenant}", func(r chi.Router) {
		r.Use(mw.Tenant)
		r.Get("/open", func(rw http.ResponseWriter, r *http.Request) {
			tenant, err := tenancy.TenantFrom(r.Context())
			if err != nil {
				mw.Error(rw, r, err)
				return
			}
			var title string
			if err := w.tn.DB().QueryRow(r.Context(), `SELECT title FROM notes`).Scan(&title); err != nil || title != "of "+tenant.Name {
				t.Errorf("of %s read %q, %v", tenant.Name, title, err)
			}
			rw.Write([]byte(tenant.Name))
		})
	})
	for _, c := range []struct {
		path, user string
		status     int
	}{
		{"/t/acme/open", "alice", 200},
		{"/t/globex/open", "alice", 403},
		{"/t/initech/open", "alice", 403},
		{"/t/Acme/open", "alice", 403},
		{"/t/acme%2f/open", "alice", 400},
		{"/t/acme/open", "", 200},
		{"/t/initech/open", "", 404},
		{"/t/Acme/open", "", 404},
		{"/t//open", "", 400},
	} {
		res := get(r, c.path, c.user)
		if c.status == 200 {
			wantBody(t, res, "acme")
		} else {
			wantProblem(t, res, c.status)
		}
	}
}
