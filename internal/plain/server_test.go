package plain_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/plain"
)

// volatile are the listed functions that are volatile and keep no state in the session. The state of random is
// a sequence of numbers that nobody else can tell, without setseed.
var volatile = []string{"clock_timestamp", "gen_random_uuid", "random", "timeofday"}

// laterVolatile are the same among those that PostgreSQL 14 and 15 do not have: not listed, but no harm as an attribute.
var laterVolatile = []string{"array_shuffle", "random_normal", "uuidv7"}

// clauses are the keywords that PostgreSQL lets a function be called by. It has a function of one name alone: like.
var clauses = []string{"by", "cube", "filter", "ilike", "join", "like", "materialized", "over", "rollup", "sets", "varying"}

func TestListedFunctionsKeepNoState(t *testing.T) {
	conn := dial(t)
	names := slices.Sorted(maps.Keys(plain.Functions))
	rows, _ := conn.Query(t.Context(), `SELECT proname::text, array_agg(DISTINCT provolatile::text) FROM pg_proc
		WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY($1) GROUP BY 1`, names)
	found := map[string][]string{}
	var name string
	var kinds []string
	if _, err := pgx.ForEachRow(rows, []any{&name, &kinds}, func() error { found[name] = kinds; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		switch kinds := found[name]; {
		case kinds == nil:
			t.Errorf("%s is no function of PostgreSQL %d: somebody may have made one", name, server.Major())
		case slices.Contains(kinds, "v") != slices.Contains(volatile, name):
			t.Errorf("%s: volatility %v, and on the test's list: %t", name, kinds, slices.Contains(volatile, name))
		case len(name) >= plain.Longest:
			t.Errorf("%s is longer than the buffer that it is looked up in", name)
		}
	}
}

func TestKeywordsBeforeAParenthesisCallNothing(t *testing.T) {
	conn := dial(t)
	names := slices.Sorted(maps.Keys(plain.Keywords))
	callable := column(t, conn, `SELECT n FROM unnest($1::text[]) n LEFT JOIN pg_get_keywords() k ON k.word = n
		WHERE k.catcode IS NULL OR k.catcode NOT IN ('R', 'C') ORDER BY n COLLATE "C"`, names)
	if !slices.Equal(callable, clauses) {
		t.Errorf("keywords that may be the name of a function: got %v, want %v", callable, clauses)
	}
	if f := column(t, conn, `SELECT DISTINCT proname::text FROM pg_proc WHERE proname = ANY($1) AND provolatile <> 'i'`, clauses); len(f) > 0 {
		t.Errorf("keywords that call something: %v", f)
	}
}

// What a read calls without a name before a parenthesis: operators, casts, types, and functions of one parameter as attributes.
func TestNothingVolatileIsCalledWithoutAParenthesis(t *testing.T) {
	conn := dial(t)
	if f := column(t, conn, `SELECT oid::regprocedure::text FROM pg_proc WHERE provolatile = 'v' AND oid IN (
		SELECT oprcode FROM pg_operator UNION SELECT castfunc FROM pg_cast
		UNION SELECT unnest(ARRAY[typinput, typoutput, typreceive, typsend, typmodin, typmodout]) FROM pg_type)`); len(f) > 0 {
		t.Errorf("volatile: %v", f)
	}
	if plain.Read(`SELECT (x).lower FROM x`) {
		t.Error("an attribute of an expression is taken for a column")
	}
	refused := 0
	for _, f := range column(t, conn, `SELECT DISTINCT proname::text FROM pg_proc WHERE provolatile = 'v' AND pronamespace = 'pg_catalog'::regnamespace
		AND (1 BETWEEN pronargs - pronargdefaults AND pronargs OR provariadic <> 0) AND prorettype <> 'internal'::regtype AND NOT 'internal'::regtype = ANY(proargtypes::oid[])`) {
		if slices.Contains(laterVolatile, f) {
			continue
		}
		refused++
		for _, sql := range []string{"SELECT x." + f + " FROM x", `SELECT x."` + f + `" FROM x`, "SELECT s.x." + strings.ToUpper(f) + " FROM s.x"} {
			if plain.Read(sql) {
				t.Errorf("taken for a column: %s", sql)
			}
		}
	}
	if refused < 20 {
		t.Errorf("%d volatile functions of one parameter: the test looks for the wrong thing", refused)
	}
}

// left is what may stay in a session, apart from the state of a sequence.
const left = `
	SELECT 'setting ' || name || '=' || setting AS l FROM pg_settings WHERE source = 'session'
	UNION ALL SELECT 'own setting ' || coalesce(current_setting('plain.x', true), '') || coalesce(current_setting('plain.y', true), '')
	UNION ALL SELECT 'lock ' || objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
	UNION ALL SELECT 'cursor ' || name FROM pg_cursors WHERE is_holdable
	UNION ALL SELECT 'channel ' || c FROM pg_listening_channels() c
	UNION ALL SELECT 'statement ' || name FROM pg_prepared_statements WHERE from_sql
	UNION ALL SELECT 'temporary ' || relname FROM pg_class WHERE relnamespace = pg_my_temp_schema()
	ORDER BY 1`

func leftIn(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	all := column(t, conn, left)
	if _, err := conn.Exec(t.Context(), `SELECT currval('plain_s')`); err == nil { // asks for more than lastval: setval counts
		all = append(all, "sequence")
	}
	return strings.Join(all, "\n")
}

const fixture = `CREATE TEMP TABLE plain_notes (id bigint, body text, at timestamptz DEFAULT now());
	INSERT INTO plain_notes (id, body) VALUES (1, 'a'), (2, 'b'); CREATE TEMP SEQUENCE plain_s`

// stays are pieces of statements that leave something, whole and as an expression.
var stays = []string{
	`SET plain.x = '1'`, `SET work_mem = '1MB'`, `LISTEN plain`, `DECLARE c CURSOR WITH HOLD FOR SELECT 1`, `PREPARE plain_p AS SELECT 1`,
	`CREATE TEMP TABLE plain_t (a int)`, `SELECT 1 AS a INTO TEMP plain_t`, `SELECT * INTO TEMP plain_t FROM plain_notes`,
}

var staysInside = []string{
	`set_config('plain.y', 'b', false)`, `"set_config" ('plain.y', 'b', false)`, "SET_CONFIG -- c\n('plain.y', 'b', false)", `pg_catalog . set_config('plain.y', 'b', false)`,
	`pg_advisory_lock(7)::text`, `(7::bigint).pg_advisory_lock::text`, `pg_advisory_lock_shared(7)::text`, `nextval('plain_s')::text`,
	`('plain_s'::regclass).nextval::text`, `(SELECT x.nextval FROM CAST('plain_s' AS regclass) x)::text`, `(SELECT x."pg_advisory_lock" FROM CAST(8 AS bigint) x)::text`,
	`setval('plain_s', 3)::text`, `query_to_xml('SELECT set_config(''plain.y'', ''b'', false)', true, true, '')::text`,
	`U&"set_confi\0067"('plain.y', 'b', false)`, `U&"set!005fconfig" UESCAPE '!' ('plain.y', 'b', false)`,
	`e'\', ' || set_config('plain.y', 'b', false) || e'\''`, `$$'$$ || set_config('plain.y', 'b', false) || $$'$$`, `$q$"$q$ || nextval('plain_s') || $q$"$q$`,
	`(SELECT max(word) FROM ts_stat('SELECT to_tsvector(set_config(''plain.y'', ''b'', false))'))`,
}

func TestProbeSeesWhatStays(t *testing.T) {
	statements := slices.Clone(stays)
	for _, e := range staysInside {
		statements = append(statements, "SELECT "+e)
	}
	for _, sql := range statements {
		conn := dial(t)
		if _, err := conn.PgConn().Exec(t.Context(), fixture).ReadAll(); err != nil {
			t.Fatal(err)
		}
		before := leftIn(t, conn)
		if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
		if leftIn(t, conn) == before {
			t.Errorf("leaves nothing that the probe sees: %s", sql)
		}
		if plain.Read(sql) {
			t.Errorf("taken for a read: %s", sql)
		}
		if err := conn.Close(t.Context()); err != nil { // with its locks
			t.Fatal(err)
		}
	}
}

// grammar makes statements, most of which the server accepts.
type grammar struct{ *rand.Rand }

func (g grammar) pick(s ...string) string { return s[g.IntN(len(s))] }

// gap is what may stand between two words.
func (g grammar) gap() string {
	return g.pick(" ", " ", " ", "\n", "\t", " /* ' ; */ ", " /* a /* \" */ -- */", " -- it's \"; SET plain.x = 1\n", " --\r")
}

func (g grammar) expression(depth int) string {
	if g.IntN(30) == 0 {
		return g.pick(staysInside...)
	}
	if depth == 0 {
		return g.pick(`id::text`, `body`, `n.body`, `"body"`, `n."body"`, `'; SET plain.x = 1 --'`, `'it''s /*'`, `'"'`, `1.5::text`, `1e3::numeric(10, 2)::text`, `'2020-01-01'::text`, `current_user::text`)
	}
	d := depth - 1
	switch g.IntN(11) {
	case 0:
		return "lower" + g.gap() + "(" + g.expression(d) + ")"
	case 1:
		return g.expression(d) + " || " + g.expression(d)
	case 2:
		return "coalesce(" + g.expression(d) + "," + g.gap() + g.expression(d) + ")"
	case 3:
		return "CASE WHEN (" + g.expression(d) + ") = 'a' THEN (" + g.expression(d) + ")" + g.gap() + "ELSE 'c' END"
	case 4:
		return "(SELECT max(" + g.expression(d) + ") FROM plain_notes n)"
	case 5:
		return "pg_catalog." + g.pick("upper", `"upper"`, "md5") + "(" + g.expression(d) + ")"
	case 6:
		return "array_to_string(ARRAY[" + g.expression(d) + "], ',')"
	case 7:
		return "to_jsonb(" + g.expression(d) + ")::text"
	case 8:
		return "jsonb_build_object('k', " + g.expression(d) + ") ->> 'k'"
	case 9:
		return "CAST(" + g.expression(d) + " AS varchar" + g.gap() + "(20))::text"
	default:
		return "substring(" + g.expression(d) + " FROM 1 FOR 2)"
	}
}

func (g grammar) query(depth int) string {
	s := "SELECT" + g.gap() + g.pick("", "", "DISTINCT ") + g.expression(depth) + " AS" + g.gap() + g.pick("a", "body", `"into"`, `"a; b"`, "größe") + g.gap()
	if g.IntN(20) == 0 {
		s += "INTO TEMP plain_t" + g.gap()
	}
	s += "FROM " + g.pick("plain_notes n", "plain_notes"+g.gap()+"AS n", "(TABLE plain_notes) n", "(VALUES (1, 'a')) AS n (id, body)")
	if g.IntN(2) == 0 {
		s += g.gap() + "WHERE" + g.gap() + "id IN (1, 2) AND NOT (" + g.expression(depth) + " IS NULL)"
	}
	return s
}

func (g grammar) statement() string {
	s := ""
	switch g.IntN(12) {
	case 0:
		s = "VALUES (1, 'a'), (2, lower('B'))"
	case 1:
		s = "TABLE" + g.gap() + "plain_notes"
	case 2, 3:
		s = "WITH x AS " + g.pick("", "MATERIALIZED ") + "(" + g.query(1) + ")" + g.gap() + "SELECT * FROM x"
	case 4:
		s = "WITH x AS (" + g.pick("INSERT INTO plain_notes (id) VALUES (nextval('plain_s')) RETURNING id", "UPDATE plain_notes SET id = nextval('plain_s') RETURNING id", "SELECT 1 FOR UPDATE") + ") SELECT * FROM x"
	case 5:
		s = "(" + g.query(1) + ")" + g.gap() + "UNION ALL (" + g.query(0) + ")"
	case 6:
		s = "SELECT count(*) FILTER (WHERE id > 1) OVER (PARTITION BY body ORDER BY (id)) FROM plain_notes n"
	case 7:
		s = "SELECT id, body FROM plain_notes n FOR" + g.gap() + g.pick("UPDATE", "NO"+g.gap()+"KEY UPDATE OF n SKIP LOCKED", "SHARE")
	default:
		s = g.query(2)
	}
	if g.IntN(8) == 0 {
		s = "-- name: It's :many\n" + s
	}
	switch g.IntN(12) {
	case 0:
		s += ";"
	case 1:
		s += " -- ; SET plain.x = 1"
	case 2:
		s += ";" + g.gap() + g.pick(stays...)
	case 3:
		s += " --\r;" + g.pick(stays...)
	}
	return s
}

func TestReadLeavesTheSessionAsItWas(t *testing.T) {
	g := grammar{rand.New(rand.NewPCG(1, 2))}
	conn := dial(t)
	if _, err := conn.PgConn().Exec(t.Context(), fixture).ReadAll(); err != nil {
		t.Fatal(err)
	}
	before := leftIn(t, conn)
	all := slices.Clone(reads)
	for range 1000 {
		all = append(all, g.statement())
	}
	read, ran := 0, 0
	for _, sql := range all {
		if !plain.Read(sql) {
			continue
		}
		read++
		if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err == nil { // as a simple query, which may be several
			ran++
		}
		if after := leftIn(t, conn); after != before {
			t.Fatalf("left in the session:\n%s\nwhere there was\n%s\nby %s", after, before, sql)
		}
	}
	if summary := fmt.Sprintf("%d statements, %d of them reads, %d ran", len(all), read, ran); read < 300 || ran < read*8/10 || read > len(all)*9/10 {
		t.Errorf("the grammar tests little: %s", summary)
	} else {
		t.Log(summary)
	}
}

// Pieces of quotes and comments in any order around a call: where Read says that the call is only text, the server has to agree.
func TestReadFindsTheQuotesThatTheServerFinds(t *testing.T) {
	g := grammar{rand.New(rand.NewPCG(3, 4))}
	for _, conforming := range []string{"on", "off"} {
		conn := dial(t)
		if _, err := conn.PgConn().Exec(t.Context(), fixture+"; SET standard_conforming_strings = "+conforming).ReadAll(); err != nil {
			t.Fatal(err)
		}
		before := leftIn(t, conn)
		read, ran := 0, 0
		for range 50_000 {
			sql := "SELECT 1"
			for range 1 + g.IntN(9) {
				sql += g.pick(`'`, `'`, `''`, `"`, `"`, `/*`, `*/`, `/`, `*`, `--`, "\n", "\r", "\f", `'\'`, `||'`, `$$`, `$1`, `$a$`, `$`, `e`, `E'`, `U&`, `u&"`, `\`, `||`, `,`, ` AS `, ` `, `1`, `a`, `é`, `.`, `;`, `(`, `)`,
					`, set_config('plain.y', 'b', false)`, `,pg_advisory_lock(9)`, `,set_config($$plain.y$$,$$b$$,false)`, `; SET plain.x = 1`, `,('plain_s'::regclass).nextval`)
			}
			if !strings.Contains(sql, "plain") && !strings.Contains(sql, "lock") || !plain.Read(sql) {
				continue
			}
			read++
			if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err != nil {
				continue
			}
			ran++
			if after := leftIn(t, conn); after != before {
				t.Fatalf("left in the session:\n%s\nwhere there was\n%s\nby %q", after, before, sql)
			}
		}
		if read < 300 || ran < 100 {
			t.Errorf("the pieces test little: %d reads, %d ran", read, ran)
		}
		t.Logf("standard_conforming_strings %s: %d reads, %d ran", conforming, read, ran)
	}
}
