package tenancy

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	rollbackTimeout = 5 * time.Second
	// leftRollbackTimeout is what a rollback has from the moment at which its caller's ctx ends.
	leftRollbackTimeout = 50 * time.Millisecond
)

// rollback ends a transaction of ctx's, also when ctx has ended: closing the connection rolls back as well, and the caller waits for neither
// much longer than for anything else. A failure closes the connection.
func rollback(ctx context.Context, tx pgx.Tx) {
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(leftRollbackTimeout, cancel) })
	defer stop()
	_ = tx.Rollback(undo)
}
