package tenancy

// UserMisses returns how many callers found nothing remembered of their user. Tests wait for it; they count at the wire.
func UserMisses(tn *Tenancy) uint64 { return tn.view.users.stats().misses }

// RefusalsWaiting returns how many refused hints wait to be looked into.
func RefusalsWaiting(tn *Tenancy) int { return len(tn.refused.queue) }
