// Path puts the tenant into the path: everything below /t/acme is acme's.
//
//	go run ./examples/path
//
// Trust: the path is a place. It names the tenant for a caller who is not logged in too, opens nothing by itself, and
// a user must be a member. The routes outside /t/{tenant} have no tenant at all.
package main

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

func main() {
	demo.Main(tenancy.Config{}, newHandler,
		"curl http://127.0.0.1:{port}/health",
		"curl -u alice@acme.test:demo http://127.0.0.1:{port}/t/acme/notes",
		"curl -u bob@globex.test:demo http://127.0.0.1:{port}/t/acme/notes")
}

func newHandler(d *demo.Demo) (http.Handler, error) {
	mw, err := tenantmw.New(d.Tenancy, tenantmw.UserKeyFunc(demo.BasicAuth),
		tenantmw.WithContributors(tenantmw.Path("tenant")),
		tenantmw.WithChallenge(`Basic realm="notes"`))
	if err != nil {
		return nil, err
	}
	db := d.DB()
	r := chi.NewRouter()
	r.Get("/health", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "well") })
	r.Route("/t/{tenant}", func(r chi.Router) {
		r.Use(mw.Tenant, mw.RequireTenant) // in here, not on the outer router: that one does not know {tenant} yet
		r.Get("/notes", func(w http.ResponseWriter, r *http.Request) {
			rows, _ := db.Query(r.Context(), `SELECT title FROM notes`) // the tenant's, and no other's
			titles, err := pgx.CollectRows(rows, pgx.RowTo[string])     // it reports Query's error too
			if err != nil {
				mw.Error(w, r, err)
				return
			}
			_ = json.NewEncoder(w).Encode(titles)
		})
	})
	return r, nil
}
