package tenancy_test

import (
	"context"
	"log"
	"os"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// A new tenant begins with a note. The statement can run again, where a process died between its commit and the record of the tenant.
func ExampleConfig_seed() {
	cfg, err := tenancy.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	cfg.Migrations = os.DirFS("migrations") // or go:embed
	cfg.Seed = func(ctx context.Context, t tenancy.Tenant, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO notes (id, title) VALUES (1, 'Welcome, ' || $1) ON CONFLICT (id) DO NOTHING`, t.DisplayName)
		return err
	}
	tn, err := tenancy.Open(context.Background(), cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer tn.Close()
	if _, err := tn.Catalog().Create(context.Background(), tenancy.NewTenant{Name: "acme", DisplayName: "Acme"}); err != nil {
		log.Fatal(err)
	}
}
