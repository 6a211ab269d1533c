package tenancy

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// A provisioner acts for a tenant's role by being a member of it: to see and to end the role's sessions, to drop or give away what it owns, to make
// what it is to own. It is one for as long as a verb is at work, because the server walks through all memberships of whoever asks it for something, and
// there would be three for each tenant. Of the few roles of a server's own (a shared schema's owner and group, a shared pool's login, a reader) it is one for good.

// actTimeout bounds the end of a membership, after the verb's own context may have ended.
const actTimeout = 10 * time.Second

// act makes the provisioner of conn a member of those of the roles that are there, until end is called. A membership that a crash leaves is ended by the next
// verb on the role, or by the validity job.
func (p *place) act(ctx context.Context, conn *pgx.Conn, roles ...string) (end func(), err error) {
	if p.isolation == IsolationShared {
		roles = slices.DeleteFunc(slices.Clone(roles), func(role string) bool { return role == p.owner || role == p.runtime })
	}
	there, err := rolesThere(ctx, conn, roles)
	if err != nil {
		return nil, err
	}
	if len(there) == 0 {
		return func() {}, nil
	}
	if err := execDDL(ctx, conn, grantMemberships(conn, there)); err != nil {
		return nil, err
	}
	return func() {
		if e, lost := errors.AsType[*Error](context.Cause(ctx)); p.joined || lost && e.Op == "lock" { // the tenant is in another verb's hands, which ends them
			return
		}
		ctx, cancel := afterwards(ctx, actTimeout)
		defer cancel()
		if conn.IsClosed() { // a cancelled statement closed it
			fresh, err := p.provisionerConn(ctx)
			if err != nil {
				return // the validity job comes to it
			}
			defer closeConn(fresh)
			conn = fresh
		}
		_ = endMemberships(ctx, conn, there)
	}, nil
}

// actOnce is act for who has not the tenant's lock: the memberships are in one transaction with what fn does on conn, and end with it. A verb that has one
// already keeps it.
func actOnce(ctx context.Context, conn *pgx.Conn, roles []string, fn func() error) error {
	for end := time.Now().Add(lockPatience); ; {
		taken := false // a membership that the verb had which has ended it meanwhile
		err := pgx.BeginFunc(ctx, conn, func(pgx.Tx) error {
			rows, _ := conn.Query(ctx, `SELECT rolname::text, EXISTS (SELECT FROM pg_auth_members m
				WHERE m.roleid = r.oid AND m.grantor = m.member AND m.member = (SELECT oid FROM pg_roles WHERE rolname = current_user)) FROM pg_roles r WHERE rolname = ANY($1) ORDER BY 1`, roles)
			var missing []string
			var role string
			var held, kept bool
			if _, err := pgx.ForEachRow(rows, []any{&role, &held}, func() error {
				if kept = kept || held; !held {
					missing = append(missing, role)
				}
				return nil
			}); err != nil {
				return err
			}
			if len(missing) > 0 {
				if _, err := conn.Exec(ctx, grantMemberships(conn, missing)); err != nil {
					return err
				}
			}
			if err := fn(); err != nil {
				taken = kept && isState(err, "42501")
				return err
			}
			return endMemberships(ctx, conn, missing)
		})
		// A statement that is sent again in a transaction that has failed hears that it has.
		again := isState(err, lockNotAvailable, "25P02", "23505") || overtaken(err) || taken
		if !again || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
		if taken {
			select {
			case <-ctx.Done():
				return err
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
}

// grantMemberships is grantMembership for the session's own login and several roles.
func grantMemberships(conn *pgx.Conn, roles []string) string {
	_, member, _ := strings.Cut(grantMembership(conn, "", conn.Config().User), " TO ")
	return "GRANT " + quotedPath(roles) + " TO " + member
}

// endMemberships ends those that the session's login has given itself in the roles. From PostgreSQL 16 on whoever made a role has ADMIN on it for good.
func endMemberships(ctx context.Context, conn *pgx.Conn, roles []string) error {
	rows, _ := conn.Query(ctx, `SELECT r.rolname::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
		WHERE m.member = (SELECT oid FROM pg_roles WHERE rolname = current_user) AND m.grantor = m.member AND r.rolname = ANY($1) ORDER BY 1`, roles)
	held, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(held) == 0 {
		return err
	}
	return execDDL(ctx, conn, "REVOKE "+quotedPath(held)+" FROM "+ident.Quote(conn.Config().User))
}

// nodesThatJoin is true in the primary while a node of a release lives whose provisioner has to be a member for good: it could not fence a tenant otherwise.
const nodesThatJoin = `EXISTS (SELECT FROM tenancy.nodes WHERE NOT acts AND seen > now() - interval '1 minute')`

// leftAtOnce is how many places one transaction makes or ends the memberships of: from PostgreSQL 16 on each role costs it a lock.
const leftAtOnce = 50

// endLeftMemberships ends the provisioners' memberships that a crash or the release before has left, of places that no verb is at work on.
func (c *Catalog) endLeftMemberships(ctx context.Context) error {
	var joined bool
	pool := c.tn.primary.pool
	if err := pool.QueryRow(ctx, `SELECT `+nodesThatJoin).Scan(&joined); err != nil || joined {
		return unavailable("validity", err)
	}
	rows, _ := pool.Query(ctx, `SELECT id, provisioner FROM tenancy.servers WHERE provisioner IS NOT NULL ORDER BY random()`)
	type server struct {
		ID          int64
		Provisioner []byte
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[server])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, list, func(s server) error {
		if err := c.endLeftAt(ctx, s.ID, s.Provisioner); err != nil && ctx.Err() == nil { // a server that is down has its own alarms
			c.tn.cfg.Logger.Debug("tenancy: memberships of the provisioner's were not looked for; the next run does", "server", s.ID, "error", err)
		}
		return nil
	})
}

func (c *Catalog) endLeftAt(ctx context.Context, server int64, sealed []byte) error {
	var at place
	if err := c.openProvisioner(&at, sealed); err != nil {
		return err
	}
	done, err := c.tn.primary.verb(ctx)
	if err != nil {
		return err
	}
	defer done()
	conn, err := at.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	rows, _ := conn.Query(ctx, `SELECT r.rolname::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
		WHERE m.member = (SELECT oid FROM pg_roles WHERE rolname = current_user) AND m.grantor = m.member AND r.rolname ~ '^t_[0-9a-f]{20}(_o|_r|_l[0-9]+|_d)?$'`)
	held, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for last := int64(0); len(held) > 0; {
		var ended int
		err := pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error {
			var places []int64
			var roles []string
			// The locks are those of the verbs, and end with the transaction.
			rows, _ := tx.Query(ctx, `WITH left_over AS MATERIALIZED (
					SELECT id, uid, roles FROM (SELECT id, uid, array_remove(CASE isolation WHEN 'shared' THEN '{}' ELSE ARRAY[owner, runtime] END || ARRAY[login, next_login, old_login, dense_role], '') roles
						FROM tenancy.data_sources WHERE server = $1 AND id > $2 AND state <> 'dropped') d WHERE roles && $3 ORDER BY id LIMIT $4)
				SELECT d.id, CASE WHEN pg_try_advisory_xact_lock(hashtextextended(coalesce('tenancy tenant ' || t.id, 'tenancy uid ' || d.uid), 0)) THEN d.roles ELSE '{}' END
				FROM left_over d LEFT JOIN tenancy.tenants t ON t.uid = d.uid ORDER BY d.id`, server, last, held, leftAtOnce)
			var id int64
			var some []string
			if _, err := pgx.ForEachRow(rows, []any{&id, &some}, func() error {
				places, roles = append(places, id), append(roles, some...)
				return nil
			}); err != nil {
				return err
			}
			if ended = len(places); ended == 0 {
				return nil
			}
			last = places[ended-1]
			return endMemberships(ctx, conn, roles)
		})
		if err != nil || ended < leftAtOnce {
			return err
		}
	}
	return nil
}
