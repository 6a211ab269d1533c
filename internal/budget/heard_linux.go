package budget

import (
	"syscall"
	"unsafe"
)

// TellsUnheard says whether [Conn.Unheard] can tell here.
const TellsUnheard = true

// owes says whether something that was written has not reached the other end's system.
func (c *Conn) owes() bool {
	if c.stir == nil {
		return false
	}
	var queued int32
	err := c.stir.raw.Control(func(fd uintptr) {
		if _, _, failed := syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&queued))); failed != 0 {
			queued = 0
		}
	})
	return err == nil && queued > 0
}
