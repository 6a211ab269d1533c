package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// inUse says which sessions a fence waits for, before it ends them all.
type inUse string

const (
	// atWork are those in a statement or a transaction: for a tenant that goes out of service.
	atWork inUse = "state <> 'idle'"
	// anySession is for a login that a node leaves for another one: its sessions end by themselves when its pool is closed, after the
	// last call. One that looks idle can be a call's that has sent nothing yet.
	anySession inUse = "true"
	// lately is anySession where a pooler keeps sessions that nobody uses any more: those that were in use within the last second.
	lately inUse = "(state <> 'idle' OR state_change > clock_timestamp() - interval '1 second')"
)

// leaving returns which sessions to wait for when nodes leave a login for another one.
func leaving(pooled bool) inUse {
	if pooled {
		return lately
	}
	return anySession
}

// fence makes the server refuse the tenant, whatever any node believes: its logins may not log in, what
// they are at has the drain's time to finish, and then their sessions end. A node that is paused or cut off is not asked.
func fence(ctx context.Context, conn *pgx.Conn, p *place, wait inUse, drain time.Duration) error {
	others := []string{p.owner}
	if p.isolation == IsolationShared { // who works for the others, too
		others = nil
	}
	// Before anything that can wait for somebody: whatever comes after it, nobody logs in any more.
	made, err := rolesThere(ctx, conn, p.logins())
	if err != nil {
		return err
	}
	if _, err := closeSome(ctx, conn, made); err != nil {
		return err
	}
	done, err := p.act(ctx, conn, slices.Concat(p.logins(), others, p.denseRoles())...)
	if err != nil {
		return err
	}
	defer done()
	return errors.Join(closeLogins(ctx, conn, p.logins(), others, wait, drain), closeDense(ctx, conn, p, wait, drain))
}

// closeLogins is fence for some logins of a place. The sessions of others end with theirs.
func closeLogins(ctx context.Context, conn *pgx.Conn, logins, others []string, wait inUse, drain time.Duration) error {
	rows, _ := conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE rolname = ANY($1)`, logins)
	made, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(made) == 0 { // what was never made has nothing to close
		return err
	}
	// A login may change its own password, so a transaction of the tenant's can keep the role's row. It has the drain's time like any other.
	kept, err := closeSome(ctx, conn, made)
	if err != nil {
		return err
	}
	roles := append(made, others...)
	for end, quiet := time.Now().Add(drain), 0; time.Now().Before(end); {
		var busy int
		if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity WHERE usename = ANY($1) AND `+string(wait), roles).Scan(&busy); err != nil {
			return fmt.Errorf("drain: %w", err)
		}
		if quiet++; busy > 0 {
			quiet = 0
		} else if quiet == quietLooks {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drain: %d sessions are at work: %w", busy, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := closeKept(ctx, conn, kept, roles); err != nil {
		return err
	}
	return endSessions(ctx, conn, roles)
}

// closeSome closes the logins, and returns those whose row somebody keeps.
func closeSome(ctx context.Context, conn *pgx.Conn, logins []string) (kept []string, err error) {
	for _, login := range logins {
		err := execShared(ctx, conn, "ALTER ROLE "+ident.Quote(login)+" NOLOGIN")
		if isState(err, lockNotAvailable) || overtaken(err) {
			kept = append(kept, login)
		} else if err != nil {
			return nil, err
		}
	}
	return kept, nil
}

// closeTries is how often sessions are ended to close a login whose row they keep.
const closeTries = 5

// closeKept ends the sessions of the roles to get at the rows of the logins that they keep. Each try ends them all and is in line for the row at
// once, before one that logs in meanwhile; sessions that are not of the roles can outlast all tries.
func closeKept(ctx context.Context, conn *pgx.Conn, kept, roles []string) (err error) {
	for range closeTries {
		if len(kept) == 0 {
			return nil
		}
		if _, err := terminate(ctx, conn, roles); err != nil {
			return fmt.Errorf("end sessions: %w", err)
		}
		if kept, err = closeSome(ctx, conn, kept); err != nil {
			return err
		}
	}
	if len(kept) > 0 {
		return fmt.Errorf("close login %s: a session that is not the tenant's keeps its row in pg_authid locked; see pg_locks", kept[0])
	}
	return nil
}

const (
	// endTimeout bounds the end of a tenant's sessions, which the server's processes come to within milliseconds.
	endTimeout = 15 * time.Second
	// quietLooks is how often in a row no session has to be seen: one that passed the login a moment before it was closed is not listed yet.
	quietLooks = 5
)

// endSessions ends the sessions of the roles and returns when none is left.
func endSessions(ctx context.Context, conn *pgx.Conn, roles []string) error {
	return endListed(ctx, conn, roles, quietLooks)
}

// endListed is endSessions that is content when so many looks in a row have seen none.
func endListed(ctx context.Context, conn *pgx.Conn, roles []string, looks int) error {
	return untilQuiet(ctx, looks, func(ctx context.Context) (int, error) { return terminate(ctx, conn, roles) })
}

// untilQuiet ends sessions until so many looks in a row have seen none.
func untilQuiet(ctx context.Context, looks int, end func(ctx context.Context) (int, error)) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	for quiet, pause := 0, time.Millisecond; ; pause = min(2*pause, 10*time.Millisecond) {
		left, err := end(ctx)
		if err != nil {
			return fmt.Errorf("end sessions: %w", err)
		}
		if quiet++; left > 0 {
			quiet = 0
		} else if quiet == looks {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end sessions: %d are left: %w", left, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// terminate tells the sessions of the roles to end, and returns how many there are.
func terminate(ctx context.Context, conn *pgx.Conn, roles []string) (sessions int, err error) {
	err = conn.QueryRow(ctx, `SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY($1)) s`, roles).Scan(&sessions)
	return sessions, err
}
