package tenancy

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// TestAttemptsWaitForTheOutcomeOfTheOneThatIsLetThrough, if it comes soon: they are refused for what it found, and never for an older outage when it found the server up.
func TestAttemptsWaitForTheOutcomeOfTheOneThatIsLetThrough(t *testing.T) {
	t.Parallel()
	older, newer := &connectFailure{text: "the older outage"}, &connectFailure{text: "the newer outage"}
	full := &connectFailure{text: "too many connections", cause: &pgconn.PgError{Code: "53300"}}
	for name, c := range map[string]struct {
		outcome error
		takes   time.Duration
		tells   string // what the others are told; "": they are made
		state   string
	}{
		"it_connects":      {nil, probePatience / 2, "", "closed"},
		"it_is_full":       {full, probePatience / 2, "", "closed"},
		"it_fails":         {newer, probePatience / 2, "the newer outage", "open"},
		"it_takes_long":    {nil, 2 * probePatience, "the older outage", "closed"},
		"it_says_nothing":  {errFoundIdle, probePatience / 2, "", "closed"},
		"it_takes_no_time": {full, 0, "", "closed"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBreaker(slog.New(slog.DiscardHandler), Tenant{})
				for range breakerFailures {
					b.do(func() error { return older })
				}
				if b.open() == nil {
					t.Fatal("it is not open")
				}
				time.Sleep(2 * breakerPause)
				begun := make(chan struct{})
				probe := make(chan error, 1)
				go func() {
					probe <- b.do(func() error { close(begun); time.Sleep(c.takes); return c.outcome })
				}()
				<-begun
				made := false
				err := b.do(func() error { made = true; return nil })
				if c.tells == "" && (err != nil || !made) || c.tells != "" && (err == nil || made || !strings.HasSuffix(err.Error(), c.tells)) {
					t.Errorf("another attempt: made %v, error %v", made, err)
				}
				if err := <-probe; !errors.Is(err, c.outcome) {
					t.Errorf("the one that is let through: %v", err)
				}
				if got := b.state().String(); got != c.state {
					t.Errorf("the breaker is %s, want %s", got, c.state)
				}
			})
		})
	}
}

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
