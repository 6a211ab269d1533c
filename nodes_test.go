package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestANodeNamesThoseThatServeTheTenant asks one node for a tenant that others serve, while they come, go, fall silent
// and die.
func TestANodeNamesThoseThatServeTheTenant(t *testing.T) {
	t.Parallel()
	f, _, _, globex := twoTenants(t, tenancy.Config{}) // this node serves both and has no address
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}, NodeAddress: "10.0.0.1:80"})
	named := func() string {
		t.Helper()
		_, err := node.Resolve(t.Context(), tenancy.Query{User: "bob@globex.test"})
		return namedBy(t, err, globex.ID)
	}
	if got := named(); got != "" {
		t.Errorf("named %q, and no node that serves the tenant has an address", got)
	}
	_, err := node.Resolve(t.Context(), tenancy.Query{User: "bob@globex.test"})
	wantError(t, err, tenancy.ErrNotServed, `tenant "globex"`, "no node that lives")

	f.Open(t, tenancy.Config{OnlyTenants: []string{"globex"}})                                     // no address
	f.Open(t, tenancy.Config{OnlyTenants: []string{"initech"}, NodeAddress: "10.0.0.5:80"})        // another tenant's
	last := f.Open(t, tenancy.Config{OnlyTenants: []string{"globex"}, NodeAddress: "10.0.0.4:80"}) // opened first, last in order
	f.Open(t, tenancy.Config{OnlyTenants: []string{"initech", "globex"}, NodeAddress: "10.0.0.2:80"})
	f.Open(t, tenancy.Config{NodeAddress: "10.0.0.3:80"}) // every tenant
	until(t, 5*time.Second, "10.0.0.2:80 10.0.0.3:80 10.0.0.4:80", named)
	_, err = node.Resolve(t.Context(), tenancy.Query{User: "bob@globex.test"})
	wantError(t, err, tenancy.ErrNotServed, "10.0.0.2:80, 10.0.0.3:80, 10.0.0.4:80")

	if err := last.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "10.0.0.2:80 10.0.0.3:80", named)

	// One that died without a word was seen a second ago: it is named until the five are over. One that was only cut off is back when it reports.
	primary := f.Admin(t, "primary")
	must(t, primary, `INSERT INTO tenancy.nodes (id, name, epoch, serves, address, seen) SELECT gen_random_uuid(), 'dead', epoch + 1000, '{globex}', '10.0.0.9:80', now() - interval '1 s' FROM tenancy.epoch`)
	until(t, 4*time.Second, "10.0.0.2:80 10.0.0.3:80 10.0.0.9:80", named)
	until(t, 8*time.Second, "10.0.0.2:80 10.0.0.3:80", named)
	must(t, primary, `UPDATE tenancy.nodes SET seen = now() WHERE name = 'dead'`)
	until(t, 5*time.Second, "10.0.0.2:80 10.0.0.3:80 10.0.0.9:80", named)
}

// namedBy returns the nodes that a refusal of the tenant names.
func namedBy(tb testing.TB, err error, id tenancy.ID) string {
	tb.Helper()
	refusal, ok := errors.AsType[*tenancy.NotServedError](err)
	if !ok || !errors.Is(err, tenancy.ErrNotServed) {
		tb.Fatalf("got %v, want a *NotServedError that matches ErrNotServed", err)
	}
	if e, ok := errors.AsType[*tenancy.Error](err); !ok || e.Tenant != id || e.RetryAfter != 0 {
		tb.Errorf("the error does not say which tenant, or that a later try helps: %+v", e)
	}
	return strings.Join(refusal.Nodes, " ")
}

// TestOnlyWhoMayKnowLearnsThatANodeDoesNotServe: who is a stranger to a tenant, and who asks for one that is out of
// service, gets the answer of every other node.
func TestOnlyWhoMayKnowLearnsThatANodeDoesNotServe(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c := tn.Catalog()
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := c.AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: id}); err != nil {
			t.Fatal(err)
		}
	}
	choice := tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "globex"}
	place := tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "globex.example.com"}
	ask := func(user tenancy.UserKey, hints ...tenancy.Hint) error {
		return eventually(func() error { // node hears of carol a moment later
			_, err := node.Resolve(t.Context(), tenancy.Query{User: user, Hints: hints})
			return err
		}, func(err error) bool { return user != "carol" || !errors.Is(err, tenancy.ErrForbidden) })
	}
	check := func(t *testing.T, want error, foreign error) {
		t.Helper()
		wantError(t, ask("bob@globex.test"), want)
		wantError(t, ask("bob@globex.test", place), want)
		wantError(t, ask("carol", choice), want)
		for name, err := range map[string]error{
			"member_of_another": ask("alice@acme.test", choice), "at_its_place": ask("alice@acme.test", place), "of_none": ask("eve", choice),
		} {
			if !errors.Is(err, tenancy.ErrForbidden) || errors.Is(err, tenancy.ErrNotServed) {
				t.Errorf("%s: got %v, want ErrForbidden", name, err)
			}
		}
		wantError(t, ask("", place), foreign)
		if err := ask("", choice); err != nil {
			t.Errorf("a choice of nobody names no tenant: %v", err)
		}
		if err := ask("alice@acme.test"); err != nil {
			t.Errorf("the tenant that is served: %v", err)
		}
	}
	check(t, tenancy.ErrNotServed, tenancy.ErrNotServed)
	missing := choice
	missing.Value = "nobody"
	if got, want := fmt.Sprint(ask("alice@acme.test", choice)), fmt.Sprint(ask("alice@acme.test", missing)); got != want {
		t.Errorf("a foreign and a missing tenant can be told apart: %q, %q", got, want)
	}

	for _, step := range []struct {
		name string
		do   func() error
		want error
	}{
		{"suspended", func() error { return c.Suspend(t.Context(), globex.ID, tenancy.Suspension{}) }, tenancy.ErrTenantSuspended},
		{"maintenance", func() error { return c.Suspend(t.Context(), globex.ID, tenancy.Suspension{Maintenance: true}) }, tenancy.ErrTenantMaintenance},
		{"deleted", func() error { return c.Delete(t.Context(), globex.ID) }, tenancy.ErrTenantGone},
	} {
		t.Run(step.name, func(t *testing.T) {
			if err := step.do(); err != nil { // it waits until node has heard
				t.Fatal(err)
			}
			check(t, step.want, tenancy.ErrTenantNotFound)
		})
	}
}

// eventually asks again for at most two seconds, until the answer is good.
func eventually(ask func() error, good func(error) bool) (err error) {
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(time.Millisecond) {
		if err = ask(); good(err) || time.Now().After(end) {
			return err
		}
	}
}

// TestNothingIsOpenedForATenantThatIsNotServed tries every way to a tenant's data with contexts of it, and looks
// for pools and for sessions at the server.
func TestNothingIsOpenedForATenantThatIsNotServed(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss"}})
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}, HostManagers: []tenancy.UserKey{"boss"}})
	workers, live := newWorkers(t, node, tenancy.BuildFirst)
	cache, err := tenancy.NewCache[string, string](node, tenancy.CacheConfig{Size: 10})
	if err != nil {
		t.Fatal(err)
	}
	enter := func(tn *tenancy.Tenancy, id tenancy.ID) context.Context {
		t.Helper()
		ctx, err := tn.Enter(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return ctx
	}
	ways := map[string]func(ctx context.Context) error{
		"exec":  func(ctx context.Context) error { return second(node.DB().Exec(ctx, `SELECT 1`)) },
		"query": func(ctx context.Context) error { return second(node.DB().Query(ctx, `SELECT 1`)) },
		"row":   func(ctx context.Context) error { return node.DB().QueryRow(ctx, `SELECT 1`).Scan(new(int)) },
		"begin": func(ctx context.Context) error { return second(node.DB().Begin(ctx)) },
		"batch": func(ctx context.Context) error {
			b := &pgx.Batch{}
			b.Queue(`SELECT 1`)
			return node.DB().SendBatch(ctx, b).Close()
		},
		"in_tx": func(ctx context.Context) error {
			return node.DB().InTx(ctx, pgx.TxOptions{}, func(context.Context, pgx.Tx) error { return nil })
		},
		"conn": func(ctx context.Context) error {
			return node.DB().WithConn(ctx, func(context.Context, *pgx.Conn) error { return nil })
		},
		"registry": func(ctx context.Context) error { return workers.Use(ctx, func(*worker) error { return nil }) },
		"acquire": func(ctx context.Context) error {
			l, err := workers.Acquire(ctx)
			if err == nil {
				l.Release()
			}
			return err
		},
		"cache": func(ctx context.Context) error {
			return second(cache.Get(ctx, "key", func(context.Context, string) (string, error) {
				return "loaded", nil
			}))
		},
		"forget": func(ctx context.Context) error { return cache.Forget(ctx, "key") },
		"check":  func(ctx context.Context) error { return node.Check(ctx) },
	}
	admin := f.Admin(t, "tenants")
	sessions := func(id tenancy.ID) string {
		return fmt.Sprint(scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, placeOf(t, f, id).Login))
	}
	refused := func(t *testing.T, id tenancy.ID, contexts map[string]context.Context) {
		t.Helper()
		wantError(t, second(node.Enter(t.Context(), id)), tenancy.ErrNotServed)
		boss, err := node.Resolve(t.Context(), tenancy.Query{User: "boss"})
		if err != nil {
			t.Fatal(err)
		}
		wantError(t, second(node.Impersonate(boss, id, tenancy.Visit{Reason: "a test"})), tenancy.ErrNotServed)
		for from, ctx := range contexts {
			for way, try := range ways {
				if err := try(ctx); !errors.Is(err, tenancy.ErrNotServed) {
					t.Errorf("%s with a context %s: %v", way, from, err)
				}
			}
		}
		wantError(t, tenancy.Buildable(t.Context(), node, id), tenancy.ErrNotServed)
		until(t, 5*time.Second, "false", func() string { return fmt.Sprint(slices.Contains(tenancy.PooledTenants(node), id)) })
		until(t, 5*time.Second, "0", func() string { return sessions(id) })
	}

	// A tenant that this node never served: contexts of it come from another node alone.
	if n := sessions(globex.ID); n != "0" {
		t.Fatalf("%s sessions before anybody asked", n)
	}
	refused(t, globex.ID, map[string]context.Context{"of_another_node": enter(tn, globex.ID)})
	if rows := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.audit WHERE action = 'impersonate'`); rows != 0 {
		t.Errorf("%d visits are recorded that did not take place", rows)
	}

	// One that it served until a moment ago: contexts, pools and values of it are there.
	ctx, cancel := context.WithCancel(t.Context())
	inTenant, err := node.Enter(ctx, acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	for way, try := range ways {
		if way == "begin" || way == "query" { // what they return would have to be ended
			continue
		}
		if err := try(inTenant); err != nil {
			t.Fatalf("%s before the rename: %v", way, err)
		}
	}
	if err := ways["exec"](inTenant); err != nil { // after "conn", which ends the connection that it got
		t.Fatal(err)
	}
	if !slices.Contains(tenancy.PooledTenants(node), acme.ID) || sessions(acme.ID) == "0" || live.Load() != 1 {
		t.Fatal("nothing is open: there is nothing to end")
	}
	detached := tenancy.Detach(inTenant)
	cancel()
	if err := tn.Catalog().Rename(t.Context(), acme.ID, "acme-2"); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "true", func() string { return fmt.Sprint(errors.Is(node.Check(detached), tenancy.ErrNotServed)) })
	refused(t, acme.ID, map[string]context.Context{"detached": detached})
	until(t, 5*time.Second, "0", func() string { return fmt.Sprint(live.Load()) })
}

// TestARenameMovesATenantBetweenNodes: the list holds names, so names decide, without a restart.
func TestARenameMovesATenantBetweenNodes(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	c := tn.Catalog()
	acme, globex := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	for user, id := range map[tenancy.UserKey]tenancy.ID{"alice": acme.ID, "bob": globex.ID} {
		if err := c.AddMember(t.Context(), tenancy.Membership{User: user, Tenant: id}); err != nil {
			t.Fatal(err)
		}
	}
	notes := func(user tenancy.UserKey) string { // whose notes the user reads at the node
		ctx, err := node.Resolve(t.Context(), tenancy.Query{User: user})
		if err != nil {
			return class(err)
		}
		var of string
		if err := node.DB().QueryRow(ctx, `SELECT string_agg(tenant, ',') FROM notes`).Scan(&of); err != nil {
			return class(err)
		}
		return of
	}
	notServed := func(user tenancy.UserKey) string {
		_, err := node.Resolve(t.Context(), tenancy.Query{User: user})
		return fmt.Sprint(errors.Is(err, tenancy.ErrNotServed))
	}
	until(t, 5*time.Second, "acme", func() string { return notes("alice") })
	until(t, 5*time.Second, "true", func() string { return notServed("bob") })

	// The names change hands: the data stays with its tenant.
	for _, step := range []struct {
		id   tenancy.ID
		name string
	}{{acme.ID, "acme-2"}, {globex.ID, "acme"}} {
		if err := c.Rename(t.Context(), step.id, step.name); err != nil {
			t.Fatal(err)
		}
	}
	until(t, 5*time.Second, "globex", func() string { return notes("bob") })
	until(t, 5*time.Second, "true", func() string { return notServed("alice") })

	if err := c.Rename(t.Context(), globex.ID, "globex"); err != nil {
		t.Fatal(err)
	}
	if err := c.Rename(t.Context(), acme.ID, "acme"); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "acme", func() string { return notes("alice") })
	until(t, 5*time.Second, "true", func() string { return notServed("bob") })
}

// TestTheChoicesOfAUserIncludeTenantsOfOtherNodes: they can be chosen, and then the answer says where.
func TestTheChoicesOfAUserIncludeTenantsOfOtherNodes(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	for _, id := range []tenancy.ID{acme.ID, globex.ID} {
		if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: id}); err != nil {
			t.Fatal(err)
		}
	}
	must(t, f.Admin(t, "primary"), `UPDATE tenancy.memberships SET is_default = false WHERE user_key = 'carol'`)
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	_, err := node.Resolve(t.Context(), tenancy.Query{User: "carol"})
	e, ok := errors.AsType[*tenancy.AmbiguousError](err)
	if !ok || len(e.Tenants) != 2 {
		t.Errorf("got %v, want both tenants to choose from", err)
	}
}

// TestTheJobOfANodeLeavesTheTenantsOfOthersAlone: what a crash left is finished by a node that serves the
// tenant, and by any where none does.
func TestTheJobOfANodeLeavesTheTenantsOfOthersAlone(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, primary, admin := tn.Catalog(), f.Admin(t, "primary"), f.Admin(t, "tenants")
	initech := tenancytest.Create(t, tn, "initech")
	place, err := c.Prepare(t.Context(), globex.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []tenancy.ID{acme.ID, globex.ID, initech.ID} {
		if err := c.Suspend(t.Context(), id, tenancy.Suspension{}); err != nil {
			t.Fatal(err)
		}
	}
	// All three die in a Resume after the login was opened, and the place for globex in a DropPlace, an hour and more ago.
	must(t, primary, `CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$`)
	must(t, primary, `CREATE TRIGGER refuse BEFORE UPDATE ON tenancy.tenants FOR EACH ROW WHEN (NEW.state = 'active') EXECUTE FUNCTION public.refuse()`)
	for _, id := range []tenancy.ID{acme.ID, globex.ID, initech.ID} {
		if err := c.Resume(t.Context(), id); err == nil {
			t.Fatal("the Resume succeeded")
		}
	}
	must(t, primary, `UPDATE tenancy.tenants SET updated = updated - interval '2 hours'`)
	must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent', updated = updated - interval '2 hours' WHERE schema = $1`, place.Schema)
	open := func(id tenancy.ID) bool {
		t.Helper()
		return scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, placeOf(t, f, id).Login)
	}
	unfinished := func() bool {
		t.Helper()
		return scan[bool](t, admin, `SELECT count(*) = 1 FROM pg_namespace WHERE nspname = $1`, place.Schema)
	}
	if !open(acme.ID) || !open(globex.ID) || !open(initech.ID) || !unfinished() {
		t.Fatal("nothing is left half-done: there is nothing to finish")
	}
	if err := tn.Close(); err != nil { // it served every tenant
		t.Fatal(err)
	}
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	other := f.Open(t, tenancy.Config{OnlyTenants: []string{"globex"}})
	refresh := func(tn *tenancy.Tenancy) {
		t.Helper()
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	refresh(node)
	if open(acme.ID) {
		t.Error("the login of a tenant that the node serves is still open")
	}
	if open(initech.ID) {
		t.Error("the login of a tenant that nobody serves is still open")
	}
	if !open(globex.ID) || !unfinished() {
		t.Error("the node finished what another one that lives has to finish")
	}

	// A node that fell silent is waited for a minute.
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	must(t, primary, `INSERT INTO tenancy.nodes (id, name, epoch, serves, seen) SELECT gen_random_uuid(), 'silent', epoch + 1000, '{globex}', now() - interval '30 s' FROM tenancy.epoch`)
	refresh(node)
	if !open(globex.ID) || !unfinished() {
		t.Error("the node finished what one that is silent for half a minute may still finish")
	}
	again := f.Open(t, tenancy.Config{OnlyTenants: []string{"globex"}})
	refresh(again)
	if open(globex.ID) || unfinished() {
		t.Error("the node that serves the tenant did not finish")
	}
}

// TestTheJobFinishesForANodeThatDied is the end of the minute, and the node that serves all.
func TestTheJobFinishesForANodeThatDied(t *testing.T) {
	t.Parallel()
	for name, only := range map[string][]string{"another_tenants_node": {"acme"}, "node_of_all": nil, "node_of_an_empty_list": {}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, tn, _, globex := twoTenants(t, tenancy.Config{})
			primary := f.Admin(t, "primary")
			must(t, primary, `UPDATE tenancy.tenants SET state = 'suspended', updated = updated - interval '1 hour' WHERE id = $1`, globex.ID)
			if err := tn.Close(); err != nil {
				t.Fatal(err)
			}
			silence := "61 s" // a node of all finishes anything at any time
			if len(only) == 0 {
				silence = "1 s"
			}
			must(t, primary, `INSERT INTO tenancy.nodes (id, name, epoch, serves, seen) SELECT gen_random_uuid(), 'dead', epoch + 1000, '{globex}', now() - $1::interval FROM tenancy.epoch`, silence)
			if err := f.Open(t, tenancy.Config{OnlyTenants: only}).Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			if scan[bool](t, f.Admin(t, "tenants"), `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, placeOf(t, f, globex.ID).Login) {
				t.Error("the login is still open")
			}
		})
	}
}

func TestSettingsOfANodeAreChecked(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	for name, step := range map[string]struct {
		cfg  tenancy.Config
		says string // "": accepted
	}{
		"upper_case_name":       {tenancy.Config{OnlyTenants: []string{"acme", "Globex"}}, "Config.OnlyTenants[1]"},
		"empty_name":            {tenancy.Config{OnlyTenants: []string{""}}, "Config.OnlyTenants[0]"},
		"name_with_a_quote":     {tenancy.Config{OnlyTenants: []string{"a'b"}}, "Config.OnlyTenants[0]"},
		"single_and_only":       {tenancy.Config{SingleTenant: "acme", OnlyTenants: []string{"acme"}}, "give one of them"},
		"address_with_a_space":  {tenancy.Config{NodeAddress: "10.0.0.1 :80"}, "Config.NodeAddress"},
		"address_with_a_comma":  {tenancy.Config{NodeAddress: "10.0.0.1:80,10.0.0.2:80"}, "Config.NodeAddress"},
		"address_with_a_quote":  {tenancy.Config{NodeAddress: `"10.0.0.1:80"`}, "Config.NodeAddress"},
		"address_with_a_line":   {tenancy.Config{NodeAddress: "10.0.0.1:80\r\nSet-Cookie: a=b"}, "Config.NodeAddress"},
		"address_beyond_ascii":  {tenancy.Config{NodeAddress: "nöde:80"}, "Config.NodeAddress"},
		"address_of_256_bytes":  {tenancy.Config{NodeAddress: strings.Repeat("a", 256)}, "Config.NodeAddress"},
		"address_of_255_bytes":  {tenancy.Config{NodeAddress: strings.Repeat("a", 255)}, ""},
		"tenants_not_yet_there": {tenancy.Config{OnlyTenants: []string{"not-yet"}, NodeAddress: "[fd00::1]:8080"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			step.cfg.PrimaryURL, step.cfg.Keys = f.PrimaryURL, f.Keys
			tn, err := tenancy.Open(t.Context(), step.cfg)
			if err == nil {
				if err := tn.Close(); err != nil {
					t.Error(err)
				}
			}
			if step.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, tenancy.ErrInvalid, step.says)
		})
	}
}

// TestOpenCopiesTheTenantsOfANode: what the caller does with the list afterwards changes nothing.
func TestOpenCopiesTheTenantsOfANode(t *testing.T) {
	t.Parallel()
	f, _, acme, globex := twoTenants(t, tenancy.Config{})
	only := []string{"acme"}
	node := f.Open(t, tenancy.Config{OnlyTenants: only})
	only[0] = "globex"
	if _, err := node.Enter(t.Context(), acme.ID); err != nil {
		t.Error(err)
	}
	wantError(t, second(node.Enter(t.Context(), globex.ID)), tenancy.ErrNotServed)
}

func TestTheEnvironmentSaysWhatANodeServes(t *testing.T) {
	key, err := tenancy.NewKey("test")
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"TENANCY_PRIMARY_URL": "postgres://u@127.0.0.1:1/db", "TENANCY_KEYS": key,
		"TENANCY_ONLY_TENANTS": " acme, ,globex,", "TENANCY_NODE_ADDRESS": "10.0.0.7:8080",
	} {
		t.Setenv(name, value)
	}
	cfg, err := tenancy.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(cfg.OnlyTenants, []string{"acme", "globex"}) || cfg.NodeAddress != "10.0.0.7:8080" {
		t.Errorf("got %q and %q", cfg.OnlyTenants, cfg.NodeAddress)
	}
	t.Setenv("TENANCY_ONLY_TENANTS", " , ")
	t.Setenv("TENANCY_NODE_ADDRESS", "")
	if cfg, err = tenancy.FromEnv(); err != nil || cfg.OnlyTenants != nil || cfg.NodeAddress != "" {
		t.Errorf("nothing is said: got %q and %q, %v", cfg.OnlyTenants, cfg.NodeAddress, err)
	}
}

// TestANodeThatWasStartedAnewIsNamedOnce: the one that was killed is on the list for a while.
func TestANodeThatWasStartedAnewIsNamedOnce(t *testing.T) {
	t.Parallel()
	f, _, _, globex := twoTenants(t, tenancy.Config{})
	must(t, f.Admin(t, "primary"), `INSERT INTO tenancy.nodes (id, name, epoch, serves, address) SELECT gen_random_uuid(), 'before', epoch + 1000, '{globex}', '10.0.0.2:80' FROM tenancy.epoch`)
	f.Open(t, tenancy.Config{OnlyTenants: []string{"globex"}, NodeAddress: "10.0.0.2:80"})
	_, err := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}}).Resolve(t.Context(), tenancy.Query{User: "bob@globex.test"})
	if got := namedBy(t, err, globex.ID); got != "10.0.0.2:80" {
		t.Errorf("named %q", got)
	}
}

func TestAnEmptyListOfTenantsIsNone(t *testing.T) {
	t.Parallel()
	f, _, _, globex := twoTenants(t, tenancy.Config{})
	all := f.Open(t, tenancy.Config{OnlyTenants: []string{}, NodeAddress: "10.0.0.2:80"})
	if _, err := all.Enter(t.Context(), globex.ID); err != nil {
		t.Error(err)
	}
	_, err := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}}).Resolve(t.Context(), tenancy.Query{User: "bob@globex.test"})
	if got := namedBy(t, err, globex.ID); got != "10.0.0.2:80" {
		t.Errorf("named %q", got)
	}
}

func TestAContextOfAnotherNodeIsJudgedHere(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}})
	globex := tenancytest.Create(t, tn, "globex")
	until(t, 3*time.Second, "true", func() string {
		return fmt.Sprint(errors.Is(second(node.Enter(t.Context(), globex.ID)), tenancy.ErrNotServed))
	})
	ctx, err := tn.Enter(t.Context(), globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := tenancy.NewCache[string, string](node, tenancy.CacheConfig{Size: 10})
	if err != nil {
		t.Fatal(err)
	}
	_, err = cache.Get(ctx, "key", func(context.Context, string) (string, error) { return "loaded", nil })
	wantError(t, err, tenancy.ErrNotServed)
	wantError(t, node.Check(ctx), tenancy.ErrNotServed)
}

func TestANodeIsNamedOnceAndNeverByItself(t *testing.T) {
	t.Parallel()
	f, _, _, globex := twoTenants(t, tenancy.Config{})
	// A node that died a moment ago, and the one that was started in its place, with another list or the same.
	must(t, f.Admin(t, "primary"), `INSERT INTO tenancy.nodes (id, name, epoch, serves, address) SELECT gen_random_uuid(), 'before', epoch + 1000, '{globex}', unnest('{10.0.0.1:80,10.0.0.2:80}'::text[]) FROM tenancy.epoch`)
	f.Open(t, tenancy.Config{OnlyTenants: []string{"globex"}, NodeAddress: "10.0.0.2:80"})
	node := f.Open(t, tenancy.Config{OnlyTenants: []string{"acme"}, NodeAddress: "10.0.0.1:80"})
	_, err := node.Resolve(t.Context(), tenancy.Query{User: "bob@globex.test"})
	if got := namedBy(t, err, globex.ID); got != "10.0.0.2:80" {
		t.Errorf("named %q", got)
	}
}
