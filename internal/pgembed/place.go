//go:build linux || darwin

package pgembed

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// serverPrefix begins the name of every server's folder.
const serverPrefix = "tenancy-pg-"

// longestSocket is what fits into a socket address on macOS; Linux allows 107.
const longestSocket = 103

// makeFolder returns a new folder for one server, open to the account alone: on a
// RAM disk if there is room, else in the temporary directory.
func makeFolder(acc account) (string, error) {
	var errs []string
	for _, place := range places(acc) {
		dir, err := os.MkdirTemp(place, serverPrefix)
		if err != nil {
			errs = append(errs, err.Error())
			continue
		}
		if err := acc.give(dir); err != nil {
			os.Remove(dir)
			return "", fmt.Errorf("giving the server's folder to %s: %w", acc.name, err)
		}
		return dir, nil
	}
	return "", fmt.Errorf("no place for the server's folder: %s", strings.Join(errs, "; "))
}

// places are the folders in which a server may live, best first.
func places(acc account) []string {
	var all []string
	if ram := ramDisk(); ram != "" {
		all = append(all, ram)
	}
	// Folders of tests are 0700 when root made them (t.TempDir), and a folder that
	// is not everyone's could not be cleaned up by the lent account.
	if tmp, err := filepath.Abs(os.TempDir()); err == nil && socketFits(tmp) && (!acc.lent || everyones(tmp, acc)) {
		all = append(all, tmp)
	}
	return append(all, "/tmp")
}

// socketFits tells whether the longest socket path below place fits into an address.
func socketFits(place string) bool {
	return len(filepath.Join(place, serverPrefix+"4294967295", socketFolder, ".s.PGSQL.65535.lock")) <= longestSocket
}

// everyones tells whether dir is like /tmp: anyone can reach it and make files in it.
func everyones(dir string, acc account) bool {
	info, err := os.Stat(dir)
	return err == nil && info.Mode()&os.ModeSticky != 0 && info.Mode().Perm() == 0o777 && acc.closedTo(dir) == ""
}

// removeFolder removes a server's folder. It tries for a while: after a crash,
// backends may write for a moment longer than the postmaster lives.
func removeFolder(dir string) error {
	var err error
	for range 40 {
		if err = os.RemoveAll(dir); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// openCache returns the folder in which templates and downloads survive the process.
//
// It is the user's cache directory; for root one outside root's home, which the lent
// account could not enter; and where neither can be written (a read-only container,
// a user without a home), one in the temporary directory. What lies in it is executed,
// so a folder that someone else owns or may write to is refused.
func openCache(acc account) (string, error) {
	const name = "tenancy-pgembed"
	var candidates []string
	if acc.lent {
		candidates = append(candidates, filepath.Join(systemCache, name))
	} else if dir, err := os.UserCacheDir(); err == nil {
		candidates = append(candidates, filepath.Join(dir, name))
	}
	candidates = append(candidates,
		filepath.Join(os.TempDir(), fmt.Sprintf("%s-%d", name, os.Geteuid())),
		filepath.Join("/tmp", fmt.Sprintf("%s-%d", name, os.Geteuid())))

	var errs []string
	for _, dir := range candidates {
		if err := prepareCache(dir, acc); err != nil {
			errs = append(errs, err.Error())
			continue
		}
		return dir, nil
	}
	return "", fmt.Errorf("no cache directory for PostgreSQL: %s", strings.Join(errs, "; "))
}

func prepareCache(dir string, acc account) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err == nil {
		if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask
			return err
		}
	} else if !os.IsExist(err) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case !ok || int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to another user", dir)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s may be written by others", dir)
	}
	if shut := acc.closedTo(dir); shut != "" {
		return fmt.Errorf("%s: the directory %s is closed to %s", dir, shut, acc.name)
	}
	probe, err := os.MkdirTemp(dir, "probe-") // sees read-only mounts, which mode bits do not show
	if err != nil {
		return err
	}
	return os.Remove(probe)
}
