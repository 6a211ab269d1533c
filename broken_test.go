package tenancy_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/middleware"
)

// TestABrokenConnectionIsAnswered: whatever pgx makes of it, whoever reads may try again, and whoever writes looks first.
func TestABrokenConnectionIsAnswered(t *testing.T) {
	t.Parallel()
	x := newFaulty(t, tenancy.Config{})
	const marked = `SELECT count(*) /* marked */ FROM notes`
	for name, call := range map[string]func() error{
		"Exec":                   func() error { return second(x.tn.DB().Exec(x.ctx, marked+` WHERE title = $1`, "x")) },
		"Exec without arguments": func() error { return second(x.tn.DB().Exec(x.ctx, marked)) },
		"QueryRow":               func() error { return x.tn.DB().QueryRow(x.ctx, marked).Scan(new(int)) },
		"statement in a transaction": func() error {
			tx, err := x.tn.DB().Begin(x.ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback(x.ctx)
			return second(tx.Exec(x.ctx, marked))
		},
		"statement behind one that broke": func() error {
			tx, err := x.tn.DB().Begin(x.ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback(x.ctx)
			if _, err := tx.Exec(x.ctx, marked); err == nil {
				t.Error("the first statement was answered")
			}
			return second(tx.Exec(x.ctx, `SELECT 1`))
		},
	} {
		lost := x.strait.loseAnswer("marked")
		err := call()
		<-lost
		for method, want := range map[string]int{http.MethodGet: http.StatusServiceUnavailable, http.MethodPost: http.StatusInternalServerError} {
			p := middleware.ProblemOf(httptest.NewRequest(method, "/", nil), err)
			if p.Status != want || p.Type == "" || p.RetryAfter > 0 != (method == http.MethodGet) {
				t.Errorf("%s, %s: %d, %q, retry after %v; want %d: %v", name, method, p.Status, p.Type, p.RetryAfter, want, err)
			}
		}
	}
}
