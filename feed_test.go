package tenancy_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// node is another process of the service, opened on a test's fleet. It answers one line with one line.
type node struct {
	tb  testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

type nodeRequest struct{ Op, Arg string }
type nodeAnswer struct{ Value, Err string }

// startNode runs the test binary once more, as a node.
func startNode(tb testing.TB, f *tenancytest.Fleet) *node {
	tb.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestNodeProcess$")
	cmd.Env = append(os.Environ(), "TENANCY_TEST_NODE=1", "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	n := &node{tb: tb, cmd: cmd, in: in, out: bufio.NewScanner(out)}
	tb.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		in.Close()
		if err := cmd.Wait(); err != nil {
			tb.Errorf("the second process: %v", err)
		}
	})
	if got := n.ask("ready", ""); got != "yes" {
		tb.Fatalf("the second process does not start: %q", got)
	}
	return n
}

// ask returns the answer, or the class of the error after "error: ".
func (n *node) ask(op, arg string) string {
	n.tb.Helper()
	if err := json.NewEncoder(n.in).Encode(nodeRequest{op, arg}); err != nil {
		n.tb.Fatal(err)
	}
	for n.out.Scan() {
		var a nodeAnswer
		if json.Unmarshal(n.out.Bytes(), &a) != nil {
			continue // the testing package's own words
		}
		if a.Err != "" {
			return "error: " + a.Err
		}
		return a.Value
	}
	n.tb.Fatalf("the second process is gone: %v", n.out.Err())
	return ""
}

// TestNodeProcess is the second process; without its environment it is nothing.
func TestNodeProcess(t *testing.T) {
	if os.Getenv("TENANCY_TEST_NODE") == "" {
		return
	}
	cfg, err := tenancy.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	tn, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	answers := json.NewEncoder(os.Stdout)
	requests := json.NewDecoder(os.Stdin)
	for {
		var r nodeRequest
		if err := requests.Decode(&r); err != nil {
			break
		}
		var a nodeAnswer
		a.Value, err = serveNode(t.Context(), tn, r)
		if err != nil {
			a.Err = class(err)
		}
		if err := answers.Encode(a); err != nil {
			t.Fatal(err)
		}
	}
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
}

func serveNode(ctx context.Context, tn *tenancy.Tenancy, r nodeRequest) (value string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	switch r.Op {
	case "ready":
		return "yes", nil
	case "query": // the caller's schema, as the server sees it
		if ctx, err = tn.Resolve(ctx, tenancy.Query{User: tenancy.UserKey(r.Arg)}); err != nil {
			return "", err
		}
		err = tn.DB().QueryRow(ctx, `SELECT current_schema()`).Scan(&value)
		return value, err
	case "resolve":
		if ctx, err = tn.Resolve(ctx, tenancy.Query{User: tenancy.UserKey(r.Arg)}); err != nil {
			return "", err
		}
		t, err := tenancy.TenantFrom(ctx)
		return t.Name, err
	}
	return "", errors.New("unknown request")
}

// class names the sentinel that err matches.
func class(err error) string {
	for _, c := range []error{tenancy.ErrForbidden, tenancy.ErrTenantSuspended, tenancy.ErrTenantGone, tenancy.ErrTenantMaintenance,
		tenancy.ErrTenantNotFound, tenancy.ErrPrimaryUnavailable, tenancy.ErrTenantNotReady, tenancy.ErrSchemaBehind, tenancy.ErrAmbiguousTenant} {
		if errors.Is(err, c) {
			return c.Error()
		}
	}
	return err.Error()
}

func refused(c error) string { return "error: " + c.Error() }

// until asks again and again for at most limit, and returns how long the wanted answer took.
func until(tb testing.TB, limit time.Duration, want string, ask func() string) time.Duration {
	tb.Helper()
	start := time.Now()
	for {
		got := ask()
		if got == want {
			return time.Since(start)
		}
		if time.Since(start) > limit {
			tb.Fatalf("after %v the answer is still %q, want %q", limit, got, want)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

func TestASecondProcessSeesEveryChangeAtOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	other := startNode(t, f)
	ctx, c := t.Context(), tn.Catalog()

	if got := other.ask("query", "alice@acme.test"); got != refused(tenancy.ErrForbidden) {
		t.Fatalf("before there is a tenant: %q", got)
	}
	acme, err := c.Create(ctx, tenancy.NewTenant{Name: "acme", Admin: "alice@acme.test"})
	if err != nil {
		t.Fatal(err)
	}
	source, err := c.DataSource(ctx, acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("created: served after", until(t, 2*time.Second, source.Schema, func() string { return other.ask("query", "alice@acme.test") }))

	if err := c.Suspend(ctx, acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if got := other.ask("query", "alice@acme.test"); got != refused(tenancy.ErrTenantSuspended) {
		t.Errorf("suspended: %q", got)
	}
	if err := c.Resume(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	t.Log("resumed: served after", until(t, 2*time.Second, source.Schema, func() string { return other.ask("query", "alice@acme.test") }))

	place, err := c.Prepare(ctx, acme.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(ctx, acme.ID, place); err != nil {
		t.Fatal(err)
	}
	t.Log("moved: the new place answers after", until(t, 2*time.Second, place.Schema, func() string { return other.ask("query", "alice@acme.test") }))

	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	if got := other.ask("query", "alice@acme.test"); got != refused(tenancy.ErrTenantGone) {
		t.Errorf("deleted: %q", got)
	}
}

func TestARemovedUserIsRefusedByASecondProcess(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	other := startNode(t, f)
	acme := tenancytest.Create(t, tn, "acme")
	took := make([]time.Duration, 20)
	for i := range took {
		m := tenancy.Membership{User: "bob@acme.test", Tenant: acme.ID}
		if err := tn.Catalog().AddMember(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		until(t, 2*time.Second, "acme", func() string { return other.ask("resolve", "bob@acme.test") })
		if err := tn.Catalog().RemoveMember(t.Context(), acme.ID, m.User); err != nil {
			t.Fatal(err)
		}
		took[i] = until(t, 2*time.Second, refused(tenancy.ErrForbidden), func() string { return other.ask("resolve", "bob@acme.test") })
	}
	slices.Sort(took)
	t.Logf("refused after: median %v, slowest %v", took[len(took)/2], took[len(took)-1])
	if median := took[len(took)/2]; median >= 100*time.Millisecond {
		t.Errorf("median %v: the notification does not arrive, this is the poll", median)
	}
}

// TestThePollCarriesChangesWhileListenIsCut keeps every notification connection of the fleet
// from living, and checks that changes still arrive within two seconds.
func TestThePollCarriesChangesWhileListenIsCut(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	other := startNode(t, f)
	acme := tenancytest.Create(t, tn, "acme")
	admin := f.Admin(t, "primary")
	ctx, cancel := context.WithCancel(t.Context())
	var cutter sync.WaitGroup
	cutter.Go(func() {
		for ctx.Err() == nil {
			_, _ = admin.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tenancy feed' AND datname = current_database()`)
			time.Sleep(2 * time.Millisecond)
		}
	})
	defer cutter.Wait()
	defer cancel()
	for range 3 {
		if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "bob@acme.test", Tenant: acme.ID}); err != nil {
			t.Fatal(err)
		}
		until(t, 6*time.Second, "acme", func() string { time.Sleep(20 * time.Millisecond); return other.ask("resolve", "bob@acme.test") })
		if err := tn.Catalog().RemoveMember(t.Context(), acme.ID, "bob@acme.test"); err != nil {
			t.Fatal(err)
		}
		took := until(t, 2*time.Second, refused(tenancy.ErrForbidden), func() string { return other.ask("resolve", "bob@acme.test") })
		t.Log("refused after", took)
	}
}

// TestSuspensionEndsTheSessionsOfAPausedNode: the node hears nothing and cannot be asked; the server's fence counts.
func TestSuspensionEndsTheSessionsOfAPausedNode(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	other := startNode(t, f)
	acme, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", Admin: "alice@acme.test"})
	if err != nil {
		t.Fatal(err)
	}
	source, err := tn.Catalog().DataSource(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	until(t, 2*time.Second, source.Schema, func() string { return other.ask("query", "alice@acme.test") })
	admin := f.Admin(t, "tenants")
	sessions := func() (n int) {
		if err := admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, source.User).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if sessions() == 0 {
		t.Fatal("the second process has no session of the tenant to end")
	}
	if err := other.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if n := sessions(); n != 0 {
		t.Errorf("%d sessions of the suspended tenant are left at the server", n)
	}
	if err := other.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := other.ask("query", "alice@acme.test"); strings.HasPrefix(got, "t_") {
		t.Errorf("the node that woke up serves the suspended tenant")
	}
}

// TestARestoredPrimaryIsNotBelieved takes the primary back to an older state, with a history of
// its own under the numbers that this node knows.
func TestARestoredPrimaryIsNotBelieved(t *testing.T) {
	t.Parallel()
	for name, restore := range map[string]string{
		"older":           `UPDATE tenancy.epoch SET epoch = epoch - 2; DELETE FROM tenancy.changes WHERE epoch > (SELECT epoch FROM tenancy.epoch)`,
		"another_history": `UPDATE tenancy.changes SET stamp = gen_random_uuid()`,
		"hole":            `UPDATE tenancy.epoch SET epoch = epoch + 5`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := tenancytest.NewFleet(t)
			tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
			acme := tenancytest.Create(t, tn, "acme")
			if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "bob", Tenant: acme.ID}); err != nil {
				t.Fatal(err)
			}
			resolve := func() string {
				_, err := tn.Resolve(t.Context(), tenancy.Query{User: "bob"})
				if err != nil {
					return refused(errors.New(class(err)))
				}
				return "served"
			}
			if got := resolve(); got != "served" {
				t.Fatal(got)
			}
			// The backup did not have bob yet, and no change says so.
			if _, err := f.Admin(t, "primary").Exec(t.Context(), `DELETE FROM tenancy.memberships; `+restore); err != nil {
				t.Fatal(err)
			}
			t.Log("noticed after", until(t, 3*time.Second, refused(tenancy.ErrForbidden), resolve))
		})
	}
}

// TestKnownUsersLiveForStaleGraceWithoutThePrimary cuts the way to the primary: known users are
// served, unknown ones are refused as unavailable and never as unknown, and after StaleGrace everyone is.
func TestKnownUsersLiveForStaleGraceWithoutThePrimary(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	way := startProxy(t, f.PrimaryURL)
	setup := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	acme := tenancytest.Create(t, setup, "acme")
	if err := setup.Catalog().AddMember(t.Context(), tenancy.Membership{User: "bob", Tenant: acme.ID}); err != nil {
		t.Fatal(err)
	}
	cut := *f
	cut.PrimaryURL = way.url
	tn := cut.Open(t, tenancy.Config{Lookups: tenancy.LookupConfig{StaleGrace: 5 * time.Second, Timeout: time.Second}})
	query := func(user tenancy.UserKey) error {
		ctx, err := tn.Resolve(t.Context(), tenancy.Query{User: user})
		if err != nil {
			return err
		}
		_, err = tn.DB().Exec(ctx, `SELECT 1`)
		return err
	}
	if err := query("bob"); err != nil {
		t.Fatal(err)
	}
	way.cut()
	began := time.Now()
	if err := query("carol"); !errors.Is(err, tenancy.ErrPrimaryUnavailable) {
		t.Errorf("an unknown user: %v, want ErrPrimaryUnavailable", err)
	}
	for time.Since(began) < 3*time.Second {
		if err := query("bob"); err != nil {
			t.Fatalf("a known user %v into the outage: %v", time.Since(began), err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	until(t, 7*time.Second, refused(tenancy.ErrPrimaryUnavailable), func() string {
		if err := query("bob"); err != nil {
			return refused(errors.New(class(err)))
		}
		return "served"
	})
	if d := time.Since(began); d < 4*time.Second {
		t.Errorf("refused after %v, before StaleGrace", d)
	}
	way.mend()
	until(t, 3*time.Second, "served", func() string {
		if err := query("bob"); err != nil {
			return refused(errors.New(class(err)))
		}
		return "served"
	})
}

// proxy is a way to a server that can be cut.
type proxy struct {
	url      string
	target   string
	listener net.Listener

	mu    sync.Mutex // guards the fields below
	down  bool
	conns map[net.Conn]bool
	done  sync.WaitGroup
}

func startProxy(tb testing.TB, url string) *proxy {
	tb.Helper()
	_, rest, _ := strings.Cut(url, "@")
	target, _, _ := strings.Cut(rest, "/")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &proxy{url: strings.Replace(url, target, l.Addr().String(), 1), target: target, listener: l, conns: map[net.Conn]bool{}}
	p.done.Go(p.accept)
	tb.Cleanup(func() {
		l.Close()
		p.cut()
		p.done.Wait()
	})
	return p
}

func (p *proxy) accept() {
	for {
		from, err := p.listener.Accept()
		if err != nil {
			return
		}
		to, err := net.Dial("tcp", p.target)
		if err != nil {
			from.Close()
			continue
		}
		p.mu.Lock()
		if p.down {
			from.Close()
			to.Close()
		} else {
			p.conns[from], p.conns[to] = true, true
			p.done.Go(func() { pipe(from, to) })
			p.done.Go(func() { pipe(to, from) })
		}
		p.mu.Unlock()
	}
}

func pipe(to, from net.Conn) {
	_, _ = io.Copy(to, from)
	to.Close()
	from.Close()
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	for c := range p.conns {
		c.Close()
	}
	clear(p.conns)
}

func (p *proxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
}

// TestTheValidityJobPassesABusyTenant has a verb at work on one tenant whose fence was cut off; that of another, and a third's rotation, are finished.
func TestTheValidityJobPassesABusyTenant(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	initech := tenancytest.Create(t, tn, "initech")
	admin, primary := f.Admin(t, "tenants"), f.Admin(t, "primary")
	must(t, primary, `UPDATE tenancy.tenants SET state = 'suspended', fenced = NULL WHERE id = ANY($1)`, []tenancy.ID{acme.ID, globex.ID})
	if err := tenancy.RotateUpTo(t.Context(), tn, initech.ID, 3); err != nil {
		t.Fatal(err)
	}
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`, acme.ID)
	age(t, f)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := tn.Refresh(ctx); err != nil {
		t.Error(err)
	}
	wantClosed(t, admin, placeOf(t, f, globex.ID).Login)
	wantOneLogin(t, f, tn, initech.ID, true)
	wantOpen(t, admin, placeOf(t, f, acme.ID).Login)
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, admin, placeOf(t, f, acme.ID).Login)
}
