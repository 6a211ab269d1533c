package budget_test

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// idle returns accounts that have n connections each, all of them idle. No socket is behind them.
func idle(s *budget.Server, accounts, n int) []*budget.Account {
	all := make([]*budget.Account, accounts)
	for i := range all {
		all[i] = s.NewAccount(budget.AccountConfig{Floor: 1, Ceiling: max(n, 1), Waiters: 100,
			Connect: func(context.Context) (time.Duration, error) { return 0, nil }, Evict: func() bool { return false }, Idle: func() bool { return true }})
		budget.Give(all[i], n)
	}
	return all
}

func BenchmarkEnterAndLeave(b *testing.B) {
	for _, accounts := range []int{1, 100} {
		all := idle(budget.NewServer(budget.Limits{Total: 10_000}), accounts, 64)
		b.Run(fmt.Sprintf("accounts_%d/serial", accounts), func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				a := all[i%accounts]
				if !a.TryEnter() {
					b.Fatal("refused")
				}
				a.Leave()
			}
		})
		b.Run(fmt.Sprintf("accounts_%d/parallel", accounts), func(b *testing.B) {
			b.ReportAllocs()
			var next atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				for i := int(next.Add(1)) * 17; pb.Next(); i++ {
					a := all[i%accounts]
					if !a.TryEnter() {
						b.Error("refused")
						return
					}
					a.Leave()
				}
			})
		})
	}
}

// What a call costs in an account with a line of its own, so that every Leave takes the lock, while others wait for a permit in vain.
func BenchmarkEnterAndLeaveInLine(b *testing.B) {
	for _, hungry := range []int{0, 10, 5000} {
		b.Run(fmt.Sprintf("hungry_%d", hungry), func(b *testing.B) {
			s := budget.NewServer(budget.Limits{Total: 102})
			a := idle(s, 25, 4)[0]
			budget.Starve(idle(s, hungry, 0))
			b.ReportAllocs()
			b.SetParallelism(8)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := a.Enter(b.Context(), time.Now().Add(time.Minute), 0); err != nil {
						b.Error(err)
						return
					}
					runtime.Gosched()
					a.Leave()
				}
			})
		})
	}
}

// What it costs to come to the end of the line of accounts, and to leave it.
func BenchmarkWaitInVain(b *testing.B) {
	for _, hungry := range []int{10, 5000} {
		b.Run(fmt.Sprintf("hungry_%d", hungry), func(b *testing.B) {
			s := budget.NewServer(budget.Limits{Total: 102})
			idle(s, 100, 1)
			budget.Starve(idle(s, hungry, 0))
			one := idle(s, 1, 0)[0]
			b.ReportAllocs()
			for b.Loop() {
				if err := one.Enter(b.Context(), time.Now(), 0); !starved(err) {
					b.Fatal(err)
				}
			}
		})
	}
}
