package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// resolved is the context of a user's request.
func resolved(tb testing.TB, tn *tenancy.Tenancy, user tenancy.UserKey, hints ...tenancy.Hint) context.Context {
	tb.Helper()
	ctx, err := tn.Resolve(tb.Context(), tenancy.Query{User: user, Hints: hints})
	if err != nil {
		tb.Fatal(err)
	}
	return ctx
}

func sessionIn(tb testing.TB, ctx context.Context) tenancy.Session {
	tb.Helper()
	s, ok := tenancy.FromContext(ctx)
	if !ok {
		tb.Fatal("no session on the context")
	}
	return s
}

func tenantIn(tb testing.TB, ctx context.Context) string {
	tb.Helper()
	t, err := tenancy.TenantFrom(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	return t.Name
}

func TestASessionIsInOneOfFourStates(t *testing.T) {
	t.Parallel()
	_, tn, acme, _ := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss", "both"}})
	if err := tn.Catalog().AddMember(t.Context(), tenancy.Membership{User: "both", Tenant: acme.ID}); err != nil {
		t.Fatal(err)
	}
	at := tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "acme.example.com"}
	boss := resolved(t, tn, "boss")
	visit, err := tn.Impersonate(boss, acme.ID, tenancy.Visit{Reason: "ticket 7"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		ctx     context.Context
		caller  tenancy.Caller
		host    bool
		manager bool
	}{
		{"nobody", resolved(t, tn, ""), tenancy.Anonymous, true, false},
		{"nobody_at_a_place", resolved(t, tn, "", at), tenancy.TenantGuest, false, false},
		{"member", resolved(t, tn, "alice@acme.test"), tenancy.TenantUser, false, false},
		{"manager", boss, tenancy.HostUser, true, true},
		{"manager_who_is_a_member", resolved(t, tn, "both"), tenancy.TenantUser, false, true},
		{"the_same_as_host", tenancy.AsHost(resolved(t, tn, "both")), tenancy.HostUser, true, true},
		{"member_as_host_is_no_host_user", tenancy.AsHost(resolved(t, tn, "alice@acme.test")), tenancy.Anonymous, true, false},
		{"manager_on_a_visit", visit, tenancy.TenantUser, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := sessionIn(t, tt.ctx)
			if s.Caller() != tt.caller || s.IsHost() != tt.host || s.IsManager() != tt.manager {
				t.Errorf("got %v, host %v, manager %v; want %v, %v, %v", s.Caller(), s.IsHost(), s.IsManager(), tt.caller, tt.host, tt.manager)
			}
		})
	}
	if s := (tenancy.Session{}); s.Caller() != tenancy.Anonymous || s.IsManager() {
		t.Errorf("the zero session is %v", s.Caller())
	}
}

// TestSwitchingIsNestedAndEndsWithItsScope: what a callee entered does not stay with the caller.
func TestSwitchingIsNestedAndEndsWithItsScope(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{})
	alice := resolved(t, tn, "alice@acme.test")
	inner, err := tn.Enter(alice, globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	host := tenancy.AsHost(inner)
	innermost, err := tn.Enter(host, acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	schema := func(ctx context.Context) (s string) {
		t.Helper()
		if err := tn.DB().QueryRow(ctx, `SELECT current_schema()`).Scan(&s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if tenantIn(t, alice) != "acme" || tenantIn(t, inner) != "globex" || tenantIn(t, innermost) != "acme" {
		t.Error("a switch reached another scope")
	}
	if _, err := tn.DB().Exec(host, `SELECT 1`); !errors.Is(err, tenancy.ErrNoTenant) {
		t.Errorf("as host: %v, want ErrNoTenant", err)
	}
	if a, g := schema(alice), schema(inner); a == g || schema(innermost) != a {
		t.Errorf("schemas: alice's %s, entered %s", a, g)
	}
	if s := sessionIn(t, inner); s.User() != "alice@acme.test" || s.Role() != "" || s.Source() != "enter" {
		t.Errorf("entered as %v", s)
	}
}

func TestInTxRefusesASwitch(t *testing.T) {
	t.Parallel()
	_, tn, acme, globex := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss"}})
	alice := resolved(t, tn, "alice@acme.test")
	err := tn.DB().InTx(alice, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		for name, try := range map[string]func() error{
			"enter":             func() error { return second(tn.Enter(ctx, globex.ID)) },
			"resolve_another":   func() error { return second(tn.Resolve(ctx, tenancy.Query{User: "bob@globex.test"})) },
			"resolve_the_host":  func() error { return second(tn.Resolve(ctx, tenancy.Query{User: "boss"})) },
			"as_host":           func() error { return second(tn.DB().Exec(tenancy.AsHost(ctx), `SELECT 1`)) },
			"as_host_host_data": func() error { return second(tn.Host().Exec(tenancy.AsHost(ctx), `SELECT 1`)) },
			"tenant_from":       func() error { return second(tenancy.TenantFrom(tenancy.AsHost(ctx))) },
			"enter_as_host":     func() error { return second(tn.Enter(tenancy.AsHost(ctx), globex.ID)) },
		} {
			wantError(t, try(), tenancy.ErrTenantMismatch, "a transaction is open")
			_ = name
		}
		same, err := tn.Enter(ctx, acme.ID) // no switch
		if err != nil {
			return err
		}
		if _, err := tx.Exec(same, `SELECT 1`); err != nil {
			return err
		}
		// A detached job is not inside.
		if _, err := tn.Enter(tenancy.Detach(ctx), globex.ID); err != nil {
			t.Errorf("detached: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tn.Enter(alice, globex.ID); err != nil {
		t.Errorf("after the transaction: %v", err)
	}
	boss := resolved(t, tn, "boss")
	err = tn.DB().InTx(alice, pgx.TxOptions{}, func(ctx context.Context, _ pgx.Tx) error {
		return second(tn.Impersonate(insideOf(boss, ctx), globex.ID, tenancy.Visit{Reason: "ticket 8"}))
	})
	wantError(t, err, tenancy.ErrTenantMismatch)
}

// insideOf is ctx with the values of another under it.
func insideOf(ctx, other context.Context) context.Context { return valuesOf{ctx, other} }

type valuesOf struct {
	context.Context
	other context.Context
}

func (v valuesOf) Value(key any) any {
	if x := v.Context.Value(key); x != nil {
		return x
	}
	return v.other.Value(key)
}

func TestAHostManagerVisitsATenantOnTheRecord(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	f, tn, acme, globex := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss"}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	boss := resolved(t, tn, "boss")
	until := time.Now().Add(time.Second).Truncate(time.Millisecond)
	ctx, err := tn.Impersonate(boss, acme.ID, tenancy.Visit{Reason: "ticket 7: cannot log in", Until: until, Role: tenancy.RoleAdmin})
	if err != nil {
		t.Fatal(err)
	}
	s := sessionIn(t, ctx)
	if v, ok := s.Visit(); !ok || v.Reason != "ticket 7: cannot log in" || !v.Until.Equal(until) || s.User() != "boss" || s.Role() != tenancy.RoleAdmin || tenantIn(t, ctx) != "acme" {
		t.Errorf("the session: %v", s)
	}
	if text := fmt.Sprintf("%+v", ctx); !strings.Contains(text, "on a visit until") || !strings.Contains(text, "ticket 7") {
		t.Errorf("printed: %s", text)
	}
	primary := f.Admin(t, "primary")
	if got := scan[string](t, primary, `SELECT actor || ' ' || tenant || ' ' || (detail->>'reason') FROM tenancy.audit WHERE action = 'impersonate'`); got != fmt.Sprintf("boss %d ticket 7: cannot log in", acme.ID) {
		t.Errorf("audit: %q", got)
	}
	if !strings.Contains(log.String(), "a host manager enters a tenant") || !strings.Contains(log.String(), "ticket 7") {
		t.Errorf("log: %s", log.String())
	}
	if err := tn.DB().QueryRow(ctx, `SELECT 1`).Scan(new(int)); err != nil {
		t.Error(err)
	}
	if err := tn.Check(ctx); err != nil {
		t.Error(err)
	}
	// What is done on a visit says so.
	if err := tn.Catalog().AddMember(ctx, tenancy.Membership{User: "new", Tenant: acme.ID}); err != nil {
		t.Fatal(err)
	}
	if got := scan[string](t, primary, `SELECT detail->>'visit' FROM tenancy.audit WHERE action = 'add member' AND actor = 'boss'`); got != "ticket 7: cannot log in" {
		t.Errorf("audit of a change on a visit: %q", got)
	}
	// A visit goes on in what is entered from it, and in a transaction, and ends there too.
	entered, err := tn.Enter(ctx, globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	savepoint, err := tx.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(until))
	if err := errors.Join(second(savepoint.Exec(t.Context(), `SELECT 1`)), second(tx.Exec(t.Context(), `SELECT 1`))); !errors.Is(err, tenancy.ErrForbidden) {
		t.Errorf("a transaction that was begun on the visit: %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Errorf("its end: %v", err)
	}
	if n := scan[int](t, primary, `SELECT count(*) FROM tenancy.tenants WHERE name = 'late'`); n != 0 {
		t.Error("a tenant was begun after the visit")
	}
	for _, err := range []error{second(tn.DB().Exec(entered, `SELECT 1`)), tn.Check(entered), second(tn.Enter(ctx, acme.ID)), second(tn.Session(ctx)),
		tn.Catalog().AddMember(ctx, tenancy.Membership{User: "late", Tenant: acme.ID}), tn.Catalog().Suspend(ctx, acme.ID, tenancy.Suspension{}),
		second(tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "late"})), second(tn.Catalog().Prepare(ctx, 0, "")), second(tn.Catalog().RotateKeys(ctx)),
		second(tn.Catalog().SyncMembers(ctx, "ldap", []tenancy.Membership{{User: "late", Tenant: globex.ID}})), second(tn.Host().Exec(ctx, `SELECT 1`)),
		second(tn.DB().Exec(ctx, `SELECT 1`)), second(tn.DB().Exec(tenancy.Detach(ctx), `SELECT 1`)), tn.Check(ctx)} {
		wantError(t, err, tenancy.ErrForbidden, "the visit ended")
	}
	if tenantIn(t, ctx) != "acme" || sessionIn(t, boss).Caller() != tenancy.HostUser {
		t.Error("the end of the visit changed a session")
	}

	for name, try := range map[string]struct {
		ctx   context.Context
		id    tenancy.ID
		visit tenancy.Visit
		err   error
	}{
		"a_member":              {resolved(t, tn, "alice@acme.test"), globex.ID, tenancy.Visit{Reason: "x"}, tenancy.ErrForbidden},
		"a_member_as_host":      {tenancy.AsHost(resolved(t, tn, "alice@acme.test")), globex.ID, tenancy.Visit{Reason: "x"}, tenancy.ErrForbidden},
		"nobody":                {resolved(t, tn, ""), globex.ID, tenancy.Visit{Reason: "x"}, tenancy.ErrForbidden},
		"no_session":            {t.Context(), globex.ID, tenancy.Visit{Reason: "x"}, tenancy.ErrForbidden},
		"no_reason":             {boss, globex.ID, tenancy.Visit{Reason: " "}, tenancy.ErrInvalid},
		"a_reason_of_two_lines": {boss, globex.ID, tenancy.Visit{Reason: "x\ny"}, tenancy.ErrInvalid},
		"over_already":          {boss, globex.ID, tenancy.Visit{Reason: "x", Until: time.Now().Add(-time.Second)}, tenancy.ErrInvalid},
		"too_long":              {boss, globex.ID, tenancy.Visit{Reason: "x", Until: time.Now().Add(25 * time.Hour)}, tenancy.ErrInvalid},
		"an_unknown_role":       {boss, globex.ID, tenancy.Visit{Reason: "x", Role: "king"}, tenancy.ErrInvalid},
		"a_missing_tenant":      {boss, 4711, tenancy.Visit{Reason: "x"}, tenancy.ErrTenantNotFound},
	} {
		if _, err := tn.Impersonate(try.ctx, try.id, try.visit); !errors.Is(err, try.err) {
			t.Errorf("%s: got %v, want %v", name, err, try.err)
		}
	}
	if err := tn.Catalog().Suspend(t.Context(), globex.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if _, err := tn.Impersonate(boss, globex.ID, tenancy.Visit{Reason: "x"}); !errors.Is(err, tenancy.ErrTenantSuspended) {
		t.Errorf("a suspended tenant: %v", err)
	}
	if n := scan[int](t, primary, `SELECT count(*) FROM tenancy.audit WHERE action = 'impersonate'`); n != 1 {
		t.Errorf("%d visits on the record, want 1", n)
	}
}

// TestASessionIsGoodForItsPrimaryAlone: a manager of one fleet is nobody in another that runs in the same process.
func TestASessionIsGoodForItsPrimaryAlone(t *testing.T) {
	t.Parallel()
	_, a, _, _ := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss"}})
	_, b, _, _ := twoTenants(t, tenancy.Config{})
	boss := resolved(t, a, "boss")
	for name, ctx := range map[string]context.Context{"manager": boss, "as_host": tenancy.AsHost(boss), "member": resolved(t, a, "alice@acme.test")} {
		if _, err := a.Session(ctx); err != nil {
			t.Errorf("%s at home: %v", name, err)
		}
		wantError(t, second(b.Session(ctx)), tenancy.ErrTenantMismatch)
		wantError(t, b.Check(ctx), tenancy.ErrTenantMismatch)
		wantError(t, second(b.Impersonate(ctx, 1, tenancy.Visit{Reason: "x"})), tenancy.ErrForbidden)
		entered, err := b.Enter(ctx, 1)
		if err != nil {
			t.Fatal(err)
		}
		if sessionIn(t, entered).IsManager() {
			t.Errorf("%s: entering made a manager", name)
		}
	}
	// IDs are small numbers, and both fleets have a tenant 1.
	one, err := a.Enter(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := tenancy.NewCache[string, string](a, tenancy.CacheConfig{Size: 1})
	if err != nil {
		t.Fatal(err)
	}
	registry, err := tenancy.NewRegistry(a, tenancy.RegistryConfig[string]{Build: func(ctx context.Context, _ tenancy.Tenant) (string, error) {
		return "", errors.Join(second(a.Session(ctx)), a.Check(ctx))
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cache.Get(one, "", func(ctx context.Context, _ string) (string, error) {
		return "", errors.Join(second(a.Session(ctx)), a.Check(ctx))
	}); err != nil {
		t.Errorf("a session of a cache's load: %v", err)
	}
	if err := registry.Use(one, func(string) error { return nil }); err != nil {
		t.Errorf("a session of a registry's build: %v", err)
	}
	err = a.DB().InTx(one, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		wantError(t, second(tx.Exec(tenancy.AsHost(ctx), `SELECT 1`)), tenancy.ErrTenantMismatch, "a transaction is open")
		return second(b.Enter(ctx, 1))
	})
	wantError(t, err, tenancy.ErrTenantMismatch, "a transaction is open")
}

// TestAContradictoryResolverIsRefused: neither a tenant's session that is a manager's nor a guest with a role.
func TestAContradictoryResolverIsRefused(t *testing.T) {
	t.Parallel()
	_, tn, acme, _ := twoTenants(t, tenancy.Config{WrapResolver: func(tenancy.TenantResolver) tenancy.TenantResolver {
		return tenancy.TenantResolverFunc(func(_ context.Context, q tenancy.Query) (tenancy.Resolution, error) {
			return tenancy.Resolution{Tenant: 1, Role: tenancy.RoleAdmin, Host: q.User != ""}, nil
		})
	}})
	_, err := tn.Resolve(t.Context(), tenancy.Query{User: "x"})
	wantError(t, err, tenancy.ErrForbidden)
	if s := sessionIn(t, resolved(t, tn, "")); s.Role() != "" || s.Caller() != tenancy.TenantGuest || acme.ID == 0 {
		t.Errorf("a guest with a role: %v", s)
	}
}

func TestAStreamEndsWithItsMembership(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{HostManagers: []tenancy.UserKey{"boss"}})
	other := f.Open(t, tenancy.Config{})
	c := other.Catalog() // another node makes the changes
	for _, m := range []tenancy.Membership{{User: "carol", Tenant: acme.ID, Role: tenancy.RoleAdmin}, {User: "carol", Tenant: globex.ID}} {
		if err := c.AddMember(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	carol := resolved(t, tn, "carol")
	bob := resolved(t, tn, "bob@globex.test")
	guest := resolved(t, tn, "", tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "acme.example.com"})
	work, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]context.Context{"carol": carol, "bob": bob, "guest": guest, "work": work, "boss": resolved(t, tn, "boss"), "nobody": resolved(t, tn, "")}
	for name, ctx := range all {
		if err := tn.Check(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantError(t, tn.Check(t.Context()), tenancy.ErrNoTenant, "no session")
	left, leave := context.WithCancel(carol)
	leave()
	wantError(t, tn.Check(left), context.Canceled) // a stream whose reader is gone
	loads := tenancy.UserLoads(tn)
	for range 1000 {
		if err := tn.Check(carol); err != nil {
			t.Fatal(err)
		}
	}
	if n := tenancy.UserLoads(tn) - loads; n != 0 {
		t.Errorf("1,000 checks asked the primary %d times", n)
	}

	checked := func(ctx context.Context) func() string {
		return func() string {
			if err := tn.Check(ctx); err != nil {
				return class(err)
			}
			return "goes on"
		}
	}
	// Another default, and a rename, are no reason to end.
	if err := c.SetDefault(t.Context(), "carol", globex.ID); err != nil {
		t.Fatal(err)
	}
	if err := c.Rename(t.Context(), acme.ID, "acme-2"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	if got := checked(carol)(); got != "goes on" {
		t.Errorf("another default and name: %s", got)
	}
	// A lower role is.
	if err := c.AddMember(t.Context(), tenancy.Membership{User: "carol", Tenant: acme.ID, Role: tenancy.RoleMember}); err != nil {
		t.Fatal(err)
	}
	until(t, 2*time.Second, class(tenancy.ErrForbidden), checked(carol))
	carol = resolved(t, tn, "carol", tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "acme-2"})
	if got := checked(carol)(); got != "goes on" {
		t.Errorf("resolved anew: %s", got)
	}
	if err := c.RemoveMember(t.Context(), acme.ID, "carol"); err != nil {
		t.Fatal(err)
	}
	until(t, 2*time.Second, class(tenancy.ErrForbidden), checked(carol))
	if got := checked(bob)(); got != "goes on" {
		t.Errorf("bob: %s", got)
	}
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	until(t, 2*time.Second, class(tenancy.ErrTenantSuspended), checked(guest))
	until(t, 2*time.Second, class(tenancy.ErrTenantSuspended), checked(work))
	// A stream that ended is no attempt at another's tenant.
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.audit WHERE action = 'refused hint'`); n != 0 {
		t.Errorf("%d refused hints on the record, want 0", n)
	}
}

// TestCheckAsksTheServicesResolver: membership is what the resolver says, wherever it has it from.
func TestCheckAsksTheServicesResolver(t *testing.T) {
	t.Parallel()
	var gone, host atomic.Bool
	host.Store(true)
	_, tn, acme, _ := twoTenants(t, tenancy.Config{WrapResolver: func(next tenancy.TenantResolver) tenancy.TenantResolver {
		return tenancy.TenantResolverFunc(func(ctx context.Context, q tenancy.Query) (tenancy.Resolution, error) {
			switch {
			case q.User == "robot" && gone.Load():
				return tenancy.Resolution{}, tenancy.ErrForbidden
			case q.User == "robot":
				return tenancy.Resolution{Tenant: 1, Role: "robot", Source: "robots"}, nil
			case q.User == "staff":
				return tenancy.Resolution{Host: host.Load()}, nil
			}
			return next.ResolveTenant(ctx, q)
		})
	}})
	robot, staff := resolved(t, tn, "robot"), resolved(t, tn, "staff")
	if s := sessionIn(t, staff); s.Caller() != tenancy.HostUser {
		t.Errorf("staff is %v", s.Caller())
	}
	if err := errors.Join(tn.Check(robot), tn.Check(staff)); err != nil || tenantIn(t, robot) == "" {
		t.Error(err)
	}
	if _, err := tn.Impersonate(staff, acme.ID, tenancy.Visit{Reason: "x"}); err != nil {
		t.Errorf("a host user by the resolver's word: %v", err)
	}
	gone.Store(true)
	host.Store(false)
	wantError(t, tn.Check(robot), tenancy.ErrForbidden)
	wantError(t, tn.Check(staff), tenancy.ErrForbidden)
}
