package tenancy

import "math"

// RetirePool ends the tenant's pool, in the background, as the feed does for a tenant that has moved.
func RetirePool(tn *Tenancy, id ID) {
	for _, f := range tn.watchers() {
		f.retire(id, math.MaxInt64)
	}
}
