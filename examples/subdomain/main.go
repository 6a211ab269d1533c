// Subdomain gives every tenant an address of its own: acme.localhost is acme's, and localhost is the host's page.
//
//	go run ./examples/subdomain
//
// Trust: where a request went is a place. It names the tenant for a caller who is not logged in, who sees that tenant's
// login page and none of its data; it opens nothing by itself, and a user must be a member.
package main

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

func main() {
	demo.Main(tenancy.Config{}, newHandler,
		"curl http://localhost:{port}/",
		"curl http://acme.localhost:{port}/",
		"curl -u alice@acme.test:demo http://acme.localhost:{port}/",
		"curl -u bob@globex.test:demo http://acme.localhost:{port}/")
}

func newHandler(d *demo.Demo) (http.Handler, error) {
	mw, err := tenantmw.New(d.Tenancy, tenantmw.UserKeyFunc(demo.BasicAuth),
		tenantmw.WithContributors(tenantmw.Subdomain("{tenant}.localhost")), // in production "{tenant}.example.com"
		tenantmw.WithChallenge(`Basic realm="notes"`))
	if err != nil {
		return nil, err
	}
	db := d.DB()
	page := func(w http.ResponseWriter, r *http.Request) {
		s, _ := tenancy.FromContext(r.Context()) // mw.Tenant has put it there
		t, _ := s.Tenant()
		switch s.Caller() {
		case tenancy.TenantUser:
			rows, _ := db.Query(r.Context(), `SELECT title FROM notes`) // the tenant's, and no other's
			titles, err := pgx.CollectRows(rows, pgx.RowTo[string])     // it reports Query's error too
			if err != nil {
				mw.Error(w, r, err)
				return
			}
			_ = json.NewEncoder(w).Encode(titles)
		case tenancy.TenantGuest:
			w.Header().Set("WWW-Authenticate", fmt.Sprintf("Basic realm=%q", t.Name))
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintf(w, "log in to %s\n", t.Name)
		default:
			fmt.Fprintln(w, "welcome: each customer has an address here")
		}
	}
	return mw.Tenant(http.HandlerFunc(page)), nil
}
