package tenancy

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/seal"
)

// RotateKeys seals again, under the first key of Config.Keys, everything in the primary that
// an older key sealed, and returns how many records that were. It may be called again, also after it died half-way; when it
// returns 0 the older keys can be taken out of the keyring. Every node must have been given the new key before.
//
// The error is [ErrWrongKey], which names the record that no key of the ring opens, or [ErrPrimaryUnavailable].
func (c *Catalog) RotateKeys(ctx context.Context) (sealed int, err error) {
	const op = "rotate keys"
	if ctx, err = begin(ctx); err != nil {
		return 0, &Error{Op: op, Err: err}
	}
	p := c.tn.primary
	for _, column := range []struct{ name, list, update string }{
		{"sentinel", `SELECT 1::bigint, realm, sentinel FROM tenancy.realm`,
			`UPDATE tenancy.realm SET sentinel = $3 WHERE $1 = 1 AND sentinel = $2`},
		{"provisioner", `SELECT id, (SELECT realm FROM tenancy.realm), provisioner FROM tenancy.servers WHERE provisioner IS NOT NULL ORDER BY id`,
			`UPDATE tenancy.servers SET provisioner = $3 WHERE id = $1 AND provisioner = $2`},
		{"data_source", `SELECT id, uid, sealed FROM tenancy.data_sources WHERE state <> 'dropped' ORDER BY id`,
			`UPDATE tenancy.data_sources SET sealed = $3 WHERE id = $1 AND sealed = $2`},
		{"dense_login", `SELECT id, (SELECT realm FROM tenancy.realm), sealed FROM tenancy.dense_logins ORDER BY id`,
			`UPDATE tenancy.dense_logins SET sealed = $3 WHERE id = $1 AND sealed = $2`},
	} {
		type record struct {
			ID   int64
			UID  UID
			Blob []byte
		}
		rows, _ := p.pool.Query(ctx, column.list)
		records, err := pgx.CollectRows(rows, pgx.RowToStructByPos[record])
		if err != nil {
			return sealed, unavailable(op, err)
		}
		for _, r := range records {
			if id, err := seal.KeyID(r.Blob); err == nil && id == p.keys.ring.Primary() {
				continue
			}
			plain, err := p.open(r.UID, column.name, r.Blob)
			if err != nil {
				return sealed, &Error{Op: op, Err: fmt.Errorf("%w: %s %d: %w", ErrWrongKey, column.name, r.ID, err)}
			}
			blob, err := p.seal(r.UID, column.name, plain)
			if err != nil {
				return sealed, &Error{Op: op, Err: err}
			}
			// The old record is part of the condition: one that was written meanwhile is left to its writer.
			tag, err := p.pool.Exec(ctx, column.update, r.ID, r.Blob, blob)
			if err != nil {
				return sealed, unavailable(op, err)
			}
			sealed += int(tag.RowsAffected())
		}
	}
	err = pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		return audit(ctx, tx, op, 0, map[string]any{"key": p.keys.ring.Primary(), "records": sealed})
	})
	return sealed, unavailable(op, err)
}
