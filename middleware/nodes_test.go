package middleware_test

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// at is w as another node of its fleet sees it.
func (w *world) at(t *testing.T, cfg tenancy.Config) *world {
	t.Helper()
	cfg.Logger = silent
	other := *w
	other.tn = w.fleet.Open(t, cfg)
	return &other
}

// TestATenantOfOtherNodesIsMisdirected looks at the whole answer, for who may know and for who may not.
func TestATenantOfOtherNodesIsMisdirected(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.at(t, tenancy.Config{OnlyTenants: []string{"acme"}, NodeAddress: "10.0.0.1:80"})
	h := node.serve(t, tenantmw.WithContributors(byHeader, byDomain))

	// Nobody who serves the tenant has an address: there is nothing to name.
	res := get(h, "/notes", "bob")
	if p := wantProblem(t, res, http.StatusMisdirectedRequest); p.Nodes != nil || strings.Contains(res.Body.String(), `"nodes"`) {
		t.Errorf("the body names nodes: %s", res.Body)
	}
	if _, sent := res.Header()[tenantmw.NodesHeader]; sent {
		t.Errorf("the header is sent: %q", res.Header()[tenantmw.NodesHeader])
	}

	w.at(t, tenancy.Config{OnlyTenants: []string{"globex"}, NodeAddress: "10.0.0.3:80"})
	w.at(t, tenancy.Config{OnlyTenants: []string{"globex", "initech"}, NodeAddress: "10.0.0.2:80"})
	want := "10.0.0.2:80, 10.0.0.3:80"
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if res = get(h, "/notes", "bob"); res.Header().Get(tenantmw.NodesHeader) == want || time.Now().After(end) {
			break
		}
	}
	for name, res := range map[string]*httptest.ResponseRecorder{
		"member":             res,
		"member_who_chose":   get(h, "/notes", "bob", "Tenant", "globex"),
		"member_at_place":    get(h, "/open", "bob", "Host", "globex.test"),
		"anonymous_at_place": get(h, "/open", "", "Host", "globex.test"),
	} {
		t.Run(name, func(t *testing.T) {
			p := wantProblem(t, res, http.StatusMisdirectedRequest)
			if p.Type != "urn:tenancy:problem:not-served" || p.Title != "Misdirected Request" || p.Detail == "" || p.Tenants != nil {
				t.Errorf("got %+v", p)
			}
			if !slices.Equal(p.Nodes, strings.Split(want, ", ")) || !slices.Equal(res.Header()[tenantmw.NodesHeader], []string{want}) {
				t.Errorf("nodes: %q in the body, %q in the header; want %s", p.Nodes, res.Header()[tenantmw.NodesHeader], want)
			}
			if res.Header().Get("Retry-After") != "" {
				t.Error("a later try is promised to help")
			}
			if strings.Contains(res.Body.String(), "globex") {
				t.Errorf("the body names the tenant: %s", res.Body)
			}
		})
	}

	// Strangers are told what they are told everywhere, and so is who may go on.
	missing := get(h, "/notes", "alice", "Tenant", "nobody")
	for name, res := range map[string]*httptest.ResponseRecorder{
		"choice": get(h, "/notes", "alice", "Tenant", "globex"),
		"place":  get(h, "/notes", "alice", "Host", "globex.test"),
		"nobody": get(h, "/notes", "eve", "Host", "globex.test"),
	} {
		wantProblem(t, res, http.StatusForbidden)
		if res.Body.String() != missing.Body.String() || res.Header().Get(tenantmw.NodesHeader) != "" {
			t.Errorf("%s: a stranger learns of the tenant: %s, %v", name, res.Body, res.Header())
		}
	}
	wantProblem(t, get(h, "/open", "", "Host", "nobody.test"), http.StatusNotFound)
	wantBody(t, get(h, "/notes", "alice"), "of acme")
	wantBody(t, get(h, "/open", ""), "ok")
}

// TestNothingRunsForAMisdirectedRequest is what makes it safe to send any request again, to another node.
func TestNothingRunsForAMisdirectedRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.at(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	mw := newMiddleware(t, node.tn)
	var ran []string
	h := mw.Tenant(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { ran = append(ran, r.Header.Get("User")) }))
	for _, user := range []string{"alice", "bob"} {
		r := httptest.NewRequest(http.MethodPost, "/notes", errReader{t})
		r.Header.Set("User", user)
		h.ServeHTTP(httptest.NewRecorder(), r)
	}
	if !slices.Equal(ran, []string{"alice"}) {
		t.Errorf("the handler ran for %q", ran)
	}
}

// TestAHandlersRefusalIsNotMisdirected: the tenant leaves the node after the handler has written. To send the request again would do that twice.
func TestAHandlersRefusalIsNotMisdirected(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := w.at(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	w.at(t, tenancy.Config{OnlyTenants: []string{"acme-2"}, NodeAddress: "10.0.0.2:80"})
	mw := newMiddleware(t, node.tn)
	h := mw.Tenant(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if _, err := node.tn.DB().Exec(r.Context(), `INSERT INTO notes VALUES ('once')`); err != nil {
			t.Error(err)
		}
		if err := w.tn.Catalog().Rename(t.Context(), w.acme.ID, "acme-2"); err != nil {
			t.Error(err)
		}
		for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if err := node.tn.DB().QueryRow(r.Context(), `SELECT 1`).Scan(new(int)); err != nil {
				mw.Error(rw, r, err)
				return
			}
		}
	}))
	res := get(h, "/", "alice")
	if p := wantProblem(t, res, http.StatusServiceUnavailable); p.Nodes != nil || res.Header().Get(tenantmw.NodesHeader) != "" || res.Header().Get("Retry-After") != "1" {
		t.Errorf("got %v %s", res.Header(), res.Body)
	}
}

// errReader is a body that nobody may read.
type errReader struct{ t *testing.T }

func (r errReader) Read([]byte) (int, error) {
	r.t.Error("the body was read")
	return 0, http.ErrBodyReadAfterClose
}

// TestNodesAreNamedByTheMiddlewareAlone: an error that a handler passes on names none, whatever is in it.
func TestNodesAreNamedByTheMiddlewareAlone(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	refusal := &tenancy.NotServedError{Nodes: []string{"a:1", "b:2"}}
	for name, err := range map[string]error{
		"bare": refusal, "wrapped": &tenancy.Error{Op: "query", Name: "acme", Err: refusal},
		"met_on_a_failures_way": &wrongClass{tenancy.ErrPrimaryUnavailable, refusal},
	} {
		t.Run(name, func(t *testing.T) {
			res := httptest.NewRecorder()
			tenantmw.ProblemOf(r, err).Write(res)
			if p := wantProblem(t, res, http.StatusServiceUnavailable); p.Nodes != nil || res.Header()[tenantmw.NodesHeader] != nil {
				t.Errorf("nodes %q, header %q", p.Nodes, res.Header()[tenantmw.NodesHeader])
			}
		})
	}
	res := httptest.NewRecorder()
	tenantmw.Problem{Status: http.StatusMisdirectedRequest, Nodes: refusal.Nodes}.Write(res)
	if got := res.Header()[tenantmw.NodesHeader]; !slices.Equal(got, []string{"a:1, b:2"}) {
		t.Errorf("header %q", got)
	}
}

// wrongClass is a failure to find out that met a refusal on the way.
type wrongClass struct{ failure, refusal error }

func (e *wrongClass) Error() string   { return e.failure.Error() }
func (e *wrongClass) Unwrap() []error { return []error{e.failure, e.refusal} }
