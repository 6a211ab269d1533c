package tenancy

// InTurn is how many verbs of this process have the tenant's lock, or wait for it.
func InTurn(tn *Tenancy, id ID) int {
	t := &tn.primary.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	if at := t.of[tenantLock(id)]; at != nil {
		return at.users
	}
	return 0
}

// VerbsAtOnce is how many verbs of this process may be at work.
func VerbsAtOnce(tn *Tenancy) int { return cap(tn.primary.verbs) }

// BusyVerbs takes all places among the verbs.
func BusyVerbs(tn *Tenancy) (release func()) {
	for range cap(tn.primary.verbs) {
		tn.primary.verbs <- struct{}{}
	}
	return func() {
		for range cap(tn.primary.verbs) {
			<-tn.primary.verbs
		}
	}
}
