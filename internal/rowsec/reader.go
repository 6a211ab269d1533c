package rowsec

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Reader lets role read the rows of all tenants, of the tables that are protected now and later, and write none. Nobody is one until this is
// called. It is the host's alone.
//
// The error is [ErrUnsafe] for a role that has rights of the server's, or can act as the owner or as a tenant; that of a name
// that [ident.Schema] refuses; or the server's.
func (s Shared) Reader(ctx context.Context, conn *pgx.Conn, role string) error {
	if err := names(role); err != nil {
		return err
	}
	err := s.asOwner(ctx, conn, pgx.TxOptions{}, func(tx pgx.Tx) error {
		var unsafe, tenant, mapped bool
		err := tx.QueryRow(ctx, `SELECT rolsuper OR rolbypassrls OR pg_has_role(oid, $2, 'MEMBER'), pg_has_role(oid, $3, 'MEMBER'),
			EXISTS (SELECT FROM `+s.table("tenancy_map")+` WHERE login = rolname) FROM pg_roles WHERE rolname = $1`, role, s.Owner, s.Runtime).Scan(&unsafe, &tenant, &mapped)
		if err != nil {
			return err
		}
		if unsafe {
			return fmt.Errorf("%w: it may do more than read", ErrUnsafe)
		}
		if tenant || mapped {
			return fmt.Errorf("%w: it is one of the tenants' roles", ErrUnsafe)
		}
		if _, err := tx.Exec(ctx, `INSERT INTO `+s.table("tenancy_readers")+` VALUES ($1) ON CONFLICT DO NOTHING`, role); err != nil {
			return err
		}
		reader := ident.Quote(role)
		// The condition is part of the reader's plans too, although it does not decide there.
		if _, err := tx.Exec(ctx, "GRANT USAGE ON SCHEMA "+ident.Quote(s.Schema)+" TO "+reader+"; GRANT EXECUTE ON FUNCTION "+s.table("tenancy_tenant")+" TO "+reader); err != nil {
			return err
		}
		return s.readers(ctx, tx)
	})
	if err != nil {
		return fmt.Errorf("make %s a reader: %w", role, err)
	}
	return nil
}

// NoReader takes back what [Shared.Reader] gave. A role that is no reader is no error. The errors are that of a name that [ident.Schema] refuses and the server's.
func (s Shared) NoReader(ctx context.Context, conn *pgx.Conn, role string) error {
	if err := names(role); err != nil {
		return err
	}
	err := s.asOwner(ctx, conn, pgx.TxOptions{}, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `DELETE FROM `+s.table("tenancy_readers")+` WHERE role = $1`, role)
		if err != nil || tag.RowsAffected() == 0 { // another role's rights are not ours to take: the tenants' group has some
			return err
		}
		schema, reader := ident.Quote(s.Schema), ident.Quote(role)
		if _, err := tx.Exec(ctx, "REVOKE ALL ON ALL TABLES IN SCHEMA "+schema+" FROM "+reader+"; REVOKE ALL ON SCHEMA "+schema+" FROM "+reader+
			"; REVOKE ALL ON FUNCTION "+s.table("tenancy_tenant")+" FROM "+reader); err != nil {
			return err
		}
		return s.readers(ctx, tx)
	})
	if err != nil {
		return fmt.Errorf("make %s no reader: %w", role, err)
	}
	return nil
}

// readers brings the policies of the readers up to date on each protected table.
func (s Shared) readers(ctx context.Context, tx pgx.Tx) error {
	tables, err := s.tables(ctx, tx)
	if err != nil {
		return err
	}
	for _, t := range tables {
		if _, err := tx.Exec(ctx, `SELECT `+s.table("tenancy_read")+`($1::regclass, $2)`, s.table(t.Name), t.Host); err != nil {
			return err
		}
	}
	return nil
}
