package tenancy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// block is one fenced block of a document.
type block struct {
	file string
	line int
	lang string
	text string
}

func blocksOf(tb testing.TB, file string) (blocks []block) {
	tb.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	var open *block
	for i, line := range strings.Split(string(text), "\n") {
		lang, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && open == nil:
			open = &block{file: file, line: i + 1, lang: lang}
		case fence:
			blocks = append(blocks, *open)
			open = nil
		case open != nil:
			open.text += line + "\n"
		}
	}
	if open != nil {
		tb.Fatalf("%s:%d: the block has no end", file, open.line)
	}
	return blocks
}

// readmeBlock returns the one block of the README that contains what.
func readmeBlock(tb testing.TB, lang, what string) string {
	tb.Helper()
	var found []string
	for _, b := range blocksOf(tb, "README.md") {
		if b.lang == lang && strings.Contains(b.text, what) {
			found = append(found, b.text)
		}
	}
	if len(found) != 1 {
		tb.Fatalf("the README has %d %s blocks with %q, want one", len(found), lang, what)
	}
	return found[0]
}

// emptyModule makes a module outside the repository that finds the library by a replace, and everything else in
// the module cache.
func emptyModule(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	root, err := filepath.Abs(".")
	if err != nil {
		tb.Fatal(err)
	}
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		tb.Fatal(err)
	}
	placeFile(tb, dir, "go.mod", fmt.Sprintf("module example.org/notes\n\ngo 1.26\n\nrequire %s v0.0.0\n\nreplace %[1]s => %s\n", module, root))
	placeFile(tb, dir, "go.sum", string(sums))
	return dir
}

func placeFile(tb testing.TB, dir, name, text string) {
	tb.Helper()
	name = filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
}

func goTool(tb testing.TB, dir string, args ...string) string {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod -buildvcs=false", "GOPROXY=off", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("go %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

func TestReadmeProgramServesTwoTenants(t *testing.T) {
	t.Parallel()
	dir := emptyModule(t)
	placeFile(t, dir, "main.go", readmeBlock(t, "go", "package main"))
	placeFile(t, dir, "migrations/00001_notes.sql", readmeBlock(t, "sql", "+goose Up"))
	goTool(t, dir, "build", "-o", "notes", ".")

	stated := strings.Fields(readmeBlock(t, "text", "golang-lru"))
	for pkg := range strings.Lines(goTool(t, dir, "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", ".")) {
		if mod := strings.TrimSpace(pkg); mod != "" && mod != "example.org/notes" && !slices.Contains(stated, mod) {
			t.Errorf("the program links %s, which the README does not state", mod)
		}
	}

	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: os.DirFS(filepath.Join(dir, "migrations"))})
	for tenant, user := range map[string]tenancy.UserKey{"acme": "alice@acme.test", "globex": "bob@globex.test"} {
		created, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: tenant, Admin: user})
		if err != nil {
			t.Fatal(err)
		}
		ctx, err := tn.Enter(t.Context(), created.ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tn.DB().Exec(ctx, "insert into notes (title) values ($1)", "of "+tenant); err != nil {
			t.Fatal(err)
		}
	}

	addr := startReadmeProgram(t, filepath.Join(dir, "notes"), f)
	for _, c := range []struct {
		user, password string
		status         int
		titles         []string
	}{
		{"alice@acme.test", "demo", 200, []string{"of acme"}},
		{"bob@globex.test", "demo", 200, []string{"of globex"}},
		{"alice@acme.test", "guess", 401, nil},
		{"eve@nowhere.test", "demo", 403, nil},
		{"", "", 401, nil},
	} {
		status, body := getAs(t, "http://"+addr+"/notes", c.user, c.password)
		if status != c.status {
			t.Errorf("%s: status %d, want %d: %s", c.user, status, c.status, body)
			continue
		}
		var titles []string
		if status == 200 {
			if err := json.Unmarshal(body, &titles); err != nil {
				t.Errorf("%s: %v: %s", c.user, err, body)
			}
		}
		if !slices.Equal(titles, c.titles) {
			t.Errorf("%s reads %q, want %q", c.user, titles, c.titles)
		}
	}
}

// startReadmeProgram runs the program as a node of the fleet and returns its address once it listens.
func startReadmeProgram(tb testing.TB, program string, f *tenancytest.Fleet) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close() // the program takes the port; nobody else was told of it
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = append(os.Environ(), "ADDR="+addr, "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	tb.Cleanup(func() { cancel(); <-ended })
	for end := time.Now().Add(30 * time.Second); ; {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			conn.Close()
			return addr
		}
		select {
		case <-ended:
			tb.Fatalf("the program ended: %s", log.Bytes())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(end) {
			tb.Fatalf("the program does not listen: %v", err)
		}
	}
}

func getAs(tb testing.TB, url, user, password string) (int, []byte) {
	tb.Helper()
	r, err := http.NewRequestWithContext(tb.Context(), http.MethodGet, url, nil)
	if err != nil {
		tb.Fatal(err)
	}
	if user != "" {
		r.SetBasicAuth(user, password)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}
	res, err := client.Do(r)
	if err != nil {
		tb.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return res.StatusCode, body
}

// snippetHead is what a block of a document may take for granted.
const snippetHead = `package snippets

import (
	"context"
	"errors"
	"log"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

var (
	_ = errors.Is
	_ = log.Printf
	_ = slog.Info
	_ http.Handler
	_ = os.Getenv
	_ = time.Second
	_ pgx.Tx
	_ *pgxpool.Pool
	_ *tenantmw.Middleware
)

`

func TestGoBlocksOfTheDocumentsCompile(t *testing.T) {
	t.Parallel()
	dir := emptyModule(t)
	var files []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md"} {
		matches, _ := filepath.Glob(pattern) // the patterns are constants
		files = append(files, matches...)
	}
	n := 0
	for _, file := range files {
		for _, b := range blocksOf(t, file) {
			if b.lang != "go" || strings.HasPrefix(b.text, "package ") {
				continue // the program has a test of its own
			}
			n++
			placeFile(t, dir, fmt.Sprintf("snippets/block%d.go", n), snippetHead+
				"func _(ctx context.Context, tn *tenancy.Tenancy, cfg tenancy.Config, id tenancy.ID) error {\n"+
				fmt.Sprintf("//line %s:%d\n", filepath.Base(b.file), b.line+1)+b.text+"\nreturn nil\n}\n")
		}
	}
	if n == 0 {
		t.Fatal("no blocks were found")
	}
	goTool(t, dir, "build", "./snippets")
}

func TestLinksOfTheDocumentsLeadSomewhere(t *testing.T) {
	t.Parallel()
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(file, ".md") {
			return err
		}
		text, err := os.ReadFile(file)
		for _, part := range strings.Split(string(text), "](")[1:] {
			link, _, _ := strings.Cut(part, ")")
			link, _, _ = strings.Cut(link, "#")
			if link == "" || strings.Contains(link, "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), link)); err != nil {
				t.Errorf("%s links to %s, which is not there", file, link)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A message that an operator searches for is one that the code writes.
func TestOperationsQuotesMessagesOfTheCode(t *testing.T) {
	t.Parallel()
	var code strings.Builder
	sources, _ := filepath.Glob("*.go")
	for _, file := range sources {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		code.Write(text)
	}
	for _, b := range blocksOf(t, "docs/operations.md") {
		if b.lang != "text" {
			continue
		}
		for line := range strings.Lines(b.text) {
			line = strings.ReplaceAll(strings.TrimSpace(line), "[7 12]", "%v")
			whole := strings.Contains(code.String(), line)
			i := strings.LastIndex(line, ": ") // a sentinel and what is said of it
			if !whole && (i < 0 || !strings.Contains(code.String(), line[:i]) || !strings.Contains(code.String(), line[i+2:])) {
				t.Errorf("docs/operations.md:%d: the code does not say %q", b.line, line)
			}
		}
	}
}

// A promise that names its test names one that is there.
func TestGuaranteesNameTestsThatExist(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("docs/guarantees.md")
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range strings.Split(string(text), "`") {
		if i%2 == 1 && strings.HasSuffix(name, "_test.go") {
			if _, err := os.Stat(name); err != nil {
				t.Errorf("docs/guarantees.md names %s, which is not there", name)
			}
		}
	}
}

func TestReadmeNamesEverySetting(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for prefix, of := range map[string]reflect.Type{
		"":         reflect.TypeFor[tenancy.Config](),
		"Lookups.": reflect.TypeFor[tenancy.LookupConfig](),
		"Limits.":  reflect.TypeFor[tenancy.Limits](),
	} {
		for _, field := range reflect.VisibleFields(of) {
			if field.Name == "Lookups" || field.Name == "Limits" {
				continue // their fields have rows
			}
			if row := "\n| `" + prefix + field.Name + "` |"; !strings.Contains(string(readme), row) {
				t.Errorf("the README's table of settings lacks %s%s", prefix, field.Name)
			}
		}
	}
}

func TestReadmeQuotesTheFirstMistakes(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{})

	_, noMigrations := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	quoted(t, "no_migrations", noMigrations)

	_, noMiddleware := tn.DB().Query(t.Context(), "select 1")
	quoted(t, "middleware_missing", noMiddleware)

	login := userOf(t, f.ServerURL)
	admin := f.Admin(t, "tenants")
	if _, err := admin.Exec(t.Context(), "ALTER ROLE "+login+" NOCREATEROLE"); err != nil {
		t.Fatal(err)
	}
	_, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys})
	if err == nil {
		t.Fatal("Open accepted a provisioner without CREATEROLE")
	}
	quoted(t, "no_createrole", fmt.Errorf("%s", strings.ReplaceAll(err.Error(), login, "app_provisioner")))

	// What the text says mends it.
	if _, err := admin.Exec(t.Context(), strings.ReplaceAll(`ALTER ROLE "app_provisioner" CREATEROLE;`, "app_provisioner", login)); err != nil {
		t.Fatal(err)
	}
	f.Open(t, tenancy.Config{})
}

func quoted(tb testing.TB, name string, err error) {
	tb.Helper()
	if err == nil {
		tb.Errorf("%s: no error", name)
		return
	}
	if !slices.ContainsFunc(blocksOf(tb, "README.md"), func(b block) bool { return b.lang == "text" && strings.TrimSpace(b.text) == err.Error() }) {
		tb.Errorf("%s: the README does not quote\n%s", name, err)
	}
}

func userOf(tb testing.TB, raw string) string {
	tb.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		tb.Fatal("the URL cannot be parsed")
	}
	return u.User.Username()
}

// TestReadmeSQLMakesWhatInitMakes sets a fleet up with the README's statements alone.
func TestReadmeSQLMakesWhatInitMakes(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t) // for its server and keys
	prefix := strings.TrimSuffix(userOf(t, f.PrimaryURL), "_catalog") + "hand"
	script := strings.ReplaceAll(readmeBlock(t, "sql", "\\connect app_tenants\n"), "app_", prefix+"_")
	t.Cleanup(func() { dropByHand(t, f, prefix) })

	runByHand(t, f, script)
	tn, err := tenancy.Open(t.Context(), tenancy.Config{
		PrimaryURL: handURL(t, f, prefix+"_catalog", "secret-1", prefix+"_primary"),
		Server:     &tenancy.ServerConfig{URL: handURL(t, f, prefix+"_provisioner", "secret-2", prefix+"_tenants")},
		Keys:       f.Keys,
		Migrations: os.DirFS("testdata/migrations"),
		Extensions: true, ReferenceTables: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"}); err != nil {
		t.Fatal(err)
	}
	var empty string
	ctx := tenancytest.Context(t, tn, "acme")
	if err := tn.DB().QueryRow(ctx, "select coalesce(max(title), '')::citext::text from notes").Scan(&empty); err != nil {
		t.Fatal(err)
	}

	compare := func(databases ...string) {
		t.Helper()
		byInit, byHand := privilegesOf(t, f, strings.TrimSuffix(userOf(t, f.PrimaryURL), "_catalog"), databases), privilegesOf(t, f, prefix, databases)
		if byInit != byHand {
			t.Errorf("Init makes\n%s\nand the README\n%s", byInit, byHand)
		}
	}
	compare("_primary", "_tenants")

	// And what tenants with a database of their own need.
	f.AllowDatabases(t)
	runByHand(t, f, strings.ReplaceAll(readmeBlock(t, "sql", "\\connect app_tenants_template\n"), "app_", prefix+"_"))
	if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex", Isolation: tenancy.IsolationDatabase}); err != nil {
		t.Fatal(err)
	}
	if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "globex"), "select coalesce(max(title), '')::citext::text from notes").Scan(&empty); err != nil {
		t.Fatal(err)
	}
	compare("_primary", "_tenants", "_tenants_template")
}

// runByHand runs statements, one a line, as psql does for a superuser.
func runByHand(tb testing.TB, f *tenancytest.Fleet, script string) {
	tb.Helper()
	admin := readmeConn(tb, f, "postgres")
	for line := range strings.Lines(script) {
		switch line = strings.TrimSpace(line); {
		case line == "":
		case strings.HasPrefix(line, `\connect `):
			admin = readmeConn(tb, f, strings.TrimPrefix(line, `\connect `))
		default:
			if _, err := admin.Exec(tb.Context(), line); err != nil {
				tb.Fatalf("%s: %v", line, err)
			}
		}
	}
	_ = admin.Close(tb.Context()) // a template that somebody is connected to is not copied
}

func readmeConn(tb testing.TB, f *tenancytest.Fleet, database string) *pgx.Conn {
	tb.Helper()
	cc, err := pgx.ParseConfig(f.AdminURL)
	if err != nil {
		tb.Fatal("the test server's URL cannot be parsed")
	}
	cc.Database = database
	conn, err := pgx.ConnectConfig(context.Background(), cc)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func handURL(tb testing.TB, f *tenancytest.Fleet, login, password, database string) string {
	tb.Helper()
	u, err := url.Parse(f.PrimaryURL)
	if err != nil {
		tb.Fatal("the fleet's URL cannot be parsed")
	}
	u.User, u.Path = url.UserPassword(login, password), "/"+database
	return u.String()
}

// privilegesOf describes a set-up without its names.
func privilegesOf(tb testing.TB, f *tenancytest.Fleet, prefix string, databases []string) string {
	tb.Helper()
	var text strings.Builder
	ask := func(database, sql string) {
		rows, _ := readmeConn(tb, f, database).Query(context.Background(), sql)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			tb.Fatal(err)
		}
		fmt.Fprintln(&text, strings.ReplaceAll(strings.Join(lines, "\n"), prefix+"_", "app_"))
	}
	ask("postgres", `SELECT concat_ws(' ', rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit)
		FROM pg_roles WHERE starts_with(rolname, '`+prefix+`_') ORDER BY 1`)
	ask("postgres", `SELECT concat_ws(' ', datname, pg_get_userbyid(datdba), datacl) FROM pg_database WHERE starts_with(datname, '`+prefix+`_') ORDER BY 1`)
	ask("postgres", `SELECT concat_ws(' ', roleid::regrole, member::regrole, admin_option) FROM pg_auth_members
		WHERE starts_with(roleid::regrole::text, '`+prefix+`_') ORDER BY 1`)
	for _, database := range databases {
		ask(prefix+database, `SELECT concat_ws(' ', nspname, pg_get_userbyid(nspowner), nspacl) FROM pg_namespace WHERE nspname IN ('public', 'tenancy_ext', 'tenancy_ref') ORDER BY 1`)
		ask(prefix+database, `SELECT concat_ws(' ', defaclrole::regrole, defaclnamespace::regnamespace, defaclobjtype, defaclacl) FROM pg_default_acl WHERE defaclnamespace::regnamespace::text LIKE 'tenancy\_%' ORDER BY 1`)
	}
	// Tenants' roles are members of the role of all tenants, in one of the two set-ups.
	if !strings.Contains(text.String(), "app_provisioner") {
		tb.Fatalf("nothing is known of %s:\n%s", prefix, text.String())
	}
	kept := slices.DeleteFunc(strings.Split(text.String(), "\n"), func(line string) bool { return strings.HasPrefix(line, "app_tenants_tenants t_") })
	return strings.Join(kept, "\n")
}

func dropByHand(tb testing.TB, f *tenancytest.Fleet, prefix string) {
	conn := readmeConn(tb, f, "postgres")
	ctx := context.Background()
	rows, _ := conn.Query(ctx, `SELECT rolname FROM pg_roles r WHERE starts_with(rolname, $1) OR EXISTS (SELECT FROM pg_auth_members
		WHERE roleid = r.oid AND starts_with(member::regrole::text, $1)) ORDER BY starts_with(rolname, $1), rolname = $1 || 'provisioner'`, prefix+"_")
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		tb.Errorf("drop: %v", err)
	}
	rows, _ = conn.Query(ctx, `SELECT quote_ident(datname) FROM pg_database WHERE starts_with(pg_get_userbyid(datdba), $1)`, prefix+"_")
	databases, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		tb.Errorf("drop: %v", err)
	}
	var steps []string
	for _, name := range databases {
		steps = append(steps, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
	}
	for _, role := range roles {
		steps = append(steps, "DROP ROLE IF EXISTS "+role)
	}
	for _, sql := range steps {
		if _, err := conn.Exec(ctx, sql); err != nil {
			tb.Logf("drop: %s: %v", sql, err)
		}
	}
}
