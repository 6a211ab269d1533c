package demo

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"net/http"
	"strings"

	"github.com/msmt-go/tenancy"
)

// BasicAuth stands in for a service's own authentication: every user's password is "demo". It is a tenantmw.UserKeyFunc.
func BasicAuth(r *http.Request) (tenancy.UserKey, error) {
	user, password, ok := r.BasicAuth()
	if !ok {
		return "", nil // nobody yet
	}
	if !Same(password, "demo") {
		return "", errors.New("wrong password")
	}
	return tenancy.UserKey(strings.ToLower(user)), nil // keys are compared byte by byte
}

// BearerToken returns the token of the header Authorization, "" where there is none. Credentials of another kind, and two of them, are an
// error: they are not nobody's.
func BearerToken(r *http.Request) (string, error) {
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return "", nil
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", errors.New("the Authorization header holds no single bearer token")
	}
	return token, nil
}

// Same compares two secrets in a time that tells nothing of either.
func Same(given, want string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}
