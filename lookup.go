package tenancy

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	defaultLoadTimeout   = 5 * time.Second
	defaultParallelLoads = 64
	closeGrace           = 500 * time.Millisecond
)

// lookup remembers what a load found, and what it did not find, within bounds. A key is loaded once
// however many ask for it at the same time.
//
// Found values never expire: the feed forgets them when they change. What was not found expires
// after negativeTTL and lives in a cache of its own, because a flood of made-up keys must not push
// out the known ones. Errors are never remembered.
//
// A load that began before its key was forgotten is the answer of those who were waiting already;
// it is not remembered, and who comes later starts a new one. Without that rule the old row, read a
// moment before the change, would stay for ever.
//
// It is safe for concurrent use; newLookup makes one, and who makes it closes it. A hit costs one
// lock of golang-lru, no allocation and no look at the clock. golang-lru's expirable cache is not
// used: each one leaves a goroutine behind for good.
type lookup[K comparable, V any] struct {
	cfg    lookupConfig
	load   loader[K, V]
	base   context.Context // of every load
	cancel context.CancelFunc

	// Replaced as a whole to forget everything: Purge would hold up every hit while it walks. Written
	// under mu; entries are added under mu too, so that a load cannot slip past a forget.
	positives atomic.Pointer[lru.Cache[K, V]]
	negatives atomic.Pointer[lru.Cache[K, time.Time]] // until when; nil: none are kept

	hits, misses, negativeHits, loads, loadErrors atomic.Uint64

	mu      sync.Mutex // guards what follows, and the fields of flights
	flights map[K]*flight[K, V]
	line    list.List // of *flight[K, V]: waiting for a permit, first come first served
	running int       // loads that have a permit
	epoch   uint64    // counts forgetAll
	closed  bool
	wg      sync.WaitGroup // one per running load; Add only under mu and before closed
}

type loader[K comparable, V any] = func(ctx context.Context, key K) (value V, found bool, err error)

// lookupConfig bounds a lookup.
type lookupConfig struct {
	size         int           // found values; required
	negativeSize int           // keys not found; 0: none are kept
	negativeTTL  time.Duration // how long a key stays not found; 0: not at all
	loadTimeout  time.Duration // of one load, from its first caller on, the line included; 0: 5 s
	parallel     int           // loads at once, over all keys; 0: 64
}

func (c lookupConfig) validate() error {
	switch {
	case c.size < 1:
		return fmt.Errorf("tenancy: look-up size is %d: at least 1", c.size)
	case c.negativeSize < 0:
		return fmt.Errorf("tenancy: look-up negative size is %d: not below 0", c.negativeSize)
	case c.negativeTTL < 0:
		return fmt.Errorf("tenancy: look-up negative TTL is %v: not below 0", c.negativeTTL)
	case c.loadTimeout < 0:
		return fmt.Errorf("tenancy: look-up load timeout is %v: not below 0", c.loadTimeout)
	case c.parallel < 0:
		return fmt.Errorf("tenancy: look-up parallel loads are %d: not below 0", c.parallel)
	}
	return nil
}

// lookupStats counts since the beginning. A miss is a call that neither cache could answer; several
// misses share one load.
type lookupStats struct {
	hits, misses, negativeHits, loads, loadErrors uint64
}

// flight is one load and those who wait for it.
type flight[K comparable, V any] struct {
	key  K
	load loader[K, V]
	end  time.Time     // loadTimeout after the first caller came, the line included
	done chan struct{} // closed after value, found and err are written

	value V
	found bool
	err   error

	// Guarded by lookup.mu.
	waiters int
	place   *list.Element // in the line; nil once the load has begun
	epoch   uint64        // of the lookup when the load began
}

// newLookup returns an empty lookup. load may be nil where only getWith is called.
func newLookup[K comparable, V any](cfg lookupConfig, load func(ctx context.Context, key K) (value V, found bool, err error)) (*lookup[K, V], error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.loadTimeout == 0 {
		cfg.loadTimeout = defaultLoadTimeout
	}
	if cfg.parallel == 0 {
		cfg.parallel = defaultParallelLoads
	}
	l := &lookup[K, V]{cfg: cfg, load: load, flights: make(map[K]*flight[K, V])}
	l.base, l.cancel = context.WithCancel(context.Background())
	l.resetLocked() // nobody else knows l yet
	return l, nil
}

// get returns what is known of key, loading it when nothing is. found is false if there is no such key.
//
// Cancelling ctx ends the wait, not the load: it runs on a context of the lookup's own, bounded by
// loadTimeout, and carries no value of ctx. Only a load that has not begun and that nobody waits for any
// more is dropped. What is known is given even to a cancelled ctx.
//
// The error is ErrClosed, ctx.Err(), or that of the load; a panic in the load is an error to all who wait.
func (l *lookup[K, V]) get(ctx context.Context, key K) (value V, found bool, err error) {
	return l.getWith(ctx, key, l.load)
}

// getWith is get with a load of the caller's. Callers who share a load get that of the first.
func (l *lookup[K, V]) getWith(ctx context.Context, key K, load loader[K, V]) (value V, found bool, err error) {
	if value, ok := l.positives.Load().Get(key); ok {
		l.hits.Add(1)
		return value, true, nil
	}
	if l.knownMissing(key) {
		l.negativeHits.Add(1)
		return value, false, nil
	}
	l.misses.Add(1)
	f, err := l.join(ctx, key, load)
	if err != nil {
		return value, false, err
	}
	select {
	case <-f.done:
		return f.value, f.found, f.err
	case <-ctx.Done():
		l.leave(f)
		return value, false, ctx.Err()
	}
}

// forget removes key, whatever is known of it. A get that begins afterwards sees a load that began afterwards.
func (l *lookup[K, V]) forget(key K) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.positives.Load().Remove(key)
	if negatives := l.negatives.Load(); negatives != nil {
		negatives.Remove(key)
	}
	// A load still in the line will see the change.
	if f := l.flights[key]; f != nil && f.place == nil {
		delete(l.flights, key)
	}
}

// reload loads key again, by a load that begins after the call. What is known of key stays in use until then: what is found, or found
// missing, takes its place, and a load that fails leaves it as it is. done is closed when the load has ended.
func (l *lookup[K, V]) reload(key K, load loader[K, V]) (done <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nowhere[K, V](key).done
	}
	f := l.flights[key]
	if f == nil || f.place == nil { // one in the line has not begun
		f = l.launchLocked(key, load)
	}
	f.waiters++ // who never leaves: it is not dropped
	return f.done
}

// reloading returns when the load of key that is under way has ended, if there is one.
func (l *lookup[K, V]) reloading(key K) (done <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.flights[key]; f != nil {
		return f.done
	}
	return nowhere[K, V](key).done
}

// forgetAll does what forget does, for every key.
func (l *lookup[K, V]) forgetAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch++
	l.resetLocked()
}

// close cancels the loads, waits for them, and forgets everything. Every later get is ErrClosed, and so is
// that of those who wait, unless their load succeeds all the same. It may be called several times, also
// at once; from within a load it would wait for itself. A load that does not heed its cancellation is left behind when ctx ends,
// with an error.
func (l *lookup[K, V]) close(ctx context.Context) error {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		l.cancel()
		l.resetLocked()
		for e := l.line.Front(); e != nil; e = l.line.Front() {
			f := l.line.Remove(e).(*flight[K, V])
			f.err = ErrClosed
			close(f.done)
		}
		clear(l.flights)
	}
	l.mu.Unlock()
	idle := make(chan struct{})
	go func() { l.wg.Wait(); close(idle) }()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-idle:
		return nil
	case <-time.After(closeGrace): // also when nothing was left of ctx: loads were cancelled and end at once
		return fmt.Errorf("tenancy: a load goes on after its end: %w", ctx.Err())
	}
}

func (l *lookup[K, V]) stats() lookupStats {
	return lookupStats{
		hits:         l.hits.Load(),
		misses:       l.misses.Load(),
		negativeHits: l.negativeHits.Load(),
		loads:        l.loads.Load(),
		loadErrors:   l.loadErrors.Load(),
	}
}

func (l *lookup[K, V]) resetLocked() {
	positives, _ := lru.New[K, V](l.cfg.size) // fails for a size below 1 alone
	l.positives.Store(positives)
	if l.cfg.negativeSize > 0 && l.cfg.negativeTTL > 0 {
		negatives, _ := lru.New[K, time.Time](l.cfg.negativeSize)
		l.negatives.Store(negatives)
	}
}

// knownMissing reports whether key was not found a short time ago. An expired entry stays until it is
// overwritten or pushed out: removing it here could hit the fresh one of a load that ends just now.
func (l *lookup[K, V]) knownMissing(key K) bool {
	negatives := l.negatives.Load()
	if negatives == nil {
		return false
	}
	until, ok := negatives.Get(key)
	return ok && time.Now().Before(until)
}

// join makes the caller a waiter for key's load, and begins one if there is none that may still be
// joined. A load that ended since the caller looked is joined too: that is what makes it one per key.
func (l *lookup[K, V]) join(ctx context.Context, key K, load loader[K, V]) (*flight[K, V], error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if value, ok := l.positives.Load().Get(key); ok {
		return landed(key, value, true), nil
	}
	if l.knownMissing(key) {
		return nowhere[K, V](key), nil
	}
	f := l.flights[key]
	if f == nil || f.place == nil && f.epoch != l.epoch {
		f = l.launchLocked(key, load)
	} else if late := time.Now().Add(l.cfg.loadTimeout / 4); f.place != nil && f.end.Before(late) {
		f.end = f.end.Add(l.cfg.loadTimeout) // it has not begun, and who comes last would have no time at all
	}
	f.waiters++
	return f, nil
}

// launchLocked begins a load of key, or puts it in the line. Nobody joins one that was under way.
func (l *lookup[K, V]) launchLocked(key K, load loader[K, V]) *flight[K, V] {
	f := &flight[K, V]{key: key, load: load, end: time.Now().Add(l.cfg.loadTimeout), done: make(chan struct{})}
	l.flights[key] = f
	if l.running < l.cfg.parallel {
		l.beginLocked(f)
	} else {
		f.place = l.line.PushBack(f)
	}
	return f
}

// landed is a flight that is over.
func landed[K comparable, V any](key K, value V, found bool) *flight[K, V] {
	f := &flight[K, V]{key: key, value: value, found: found, done: make(chan struct{})}
	close(f.done)
	return f
}

// nowhere is a flight that is over and has found nothing.
func nowhere[K comparable, V any](key K) *flight[K, V] {
	var none V
	return landed(key, none, false)
}

// leave is called by a waiter who waits no more. A load that has not begun and that nobody waits for is
// dropped, or callers who give up at once could make the line grow without bound.
func (l *lookup[K, V]) leave(f *flight[K, V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.waiters--; f.waiters == 0 && f.place != nil && !l.closed {
		l.line.Remove(f.place)
		delete(l.flights, f.key)
	}
}

// beginLocked gives f a permit. It sees every change that was forgotten before.
func (l *lookup[K, V]) beginLocked(f *flight[K, V]) {
	f.place = nil
	f.epoch = l.epoch
	l.running++
	l.wg.Add(1)
	go l.run(f)
}

// run loads f and passes the permit on.
func (l *lookup[K, V]) run(f *flight[K, V]) {
	l.loads.Add(1)
	f.err = errors.New("tenancy: a load ended its goroutine") // unless it returns or panics
	defer l.land(f)
	defer func() {
		if p := recover(); p != nil {
			f.err = &loadPanic{value: p, stack: debug.Stack()}
		}
	}()
	ctx, cancel := context.WithDeadline(l.base, f.end)
	defer cancel()
	f.value, f.found, f.err = f.load(ctx, f.key)
}

// land delivers f, remembers it unless it was overtaken, and begins the next load in the line.
func (l *lookup[K, V]) land(f *flight[K, V]) {
	if f.err != nil {
		l.loadErrors.Add(1)
	}
	if f.err != nil || !f.found {
		var none V
		f.value, f.found = none, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.wg.Done()
	if l.closed && f.err != nil {
		f.err = ErrClosed // most likely close is what cancelled it
	}
	if l.flights[f.key] == f {
		delete(l.flights, f.key)
		if f.epoch == l.epoch && f.err == nil {
			l.rememberLocked(f)
		}
	}
	close(f.done)
	l.running--
	if next := l.line.Front(); next != nil {
		l.beginLocked(l.line.Remove(next).(*flight[K, V]))
	}
}

func (l *lookup[K, V]) rememberLocked(f *flight[K, V]) {
	negatives := l.negatives.Load()
	switch {
	case f.found:
		l.positives.Load().Add(f.key, f.value)
		if negatives != nil {
			negatives.Remove(f.key)
		}
	default:
		l.positives.Load().Remove(f.key) // a reload's
		if negatives != nil {
			negatives.Add(f.key, time.Now().Add(l.cfg.negativeTTL))
		}
	}
}

// loadPanic is the error of a load that panicked. The stack is for a debugger and stays out of the text.
type loadPanic struct {
	value any
	stack []byte
}

func (p *loadPanic) Error() string { return fmt.Sprintf("tenancy: a load panicked: %v", p.value) }

func (p *loadPanic) Unwrap() error {
	err, _ := p.value.(error)
	return err
}
