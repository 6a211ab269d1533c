package tenancy_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestASilentServerKeepsTheValidityJobFromNoOther has tenants of it to fence, and a rotation to finish at a server that is well.
func TestASilentServerKeepsTheValidityJobFromNoOther(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{Limits: tenancy.Limits{ConnectTimeout: time.Second}})
	way := newStrait(t, tenancytest.NewFleet(t).ServerURL)
	if err := tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{Name: "far", URL: way.url}); err != nil {
		t.Fatal(err)
	}
	for n := range 4 {
		if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("far-%d", n), Server: "far"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, 3); err != nil {
		t.Fatal(err)
	}
	change(t, f, "primary", `UPDATE tenancy.tenants SET state = 'suspended', fenced = NULL WHERE name LIKE 'far-%' OR id = $1`, globex.ID)
	age(t, f)
	way.freeze()
	dials := way.dials()
	if err := tn.Refresh(t.Context()); err == nil {
		t.Error("a server that is silent is no error")
	}
	if n := way.dials() - dials; n != 1 {
		t.Errorf("the silent server was asked %d times, want once", n)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
	wantClosed(t, f.Admin(t, "tenants"), placeOf(t, f, globex.ID).Login)
	way.calm()
	if err := tn.Refresh(t.Context()); err != nil {
		t.Error(err)
	}
	if n := ask[int](t, f, "primary", `SELECT count(*) FROM tenancy.tenants WHERE state = 'suspended' AND fenced IS NULL`); n != 0 {
		t.Errorf("%d tenants are not fenced by the next run", n)
	}
}

// TestEachKindOfLooseEndsHasItsShareOfARun: fences that take the whole drain would use up the time.
func TestEachKindOfLooseEndsHasItsShareOfARun(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{DrainTimeout: 3 * time.Second})
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, 3); err != nil {
		t.Fatal(err)
	}
	busy := []tenancy.ID{globex.ID}
	for n := range 3 {
		busy = append(busy, tenancytest.Create(t, tn, fmt.Sprintf("busy-%d", n)).ID)
	}
	for _, id := range busy {
		must(t, login(t, tn, id), `BEGIN`)
	}
	change(t, f, "primary", `UPDATE tenancy.tenants SET state = 'suspended', fenced = NULL WHERE id = ANY($1)`, busy)
	age(t, f)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := tn.Refresh(ctx); err != nil {
		t.Error(err)
	}
	wantOneLogin(t, f, tn, acme.ID, true)
	if n := ask[int](t, f, "primary", `SELECT count(*) FROM tenancy.tenants WHERE state = 'suspended' AND fenced IS NOT NULL`); n == 0 {
		t.Error("no fence was finished")
	}
}

// TestANodeTiesUpLooseEndsSoonAfterOpen, and not at ValidityCron alone: a fleet whose nodes live shortly has no other time for it.
func TestANodeTiesUpLooseEndsSoonAfterOpen(t *testing.T) {
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	if err := tenancy.RotateUpTo(t.Context(), tn, acme.ID, 3); err != nil {
		t.Fatal(err)
	}
	change(t, f, "primary", `UPDATE tenancy.tenants SET state = 'suspended', fenced = NULL WHERE id = $1`, globex.ID)
	age(t, f)
	defer tenancy.SetSoonAfterOpen(tenancy.SetSoonAfterOpen(time.Second)) // no other test is at work now
	f.Open(t, tenancy.Config{Migrations: noteMigrations})
	untilTrue(t, "the rotation and the fence are finished", func() bool {
		return ask[bool](t, f, "primary", `SELECT NOT EXISTS (SELECT FROM tenancy.data_sources WHERE old_login <> '') AND NOT EXISTS (SELECT FROM tenancy.tenants WHERE state = 'suspended' AND fenced IS NULL)`)
	})
	wantOneLogin(t, f, tn, acme.ID, true)
	wantClosed(t, f.Admin(t, "tenants"), placeOf(t, f, globex.ID).Login)
}
