package tenancy

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Receipt says what Purge dropped.
type Receipt struct {
	Tenant ID
	UID    UID
	Name   string
	Tables int      // relations dropped one by one; those in a database of the tenant's own went with it
	Roles  []string // roles dropped
	// Databases are those of the tenant's own that were dropped. One that an earlier call dropped, before it died, is not among them.
	Databases []string
	// Rows are those that were deleted from the tables of a shared schema, by table, those without any included; all calls together.
	Rows    []ErasedRows
	Members int // memberships erased
}

// Purge drops a deleted tenant's data (of a shared schema its rows), roles, memberships and domains, for good. It asks for the name again, so that a
// wrong ID cannot do it. What stays is a tombstone: ID, UID, name and dates, which are never used again. A Purge that died is finished by the next one.
//
// The error is [ErrInvalid] when the name is not the tenant's or the tenant is not deleted, [ErrTenantNotFound],
// [ErrTenantGone] when it was purged before, [ErrNoProvisioner] or [ErrPrimaryUnavailable].
func (c *Catalog) Purge(ctx context.Context, id ID, name string) (Receipt, error) {
	fail := func(err error) (Receipt, error) { return Receipt{}, &Error{Op: "purge", Tenant: id, Err: err} }
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return fail(err)
	}
	defer release()
	p, err := c.place(ctx, id)
	switch {
	case err != nil:
		return fail(err)
	case p.tenant.Name != name:
		return fail(invalid(errors.New("name: it is not this tenant's")))
	case p.tenant.State == StatePurged:
		return fail(ErrTenantGone)
	case p.tenant.State != StateDeleted:
		return fail(invalid(fmt.Errorf("state: the tenant is %s, only a deleted one can be purged", p.tenant.State)))
	}
	if err := c.fenceTenant(ctx, p, 0); err != nil {
		return fail(err)
	}
	places, err := c.placesOf(ctx, p.tenant)
	if err != nil {
		return fail(err)
	}
	r := Receipt{Tenant: id, UID: p.tenant.UID, Name: name}
	var dropped []int64
	for _, at := range places {
		if err := c.dropPlace(ctx, at, &r); err != nil {
			return fail(err)
		}
		dropped = append(dropped, at.id)
	}
	if err := c.entomb(ctx, "purge", dropped, &r); err != nil {
		return Receipt{}, err
	}
	return r, nil
}

// entomb leaves a tombstone of a deleted tenant, whose places are gone.
func (c *Catalog) entomb(ctx context.Context, op string, places []int64, r *Receipt) error {
	id := r.Tenant
	return c.write(ctx, op, id, func(tx pgx.Tx) error {
		if state, err := lockRow(ctx, tx, id); err != nil {
			return err
		} else if state != StateDeleted {
			return errOvertaken
		}
		rows, _ := tx.Query(ctx, `DELETE FROM tenancy.memberships WHERE tenant = $1 RETURNING user_key`, id)
		users, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		r.Members = len(users)
		rows, _ = tx.Query(ctx, `DELETE FROM tenancy.domains WHERE tenant = $1 RETURNING domain`, id)
		domains, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET state = 'purged', display_name = '', attributes = '{}', message = '', updated = now() WHERE id = $1`, id); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET `+placeGone+` WHERE id = ANY($1)`, places); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `DELETE FROM tenancy.adoptions WHERE data_source = ANY($1)`, places); err != nil {
			return err
		}
		// What is kept of a purged tenant names none of its members.
		if _, err := tx.Exec(ctx, `UPDATE tenancy.audit SET detail = detail - 'user', actor = CASE WHEN actor = ANY($2) THEN '' ELSE actor END WHERE tenant = $1`, id, users); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.changes SET key = NULL WHERE tenant = $1 AND kind = 'member'`, id); err != nil {
			return err
		}
		if err := audit(ctx, tx, op, id, map[string]any{"tables": r.Tables, "databases": len(r.Databases), "rows": r.Rows, "members": r.Members}); err != nil {
			return err
		}
		if len(users) > 0 { // without a key: every node forgets all users' look-ups
			if err := changed(ctx, tx, "member", id, ""); err != nil {
				return err
			}
		}
		for _, domain := range domains {
			if err := changed(ctx, tx, "domain", id, domain); err != nil {
				return err
			}
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}

// dropPlace drops the schema, or the database that it is in, then what its roles own elsewhere, then the roles. In a shared schema it deletes
// the tenant's rows, and what is left of the place are its logins.
func (c *Catalog) dropPlace(ctx context.Context, p *place, r *Receipt) error {
	roles := append(p.logins(), p.denseRoles()...)
	if p.isolation == IsolationShared {
		if err := c.erase(ctx, p, r); err != nil {
			return fmt.Errorf("erase rows in %s: %w", p.source.Schema, err)
		}
	} else {
		roles = append(roles, p.runtime, p.owner)
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	switch p.isolation {
	case IsolationShared:
	case IsolationDatabase:
		dropped, err := dropDatabase(ctx, conn, p)
		if err != nil {
			return fmt.Errorf("drop database %s: %w", p.source.Database, err)
		}
		if dropped {
			r.Databases = append(r.Databases, p.source.Database)
		}
	default:
		tables, err := dropSchema(ctx, conn, p)
		r.Tables += tables
		if err != nil {
			return fmt.Errorf("drop schema %s: %w", p.source.Schema, err)
		}
	}
	dropped, err := dropRoles(ctx, conn, roles...)
	r.Roles = append(r.Roles, dropped...)
	if err != nil {
		return fmt.Errorf("drop roles of %s: %w", p.source.Schema, err)
	}
	return nil
}

// dropSchema drops relation by relation: one statement for thousands of tables runs out of the server's lock table.
func dropSchema(ctx context.Context, conn *pgx.Conn, p *place) (dropped int, err error) {
	kinds := map[string]string{"r": "TABLE", "p": "TABLE", "v": "VIEW", "m": "MATERIALIZED VIEW", "f": "FOREIGN TABLE", "S": "SEQUENCE"}
	rows, _ := conn.Query(ctx, `SELECT c.relname, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND pg_get_userbyid(n.nspowner) = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
		ORDER BY c.relkind = 'S', c.oid`, p.source.Schema, p.owner)
	type relation struct{ Name, Kind string }
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[relation])
	if err != nil {
		return 0, err
	}
	for _, r := range list {
		if err := execDDL(ctx, conn, "DROP "+kinds[r.Kind]+" IF EXISTS "+ident.Quote(p.source.Schema, r.Name)+" CASCADE"); err != nil {
			return dropped, err
		}
		dropped++
	}
	return dropped, execDDL(ctx, conn, "DROP SCHEMA IF EXISTS "+ident.Quote(p.source.Schema)+" CASCADE")
}

// dropRoles drops what the roles own outside the schema (large objects, default privileges) and then the roles.
func dropRoles(ctx context.Context, conn *pgx.Conn, roles ...string) (dropped []string, err error) {
	for _, role := range roles {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, role).Scan(&there); err != nil {
			return dropped, err
		}
		if !there {
			continue
		}
		for _, sql := range []string{
			grantMembership(conn, role, conn.Config().User), // a crash can have left a role that was made and not granted
			"DROP OWNED BY " + ident.Quote(role) + " CASCADE",
			"DROP ROLE " + ident.Quote(role),
		} {
			if err := execDDL(ctx, conn, sql); err != nil {
				return dropped, err
			}
		}
		dropped = append(dropped, role)
	}
	return dropped, nil
}
