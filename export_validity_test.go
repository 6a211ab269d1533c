package tenancy

import "time"

// SetSoonAfterOpen is for the nodes that are opened from now on.
func SetSoonAfterOpen(d time.Duration) (before time.Duration) {
	before, soonAfterOpen = soonAfterOpen, d
	return before
}
