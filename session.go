package tenancy

import (
	"context"
	"fmt"
	"time"
)

// Session is what a context carries about its caller: who, for which tenant, in which role.
// It is an immutable value, safe for concurrent use; the zero Session is that of an anonymous
// caller without a tenant. Only [Tenancy.Resolve], [Tenancy.Enter], [Tenancy.Impersonate] and [AsHost]
// put one on a context, so code cannot make itself a key to a tenant.
type Session struct {
	user    UserKey
	role    Role
	source  string
	tenant  *Tenant // shared and never written; nil: none
	record  *record // where tenant was read, when it was; a checkout asks whether it is still current
	visit   *Visit  // shared and never written; nil: none
	realm   realm   // of the Tenancy that made it; a manager of one primary is nobody at another
	host    bool
	manager bool // the user is one of the host's
	work    bool // the service's own work, for which no membership was asked
	refused bool // a switch inside a transaction: nothing works on it
}

// Caller is which of four a session's caller is.
type Caller int

const (
	// Anonymous is nobody in particular: no tenant is known and no host user logged in. It opens nothing.
	Anonymous Caller = iota
	// HostUser works for the host and is in no tenant.
	HostUser
	// TenantUser is logged in and in a tenant: a member, or a host manager on a visit.
	TenantUser
	// TenantGuest is at a tenant's place (its domain, its path) and not logged in.
	TenantGuest
)

// String returns the name in lower case: "anonymous", "host user", "tenant user" or "tenant guest".
func (c Caller) String() string {
	switch c {
	case HostUser:
		return "host user"
	case TenantUser:
		return "tenant user"
	case TenantGuest:
		return "tenant guest"
	}
	return "anonymous"
}

// Caller tells which of the four states the session is in.
func (s Session) Caller() Caller {
	switch {
	case s.tenant != nil && s.user != "":
		return TenantUser
	case s.tenant != nil:
		return TenantGuest
	case s.IsManager():
		return HostUser
	}
	return Anonymous
}

// User returns the key of the authenticated user, "" for an anonymous caller.
func (s Session) User() UserKey { return s.user }

// Role returns the user's role in the tenant, "" without a membership.
func (s Session) Role() Role { return s.role }

// IsHost reports whether the session is the host's: it belongs to no tenant. It grants nothing: an
// anonymous caller without a tenant has such a session too, and so has what [AsHost] returns. Who may do the host's
// work is told by [Session.IsManager].
func (s Session) IsHost() bool { return s.host }

// IsManager reports whether the user is one of the host's (Config.HostManagers, or called so by the
// resolver), in whatever tenant the session is.
func (s Session) IsManager() bool { return s.manager && s.user != "" }

// Tenant returns the session's tenant, false when it has none.
func (s Session) Tenant() (Tenant, bool) {
	if s.tenant == nil {
		return Tenant{}, false
	}
	return *s.tenant, true
}

// Source names what decided on the tenant: "membership", "enter", "impersonate", "host", "single tenant" or the source of a hint, such as "header".
func (s Session) Source() string { return s.source }

// Visit returns why and until when a host manager is in the tenant, false for everyone else.
func (s Session) Visit() (Visit, bool) {
	if s.visit == nil {
		return Visit{}, false
	}
	return *s.visit, true
}

// Format writes user, role, tenant, source and visit, whatever the verb.
func (s Session) Format(f fmt.State, _ rune) {
	name := "none"
	if s.tenant != nil {
		name = fmt.Sprintf("%q (id %d)", s.tenant.Name, s.tenant.ID)
	}
	fmt.Fprintf(f, "session of user %q, role %q, tenant %s, by %s", string(s.user), string(s.role), name, s.source)
	if s.visit != nil {
		fmt.Fprintf(f, ", on a visit until %s: %q", s.visit.Until.UTC().Format("2006-01-02 15:04:05Z"), s.visit.Reason)
	}
}

// sessionKey is the key of the session on a context; its address is the identity.
type sessionKey struct{}

// sessionContext carries a Session by value: one allocation a request, where context.WithValue
// and a separate *Session are two.
type sessionContext struct {
	context.Context
	session Session
}

func (c *sessionContext) Value(key any) any {
	if _, ok := key.(sessionKey); ok {
		return &c.session
	}
	return c.Context.Value(key)
}

// Format writes the session alone, whatever the verb: a context is printed by accident, with all that it points to.
func (c *sessionContext) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "context with %v", c.session) }

func withSession(ctx context.Context, s Session) context.Context {
	return &sessionContext{Context: ctx, session: s}
}

// sessionOf returns the session of ctx, nil when it has none.
func sessionOf(ctx context.Context) *Session {
	s, _ := ctx.Value(sessionKey{}).(*Session)
	return s
}

// FromContext returns the session that ctx carries, false when no session was put on it.
func FromContext(ctx context.Context) (Session, bool) {
	s := sessionOf(ctx)
	if s == nil {
		return Session{}, false
	}
	return *s, true
}

// Session returns the session of ctx if it is good for tn: one that tn made, and not that of a visit that is over. The middleware's guards ask
// it. It costs no look-up, and says nothing of what changed since the session was made: that is [Tenancy.Check].
//
// The error is [ErrNoTenant] when ctx has no session, [ErrTenantMismatch] for one of another primary or of a switch inside a transaction, and [ErrForbidden] after a visit.
func (tn *Tenancy) Session(ctx context.Context) (Session, error) {
	const op = "session"
	s := sessionOf(ctx)
	switch {
	case s == nil:
		return Session{}, &Error{Op: op, Err: errNoSession}
	case s.refused:
		return Session{}, &Error{Op: op, Err: errSwitchInTx}
	case s.realm != tn.realm && (s.tenant != nil || s.user != ""):
		return Session{}, &Error{Op: op, Err: hinted(ErrTenantMismatch, "the context's session was made by another primary")}
	}
	if err := s.visit.over(time.Now()); err != nil {
		return Session{}, &Error{Op: op, Tenant: s.tenant.ID, Name: s.tenant.Name, Err: err}
	}
	return *s, nil
}

// TenantFrom returns the tenant of ctx. Without one the error is [ErrNoTenant].
func TenantFrom(ctx context.Context) (Tenant, error) {
	s := sessionOf(ctx)
	if s == nil || s.tenant == nil {
		return Tenant{}, errNoTenant(s)
	}
	return *s.tenant, nil
}

// Detach returns a context that carries the session of ctx and nothing else: no deadline, no
// cancellation, no other value. It is for work that outlives a request. Keeping the request's
// context instead is a known way to cross tenants: routers reuse what they put on it
// (chi pools its route context, and a kept one answers with another request's parameters).
//
// The session says who; whether the tenant may be served is still decided at each use.
func Detach(ctx context.Context) context.Context {
	s := sessionOf(ctx)
	if s == nil {
		return context.Background()
	}
	return withSession(context.Background(), *s)
}

// AsHost returns a context of the host: the user stays, the tenant is removed, and nothing is
// granted. [Tenancy.DB] refuses it with [ErrNoTenant]; host data is reached through [Tenancy.Host].
//
// Inside [TenantAwareDB.InTx] it is a switch, which both refuse with [ErrTenantMismatch].
func AsHost(ctx context.Context) context.Context {
	s := Session{host: true, source: "host", refused: inTx(ctx)}
	if from := sessionOf(ctx); from != nil {
		s.user, s.manager, s.realm = from.user, from.manager, from.realm
	}
	return withSession(ctx, s)
}
