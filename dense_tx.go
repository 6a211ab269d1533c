package tenancy

import (
	"context"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/msmt-go/tenancy/internal/plain"
)

// denseTx is a transaction in a shared session, or a savepoint in one. A savepoint's own statements are marked like all others, so it is not pgx's.
type denseTx struct {
	pgx.Tx
	s         *denseSession
	over      *bool  // the transaction has ended, and the session is somebody else's: shared with its savepoints
	savepoint string // "": the transaction itself
}

func (t *denseTx) Commit(ctx context.Context) error {
	switch {
	case *t.over:
		return pgx.ErrTxClosed
	case t.savepoint != "":
		return t.end(ctx, "release savepoint ")
	}
	*t.over = true
	return t.Tx.Commit(ctx)
}

func (t *denseTx) Rollback(ctx context.Context) error {
	switch {
	case *t.over:
		return pgx.ErrTxClosed
	case t.savepoint != "":
		return t.end(ctx, "rollback to savepoint ")
	}
	*t.over = true
	return t.Tx.Rollback(ctx)
}

// Begin makes a savepoint, as pgx does it but with the tenant's mark.
func (t *denseTx) Begin(ctx context.Context) (pgx.Tx, error) {
	if *t.over {
		return nil, pgx.ErrTxClosed
	}
	t.s.savepoints++
	name := "sp_" + strconv.Itoa(t.s.savepoints)
	if _, err := t.Tx.Exec(ctx, t.s.to.mark()+"savepoint "+name); err != nil {
		return nil, err
	}
	return &denseTx{Tx: t.Tx, s: t.s, over: t.over, savepoint: name}, nil
}

func (t *denseTx) end(ctx context.Context, verb string) error {
	_, err := t.Tx.Exec(ctx, t.s.to.mark()+verb+t.savepoint)
	var b pgx.Batch
	b.BeginTx(pgx.TxOptions{})
	t.Tx = pgx.FailedBatchResults(&b, pgx.ErrTxClosed).Tx() // a closed one
	return err
}

func (t *denseTx) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	if *t.over {
		return pgconn.CommandTag{}, pgx.ErrTxClosed
	}
	text, all, err := t.s.resolve(ctx, sql, arguments, true)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return t.Tx.Exec(ctx, text, all...)
}

func (t *denseTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if *t.over {
		return errRows{pgx.ErrTxClosed}, pgx.ErrTxClosed
	}
	text, all, err := t.s.resolve(ctx, sql, args, false)
	if err != nil {
		return errRows{err}, err
	}
	rows, err := t.Tx.Query(ctx, text, all...)
	return lentRows{rows, t.s}, err
}

// lentRows are pgx's own, whose connection may be asked for.
type lentRows struct {
	pgx.Rows
	s *denseSession
}

func (r lentRows) Conn() *pgx.Conn {
	r.s.lent = true
	return r.Rows.Conn()
}

func (r lentRows) TypeMap() *pgtype.Map {
	r.s.lent = true
	return r.Rows.TypeMap()
}

func (t *denseTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if *t.over {
		return errRow{pgx.ErrTxClosed}
	}
	text, all, err := t.s.resolve(ctx, sql, args, false)
	if err != nil {
		return errRow{err}
	}
	return t.Tx.QueryRow(ctx, text, all...)
}

func (t *denseTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if *t.over {
		return failedBatch{BatchResults: pgx.FailedBatchResults(b, pgx.ErrTxClosed), err: pgx.ErrTxClosed}
	}
	own, err := t.s.resolveBatch(ctx, b)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return t.Tx.SendBatch(ctx, own)
}

func (t *denseTx) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	if *t.over {
		return 0, pgx.ErrTxClosed
	}
	t.s.spoiled = true
	return t.Tx.CopyFrom(ctx, tableName, columnNames, rowSrc)
}

// Prepare makes a statement that the transaction's calls name. Another tenant's of the same name is another one.
func (t *denseTx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if *t.over {
		return nil, pgx.ErrTxClosed
	}
	st := &denseStatement{text: t.s.to.role + " " + strconv.Itoa(t.s.prepared) + " " + name, plain: plain.Read(sql)}
	if name == "" {
		st.text = ""
	}
	d, err := t.Tx.Prepare(ctx, st.text, t.s.to.mark()+sql)
	if err != nil {
		return nil, err
	}
	if name != "" {
		t.s.prepared++
		t.s.statements[statementKey{t.s.to, named, name}] = st
	}
	t.s.look(sql, st.plain)
	known := *d
	known.Name, known.SQL = name, sql
	return &known, nil
}

// Conn is pgx's own connection. It is replaced afterwards: see full.
func (t *denseTx) Conn() *pgx.Conn {
	if !*t.over {
		t.s.lent = true
	}
	return t.Tx.Conn()
}

func (t *denseTx) LargeObjects() pgx.LargeObjects {
	if !*t.over {
		t.s.spoiled = true
	}
	return t.Tx.LargeObjects()
}
