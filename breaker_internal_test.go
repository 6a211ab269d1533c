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
