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
	"github.com/msmt-go/tenancy/internal/ident"
)

// Export writes the rows of one tenant, all as of one moment, to w: a line of JSON for each, {"table":"notes","row":{...}}, with the tables that are
// referred to before those that refer, and times in UTC. The last line is {"end":[{"table":"notes","rows":2},...]}, which is also what is
// returned: without it an export is not complete. Rows of the host's are not in it.
//
// Nothing is kept in memory but the row at hand. The reader of w sets the pace, and vacuum waits for it: its tables keep dead rows for as long as the
// export runs. No row is locked; each table that was read is, in ACCESS SHARE until the end: who alters one waits, and others behind him.
//
// The error is [ErrUnknown], [ErrErasing], that of w, or the server's.
func (s Shared) Export(ctx context.Context, conn *pgx.Conn, id int64, w io.Writer) ([]Count, error) {
	return export(w, id, func(out *bufio.Writer) (counts []Count, err error) {
		err = s.asOwner(ctx, conn, snapshot, func(tx pgx.Tx) error {
			var known, erasing bool
			err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM `+s.table("tenancy_roster")+` WHERE id = $1), EXISTS (SELECT FROM `+s.table("tenancy_receipts")+` WHERE id = $1)`, id).Scan(&known, &erasing)
			switch {
			case err != nil:
				return err
			case !known:
				return ErrUnknown
			case erasing:
				return ErrErasing
			}
			if err := enter(ctx, tx, id); err != nil {
				return err
			}
			counts, err = s.exportRows(ctx, tx, id, out)
			return err
		})
		return counts, err
	})
}

// ExportOwn is [Shared.Export] on a session of the tenant's own login, behind the wall. A login of another's is [ErrUnknown].
func (s Shared) ExportOwn(ctx context.Context, conn *pgx.Conn, id int64, w io.Writer) ([]Count, error) {
	return export(w, id, func(out *bufio.Writer) (counts []Count, err error) {
		err = pgx.BeginTxFunc(ctx, conn, snapshot, func(tx pgx.Tx) error {
			var mine bool
			if _, err := tx.Exec(ctx, systemNames); err != nil {
				return err
			}
			if err := tx.QueryRow(ctx, `SELECT coalesce(`+s.table("tenancy_tenant")+`() = $1, false)`, id).Scan(&mine); err != nil {
				return err
			}
			if !mine {
				return ErrUnknown
			}
			counts, err = s.exportRows(ctx, tx, id, out)
			return err
		})
		return counts, err
	})
}

// ExportSchemaModel is [Shared.Export] for a schema of tenant id alone: the rows of all its tables but those named in without, on a session that may read them.
// The error is that of w or the server's: 42501 for a table that the session may not read, or from which a policy of the service's own keeps rows from it.
func ExportSchemaModel(ctx context.Context, conn *pgx.Conn, schema string, id int64, w io.Writer, without ...string) ([]Count, error) {
	return export(w, id, func(out *bufio.Writer) (counts []Count, err error) {
		err = pgx.BeginTxFunc(ctx, conn, snapshot, func(tx pgx.Tx) error {
			// Here no wall of the library's is a policy, and rows that another's policy hides would be missing without a word.
			if _, err := tx.Exec(ctx, systemNames+"; SET LOCAL row_security = off"); err != nil {
				return err
			}
			rows, _ := tx.Query(ctx, `SELECT c.relname::text, c.relkind = 'p' FROM (`+all+`) a JOIN pg_catalog.pg_class c ON c.oid = a.polrelid WHERE c.relname <> ALL ($2) ORDER BY 1`, schema, without)
			var tables []Table
			from := map[string]string{}
			var name string
			var parts bool
			_, err := pgx.ForEachRow(rows, []any{&name, &parts}, func() error {
				tables = append(tables, Table{Name: name})
				from[name] = "ONLY " + ident.Quote(schema, name) // a table that inherits has its rows to itself
				if parts {
					from[name] = ident.Quote(schema, name)
				}
				return nil
			})
			if err != nil {
				return err
			}
			refs, err := references(ctx, tx, all, schema)
			if err != nil {
				return err
			}
			counts, err = exportTables(ctx, tx, order(tables, refs), out, func(table string) (string, []any) { return from[table] + " tenancy_row", nil })
			return err
		})
		return counts, err
	})
}

// snapshot is a transaction that sees one moment and writes nothing.
var snapshot = pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}

// export runs fn, and writes the end.
func export(w io.Writer, id int64, fn func(out *bufio.Writer) ([]Count, error)) ([]Count, error) {
	out := bufio.NewWriter(w)
	counts, err := fn(out)
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

// exportRows writes the rows of the protected tables, behind the wall.
func (s Shared) exportRows(ctx context.Context, tx pgx.Tx, id int64, out *bufio.Writer) ([]Count, error) {
	tables, err := s.tables(ctx, tx)
	if err != nil {
		return nil, err
	}
	refs, err := references(ctx, tx, protected, s.Schema)
	if err != nil {
		return nil, err
	}
	// The condition is the wall's; it is said once more for a caller whom no wall would stop.
	return exportTables(ctx, tx, order(tables, refs), out, func(table string) (string, []any) {
		return s.table(table) + " tenancy_row WHERE tenant_id = $1", []any{id}
	})
}

func exportTables(ctx context.Context, tx pgx.Tx, groups [][]string, out *bufio.Writer, from func(table string) (sql string, args []any)) ([]Count, error) {
	// What the login or the database has set would be seen in the text.
	if _, err := tx.Exec(ctx, `SET LOCAL TimeZone = 'UTC'; SET LOCAL bytea_output = 'hex'; SET LOCAL extra_float_digits = 1; SET LOCAL IntervalStyle = 'postgres'`); err != nil {
		return nil, err
	}
	counts := []Count{}
	for _, group := range slices.Backward(groups) {
		for _, t := range group {
			sql, args := from(t)
			n, err := exportTable(ctx, tx, t, sql, args, out)
			if err != nil {
				return nil, fmt.Errorf("table %s: %w", t, err)
			}
			counts = append(counts, Count{t, n})
		}
	}
	return counts, nil
}

func exportTable(ctx context.Context, tx pgx.Tx, table, from string, args []any, out *bufio.Writer) (n int64, err error) {
	name, err := json.Marshal(table)
	if err != nil {
		return 0, err
	}
	rows, err := tx.Query(ctx, `SELECT to_json(tenancy_row)::text FROM `+from, args...)
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
