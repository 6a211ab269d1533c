package middleware

import (
	"net/http"

	"github.com/msmt-go/tenancy"
)

// UserKeyResolver tells who sent a request. It is the service's authentication, or what that
// left on the request's context: a verified token's subject, a session's user.
//
// The key decides whose data is opened, so an implementation returns only what it has proved. A
// header, cookie or query parameter that the caller can set is no proof; neither is one that a proxy
// is meant to set, unless the service is reachable through that proxy alone and the proxy always
// overwrites it. Where two credentials are given and name two users, that is an error.
// Doubt is an error, never "".
//
// UserKey is called once per request, concurrently. It returns "" for a caller who gave no
// credentials. Its error is answered with 401, but with 503 where it matches
// [tenancy.ErrPrimaryUnavailable] or is the context's: credentials that could not be checked
// are not wrong ones. Keys are compared byte by byte; see [tenancy.UserKey] for what to fold.
type UserKeyResolver interface {
	UserKey(r *http.Request) (tenancy.UserKey, error)
}

// UserKeyFunc is a function as a UserKeyResolver.
type UserKeyFunc func(r *http.Request) (tenancy.UserKey, error)

// UserKey calls f.
func (f UserKeyFunc) UserKey(r *http.Request) (tenancy.UserKey, error) { return f(r) }
