// Jwt is a service whose callers send signed tokens: the service's own authentication (auth.go) verifies them, and the
// tenant is a claim of the token.
//
//	go -C examples/integrations run ./jwt
//
// Trust: a verified claim is an identity: who issued the token said it, not the caller. The user must be that tenant's
// member all the same, and a request that names another tenant beside it is refused.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"log"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

func main() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) // the issuer's; a service has the public half alone
	if err != nil {
		log.Fatal(err)
	}
	alice, err := issue(key, "alice", "acme")
	if err != nil {
		log.Fatal(err)
	}
	curl := "curl -H 'Authorization: Bearer " + alice + "' "
	demo.Main(tenancy.Config{}, func(d *demo.Demo) (http.Handler, error) { return newHandler(d, &key.PublicKey) },
		"curl http://127.0.0.1:{port}/notes",
		curl+"http://127.0.0.1:{port}/notes",
		curl+"-H 'X-Tenant: globex' http://127.0.0.1:{port}/notes")
}

func newHandler(d *demo.Demo, key *ecdsa.PublicKey) (http.Handler, error) {
	for subject, tenants := range map[string][]string{"alice": {"acme"}, "bob": {"globex"}, "carol": {"acme", "globex"}} {
		if err := d.Join(context.Background(), userKey(subject), tenants...); err != nil {
			return nil, err
		}
	}
	mw, err := tenantmw.New(d.Tenancy, tenantmw.UserKeyFunc(caller),
		tenantmw.WithContributors(tenantmw.Claim(tenantClaim), tenantmw.Header("X-Tenant")),
		tenantmw.WithChallenge("Bearer"))
	if err != nil {
		return nil, err
	}
	db := d.DB()
	r := chi.NewRouter()
	r.Use(authenticate(key, mw.Error), mw.Tenant, mw.RequireTenant) // who it is comes before where
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
