package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Receipt says what a purge has dropped, all calls together: a Purge that died writes down what it finds before it drops it, and the next one goes on.
type Receipt struct {
	Tenant          ID
	UID             UID
	Name            string    // "" in what Catalog.Receipt reads: it is kept nowhere
	Deleted, Purged time.Time // by the primary's clock; Purged is zero while it is not finished
	Tables          int       // relations dropped from schemas; those in a database of the tenant's own went with it
	Roles           []string  // roles dropped
	Databases       []string  // databases of the tenant's own that were dropped
	// Rows are those that were deleted from the tables of a shared schema, by table, those without any included.
	Rows    []ErasedRows
	Members int // memberships erased
}

// dropped is what the primary keeps of a receipt.
type dropped struct {
	Tables    map[int64]int `json:"tables,omitempty"` // by place
	Roles     []string      `json:"roles,omitempty"`
	Databases []string      `json:"databases,omitempty"`
	Rows      []ErasedRows  `json:"rows,omitempty"`
	Members   int           `json:"members,omitempty"`
}

func (d *dropped) tables() (n int) {
	for _, more := range d.Tables {
		n += more
	}
	return n
}

// found adds what a place has now to what it had before an earlier call dropped some of it.
func (d *dropped) found(p *place, tables int, roles []string, database bool) {
	if d.Tables == nil {
		d.Tables = map[int64]int{}
	}
	d.Tables[p.id] = max(d.Tables[p.id], tables)
	for _, role := range roles {
		if !slices.Contains(d.Roles, role) {
			d.Roles = append(d.Roles, role)
		}
	}
	if database && !slices.Contains(d.Databases, p.source.Database) {
		d.Databases = append(d.Databases, p.source.Database)
	}
}

func (d *dropped) tell(r *Receipt) {
	r.Tables, r.Roles, r.Databases, r.Rows, r.Members = d.tables(), d.Roles, d.Databases, d.Rows, d.Members
}

// Purge drops a deleted tenant's data (of a shared schema its rows), roles, memberships and domains, for good, when its quarantine is over: see Config.Quarantine and
// [Profile].PurgeAfter. It asks for the name again, so that a wrong ID cannot do it. A Purge that died is finished by the next one, and nothing else is done with the tenant.
//
// What stays is a tombstone that says nothing of who it was: ID and UID, which are never used again, dates and what [Catalog.Receipt] reads. The name is free, and it is
// gone from the audit trail too, with the domains, the members' keys and the reasons of visits. Backups, logs and what the service keeps elsewhere are the operator's.
//
// The error is [ErrQuarantined], [ErrInvalid] when the name is not the tenant's or the tenant is not deleted, [ErrTenantNotFound],
// [ErrTenantGone] when it was purged before, [ErrNoProvisioner] or [ErrPrimaryUnavailable].
func (c *Catalog) Purge(ctx context.Context, id ID, name string) (Receipt, error) {
	return c.purge(ctx, id, name, false)
}

// PurgeNow is Purge that does not wait for the end of the quarantine.
func (c *Catalog) PurgeNow(ctx context.Context, id ID, name string) (Receipt, error) {
	return c.purge(ctx, id, name, true)
}

func (c *Catalog) purge(ctx context.Context, id ID, name string, now bool) (Receipt, error) {
	ctx, release, err := c.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return Receipt{}, &Error{Op: opPurge, Tenant: id, Err: err}
	}
	defer release()
	return c.purgeLocked(ctx, id, name, now)
}

func (c *Catalog) purgeLocked(ctx context.Context, id ID, name string, now bool) (Receipt, error) {
	fail := func(err error) (Receipt, error) { return Receipt{}, &Error{Op: opPurge, Tenant: id, Err: err} }
	p, err := c.place(ctx, id)
	switch {
	case err != nil:
		return fail(err)
	case p.tenant.State == StatePurged:
		return fail(ErrTenantGone)
	case p.tenant.Name != name:
		return fail(invalid(errors.New("name: it is not this tenant's")))
	case p.tenant.State != StateDeleted:
		return fail(invalid(fmt.Errorf("state: the tenant is %s, only a deleted one can be purged", p.tenant.State)))
	}
	d, begun, err := c.readReceipt(ctx, id)
	if err != nil {
		return fail(err)
	}
	if !now && !begun {
		if err := c.quarantined(ctx, id); err != nil {
			return fail(err)
		}
	}
	if err := c.fenceTenant(ctx, p, 0); err != nil {
		return fail(err)
	}
	places, err := c.placesOf(ctx, p.tenant)
	if err != nil {
		return fail(err)
	}
	var gone []int64
	for _, at := range places {
		if err := c.dropPlace(ctx, at, d); err != nil {
			return fail(err)
		}
		gone = append(gone, at.id)
	}
	r := Receipt{Tenant: id, UID: p.tenant.UID, Name: name}
	if err := c.entomb(ctx, opPurge, gone, d, &r); err != nil {
		return Receipt{}, err
	}
	d.tell(&r)
	return r, nil
}

const opPurge = "purge"

// errHalfPurged refuses what would be done with the rest of a tenant.
var errHalfPurged = hinted(ErrTenantGone, "its purge has begun, and what is left is not all of it: call Purge again to finish it")

// quarantined is ErrQuarantined while the tenant's quarantine lasts, by the primary's clock.
func (c *Catalog) quarantined(ctx context.Context, id ID) error {
	var until time.Time
	var over bool
	if err := c.tn.primary.pool.QueryRow(ctx, `SELECT deleted + quarantine, deleted + quarantine <= now() FROM tenancy.tenants WHERE id = $1`, id).Scan(&until, &over); err != nil {
		return unavailable("read quarantine", err)
	}
	if over {
		return nil
	}
	return hinted(ErrQuarantined, "until %s; Catalog.PurgeNow does not wait, and Catalog.Restore takes it back", until.UTC().Format(time.RFC3339))
}

// entomb leaves a tombstone of a deleted tenant, whose places are gone.
func (c *Catalog) entomb(ctx context.Context, op string, places []int64, d *dropped, r *Receipt) error {
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
		d.Members = len(users)
		domains, err := tx.Exec(ctx, `DELETE FROM tenancy.domains WHERE tenant = $1`, id)
		if err != nil {
			return err
		}
		// The intent is a hash of what Create was asked for, by which a guess could be checked.
		if err := tx.QueryRow(ctx, `UPDATE tenancy.tenants SET state = 'purged', name = '#' || id, display_name = '', attributes = '{}', message = '', intent = '', receipt = $2, updated = now()
			WHERE id = $1 RETURNING deleted, updated`, id, d).Scan(&r.Deleted, &r.Purged); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.data_sources SET `+placeGone+` WHERE id = ANY($1)`, places); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `DELETE FROM tenancy.adoptions WHERE data_source = ANY($1)`, places); err != nil {
			return err
		}
		// What is kept names nobody: neither the tenant nor those who are or were its members.
		if _, err := tx.Exec(ctx, `UPDATE tenancy.audit SET detail = detail - '{user,name,domain,reason,visit}'::text[],
			actor = CASE WHEN actor = ANY($2) OR actor IN (SELECT a.detail->>'user' FROM tenancy.audit a WHERE a.tenant = $1) THEN '' ELSE actor END WHERE tenant = $1`, id, users); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE tenancy.changes SET key = NULL WHERE tenant = $1 AND kind IN ('member', 'domain')`, id); err != nil {
			return err
		}
		if err := audit(ctx, tx, op, id, map[string]any{"tables": d.tables(), "databases": len(d.Databases), "rows": d.Rows, "members": d.Members}); err != nil {
			return err
		}
		if len(users) > 0 { // without a key: every node forgets all users' look-ups
			if err := changed(ctx, tx, "member", id, ""); err != nil {
				return err
			}
		}
		if domains.RowsAffected() > 0 { // and all domains'; a node of the release before keeps some, of a tenant that is refused
			if err := changed(ctx, tx, "domain", id, ""); err != nil {
				return err
			}
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}

// Receipt returns what the purge of a tenant has dropped, also of one that has begun and is not finished; what such a one says may not be dropped yet.
// The error is [ErrTenantNotFound], [ErrInvalid] when no purge has begun, or when a release before this kind of receipt finished it, or [ErrPrimaryUnavailable].
func (c *Catalog) Receipt(ctx context.Context, id ID) (Receipt, error) {
	fail := func(err error) (Receipt, error) { return Receipt{}, &Error{Op: "read receipt", Tenant: id, Err: err} }
	d, begun, err := c.readReceipt(ctx, id)
	switch {
	case err != nil:
		return fail(err)
	case !begun:
		return fail(invalid(errors.New("state: no purge of the tenant has begun")))
	}
	r := Receipt{Tenant: id}
	d.tell(&r)
	var deleted, purged *time.Time
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT uid, deleted, CASE WHEN state = 'purged' THEN updated END FROM tenancy.tenants WHERE id = $1`, id).Scan(&r.UID, &deleted, &purged)
	if err != nil {
		return fail(unavailable("read receipt", err))
	}
	if deleted != nil {
		r.Deleted = *deleted
	}
	if purged != nil {
		r.Purged = *purged
	}
	return r, nil
}

// readReceipt returns what is written of the tenant's purge, and whether one has begun.
func (c *Catalog) readReceipt(ctx context.Context, id ID) (d *dropped, begun bool, err error) {
	err = c.tn.primary.pool.QueryRow(ctx, `SELECT receipt FROM tenancy.tenants WHERE id = $1`, id).Scan(&d)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, false, ErrTenantNotFound
	case err != nil:
		return nil, false, unavailable("read receipt", err)
	case d == nil:
		return &dropped{}, false, nil
	}
	return d, true, nil
}

// writeReceipt says what is dropped next. From here on the tenant cannot be restored.
func (c *Catalog) writeReceipt(ctx context.Context, id ID, d *dropped) error {
	_, err := c.tn.primary.pool.Exec(ctx, `UPDATE tenancy.tenants SET receipt = $2 WHERE id = $1`, id, d)
	return unavailable("write receipt", err)
}

// dropPlace drops the schema, or the database that it is in, then what its roles own elsewhere, then the roles. In a shared schema it deletes
// the tenant's rows, and what is left of the place are its logins. With d nil no receipt is written: no tenant is in the place.
func (c *Catalog) dropPlace(ctx context.Context, p *place, d *dropped) error {
	roles := append(p.logins(), p.denseRoles()...)
	if p.isolation != IsolationShared {
		roles = append(roles, p.runtime, p.owner)
	}
	if d != nil {
		if err := c.expect(ctx, p, roles, d); err != nil {
			return err
		}
	}
	if p.isolation == IsolationShared {
		rows, err := c.erase(ctx, p)
		if err != nil {
			return fmt.Errorf("erase rows in %s: %w", p.source.Schema, err)
		}
		if rows != nil && d != nil {
			d.Rows = rows
		}
	}
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	switch p.isolation {
	case IsolationShared:
	case IsolationDatabase:
		if err := dropDatabase(ctx, conn, p); err != nil {
			return fmt.Errorf("drop database %s: %w", p.source.Database, err)
		}
	default:
		done, err := p.act(ctx, conn, p.owner)
		if err != nil {
			return err
		}
		defer done() // it ends with the role
		if err := dropSchema(ctx, conn, p); err != nil {
			return fmt.Errorf("drop schema %s: %w", p.source.Schema, err)
		}
	}
	if err := dropRoles(ctx, conn, roles...); err != nil {
		return fmt.Errorf("drop roles of %s: %w", p.source.Schema, err)
	}
	return nil
}

// expect writes down what there is to drop in the place, so that a receipt is whole whatever dies after it.
func (c *Catalog) expect(ctx context.Context, p *place, roles []string, d *dropped) error {
	conn, err := p.provisionerConn(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	made, err := rolesThere(ctx, conn, roles)
	if err != nil {
		return err
	}
	tables, database := 0, false
	switch p.isolation {
	case IsolationShared:
	case IsolationDatabase:
		found, err := findDatabase(ctx, conn, p)
		if err != nil {
			return fmt.Errorf("drop database %s: %w", p.source.Database, err)
		}
		database = found.there
	default:
		list, err := relationsOf(ctx, conn, p)
		if err != nil {
			return err
		}
		tables = len(list)
	}
	d.found(p, tables, made, database)
	return c.writeReceipt(ctx, p.tenant.ID, d)
}

// rolesThere returns those of the roles that there are.
func rolesThere(ctx context.Context, q querier, roles []string) ([]string, error) {
	rows, _ := q.Query(ctx, `SELECT rolname::text FROM pg_roles WHERE rolname = ANY($1) ORDER BY 1`, roles)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// relation is one of a place's, with an estimate of the locks that it takes to drop it.
type relation struct {
	Name, Kind string
	Locks      int
}

// relationsOf returns what is to be dropped one by one of the place's schema, in this order: partitions before what they are of, and what refers before
// what is referred to as far as that is the younger, so that CASCADE finds little more to lock.
func relationsOf(ctx context.Context, conn *pgx.Conn, p *place) ([]relation, error) {
	rows, _ := conn.Query(ctx, `SELECT c.relname, CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'f' THEN 'FOREIGN TABLE' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
		4 + 2 * (SELECT count(*) FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid)
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND pg_get_userbyid(n.nspowner) = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
		ORDER BY c.relkind = 'S', c.relkind = 'p' OR NOT c.relispartition, c.oid DESC`, p.source.Schema, p.owner)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[relation])
}

// lockShare is the part of the server's lock table that a transaction of a drop may fill: what is full fails for everybody.
const lockShare = 10

// dropSchema drops some relations at a time: one statement for thousands of tables runs out of the server's lock table, and a transaction for each table
// takes longer.
func dropSchema(ctx context.Context, conn *pgx.Conn, p *place) error {
	list, err := relationsOf(ctx, conn, p)
	if err != nil {
		return err
	}
	var budget int
	if err := conn.QueryRow(ctx, `SELECT current_setting('max_locks_per_transaction')::int * current_setting('max_connections')::int / $1`, lockShare).Scan(&budget); err != nil {
		return err
	}
	for len(list) > 0 {
		n, locks := 1, list[0].Locks
		for n < len(list) && list[n].Kind == list[0].Kind && locks+list[n].Locks <= budget {
			locks += list[n].Locks
			n++
		}
		if err := dropRelations(ctx, conn, p, list[:n]); err != nil {
			return err
		}
		list = list[n:]
	}
	return execDDL(ctx, conn, "DROP SCHEMA IF EXISTS "+ident.Quote(p.source.Schema)+" CASCADE")
}

// dropRelations drops relations of one kind in one transaction, or in two halves where others have left the server too few locks.
func dropRelations(ctx context.Context, conn *pgx.Conn, p *place, list []relation) error {
	names := make([]string, len(list))
	for i, r := range list {
		names[i] = ident.Quote(p.source.Schema, r.Name)
	}
	err := execDDL(ctx, conn, "DROP "+list[0].Kind+" IF EXISTS "+strings.Join(names, ", ")+" CASCADE")
	if len(list) > 1 && isState(err, "53200") {
		half := len(list) / 2
		if err = dropRelations(ctx, conn, p, list[:half]); err == nil {
			err = dropRelations(ctx, conn, p, list[half:])
		}
	}
	return err
}

// dropRoles drops what the roles own outside the schema (large objects, default privileges) and then the roles.
func dropRoles(ctx context.Context, conn *pgx.Conn, roles ...string) error {
	for _, role := range roles {
		var there bool
		if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_roles WHERE rolname = $1`, role).Scan(&there); err != nil {
			return err
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
				return err
			}
		}
	}
	return nil
}
