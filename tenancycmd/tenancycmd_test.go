package tenancycmd_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancycmd"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestMain(m *testing.M) {
	if os.Getenv("TENANCY_PG_DOWNLOAD") == "" {
		if err := os.Setenv("TENANCY_PG_DOWNLOAD", "on"); err != nil {
			panic(err)
		}
	}
	tenancytest.Main(m)
}

const notes = "-- +goose Up\nCREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text NOT NULL);\n-- +goose Down\nDROP TABLE notes;\n"

// tags fails in a tenant that has a note called poison.
const tags = `-- +goose Up
-- +goose StatementBegin
DO $$ BEGIN IF EXISTS (SELECT FROM notes WHERE title = 'poison') THEN RAISE EXCEPTION 'a note is poison'; END IF; END $$;
-- +goose StatementEnd
ALTER TABLE notes ADD COLUMN tag text;
-- +goose Down
ALTER TABLE notes DROP COLUMN tag;
`

// line is a command line on a fleet, and all that it has printed.
type line struct {
	t       *testing.T
	o       tenancycmd.Options
	fleet   *tenancytest.Fleet
	stdin   io.Reader
	printed bytes.Buffer
}

func newLine(t *testing.T) *line {
	f := tenancytest.NewFleet(t)
	for name, value := range map[string]string{"PRIMARY_URL": f.PrimaryURL, "KEYS": f.KeyText, "SERVER_URL": f.ServerURL, "ADMIN_URL": f.AdminURL,
		"NODE_ADDRESS": "10.0.0.7:8080", "ONLY_TENANTS": "nobody", "MIGRATIONS": ""} {
		t.Setenv("TENANCY_"+name, value)
	}
	return &line{t: t, fleet: f, o: tenancycmd.Options{Migrations: fstest.MapFS{"00001_notes.sql": {Data: []byte(notes)}}}}
}

// run wants a command to end with code, and returns what it printed.
func (l *line) run(code int, args ...string) (stdout, stderr string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	return l.runIn(ctx, code, args...)
}

func (l *line) runIn(ctx context.Context, code int, args ...string) (stdout, stderr string) {
	l.t.Helper()
	var out, err bytes.Buffer
	in := l.stdin
	if in == nil {
		in = strings.NewReader("")
	}
	got := tenancycmd.Run(ctx, l.o, args, in, &out, &err)
	l.printed.Write(out.Bytes())
	l.printed.Write(err.Bytes())
	if got != code {
		l.t.Errorf("%q ended with %d, want %d\n%s%s", args, got, code, out.String(), err.String())
	}
	if got != 0 && strings.Count(err.String(), "\n") == 0 {
		l.t.Errorf("%q ended with %d and says nothing", args, got)
	}
	if strings.Contains(out.String()+err.String(), "Usage:") {
		l.t.Errorf("%q answers a failure with the usage:\n%s", args, err.String())
	}
	return out.String(), err.String()
}

// has wants a text in what a command prints.
func (l *line) has(text string, code int, args ...string) {
	l.t.Helper()
	out, err := l.run(code, args...)
	if !strings.Contains(out+err, text) {
		l.t.Errorf("%q does not say %q:\n%s%s", args, text, out, err)
	}
}

// decode reads each line that a command prints as JSON.
func decode[T any](l *line, code int, args ...string) (list []T) {
	l.t.Helper()
	out, _ := l.run(code, append(args, "--json")...)
	for text := range strings.Lines(out) {
		var v T
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			l.t.Fatalf("%q prints %q, which is no JSON: %v", args, text, err)
		}
		list = append(list, v)
	}
	return list
}

type tenant struct {
	ID      int64    `json:"id"`
	Name    string   `json:"name"`
	State   string   `json:"state"`
	Schema  string   `json:"schema"`
	Domains []string `json:"domains"`
}

func TestALifeOfATenant(t *testing.T) {
	l := newLine(t)
	l.has("are set up", 0, "init")
	l.has("acme (#1) is active", 0, "create", "acme", "--display-name", "Acme Inc", "--admin", "alice@acme.test", "--domain", "acme.example.com")
	if got := decode[tenant](l, 0, "create", "globex"); len(got) != 1 || got[0].ID != 2 || got[0].State != "active" {
		t.Errorf("create printed %+v", got)
	}
	l.has("name is taken", 1, "create", "globex", "--display-name", "another")
	l.has(`\x1b[31m`, 2, "create", "evil\x1b[31m")

	if got := decode[tenant](l, 0, "list"); len(got) != 2 || got[1].Name != "globex" {
		t.Errorf("list printed %+v", got)
	}
	if got := decode[tenant](l, 0, "list", "--state", "suspended"); len(got) != 0 {
		t.Errorf("list --state suspended printed %+v", got)
	}
	l.has("Acme Inc", 0, "list")
	l.has("acme", 0, "show", "#1")
	l.has("globex", 0, "show", "--id", "2")
	l.has("bob is in acme (#1) as admin", 0, "members", "add", "acme", "bob", "--role", "admin")
	if got := decode[struct{ User, Role string }](l, 0, "members", "list", "acme"); len(got) != 2 || got[0].User != "alice@acme.test" || got[1].Role != "admin" {
		t.Errorf("members list printed %+v", got)
	}
	l.run(0, "members", "remove", "acme", "bob")
	l.run(0, "domains", "add", "acme", "www.acme.test", "--primary")
	l.has("belongs to acme", 2, "domains", "remove", "globex", "acme.example.com")
	l.run(0, "domains", "remove", "acme", "acme.example.com")
	if got := decode[tenant](l, 0, "domains", "list", "acme"); len(got) != 1 || !slices.Equal(got[0].Domains, []string{"www.acme.test"}) {
		t.Errorf("domains list printed %+v", got)
	}

	// Each of the two sees its own rows, and is refused the other's.
	l.run(0, "exec", "acme", "INSERT INTO notes (title) VALUES ('of acme'), (E'two\nlines\x1b[2J')")
	l.run(0, "exec", "globex", "INSERT INTO notes (title) VALUES ('of globex')")
	schema := decode[tenant](l, 0, "show", "acme")[0].Schema
	l.has("permission denied", 3, "exec", "globex", "SELECT * FROM "+schema+".notes")
	if out, _ := l.run(0, "exec", "globex", "SELECT title FROM notes"); strings.Contains(out, "acme") || !strings.Contains(out, "of globex") {
		t.Errorf("globex sees %q", out)
	}
	if out, _ := l.run(0, "exec", "acme", "SELECT title FROM notes"); strings.Contains(out, "\x1b") || !strings.Contains(out, `two\nlines\x1b[2J`) {
		t.Errorf("exec printed %q", out)
	}
	l.has("1 of 2 tenants failed", 3, "exec", "--all", "--parallel", "2", "SELECT 1 / (SELECT count(*) - 2 FROM notes)")
	type answer struct {
		Name    string
		Results []struct {
			Command string
			Rows    [][]*string
		}
		Error string
	}
	got := decode[answer](l, 3, "exec", "--all", "SELECT NULL; SELECT 1 / (SELECT count(*) - 2 FROM notes)")
	if len(got) != 2 || got[0].Name != "acme" || !strings.Contains(got[0].Error, "division by zero") || got[1].Error != "" || len(got[1].Results) != 2 ||
		got[1].Results[0].Rows[0][0] != nil || *got[1].Results[1].Rows[0][0] != "-1" {
		t.Errorf("exec --all printed %+v", got)
	}
	if out, _ := l.run(0, "exec", "acme", "--json", `SELECT E'\u009b31m'`); strings.Contains(out, "\u009b") || !strings.Contains(out, `\u009b31m`) {
		t.Errorf("exec --json printed %q", out)
	}
	l.run(3, "exec", "acme", "DELETE FROM notes; SELECT 1/0")
	l.has("2", 0, "exec", "acme", "SELECT count(*) FROM notes") // the statement before the one that failed was rolled back
	l.has("use psql", 3, "exec", "acme", "COPY notes (title) FROM STDIN", "--timeout", "30s")
	l.has("transaction block", 3, "exec", "acme", "VACUUM notes")
	l.has("VACUUM", 0, "exec", "acme", "--no-transaction", "VACUUM notes")
	l.stdin = strings.NewReader("SELECT 'from stdin'")
	l.has("from stdin", 0, "exec", "acme")
	l.stdin = nil

	file := filepath.Join(t.TempDir(), "acme.jsonl")
	l.has("1 tables, 2 rows", 0, "export", "acme", "-o", file)
	l.has("there already", 2, "export", "acme", "-o", file)
	if text, err := os.ReadFile(file); err != nil || !strings.Contains(string(text), `{"end":`) {
		t.Errorf("export wrote %q, %v", text, err)
	}

	l.has("is out of service", 0, "suspend", "acme", "--message", "unpaid", "--drain", "1ns")
	l.has("suspended", 3, "exec", "acme", "SELECT 1")
	l.run(0, "resume", "acme")
	l.run(0, "rename", "acme", "acme-two")
	l.run(4, "show", "acme")
	l.has("delete it first", 2, "purge", "acme-two", "--yes-purge", "acme-two")
	l.has("Nothing was done", 0, "delete", "acme-two", "--dry-run")
	if got := decode[tenant](l, 0, "show", "acme-two"); got[0].State != "active" {
		t.Errorf("a dry run of delete left %+v", got)
	}
	l.run(0, "delete", "acme-two")
	l.run(0, "restore", "acme-two")
	l.run(0, "delete", "acme-two")
	l.has("Nothing was done", 0, "purge", "acme-two", "--dry-run")
	l.has("tenant is in quarantine", 1, "purge", "acme-two", "--yes-purge", "acme-two")
	l.has("Purge after", 0, "show", "acme-two")
	l.has("--yes-purge acme-two", 2, "purge", "acme-two")
	l.has("nothing was done", 2, "purge", "acme-two", "--now", "--yes-purge", "acme")
	t.Run("the_name_is_asked_for", func(t *testing.T) {
		tenancycmd.OnATerminal(t)
		l.stdin = strings.NewReader("globex\n")
		l.has("nothing was done", 2, "purge", "acme-two")
		l.stdin = io.MultiReader(readerFunc(func([]byte) (int, error) {
			var nodes, named int // a command is one, and takes no callers
			err := l.fleet.Admin(t, "primary").QueryRow(t.Context(), "SELECT count(*), count(*) FILTER (WHERE address <> '') FROM tenancy.nodes").Scan(&nodes, &named)
			if err != nil || nodes != 1 || named != 0 {
				t.Errorf("%d nodes, %d of them with an address, %v", nodes, named, err)
			}
			return 0, io.EOF
		}), strings.NewReader("acme-two\n"))
		l.has("is purged", 0, "purge", "acme-two", "--now")
		l.stdin = nil
		l.has("give -o FILE", 2, "export", "globex")
	})
	l.run(4, "purge", "acme-two", "--yes-purge", "acme-two") // nobody has the name
	l.has("was deleted", 1, "purge", "#1", "--yes-purge", "#1")

	released := fmt.Sprintf("#%d", decode[tenant](l, 0, "create", "hooli")[0].ID)
	l.run(0, "delete", "hooli", "--release-name")
	l.run(0, "create", "hooli")
	l.has("was released", 2, "restore", released)
	l.has("is in service", 0, "restore", released, "--as", "hooli-one")
	l.has("hooli-one", 0, "list", "hooli-")

	l.has("one run of the validity job is done", 0, "reconcile")
	if out, _ := l.run(0, "doctor", "--all"); !strings.Contains(out, "ok: isolation") {
		t.Errorf("doctor printed %q", out)
	}
	node := l.fleet.Open(t, tenancy.Config{}) // one of one: the command is none
	t.Setenv("TENANCY_SERVER_CONNS", "5000")
	said, _ := l.run(0, "doctor", "--all")
	if !strings.Contains(said, "Limits.ServerConns is 5000") || !strings.Contains(said, "ok: nodes") {
		t.Errorf("doctor printed %q", said)
	}
	t.Setenv("TENANCY_SERVER_CONNS", "")
	if err := node.Close(); err != nil {
		t.Fatal(err)
	}
	wall := func(sql string) {
		if _, err := l.fleet.Admin(t, "tenants").Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	wall("GRANT CREATE ON SCHEMA public TO PUBLIC") // no node opens on it
	l.has("mend: REVOKE", 5, "doctor")
	found := decode[struct{ Check, Level, Mend string }](l, 5, "doctor", "--fail-on", "warning")
	if len(found) == 0 || found[0].Level != "failure" {
		t.Fatalf("doctor printed %+v", found)
	}
	wall(found[0].Mend)
	l.run(2, "doctor", "--fail-on", "ok")
	l.has("there is no role", 5, "adopt", "initech", "--login", "nobody", "--dry-run")
	l.run(4, "show", "initech")
	l.has("of globex", 0, "exec", "globex", "SELECT title FROM notes")

	if out, _ := l.run(0, "__complete", "show", "glo"); !strings.HasPrefix(out, "globex\n") {
		t.Errorf("the shell is told %q", out)
	}
	l.run(0, "rotate", "password", "globex")
	l.has("0 records", 0, "rotate", "keys")
	l.run(0, "rotate", "dense")
	if got := decode[struct{ Name string }](l, 0, "server", "list"); len(got) != 1 || got[0].Name != "main" {
		t.Errorf("server list printed %+v", got)
	}
	l.psql()
	l.tidy()
}

// psql starts a program that shows what it was given.
func (l *line) psql() {
	t := l.t
	dir := t.TempDir()
	seen := filepath.Join(dir, "seen")
	if err := os.WriteFile(filepath.Join(dir, "psql"), []byte("#!/bin/sh\necho \"arguments: $*\"\nenv > "+seen+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	t.Setenv("PGHOST", "elsewhere.example.com")
	if out, _ := l.run(0, "psql", "globex", "--", "-c", "SELECT 1"); out != "arguments: --no-password -c SELECT 1\n" {
		t.Errorf("psql was called with %q", out)
	}
	env, err := os.ReadFile(seen)
	if err != nil {
		t.Fatal(err)
	}
	d := l.login("globex")
	for _, want := range []string{"PGUSER=" + d.User, "PGPASSWORD=" + d.Password.Reveal(), "PGDATABASE=" + d.Database, "PGHOST=" + d.Host} {
		if !strings.Contains(string(env), want+"\n") {
			t.Errorf("psql was not given %s", strings.SplitN(want, "=", 2)[0])
		}
	}
	if strings.Contains(string(env), "TENANCY_") || strings.Contains(string(env), "elsewhere") {
		t.Error("psql has the service's settings, or those of another place")
	}
}

func (l *line) login(name string) tenancy.DataSource {
	l.t.Helper()
	tn := l.fleet.Open(l.t, tenancy.Config{})
	tenant, err := tn.Catalog().TenantByName(l.t.Context(), name)
	if err != nil {
		l.t.Fatal(err)
	}
	d, err := tn.Catalog().Login(l.t.Context(), tenant.ID)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := tn.Close(); err != nil {
		l.t.Fatal(err)
	}
	return d
}

// tidy looks for secrets in all that was printed, and for nodes that have not left.
func (l *line) tidy() {
	l.t.Helper()
	_, key, _ := strings.Cut(l.fleet.KeyText, ":")
	secrets := map[string]string{"the key": key, "a tenant's password": l.login("globex").Password.Reveal()}
	for name, text := range map[string]string{"the catalog's password": l.fleet.PrimaryURL, "the provisioner's password": l.fleet.ServerURL, "the administrator's password": l.fleet.AdminURL} {
		u, err := url.Parse(text)
		if err != nil {
			l.t.Fatal("a URL of the fleet cannot be parsed")
		}
		secrets[name], _ = u.User.Password()
	}
	for name, secret := range secrets {
		if len(secret) < 12 {
			l.t.Fatalf("%s is too short to be looked for", name)
		}
		for _, form := range []string{secret, url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(secret))} {
			if strings.Contains(l.printed.String(), form) {
				l.t.Errorf("%s was printed", name)
			}
		}
	}
	var nodes int
	if err := l.fleet.Admin(l.t, "primary").QueryRow(l.t.Context(), "SELECT count(*) FROM tenancy.nodes").Scan(&nodes); err != nil || nodes != 0 {
		l.t.Errorf("%d commands have not left as nodes, %v", nodes, err)
	}
}

func TestMigratingAFleet(t *testing.T) {
	l := newLine(t)
	for _, name := range []string{"acme", "globex", "initech"} {
		l.run(0, "create", name)
	}
	l.run(0, "status", "--check", "--verify")
	l.run(0, "exec", "globex", "INSERT INTO notes (title) VALUES ('poison')")
	l.o.Migrations = fstest.MapFS{"00001_notes.sql": {Data: []byte(notes)}, "00002_tags.sql": {Data: []byte(tags)}}
	type status struct {
		Newest int
		Behind []struct{ Name string }
		Pinned []struct{ Name string }
	}
	if got := decode[status](l, 5, "status", "--check"); len(got) != 1 || got[0].Newest != 2 || len(got[0].Behind) != 3 {
		t.Errorf("status printed %+v", got)
	}
	l.has("would apply 00002_tags.sql", 0, "migrate", "--all", "--dry-run")
	type run struct {
		Migrated int
		Failed   int
		NotBegun int `json:"not_begun"`
		UpToDate int `json:"up_to_date"`
		Tenants  []struct {
			Name    string
			Version int
			Error   string
		}
	}
	if got := decode[run](l, 3, "migrate", "--all", "--canary", "globex"); len(got) != 1 || got[0].Failed != 1 || got[0].NotBegun != 2 {
		t.Errorf("migrate printed %+v", got)
	}
	t.Run("on_a_terminal", func(t *testing.T) {
		tenancycmd.OnATerminal(t)
		_, err := l.run(3, "migrate", "--all", "--parallel", "2")
		if !strings.Contains(err, "2 done, 1 failed, 0 left") || !strings.Contains(err, "globex (#2) failed") {
			t.Errorf("the bar is %q", err)
		}
	})
	if got := decode[run](l, 3, "migrate", "--all"); len(got) != 1 || got[0].Failed != 1 || got[0].UpToDate != 2 || got[0].Tenants[0].Version != 2 || !strings.Contains(got[0].Tenants[1].Error, "a note is poison") {
		t.Errorf("migrate printed %+v", got)
	}
	_, err := l.run(3, "migrate", "globex")
	if !strings.Contains(err, "1 of 1: globex (#2) failed") {
		t.Errorf("elsewhere than on a terminal it says %q", err)
	}
	l.run(0, "exec", "globex", "DELETE FROM notes")
	l.has("globex (#2) is at version 2", 0, "migrate", "globex")
	l.run(0, "status", "--check", "--verify")
	l.has("--yes-down acme", 2, "schema", "down", "acme")
	l.has("nothing was done", 2, "schema", "down", "acme", "--yes-down", "globex")
	l.has("is at version 1, without 2", 0, "schema", "down", "acme", "--yes-down", "acme")
	l.run(4, "migrate", "down", "acme") // tenants are named, and no command
	l.run(0, "schema", "pin", "acme", "1")
	if got := decode[status](l, 0, "status", "--check"); len(got[0].Pinned) != 1 || got[0].Pinned[0].Name != "acme" {
		t.Errorf("status printed %+v", got)
	}
	l.run(0, "schema", "unpin", "acme")
	l.has("not one that has died", 2, "schema", "resolve", "acme", "2", "--applied")
	l.run(0, "migrate", "--all")

	// acme's owner is the administrator's to change.
	var schema string
	admin := l.fleet.Admin(t, "tenants")
	schema = decode[tenant](l, 0, "show", "acme")[0].Schema
	if _, err := admin.Exec(t.Context(), "ALTER TABLE "+schema+".notes ADD COLUMN by_hand text"); err != nil {
		t.Fatal(err)
	}
	type drift struct {
		Name        string
		Differences []struct{ Object string }
	}
	got := decode[drift](l, 5, "drift", "--check", "--against", "initech")
	if i := slices.IndexFunc(got, func(d drift) bool { return d.Name == "acme" }); i < 0 || !slices.ContainsFunc(got[i].Differences, func(d struct{ Object string }) bool { return strings.Contains(d.Object, "by_hand") }) {
		t.Errorf("drift printed %+v", got)
	}
	l.has("by_hand", 0, "drift")
	l.tidy()
}

func TestWrongCommandsSayWhatIsWrong(t *testing.T) {
	l := newLine(t)
	l.run(0, "create", "globex")
	for _, args := range [][]string{{"bogus"}, {"members"}, {"members", "bogus", "globex"}, {"create"}, {"create", "a", "b"}, {"create", "Capital"}, {"create", "x", "--isolation", "none"},
		{"list", "--bogus"}, {"list", "--state", "bogus"}, {"list", "--timeout", "soon"}, {"list", "--conns", "-1"}, {"list", "--conns", "1"}, {"show", "#x"}, {"show", "--id", "globex"}, {"migrate"}, {"migrate", "--all", "globex"},
		{"migrate", "--all", "--up-to", "9"}, {"migrate", "--all", "--parallel", "1000"}, {"schema", "pin", "globex", "x"}, {"schema", "resolve", "globex", "1"}, {"exec"}, {"exec", "globex"}, {"exec", "--all", "a", "b"},
		{"exec", "globex", "SELECT 1", "-f", "x"}, {"exec", "globex", "-f", "/nosuch"}, {"members", "add", "globex", "u", "--role", "king"}, {"domains", "add", "globex", "no domain"}} {
		l.run(2, args...)
	}
	for _, args := range [][]string{{"show", "nosuch"}, {"show", "#99"}, {"suspend", "nosuch"}, {"exec", "nosuch", "SELECT 1"}, {"migrate", "globex", "nosuch"}, {"drift", "--against", "nosuch"}, {"members", "list", "nosuch"}, {"psql", "nosuch"}} {
		if args[0] == "psql" {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "psql"), []byte("#!/bin/sh\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir)
		}
		l.run(4, args...)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(tenancycmd.ErrInterrupted)
	l.runIn(ctx, 130, "list")
	l.has("--timeout", 1, "exec", "globex", "SELECT pg_sleep(60)", "--timeout", "1s")
	l.o.Migrations = nil
	l.has("--migrations", 1, "status")
	l.has("no directory", 2, "status", "--migrations", "/nosuch")
	t.Setenv("TENANCY_SINGLE_TENANT", "globex")
	l.has("TENANCY_SINGLE_TENANT", 2, "create", "another")
	l.has("globex", 0, "list")
	l.tidy()
	primary, err := url.Parse(l.fleet.PrimaryURL)
	if err != nil {
		t.Fatal("the fleet's URL cannot be parsed")
	}
	primary.Host = "127.0.0.1:1"
	t.Setenv("TENANCY_PRIMARY_URL", primary.String())
	l.has("primary database is unavailable", 6, "list")
	t.Setenv("TENANCY_PRIMARY_URL", "")
	l.has("TENANCY_PRIMARY_URL is not set", 2, "list")
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func TestControlCharactersAreShown(t *testing.T) {
	for in, want := range map[string]string{"plain, ümläut": "plain, ümläut", "\x1b[31m": `\x1b[31m`, "a\u009bb": `a\u009bb`, "a\u202eb": `a\u202eb`, "a\xffb": `a\xffb`, "a\tb\n": `a\tb\n`, "\ufffd": `\ufffd`} {
		if got := tenancycmd.Clean(in); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
}
