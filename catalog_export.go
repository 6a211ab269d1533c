package tenancy

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/rowsec"
)

const opExport = "export"

// ExportedRows is how many rows of a table [Catalog.Export] has written.
type ExportedRows struct {
	Table string
	Rows  int64
}

// exportHead is the first line of an export.
type exportHead struct {
	Realm     string    `json:"realm"`
	UID       string    `json:"uid"`
	ID        ID        `json:"id"`
	Name      string    `json:"name"`
	Isolation Isolation `json:"isolation"`
	Version   int64     `json:"version"` // of the service's migrations
	Begun     time.Time `json:"begun"`
}

// Export writes all rows of one tenant to w, as of one moment, in JSON lines of UTF-8, which are the same for each isolation:
//
//	{"tenant":{"realm":"…","uid":"…","id":7,"name":"acme","isolation":"schema","version":12,"begun":"2026-11-26T12:00:00Z"}}
//	{"table":"notes","row":{"id":1,"title":"…"}}
//	{"end":[{"table":"notes","rows":1}]}
//
// Tables come after those that they refer to; times with a zone are in UTC, and bytea is hexadecimal. Without its last line an export is not complete. In it are the tables of the
// tenant's schema, or its rows of the protected tables of a shared one; not in it are the library's own tables, views, large objects, and rows of the host's.
//
// A tenant in service is read through its own login, behind the wall that its calls are behind, on one connection beside its pool's. A table that the login may
// not read, or in a schema of its own one with a policy of the service's, is an error (42501), and a suspension meanwhile ends the export. A tenant that is suspended, under maintenance or deleted is read as its owner: no other verb works on the tenant
// meanwhile, and with [IsolationShared] no tenant is made, migrated or purged in the same schema. One whose purge has begun is refused: what is left is not all of it.
//
// Nothing is kept in memory but a row, so w sets the pace, and vacuum waits for it. Until it ends it holds a read lock (ACCESS SHARE) on each table that it has read: a migration that alters
// one waits, and the calls behind it, with [IsolationShared] those of all tenants. So write to a file, not to a slow client. Cancelling ctx ends the session at the server, and does not end a Write.
// The audit trail has the action "export" before the first row is read, and "exported" with the numbers of rows after the last.
//
// The error is that of w, [ErrTenantNotFound], [ErrTenantGone] (purged, or begun to be), [ErrTenantNotReady], [ErrIdentity], [ErrNoProvisioner], [ErrInProgress],
// [ErrPrimaryUnavailable] or the server's.
func (c *Catalog) Export(ctx context.Context, id ID, w io.Writer) ([]ExportedRows, error) {
	fail := func(err error) ([]ExportedRows, error) {
		return nil, &Error{Op: opExport, Tenant: id, Err: err}
	}
	ctx, err := begin(ctx)
	if err != nil {
		return fail(err)
	}
	p, err := c.exportable(ctx, id)
	if err != nil {
		return fail(err)
	}
	export := c.exportByLogin
	if p.tenant.State != StateActive {
		held, release, err := c.tn.primary.lockTenant(ctx, id)
		if err != nil {
			return fail(err)
		}
		defer release()
		ctx, export = held, c.exportAsOwner
		if p, err = c.exportable(ctx, id); err != nil { // what is locked now may have changed before
			return fail(err)
		}
	}
	if err := c.auditExport(ctx, opExport, p, nil); err != nil {
		return fail(err)
	}
	head := exportHead{UID(c.tn.realm.Value()).String(), p.tenant.UID.String(), id, p.tenant.Name, p.tenant.Isolation, p.version, time.Now().UTC().Truncate(time.Second)}
	if err := json.NewEncoder(w).Encode(map[string]exportHead{"tenant": head}); err != nil {
		return fail(err)
	}
	reading, cut := context.WithCancel(ctx)
	defer cut()
	counts, err := export(reading, p, cutting{w, cut})
	if err != nil {
		return fail(err)
	}
	rows := make([]ExportedRows, len(counts))
	for i, count := range counts {
		rows[i] = ExportedRows{count.Table, count.Rows}
	}
	if err := c.auditExport(ctx, "exported", p, rows); err != nil {
		return fail(err)
	}
	return rows, nil
}

// cutting ends the reading where nothing can be written any more: what is left of a table would be read to its end.
type cutting struct {
	io.Writer
	cut context.CancelFunc
}

func (c cutting) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	if err != nil {
		c.cut()
	}
	return n, err
}

// exportable reads the place of a tenant that has data.
func (c *Catalog) exportable(ctx context.Context, id ID) (*place, error) {
	p, err := c.place(ctx, id)
	switch {
	case err != nil:
		return nil, err
	case p.tenant.State == StatePurged:
		return nil, ErrTenantGone
	case p.state != "made":
		return nil, hinted(ErrTenantNotReady, "its place was never finished: there is nothing to export")
	case p.tenant.State == StateDeleted:
		if _, begun, err := c.readReceipt(ctx, id); err != nil || begun {
			return nil, cmp.Or(err, errHalfPurged)
		}
	}
	return p, nil
}

func (c *Catalog) auditExport(ctx context.Context, action string, p *place, rows []ExportedRows) error {
	detail := map[string]any{"state": p.tenant.State, "isolation": p.isolation}
	if rows != nil {
		detail["rows"] = rows
	}
	return refusal(opExport, pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error {
		return audit(ctx, tx, action, p.tenant.ID, detail)
	}))
}

// exportByLogin reads through the tenant's own login, which sees nothing of any other tenant, whatever is asked.
func (c *Catalog) exportByLogin(ctx context.Context, p *place, w io.Writer) ([]rowsec.Count, error) {
	source := p.source
	source.Pooler, source.PoolerTLS = "", "" // what a pooler lends is too short for it
	conn, err := c.tn.proved(ctx, p.tenant, source, "tenancy export")
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, "SET statement_timeout = 0"); err != nil { // the login can have one of its own
		return nil, err
	}
	if p.isolation == IsolationShared {
		return p.wall().ExportOwn(ctx, conn, int64(p.tenant.ID), w)
	}
	return p.exportSchema(ctx, conn, w)
}

// exportAsOwner reads a tenant whose logins are closed. The tenant's lock is held.
func (c *Catalog) exportAsOwner(ctx context.Context, p *place, w io.Writer) (counts []rowsec.Count, err error) {
	if p.isolation == IsolationShared {
		held, release, err := c.lockArea(ctx, p)
		if err != nil {
			return nil, err
		}
		defer release()
		ctx = held
	}
	provisioner, err := p.provisionerConn(ctx)
	if err != nil {
		return nil, err
	}
	defer closeConn(provisioner)
	err = c.asOwner(ctx, provisioner, p, func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.RuntimeParams["application_name"], cc.RuntimeParams["statement_timeout"] = "tenancy export", "0"
		return asArea(ctx, cc, func(owner *pgx.Conn) (err error) {
			if p.isolation == IsolationShared {
				counts, err = p.wall().Export(ctx, owner, int64(p.tenant.ID), w)
				return err
			}
			if err := c.ofTenant(ctx, owner, p); err != nil {
				return err
			}
			counts, err = p.exportSchema(ctx, owner, w)
			return err
		})
	})
	return counts, err
}

func (p *place) exportSchema(ctx context.Context, conn *pgx.Conn, w io.Writer) ([]rowsec.Count, error) {
	return rowsec.ExportSchemaModel(ctx, conn, p.source.Schema, int64(p.tenant.ID), w, markerTable, versionTable)
}

// ofTenant asks the schema's marker whose it is, which a login's proof does for itself.
func (c *Catalog) ofTenant(ctx context.Context, conn *pgx.Conn, p *place) error {
	var mine bool
	err := conn.QueryRow(ctx, "SELECT count(*) = 1 AND bool_and(realm = $1 AND tenant = $2) FROM "+ident.Quote(p.source.Schema, markerTable), UID(c.tn.realm.Value()), p.tenant.UID).Scan(&mine)
	if err == nil && !mine {
		err = fmt.Errorf("%w: the marker of schema %s is another's", ErrIdentity, p.source.Schema)
	}
	return err
}
