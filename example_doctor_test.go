package tenancy_test

import (
	"context"
	"fmt"
	"os"

	"github.com/msmt-go/tenancy"
)

// A command before a deployment tells what is wrong, and fails where something does not work or is open that must be closed.
func ExampleTenancy_Doctor() {
	var tn *tenancy.Tenancy // of tenancy.Open
	examine := func(ctx context.Context) (exit int, err error) {
		findings, err := tn.Doctor(ctx)
		if err != nil {
			return 1, err
		}
		for _, f := range findings { // the worst first
			fmt.Fprintln(os.Stderr, f)
			if f.Level == tenancy.LevelFailure {
				exit = 1
			}
		}
		return exit, nil
	}
	_ = examine
}

func ExampleFinding() {
	fmt.Println(tenancy.Finding{
		Check: "role", Level: tenancy.LevelFailure, Server: "main", Tenant: tenancy.Tenant{ID: 7, Name: "acme"},
		What: "the owner t_0a1b_o has CREATEDB",
		Why:  "the wall between tenants is open",
		Mend: `ALTER ROLE "t_0a1b_o" NOCREATEDB;`,
	})
	// Output:
	// failure role server main tenant acme (7): the owner t_0a1b_o has CREATEDB; it matters: the wall between tenants is open; mend it with: ALTER ROLE "t_0a1b_o" NOCREATEDB;
}
