package tenancy

import (
	"iter"
	"time"
)

// TenantStats is a tenant's pool on this node at one moment. Counts are of the pool's life: a pool that was idle for
// [Limits].TenantIdle is closed, and one that follows it begins at 0.
type TenantStats struct {
	Name       string // as of when the pool was made
	Generation int64
	Dense      bool   // it shares a pool: Conns are those that it uses now, and the counts are of this generation
	Conns      int    // connections that are open or being opened
	Busy       int    // of them, in use or being opened
	Waiting    int    // calls that wait for one
	Breaker    string // "closed"; "open": the last attempts to connect failed, and none is made at the moment; "half-open": one is let through

	Waits    int64         // calls that had to wait, for a connection that was in use or for one to be opened
	WaitTime time.Duration // the sum of their waits
	Starved  int64         // times that the node's budget was used up when the tenant needed a connection
	Refused  int64         // calls refused with ErrBusy
}

// Stats returns the tenants that have a pool on this node, in no order. It takes no lock that a call would wait for, and
// can be read each second for thousands of tenants. Pools that are replaced and still in use are left out.
func (tn *Tenancy) Stats() iter.Seq2[ID, TenantStats] {
	return func(yield func(ID, TenantStats) bool) {
		more := true
		tn.pools.Each(func(id ID, generation int64, p *tenantPool, _ int) {
			if more {
				more = yield(id, p.stats())
			}
		})
	}
}

func (p *tenantPool) stats() TenantStats {
	if p.dense != nil {
		return p.denseStats()
	}
	u := p.account.Usage()
	return TenantStats{
		Name: p.tenant.Name, Generation: p.tenant.Generation,
		Conns: u.Conns, Busy: u.Busy, Waiting: u.Waiting, Breaker: p.breaker.state(),
		Waits: u.Waits, WaitTime: u.Waited, Starved: u.Starved, Refused: p.refused.Load(),
	}
}

// ServerStats is this node's budget of one server at one moment.
type ServerStats struct {
	Address string // host:port
	Budget  int    // the most connections that this node opens there: Limits.ServerConns/Limits.Nodes
	Own     int    // of them, set aside for the library's own pools and their cancel requests; 0 where they do not lead
	OwnUsed int    // of those, open
	Shared  int    // of Budget, for tenants and the verbs of the catalog
	Used    int    // of those, open, being opened, or being closed and not yet let go by the server
	Closing int    // of those, the last
	Hungry  int    // tenants, and verbs, that wait for a connection of the budget
	Evicted int64  // idle connections that were closed to make room, since Open
}

// Servers returns this node's budget of each server that it has to do with, by address.
func (tn *Tenancy) Servers() iter.Seq[ServerStats] {
	return func(yield func(ServerStats) bool) {
		for address, s := range tn.servers.snapshots() {
			if !yield(ServerStats{Address: address, Budget: s.Total, Own: s.Own, OwnUsed: s.OwnUsed, Shared: s.Shared(),
				Used: s.Used, Closing: s.Closing, Hungry: s.Hungry, Evicted: s.Evicted}) {
				return
			}
		}
	}
}
