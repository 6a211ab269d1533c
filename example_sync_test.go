package tenancy_test

import (
	"context"
	"errors"
	"log"

	"github.com/msmt-go/tenancy"
)

// A directory is asked every few minutes. What it gave and gives no more is taken away; what was made by hand stays.
func ExampleCatalog_SyncMembers() {
	var tn *tenancy.Tenancy // of tenancy.Open
	pull := func(ctx context.Context, directory func(context.Context) ([]tenancy.Membership, error)) error {
		set, err := directory(ctx)
		if err != nil {
			return err
		}
		if len(set) == 0 { // it would remove everyone that the directory ever gave
			return errors.New("the directory answered nothing")
		}
		done, err := tn.Catalog().SyncMembers(ctx, "ldap", set)
		if err != nil {
			return err
		}
		log.Printf("%d added, %d changed, %d removed, %d left to others", done.Added, done.Changed, done.Removed, done.Kept)
		return nil
	}
	_ = pull
}
