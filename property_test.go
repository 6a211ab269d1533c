package tenancy_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
	"pgregory.net/rapid"
)

// TestNothingCrosses drives up to six tenants on two nodes through their lives while eight
// goroutines work in all of them, and checks after each burst, past the library, that every row is where it belongs. There are tenants of all
// isolations at once: two at least with shared tables, and one with a schema and a database each.
//
// By default the server answers at least 6,000 statements, with TENANCY_LONG=1 at least 100,000; the
// refused ones come on top. Seeds are fixed, and
// -rapid.seed=N runs that one alone. A seed fixes what is done, not how goroutines meet: what it finds depends on
// timing, so nothing is shrunk, and a finding is reported with the verbs that led to it.
//
// Not parallel: rapid is set by flags of the process.
func TestNothingCrosses(t *testing.T) {
	seeds, each := 3, 2000
	if os.Getenv("TENANCY_LONG") == "1" {
		seeds, each = 10, 10_000
	}
	first := 1
	if given, _ := strconv.Atoi(flag.Lookup("rapid.seed").Value.String()); given != 0 {
		first, seeds = given, 1
	}
	began := time.Now()
	var all, good int64
	for seed := first; seed < first+seeds; seed++ {
		t.Run(fmt.Sprintf("seed_%d", seed), func(t *testing.T) {
			setFlag(t, "rapid.seed", strconv.Itoa(seed))
			setFlag(t, "rapid.checks", "1")
			setFlag(t, "rapid.steps", strconv.Itoa(each/250))
			setFlag(t, "rapid.nofailfile", "true")
			m := newMachine(t)
			rapid.Check(t, func(rt *rapid.T) { m.run(rt, int64(each)) })
			m.finish()
			all, good = all+m.ops.Load(), good+m.good.Load()
		})
	}
	t.Logf("%d statements, %d of them answered, from seed %d on, in %v", all, good, first, time.Since(began).Round(time.Millisecond))
}

func setFlag(t *testing.T, name, value string) {
	t.Helper()
	f := flag.Lookup(name)
	before := f.Value.String()
	if err := f.Value.Set(value); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Value.Set(before) })
}

const (
	fewest, most = 4, 6            // tenants
	heard        = 2 * time.Second // by when the other node knows, also without its notification
	idle         = time.Second     // after which a tenant loses its pool
)

// machine is one fleet with two nodes and what the test knows of them.
type machine struct {
	*arena
	tb          testing.TB
	nodes       [nodes]*tenancy.Tenancy
	users       []tenancy.UserKey
	abroad      *tenancy.Tenancy  // of another primary, with tenants of the same names and IDs
	exiles      []context.Context // its tenants'
	abroadAdmin *pgx.Conn         // a superuser in its tenants' database

	enrolling sync.Mutex // one change of memberships at a time

	mu       sync.Mutex // guards the fields below; admin is used under it
	admin    *pgx.Conn
	subjects []*subject
	diary    []string
	builds   map[string]int // of pools, by node, tenant and generation
}

// newerMigrations is what the second node knows more than the first, as in the middle of a roll-out.
var newerMigrations = fstest.MapFS{
	"00001_notes.sql": {Data: mustRead("testdata/migrations/00001_notes.sql")},
	"00002_pinned.sql": {Data: []byte("-- +goose Up\nALTER TABLE notes ADD COLUMN pinned boolean NOT NULL DEFAULT false;\n" +
		"-- +goose Down\nALTER TABLE notes DROP COLUMN pinned;\n")},
}

func mustRead(name string) []byte {
	text, err := os.ReadFile(name)
	if err != nil {
		panic(err)
	}
	return text
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{tb: t, builds: map[string]int{}, users: []tenancy.UserKey{"ann", "bob", "cid", "dot"}}
	m.arena = &arena{ledger: newLedger(), door: m.door, kinds: append([]operation{
		{3, (*call).dirty},
		{4, m.leak},
		{4, m.trespass},
	}, plainOperations...)}
	f, abroad := tenancytest.NewFleet(t), tenancytest.NewFleet(t)
	f.AllowDatabases(t)
	for i := range m.nodes {
		cfg := m.config(i)
		cfg.Migrations = noteMigrations
		if i == 1 {
			cfg.Migrations = newerMigrations
		}
		m.nodes[i] = f.Open(t, cfg)
	}
	m.admin = f.Admin(t, "tenants")
	m.abroad = abroad.Open(t, tenancy.Config{Migrations: noteMigrations})
	m.abroadAdmin = abroad.Admin(t, "tenants")
	for i := range fewest {
		name := fmt.Sprintf("tenant-%d", i+1)
		tenancytest.Create(t, m.abroad, name)
		m.exiles = append(m.exiles, tenancytest.Context(t, m.abroad, name))
	}
	return m
}

func (m *machine) config(node int) tenancy.Config {
	return tenancy.Config{
		Limits: tenancy.Limits{TenantConns: 3, TenantIdle: idle},
		Logger: slog.New(slog.DiscardHandler),
		PoolConfig: func(_ context.Context, t tenancy.Tenant, _ *pgxpool.Config) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.builds[fmt.Sprintf("%d/%d/%d", node, t.ID, t.Generation)]++
			return nil
		},
	}
}

// run is one rapid case: bursts alone, beside verbs, and after verbs, until the stated number of statements is answered.
func (m *machine) run(rt *rapid.T, statements int64) {
	for range fewest {
		m.create(nil, 0, "")
	}
	if !m.clean() {
		return
	}
	for i, user := range m.users[:3] { // the fourth belongs to nobody yet
		m.enrol(m.subjects[i%fewest], i%nodes, user)
	}
	m.drawBurst(rt, nil)
	m.lull()
	actions := map[string]func(*rapid.T){
		"burst":              func(rt *rapid.T) { m.drawBurst(rt, nil) },
		"burst beside verbs": func(rt *rapid.T) { m.drawBurst(rt, m.drawVerbs(rt)) },
		"verbs, then burst":  func(rt *rapid.T) { m.drawVerbs(rt)(); m.drawBurst(rt, nil) },
		"":                   func(*rapid.T) { m.auditAll() },
	}
	for name, act := range actions {
		actions[name] = func(rt *rapid.T) {
			if m.clean() { // after the first finding the rest would only hide it
				act(rt)
			}
		}
	}
	rt.Repeat(actions)
	for m.clean() && m.good.Load() < statements {
		m.drawBurst(rt, m.drawVerbs(rt))
		m.auditAll()
	}
}

// lull leaves all tenants but one alone for long enough to lose their pools.
func (m *machine) lull() {
	for start, i := time.Now(), uint64(0); time.Since(start) < 5*idle/2; i++ {
		time.Sleep(idle / 10) // the server's connections are real, and so is the time
		m.burst(i, 20, m.everyone()[:1], nil)
	}
}

// finish reports.
func (m *machine) finish() {
	m.tb.Helper()
	m.auditAll()
	if !m.clean() {
		m.tb.Errorf("crossings: %d; the last verbs:\n%s", m.crossings(), strings.Join(m.diary[max(0, len(m.diary)-30):], "\n"))
		m.report(m.tb)
		return
	}
	pools, again := 0, 0
	for _, n := range m.builds {
		pools += n
		again += n - 1
	}
	if again == 0 {
		m.tb.Error("no pool was built again: no tenant was idle")
	}
	m.tb.Logf("%d statements, %d answered, %d crossings; %d tenants, %d verbs, %d pools built, %d of them again after idling",
		m.ops.Load(), m.good.Load(), m.crossings(), len(m.subjects), len(m.diary), pools, again)
}

func (m *machine) auditAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.audit(m.tb, m.admin, m.subjects)
	for schema, rows := range tablesOfNotes(m.tb, m.abroadAdmin) {
		for _, r := range rows {
			m.found(foreignPlace, "%s of %s lies in schema %s of another primary", r.title, r.tenant, schema)
		}
	}
}

func (m *machine) drawBurst(rt *rapid.T, during func()) {
	seed := rapid.Uint64().Draw(rt, "burst")
	statements := rapid.IntRange(50, 200).Draw(rt, "statements")
	among := m.everyone()
	if alone := rapid.IntRange(0, 2*most).Draw(rt, "alone"); alone < len(among) && len(among) > fewest {
		among = append(among[:alone:alone], among[alone+1:]...) // one has a rest, long enough to lose its pool now and then
	}
	m.burst(seed, statements, among, during)
}

func (m *machine) everyone() []*subject {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]*subject(nil), m.subjects...)
}

// drawVerbs draws one to three verbs of tenants' lives. One that makes no sense when its turn comes does nothing.
func (m *machine) drawVerbs(rt *rapid.T) func() {
	type verb struct {
		name string
		run  func(s *subject, node int, user tenancy.UserKey)
	}
	verbs := []verb{
		{"create", m.create}, {"withdraw", m.withdraw}, {"reopen", m.reopen}, {"reopen", m.reopen}, {"move", m.move}, {"migrate", m.migrate},
		{"enrol", m.enrol}, {"expel", m.expel}, {"set default", m.setDefault}, {"refresh", m.refresh},
	}
	var chosen []func()
	for range rapid.IntRange(1, 3).Draw(rt, "verbs") {
		v := verbs[rapid.IntRange(0, len(verbs)-1).Draw(rt, "verb")]
		who := rapid.IntRange(0, most-1).Draw(rt, "tenant")
		node := rapid.IntRange(0, nodes-1).Draw(rt, "node")
		user := rapid.SampledFrom(m.users).Draw(rt, "user")
		chosen = append(chosen, func() {
			all := m.everyone()
			s := all[who%len(all)]
			m.note("%s %s on node %d, user %s", v.name, s.name, node, user)
			v.run(s, node, user)
		})
	}
	return func() {
		for _, run := range chosen {
			run()
		}
	}
}

func (m *machine) note(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.diary = append(m.diary, fmt.Sprintf(format, args...))
}

// door lets a call in by one of the ways that a service has: as a user, by ID, or with a session made earlier.
func (m *machine) door(c *call) bool {
	c.db = m.nodes[c.node].DB()
	way := c.rng.Float64()
	if way < 0.2 {
		if kept := c.who.keptContext(c.rng); kept != nil {
			c.onDoor = "a kept session"
			c.ctx = sessionOn{c.ctx, kept}
			return true
		}
	}
	if way < 0.5 {
		return m.enter(c)
	}
	return m.resolve(c)
}

func (m *machine) enter(c *call) bool {
	c.onDoor = "enter"
	ctx, err := m.nodes[c.node].Enter(c.ctx, c.who.id)
	if err != nil {
		c.counted(1, err)
		c.fails("enter", err)
		return false
	}
	if c.who.isOut(c.start, time.Now()) {
		m.found(letIn, "%s was entered on node %d and is out of service", c.who.name, c.node)
	}
	c.who.keep(c.node, c.rng, ctx)
	c.ctx = ctx
	return true
}

func (m *machine) resolve(c *call) bool {
	user := m.users[c.rng.IntN(len(m.users))]
	for range 3 { // mostly one who may
		if maybe, _ := c.who.belonged(user, c.node, c.start, c.start); maybe {
			break
		}
		user = m.users[c.rng.IntN(len(m.users))]
	}
	c.onDoor = "user " + string(user)
	q, named := askingFor(user, c.who), c.rng.Float64() < 0.8
	if !named {
		q.Hints = nil
	}
	ctx, err := m.nodes[c.node].Resolve(c.ctx, q)
	if err != nil {
		c.counted(1, err)
		m.judgeRefusal(c, user, named, err)
		return false
	}
	t, _ := tenancy.TenantFrom(ctx)
	asked := c.who
	if c.who = m.byID(t.ID); c.who == nil {
		return false // made a moment ago: not known here yet
	}
	end := time.Now()
	if named && c.who != asked {
		m.found(letIn, "%s asked for %s and got %s", user, asked.name, c.who.name)
	}
	if maybe, _ := c.who.belonged(user, c.node, c.start, end); !maybe {
		m.found(letIn, "%s, no member, got into %s on node %d", user, c.who.name, c.node)
	}
	if c.who.isOut(c.start, end) {
		m.found(letIn, "%s got into %s on node %d, which is out of service", user, c.who.name, c.node)
	}
	c.ctx = ctx
	return true
}

// judgeRefusal checks that a user was refused for a reason, and that a stranger learns nothing of the tenant.
func (m *machine) judgeRefusal(c *call, user tenancy.UserKey, named bool, err error) {
	forbidden := errors.Is(err, tenancy.ErrForbidden)
	if !named {
		if !c.hasty && !forbidden && !errors.Is(err, tenancy.ErrAmbiguousTenant) && !errors.Is(err, tenancy.ErrTenantSuspended) && !errors.Is(err, tenancy.ErrTenantGone) {
			m.found(failed, "resolve %s: %v", user, err)
		}
		return
	}
	maybe, surely := c.who.belonged(user, c.node, c.start, time.Now())
	switch {
	case c.hasty:
	case surely:
		c.fails("resolve", err)
	case !maybe && !forbidden:
		m.found(unguarded, "%s is no member of %s and was told: %v", user, c.who.name, err)
	}
}

func (m *machine) byID(id tenancy.ID) *subject {
	for _, s := range m.everyone() {
		if s.id == id {
			return s
		}
	}
	return nil
}

// sessionOn is a context with the deadline of one and the session of another.
type sessionOn struct {
	context.Context
	session context.Context
}

func (s sessionOn) Value(key any) any { return s.session.Value(key) }

// keep remembers a session now and then.
func (s *subject) keep(node int, rng *rand.Rand, ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	const enough = 4
	switch ctx = tenancy.Detach(ctx); {
	case len(s.kept[node]) < enough:
		s.kept[node] = append(s.kept[node], ctx)
	case rng.IntN(50) == 0:
		s.kept[node][rng.IntN(enough)] = ctx
	}
}

// keptContext returns a session that either node has made at some time; it is good on both.
func (s *subject) keptContext(rng *rand.Rand) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := s.kept[rng.IntN(nodes)]
	if len(kept) == 0 {
		return nil
	}
	return kept[rng.IntN(len(kept))]
}

// wants checks that a call was refused with the class.
func (m *machine) wants(c *call, what string, err, class error) {
	c.counted(1, err)
	switch {
	case err == nil:
		m.found(unguarded, "%s, for %s on node %d", what, c.who.name, c.node)
	case !c.hasty && !errors.Is(err, class):
		m.found(failed, "%s: %v, want %v", what, err, class)
	}
}

// trespass calls with contexts that are no key to anything here.
func (m *machine) trespass(c *call) {
	const intrude = `INSERT INTO notes (tenant, title) VALUES ('intruder', 'intruder')`
	exec := func(db database, ctx context.Context) error { _, err := db.Exec(ctx, intrude); return err }
	exile := sessionOn{c.ctx, m.exiles[c.rng.IntN(len(m.exiles))]}
	switch c.rng.IntN(5) {
	case 0:
		m.wants(c, "no session", exec(c.db, context.Background()), tenancy.ErrNoTenant)
	case 1:
		m.wants(c, "the host's session", exec(c.db, tenancy.AsHost(c.ctx)), tenancy.ErrNoTenant)
	case 2:
		_, err := m.nodes[c.node].Enter(c.ctx, tenancy.ID(1_000_000+c.rng.IntN(1000)))
		m.wants(c, "an ID that nobody has", err, tenancy.ErrTenantNotFound)
	case 3:
		m.wants(c, "a session of another primary", exec(c.db, exile), tenancy.ErrTenantMismatch)
	case 4:
		m.wants(c, "a session on another primary", exec(m.abroad.DB(), c.ctx), tenancy.ErrTenantMismatch)
	}
}

// leak passes another tenant's context to a transaction, by every method that takes one.
func (m *machine) leak(c *call) {
	other := c.other()
	if other == nil {
		return
	}
	theirs := other.keptContext(c.rng)
	if theirs == nil || c.rng.IntN(8) == 0 {
		theirs = m.exiles[c.rng.IntN(len(m.exiles))]
	}
	c.inTx("leak", func(tx pgx.Tx) {
		if err := m.leakOn(c, tx, other, sessionOn{c.ctx, theirs}); err == nil {
			_ = tx.Commit(c.ctx) // so that the rows tell
		}
	})
}

func (m *machine) leakOn(c *call, tx pgx.Tx, other *subject, theirs context.Context) (err error) {
	w := m.declare(other, c.node, c.start)
	m.settle(undone, w)
	const insert = `INSERT INTO notes (tenant, title) VALUES ($1, $2)`
	args := []any{other.name, w.title}
	what := "a transaction with a context of " + other.name
	switch c.rng.IntN(7) {
	case 0:
		_, err = tx.Exec(theirs, insert, args...)
	case 1:
		var rows pgx.Rows
		rows, _ = tx.Query(theirs, insert, args...)
		rows.Close()
		err = rows.Err()
	case 2:
		err = tx.QueryRow(theirs, insert+` RETURNING 1`, args...).Scan(nil)
	case 3:
		var b pgx.Batch
		b.Queue(insert, args...)
		err = tx.SendBatch(theirs, &b).Close()
	case 4:
		_, err = tx.CopyFrom(theirs, pgx.Identifier{"notes"}, []string{"tenant", "title"}, pgx.CopyFromRows([][]any{args}))
	case 5:
		_, err = tx.Begin(theirs)
	case 6:
		_, err = tx.Prepare(theirs, "leaked", insert)
	}
	m.wants(c, what, err, tenancy.ErrTenantMismatch)
	return err
}
