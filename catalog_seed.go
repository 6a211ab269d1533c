package tenancy

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/lease"
)

// seed runs Config.Seed as the place's own login. That it ran is recorded with the tenant's activation, which comes next.
func (c *Catalog) seed(ctx context.Context, p *place) error {
	if c.tn.cfg.Seed == nil {
		return nil
	}
	if err := c.runSeed(ctx, p); err != nil {
		return fmt.Errorf("seed: %w", err)
	}
	if p.dense { // its calls are not the login's, which owns the large objects that it made
		return giveToDense(ctx, p)
	}
	return nil
}

func (c *Catalog) runSeed(ctx context.Context, p *place) error {
	source, err := p.source.viaPooler()
	if err != nil {
		return err
	}
	conn, err := c.tn.proved(ctx, p.tenant, source, "tenancy seed")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	seeding := AsHost(ctx) // the caller may be in another tenant
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error { return c.callSeed(seeding, p.tenant, tx) })
}

func (c *Catalog) callSeed(ctx context.Context, t Tenant, tx pgx.Tx) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &lease.PanicError{Callback: "Config.Seed", Value: v, Stack: debug.Stack()}
			c.tn.logPanic(t, err)
		}
	}()
	return c.tn.cfg.Seed(ctx, t, tx)
}
