//go:build linux || darwin

package budget

import "syscall"

// stirrer looks at a socket without waiting and without taking anything out of it.
type stirrer struct {
	raw   syscall.RawConn
	look  func(fd uintptr) // made once: a call must not allocate
	stirs bool
}

func newStirrer(inner any) *stirrer {
	socket, ok := inner.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil
	}
	s := &stirrer{raw: raw}
	s.look = func(fd uintptr) {
		var one [1]byte
		_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		s.stirs = err != syscall.EAGAIN && err != syscall.EINTR // something is there, or the end
	}
	return s
}

// Stirs says whether the server has sent something that nobody has read, or has closed its end. It never waits. For
// one caller at a time.
func (c *Conn) Stirs() bool {
	if c.stir == nil {
		return false
	}
	// Not Read, which would wait for a reader that pgx may have left behind on an idle connection.
	return c.stir.raw.Control(c.stir.look) != nil || c.stir.stirs
}
