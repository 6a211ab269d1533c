// Package middleware puts the caller's tenant on every HTTP request, once, before any handler runs.
//
// It is plain net/http and fits chi, http.ServeMux and every router that takes
// func(http.Handler) http.Handler. Users of chi already import a package called middleware:
//
//	import tenantmw "github.com/msmt-go/tenancy/middleware"
//
//	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(userOfRequest))
//	r := chi.NewRouter()
//	r.Use(mw.Tenant)
//	r.With(mw.RequireTenant).Get("/notes", listNotes)      // db.Query(r.Context(), ...) is the tenant's
//	r.With(mw.RequireRole(tenancy.RoleAdmin)).Put("/plan", changePlan)
//	r.With(mw.RequireHostUser).Get("/tenants", listTenants)
//
// Who the user is comes from the service's own authentication, through a [UserKeyResolver]. What
// the request says about its tenant (domain, path, header) comes from each [Contributor] and is
// a hint, never a proof: [tenancy.Tenancy.Resolve] decides.
//
// # Errors
//
// Refusals are problem details (RFC 9457) that tell nothing of the inside, and errors.go alone decides
// on statuses. A tenant can be suspended between the middleware and a query, so handlers hand
// the errors of their queries to [Middleware.Error] and get the same answers.
package middleware

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/msmt-go/tenancy"
)

// Middleware resolves the tenants of one [tenancy.Tenancy]. It is made by [New], is immutable and safe
// for concurrent use; the zero value does not work, and nothing needs to be closed.
type Middleware struct {
	tn           *tenancy.Tenancy
	users        UserKeyResolver
	contributors []Contributor
	exempt       func(*http.Request) bool // nil: none is
	challenge    string                   // of a 401; "": none
	onError      func(http.ResponseWriter, *http.Request, error)
	log          *slog.Logger
}

// New makes a middleware for tn. users tells who the caller is.
//
// The error is [tenancy.ErrInvalid]: something required is nil, or an option is nil or given twice.
func New(tn *tenancy.Tenancy, users UserKeyResolver, opts ...Option) (*Middleware, error) {
	if tn == nil {
		return nil, invalid("tn is nil: give what tenancy.Open returned")
	}
	if f, ok := users.(UserKeyFunc); users == nil || ok && f == nil {
		return nil, invalid("users is nil: give the UserKeyResolver of the service's authentication")
	}
	var o options
	for i, opt := range opts {
		if opt == nil {
			return nil, invalid("opts[%d] is nil", i)
		}
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	m := &Middleware{tn: tn, users: users, contributors: o.contributors, exempt: o.exempt, challenge: o.challenge, onError: o.onError, log: o.log}
	if m.onError == nil {
		m.onError = func(w http.ResponseWriter, r *http.Request, err error) { ProblemOf(r, err).Write(w) }
	}
	if m.log == nil {
		m.log = slog.Default()
	}
	return m, nil
}

// Tenant resolves the request's tenant and puts the session on its context, for
// [tenancy.FromContext], [tenancy.TenantFrom] and the database. A request that cannot be
// resolved is answered with its problem and goes no further.
//
// A caller without credentials gets through, with an anonymous session that opens no data: pages for
// everyone need that. Routes for users say so with [Middleware.RequireTenant].
//
// Use it once on a request's way. A second one resolves anew, and its session wins.
func (m *Middleware) Tenant(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if m.exempt != nil && m.exempt(r) {
			next.ServeHTTP(w, r)
			return
		}
		q, err := m.query(r)
		if err != nil {
			m.Error(w, r, err)
			return
		}
		ctx, err := m.tn.Resolve(r.Context(), q)
		if errors.Is(err, tenancy.ErrNotServed) {
			err = fmt.Errorf("%w: %w", errMisdirected, err)
		}
		if err != nil {
			m.Error(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// query collects what is known of the caller. All contributors are asked: hints that disagree
// must be seen to be refused.
func (m *Middleware) query(r *http.Request) (q tenancy.Query, err error) {
	if q.User, err = m.users.UserKey(r); err != nil {
		return q, fmt.Errorf("%w: %w", ErrUnauthenticated, err)
	}
	if len(m.contributors) == 0 { // the hot path allocates no hints
		return q, nil
	}
	q.Hints = make([]tenancy.Hint, 0, len(m.contributors))
	for _, c := range m.contributors {
		h, err := c.Hint(r)
		if errors.Is(err, errMiswired) {
			return q, err // the service's own failure, and no fault of the request
		}
		if err != nil {
			return q, fmt.Errorf("%w: hint: %w", tenancy.ErrInvalid, err)
		}
		if h.Value != "" {
			q.Hints = append(q.Hints, h)
		}
	}
	return q, nil
}

// RequireTenant lets users of a tenant through, and host managers on a visit. Everyone else is refused: 401 without
// credentials, 403 for a host user.
func (m *Middleware) RequireTenant(next http.Handler) http.Handler {
	return m.require(next, inTenant)
}

// RequireHostUser lets users of the host through, and takes the tenant off the session of one who is a tenant's member too. Everyone
// else is refused: 401 without credentials, 403 for a tenant's user, its administrators included.
func (m *Middleware) RequireHostUser(next http.Handler) http.Handler {
	host := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s, _ := tenancy.FromContext(r.Context()); !s.IsHost() {
			r = r.WithContext(tenancy.AsHost(r.Context()))
		}
		next.ServeHTTP(w, r)
	})
	return m.require(host, tenancy.Session.IsManager)
}

// RequireRole lets users through who have the role in their tenant; an administrator has the
// member's role too. Everyone else is refused as by RequireTenant, with 403 for another role.
// It panics when role is "", which would be nobody's.
func (m *Middleware) RequireRole(role tenancy.Role) func(http.Handler) http.Handler {
	if role == "" {
		panic("tenancy/middleware: RequireRole of an empty role")
	}
	return func(next http.Handler) http.Handler {
		return m.require(next, func(s tenancy.Session) bool {
			return inTenant(s) && (s.Role() == role || role == tenancy.RoleMember && s.Role() == tenancy.RoleAdmin)
		})
	}
}

func inTenant(s tenancy.Session) bool {
	_, ok := s.Tenant()
	return ok
}

// require asks who the caller is before it asks for what: without a session of this primary it is the service's mistake.
func (m *Middleware) require(next http.Handler, may func(tenancy.Session) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch s, err := m.tn.Session(r.Context()); {
		case err != nil:
			m.Error(w, r, err)
		case s.User() == "":
			m.Error(w, r, ErrUnauthenticated)
		case !may(s):
			m.Error(w, r, tenancy.ErrForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// Error answers r for err, as the middleware answers its own: a handler calls it with the error of a query and
// returns. It must be called before anything was written to w.
//
// What is the service's own failure (500) is logged as an error, all else at debug level.
func (m *Middleware) Error(w http.ResponseWriter, r *http.Request, err error) {
	level, text := slog.LevelDebug, "tenancy: request refused"
	switch statusOf(r, err) {
	case http.StatusInternalServerError:
		level, text = slog.LevelError, "tenancy: request failed"
	case http.StatusUnauthorized:
		if m.challenge != "" {
			w.Header().Set("WWW-Authenticate", m.challenge)
		}
	}
	if m.log.Enabled(r.Context(), level) {
		m.log.Log(r.Context(), level, text, "method", r.Method, "path", r.URL.Path, "error", err)
	}
	m.onError(w, r, err)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: middleware.New: %s", tenancy.ErrInvalid, fmt.Sprintf(format, args...))
}
