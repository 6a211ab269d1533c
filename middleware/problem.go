package middleware

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
)

// Problem is the body of a refusal, problem details of RFC 9457. A service can write its own in
// the same form: Problem{Status: 400, Detail: "title is missing"}.Write(w).
type Problem struct {
	Type    string   `json:"type"`              // a URN for a program to branch on; default "about:blank"
	Title   string   `json:"title"`             // default: the status's own text
	Status  int      `json:"status"`            // HTTP status; default 500
	Detail  string   `json:"detail,omitempty"`  // for a person; default: none
	Tenants []string `json:"tenants,omitempty"` // with 409: the names of the user's own tenants
	Nodes   []string `json:"nodes,omitempty"`   // with 421: the addresses of the nodes that serve the tenant; sent as NodesHeader too

	RetryAfter time.Duration `json:"-"` // sent as the header, in whole seconds and at least 1; 0: not sent
}

// ProblemOf returns what the caller of r may know of err. No part of the error's text is in it, but for the operator's
// message to the members of a tenant that is out of service. The statuses:
//
//	401  [ErrUnauthenticated], and [tenancy.ErrNoTenant] for an anonymous caller
//	403  [tenancy.ErrForbidden] (a foreign and a missing tenant alike), [tenancy.ErrTenantSuspended]
//	404  [tenancy.ErrTenantNotFound], and for anonymous callers every tenant that is out of service
//	409  [tenancy.ErrAmbiguousTenant], with the user's choices
//	410  [tenancy.ErrTenantGone]
//	421  [tenancy.ErrNotServed] from [Middleware.Tenant], with the nodes that serve the tenant; 503 where a handler meets it
//	400  [tenancy.ErrInvalid]
//	503  [tenancy.ErrTenantMaintenance], [tenancy.ErrTenantNotReady], [tenancy.ErrSchemaBehind], [tenancy.ErrPrimaryUnavailable],
//	     [tenancy.ErrTenantUnavailable], [tenancy.ErrBusy], [tenancy.ErrClosed], a deadline, and these answers of the server: 57P03 (it restarts), 25006 (it
//	     is read-only), 57014 (the statement took too long), for safe methods 57P01 and 57P02 (it ended the session), a pooler's 08P01 (its server is gone) and
//	     a broken connection: with Retry-After
//	499  the caller hung up
//	500  [tenancy.ErrCommitUnknown] and, for methods that are not safe, a session that ended so or broke, which are not to be tried again blindly; and everything else, such as [tenancy.ErrNoTenant]: the route lacks [Middleware.Tenant]
func ProblemOf(r *http.Request, err error) Problem {
	a := answerFor(r, err)
	p := Problem{Title: a.title, Status: a.status, Detail: a.detail, RetryAfter: a.retry}
	if a.name != "" {
		p.Type = "urn:tenancy:problem:" + a.name
	}
	if e, ok := errors.AsType[*tenancy.Error](err); ok {
		if a.retry > 0 && e.RetryAfter > 0 {
			p.RetryAfter = e.RetryAfter
		}
		if a.operator && e.Message != "" {
			p.Detail = e.Message
		}
	}
	if e, ok := errors.AsType[*tenancy.AmbiguousError](err); ok && a.class == tenancy.ErrAmbiguousTenant {
		for _, t := range e.Tenants {
			p.Tenants = append(p.Tenants, t.Name)
		}
	}
	if e, ok := errors.AsType[*tenancy.NotServedError](err); ok && a.class == errMisdirected {
		p.Nodes = e.Nodes
	}
	return p
}

// NodesHeader comes with 421 and lists the nodes that serve the tenant ([tenancy.Config].NodeAddress), comma separated: a
// balancer sends the request to one of them. Nothing of the service has run yet, so that is safe for every method.
const NodesHeader = "Tenancy-Nodes"

// Write sends p with its status. Headers that are set before, such as WWW-Authenticate, are sent with it.
func (p Problem) Write(w http.ResponseWriter) {
	if p.Status == 0 {
		p.Status = http.StatusInternalServerError
	}
	if p.Type == "" {
		p.Type = "about:blank"
	}
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	h := w.Header()
	for _, name := range []string{"Content-Length", "Content-Encoding", "Etag", "Last-Modified"} {
		h.Del(name) // they were meant for the body that does not come
	}
	h.Set("Content-Type", "application/problem+json")
	h.Set("X-Content-Type-Options", "nosniff")
	// An answer to one caller, at one moment: the next request may find the tenant resumed.
	h.Set("Cache-Control", "no-store")
	if p.RetryAfter > 0 {
		seconds := int64((p.RetryAfter + time.Second - 1) / time.Second)
		h.Set("Retry-After", strconv.FormatInt(seconds, 10))
	}
	if len(p.Nodes) > 0 {
		h.Set(NodesHeader, strings.Join(p.Nodes, ", "))
	}
	body, err := json.Marshal(p)
	if err != nil { // strings and a number: it cannot fail
		body = []byte(`{"type":"about:blank"}`)
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(body, '\n')) // a caller who is gone needs no answer
}
