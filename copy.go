package tenancy

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// copyBatch is how many rows one round trip inserts where the server does not copy.
const copyBatch = 200

// copies says whether the server copies into the tenant's tables: those of a shared schema have policies, and COPY FROM is refused there. A nil pool is the host's.
func (p *tenantPool) copies() bool { return p == nil || p.tenant.Isolation != IsolationShared }

// insertRows is CopyFrom by INSERT, all rows or none: in a transaction of its own, or a savepoint of the one that b is. commit ends it.
func insertRows(ctx context.Context, b interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}, commit func(ctx context.Context, tx pgx.Tx) error, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (n int64, err error) {
	tx, err := b.Begin(ctx)
	if err != nil {
		return 0, err
	}
	defer rollback(ctx, tx) // also when the source panics; after the commit it does nothing
	sql := insertSQL(table, columns)
	for more := true; more; {
		var batch pgx.Batch
		for batch.Len() < copyBatch {
			if more = src.Next(); !more {
				break
			}
			values, err := src.Values()
			if err != nil {
				return 0, err
			}
			batch.Queue(sql, values...)
		}
		if batch.Len() == 0 {
			break
		}
		results := tx.SendBatch(ctx, &batch)
		for range batch.Len() {
			tag, err := results.Exec()
			if err != nil {
				_ = results.Close() // which says the same
				return 0, err
			}
			n += tag.RowsAffected() // a trigger can have kept one out
		}
		if err := results.Close(); err != nil {
			return 0, err
		}
	}
	if err := errors.Join(src.Err(), ctx.Err()); err != nil {
		return 0, err
	}
	return n, commit(ctx, tx)
}

// insertSQL writes all columns, identities included, as COPY does.
func insertSQL(table pgx.Identifier, columns []string) string {
	names, params := make([]string, len(columns)), make([]string, len(columns))
	for i, name := range columns {
		names[i], params[i] = ident.Quote(name), "$"+strconv.Itoa(i+1)
	}
	return "INSERT INTO " + table.Sanitize() + " (" + strings.Join(names, ", ") + ") OVERRIDING SYSTEM VALUE VALUES (" + strings.Join(params, ", ") + ")"
}
