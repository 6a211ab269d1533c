package tenancy

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/budget"
)

// worker is what one of a run's workers keeps from one tenant to the next: a session for the tenants' locks, and one of a server's provisioner. It holds neither while it waits for
// its turn among the verbs of this node. The zero value has none yet, and nil is who works for one tenant only. It is one goroutine's.
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
	done, err := w.turn(ctx, p)
	if err != nil {
		return nil, nil, err
	}
	if !usable(w.locks) {
		w.closeLocks()
		if w.locks, err = pgx.ConnectConfig(ctx, p.direct); err != nil {
			done()
			return nil, nil, unavailable("lock", err)
		}
	}
	return p.holdOn(ctx, w.locks, id, takeTenant, id, func() {
		w.unlock()
		done()
	})
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
	if w.server != p.server || !usable(w.provisioner) {
		w.closeProvisioner()
		if w.provisioner, err = p.provisionerConn(ctx); err != nil {
			return nil, nil, err
		}
		w.server = p.server
	}
	return w.provisioner, func() {}, nil
}

// usable says whether the session is there, as far as can be seen without asking its server.
func usable(conn *pgx.Conn) bool {
	if conn == nil || conn.IsClosed() {
		return false
	}
	c := budget.Of(conn.PgConn().Conn())
	return c == nil || !c.Stirs()
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
