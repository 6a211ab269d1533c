package tenancy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Catalog is the Go face of the primary, and the one place for every verb of a tenant's life.
// It is safe for concurrent use, also by several nodes. Every write is one transaction of the
// primary that numbers and announces the change; when a verb returns, this node has applied it,
// or, where it could not read the primary a second time, does so within PollPeriod.
//
// Verbs of one tenant take turns, on all nodes: one whose turn has not come when ctx ends is [ErrInProgress]. One for which this node's budget
// (Limits.ServerConns) has had no place among the verbs is [ErrBusy].
//
// The catalog checks no permissions: whoever may call it may manage every tenant.
type Catalog struct{ tn *Tenancy }

// Tenant returns the tenant as the primary has it now. The error is [ErrTenantNotFound] or [ErrPrimaryUnavailable].
func (c *Catalog) Tenant(ctx context.Context, id ID) (Tenant, error) {
	return c.tenant(ctx, `t.id = $1`, id)
}

// TenantByName is Tenant by its unique name.
func (c *Catalog) TenantByName(ctx context.Context, name string) (Tenant, error) {
	return c.tenant(ctx, `t.name = $1`, name)
}

func (c *Catalog) tenant(ctx context.Context, where string, arg any) (Tenant, error) {
	p := c.tn.primary
	t, err := p.scanTenant(p.pool.QueryRow(ctx, `SELECT `+tenantColumns+` FROM tenancy.tenants t WHERE `+where, arg))
	if errors.Is(err, pgx.ErrNoRows) {
		return Tenant{}, ErrTenantNotFound
	}
	return t, refusal("read tenant", err)
}

// Filter chooses tenants. The zero Filter is all of them but the purged.
type Filter struct {
	State  State  // "": every state but purged
	Prefix string // of the name
}

// Tenants iterates over the chosen tenants in order of ID, reading the primary page by page. It stops at
// the first error, which comes with a zero Tenant.
func (c *Catalog) Tenants(ctx context.Context, f Filter) iter.Seq2[Tenant, error] {
	const page = 500
	return func(yield func(Tenant, error) bool) {
		var after ID
		for {
			p := c.tn.primary
			rows, _ := p.pool.Query(ctx, `SELECT `+tenantColumns+` FROM tenancy.tenants t
				WHERE t.id > $1 AND ($2 = '' AND t.state <> 'purged' OR t.state = $2) AND starts_with(t.name, $3)
				ORDER BY t.id LIMIT $4`, after, f.State, f.Prefix, page)
			tenants, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Tenant, error) { return p.scanTenant(row) })
			if err != nil {
				yield(Tenant{}, refusal("list tenants", err))
				return
			}
			for _, t := range tenants {
				after = t.ID
				if !yield(t, nil) {
					return
				}
			}
			if len(tenants) < page {
				return
			}
		}
	}
}

// DataSource returns how the tenant's data is reached, without the password.
func (c *Catalog) DataSource(ctx context.Context, id ID) (DataSource, error) {
	p, err := c.place(ctx, id)
	if err != nil {
		return DataSource{}, &Error{Op: "read data source", Tenant: id, Err: err}
	}
	d := p.source
	d.Password = ""
	return d, nil
}

// write runs fn in one transaction of the primary, then waits until this node has applied what it changed.
func (c *Catalog) write(ctx context.Context, op string, id ID, fn func(tx pgx.Tx) error) error {
	ctx, err := begin(ctx)
	if err != nil {
		return &Error{Op: op, Tenant: id, Err: err}
	}
	if err := c.tn.primary.transact(ctx, fn); err != nil {
		return &Error{Op: op, Tenant: id, Err: refusal(op, err)}
	}
	c.tn.feed.catchUp(ctx)
	return nil
}

// refusal keeps the errors that this package decided on, and calls all others what they are: the primary's.
func refusal(op string, err error) error {
	for _, class := range []error{ErrTenantNotFound, ErrTenantExists, ErrTenantGone, ErrQuarantined, ErrUserLimit, ErrInvalid, ErrForbidden, ErrNoProvisioner, ErrNoRoom, ErrTenantNotReady, ErrInProgress} {
		if errors.Is(err, class) {
			return err
		}
	}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && strings.HasPrefix(pg.Code, "22") {
		return hinted(ErrInvalid, "the primary cannot store a value: %s", pg.Message)
	}
	return unavailable(op, err)
}

// transact runs fn in a transaction, once more where the server chose it as a deadlock's victim: nothing of it remains then. A COMMIT whose answer the caller
// did not wait for is ErrPrimaryUnavailable: it may have been done.
func (p *primaryDB) transact(ctx context.Context, fn func(tx pgx.Tx) error) error {
	for try := 1; ; try++ {
		committing := false
		err := pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
			err := fn(tx)
			committing = err == nil
			return err
		})
		if committing && errors.Is(err, context.Canceled) && !pgconn.SafeToRetry(err) {
			return fmt.Errorf("%w: the call ended before the answer to its COMMIT, which may have been done: %w", ErrPrimaryUnavailable, withoutSecrets(err))
		}
		if try == 3 || !isState(err, "40P01", "40001") {
			return err
		}
	}
}

// isState reports whether err is the server's answer with that SQLSTATE.
func isState(err error, codes ...string) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return false
	}
	for _, code := range codes {
		if pg.Code == code {
			return true
		}
	}
	return false
}

func newUID() UID {
	var u UID
	_, _ = rand.Read(u[:]) // never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return u
}

// Rename gives the tenant another unique name. IDs, data and logins stay as they are.
// The error is [ErrInvalid], [ErrTenantExists] (the name is taken, also by a deleted tenant), [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (c *Catalog) Rename(ctx context.Context, id ID, name string) error {
	if err := c.checkName(name); err != nil {
		return &Error{Op: "rename", Tenant: id, Err: err}
	}
	return c.write(ctx, "rename", id, func(tx pgx.Tx) error {
		if _, err := lockRow(ctx, tx, id); err != nil {
			return err
		}
		return rename(ctx, tx, "rename", id, name)
	})
}

// checkName refuses what a tenant that is there cannot be called.
func (c *Catalog) checkName(name string) error {
	if err := ident.Slug(name); err != nil {
		return invalid(fmt.Errorf("name: %w", err))
	}
	if single := c.tn.cfg.SingleTenant; single != "" && name != single {
		return invalid(fmt.Errorf("Config.SingleTenant is %q: the next start would not find it", single))
	}
	return nil
}

// rename runs under the lock of the tenant's row.
func rename(ctx context.Context, tx pgx.Tx, op string, id ID, name string) error {
	if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET name = $2, updated = now() WHERE id = $1`, id, name); isState(err, "23505") {
		return ErrTenantExists
	} else if err != nil {
		return err
	}
	if err := audit(ctx, tx, op, id, map[string]any{"name": name}); err != nil {
		return err
	}
	return changed(ctx, tx, "tenant", id, "")
}

// lockRow locks a living tenant's row for the transaction and returns its state.
func lockRow(ctx context.Context, tx pgx.Tx, id ID) (State, error) {
	var s State
	err := tx.QueryRow(ctx, `SELECT state FROM tenancy.tenants WHERE id = $1 FOR NO KEY UPDATE`, id).Scan(&s)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return "", ErrTenantNotFound
	case err != nil:
		return "", err
	case s == StatePurged:
		return s, ErrTenantGone
	}
	return s, nil
}
