package tenancy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/sony/gobreaker/v2"
)

const (
	breakerFailures = 3                      // failures to connect, one after the other, that open it
	breakerPause    = time.Second            // until the next attempt; up to half of it more, so that tenants of one server do not ask it together
	probePatience   = 100 * time.Millisecond // how long the others wait for the outcome of the one attempt that is let through: a server that is up answers sooner
)

// breaker stands before the attempts to connect to one data source. After breakerFailures of them in a row it refuses at once, and lets
// one attempt through after each pause, until the server answers: also that it is full. Connections that are open are used meanwhile. Safe for concurrent use.
type breaker struct {
	cb    *gobreaker.CircuitBreaker[struct{}]
	pause time.Duration
	log   func(outage bool, last error)

	mu     sync.Mutex // guards the fields below
	last   error      // of the last attempt that failed
	probe  time.Time  // when the last attempt began; zero: it is over
	until  time.Time  // when the pause is over
	outage bool       // it is not closed
	told   bool       // the outage was logged: one line for each
}

func newBreaker(log *slog.Logger, t Tenant) *breaker {
	b := &breaker{pause: breakerPause + rand.N(breakerPause/2)}
	b.cb = gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
		Timeout:      b.pause,
		ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakerFailures },
		IsExcluded:   func(err error) bool { return err != nil && !tellsOfSource(err) && !isFull(err) },
		IsSuccessful: func(err error) bool { return err == nil || isFull(err) },
		OnStateChange: func(_ string, from, to gobreaker.State) { // under the breaker's own lock
			b.mu.Lock()
			defer b.mu.Unlock()
			if to == gobreaker.StateOpen {
				b.until = time.Now().Add(b.pause)
			}
			b.outage = to != gobreaker.StateClosed
		},
	})
	b.log = func(outage bool, last error) {
		if outage && isState(last, "28P01", "28000") {
			log.Warn("tenancy: a server refuses a tenant's login; the tenant's calls are refused until it can log in", "tenant", t.ID, "name", t.Name, "error", last)
			return
		}
		if outage {
			log.Warn("tenancy: a tenant's database cannot be reached; its calls are refused until it can", "tenant", t.ID, "name", t.Name, "error", last)
			return
		}
		log.Info("tenancy: a tenant's database is reached again", "tenant", t.ID, "name", t.Name)
	}
	return b
}

// tellsOfSource says whether a failure to connect says something about the data source, and not about ourselves or
// about who else is connected.
func tellsOfSource(err error) bool {
	for _, other := range []error{ErrIdentity, ErrPooler, errFoundIdle, budget.ErrNoPermit, budget.ErrClosed, context.Canceled} {
		if errors.Is(err, other) {
			return false
		}
	}
	return !poolClosed(err) && !isFull(err)
}

// connecting says whether err is that of an attempt to connect, made or refused.
func connecting(err error) bool {
	if _, refused := errors.AsType[*refusedAttempt](err); refused {
		return true
	}
	_, failed := errors.AsType[*connectFailure](err)
	return failed
}

// isFull says whether the server, or the login, has answered that it takes no more connections.
func isFull(err error) bool { return isState(err, "53300") }

// do runs an attempt, or refuses it with the failure of the last one.
func (b *breaker) do(attempt func() error) error {
	began, err := time.Now(), b.try(attempt)
	for errors.Is(err, gobreaker.ErrTooManyRequests) && b.probing() && time.Since(began) < probePatience {
		time.Sleep(noPermitPause)
		err = b.try(attempt)
	}
	b.tell()
	if errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests) {
		return b.refusal()
	}
	return err
}

func (b *breaker) try(attempt func() error) error {
	_, err := b.cb.Execute(func() (struct{}, error) {
		defer b.begin()()
		err := attempt()
		if err != nil && tellsOfSource(err) {
			b.mu.Lock()
			b.last = err
			b.mu.Unlock()
		}
		return struct{}{}, err
	})
	return err
}

// begin notes when an attempt begins, and with end that it is over.
func (b *breaker) begin() (end func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	began := time.Now()
	b.probe = began
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.probe == began {
			b.probe = time.Time{}
		}
	}
}

// probing says whether the attempt that was let through may soon tell more: it has just begun, or is about to.
func (b *breaker) probing() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.probe.IsZero() || time.Since(b.probe) < probePatience
}

// tell logs the begin and the end of an outage.
func (b *breaker) tell() {
	b.mu.Lock()
	changed, outage, last := b.outage != b.told, b.outage, b.last
	b.told = b.outage
	b.mu.Unlock()
	if changed {
		b.log(outage, last)
	}
}

// open returns the error of an attempt if it would be refused now.
func (b *breaker) open() error {
	if b.cb.State() != gobreaker.StateOpen {
		return nil
	}
	return b.refusal()
}

// trouble returns the error of an attempt that would be refused, or may be: until one has succeeded.
func (b *breaker) trouble() error {
	if b.state() == gobreaker.StateClosed {
		return nil
	}
	return b.refusal()
}

// breakerState is "closed", "half-open" or "open", in this order.
type breakerState = gobreaker.State

func (b *breaker) state() breakerState { return b.cb.State() }

func (b *breaker) refusal() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return &refusedAttempt{after: max(time.Until(b.until), 50*time.Millisecond), last: b.last}
}

// refusedAttempt is an attempt to connect that was not made.
type refusedAttempt struct {
	after time.Duration
	last  error
}

func (r *refusedAttempt) Error() string {
	return fmt.Sprintf("no attempt was made, the next one is in %v; the last one: %v", r.after.Round(10*time.Millisecond), r.last)
}

func (r *refusedAttempt) Unwrap() error { return r.last }
