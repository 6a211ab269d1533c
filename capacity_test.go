package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// addServer makes a further tenants' database and registers it under the name, with weight and capacity.
func addServer(tb testing.TB, f *tenancytest.Fleet, name string, weight, capacity int) {
	tb.Helper()
	a := uninitialisedAs(tb, f, name)
	a.PrimaryURL, a.Server.Name, a.Server.Weight, a.Server.Capacity = f.PrimaryURL, name, weight, capacity
	if err := tenancy.Init(tb.Context(), a); err != nil {
		tb.Fatal(err)
	}
}

// mainServer is the fleet's first server, with other weight and capacity.
func mainServer(tb testing.TB, f *tenancytest.Fleet, tn *tenancy.Tenancy, weight, capacity int) {
	tb.Helper()
	if err := tn.Catalog().AddServer(tb.Context(), tenancy.ServerConfig{URL: f.ServerURL, Weight: weight, Capacity: capacity}); err != nil {
		tb.Fatal(err)
	}
}

// placesByServer counts the places of each server.
func placesByServer(tb testing.TB, f *tenancytest.Fleet) map[string]int {
	tb.Helper()
	return scan[map[string]int](tb, f.Admin(tb, "primary"), `SELECT coalesce(jsonb_object_agg(name, n), '{}') FROM
		(SELECT s.name, count(*) AS n FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE d.state <> 'dropped' GROUP BY 1) p`)
}

func TestNewTenantsAreSharedOutByWeight(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	addServer(t, f, "big", 3, 0)
	addServer(t, f, "own", -1, 0)
	for i := range 8 {
		tenancytest.Create(t, tn, fmt.Sprintf("acme-%d", i))
	}
	if got, want := placesByServer(t, f), map[string]int{"main": 2, "big": 6}; !maps.Equal(got, want) {
		t.Errorf("places are %v, want %v", got, want)
	}
	if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "vip", Server: "own"}); err != nil {
		t.Error(err)
	}
	if got := placesByServer(t, f); got["own"] != 1 {
		t.Errorf("a tenant that names a server lives elsewhere: %v", got)
	}
	mainServer(t, f, tn, 100, 0) // again: it is registered, and gets another weight
	for i := range 4 {
		tenancytest.Create(t, tn, fmt.Sprintf("globex-%d", i))
	}
	if got, want := placesByServer(t, f), map[string]int{"main": 6, "big": 6, "own": 1}; !maps.Equal(got, want) {
		t.Errorf("places are %v, want %v", got, want)
	}
	mainServer(t, f, tn, -5, 0)
	must(t, f.Admin(t, "primary"), `UPDATE tenancy.servers SET weight = -1`)
	_, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "nowhere"})
	wantError(t, err, tenancy.ErrNoRoom, "only tenants that name it")
}

func TestAFullServerTakesNoTenant(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	mainServer(t, f, tn, 100, 1)
	addServer(t, f, "small", 1, 2)
	for i := range 3 {
		tenancytest.Create(t, tn, fmt.Sprintf("acme-%d", i))
	}
	if got, want := placesByServer(t, f), map[string]int{"main": 1, "small": 2}; !maps.Equal(got, want) {
		t.Fatalf("places are %v, want %v", got, want)
	}
	for what, err := range map[string]error{
		"create":        second(c.Create(ctx, tenancy.NewTenant{Name: "globex"})),
		"create_named":  second(c.Create(ctx, tenancy.NewTenant{Name: "globex", Server: "small"})),
		"prepare":       second(c.Prepare(ctx, 0, "")),
		"prepare_named": second(c.Prepare(ctx, 0, "main")),
	} {
		if !errors.Is(err, tenancy.ErrNoRoom) || !strings.Contains(err.Error(), "Capacity") || errors.Is(err, tenancy.ErrPrimaryUnavailable) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.TenantByName(ctx, "globex"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("a refused Create left its intent: %v", err)
	}
	// Room is made by a purge, and by a larger number.
	gone := mustTenant(t, tn, "acme-0")
	if err := c.Delete(ctx, gone.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.PurgeNow(ctx, gone.ID, "acme-0"); err != nil {
		t.Fatal(err)
	}
	tenancytest.Create(t, tn, "globex")
	_, err := c.Create(ctx, tenancy.NewTenant{Name: "initech"})
	wantError(t, err, tenancy.ErrNoRoom)
	mainServer(t, f, tn, 0, 2)
	tenancytest.Create(t, tn, "initech")
	if got, want := placesByServer(t, f), map[string]int{"main": 2, "small": 2}; !maps.Equal(got, want) {
		t.Errorf("places are %v, want %v", got, want)
	}
}

func TestCreatesAtOnceDoNotOverfillAServer(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	nodes := []*tenancy.Tenancy{f.Open(t, tenancy.Config{Migrations: noteMigrations}), f.Open(t, tenancy.Config{Migrations: noteMigrations})}
	mainServer(t, f, nodes[0], 1, 3)
	addServer(t, f, "small", 1, 2)
	var mu sync.Mutex
	var wg sync.WaitGroup
	made, full := 0, 0
	for i := range 12 {
		wg.Go(func() {
			var err error
			if i%3 == 0 {
				_, err = nodes[i%2].Catalog().Prepare(context.WithoutCancel(t.Context()), 0, "")
			} else {
				_, err = nodes[i%2].Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("acme-%d", i)})
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				made++
			case errors.Is(err, tenancy.ErrNoRoom):
				full++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made != 5 || full != 7 {
		t.Errorf("%d were made and %d refused, want 5 and 7", made, full)
	}
	if got, want := placesByServer(t, f), map[string]int{"main": 3, "small": 2}; !maps.Equal(got, want) {
		t.Errorf("places are %v, want %v", got, want)
	}
}

func TestWeightAndCapacityAreChecked(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{})
	for field, s := range map[string]tenancy.ServerConfig{
		"ServerConfig.Weight":   {URL: f.ServerURL, Weight: 1_000_001},
		"ServerConfig.Capacity": {URL: f.ServerURL, Capacity: -1},
	} {
		wantError(t, tn.Catalog().AddServer(t.Context(), s), tenancy.ErrInvalid, field)
	}
}
