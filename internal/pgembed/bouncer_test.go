//go:build linux || darwin

package pgembed_test

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

func TestABouncerTakesConnectionsUntilItIsStopped(t *testing.T) {
	t.Parallel()
	b, err := pgembed.StartBouncer(t.Context(), "[databases]\n[pgbouncer]\nauth_type = trust\n", "")
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(b.Port()))
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{0}); err != nil { // with tcp_defer_accept it hears of a connection when there is something to read
		t.Fatal(err)
	}
	if log, err := b.Log(); err != nil || !strings.Contains(log, "listening on "+address) {
		t.Errorf("the log is %q, %v", log, err)
	}
	for range 2 {
		if err := b.Stop(); err != nil {
			t.Error(err)
		}
	}
	if _, err := b.Log(); !os.IsNotExist(err) {
		t.Errorf("its folder is still there: %v", err)
	}
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("it has sent %d bytes and is still there", n)
	}
}

func TestABouncerThatCannotStartSaysWhy(t *testing.T) {
	t.Parallel()
	_, err := pgembed.StartBouncer(t.Context(), "[databases]\n[pgbouncer]\nauth_type = none of these\n", "")
	if err == nil || !strings.Contains(err.Error(), "ended while starting") || !strings.Contains(err.Error(), "auth_type") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if b, err := pgembed.StartBouncer(ctx, "[databases]\n[pgbouncer]\n", ""); err == nil {
		t.Error("it started with a ctx that had ended", b.Stop())
	}
}

func TestAKilledParentLeavesNoBouncer(t *testing.T) {
	t.Parallel()
	cmd, o := startParent(t, "bouncer")
	if dead(o.server) {
		t.Fatal("it does not run")
	}
	if uid := uidOf(t, o.server); uid == "0" {
		t.Error("it runs as root")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	assertGone(t, o.server, o.folder)
}
