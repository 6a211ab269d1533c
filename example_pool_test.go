package tenancy_test

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/msmt-go/tenancy"
)

// PoolConfig changes a tenant's pool. Login, address and search_path are set again afterwards.
func ExampleConfig_poolConfig() {
	cfg := tenancy.Config{
		PoolConfig: func(_ context.Context, t tenancy.Tenant, pool *pgxpool.Config) error {
			if t.Name == "acme" {
				pool.MaxConns = 16
			}
			pool.ConnConfig.RuntimeParams["statement_timeout"] = "30s"
			return nil
		},
	}
	_ = cfg
}
