//go:build linux || darwin

package pgembed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// publish makes the folder dir with the content that fill puts into it. It appears
// by a rename, complete or not at all; if another process was quicker, theirs stays.
// dir is a child of cache.
func publish(cache, dir string, fill func(staging string) error) error {
	sweep(cache)
	staging, err := os.MkdirTemp(cache, stagingPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(staging)
	if err := os.Chmod(staging, 0o755); err != nil {
		return err
	}
	if err := fill(staging); err != nil {
		return err
	}
	err = os.Rename(staging, dir)
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) {
		return nil
	}
	return err
}

const stagingPrefix = "unfinished-"

// sweep removes what processes left that were killed while they filled a folder.
func sweep(cache string) {
	left, _ := filepath.Glob(filepath.Join(cache, stagingPrefix+"*")) // the pattern is a constant
	for _, dir := range left {
		if info, err := os.Lstat(dir); err == nil && time.Since(info.ModTime()) > time.Hour {
			os.RemoveAll(dir)
		}
	}
}

// lock makes parallel test packages do slow work once and not each for itself.
// Nothing breaks without it, so a file system that cannot lock is no error. The
// kernel releases it when its holder dies.
//
// The error is ctx.Err(), or that the lock file cannot be opened.
func lock(ctx context.Context, cache, name string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(cache, name+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cache of PostgreSQL: %w", err)
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
