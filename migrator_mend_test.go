package tenancy_test

import (
	"context"
	databasesql "database/sql"
	"testing"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestADownThatCannotBeLookedAtKeepsItsMark: the table of versions cannot be read for a while, from the moment that the way back is committed.
func TestADownThatCannotBeLookedAtKeepsItsMark(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	hides := `-- +goose Up
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION hide() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN ALTER TABLE goose_db_version RENAME COLUMN version_id TO hidden; RETURN NULL; END $$;
-- +goose StatementEnd
CREATE CONSTRAINT TRIGGER hide AFTER UPDATE ON notes DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hide();
INSERT INTO notes (tenant, title) VALUES ('acme', 'one');

-- +goose Down
UPDATE notes SET title = 'two';
`
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t, hides), Isolation: tenancy.IsolationSchema})
	acme := tenancytest.Create(t, tn, "acme")
	if done, err := tn.Migrator().Down(t.Context(), acme.ID); err == nil {
		t.Errorf("nobody knows the version, and it says %+v", done)
	}
	if got := ask[int64](t, f, "primary", `SELECT coalesce(migrating, 0) FROM tenancy.data_sources`); got != -2 {
		t.Errorf("the mark is %d", got)
	}
	table := placeBriefly(t, f, acme.ID).table("goose_db_version")
	change(t, f, "tenants", "ALTER TABLE "+table+" RENAME COLUMN hidden TO version_id")
	change(t, f, "tenants", "DROP TRIGGER hide ON "+placeBriefly(t, f, acme.ID).table("notes"))
	done, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{})
	if err != nil || len(done) != 1 || len(done[0].Applied) != 1 {
		t.Errorf("the next run: %+v, %v", done, err)
	}
}

// TestAProvisionerThatIsEndedMeanwhileLeavesNoOwnerOpen, and fails nobody whose migration was done.
func TestAProvisionerThatIsEndedMeanwhileLeavesNoOwnerOpen(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tenants := several(t, f, 2)
	ended := 0
	tn := f.Open(t, tenancy.Config{Migrations: notesAnd(t), GoMigrations: []tenancy.GoMigration{{Version: 9, Up: func(context.Context, *databasesql.Tx) error {
		admin := f.Admin(t, "tenants")
		n := scan[int](t, admin, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'tenancy provisioner'`)
		ended += n
		return nil
	}}}})
	done, err := tn.Migrator().Run(t.Context(), tenancy.MigrateOptions{Parallel: 1})
	if err != nil || ended == 0 {
		t.Errorf("%d sessions were ended: %+v, %v", ended, done, err)
	}
	for _, tenant := range tenants {
		owner := placeBriefly(t, f, tenant.ID).Owner
		if ask[bool](t, f, "tenants", `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, owner) {
			t.Errorf("%s may log in", owner)
		}
	}
}

// TestAVersionTableThatIsLockedHoldsUpNobodyElse when the schemas are asked for their versions.
func TestAVersionTableThatIsLockedHoldsUpNobodyElse(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema})
	acme, globex := create(t, f, tn, "acme"), create(t, f, tn, "globex")
	blocker, err := f.Admin(t, "tenants").Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = blocker.Rollback(context.Background()) }()
	if _, err := blocker.Exec(t.Context(), "LOCK TABLE "+placeBriefly(t, f, acme.ID).table("goose_db_version")+" IN SHARE MODE"); err != nil {
		t.Fatal(err)
	}
	drifts, err := tn.Migrator().Verify(t.Context(), acme.ID, globex.ID)
	if err != nil || len(drifts) != 1 || drifts[0].Tenant.ID != acme.ID || sqlState(drifts[0].Err) != "55P03" {
		t.Errorf("%+v, %v", drifts, err)
	}
}
