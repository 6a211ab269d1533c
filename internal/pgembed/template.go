//go:build linux || darwin

package pgembed

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// template is a data directory fresh from initdb, made once per build of PostgreSQL
// and user, and copied for every server: initdb takes half a second, a copy a tenth
// of that. It belongs to us even where the server's account is lent, so that no
// process of that account can change what the next server starts with.
type template struct{ dir string }

func (t template) data() string         { return filepath.Join(t.dir, "data") }
func (t template) passwordFile() string { return filepath.Join(t.dir, "password") }

// password is the superuser's in a fresh copy. The server gets another one before
// anyone hears of it.
func (t template) password() (string, error) {
	b, err := os.ReadFile(t.passwordFile())
	return string(b), err
}

// initdbFlags: no flush to disk, 1 MB of log instead of 16 to copy, and the same
// order of strings on every machine.
var initdbFlags = []string{
	"--no-sync", "--wal-segsize=1", "--locale=C", "--encoding=UTF8",
	"--username=postgres", "--auth=scram-sha-256", "--no-instructions",
}

// openTemplate returns the template for b, made now if there is none.
func openTemplate(ctx context.Context, b binaries, acc account, cache string) (template, error) {
	key, err := templateKey(b)
	if err != nil {
		return template{}, err
	}
	t := template{filepath.Join(cache, "template-"+key)}
	if _, err := os.Stat(t.dir); err == nil {
		return t, nil
	}
	unlock, err := lock(ctx, cache, "template")
	if err != nil {
		return template{}, err
	}
	defer unlock()
	if _, err := os.Stat(t.dir); err == nil {
		return t, nil
	}
	return t, publish(cache, t.dir, func(staging string) error {
		return template{staging}.fill(ctx, b, acc)
	})
}

// templateKey tells builds apart: two of one version may differ in page size or
// catalogue, and an upgrade replaces the binaries in place.
func templateKey(b binaries) (string, error) {
	info, err := os.Stat(filepath.Join(b.dir, "postgres"))
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintln(h, b.dir, info.Size(), info.ModTime().UnixNano(), initdbFlags)
	return fmt.Sprintf("%s-%x", b.version.text, h.Sum(nil)[:6]), nil
}

func (t template) fill(ctx context.Context, b binaries, acc account) error {
	if err := os.WriteFile(t.passwordFile(), []byte(rand.Text()), 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(t.data(), 0o700); err != nil {
		return err
	}
	for _, path := range []string{t.passwordFile(), t.data()} {
		if err := acc.give(path); err != nil {
			return err
		}
	}
	args := append([]string{"--pgdata=" + t.data(), "--pwfile=" + t.passwordFile()}, initdbFlags...)
	cmd := acc.command(exec.CommandContext(ctx, filepath.Join(b.dir, "initdb"), args...))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // lets it end its own children
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return explainInitdb(acc.explain(err, cmd.Path), string(out))
	}
	if !acc.lent {
		return nil
	}
	return filepath.WalkDir(t.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, os.Geteuid(), os.Getegid())
	})
}

func explainInitdb(err error, out string) error {
	if strings.Contains(out, "could not look up effective user ID") {
		return fmt.Errorf("initdb needs a name for user %d, and the system knows none: add the user to /etc/passwd, or run as root (in a container: without --user)", os.Geteuid())
	}
	return fmt.Errorf("initdb: %w: %s", err, lastLines(out, 10))
}

// copyTo makes dir, a data directory of the account's own.
func (t template) copyTo(ctx context.Context, dir string, acc account) error {
	return filepath.WalkDir(t.data(), func(path string, entry fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(t.data(), path)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, rel)
		switch {
		case entry.IsDir():
			err = os.Mkdir(to, 0o700)
		case entry.Type().IsRegular():
			err = copyFile(to, path)
		default: // initdb makes no links, and following one as root would be a gift
			err = fmt.Errorf("template: %s is neither file nor directory", path)
		}
		if err != nil {
			return err
		}
		return acc.give(to)
	})
}

func copyFile(to, from string) error {
	src, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}
