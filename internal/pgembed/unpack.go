//go:build linux || darwin

package pgembed

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// packageRoot is the part of the package that is PostgreSQL; the rest is JavaScript.
const packageRoot = "package/native/"

// linkList names the symbolic links which npm packages cannot carry and which their
// install script would make.
const linkList = "pg-symlinks.json"

// unpack puts the binaries of a packed package into dir. Every path goes through an
// [os.Root], so no name in the archive reaches beyond dir.
func unpack(packed io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	gz, err := gzip.NewReader(packed)
	if err != nil {
		return fmt.Errorf("package: %w", err)
	}
	for r := tar.NewReader(gz); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("package: %w", err)
		}
		if err := unpackEntry(root, h, r); err != nil {
			return fmt.Errorf("package entry %q: %w", h.Name, err)
		}
	}
	return link(root)
}

func unpackEntry(root *os.Root, h *tar.Header, content io.Reader) error {
	if !filepath.IsLocal(h.Name) {
		return errors.New("leads out of the package")
	}
	name, ours := strings.CutPrefix(path.Clean(h.Name), packageRoot)
	if !ours {
		return nil
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return makeDir(root, name)
	case tar.TypeReg:
	default: // the package has none, and links are how archives escape
		return fmt.Errorf("unexpected type %q", h.Typeflag)
	}
	if err := makeDir(root, path.Dir(name)); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, content); err != nil {
		return err
	}
	mode := os.FileMode(0o644)
	if h.Mode&0o111 != 0 {
		mode = 0o755
	}
	if err := f.Chmod(mode); err != nil { // whatever the umask: a lent account reads it
		return err
	}
	return f.Close()
}

// makeDir makes name and its parents, open to everyone whatever the umask.
func makeDir(root *os.Root, name string) error {
	if name == "." {
		return nil
	}
	if info, err := root.Lstat(name); err == nil && info.IsDir() {
		return nil
	}
	if err := makeDir(root, path.Dir(name)); err != nil {
		return err
	}
	if err := root.Mkdir(name, 0o755); err != nil {
		return err
	}
	return root.Chmod(name, 0o755)
}

// link makes the symbolic links of linkList, which the libraries' names need.
func link(root *os.Root) error {
	list, err := root.ReadFile(linkList)
	if err != nil {
		return fmt.Errorf("package: %w", err)
	}
	var links []struct{ Source, Target string } // the link is Target
	if err := json.Unmarshal(list, &links); err != nil {
		return fmt.Errorf("package: %s: %w", linkList, err)
	}
	for _, l := range links {
		source, ok1 := strings.CutPrefix(path.Clean(l.Source), "native/")
		target, ok2 := strings.CutPrefix(path.Clean(l.Target), "native/")
		if !ok1 || !ok2 || !filepath.IsLocal(source) || !filepath.IsLocal(target) {
			return fmt.Errorf("package: %s: %q to %q leads out of the package", linkList, l.Target, l.Source)
		}
		// Relative, so that the folder can be renamed.
		rel, err := filepath.Rel(path.Dir(target), source)
		if err != nil {
			return fmt.Errorf("package: %s: %w", linkList, err)
		}
		if err := root.Symlink(rel, target); err != nil {
			return fmt.Errorf("package: %s: %w", linkList, err)
		}
	}
	return nil
}
