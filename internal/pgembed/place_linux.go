package pgembed

import "syscall"

// systemCache is root's cache, outside root's home.
const systemCache = "/var/cache"

const (
	tmpfsMagic = 0x01021994
	// ramNeeded leaves room for the databases of a large test package, and refuses
	// the 64 MB which a container gets by default.
	ramNeeded = 1 << 30
)

// ramDisk returns a folder in memory with enough room, or "".
func ramDisk() string {
	const dir = "/dev/shm"
	var st syscall.Statfs_t
	if syscall.Statfs(dir, &st) != nil || int64(st.Type) != tmpfsMagic {
		return ""
	}
	if st.Bavail*uint64(st.Bsize) < ramNeeded {
		return ""
	}
	return dir
}
