package tenancy_test

import (
	"context"
	"errors"

	"github.com/msmt-go/tenancy"
)

// One customer gets a database of its own, the others a schema each. The service's queries are the same for all, and a
// tenant can move: what keeps it apart is the place that it is in.
func ExampleIsolation() {
	var tn *tenancy.Tenancy // of tenancy.Open
	signUp := func(ctx context.Context, name string, alone bool) (tenancy.Tenant, error) {
		n := tenancy.NewTenant{Name: name} // of Config.Isolation
		if alone {
			n.Isolation = tenancy.IsolationDatabase
		}
		return tn.Catalog().Create(ctx, n)
	}
	moveOut := func(ctx context.Context, id tenancy.ID, copyRows func(context.Context, tenancy.DataSource) error) error {
		c := tn.Catalog()
		if err := c.Suspend(ctx, id, tenancy.Suspension{Maintenance: true}); err != nil {
			return err
		}
		place, err := c.Prepare(ctx, id, "", tenancy.IsolationDatabase)
		if err == nil {
			err = copyRows(ctx, place)
		}
		if err == nil {
			err = c.SetDataSource(ctx, id, place)
		}
		return errors.Join(err, c.Resume(ctx, id))
	}
	_, _ = signUp, moveOut
}
