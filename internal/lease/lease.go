package lease

import (
	"context"
	"math"
	"sync/atomic"
)

// Lease keeps a value open. It is a small value, so that a hit allocates nothing; the
// price is that a copy can be released twice. A lease is held by one goroutine or handed
// over whole. The zero Lease has no value and no use.
type Lease[K comparable, V any] struct {
	e *entry[K, V]
}

// Value returns the leased value. It must not be used after Release.
func (l Lease[K, V]) Value() V { return l.e.value }

// Generation returns the generation that the value was built for, which may be newer
// than the one asked for.
func (l Lease[K, V]) Generation() int64 { return l.e.generation }

// Release gives the lease back, exactly once. It never blocks: a retired value ends in
// the background after its last lease.
//
// A second Release of the same lease, through a copy or not, is an error of the caller. It
// gives back the lease of somebody else on the same value (other values have counters of
// their own), so that the value may close under their hands. Where nobody else holds one,
// Release notices and panics, as sync.WaitGroup does: a count that is wrong once makes
// every later Close a guess. To notice every time would need an allocation per lease.
func (l Lease[K, V]) Release() { l.e.release() }

// Discard retires the leased value if it is still current: for a caller who found it
// broken. A newer value stays. The lease itself must still be released.
func (l Lease[K, V]) Discard() {
	t := l.e.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.slots[l.e.key]; s != nil && s.current == l.e {
		t.unlinkLocked(s)
	}
}

// The state of an entry is one number: two per lease, plus one while the entry is linked
// (current, for new callers). Whoever brings it to zero tries to swap zero for dead, and
// who succeeds closes the value, so it is closed once. A caller adds its lease first
// and looks afterwards: if the sum is negative the value is dead, and it takes its two
// back. That is one addition on a hit, where a compare-and-swap loop would spin between cores.
const (
	linked   = 1
	oneLease = 2
	dead     = math.MinInt64 / 2 // so far down that no number of late callers lifts it
)

type entry[K comparable, V any] struct {
	table      *Table[K, V]
	key        K
	generation int64
	value      V     // written before ready is closed
	err        error // likewise

	// A cache line of its own for state was tried and taken back: under callers of one value
	// on two cores it measured no difference.
	state   atomic.Int64
	touched atomic.Bool // a lease was released since the last tick of the janitor

	ready  chan struct{} // closed when the build has ended
	ended  chan struct{} // closed when the value has ended, or the build failed
	cancel context.CancelFunc

	// Guarded by table.mu.
	waiters int            // callers waiting for ready; each gets a lease at the end
	waitFor []*entry[K, V] // builds that this build waits for
	built   bool           // the build has ended
	retired bool           // will not become current
	idle    int            // ticks without use
}

// take adds a lease unless the value is dead.
func (e *entry[K, V]) take() bool {
	if e.state.Add(oneLease) > 0 {
		return true
	}
	e.state.Add(-oneLease)
	return false
}

// release is drop for a user: it counts as use.
func (e *entry[K, V]) release() {
	if !e.touched.Load() { // mostly set already, and then the line stays shared
		e.touched.Store(true)
	}
	e.drop()
}

// drop takes a lease away and ends the value if that was all that held it.
func (e *entry[K, V]) drop() {
	switch n := e.state.Add(-oneLease); {
	case n < 0:
		e.state.Add(oneLease)
		panic("lease: released more often than acquired")
	case n == 0:
		e.endIfUnused()
	}
}

// unlink ends the value if no lease holds it. Called once, under table.mu.
func (e *entry[K, V]) unlink() {
	if e.state.Add(-linked) == 0 {
		e.endIfUnused()
	}
}

func (e *entry[K, V]) endIfUnused() {
	if e.state.CompareAndSwap(0, dead) {
		go e.table.end(e)
	}
}

// leases returns the number of leases; transiently also of callers who are about to
// notice that the value is dead.
func (e *entry[K, V]) leases() int {
	return int(max(0, e.state.Load()) / oneLease)
}

func (e *entry[K, V]) below(generation int64) bool {
	return e.generation < generation || generation == math.MaxInt64
}
