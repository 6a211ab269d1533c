package rowsec

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Table is a protected one.
type Table struct {
	Name string
	Host bool // it may have rows of the host's
	// Unique are its unique indexes and exclusion constraints without tenant_id: by an insert of its own a tenant learns whether another has the value.
	Unique []string
	// References are its foreign keys to protected tables without tenant_id: a tenant's row can refer to another's.
	References []string
}

// Tables lists the protected tables, by name, as the server's catalogs have them. The error is the server's.
func (s Shared) Tables(ctx context.Context, conn *pgx.Conn) ([]Table, error) {
	tables, err := s.tables(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("list protected tables: %w", err)
	}
	return tables, nil
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

const protected = `SELECT p.polrelid FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE p.polname = 'tenancy_wall' AND n.nspname = $1`

// all is every table of a schema, as protected is the protected ones.
const all = `SELECT c.oid AS polrelid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE n.nspname = $1 AND c.relkind IN ('r', 'p') AND NOT c.relispartition`

func (s Shared) tables(ctx context.Context, q querier) ([]Table, error) {
	rows, _ := q.Query(ctx, `WITH protected AS (`+protected+`), own AS (
			SELECT a.attrelid, a.attnum FROM pg_catalog.pg_attribute a WHERE a.attname = 'tenant_id' AND NOT a.attisdropped)
		SELECT c.relname::text, EXISTS (SELECT FROM pg_catalog.pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenancy_wall' AND pg_catalog.pg_get_expr(p.polqual, c.oid) LIKE '%tenant_id IS NULL%'),
			ARRAY(SELECT x.relname::text FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
				WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion) AND own.attnum <> ALL (i.indkey::int2[]) ORDER BY 1),
			ARRAY(SELECT k.conname::text FROM pg_catalog.pg_constraint k JOIN own other ON other.attrelid = k.confrelid
				WHERE k.conrelid = c.oid AND k.contype = 'f' AND k.confrelid IN (SELECT polrelid FROM protected)
				AND NOT EXISTS (SELECT FROM unnest(k.conkey, k.confkey) pair (mine, theirs) WHERE mine = own.attnum AND theirs = other.attnum) ORDER BY 1)
		FROM protected JOIN pg_catalog.pg_class c ON c.oid = polrelid JOIN own ON own.attrelid = c.oid ORDER BY 1`, s.Schema)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Table])
}

// reference is a foreign key between tables, with the names of its columns in pairs.
type reference struct {
	Child, Parent        string
	ChildCols, ParentCol []string
}

// references lists those between the tables that the query set chooses of the schema.
func references(ctx context.Context, q querier, set, schema string) ([]reference, error) {
	rows, _ := q.Query(ctx, `WITH chosen AS (`+set+`)
		SELECT c.relname::text, p.relname::text,
			ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY x (num, at) JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = num ORDER BY at),
			ARRAY(SELECT a.attname::text FROM unnest(k.confkey) WITH ORDINALITY x (num, at) JOIN pg_catalog.pg_attribute a ON a.attrelid = p.oid AND a.attnum = num ORDER BY at)
		FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_class p ON p.oid = k.confrelid
		WHERE k.contype = 'f' AND k.conrelid IN (SELECT polrelid FROM chosen) AND k.confrelid IN (SELECT polrelid FROM chosen) ORDER BY 1, 2, k.conname`, schema)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[reference])
}

// unreferenced is the condition that no row of the child refers to the row, called doomed, of the parent, other than itself.
func (r reference) unreferenced(schema string) string {
	var on []string
	for i := range r.ChildCols {
		on = append(on, "child."+ident.Quote(r.ChildCols[i])+" = doomed."+ident.Quote(r.ParentCol[i]))
	}
	if r.Child == r.Parent {
		on = append(on, "(child.tableoid, child.ctid) <> (doomed.tableoid, doomed.ctid)")
	}
	return "NOT EXISTS (SELECT FROM " + ident.Quote(schema, r.Child) + " child WHERE " + strings.Join(on, " AND ") + ")"
}

// order puts the tables into groups, those that refer before those that are referred to. Tables in a group refer to each other,
// in a circle; most groups have one table. These are the strongly connected components of the references, by Tarjan.
func order(tables []Table, refs []reference) [][]string {
	var groups [][]string
	var stack []string
	index, low, onStack := map[string]int{}, map[string]int{}, map[string]bool{}
	var visit func(t string)
	visit = func(t string) {
		index[t] = len(index) + 1
		low[t] = index[t]
		stack, onStack[t] = append(stack, t), true
		for _, r := range refs {
			if r.Parent != t {
				continue
			}
			if index[r.Child] == 0 {
				visit(r.Child)
				low[t] = min(low[t], low[r.Child])
			} else if onStack[r.Child] {
				low[t] = min(low[t], index[r.Child])
			}
		}
		if low[t] < index[t] {
			return
		}
		at := slices.Index(stack, t)
		groups = append(groups, slices.Clone(stack[at:]))
		for _, member := range stack[at:] {
			onStack[member] = false
		}
		stack = stack[:at]
	}
	for _, t := range tables {
		if index[t.Name] == 0 {
			visit(t.Name)
		}
	}
	return groups
}
