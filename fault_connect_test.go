package tenancy_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
)

// Connections that do not come about, and those that are encrypted.

const (
	shortPing    = 200 * time.Millisecond
	shortConnect = 300 * time.Millisecond
)

// stuck has acme call while no connection can be made: each call ends in time, with a deadline of its own and without one, and then nothing goes on in
// the background.
func (x *faulty) stuck(what string) {
	x.Helper()
	const deadline = 200 * time.Millisecond
	for limit, bounded := range map[time.Duration]bool{deadline: true, 2 * shortConnect: false} { // twice: the attempt of another caller may be waited for first
		x.keeps(what, limit, func() time.Duration {
			ctx, cancel := x.ctx, context.CancelFunc(func() {})
			if bounded {
				ctx, cancel = context.WithTimeout(x.ctx, deadline)
			}
			defer cancel()
			began := time.Now()
			if _, err := x.tn.DB().Exec(ctx, `SELECT 1`); err == nil {
				x.Errorf("%s: a call succeeded", what)
			}
			return time.Since(began)
		})
	}
	untilTrue(x.T, what+": no attempt goes on", func() bool { return x.stats().Conns == 0 })
}

// served waits until acme is, and says after how long.
func (x *faulty) served(after string) {
	x.Helper()
	took := until(x, 20*time.Second, "", func() string { _, err := x.tn.DB().Exec(x.ctx, `SELECT 1`); return outage(err) })
	x.Logf("%s: served again after %v", after, took.Round(time.Millisecond))
}

// TestAServerThatFreezesWhileItIsConnectedToHoldsNobody: when it is asked in, when it checks the password, and when we ask whose it is.
func TestAServerThatFreezesWhileItIsConnectedToHoldsNobody(t *testing.T) {
	x := newFaulty(t, tenancy.Config{Limits: tenancy.Limits{PingTimeout: shortPing, ConnectTimeout: shortConnect}})
	x.neighbourAtWork()
	for what, text := range map[string]string{"startup": "search_path\x00", "SCRAM": ",p=", "proof": "tenancy_marker"} {
		x.strait.drop()
		frozen := x.strait.freezeAt(text)
		x.stuck(what)
		select {
		case <-frozen:
		default:
			t.Errorf("%s: nobody has come so far", what)
		}
		x.strait.calm()
		x.served(what)
	}
}

// TestANameServerThatHangsHoldsNobody: the host is looked up for each connection.
func TestANameServerThatHangsHoldsNobody(t *testing.T) {
	var hangs atomic.Bool
	x := newFaulty(t, tenancy.Config{
		Limits: tenancy.Limits{PingTimeout: shortPing, ConnectTimeout: shortConnect},
		PoolConfig: func(_ context.Context, t tenancy.Tenant, cfg *pgxpool.Config) error {
			if t.Name == "acme" {
				cfg.ConnConfig.LookupFunc = func(ctx context.Context, host string) ([]string, error) {
					if hangs.Load() {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					return []string{host}, nil
				}
			}
			return nil
		}})
	x.neighbourAtWork()
	x.warm(1)
	hangs.Store(true)
	if _, err := x.tn.DB().Exec(x.ctx, `SELECT 1`); err != nil {
		t.Errorf("over the open connection: %v", err)
	}
	x.strait.drop()
	x.stuck("DNS")
	hangs.Store(false)
	x.served("DNS")
}

// overTLS has acme's calls go to a server of its own over TLS, in which the strait reads nothing.
func overTLS(t *testing.T, cfg tenancy.Config) *faulty {
	t.Helper()
	x, _ := newFaultyServer(t, cfg, nil)
	dir := scan[string](t, x.admin, `SHOW data_directory`)
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "127.0.0.1"}, NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	certificate, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	for name, b := range map[string]*pem.Block{"server.crt": {Type: "CERTIFICATE", Bytes: certificate}, "server.key": {Type: "PRIVATE KEY", Bytes: private}} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil { // the server runs as another user than root
			t.Fatal(err)
		}
	}
	must(t, x.admin, `ALTER SYSTEM SET ssl = on`)
	must(t, x.admin, `SELECT pg_reload_conf()`)
	d := sourceOf(t, x.tn, x.acme.ID)
	d.TLS = "require"
	if err := x.tn.Catalog().SetDataSource(t.Context(), x.acme.ID, d); err != nil {
		t.Fatal(err)
	}
	untilTrue(t, "calls go over TLS", func() bool {
		var on bool
		err := x.tn.DB().QueryRow(x.ctx, `SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()`).Scan(&on)
		return err == nil && on
	})
	return x
}

// TestFaultsOverTLS: what the tests of calls that were never sent, and of frozen servers, say of plain connections. TLS has records, a good-bye and a
// handshake of its own.
func TestFaultsOverTLS(t *testing.T) {
	const conns, deadline = 14, 300 * time.Millisecond
	x := overTLS(t, tenancy.Config{Limits: tenancy.Limits{TenantConns: 16, PingTimeout: shortPing, ConnectTimeout: shortConnect}})
	x.neighbourAtWork()
	whole := func(after string) {
		t.Helper()
		x.served(after)
		until(t, 20*time.Second, "", func() string { return outage(x.tryWarm(conns)) })
		x.settled()
	}

	for how, end := range map[string]func(){
		"terminated": func() {
			before, sessions := x.strait.leftBy(), len(x.pids())
			must(x, x.admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1`, x.place.Login)
			untilTrue(t, "the client has been told", func() bool { return x.strait.leftBy() >= before+sessions })
		},
		"cut":   func() { x.strait.drop() },
		"reset": func() { x.strait.reset(); x.strait.calm() },
	} {
		for name, call := range x.callsOf() {
			title := how + " " + name
			until(t, 20*time.Second, "", func() string { return outage(x.tryWarm(3)) })
			end()
			if err := call(title); err != nil {
				t.Errorf("%s: %v", title, err)
			}
			if n := x.written(title); n != 1 {
				t.Errorf("%s: written %d times", title, n)
			}
		}
	}

	whole("nothing")
	x.keepDeadlines(x.everyCall("frozen"), deadline, func() {}, func() { x.strait.calm(); whole("a frozen server") }, func(wayIn, error) {})

	x.strait.drop()
	frozen := x.strait.freezeAt("\x16\x03\x01") // the client's first record
	x.stuck("handshake")
	select {
	case <-frozen:
	default:
		t.Error("nobody has come so far")
	}
	x.strait.calm()
	x.served("a handshake that hung")
}
