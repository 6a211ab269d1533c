package main

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

const (
	issuer   = "https://id.example.com"
	audience = "notes"
)

type claimsKey struct{}

// authenticate puts the claims of a valid token on the request's context. A token that is not valid is 401; none is nobody, which
// RequireTenant refuses.
func authenticate(key *ecdsa.PublicKey, fail func(http.ResponseWriter, *http.Request, error)) func(http.Handler) http.Handler {
	parser := jwt.NewParser(
		jwt.WithValidMethods([]string{"ES256"}), // what we sign with, never what the token's own header asks for
		jwt.WithExpirationRequired(),
		jwt.WithIssuer(issuer),
		jwt.WithAudience(audience), // a token for another service is none for this one
	)
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			token, err := demo.BearerToken(r)
			if err == nil && token != "" {
				claims := jwt.MapClaims{}
				_, err = parser.ParseWithClaims(token, claims, func(*jwt.Token) (any, error) { return key, nil })
				r = r.WithContext(context.WithValue(r.Context(), claimsKey{}, claims))
			}
			if err != nil {
				fail(w, r, fmt.Errorf("%w: %w", tenantmw.ErrUnauthenticated, err))
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// caller is the user of the verified token. Subjects are unique at their issuer alone, so the key names both.
func caller(r *http.Request) (tenancy.UserKey, error) {
	claims, ok := r.Context().Value(claimsKey{}).(jwt.MapClaims)
	if !ok {
		return "", nil
	}
	subject, err := claims.GetSubject()
	if err != nil || subject == "" {
		return "", errors.Join(errors.New("the token has no subject"), err)
	}
	return userKey(subject), nil
}

func userKey(subject string) tenancy.UserKey { return tenancy.UserKey(issuer + "|" + subject) }

// tenantClaim hands the claim over as it was decoded: that it is a string is for tenantmw.Claim to see.
func tenantClaim(r *http.Request) (any, bool) {
	claims, _ := r.Context().Value(claimsKey{}).(jwt.MapClaims)
	tenant, present := claims["tenant"]
	return tenant, present
}

// issue stands in for the issuer.
func issue(key *ecdsa.PrivateKey, subject, tenant string) (string, error) {
	claims := jwt.MapClaims{"iss": issuer, "aud": audience, "sub": subject, "exp": time.Now().Add(time.Hour).Unix(), "tenant": tenant}
	return jwt.NewWithClaims(jwt.SigningMethodES256, claims).SignedString(key)
}
