package middleware_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

func TestUsersReachTheirOwnTenantAndNoOther(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithContributors(byHeader))
	wantBody(t, get(h, "/notes", "alice"), "of acme")
	wantBody(t, get(h, "/notes", "bob"), "of globex")
	wantBody(t, get(h, "/notes", "alice", "Tenant", "acme"), "of acme")
	wantBody(t, get(h, "/open", ""), "ok")
	wantProblem(t, get(h, "/notes", ""), http.StatusUnauthorized)
	wantProblem(t, get(h, "/notes", "", "Tenant", "acme"), http.StatusUnauthorized)
	wantProblem(t, get(h, "/open", "eve"), http.StatusForbidden)

	foreign, missing := get(h, "/notes", "alice", "Tenant", "globex"), get(h, "/notes", "alice", "Tenant", "initech")
	wantProblem(t, foreign, http.StatusForbidden)
	if foreign.Body.String() != missing.Body.String() || fmt.Sprint(foreign.Result().Header) != fmt.Sprint(missing.Result().Header) {
		t.Errorf("a foreign and a missing tenant can be told apart:\n%v %s\n%v %s", foreign.Result().Header, foreign.Body, missing.Result().Header, missing.Body)
	}

	// With SQL that alice injects she reaches for bob's table by its full name, which she may not read, which is not in her database, or where she sees her own rows.
	d, err := w.tn.Catalog().DataSource(t.Context(), w.globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	mw := newMiddleware(t, w.tn)
	wantBody(t, get(mw.Tenant(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var title string
		err := w.tn.DB().QueryRow(r.Context(), `SELECT title FROM `+pgx.Identifier{d.Schema, "notes"}.Sanitize()+` WHERE title <> 'of acme'`).Scan(&title)
		fmt.Fprint(rw, title, errors.Is(err, pgx.ErrNoRows) || err != nil && (strings.Contains(err.Error(), "42501") || strings.Contains(err.Error(), "42P01")))
	})), "/", "alice"), "true")
}

func TestUserOfSeveralTenantsChooses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithContributors(byHeader))
	initech := w.create(t, "initech", "")
	for _, id := range []tenancy.ID{w.acme.ID, w.globex.ID, initech.ID} {
		if err := w.tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "dave", Tenant: id}); err != nil {
			t.Fatal(err)
		}
	}
	wantBody(t, get(h, "/notes", "dave"), "of acme") // the first one became the default
	if err := w.tn.Catalog().RemoveMember(t.Context(), w.acme.ID, "dave"); err != nil {
		t.Fatal(err)
	}
	p := wantProblem(t, get(h, "/notes", "dave"), http.StatusConflict)
	if want := []string{"globex", "initech"}; !slices.Equal(p.Tenants, want) {
		t.Errorf("choices: got %v, want %v", p.Tenants, want)
	}
	wantBody(t, get(h, "/notes", "dave", "Tenant", "globex"), "of globex")
	wantProblem(t, get(h, "/notes", "dave", "Tenant", "acme"), http.StatusForbidden)
	if err := w.tn.Catalog().SetDefault(t.Context(), "dave", initech.ID); err != nil {
		t.Fatal(err)
	}
	wantBody(t, get(h, "/notes", "dave"), "of initech")
}

func TestHintsThatDisagreeAreRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithContributors(byHeader, byDomain))
	wantBody(t, get(h, "/notes", "alice", "Host", "acme.test", "Tenant", "acme"), "of acme")
	wantProblem(t, get(h, "/notes", "alice", "Host", "globex.test", "Tenant", "acme"), http.StatusForbidden)
	wantProblem(t, get(h, "/notes", "alice", "Host", "globex.test"), http.StatusForbidden)
}

func TestTenantOutOfServiceTellsItsMembersAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithContributors(byDomain))
	for _, step := range []struct {
		name   string
		do     func(context.Context) error
		status int
		detail string
		retry  string
	}{
		{"suspended", func(ctx context.Context) error {
			return w.tn.Catalog().Suspend(ctx, w.acme.ID, tenancy.Suspension{Message: "unpaid"})
		}, 403, "unpaid", ""},
		{"maintenance", func(ctx context.Context) error {
			return w.tn.Catalog().Suspend(ctx, w.acme.ID, tenancy.Suspension{Message: "back at 9", Maintenance: true, RetryAfter: 90 * time.Second})
		}, 503, "back at 9", "90"},
		{"deleted", func(ctx context.Context) error { return w.tn.Catalog().Delete(ctx, w.acme.ID) }, 410, "", ""},
	} {
		t.Run(step.name, func(t *testing.T) {
			if err := step.do(t.Context()); err != nil {
				t.Fatal(err)
			}
			res := get(h, "/notes", "alice")
			if p := wantProblem(t, res, step.status); p.Detail != step.detail || res.Header().Get("Retry-After") != step.retry {
				t.Errorf("got detail %q and Retry-After %q", p.Detail, res.Header().Get("Retry-After"))
			}
			nobody, unknown := get(h, "/open", "", "Host", "acme.test"), get(h, "/open", "", "Host", "nobody.test")
			wantProblem(t, nobody, http.StatusNotFound)
			if nobody.Body.String() != unknown.Body.String() {
				t.Errorf("anonymous callers learn of the tenant: %s, %s", nobody.Body, unknown.Body)
			}
			wantProblem(t, get(h, "/notes", "eve", "Host", "acme.test"), http.StatusForbidden)
			wantBody(t, get(h, "/notes", "bob"), "of globex")
		})
	}
	if err := w.tn.Catalog().Restore(t.Context(), w.acme.ID); err != nil {
		t.Fatal(err)
	}
	wantBody(t, get(h, "/notes", "alice"), "of acme")
}

func TestTenantSuspendedBetweenResolveAndQuery(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mw := newMiddleware(t, w.tn)
	h := mw.Tenant(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if err := w.tn.Catalog().Suspend(t.Context(), w.acme.ID, tenancy.Suspension{Message: "unpaid"}); err != nil {
			t.Error(err)
		}
		_, err := w.tn.DB().Exec(r.Context(), `INSERT INTO notes VALUES ('late')`)
		mw.Error(rw, r, err)
	}))
	if p := wantProblem(t, get(h, "/", "alice"), http.StatusForbidden); p.Type != "urn:tenancy:problem:tenant-suspended" || p.Detail != "unpaid" {
		t.Errorf("got %+v", p)
	}
}

func TestUnreachablePrimaryIsNeverNotFound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithContributors(byDomain))
	wantBody(t, get(h, "/notes", "alice"), "of acme")

	u, err := url.Parse(w.fleet.PrimaryURL)
	if err != nil {
		t.Fatal(err)
	}
	primary := strings.TrimPrefix(u.Path, "/")
	admin := w.fleet.Admin(t, "tenants")
	if _, err := admin.Exec(t.Context(), `ALTER DATABASE `+pgx.Identifier{primary}.Sanitize()+` ALLOW_CONNECTIONS false`); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, primary); err != nil {
		t.Fatal(err)
	}
	for name, res := range map[string]*httptest.ResponseRecorder{
		"a user nobody asked about yet": get(h, "/notes", "bob"),
		"an unknown user":               get(h, "/notes", "eve"),
		"an anonymous caller's place":   get(h, "/open", "", "Host", "nobody.test"),
	} {
		t.Log(name)
		wantProblem(t, res, http.StatusServiceUnavailable)
		if res.Header().Get("Retry-After") == "" {
			t.Error("Retry-After is missing")
		}
	}
	wantBody(t, get(h, "/notes", "alice"), "of acme") // known users go on for StaleGrace
}

func TestWhoMayPass(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if err := w.tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "amy", Tenant: w.acme.ID}); err != nil {
		t.Fatal(err)
	}
	h := w.serve(t, tenantmw.WithContributors(byDomain))
	for _, c := range []struct {
		user                        string
		notes, host, admin, member_ int
	}{
		{"alice", 200, 403, 200, 200},
		{"amy", 200, 403, 403, 200},
		{"root", 403, 200, 403, 403}, // a host user is in no tenant
		{"eve", 403, 403, 403, 403},
		{"", 401, 401, 401, 401},
	} {
		for path, want := range map[string]int{"/notes": c.notes, "/host": c.host, "/admin": c.admin, "/member": c.member_} {
			if got := get(h, path, c.user).Code; got != want {
				t.Errorf("%q at %s: got %d, want %d", c.user, path, got, want)
			}
		}
	}
	wantProblem(t, get(h, "/notes", "", "Host", "acme.test"), http.StatusUnauthorized) // a known tenant, and nobody in it
}

func TestMissingTenantMiddlewareIsToldToTheLogAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var log bytes.Buffer
	mw, err := tenantmw.New(w.tn, tenantmw.UserKeyFunc(userOf), tenantmw.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	for _, require := range []func(http.Handler) http.Handler{mw.RequireTenant, mw.RequireHostUser, mw.RequireRole(tenancy.RoleMember)} {
		log.Reset()
		res := get(require(http.HandlerFunc(ok)), "/path", "alice")
		wantProblem(t, res, http.StatusInternalServerError)
		if strings.Contains(res.Body.String(), "middleware") || !strings.Contains(log.String(), "middleware.Tenant") || !strings.Contains(log.String(), "/path") {
			t.Errorf("body %q, log %q", res.Body, &log)
		}
	}
	log.Reset()
	wantProblem(t, get(mw.Tenant(http.HandlerFunc(ok)), "/", "eve"), http.StatusForbidden)
	if log.Len() > 0 {
		t.Errorf("a refusal is no failure of the service: %q", &log)
	}
}

func TestErrorsOfTheServicesOwnParts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, c := range []struct {
		name   string
		user   tenancy.UserKey
		err    error
		hint   error
		status int
	}{
		{"wrong_credentials", "", errors.New("canary"), nil, 401},
		{"a_key_with_an_error_is_not_believed", "alice", errors.New("canary"), nil, 401},
		{"credentials_that_could_not_be_checked", "", fmt.Errorf("canary: %w", tenancy.ErrPrimaryUnavailable), nil, 503},
		{"credentials_that_took_too_long", "", fmt.Errorf("canary: %w", context.DeadlineExceeded), nil, 503},
		{"a_user_key_that_is_none", "a\x00b", nil, nil, 400},
		{"a_user_key_beyond_256_bytes", tenancy.UserKey(strings.Repeat("canary", 50)), nil, nil, 400},
		{"a_hint_that_cannot_be_read", "alice", nil, errors.New("canary"), 400},
		{"a_hint_that_could_not_be_looked_up", "alice", nil, fmt.Errorf("canary: %w", tenancy.ErrPrimaryUnavailable), 503},
	} {
		t.Run(c.name, func(t *testing.T) {
			mw, err := tenantmw.New(w.tn,
				tenantmw.UserKeyFunc(func(*http.Request) (tenancy.UserKey, error) { return c.user, c.err }),
				tenantmw.WithContributors(tenantmw.ContributorFunc(func(*http.Request) (tenancy.Hint, error) { return tenancy.Hint{}, c.hint })),
				tenantmw.WithLogger(silent))
			if err != nil {
				t.Fatal(err)
			}
			res := get(mw.Tenant(http.HandlerFunc(ok)), "/", "")
			wantProblem(t, res, c.status)
			if contains(res.Body.String(), "canary") {
				t.Errorf("the body holds an error's text: %q", res.Body)
			}
		})
	}
}

func TestErrorHandlerAnswersInsteadOfUs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithErrorHandler(func(rw http.ResponseWriter, r *http.Request, err error) {
		p := tenantmw.ProblemOf(r, err)
		if errors.Is(err, tenantmw.ErrUnauthenticated) {
			rw.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		}
		rw.WriteHeader(p.Status)
		fmt.Fprint(rw, "sorry")
	}))
	if res := get(h, "/notes", ""); res.Code != 401 || res.Body.String() != "sorry" || res.Header().Get("WWW-Authenticate") == "" {
		t.Errorf("got %d %q %v", res.Code, res.Body, res.Header())
	}
	if res := get(h, "/notes", "eve"); res.Code != 403 || res.Body.String() != "sorry" {
		t.Errorf("got %d %q", res.Code, res.Body)
	}
}

func TestClosedTenancyIsUnavailable(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t)
	wantBody(t, get(h, "/notes", "alice"), "of acme")
	if err := w.tn.Close(); err != nil {
		t.Fatal(err)
	}
	for _, user := range []string{"alice", "bob", "eve"} {
		wantProblem(t, get(h, "/notes", user), http.StatusServiceUnavailable)
	}
}

func TestNewRefusesWhatIsNilRepeatedOrMissing(t *testing.T) {
	t.Parallel()
	tn, users := &tenancy.Tenancy{}, tenantmw.UserKeyFunc(userOf)
	handler := tenantmw.WithErrorHandler(func(http.ResponseWriter, *http.Request, error) {})
	for name, make := range map[string]func() (*tenantmw.Middleware, error){
		"nil_tenancy":    func() (*tenantmw.Middleware, error) { return tenantmw.New(nil, users) },
		"nil_users":      func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, nil) },
		"nil_users_func": func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, tenantmw.UserKeyFunc(nil)) },
		"nil_option":     func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, users, nil) },
		"nil_handler":    func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, users, tenantmw.WithErrorHandler(nil)) },
		"handler_twice":  func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, users, handler, handler) },
		"nil_logger":     func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, users, tenantmw.WithLogger(nil)) },
		"logger_twice": func() (*tenantmw.Middleware, error) {
			return tenantmw.New(tn, users, tenantmw.WithLogger(silent), tenantmw.WithLogger(silent))
		},
		"no_contributors": func() (*tenantmw.Middleware, error) { return tenantmw.New(tn, users, tenantmw.WithContributors()) },
		"nil_contributor": func() (*tenantmw.Middleware, error) {
			return tenantmw.New(tn, users, tenantmw.WithContributors(byHeader, nil))
		},
		"nil_contributor_func": func() (*tenantmw.Middleware, error) {
			return tenantmw.New(tn, users, tenantmw.WithContributors(tenantmw.ContributorFunc(nil)))
		},
		"contributors_twice": func() (*tenantmw.Middleware, error) {
			return tenantmw.New(tn, users, tenantmw.WithContributors(byHeader), tenantmw.WithContributors(byDomain))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if mw, err := make(); mw != nil || !errors.Is(err, tenancy.ErrInvalid) {
				t.Errorf("got %v, %v, want ErrInvalid", mw, err)
			}
		})
	}
	mw, err := tenantmw.New(tn, users, handler, tenantmw.WithContributors(byHeader))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() == nil {
			t.Error("a role that nobody has was accepted")
		}
	}()
	mw.RequireRole("")
}

// TestDetachedWorkKeepsItsTenant lets work outlive its request. The router pools what it puts on a
// request's context and hands it to the next request, of another tenant; a detached context has no part in that.
func TestDetachedWorkKeepsItsTenant(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mw := newMiddleware(t, w.tn)
	var (
		work    sync.WaitGroup
		allOver = make(chan struct{})
		mu      sync.Mutex
		seen    = map[*chi.Context]map[string]bool{} // route context -> tenants that had it
	)
	r := chi.NewRouter()
	r.Use(mw.Tenant, mw.RequireTenant)
	r.Get("/of/{tenant}/{n}", func(rw http.ResponseWriter, r *http.Request) {
		want, late, query := chi.URLParam(r, "tenant"), strings.HasSuffix(r.URL.Path, "0"), strings.HasSuffix(r.URL.Path, "00")
		route := chi.RouteContext(r.Context())
		mu.Lock()
		if seen[route] == nil {
			seen[route] = map[string]bool{}
		}
		seen[route][want] = true
		mu.Unlock()
		request, ctx := r.Context(), tenancy.Detach(r.Context())
		work.Go(func() {
			<-request.Done()
			if late {
				<-allOver
			}
			tenant, err := tenancy.TenantFrom(ctx)
			if err != nil || tenant.Name != want || ctx.Err() != nil || chi.RouteContext(ctx) != nil {
				t.Errorf("detached from %s: tenant %q, %v, %v", want, tenant.Name, err, ctx.Err())
			}
			if !query {
				return
			}
			var title string
			if err := w.tn.DB().QueryRow(ctx, `SELECT title FROM notes`).Scan(&title); err != nil || title != "of "+want {
				t.Errorf("detached from %s: read %q, %v", want, title, err)
			}
		})
	})
	server := httptest.NewServer(r)
	defer server.Close()
	var callers sync.WaitGroup
	for caller := range 8 {
		user, tenant := "alice", "acme"
		if caller%2 == 1 {
			user, tenant = "bob", "globex"
		}
		callers.Go(func() {
			for n := range 500 {
				req, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("%s/of/%s/%d", server.URL, tenant, n), nil)
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("User", user)
				res, err := server.Client().Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode != http.StatusOK {
					t.Errorf("%s: %d", user, res.StatusCode)
				}
			}
		})
	}
	callers.Wait()
	close(allOver)
	work.Wait()
	shared := 0
	for _, tenants := range seen {
		if len(tenants) > 1 {
			shared++
		}
	}
	if shared == 0 {
		t.Error("no route context served both tenants: this test shows nothing")
	}
}

func newMiddleware(t *testing.T, tn *tenancy.Tenancy) *tenantmw.Middleware {
	t.Helper()
	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(userOf), tenantmw.WithLogger(silent))
	if err != nil {
		t.Fatal(err)
	}
	return mw
}

func contains(s, part string) bool { return strings.Contains(strings.ToLower(s), part) }

func TestAnExemptRequestIsNotResolved(t *testing.T) {
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithExempt(func(r *http.Request) bool { return r.Header.Get("Probe") != "" }),
		tenantmw.WithContributors(tenantmw.Header("Tenant")))
	wantBody(t, get(h, "/open", "mallory", "Probe", "1", "Tenant", "two, names"), "ok")
	wantProblem(t, get(h, "/open", "mallory", "Tenant", "two, names"), http.StatusBadRequest)
	wantProblem(t, get(h, "/notes", "alice", "Probe", "1"), http.StatusInternalServerError) // guards refuse what was not resolved
}

func TestA401TellsHowToLogIn(t *testing.T) {
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithChallenge("Bearer"))
	for path, status := range map[string]int{"/notes": http.StatusUnauthorized, "/host": http.StatusUnauthorized, "/open": http.StatusOK} {
		res := get(h, path, "")
		if got := res.Header().Get("WWW-Authenticate"); res.Code != status || (got == "Bearer") != (status == http.StatusUnauthorized) {
			t.Errorf("%s: got %d, challenge %q", path, res.Code, got)
		}
	}
	if res := get(h, "/host", "alice"); res.Code != http.StatusForbidden || res.Header().Get("WWW-Authenticate") != "" {
		t.Errorf("got %d, challenge %q", res.Code, res.Header().Get("WWW-Authenticate"))
	}
	for name, opt := range map[string]tenantmw.Option{"empty": tenantmw.WithChallenge(""), "two_lines": tenantmw.WithChallenge("a\r\nb")} {
		if _, err := tenantmw.New(w.tn, tenantmw.UserKeyFunc(userOf), opt); !errors.Is(err, tenancy.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAManagerWhoIsAMemberReachesTheHost(t *testing.T) {
	w := newWorld(t)
	if err := w.tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "root", Tenant: w.acme.ID}); err != nil {
		t.Fatal(err)
	}
	mw := newMiddleware(t, w.tn)
	h := mw.Tenant(mw.RequireHostUser(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, err := w.tn.DB().Exec(r.Context(), `SELECT 1`)
		fmt.Fprint(rw, errors.Is(err, tenancy.ErrNoTenant))
	})))
	wantBody(t, get(h, "/", "root"), "true")
	wantProblem(t, get(h, "/", "alice"), http.StatusForbidden)
	asHost := mw.Tenant(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { // what code makes of itself is no right
		mw.RequireHostUser(http.HandlerFunc(ok)).ServeHTTP(rw, r.WithContext(tenancy.AsHost(r.Context())))
	}))
	wantProblem(t, get(asHost, "/", "alice"), http.StatusForbidden)
	wantBody(t, get(asHost, "/", "root"), "ok")
}
