package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/msmt-go/tenancy"
)

// Sign-up: the same request again finishes what a crash left, another one for the same name is refused.
func ExampleCatalog_Create() {
	var tn *tenancy.Tenancy // of tenancy.Open
	signUp := func(ctx context.Context, name string, admin tenancy.UserKey) (tenancy.Tenant, error) {
		t, err := tn.Catalog().Create(ctx, tenancy.NewTenant{Name: name, Admin: admin, MaxUsers: 50})
		if errors.Is(err, tenancy.ErrTenantExists) {
			return tenancy.Tenant{}, errors.New("this name is taken")
		}
		return t, err
	}
	_ = signUp
}

// A tenant under maintenance: its members get 503 with the message, and no session of it is left at the server.
func ExampleCatalog_Suspend() {
	var tn *tenancy.Tenancy // of tenancy.Open
	maintain := func(ctx context.Context, id tenancy.ID, work func(context.Context) error) error {
		err := tn.Catalog().Suspend(ctx, id, tenancy.Suspension{
			Maintenance: true, Message: "We are moving your data.", RetryAfter: 10 * time.Minute,
		})
		if err != nil {
			return err
		}
		return errors.Join(work(ctx), tn.Catalog().Resume(ctx, id))
	}
	_ = maintain
}

// A job of every day drops the deleted tenants whose quarantine is over.
func ExampleCatalog_Purge() {
	var tn *tenancy.Tenancy // of tenancy.Open
	purge := func(ctx context.Context) error {
		for t, err := range tn.Catalog().Tenants(ctx, tenancy.Filter{State: tenancy.StateDeleted}) {
			if err != nil {
				return err
			}
			if _, err := tn.Catalog().Purge(ctx, t.ID, t.Name); err != nil && !errors.Is(err, tenancy.ErrQuarantined) {
				return err
			}
		}
		return nil
	}
	_ = purge
}

// Tenants are read page by page; the error comes with the last pair.
func ExampleCatalog_Tenants() {
	var tn *tenancy.Tenancy // of tenancy.Open
	list := func(ctx context.Context) error {
		for t, err := range tn.Catalog().Tenants(ctx, tenancy.Filter{State: tenancy.StateSuspended}) {
			if err != nil {
				return err
			}
			fmt.Println(t.ID, t.Name)
		}
		return nil
	}
	_ = list
}

// A deployment migrates all tenants; one that fails does not keep the others.
func ExampleMigrator_All() {
	var tn *tenancy.Tenancy // of tenancy.Open
	migrate := func(ctx context.Context) error {
		results, err := tn.Migrator().All(ctx)
		for _, r := range results {
			if r.Err != nil {
				log.Printf("%s stays at version %d: %v", r.Tenant.Name, r.Version, r.Err)
			}
		}
		return err
	}
	_ = migrate
}
