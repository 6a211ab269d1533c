package tenancy

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// guardedTx is a transaction, or a savepoint in one, that stays its tenant's. Like every pgx.Tx it is
// for one goroutine at a time.
//
// Conn and LargeObjects are pgx's own: what they return takes contexts that cannot be looked at.
type guardedTx struct {
	pgx.Tx
	pool  *tenantPool // whose it is; nil: the host's, which has no tenant to guard
	visit *Visit      // in which it was begun; nil: none
	c     checkout    // given back at the end; empty in a savepoint

	commitsMore bool // it has a CommitQuery
}

// tenant is 0 for the host's.
func (t *guardedTx) tenant() ID {
	if t.pool == nil {
		return 0
	}
	return t.pool.tenant.ID
}

func visitOf(ctx context.Context) *Visit {
	if s := sessionOf(ctx); s != nil {
		return s.visit
	}
	return nil
}

// admit refuses the context of another tenant or realm, of a switch, and any after the visit's end. A context without a tenant is admitted:
// the transaction itself says whose it is, and context.Background() is a habit in clean-up.
func (t *guardedTx) admit(ctx context.Context) error {
	s := sessionOf(ctx)
	if s != nil && s.refused {
		return &Error{Op: "transaction", Tenant: t.tenant(), Err: errSwitchInTx}
	}
	if err := t.visitOver(s); err != nil {
		return &Error{Op: "transaction", Tenant: t.tenant(), Err: err}
	}
	if t.pool == nil || s == nil || s.tenant == nil {
		return nil
	}
	own := &t.pool.tenant
	if s.tenant.realm == own.realm && s.tenant.UID == own.UID && s.tenant.ID == own.ID {
		return nil
	}
	return &Error{Op: "transaction", Tenant: own.ID, Name: own.Name,
		Err: hinted(ErrTenantMismatch, "the context is that of tenant id %d", s.tenant.ID)}
}

// visitOver looks at the visit in which t was begun and at that of the session, which may be nil.
func (t *guardedTx) visitOver(s *Session) error {
	if t.visit == nil && (s == nil || s.visit == nil) {
		return nil
	}
	now := time.Now()
	if s != nil {
		if err := s.visit.over(now); err != nil {
			return err
		}
	}
	return t.visit.over(now)
}

// Commit never refuses: whose context it is does not matter for the end.
func (t *guardedTx) Commit(ctx context.Context) error {
	if t.c.conn == nil { // a savepoint, whose end is no commit
		return told(ctx, t.Tx.Commit(ctx), false)
	}
	defer t.c.release()
	return t.c.commitBy(ctx, t.Tx, t.commitsMore)
}

// commit ends a transaction that the library itself has begun.
func (c *checkout) commit(ctx context.Context, tx pgx.Tx) error { return c.commitBy(ctx, tx, false) }

// commitBy says of a lost answer that it is one. more is of a CommitQuery: it may have committed before it failed.
func (c *checkout) commitBy(ctx context.Context, tx pgx.Tx, more bool) error {
	conn := c.conn.Conn()
	gone := conn.IsClosed() // then the server has never heard of the COMMIT
	err := tx.Commit(ctx)
	if err == nil {
		return nil
	}
	if gone || unheard(conn, err) || !mayHaveCommitted(err, more) {
		if errors.Is(err, pgconn.ErrConnClosed) {
			err = ended(ctx, err)
		}
		return err
	}
	e := &Error{Op: "commit", Err: fmt.Errorf("%w: %w", ErrCommitUnknown, told(ctx, err, true))}
	if c.pool != nil {
		e.Tenant, e.Name = c.pool.tenant.ID, c.pool.tenant.Name
	}
	return e
}

// mayHaveCommitted says whether err is a lost answer. The server's own refusal is an answer, unless more than a COMMIT was sent. A FATAL one is none: a session
// can be ended after its transaction was committed and before it could say so (by transaction_timeout too). Nor is a pooler's word that it has lost the server.
func mayHaveCommitted(err error, more bool) bool {
	if errors.Is(err, pgx.ErrTxClosed) || errors.Is(err, pgx.ErrTxCommitRollback) || neverSent(err) {
		return false
	}
	refused, ok := errors.AsType[*pgconn.PgError](err)
	if ok && refused.Code == "25P03" { // idle_in_transaction_session_timeout struck before the COMMIT arrived
		return false
	}
	return !ok || more || fatal(refused) || strings.HasPrefix(refused.Code, "08")
}

// Rollback never refuses either.
func (t *guardedTx) Rollback(ctx context.Context) error {
	defer t.c.release()
	return t.Tx.Rollback(ctx)
}

// closeIfOver gives the connection back when the batch has left no transaction open: pgx has closed
// t then, and nobody may come to end it.
func (t *guardedTx) closeIfOver() {
	if t.c.conn == nil {
		return
	}
	if conn := t.c.conn.Conn(); conn.IsClosed() || conn.PgConn().TxStatus() == 'I' {
		t.c.release()
	}
}

func (t *guardedTx) Begin(ctx context.Context) (pgx.Tx, error) {
	if err := t.admit(ctx); err != nil {
		return nil, err
	}
	inner, err := t.Tx.Begin(ctx)
	if err != nil {
		return nil, told(ctx, err, false)
	}
	return &guardedTx{Tx: inner, pool: t.pool, visit: t.visit}, nil
}

func (t *guardedTx) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	if err := t.admit(ctx); err != nil {
		return pgconn.CommandTag{}, err
	}
	tag, err := t.Tx.Exec(ctx, sql, arguments...)
	return tag, told(ctx, err, false)
}

func (t *guardedTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if err := t.admit(ctx); err != nil {
		return errRows{err}, err
	}
	rows, err := t.Tx.Query(ctx, sql, args...)
	if ctx.Err() != nil { // it may have closed the connection, which the rows say only when they are read
		return toldRows{rows, ctx}, told(ctx, err, false)
	}
	return rows, told(ctx, err, false)
}

func (t *guardedTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if err := t.admit(ctx); err != nil {
		return errRow{err}
	}
	return toldRow{t.Tx.QueryRow(ctx, sql, args...), ctx}
}

func (t *guardedTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if err := t.admit(ctx); err != nil {
		return failedBatch{BatchResults: pgx.FailedBatchResults(b, err), err: err}
	}
	return toldBatch{t.Tx.SendBatch(ctx, b), ctx}
}

func (t *guardedTx) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	if err := t.admit(ctx); err != nil {
		return 0, err
	}
	if !t.pool.copies() {
		n, err := insertRows(ctx, t.Tx, func(ctx context.Context, inner pgx.Tx) error { return inner.Commit(ctx) }, tableName, columnNames, rowSrc)
		return n, told(ctx, err, false)
	}
	n, err := t.Tx.CopyFrom(ctx, tableName, columnNames, rowSrc)
	return n, told(ctx, err, false)
}

func (t *guardedTx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if err := t.admit(ctx); err != nil {
		return nil, err
	}
	d, err := t.Tx.Prepare(ctx, name, sql)
	return d, told(ctx, err, false)
}
