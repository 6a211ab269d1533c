// Header is calls between services: the caller is another service, with a credential of its own, that works for several
// tenants and names the one it means in X-Tenant. On the way out (outgoing.go) the same header carries the tenant on.
//
//	go run ./examples/header
//
// Trust: the token proves which service calls. X-Tenant is a choice, because any caller can send it: it only chooses among
// the tenants of which that service is a member, and without a token it means nothing.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// callers stands in for a secret store and an operator: the services, their tokens and the tenants that they work for.
var callers = []struct {
	user    tenancy.UserKey
	token   string
	tenants []string
}{
	{"service|billing", "billing-secret", []string{"acme", "globex"}},
	{"service|reports", "reports-secret", []string{"acme", "globex"}},
	{"service|shop", "shop-secret", []string{"acme"}},
}

func main() {
	const billing = "curl -H 'Authorization: Bearer billing-secret' "
	demo.Main(tenancy.Config{}, newHandler,
		billing+"http://127.0.0.1:{port}/notes",
		billing+"-H 'X-Tenant: acme' http://127.0.0.1:{port}/notes",
		billing+"-H 'X-Tenant: globex' http://127.0.0.1:{port}/report")
}

func newHandler(d *demo.Demo) (http.Handler, error) {
	for _, c := range callers {
		if err := d.Join(context.Background(), c.user, c.tenants...); err != nil {
			return nil, err
		}
	}
	mw, err := tenantmw.New(d.Tenancy, tenantmw.UserKeyFunc(caller),
		tenantmw.WithContributors(tenantmw.Header(tenantHeader)),
		tenantmw.WithChallenge("Bearer"))
	if err != nil {
		return nil, err
	}
	db := d.DB()
	r := chi.NewRouter()
	r.Use(mw.Tenant, mw.RequireTenant)
	r.Get("/notes", func(w http.ResponseWriter, r *http.Request) {
		rows, _ := db.Query(r.Context(), `SELECT title FROM notes`) // the tenant's, and no other's
		titles, err := pgx.CollectRows(rows, pgx.RowTo[string])     // it reports Query's error too
		if err != nil {
			mw.Error(w, r, err)
			return
		}
		_ = json.NewEncoder(w).Encode(titles)
	})
	r.Get("/report", report(d.URL+"/notes")) // from another service; here it is this one again
	return r, nil
}

// caller tells which service sent the request. Every token is compared, each in constant time.
func caller(r *http.Request) (user tenancy.UserKey, err error) {
	token, err := demo.BearerToken(r)
	if err != nil || token == "" {
		return "", err
	}
	for _, c := range callers {
		if demo.Same(token, c.token) {
			user = c.user
		}
	}
	if user == "" {
		return "", errors.New("unknown token")
	}
	return user, nil
}
