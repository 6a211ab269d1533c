// Package lease keeps one live value per key and generation, and never closes it under a user's hands.
//
// A [Table] builds a value when it is first asked for, hands out leases on it, replaces
// it when a newer generation is asked for, and closes it after its last lease has been
// released. Connection pools, workers and blocks of ids are all such values.
//
// # Concurrency
//
// A hit takes no lock: a look-up in a sync.Map and one addition to the value's own
// counter. Everything else happens under one mutex that is only ever held for
// bookkeeping: Build, Close, Cut and the callback of Each run outside it, so keys never
// wait for each other.
package lease

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

var (
	// ErrClosed is the error of Acquire after Close.
	ErrClosed = errors.New("lease: closed")

	// ErrReentrant is the error of an Acquire inside a Build that would have to wait for
	// that same Build, directly or through the builds of other keys.
	ErrReentrant = errors.New("lease: a build waits for itself")
)

const (
	defaultBuildTimeout = 30 * time.Second
	cutGrace            = time.Second      // how long Close waits for the closers after Cut
	ticksPerIdle        = 4                // precision of IdleAfter: a quarter
	minTick             = time.Millisecond // a shorter one would keep a core busy sweeping
)

// Config says how values are made and ended. Build is required.
type Config[K comparable, V any] struct {
	// Build makes the value of a key. Its ctx is the table's own: it carries no value
	// and no cancellation of a caller, because the result is shared with callers who
	// have neither. It ends after BuildTimeout, at the deadline of Table.Close, and when
	// the last caller has left a build whose value has been retired in advance. A
	// Build that ignores its ctx keeps the callers of its key waiting.
	//
	// A panic, or the end of the goroutine by runtime.Goexit, is an error to all who
	// wait. A value returned together with an error is dropped and not closed.
	Build func(ctx context.Context, key K, generation int64) (V, error)

	// Close ends a value: once for each one built, after its last lease, in a goroutine
	// of its own. It may block for long. A panic in it is reported by Table.Close.
	// Default nil: nothing to end.
	Close func(value V)

	// Cut interrupts those who use a value that is still leased when the ctx of
	// Table.Close ends, so that they release it. It runs before Close of that value,
	// in a goroutine of its own. Default nil: nobody is interrupted.
	Cut func(value V)

	// BuildTimeout bounds one Build. With CloseFirst the wait for earlier values
	// of the key is bounded by as much again. Default (zero or less): 30 s.
	BuildTimeout time.Duration

	// IdleAfter ends a value that nobody has leased for that long, at most a quarter of
	// it later. Below 4 ms it is 4 ms. Default (zero or less): never.
	IdleAfter time.Duration

	// CloseFirst lets a value be built only after Close has returned for every earlier
	// value of its key: for workers, of which two must never run. The default builds first,
	// then retires the old value: for pools, which should not be missing for a moment.
	CloseFirst bool
}

// Table holds at most one current value per key. It is safe for concurrent use; the
// zero value does not work, [New] makes one. Who makes it calls Close.
type Table[K comparable, V any] struct {
	cfg    Config[K, V]
	base   context.Context // of every Build
	cancel context.CancelFunc

	live sync.Map // K -> *entry[K, V]; the slots' current entries, for hits without mu

	mu       sync.Mutex // guards everything below, and the fields of entries that say so
	slots    map[K]*slot[K, V]
	count    int         // slots with a current entry
	janitor  *time.Timer // nil before the first value; armed only while count > 0
	armed    bool
	closed   bool
	panicked error // the first panic of Close or Cut

	done    chan struct{} // closed when the table is closed and every value has ended
	cutting chan struct{} // closed when the deadline of Close has passed

	// The one report of Close for all its callers. Not a sync.Once: waiting for a channel
	// lets the clock of a synctest bubble run on.
	reporting atomic.Bool
	reported  chan struct{} // closed when cutKeys and cutErr are written
	cutKeys   []K
	cutErr    error
}

// slot is what a table knows about one key. It exists while any entry of the key does.
type slot[K comparable, V any] struct {
	current  *entry[K, V]   // linked: given to new callers
	building *entry[K, V]   // will become current, unless retired before
	entries  []*entry[K, V] // all that have not ended, current and building among them
}

// New returns an empty table. It panics when cfg.Build is nil.
func New[K comparable, V any](cfg Config[K, V]) *Table[K, V] {
	if cfg.Build == nil {
		panic("lease: Config.Build is nil")
	}
	if cfg.BuildTimeout <= 0 {
		cfg.BuildTimeout = defaultBuildTimeout
	}
	base, cancel := context.WithCancel(context.Background())
	return &Table[K, V]{
		cfg:     cfg,
		base:    base,
		cancel:  cancel,
		slots:   make(map[K]*slot[K, V]),
		done:    make(chan struct{}),
		cutting: make(chan struct{}),

		reported: make(chan struct{}),
	}
}

// Acquire leases the value of key in the given generation or a newer one, and builds it
// when there is none. An older live value is replaced; all callers share one build. The
// caller must release the lease exactly once.
//
// A failed build is the error of those who waited for it and is not remembered: the next
// call builds again. Without CloseFirst an older live value stays current meanwhile. A
// build that is overtaken by a newer generation or by Retire still serves those who wait
// for it already.
//
// Cancelling ctx ends the wait, not the build: the finished value stays for the next
// caller. A live value is given even to a cancelled ctx.
//
// The error is [ErrClosed], [ErrReentrant], ctx.Err(), or that of Build. A caller that
// holds a lease of an older generation while it acquires a newer one under CloseFirst
// waits for itself, until ctx or BuildTimeout ends it.
func (t *Table[K, V]) Acquire(ctx context.Context, key K, generation int64) (Lease[K, V], error) {
	if v, ok := t.live.Load(key); ok {
		if e := v.(*entry[K, V]); e.generation >= generation && e.take() {
			return Lease[K, V]{e}, nil
		}
	}
	return t.acquireSlow(ctx, key, generation)
}

// Retire unlinks the value of key if its generation is below the given one; with
// math.MaxInt64 whatever its generation. It does not wait: the value ends after its last
// lease. An Acquire that begins after Retire has returned gets a value whose Build began
// after Retire was called. A build in flight is delivered to those who wait for it
// already, and ends after them.
func (t *Table[K, V]) Retire(key K, below int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.slots[key]; s != nil {
		t.retireLocked(s, below)
	}
}

// RetireAll does what Retire with math.MaxInt64 does, for every key.
func (t *Table[K, V]) RetireAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireAllLocked()
}

// Len returns the number of current values: retired ones and builds in flight do not count.
func (t *Table[K, V]) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// Each calls fn for every value that was current when Each was called, in no order, with
// its number of leases. A value that ended meanwhile is left out, and none ends while fn
// has it. Looking does not count as use: it puts off no idle value's end.
func (t *Table[K, V]) Each(fn func(key K, generation int64, value V, leases int)) {
	t.mu.Lock()
	entries := make([]*entry[K, V], 0, t.count)
	for _, s := range t.slots {
		if s.current != nil {
			entries = append(entries, s.current)
		}
	}
	t.mu.Unlock()

	for _, e := range entries {
		if !e.take() {
			continue
		}
		func() {
			defer e.drop()
			fn(e.key, e.generation, e.value, max(0, e.leases()-1))
		}()
	}
}

// Close refuses new leases, ends idle values at once and the others after their last
// lease. A build in flight still serves those who wait for it; one without waiters is
// cancelled.
//
// When ctx ends first, builds are cancelled, waiters get [ErrClosed], Cut is called for every
// value still leased, and Close waits one more second. It then returns the keys that
// were leased and an error that wraps ctx.Err(). Whatever is left ends by itself, after its
// last lease. Otherwise every Close has returned, and the error is nil or tells of the
// first panic in one.
//
// Close may be called several times, also at once: all calls wait for the same end, and
// the first of their contexts to end is the deadline.
func (t *Table[K, V]) Close(ctx context.Context) (cut []K, err error) {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		if t.janitor != nil {
			t.janitor.Stop()
		}
		t.retireAllLocked()
		t.finishLocked()
	}
	t.mu.Unlock()

	select {
	case <-t.done: // even if ctx has ended: there is nothing to cut
	default:
		select {
		case <-t.done:
		case <-t.cutting:
		case <-ctx.Done():
		}
	}
	if t.reporting.CompareAndSwap(false, true) {
		t.cutKeys, t.cutErr = t.cut(ctx)
		close(t.reported)
	}
	<-t.reported
	return slices.Clone(t.cutKeys), t.cutErr
}

// cut interrupts what is still in use, waits for it within cutGrace, and reports.
func (t *Table[K, V]) cut(ctx context.Context) (keys []K, err error) {
	t.mu.Lock()
	if len(t.slots) == 0 {
		defer t.mu.Unlock()
		return nil, t.panicked
	}
	close(t.cutting)
	t.cancel()
	var leased []*entry[K, V]
	for key, s := range t.slots {
		before := len(leased)
		for _, e := range s.entries {
			// The lease taken here keeps Close of the value behind its Cut.
			if e.built && e.leases() > 0 && e.take() {
				leased = append(leased, e)
			}
		}
		if len(leased) > before {
			keys = append(keys, key)
		}
	}
	t.mu.Unlock()

	for _, e := range leased {
		go t.interrupt(e)
	}
	grace := time.NewTimer(cutGrace)
	defer grace.Stop()
	select {
	case <-t.done:
	case <-grace.C:
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	left := 0
	for _, s := range t.slots {
		left += len(s.entries)
	}
	if len(keys) == 0 && left == 0 { // the deadline came, and nobody was there to meet it
		return nil, t.panicked
	}
	return keys, errors.Join(t.panicked, fmt.Errorf(
		"lease: deadline of Close: %d keys still leased, %d values not closed %v later: %w",
		len(keys), left, cutGrace, ctx.Err()))
}

func (t *Table[K, V]) interrupt(e *entry[K, V]) {
	defer e.drop()
	if t.cfg.Cut != nil {
		defer t.recovered("Cut")
		t.cfg.Cut(e.value)
	}
}

// retireLocked is Retire for one slot.
func (t *Table[K, V]) retireLocked(s *slot[K, V], below int64) {
	if e := s.building; e != nil && e.below(below) {
		t.overtakeLocked(s)
	}
	if e := s.current; e != nil && e.below(below) {
		t.unlinkLocked(s)
	}
}

func (t *Table[K, V]) retireAllLocked() {
	for _, s := range t.slots {
		t.retireLocked(s, math.MaxInt64)
	}
}

// unlinkLocked takes the current value from new callers. It ends now if nobody leases it.
func (t *Table[K, V]) unlinkLocked(s *slot[K, V]) {
	e := s.current
	s.current = nil
	t.live.Delete(e.key)
	t.count--
	e.unlink()
}

// overtakeLocked keeps the build in flight from becoming current. Nobody can join it any
// more, so without waiters it is for nothing.
func (t *Table[K, V]) overtakeLocked(s *slot[K, V]) {
	e := s.building
	s.building = nil
	e.retired = true
	if e.waiters == 0 {
		e.cancel()
	}
}

// end closes a value whose state is dead, and forgets it.
func (t *Table[K, V]) end(e *entry[K, V]) {
	defer func() { // in a defer, because Close may end its goroutine by runtime.Goexit
		t.mu.Lock()
		defer t.mu.Unlock()
		t.forgetLocked(e)
	}()
	if t.cfg.Close != nil {
		defer t.recovered("Close")
		t.cfg.Close(e.value)
	}
}

// forgetLocked removes an entry that has ended or was never built.
func (t *Table[K, V]) forgetLocked(e *entry[K, V]) {
	s := t.slots[e.key]
	s.entries = slices.DeleteFunc(s.entries, func(o *entry[K, V]) bool { return o == e })
	if len(s.entries) == 0 {
		delete(t.slots, e.key)
	}
	close(e.ended)
	t.finishLocked()
}

// finishLocked tells Close that nothing is left.
func (t *Table[K, V]) finishLocked() {
	if t.closed && len(t.slots) == 0 {
		t.cancel()
		close(t.done)
	}
}

// recovered is deferred around a callback that has nobody to return an error to.
func (t *Table[K, V]) recovered(callback string) {
	if p := recover(); p != nil {
		err := newPanicError(callback, p)
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.panicked == nil {
			t.panicked = err
		}
	}
}

// armLocked starts the janitor if there is something to watch. It is a timer and not a
// goroutine, so there is nothing to stop but the timer.
func (t *Table[K, V]) armLocked() {
	if t.cfg.IdleAfter <= 0 || t.armed || t.closed || t.count == 0 {
		return
	}
	t.armed = true
	tick := max(t.cfg.IdleAfter/ticksPerIdle, minTick)
	if t.janitor == nil {
		t.janitor = time.AfterFunc(tick, t.sweep)
	} else {
		t.janitor.Reset(tick)
	}
}

// sweep is one tick of the janitor. A release only sets a bit, without reading the
// clock; a value is idle when the bit stayed clear for ticksPerIdle ticks.
func (t *Table[K, V]) sweep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.armed = false
	if t.closed {
		return
	}
	for _, s := range t.slots {
		e := s.current
		if e == nil {
			continue
		}
		if e.touched.Swap(false) || e.leases() > 0 {
			e.idle = 0
			continue
		}
		// A caller who takes the value between this and its unlinking keeps it alive: it
		// was retired, not closed.
		if e.idle++; e.idle >= ticksPerIdle {
			t.unlinkLocked(s)
		}
	}
	t.armLocked()
}
