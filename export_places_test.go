package tenancy

import (
	"context"
	"time"
)

// MoveUnlocked is SetDataSource of a tenant in service in a process that has lost its lock and does not know it yet. before is called ahead of each step.
func MoveUnlocked(ctx context.Context, tn *Tenancy, id ID, d DataSource, before func(step string)) error {
	c := tn.catalog
	now, to, err := c.bothPlaces(ctx, id, d)
	if err != nil {
		return err
	}
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

// bothPlaces reads where the tenant is and where d leads, as SetDataSource does.
func (c *Catalog) bothPlaces(ctx context.Context, id ID, d DataSource) (now, to *place, err error) {
	if now, err = c.place(ctx, id); err != nil {
		return nil, nil, err
	}
	_, source, err := c.prepared(ctx, c.tn.primary.pool, d)
	if err != nil {
		return nil, nil, err
	}
	if to, err = c.placeByID(ctx, source); err != nil {
		return nil, nil, err
	}
	to.tenant = now.tenant
	return now, to, nil
}

// SetLeaveTime makes the bound on closing what was left, the drain apart, another one than a minute.
func SetLeaveTime(tn *Tenancy, d time.Duration) { tn.leaveTime = d }

// MoveLate is SetDataSource of a tenant out of service, from where it says that it is fenced no more, in a process that loses its lock before the move.
func MoveLate(ctx context.Context, tn *Tenancy, id ID, d DataSource, between func()) (err error) {
	c := tn.catalog
	now, to, err := c.bothPlaces(ctx, id, d)
	if err != nil {
		return err
	}
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
