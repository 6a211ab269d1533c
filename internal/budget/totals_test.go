package budget_test

import (
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// The totals are the sum of all accounts that there ever were, but for the waits of inner ones.
func TestTotalsOutliveTheirAccounts(t *testing.T) {
	in(t, 2, func(t *testing.T, w *world) {
		wait := func(p *pool) budget.Usage { // for a connection that is in use, with no permit left for another
			held := w.take(p)
			next := w.call(p)
			time.Sleep(30 * ms)
			p.give(held)
			next.give()
			for p.evict() {
			}
			p.account.Close()
			time.Sleep(30 * ms)
			return p.account.Usage()
		}
		other := w.pool(1, 1)
		theirs := w.take(other)
		a, b := wait(w.pool(1, 2)), wait(w.pool(1, 2))
		inner := w.pool(1, 2)
		inner.account = w.NewAccount(budget.AccountConfig{Floor: 1, Ceiling: 2, Waiters: 100, Inner: true,
			Connect: inner.connectOne, Evict: inner.evict, Idle: func() bool { return inner.idleConns() > 0 }})
		c := wait(inner)
		other.give(theirs)

		// The first call of each waits for a connect, which takes no time here.
		for i, u := range []budget.Usage{a, b, c} {
			if u.Waits != 2 || u.Waited != 30*ms || u.Starved != 1 {
				t.Errorf("account %d: %+v", i, u)
			}
		}
		ofOther := other.account.Usage()
		if n, want := w.Totals.Waits.Load(), a.Waits+b.Waits+ofOther.Waits; n != want {
			t.Errorf("%d waits in total, want %d", n, want)
		}
		if d := time.Duration(w.Totals.Waited.Load()); d != 60*ms {
			t.Errorf("waited %v in total, want 60ms", d)
		}
		if n := w.Totals.Starved.Load(); n != 3 {
			t.Errorf("starved %d times in total, want 3: an inner account needs permits as others do", n)
		}
	})
}

// What verbs have beyond what is kept for them, accounts cannot have.
func TestASnapshotTellsWhatAccountsCanHave(t *testing.T) {
	in(t, 20, func(t *testing.T, w *world) {
		w.Server = budget.NewServer(budget.Limits{Total: 20 + budget.Cancels, Work: 3})
		want := func(n int) {
			t.Helper()
			if s := w.Snapshot(); s.Accounts != n {
				t.Errorf("accounts can have %d, want %d: %+v", s.Accounts, n, s)
			}
		}
		want(17)
		dial := w.Dialer(w.b.dial)
		for i := range 5 {
			c, err := dial(t.Context(), "tcp", "db:5432")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { c.Close(); time.Sleep(time.Second) }()
			want(20 - max(3, i+1))
		}
		// And so many they get.
		p := w.pool(20, 20)
		var held []*budget.Conn
		for range 15 {
			held = append(held, w.take(p))
		}
		next := w.call(p)
		if next.served() {
			t.Error("an account has got what is a verb's")
		}
		for _, c := range held {
			p.give(c)
		}
		next.give()
	})
}
