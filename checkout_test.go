package tenancy_test

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/budget"
)

// Who connects, and for how long a call waits for it.

// TestConnectionsAreMadeForTheAccountAndNotByCallers: a caller who dials waits for that one connection, past the breaker and beside
// those that come back.
func TestConnectionsAreMadeForTheAccountAndNotByCallers(t *testing.T) {
	var dials, byCallers atomic.Int32
	f, tn, ctx, _ := limited(t, tenancy.Config{
		PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error {
			dial := cfg.ConnConfig.DialFunc
			cfg.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
				dials.Add(1)
				if _, ok := tenancy.FromContext(ctx); ok {
					byCallers.Add(1)
				}
				return dial(ctx, network, addr)
			}
			return nil
		}})
	admin := f.Admin(t, "tenants")
	for range 20 {
		// All of them are idle, and dead: the first is found to be, and the account still believes in the others.
		txs := make([]pgx.Tx, 4)
		for i := range txs {
			var err error
			if txs[i], err = tn.DB().Begin(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for _, tx := range txs {
			if err := tx.Rollback(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for left := 1; left > 0; { // until each has said so: what is sent to one that has not is lost
			if err := admin.QueryRow(t.Context(), `SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND usename LIKE 't\_%\_l1') s`).Scan(&left); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan error)
		for range 8 {
			go func() { _, err := tn.DB().Exec(ctx, "SELECT 1"); done <- err }()
		}
		for range 8 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	if byCallers.Load() > 0 || dials.Load() < 20 {
		t.Errorf("%d of %d dials were made by callers", byCallers.Load(), dials.Load())
	}
}

// TestAPoolOfTheServicesOwnMakingHoldsNobodyForEver: what bounds it is its own, and how long a call waits is not.
func TestAPoolOfTheServicesOwnMakingHoldsNobodyForEver(t *testing.T) {
	_, tn, ctx, _ := limited(t, tenancy.Config{Limits: tenancy.Limits{AcquireTimeout: 200 * time.Millisecond},
		PoolBuilder: tenancy.PoolBuilderFunc(func(ctx context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
			own, err := pgxpool.ParseConfig("host=localhost user=none")
			if err != nil {
				return nil, err
			}
			own.ConnConfig = cfg.ConnConfig.Copy()
			own.ConnConfig.DialFunc = (&net.Dialer{}).DialContext
			own.MaxConns = 1
			return pgxpool.NewWithConfig(ctx, own)
		})})
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	began := time.Now()
	if _, err := tn.DB().Exec(ctx, "SELECT 1"); !errors.Is(err, tenancy.ErrBusy) {
		t.Errorf("beside its one connection in use: %v", err)
	}
	if waited := time.Since(began); waited < 200*time.Millisecond || waited > 5*time.Second {
		t.Errorf("it waited for %v", waited)
	}
}

// TestAConnectionThatFailsItsHookIsNotIdle: where its process is stuck, pgx goes on closing it for 15 s, and it must not count as idle meanwhile.
func TestAConnectionThatFailsItsHookIsNotIdle(t *testing.T) {
	if os.Getenv("TENANCY_TEST_URL") != "" {
		t.Skip("the processes of that server are not ours to stop")
	}
	_, tn, ctx, _ := limited(t, tenancy.Config{Limits: tenancy.Limits{ConnectTimeout: 300 * time.Millisecond},
		PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error {
			cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				pid := int(conn.PgConn().PID())
				if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
					return err
				}
				t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
				return conn.Ping(ctx)
			}
			return nil
		}})
	if _, err := tn.DB().Exec(ctx, "SELECT 1"); err == nil {
		t.Fatal("the hook did not fail")
	}
	for _, s := range tn.Stats() {
		if s.Conns != 0 {
			t.Errorf("%d connections count although the only one failed", s.Conns)
		}
	}
}

// TestASocketThatAHookLeavesAloneIsNotWrapped: pgx looks for TLS by its type, and without it binds no channel.
func TestASocketThatAHookLeavesAloneIsNotWrapped(t *testing.T) {
	_, tn, ctx, _ := limited(t, tenancy.Config{
		PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error {
			cfg.ConnConfig.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, c net.Conn) (net.Conn, error) { return c, nil }
			return nil
		}})
	if err := tn.DB().WithConn(ctx, func(_ context.Context, conn *pgx.Conn) error {
		if c, ok := conn.PgConn().Conn().(*budget.Conn); !ok {
			t.Errorf("pgx was given a %T", c)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestTheHostsURLNamesOneHost(t *testing.T) {
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: "postgres://u:p@localhost/p", Keys: someKeys(t), HostURL: "postgres://u:secret@one.example,two.example/d"})
	if !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("two hosts in HostURL: %v", err)
	}
}

func someKeys(t *testing.T) tenancy.Keyring {
	t.Helper()
	key, err := tenancy.NewKey("k")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := tenancy.ParseKeyring(key)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// TestAPoolThatIsNotCountedMakesItsOwnConnections: a hook has replaced our dialer, so the account sees none of its sockets.
func TestAPoolThatIsNotCountedMakesItsOwnConnections(t *testing.T) {
	_, tn, ctx, _ := limited(t, tenancy.Config{Limits: tenancy.Limits{AcquireTimeout: time.Second},
		PoolBuilder: tenancy.PoolBuilderFunc(func(ctx context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) (*pgxpool.Pool, error) {
			ours := cfg.BeforeConnect
			cfg.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
				err := ours(ctx, cc)
				cc.DialFunc = (&net.Dialer{}).DialContext
				return err
			}
			return pgxpool.NewWithConfig(ctx, cfg)
		})})
	for range 3 {
		tx, err := tn.DB().Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.Background())
	}
}
