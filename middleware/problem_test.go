package middleware_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

func TestEveryClassOfErrorHasItsStatus(t *testing.T) {
	const secret = "postgres://u:canary@db/x"
	op := func(e tenancy.Error) error { e.Op = "query"; e.Tenant = 7; e.Name = "canary"; return &e }
	for _, c := range []struct {
		name   string
		err    error
		status int
		typ    string
		retry  string
		detail string // "": not looked at
	}{
		{"forbidden", op(tenancy.Error{Err: tenancy.ErrForbidden}), 403, "forbidden", "", ""},
		{"ambiguous", op(tenancy.Error{Err: &tenancy.AmbiguousError{}}), 409, "ambiguous-tenant", "", ""},
		{"suspended", op(tenancy.Error{Err: tenancy.ErrTenantSuspended, Message: "unpaid"}), 403, "tenant-suspended", "", "unpaid"},
		{"maintenance", op(tenancy.Error{Err: tenancy.ErrTenantMaintenance, Message: "back at 9", RetryAfter: 90 * time.Second}), 503, "tenant-maintenance", "90", "back at 9"},
		{"maintenance_without_a_time", tenancy.ErrTenantMaintenance, 503, "tenant-maintenance", "60", ""},
		{"retry_is_rounded_up", op(tenancy.Error{Err: tenancy.ErrTenantNotReady, RetryAfter: 1001 * time.Millisecond}), 503, "tenant-not-ready", "2", ""},
		{"gone", op(tenancy.Error{Err: tenancy.ErrTenantGone}), 410, "tenant-gone", "", ""},
		{"not_ready", tenancy.ErrTenantNotReady, 503, "tenant-not-ready", "1", ""},
		{"behind", op(tenancy.Error{Err: fmt.Errorf("%w: canary", tenancy.ErrSchemaBehind)}), 503, "tenant-updating", "10", ""},
		{"not_found", tenancy.ErrTenantNotFound, 404, "tenant-not-found", "", ""},
		{"not_served_in_a_handler", tenancy.ErrNotServed, 503, "tenant-unavailable", "1", ""},
		{"primary_unavailable", op(tenancy.Error{Err: fmt.Errorf("%w: %s", tenancy.ErrPrimaryUnavailable, secret), RetryAfter: 3 * time.Second}), 503, "unavailable", "3", ""},
		{"tenant_unavailable", op(tenancy.Error{Err: fmt.Errorf("%w: %s", tenancy.ErrTenantUnavailable, secret), RetryAfter: 1400 * time.Millisecond}), 503, "tenant-unavailable", "2", ""},
		{"busy", op(tenancy.Error{Err: tenancy.ErrBusy, RetryAfter: 2 * time.Second}), 503, "busy", "2", ""},
		{"commit_unknown", op(tenancy.Error{Err: fmt.Errorf("%w: %w", tenancy.ErrCommitUnknown, context.DeadlineExceeded)}), 500, "outcome-unknown", "", ""},
		{"session_ended", &pgconn.PgError{Code: "57P01", Message: secret}, 503, "tenant-unavailable", "1", ""},
		{"read_only", &pgconn.PgError{Code: "25006", Message: secret}, 503, "tenant-unavailable", "1", ""},
		{"statement_timeout", &pgconn.PgError{Code: "57014", Message: secret}, 503, "unavailable", "1", ""},
		{"other_answers_of_the_server", &pgconn.PgError{Code: "42P01", Message: secret}, 500, "", "", ""},
		{"closed", tenancy.ErrClosed, 503, "unavailable", "1", ""},
		{"invalid", fmt.Errorf("%w: %s", tenancy.ErrInvalid, secret), 400, "", "", ""},
		{"unauthenticated", fmt.Errorf("%w: %s", tenantmw.ErrUnauthenticated, secret), 401, "", "", ""},
		{"deadline", fmt.Errorf("query: %w", context.DeadlineExceeded), 503, "unavailable", "1", ""},
		{"cancelled_by_us", fmt.Errorf("query: %w", context.Canceled), 503, "unavailable", "1", ""},
		{"no_tenant", tenancy.ErrNoTenant, 500, "", "", ""},
		{"mismatch", tenancy.ErrTenantMismatch, 500, "", "", ""},
		{"identity", tenancy.ErrIdentity, 500, "", "", ""},
		{"wrong_key", tenancy.ErrWrongKey, 500, "", "", ""},
		{"anything_else", errors.New(secret), 500, "", "", ""},
		{"no_message_but_the_operators", op(tenancy.Error{Err: errors.New(secret), Message: "canary"}), 500, "", "", ""},
		{"an_outage_wins_over_a_refusal", fmt.Errorf("%w: %w", tenantmw.ErrUnauthenticated, tenancy.ErrPrimaryUnavailable), 503, "unavailable", "2", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			tenantmw.ProblemOf(httptest.NewRequest("GET", "/", nil), c.err).Write(w)
			p := wantProblem(t, w, c.status)
			want := "about:blank"
			if c.typ != "" {
				want = "urn:tenancy:problem:" + c.typ
			}
			if p.Type != want {
				t.Errorf("type: got %q, want %q", p.Type, want)
			}
			if got := w.Header().Get("Retry-After"); got != c.retry {
				t.Errorf("Retry-After: got %q, want %q", got, c.retry)
			}
			if c.detail != "" && p.Detail != c.detail {
				t.Errorf("detail: got %q, want %q", p.Detail, c.detail)
			}
			if body := w.Body.String(); contains(body, "canary") {
				t.Errorf("the body tells of the inside: %q", body)
			}
		})
	}
}

func TestCallerWhoHungUpIsNoFailureOfTheService(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	if p := tenantmw.ProblemOf(r, fmt.Errorf("query: %w", context.Canceled)); p.Status != 499 {
		t.Errorf("got %d, want 499", p.Status)
	}
}

func TestAnonymousCallersLearnNothingOfATenantsState(t *testing.T) {
	r := httptest.NewRequestWithContext(tenancy.AsHost(t.Context()), "GET", "/", nil) // a session without a user
	for _, err := range []error{tenancy.ErrTenantSuspended, tenancy.ErrTenantMaintenance, tenancy.ErrTenantGone, tenancy.ErrTenantNotReady, tenancy.ErrSchemaBehind, tenancy.ErrTenantNotFound} {
		w := httptest.NewRecorder()
		tenantmw.ProblemOf(r, &tenancy.Error{Op: "query", Err: err, Message: "unpaid", RetryAfter: time.Minute}).Write(w)
		p := wantProblem(t, w, http.StatusNotFound)
		if p.Type != "urn:tenancy:problem:tenant-not-found" || p.Detail != "" || w.Header().Get("Retry-After") != "" {
			t.Errorf("%v: got %+v, Retry-After %q", err, p, w.Header().Get("Retry-After"))
		}
	}
}

func TestProblemOfTheServiceItself(t *testing.T) {
	w := httptest.NewRecorder()
	w.Header().Set("Content-Length", "7")
	w.Header().Set("Etag", `"1"`)
	tenantmw.Problem{Status: 400, Detail: "title is missing"}.Write(w)
	if p := wantProblem(t, w, 400); p.Detail != "title is missing" || p.Title != "Bad Request" {
		t.Errorf("got %+v", p)
	}
	if w.Header().Get("Content-Length") != "" || w.Header().Get("Etag") != "" {
		t.Errorf("headers of another body are left: %v", w.Header())
	}
	w = httptest.NewRecorder()
	tenantmw.Problem{}.Write(w)
	wantProblem(t, w, 500)
}

func TestASessionThatEndedIsNoFailureOfTheService(t *testing.T) {
	ended := map[error]bool{ // whether nothing was done
		&pgconn.PgError{Code: "57P01"}: false, &pgconn.PgError{Code: "57P02"}: false, &pgconn.PgError{Code: "57P03"}: true, &pgconn.PgError{Code: "25006"}: true,
		&pgconn.PgError{Code: "08P01", Severity: "FATAL", Message: "server conn crashed?"}: false,
		fmt.Errorf("%w: %w", context.DeadlineExceeded, pgconn.ErrConnClosed):               false, // the deadline was why
		pgconn.ErrConnClosed: false, io.ErrUnexpectedEOF: false, net.ErrClosed: false,
		&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}: false, &net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EPIPE)}: false,
		&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ETIMEDOUT)}: false,
	}
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "PURGE"} {
		r := httptest.NewRequest(method, "/", nil)
		for err, refused := range ended {
			p := tenantmw.ProblemOf(r, fmt.Errorf("list notes: %w", err))
			if refused || method == "GET" || method == "HEAD" || method == "OPTIONS" {
				if p.Status != http.StatusServiceUnavailable || p.RetryAfter == 0 {
					t.Errorf("%s, %v: %d, retry after %v; want 503 with a time", method, err, p.Status, p.RetryAfter)
				}
				continue
			}
			// It may have been done, and whoever tries again by itself does it twice.
			if p.Status != http.StatusInternalServerError || p.Type != "urn:tenancy:problem:outcome-unknown" || p.RetryAfter != 0 {
				t.Errorf("%s, %v: %d, %s, retry after %v; want an unknown outcome", method, err, p.Status, p.Type, p.RetryAfter)
			}
		}
	}
	for _, err := range []*pgconn.PgError{{Code: "42P01"}, {Code: "08P01", Severity: "ERROR"}} {
		if p := tenantmw.ProblemOf(httptest.NewRequest("GET", "/", nil), err); p.Status != http.StatusInternalServerError || p.Type != "" {
			t.Errorf("%v: %d, %s; want 500", err, p.Status, p.Type)
		}
	}
}
