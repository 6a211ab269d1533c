package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// notes are the handlers. Nothing in their SQL names a tenant: db finds it in the request's context.
type notes struct {
	db   *tenancy.TenantAwareDB
	fail func(http.ResponseWriter, *http.Request, error)
}

type note struct {
	ID    int64  `json:"id"`
	Title string `json:"title"`
}

func (n notes) list(w http.ResponseWriter, r *http.Request) {
	rows, _ := n.db.Query(r.Context(), `SELECT id, title FROM notes ORDER BY id`)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByName[note]) // it reports Query's error too
	if err != nil {
		n.fail(w, r, err) // the tenant may have been suspended a moment ago
		return
	}
	writeJSON(w, http.StatusOK, list)
}

func (n notes) add(w http.ResponseWriter, r *http.Request) {
	title, problem := readTitle(w, r)
	if problem != nil {
		problem.Write(w)
		return
	}
	added := note{Title: title}
	err := n.db.QueryRow(r.Context(), `INSERT INTO notes (title) VALUES ($1) RETURNING id`, title).Scan(&added.ID)
	if err != nil {
		n.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusCreated, added)
}

func whoami(w http.ResponseWriter, r *http.Request) {
	s, _ := tenancy.FromContext(r.Context()) // RequireTenant has seen both
	t, _ := s.Tenant()
	writeJSON(w, http.StatusOK, struct {
		User   tenancy.UserKey `json:"user"`
		Tenant string          `json:"tenant"`
	}{s.User(), t.Name})
}

// readTitle returns the title of {"title": "..."}, or what is wrong with the body.
func readTitle(w http.ResponseWriter, r *http.Request) (string, *tenantmw.Problem) {
	refuse := func(status int, detail string) (string, *tenantmw.Problem) {
		return "", &tenantmw.Problem{Status: status, Detail: detail}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return refuse(http.StatusRequestEntityTooLarge, "The body is larger than 1 MB.")
	} else if err != nil {
		return refuse(http.StatusBadRequest, "The body could not be read.")
	}
	var in struct{ Title string }
	if json.Unmarshal(body, &in) != nil {
		return refuse(http.StatusBadRequest, `The body must be JSON: {"title": "..."}`)
	}
	if strings.TrimSpace(in.Title) == "" || strings.ContainsRune(in.Title, 0) { // PostgreSQL stores no NUL
		return refuse(http.StatusBadRequest, "The title must not be empty and must not contain a NUL.")
	}
	return in.Title, nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store") // one user's data, nobody else's
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a caller who is gone needs no answer
}
