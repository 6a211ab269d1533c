package tenancy_test

import (
	"context"
	"errors"
	"log"

	"github.com/msmt-go/tenancy"
)

// A job at night tells where a tenant's schema is not what the migrations make.
func ExampleCatalog_Drift() {
	var tn *tenancy.Tenancy // of tenancy.Open
	report := func(ctx context.Context) error {
		drifts, err := tn.Catalog().Drift(ctx)
		if err != nil {
			return err
		}
		var errs []error
		for _, d := range drifts {
			switch {
			case d.Err != nil:
				errs = append(errs, d.Err)
			case d.Version != d.Wants:
				log.Printf("%s is at version %d, not %d", d.Tenant.Name, d.Version, d.Wants)
			}
			for _, difference := range d.Differences {
				log.Printf("%s: %s", d.Tenant.Name, difference)
			}
		}
		return errors.Join(errs...)
	}
	_ = report
}
