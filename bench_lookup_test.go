package tenancy_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
)

// BenchmarkResolve is what callers cost by what is known of them. unknown_new is a query at the primary for each, for as many
// callers as may be looked up at once. hint_refused is the request's part of a name that is not the user's, and hint_looked_into
// what follows behind it, one at a time: the primary gets no more of these queries than one in that time.
func BenchmarkResolve(b *testing.B) {
	f := newBenchFleet(b, 1)
	must(b, f.Admin(b, "primary"), `INSERT INTO tenancy.memberships (user_key, tenant, role) VALUES ('known-1', $1, 'member')`, f.tenants[0].ID)
	tn := f.Open(b, tenancy.Config{})
	var made atomic.Int64
	next := func() string { return madeUp(int(made.Add(1))) }
	hinted := func() tenancy.Query {
		return tenancy.Query{User: "known-1", Hints: []tenancy.Hint{{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: next()}}}
	}
	for _, bench := range []struct {
		name  string
		query func() tenancy.Query
	}{
		{"known", func() tenancy.Query { return tenancy.Query{User: "known-1"} }},
		{"unknown_again", func() tenancy.Query { return tenancy.Query{User: "unknown"} }},
		{"unknown_new", func() tenancy.Query { return tenancy.Query{User: tenancy.UserKey(next())} }},
		{"hint_refused", hinted},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					_, _ = tn.Resolve(b.Context(), bench.query())
				}
			})
		})
	}
	b.Run("hint_looked_into", func(b *testing.B) {
		for b.Loop() {
			for tenancy.RefusalsWaiting(tn) > 256 { // never full: nothing is dropped
				time.Sleep(50 * time.Microsecond)
			}
			_, _ = tn.Resolve(b.Context(), hinted())
		}
	})
}
