package tenancy

import (
	"iter"
	"time"
)

// TenantStats is a tenant's pool on this node at one moment. Counts are of the pool's life: a pool that was idle for
// [Limits].TenantIdle is closed, and one that follows it begins at 0.
type TenantStats struct {
	Name       string // as of when the pool was made
	Server     string // host:port, the Address of its ServerStats
	Generation int64
	Dense      bool   // it shares a pool: Conns are those that it uses now, Breaker is the worst and Starved the sum of that pool's groups, and the other counts are its own, of this generation
	Conns      int    // connections that are open or being opened
	Busy       int    // of them, in use or being opened
	Waiting    int    // calls that wait for one
	Breaker    string // "closed"; "open": the last attempts to connect failed, and none is made at the moment; "half-open": one is let through

	Waits    int64         // calls that had to wait, for a connection that was in use or for one to be opened
	WaitTime time.Duration // the sum of their waits
	Starved  int64         // times that the node's budget was used up when the tenant needed a connection
	Refused  int64         // calls refused with ErrBusy
	Canceled int64         // calls whose ctx ended while they waited in line
}

// Stats returns the tenants that have a pool on this node, in no order. It takes no lock for longer than a moment, and
// can be read each second for thousands of tenants. Pools that are replaced and still in use are left out.
func (tn *Tenancy) Stats() iter.Seq2[ID, TenantStats] {
	return func(yield func(ID, TenantStats) bool) {
		more, shared := true, tn.slotStats()
		tn.pools.Each(func(id ID, generation int64, p *tenantPool, _ int) {
			if more {
				s := p.stats(shared)
				s.Server, s.Canceled = p.server.address, p.canceled.Load()
				more = yield(id, s)
			}
		})
	}
}

func (p *tenantPool) stats(shared map[poolKey]slotStats) TenantStats {
	if p.dense != nil {
		return p.denseStats(shared[p.dense.from.key()])
	}
	u := p.account.Usage()
	return TenantStats{
		Name: p.tenant.Name, Generation: p.tenant.Generation,
		Conns: u.Conns, Busy: u.Busy, Waiting: u.Waiting, Breaker: p.breaker.state().String(),
		Waits: u.Waits, WaitTime: u.Waited, Starved: u.Starved, Refused: p.refused.Load(),
	}
}

// ServerStats is this node's budget of one server at one moment, and what has happened there since Open: those counts never fall, whichever pools come and go.
type ServerStats struct {
	Address string // host:port
	Budget  int    // the most connections that this node opens there: Limits.ServerConns/Limits.Nodes
	Own     int    // of them, set aside for the library's own pools and their cancel requests; 0 where they do not lead
	OwnUsed int    // of those, open
	Shared  int    // of Budget, for tenants and the verbs of the catalog
	Tenants int    // of Shared, what tenants can have now: all but what verbs have, and but 3 in any case. The last tenth is for tenants below Limits.TenantFloor alone
	Used    int    // of Shared, open, being opened, or being closed and not yet let go by the server
	Closing int    // of those, the last
	Hungry  int    // tenants, and verbs, that wait for a connection of the budget

	Evicted  int64         // idle connections that were closed to make room
	Waits    int64         // tenants' calls that had to wait, for a connection that was in use or for one to be opened
	WaitTime time.Duration // the sum of their waits
	Starved  int64         // times that the budget was used up when a tenant, or a pool that tenants share, needed a connection
	Refused  int64         // tenants' calls that ended with ErrBusy
	Canceled int64         // tenants' calls whose ctx ended while they waited in line

	Connects        int64 // tenants' connections that were opened, and proved to be the tenant's
	ConnectFailures int64 // attempts to open one that failed; those that a breaker has refused were not made
	TooManyConns    int64 // times that the server answered that it has no connection left (53300), to tenants, verbs or the library's own pools; a login's CONNECTION LIMIT apart
}

// Servers returns this node's budget of each server that it has to do with, by address.
func (tn *Tenancy) Servers() iter.Seq[ServerStats] {
	return func(yield func(ServerStats) bool) {
		for s := range tn.servers.sorted() {
			if !yield(s.stats()) {
				return
			}
		}
	}
}

func (s *server) stats() ServerStats {
	b, t := s.Snapshot(), &s.Totals
	return ServerStats{
		Address: s.address, Budget: b.Total, Own: b.Own, OwnUsed: b.OwnUsed, Shared: b.Shared(), Tenants: b.Accounts, Used: b.Used, Closing: b.Closing, Hungry: b.Hungry,
		Evicted: b.Evicted, Waits: t.Waits.Load(), WaitTime: time.Duration(t.Waited.Load()), Starved: t.Starved.Load(), Refused: t.Refused.Load(), Canceled: t.Canceled.Load(),
		Connects: t.Connects.Load(), ConnectFailures: t.ConnectFailures.Load(), TooManyConns: t.TooMany.Load(),
	}
}
