package tenancy_test

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
)

// All statements of fn run in one transaction of the context's tenant.
func ExampleTenantAwareDB_InTx() {
	var tn *tenancy.Tenancy // of tenancy.Open
	rename := func(ctx context.Context, id int64, title string) error {
		return tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "insert into history (note, title) select id, title from notes where id = $1", id); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, "update notes set title = $2 where id = $1", id, title)
			return err
		})
	}
	_ = rename
}
