package tenancy_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
)

// What the property test believes is kept here, outside of the library: who each row belongs to, who a
// connection has to say it is at which time, and what a superuser finds in the tables afterwards.

// nodes is the number of Tenancy values on the fleet.
const nodes = 2

// span is a stretch of time; a zero end is still open.
type span struct{ from, to time.Time }

func (s span) covers(start, end time.Time) bool {
	return start.After(s.from) && (s.to.IsZero() || end.Before(s.to))
}

func (s span) touches(start, end time.Time) bool {
	return end.After(s.from) && (s.to.IsZero() || start.Before(s.to))
}

// stay is one place of a tenant, from the call that moved it there until each node has to have left. With shared tables the schema is also others'.
type stay struct {
	schema, login string
	from          time.Time
	until         [nodes]time.Time
}

func (s *stay) admits(node int, start, end time.Time) bool {
	return !end.Before(s.from) && (s.until[node].IsZero() || !start.After(s.until[node]))
}

// membership is one user's time in one tenant. Between from and sure, and between removed and until,
// both answers are right.
type membership struct {
	from    time.Time
	sure    [nodes]time.Time
	removed time.Time
	until   [nodes]time.Time
}

// subject is a tenant as the test knows it.
type subject struct {
	name   string
	id     tenancy.ID
	uid    string
	shared bool // for its whole life: its rows are in one schema with others'

	verb sync.Mutex // one verb of its life at a time

	mu       sync.Mutex // guards the fields below
	stays    []stay
	out      []span // no call of a context of it may succeed
	restless []span // a verb is at work, or not every node has to know yet: calls may fail
	members  map[tenancy.UserKey][]membership
	kept     [nodes][]context.Context // sessions made earlier, of a time when it was served
}

// answer is what a statement reports about the connection that ran it.
type answer struct{ schema, login, marker string }

// askWho are the columns of answer. Names are left to the search_path: that is what is asked about.
const askWho = `current_schema()::text, session_user::text, (SELECT tenant::text FROM tenancy_marker)`

// disowns says why a connection that gave this answer was not the subject's own, "" when it was.
func (s *subject) disowns(a answer, node int, start, end time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.marker != s.uid {
		return fmt.Sprintf("the marker is %s", a.marker)
	}
	for i := range s.stays {
		p := &s.stays[i]
		if p.schema != a.schema || p.login != "" && p.login != a.login {
			continue
		}
		if p.admits(node, start, end) {
			return ""
		}
		return fmt.Sprintf("schema %s was left before", a.schema)
	}
	return fmt.Sprintf("schema %s of login %s is none of its places", a.schema, a.login)
}

// isOut reports whether the tenant was out of service for the whole time, from before start.
func (s *subject) isOut(start, end time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.out {
		if o.covers(start, end) {
			return true
		}
	}
	return false
}

// mayFail reports whether the tenant was out of service, or about to be, at any moment of the time.
func (s *subject) mayFail(start, end time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range slices.Concat(s.restless, s.out) {
		if o.touches(start, end) {
			return true
		}
	}
	return false
}

// serves reports whether the tenant is in service now.
func (s *subject) serves() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.out) == 0 || !s.out[len(s.out)-1].to.IsZero()
}

// belonged says whether the user was a member at some moment of the time, and whether all of it.
func (s *subject) belonged(user tenancy.UserKey, node int, start, end time.Time) (maybe, surely bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.members[user] {
		if !end.Before(m.from) && (m.until[node].IsZero() || !start.After(m.until[node])) {
			maybe = true
		}
		if !m.sure[node].IsZero() && start.After(m.sure[node]) && (m.removed.IsZero() || end.Before(m.removed)) {
			surely = true
		}
	}
	return maybe, surely
}

// outcome is what became of a write.
type outcome int

const (
	unsure outcome = iota // the call returned an error: it may be there, once
	acked                 // it is there, once
	undone                // rolled back or refused: it is not there
)

// write is one row that the test has tried to write.
type write struct {
	title      string // unique over everything
	who        *subject
	node       int
	start, end time.Time
	outcome    outcome
}

// kind classes a finding.
type kind string

const (
	foreignRow   kind = "foreign row read"
	foreignConn  kind = "foreign connection"
	foreignPlace kind = "row in a foreign place"
	letIn        kind = "let in"
	unguarded    kind = "call was not refused"
	lost         kind = "acknowledged write lost"
	twice        kind = "row present twice"
	revived      kind = "undone write present"
	late         kind = "change arrived late"
	failed       kind = "unexplained failure"
)

// ledger holds every write and every finding. Safe for concurrent use.
type ledger struct {
	mu       sync.Mutex // guards the fields below
	writes   map[string]*write
	findings map[kind]int
	texts    []string
	serial   int
}

func newLedger() *ledger { return &ledger{writes: map[string]*write{}, findings: map[kind]int{}} }

// declare notes a write before it is sent.
func (l *ledger) declare(who *subject, node int, start time.Time) *write {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.serial++
	w := &write{title: fmt.Sprintf("%s/%d", who.name, l.serial), who: who, node: node, start: start}
	l.writes[w.title] = w
	return w
}

func (l *ledger) settle(o outcome, writes ...*write) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range writes {
		w.outcome, w.end = o, time.Now()
	}
}

// found notes what must not be. The first 20 are kept in words.
func (l *ledger) found(k kind, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.findings[k]++
	if len(l.texts) < 20 {
		l.texts = append(l.texts, fmt.Sprintf("%s: %s", k, fmt.Sprintf(format, args...)))
	}
}

func (l *ledger) count(kinds ...kind) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range kinds {
		n += l.findings[k]
	}
	return n
}

// crossings are the findings in which one tenant's work met another's data or was done without being allowed.
func (l *ledger) crossings() int {
	return l.count(foreignRow, foreignConn, foreignPlace, letIn, unguarded)
}

func (l *ledger) clean() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.findings) == 0
}

// report fails the test with what was found.
func (l *ledger) report(tb testing.TB) {
	tb.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for k, n := range l.findings {
		tb.Errorf("%s: %d times", k, n)
	}
	for _, text := range l.texts {
		tb.Error(text)
	}
}

// audit reads every table notes of the database as a superuser, and compares it with the ledger. No work may be in flight.
func (l *ledger) audit(tb testing.TB, admin *pgx.Conn, subjects []*subject) {
	tb.Helper()
	present := map[string]int{}
	for schema, rows := range tablesOfNotes(tb, admin) {
		for _, r := range rows {
			present[r.title]++
			owner, place := ownerOf(subjects, schema, r.of)
			l.judge(r, schema, owner, place)
		}
	}
	l.mu.Lock()
	var missing []string
	for title, w := range l.writes {
		if w.outcome == acked && present[title] == 0 {
			missing = append(missing, title)
		}
	}
	l.mu.Unlock()
	for _, title := range missing {
		l.found(lost, "%s", title)
	}
	for title, n := range present {
		if n > 1 {
			l.found(twice, "%s is there %d times", title, n)
		}
	}
}

// judge looks at one row of a tenant's place. owner is whose row the database takes it for.
func (l *ledger) judge(r noteRow, schema string, owner *subject, place *stay) {
	if owner == nil {
		l.found(foreignPlace, "%s of %s lies in schema %s as tenant %d's, and nobody's place is there", r.title, r.tenant, schema, r.of)
		return
	}
	l.mu.Lock()
	w := l.writes[r.title]
	var known write
	if w != nil {
		known = *w
	}
	l.mu.Unlock()
	owner.mu.Lock()
	admitted := w != nil && place.admits(known.node, known.start, known.end)
	owner.mu.Unlock()
	switch {
	case w == nil:
		l.found(foreignPlace, "schema %s has a row %q that nobody wrote", schema, r.title)
	case known.who != owner || r.tenant != owner.name:
		l.found(foreignPlace, "%s of %s lies in schema %s of %s", r.title, r.tenant, schema, owner.name)
	case known.outcome == undone:
		l.found(revived, "%s in schema %s", r.title, schema)
	case known.outcome == acked && !admitted:
		l.found(foreignPlace, "%s lies in schema %s, which %s had left", r.title, schema, owner.name)
	}
}

// ownerOf returns whose place holds a row: with a schema for each the schema says so, with shared tables the row's own tenant_id.
func ownerOf(subjects []*subject, schema string, id tenancy.ID) (*subject, *stay) {
	for _, s := range subjects {
		if s.shared && s.id != id {
			continue
		}
		s.mu.Lock()
		for i := range s.stays {
			if s.stays[i].schema == schema {
				s.mu.Unlock()
				return s, &s.stays[i]
			}
		}
		s.mu.Unlock()
	}
	return nil, nil
}

// noteRow is a row of notes: who wrote it, and in shared tables whose it is by its tenant_id.
type noteRow struct {
	tenant, title string
	of            tenancy.ID // 0: the table has no such column
}

// tablesOfNotes returns the rows of every table called notes of a fleet, whoever's it is, by schema: in the tenants' database, and in those of one tenant each.
func tablesOfNotes(tb testing.TB, admin *pgx.Conn) map[string][]noteRow {
	tb.Helper()
	ctx := context.Background()
	found := notesIn(tb, admin)
	rows, _ := admin.Query(ctx, `SELECT datname FROM pg_database WHERE datname ~ '^t_[0-9a-f]{20}$' AND datallowconn
		AND datdba = (SELECT datdba FROM pg_database WHERE datname = current_database())`)
	databases, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		tb.Fatal(err)
	}
	for _, name := range databases {
		cc := admin.Config()
		cc.Database = name
		conn, err := pgx.ConnectConfig(ctx, cc)
		if err != nil {
			tb.Fatal(err)
		}
		for schema, list := range notesIn(tb, conn) {
			if found[schema] != nil || schema != name {
				tb.Errorf("schema %s is in database %s", schema, name)
			}
			found[schema] = list
		}
		_ = conn.Close(ctx)
	}
	return found
}

// notesIn returns the rows of every table called notes of one database.
func notesIn(tb testing.TB, admin *pgx.Conn) map[string][]noteRow {
	tb.Helper()
	ctx := context.Background()
	rows, _ := admin.Query(ctx, `SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relname = 'notes' AND c.relkind = 'r' AND c.relpersistence = 'p'`)
	schemas, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		tb.Fatal(err)
	}
	found := map[string][]noteRow{}
	if len(schemas) == 0 {
		return found
	}
	parts := make([]string, len(schemas))
	for i, s := range schemas {
		parts[i] = fmt.Sprintf(`SELECT '%s', tenant, title, coalesce((to_jsonb(n)->>'tenant_id')::bigint, 0) FROM %s n`, s, pgx.Identifier{s, "notes"}.Sanitize())
	}
	rows, _ = admin.Query(ctx, strings.Join(parts, " UNION ALL "), pgx.QueryExecModeExec)
	var schema string
	var r noteRow
	if _, err := pgx.ForEachRow(rows, []any{&schema, &r.tenant, &r.title, &r.of}, func() error {
		found[schema] = append(found[schema], r)
		return nil
	}); err != nil {
		tb.Fatal(err)
	}
	return found
}
