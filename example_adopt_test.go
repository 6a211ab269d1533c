package tenancy_test

import (
	"context"
	"fmt"
	"log"

	"github.com/msmt-go/tenancy"
)

// The tables of a service with one customer become the first tenant's. docs/adoption.md shows the plan.
func ExampleCatalog_Adopt() {
	var tn *tenancy.Tenancy // of tenancy.Open
	adopt := func(ctx context.Context) error {
		shop := tenancy.Adoption{Name: "acme", Login: "app", Domains: []string{"acme.example.com"}}
		plan, err := tn.Catalog().PlanAdoption(ctx, shop)
		if err != nil {
			return err
		}
		fmt.Print(plan)
		if len(plan.Obstacles) > 0 {
			return fmt.Errorf("%d things stand in the way", len(plan.Obstacles))
		}
		acme, err := tn.Catalog().Adopt(ctx, shop) // again, if it died
		if err != nil {
			return err
		}
		inTenant, err := tn.Enter(ctx, acme.ID)
		if err != nil {
			return err
		}
		var notes int
		if err := tn.DB().QueryRow(inTenant, `SELECT count(*) FROM notes`).Scan(&notes); err != nil {
			log.Printf("the way back: %v", err)
			return tn.Catalog().Unadopt(ctx, acme.ID)
		}
		return tn.Catalog().ConfirmAdoption(ctx, acme.ID)
	}
	_ = adopt
}
