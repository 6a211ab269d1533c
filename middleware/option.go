package middleware

import (
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"unicode"
)

// Option changes what [New] makes. Each may be given once.
type Option func(*options) error

type options struct {
	contributors []Contributor
	exempt       func(*http.Request) bool
	challenge    string
	onError      func(http.ResponseWriter, *http.Request, error)
	log          *slog.Logger
}

// WithContributors sets what is asked for hints about the request's tenant. Their order does not
// matter: all are asked, and hints that disagree are refused. Default: none, and each
// user gets the tenant of the default membership.
func WithContributors(cs ...Contributor) Option {
	return func(o *options) error {
		if len(cs) == 0 {
			return invalid("WithContributors: none is given")
		}
		if o.contributors != nil {
			return invalid("WithContributors is given twice: name all in one")
		}
		for i, c := range cs {
			if f, ok := c.(ContributorFunc); c == nil || ok && f == nil {
				return invalid("WithContributors: [%d] is nil", i)
			}
			if a, ok := c.(interface{ check() error }); ok { // one of ours: it was made without an error to return
				if err := a.check(); err != nil {
					return invalid("WithContributors: [%d]: %v", i, err)
				}
			}
		}
		o.contributors = slices.Clone(cs)
		return nil
	}
}

// WithExempt sets which requests pass [Middleware.Tenant] unresolved, such as a health check under a router-wide Use. They get no
// session here: the database refuses them, and so does a guard behind, unless an outer middleware gave them one. Default: none.
func WithExempt(fn func(r *http.Request) bool) Option {
	return func(o *options) error {
		if fn == nil {
			return invalid("WithExempt: it is nil")
		}
		if o.exempt != nil {
			return invalid("WithExempt is given twice")
		}
		o.exempt = fn
		return nil
	}
}

// WithChallenge sets the WWW-Authenticate header of a 401, such as `Basic realm="notes", charset="UTF-8"` or `Bearer`: HTTP wants one,
// and only the service knows the scheme. Default: none is sent. An ErrorHandler finds it set.
func WithChallenge(challenge string) Option {
	return func(o *options) error {
		if challenge == "" || strings.ContainsFunc(challenge, unicode.IsControl) {
			return invalid("WithChallenge: it is empty or has control characters")
		}
		if o.challenge != "" {
			return invalid("WithChallenge is given twice")
		}
		o.challenge = challenge
		return nil
	}
}

// WithErrorHandler sets who answers a request that is refused or has failed: a page for browsers, or the
// service's own envelope. [ProblemOf] gives the status and
// words of the default. Default: ProblemOf(r, err).Write(w).
//
// The error's text is for logs. It names tenants and tells a foreign tenant from a missing one, so it must not be sent.
func WithErrorHandler(fn func(w http.ResponseWriter, r *http.Request, err error)) Option {
	return func(o *options) error {
		if fn == nil {
			return invalid("WithErrorHandler: it is nil")
		}
		if o.onError != nil {
			return invalid("WithErrorHandler is given twice")
		}
		o.onError = fn
		return nil
	}
}

// WithLogger sets where failures are logged. Default: slog.Default() at the time of New.
func WithLogger(log *slog.Logger) Option {
	return func(o *options) error {
		if log == nil {
			return invalid("WithLogger: it is nil")
		}
		if o.log != nil {
			return invalid("WithLogger is given twice")
		}
		o.log = log
		return nil
	}
}
