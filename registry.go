package tenancy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/msmt-go/tenancy/internal/lease"
)

// Registry holds one live value of the service's own per tenant: a worker, a client, an index.
// A value is built at the tenant's first use, replaced when the tenant's generation changes, and
// closed when the tenant is suspended or gone, idle, or when the registry ends; never while it is in use.
//
// The tenant comes from the context alone, so code of one tenant cannot ask for another's value. A
// Registry is safe for concurrent use. Close ends it; so does [Tenancy.Close], in reverse order of creation.
type Registry[T any] struct {
	tn    *Tenancy
	table *lease.Table[ID, built[T]]
}

// built is a value with the tenant that it was built for.
type built[T any] struct {
	value  T
	record *record
}

func (b built[T]) session() Session {
	return Session{tenant: &b.record.tenant, record: b.record, source: "registry", realm: b.record.tenant.realm, work: true}
}

// RegistryConfig says how a Registry's values live.
type RegistryConfig[T any] struct {
	// Build makes the value of one tenant. Its ctx carries a session of that tenant and is not the caller's: a caller who leaves
	// does not end it. It ends after 30 s and when Build returns; what Build starts keeps [Detach](ctx).
	// Building asks for no value of the same tenant in the same registry: that is an error. Required.
	Build func(ctx context.Context, t Tenant) (T, error)
	// Close ends a value, once, after its last use. Its ctx carries a session of the tenant, which works unless
	// the tenant is out of service, and ends after 30 s. An error is logged. Default: nothing to close.
	Close func(ctx context.Context, value T) error
	// IdleAfter is how long an unused value is kept. Default 0: until the tenant or the registry ends.
	IdleAfter time.Duration
	// Replace is the order when a tenant moves to a new generation. Default BuildFirst.
	Replace Replacement
}

// Replacement is the order in which a value follows another.
type Replacement int

const (
	BuildFirst Replacement = iota // the new value serves at once, the old one drains: right for pools and clients
	CloseFirst                    // the old value has ended before the new one starts: right for workers
)

// registryCloseTimeout bounds one value's Close.
const registryCloseTimeout = 30 * time.Second

// NewRegistry makes a registry that follows tn's tenants. The error is [ErrInvalid] or [ErrClosed].
func NewRegistry[T any](tn *Tenancy, cfg RegistryConfig[T]) (*Registry[T], error) {
	switch {
	case cfg.Build == nil:
		return nil, invalid(errors.New("RegistryConfig.Build is required"))
	case cfg.IdleAfter < 0:
		return nil, invalid(fmt.Errorf("RegistryConfig.IdleAfter is %v: not below 0", cfg.IdleAfter))
	case cfg.Replace != BuildFirst && cfg.Replace != CloseFirst:
		return nil, invalid(fmt.Errorf("RegistryConfig.Replace is %d: BuildFirst or CloseFirst", cfg.Replace))
	}
	r := &Registry[T]{tn: tn}
	r.table = lease.New(lease.Config[ID, built[T]]{
		Build: func(ctx context.Context, id ID, generation int64) (b built[T], err error) {
			if b.record, err = tn.view.recordAt(ctx, id, generation); err != nil {
				return b, err
			}
			b.value, err = cfg.Build(withSession(ctx, b.session()), b.record.tenant)
			return b, err
		},
		Close: func(b built[T]) {
			if cfg.Close == nil {
				return
			}
			ctx, cancel := context.WithTimeout(withSession(context.Background(), b.session()), registryCloseTimeout)
			defer cancel()
			if err := cfg.Close(ctx, b.value); err != nil {
				tn.cfg.Logger.Warn("tenancy: closing a registry's value failed", "tenant", b.record.tenant.ID, "name", b.record.tenant.Name, "error", err)
			}
		},
		IdleAfter:  cfg.IdleAfter,
		CloseFirst: cfg.Replace == CloseFirst,
	})
	tn.mu.Lock()
	defer tn.mu.Unlock()
	if tn.ended != nil {
		return nil, ErrClosed
	}
	tn.followers = append(tn.followers, tableFollower[built[T]]{r.table})
	tn.registries = append(tn.registries, r)
	return r, nil
}

// Use runs fn with the value of the tenant in ctx, building it if no live one exists. Callers of
// the same tenant share one build, and the value stays open until fn returns.
//
// Cancelling ctx ends the wait, not the build: the finished value stays for the next caller.
// The error is [ErrNoTenant], [ErrTenantMismatch], a state of the tenant as in [Tenancy.Resolve],
// [ErrPrimaryUnavailable], [ErrClosed], ctx.Err(), or that of Build or fn.
func (r *Registry[T]) Use(ctx context.Context, fn func(value T) error) error {
	l, err := r.acquire(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	return fn(l.Value().value)
}

// Acquire is Use for work that outlives a call: the value stays open until Release. The errors are those of Use.
func (r *Registry[T]) Acquire(ctx context.Context) (*Lease[T], error) {
	l, err := r.acquire(ctx)
	if err != nil {
		return nil, err
	}
	return &Lease[T]{lease: l, release: sync.OnceFunc(l.Release)}, nil
}

func (r *Registry[T]) acquire(ctx context.Context) (lease.Lease[ID, built[T]], error) {
	rec, err := r.tn.current(ctx, "acquire")
	if err != nil {
		return lease.Lease[ID, built[T]]{}, err
	}
	l, err := r.table.Acquire(ctx, rec.tenant.ID, rec.tenant.Generation)
	if errors.Is(err, lease.ErrClosed) {
		err = ErrClosed
	}
	if _, told := err.(*Error); err != nil && !told {
		r.tn.logPanic(rec.tenant, err)
		err = &Error{Op: "acquire", Tenant: rec.tenant.ID, Name: rec.tenant.Name, Err: err}
	}
	return l, err
}

// Close refuses new uses, waits for those in flight until ctx ends, and closes every value. It may be called again.
func (r *Registry[T]) Close(ctx context.Context) error {
	cut, err := r.table.Close(ctx)
	if len(cut) > 0 {
		return fmt.Errorf("tenancy: registry: values of tenants %v were still in use at the end of the drain time", cut)
	}
	return err
}

// Lease keeps a registry's value open. It is safe for concurrent use.
type Lease[T any] struct {
	lease   lease.Lease[ID, built[T]]
	release func()
}

// Value returns the value, which must not be used after Release.
func (l *Lease[T]) Value() T { return l.lease.Value().value }

// Release gives the value back. Further calls do nothing.
func (l *Lease[T]) Release() { l.release() }

// tableFollower lets the feed end what a table holds.
type tableFollower[T any] struct{ table *lease.Table[ID, T] }

func (f tableFollower[T]) held() (ids []ID) {
	f.table.Each(func(id ID, _ int64, _ T, _ int) { ids = append(ids, id) })
	return ids
}

func (f tableFollower[T]) retire(id ID, below int64) { f.table.Retire(id, below) }
