package tenancy

// UserLoads returns how many look-ups of users were sent to the primary.
func UserLoads(tn *Tenancy) uint64 { return tn.view.users.stats().loads }
