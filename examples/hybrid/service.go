package main

import (
	"context"
	"embed"
	"encoding/json"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

//go:embed migrations/*.sql
var migrations embed.FS

// service is the service. It knows that it has tenants, and not how they are kept apart.
type service struct {
	db   *tenancy.TenantAwareDB
	fail func(http.ResponseWriter, *http.Request, error)
}

func newHandler(tn *tenancy.Tenancy) (http.Handler, error) {
	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(demo.BasicAuth))
	if err != nil {
		return nil, err
	}
	s := service{db: tn.DB(), fail: mw.Error}
	r := chi.NewRouter()
	r.Use(mw.Tenant, mw.RequireTenant)
	r.Get("/notes", s.list)
	r.Post("/notes", s.add)
	r.Get("/notes/count", s.count)
	r.Get("/where", s.where)
	return r, nil
}

// list answers the newest notes.
func (s service) list(w http.ResponseWriter, r *http.Request) {
	rows, _ := s.db.Query(r.Context(), `SELECT title FROM notes ORDER BY id DESC LIMIT 20`)
	titles, err := pgx.CollectRows(rows, pgx.RowTo[string]) // it reports Query's error too
	s.answer(w, r, titles, err)
}

// add writes a note in a transaction.
func (s service) add(w http.ResponseWriter, r *http.Request) {
	var id int64
	err := s.db.InTx(r.Context(), pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		return tx.QueryRow(ctx, `INSERT INTO notes (title) VALUES ($1) RETURNING id`, r.FormValue("title")).Scan(&id)
	})
	s.answer(w, r, id, err)
}

func (s service) count(w http.ResponseWriter, r *http.Request) {
	var n int
	err := s.db.QueryRow(r.Context(), `SELECT count(*) FROM notes`).Scan(&n)
	s.answer(w, r, n, err)
}

// way is how PostgreSQL says that it was reached.
type way struct{ Login, Role, Schema, Database string }

// where answers what a service has no need to know.
func (s service) where(w http.ResponseWriter, r *http.Request) {
	var is way
	err := s.db.QueryRow(r.Context(), `SELECT session_user, current_user, current_schema, current_database()`).Scan(&is.Login, &is.Role, &is.Schema, &is.Database)
	s.answer(w, r, is, err)
}

func (s service) answer(w http.ResponseWriter, r *http.Request, v any, err error) {
	if err != nil {
		s.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store") // one user's data, nobody else's
	_ = json.NewEncoder(w).Encode(v)            // a caller who is gone needs no answer
}
