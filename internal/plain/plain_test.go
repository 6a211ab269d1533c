package plain_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/plain"
)

const sqlc = `-- name: ListNotes :many
SELECT n.id, n.title, coalesce(n.body, '') AS body, count(*) OVER () AS total
FROM notes n
LEFT JOIN authors a ON a.id = n.author_id AND lower(a.name) LIKE $1 || '%'
WHERE n.created_at >= now() - $2::interval AND n.tags @> ARRAY[$3]::text[] AND n.id = ANY($4::bigint[])
ORDER BY n.created_at DESC, n.id
LIMIT $5 OFFSET $6
`

var reads = []string{
	`SELECT 1`,
	`select 1;`,
	"  select\t1 ;\r\n -- done; SET x = 1\n /* ; */ ",
	`SELECT 1 -- no newline`,
	`SELECT 1 --`,
	`(SELECT 1)`,
	`((SELECT 1) UNION ALL (SELECT 2)) ORDER BY 1`,
	`TABLE notes`,
	`VALUES (1, 'a'), (2, 'b')`,
	`WITH x AS (SELECT 1 AS a) SELECT a FROM x`,
	`WITH RECURSIVE x AS NOT MATERIALIZED (SELECT 1 AS a UNION ALL SELECT a + 1 FROM x WHERE a < 3) TABLE x`,
	`/* ' */ SELECT 1`,
	`/* a /* b ; " */ ' */ SELECT 1`,
	`/**/SELECT/*/ */ 1 /***/`,
	`SELECT '; SET x = 1', '--', '/*', 'it''s', '$$', '"'`,
	`SELECT 'a' -- b` + "\n" + `'c; d'`,
	`SELECT 1 AS "into", 2 AS "a""b; insert", "update" FROM "delete"`,
	`SELECT a.b, "A"."B", s.t.c, t.* FROM s.t AS a`,
	`SELECT a->'b'->>'c', a #>> '{x,y}', a ? 'k', a @> $1, -1 + +1, 2*/* c */3, 1.5e3, .5, 5., 1e-3, x[1:2] FROM t`,
	`SELECT a::numeric(10, 2), b::varchar (3), c::timestamp(0), '{}'::jsonb, CAST(d AS character varying(3)), "date" FROM t`,
	`SELECT größe, naïve FROM straße WHERE größe > 1`,
	`SELECT COUNT(*) FILTER (WHERE a IS NOT NULL), "count"(*), pg_catalog.now(), "pg_catalog".lower('A'), PG_CATALOG . "lower" ('A') FROM t`,
	`SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY a) FROM t GROUP BY GROUPING SETS ((a), ()), ROLLUP (b), CUBE (c)`,
	`SELECT row_number() OVER (PARTITION BY a ORDER BY b), CASE WHEN (a) THEN (b) ELSE (c) END FROM t`,
	`SELECT extract(epoch FROM now()), trim(both ' ' FROM a), substring(a FROM 1 FOR 2), position('a' IN b), overlay(a PLACING b FROM 1) FROM t`,
	`SELECT * FROM a JOIN LATERAL (SELECT 1) b ON (true) JOIN c USING (id) WHERE EXISTS (SELECT 1) AND NOT (a.x IN (1, 2)) OR (a.y BETWEEN (1) AND (2))`,
	`SELECT * FROM unnest($1::text[]) WITH ORDINALITY AS t(word, n)`,
	`SELECT * FROM json_to_recordset($1) AS "x" (a int, b text)`,
	`SELECT * FROM t FOR UPDATE`,
	`SELECT * FROM t FOR /* c */ UPDATE OF t NOWAIT`,
	`SELECT n.id FROM n JOIN m USING (id) FOR NO KEY UPDATE OF n SKIP LOCKED`,
	`SELECT * FROM t FOR KEY SHARE`,
	`SELECT current_user, session_user, CURRENT_DATE, current_setting('tenancy.x', true), gen_random_uuid(), random()`,
	`SELECT array(SELECT 1), ARRAY [1], array_agg(DISTINCT a ORDER BY b) FROM t`,
	`SELECT make_interval(days => $1), date_trunc('day', now() AT TIME ZONE 'UTC')`,
	`SELECT (t).*, id FROM t`,
	`SELECT a$b, a$1 FROM t WHERE x=$1AND y=$2`,
	`SELECT "UPDATE" FROM t WHERE do_it AND setting AND updated_at < now()`,
	sqlc,
}

var others = map[string]string{
	"empty":                           ``,
	"only_a_comment":                  `-- SELECT 1`,
	"only_parentheses":                `()`,
	"semicolon_first":                 `; SELECT 1`,
	"two_statements":                  `SELECT 1; SET x = 1`,
	"two_reads":                       `SELECT 1; SELECT 2`,
	"two_semicolons":                  `SELECT 1;;`,
	"statement_after_a_line_comment":  "SELECT 1; -- a\nSET x = 1",
	"carriage_return_ends_a_comment":  "SELECT 1 -- a\r; SET x = 1",
	"statement_after_nested_comments": `SELECT 1 /* /* */ */; SET x = 1`,
	"insert":                          `INSERT INTO t VALUES (1)`,
	"update":                          `UPDATE t SET a = 1`,
	"delete":                          `DELETE FROM t`,
	"set":                             `SET x = 1`,
	"set_local":                       `SET LOCAL x = 1`,
	"reset":                           `RESET ALL`,
	"begin":                           `BEGIN`,
	"listen":                          `LISTEN a`,
	"declare":                         `DECLARE c CURSOR WITH HOLD FOR SELECT 1`,
	"prepare":                         `PREPARE p AS SELECT 1`,
	"execute":                         `EXECUTE p`,
	"explain":                         `EXPLAIN ANALYZE SELECT 1`,
	"copy":                            `COPY (SELECT 1) TO STDOUT`,
	"do":                              `DO 'BEGIN END'`,
	"show":                            `SHOW x`,
	"create":                          `CREATE TEMP TABLE t AS SELECT 1`,
	"quoted_first_word":               `"select" 1`,
	"first_word_in_part":              `SELECTED`,
	"select_into":                     `select * into t from n`,
	"select_into_temp":                `SELECT 1 AS a INTO TEMP t`,
	"into_in_odd_case":                `SELECT 1 InTo t`,
	"into_behind_a_number":            `SELECT 1into t`,
	"into_between_comments":           `SELECT 1/**/INTO/**/t`,
	"insert_in_with":                  `with x as (insert into t values (1) returning *) select * from x`,
	"update_in_with":                  `WITH x AS (UPDATE t SET a = 1 RETURNING *) SELECT * FROM x`,
	"delete_in_with":                  `WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x`,
	"merge_in_with":                   `WITH x AS (MERGE INTO t USING s ON true WHEN MATCHED THEN DO NOTHING) SELECT 1`,
	"update_behind_with":              `WITH x AS (SELECT 1 FOR UPDATE) UPDATE t a`,
	"for_elsewhere":                   `WITH x AS (SELECT 1 AS for) UPDATE t a`,
	"for_in_quotes":                   `WITH x AS (SELECT 1 "for" UPDATE t`,
	"no_key_without_for":              `SELECT 1 NO KEY UPDATE`,
	"for_no_update":                   `SELECT 1 FOR NO UPDATE`,
	"doubled_quote_in_a_function":     `SELECT "a""lower"('b')`,
	"for_key_update":                  `SELECT 1 FOR KEY UPDATE`,
	"set_config":                      `select set_config('a', 'b', false)`,
	"set_config_in_quotes":            `select "set_config"('a', 'b', false)`,
	"set_config_qualified":            `SELECT pg_catalog.set_config('a', 'b', false)`,
	"set_config_qualified_in_quotes":  `SELECT "pg_catalog" . "set_config" ('a', 'b', false)`,
	"set_config_after_a_comment":      `SELECT set_config/* a /* b */ */('a', 'b', false)`,
	"set_config_after_a_line":         "SELECT set_config -- a\n('a', 'b', false)",
	"set_config_in_from":              `SELECT * FROM ROWS FROM (now(), set_config('a', 'b', false))`,
	"set_config_in_filter":            `SELECT count(*) FILTER (WHERE set_config('a', 'b', false) = 'b')`,
	"set_config_in_distinct":          `SELECT DISTINCT ON (1) set_config('a', 'b', false)`,
	"set_config_as_a_param":           `SELECT $1set_config('a', 'b', false)`,
	"set_config_in_values":            `VALUES (set_config('a', 'b', false))`,
	"set_config_in_limit":             `SELECT 1 LIMIT set_config('a', '1', false)::int`,
	"set_config_in_upper_case":        `SELECT SET_CONFIG('a', 'b', false)`,
	"set_config_with_unicode":         `SELECT U&"d\0061ta"('a')`,
	"unicode_name":                    `SELECT U&"d\0061t"`,
	"unicode_name_without_backslash":  `SELECT u&"a" FROM t`,
	"unicode_name_other_escape":       `SELECT U&"set!005fconfig" UESCAPE '!' ('a', 'b', false)`,
	"unicode_string":                  `SELECT U&'d\0061t'`,
	"escape_string":                   `SELECT E'a'`,
	"escape_string_with_quote":        `SELECT e'\'' || '; SET x = 1 --'`,
	"escape_string_after_a_number":    `SELECT 1e'\', set_config(''a'', ''b'', false) --'`,
	"backslash_in_a_string":           `SELECT '\'; SET x = 1 --'`,
	"backslash_may_go_on":             `SELECT '\' || ', set_config($1, $2, false) --'`,
	"bit_string":                      `SELECT B'1'`,
	"national_string":                 `SELECT N'a'`,
	"dollar_quotes":                   `SELECT $$a$$`,
	"dollar_quotes_hide_a_quote":      `SELECT $$'$$, set_config('a', 'b', false), $$'$$`,
	"tagged_dollar_quotes":            `SELECT $a$'$a$`,
	"dollar_quotes_after_a_param":     `SELECT $1$$'$$`,
	"dollar_quotes_after_a_number":    `SELECT 1$a$'$a$`,
	"dollar_quotes_non_ascii":         `SELECT $é$'$é$`,
	"open_string":                     `SELECT 'a`,
	"open_name":                       `SELECT "a`,
	"open_comment":                    `SELECT 1 /* /* */`,
	"comment_closed_by_its_opening":   `SELECT 1 /*/`,
	"backslash":                       `SELECT 1 \g`,
	"braces":                          `SELECT {}`,
	"nul":                             "SELECT 1\x00",
	"nul_in_a_string":                 "SELECT '\x00'",
	"nul_in_a_comment":                "SELECT 1 --\x00",
	"vertical_tab":                    "SELECT\v1",
	"nextval":                         `SELECT nextval('s')`,
	"currval":                         `SELECT currval('s')`,
	"lastval":                         `SELECT lastval()`,
	"setval":                          `SELECT setval('s', 1)`,
	"setseed":                         `SELECT setseed(0)`,
	"advisory_lock":                   `SELECT pg_advisory_lock(1)`,
	"advisory_lock_of_transaction":    `SELECT pg_try_advisory_xact_lock(1)`,
	"notify":                          `SELECT pg_notify('a', 'b')`,
	"large_object":                    `SELECT lo_creat(1)`,
	"query_to_xml":                    `SELECT query_to_xml('SELECT set_config(''a'', ''b'', false)', true, true, '')`,
	"ts_stat":                         `SELECT * FROM ts_stat('SELECT to_tsvector(''a'')')`,
	"ts_rewrite":                      `SELECT ts_rewrite('a'::tsquery, 'SELECT ''a''::tsquery, ''b''::tsquery')`,
	"dblink":                          `SELECT dblink_connect('a')`,
	"function_of_the_service":         `SELECT touch(1)`,
	"function_of_another_schema":      `SELECT public.lower('a')`,
	"function_of_another_database":    `SELECT a.pg_catalog.lower('a')`,
	"quoted_name_in_another_case":     `SELECT "Lower"('a')`,
	"quoted_schema_in_another_case":   `SELECT "PG_CATALOG".lower('a')`,
	"quoted_keyword_is_a_function":    `SELECT "in"(1)`,
	"qualified_keyword_is_a_function": `SELECT pg_catalog.over(1)`,
	"non_ascii_function":              `SELECT élower('a')`,
	"operator_by_name":                `SELECT 1 OPERATOR(public.+) 1`,
	"column_list_without_as":          `WITH x(a, b) AS (SELECT 1, 2) SELECT a FROM x`,
	"as_is_a_column":                  `SELECT t.as touch(1)`,
	"as_is_an_alias":                  `SELECT 1 AS as touch(1)`,
	"lock_as_an_attribute":            `SELECT (5::bigint).pg_advisory_lock`,
	"nextval_of_a_number":             `SELECT 1.nextval`,
	"nextval_as_an_attribute":         `SELECT ('s'::regclass).nextval`,
	"nextval_of_an_element":           `SELECT (ARRAY['s'::regclass])[1].nextval`,
	"nextval_of_a_column":             `SELECT a[1].nextval FROM t`,
	"nextval_of_a_param":              `SELECT $1.nextval`,
	"nextval_in_quotes":               `SELECT ('s'::regclass)/**/./**/"nextval"`,
	"nextval_of_an_alias":             `SELECT x.nextval FROM CAST('s' AS regclass) x`,
	"nextval_of_an_alias_in_quotes":   `SELECT x . "nextval" FROM unnest($1::regclass[]) x`,
	"lock_of_an_alias":                `SELECT g.PG_advisory_lock FROM generate_series(1::bigint, 3) g`,
}

func TestReadKnowsAPlainRead(t *testing.T) {
	for _, sql := range reads {
		if !plain.Read(sql) {
			t.Errorf("refused: %s", sql)
		}
		for _, more := range []string{";\nSET x = 1", "\n, set_config('a', 'b', false)", "\nINTO t", "\n(nextval('s'))"} {
			if plain.Read(sql + more) {
				t.Errorf("taken for a read: %s", sql+more)
			}
		}
	}
}

func TestReadRefusesWhatMayStay(t *testing.T) {
	for name, sql := range others {
		if plain.Read(sql) {
			t.Errorf("%s: taken for a read: %s", name, sql)
		}
	}
}

func TestReadDoesNotAllocate(t *testing.T) {
	for _, sql := range []string{sqlc, strings.ToUpper(sqlc), others["nextval_of_an_alias_in_quotes"]} {
		if n := testing.AllocsPerRun(100, func() { plain.Read(sql) }); n != 0 {
			t.Errorf("%v allocations for %s", n, sql)
		}
	}
}

// piece is what the fuzz target's own, simpler reading takes out of a statement.
var (
	piece = regexp.MustCompile(`(?s)'[^']*'|"[^"]*"|--[^\r\n]*|/\*.*?\*/`)
	word  = regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_$]*`)
	bad   = regexp.MustCompile(`(?i)^(insert|delete|merge|into|call|do|set)$`)
)

func FuzzRead(f *testing.F) {
	for _, sql := range reads {
		f.Add(sql)
	}
	for _, sql := range others {
		f.Add(sql)
	}
	f.Add("SELECT AS 0As touch(")
	f.Add("SELECT 1 AS étouch(a), ſet, n.nextvalK")
	f.Fuzz(func(t *testing.T, sql string) {
		if len(sql) > 1000 {
			return // the rest of the target is slower than what it tests
		}
		ok := plain.Read(sql)
		if commented := plain.Read("/* ' /* \" */ ; */-- $$\r" + sql); commented != ok {
			t.Fatalf("%t, behind a comment %t: %q", ok, commented, sql)
		}
		if !ok {
			return
		}
		for _, more := range []string{";\nSET x = 1", "\n; --\rSELECT 2", "\n, set_config('a', 'b', false)", "\nINTO t", "\n.nextval()", "\n'", "\n/*"} {
			if plain.Read(sql + more) {
				t.Fatalf("taken for a read: %q", sql+more)
			}
		}
		if !plain.Read(sql + "\n-- ' ; SET x = 1") {
			t.Fatalf("refused with a comment behind: %q", sql)
		}
		if strings.Count(sql, "/*") > 1 && strings.Contains(sql, "*/") {
			return // may nest, which no regular expression reads
		}
		ascii := strings.Map(func(r rune) rune {
			if r >= 0x80 {
				return '_' // a letter too, and none that (?i) takes for an s or a k
			}
			return r
		}, sql)
		rest := piece.ReplaceAllStringFunc(ascii, func(s string) string {
			if s[0] == '-' || s[0] == '/' {
				return " "
			}
			return " $ "
		})
		if head, tail, _ := strings.Cut(rest, ";"); strings.TrimSpace(tail) != "" || strings.ContainsAny(head, "\\'\"") {
			t.Fatalf("taken for a read: %q", sql)
		}
		for _, w := range word.FindAllString(rest, -1) {
			if bad.MatchString(w) {
				t.Fatalf("taken for a read, with %s: %q", w, sql)
			}
		}
	})
}

func BenchmarkRead(b *testing.B) {
	for name, sql := range map[string]string{"short": "SELECT id, title, body FROM notes WHERE author_id = $1 ORDER BY created_at DESC LIMIT 20", "long": sqlc} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !plain.Read(sql) {
					b.Fatal("refused")
				}
			}
		})
	}
}
