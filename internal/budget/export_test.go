package budget

// What tests measure against.
const (
	Patience       = patience
	LingerTimeout  = lingerTimeout
	LingerOneSided = lingerOneSided
	LingerUsual    = lingerUsual
	Rest           = rest
	LastWords      = lastWords
)

// Lock holds the server's mutex until the returned function is called.
func (s *Server) Lock() (unlock func()) {
	s.mu.Lock()
	return s.mu.Unlock
}

// Accounts returns how many accounts are asked for room.
func (s *Server) Accounts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.accounts)
}

// Ticking says whether a timer counts the next rest.
func (s *Server) Ticking() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ticking
}

// Expires says whether a timer will go off at a waiter's deadline. It stops it.
func (a *Account) Expires() bool {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	return a.expiry != nil && a.expiry.Stop()
}

// Books returns how many permits the account has that no socket has taken, its calls of Connect under way, and its sockets.
func (a *Account) Books() (unclaimed, making, open int) {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	return len(a.unclaimed), a.making, len(a.open)
}

// Give has the account hold n permits, of idle connections that do not exist.
func Give(a *Account, n int) {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	a.addConnLocked(int64(n))
	s.used += n
	if n > 0 {
		s.holdLocked(a)
	}
}

// Starve has each account wait for a permit, of which none is left.
func Starve(all []*Account) {
	for _, a := range all {
		a.enqueue(&waiter{ready: make(chan error, 1)})
	}
}
