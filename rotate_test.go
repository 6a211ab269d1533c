package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"github.com/msmt-go/tenancy/primary"
	"github.com/msmt-go/tenancy/tenancytest"
)

// loginsOf are the logins of a place that the server has, in order.
func loginsOf(t *testing.T, admin *pgx.Conn, place string) []string {
	t.Helper()
	return scan[[]string](t, admin, `SELECT coalesce(array_agg(rolname::text ORDER BY rolname), '{}') FROM pg_roles WHERE starts_with(rolname, $1)`, place+"_l")
}

// wantOneLogin checks past the library that the tenant has one login, which is open or closed, that nothing of a rotation is left, and
// that the tenant works with it when it is open.
func wantOneLogin(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy, id tenancy.ID, open bool) {
	t.Helper()
	admin, d := f.Admin(t, "tenants"), sourceOf(t, tn, id)
	defer admin.Close(context.Background())
	if logins := loginsOf(t, admin, d.Schema); len(logins) != 1 || logins[0] != d.User {
		t.Errorf("logins %q, want %s alone", logins, d.User)
	}
	if n := ask[int](t, f, "primary", `SELECT count(*) FROM tenancy.data_sources WHERE next_login <> '' OR next_sealed IS NOT NULL OR old_login <> '' OR leaving IS NOT NULL`); n != 0 {
		t.Errorf("the primary lists %d places with something left to do", n)
	}
	if listed := ask[string](t, f, "primary", `SELECT login FROM tenancy.data_sources WHERE schema = $1`, d.Schema); listed != d.User {
		t.Errorf("the primary lists login %s, the sealed record has %s", listed, d.User)
	}
	if !open {
		wantClosed(t, admin, d.User)
		return
	}
	wantOpen(t, admin, d.User)
	tenant, err := tn.Catalog().Tenant(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, err := tn.Enter(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	var user string
	if err := tn.DB().QueryRow(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'still here') RETURNING session_user`, tenant.Name).Scan(&user); err != nil || user != d.User {
		t.Errorf("the tenant works as %q, %v; want %s", user, err, d.User)
	}
}

// TestRotationsFailNoRequest rotates a tenant's password again and again while two nodes work on it and on another one.
func TestRotationsFailNoRequest(t *testing.T) {
	f := tenancytest.NewFleet(t)
	cfg := tenancy.Config{Migrations: noteMigrations, Limits: tenancy.Limits{Nodes: 2}}
	tn, second := f.Open(t, cfg), f.Open(t, cfg)
	acme, globex := tenancytest.Create(t, tn, "acme"), tenancytest.Create(t, tn, "globex")
	admin := f.Admin(t, "tenants")
	l := startLoad(t, 4, []tenancy.Tenant{acme, globex}, tn, second)
	began, slowest := time.Now(), time.Duration(0)
	for i := range liveTurns() {
		before, start := sourceOf(t, tn, acme.ID), time.Now()
		if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil {
			t.Fatalf("rotation %d: %v", i, err)
		}
		slowest = max(slowest, time.Since(start))
		after := sourceOf(t, tn, acme.ID)
		if after.User == before.User || after.Password == before.Password {
			t.Fatalf("rotation %d: login %s after %s", i, after.User, before.User)
		}
		wantClosed(t, admin, before.User)
		wantOpen(t, admin, after.User)
		if logins := loginsOf(t, admin, after.Schema); len(logins) != 1 {
			t.Errorf("rotation %d: logins %q, want one", i, logins)
		}
	}
	t.Logf("%d rotations in %v, the slowest %v", liveTurns(), time.Since(began), slowest)
	l.wantNoFailure(admin, map[string][]string{"acme": {tableOf(sourceOf(t, tn, acme.ID))}, "globex": {tableOf(sourceOf(t, tn, globex.ID))}})
}

// accidents are the places at which a rotation can be cut off: after each of its steps, and in the middle of two.
func accidents(t *testing.T, f *tenancytest.Fleet, tn *tenancy.Tenancy) map[string]func(t *testing.T, id tenancy.ID) {
	t.Helper()
	if n := tenancy.RotationSteps(tn); n != 4 {
		t.Fatalf("a rotation has %d steps, this knows four", n)
	}
	upTo := func(steps int) func(t *testing.T, id tenancy.ID) {
		return func(t *testing.T, id tenancy.ID) {
			t.Helper()
			if err := tenancy.RotateUpTo(t.Context(), tn, id, steps); err != nil {
				t.Fatal(err)
			}
		}
	}
	return map[string]func(t *testing.T, id tenancy.ID){
		"intended": upTo(1),
		"made":     upTo(2),
		"taken":    upTo(3),
		"made_and_not_granted": func(t *testing.T, id tenancy.ID) {
			upTo(1)(t, id)
			admin := f.Admin(t, "tenants")
			provisioner := scan[string](t, admin, `SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()`)
			must(t, admin, `SET ROLE `+pgx.Identifier{provisioner}.Sanitize())
			must(t, admin, `CREATE ROLE `+placeOf(t, f, id).Schema+`_l2 LOGIN`)
		},
		"dropped_and_not_written": func(t *testing.T, id tenancy.ID) {
			upTo(3)(t, id)
			admin, old := f.Admin(t, "tenants"), placeOf(t, f, id).Schema+"_l1"
			must(t, admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1`, old)
			must(t, admin, `DROP OWNED BY `+old)
			must(t, admin, `DROP ROLE `+old)
		},
		"sealed_under_a_key_that_is_gone": func(t *testing.T, id tenancy.ID) {
			upTo(2)(t, id)
			must(t, f.Admin(t, "primary"), `UPDATE tenancy.data_sources SET next_sealed = 'x' WHERE next_login <> ''`)
		},
	}
}

// named makes a tenant's name of an accident's.
func named(prefix, accident string) string {
	return prefix + strings.ReplaceAll(accident, "_", "-")[:min(30, len(accident))]
}

func TestARotationThatWasCutOffIsFinished(t *testing.T) {
	t.Parallel()
	f, tn, _, globex := twoTenants(t, tenancy.Config{})
	before := sourceOf(t, tn, globex.ID)
	for name, accident := range accidents(t, f, tn) {
		for finisher, finish := range map[string]func(id tenancy.ID) error{
			"job": func(id tenancy.ID) error {
				if err := tn.Refresh(t.Context()); err != nil {
					return err
				}
				if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.data_sources WHERE next_login <> '' OR old_login <> ''`); n != 1 {
					t.Errorf("%s: the validity job does not leave a fresh rotation alone", name)
				}
				age(t, f)
				return tn.Refresh(t.Context())
			},
			"next": func(id tenancy.ID) error { return tn.Catalog().RotatePassword(t.Context(), id) },
		} {
			t.Run(name+"/"+finisher, func(t *testing.T) {
				made := tenancytest.Create(t, tn, named(finisher+"-", name))
				old := sourceOf(t, tn, made.ID)
				accident(t, made.ID)
				if err := finish(made.ID); err != nil {
					t.Fatal(err)
				}
				wantOneLogin(t, f, tn, made.ID, true)
				if now := sourceOf(t, tn, made.ID); now.User == old.User || now.Password == old.Password {
					t.Errorf("login %s after %s", now.User, old.User)
				}
				if _, err := connectTo(t, old); sqlState(err) == "" {
					t.Error("the old password still opens a session")
				}
			})
		}
	}
	if after := sourceOf(t, tn, globex.ID); after != before {
		t.Error("the other tenant's login has changed")
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestAnUnfinishedRotationLeavesNoDoorOpen suspends, moves and purges tenants in the middle of a rotation that was cut off.
func TestAnUnfinishedRotationLeavesNoDoorOpen(t *testing.T) {
	t.Parallel()
	f, tn, _, globex := twoTenants(t, tenancy.Config{DrainTimeout: 300 * time.Millisecond})
	admin, c := f.Admin(t, "tenants"), tn.Catalog()
	for name, accident := range accidents(t, f, tn) {
		t.Run(name+"/suspended", func(t *testing.T) {
			made := tenancytest.Create(t, tn, named("", name))
			schema := placeOf(t, f, made.ID).Schema
			first := login(t, tn, made.ID)
			accident(t, made.ID)
			d := sourceOf(t, tn, made.ID)
			for _, user := range loginsOf(t, admin, schema)[1:] { // a session of the other one, too
				if scan[bool](t, admin, `SELECT NOT pg_has_role($1, $2, 'MEMBER')`, user, admin.Config().Database+"_tenants") {
					continue // it may not connect yet
				}
				if user != d.User {
					must(t, admin, `ALTER ROLE `+user+` PASSWORD 'known'`)
					d.User, d.Password = user, "known"
				}
				if _, err := connectTo(t, d); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Suspend(t.Context(), made.ID, tenancy.Suspension{}); err != nil {
				t.Fatal(err)
			}
			for _, role := range scan[[]string](t, admin, `SELECT array_agg(rolname::text) FROM pg_roles WHERE starts_with(rolname, $1)`, schema) {
				wantClosed(t, admin, role)
			}
			if _, err := first.Exec(t.Context(), `SELECT 1`); err == nil {
				t.Error("a session of the first login goes on")
			}
			age(t, f)
			if err := tn.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantOneLogin(t, f, tn, made.ID, false)
			if got := mustTenant(t, tn, made.Name).State; got != tenancy.StateSuspended {
				t.Errorf("the tenant is %s", got)
			}
			if err := c.Resume(t.Context(), made.ID); err != nil {
				t.Fatal(err)
			}
			wantOneLogin(t, f, tn, made.ID, true)
		})
		t.Run(name+"/moved", func(t *testing.T) {
			made := tenancytest.Create(t, tn, named("moved-", name))
			from, to := placeOf(t, f, made.ID).Schema, prepare(t, tn, made.ID, "")
			accident(t, made.ID)
			if err := c.SetDataSource(t.Context(), made.ID, to); err != nil {
				t.Fatal(err)
			}
			for _, user := range loginsOf(t, admin, from) {
				wantClosed(t, admin, user)
			}
			age(t, f)
			if err := tn.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantOneLogin(t, f, tn, made.ID, true)
			if logins := loginsOf(t, admin, from); len(logins) != 1 {
				t.Errorf("the place that was left has logins %q, want one", logins)
			} else {
				wantClosed(t, admin, logins[0])
			}
		})
		t.Run(name+"/purged", func(t *testing.T) {
			made := tenancytest.Create(t, tn, named("purged-", name))
			schema := placeOf(t, f, made.ID).Schema
			accident(t, made.ID)
			if err := c.Delete(t.Context(), made.ID); err != nil {
				t.Fatal(err)
			}
			if _, err := c.PurgeNow(t.Context(), made.ID, made.Name); err != nil {
				t.Fatal(err)
			}
			if n := scan[int](t, admin, `SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)`, schema); n != 0 {
				t.Errorf("%d roles are left", n)
			}
		})
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestRotationsKilledAnywhereAreFinished kills the process that rotates at random moments.
func TestRotationsKilledAnywhereAreFinished(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{Limits: tenancy.Limits{Nodes: 2}})
	admin, rng := f.Admin(t, "tenants"), rand.New(rand.NewPCG(5, 6))
	l := startLoad(t, 1, []tenancy.Tenant{acme, globex}, tn)
	before := mustTenant(t, tn, "acme").Generation
	unfinished := map[string]int{}
	for i := 0; i < killings() || unfinished["none"] == i && i < 10*killings(); i++ { // until one has died in the middle
		verb := startVerb(t, f, acme.ID)
		time.Sleep(300*time.Millisecond + time.Duration(rng.Int64N(int64(600*time.Millisecond)))) // a moment that nothing waits for is the point
		killAtWork(t, verb)
		bury(t, f, verb)
		unfinished[ask[string](t, f, "primary", `SELECT CASE WHEN next_login <> '' THEN 'next' WHEN old_login <> '' THEN 'old' ELSE 'none' END
			FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.id = $1`, acme.ID)]++
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantOneLogin(t, f, tn, acme.ID, true)
	}
	rotations := mustTenant(t, tn, "acme").Generation - before
	t.Logf("%d rotations; left unfinished: %v", rotations, unfinished)
	if rotations == 0 || unfinished["next"]+unfinished["old"] == 0 {
		t.Error("nothing was killed in the middle: the test shows nothing")
	}
	l.wantNoFailure(admin, map[string][]string{"acme": {tableOf(sourceOf(t, tn, acme.ID))}, "globex": {tableOf(sourceOf(t, tn, globex.ID))}})
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestARotationThatIsOvertakenSpoilsNothing has one process rotate in the middle of what another, without its lock, does.
func TestARotationThatIsOvertakenSpoilsNothing(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	other := f.Open(t, tenancy.Config{DrainTimeout: 100 * time.Millisecond})
	for at := range tenancy.RotationSteps(tn) {
		err := tenancy.RotateUnlocked(t.Context(), tn, acme.ID, func(step int) {
			if step != at {
				return
			}
			if err := other.Catalog().RotatePassword(t.Context(), acme.ID); err != nil {
				t.Fatal(err)
			}
		})
		t.Logf("overtaken before step %d: %v", at, err)
		if at < 3 && err == nil {
			t.Errorf("overtaken before step %d: it went on", at)
		}
		if at == 0 || at == 2 {
			wantError(t, err, tenancy.ErrInProgress)
		}
		wantOneLogin(t, f, tn, acme.ID, true)
		if _, err := tryLogin(t, tn, acme.ID); err != nil {
			t.Errorf("overtaken before step %d: the password that is kept does not fit: %v", at, err)
		}
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

func TestARotationIsRefusedWhereThereIsNothingToRotate(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "primary")
	before := sourceOf(t, tn, globex.ID)
	wantError(t, c.RotatePassword(ctx, 999), tenancy.ErrTenantNotFound, "rotate password")
	if err := c.Delete(ctx, acme.ID); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.RotatePassword(ctx, acme.ID), tenancy.ErrTenantGone)
	if _, err := c.PurgeNow(ctx, acme.ID, "acme"); err != nil {
		t.Fatal(err)
	}
	wantError(t, c.RotatePassword(ctx, acme.ID), tenancy.ErrTenantGone)
	must(t, admin, `UPDATE tenancy.tenants SET state = 'provisioning' WHERE id = $1`, globex.ID)
	wantError(t, c.RotatePassword(ctx, globex.ID), tenancy.ErrTenantNotReady)
	wantError(t, c.SetDataSource(ctx, globex.ID, before), tenancy.ErrTenantNotReady)
	must(t, admin, `UPDATE tenancy.tenants SET state = 'active' WHERE id = $1`, globex.ID)
	must(t, admin, `UPDATE tenancy.servers SET provisioner = NULL`)
	wantError(t, c.RotatePassword(ctx, globex.ID), tenancy.ErrNoProvisioner)
	if after := sourceOf(t, tn, globex.ID); after != before {
		t.Error("a refused rotation has changed the login")
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

func TestATenantOutOfServiceIsRotatedAndStaysSo(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	c, ctx := tn.Catalog(), t.Context()
	for _, s := range []tenancy.Suspension{{}, {Maintenance: true}} {
		if err := c.Suspend(ctx, acme.ID, s); err != nil {
			t.Fatal(err)
		}
		before, state := sourceOf(t, tn, acme.ID), mustTenant(t, tn, "acme").State
		fenced := func(after string, want bool) {
			t.Helper()
			if got := ask[bool](t, f, "primary", `SELECT fenced IS NOT NULL FROM tenancy.tenants WHERE id = $1`, acme.ID); got != want {
				t.Errorf("%s, after %s: fenced is %v, want %v", state, after, got, want)
			}
		}
		if err := c.RotatePassword(ctx, acme.ID); err != nil {
			t.Fatal(err)
		}
		fenced("a rotation", true)
		wantOneLogin(t, f, tn, acme.ID, false)
		from := sourceOf(t, tn, acme.ID)
		for _, to := range []tenancy.DataSource{prepare(t, tn, acme.ID, ""), from} {
			if err := c.SetDataSource(ctx, acme.ID, to); err != nil {
				t.Fatal(err)
			}
			fenced("a move", true)
			wantClosed(t, f.Admin(t, "tenants"), to.User)
		}
		// What was not closed before is not closed by that: a place out of reach may have been left open.
		change(t, f, "primary", `UPDATE tenancy.tenants SET fenced = NULL WHERE id = $1`, acme.ID)
		if err := c.SetDataSource(ctx, acme.ID, from); err != nil {
			t.Fatal(err)
		}
		fenced("a move of a tenant that was not fenced", false)
		if after := sourceOf(t, tn, acme.ID); after.User == before.User {
			t.Errorf("%s: the login is still %s", state, after.User)
		}
		if got := scan[string](t, f.Admin(t, "primary"), `SELECT action FROM tenancy.audit WHERE action NOT IN ('prepare', 'set data source') ORDER BY id DESC LIMIT 1`); got != "rotate password" {
			t.Errorf("%s: the audit trail ends with %q", state, got)
		}
		if got := mustTenant(t, tn, "acme").State; got != state {
			t.Errorf("it was %s and is %s", state, got)
		}
		if err := c.Resume(ctx, acme.ID); err != nil {
			t.Fatal(err)
		}
		wantOneLogin(t, f, tn, acme.ID, true)
	}
	wantOneLogin(t, f, tn, globex.ID, true)
}

// TestASuspendedTenantIsClosedAgainAfterACrash dies when the rotation of a suspended tenant is done and its login is open.
func TestASuspendedTenantIsClosedAgainAfterACrash(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	if err := tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, tenancy.RotationSteps(tn)); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, f.Admin(t, "tenants"), sourceOf(t, tn, acme.ID).User)
	age(t, f)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOneLogin(t, f, tn, acme.ID, false)
}

// TestAVerbThatLostItsLockClosesNothing takes the lock's session away from a verb on a suspended tenant that has opened a login. Another node may
// have resumed the tenant by the time that the verb ends.
func TestAVerbThatLostItsLockClosesNothing(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c, admin, primary := tn.Catalog(), f.Admin(t, "tenants"), f.Admin(t, "primary")
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	for name, verb := range map[string]struct {
		do     func() error
		opened string // the login
	}{
		"rotation": {func() error { return c.RotatePassword(t.Context(), acme.ID) }, `SELECT next_login FROM tenancy.data_sources WHERE next_login <> ''`},
		"switch": {func() error { return c.SetDataSource(t.Context(), acme.ID, sourceOf(t, tn, acme.ID)) }, // the place that it is in
			`SELECT login FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.name = 'acme'`},
	} {
		blocker, err := f.Admin(t, "primary").Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := blocker.Exec(t.Context(), `SELECT FROM tenancy.epoch FOR UPDATE`); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- verb.do() }()
		until(t, 10*time.Second, "1", func() string { return waiting(t, primary, "tenancy") })
		must(t, primary, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
		if err := <-ended; err == nil {
			t.Errorf("a %s without its lock succeeded", name)
		}
		if err := blocker.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantOpen(t, admin, scan[string](t, primary, verb.opened))
		if scan[bool](t, primary, `SELECT fenced IS NOT NULL FROM tenancy.tenants WHERE id = $1`, acme.ID) {
			t.Errorf("%s: the primary says that the tenant is fenced: the validity job will not look at it", name)
		}
		age(t, f)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantOneLogin(t, f, tn, acme.ID, false)
	}
}

// TestAServerThatFreezesHoldsNoCleanUpForEver freezes it when a rotation of a suspended tenant, which has failed, closes its logins again.
func TestAServerThatFreezesHoldsNoCleanUpForEver(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	far := tenancytest.NewFleet(t)
	way := newStrait(t, far.ServerURL)
	c, admin := tn.Catalog(), far.Admin(t, "tenants")
	if err := c.AddServer(t.Context(), tenancy.ServerConfig{Name: "far", URL: way.url}); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDataSource(t.Context(), acme.ID, prepare(t, tn, acme.ID, "far")); err != nil {
		t.Fatal(err)
	}
	if err := c.Suspend(t.Context(), acme.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	p := placeOf(t, f, acme.ID)
	must(t, admin, `GRANT CREATE ON SCHEMA `+p.Schema+` TO `+p.Runtime) // the next login has a right too many, and is refused
	way.freezeAt(" NOLOGIN")
	rotated := make(chan error, 1)
	go func() { rotated <- c.RotatePassword(t.Context(), acme.ID) }()
	select {
	case err := <-rotated:
		wantError(t, err, tenancy.ErrSetup)
	case <-time.After(40 * time.Second):
		t.Error("it goes on")
	}
	way.calm()
	must(t, admin, `REVOKE CREATE ON SCHEMA `+p.Schema+` FROM `+p.Runtime)
	age(t, f)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, admin, sourceOf(t, tn, acme.ID).User)
}

func TestANewLoginIsProvedBeforeItIsTaken(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	admin, c, before := f.Admin(t, "tenants"), tn.Catalog(), sourceOf(t, tn, acme.ID)
	p := placeOf(t, f, acme.ID)
	mark := `UPDATE ` + p.table("tenancy_marker") + ` SET tenant = `
	for _, spoil := range []struct {
		name, do, undo string
		class          error
	}{
		{"another_tenants_marker", mark + `'` + globex.UID.String() + `'`, mark + `'` + acme.UID.String() + `'`, tenancy.ErrIdentity},
		{"a_right_too_many", `GRANT CREATE ON SCHEMA ` + p.Schema + ` TO ` + p.Runtime, `REVOKE CREATE ON SCHEMA ` + p.Schema + ` FROM ` + p.Runtime, tenancy.ErrSetup},
	} {
		must(t, admin, spoil.do)
		wantError(t, c.RotatePassword(t.Context(), acme.ID), spoil.class)
		if after := sourceOf(t, tn, acme.ID); after != before {
			t.Errorf("%s: the login that was refused is the tenant's", spoil.name)
		}
		wantOpen(t, admin, before.User)
		must(t, admin, spoil.undo)
	}
	if err := c.RotatePassword(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
}

// TestLargeObjectsOutliveARotation: they are what a login can own.
func TestLargeObjectsOutliveARotation(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	ctx, err := tn.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	other, err := tn.Enter(t.Context(), globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	var object uint32
	if err := tn.DB().QueryRow(ctx, `SELECT lo_from_bytea(0, 'mine')`).Scan(&object); err != nil {
		t.Fatal(err)
	}
	read := func(when string) {
		t.Helper()
		var text string
		if err := tn.DB().QueryRow(ctx, `SELECT convert_from(lo_get($1), 'UTF8')`, object).Scan(&text); err != nil || text != "mine" {
			t.Errorf("%s: %q, %v", when, text, err)
		}
		if _, err := tn.DB().Exec(ctx, `SELECT lo_put($1, 0, 'mine')`, object); err != nil {
			t.Errorf("%s: writing: %v", when, err)
		}
		if _, err := tn.DB().Exec(other, `SELECT lo_get($1)`, object); sqlState(err) != "42501" {
			t.Errorf("%s: the other tenant reads it: %v", when, err)
		}
	}
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, 3); err != nil {
		t.Fatal(err)
	}
	read("while both logins are there")
	if err := tn.Catalog().RotatePassword(t.Context(), acme.ID); err != nil { // finishes that one first
		t.Fatal(err)
	}
	read("afterwards")
	owner := scan[string](t, f.Admin(t, "tenants"), `SELECT pg_get_userbyid(lomowner) FROM pg_largeobject_metadata WHERE oid = $1`, object)
	if d := sourceOf(t, tn, acme.ID); owner != d.User || !strings.HasSuffix(owner, "_l3") {
		t.Errorf("it is owned by %s, the login is %s", owner, d.User)
	}
}

// TestAnOldLoginThatCannotBeDroppedIsClosed lets it own something where the provisioner does not come.
func TestAnOldLoginThatCannotBeDroppedIsClosed(t *testing.T) {
	t.Parallel()
	f, tn, acme, _ := twoTenants(t, tenancy.Config{})
	c, ctx, elsewhere, admin := tn.Catalog(), t.Context(), f.Admin(t, "primary"), f.Admin(t, "tenants")
	old := sourceOf(t, tn, acme.ID)
	must(t, elsewhere, `CREATE TABLE public.of_the_old_login ()`)
	must(t, elsewhere, `ALTER TABLE public.of_the_old_login OWNER TO `+old.User)
	wantError(t, c.RotatePassword(ctx, acme.ID), tenancy.ErrNotClosed, old.User, "drop login")
	wantClosed(t, admin, old.User)
	now := sourceOf(t, tn, acme.ID)
	wantOpen(t, admin, now.User)
	if now.User == old.User {
		t.Error("the tenant has its old login")
	}
	err := c.RotatePassword(ctx, acme.ID)
	if err == nil || errors.Is(err, tenancy.ErrNotClosed) || !strings.Contains(err.Error(), "earlier rotation") {
		t.Errorf("the next rotation: %v", err)
	}
	if after := sourceOf(t, tn, acme.ID); after != now {
		t.Error("a third login was made")
	}
	age(t, f)
	if err := tn.Refresh(ctx); err == nil || !strings.Contains(err.Error(), old.User) {
		t.Errorf("the validity job says nothing of it: %v", err)
	}
	must(t, elsewhere, `DROP TABLE public.of_the_old_login`)
	age(t, f)
	if err := tn.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
}

func TestTheServerBoundsATenantsConnections(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{Limits: tenancy.Limits{Nodes: 2, TenantConns: 1}})
	admin := f.Admin(t, "tenants")
	ceiling := func(id tenancy.ID) int {
		return scan[int](t, admin, `SELECT rolconnlimit FROM pg_roles WHERE rolname = $1`, sourceOf(t, tn, id).User)
	}
	if got := ceiling(acme.ID); got != 4 {
		t.Fatalf("two nodes with a connection each: at most %d, want 4", got)
	}
	for i := range 4 {
		if _, err := tryLogin(t, tn, acme.ID); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	if _, err := tryLogin(t, tn, acme.ID); sqlState(err) != "53300" {
		t.Errorf("a fifth connection: %v, want 53300", err)
	}
	login(t, tn, globex.ID) // has its own
	larger := f.Open(t, tenancy.Config{Limits: tenancy.Limits{Nodes: 3, TenantConns: 5}, DrainTimeout: 100 * time.Millisecond})
	c, ctx := larger.Catalog(), t.Context()
	place := prepare(t, tn, globex.ID, "")
	for name, open := range map[string]func() error{
		"resume": func() error {
			return errors.Join(c.Suspend(ctx, acme.ID, tenancy.Suspension{Drain: 1}), c.Resume(ctx, acme.ID))
		},
		"rotate": func() error { return c.RotatePassword(ctx, acme.ID) },
	} {
		must(t, admin, `ALTER ROLE `+sourceOf(t, tn, acme.ID).User+` CONNECTION LIMIT 7`)
		if err := open(); err != nil {
			t.Fatal(err)
		}
		if got := ceiling(acme.ID); got != 30 {
			t.Errorf("%s: at most %d, want 30", name, got)
		}
	}
	must(t, admin, `ALTER ROLE `+place.User+` CONNECTION LIMIT 7`)
	if err := c.SetDataSource(ctx, globex.ID, place); err != nil {
		t.Fatal(err)
	}
	if got := ceiling(globex.ID); got != 30 {
		t.Errorf("switch: at most %d, want 30", got)
	}
	huge := f.Open(t, tenancy.Config{Limits: tenancy.Limits{ServerConns: 1 << 50, Nodes: 1 << 40, TenantConns: 10_000}, DrainTimeout: 100 * time.Millisecond})
	if err := huge.Catalog().RotatePassword(ctx, acme.ID); err != nil {
		t.Errorf("more than the server can count: %v", err)
	}
}

// TestARotationTellsNoSecret looks at its errors, its log and that of the server.
func TestARotationTellsNoSecret(t *testing.T) {
	t.Parallel()
	server, err := pgembed.Start(t.Context(), pgembed.Options{Settings: map[string]string{"log_statement": "all", "log_min_duration_statement": "0",
		"log_connections": "on", "log_min_error_statement": "debug5", "log_parameter_max_length_on_error": "-1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	if server.External() {
		t.Skip("the log of the server of TENANCY_TEST_URL cannot be read")
	}
	at := func(user, database string) string {
		u, err := url.Parse(server.URL())
		if err != nil {
			t.Fatal("the test server's URL cannot be parsed")
		}
		u.User, u.Path = url.UserPassword(user, "cnry-"+user+"-9d1f"), "/"+database
		return u.String()
	}
	ctx, text := t.Context(), newKey(t)
	_, key, _ := strings.Cut(text, ":")
	secrets := map[string]string{"the catalog's password": "cnry-fleet_catalog-9d1f", "the provisioner's password": "cnry-fleet_provisioner-9d1f", "the key": key}
	keys, err := tenancy.ParseKeyring(text)
	if err != nil {
		t.Fatal(err)
	}
	a := tenancy.AdminConfig{AdminURL: server.URL(), PrimaryURL: at("fleet_catalog", "fleet_primary"), Server: tenancy.ServerConfig{URL: at("fleet_provisioner", "fleet_tenants")}, Keys: keys}
	if err := tenancy.Init(ctx, a); err != nil {
		t.Fatal(err)
	}
	var out leakLog
	tn, err := tenancy.Open(ctx, tenancy.Config{PrimaryURL: a.PrimaryURL, Keys: keys, Migrations: noteMigrations, Logger: slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	acme := tenancytest.Create(t, tn, "acme")
	super := connectURL(t, server.URL())
	note := func(when string) {
		secrets["the tenant's password "+when] = sourceOf(t, tn, acme.ID).Password.Reveal()
	}
	note("at first")
	for name, spoil := range map[string]string{
		"no_createrole":  `ALTER ROLE fleet_provisioner NOCREATEROLE`,
		"no_provisioner": `ALTER ROLE fleet_provisioner NOLOGIN`,
		"no_connect":     `REVOKE CONNECT ON DATABASE fleet_tenants FROM fleet_tenants_tenants`,
	} {
		must(t, super, spoil)
		err := tn.Catalog().RotatePassword(ctx, acme.ID)
		if err == nil {
			t.Errorf("%s did not fail", name)
		}
		var shown leakLog
		shown.show(err)
		if strings.Contains(shown.String(), "SCRAM-SHA-256$") {
			t.Errorf("%s shows a verifier: %v", name, err)
		}
		fmt.Fprint(&out, shown.String())
		must(t, super, `ALTER ROLE fleet_provisioner CREATEROLE LOGIN`)
		must(t, super, `GRANT CONNECT ON DATABASE fleet_tenants TO fleet_tenants_tenants`)
		if err := tn.Catalog().RotatePassword(ctx, acme.ID); err != nil {
			t.Fatalf("after %s: %v", name, err)
		}
		note("after " + name)
	}
	if len(secrets) != 3+4 {
		t.Fatalf("%d secrets are looked for", len(secrets))
	}
	wantHidden(t, "an error or the log", out.String(), secrets)
	log, err := server.Log()
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []string{"_l2", "_l4", "PASSWORD 'SCRAM-SHA-256$", "REASSIGN OWNED BY", "permission denied"} {
		if !strings.Contains(log, must) {
			t.Errorf("the server's log does not have %q: the test looks at nothing", must)
		}
	}
	wantHidden(t, "the server's log", log, secrets)
}

// TestTheSecondReleaseWorksOnTheThirdVersion runs the statements of a release that knows nothing of next and old logins, as a deployment from
// node to node does.
func TestTheSecondReleaseWorksOnTheThirdVersion(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	old := connectURL(t, f.PrimaryURL)
	source := scan[int64](t, old, `INSERT INTO tenancy.data_sources (uid, server, schema, owner, runtime, login, sealed, state)
		SELECT uid, server, 't_old', 't_old_o', 't_old_r', 't_old_l1', '', 'intent' FROM tenancy.data_sources LIMIT 1 RETURNING id`)
	must(t, old, `UPDATE tenancy.data_sources SET state = 'dropped', sealed = '', updated = now() WHERE id = $1`, source)
	// A rotation that was cut off is no obstacle: it reads the login that there is.
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, 3); err != nil {
		t.Fatal(err)
	}
	if login := scan[string](t, old, `SELECT d.login FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = $1 AND d.sealed <> ''`, acme.ID); !strings.HasSuffix(login, "_l2") {
		t.Errorf("the login is %s", login)
	}
	age(t, f)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
	wantOneLogin(t, f, tn, globex.ID, true)

	files, err := fs.Glob(primary.Migrations(), "00003_*.sql")
	if err != nil || len(files) != 1 {
		t.Fatalf("the third migration is %q, %v", files, err)
	}
	text, err := fs.ReadFile(primary.Migrations(), files[0])
	if err != nil {
		t.Fatal(err)
	}
	up, _, _ := strings.Cut(string(text), "-- +goose Down")
	for line := range strings.Lines(up) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "--") {
			continue
		}
		if !strings.Contains(line, " ADD COLUMN ") || strings.Contains(line, "NOT NULL") && !strings.Contains(line, "DEFAULT") {
			t.Errorf("a write of the release before fails after %q", line)
		}
	}
}
