package tenancy_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// TestATenantBehindTheNodesCodeIsRefusedUntilItIsMigrated: two shared tenants, two with a schema of their own, two nodes of the new release and one of the old, which serves all the time.
func TestATenantBehindTheNodesCodeIsRefusedUntilItIsMigrated(t *testing.T) {
	t.Parallel()
	f, old, acme, globex, initech := sharedFleet(t)
	umbrella := createIn(t, old, "umbrella", tenancy.IsolationSchema)
	all := []tenancy.Tenant{acme, globex, initech, umbrella}
	cfg := tenancy.Config{Migrations: notesAnd(t, oncePerTenant), MinVersion: 2}
	migrating := f.Open(t, cfg)
	cfg.Store = &tenancytest.Store{} // what it says does not hide what the primary knows of the schema
	for _, tenant := range all {
		cfg.Store.(*tenancytest.Store).PutTenant(tenant)
	}
	nodes := []*tenancy.Tenancy{migrating, f.Open(t, cfg), f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant), MinVersion: 1})}
	read := func(tn *tenancy.Tenancy, of tenancy.Tenant) error {
		ctx, err := tn.Enter(t.Context(), of.ID)
		if err != nil {
			return err
		}
		return tn.DB().QueryRow(ctx, `SELECT title FROM notes`).Scan(new(string))
	}
	want := func(behind ...tenancy.Tenant) {
		t.Helper()
		refused := map[tenancy.ID]bool{}
		for _, tenant := range behind {
			refused[tenant.ID] = true
		}
		for i, tn := range nodes {
			for _, tenant := range all {
				text := ""
				if refused[tenant.ID] && i < 2 {
					text = class(tenancy.ErrSchemaBehind)
				}
				until(t, 10*time.Second, text, func() string {
					if err := read(tn, tenant); err != nil {
						return class(err)
					}
					return ""
				})
			}
		}
	}
	want(all...)
	failed, ok := errors.AsType[*tenancy.Error](read(migrating, initech))
	if !ok || failed.RetryAfter <= 0 || failed.Name != "initech" {
		t.Errorf("the refusal is %+v", failed)
	}
	wantError(t, failed, tenancy.ErrSchemaBehind, "at version 1", "MinVersion is 2")
	_, err := migrating.Resolve(t.Context(), tenancy.Query{Hints: []tenancy.Hint{{Source: "path", Trust: tenancy.Place, By: tenancy.ByName, Value: "initech"}}})
	wantError(t, err, tenancy.ErrTenantNotFound) // an anonymous caller is not told
	if _, err := migrating.Migrator().Tenant(t.Context(), initech.ID); err != nil {
		t.Fatal(err)
	}
	if err := read(migrating, initech); err != nil { // who has migrated it has seen the change
		t.Error(err)
	}
	want(acme, globex, umbrella)
	session, err := migrating.Enter(t.Context(), initech.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := migrating.Migrator().All(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, tenant := range all { // at once here, too
		if err := read(migrating, tenant); err != nil {
			t.Error(err)
		}
	}
	want()
	// A session that was made before is refused with the rest.
	if _, err := migrating.Migrator().Down(t.Context(), initech.ID); err != nil {
		t.Fatal(err)
	}
	_, err = migrating.DB().Exec(session, `SELECT 1`)
	wantError(t, err, tenancy.ErrSchemaBehind, "initech")
	want(initech)

	for name, c := range map[string]tenancy.Config{
		"MinVersion is 3":  {Migrations: notesAnd(t, oncePerTenant), MinVersion: 3},
		"MinVersion is -1": {Migrations: notesAnd(t, oncePerTenant), MinVersion: -1},
		"MinVersion is 1":  {MinVersion: 1},
	} {
		c.PrimaryURL, c.Keys = f.PrimaryURL, f.Keys
		_, err := tenancy.Open(t.Context(), c)
		wantError(t, err, tenancy.ErrInvalid, name)
	}
}

// TestNoCallOfTheOldReleaseFailsWhileItsTenantIsMigrated: SELECT * has a plan that the migration makes invalid, on each connection that has it.
func TestNoCallOfTheOldReleaseFailsWhileItsTenantIsMigrated(t *testing.T) {
	t.Parallel()
	f, old, acme, globex, _ := sharedFleet(t)
	umbrella := createIn(t, old, "umbrella", tenancy.IsolationSchema)
	next := f.Open(t, tenancy.Config{Migrations: notesAnd(t, oncePerTenant)})
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	read, newer := make(chan struct{}, 6), make(chan struct{}, 6)
	for i := range 6 {
		tenant := []tenancy.Tenant{acme, globex, umbrella}[i%3]
		clients.Go(func() {
			of, err := old.Enter(t.Context(), tenant.ID)
			if err != nil {
				t.Error(err)
				return
			}
			for seen := 0; ctx.Err() == nil; {
				rows, err := old.DB().Query(of, `SELECT * FROM notes`)
				if err != nil {
					t.Errorf("%s: %v", tenant.Name, err)
					return
				}
				columns := 0
				for rows.Next() {
					columns = len(rows.RawValues())
				}
				if err := rows.Err(); err != nil {
					t.Errorf("%s: %v", tenant.Name, err)
					return
				}
				switch {
				case seen == 0:
					read <- struct{}{}
				case columns > seen:
					newer <- struct{}{}
				}
				seen = columns
			}
		})
	}
	each := func(what string, done <-chan struct{}) {
		for range 6 {
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Error("not every client has " + what)
				return
			}
		}
	}
	each("read once", read)
	if _, err := next.Migrator().All(t.Context()); err != nil {
		t.Error(err)
	}
	each("seen the new column", newer)
	stop()
	clients.Wait()
}
