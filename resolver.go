package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/msmt-go/tenancy/internal/ident"
)

// TenantResolver turns a user key and hints into a tenant. The library loads and judges the
// tenant that it names, so a resolver cannot let anyone into one that is suspended or gone.
//
// Implementations are called for every request, concurrently, and answer from memory where they
// can. [Tenancy.Check] calls them too, with the session's tenant as a Choice by ID. They return [ErrForbidden] for a user who has no business there, [ErrAmbiguousTenant],
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
	Hints []Hint  // what the request says about its tenant; all must agree, and the first one is Session.Source
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
//   - A user with hints gets the hinted tenant, if a member; hints that disagree, a foreign and a missing tenant are all
//     ErrForbidden. For names and IDs they are the same work too. Where the tenant exists, the audit trail says who tried.
//   - An anonymous caller gets the tenant that a Place names, or a session without a tenant when none does ([Anonymous]). An unknown, suspended or deleted one,
//     and two places that disagree, are [ErrTenantNotFound].
//
// For members a tenant that is out of service is [ErrTenantSuspended], [ErrTenantMaintenance], [ErrTenantGone] or
// [ErrTenantNotReady], as is one whose schema is older than [Config].MinVersion ([ErrSchemaBehind]); an active one that this node does not serve is a [*NotServedError], for guests too. Other errors: [ErrInvalid],
// [ErrTenantMismatch] inside a transaction of another tenant, [ErrPrimaryUnavailable] (never "not found"), [ErrClosed].
//
// With Config.SingleTenant everyone gets that tenant.
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
		if errors.Is(err, ErrForbidden) {
			tn.refused.note(q)
		}
		return nil, wrapOp(op, 0, err)
	}
	if res.Host && res.Tenant != 0 {
		return nil, &Error{Op: op, Tenant: res.Tenant, Err: hinted(ErrForbidden, "the resolver answered with a tenant and the host at once")}
	}
	if err := tn.refuseSwitch(ctx, res.Tenant); err != nil {
		return nil, &Error{Op: op, Tenant: res.Tenant, Err: err}
	}
	s := Session{user: q.User, source: res.Source, realm: tn.realm, manager: q.User != "" && (res.Host || tn.managers[q.User])}
	if res.Tenant == 0 {
		if !res.Host { // a resolver's zero answer is no way in
			return nil, &Error{Op: op, Err: ErrForbidden}
		}
		s.host = true
		return withSession(ctx, s), nil
	}
	if q.User != "" {
		s.role = res.Role
	}
	r := res.record
	if !tn.view.current(r) || r.tenant.ID != res.Tenant {
		r, err = tn.view.record(ctx, res.Tenant)
	}
	if err == nil {
		err = r.served(op)
	}
	if err != nil {
		if q.User == "" && outOfService(err) {
			err = ErrTenantNotFound
		}
		return nil, wrapOp(op, res.Tenant, err)
	}
	s.tenant, s.record = &r.tenant, r
	return withSession(ctx, s), nil
}

// outOfService reports whether err is a state of the tenant, which is its members' to know.
func outOfService(err error) bool {
	for _, state := range []error{ErrTenantSuspended, ErrTenantMaintenance, ErrTenantGone, ErrTenantNotReady, ErrSchemaBehind} {
		if errors.Is(err, state) {
			return true
		}
	}
	return false
}

// current returns what the catalog says now about the tenant of ctx: the context says who, the
// current record says whether. It is asked at every checkout.
func (tn *Tenancy) current(ctx context.Context, op string) (*record, error) {
	s := sessionOf(ctx)
	if s == nil || s.tenant == nil {
		return nil, wrapOp(op, 0, errNoTenant(s))
	}
	if s.visit != nil {
		if err := s.visit.over(time.Now()); err != nil {
			return nil, &Error{Op: op, Tenant: s.tenant.ID, Name: s.tenant.Name, Err: err}
		}
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
	if r.tenant.State != StateActive || r.sourceErr != nil || r.elsewhere != nil {
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

// defaultResolver answers from memberships.
type defaultResolver struct {
	view     *view
	managers map[UserKey]bool
}

func (r *defaultResolver) ResolveTenant(ctx context.Context, q Query) (Resolution, error) {
	if r.view.stale.Load() {
		return Resolution{}, errStale
	}
	if q.User == "" {
		return r.guest(ctx, q.Hints)
	}
	members, found, err := r.view.users.get(ctx, q.User)
	if err != nil {
		return Resolution{}, lookupFailure(ctx, err)
	}
	if slices.ContainsFunc(q.Hints, func(h Hint) bool { return h.Value != "" }) {
		return r.hinted(ctx, q, members)
	}
	if !found {
		if r.managers[q.User] {
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

// guest lets places alone speak. One that is unknown and two that disagree are told alike: the difference would say which tenants exist.
func (r *defaultResolver) guest(ctx context.Context, hints []Hint) (Resolution, error) {
	res := Resolution{Host: true}
	for _, h := range hints {
		if h.Value == "" || h.Trust != Place {
			continue
		}
		id, err := r.view.find(ctx, h)
		if err != nil {
			return Resolution{}, err
		}
		if id == 0 || !res.Host && res.Tenant != id {
			return Resolution{}, ErrTenantNotFound
		}
		if res.Host {
			res = Resolution{Tenant: id, Source: h.Source}
		}
	}
	return res, nil
}

// hinted chooses among the user's own tenants. All hints must mean the same one.
//
// What is compared is the user's memberships, not what the primary has: a foreign tenant and a missing one are refused
// after the same work. Whether there is such a tenant is found out afterwards, by who writes the audit trail.
func (r *defaultResolver) hinted(ctx context.Context, q Query, members []*member) (Resolution, error) {
	var chosen *member
	var source string
	for _, h := range q.Hints {
		if h.Value == "" {
			continue
		}
		m, err := r.own(ctx, h, members)
		switch {
		case err != nil:
			return Resolution{}, err
		case m == nil:
			return Resolution{}, ErrForbidden
		case chosen != nil && m != chosen:
			return Resolution{}, hinted(ErrForbidden, "the request names two tenants (by %s and by %s)", source, h.Source)
		case chosen == nil:
			chosen, source = m, h.Source
		}
	}
	return r.member(ctx, chosen, source), nil
}

// own returns the membership that a hint means, nil when it means none of the user's.
func (r *defaultResolver) own(ctx context.Context, h Hint, members []*member) (*member, error) {
	switch h.By {
	case ByName:
		return r.named(ctx, h.Value, members)
	case ByID:
		return belonging(members, parseID(h.Value)), nil
	}
	id, err := r.view.find(ctx, h) // domains are public
	if err != nil {
		return nil, err
	}
	return belonging(members, id), nil
}

// named returns the membership in the tenant of a name. Those that are at hand come first: a look-up that hangs for one of the user's
// tenants must not keep the user from another.
func (r *defaultResolver) named(ctx context.Context, name string, members []*member) (*member, error) {
	var found *member
	for _, m := range members {
		if rec := m.record.Load(); r.view.current(rec) && rec.tenant.Name == name {
			if found != nil { // names are unique in the primary
				return nil, fmt.Errorf("tenancy: tenants id %d and id %d have the same name: Config.Store says so", found.tenant, m.tenant)
			}
			found = m
		}
	}
	if found != nil {
		return found, nil
	}
	var unknown error
	for _, m := range members {
		rec, err := r.recordOf(ctx, m)
		if err != nil && !errors.Is(err, ErrTenantNotFound) {
			unknown = err // it may be the one that is meant
		} else if err == nil && rec.tenant.Name == name {
			return m, nil
		}
	}
	return nil, unknown
}

// belonging returns the membership in a tenant, nil when there is none.
func belonging(members []*member, id ID) *member {
	for _, m := range members {
		if m.tenant == id {
			return m
		}
	}
	return nil
}

// recordOf returns the record of a membership's tenant.
func (r *defaultResolver) recordOf(ctx context.Context, m *member) (*record, error) {
	if rec := m.record.Load(); r.view.current(rec) {
		return rec, nil
	}
	rec, err := r.view.record(ctx, m.tenant)
	if err == nil {
		m.record.Store(rec)
	}
	return rec, err
}

// member is the answer for a membership, with the tenant's record. A record that cannot be had is not
// decided on here: the library asks for it again, and refuses.
func (r *defaultResolver) member(ctx context.Context, m *member, source string) Resolution {
	rec, _ := r.recordOf(ctx, m)
	return Resolution{Tenant: m.tenant, Role: m.role, Source: source, record: rec}
}

// ambiguous names the user's own choices, without the tenants that are out of service.
func (r *defaultResolver) ambiguous(ctx context.Context, members []*member) error {
	e := &AmbiguousError{}
	for _, m := range members {
		rec, err := r.recordOf(ctx, m)
		if err != nil {
			return err
		}
		if err := rec.served("resolve"); err == nil || errors.Is(err, ErrNotServed) {
			e.Tenants = append(e.Tenants, rec.tenant)
		}
	}
	return e
}

// singleResolver gives everyone the one tenant of Config.SingleTenant.
type singleResolver struct {
	view   *view
	tenant ID
}

func (r *singleResolver) ResolveTenant(ctx context.Context, q Query) (Resolution, error) {
	if r.view.stale.Load() {
		return Resolution{}, errStale
	}
	res := Resolution{Tenant: r.tenant, Source: "single tenant"}
	if q.User == "" {
		return res, nil
	}
	for _, h := range q.Hints { // places and choices mean nothing here; a token that was made out for another tenant does
		if h.Trust != Identity || h.Value == "" {
			continue
		}
		if id, err := r.view.find(ctx, h); err != nil {
			return Resolution{}, err
		} else if id != r.tenant {
			return Resolution{}, ErrForbidden
		}
	}
	members, _, err := r.view.users.get(ctx, q.User)
	if err != nil {
		return Resolution{}, lookupFailure(ctx, err)
	}
	res.Role = RoleMember
	for _, m := range members {
		if m.tenant == r.tenant {
			res.Role = m.role
		}
	}
	return res, nil
}
