package lease

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
)

var errGoexit = errors.New("lease: Build ended its goroutine (runtime.Goexit)")

// PanicError is the error of a build that panicked. Its text holds the panic's value but
// not the stack, which names files and belongs in a log.
type PanicError struct {
	Callback string // "Build", "Close" or "Cut"
	Value    any    // the argument of panic
	Stack    []byte // as debug.Stack gives it
}

func newPanicError(callback string, value any) *PanicError {
	return &PanicError{Callback: callback, Value: value, Stack: debug.Stack()}
}

func (p *PanicError) Error() string {
	return fmt.Sprintf("lease: %s panicked: %v", p.Callback, p.Value)
}

// Unwrap returns the argument of panic if it was an error.
func (p *PanicError) Unwrap() error {
	err, _ := p.Value.(error)
	return err
}

// builderKey is the context key under which a Build's ctx carries its own entry, so that
// an Acquire inside it is known to be one.
type builderKey[K comparable, V any] struct{ table *Table[K, V] }

// acquireSlow leases the value of key when no live one could be had without the lock.
func (t *Table[K, V]) acquireSlow(ctx context.Context, key K, generation int64) (Lease[K, V], error) {
	builder, _ := ctx.Value(builderKey[K, V]{t}).(*entry[K, V])

	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return Lease[K, V]{}, ErrClosed
	}
	s := t.slots[key]
	if s != nil && s.current != nil && s.current.generation >= generation && s.current.take() {
		e := s.current
		t.mu.Unlock()
		return Lease[K, V]{e}, nil
	}
	if err := ctx.Err(); err != nil {
		t.mu.Unlock()
		return Lease[K, V]{}, err
	}
	if builder != nil && builder.built {
		builder = nil // a ctx kept beyond its Build: nobody waits for that one any more
	}
	// A build that asks for its own key could be served only by a second build of it.
	if builder != nil && builder.key == key {
		t.mu.Unlock()
		return Lease[K, V]{}, ErrReentrant
	}
	var e *entry[K, V]
	if s != nil && s.building != nil && s.building.generation >= generation {
		e = s.building
	}
	if e != nil && builder != nil && e.waitsFor(builder) {
		t.mu.Unlock()
		return Lease[K, V]{}, ErrReentrant
	}
	if e == nil {
		if builder != nil && t.cfg.CloseFirst && s != nil && waitForAny(s.entries, builder) {
			t.mu.Unlock()
			return Lease[K, V]{}, ErrReentrant
		}
		e = t.startLocked(key, generation)
	}
	e.waiters++
	if builder != nil {
		builder.waitFor = append(builder.waitFor, e)
	}
	t.mu.Unlock()
	return t.wait(ctx, e, builder)
}

// wait waits for a build as one of its waiters. builder is the build in which the caller
// itself runs, or nil.
func (t *Table[K, V]) wait(ctx context.Context, e, builder *entry[K, V]) (Lease[K, V], error) {
	var left error
	select {
	case <-e.ready:
		if builder == nil { // the common case needs no lock
			return e.granted()
		}
	case <-ctx.Done():
		left = ctx.Err()
	case <-t.cutting:
		left = ErrClosed
	}

	t.mu.Lock()
	if builder != nil {
		if i := slices.Index(builder.waitFor, e); i >= 0 { // one of its edges to e
			builder.waitFor = slices.Delete(builder.waitFor, i, i+1)
		}
	}
	built := e.built
	if !built {
		if e.waiters--; e.waiters == 0 && e.retired {
			e.cancel()
		}
	}
	t.mu.Unlock()

	if left == nil {
		return e.granted()
	}
	if built && e.err == nil {
		e.release() // the build ended first and granted a lease that nobody will use
	}
	return Lease[K, V]{}, left
}

// granted is the outcome of a build for one of its waiters: a lease that settle counted.
func (e *entry[K, V]) granted() (Lease[K, V], error) {
	if e.err != nil {
		select {
		case <-e.table.cutting: // most likely Close is what cancelled the build
			return Lease[K, V]{}, ErrClosed
		default:
			return Lease[K, V]{}, e.err
		}
	}
	return Lease[K, V]{e}, nil
}

// waitsFor reports whether e is other or waits for it, through any number of builds. The
// caller holds the lock of the table. Edges are only added where they close no circle, so
// the walk ends.
func (e *entry[K, V]) waitsFor(other *entry[K, V]) bool {
	return e == other || waitForAny(e.waitFor, other)
}

func waitForAny[K comparable, V any](entries []*entry[K, V], other *entry[K, V]) bool {
	return slices.ContainsFunc(entries, func(e *entry[K, V]) bool { return e.waitsFor(other) })
}

// startLocked begins a build that will become current.
func (t *Table[K, V]) startLocked(key K, generation int64) *entry[K, V] {
	s := t.slots[key]
	if s == nil {
		s = &slot[K, V]{}
		t.slots[key] = s
	}
	e := &entry[K, V]{
		table:      t,
		key:        key,
		generation: generation,
		ready:      make(chan struct{}),
		ended:      make(chan struct{}),
	}
	var ctx context.Context
	ctx, e.cancel = context.WithCancel(context.WithValue(t.base, builderKey[K, V]{t}, e))

	if s.building != nil {
		t.overtakeLocked(s)
	}
	var before []*entry[K, V]
	if t.cfg.CloseFirst {
		if s.current != nil {
			t.unlinkLocked(s)
		}
		before = slices.Clone(s.entries)
		e.waitFor = slices.Clone(before)
	}
	s.building = e
	s.entries = append(s.entries, e)
	go t.run(ctx, e, before)
	return e
}

// run builds one value, after the end of those before it.
func (t *Table[K, V]) run(ctx context.Context, e *entry[K, V], before []*entry[K, V]) {
	err := errGoexit // unless Build returns or panics
	defer func() {
		if p := recover(); p != nil {
			err = newPanicError("Build", p)
		}
		t.settle(e, err)
	}()

	if err = t.awaitEnd(ctx, before); err != nil {
		return
	}
	err = errGoexit
	ctx, cancel := context.WithTimeout(ctx, t.cfg.BuildTimeout)
	defer cancel()
	e.value, err = t.cfg.Build(ctx, e.key, e.generation)
}

// awaitEnd waits until the given entries have ended. It is bounded, so that one lease that
// is never released cannot hold up the callers of a key in silence.
func (t *Table[K, V]) awaitEnd(ctx context.Context, entries []*entry[K, V]) error {
	if len(entries) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, t.cfg.BuildTimeout)
	defer cancel()
	for _, e := range entries {
		select {
		case <-e.ended:
		case <-ctx.Done():
			return fmt.Errorf("lease: generation %d has not ended within %v: %w",
				e.generation, t.cfg.BuildTimeout, ctx.Err())
		}
	}
	return nil
}

// settle ends a build: it grants every waiter a lease, and makes the value current unless
// it was retired meanwhile.
func (t *Table[K, V]) settle(e *entry[K, V], err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer close(e.ready)
	e.cancel()
	e.err, e.built, e.waitFor = err, true, nil
	s := t.slots[e.key]
	if s.building == e {
		s.building = nil
	}
	switch {
	case err != nil:
		t.forgetLocked(e)
	case e.retired:
		e.state.Store(int64(e.waiters) * oneLease)
		if e.waiters == 0 {
			e.endIfUnused()
		}
	default:
		if s.current != nil {
			t.unlinkLocked(s)
		}
		e.touched.Store(true) // its idle time begins now, not at the last tick
		e.state.Store(int64(e.waiters)*oneLease + linked)
		s.current = e
		t.count++
		t.live.Store(e.key, e)
		t.armLocked()
	}
}
