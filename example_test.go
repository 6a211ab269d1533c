package tenancy_test

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"os"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// A service puts the middleware behind its own authentication; its queries name no tenant.
func Example() {
	cfg, err := tenancy.FromEnv() // TENANCY_PRIMARY_URL, TENANCY_KEYS
	if err != nil {
		log.Fatal(err)
	}
	cfg.Migrations = os.DirFS("migrations") // or go:embed
	tn, err := tenancy.Open(context.Background(), cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer tn.Close()

	users := tenantmw.UserKeyFunc(func(r *http.Request) (tenancy.UserKey, error) {
		email, password, ok := r.BasicAuth()
		if ok && password != "demo" {
			return "", errors.New("wrong password")
		}
		return tenancy.UserKey(email), nil
	})
	mw, err := tenantmw.New(tn, users)
	if err != nil {
		log.Print(err)
		return
	}
	r := chi.NewRouter()
	r.Use(mw.Tenant, mw.RequireTenant)
	r.Get("/notes", func(w http.ResponseWriter, r *http.Request) {
		rows, _ := tn.DB().Query(r.Context(), "select title from notes order by id")
		titles, err := pgx.CollectRows(rows, pgx.RowTo[string]) // reports Query's error too
		if err != nil {
			mw.Error(w, r, err)
			return
		}
		_ = json.NewEncoder(w).Encode(titles)
	})
	log.Print(http.ListenAndServe("127.0.0.1:8080", r))
}
