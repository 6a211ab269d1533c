package tenancy

import (
	"context"
	"fmt"
)

// Session is what a context carries about its caller: who, for which tenant, in which role.
// It is an immutable value, safe for concurrent use; the zero Session is that of an anonymous
// caller without a tenant. Only [Tenancy.Resolve], [Tenancy.Enter] and [AsHost] put one on a context,
// so code cannot make itself a key to a tenant.
type Session struct {
	user   UserKey
	role   Role
	source string
	tenant *Tenant // shared and never written; nil: none
	record *record // where tenant was read, when it was; a checkout asks whether it is still current
	host   bool
}

// User returns the key of the authenticated user, "" for an anonymous caller.
func (s Session) User() UserKey { return s.user }

// Role returns the user's role in the tenant, "" without a membership.
func (s Session) Role() Role { return s.role }

// IsHost reports whether the session is the host's: it belongs to no tenant. A host user has a
// user key, the anonymous host session has none.
func (s Session) IsHost() bool { return s.host }

// Tenant returns the session's tenant, false when it has none.
func (s Session) Tenant() (Tenant, bool) {
	if s.tenant == nil {
		return Tenant{}, false
	}
	return *s.tenant, true
}

// Source names what decided on the tenant: "membership", "enter", "detached host" or the name of a hint's source.
func (s Session) Source() string { return s.source }

// Format writes user, role, tenant and source, whatever the verb.
func (s Session) Format(f fmt.State, _ rune) {
	name := "none"
	if s.tenant != nil {
		name = fmt.Sprintf("%q (id %d)", s.tenant.Name, s.tenant.ID)
	}
	fmt.Fprintf(f, "session of user %q, role %q, tenant %s, by %s", string(s.user), string(s.role), name, s.source)
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
func AsHost(ctx context.Context) context.Context {
	s := Session{host: true, source: "host"}
	if from := sessionOf(ctx); from != nil {
		s.user = from.user
	}
	return withSession(ctx, s)
}
