package lease_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msmt-go/tenancy/internal/lease"
)

type table = lease.Table[string, *conn]

// conn is a value that knows whether it is open.
type conn struct {
	key        string
	generation int64
	closed     atomic.Bool
}

// factory makes conns and counts them.
type factory struct {
	built, closed atomic.Int64
}

func (f *factory) build(_ context.Context, key string, generation int64) (*conn, error) {
	f.built.Add(1)
	return &conn{key: key, generation: generation}, nil
}

// slowly is build after d, whatever happens to its ctx.
func (f *factory) slowly(d time.Duration) func(context.Context, string, int64) (*conn, error) {
	return func(ctx context.Context, key string, generation int64) (*conn, error) {
		time.Sleep(d)
		return f.build(ctx, key, generation)
	}
}

func (f *factory) close(c *conn) {
	if c.closed.Swap(true) {
		panic("closed twice")
	}
	f.closed.Add(1)
}

func (f *factory) config() lease.Config[string, *conn] {
	return lease.Config[string, *conn]{Build: f.build, Close: f.close}
}

// want checks the counts once everything has come to rest.
func (f *factory) want(t *testing.T, built, closed int64) {
	t.Helper()
	synctest.Wait()
	if b, c := f.built.Load(), f.closed.Load(); b != built || c != closed {
		t.Fatalf("built %d and closed %d, want %d and %d", b, c, built, closed)
	}
}

func acquire(t *testing.T, tab *table, key string, generation int64) lease.Lease[string, *conn] {
	t.Helper()
	l, err := tab.Acquire(context.Background(), key, generation)
	if err != nil {
		t.Fatalf("Acquire(%q, %d): %v", key, generation, err)
	}
	c := l.Value()
	if c.key != key || c.generation != l.Generation() || c.closed.Load() {
		t.Fatalf("Acquire(%q, %d) leased %q of %d, closed: %v", key, generation, c.key, c.generation, c.closed.Load())
	}
	return l
}

func use(t *testing.T, tab *table, key string, generation int64) {
	t.Helper()
	acquire(t, tab, key, generation).Release()
}

func closeTable(t *testing.T, tab *table) {
	t.Helper()
	if cut, err := tab.Close(context.Background()); err != nil || cut != nil {
		t.Fatalf("Close = %v, %v", cut, err)
	}
}

// in runs a test in a bubble, on a table that is closed at the end. The bubble fails the
// test when a goroutine is left.
func in(t *testing.T, cfg lease.Config[string, *conn], test func(t *testing.T, tab *table)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tab := lease.New(cfg)
		defer closeTable(t, tab)
		test(t, tab)
	})
}
