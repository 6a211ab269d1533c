package middleware_test

import (
	"context"
	"encoding/json"
	"log"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// A service on chi whose authentication leaves the user's email on the request's context. examples/quickstart is a whole one.
func Example() {
	cfg, err := tenancy.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	tn, err := tenancy.Open(context.Background(), cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer tn.Close()

	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(func(r *http.Request) (tenancy.UserKey, error) {
		email, _ := r.Context().Value(emailKey{}).(string)
		return tenancy.UserKey(email), nil // "" for a caller without credentials
	}))
	if err != nil {
		log.Fatal(err)
	}
	db := tn.DB()
	r := chi.NewRouter()
	r.Use(authenticate, mw.Tenant)
	r.With(mw.RequireTenant).Get("/notes", func(w http.ResponseWriter, r *http.Request) {
		rows, _ := db.Query(r.Context(), `SELECT title FROM notes`)
		titles, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			mw.Error(w, r, err)
			return
		}
		_ = json.NewEncoder(w).Encode(titles)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:8080", r))
}

type emailKey struct{}

// authenticate is the service's own.
func authenticate(next http.Handler) http.Handler { return next }
