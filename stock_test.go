package tenancy_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// stockMigrations make rows with the number of the tenant that a place is promised to.
var stockMigrations = fstest.MapFS{
	"00001_notes.sql": {Data: []byte("-- +goose Up\nCREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL, title text NOT NULL);\nSELECT tenancy_must('notes');\nINSERT INTO notes (tenant, title) VALUES ('', 'welcome');\n-- +goose Down\nDROP TABLE notes;")},
}

// inStock are the schemas of the places that are ready, in order of their making.
func inStock(tb testing.TB, primary *pgx.Conn) []string {
	tb.Helper()
	return scan[[]string](tb, primary, `SELECT coalesce(array_agg(schema ORDER BY id), '{}') FROM tenancy.data_sources WHERE stocked AND state = 'made'`)
}

// stocked opens a node whose stock has been filled.
func stocked(tb testing.TB, f *tenancytest.Fleet, cfg tenancy.Config) *tenancy.Tenancy {
	tb.Helper()
	def := tenancy.Config{Migrations: stockMigrations, Isolation: tenancy.IsolationSchema, ValidityCron: "@every 10h", Stock: cfg.Stock}
	if cfg.Migrations != nil {
		def.Migrations = cfg.Migrations
	}
	if cfg.Isolation != "" {
		def.Isolation = cfg.Isolation
	}
	tn := f.Open(tb, def)
	awaitStock(tb, f, cfg.Stock)
	return tn
}

func awaitStock(tb testing.TB, f *tenancytest.Fleet, n int) {
	tb.Helper()
	primary := f.Admin(tb, "primary")
	defer primary.Close(context.Background())
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if ready := inStock(tb, primary); len(ready) == n {
			return
		} else if time.Now().After(end) {
			tb.Fatalf("the stock has %v, want %d", ready, n)
		}
	}
}

func TestACreateTakesAPlaceOfTheStock(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 2})
	primary, admin, cat := f.Admin(t, "primary"), f.Admin(t, "tenants"), tn.Catalog()
	ready := inStock(t, primary)

	// Nobody reads a place before it is taken.
	outsider := login(t, tn, create(t, f, tn, "acme").ID)
	awaitStock(t, f, 2)
	for _, schema := range inStock(t, primary) {
		if _, err := outsider.Exec(t.Context(), `SELECT FROM `+pgx.Identifier{schema, "notes"}.Sanitize()); sqlState(err) != "42501" {
			t.Errorf("a tenant reads a place of the stock: %v", err)
		}
	}
	globex, err := cat.Create(t.Context(), tenancy.NewTenant{Name: "globex", Admin: "ann", Domains: []string{"globex.example"}})
	if err != nil {
		t.Fatal(err)
	}
	acme, err := cat.TenantByName(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	// Both have what was ready, are what they say, and read their own alone.
	for i, tenant := range []tenancy.Tenant{acme, globex} {
		place := placeOf(t, f, tenant.ID)
		if place.Schema != ready[i] {
			t.Errorf("%s is in %s, and %v were ready", tenant.Name, place.Schema, ready)
		}
		if of := scan[int64](t, admin, `SELECT tenant_id FROM `+place.table("notes")+` WHERE title = 'welcome'`); tenancy.ID(of) != tenant.ID {
			t.Errorf("what the migrations made for %s is of tenant %d", tenant.Name, of)
		}
		if _, err := tn.DB().Exec(tenancytest.Context(t, tn, tenant.Name), `INSERT INTO notes (tenant, title) VALUES ($1, 'own')`, tenant.Name); err != nil {
			t.Error(err)
		}
	}
	for tenant, foreign := range map[tenancy.ID]tenancy.ID{acme.ID: globex.ID, globex.ID: acme.ID} {
		if _, err := login(t, tn, tenant).Exec(t.Context(), `SELECT FROM `+placeOf(t, f, foreign).table("notes")); sqlState(err) != "42501" {
			t.Errorf("tenant %d reads tenant %d: %v", tenant, foreign, err)
		}
	}
	// What is asked for is not always what is ready.
	awaitStock(t, f, 2)
	kept := inStock(t, primary)
	f.AllowDatabases(t)
	initech, err := cat.Create(t.Context(), tenancy.NewTenant{Name: "initech", Isolation: tenancy.IsolationDatabase})
	if err != nil || initech.Isolation != tenancy.IsolationDatabase {
		t.Errorf("%v: %v", initech, err)
	}
	// A place that was never taken outlives whoever cleans up.
	must(t, primary, `UPDATE tenancy.data_sources SET updated = now() - interval '2 days' WHERE stocked`)
	if err := tn.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := inStock(t, primary); !slices.Equal(now, kept) {
		t.Errorf("the stock was %v and is %v", kept, now)
	}
}

func TestAPlaceOfTheStockIsAsOneThatWasMade(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 1})
	ready := inStock(t, f.Admin(t, "primary"))
	plain := f.Open(t, tenancy.Config{Migrations: stockMigrations, ValidityCron: "@every 10h"})
	var lines [][]string
	for i, n := range []*tenancy.Tenancy{tn, plain} {
		if i == 1 { // the second is made while there is no stock
			must(t, f.Admin(t, "primary"), `UPDATE tenancy.data_sources SET stocked = false WHERE stocked`)
		}
		tenant, err := n.Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("tenant%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		if in := slices.Contains(ready, placeOf(t, f, tenant.ID).Schema); in != (i == 0) {
			t.Errorf("tenant %d is of the stock: %v", i, in)
		}
		lines = append(lines, describePlace(t, f.Admin(t, "primary"), f.Admin(t, "tenants"), tenant))
		if i == 0 {
			awaitStock(t, f, 1)
		}
	}
	for i := range max(len(lines[0]), len(lines[1])) {
		if i >= len(lines[0]) || i >= len(lines[1]) || lines[0][i] != lines[1][i] {
			t.Fatalf("they differ from line %d on:\nof the stock %q\nmade %q", i, lines[0][min(i, len(lines[0])):], lines[1][min(i, len(lines[1])):])
		}
	}
}

func TestTwoNodesShareAStock(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	const stock = 3
	cfg := tenancy.Config{Migrations: stockMigrations, Isolation: tenancy.IsolationSchema, ValidityCron: "@every 10h", Stock: stock}
	f.Open(t, tenancy.Config{}) // the primary's schema is there
	primary := f.Admin(t, "primary")
	// Both find that the stock is short, and one after the other finds out whether it still is.
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy stock', 0))`)
	nodes := []*tenancy.Tenancy{f.Open(t, cfg), f.Open(t, cfg)}
	for end := time.Now().Add(time.Minute); scan[int](t, primary, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) < 2; {
		if time.Now().After(end) {
			t.Fatalf("who fills the stock waits for nobody: there are %v", inStock(t, primary))
		}
		time.Sleep(time.Millisecond)
	}
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	awaitStock(t, f, stock)
	ready := inStock(t, primary)
	done := make(chan struct{})
	watched := make(chan int)
	watcher := f.Admin(t, "primary")
	go func() { // never more than the stock, at no moment
		most := 0
		for {
			select {
			case <-done:
				watched <- most
				return
			default:
			}
			var n int
			if err := watcher.QueryRow(context.Background(), `SELECT count(*) FROM tenancy.data_sources WHERE stocked AND state <> 'dropped'`).Scan(&n); err == nil {
				most = max(most, n)
			}
		}
	}()
	var wg sync.WaitGroup
	var mu sync.Mutex // guards places
	places := map[string]bool{}
	for i := range 6 {
		wg.Go(func() {
			tenant, err := nodes[i%2].Catalog().Create(t.Context(), tenancy.NewTenant{Name: fmt.Sprintf("t%d", i)})
			if err != nil {
				t.Error(err)
				return
			}
			d, err := nodes[i%2].Catalog().DataSource(t.Context(), tenant.ID)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			places[d.Schema] = true
			mu.Unlock()
		})
	}
	wg.Wait()
	awaitStock(t, f, stock)
	close(done)
	if most := <-watched; most > stock {
		t.Errorf("there were %d places in a stock of %d", most, stock)
	}
	if len(places) != 6 {
		t.Errorf("6 tenants are in %v", places)
	}
	for _, schema := range ready {
		if !places[schema] {
			t.Errorf("place %s was ready and nobody has it", schema)
		}
	}
}

func TestACreateThatDiedGoesOnInItsPlaceOfTheStock(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 1})
	primary := f.Admin(t, "primary")
	ready := inStock(t, primary)
	// The tenant's lock is held, so that Create dies between the claim and what comes after it.
	next := scan[int64](t, primary, `SELECT promised FROM tenancy.data_sources WHERE stocked`)
	must(t, primary, `SELECT pg_advisory_lock(hashtextextended('tenancy tenant ' || $1::bigint, 0))`, next)
	ctx, cancel := context.WithCancel(t.Context())
	died := make(chan error)
	go func() {
		_, err := tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "acme"})
		died <- err
	}()
	for scan[int](t, primary, `SELECT count(*) FROM tenancy.tenants`) == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-died; err == nil {
		t.Fatal("it did not die")
	}
	must(t, primary, `SELECT pg_advisory_unlock_all()`)
	if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme", DisplayName: "another"}); err == nil {
		t.Error("another request has taken the name")
	}
	tenant, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	if place := placeOf(t, f, tenant.ID); place.Schema != ready[0] || int64(tenant.ID) != next {
		t.Errorf("tenant %d is in %s, want %d in %s", tenant.ID, place.Schema, next, ready[0])
	}
	create(t, f, tn, "globex")
}

func TestTheStockIsMigratedAndFinished(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	old := stocked(t, f, tenancy.Config{Stock: 2})
	primary := f.Admin(t, "primary")
	ready := inStock(t, primary)
	more := fstest.MapFS{"00002_more.sql": {Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN more text;\n-- +goose Down\nALTER TABLE notes DROP COLUMN more;")}}
	for name, file := range stockMigrations {
		more[name] = file
	}
	// One that is behind is not taken, one whose making died is finished.
	behind := f.Open(t, tenancy.Config{Migrations: more, ValidityCron: "@every 10h"})
	tenant, err := behind.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(ready, placeOf(t, f, tenant.ID).Schema) {
		t.Error("a place that is behind was taken")
	}
	must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent', version = 0 WHERE stocked AND schema = $1`, ready[0])
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	stocked(t, f, tenancy.Config{Stock: 2, Migrations: more})
	if now := inStock(t, primary); !slices.Equal(now, ready) {
		t.Errorf("the stock was %v and is %v", ready, now)
	}
	if n := scan[int](t, primary, `SELECT count(*) FROM tenancy.data_sources WHERE stocked AND version = 2`); n != 2 {
		t.Errorf("%d places of the stock have the newest version, want 2", n)
	}
	tenant, err = behind.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := behind.DB().Exec(tenancytest.Context(t, behind, "globex"), `INSERT INTO notes (tenant, title, more) VALUES ('globex', 'own', 'x')`); err != nil || placeOf(t, f, tenant.ID).Schema != ready[0] {
		t.Errorf("in %s: %v", placeOf(t, f, tenant.ID).Schema, err)
	}
}

func TestAPlaceOfTheStockThatCreateIsGivenIsInUse(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 1})
	primary, admin, cat := f.Admin(t, "primary"), f.Admin(t, "tenants"), tn.Catalog()
	create(t, f, tn, "acme")
	awaitStock(t, f, 1)
	acme, err := cat.TenantByName(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	given, err := cat.DataSource(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	given.Schema = inStock(t, primary)[0]
	given.User, given.Password = given.Schema+"_l1", "whatever"
	globex, err := cat.Create(t.Context(), tenancy.NewTenant{Name: "globex", DataSource: &given})
	if err != nil {
		t.Fatal(err)
	}
	of := func(what string) string {
		return scan[string](t, primary, `SELECT (`+what+`)::text FROM tenancy.data_sources WHERE schema = $1`, given.Schema)
	}
	if got := of("stocked"); got != "false" {
		t.Errorf("a place that a tenant has is in the stock: %s", got)
	}
	create(t, f, tn, "initech")
	if err := cat.Suspend(t.Context(), globex.ID, tenancy.Suspension{}); err != nil {
		t.Fatal(err)
	}
	// The release before has left such places, behind and made, as has a crash of it.
	for state, change := range map[string]string{"made": "version = 0", "intent": "state = 'intent'"} {
		must(t, primary, `UPDATE tenancy.data_sources SET stocked = true, `+change+` WHERE schema = $1`, given.Schema)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Error(err)
		}
		if got := of("state"); got != state || scan[bool](t, admin, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, given.User) {
			t.Errorf("the place of a suspended tenant is %s, want %s, and its login open", got, state)
		}
		must(t, primary, `UPDATE tenancy.data_sources SET stocked = true, state = 'made', version = 1 WHERE schema = $1`, given.Schema)
	}
	awaitStock(t, f, 2) // one of which is no place for anybody
	if umbrella := create(t, f, tn, "umbrella"); placeOf(t, f, umbrella.ID).Schema == given.Schema {
		t.Error("another tenant has the place")
	}
}

func TestAPlaceThatCannotBeFinishedStopsNoOther(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 2})
	primary := f.Admin(t, "primary")
	ready := inStock(t, primary)
	must(t, primary, `UPDATE tenancy.data_sources SET state = 'intent', sealed = '\x00' WHERE schema = $1`, ready[0])
	if err := tn.Refresh(t.Context()); err == nil {
		t.Error("nobody hears of a place that cannot be finished")
	}
	if now := inStock(t, primary); len(now) != 2 || now[0] != ready[1] {
		t.Errorf("beside a place that cannot be finished the stock is %v, was %v", now, ready)
	}
	// A server of no use, which has most room, stops none at the other, and does not get more places for ever.
	must(t, primary, `INSERT INTO tenancy.servers (name, host, port, database, tls, provisioner, weight) SELECT 'gone', 'gone', port, database, tls, '\x00', 1000 FROM tenancy.servers`)
	create(t, f, tn, "acme")
	awaitStock(t, f, 2)
	begun := func() int {
		return scan[int](t, primary, `SELECT count(*) FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server WHERE s.name = 'gone'`)
	}
	if begun() == 0 {
		t.Error("nothing was tried at the other server")
	}
	must(t, primary, `UPDATE tenancy.servers SET capacity = 1 WHERE name = 'main'`)
	must(t, primary, `UPDATE tenancy.data_sources SET stocked = false WHERE state = 'made'`)
	for range 5 {
		_ = tn.Refresh(t.Context())
	}
	if n := begun(); n != 3 {
		t.Errorf("%d places were begun at a server where none is ever finished, want one more than the stock of 2", n)
	}
}

func TestAStockOnAFullServerIsNoError(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 2})
	primary := f.Admin(t, "primary")
	must(t, primary, `UPDATE tenancy.servers SET capacity = 2`)
	create(t, f, tn, "acme")
	if err := tn.Refresh(t.Context()); err != nil {
		t.Errorf("a stock that has no room: %v", err)
	}
	if now := inStock(t, primary); len(now) != 1 {
		t.Errorf("beside a tenant on a server for two, the stock is %v", now)
	}
}

func TestPlacesOfANewerReleaseAreNotReady(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	more := fstest.MapFS{"00002_more.sql": {Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN more text;\n-- +goose Down\nALTER TABLE notes DROP COLUMN more;")}}
	for name, file := range stockMigrations {
		more[name] = file
	}
	later := stocked(t, f, tenancy.Config{Stock: 1, Migrations: more})
	primary := f.Admin(t, "primary")
	kept := inStock(t, primary)
	tn := f.Open(t, tenancy.Config{Migrations: stockMigrations, Isolation: tenancy.IsolationSchema, ValidityCron: "@every 10h", Stock: 1})
	awaitStock(t, f, 2)
	ready := inStock(t, primary)
	if ready[0] != kept[0] || scan[int](t, primary, `SELECT version FROM tenancy.data_sources WHERE schema = $1`, kept[0]) != 2 {
		t.Errorf("the newer release's stock was %v, and there is %v", kept, ready)
	}
	// Neither takes what the other has use for, however often they fill theirs.
	for _, n := range []*tenancy.Tenancy{later, tn, later, tn} {
		if err := n.Refresh(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if now := inStock(t, primary); !slices.Equal(now, ready) {
		t.Errorf("the stock was %v and is %v", ready, now)
	}
	if acme := create(t, f, tn, "acme"); placeOf(t, f, acme.ID).Schema != ready[1] {
		t.Errorf("the tenant is in %s, and %v was ready", placeOf(t, f, acme.ID).Schema, ready)
	}
}

func TestAStockLeavesItsRoomToWhoeverNeedsIt(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := stocked(t, f, tenancy.Config{Stock: 2})
	primary, cat := f.Admin(t, "primary"), tn.Catalog()
	f.AllowDatabases(t)
	must(t, primary, `UPDATE tenancy.servers SET capacity = 4`)
	create(t, f, tn, "acme")
	awaitStock(t, f, 2)
	must(t, primary, `UPDATE tenancy.servers SET capacity = 3`)
	if _, err := cat.Create(t.Context(), tenancy.NewTenant{Name: "globex", Isolation: tenancy.IsolationDatabase}); err != nil {
		t.Errorf("beside a stock of 2 on a server for 3, of which one is in use: %v", err)
	}
	prepared, err := cat.Prepare(t.Context(), 0, "")
	if err != nil {
		t.Errorf("beside a stock of 2 on a server for 3, of which two are in use: %v", err)
	}
	// What is ready fills no server beyond its capacity.
	_, err = cat.Create(t.Context(), tenancy.NewTenant{Name: "initech"})
	wantError(t, err, tenancy.ErrNoRoom)
	if err := tn.Refresh(t.Context()); err != nil || len(inStock(t, primary)) != 2 {
		t.Errorf("the stock is %v: %v", inStock(t, primary), err)
	}
	if err := cat.DropPlace(t.Context(), prepared); err != nil {
		t.Fatal(err)
	}
	create(t, f, tn, "initech")
	_, err = cat.Create(t.Context(), tenancy.NewTenant{Name: "umbrella"})
	wantError(t, err, tenancy.ErrNoRoom)
}
