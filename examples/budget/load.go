package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// figures are a load at one moment.
type figures struct {
	calls, errors int
	firstError    error
	p50, p99      time.Duration // of the last calls
	conns, most   int           // connections that PostgreSQL counts, now and at most
	evicted       int64         // idle connections that were closed for others
}

func (f figures) String() string {
	return fmt.Sprintf("%d calls, %d errors, p50 %v, p99 %v, %d connections closed for others; PostgreSQL counts %d, at most %d",
		f.calls, f.errors, f.p50, f.p99, f.evicted, f.conns, f.most)
}

// load is what the clients see. Safe for concurrent use.
type load struct {
	fleet *fleet
	asked []atomic.Int64 // calls that were answered, of each tenant of the fleet

	mu   sync.Mutex // guards what follows
	seen figures
	took [10_000]time.Duration // of the last calls
}

// start has the clients ask until ctx ends. ended waits for the calls that have begun: none is cut off.
func (l *load) start(ctx context.Context, clients int) (ended func() error, err error) {
	admin, err := pgx.Connect(ctx, l.fleet.server.URL())
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
			pick := rand.NewZipf(r, 1.1, 1, uint64(len(l.fleet.tenants)-1)) // the k-th k^1.1 times more seldom than the first
			for ctx.Err() == nil {
				began := time.Now()
				tenant := int(pick.Uint64())
				err := l.ask(context.WithoutCancel(ctx), tenant)
				l.note(tenant, time.Since(began), err)
			}
		})
	}
	var failed error
	wg.Go(func() { failed = l.count(ctx, admin) })
	return func() error {
		wg.Wait()
		_ = admin.Close(context.WithoutCancel(ctx))
		return failed
	}, nil
}

// ask is a request for one tenant. Which connection it runs on, and whose had to go for it, is the library's business.
func (l *load) ask(ctx context.Context, tenant int) error {
	ctx, err := l.fleet.node.Enter(ctx, l.fleet.tenants[tenant])
	if err != nil {
		return err
	}
	var title string
	return l.fleet.node.DB().QueryRow(ctx, `SELECT title FROM notes WHERE id = $1`, 1).Scan(&title)
}

func (l *load) note(tenant int, took time.Duration, err error) {
	if err == nil {
		l.asked[tenant].Add(1)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.took[l.seen.calls%len(l.took)] = took
		l.seen.calls++
		return
	}
	if l.seen.errors++; l.seen.firstError == nil {
		l.seen.firstError = err
	}
}

// count asks PostgreSQL every few milliseconds how many connections the node has. The superuser's, who asks, is not one of them.
func (l *load) count(ctx context.Context, admin *pgx.Conn) error {
	for ctx.Err() == nil {
		var n int
		err := admin.QueryRow(context.WithoutCancel(ctx), `SELECT count(*) FROM pg_stat_activity
			WHERE backend_type = 'client backend' AND usename IS DISTINCT FROM current_user`).Scan(&n)
		if err != nil {
			return err
		}
		l.mu.Lock()
		l.seen.conns, l.seen.most = n, max(l.seen.most, n)
		l.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// tenant is what the library says of one that has a pool, and how often it was asked.
type tenant struct {
	tenancy.TenantStats
	calls int
}

func (l *load) tenants() (all []tenant) {
	stats := maps.Collect(l.fleet.node.Stats())
	for i, id := range l.fleet.tenants {
		if s, ok := stats[id]; ok {
			all = append(all, tenant{s, int(l.asked[i].Load())})
		}
	}
	return all
}

func (l *load) figures() figures {
	l.mu.Lock()
	now := l.seen
	took := slices.Clone(l.took[:min(now.calls, len(l.took))])
	l.mu.Unlock()
	if slices.Sort(took); len(took) > 0 {
		now.p50, now.p99 = took[len(took)/2].Round(10*time.Microsecond), took[len(took)*99/100].Round(10*time.Microsecond)
	}
	for server := range l.fleet.node.Servers() { // there is one
		now.evicted = server.Evicted
	}
	return now
}
