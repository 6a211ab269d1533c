package tenancy

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/msmt-go/tenancy/internal/ident"
)

// TenantResolver turns a user key and hints into a tenant. The library loads and judges the
// tenant that it names, so a resolver cannot let anyone into one that is suspended or gone.
//
// Implementations are called for every request, concurrently, and answer from memory where they
// can. They return [ErrForbidden] for a user who has no business there, [ErrAmbiguousTenant],
// [ErrTenantNotFound] (for an anonymous caller) or [ErrPrimaryUnavailable]; any other error is refused as a failure of the service.
type TenantResolver interface {
	ResolveTenant(ctx context.Context, q Query) (Resolution, error)
}

// TenantResolverFunc is a function as a TenantResolver.
type TenantResolverFunc func(ctx context.Context, q Query) (Resolution, error)

// ResolveTenant calls f.
func (f TenantResolverFunc) ResolveTenant(ctx context.Context, q Query) (Resolution, error) {
	return f(ctx, q)
}

// Query is what is known of a caller.
type Query struct {
	User  UserKey // from the service's own authentication; "": anonymous
	Hints []Hint  // what the request says about its tenant; all must agree
}

// Hint is a request's word about its tenant. It is never believed by itself.
type Hint struct {
	Source string // "domain", "header", ...: shown in Session.Source
	Trust  Trust
	By     By
	Value  string // "" is no opinion
}

// Trust is how much a hint's place in the request is worth.
type Trust int

const (
	// Choice is anything the caller can set at will (header, cookie, query): it can only choose
	// among the tenants that the user belongs to, and is ignored for anonymous callers.
	Choice Trust = iota
	// Place is where the request went (domain, path): it can name a tenant for an anonymous caller too.
	Place
	// Identity comes from the service's authentication (a claim). It must still be a tenant of the user.
	Identity
)

// By is what a hint's value is.
type By int

const (
	ByName By = iota
	ByID
	ByDomain
)

// Resolution is a resolver's answer: a tenant with the user's role in it, or the host.
type Resolution struct {
	Tenant ID     // 0 with Host
	Role   Role   // in Tenant; "" for a caller who is not logged in
	Host   bool   // no tenant: a host user, or nobody
	Source string // what decided

	record *record // the tenant's, where the default resolver had it at hand; believed only while it is current
}

// AmbiguousError is a user with several tenants and no default, whose request names none.
// It matches [ErrAmbiguousTenant].
type AmbiguousError struct{ Tenants []Tenant }

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%v: the user belongs to %d tenants; name one, or set a default with Catalog.SetDefault", ErrAmbiguousTenant, len(e.Tenants))
}

func (e *AmbiguousError) Unwrap() error { return ErrAmbiguousTenant }

// Resolve finds the caller's tenant and returns a context that carries the session: for HTTP (the middleware
// calls it), RPC and jobs alike. The rules:
//
//   - A user without hints gets the default membership. Several and no default are an [*AmbiguousError];
//     none is the host for a host manager and [ErrForbidden] for everyone else.
//   - A user with hints gets the hinted tenant, if a member; hints that disagree, a foreign and a missing tenant are all ErrForbidden.
//   - An anonymous caller gets the tenant that a Place names, or a host session when none does. An unknown, suspended or deleted one is [ErrTenantNotFound].
//
// For members a tenant that is out of service is [ErrTenantSuspended], [ErrTenantMaintenance], [ErrTenantGone] or
// [ErrTenantNotReady]. Other errors: [ErrInvalid], [ErrPrimaryUnavailable] (never "not found"), [ErrClosed].
func (tn *Tenancy) Resolve(ctx context.Context, q Query) (context.Context, error) {
	const op = "resolve"
	if tn.closing.Load() {
		return nil, &Error{Op: op, Err: ErrClosed}
	}
	if q.User != "" {
		if err := ident.UserKey(string(q.User)); err != nil {
			return nil, &Error{Op: op, Err: invalid(fmt.Errorf("user key: %w", err))}
		}
	}
	res, err := tn.resolver.ResolveTenant(ctx, q)
	if err != nil {
		return nil, wrapOp(op, 0, err)
	}
	s := Session{user: q.User, role: res.Role, source: res.Source, host: res.Tenant == 0}
	if res.Tenant == 0 {
		if !res.Host { // a resolver's zero answer is no way in
			return nil, &Error{Op: op, Err: ErrForbidden}
		}
		return withSession(ctx, s), nil
	}
	r := res.record
	if !tn.view.current(r) || r.tenant.ID != res.Tenant {
		r, err = tn.view.record(ctx, res.Tenant)
	}
	if err == nil {
		err = r.served(op)
	}
	if err != nil {
		if q.User == "" && !isUnavailable(err) {
			err = ErrTenantNotFound
		}
		return nil, wrapOp(op, res.Tenant, err)
	}
	s.tenant, s.record = &r.tenant, r
	return withSession(ctx, s), nil
}

// Enter returns a context for one tenant, for jobs and for the service's own work. It checks
// that the tenant exists and is served; no membership is asked for, so the ID must not come
// from a request. The session has no role. The error is [ErrTenantNotFound], one of the
// tenant's states as in [Tenancy.Resolve], [ErrPrimaryUnavailable] or [ErrClosed].
func (tn *Tenancy) Enter(ctx context.Context, id ID) (context.Context, error) {
	if tn.closing.Load() {
		return nil, &Error{Op: "enter", Tenant: id, Err: ErrClosed}
	}
	r, err := tn.view.record(ctx, id)
	if err == nil {
		err = r.served("enter")
	}
	if err != nil {
		return nil, wrapOp("enter", id, err)
	}
	s := Session{tenant: &r.tenant, record: r, source: "enter"}
	if from := sessionOf(ctx); from != nil {
		s.user = from.user
	}
	return withSession(ctx, s), nil
}

// current returns what the catalog says now about the tenant of ctx: the context says who, the
// current record says whether. It is asked at every checkout.
func (tn *Tenancy) current(ctx context.Context, op string) (*record, error) {
	s := sessionOf(ctx)
	if s == nil || s.tenant == nil {
		return nil, wrapOp(op, 0, errNoTenant(s))
	}
	if s.tenant.realm != tn.realm {
		return nil, wrapOp(op, s.tenant.ID, hinted(ErrTenantMismatch, "the context's tenant belongs to another primary"))
	}
	r := s.record
	if !tn.view.current(r) {
		var err error
		if r, err = tn.view.record(ctx, s.tenant.ID); err != nil {
			return nil, wrapOp(op, s.tenant.ID, err)
		}
	}
	if r.tenant.State != StateActive || r.sourceErr != nil {
		return nil, r.served(op)
	}
	return r, nil
}

// wrapOp adds the operation to an error that has none yet.
func wrapOp(op string, id ID, err error) error {
	if _, ok := err.(*Error); ok {
		return err
	}
	return &Error{Op: op, Tenant: id, Err: err}
}

// defaultResolver answers from memberships in the primary.
type defaultResolver struct {
	view     *view
	managers []UserKey
}

func (r *defaultResolver) ResolveTenant(ctx context.Context, q Query) (Resolution, error) {
	if r.view.stale.Load() {
		return Resolution{}, errStale
	}
	hint, err := r.hinted(ctx, q)
	if err != nil {
		return Resolution{}, err
	}
	if q.User == "" {
		if hint.given && hint.id == 0 {
			return Resolution{}, ErrTenantNotFound
		}
		return Resolution{Tenant: hint.id, Host: !hint.given, Source: hint.source}, nil
	}
	members, found, err := r.view.users.get(ctx, q.User)
	if err != nil {
		return Resolution{}, lookupFailure(ctx, err)
	}
	if hint.given {
		for _, m := range members {
			if m.tenant == hint.id {
				return r.member(ctx, m, hint.source), nil
			}
		}
		return Resolution{}, ErrForbidden
	}
	if !found {
		if slices.Contains(r.managers, q.User) {
			return Resolution{Host: true, Source: "host"}, nil
		}
		return Resolution{}, ErrForbidden
	}
	for _, m := range members {
		if m.isDefault || len(members) == 1 {
			return r.member(ctx, m, "membership"), nil
		}
	}
	return Resolution{}, r.ambiguous(ctx, members)
}

// member is the answer for a membership, with the tenant's record. A record that cannot be had is not
// decided on here: the library asks for it again, and refuses.
func (r *defaultResolver) member(ctx context.Context, m *member, source string) Resolution {
	rec := m.record.Load()
	if !r.view.current(rec) {
		var err error
		if rec, err = r.view.record(ctx, m.tenant); err == nil {
			m.record.Store(rec)
		}
	}
	return Resolution{Tenant: m.tenant, Role: m.role, Source: source, record: rec}
}

// verdict is what all hints of a request say together.
type verdict struct {
	given  bool
	id     ID // 0: no such tenant
	source string
}

// hinted looks every hint up and refuses those that disagree. An unknown tenant is an answer (0), not an error: what becomes of it
// depends on who asks.
func (r *defaultResolver) hinted(ctx context.Context, q Query) (v verdict, err error) {
	for _, h := range q.Hints {
		if h.Value == "" || q.User == "" && h.Trust != Place {
			continue
		}
		id, err := r.find(ctx, h)
		if err != nil {
			return v, err
		}
		if v.given && v.id != id {
			return v, hinted(ErrForbidden, "the request names two tenants (%s and %s)", v.source, h.Source)
		}
		if !v.given {
			v = verdict{true, id, h.Source}
		}
	}
	return v, nil
}

func (r *defaultResolver) find(ctx context.Context, h Hint) (id ID, err error) {
	switch h.By {
	case ByName:
		if ident.Slug(h.Value) != nil {
			return 0, nil // no tenant has such a name; the primary need not be asked
		}
		id, _, err = r.view.names.get(ctx, h.Value)
	case ByDomain:
		domain, bad := ident.Domain(h.Value)
		if bad != nil {
			return 0, nil
		}
		id, _, err = r.view.domains.get(ctx, domain)
	case ByID:
		n, bad := strconv.ParseInt(h.Value, 10, 64)
		if bad != nil || n <= 0 || strings.HasPrefix(h.Value, "+") {
			return 0, nil
		}
		_, found, e := r.view.records.get(ctx, ID(n))
		if err = e; found {
			id = ID(n)
		}
	}
	if err != nil {
		return 0, lookupFailure(ctx, err)
	}
	return id, nil
}

// ambiguous names the user's own choices, without the tenants that are out of service.
func (r *defaultResolver) ambiguous(ctx context.Context, members []*member) error {
	e := &AmbiguousError{}
	for _, m := range members {
		rec, err := r.view.record(ctx, m.tenant)
		if err != nil {
			return err
		}
		if rec.served("resolve") == nil {
			e.Tenants = append(e.Tenants, rec.tenant)
		}
	}
	return e
}
