package tenancy

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// Enter returns a context for one tenant, for jobs and for the service's own work: it lasts for the code that gets it, and
// the caller's ctx stays as it was. It checks that the tenant exists and is served here; no membership is asked for, so
// the ID must not come from a request. The session has no role, and the user of ctx.
//
// A visit goes on in what is entered from it, and ends when it ends.
//
// The error is [ErrTenantNotFound], one of the tenant's states as in [Tenancy.Resolve], [ErrNotServed],
// [ErrTenantMismatch] inside a transaction of another tenant, [ErrForbidden] after a visit, [ErrPrimaryUnavailable] or [ErrClosed].
func (tn *Tenancy) Enter(ctx context.Context, id ID) (context.Context, error) {
	r, err := tn.enter(ctx, "enter", id)
	if err != nil {
		return nil, err
	}
	s := Session{tenant: &r.tenant, record: r, source: "enter", work: true, realm: tn.realm}
	if from := sessionOf(ctx); from != nil {
		s.user, s.visit, s.manager = from.user, from.visit, from.manager && from.realm == tn.realm
	}
	return withSession(ctx, s), nil
}

func (tn *Tenancy) enter(ctx context.Context, op string, id ID) (*record, error) {
	if tn.closing.Load() {
		return nil, &Error{Op: op, Tenant: id, Err: ErrClosed}
	}
	if err := tn.refuseSwitch(ctx, id); err != nil {
		return nil, &Error{Op: op, Tenant: id, Err: err}
	}
	if err := visitOver(ctx); err != nil {
		return nil, &Error{Op: op, Tenant: id, Err: err}
	}
	r, err := tn.view.record(ctx, id)
	if err == nil {
		err = r.served(op)
	}
	if err != nil {
		return nil, wrapOp(op, id, err)
	}
	return r, nil
}

// Visit is a host manager's stay in a tenant.
type Visit struct {
	// Reason is why, for the audit trail and the log: 1 to 500 bytes on one line. Required.
	Reason string
	// Until is when the visit ends by itself. Default: in an hour. At most 24 hours ahead.
	Until time.Time
	// Role is what the manager may do. Default: RoleMember.
	Role Role
}

const (
	visitDefault = time.Hour
	visitLongest = 24 * time.Hour
)

func (v *Visit) check(now time.Time) error {
	def(&v.Role, RoleMember)
	if v.Until.IsZero() {
		v.Until = now.Add(visitDefault)
	}
	switch {
	case strings.TrimSpace(v.Reason) == "" || len(v.Reason) > 500 || !utf8.ValidString(v.Reason) || strings.ContainsFunc(v.Reason, unicode.IsControl):
		return invalid(errors.New("Visit.Reason: 1 to 500 bytes of UTF-8 on one line"))
	case !v.Until.After(now) || v.Until.Sub(now) > visitLongest:
		return invalid(fmt.Errorf("Visit.Until: from now on, at most %v ahead", visitLongest))
	case v.Role != RoleMember && v.Role != RoleAdmin:
		return invalid(fmt.Errorf("Visit.Role: %q is neither member nor admin", v.Role))
	}
	return nil
}

// Impersonate lets the host manager of ctx into a tenant to which they do not belong. Who, why and until when are written to the
// audit trail first, and to the log; [Session.Visit] shows it, and what the manager changes in the catalog meanwhile
// carries the reason. When the visit is over every further call is refused with [ErrForbidden], also on a transaction that was begun before; what runs then, and the commit of what was
// done, end as they would have.
//
// The error is [ErrForbidden] when ctx is not that of a host manager, [ErrInvalid], or one of [Tenancy.Enter].
func (tn *Tenancy) Impersonate(ctx context.Context, id ID, v Visit) (context.Context, error) {
	const op = "impersonate"
	from := sessionOf(ctx)
	if from == nil || !from.IsManager() || from.realm != tn.realm {
		return nil, &Error{Op: op, Tenant: id, Err: hinted(ErrForbidden, "only a host manager may: Config.HostManagers lists them")}
	}
	if err := v.check(time.Now()); err != nil {
		return nil, &Error{Op: op, Tenant: id, Err: err}
	}
	r, err := tn.enter(ctx, op, id)
	if err != nil {
		return nil, err
	}
	err = tn.primary.transact(ctx, func(tx pgx.Tx) error {
		return audit(ctx, tx, op, id, map[string]any{"reason": v.Reason, "until": v.Until.UTC(), "role": v.Role})
	})
	if err != nil {
		return nil, &Error{Op: op, Tenant: id, Name: r.tenant.Name, Err: refusal(op, err)}
	}
	tn.cfg.Logger.Info("tenancy: a host manager enters a tenant", "user", from.user, "tenant", id, "name", r.tenant.Name, "reason", v.Reason, "until", v.Until)
	return withSession(ctx, Session{user: from.user, manager: true, role: v.Role, source: op, tenant: &r.tenant, record: r, visit: &v, realm: tn.realm}), nil
}

// begin refuses a verb of the catalog after the end of a visit. One that has begun in time is not cut off in the middle of its steps.
func begin(ctx context.Context) (context.Context, error) {
	s := sessionOf(ctx)
	if s == nil || s.visit == nil {
		return ctx, nil
	}
	if err := s.visit.over(time.Now()); err != nil {
		return nil, err
	}
	begun, visit := *s, *s.visit
	visit.Until = time.Time{}
	begun.visit = &visit
	return withSession(ctx, begun), nil
}

// visitOver refuses what a visit's context asks for after its end.
func visitOver(ctx context.Context) error {
	if s := sessionOf(ctx); s != nil {
		return s.visit.over(time.Now())
	}
	return nil
}

// over refuses a visit whose time has come; nil is no visit, and without an end it is one whose verb has begun.
func (v *Visit) over(now time.Time) error {
	if v == nil || v.Until.IsZero() || now.Before(v.Until) {
		return nil
	}
	return hinted(ErrForbidden, "the visit ended at %s", v.Until.UTC().Format(time.RFC3339))
}

// Check asks again whether the session of ctx may go on: for a stream that outlives the moment in which it
// was resolved (server-sent events, a websocket), before each message or every few seconds. It is answered from memory, as a request is.
//
// The user's membership must still be there, with at least the session's role; a visit must not be over, nor its user no manager any more; the tenant must be
// served. A session of [Tenancy.Enter], or of a guest, needs the last alone; one without a tenant is allowed for ever, unless it was a host user's who is none any more.
//
// The error is [ErrForbidden], a state of the tenant as in [Tenancy.Resolve], [ErrPrimaryUnavailable] (nobody knows; the stream can wait or end),
// [ErrNoTenant] when ctx has no session, [ErrClosed], or ctx.Err() when ctx has ended.
func (tn *Tenancy) Check(ctx context.Context) error {
	const op = "check"
	s := sessionOf(ctx)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case tn.closing.Load():
		return &Error{Op: op, Err: ErrClosed}
	case s == nil:
		return &Error{Op: op, Err: errNoSession}
	case s.tenant == nil:
		return tn.checkHost(ctx, s)
	}
	r, err := tn.current(ctx, op)
	switch {
	case err != nil:
		return err
	case s.visit != nil:
		return tn.checkHost(ctx, s)
	case s.work || s.user == "":
		return nil
	}
	res, err := tn.resolver.ResolveTenant(ctx, Query{User: s.user,
		Hints: []Hint{{Source: s.source, Trust: Choice, By: ByID, Value: strconv.FormatInt(int64(r.tenant.ID), 10)}}})
	if err == nil && (res.Tenant != r.tenant.ID || !covers(res.Role, s.role)) {
		err = hinted(ErrForbidden, "the user's role was %q and is %q", s.role, res.Role)
	}
	if err != nil {
		return wrapOp(op, r.tenant.ID, err)
	}
	return nil
}

func (tn *Tenancy) checkHost(ctx context.Context, s *Session) error {
	switch {
	case s.realm != tn.realm && s.user != "":
		return &Error{Op: "check", Err: hinted(ErrTenantMismatch, "the context's session was made by another primary")}
	case !s.IsManager() || tn.managers[s.user]:
		return nil
	}
	res, err := tn.resolver.ResolveTenant(ctx, Query{User: s.user})
	if err == nil && !res.Host {
		err = hinted(ErrForbidden, "the user is no host user any more")
	}
	if err != nil {
		return wrapOp("check", 0, err)
	}
	return nil
}

// covers reports whether who has one role may do what the other may.
func covers(has, wants Role) bool {
	return has == wants || wants == "" || wants == RoleMember && has == RoleAdmin
}

// txKey is the key of the txOwner whose transaction InTx runs.
type txKey struct{}

type txOwner struct {
	realm  realm
	tenant ID // 0: the host
}

func withTx(ctx context.Context, o txOwner) context.Context {
	return context.WithValue(ctx, txKey{}, o)
}

func inTx(ctx context.Context) bool { return ctx.Value(txKey{}) != nil }

// refuseSwitch keeps code inside a transaction in its tenant: what it did under another would be neither in the
// transaction nor undone with it.
func (tn *Tenancy) refuseSwitch(ctx context.Context, to ID) error {
	o, in := ctx.Value(txKey{}).(txOwner)
	if !in || to != 0 && o == (txOwner{tn.realm, to}) {
		return nil
	}
	return errSwitchInTx
}

var errSwitchInTx = hinted(ErrTenantMismatch, "a transaction is open: end it before you switch to another tenant or to the host")
