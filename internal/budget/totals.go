package budget

import "sync/atomic"

// Totals counts what has happened at a server since it has a budget. What the budget does not see (Refused to the last) is counted by who makes the pools.
type Totals struct {
	Waits   atomic.Int64 // callers who had to wait, those of an account with Inner apart
	Waited  atomic.Int64 // for how long, in ns
	Starved atomic.Int64 // times that an account had to wait for a permit

	Refused  atomic.Int64 // callers who got no connection
	Canceled atomic.Int64 // callers who left the line because their context had ended

	Connects        atomic.Int64 // connections that were opened, and proved
	ConnectFailures atomic.Int64 // attempts to open one that failed
	TooMany         atomic.Int64 // times that the server had no connection left
}

// totalsOf returns where the waits of an account are counted.
func (s *Server) totalsOf(cfg AccountConfig) *Totals {
	if cfg.Inner {
		return new(Totals)
	}
	return &s.Totals
}

// accountsLocked is how many permits all accounts together can have now: the others are kept for [Server.Dialer], or its.
func (s *Server) accountsLocked() int { return s.limits.Shared() - max(s.limits.Work, s.working) }
