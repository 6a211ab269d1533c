//go:build linux || darwin

package pgembed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// account is whom the children run as. PostgreSQL refuses root, so root lends
// them another account; anyone else runs them as himself.
type account struct {
	name     string // empty when nothing is lent
	uid, gid uint32
	lent     bool
}

// lendable are tried in this order: the name on Linux, on macOS, and everywhere.
var lendable = []string{"postgres", "_postgres", "nobody"}

func chooseAccount(euid int, lookup func(name string) (*user.User, error)) (account, error) {
	if euid != 0 {
		return account{uid: uint32(euid), gid: uint32(os.Getegid())}, nil
	}
	for _, name := range lendable {
		u, err := lookup(name)
		if err != nil {
			continue
		}
		uid, uerr := strconv.ParseUint(u.Uid, 10, 32)
		gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
		if uerr != nil || gerr != nil || uid == 0 {
			continue
		}
		return account{name: name, uid: uint32(uid), gid: uint32(gid), lent: true}, nil
	}
	return account{}, fmt.Errorf("PostgreSQL refuses to run as root, and none of the accounts %s exists to run it as: add one, or run as another user", strings.Join(lendable, ", "))
}

// command prepares a child of this account: in a session of its own, or Ctrl-C
// would stop it before its parent is done with it, and with an environment of its
// own, because PGPORT and the like would change what it does, and secrets of a CI
// job are none of its business.
func (a account) command(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if a.lent {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	cmd.Dir = "/" // the caller's folder may be closed to this account
	// TZ spares initdb the search for the machine's time zone; LC_ALL keeps messages
	// English, and on macOS the postmaster single-threaded.
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC", "HOME=/"}
	for _, name := range []string{"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"} {
		if v, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	return cmd
}

// give makes path the account's own. It does nothing unless the account is lent.
func (a account) give(path string) error {
	if !a.lent {
		return nil
	}
	return os.Lchown(path, int(a.uid), int(a.gid))
}

// closedTo returns the first folder on the way to path that the account may not
// enter, or "". It reads permission bits only; access lists are beyond it.
func (a account) closedTo(path string) string {
	var way []string
	for dir := filepath.Clean(path); ; dir = filepath.Dir(dir) {
		way = append(way, dir)
		if dir == filepath.Dir(dir) {
			break
		}
	}
	for i := len(way) - 1; i >= 0; i-- {
		info, err := os.Stat(way[i])
		if errors.Is(err, fs.ErrPermission) && i+1 < len(way) {
			return way[i+1]
		}
		if err != nil || !info.IsDir() {
			return ""
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return ""
		}
		bits := info.Mode().Perm()
		switch {
		case st.Uid == a.uid:
			bits >>= 6
		case st.Gid == a.gid:
			bits >>= 3
		}
		if bits&1 == 0 {
			return way[i]
		}
	}
	return ""
}

// explain adds to err what the account may have to do with it.
func (a account) explain(err error, bin string) error {
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	dir := a.closedTo(bin)
	if dir == "" {
		return err
	}
	if !a.lent {
		return fmt.Errorf("%w: the directory %s is closed to you", err, dir)
	}
	return fmt.Errorf("%w: the directory %s is closed to %s, as whom PostgreSQL runs because it refuses root; open it (chmod o+x) or move the binaries", err, dir, a.name)
}
