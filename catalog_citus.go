package tenancy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// MoveToWorker moves the tenant's schema to another worker of its server, which is the coordinator of a Citus cluster with
// schema-based sharding, by [citus_schema_move]. host and port are the worker's in pg_dist_node. The tenant is served meanwhile by the connections that
// it has, under the address that it has; one that is there already stays. See docs/citus.md for what the cluster needs.
//
// An active tenant's tables need a primary key or a replica identity, and the worker that it leaves wal_level = logical; those of one that is
// suspended or under maintenance need neither. A transaction that has written keeps the end of the move waiting, and the tenant's other writes
// behind it: for Config.DrainTimeout, after which the move fails and the tenant stays where it was. Cancelling ctx ends the move in the same way, unless it was
// made at that moment. Another verb of the tenant, Suspend too, waits until the move has ended.
//
// The error is [ErrInvalid] (the server is not such a coordinator or has no such worker, a table cannot be moved in service, or the tenant has another isolation than
// [IsolationSchema]), [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady], [ErrNoProvisioner], [ErrInProgress], [ErrPrimaryUnavailable] or that of the server.
//
// [citus_schema_move]: https://docs.citusdata.com/en/stable/develop/api_udf.html#citus-schema-move
func (c *Catalog) MoveToWorker(ctx context.Context, id ID, host string, port uint16) error {
	const op = "move to worker"
	fail := func(err error) error { return &Error{Op: op, Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	if err := settled(p.tenant.State); err != nil {
		return fail(err)
	}
	if p.isolation != IsolationSchema {
		return fail(invalid(fmt.Errorf("isolation: the tenant has %q, and a schema of its own alone moves between workers", p.isolation)))
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return fail(err)
	}
	defer closeConn(conn)
	worker := net.JoinHostPort(host, strconv.Itoa(int(port)))
	there, err := checkMove(ctx, conn, p, worker, host, port)
	if err != nil || there {
		if err != nil {
			err = fail(err)
		}
		return err
	}
	err = pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error {
		return audit(ctx, tx, op, id, map[string]any{"worker": worker})
	})
	if err != nil {
		return fail(refusal(op, err))
	}
	// Never as the provisioner or a superuser: where the rows are copied to, the CHECKs of the tenant's tables call its functions as whoever asked for the move. The owner
	// has to be able to log in in any case, because Citus makes the tables there as their owner.
	err = c.asOwner(ctx, conn, p, func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.RuntimeParams["search_path"] = "pg_catalog"
		cc.RuntimeParams["lock_timeout"] = strconv.FormatInt(max(c.tn.cfg.DrainTimeout.Milliseconds(), 1), 10)
		owner, err := pgx.ConnectConfig(ctx, cc)
		if err != nil {
			return connectError(err)
		}
		defer closeConn(owner)
		_, err = owner.Exec(ctx, `SELECT pg_catalog.citus_schema_move($1::text::regnamespace, $2::text, $3::int, '`+transferMode(p.tenant.State)+`')`,
			ident.Quote(p.source.Schema), host, int32(port))
		return err
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// transferMode is how Citus copies. By force_logical the tenant's writes go on; it is forced because the marker has no key, which nobody writes to.
func transferMode(s State) string {
	if s == StateActive {
		return "force_logical"
	}
	return "block_writes"
}

// checkMove asks the server whether the place can move to the worker, and whether it is there already.
func checkMove(ctx context.Context, conn *pgx.Conn, p *place, worker, host string, port uint16) (there bool, err error) {
	var citus bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_extension WHERE extname = 'citus'`).Scan(&citus); err != nil {
		return false, err
	}
	if !citus {
		return false, invalid(errors.New("server: the tenant's database has no extension citus; see Catalog.SetDataSource"))
	}
	schema := ident.Quote(p.source.Schema)
	var distributed, known bool
	err = conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_dist_schema WHERE schemaid = to_regnamespace($1)),
		EXISTS (SELECT FROM pg_dist_node WHERE nodename = $2 AND nodeport = $3 AND noderole = 'primary' AND isactive AND shouldhaveshards),
		EXISTS (SELECT FROM pg_dist_schema JOIN pg_dist_partition USING (colocationid) JOIN pg_dist_shard USING (logicalrelid) JOIN pg_dist_placement USING (shardid)
			JOIN pg_dist_node USING (groupid) WHERE schemaid = to_regnamespace($1) AND nodename = $2 AND nodeport = $3)`,
		schema, host, int32(port)).Scan(&distributed, &known, &there)
	switch {
	case err != nil:
		return false, err
	case !distributed:
		return false, invalid(fmt.Errorf("server: schema %s is not distributed: it was made without citus.enable_schema_based_sharding", p.source.Schema))
	case !known:
		return false, invalid(fmt.Errorf("worker: %s is not an active worker that takes shards; see pg_dist_node", worker))
	case there || p.tenant.State != StateActive:
		return there, nil
	}
	var bare string
	err = conn.QueryRow(ctx, `SELECT coalesce(string_agg(c.relname, ', ' ORDER BY c.relname), '') FROM pg_class c
		WHERE c.relnamespace = to_regnamespace($1) AND c.relkind IN ('r', 'p') AND c.relname <> $2
			AND (c.relreplident = 'n' OR c.relreplident = 'd' AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary))`,
		schema, markerTable).Scan(&bare)
	if err == nil && bare != "" {
		err = invalid(fmt.Errorf("tables: without a primary key or a replica identity rows of %s cannot change while they move: add one, or put the tenant under maintenance for the move", bare))
	}
	return false, err
}
