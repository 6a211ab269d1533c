//go:build unix

package main_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

var binary string

func TestMain(m *testing.M) {
	// A server for tests is not the program's to take: it starts its own.
	os.Setenv("TENANCY_TEST_URL", "postgres://nobody:nothing@127.0.0.1:1/nowhere")
	os.Unsetenv("TENANCY_KEYS")
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "quickstart-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "quickstart")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// program is a running quickstart, looked at from outside.
type program struct {
	cmd    *exec.Cmd
	base   string   // http://127.0.0.1:port
	lines  []string // printed up to the last hint
	stderr *bytes.Buffer
}

func start(t *testing.T, env []string, args ...string) *program {
	t.Helper()
	addr := freeAddress(t)
	p := &program{base: "http://" + addr, stderr: new(bytes.Buffer)}
	p.cmd = exec.Command(binary, append([]string{"-addr", addr}, args...)...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stderr = p.stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() })
	last := "TENANCY_KEYS=" // a given server's are not printed
	if slices.Contains(args, "-database") {
		last = "psql "
	}
	for s := bufio.NewScanner(out); s.Scan(); {
		p.lines = append(p.lines, s.Text())
		if strings.Contains(s.Text(), last) {
			go io.Copy(io.Discard, out)
			return p
		}
	}
	p.cmd.Wait()
	t.Fatalf("the program ended: %s", p.stderr)
	return nil
}

// adminURL is the administrator's, of the tenants' database, as it is printed.
func (p *program) adminURL() string {
	return regexp.MustCompile(`postgres://[^']+`).FindString(p.lines[slices.IndexFunc(p.lines, func(l string) bool { return strings.Contains(l, "psql ") })])
}

func (p *program) primaryURL() string {
	return strings.Replace(p.adminURL(), "/quickstart_tenants", "/quickstart_primary", 1)
}

// throughPooler has the program's calls go through a PgBouncer, with TENANCY_TEST_POOLER=1. The program does not know, and need not: what an operator
// does is done beside it.
func (p *program) throughPooler(t *testing.T) {
	t.Helper()
	if os.Getenv("TENANCY_TEST_POOLER") != "1" {
		return
	}
	bouncer, err := pgembed.StartBouncerBefore(t.Context(), p.adminURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := bouncer.Stop(); err != nil {
			t.Error(err)
		}
	})
	conn, err := pgx.Connect(t.Context(), p.primaryURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), `UPDATE tenancy.servers SET pooler = $1, pooler_tls = 'disable'`, fmt.Sprintf("127.0.0.1:%d", bouncer.Port())); err != nil { // as AddServer does
		t.Fatal(err)
	}
	last := p.lines[len(p.lines)-1]
	keys, err := tenancy.ParseKeyring(regexp.MustCompile(`TENANCY_KEYS='([^']+)'`).FindStringSubmatch(last)[1])
	if err != nil {
		t.Fatal(err)
	}
	tn, err := tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: regexp.MustCompile(`postgres://[^']+`).FindString(last), Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	for _, name := range []string{"acme", "globex"} {
		tenant, err := tn.Catalog().TenantByName(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if err := tn.Catalog().RotatePassword(t.Context(), tenant.ID); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { // before it is stopped
		log, err := bouncer.Log()
		if n := len(regexp.MustCompile(`_l2@\S+ login attempt`).FindAllString(log, -1)); err != nil || n < 4 { // two of them are the proofs of new logins
			t.Errorf("the program's calls did not go through PgBouncer, which has %d logins: %v\n%s", n, err, log)
		}
	})
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

type answer struct {
	status int
	header http.Header
	body   string
}

func (p *program) do(t *testing.T, method, path, user, password, body string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, p.base+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	return p.send(t, req)
}

func (p *program) send(t *testing.T, req *http.Request) answer {
	t.Helper()
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header, string(text)}
}

func (p *program) get(t *testing.T, path, user string) answer {
	t.Helper()
	return p.do(t, "GET", path, user, "demo", "")
}

// TestContract is what a caller sees of the service, which does not know what its tenants have of their own.
func TestContract(t *testing.T) {
	t.Parallel()
	for _, isolation := range isolations {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			testContract(t, isolation)
		})
	}
}

var isolations = []string{"schema", "database", "shared"}

func testContract(t *testing.T, isolation string) {
	p := start(t, nil, "-isolation", isolation)
	p.throughPooler(t)
	const alice, bob = "alice@acme.test", "bob@globex.test"
	ofGlobex := firstOfGlobex(isolation)

	if !slices.Contains(p.lines, "pid "+strconv.Itoa(p.cmd.Process.Pid)) || !slices.Contains(p.lines, "listening on "+p.base) {
		t.Errorf("pid or address is not told: %q", p.lines)
	}
	if n := strings.Count(strings.Join(p.lines, "\n"), "curl "); n != 4 {
		t.Errorf("got %d curl lines, want 4: %q", n, p.lines)
	}

	wantJSON(t, p.get(t, "/notes", alice), 200, `[]`)
	wantJSON(t, p.do(t, "POST", "/notes", alice, "demo", `{"title":"of acme"}`), 201, `{"id":1,"title":"of acme"}`)
	wantJSON(t, p.do(t, "POST", "/notes", bob, "demo", `{"title":"of globex"}`), 201, ofGlobex)
	wantJSON(t, p.get(t, "/notes", alice), 200, `[{"id":1,"title":"of acme"}]`)
	wantJSON(t, p.get(t, "/notes", bob), 200, "["+ofGlobex+"]")
	wantJSON(t, p.get(t, "/whoami", alice), 200, `{"user":"alice@acme.test","tenant":"acme"}`)
	wantJSON(t, p.get(t, "/whoami", "Bob@Globex.test"), 200, `{"user":"bob@globex.test","tenant":"globex"}`)

	for name, a := range map[string]answer{
		"no credentials": p.get(t, "/notes", ""),
		"wrong password": p.do(t, "GET", "/notes", alice, "guess", ""),
		"no user":        p.do(t, "GET", "/notes", ":", "", ""),
	} {
		wantProblem(t, name, a, 401)
		if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Basic ") {
			t.Errorf("%s: WWW-Authenticate is %q", name, a.header.Get("WWW-Authenticate"))
		}
	}
	wantProblem(t, "no tenant", p.get(t, "/notes", "eve@nowhere.test"), 403)
	for name, body := range map[string]string{
		"no JSON": `title`, "cut": `{"title":"x"`, "two": `{"title":"x"}{}`, "array": `[]`, "null": `null`, "number": `{"title":1}`,
		"no title": `{}`, "empty": `{"title":""}`, "blank": `{"title":" \n"}`, "NUL": `{"title":"a\u0000b"}`, "nothing": ``,
	} {
		wantProblem(t, name, p.do(t, "POST", "/notes", alice, "demo", body), 400)
	}
	wantProblem(t, "too large", p.do(t, "POST", "/notes", alice, "demo", `{"title":"`+strings.Repeat("x", 1<<20)+`"}`), 413)
	const quote = `{"title":"'); DROP TABLE notes; -- <b>\"é"}`
	if a := p.do(t, "POST", "/notes", alice, "demo", quote); a.status != 201 {
		t.Errorf("a title is a title: %+v", a)
	}
	wantJSON(t, p.get(t, "/notes", bob), 200, "["+ofGlobex+"]")
}

// firstOfGlobex is globex's first note, after acme's. In one schema tenants share how far its sequences have counted, and nothing else.
func firstOfGlobex(isolation string) string {
	id := 1
	if isolation == "shared" {
		id = 2
	}
	return fmt.Sprintf(`{"id":%d,"title":"of globex"}`, id)
}

// TestWhatARequestSaysOfItsTenant tries each way to name one, for a user of it, of another, of both and of none.
func TestWhatARequestSaysOfItsTenant(t *testing.T) {
	t.Parallel()
	for _, isolation := range isolations {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			testWhatARequestSays(t, isolation)
		})
	}
}

func testWhatARequestSays(t *testing.T, isolation string) {
	p := start(t, nil, "-isolation", isolation)
	p.throughPooler(t)
	const alice, bob, carol, mallory = "alice@acme.test", "bob@globex.test", "carol@both.test", "mallory@nowhere.test"
	const ofAcme = `[{"id":1,"title":"of acme"}]`
	ofGlobex := "[" + firstOfGlobex(isolation) + "]"
	p.do(t, "POST", "/notes", alice, "demo", `{"title":"of acme"}`)
	p.do(t, "POST", "/notes", bob, "demo", `{"title":"of globex"}`)
	port := p.base[strings.LastIndex(p.base, ":"):]

	for _, c := range []struct {
		name, user, path string
		headers          []string
		status           int
		body             string
	}{
		{"bob_by_header", bob, "/notes", []string{"X-Tenant", "acme"}, 403, ""},
		{"bob_by_host", bob, "/notes", []string{"Host", "acme.localhost" + port}, 403, ""},
		{"bob_by_cookie", bob, "/notes", []string{"Cookie", "tenant=acme; X-Tenant=acme"}, 200, ofGlobex},
		{"bob_by_query", bob, "/notes?tenant=acme&X-Tenant=acme", nil, 200, ofGlobex},
		{"bob_by_forwarded_host", bob, "/notes", []string{"X-Forwarded-Host", "acme.localhost", "Forwarded", "host=acme.localhost"}, 200, ofGlobex},
		{"bob_by_two_headers", bob, "/notes", []string{"X-Tenant", "globex", "X-Tenant", "acme"}, 400, ""},
		{"bob_host_against_header", bob, "/notes", []string{"Host", "globex.localhost", "X-Tenant", "acme"}, 403, ""},
		{"alice_at_her_host", alice, "/notes", []string{"Host", "acme.localhost" + port}, 200, ofAcme},
		{"nobody_at_a_host", "", "/notes", []string{"Host", "acme.localhost" + port}, 401, ""},
		{"nobody_at_a_missing_one", "", "/notes", []string{"Host", "nosuch.localhost"}, 404, ""},
		{"carol_names_none", carol, "/notes", nil, 409, ""},
		{"carol_by_header", carol, "/notes", []string{"X-Tenant", "acme"}, 200, ofAcme},
		{"carol_by_the_other_header", carol, "/notes", []string{"X-Tenant", "globex"}, 200, ofGlobex},
		{"carol_by_host", carol, "/notes", []string{"Host", "globex.localhost" + port}, 200, ofGlobex},
		{"carol_names_two", carol, "/notes", []string{"Host", "globex.localhost", "X-Tenant", "acme"}, 403, ""},
	} {
		a := p.ask(t, c.path, c.user, c.headers...)
		if c.status == 200 {
			wantJSON(t, a, 200, c.body)
		} else {
			wantProblem(t, c.name, a, c.status)
		}
		if c.name == "carol_names_none" && !strings.Contains(a.body, `"tenants":["acme","globex"]`) {
			t.Errorf("her choices are not told: %s", a.body)
		}
	}
	// One who belongs nowhere cannot tell what exists.
	for _, name := range []string{"X-Tenant", "Host"} {
		suffix := ""
		if name == "Host" {
			suffix = ".localhost"
		}
		foreign, missing := p.ask(t, "/notes", mallory, name, "acme"+suffix), p.ask(t, "/notes", mallory, name, "nosuch"+suffix)
		foreign.header.Del("Date")
		missing.header.Del("Date")
		if foreign.status != 403 || !reflect.DeepEqual(foreign, missing) {
			t.Errorf("%s: a foreign tenant is %+v, a missing one %+v", name, foreign, missing)
		}
	}
	p.wantRefused(t, "bob@globex.test header acme", "bob@globex.test subdomain acme", "carol@both.test header acme", "carol@both.test subdomain globex",
		"mallory@nowhere.test header acme", "mallory@nowhere.test subdomain acme")
}

// ask is get with headers in pairs; Host is the request's host.
func (p *program) ask(t *testing.T, path, user string, headers ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", p.base+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, "demo")
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		} else {
			req.Header.Add(headers[i], headers[i+1])
		}
	}
	return p.send(t, req)
}

// wantRefused looks into the audit trail of the primary, which is written behind the answer.
func (p *program) wantRefused(t *testing.T, want ...string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.primaryURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var got []string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end) && !slices.Equal(got, want); time.Sleep(20 * time.Millisecond) {
		rows, _ := conn.Query(t.Context(), `SELECT a.actor || ' ' || (a.detail->>'source') || ' ' || t.name FROM tenancy.audit a JOIN tenancy.tenants t ON t.id = a.tenant
			WHERE a.action = 'refused hint' ORDER BY 1`)
		if got, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("refused hints on the record: %q, want %q", got, want)
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		signal syscall.Signal
	}{{"ctrl_c", syscall.SIGINT}, {"terminated", syscall.SIGTERM}, {"kill_9", syscall.SIGKILL}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, nil)
			postmaster, folder := p.server(t)
			p.get(t, "/notes", "alice@acme.test") // a pool is open
			if err := p.cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			if err := p.cmd.Wait(); err != nil && c.signal != syscall.SIGKILL {
				t.Errorf("the program ended with %v: %s", err, p.stderr)
			}
			wait := 10 * time.Second
			if c.signal != syscall.SIGKILL {
				wait = 0 // it has waited itself
			}
			wantGone(t, postmaster, folder, wait)
		})
	}
}

// server asks the throw-away server itself where it lives, on the way that the printed psql line names.
func (p *program) server(t *testing.T) (postmaster int, folder string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.adminURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	err = conn.QueryRow(t.Context(), `SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1)::int, current_setting('data_directory')`).Scan(&postmaster, &folder)
	if err != nil {
		t.Fatal(err)
	}
	folder = regexp.MustCompile(`^.*/tenancy-pg-[^/]+`).FindString(folder)
	if folder == "" {
		t.Fatal("the data directory is not in a server's folder")
	}
	return postmaster, folder
}

// wantGone looks at the process, at every process that names the folder, and at the folder.
func wantGone(t *testing.T, postmaster int, folder string, wait time.Duration) {
	t.Helper()
	for end := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		out, err := exec.Command("ps", "-A", "-o", "pid=,stat=,args=").Output()
		if err != nil {
			t.Fatal(err)
		}
		var left []string
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if len(f) > 1 && !strings.HasPrefix(f[1], "Z") && (f[0] == strconv.Itoa(postmaster) || strings.Contains(line, folder)) {
				left = append(left, line)
			}
		}
		_, err = os.Stat(folder)
		if len(left) == 0 && errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: %q, folder %s (%v)", left, folder, err)
		}
	}
}

func TestGivenDatabaseKeepsNotesFromStartToStart(t *testing.T) {
	t.Parallel()
	given, err := pgembed.Start(t.Context(), pgembed.Options{Download: true, Own: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := given.Stop(); err != nil {
			t.Error(err)
		}
	})
	server := given.URL()
	key, err := tenancy.NewKey("main")
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"TENANCY_KEYS=" + key}
	p := start(t, env, "-database", server)
	wantJSON(t, p.do(t, "POST", "/notes", "alice@acme.test", "demo", `{"title":"kept"}`), 201, `{"id":1,"title":"kept"}`)
	second := start(t, env, "-database", server) // beside the first one
	for _, p := range []*program{p, second} {
		wantJSON(t, p.get(t, "/notes", "alice@acme.test"), 200, `[{"id":1,"title":"kept"}]`)
		wantJSON(t, p.get(t, "/notes", "bob@globex.test"), 200, `[]`)
		if out := strings.Join(p.lines, "\n"); strings.Contains(out, key) || regexp.MustCompile(`postgres://[^/@]*:[^/@]*@`).MatchString(out) {
			t.Errorf("a secret of a given server is printed: %s", out)
		}
	}
	for _, c := range []struct {
		name, keys, url, want string
		code                  int
	}{
		{"no_key_tells_how_to_make_one", "", server, "openssl rand", 2},
		{"bad_key", "main:passphrase", server, "TENANCY_KEYS", 2},
		{"another_key_is_refused", "main:" + strings.Repeat("A", 42) + "E=", server, "Config.Keys", 1},
		{"no_url", key, "canary secret", "-database", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(binary, "-addr", freeAddress(t), "-database", c.url)
			cmd.Env = append(os.Environ(), "TENANCY_KEYS="+c.keys)
			out, _ := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != c.code || !strings.Contains(string(out), c.want) || strings.Contains(string(out), "canary") {
				t.Errorf("got exit %d and %q, want %d and %q", cmd.ProcessState.ExitCode(), out, c.code, c.want)
			}
		})
	}
}

func TestTakenAddressIsToldAtOnce(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := exec.Command(binary, "-addr", l.Addr().String())
	out, _ := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "address already in use") {
		t.Errorf("got exit %d and %q", cmd.ProcessState.ExitCode(), out)
	}
}

func wantJSON(t *testing.T, a answer, status int, body string) {
	t.Helper()
	if a.status != status || strings.TrimSpace(a.body) != body || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("got %d %s %q, want %d %q", a.status, a.header.Get("Content-Type"), a.body, status, body)
	}
}

func wantProblem(t *testing.T, name string, a answer, status int) {
	t.Helper()
	var p struct {
		Type, Title string
		Status      int
	}
	err := json.Unmarshal([]byte(a.body), &p)
	if err != nil || a.status != status || p.Status != status || p.Type == "" || p.Title == "" || a.header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("%s: got %d %s %q, want problem %d", name, a.status, a.header.Get("Content-Type"), a.body, status)
	}
}
