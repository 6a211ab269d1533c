package rowsec

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Tenant is who a login is.
type Tenant struct {
	ID    int64 // from 1
	UID   [16]byte
	Realm [16]byte
}

// errOther is a login, a number or a UID that is another tenant's already.
var errOther = errors.New("it is another tenant's already")

// Admit makes login the tenant's: from its next statement on it sees the tenant's rows. A tenant can have several logins. The
// login exists and is a member of the runtime group; it may be admitted again.
//
// The error is [ErrUnsafe] for a login that may become another role of the schema's, may create anything, or has rights of the server's, and for one
// that is another tenant's; or the server's.
func (s Shared) Admit(ctx context.Context, conn *pgx.Conn, login string, t Tenant) error {
	err := s.asOwner(ctx, conn, pgx.TxOptions{}, func(tx pgx.Tx) error {
		if err := s.judge(ctx, tx, login); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `INSERT INTO `+s.table("tenancy_roster")+` (id, realm, tenant) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`, t.ID, t.Realm, t.UID)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `INSERT INTO `+s.table("tenancy_map")+` (login, id, realm, tenant)
			SELECT $1, id, realm, tenant FROM `+s.table("tenancy_roster")+` WHERE (id, realm, tenant) = ($2, $3, $4) ON CONFLICT DO NOTHING`, login, t.ID, t.Realm, t.UID)
		if err != nil {
			return err
		}
		var done bool
		err = tx.QueryRow(ctx, `SELECT count(*) = 1 FROM `+s.table("tenancy_map")+` WHERE (login, id, realm, tenant) = ($1, $2, $3, $4)`, login, t.ID, t.Realm, t.UID).Scan(&done)
		if err == nil && !done {
			err = fmt.Errorf("%w: the login, the number or the UID: %w", ErrUnsafe, errOther)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("admit login %s as tenant %d: %w", login, t.ID, err)
	}
	return nil
}

// judge refuses a login that the wall does not stop, or that can put itself in another's place.
func (s Shared) judge(ctx context.Context, tx pgx.Tx, login string) error {
	var why *string
	err := tx.QueryRow(ctx, `WITH RECURSIVE of AS (
			SELECT m.roleid FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = $1
			UNION SELECT m.roleid FROM pg_auth_members m JOIN of ON m.member = of.roleid)
		SELECT CASE
			WHEN rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication THEN 'it has rights of the server''s'
			WHEN rolname IN ($2, $3) THEN 'it is the owner or the group itself'
			WHEN NOT pg_has_role(oid, $3, 'USAGE') OR NOT has_schema_privilege(oid, $4, 'USAGE') THEN 'it has not the rights of the group'
			WHEN EXISTS (SELECT FROM of WHERE pg_get_userbyid(roleid) = $2) THEN 'it may become the owner'
			WHEN EXISTS (SELECT FROM pg_namespace n WHERE has_schema_privilege(pg_roles.oid, n.oid, 'CREATE')) THEN 'it may create in a schema'
			WHEN has_database_privilege(oid, current_database(), 'TEMPORARY, CREATE') THEN 'it may create temporary objects, or schemas'
			WHEN EXISTS (SELECT FROM of JOIN `+s.table("tenancy_readers")+` x ON x.role = pg_get_userbyid(roleid))
				OR EXISTS (SELECT FROM `+s.table("tenancy_readers")+` WHERE role = rolname) THEN 'it may become a reader of all rows'
			WHEN EXISTS (SELECT FROM of JOIN `+s.table("tenancy_map")+` x ON x.login = pg_get_userbyid(roleid)) THEN 'it may become another login'
		END FROM pg_roles WHERE rolname = $1`, login, s.Owner, s.Runtime, s.Schema).Scan(&why)
	if err == nil && why != nil {
		err = fmt.Errorf("%w: %s", ErrUnsafe, *why)
	}
	return err
}

// Dismiss takes the tenant from the login: from its next statement on it sees nothing and writes nothing. The rows stay, and so does the tenant on
// the roster. A login that is not there is no error. The error is the server's.
func (s Shared) Dismiss(ctx context.Context, conn *pgx.Conn, login string) error {
	err := s.asOwner(ctx, conn, pgx.TxOptions{}, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `DELETE FROM `+s.table("tenancy_map")+` WHERE login = $1`, login)
		return err
	})
	if err != nil {
		return fmt.Errorf("dismiss login %s: %w", login, err)
	}
	return nil
}
