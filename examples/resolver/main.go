// Resolver wraps the library's resolver: a caller with an API key gets the tenant for which the key was issued, from the
// service's own table (keys.go), and everyone else the tenant of their membership.
//
//	go run ./examples/resolver
//
// Trust: the authentication proves the key, and the table says whose it is. A resolver names a tenant and opens none: the
// library loads it, and a suspended one is refused whoever named it.
package main

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

func main() {
	keys := apiKeys{}
	demo.Main(tenancy.Config{WrapResolver: keys.wrap}, keys.newHandler,
		"curl -u bob@globex.test:demo http://127.0.0.1:{port}/notes",
		"curl -H 'X-Api-Key: acme-secret' http://127.0.0.1:{port}/notes",
		"curl -H 'X-Api-Key: acme-secret' -H 'X-Tenant: globex' http://127.0.0.1:{port}/notes")
}

func (k apiKeys) newHandler(d *demo.Demo) (http.Handler, error) {
	acme, err := d.Catalog().TenantByName(context.Background(), "acme")
	if err != nil {
		return nil, err
	}
	k[userOfKey("acme-secret")] = acme.ID
	mw, err := tenantmw.New(d.Tenancy, tenantmw.UserKeyFunc(k.caller),
		tenantmw.WithContributors(tenantmw.Header("X-Tenant")),
		tenantmw.WithChallenge(`Basic realm="notes"`))
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
	return r, nil
}
