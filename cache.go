package tenancy

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"
)

// Cache is a cache of the service's own, keyed by tenant and generation besides its key: one tenant's entry is
// never another's answer, and a tenant that moved starts anew. One bound holds for all tenants together.
//
// It is safe for concurrent use. Entries are shared: callers do not change what they get.
type Cache[K comparable, V any] struct {
	tn      *Tenancy
	entries *lookup[cacheKey[K], V]
}

type cacheKey[K comparable] struct {
	tenant     ID
	generation int64
	key        K
}

// CacheConfig bounds a Cache.
type CacheConfig struct {
	// Size is the number of entries of all tenants together. Required.
	Size int
	// LoadTimeout bounds one load. Default: 10 s.
	LoadTimeout time.Duration
}

// NewCache makes a cache over tn's tenants. The error is [ErrInvalid] or [ErrClosed].
func NewCache[K comparable, V any](tn *Tenancy, cfg CacheConfig) (*Cache[K, V], error) {
	def(&cfg.LoadTimeout, 10*time.Second)
	if cfg.Size < 1 {
		return nil, invalid(fmt.Errorf("CacheConfig.Size is %d: at least 1", cfg.Size))
	}
	if cfg.LoadTimeout < 0 {
		return nil, invalid(errors.New("CacheConfig.LoadTimeout: not below 0"))
	}
	c := &Cache[K, V]{tn: tn}
	var err error
	c.entries, err = newLookup[cacheKey[K], V](lookupConfig{size: cfg.Size, loadTimeout: cfg.LoadTimeout,
		parallel: math.MaxInt}, nil) // no line in which one tenant's loads could stand before another's: their pools bound them
	if err != nil {
		return nil, err
	}
	return c, tn.closeLater(c.entries.close)
}

// Get returns the entry of the tenant in ctx, loading it when there is none. Callers of the same
// entry share one load, and no error is kept. load's ctx carries a session of the tenant and is not the caller's:
// cancelling ctx ends the wait and not the load.
//
// Asking for the same entry within its own load waits for itself, until LoadTimeout.
//
// The error is [ErrNoTenant], [ErrTenantMismatch], a state of the tenant as in [Tenancy.Resolve], [ErrPrimaryUnavailable], [ErrClosed], ctx.Err() or that of load.
func (c *Cache[K, V]) Get(ctx context.Context, key K, load func(ctx context.Context, key K) (V, error)) (V, error) {
	var none V
	r, err := c.tn.current(ctx, "cache")
	if err != nil {
		return none, err
	}
	v, _, err := c.entries.getWith(ctx, cacheKey[K]{r.tenant.ID, r.tenant.Generation, key}, func(ctx context.Context, k cacheKey[K]) (V, bool, error) {
		v, err := load(withSession(ctx, Session{tenant: &r.tenant, record: r, source: "cache", realm: r.tenant.realm, work: true}), k.key)
		return v, err == nil, err
	})
	c.tn.logPanic(r.tenant, err)
	return v, err
}

// Forget removes the entry of the tenant in ctx from this node's cache. A load that began before is not kept. Other nodes are not told.
// The errors are those of Get.
func (c *Cache[K, V]) Forget(ctx context.Context, key K) error {
	r, err := c.tn.current(ctx, "cache")
	if err != nil {
		return err
	}
	c.entries.forget(cacheKey[K]{r.tenant.ID, r.tenant.Generation, key})
	return nil
}
