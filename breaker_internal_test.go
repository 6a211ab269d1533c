package tenancy

import (
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// TestABreakerPausesForATimeOfItsOwn: from breakerPause to half more, so that the tenants of a server that is back do not ask it together. Whoever is
// refused meanwhile hears when it is over, and is not sent back sooner than in a second.
func TestABreakerPausesForATimeOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := errors.New("down")
		logger := slog.New(slog.DiscardHandler)
		tn := &Tenancy{cfg: Config{Logger: logger}}
		pauses := map[time.Duration]int{}
		for id := ID(1); id <= 40; id++ {
			b := newBreaker(logger, Tenant{ID: id})
			attempts := 0
			attempt := func() error { attempts++; return down }
			for range breakerFailures {
				if err := b.open(); err != nil {
					t.Fatalf("after %d failures: %v", attempts, err)
				}
				if err := b.do(attempt); !errors.Is(err, down) {
					t.Fatal(err)
				}
			}
			opened, hints := time.Now(), []time.Duration{}
			for err := b.open(); err != nil; err = b.open() {
				if refused := b.do(attempt); !errors.Is(refused, down) || attempts != breakerFailures {
					t.Fatalf("%v: an attempt was made %v after the last one", refused, time.Since(opened))
				}
				e, ok := tn.checkoutFailure("exec", Tenant{ID: id}, err).(*Error)
				if !ok || !errors.Is(e, ErrTenantUnavailable) || e.Tenant != id {
					t.Fatalf("%#v", e)
				}
				hints = append(hints, e.RetryAfter)
				time.Sleep(time.Millisecond)
			}
			pause := time.Since(opened) // to the next millisecond
			pauses[pause]++
			if pause < breakerPause || pause > breakerPause*3/2+time.Millisecond {
				t.Errorf("tenant %d: a pause of %v", id, pause)
			}
			if first, last := hints[0], hints[len(hints)-1]; pause-first > time.Millisecond || last != time.Second {
				t.Errorf("tenant %d: a pause of %v; the first caller is told %v, the last one %v", id, pause, first, last)
			}
			if err := b.do(attempt); !errors.Is(err, down) || attempts != breakerFailures+1 {
				t.Errorf("tenant %d: after the pause %d attempts, %v", id, attempts, err)
			}
		}
		if len(pauses) < 10 {
			t.Errorf("40 breakers have the pauses %v: they wake together", pauses)
		}
	})
}
