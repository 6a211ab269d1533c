package tenancy

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/budget"
)

// mayRepeat says whether what was done outside a transaction may be done once more after err, because it had no effect: it
// was never sent, or never arrived, or the server refused a plan that is older than a migration. one says that it was one statement for certain: of several, those
// before the one that was refused may have been committed.
func mayRepeat(ctx context.Context, conn *pgx.Conn, err error, one bool) bool {
	if err == nil || ctx.Err() != nil {
		return false
	}
	if neverSent(err) || unheard(conn, err) || errors.Is(err, errUnbound) {
		return true
	}
	if !one {
		return false
	}
	refused, ok := errors.AsType[*pgconn.PgError](err)
	return ok && outdatedPlan(refused) && refused.Where == "" // else a function or a procedure was at work, which may have committed something
}

// execsOne says whether pgx's Exec sent one statement for certain: by the extended protocol, which it does not take without arguments.
func execsOne(ctx context.Context, conn *pgx.Conn, sql string, arguments []any) bool {
	mode, rewriter, arguments := options(conn, arguments)
	switch rewriter.(type) {
	case nil:
	case pgx.NamedArgs, pgx.StrictNamedArgs: // which answer the same every time
		_, rewritten, err := rewriter.RewriteQuery(ctx, conn, sql, arguments)
		if err != nil {
			return false
		}
		arguments = rewritten
	default:
		return false
	}
	return mode != pgx.QueryExecModeSimpleProtocol && len(arguments) > 0
}

// queriesOne is execsOne for pgx's Query, which takes the simple protocol only when it is told to.
func queriesOne(conn *pgx.Conn, args []any) bool {
	mode, _, _ := options(conn, args)
	return mode != pgx.QueryExecModeSimpleProtocol
}

// options takes off what stands before the arguments of a statement, as pgx does: the last of a kind counts.
func options(conn *pgx.Conn, args []any) (mode pgx.QueryExecMode, rewriter pgx.QueryRewriter, arguments []any) {
	mode = conn.Config().DefaultQueryExecMode
	for i, arg := range args {
		switch arg := arg.(type) {
		case pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		case pgx.QueryExecMode:
			mode = arg
		case pgx.QueryRewriter:
			rewriter = arg
		default:
			return mode, rewriter, args[i:]
		}
	}
	return mode, rewriter, nil
}

// neverSent says whether nothing of a statement has left. pgx's own word is not enough: in the simple protocol, which it takes for
// statements without arguments and for COMMIT, a connection that breaks before the answer is "conn closed", as if
// it had been so before. A checkout never gives out a connection that is.
func neverSent(err error) bool {
	return pgconn.SafeToRetry(err) && !errors.Is(err, pgconn.ErrConnClosed)
}

// unheard says whether what was sent last cannot have reached the server, because the connection was gone: a good-bye that was not read yet
// lets it be written all the same.
func unheard(conn *pgx.Conn, err error) bool {
	c := budget.Of(conn.PgConn().Conn())
	if c == nil {
		return false
	}
	last, ok := errors.AsType[*pgconn.PgError](err)
	return c.Unheard(ok && fatal(last))
}

// fatal says whether the server ends the session with err. A pooler's own errors have only the field that a server translates.
func fatal(err *pgconn.PgError) bool {
	severity := cmp.Or(err.SeverityUnlocalized, err.Severity)
	return severity == "FATAL" || severity == "PANIC"
}

// told is err as the caller is to hear it. pgx may say "conn closed", or what became of the socket, where the end of ctx is the reason, and calls the former
// safe to retry also where the connection broke before the answer. broken says that the connection is closed.
func told(ctx context.Context, err error, broken bool) error {
	if err == nil {
		return nil
	}
	closed := errors.Is(err, pgconn.ErrConnClosed)
	if closed && pgconn.SafeToRetry(err) {
		err = unsettled{err}
	}
	if _, answered := errors.AsType[*pgconn.PgError](err); closed || broken && !answered {
		return ended(ctx, err)
	}
	return err
}

// ended is err, and the error of ctx if that has ended.
func ended(ctx context.Context, err error) error {
	if end := ctx.Err(); end != nil && !errors.Is(err, end) {
		return fmt.Errorf("%w: %w", end, err)
	}
	return err
}

// unsettled is the error of what the server may have done.
type unsettled struct{ error }

func (u unsettled) Unwrap() error { return u.error }

// SafeToRetry is what pgconn.SafeToRetry asks.
func (unsettled) SafeToRetry() bool { return false }
