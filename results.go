package tenancy

import (
	"cmp"
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// leasedRows are [pgx.Rows] that give their connection back when they end.
type leasedRows struct {
	pgx.Rows
	c     checkout
	begun bool  // a row was read, or the statement was sent a second time: it is not sent again
	err   error // that of Rows, as the caller is to hear it; set when c is given back

	ctx  context.Context // with the fields below, what the statement was
	db   *TenantAwareDB
	sql  string
	args []any
}

// Conn is pgx's own. One that tenants share is replaced afterwards.
func (r *leasedRows) Conn() *pgx.Conn {
	if r.c.conn != nil && r.c.dense != nil {
		r.c.dense.lent = true
	}
	return r.Rows.Conn()
}

// TypeMap is pgx's own, too.
func (r *leasedRows) TypeMap() *pgtype.Map {
	if r.c.conn != nil && r.c.dense != nil {
		r.c.dense.lent = true
	}
	return r.Rows.TypeMap()
}

func (r *leasedRows) Close() {
	r.Rows.Close()
	if err := r.Rows.Err(); err != nil && r.c.conn != nil {
		r.err = told(r.ctx, err, r.c.conn.Conn().IsClosed())
	}
	r.c.release()
}

func (r *leasedRows) Err() error { return cmp.Or(r.err, r.Rows.Err()) }

func (r *leasedRows) Next() bool {
	if r.Rows.Next() {
		r.begun = true
		return true
	}
	if err := r.Rows.Err(); err != nil && !r.begun && r.mayRepeat(err) {
		r.repeat()
		return r.Next()
	}
	r.Close()
	return false
}

func (r *leasedRows) mayRepeat(err error) bool {
	return r.c.conn != nil && mayRepeat(r.ctx, r.c.conn.Conn(), err, queriesOne(r.c.conn.Conn(), r.args))
}

// repeat sends the statement again, over another connection. Many an error shows at the first row only.
func (r *leasedRows) repeat() {
	r.begun = true
	r.Close()
	r.err = nil
	var err error
	if r.c, err = r.db.checkoutFor(r.ctx, "query", true); err == nil {
		r.Rows, _, err = r.c.query(r.ctx, r.sql, r.args)
	}
	if err != nil {
		r.Rows = errRows{err}
	}
}

// Scan closes the rows when it fails, as pgx does.
func (r *leasedRows) Scan(dest ...any) error {
	err := r.Rows.Scan(dest...)
	if err != nil {
		r.Close()
	}
	return err
}

// Values closes the rows when it fails, as pgx does.
func (r *leasedRows) Values() ([]any, error) {
	values, err := r.Rows.Values()
	if err != nil {
		r.Close()
	}
	return values, err
}

// leasedRow is a [pgx.Row]: the first of the rows, as pgx makes one of them.
type leasedRow leasedRows

func (r *leasedRow) Scan(dest ...any) error {
	rows := (*leasedRows)(r)
	defer rows.Close() // also when a Scan method of dest panics
	if err := rows.Err(); err != nil {
		return err
	}
	for _, d := range dest {
		if _, ok := d.(*pgtype.DriverBytes); ok { // it would point into a buffer that is no longer ours
			return errors.New("cannot scan into *pgtype.DriverBytes from QueryRow")
		}
	}
	if !rows.Next() {
		if err := rows.Err(); err != nil {
			return err
		}
		return pgx.ErrNoRows
	}
	_ = rows.Scan(dest...) // Err has it
	rows.Close()
	return rows.Err()
}

// leasedBatch is a [pgx.BatchResults] that give their connection back when they are closed, or
// leave that to the transaction which the batch began.
type leasedBatch struct {
	toldBatch
	c  checkout
	tx *guardedTx // nil: none, and c is ours
}

func (b *leasedBatch) Close() error {
	defer b.c.release() // also when a callback panics: the connection is busy then, and closed
	err := b.toldBatch.Close()
	if b.tx != nil {
		b.tx.closeIfOver()
	}
	return err
}

// Tx returns the guarded transaction, or an untyped nil as pgx does.
func (b *leasedBatch) Tx() pgx.Tx {
	if b.tx == nil {
		return nil
	}
	return b.tx
}

// toldBatch are a batch's results, with errors as the caller is to hear them.
type toldBatch struct {
	pgx.BatchResults
	ctx context.Context
}

func (b toldBatch) Exec() (pgconn.CommandTag, error) {
	tag, err := b.BatchResults.Exec()
	return tag, told(b.ctx, err, false)
}

func (b toldBatch) Query() (pgx.Rows, error) {
	rows, err := b.BatchResults.Query()
	return toldRows{rows, b.ctx}, told(b.ctx, err, false)
}

func (b toldBatch) QueryRow() pgx.Row { return toldRow{b.BatchResults.QueryRow(), b.ctx} }
func (b toldBatch) Close() error      { return told(b.ctx, b.BatchResults.Close(), false) }

type toldRows struct {
	pgx.Rows
	ctx context.Context
}

func (r toldRows) Err() error { return told(r.ctx, r.Rows.Err(), false) }

type toldRow struct {
	pgx.Row
	ctx context.Context
}

func (r toldRow) Scan(dest ...any) error { return told(r.ctx, r.Row.Scan(dest...), false) }

// failedBatch is a batch that was never sent. pgx's own would panic in FieldDescriptions and Scan
// of the rows it returns; its Tx, a closed one if the batch asked for one, is right.
type failedBatch struct {
	pgx.BatchResults
	err error
}

func (b failedBatch) Query() (pgx.Rows, error) { return errRows{b.err}, b.err }
func (b failedBatch) QueryRow() pgx.Row        { return errRow{b.err} }

// errRows are the rows of a query that was not run.
type errRows struct{ err error }

func (errRows) Close()                                       {}
func (r errRows) Err() error                                 { return r.err }
func (errRows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (errRows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (errRows) Next() bool                                   { return false }
func (r errRows) Scan(...any) error                          { return r.err }
func (r errRows) Values() ([]any, error)                     { return nil, r.err }
func (errRows) RawValues() [][]byte                          { return nil }
func (errRows) Conn() *pgx.Conn                              { return nil }
func (errRows) TypeMap() *pgtype.Map                         { return nil }

type errRow struct{ err error }

func (r errRow) Scan(...any) error { return r.err }
