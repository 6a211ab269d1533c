package tenancy_test

import (
	"context"
	databasesql "database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// notesAnd are the migrations of the tests' service with more after them, each the text of a file.
func notesAnd(tb testing.TB, more ...string) fstest.MapFS {
	tb.Helper()
	first, err := fs.ReadFile(noteMigrations, "00001_notes.sql")
	if err != nil {
		tb.Fatal(err)
	}
	files := fstest.MapFS{"00001_notes.sql": {Data: first}}
	for i, text := range more {
		files[fmt.Sprintf("%05d_more.sql", i+2)] = &fstest.MapFile{Data: []byte(text)}
	}
	return files
}

// oncePerTenant adds a column, which a second time would fail.
const oncePerTenant = "-- +goose Up\nALTER TABLE notes ADD COLUMN once int;\n\n-- +goose Down\nALTER TABLE notes DROP COLUMN once;\n"

// halfWay does one thing for good, and then another that fails while there is no table ready.
const halfWay = "-- +goose NO TRANSACTION\n-- +goose Up\nCREATE TABLE half (id int);\nSELECT count(*) FROM ready;\n\n-- +goose Down\nDROP TABLE half;\n"

// several makes tenants with a schema each.
func several(tb testing.TB, f *tenancytest.Fleet, n int) []tenancy.Tenant {
	tb.Helper()
	tn := f.Open(tb, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	tenants := make([]tenancy.Tenant, n)
	for i := range tenants {
		tenants[i] = createIn(tb, tn, fmt.Sprintf("t%02d", i), tenancy.IsolationSchema)
	}
	return tenants
}

func migrateError(tb testing.TB, results []tenancy.Migrated, err error) *tenancy.MigrateError {
	tb.Helper()
	failed, ok := errors.AsType[*tenancy.MigrateError](err)
	if !ok || len(failed.Results) != len(results) {
		tb.Fatalf("%+v, %v: want a MigrateError with the same results", results, err)
	}
	return failed
}

// placeBriefly is placeOf without a connection that stays until the test ends.
func placeBriefly(t *testing.T, f *tenancytest.Fleet, id tenancy.ID) placeRow {
	t.Helper()
	schema := schemaOf(t, f, id)
	return placeRow{Schema: schema, Owner: schema + "_o"}
}

func versionIn(t *testing.T, f *tenancytest.Fleet, id tenancy.ID) int64 {
	t.Helper()
	return ask[int64](t, f, "tenants", `SELECT max(version_id) FROM `+placeBriefly(t, f, id).table("goose_db_version"))
}

// toldProgress is what MigrateOptions.Progress was told.
type toldProgress struct {
	tb     testing.TB
	inside atomic.Int32
	all    []tenancy.MigrateProgress
}

func (told *toldProgress) tell(p tenancy.MigrateProgress) {
	if told.inside.Add(1) != 1 {
		told.tb.Error("told while it is told")
	}
	time.Sleep(2 * time.Millisecond) // for another one to come in
	told.all = append(told.all, p)
	told.inside.Add(-1)
}

// end checks that each tenant was told of once, and returns the last word.
func (told *toldProgress) end(total int) (last tenancy.MigrateProgress) {
	told.tb.Helper()
	seen := map[tenancy.ID]bool{}
	for i, p := range told.all {
		before := told.all[max(i-1, 0)]
		if p.Total != total || i == 0 && (p.Last.Tenant.ID != 0 || p.Done+p.NotBegun > 0) || i > 0 && (seen[p.Last.Tenant.ID] || p.Done+p.Failed+p.NotBegun != before.Done+before.Failed+before.NotBegun+1) {
			told.tb.Errorf("told %+v after %+v", p, before)
		}
		seen[p.Last.Tenant.ID] = true
		last = p
	}
	if last.Done+last.Failed+last.NotBegun != total {
		told.tb.Errorf("the last word is %+v, want all of %d", last, total)
	}
	return last
}

func TestAPoisonTenantStopsNobodyElse(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 20)
	poison := tenants[7]
	change(t, f, "tenants", "ALTER TABLE "+placeBriefly(t, f, poison.ID).table("notes")+" ADD COLUMN once int")
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	before, err := tn.Migrator().Status(t.Context())
	if err != nil || before.Newest != 2 || before.Tenants != 20 || before.Versions[1] != 20 || len(before.Behind) != 20 {
		t.Errorf("before: %+v, %v", before, err)
	}
	plan, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{DryRun: true, Progress: func(tenancy.MigrateProgress) { t.Error("a dry run has no progress") }})
	if err != nil || len(plan) != 20 || len(plan[0].Pending) != 1 || plan[0].Pending[0].File != "00002_more.sql" || plan[0].Version != 1 {
		t.Errorf("planned %+v, %v", plan, err)
	}
	told := &toldProgress{tb: t}
	done, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{Parallel: 6, Progress: told.tell})
	failed := migrateError(t, done, err)
	if p := told.end(20); p.Done != 19 || p.Failed != 1 || p.NotBegun != 0 {
		t.Errorf("the run told of %+v", p)
	}
	if len(failed.Unwrap()) != 1 || sqlState(err) != "42701" || !strings.Contains(err.Error(), "1 of 20 tenants failed") || !strings.Contains(err.Error(), poison.Name) {
		t.Errorf("the error is %v", err)
	}
	for i, m := range done {
		if want := map[bool]int64{true: 1, false: 2}[i == 7]; m.Tenant.ID != tenants[i].ID || m.Version != want || versionIn(t, f, m.Tenant.ID) != want {
			t.Errorf("%+v, want version %d", m, want)
		}
	}
	after, err := tn.Migrator().Status(t.Context())
	if err != nil || after.Versions[1] != 1 || after.Versions[2] != 19 || len(after.Behind) != 1 || after.Behind[0].Tenant.ID != poison.ID || len(after.Dirty) != 0 {
		t.Errorf("after: %+v, %v", after, err)
	}
	older := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	if s, err := older.Migrator().Status(t.Context()); err != nil || len(s.Ahead) != 19 {
		t.Errorf("to an older release %d are ahead, %v; want 19", len(s.Ahead), err)
	}
	change(t, f, "tenants", "ALTER TABLE "+placeBriefly(t, f, poison.ID).table("notes")+" DROP COLUMN once")
	done, err = tn.Migrator().All(t.Context())
	if err != nil || done[7].Version != 2 || !slices.Equal(done[7].Applied, []int64{2}) {
		t.Errorf("the second run: %+v, %v", done[7], err)
	}
}

func TestACanaryThatFailsKeepsTheRestFromBeginning(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 5)
	for _, i := range []int{0, 2} {
		change(t, f, "tenants", "ALTER TABLE "+placeBriefly(t, f, tenants[i].ID).table("notes")+" ADD COLUMN once int")
	}
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	for name, o := range map[string]tenancy.MigrateOptions{
		"a_list":     {Canary: []tenancy.ID{tenants[2].ID}},
		"a_percent":  {CanaryPercent: 1},
		"stop_after": {StopAfter: 1, Parallel: 1},
	} {
		told := &toldProgress{tb: t}
		o.Progress = told.tell
		done, err := tn.Migrator().Run(t.Context(), o)
		failed := migrateError(t, done, err)
		if p := told.end(5); p.Done != 0 || p.Failed != 1 || p.NotBegun != 4 {
			t.Errorf("%s: the run told of %+v", name, p)
		}
		if len(failed.Unwrap()) != 1 || !strings.Contains(err.Error(), "1 of 5 tenants failed, 4 were not begun") {
			t.Errorf("%s: %v", name, err)
		}
		for _, m := range done {
			if !errors.Is(m.Err, tenancy.ErrNotBegun) && sqlState(m.Err) != "42701" || len(m.Applied) > 0 || versionIn(t, f, m.Tenant.ID) != 1 {
				t.Errorf("%s: %+v", name, m)
			}
		}
	}
	done, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{Canary: []tenancy.ID{tenants[1].ID}, Tenants: []tenancy.ID{tenants[3].ID, tenants[1].ID}})
	if err != nil || len(done) != 2 || done[0].Tenant.ID != tenants[1].ID || done[1].Version != 2 {
		t.Errorf("a list with a good canary: %+v, %v", done, err)
	}
	if v := versionIn(t, f, tenants[4].ID); v != 1 {
		t.Errorf("a tenant that is not on the list is at %d", v)
	}
	for name, o := range map[string]tenancy.MigrateOptions{
		"UpTo":          {UpTo: 3},
		"Parallel":      {Parallel: 1000},
		"CanaryPercent": {CanaryPercent: 101},
		"give one":      {CanaryPercent: 10, Canary: []tenancy.ID{tenants[0].ID}},
		"not one of":    {Tenants: []tenancy.ID{tenants[0].ID}, Canary: []tenancy.ID{tenants[1].ID}},
		"StopAfter":     {StopAfter: -1},
		"empty list":    {Tenants: []tenancy.ID{}},
	} {
		wantError(t, second(tn.Migrator().Run(t.Context(), o)), tenancy.ErrInvalid, name)
	}
	told := &toldProgress{tb: t}
	done, err = tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{Tenants: []tenancy.ID{999999, tenants[1].ID}, Progress: told.tell})
	migrateError(t, done, err)
	if len(told.all) != 1 || told.all[0].Total != 1 || told.all[0].Failed != 1 {
		t.Errorf("of one that cannot be migrated and one with nothing to do the run told %+v", told.all)
	}
	wantError(t, err, tenancy.ErrTenantNotFound, "999999")
}

// The migration inserts a row in each tenant, and nothing keeps it from doing so twice but the runs themselves.
func TestTwoRunsAtOnceApplyEachMigrationOnce(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 8)
	files := notesAnd(t, "-- +goose Up\nINSERT INTO notes (tenant, title) VALUES ('counted', 'counted');\nSELECT pg_sleep(0.05);\n",
		"-- +goose NO TRANSACTION\n-- +goose Up\nINSERT INTO notes (tenant, title) VALUES ('counted', 'counted');\nSELECT pg_sleep(0.05);\n")
	applied := map[tenancy.ID]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 3 {
		tn := f.Open(t, tenancy.Config{Migrations: files})
		wg.Go(func() {
			done, err := tn.Migrator().All(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, m := range done {
				applied[m.Tenant.ID] += len(m.Applied)
				if m.Version != 3 {
					t.Errorf("%+v, want version 3", m)
				}
			}
		})
	}
	wg.Wait()
	for _, tenant := range tenants {
		if n := ask[int](t, f, "tenants", `SELECT count(*) FROM `+placeBriefly(t, f, tenant.ID).table("notes")+` WHERE tenant = 'counted'`); n != 2 || applied[tenant.ID] != 2 {
			t.Errorf("%s: the two were applied %d times, and told %d times", tenant.Name, n, applied[tenant.ID])
		}
	}
}

// Both locks of a tenant's are had by somebody else: that of its schema, which holds without the primary's, and a version that another run has applied behind its back.
func TestARunThatLostSightOfAnotherAppliesNothing(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	locked, free := placeBriefly(t, f, tenants[0].ID), placeBriefly(t, f, tenants[1].ID)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, GoMigrations: []tenancy.GoMigration{{Version: 2, Up: func(ctx context.Context, tx *databasesql.Tx) error {
		_, err := tx.ExecContext(ctx, "CREATE TABLE twice (); INSERT INTO goose_db_version (version_id, is_applied) VALUES (2, true)")
		return err
	}}}})
	holder := f.Admin(t, "tenants")
	must(t, holder, `BEGIN`)
	must(t, holder, `LOCK TABLE `+locked.table("tenancy_marker")+` IN SHARE UPDATE EXCLUSIVE MODE`)
	done, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{LockPatience: time.Millisecond})
	migrateError(t, done, err)
	if sqlState(done[0].Err) != "55P03" || !strings.Contains(fmt.Sprint(done[1].Err), "another run has applied it meanwhile") {
		t.Errorf("%+v", done)
	}
	for _, p := range []placeRow{locked, free} {
		if there := ask[bool](t, f, "tenants", `SELECT to_regclass($1) IS NOT NULL`, p.table("twice")); there {
			t.Errorf("the migration has left its table in %s", p.Schema)
		}
	}
}

// The worker keeps its sessions, and no tenant.
func TestARunLetsGoOfEachTenantThatIsDone(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	several(t, f, 2)
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done, err := tn.Migrator().Run(ctx, tenancy.MigrateOptions{Parallel: 1, Progress: func(p tenancy.MigrateProgress) {
		if p.Last.Tenant.ID == 0 {
			return
		}
		if m, err := tn.Migrator().Tenant(ctx, p.Last.Tenant.ID); err != nil || m.Version != 2 {
			t.Errorf("while the run goes on: %+v, %v", m, err)
		}
		// What the run keeps is lost on its way to the next tenant.
		for _, database := range []string{"primary", "tenants"} {
			until(t, 10*time.Second, "0", func() string {
				return fmt.Sprint(ask[int](t, f, database, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND (application_name = 'tenancy provisioner' OR query = 'SELECT pg_advisory_unlock_all()') AND pid <> pg_backend_pid()`))
			})
		}
	}})
	if err != nil || done[1].Version != 2 {
		t.Errorf("%+v, %v", done, err)
	}
}

func TestABusyTenantIsTriedAgainAndThenReported(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	busy, idle := tenants[0], tenants[1]
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	holder, admin := f.Admin(t, "tenants"), f.Admin(t, "tenants")
	hold := `LOCK TABLE ` + placeBriefly(t, f, busy.ID).table("notes") + ` IN ACCESS SHARE MODE`
	must(t, holder, `BEGIN`)
	must(t, holder, hold)
	done, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{LockPatience: 2500 * time.Millisecond})
	migrateError(t, done, err)
	if sqlState(done[0].Err) != "55P03" || !strings.Contains(done[0].Err.Error(), "kept a table locked") || done[1].Err != nil || done[1].Tenant.ID != idle.ID || done[1].Version != 2 {
		t.Errorf("%+v", done)
	}
	aside := placeBriefly(t, f, idle.ID).table("aside") // of the migration without a transaction, which waits for it and is not tried again
	must(t, admin, `SET ROLE `+placeBriefly(t, f, idle.ID).Owner)
	must(t, admin, `CREATE TABLE `+aside+` ()`)
	must(t, admin, `RESET ROLE`)
	must(t, holder, `LOCK TABLE `+aside+` IN ACCESS SHARE MODE`)
	next := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant, "-- +goose NO TRANSACTION\n-- +goose Up\nCREATE TABLE IF NOT EXISTS aside ();\nALTER TABLE aside ADD COLUMN x int;\n")})
	ended := make(chan error, 1)
	go func() { ended <- second(next.Migrator().All(t.Context())) }()
	until(t, 20*time.Second, "2", func() string { return waiting(t, admin, "tenancy migration") })
	time.Sleep(2200 * time.Millisecond) // past the first try
	must(t, holder, `ROLLBACK`)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	for _, tenant := range tenants {
		if v := versionIn(t, f, tenant.ID); v != 3 {
			t.Errorf("%s is at %d", tenant.Name, v)
		}
	}
}

func TestADirtyTenantIsRefusedUntilSomebodyHasLooked(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	acme, globex := tenants[0], tenants[1]
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, halfWay)})
	admin := f.Admin(t, "tenants")
	in := func(of tenancy.Tenant, table string) string { return placeBriefly(t, f, of.ID).table(table) }
	must(t, admin, `SET ROLE `+placeBriefly(t, f, globex.ID).Owner)
	must(t, admin, `CREATE TABLE `+in(globex, "ready")+` ()`)
	must(t, admin, `RESET ROLE`)
	for _, state := range []string{"42P01", "?"} { // the second time nothing is tried
		done, err := tn.Migrator().All(t.Context())
		migrateError(t, done, err)
		if got := sqlState(done[0].Err); got != state {
			t.Errorf("the cause is %s, want %s", got, state)
		}
		wantError(t, done[0].Err, tenancy.ErrMigrationDirty, acme.Name, "version 2", fmt.Sprintf("Migrator.Resolve(ctx, %d, 2, true)", acme.ID))
		if done[1].Err != nil || done[1].Version != 2 {
			t.Errorf("the other one: %+v", done[1])
		}
	}
	_, err := tn.Migrator().Tenant(t.Context(), acme.ID)
	wantError(t, err, tenancy.ErrMigrationDirty)
	until(t, 5*time.Second, fmt.Sprintf("[[%d 2]] <nil>", acme.ID), func() string { // the server takes a moment to let go of the lock of who has died
		s, err := tn.Migrator().Status(t.Context())
		var dirty [][2]int64
		for _, d := range s.Dirty {
			dirty = append(dirty, [2]int64{int64(d.Tenant.ID), d.Dirty})
		}
		return fmt.Sprint(dirty, err)
	})
	wantError(t, tn.Migrator().Resolve(t.Context(), acme.ID, 3, true), tenancy.ErrInvalid, "version 3")
	wantError(t, tn.Migrator().Resolve(t.Context(), globex.ID, 2, true), tenancy.ErrInvalid, "version 2")

	// Undone by hand: it is applied from its beginning, and dies again.
	must(t, admin, `DROP TABLE `+in(acme, "half"))
	if err := tn.Migrator().Resolve(t.Context(), acme.ID, 2, false); err != nil {
		t.Fatal(err)
	}
	_, err = tn.Migrator().Tenant(t.Context(), acme.ID)
	wantError(t, err, tenancy.ErrMigrationDirty, "42P01")
	// Finished by hand.
	if err := tn.Migrator().Resolve(t.Context(), acme.ID, 2, true); err != nil {
		t.Fatal(err)
	}
	if done, err := tn.Migrator().All(t.Context()); err != nil || done[0].Version != 2 || versionIn(t, f, acme.ID) != 2 {
		t.Errorf("%+v, %v", done, err)
	}
	if n := scan[int](t, f.Admin(t, "primary"), `SELECT count(*) FROM tenancy.audit WHERE action = 'resolve migration' AND tenant = $1 AND detail->>'version' = '2'`, acme.ID); n != 2 {
		t.Errorf("%d audit records, want 2", n)
	}
}

// A mark of what has ended is no dirt: the process died between goose and the catalog.
func TestAMarkOfWhatHasEndedIsCleared(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	for _, tenant := range tenants {
		change(t, f, "tenants", `CREATE TABLE `+placeBriefly(t, f, tenant.ID).table("ready")+` ()`)
		change(t, f, "tenants", `ALTER TABLE `+placeBriefly(t, f, tenant.ID).table("ready")+` OWNER TO `+placeBriefly(t, f, tenant.ID).Owner)
	}
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, halfWay)})
	if _, err := tn.Migrator().All(t.Context()); err != nil {
		t.Fatal(err)
	}
	change(t, f, "primary", `UPDATE tenancy.data_sources SET version = 1, migrating = 2 WHERE id = (SELECT data_source FROM tenancy.tenants WHERE id = $1)`, tenants[0].ID)
	done, err := tn.Migrator().All(t.Context())
	if err != nil || done[0].Version != 2 || len(done[0].Applied) > 0 {
		t.Errorf("%+v, %v", done, err)
	}
	if s, err := tn.Migrator().Status(t.Context()); err != nil || s.Versions[2] != 2 || len(s.Dirty) > 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestDownTakesOneTenantBackAndAPinKeepsItThere(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant, "-- +goose Up\nCREATE TABLE third ();\n")})
	m := tn.Migrator()
	if done, err := m.Run(t.Context(), tenancy.MigrateOptions{UpTo: 2}); err != nil || done[0].Version != 2 || done[1].Version != 2 {
		t.Fatalf("%+v, %v", done, err)
	}
	if err := m.Pin(t.Context(), tenants[0].ID, 1); err != nil {
		t.Fatal(err)
	}
	done, err := m.Down(t.Context(), tenants[0].ID)
	if err != nil || done.Reverted != 2 || done.Version != 1 || versionIn(t, f, tenants[0].ID) != 1 || versionIn(t, f, tenants[1].ID) != 2 {
		t.Errorf("%+v, %v", done, err)
	}
	all, err := m.All(t.Context())
	if err != nil || all[0].Version != 1 || all[1].Version != 3 {
		t.Errorf("%+v, %v", all, err)
	}
	if one, err := m.Tenant(t.Context(), tenants[0].ID); err != nil || one.Version != 1 {
		t.Errorf("%+v, %v", one, err)
	}
	s, err := m.Status(t.Context())
	if err != nil || len(s.Pinned) != 1 || s.Pinned[0].Pinned != 1 || len(s.Behind) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	_, err = m.Down(t.Context(), tenants[1].ID)
	wantError(t, err, tenancy.ErrInvalid, "no Down")
	if err := m.Unpin(t.Context(), tenants[0].ID); err != nil {
		t.Fatal(err)
	}
	if all, err := m.All(t.Context()); err != nil || all[0].Version != 3 || !slices.Equal(all[0].Applied, []int64{2, 3}) {
		t.Errorf("%+v, %v", all, err)
	}
	// A Down that died after goose, before the catalog: nobody would look there, but for its mark.
	down := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	change(t, f, "tenants", `DELETE FROM `+placeBriefly(t, f, tenants[1].ID).table("goose_db_version")+` WHERE version_id > 1`)
	change(t, f, "tenants", `ALTER TABLE `+placeBriefly(t, f, tenants[1].ID).table("notes")+` DROP COLUMN once`)
	change(t, f, "primary", `UPDATE tenancy.data_sources SET version = 2, migrating = -2 WHERE id = (SELECT data_source FROM tenancy.tenants WHERE id = $1)`, tenants[1].ID)
	if all, err := down.Migrator().All(t.Context()); err != nil || !slices.Equal(all[1].Applied, []int64{2}) {
		t.Errorf("%+v, %v", all, err)
	}
}

// Nobody can connect to the tenants' server, and the run does not notice.
func TestARunWithNothingToDoConnectsToNoTenant(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	several(t, f, 3)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	change(t, f, "tenants", `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I CONNECTION LIMIT 0', current_database()); END $$`)
	done, err := tn.Migrator().All(t.Context())
	if err != nil || len(done) != 3 || done[2].Version != 1 {
		t.Errorf("%+v, %v", done, err)
	}
	if s, err := tn.Migrator().Status(t.Context()); err != nil || s.Versions[1] != 3 {
		t.Errorf("%+v, %v", s, err)
	}
	if drifts, err := tn.Migrator().Verify(t.Context()); err != nil || len(drifts) != 3 || sqlState(drifts[0].Err) != "53300" {
		t.Errorf("to ask the schemas needs a connection: %+v, %v", drifts, err)
	}
}

func TestVerifyFindsADriftAndARunMendsIt(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 4)
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	m := tn.Migrator()
	if _, err := m.All(t.Context()); err != nil {
		t.Fatal(err)
	}
	if drifts, err := m.Verify(t.Context()); err != nil || len(drifts) != 0 {
		t.Fatalf("%+v, %v", drifts, err)
	}
	// One was restored, one was migrated by a newer release by hand, and one has a view that would do something in the name of who reads it.
	restored, view := placeBriefly(t, f, tenants[0].ID), placeBriefly(t, f, tenants[2].ID)
	change(t, f, "tenants", `DELETE FROM `+restored.table("goose_db_version")+` WHERE version_id = 2`)
	change(t, f, "tenants", `ALTER TABLE `+restored.table("notes")+` DROP COLUMN once`)
	change(t, f, "tenants", `INSERT INTO `+placeBriefly(t, f, tenants[1].ID).table("goose_db_version")+` (version_id, is_applied) VALUES (7, true)`)
	admin := f.Admin(t, "tenants")
	must(t, admin, `ALTER TABLE `+view.table("goose_db_version")+` RENAME TO kept`)
	must(t, admin, `CREATE TABLE `+view.table("trap")+` (who text)`)
	must(t, admin, `GRANT INSERT ON `+view.table("trap")+` TO PUBLIC`)
	must(t, admin, `CREATE FUNCTION `+view.table("spring")+`() RETURNS bigint LANGUAGE sql AS 'INSERT INTO `+view.table("trap")+` VALUES (current_user) RETURNING 2::bigint'`)
	must(t, admin, `CREATE VIEW `+view.table("goose_db_version")+` AS SELECT 1 id, `+view.table("spring")+`() version_id, true is_applied`)
	must(t, admin, `ALTER VIEW `+view.table("goose_db_version")+` OWNER TO `+view.Owner)
	drifts, err := m.Verify(t.Context())
	if err != nil || len(drifts) != 3 || drifts[0].Recorded != 2 || drifts[0].Actual != 1 || drifts[1].Actual != 7 || drifts[2].Err == nil {
		t.Fatalf("%+v, %v", drifts, err)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM `+view.table("trap")); n != 0 {
		t.Error("code of the tenant's has run")
	}
	must(t, admin, `DROP VIEW `+view.table("goose_db_version"))
	must(t, admin, `ALTER TABLE `+view.table("kept")+` RENAME TO goose_db_version`)
	// And whatever else would have the server run code of the tenant's, or needs a look.
	version, spring := view.table("goose_db_version"), view.table("spring")
	must(t, admin, `CREATE OR REPLACE FUNCTION `+spring+`() RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RAISE EXCEPTION ''sprung by %'', current_user; END'`)
	must(t, admin, `CREATE DOMAIN `+view.table("sort")+` AS bigint`)
	for name, trap := range map[string][2]string{
		"a_policy":              {`ALTER TABLE ` + version + ` ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON ` + version + ` USING (` + spring + `() > 0)`, `DROP POLICY p ON ` + version + `; ALTER TABLE ` + version + ` DISABLE ROW LEVEL SECURITY`},
		"another_type":          {`ALTER TABLE ` + version + ` ALTER version_id TYPE ` + view.table("sort"), `ALTER TABLE ` + version + ` ALTER version_id TYPE bigint`},
		"an_index_of_a_part":    {`CREATE INDEX trapped ON ` + version + ` (id) WHERE version_id > 0`, `DROP INDEX ` + view.table("trapped")},
		"an_index_of_a_formula": {`CREATE INDEX trapped ON ` + version + ` ((version_id + 1))`, `DROP INDEX ` + view.table("trapped")},
		"statistics":            {`CREATE STATISTICS ` + view.table("trapped") + ` ON id, version_id FROM ` + version, `DROP STATISTICS ` + view.table("trapped")},
		"no_table":              {`ALTER TABLE ` + version + ` RENAME TO kept`, `ALTER TABLE ` + view.table("kept") + ` RENAME TO goose_db_version`},
	} {
		must(t, admin, trap[0])
		drifts, err := m.Verify(t.Context(), tenants[2].ID)
		if err != nil || len(drifts) != 1 || drifts[0].Err == nil || !strings.Contains(drifts[0].Err.Error(), "no table goose_db_version as goose makes it") {
			t.Errorf("%s: %+v, %v", name, drifts, err)
		}
		must(t, admin, trap[1])
	}
	if done, err := m.All(t.Context()); err != nil || len(done[0].Applied) > 0 {
		t.Errorf("without Verify: %+v, %v", done[0], err)
	}
	done, err := m.Run(t.Context(), tenancy.MigrateOptions{Verify: true})
	if err != nil || done[0].Drift == nil || !slices.Equal(done[0].Applied, []int64{2}) || done[1].Version != 7 || done[2].Drift != nil || done[3].Drift != nil {
		t.Errorf("%+v, %v", done, err)
	}
	if drifts, err := m.Verify(t.Context()); err != nil || len(drifts) != 0 {
		t.Errorf("after it: %+v, %v", drifts, err)
	}
}

func TestOneTenantOfASharedSchemaStandsForAll(t *testing.T) {
	t.Parallel()
	f, _, acme, globex, initech := sharedFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant, halfWay)})
	m := tn.Migrator()
	done, err := m.Run(t.Context(), tenancy.MigrateOptions{Tenants: []tenancy.ID{globex.ID}, UpTo: 2})
	if err != nil || len(done) != 1 || done[0].Version != 2 {
		t.Fatalf("%+v, %v", done, err)
	}
	if s, err := m.Status(t.Context()); err != nil || s.Versions[2] != 2 || s.Versions[1] != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	done, err = m.All(t.Context())
	migrateError(t, done, err)
	for _, r := range done { // initech has a schema of its own, and no table ready either
		wantError(t, r.Err, tenancy.ErrMigrationDirty, r.Tenant.Name)
	}
	change(t, f, "tenants", `DROP TABLE `+placeBriefly(t, f, acme.ID).table("half"))
	if err := m.Resolve(t.Context(), acme.ID, 3, false); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, fmt.Sprintf("[%d] <nil>", initech.ID), func() string {
		s, err := m.Status(t.Context())
		var dirty []tenancy.ID
		for _, d := range s.Dirty {
			dirty = append(dirty, d.Tenant.ID)
		}
		return fmt.Sprint(dirty, err)
	})
	if drifts, err := m.Verify(t.Context()); err != nil || len(drifts) != 0 {
		t.Errorf("%+v, %v", drifts, err)
	}
	_, err = m.Down(t.Context(), acme.ID)
	wantError(t, err, tenancy.ErrInvalid, "others")
	wantError(t, m.Pin(t.Context(), acme.ID, 1), tenancy.ErrInvalid, "others")
}

// TestMigratingProcess is the other process of the test below; without its environment it is nothing.
func TestMigratingProcess(t *testing.T) {
	if os.Getenv("TENANCY_TEST_MIGRATES") == "" {
		return
	}
	cfg, err := tenancy.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Migrations = killedMigrations(t)
	if os.Getenv("TENANCY_TEST_MIGRATES") == "alone" {
		cfg.Migrations = notesAnd(t, oncePerTenant, dyingAlone)
	}
	tn, err := tenancy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	if _, err := tn.Migrator().All(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func killedMigrations(t *testing.T) fs.FS {
	var more []string
	for i := range 4 {
		more = append(more, fmt.Sprintf("-- +goose Up\nCREATE TABLE step%d (id int);\nSELECT pg_sleep(0.01);\nINSERT INTO step%d VALUES (1);\n", i, i))
	}
	return notesAnd(t, more...)
}

func TestARunThatIsKilledIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	kills := 6
	if os.Getenv("TENANCY_LONG") == "1" {
		kills = 40
	}
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 6)
	primary := f.Admin(t, "primary")
	for i := range kills {
		cmd := exec.Command(os.Args[0], "-test.run=^TestMigratingProcess$")
		cmd.Env = append(os.Environ(), "TENANCY_TEST_MIGRATES=1", "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { kill(cmd) })
		sum := func() int { return scan[int](t, primary, `SELECT sum(version)::int FROM tenancy.data_sources`) }
		for before, end := sum(), time.Now().Add(20*time.Second); i%2 == 0 && before < 6*5 && sum() == before && time.Now().Before(end); { // every other one as soon as it has done something
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(37*i%200) * time.Millisecond)
		kill(cmd)
		bury(t, f, cmd)
	}
	tn := f.Open(t, tenancy.Config{Migrations: killedMigrations(t)})
	done, err := tn.Migrator().All(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range done {
		if m.Version != 5 || versionIn(t, f, tenants[i].ID) != 5 {
			t.Errorf("%+v", m)
		}
		for step := range 4 {
			if n := ask[int](t, f, "tenants", `SELECT count(*) FROM `+placeBriefly(t, f, tenants[i].ID).table(fmt.Sprintf("step%d", step))); n != 1 {
				t.Errorf("%s: step %d has %d rows", tenants[i].Name, step, n)
			}
		}
	}
	if s, err := tn.Migrator().Status(t.Context()); err != nil || s.Versions[5] != 6 || len(s.Dirty) > 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// dyingAlone is at work until its session ends.
const dyingAlone = "-- +goose NO TRANSACTION\n-- +goose Up\nCREATE TABLE half (id int);\nSELECT pg_sleep(60);\n"

// The process dies in the middle of what nothing rolls back, while another run waits for its tenant.
func TestAProcessThatDiesWithoutATransactionLeavesADirtyTenant(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	acme, globex := tenants[0], tenants[1]
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant, dyingAlone)})
	if err := tn.Migrator().Pin(t.Context(), globex.ID, 1); err != nil {
		t.Fatal(err)
	}
	holder := f.Admin(t, "tenants") // keeps the process from what it dies in until the other run waits behind it
	must(t, holder, `BEGIN`)
	must(t, holder, `LOCK TABLE `+placeBriefly(t, f, acme.ID).table("notes")+` IN ACCESS SHARE MODE`)
	cmd := exec.Command(os.Args[0], "-test.run=^TestMigratingProcess$")
	cmd.Env = append(os.Environ(), "TENANCY_TEST_MIGRATES=alone", "TENANCY_PRIMARY_URL="+f.PrimaryURL, "TENANCY_KEYS="+f.KeyText)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(cmd) })
	admin, half := f.Admin(t, "tenants"), placeBriefly(t, f, acme.ID).table("half")
	until(t, 20*time.Second, "1", func() string { return waiting(t, admin, "tenancy migration") })
	ended := make(chan error, 1)
	go func() { ended <- second(tn.Migrator().All(t.Context())) }()
	untilTrue(t, "the other run waits", func() bool { return tenancy.InTurn(tn, acme.ID) == 1 })
	must(t, holder, `ROLLBACK`)
	until(t, 20*time.Second, "true", func() string { return fmt.Sprint(scan[bool](t, admin, `SELECT to_regclass($1) IS NOT NULL`, half)) })
	dirty := func() string {
		s, err := tn.Migrator().Status(t.Context())
		var list [][2]int64
		for _, d := range s.Dirty {
			list = append(list, [2]int64{int64(d.Tenant.ID), d.Dirty})
		}
		return fmt.Sprint(list, err)
	}
	if got := dirty(); got != "[] <nil>" {
		t.Errorf("while it is at work %s are dirty", got)
	}
	killAtWork(t, cmd)
	bury(t, f, cmd)
	err := <-ended
	wantError(t, err, tenancy.ErrMigrationDirty, acme.Name)
	if state := sqlState(err); state != "?" {
		t.Errorf("it was begun again: %s", state)
	}
	until(t, 5*time.Second, fmt.Sprintf("[[%d 3]] <nil>", acme.ID), dirty)
	if v := versionIn(t, f, globex.ID); v != 1 {
		t.Errorf("the other one is at %d", v)
	}
	if err := tn.Migrator().Resolve(t.Context(), acme.ID, 3, true); err != nil {
		t.Fatal(err)
	}
	if done, err := tn.Migrator().All(t.Context()); err != nil || done[0].Version != 3 || dirty() != "[] <nil>" {
		t.Errorf("%+v, %v, %s", done, err, dirty())
	}
}

func TestACancelledRunBeginsNobodyElse(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	several(t, f, 4)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, GoMigrations: []tenancy.GoMigration{{Version: 2, Up: func(ctx context.Context, tx *databasesql.Tx) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}}}})
	done, err := tn.Migrator().Run(ctx, tenancy.MigrateOptions{Parallel: 1})
	migrateError(t, done, err)
	if errors.Is(done[0].Err, tenancy.ErrNotBegun) {
		t.Errorf("the first one: %v", done[0].Err)
	}
	for _, m := range done[1:] {
		if !errors.Is(m.Err, tenancy.ErrNotBegun) || !errors.Is(m.Err, context.Canceled) {
			t.Errorf("%+v", m)
		}
	}
	mended := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	if done, err := mended.Migrator().All(t.Context()); err != nil || done[3].Version != 2 {
		t.Errorf("%+v, %v", done, err)
	}
}
