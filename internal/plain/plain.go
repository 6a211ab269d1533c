// Package plain tells the statements that only read from those that may leave something in a session.
//
// It knows a statement by its text alone, as UTF-8, and does not look into what the text calls by other
// names: views, row policies, operators, casts, types, column defaults, a function called as a column
// (n.f for f(n)), and a function that somebody created under a name which PostgreSQL has itself, with
// other parameters. Where one of these changes the session, no text tells.
//
// All functions are safe for concurrent use.
package plain

import "strings"

// Read reports whether sql is one plain read that leaves nothing in the session: no setting, temporary
// table, cursor, LISTEN, advisory lock, prepared statement or state of a sequence. Row locks
// (FOR UPDATE and the like) are allowed: they end with the transaction.
//
// It does not parse. True is certain; false says only that it is not, and is the answer for much that is
// harmless: a function that is not listed, a backslash in a string, dollar quotes, an attribute of an
// expression.
func Read(sql string) bool {
	if strings.IndexByte(sql, 0) >= 0 {
		return false // the protocol ends the text there
	}
	var (
		last    = token{kind: start}
		lock    int // words of FOR NO KEY that stand directly before
		started bool
		ended   bool // by a semicolon
	)
	for i := 0; i < len(sql); {
		c := sql[i]
		switch {
		case c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f':
			i++
			continue
		case c == '-' && next(sql, i) == '-':
			i = lineEnd(sql, i)
			continue
		case c == '/' && next(sql, i) == '*':
			if i = commentEnd(sql, i); i < 0 {
				return false
			}
			continue
		case ended:
			return false
		case !started && c != '(' && !wordStart(c):
			return false
		}
		locked := lock
		lock = 0
		switch {
		case wordStart(c):
			from := i
			for i++; i < len(sql) && wordPart(sql[i]); i++ {
			}
			word := sql[from:i]
			switch n := next(sql, i-1); {
			case n == '\'': // E'', B'', X'', N'' and date'' alike
				return false
			case n == '&' && len(word) == 1 && word[0]|0x20 == 'u' && (next(sql, i) == '\'' || next(sql, i) == '"'):
				return false
			}
			var ok bool
			if last, ok = named(last, token{kind: bare, text: word}); !ok {
				return false
			}
			what := classify(word)
			if !started {
				if started = what == first; !started {
					return false
				}
				break
			}
			switch {
			case what == refused, what == update && locked != 1 && locked != 3:
				return false
			case what == lockFor, what == lockNo && locked == 1, what == lockKey && locked == 2:
				lock = locked + 1
				if what == lockFor {
					lock = 1
				}
			case what == as && !last.qualified && !last.alias:
				last.as = true
			}
		case c == '"':
			from := i + 1
			if i = quoteEnd(sql, i, '"'); i < 0 {
				return false
			}
			var ok bool
			if last, ok = named(last, token{kind: quoted, text: sql[from : i-1]}); !ok {
				return false
			}
		case c == '\'':
			from := i
			if i = quoteEnd(sql, i, '\''); i < 0 || strings.IndexByte(sql[from:i], '\\') >= 0 {
				return false // what a backslash does depends on a setting
			}
			last = token{kind: other}
		case c == '$':
			if !digit(next(sql, i)) {
				return false // dollar quotes
			}
			for i++; i < len(sql) && digit(sql[i]); i++ {
			}
			last = token{kind: other}
		case c == '.':
			last = dotted(last, digit(next(sql, i)))
			i++
		case c == '(':
			if !last.opens() {
				return false
			}
			last = token{kind: other}
			i++
		case c == ';':
			ended = true
			i++
		case parts[c] == symbol, digit(c):
			last = token{kind: other}
			i++
		default:
			return false
		}
	}
	return started
}

// kind is what a token is, as far as the tokens behind it have to know.
type kind byte

const (
	start kind = iota
	other
	bare   // a word outside quotes: a keyword or a name
	quoted // a name in double quotes
	dot    // behind a name
	dotAfterExpression
)

type token struct {
	kind      kind
	text      string // of a name, without the quotes
	qualified bool   // a name behind a dot
	catalog   bool   // a dot behind pg_catalog, or the name behind that
	as        bool   // the keyword AS
	alias     bool   // a name behind AS
}

// named returns the name t with what the token before makes of it, or false where it may be a function
// that is called without parentheses: PostgreSQL reads (5).pg_advisory_lock as pg_advisory_lock(5), and
// so u.pg_advisory_lock where u is the alias of a function.
func named(last, t token) (token, bool) {
	switch last.kind {
	case dotAfterExpression:
		return t, false
	case dot:
		t.qualified, t.catalog = true, last.catalog
		return t, !attribute(t.text)
	}
	t.alias = last.as
	return t, true
}

// attribute reports whether the name may be a function of one parameter that changes a session.
func attribute(name string) bool {
	var buf [longest]byte
	b := fold(&buf, name)
	for _, prefix := range [...]string{"pg_", "lo_", "dblink", "binary_upgrade_", "brin_", "gin_", "set_", "query_to_", "cursor_to_"} {
		if len(b) >= len(prefix) && string(b[:len(prefix)]) == prefix {
			return true
		}
	}
	switch string(b) {
	case "nextval", "currval", "lastval", "setval", "setseed", "ts_stat", "ts_rewrite", "loread", "lowrite", "txid_status", "plpgsql_validator", "amvalidate":
		return true
	}
	return false
}

// dotted returns the dot behind last: of a number, of a qualified name, or of an attribute.
func dotted(last token, beforeDigit bool) token {
	switch {
	case beforeDigit:
		return token{kind: other} // a number
	case last.kind == bare || last.kind == quoted:
		return token{kind: dot, catalog: isCatalog(last)}
	default:
		return token{kind: dotAfterExpression}
	}
}

func isCatalog(t token) bool {
	return t.text == "pg_catalog" || t.kind == bare && strings.EqualFold(t.text, "pg_catalog")
}

// opens reports whether a parenthesis may follow: t is no name, a keyword, the alias of a column list, or
// the name of a listed function.
func (t token) opens() bool {
	switch {
	case t.kind != bare && t.kind != quoted || t.alias:
		return true
	case t.qualified && !t.catalog:
		return false
	case t.kind == quoted:
		return functions[t.text]
	}
	var buf [longest]byte
	b := fold(&buf, t.text)
	return functions[string(b)] || !t.qualified && keywords[string(b)]
}

// class is what a word means to Read.
type class byte

const (
	ordinary class = iota
	first          // may begin a read
	refused
	update
	lockFor
	lockNo
	lockKey
	as
)

func classify(word string) class {
	if len(word) > 6 {
		return ordinary
	}
	var buf [longest]byte
	switch string(fold(&buf, word)) {
	case "select", "with", "values", "table":
		return first
	case "insert", "delete", "merge", "into", "call", "do", "set":
		return refused
	case "update":
		return update
	case "for":
		return lockFor
	case "no":
		return lockNo
	case "key":
		return lockKey
	case "as":
		return as
	}
	return ordinary
}

// longest is one more than the length of the longest name in a list, so that a longer one, cut, is in none.
const longest = 32

// fold returns name in lower case, cut to the length of buf. PostgreSQL folds ASCII alone where the text is UTF-8.
func fold(buf *[longest]byte, name string) []byte {
	n := copy(buf[:], name)
	for i, c := range buf[:n] {
		if 'A' <= c && c <= 'Z' {
			buf[i] = c | 0x20
		}
	}
	return buf[:n]
}

// next returns the byte behind i, 0 at the end.
func next(sql string, i int) byte {
	if i+1 < len(sql) {
		return sql[i+1]
	}
	return 0
}

// What a byte may be part of.
const (
	letter = 1 + iota // begins a word
	inner             // goes on with one
	symbol            // an operator or punctuation that needs no other look
)

var parts = func() (p [256]byte) {
	for c := range p {
		switch {
		case c >= 0x80, c == '_', 'a' <= c|0x20 && c|0x20 <= 'z':
			p[c] = letter
		case c == '$', digit(byte(c)):
			p[c] = inner
		case strings.IndexByte("),*=<>+-/:[]|&@~!#%^?`", byte(c)) >= 0:
			p[c] = symbol
		}
	}
	return p
}()

func wordStart(c byte) bool { return parts[c] == letter }

func wordPart(c byte) bool { return parts[c]-letter <= inner-letter }

func digit(c byte) bool { return '0' <= c && c <= '9' }

// lineEnd returns where the line comment at i ends.
func lineEnd(sql string, i int) int {
	for i < len(sql) && sql[i] != '\n' && sql[i] != '\r' {
		i++
	}
	return i
}

// commentEnd returns what follows the comment at i, in which others may nest, or -1 where it stays open.
func commentEnd(sql string, i int) int {
	depth := 0
	for ; i+1 < len(sql); i++ {
		switch {
		case sql[i] == '/' && sql[i+1] == '*':
			depth++
			i++
		case sql[i] == '*' && sql[i+1] == '/':
			i++
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return -1
}

// quoteEnd returns what follows the text in quotes at i, in which a doubled quote stands for one, or -1
// where it stays open.
func quoteEnd(sql string, i int, quote byte) int {
	for i++; i < len(sql); i++ {
		if sql[i] != quote {
			continue
		}
		if next(sql, i) != quote {
			return i + 1
		}
		i++
	}
	return -1
}
