package tenancy_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// failingSource fails at its first row.
type failingSource struct{ fail func() error }

func (failingSource) Next() bool               { return true }
func (s failingSource) Values() ([]any, error) { return nil, s.fail() }
func (failingSource) Err() error               { return nil }

// TestARollbackAtAFrozenServerEndsWithItsContext, whatever it has left of its own time. Not parallel: it is about time.
func TestARollbackAtAFrozenServerEndsWithItsContext(t *testing.T) {
	const least = 2500 * time.Millisecond // half of what a rollback has while ctx lasts
	x := newFaulty(t, tenancy.Config{Isolation: tenancy.IsolationShared})
	x.neighbourAtWork()
	own := errors.New("the service's own")
	for name, call := range map[string]func(ctx context.Context, fail func() error) error{
		"InTx": func(ctx context.Context, fail func() error) error {
			return x.tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, insert, "rolled back"); err != nil {
					return err
				}
				return fail()
			})
		},
		"CopyFrom of a shared schema": func(ctx context.Context, fail func() error) error {
			_, err := x.tn.DB().CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, failingSource{fail})
			return err
		},
	} {
		for moment, spoil := range map[string]func(end func()){
			"fails before its deadline":     func(func()) {},
			"is cancelled at the roll-back": func(end func()) { x.strait.before(1, end) },
			"fails when it was cancelled":   func(end func()) { end() },
		} {
			t.Run(name+" "+moment, func(t *testing.T) {
				x := x.in(t)
				patience := 300 * time.Millisecond
				if moment != "fails before its deadline" {
					patience = time.Minute
				}
				ctx, end := context.WithTimeout(x.ctx, patience)
				defer end()
				var began time.Time
				err := call(ctx, func() error {
					x.strait.freeze()
					spoil(end)
					began = time.Now()
					return own
				})
				took := time.Since(began)
				x.strait.calm()
				if !errors.Is(err, own) || took > least {
					t.Errorf("%v after %v", err, took)
				}
				until(t, 20*time.Second, "", func() string { _, err := x.tn.DB().Exec(x.ctx, `SELECT 1`); return outage(err) })
			})
		}
	}
	if n := x.written("rolled back"); n != 0 {
		t.Errorf("%d rows of what was rolled back", n)
	}
}
