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
	table *lease.Table[ID, T]
}

// RegistryConfig says how a Registry's values live.
type RegistryConfig[T any] struct {
	// Build makes the value of one tenant. Its ctx carries a session of that tenant and a deadline of 30 s,
	// and is not the caller's: a caller who leaves does not end it. Building asks for no value of the same tenant in the same registry: that is an error. Required.
	Build func(ctx context.Context, t Tenant) (T, error)
	// Close ends a value, once, after its last use. Default: nothing to close.
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
	r.table = lease.New(lease.Config[ID, T]{
		Build: func(ctx context.Context, id ID, generation int64) (value T, err error) {
			rec, err := tn.view.recordAt(ctx, id, generation)
			if err != nil {
				return value, err
			}
			return cfg.Build(withSession(ctx, Session{tenant: &rec.tenant, record: rec, source: "registry"}), rec.tenant)
		},
		Close: func(value T) {
			if cfg.Close == nil {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), registryCloseTimeout)
			defer cancel()
			if err := cfg.Close(ctx, value); err != nil {
				tn.cfg.Logger.Warn("tenancy: closing a registry's value failed", "error", err)
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
	tn.followers = append(tn.followers, tableFollower[T]{r.table})
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
	return fn(l.Value())
}

// Acquire is Use for work that outlives a call: the value stays open until Release. The errors are those of Use.
func (r *Registry[T]) Acquire(ctx context.Context) (*Lease[T], error) {
	l, err := r.acquire(ctx)
	if err != nil {
		return nil, err
	}
	return &Lease[T]{lease: l, release: sync.OnceFunc(l.Release)}, nil
}

func (r *Registry[T]) acquire(ctx context.Context) (lease.Lease[ID, T], error) {
	rec, err := r.tn.current(ctx, "acquire")
	if err != nil {
		return lease.Lease[ID, T]{}, err
	}
	l, err := r.table.Acquire(ctx, rec.tenant.ID, rec.tenant.Generation)
	if errors.Is(err, lease.ErrClosed) {
		err = ErrClosed
	}
	if err != nil {
		return l, &Error{Op: "acquire", Tenant: rec.tenant.ID, Name: rec.tenant.Name, Err: err}
	}
	return l, nil
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
	lease   lease.Lease[ID, T]
	release func()
}

// Value returns the value, which must not be used after Release.
func (l *Lease[T]) Value() T { return l.lease.Value() }

// Release gives the value back. Further calls do nothing.
func (l *Lease[T]) Release() { l.release() }

// tableFollower lets the feed end what a table holds.
type tableFollower[T any] struct{ table *lease.Table[ID, T] }

func (f tableFollower[T]) held() (ids []ID) {
	f.table.Each(func(id ID, _ int64, _ T, _ int) { ids = append(ids, id) })
	return ids
}

func (f tableFollower[T]) retire(id ID, below int64) { f.table.Retire(id, below) }
