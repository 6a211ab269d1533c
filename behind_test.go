package tenancy_test

import (
	"errors"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// releases are the migrations of a service's first, second and third release. The third one's can die half-way.
func releases() (first, second, third fstest.MapFS) {
	notes := &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL, title text NOT NULL);\nSELECT tenancy_must('notes');\n")}
	more := &fstest.MapFile{Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN more int;\n-- +goose Down\nALTER TABLE notes DROP COLUMN more;\n")}
	alone := &fstest.MapFile{Data: []byte("-- +goose NO TRANSACTION\n-- +goose Up\nCREATE TABLE alone ();\nSELECT tenancy_must('alone');\n")}
	return fstest.MapFS{"00001_notes.sql": notes}, fstest.MapFS{"00001_notes.sql": notes, "00002_more.sql": more},
		fstest.MapFS{"00001_notes.sql": notes, "00002_more.sql": more, "00003_alone.sql": alone}
}

// versionOf is what the primary has recorded of a place.
func versionOf(t *testing.T, f *tenancytest.Fleet, d tenancy.DataSource) (version int) {
	t.Helper()
	return ask[int](t, f, "primary", `SELECT version FROM tenancy.data_sources WHERE schema = $1`, d.Schema)
}

// TestATenantMovesToAPlaceThatIsBehind: to one that was prepared before the tenant was migrated, and back to the one that it has left before it was migrated again.
func TestATenantMovesToAPlaceThatIsBehind(t *testing.T) {
	t.Parallel()
	first, second, third := releases()
	f := tenancytest.NewFleet(t)
	old := f.Open(t, tenancy.Config{Migrations: first})
	acme, globex := tenancytest.Create(t, old, "acme"), tenancytest.Create(t, old, "globex")
	here, there := sourceOf(t, old, acme.ID), prepare(t, old, acme.ID, "")
	for release, step := range []struct {
		migrations fstest.MapFS
		to         tenancy.DataSource
		sql        string // works with this release's tables alone
	}{{second, there, `SELECT more FROM notes`}, {third, here, `SELECT FROM alone`}} {
		version := release + 2
		tn := f.Open(t, tenancy.Config{Migrations: step.migrations, MinVersion: int64(version), DrainTimeout: 500 * time.Millisecond})
		if _, err := tn.Migrator().All(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := mustTenant(t, tn, "acme").Generation
		l := startLoad(t, 2, []tenancy.Tenant{acme, globex}, tn)
		if err := tn.Catalog().SetDataSource(t.Context(), acme.ID, step.to); err != nil {
			t.Fatalf("version %d: %v", version, err)
		}
		l.end()
		for _, failed := range l.failed {
			t.Errorf("version %d: %s", version, failed)
		}
		wantPlace(t, f, acme.ID, step.to)
		if got := versionOf(t, f, step.to); got != version {
			t.Errorf("the place is recorded at version %d, want %d", got, version)
		}
		if after := mustTenant(t, tn, "acme").Generation; after != before+1 {
			t.Errorf("generation %d after %d: the migration of a place that the tenant is not in moves its pools", after, before)
		}
		ctx, err := tn.Enter(t.Context(), acme.ID)
		if err != nil {
			t.Fatalf("version %d: %v", version, err)
		}
		if _, err := tn.DB().Exec(ctx, step.sql); err != nil {
			t.Errorf("version %d: %v", version, err)
		}
		if got := current(t, tn, globex.ID); got != placeOf(t, f, globex.ID).Schema {
			t.Errorf("the other tenant is in %s", got)
		}
		if drifts, err := tn.Migrator().Verify(t.Context()); err != nil || len(drifts) != 0 {
			t.Errorf("version %d: what is recorded is not what the schemas have: %v, %v", version, drifts, err)
		}
	}
}

// TestAPlaceThatCannotBeBroughtUpIsNotTaken: the tenant stays where it is, and is served.
func TestAPlaceThatCannotBeBroughtUpIsNotTaken(t *testing.T) {
	t.Parallel()
	first, second, third := releases()
	f := tenancytest.NewFleet(t)
	cfg := func(migrations fstest.MapFS) tenancy.Config {
		cfg := tenancy.Config{Isolation: tenancy.IsolationSchema, DrainTimeout: 500 * time.Millisecond}
		if migrations != nil {
			cfg.Migrations = migrations
		}
		return cfg
	}
	v1, v2, v3, none := f.Open(t, cfg(first)), f.Open(t, cfg(second)), f.Open(t, cfg(third)), f.Open(t, cfg(nil))
	acme, globex := tenancytest.Create(t, v1, "acme"), tenancytest.Create(t, v1, "globex")
	here, behind, dies, beyond := sourceOf(t, v1, acme.ID), prepare(t, v1, acme.ID, ""), prepare(t, v2, acme.ID, ""), prepare(t, v3, acme.ID, "")
	m, admin := v3.Migrator(), f.Admin(t, "tenants")
	refused := func(what string, tn *tenancy.Tenancy, to tenancy.DataSource, version int, class error, texts ...string) {
		t.Helper()
		before := mustTenant(t, tn, "acme").Generation
		err := tn.Catalog().SetDataSource(t.Context(), acme.ID, to)
		if !errors.Is(err, class) {
			t.Errorf("%s: %v, want %v", what, err, class)
		}
		for _, text := range texts {
			if err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, which does not say %q", what, err, text)
			}
		}
		wantPlace(t, f, acme.ID, here)
		if got := versionOf(t, f, to); got != version {
			t.Errorf("%s: the place is recorded at version %d, want %d", what, got, version)
		}
		if after := mustTenant(t, tn, "acme").Generation; after != before {
			t.Errorf("%s: generation %d after %d", what, after, before)
		}
		for id, want := range map[tenancy.ID]string{acme.ID: here.Schema, globex.ID: placeOf(t, f, globex.ID).Schema} {
			if got := current(t, tn, id); got != want {
				t.Errorf("%s: work is done in %s, want %s", what, got, want)
			}
		}
	}
	pin := func(version int64) {
		t.Helper()
		if err := m.Pin(t.Context(), acme.ID, version); err != nil {
			t.Fatal(err)
		}
	}

	pin(1)
	refused("a place beyond the pin", v3, beyond, 3, tenancy.ErrInvalid, "version 3", "pinned at 1", "Unpin")
	if err := m.Unpin(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Tenant(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	refused("a node of the release before", v2, behind, 2, tenancy.ErrInvalid, "version 2", "at 3", "Config.Migrations")
	refused("a node without migrations", none, behind, 2, tenancy.ErrNoMigrations)
	pin(2)
	refused("a tenant beyond its pin", v3, behind, 2, tenancy.ErrInvalid, "pinned at 2", "Migrator.Pin with 3")
	pin(3)
	must(t, admin, `CREATE TABLE `+dies.Schema+`.alone ()`)
	for _, what := range []string{"a migration that dies", "one that has died"} {
		refused(what, v3, dies, 2, tenancy.ErrMigrationDirty, dies.Schema, "DropPlace")
	}
	if status, err := m.Status(t.Context()); err != nil || len(status.Dirty) != 0 {
		t.Errorf("the tenant is dirty where it is: %+v, %v", status, err)
	}
	if err := v3.Catalog().DropPlace(t.Context(), dies); err != nil {
		t.Error(err)
	}
	if err := v3.Catalog().SetDataSource(t.Context(), acme.ID, behind); err != nil { // as the pin that is its own version lets it
		t.Error(err)
	}
	wantPlace(t, f, acme.ID, behind)

	// One that a process has left marked, and whose migration is whole, is looked at before it is the tenant's.
	change(t, f, "primary", `UPDATE tenancy.data_sources SET migrating = 3 WHERE schema = $1`, beyond.Schema)
	if err := v3.Catalog().SetDataSource(t.Context(), acme.ID, beyond); err != nil {
		t.Error(err)
	}
	wantPlace(t, f, acme.ID, beyond)
	if status, err := m.Status(t.Context()); err != nil || len(status.Dirty) != 0 {
		t.Errorf("the tenant is dirty where it has moved: %+v, %v", status, err)
	}
}
