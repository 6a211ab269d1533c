package tenancy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/plain"
)

// runner is what a call needs of a connection: one of the tenant's own pool, or a session of a shared one that is bound to the tenant.
type runner interface {
	Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
	CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error)
	Begin(ctx context.Context) (pgx.Tx, error)
	BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error)
}

// denseKey is where a connection carries its denseSession.
const denseKey = "github.com/msmt-go/tenancy.dense"

// maxStatements is how many statements a session prepares before its connection is replaced. PostgreSQL keeps some 7 KB for a short one and
// 80 KB for a join of five tables.
const maxStatements = 2048

// denseSession is a connection of a shared pool, and what is known of its state at the server. It is used by whoever has the connection.
//
// The binding is a session's SET ROLE, which stays for the tenant's next call. It goes out together with the statement that needs it, and
// whatever fails leaves it unknown: then it is sent again.
type denseSession struct {
	conn *pgx.Conn
	to   *binding // whose the connection is now

	bound   *binding // whose role the session has for certain; nil: unknown
	last    *binding // whose the connection was
	spoiled bool     // last may have left something in the session: a setting, a cursor, a lock
	lent    bool     // last had the connection itself, or has prepared a statement by SQL: it is replaced

	proved     map[*binding]bool // it is the tenant's; true: and the statement that binds is prepared
	statements map[statementKey]*denseStatement
	prepared   int // statements, those that are forgotten too
	savepoints int // that were set
}

type statementKey struct {
	to       *binding
	outdated int32 // named for one whose name is in sql
	sql      string
}

// named are the statements that a transaction has given a name: their owner knows nothing of migrations.
const named = -1

type denseStatement struct {
	text  string // as it was prepared, and its name
	plain bool   // it leaves nothing in a session
	joins bool   // it can go out in one transaction with the role: no CALL, which may end that
}

// joining begins a statement that is a query or a change of rows.
var joining = regexp.MustCompile(`(?i)^\s*(select|insert|update|delete|merge|with|values|table)\b`)

func denseSessionOf(conn *pgx.Conn) *denseSession {
	data := conn.PgConn().CustomData()
	if s, ok := data[denseKey].(*denseSession); ok {
		return s
	}
	s := &denseSession{conn: conn, proved: map[*binding]bool{}, statements: map[statementKey]*denseStatement{}}
	data[denseKey] = s
	return s
}

// resetSession takes out of a session what its last tenant may have left there. Not DISCARD ALL, which drops prepared statements.
const resetSession = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"

func (s *denseSession) reset(ctx context.Context) error {
	if _, err := s.conn.PgConn().Exec(ctx, resetSession).ReadAll(); err != nil {
		return unanswered(err)
	}
	s.bound, s.last, s.spoiled = nil, nil, false
	return nil
}

// prove binds the session to the tenant for the first time and asks it who it is.
func (s *denseSession) prove(ctx context.Context) error {
	b := s.to
	s.bound = nil
	results, err := s.conn.PgConn().Exec(ctx, b.bind+"; "+b.want.question).ReadAll()
	if len(results) < 2 && err != nil {
		return unboundError(err)
	}
	if len(results) > 1 && results[1].Err == nil {
		if e := b.want.bound(s.conn.PgConn().PID(), results[1].Rows); e != nil {
			return fmt.Errorf("%w: %w", errUnbound, e) // the tenant may just be leaving
		}
	}
	if err != nil {
		return unanswered(err)
	}
	if len(results) != 3 {
		return hinted(ErrIdentity, "it gave %d answers to two questions", len(results)-1)
	}
	if err := b.want.marker(results[2].Rows); err != nil {
		return err
	}
	s.bound = b
	s.proved[b] = false
	return nil
}

// full says whether the session has seen as much as one may: PostgreSQL forgets nothing of it. What a tenant did to the connection itself, which has a
// map of types and statements of its own, nobody can take back.
func (s *denseSession) full(tenants int) bool {
	return s.lent || len(s.proved) > tenants || s.prepared >= maxStatements
}

// end is called when the connection is given back.
func (s *denseSession) end() {
	if s.spoiled {
		s.bound = nil // a SET ROLE may have been among what was run
	}
}

// use takes the tenant's role, where the session has it not.
func (s *denseSession) use(ctx context.Context) error {
	if s.bound == s.to {
		return nil
	}
	if _, err := s.conn.Exec(ctx, s.to.bind); err != nil {
		delete(s.proved, s.to)
		return s.to.unboundCall(err)
	}
	s.bound = s.to
	return nil
}

// lend binds a session that is given out as it is. Its name tells a fence whose it is, whatever is run there.
func (s *denseSession) lend(ctx context.Context) error {
	if _, err := s.conn.Exec(ctx, s.to.bind+"; SET application_name = "+ident.Literal(s.to.role)); err != nil {
		return s.to.unboundCall(err)
	}
	return nil
}

// unboundCall is unboundError for a call that has its connection already.
func (b *binding) unboundCall(err error) error {
	if _, ok := errors.AsType[*pgconn.PgError](err); ok {
		return &Error{Op: "bind", Tenant: b.tenant.ID, Name: b.tenant.Name, RetryAfter: time.Second, Err: fmt.Errorf("%w: %w", ErrTenantUnavailable, unboundError(err))}
	}
	return err
}

// call is one statement on its way: the options that stand before its arguments are apart.
type call struct {
	sql     string
	options []any // what pgx takes before the arguments, but for the rewriter, which has done its work
	args    []any
	mode    pgx.QueryExecMode
	direct  bool // mode was given
}

func (s *denseSession) parse(ctx context.Context, sql string, args []any) (call, error) {
	c := call{sql: sql}
	var rewriter pgx.QueryRewriter
	n := 0
options:
	for ; n < len(args); n++ {
		switch arg := args[n].(type) {
		case pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			c.options = append(c.options, arg)
		case pgx.QueryExecMode:
			c.options = append(c.options, arg)
			c.mode, c.direct = arg, true
		case pgx.QueryRewriter:
			rewriter = arg
		default:
			break options
		}
	}
	c.args = args[n:]
	if rewriter != nil {
		switch rewriter.(type) {
		case pgx.NamedArgs, pgx.StrictNamedArgs:
		default: // it is given the connection
			s.lent = true
		}
		var err error
		if c.sql, c.args, err = rewriter.RewriteQuery(ctx, s.conn, c.sql, c.args); err != nil {
			return c, err
		}
	}
	return c, nil
}

// cached says whether the statement is one to prepare.
func (c *call) cached() bool {
	return c.sql != "" && (!c.direct || c.mode == pgx.QueryExecModeCacheStatement || c.mode == pgx.QueryExecModeCacheDescribe)
}

// all are the arguments as pgx takes them.
func (c *call) all() []any {
	if len(c.options) == 0 {
		return c.args
	}
	return append(c.options[:len(c.options):len(c.options)], c.args...)
}

// known returns the statement if it is prepared for the tenant.
func (s *denseSession) known(sql string) *denseStatement {
	if st := s.statements[statementKey{s.to, s.to.outdated.Load(), sql}]; st != nil {
		return st
	}
	return s.statements[statementKey{s.to, named, sql}]
}

// statement returns the tenant's own prepared statement. It is prepared as the tenant, whose tables may differ from another's.
func (s *denseSession) statement(ctx context.Context, sql string) (*denseStatement, error) {
	if st := s.known(sql); st != nil {
		return st, nil
	}
	key := statementKey{s.to, s.to.outdated.Load(), sql}
	st := &denseStatement{text: s.to.mark() + sql, plain: plain.Read(sql)}
	st.joins = st.plain || joining.MatchString(sql)
	if _, err := s.conn.Prepare(ctx, st.text, st.text); err != nil {
		return nil, err
	}
	s.prepared++
	s.statements[key] = st
	s.look(sql, st.plain)
	return st, nil
}

// irreversible are the words of what no reset takes away: PREPARE, whose names are the session's; what drops statements that we believe in; and LISTEN,
// whose notifications may have arrived.
var irreversible = regexp.MustCompile(`(?i)\b(prepare|deallocate|discard|listen)\b`)

// look has the connection replaced after a text that no reset undoes.
func (s *denseSession) look(sql string, plain bool) {
	if !plain && irreversible.MatchString(sql) {
		s.lent = true
	}
}

// text is the statement for what is not prepared. It may leave anything.
func (s *denseSession) text(sql string) string {
	if !plain.Read(sql) {
		s.spoiled = true
		s.look(sql, false)
	}
	return s.to.mark() + sql
}

// resolve makes a statement ready for a session that is bound: what to hand to pgx in its place.
func (s *denseSession) resolve(ctx context.Context, sql string, args []any, simple bool) (text string, all []any, err error) {
	c, err := s.parse(ctx, sql, args)
	if err != nil {
		return "", nil, err
	}
	if !c.cached() || simple && len(c.args) == 0 && s.statements[statementKey{s.to, named, c.sql}] == nil { // pgx's Exec sends what has no arguments as it is: it may be several statements
		return s.text(c.sql), c.all(), nil
	}
	st, err := s.statement(ctx, c.sql)
	if err != nil {
		return "", nil, err
	}
	s.run(st)
	return st.text, c.all(), nil
}

// run notes what st may leave.
func (s *denseSession) run(st *denseStatement) {
	if !st.plain {
		s.spoiled = true
	}
}

// together returns the statement of c when it can go out in one batch with the tenant's role.
func (s *denseSession) together(c *call) *denseStatement {
	if s.bound == s.to || len(c.options) > 0 || !c.cached() {
		return nil
	}
	if st := s.known(c.sql); st != nil && st.joins {
		return st
	}
	return nil
}

func (s *denseSession) Exec(ctx context.Context, sql string, arguments ...any) (tag pgconn.CommandTag, err error) {
	c, err := s.parse(ctx, sql, arguments)
	if err != nil {
		return tag, err
	}
	if st := s.together(&c); st != nil && len(c.args) > 0 {
		br, err := s.sendBound(ctx, st, c.args)
		if err != nil {
			return tag, err
		}
		tag, err = br.Exec()
		if closed := s.sent(br.Close(), err); err == nil {
			err = closed
		}
		return tag, err
	}
	if err := s.use(ctx); err != nil {
		return tag, err
	}
	text, all, err := s.resolve(ctx, c.sql, c.all(), true)
	if err != nil {
		return tag, err
	}
	return s.conn.Exec(ctx, text, all...)
}

func (s *denseSession) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	c, err := s.parse(ctx, sql, args)
	if err != nil {
		return errRows{err}, err
	}
	if st := s.together(&c); st != nil {
		br, err := s.sendBound(ctx, st, c.args)
		if err != nil {
			return errRows{err}, err
		}
		rows, err := br.Query()
		if err != nil {
			_ = s.sent(br.Close(), err) // which says the same
			return errRows{err}, err
		}
		return &boundRows{Rows: rows, results: br, s: s}, nil
	}
	if err := s.use(ctx); err != nil {
		return errRows{err}, err
	}
	text, all, err := s.resolve(ctx, c.sql, c.all(), false)
	if err != nil {
		return errRows{err}, err
	}
	return s.conn.Query(ctx, text, all...)
}

// sendBound sends the role and a statement in one round trip. The session is bound when what follows has succeeded: see sent.
func (s *denseSession) sendBound(ctx context.Context, st *denseStatement, args []any) (pgx.BatchResults, error) {
	if err := s.prepareBind(ctx); err != nil {
		return nil, err
	}
	var b pgx.Batch
	b.Queue(s.to.bind)
	b.Queue(st.text, args...)
	s.bound = nil
	s.run(st)
	br := s.conn.SendBatch(ctx, &b)
	if _, err := br.Exec(); err != nil {
		_ = br.Close() // which says the same
		delete(s.proved, s.to)
		return nil, s.to.unboundCall(err)
	}
	return br, nil
}

// prepareBind prepares the statement that binds, at its first use.
func (s *denseSession) prepareBind(ctx context.Context) error {
	if s.proved[s.to] {
		return nil
	}
	if _, err := s.conn.Prepare(ctx, s.to.bind, s.to.bind); err != nil {
		return err
	}
	s.prepared++
	s.proved[s.to] = true
	return nil
}

// sent ends what sendBound began, with the errors of the batch's close and of its statement: what failed took the role back with it. It returns
// the close's own error.
func (s *denseSession) sent(closed, failed error) error {
	switch {
	case failed != nil: // the close repeats it
		return nil
	case closed == nil:
		s.bound = s.to
	}
	return closed
}

// boundRows are those of a statement that went out together with the role.
type boundRows struct {
	pgx.Rows
	results pgx.BatchResults
	s       *denseSession
	closed  bool
	err     error // of the end, such as that of a deferred constraint
}

func (r *boundRows) Close() {
	if r.closed {
		return
	}
	r.closed = true
	r.Rows.Close()
	r.err = r.s.sent(r.results.Close(), r.Rows.Err())
}

func (r *boundRows) Err() error {
	if err := r.Rows.Err(); err != nil {
		return err
	}
	return r.err
}

func (r *boundRows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

// SendBatch sends the role first, because pgx asks the server about new statements before it runs any.
func (s *denseSession) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if err := s.use(ctx); err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	own, err := s.resolveBatch(ctx, b)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	br := s.conn.SendBatch(ctx, own)
	if tx := br.Tx(); tx != nil {
		return &denseBatch{br, &denseTx{Tx: tx, s: s, over: new(bool)}}
	}
	return br
}

// resolveBatch is resolve for a copy of a batch: the service may look at its own afterwards.
func (s *denseSession) resolveBatch(ctx context.Context, b *pgx.Batch) (*pgx.Batch, error) {
	own := *b
	own.QueuedQueries = make([]*pgx.QueuedQuery, len(b.QueuedQueries))
	for i, q := range b.QueuedQueries {
		copied := *q
		text, all, err := s.resolve(ctx, q.SQL, q.Arguments, false)
		if err != nil {
			return nil, err
		}
		copied.SQL, copied.Arguments = text, all
		own.QueuedQueries[i] = &copied
	}
	return &own, nil
}

// denseBatch hands out its transaction as one of a shared session.
type denseBatch struct {
	pgx.BatchResults
	tx *denseTx
}

func (b *denseBatch) Tx() pgx.Tx { return b.tx }

// Close also ends the transaction that the batch has left none of.
func (b *denseBatch) Close() error {
	err := b.BatchResults.Close()
	if conn := b.tx.s.conn; conn.IsClosed() || conn.PgConn().TxStatus() == 'I' {
		*b.tx.over = true
	}
	return err
}

func (s *denseSession) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	if err := s.use(ctx); err != nil {
		return 0, err
	}
	s.spoiled = true // triggers run
	return s.conn.CopyFrom(ctx, tableName, columnNames, rowSrc)
}

func (s *denseSession) Begin(ctx context.Context) (pgx.Tx, error) {
	return s.BeginTx(ctx, pgx.TxOptions{})
}

// BeginTx sends the role before the BEGIN, in one round trip and in a transaction of its own: a ROLLBACK that the service sends as SQL must not give
// back the role of whoever had the session before.
func (s *denseSession) BeginTx(ctx context.Context, o pgx.TxOptions) (pgx.Tx, error) {
	o = s.marked(o)
	if s.bound != s.to {
		o.BeginQuery = s.to.mark() + "begin; " + s.to.bind + "; commit; " + o.BeginQuery
		s.bound = nil
	}
	tx, err := s.conn.BeginTx(ctx, o) // which closes the connection when it fails
	if err != nil {
		return nil, s.to.unboundCall(err)
	}
	s.bound = s.to
	return &denseTx{Tx: tx, s: s, over: new(bool)}, nil
}

// marked returns o with the tenant's mark on its statements, by which a fence knows whose a transaction is that has done nothing yet.
func (s *denseSession) marked(o pgx.TxOptions) pgx.TxOptions {
	var b pgx.Batch
	b.BeginTx(o)
	o.BeginQuery = s.to.mark() + b.QueuedQueries[0].SQL
	o.CommitQuery = s.to.mark() + cmp.Or(o.CommitQuery, "commit")
	return o
}
