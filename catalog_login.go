package tenancy

import "context"

// Login returns how the tenant's own login reaches its data, with the password: for a tool such as psql or pg_dump, which is then behind the wall that the tenant's
// calls are behind, and outside this library's limits. A suspension ends its sessions, and [Catalog.RotatePassword] the password.
//
// The audit trail has the action "login". Behind a pooler the address is that of the server itself.
//
// The error is [ErrTenantNotFound], [ErrTenantSuspended], [ErrTenantMaintenance], [ErrTenantGone], [ErrTenantNotReady] (the login of a tenant that is not in service is closed) or [ErrPrimaryUnavailable].
func (c *Catalog) Login(ctx context.Context, id ID) (DataSource, error) {
	const op = "login"
	fail := func(err error) (DataSource, error) { return DataSource{}, &Error{Op: op, Tenant: id, Err: err} }
	ctx, err := begin(ctx)
	if err != nil {
		return fail(err)
	}
	p, err := c.place(ctx, id)
	if err == nil {
		err = settled(p.tenant.State)
	}
	if err != nil {
		return fail(err)
	}
	switch p.tenant.State {
	case StateSuspended:
		return fail(ErrTenantSuspended)
	case StateMaintenance:
		return fail(ErrTenantMaintenance)
	}
	if err := c.note(ctx, op, id, map[string]any{"login": p.source.User}); err != nil {
		return DataSource{}, err
	}
	d := p.source
	d.Pooler, d.PoolerTLS = "", ""
	return d, nil
}
