package tenancy

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// worker is what one of a run's workers keeps from one tenant to the next: a session for the tenants' locks, and one of a server's provisioner. It holds neither while it waits for
// its turn among the verbs of this node, or for a tenant's lock. The zero value has none yet, and nil is who works for one tenant only. It is one goroutine's.
type worker struct {
	locks       *pgx.Conn
	provisioner *pgx.Conn
	server      int64 // whose provisioner that is
}

// lockTenant is that of the primary.
func (w *worker) lockTenant(ctx context.Context, p *primaryDB, id ID) (held context.Context, release func(), err error) {
	if w == nil {
		return p.lockTenant(ctx, id)
	}
	if ctx, err = begin(ctx); err != nil {
		return nil, nil, err
	}
	return p.await(ctx, tenantLock(id), w.close, func() (context.Context, func(), error) { return w.tryLockTenant(ctx, p, id) })
}

func (w *worker) tryLockTenant(ctx context.Context, p *primaryDB, id ID) (held context.Context, release func(), err error) {
	done, err := w.turn(ctx, p)
	if err != nil {
		return nil, nil, err
	}
	kept := w.locks != nil && !w.locks.IsClosed()
	if !kept {
		w.closeLocks()
		if w.locks, err = pgx.ConnectConfig(ctx, p.direct); err != nil {
			done()
			return nil, nil, unavailable("lock", err)
		}
	}
	held, release, err = p.holdOn(ctx, w.locks, id, tryTenant, id, func() {
		w.unlock()
		done()
	})
	if err != nil && kept && w.locks == nil && ctx.Err() == nil { // it had ended since the tenant before, and nothing was locked
		return w.tryLockTenant(ctx, p, id)
	}
	return held, release, err
}

// turn is a place among the verbs.
func (w *worker) turn(ctx context.Context, p *primaryDB) (done func(), err error) {
	select {
	case p.verbs <- struct{}{}:
		return func() { <-p.verbs }, nil
	default:
		w.close() // who is at work may wait for its connections
		return p.verb(ctx)
	}
}

func (w *worker) unlock() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := w.locks.Exec(ctx, `SELECT pg_advisory_unlock_all()`); err != nil {
		w.closeLocks() // which unlocks, too
	}
}

// provisionerOf returns a session of the provisioner of the place's server. done ends its use.
func (w *worker) provisionerOf(ctx context.Context, p *place) (conn *pgx.Conn, done func(), err error) {
	if w == nil {
		if conn, err = p.provisionerConn(ctx); err != nil {
			return nil, nil, err
		}
		return conn, func() { closeConn(conn) }, nil
	}
	if w.server != p.server || w.provisioner == nil || w.provisioner.Ping(ctx) != nil {
		w.closeProvisioner()
		if w.provisioner, err = p.provisionerConn(ctx); err != nil {
			return nil, nil, err
		}
		w.server = p.server
	}
	return w.provisioner, func() {}, nil
}

func (w *worker) closeLocks() {
	if w.locks != nil {
		closeConn(w.locks)
		w.locks = nil
	}
}

func (w *worker) closeProvisioner() {
	if w.provisioner != nil {
		closeConn(w.provisioner)
		w.provisioner = nil
	}
}

func (w *worker) close() {
	w.closeLocks()
	w.closeProvisioner()
}
