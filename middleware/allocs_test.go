//go:build !race

package middleware_test

import "testing"

// TestTenantAddsTwoAllocations: the copy of the request that net/http's WithContext makes, and the
// context that carries the session. The race detector adds its own.
func TestTenantAddsTwoAllocations(t *testing.T) {
	requests := benchRequests()
	bare, ours := chiRouter(nil, ignoreTenant), chiRouter(openBench(t), ourTenant)
	w := &discard{}
	count := func(n int) func() {
		h := bare
		if n == 1 {
			h = ours
		}
		for _, r := range requests { // warm
			h.ServeHTTP(w, r)
		}
		i := 0
		return func() { h.ServeHTTP(w, requests[i%benchUsers]); i++ }
	}
	before, after := testing.AllocsPerRun(benchUsers, count(0)), testing.AllocsPerRun(benchUsers, count(1))
	if after-before > 2 {
		t.Errorf("a warm request allocates %.0f times, bare chi %.0f: at most 2 more are promised", after, before)
	}
}
