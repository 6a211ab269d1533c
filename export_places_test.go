package tenancy

import (
	"context"
	"time"
)

// MoveUnlocked is SetDataSource of a tenant in service in a process that has lost its lock and does not know it yet. before is called ahead of each step.
func MoveUnlocked(ctx context.Context, tn *Tenancy, id ID, d DataSource, before func(step string)) error {
	c := tn.catalog
	now, err := c.place(ctx, id)
	if err != nil {
		return err
	}
	_, source, err := c.prepared(ctx, tn.primary.pool, d)
	if err != nil {
		return err
	}
	to, err := c.placeByID(ctx, source)
	if err != nil {
		return err
	}
	to.tenant = now.tenant
	before("enter")
	if err := c.enterPlace(ctx, now, to); err != nil {
		return err
	}
	before("move")
	if err := c.move(ctx, "set data source", now, to); err != nil {
		return err
	}
	before("leave")
	return c.leavePlace(ctx, now)
}

// SetLeaveTime makes the bound on closing what was left, the drain apart, another one than a minute.
func SetLeaveTime(tn *Tenancy, d time.Duration) { tn.leaveTime = d }

// MoveLate is SetDataSource of a tenant out of service, from where it says that it is fenced no more, in a process that loses its lock before the move.
func MoveLate(ctx context.Context, tn *Tenancy, id ID, d DataSource, between func()) (err error) {
	c := tn.catalog
	now, err := c.place(ctx, id)
	if err != nil {
		return err
	}
	_, source, err := c.prepared(ctx, tn.primary.pool, d)
	if err != nil {
		return err
	}
	to, err := c.placeByID(ctx, source)
	if err != nil {
		return err
	}
	to.tenant = now.tenant
	if err := c.unfence(ctx, id); err != nil {
		return err
	}
	defer func() { err = c.closeAgain(ctx, to, now.fenced, err) }()
	if err := c.enterPlace(ctx, now, to); err != nil {
		return err
	}
	between()
	return c.move(ctx, "set data source", now, to)
}
