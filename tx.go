package tenancy

import (
	"context"
	"errors"
	"fmt"
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
	held := t.c.conn != nil // not a savepoint, whose end is no commit
	defer t.c.release()
	gone := held && t.c.conn.Conn().IsClosed() // then the server has never heard of the COMMIT
	err := t.Tx.Commit(ctx)
	if err == nil || !held || gone || !mayHaveCommitted(err) {
		return err
	}
	e := &Error{Op: "commit", Tenant: t.tenant(), Err: fmt.Errorf("%w: %w", ErrCommitUnknown, err)}
	if t.pool != nil {
		e.Name = t.pool.tenant.Name
	}
	return e
}

// mayHaveCommitted says whether err is a lost answer. The server's own refusal is an answer, but not a FATAL one: a session
// can be ended after its transaction was committed and before it could say so.
func mayHaveCommitted(err error) bool {
	if errors.Is(err, pgx.ErrTxClosed) || errors.Is(err, pgx.ErrTxCommitRollback) || neverSent(err) {
		return false
	}
	refused, ok := errors.AsType[*pgconn.PgError](err)
	if ok && refused.Code == "25P03" { // idle_in_transaction_session_timeout struck before the COMMIT arrived
		return false
	}
	return !ok || refused.SeverityUnlocalized == "FATAL" || refused.SeverityUnlocalized == "PANIC"
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
		return nil, err
	}
	return &guardedTx{Tx: inner, pool: t.pool, visit: t.visit}, nil
}

func (t *guardedTx) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	if err := t.admit(ctx); err != nil {
		return pgconn.CommandTag{}, err
	}
	return t.Tx.Exec(ctx, sql, arguments...)
}

func (t *guardedTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if err := t.admit(ctx); err != nil {
		return errRows{err}, err
	}
	return t.Tx.Query(ctx, sql, args...)
}

func (t *guardedTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if err := t.admit(ctx); err != nil {
		return errRow{err}
	}
	return t.Tx.QueryRow(ctx, sql, args...)
}

func (t *guardedTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if err := t.admit(ctx); err != nil {
		return failedBatch{BatchResults: pgx.FailedBatchResults(b, err), err: err}
	}
	return t.Tx.SendBatch(ctx, b)
}

func (t *guardedTx) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	if err := t.admit(ctx); err != nil {
		return 0, err
	}
	if !t.pool.copies() {
		return insertRows(ctx, t.Tx, tableName, columnNames, rowSrc)
	}
	return t.Tx.CopyFrom(ctx, tableName, columnNames, rowSrc)
}

func (t *guardedTx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if err := t.admit(ctx); err != nil {
		return nil, err
	}
	return t.Tx.Prepare(ctx, name, sql)
}
