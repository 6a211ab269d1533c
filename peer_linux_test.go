package tenancy

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// TestSocketsNoticeADeadHost asks the kernel what it will do. A host that vanishes cannot be made here.
func TestSocketsNoticeADeadHost(t *testing.T) {
	f := newPoolFixture(t, Config{})
	f.wantNotes(acme, "t_a")
	f.tn.pools.Each(func(_ ID, _ int64, p *tenantPool, _ int) {
		for _, conn := range p.pool.AcquireAllIdle(t.Context()) {
			defer conn.Release()
			socket, ok := budget.Of(conn.Conn().PgConn().Conn()).Conn.(*net.TCPConn)
			if !ok {
				t.Fatal("not a TCP socket")
			}
			raw, err := socket.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var ms int
			if failed := raw.Control(func(fd uintptr) {
				ms, err = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout)
			}); failed != nil || err != nil {
				t.Fatal(failed, err)
			}
			if got := time.Duration(ms) * time.Millisecond; got != deadPeer {
				t.Errorf("TCP_USER_TIMEOUT is %v, want %v", got, deadPeer)
			}
		}
	})
}
