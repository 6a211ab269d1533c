package tenancy

import (
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/shape"
)

// CompareForTest compares two tenants of conn's database in the transaction that conn is in.
func CompareForTest(tb testing.TB, tn *Tenancy, conn *pgx.Conn, id, reference ID) (all []Difference) {
	tb.Helper()
	var places []shape.Place
	for _, id := range []ID{id, reference} {
		one, err := tn.catalog.surveyed(tb.Context(), `t.id = $1`, id)
		if err != nil {
			tb.Fatal(err)
		}
		places = append(places, one[0].at)
	}
	shapes, err := shape.ReadWithin(tb.Context(), conn, places)
	if err != nil {
		tb.Fatal(err)
	}
	for _, d := range shape.Compare(shapes[0], shapes[1]) {
		all = append(all, Difference(d))
	}
	return all
}
