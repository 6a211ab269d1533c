package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestMain(m *testing.M) {
	// This repository's own tests may fetch a PostgreSQL; those of its users ask first.
	if os.Getenv("TENANCY_PG_DOWNLOAD") == "" {
		if err := os.Setenv("TENANCY_PG_DOWNLOAD", "on"); err != nil {
			panic(err)
		}
	}
	log.SetOutput(io.Discard) // what ReverseProxy says of a node that is gone
	tenancytest.Main(m)
}

var (
	silent     = slog.New(slog.DiscardHandler)
	migrations = fstest.MapFS{"00001_notes.sql": {Data: []byte("-- +goose Up\nCREATE TABLE notes (title text NOT NULL);\n")}}
)

// node is a process of the service as the proxy sees it.
type node struct {
	tn      *tenancy.Tenancy
	address string
	calls   atomic.Int64 // requests that came, refused ones included
}

// startNode opens a node that serves only, or every tenant, and listens.
func startNode(t *testing.T, f *tenancytest.Fleet, only ...string) *node {
	t.Helper()
	server := httptest.NewUnstartedServer(nil)
	n := &node{address: server.Listener.Addr().String()}
	n.tn = f.Open(t, tenancy.Config{Migrations: migrations, OnlyTenants: only, NodeAddress: n.address, Logger: silent})
	server.Config.Handler = service(n.tn, n.address, &n.calls)
	server.Start()
	t.Cleanup(server.Close)
	return n
}

// service keeps notes. Its authentication believes any user's name, which no service should.
func service(tn *tenancy.Tenancy, address string, calls *atomic.Int64) http.Handler {
	users := tenantmw.UserKeyFunc(func(r *http.Request) (tenancy.UserKey, error) {
		user, _, _ := r.BasicAuth()
		return tenancy.UserKey(user), nil
	})
	header := tenantmw.ContributorFunc(func(r *http.Request) (tenancy.Hint, error) {
		return tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: r.Header.Get("X-Tenant")}, nil
	})
	domain := tenantmw.ContributorFunc(func(r *http.Request) (tenancy.Hint, error) {
		if !strings.HasSuffix(r.Host, ".test") {
			return tenancy.Hint{}, nil
		}
		return tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: r.Host}, nil
	})
	mw, err := tenantmw.New(tn, users, tenantmw.WithContributors(header, domain), tenantmw.WithLogger(silent))
	if err != nil {
		panic(err)
	}
	r := chi.NewRouter()
	r.Use(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			calls.Add(1)
			next.ServeHTTP(w, r)
		})
	}, mw.Tenant)
	r.Get("/place", func(w http.ResponseWriter, r *http.Request) {
		t, err := tenancy.TenantFrom(r.Context())
		if err != nil {
			mw.Error(w, r, err)
			return
		}
		fmt.Fprintf(w, "%s at %s", t.Name, r.Host)
	})
	r.With(mw.RequireTenant).Get("/notes", func(w http.ResponseWriter, r *http.Request) {
		rows, _ := tn.DB().Query(r.Context(), `SELECT title FROM notes ORDER BY title`)
		titles, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			mw.Error(w, r, err)
			return
		}
		w.Header().Set("Served-By", address)
		_, _ = io.WriteString(w, strings.Join(titles, ","))
	})
	r.With(mw.RequireTenant).Post("/notes", func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, err := io.Copy(hash, r.Body)
		if err == nil {
			_, err = tn.DB().Exec(r.Context(), `INSERT INTO notes VALUES ($1)`, fmt.Sprintf("%d bytes %x", n, hash.Sum(nil)))
		}
		if err != nil {
			mw.Error(w, r, err)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
	return r
}

// newFleet makes acme with alice and globex with bob, carol in both, and a note in each.
func newFleet(t *testing.T, more ...string) (*tenancytest.Fleet, *tenancy.Tenancy) {
	t.Helper()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: migrations, Logger: silent}) // it has no address and takes no callers
	users := map[string]tenancy.UserKey{"acme": "alice", "globex": "bob"}
	for _, name := range append([]string{"acme", "globex"}, more...) {
		tenant, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: name, Admin: users[name], Domains: []string{name + ".test"}})
		if err == nil {
			_, err = tn.DB().Exec(tenancytest.Context(t, tn, name), `INSERT INTO notes VALUES ($1)`, "of "+name)
		}
		if err == nil {
			err = tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: tenant.ID})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return f, tn
}

// notes are the tenant's, read past the proxy.
func notes(t *testing.T, tn *tenancy.Tenancy, tenant string) []string {
	t.Helper()
	rows, _ := tn.DB().Query(tenancytest.Context(t, tn, tenant), `SELECT title FROM notes ORDER BY title`)
	titles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return titles
}

func request(user, method, path string, body io.Reader, headers ...string) *http.Request {
	r := httptest.NewRequest(method, path, body)
	if user != "" {
		r.SetBasicAuth(user, "demo")
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return r
}

func answerOf(h http.Handler, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// startAt returns a proxy for nodes that sends r first to node first.
func startAt(first string, r *http.Request, nodes ...string) http.Handler {
	h := newHandler(nodes)
	last := &routerOf(h).last
	last.remember(last.key(r), first)
	return h
}

func routerOf(h http.Handler) *router { return h.(*httputil.ReverseProxy).Transport.(*router) }

// told waits until a node answers user with the names of others, as it does within a second or two of their start.
func told(t *testing.T, n *node, user string, others ...*node) {
	t.Helper()
	var want []string
	for _, o := range others {
		want = append(want, o.address)
	}
	slices.Sort(want)
	direct := newHandler([]string{n.address})
	until(t, 5*time.Second, strings.Join(want, ", "), func() string {
		return answerOf(direct, request(user, http.MethodGet, "/notes", nil)).Header().Get(tenantmw.NodesHeader)
	})
	n.calls.Store(0)
}

// until asks again and again for at most limit.
func until(t *testing.T, limit time.Duration, want string, ask func() string) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		got := ask()
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v the answer is still %q, want %q", limit, got, want)
		}
	}
}

func want(t *testing.T, w *httptest.ResponseRecorder, status int, body string) {
	t.Helper()
	if w.Code != status || body != "" && w.Body.String() != body {
		t.Errorf("got %d %q, want %d %q", w.Code, w.Body, status, body)
	}
	if named := w.Header().Get(tenantmw.NodesHeader); named != "" && status != http.StatusMisdirectedRequest {
		t.Errorf("the caller of a %d is told of nodes: %s", status, named)
	}
}

func TestARequestReachesANodeOfItsTenantWhereverItStarts(t *testing.T) {
	t.Parallel()
	f, tn := newFleet(t)
	ofAcme, ofGlobex, ofAll := startNode(t, f, "acme"), startNode(t, f, "globex"), startNode(t, f)
	told(t, ofAcme, "bob", ofGlobex, ofAll)
	told(t, ofGlobex, "alice", ofAcme, ofAll)
	nodes := []*node{ofAcme, ofGlobex, ofAll}
	addresses := []string{ofAcme.address, ofGlobex.address, ofAll.address}

	for _, caller := range []struct {
		tenant  string
		foreign *node
		make    func() *http.Request
		body    string
	}{
		{"acme", ofGlobex, func() *http.Request { return request("alice", http.MethodGet, "/notes", nil) }, "of acme"},
		{"globex", ofAcme, func() *http.Request { return request("bob", http.MethodGet, "/notes", nil) }, "of globex"},
		{"acme", ofGlobex, func() *http.Request { return request("carol", http.MethodGet, "/notes", nil, "X-Tenant", "acme") }, "of acme"},
		{"globex", ofAcme, func() *http.Request { return request("carol", http.MethodGet, "/notes", nil, "X-Tenant", "globex") }, "of globex"},
		// The Host header is what names the tenant here, and the node sees it as it came.
		{"globex", ofAcme, func() *http.Request { return request("", http.MethodGet, "http://globex.test/place", nil) }, "globex at globex.test"},
		{"acme", ofGlobex, func() *http.Request { return request("", http.MethodGet, "http://acme.test/place?a=b;c", nil) }, "acme at acme.test"},
	} {
		for _, first := range nodes {
			h := startAt(first.address, caller.make(), addresses...)
			before := caller.foreign.calls.Load()
			want(t, answerOf(h, caller.make()), http.StatusOK, caller.body)
			for range 3 { // and from then on nowhere else
				want(t, answerOf(h, caller.make()), http.StatusOK, caller.body)
			}
			asked, wanted := caller.foreign.calls.Load()-before, int64(0)
			if first == caller.foreign {
				wanted = 1
			}
			if asked != wanted {
				t.Errorf("%s from %d: the node that does not serve it was asked %d times, want %d", caller.tenant, slices.Index(nodes, first), asked, wanted)
			}
		}
	}

	// No tenant crosses: strangers are refused wherever they start, and moved nowhere.
	for _, first := range nodes {
		for _, make := range []func() *http.Request{
			func() *http.Request { return request("alice", http.MethodGet, "/notes", nil, "X-Tenant", "globex") },
			func() *http.Request { return request("bob", http.MethodGet, "http://acme.test/notes", nil) },
			func() *http.Request { return request("eve", http.MethodGet, "/notes", nil) },
		} {
			h, before := startAt(first.address, make(), addresses...), first.calls.Load()
			want(t, answerOf(h, make()), http.StatusForbidden, "")
			if n := first.calls.Load() - before; n != 1 {
				t.Errorf("a stranger was answered by another node")
			}
		}
	}
	if got := notes(t, tn, "acme"); !slices.Equal(got, []string{"of acme"}) {
		t.Errorf("acme has %q", got)
	}
}

func TestCallersOfAllTenantsAtOnceStayApart(t *testing.T) {
	t.Parallel()
	f, _ := newFleet(t)
	ofAcme, ofGlobex := startNode(t, f, "acme"), startNode(t, f, "globex")
	told(t, ofAcme, "bob", ofGlobex)
	told(t, ofGlobex, "alice", ofAcme)
	h := newHandler([]string{ofAcme.address, ofGlobex.address})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 25 {
				user, tenant := "alice", "acme"
				if (i+j)%2 == 0 {
					user, tenant = "bob", "globex"
				}
				headers := []string{}
				if j%3 == 0 { // a caller that the proxy does not know yet
					headers = []string{"Cookie", fmt.Sprintf("visit=%d-%d", i, j)}
				}
				want(t, answerOf(h, request(user, http.MethodGet, "/notes", nil, headers...)), http.StatusOK, "of "+tenant)
			}
		})
	}
	wg.Wait()
}

func TestAPostArrivesOnceAndWhole(t *testing.T) {
	t.Parallel()
	f, tn := newFleet(t)
	ofAcme, ofGlobex := startNode(t, f, "acme"), startNode(t, f, "globex")
	told(t, ofGlobex, "alice", ofAcme)
	text := make([]byte, maxReplay)
	fill := rand.NewChaCha8([32]byte{1})
	_, _ = fill.Read(text)
	wanted := []string{"of acme"}
	for name, size := range map[string]int{"empty": 0, "small": 10, "chunked": 300_000, "largest": maxReplay} {
		t.Run(name, func(t *testing.T) {
			body := text[:size]
			post := func() *http.Request {
				var from io.Reader = bytes.NewReader(body)
				if name == "chunked" {
					from = io.MultiReader(from) // the length is not known
				}
				return request("alice", http.MethodPost, "/notes", from)
			}
			front := httptest.NewServer(startAt(ofGlobex.address, onTheWire(post()), ofAcme.address, ofGlobex.address))
			defer front.Close()
			before := ofGlobex.calls.Load()
			if got := send(t, front, post()); got != http.StatusCreated {
				t.Errorf("got %d", got)
			}
			if n := ofGlobex.calls.Load() - before; n != 1 {
				t.Errorf("the node that does not serve acme was asked %d times: the way around is not tested", n)
			}
			sum := sha256.Sum256(body)
			wanted = append(wanted, fmt.Sprintf("%d bytes %s", size, hex.EncodeToString(sum[:])))
			slices.Sort(wanted)
			if got := notes(t, tn, "acme"); !slices.Equal(got, wanted) {
				t.Errorf("acme has %q, want %q", got, wanted)
			}
		})
	}
	if got := notes(t, tn, "globex"); !slices.Equal(got, []string{"of globex"}) {
		t.Errorf("globex has %q", got)
	}
}

// onTheWire is r as the proxy gets it from send.
func onTheWire(r *http.Request) *http.Request {
	r.Host = "service"
	return r
}

// send sends r over a connection to the proxy.
func send(t *testing.T, front *httptest.Server, r *http.Request) (status int) {
	t.Helper()
	out, err := http.NewRequestWithContext(t.Context(), r.Method, front.URL+r.URL.Path, r.Body)
	if err != nil {
		t.Fatal(err)
	}
	out.Header, out.Host, out.ContentLength = r.Header, "service", r.ContentLength
	res, err := front.Client().Do(out)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

func TestATenantThatNobodyServesIsRefusedOnce(t *testing.T) {
	t.Parallel()
	f, tn := newFleet(t, "initech")
	ofAcme, ofGlobex := startNode(t, f, "acme"), startNode(t, f, "globex")
	if err := tn.Close(); err != nil { // it served every tenant, if to nobody
		t.Fatal(err)
	}
	w := answerOf(newHandler([]string{ofAcme.address, ofGlobex.address}), request("carol", http.MethodGet, "/notes", nil, "X-Tenant", "initech"))
	want(t, w, http.StatusMisdirectedRequest, "")
	if w.Header().Get("Content-Type") != "application/problem+json" || w.Header().Get(tenantmw.NodesHeader) != "" {
		t.Errorf("got %v", w.Header())
	}
	if n := ofAcme.calls.Load() + ofGlobex.calls.Load(); n != 1 {
		t.Errorf("%d nodes were asked, want one", n)
	}
}

func TestANodeThatIsNotConfiguredIsNotCalled(t *testing.T) {
	t.Parallel()
	f, _ := newFleet(t)
	ofAcme, ofGlobex := startNode(t, f, "acme"), startNode(t, f, "globex")
	told(t, ofGlobex, "alice", ofAcme)
	h := newHandler([]string{ofGlobex.address})
	w := answerOf(h, request("alice", http.MethodGet, "/notes", nil))
	want(t, w, http.StatusMisdirectedRequest, "")
	if got := w.Header().Get(tenantmw.NodesHeader); got != ofAcme.address {
		t.Errorf("the caller is told of %q, want %q", got, ofAcme.address)
	}
	if n := ofAcme.calls.Load(); n != 0 {
		t.Errorf("a node that is not configured was called %d times", n)
	}
	want(t, answerOf(h, request("bob", http.MethodGet, "/notes", nil)), http.StatusOK, "of globex")
}

func TestARenamedTenantIsFollowed(t *testing.T) {
	t.Parallel()
	f, tn := newFleet(t)
	first, second := startNode(t, f, "acme"), startNode(t, f, "globex", "umbrella")
	told(t, second, "alice", first)
	h := newHandler([]string{first.address, second.address})
	get := func() *httptest.ResponseRecorder {
		return answerOf(h, request("alice", http.MethodGet, "/notes", nil))
	}
	for range 3 {
		w := get()
		want(t, w, http.StatusOK, "of acme")
		if by := w.Header().Get("Served-By"); by != first.address {
			t.Errorf("served by %s, want %s", by, first.address)
		}
	}
	acme, err := tn.Catalog().TenantByName(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		by   *node
	}{{"umbrella", second}, {"acme", first}} {
		if err := tn.Catalog().Rename(t.Context(), acme.ID, step.name); err != nil {
			t.Fatal(err)
		}
		until(t, 3*time.Second, step.by.address, func() string { return get().Header().Get("Served-By") })
		want(t, get(), http.StatusOK, "of acme")
	}
	want(t, answerOf(h, request("bob", http.MethodGet, "/notes", nil)), http.StatusOK, "of globex")
}

// TestANodeThatDiedIsPassedBy kills a process, as a machine that loses its power does.
func TestANodeThatDiedIsPassedBy(t *testing.T) {
	t.Parallel()
	f, tn := newFleet(t)
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	ofGlobex := startNode(t, f, "globex")
	address, kill := startProcess(t, f, "acme")
	direct := newHandler([]string{ofGlobex.address})
	named := func() string {
		return answerOf(direct, request("alice", http.MethodGet, "/notes", nil)).Header().Get(tenantmw.NodesHeader)
	}
	until(t, 5*time.Second, address, named)
	h := newHandler([]string{address, ofGlobex.address})
	want(t, answerOf(h, request("alice", http.MethodGet, "/notes", nil)), http.StatusOK, "of acme")

	kill()
	died := time.Now()
	// Whoever was served there is not stuck to it: globex's node is asked, which still names the dead one or nobody.
	if w := answerOf(h, request("alice", http.MethodGet, "/notes", nil)); w.Code != http.StatusMisdirectedRequest {
		t.Errorf("after the death: got %d %q", w.Code, w.Body)
	}
	want(t, answerOf(h, request("bob", http.MethodGet, "/notes", nil)), http.StatusOK, "of globex")
	until(t, 10*time.Second, "", named)
	if took := time.Since(died); took < 3*time.Second {
		t.Errorf("not named any more after %v: a node is given five seconds", took)
	}

	again := startNode(t, f, "acme")
	h = newHandler([]string{address, ofGlobex.address, again.address})
	until(t, 5*time.Second, "of acme", func() string { // a proxy that met the dead one first goes on as well
		return answerOf(h, request("alice", http.MethodGet, "/notes", nil)).Body.String()
	})
}

// startProcess runs the test binary once more, as a node, and returns its address and what kills it.
func startProcess(t *testing.T, f *tenancytest.Fleet, only string) (address string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestNodeProcess$")
	cmd.Env = append(os.Environ(), "PROXY_TEST_NODE=1", "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText, "TENANCY_ONLY_TENANTS="+only)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	t.Cleanup(kill)
	if _, err := fmt.Fscanln(out, &address); err != nil {
		t.Fatalf("the process does not start: %v", err)
	}
	return address, kill
}

// TestNodeProcess is that process; without its environment it is nothing.
func TestNodeProcess(t *testing.T) {
	if os.Getenv("PROXY_TEST_NODE") == "" {
		return
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := tenancy.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	cfg.NodeAddress, cfg.Logger = l.Addr().String(), silent
	tn, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(cfg.NodeAddress)
	t.Fatal(http.Serve(l, service(tn, cfg.NodeAddress, new(atomic.Int64))))
}

// fake is a node that answers as a test wants.
func fake(t *testing.T, h http.HandlerFunc) (address string, calls *atomic.Int64) {
	t.Helper()
	calls = new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		h(w, r)
	}))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String(), calls
}

// misdirected answers with nodes.
func misdirected(nodes func() string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		tenantmw.Problem{Status: http.StatusMisdirectedRequest, Nodes: strings.Split(nodes(), ", ")}.Write(w)
	}
}

func TestNodesThatNameEachOtherMakeNoLoop(t *testing.T) {
	t.Parallel()
	var all []string
	var calls []*atomic.Int64
	for range 5 {
		address, n := fake(t, misdirected(func() string { return strings.Join(all, ", ") }))
		all, calls = append(all, address), append(calls, n)
	}
	w := answerOf(newHandler(all), request("alice", http.MethodPost, "/notes", strings.NewReader("hello")))
	want(t, w, http.StatusMisdirectedRequest, "")
	var sent int64
	for _, n := range calls {
		sent += n.Load()
		if n.Load() > 1 {
			t.Errorf("a node was asked %d times", n.Load())
		}
	}
	if sent != 1+maxMoves {
		t.Errorf("the request was sent %d times, want %d", sent, 1+maxMoves)
	}
}

func TestAnAddressOfAnAnswerAloneIsNotCalled(t *testing.T) {
	t.Parallel()
	outside, calls := fake(t, func(w http.ResponseWriter, r *http.Request) { t.Errorf("%s was sent outside", r.URL) })
	_, port, _ := net.SplitHostPort(outside)
	right, _ := fake(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "right") })
	for _, nodes := range []string{outside, "localhost:" + port, "http://" + outside, outside + "/", "user@" + outside, "@" + outside, ":" + port, "", ",,"} {
		wrong, _ := fake(t, misdirected(func() string { return nodes }))
		want(t, answerOf(newHandler([]string{wrong}), request("alice", http.MethodGet, "/", nil)), http.StatusMisdirectedRequest, "")
		both, _ := fake(t, misdirected(func() string { return nodes + ", " + right }))
		r := request("alice", http.MethodGet, "/", nil)
		want(t, answerOf(startAt(both, r, both, right), r), http.StatusOK, "right")
	}
	if n := calls.Load(); n != 0 {
		t.Errorf("%d requests left for an address that is not configured", n)
	}
}

func TestAPostIsNotSentAgainWhenItMayHaveArrived(t *testing.T) {
	t.Parallel()
	dying := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler) // the connection is cut, and nobody knows what was done
	}
	one, calls := fake(t, dying)
	other, more := fake(t, dying)
	w := answerOf(newHandler([]string{one, other}), request("alice", http.MethodPost, "/notes", strings.NewReader("hello")))
	want(t, w, http.StatusBadGateway, "")
	if n := calls.Load() + more.Load(); n != 1 {
		t.Errorf("it was sent %d times", n)
	}
	// Nor is an answer of the service's own taken for a sign to go on.
	for _, status := range []int{http.StatusMisdirectedRequest, http.StatusServiceUnavailable, http.StatusBadGateway} {
		own, calls := fake(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) })
		next, more := fake(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) })
		want(t, answerOf(newHandler([]string{own, next}), request("alice", http.MethodPost, "/notes", strings.NewReader("hello"))), status, "")
		if n := calls.Load() + more.Load(); n != 1 {
			t.Errorf("%d: it was sent %d times", status, n)
		}
	}
}

func TestANodeThatCannotBeReachedIsPassedBy(t *testing.T) {
	t.Parallel()
	live, _ := fake(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	dead, another := closedAddress(t), closedAddress(t)
	for _, body := range []string{"", "hello", strings.Repeat("x", 2*maxReplay)} {
		r := request("alice", http.MethodPost, "/notes", strings.NewReader(body))
		want(t, answerOf(startAt(dead, r, dead, another, live), r), http.StatusOK, body)
	}
	var lines strings.Builder
	h := newHandler([]string{dead, another})
	h.(*httputil.ReverseProxy).ErrorLog = log.New(&lines, "", 0)
	r := request("alice", http.MethodGet, "/notes", nil, "Cookie", "canary")
	want(t, answerOf(h, r), http.StatusBadGateway, "")
	if basic := r.Header.Get("Authorization"); lines.Len() == 0 || strings.Contains(lines.String(), basic) || strings.Contains(lines.String(), "canary") {
		t.Errorf("logged: %q", lines.String())
	}

	// Nobody is sent to a dead node first again, whatever the answer is elsewhere.
	refusing, _ := fake(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotFound) })
	h = startAt(dead, r, dead, refusing)
	want(t, answerOf(h, r), http.StatusNotFound, "")
	if last := &routerOf(h).last; last.node(last.key(r)) != "" {
		t.Error("the dead node is remembered")
	}

	// A 421 that names none but dead ones is no reason to ask who did not name itself.
	wrong, _ := fake(t, misdirected(func() string { return dead + ", " + another }))
	r = request("alice", http.MethodGet, "/notes", nil)
	want(t, answerOf(startAt(wrong, r, wrong, dead, another, live), r), http.StatusBadGateway, "")

	// Who hangs up is not carried on.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	want(t, answerOf(newHandler([]string{dead, live}), r.WithContext(ctx)), http.StatusBadGateway, "")
}

func closedAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestALargeBodyIsNotKept: its 421 goes to the caller, whose second try goes to the right node at once.
func TestALargeBodyIsNotKept(t *testing.T) {
	t.Parallel()
	right, calls := fake(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	})
	wrong, asked := fake(t, misdirected(func() string { return right }))
	for name, large := range map[string]func() io.Reader{
		"known":   func() io.Reader { return bytes.NewReader(make([]byte, maxReplay+1)) },
		"unknown": func() io.Reader { return io.MultiReader(bytes.NewReader(make([]byte, maxReplay+1))) },
	} {
		t.Run(name, func(t *testing.T) {
			post := func() *http.Request { return request("alice", http.MethodPost, "/notes", large()) }
			h := startAt(wrong, post(), wrong, right)
			before, arrived := asked.Load(), calls.Load()
			w := answerOf(h, post())
			want(t, w, http.StatusMisdirectedRequest, "")
			if got := w.Header().Get(tenantmw.NodesHeader); got != right {
				t.Errorf("the caller is told of %q, want %q", got, right)
			}
			if calls.Load() != arrived {
				t.Error("a part of the body was sent again")
			}
			want(t, answerOf(h, post()), http.StatusOK, fmt.Sprint(maxReplay+1))
			if n := asked.Load() - before; n != 1 {
				t.Errorf("the wrong node was asked %d times, want once", n)
			}
		})
	}
}

// TestARequestIsPassedOnAsItCame looks at what a proxy could spoil.
func TestARequestIsPassedOnAsItCame(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var got *http.Request
	to, _ := fake(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got = r
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "1")
	})
	w := answerOf(newHandler([]string{to}), request("alice", http.MethodGet, "http://acme.test:81/a%2Fb?x=1;y&z", nil,
		"X-Forwarded-For", "6.6.6.6", "X-Forwarded-Host", "globex.test", "Forwarded", "host=globex.test",
		"Connection", "X-Private", "X-Private", "1", "X-Tenant", "acme"))
	want(t, w, http.StatusOK, "")
	mu.Lock()
	defer mu.Unlock()
	if got.Host != "acme.test:81" || got.RequestURI != "/a%2Fb?x=1;y&z" || got.Header.Get("X-Tenant") != "acme" {
		t.Errorf("host %q, %s, hint %q", got.Host, got.RequestURI, got.Header.Get("X-Tenant"))
	}
	if user, _, _ := got.BasicAuth(); user != "alice" {
		t.Errorf("user %q", user)
	}
	for name, value := range map[string]string{"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Host": "acme.test:81", "Forwarded": "", "X-Private": "", "Accept-Encoding": ""} {
		if got.Header.Get(name) != value {
			t.Errorf("%s: %q, want %q", name, got.Header.Get(name), value)
		}
	}
	if w.Header().Get("X-Hop") != "" {
		t.Error("a hop's own header was passed on")
	}
}

func TestTheMemoryIsBounded(t *testing.T) {
	t.Parallel()
	p := newRouter([]string{"a:1"})
	for i := range maxCallers + 100 {
		p.last.remember(uint64(i), "a:1")
	}
	if n := len(p.last.nodes); n != maxCallers {
		t.Errorf("%d callers are remembered, want %d", n, maxCallers)
	}
	if p.last.node(maxCallers+99) != "a:1" {
		t.Error("the latest caller is not remembered")
	}

	key := func(host string, headers ...string) uint64 {
		r := request("", http.MethodGet, "/", nil)
		r.Host = host
		for i := 0; i < len(headers); i += 2 {
			r.Header.Add(headers[i], headers[i+1])
		}
		return p.last.key(r)
	}
	seen := map[uint64]int{}
	for i, k := range []uint64{
		key("a"), key("ab"), key("a", "Authorization", "b"), key("a", "Cookie", "b"), key("a", "Authorization", "b", "Cookie", "b"),
		key("a", "Authorization", "bb"), key("a", "Cookie", "b", "Cookie", "b"), key("a", "Cookie", "bb"), key("a", "X-Tenant", "b"), key("a", "X-Api-Key", "b"),
	} {
		if j, twice := seen[k]; twice {
			t.Errorf("requests %d and %d have one key", i, j)
		}
		seen[k] = i
	}
	if key("a", "Accept", "b") != key("a") {
		t.Error("a header that decides nothing is in the key")
	}
}

// TestRefusalsAreNotRemembered: a flood of made-up credentials must not push out those who were served.
func TestRefusalsAreNotRemembered(t *testing.T) {
	t.Parallel()
	to, _ := fake(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	h := newHandler([]string{to})
	want(t, answerOf(h, request("", http.MethodGet, "/", nil)), http.StatusUnauthorized, "")
	want(t, answerOf(h, request("alice", http.MethodGet, "/", nil)), http.StatusOK, "")
	if n := len(routerOf(h).last.nodes); n != 1 {
		t.Errorf("%d callers are remembered, want one", n)
	}
}

func TestNodesAreParsed(t *testing.T) {
	t.Parallel()
	got, err := parseNodes(" 10.0.0.7:8080, [::1]:80,node.internal:http ")
	if err != nil || !slices.Equal(got, []string{"10.0.0.7:8080", "[::1]:80", "node.internal:http"}) {
		t.Errorf("got %q, %v", got, err)
	}
	for _, bad := range []string{"", "a", "a:", ":1", "a:1,", "a:1,a:1", "http://a:1"} {
		if got, err := parseNodes(bad); err == nil {
			t.Errorf("%q is accepted: %q", bad, got)
		}
	}
}

func TestTheProgramServesUntilItIsEnded(t *testing.T) {
	t.Parallel()
	to, _ := fake(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "hello") })
	address := closedAddress(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, address, []string{to}) }()
	until(t, 5*time.Second, "hello", func() string {
		res, err := http.Get("http://" + address)
		if err != nil {
			return err.Error()
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return string(body)
	})
	if err := run(t.Context(), address, []string{to}); err == nil {
		t.Error("a taken address is no error")
	}
	cancel()
	if err := <-ended; err != nil && !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}

// A node that serves globex alone, and a proxy that brings a caller of acme past it.
func Example() {
	acme := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "the notes of acme, asked for at", r.Host)
	}))
	defer acme.Close()
	globex := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tenantmw.Problem{Status: http.StatusMisdirectedRequest, Nodes: []string{acme.Listener.Addr().String()}}.Write(w)
	}))
	defer globex.Close()

	proxy := newHandler([]string{globex.Listener.Addr().String(), acme.Listener.Addr().String()})
	w := httptest.NewRecorder()
	proxy.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "http://acme.example.com/notes", nil))
	fmt.Print(w.Code, " ", w.Body)
	// Output: 200 the notes of acme, asked for at acme.example.com
}
