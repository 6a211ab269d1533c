package tenancy

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Route does for one call what [TenantAwareDB.QueryRow] adds to its pool's: it asks the catalog's
// current word, leases the tenant's pool, looks at conn's proof, wraps the row and gives the lease
// back. conn is a connection of the tenant's pool that the caller holds; nothing is sent on it.
//
// It follows checkout, acquire and release line by line, without the connection.
func (db *TenantAwareDB) Route(ctx context.Context, conn *pgxpool.Conn) (pgx.Row, error) {
	r, err := db.tn.current(ctx, "query")
	if err != nil {
		return nil, err
	}
	l, err := db.tn.pools.Acquire(ctx, r.tenant.ID, r.tenant.Generation)
	if err != nil {
		return nil, err
	}
	p := l.Value()
	if !p.hasProved(conn.Conn()) {
		l.Release()
		return nil, errors.New("the connection is not proved")
	}
	row := &leasedRow{c: checkout{pool: p, lease: l}}
	row.c.lease.Release()
	return row, nil
}
