package middleware

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy"
)

// ErrUnauthenticated: the request needs a user, and gave no credentials or wrong ones.
var ErrUnauthenticated = errors.New("tenancy/middleware: not authenticated")

// errMisdirected is [tenancy.ErrNotServed] as Middleware.Tenant meets it: no handler has run, and the request may be sent to another node.
var errMisdirected = errors.New("tenancy/middleware: the request is for another node")

// statusClientGone is what nginx logs for a caller who hung up. Nobody receives it; in an
// access log it is no failure of the service, which a 5xx would be.
const statusClientGone = 499

// answer is what a class of error means to a caller. This table is the one place that decides on statuses.
type answer struct {
	class  error
	status int
	name   string        // the last part of the problem's type; "": about:blank
	title  string        // "": the status's own text
	detail string        // the operator's message comes before it where operator is set
	retry  time.Duration // what Retry-After says when the error does not know better; 0: no header
	// operator: members may read the operator's message.
	operator bool
	// members: what an anonymous caller is not told: there it is "no such tenant".
	members bool
	// halfway: it came in the middle of a statement, which may have been a change, and done.
	halfway bool
}

// answers are tried in order. Those that mean "could not find out" come first: an error can match a refusal as well,
// and a refusal that was never established must not be claimed.
var answers = []answer{
	{class: errMisdirected, status: http.StatusMisdirectedRequest, name: "not-served",
		detail: "This node does not serve the tenant."},
	// Not 503, whatever broke the connection: a caller that tries again by itself would do it twice.
	{class: tenancy.ErrCommitUnknown, status: http.StatusInternalServerError, name: "outcome-unknown", title: "Outcome unknown",
		detail: "It is not known whether the change was made: look before you try again."},
	{class: tenancy.ErrPrimaryUnavailable, status: http.StatusServiceUnavailable, name: "unavailable",
		detail: "The service cannot look the tenant up at the moment.", retry: 2 * time.Second},
	{class: tenancy.ErrTenantUnavailable, status: http.StatusServiceUnavailable, name: "tenant-unavailable",
		detail: "The tenant's database cannot be reached at the moment.", retry: time.Second, members: true},
	{class: tenancy.ErrBusy, status: http.StatusServiceUnavailable, name: "busy",
		detail: "The tenant has too many requests under way.", retry: time.Second, members: true},
	{class: tenancy.ErrClosed, status: http.StatusServiceUnavailable, name: "unavailable",
		detail: "This node is shutting down.", retry: time.Second},
	{class: context.Canceled, status: http.StatusServiceUnavailable, name: "unavailable",
		detail: "The work was cut short.", retry: time.Second},
	{class: context.DeadlineExceeded, status: http.StatusServiceUnavailable, name: "unavailable",
		detail: "The answer took too long.", retry: time.Second},

	{class: ErrUnauthenticated, status: http.StatusUnauthorized,
		detail: "Valid credentials are required."},
	// One body for a foreign and a missing tenant: the difference is not the caller's to know.
	{class: tenancy.ErrForbidden, status: http.StatusForbidden, name: "forbidden",
		detail: "You have no access here."},
	{class: tenancy.ErrAmbiguousTenant, status: http.StatusConflict, name: "ambiguous-tenant", title: "Which tenant?",
		detail: "You belong to several tenants: name one of them in the request."},
	{class: tenancy.ErrTenantSuspended, status: http.StatusForbidden, name: "tenant-suspended", title: "Tenant is suspended",
		operator: true, members: true},
	{class: tenancy.ErrTenantMaintenance, status: http.StatusServiceUnavailable, name: "tenant-maintenance", title: "Tenant is under maintenance",
		retry: time.Minute, operator: true, members: true},
	{class: tenancy.ErrTenantGone, status: http.StatusGone, name: "tenant-gone", title: "Tenant was deleted", members: true},
	{class: tenancy.ErrTenantNotReady, status: http.StatusServiceUnavailable, name: "tenant-not-ready", title: "Tenant is being set up",
		retry: time.Second, members: true},
	{class: tenancy.ErrSchemaBehind, status: http.StatusServiceUnavailable, name: "tenant-updating", title: "Tenant is being updated",
		retry: 10 * time.Second, members: true},
	{class: tenancy.ErrTenantNotFound, status: http.StatusNotFound, name: "tenant-not-found", title: "No such tenant"},
	// Not 421: a handler met it, after work that a balancer must not repeat elsewhere.
	{class: tenancy.ErrNotServed, status: http.StatusServiceUnavailable, name: "tenant-unavailable",
		detail: "This node does not serve the tenant.", retry: time.Second},
	// The reason can repeat what the request said, which belongs into the log.
	{class: tenancy.ErrInvalid, status: http.StatusBadRequest,
		detail: "The request names its user or tenant in a form that is not accepted."},
	// Every other one, ErrNoTenant among them (the middleware is missing on the route), is the service's failure.
}

var (
	// refused is of a server that did nothing of what it was told.
	refused = answer{status: http.StatusServiceUnavailable, name: "tenant-unavailable",
		detail: "The tenant's database cannot be reached at the moment.", retry: time.Second, members: true}
	// ended is of a session that ended under a statement.
	ended    = answer{status: refused.status, name: refused.name, detail: refused.detail, retry: refused.retry, members: true, halfway: true}
	failed   = answer{status: http.StatusInternalServerError}
	notFound = answerTo(tenancy.ErrTenantNotFound)
	unknown  = answerTo(tenancy.ErrCommitUnknown)
)

func answerTo(err error) answer {
	for _, a := range answers {
		if errors.Is(err, a.class) {
			return a
		}
	}
	var server interface{ SQLState() string }
	if errors.As(err, &server) {
		switch server.SQLState() {
		case "57P03", "25006": // the server restarts or is read-only: the next try is told why, or works
			return refused
		case "57P01", "57P02": // the session was ended, as an operator or a restart does
			return ended
		case "08P01": // a pooler's, whose server is gone; the server's own is no FATAL one, and the session goes on
			if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.Severity == "FATAL" {
				return ended
			}
		case "57014": // of statement_timeout, or of an operator
			return answerTo(context.DeadlineExceeded)
		}
		return failed
	}
	if broken(err) {
		return ended
	}
	return failed
}

// broken says whether a connection broke, as those of a server do that crashes or is cut off. It need not have been the tenant's.
func broken(err error) bool {
	for _, sign := range []error{pgconn.ErrConnClosed, io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE, syscall.ETIMEDOUT} {
		if errors.Is(err, sign) {
			return true
		}
	}
	return false
}

// answerFor is answerTo for the caller of r.
func answerFor(r *http.Request, err error) answer {
	a := answerTo(err)
	if a.class == context.Canceled && r.Context().Err() != nil {
		return answer{status: statusClientGone, title: "Client closed the request"}
	}
	if (a.class == context.Canceled || a.class == context.DeadlineExceeded) && broken(err) {
		a.halfway = true // by its end the connection broke, and a statement may have been on it
	}
	if a.halfway && !safe(r.Method) {
		return unknown
	}
	if errors.Is(err, tenancy.ErrNoTenant) {
		// The middleware ran and found nobody: then it is the caller who has to say who they are.
		if s, ok := tenancy.FromContext(r.Context()); ok && s.User() == "" {
			return answerTo(ErrUnauthenticated)
		}
	}
	if a.members {
		if s, ok := tenancy.FromContext(r.Context()); ok && s.User() == "" {
			return notFound
		}
	}
	return a
}

// safe are the methods that ask for no change, RFC 9110 section 9.2.1: what they did can be done again.
func safe(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return false
}

func statusOf(r *http.Request, err error) int { return answerFor(r, err).status }
