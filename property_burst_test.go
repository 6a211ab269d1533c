package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy"
)

// database is what a service calls: a TenantAwareDB, or the forgetful router of the control.
type database interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error)
	Begin(ctx context.Context) (pgx.Tx, error)
	WithConn(ctx context.Context, fn func(ctx context.Context, conn *pgx.Conn) error) error
}

var _ database = (*tenancy.TenantAwareDB)(nil)

// arena is where bursts of concurrent calls run. Safe for concurrent use.
type arena struct {
	*ledger
	door  func(c *call) bool // finds the call a context and a database, or reports why it has none
	kinds []operation
	ops   atomic.Int64 // statements that reached the server or were refused
	good  atomic.Int64 // of these, the answered ones
}

// operation is one kind of call, and how often it is chosen.
type operation struct {
	weight int
	run    func(c *call)
}

// plainOperations are those that any router has to survive.
var plainOperations = []operation{
	{30, (*call).write},
	{30, (*call).read},
	{6, (*call).readHalf},
	{8, (*call).commit},
	{5, (*call).rollBack},
	{6, (*call).batch},
	{4, (*call).copyIn},
}

// call is one operation in the course of a burst.
type call struct {
	a      *arena
	rng    *rand.Rand
	among  []*subject // who may be asked for or reached for
	who    *subject
	node   int
	db     database
	ctx    context.Context
	start  time.Time
	hasty  bool // its context ends at a random moment: any error is right
	onDoor string
}

const (
	workers   = 8
	patience  = 30 * time.Second // of a call that is not hasty
	hastyPart = 0.06
)

// burst runs statements from several goroutines at once, for as long as during runs and at
// least the given number of them.
func (a *arena) burst(seed uint64, statements int, among []*subject, during func()) {
	var busy atomic.Bool
	var wg sync.WaitGroup
	if during != nil {
		busy.Store(true)
		wg.Go(func() { defer busy.Store(false); during() })
	}
	until := a.ops.Load() + int64(statements)
	for w := range workers {
		rng := rand.New(rand.NewPCG(seed, uint64(w)))
		wg.Go(func() {
			for a.ops.Load() < until || busy.Load() {
				a.once(rng, among)
			}
		})
	}
	wg.Wait()
}

func (a *arena) once(rng *rand.Rand, among []*subject) {
	c := &call{a: a, rng: rng, among: among, who: among[rng.IntN(len(among))], node: rng.IntN(nodes), start: time.Now()}
	for range 3 { // mostly one that is served: refusals are quick, and would be most of the work
		if c.who.serves() {
			break
		}
		c.who = among[rng.IntN(len(among))]
	}
	limit := patience
	if c.hasty = rng.Float64() < hastyPart; c.hasty {
		limit = time.Duration(rng.Int64N(int64(2 * time.Millisecond)))
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c.ctx = ctx
	if a.door(c) {
		a.pick(rng)(c)
	}
}

func (a *arena) pick(rng *rand.Rand) func(*call) {
	total := 0
	for _, k := range a.kinds {
		total += k.weight
	}
	n := rng.IntN(total)
	for _, k := range a.kinds {
		if n -= k.weight; n < 0 {
			return k.run
		}
	}
	panic("unreachable")
}

// counted counts statements, answered or not.
func (c *call) counted(n int, err error) {
	c.a.ops.Add(int64(n))
	if err == nil {
		c.a.good.Add(int64(n))
	}
}

// fails judges an error: it must have a reason that the test knows.
func (c *call) fails(op string, err error) {
	end := time.Now()
	out := errors.Is(err, tenancy.ErrTenantSuspended) || errors.Is(err, tenancy.ErrTenantGone)
	switch {
	case c.hasty:
	case !out && c.who.isOut(c.start, end):
		c.a.found(unguarded, "%s for %s, out of service, came as far as: %v", op, c.who.name, err)
	case !c.who.mayFail(c.start, end):
		c.a.found(failed, "%s for %s on node %d (%s) after %v: %v", op, c.who.name, c.node, c.onDoor, end.Sub(c.start), err)
	}
}

// saw judges an answer: it must be of a connection of the tenant's own, while it is served.
func (c *call) saw(op string, a answer) {
	end := time.Now()
	if why := c.who.disowns(a, c.node, c.start, end); why != "" {
		c.a.found(foreignConn, "%s for %s on node %d (%s): %s", op, c.who.name, c.node, c.onDoor, why)
	}
	if c.who.isOut(c.start, end) {
		c.a.found(letIn, "%s for %s on node %d (%s), which is out of service", op, c.who.name, c.node, c.onDoor)
	}
}

// ownRow judges a row that was read.
func (c *call) ownRow(op, tenant, title string) {
	if tenant != c.who.name {
		c.a.found(foreignRow, "%s for %s on node %d (%s): %s of %s", op, c.who.name, c.node, c.onDoor, title, tenant)
	}
}

func (c *call) declare() *write { return c.a.ledger.declare(c.who, c.node, c.start) }

const (
	insertNote = `INSERT INTO notes (tenant, title) VALUES ($1, $2) RETURNING ` + askWho
	// The answer comes with every row, and alone when there is none.
	readNotes = `SELECT ` + askWho + `, coalesce(n.tenant, ''), coalesce(n.title, '')
		FROM (SELECT 1) one LEFT JOIN (SELECT tenant, title FROM notes ORDER BY id DESC LIMIT 8) n ON true`
)

// rowQuerier is what can run a query: a database, a transaction, a connection.
type rowQuerier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func (c *call) writeOn(op string, q rowQuerier) (*write, error) {
	w := c.declare()
	var a answer
	err := q.QueryRow(c.ctx, insertNote, c.who.name, w.title).Scan(&a.schema, &a.login, &a.marker)
	c.counted(1, err)
	if err == nil {
		c.saw(op, a)
	}
	return w, err
}

// readOn reads at most limit rows and leaves the rest to Close; 0 reads all.
func (c *call) readOn(op string, q rowQuerier, limit int) error {
	rows, err := q.Query(c.ctx, readNotes)
	defer func() { c.counted(1, err) }()
	defer rows.Close()
	for n := 0; rows.Next() && (limit == 0 || n < limit); n++ {
		if err = c.scanNote(op, rows); err != nil {
			return err
		}
	}
	rows.Close()
	err = rows.Err()
	return err
}

func (c *call) scanNote(op string, rows pgx.Rows) error {
	var a answer
	var tenant, title string
	if err := rows.Scan(&a.schema, &a.login, &a.marker, &tenant, &title); err != nil {
		return err
	}
	c.saw(op, a)
	if title != "" {
		c.ownRow(op, tenant, title)
	}
	return nil
}

func (c *call) write() {
	w, err := c.writeOn("write", c.db)
	c.conclude("write", err, w)
}

func (c *call) read() {
	if err := c.readOn("read", c.db, 0); err != nil {
		c.fails("read", err)
	}
}

func (c *call) readHalf() {
	if err := c.readOn("half read", c.db, 1+c.rng.IntN(3)); err != nil {
		c.fails("half read", err)
	}
}

// conclude settles writes whose call has returned.
func (c *call) conclude(op string, err error, writes ...*write) {
	if err != nil {
		c.a.settle(unsure, writes...)
		c.fails(op, err)
		return
	}
	c.a.settle(acked, writes...)
}

// inTx runs fn in a transaction, whose end is the caller's.
func (c *call) inTx(op string, fn func(tx pgx.Tx)) {
	tx, err := c.db.Begin(c.ctx)
	if err != nil {
		c.counted(1, err)
		c.fails(op, err)
		return
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), patience)
		defer cancel()
		_ = tx.Rollback(ctx) // after a commit it does nothing
	}()
	fn(tx)
}

func (c *call) commit() {
	c.inTx("transaction", func(tx pgx.Tx) {
		var writes []*write
		for range 1 + c.rng.IntN(2) {
			w, err := c.writeOn("transaction", tx)
			writes = append(writes, w)
			if err != nil {
				c.a.settle(undone, writes...)
				c.fails("transaction", err)
				return
			}
		}
		err := c.readOn("transaction", tx, 0)
		if err == nil {
			err = tx.Commit(c.ctx)
		}
		c.conclude("commit", err, writes...)
	})
}

func (c *call) rollBack() {
	c.inTx("roll back", func(tx pgx.Tx) {
		w, err := c.writeOn("roll back", tx)
		c.a.settle(undone, w)
		if err == nil {
			err = tx.Rollback(c.ctx)
		}
		if err != nil {
			c.fails("roll back", err)
		}
	})
}

func (c *call) batch() {
	var b pgx.Batch
	var writes []*write
	for range 1 + c.rng.IntN(3) {
		w := c.declare()
		writes = append(writes, w)
		b.Queue(insertNote, c.who.name, w.title)
	}
	b.Queue(readNotes)
	err := c.readBatch(c.db.SendBatch(c.ctx, &b), len(writes))
	c.counted(b.Len(), err)
	c.conclude("batch", err, writes...)
}

func (c *call) readBatch(results pgx.BatchResults, writes int) (err error) {
	defer func() { err = errors.Join(err, results.Close()) }()
	for range writes {
		var a answer
		if err := results.QueryRow().Scan(&a.schema, &a.login, &a.marker); err != nil {
			return err
		}
		c.saw("batch", a)
	}
	rows, err := results.Query()
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := c.scanNote("batch", rows); err != nil {
			return err
		}
	}
	rows.Close()
	return rows.Err()
}

func (c *call) copyIn() {
	writes := []*write{c.declare(), c.declare(), c.declare()}
	_, err := c.db.CopyFrom(c.ctx, pgx.Identifier{"notes"}, []string{"tenant", "title"}, c.notesOf(writes))
	c.counted(1, err)
	c.conclude("copy", err, writes...)
}

func (c *call) notesOf(writes []*write) pgx.CopyFromSource {
	return pgx.CopyFromSlice(len(writes), func(i int) ([]any, error) { return []any{c.who.name, writes[i].title}, nil })
}

// other returns a subject that is not the call's, nil when there is none.
func (c *call) other() *subject {
	for range 8 {
		if o := c.among[c.rng.IntN(len(c.among))]; o != c.who {
			return o
		}
	}
	return nil
}

// mustRefuse notes a statement that another tenant's wall should have stopped.
func (c *call) mustRefuse(what string, err error) {
	c.counted(1, err)
	if err == nil {
		c.a.found(unguarded, "%s for %s on node %d", what, c.who.name, c.node)
	}
}

// dirty takes a connection and leaves it as badly as SQL can: whoever gets it next must not notice.
func (c *call) dirty() {
	other := c.other()
	if other == nil {
		return
	}
	theirs := other.current()
	err := c.db.WithConn(c.ctx, func(ctx context.Context, conn *pgx.Conn) error {
		schema := pgx.Identifier{theirs.schema}.Sanitize()
		c.reach(ctx, conn, other, theirs)
		if c.who.shared { // without temporary tables
			_, err := conn.Exec(ctx, `CREATE TEMP TABLE notes (id bigint, tenant text, title text)`)
			c.mustRefuse("a temporary table in a session of shared tables", err)
			_, err = conn.Exec(ctx, `SET search_path TO `+schema)
			c.counted(1, err)
			if err != nil || !other.shared {
				return err
			}
			var marker string
			if err := conn.QueryRow(ctx, `SELECT tenant::text FROM tenancy_marker`).Scan(&marker); err != nil {
				return err
			}
			if marker != c.who.uid {
				c.a.found(foreignConn, "%s reads the marker %s", c.who.name, marker)
			}
			return nil
		}
		for _, sql := range []string{
			`CREATE TEMP TABLE notes (id bigint, tenant text, title text)`,
			fmt.Sprintf(`INSERT INTO pg_temp.notes VALUES (1, '%s', 'left behind')`, other.name),
			`SET search_path TO pg_temp, ` + schema,
		} {
			_, err := conn.Exec(ctx, sql)
			c.counted(1, err)
			if err != nil {
				return err
			}
		}
		_, err := conn.Exec(ctx, `SELECT tenant FROM tenancy_marker`)
		c.mustRefuse("reading through the search_path", err)
		return nil
	})
	if err != nil {
		c.fails("with conn", err)
	}
}

// reach tries the ways into another tenant that a session has.
func (c *call) reach(ctx context.Context, conn *pgx.Conn, other *subject, theirs stay) {
	schema := pgx.Identifier{theirs.schema}.Sanitize()
	refused := []string{
		`SET ROLE ` + pgx.Identifier{theirs.login}.Sanitize(),
		`SET ROLE ` + pgx.Identifier{theirs.schema + "_o"}.Sanitize(),
	}
	if c.who.shared && other.shared { // one table: what it is asked for is answered with the caller's own rows
		refused = append(refused, fmt.Sprintf(`INSERT INTO notes (tenant, title, tenant_id) VALUES ('intruder', 'intruder', %d)`, other.id))
		for _, sql := range []string{
			`SELECT tenant FROM notes WHERE tenant = $1 OR tenant_id = $2`,
			`UPDATE notes SET title = 'intruder' WHERE tenant = $1 OR tenant_id = $2`,
			`DELETE FROM notes WHERE tenant = $1 OR tenant_id = $2`,
		} {
			tag, err := conn.Exec(ctx, sql, other.name, other.id)
			c.counted(1, err)
			if tag.RowsAffected() > 0 {
				c.a.found(foreignRow, "%s: %d rows of %s for %s on node %d", sql, tag.RowsAffected(), other.name, c.who.name, c.node)
			}
		}
	} else {
		refused = append(refused, `SELECT tenant FROM `+schema+`.notes`, `INSERT INTO `+schema+`.notes (tenant, title) VALUES ('intruder', 'intruder')`)
	}
	for _, sql := range refused {
		_, err := conn.Exec(ctx, sql)
		c.mustRefuse(sql, err)
	}
}

// current is the subject's newest place.
func (s *subject) current() stay {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stays[len(s.stays)-1]
}
