package tenancy

import (
	"net"
	"syscall"
	"time"
)

// deadPeer is how long a host may leave what it was sent without an acknowledgement, or a probe of a silent connection without an answer,
// before the connection is given up. The system's own measure is a quarter of an hour.
const deadPeer = 30 * time.Second

// tcpUserTimeout is TCP_USER_TIMEOUT of linux/tcp.h (RFC 5482), which package syscall lacks.
const tcpUserTimeout = 18

// dialer opens sockets that notice the death of the other host.
func dialer() *net.Dialer {
	return &net.Dialer{Control: func(network, _ string, c syscall.RawConn) (err error) {
		if network != "tcp4" && network != "tcp6" {
			return nil
		}
		failed := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(deadPeer/time.Millisecond))
		})
		if failed != nil {
			return failed
		}
		return err
	}}
}
