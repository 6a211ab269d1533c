package tenancy_test

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// eachLine is a log that tells a test of each line: its text, and what it says of the error.
type eachLine func(line string)

func (eachLine) Enabled(context.Context, slog.Level) bool { return true }
func (h eachLine) WithAttrs([]slog.Attr) slog.Handler     { return h }
func (h eachLine) WithGroup(string) slog.Handler          { return h }
func (h eachLine) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	r.Attrs(func(a slog.Attr) bool { line += " " + a.String(); return true })
	h(line)
	return nil
}

// TestASilentListenConnectionIsReplaced: nobody closes it and nothing comes over it, as behind a firewall that has forgotten it. The poll is slow here, and
// could not do what the test wants of notifications.
func TestASilentListenConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	way := newStrait(t, f.PrimaryURL)
	way.mark("tenancy feed")
	lost := make(chan time.Time, 100)
	far := *f
	far.PrimaryURL = way.url
	node := far.Open(t, tenancy.Config{Lookups: tenancy.LookupConfig{PollPeriod: 4 * time.Second}, Logger: slog.New(eachLine(func(line string) {
		if strings.HasPrefix(line, "tenancy: the notification connection was lost") {
			lost <- time.Now()
		}
	}))})
	ask := func(user tenancy.UserKey) string {
		if _, err := node.Resolve(t.Context(), tenancy.Query{User: user}); err != nil {
			return class(err)
		}
		return "served"
	}
	join := func(user tenancy.UserKey, id tenancy.ID) {
		t.Helper()
		mustAdd(t, tn, tenancy.Membership{User: user, Tenant: id})
		until(t, 15*time.Second, "served", func() string { return ask(user) })
	}
	leave := func(user tenancy.UserKey, id tenancy.ID) {
		t.Helper()
		if err := tn.Catalog().RemoveMember(t.Context(), id, user); err != nil {
			t.Fatal(err)
		}
	}
	join("bob", acme.ID)
	join("carol", globex.ID)
	primary := f.Admin(t, "primary")
	sessions := `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tenancy feed' AND datname = current_database()`
	untilTrue(t, "both nodes listen", func() bool { return scan[int](t, primary, sessions) == 2 })

	way.mute()
	muted := time.Now()
	leave("bob", acme.ID)
	select {
	case at := <-lost:
		t.Logf("found out after %v", at.Sub(muted).Round(time.Millisecond))
	case <-time.After(12 * time.Second): // 5 s without a word, and 2 s for the question
		t.Fatal("a notification connection that is silent is not found out")
	}
	until(t, 5*time.Second, tenancy.ErrForbidden.Error(), func() string { return ask("bob") })
	untilTrue(t, "it listens again", func() bool { return scan[int](t, primary, sessions) == 3 }) // the server has not heard that the muted one is closed
	leave("carol", globex.ID)
	took := until(t, 5*time.Second, tenancy.ErrForbidden.Error(), func() string { return ask("carol") })
	t.Logf("a change over the new one after %v", took.Round(time.Millisecond))
	way.calm()
}

// TestAListenWithoutAnAnswerIsTriedAgain: the server freezes for that connection alone, after the login.
func TestAListenWithoutAnAnswerIsTriedAgain(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	f.Open(t, tenancy.Config{}) // makes the primary's schema
	way := newStrait(t, f.PrimaryURL)
	way.mark("LISTEN tenancy")
	way.set(func() { way.muted = true })
	far := *f
	far.PrimaryURL = way.url
	lost := make(chan string, 100)
	far.Open(t, tenancy.Config{Logger: slog.New(eachLine(func(line string) {
		if strings.HasPrefix(line, "tenancy: the notification connection was lost") {
			lost <- line
		}
	}))})
	select {
	case <-lost:
	case <-time.After(10 * time.Second):
		t.Error("it is waited for without end")
	}
	way.calm()
	sessions := `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tenancy feed' AND datname = current_database() AND query = 'LISTEN tenancy'`
	primary := f.Admin(t, "primary")
	untilTrue(t, "both nodes listen", func() bool { return scan[int](t, primary, sessions) >= 2 })
}

// TestTheValidityJobOutlivesAPanicAndNeverRunsTwiceAtOnce: what panics in it, or takes longer than to its next time, is the service's own log, which it
// calls.
func TestTheValidityJobOutlivesAPanicAndNeverRunsTwiceAtOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	var mu sync.Mutex // guards the fields below
	var runs, running, most, skipped, caught int
	failing := false
	let := make(chan struct{})
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, ValidityCron: "@every 1s", Logger: slog.New(eachLine(func(line string) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case strings.HasPrefix(line, "tenancy: validity job failed") && failing:
			runs++
			if runs == 1 {
				panic("the log is full")
			}
			running++
			most = max(most, running)
			mu.Unlock()
			<-let
			mu.Lock()
			running--
		case strings.HasPrefix(line, "tenancy: cron: skip"):
			skipped++
		case strings.HasPrefix(line, "tenancy: cron: panic") && strings.Contains(line, "the log is full"):
			caught++
		}
	}))})
	seen := func(ok func() bool) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return ok() }
	}
	create(t, f, tn, "acme")
	create(t, f, tn, "globex")
	primary := f.Admin(t, "primary")
	must(t, primary, `CREATE FUNCTION public.fails() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'as told'; END $$`)
	mu.Lock()
	failing = true
	mu.Unlock()
	must(t, primary, `CREATE TRIGGER fails BEFORE DELETE ON tenancy.changes FOR EACH STATEMENT EXECUTE FUNCTION public.fails()`)
	untilTrue(t, "a run after one that panicked", seen(func() bool { return running == 1 }))
	untilTrue(t, "the time of the next run, in the middle of that", seen(func() bool { return skipped > 0 || running > 1 }))
	must(t, primary, `DROP TRIGGER fails ON tenancy.changes`)
	must(t, primary, `INSERT INTO tenancy.nodes (id, name, epoch, seen) SELECT gen_random_uuid(), 'dead', epoch, now() - interval '2 hours' FROM tenancy.epoch`)
	close(let)
	untilTrue(t, "a run that succeeds", func() bool {
		return scan[int](t, primary, `SELECT count(*) FROM tenancy.nodes WHERE name = 'dead'`) == 0
	})
	mu.Lock()
	defer mu.Unlock()
	if most != 1 || caught != 1 {
		t.Errorf("%d runs at once, want 1; %d panics caught, want 1", most, caught)
	}
}
