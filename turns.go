package tenancy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// turns is who comes when to the primary's locks among the verbs of this process: one at a time for each lock, in the order in which they asked.
// The zero value is ready. Safe for concurrent use.
type turns struct {
	mu sync.Mutex // guards of, and the turns' users
	of map[lockOf]*turn
}

// lockOf names a lock of the primary.
type lockOf struct {
	what string
	id   int64
}

type turn struct {
	taken chan struct{} // holds one: who has the lock, or asks for it
	users int           // with those that wait
}

// take waits for the turn. rest is called before a wait.
func (t *turns) take(ctx context.Context, lock lockOf, rest func()) (done func(), err error) {
	t.mu.Lock()
	if t.of == nil {
		t.of = map[lockOf]*turn{}
	}
	at := t.of[lock]
	if at == nil {
		at = &turn{taken: make(chan struct{}, 1)}
		t.of[lock] = at
	}
	at.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if at.users--; at.users == 0 {
			delete(t.of, lock)
		}
	}
	select {
	case at.taken <- struct{}{}:
	default:
		rest()
		select {
		case at.taken <- struct{}{}:
		case <-ctx.Done():
			leave()
			return nil, ctx.Err()
		}
	}
	return func() { <-at.taken; leave() }, nil
}

const (
	firstPause   = 10 * time.Millisecond // between two looks at a lock that another node has
	longestPause = 250 * time.Millisecond
)

// await calls try until the lock is free, when it is this verb's turn. Who waits holds nothing that the verbs of other tenants need, neither a
// place among the verbs nor a connection: rest gives up what is kept from one try to the next.
func (p *primaryDB) await(ctx context.Context, lock lockOf, rest func(), try func() (held context.Context, release func(), err error)) (held context.Context, release func(), err error) {
	done, err := p.turns.take(ctx, lock, rest)
	if err != nil {
		return nil, nil, notInTime(ctx)
	}
	locked := false
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		held, unlock, err := try()
		switch {
		case err == nil:
			return held, func() { unlock(); done() }, nil
		case errors.Is(err, errLocked):
			locked = true
		case locked && ctx.Err() != nil: // in the middle of a look
		default:
			done()
			return nil, nil, err
		}
		rest()
		select {
		case <-ctx.Done():
			done()
			return nil, nil, notInTime(ctx)
		case <-time.After(pause/2 + rand.N(pause)):
		}
	}
}

func notInTime(ctx context.Context) error {
	return fmt.Errorf("%w: its lock was not free in time: %w", ErrInProgress, ctx.Err())
}
