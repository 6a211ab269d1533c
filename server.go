package tenancy

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/budget"
)

// server is this node's budget of one server, and what is told of it. Safe for concurrent use.
type server struct {
	*budget.Server
	address string // host:port
	log     *slog.Logger

	full, loginFull, busy seldom
}

// heed wraps a connection's handler of errors: a server that has no connection left is counted and told of, whoever wanted one.
func (s *server) heed(next pgconn.PgErrorHandler) pgconn.PgErrorHandler {
	return func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		switch {
		case err.Code != "53300" || !fatal(err): // the latter a tenant's function can raise
		case ofLogin(err):
			s.tell(&s.loginFull, "tenancy: a login has no connection left: more nodes run than Limits.Nodes says, or its CONNECTION LIMIT is older than Limits.TenantConns", "error", err)
		default:
			s.Totals.TooMany.Add(1)
			s.tell(&s.full, "tenancy: a server has no connection left: Limits.ServerConns is more than its max_connections leaves, or more nodes run than Limits.Nodes says", "error", err)
		}
		if next != nil {
			return next(conn, err)
		}
		return !fatal(err)
	}
}

// attempted counts an attempt to connect that failed. One that did not come to that is none.
func (s *server) attempted(err error) {
	if err == nil || poolClosed(err) || errors.Is(err, errFoundIdle) || errors.Is(err, budget.ErrNoPermit) || errors.Is(err, budget.ErrClosed) {
		return
	}
	s.Totals.ConnectFailures.Add(1)
}

// sentAway counts a call that has got no connection. p is the pool of its tenant; nil: it was not even built.
func (p *tenantPool) sentAway(err error) {
	if p == nil {
		return
	}
	if errors.Is(err, ErrBusy) {
		p.server.Totals.Refused.Add(1)
		p.server.tell(&p.server.busy, "tenancy: calls are refused, because no connection is free", "tenant", p.tenant.ID, "name", p.tenant.Name, "error", err)
	} else if _, ok := errors.AsType[*leftLine](err); ok {
		p.canceled.Add(1)
		p.server.Totals.Canceled.Add(1)
	}
}

// tell warns of something that can happen thousands of times a second.
func (s *server) tell(line *seldom, message string, args ...any) {
	if times, due := line.due(); due {
		s.log.Warn(message, append([]any{"server", s.address, "times", times}, args...)...)
	}
}

// seldomPeriod is the time between two lines of the same kind and server.
const seldomPeriod = time.Minute

// seldom lets one line a seldomPeriod through. Safe for concurrent use.
type seldom struct {
	mu    sync.Mutex // guards the fields below
	next  time.Time
	times int64 // since the last line
}

// due says whether a line may be written, and of how many times it tells.
func (s *seldom) due() (times int64, due bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.times++
	now := time.Now()
	if now.Before(s.next) {
		return 0, false
	}
	times, s.times, s.next = s.times, 0, now.Add(seldomPeriod)
	return times, true
}
