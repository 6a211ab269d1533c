package rowsec

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Export writes the rows of one tenant, all as of one moment, to w: a line of JSON for each, {"table":"notes","row":{...}}, with the tables that are
// referred to before those that refer, and times in UTC. The last line is {"end":[{"table":"notes","rows":2},...]}, which is also what is
// returned: without it an export is not complete. Rows of the host's are not in it.
//
// Nothing is locked, and nothing is kept in memory but the row at hand. The reader of w sets the pace, and vacuum waits for it: its tables keep dead
// rows for as long as the export runs.
//
// The error is [ErrUnknown], that of w, or the server's.
func (s Shared) Export(ctx context.Context, conn *pgx.Conn, id int64, w io.Writer) ([]Count, error) {
	counts := []Count{}
	out := bufio.NewWriter(w)
	options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	err := s.asOwner(ctx, conn, options, func(tx pgx.Tx) error {
		var known bool
		if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM `+s.table("tenancy_roster")+` WHERE id = $1)`, id).Scan(&known); err != nil {
			return err
		}
		if !known {
			return ErrUnknown
		}
		if err := enter(ctx, tx, id); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `SET LOCAL TimeZone = 'UTC'`); err != nil {
			return err
		}
		tables, err := s.tables(ctx, tx)
		if err != nil {
			return err
		}
		refs, err := s.references(ctx, tx)
		if err != nil {
			return err
		}
		groups := order(tables, refs)
		for _, group := range slices.Backward(groups) {
			for _, t := range group {
				n, err := s.exportTable(ctx, tx, id, t, out)
				if err != nil {
					return fmt.Errorf("table %s: %w", t, err)
				}
				counts = append(counts, Count{t, n})
			}
		}
		return nil
	})
	if err == nil {
		err = json.NewEncoder(out).Encode(map[string][]Count{"end": counts})
	}
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		return nil, fmt.Errorf("export tenant %d: %w", id, err)
	}
	return counts, nil
}

func (s Shared) exportTable(ctx context.Context, tx pgx.Tx, id int64, table string, out *bufio.Writer) (n int64, err error) {
	name, err := json.Marshal(table)
	if err != nil {
		return 0, err
	}
	// The condition is the wall's; it is said once more for a caller whom no wall would stop.
	rows, err := tx.Query(ctx, `SELECT to_json(tenancy_row)::text FROM `+s.table(table)+` tenancy_row WHERE tenant_id = $1`, id)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	var line bytes.Buffer
	for ; rows.Next(); n++ {
		line.Reset()
		line.WriteString(`{"table":`)
		line.Write(name)
		line.WriteString(`,"row":`)
		if err := json.Compact(&line, rows.RawValues()[0]); err != nil { // a column of type json keeps its line breaks
			return n, err
		}
		line.WriteString("}\n")
		if _, err := out.Write(line.Bytes()); err != nil {
			return n, err
		}
	}
	return n, rows.Err()
}
