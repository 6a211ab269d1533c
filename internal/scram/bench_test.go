//go:build unix

package scram_test

import (
	"context"
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/scram"
)

const (
	benchTurns  = 12 // of each contender in a round
	benchRounds = 21
)

// BenchmarkLogin compares logins by the iterations of their verifiers: the time from pgx.ConnectConfig to the answer of a first
// query, with some such connects begun at once. Closing is not in it.
//
// One iteration is a round in which {4096, fewer, 4096 again} take 12 turns each, in a new order each time; at least 21 are made, and
// -benchtime=101x makes 101. Each round gives the ratios fewer/4096 and again/4096 of the median turns, and of the client's
// processor time. Reported are the medians over rounds, with the interval that holds the true median with at least 95 %, and the
// client's processor time for a connect, in us. What again is off 1 is the machine's noise.
func BenchmarkLogin(b *testing.B) {
	s := startServer(b)
	reference, again := s.loginWith(b, 4096), s.loginWith(b, 4096)
	for _, iterations := range []int{1, 16, 1000} {
		contenders := []*pgx.ConnConfig{reference, s.loginWith(b, iterations), again}
		for _, connects := range []int{1, 8} {
			b.Run(fmt.Sprintf("iterations=%d/connects=%d", iterations, connects), func(b *testing.B) {
				benchLogins(b, contenders, connects)
			})
		}
	}
}

func (s *server) loginWith(tb testing.TB, iterations int) *pgx.ConnConfig {
	tb.Helper()
	var salt [16]byte
	_, _ = rand.Read(salt[:]) // never fails
	p := password(tb)
	v, err := scram.Derive(p, salt[:], iterations)
	if err != nil {
		tb.Fatal(err)
	}
	return s.login(tb, p, v)
}

func benchLogins(b *testing.B, contenders []*pgx.ConnConfig, connects int) {
	var ratio, again, cpuRatio, cpuAgain []float64
	var cpu [3]float64 // of all rounds
	round := func() {
		var took, spent [3][]float64
		for range benchTurns {
			for _, who := range mrand.Perm(len(contenders)) {
				t, c := benchTurn(b, contenders[who], connects)
				took[who], spent[who] = append(took[who], t), append(spent[who], c)
			}
		}
		var t, c [3]float64
		for who := range contenders {
			t[who], c[who] = median(took[who]), median(spent[who])
			cpu[who] += c[who]
		}
		ratio, again = append(ratio, t[1]/t[0]), append(again, t[2]/t[0])
		cpuRatio, cpuAgain = append(cpuRatio, c[1]/c[0]), append(cpuAgain, c[2]/c[0])
	}
	for who := range contenders {
		benchTurn(b, contenders[who], connects) // the first one after a pause is another machine's
	}
	for b.Loop() {
		round()
	}
	for len(ratio) < benchRounds {
		round()
	}
	rounds := float64(len(ratio))
	b.ReportMetric(0, "ns/op") // of a round: says nothing
	b.ReportMetric(rounds, "rounds")
	for name, values := range map[string][]float64{"ratio": ratio, "again": again} {
		low, high := interval(values)
		b.ReportMetric(median(values), name)
		b.ReportMetric(low, name+"-low")
		b.ReportMetric(high, name+"-high")
	}
	b.ReportMetric(median(cpuRatio), "cpu-ratio")
	b.ReportMetric(median(cpuAgain), "cpu-again")
	for who, name := range []string{"cpu-us-4096", "cpu-us", "cpu-us-again"} {
		b.ReportMetric(cpu[who]/rounds/float64(connects)*1e6, name)
	}
}

// benchTurn begins the connects at once and returns how long it took until the last one had its answer, and the process's
// processor time meanwhile, both in seconds.
func benchTurn(b *testing.B, cc *pgx.ConnConfig, connects int) (took, cpu float64) {
	conns := make([]*pgx.Conn, connects)
	var wg sync.WaitGroup
	before, start := processorTime(b), time.Now()
	for i := range conns {
		wg.Go(func() {
			conn, err := pgx.ConnectConfig(b.Context(), cc)
			if err != nil {
				b.Error(err)
				return
			}
			conns[i] = conn
			var one int
			if err := conn.QueryRow(b.Context(), "SELECT 1").Scan(&one); err != nil || one != 1 {
				b.Errorf("got %d, %v", one, err)
			}
		})
	}
	wg.Wait()
	took, cpu = time.Since(start).Seconds(), processorTime(b)-before
	for _, conn := range conns {
		if conn != nil {
			conn.Close(context.WithoutCancel(b.Context())) // returns when the server has closed
		}
	}
	if b.Failed() {
		b.FailNow()
	}
	return took, cpu
}

// processorTime is the process's, of all its threads, in seconds.
func processorTime(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return (time.Duration(u.Utime.Nano()) + time.Duration(u.Stime.Nano())).Seconds()
}

func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// interval returns the narrowest pair of values, with equal ranks from both ends, that has the true median between them with at
// least 95 %: the chance that it is below the k-th smallest is that of fewer than k heads in n tosses. Of 21 these are the 6th and the 16th.
func interval(values []float64) (low, high float64) {
	v := slices.Sorted(slices.Values(values))
	n, k := len(v), 0
	term := 1.0
	for range n {
		term /= 2
	}
	for below := term; k+1 < n/2; k++ { // v[k] is the (k+1)-th smallest
		term *= float64(n-k) / float64(k+1) // exactly k+1 heads
		if below += term; below > 0.025 {
			break
		}
	}
	return v[k], v[n-1-k]
}
