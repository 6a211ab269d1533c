package tenancy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// Level says how bad a [Finding] is.
type Level int

const (
	LevelOK      Level = iota // the check was made, and nothing was found
	LevelNote                 // worth knowing
	LevelWarning              // it will hurt, or a second wall is down
	LevelFailure              // something does not work, or is open that must be closed
)

// String returns "ok", "note", "warning" or "failure".
func (l Level) String() string {
	names := []string{"ok", "note", "warning", "failure"}
	if l < 0 || int(l) >= len(names) {
		return "level " + strconv.Itoa(int(l))
	}
	return names[l]
}

// Finding is one thing that [Tenancy.Doctor] has found, or that [Open] misses, with what mends it. It holds no secret, and names that people of a tenant may have chosen.
type Finding struct {
	Check  string // a stable name, such as "pooler", "clock" or "membership"
	Level  Level
	Tenant Tenant // zero: of no tenant alone
	Server string // its name; "": of the primary, or of all
	What   string
	Why    string // why it matters
	// Mend is a statement for a superuser, with the database that it is for behind it, or else what to do.
	Mend string
}

// String says it on one line. Control characters are quoted.
func (f Finding) String() string {
	var b strings.Builder
	b.WriteString(f.Level.String() + " " + f.Check)
	if f.Server != "" {
		b.WriteString(" server " + f.Server)
	}
	if f.Tenant.ID != 0 {
		fmt.Fprintf(&b, " tenant %s (%d)", f.Tenant.Name, f.Tenant.ID)
	}
	for _, part := range []struct{ name, text string }{{": ", f.What}, {"; it matters: ", f.Why}, {"; mend it with: ", f.Mend}} {
		if part.text != "" {
			b.WriteString(part.name + part.text)
		}
	}
	return quoteControls(b.String())
}

// quoteControls writes what would steer a terminal, or the reader's eye, as Go writes it in a string.
func quoteControls(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsControl(r) || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control) || r == unicode.ReplacementChar {
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}

// Doctor looks at the primary, at each server and at the walls between tenants as the servers' catalogs have them, and says what is wrong, why it matters and what mends it. It is for the
// operator, at night and before a deployment; the caller decides by Level what an error is.
//
// It only reads, and of tenants neither rows nor code. It has one session for each database with tenants, one after the other at a server; of many tenants it asks together. What is at work meanwhile is not found.
//
// Findings are in order of level, the worst first, then of check and tenant. Each check that has found nothing is one of them, with [LevelOK]. One that
// could not be made is one too, and ends nothing: neither a server that is down nor the primary. The error is ctx.Err(), or that of a visit that is over.
func (tn *Tenancy) Doctor(ctx context.Context) ([]Finding, error) {
	return tn.doctor(ctx, time.Now)
}

func (tn *Tenancy) doctor(ctx context.Context, now func() time.Time) ([]Finding, error) {
	const op = "doctor"
	ctx, err := begin(ctx)
	if err != nil {
		return nil, &Error{Op: op, Err: err}
	}
	d := &doctor{tn: tn, now: now, known: map[string]bool{}, made: map[string]bool{}}
	d.examine(ctx)
	if err := ctx.Err(); err != nil {
		return nil, &Error{Op: op, Err: err}
	}
	return d.report(), nil
}

const (
	wardTimeout  = 2 * time.Minute // for all checks of one database
	probeTimeout = 3 * time.Second // for an answer that takes milliseconds
)

// doctor is one run of Doctor.
type doctor struct {
	tn      *Tenancy
	now     func() time.Time
	servers []*doctorServer
	known   map[string]bool // names of all places: schemas, roles, databases

	mu    sync.Mutex // guards the fields below
	found []doctorFinding
	made  map[string]bool // checks
}

// doctorFinding may be of a place, which may have changed since it was read.
type doctorFinding struct {
	Finding
	place *place
}

// doctorServer is a server with what the primary knows of it.
type doctorServer struct {
	id          int64
	name        string
	provisioner DataSource // the zero one where err says why
	err         error
	tablespace  string
	pooler      string
	reader      string // role; "": none
	places      []*doctorPlace
	areas       []area
	dense       []doctorDense
	open, pools bool // something was found at a database, or at the login of a shared pool: what follows from that at each tenant is not told as well
}

// doctorPlace is a place, of which no password is read.
type doctorPlace struct {
	place
	current bool // the tenant is in it
	updated time.Time
	suspect bool // something was found at it: what follows from that is not told as well
}

// doctorDense are the logins of a shared pool.
type doctorDense struct {
	isolation Isolation
	logins    []string
}

// ward is a session, of the catalog's login at the primary or of the provisioner's in a database with tenants.
type ward struct {
	*doctor
	check    string // that is being made
	conn     *pgx.Conn
	address  DataSource // without a password
	server   *doctorServer
	name     string // of the server; "" for the primary
	places   []*doctorPlace
	settings map[string]setting
	pooled   bool // the session is not this node's alone
}

// doctorCheck is one that is made in a ward.
type doctorCheck struct {
	name string
	make func(ctx context.Context, w *ward) error
	wall bool // of what is between tenants: it fails when it could not be made
}

var (
	// sessionChecks are made at the primary and at each server, first of them whether the session is one.
	sessionChecks = []doctorCheck{{name: "pooler", make: checkPooler}, {name: "version", make: checkVersion}, {name: "settings", make: checkSettings}, {name: "connections", make: checkConnections}, {name: "clock", make: checkClock}}
	// primaryChecks are made of what the primary says.
	primaryChecks = []doctorCheck{{name: "primary", make: checkPrimary}, {name: "listen", make: checkListen}, {name: "keys", make: checkKeys}, {name: "nodes", make: checkNodes}, {name: "intent", make: checkIntents}, {name: "fence", make: checkFences}, {name: "migration", make: checkMigrations}}
	// wardChecks are made in each server's own database, of all that is the server's.
	wardChecks = []doctorCheck{{"server", checkServer, true}, {"role", checkRoles, true}, {"membership", checkMemberships, true}, {"database", checkDatabases, true}, {"orphan", checkOrphans, false}}
	// insideChecks are made in each database with places of tenants, those of a place after what is around it.
	insideChecks = []doctorCheck{{"extension", checkExtensions, true}, {"place", checkPlaces, true}, {"privilege", checkPrivileges, true}, {"owner", checkOwners, true}, {"rows", checkRows, true}, {"isolation", checkIsolation, true}}
)

// examine makes all checks. Servers are looked at side by side.
func (d *doctor) examine(ctx context.Context) {
	done, err := d.tn.primary.verb(ctx)
	if err != nil {
		return // ctx has ended
	}
	defer done()
	if d.examinePrimary(ctx) != nil {
		return
	}
	var wg sync.WaitGroup
	for _, s := range d.servers {
		wg.Go(func() { d.examineServer(ctx, s) })
	}
	wg.Wait()
	d.forgetChanged(ctx)
}

func (d *doctor) examinePrimary(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, wardTimeout)
	defer cancel()
	w := &ward{doctor: d, check: "primary"}
	const why = "without the primary nobody new is served, and nothing can be changed"
	conn, err := pgx.ConnectConfig(ctx, d.tn.primary.direct)
	if err != nil {
		w.find(LevelFailure, "the primary cannot be reached: "+withoutSecrets(err).Error(), why, "start it, or see Config.PrimaryURL and ListenURL; docs/operations.md, \"The primary is down\"")
		return err
	}
	defer closeConn(conn)
	w.conn = conn
	cc := conn.Config()
	w.address = DataSource{Host: cc.Host, Port: cc.Port, Database: cc.Database, User: cc.User}
	w.make(ctx, sessionChecks)
	if err := d.read(ctx); err != nil {
		w.check = "primary"
		w.find(LevelFailure, "the primary's catalog cannot be read: "+err.Error(), why, "see what it says, and call Doctor again: the servers were not looked at")
		return err
	}
	w.make(ctx, primaryChecks)
	return nil
}

func (d *doctor) examineServer(ctx context.Context, s *doctorServer) {
	by := map[string][]*doctorPlace{s.provisioner.Database: nil}
	for _, p := range s.places {
		by[p.source.Database] = append(by[p.source.Database], p)
	}
	databases := make([]string, 0, len(by))
	for name := range by {
		databases = append(databases, name)
	}
	slices.SortFunc(databases, func(a, b string) int { // the server's own first
		return cmp.Or(-cmp.Compare(btoi(a == s.provisioner.Database), btoi(b == s.provisioner.Database)), strings.Compare(a, b))
	})
	for _, name := range databases {
		w := &ward{doctor: d, check: "server", server: s, name: s.name, places: by[name]}
		if !w.examine(ctx, name) {
			return
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// examine makes the checks in one database, and says whether the server's others can be looked at.
func (w *ward) examine(ctx context.Context, database string) bool {
	ctx, cancel := context.WithTimeout(ctx, wardTimeout)
	defer cancel()
	if w.server.err != nil {
		w.find(LevelFailure, "it cannot be looked at: "+w.server.err.Error(), "its tenants can be served, and neither made, nor migrated, nor fenced", "register its provisioner with Catalog.AddServer")
		return false
	}
	d := w.server.provisioner
	own := database == d.Database
	d.Database = database
	conn, err := connectProvisioner(ctx, w.tn.servers, d)
	if err != nil && !own {
		w.check = "place"
		for _, p := range w.places {
			if p.state == "made" {
				w.ofPlace(p, LevelFailure, fmt.Sprintf("its database %s cannot be looked at: %v", database, err), "its tenant cannot be served", "restore the database from a backup, or see what keeps the provisioner from it")
			}
		}
		return true
	}
	if errors.Is(err, ErrPooler) {
		w.check = "pooler"
	}
	if err != nil {
		w.find(LevelFailure, "it cannot be reached: "+err.Error(), "its tenants cannot be served; they were not looked at", "start it, or see its address and tell Catalog.AddServer the provisioner's password; docs/operations.md, \"A tenants' server is down\"")
		return false
	}
	defer closeConn(conn)
	w.conn, w.address = conn, d
	w.address.Password = ""
	if own {
		w.make(ctx, sessionChecks[:1])
		if w.pooled { // what is set here would be others'
			return false
		}
		w.make(ctx, sessionChecks[1:])
	}
	if _, err := conn.Exec(ctx, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"); err != nil {
		w.find(LevelWarning, "its session cannot be made to read only: "+err.Error(), "Doctor changes nothing, and does not look without that", "see what it says")
		return true
	}
	if own {
		w.make(ctx, wardChecks)
	}
	w.make(ctx, insideChecks)
	return true
}

// make makes the checks in turn. One that fails is told, and the next one is made.
func (w *ward) make(ctx context.Context, checks []doctorCheck) {
	for _, c := range checks {
		w.check = c.name
		if err := c.make(ctx, w); err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("%w: %w", ctx.Err(), err)
			}
			level := LevelWarning
			if c.wall {
				level = LevelFailure
			}
			w.find(level, "the check could not be made: "+withoutSecrets(err).Error(), "what it looks for may be there", "see what it says, and call Doctor again")
		}
		w.mu.Lock()
		w.made[c.name] = true
		w.mu.Unlock()
	}
}

func (w *ward) find(level Level, what, why, mend string) {
	w.ofTenant(Tenant{}, level, what, why, mend)
}

func (w *ward) ofTenant(t Tenant, level Level, what, why, mend string) {
	w.add(doctorFinding{Finding: Finding{Check: w.check, Level: level, Tenant: t, Server: w.name, What: what, Why: why, Mend: mend}})
}

// ofPlace is a finding at a place: of its tenant, if it has one.
func (w *ward) ofPlace(p *doctorPlace, level Level, what, why, mend string) {
	if level > LevelNote {
		p.suspect = true
	}
	w.add(doctorFinding{Finding: Finding{Check: w.check, Level: level, Tenant: p.tenant, Server: w.name, What: what, Why: why, Mend: mend}, place: &p.place})
}

func (d *doctor) add(f doctorFinding) {
	if f.Tenant.ID == 0 {
		f.Tenant = Tenant{} // a place that no tenant is in has its UID
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.found = append(d.found, f)
}

// within names the database that a statement is for.
func (w *ward) within(statement string) string {
	return statement + " -- in database " + ident.Quote(w.address.Database)
}

// report is what was found, and what was looked for in vain.
func (d *doctor) report() []Finding {
	var all []Finding
	said := map[string]bool{}
	for _, f := range d.found {
		said[f.Check] = true
		all = append(all, f.Finding)
	}
	for _, checks := range [][]doctorCheck{sessionChecks, primaryChecks, wardChecks, insideChecks} {
		for _, c := range checks {
			switch {
			case said[c.name]:
				continue
			case d.made[c.name]:
				all = append(all, Finding{Check: c.name, What: "nothing found"})
			default:
				all = append(all, Finding{Check: c.name, Level: LevelNote, What: "the check was not made: there was nothing that it could be asked of"})
			}
			said[c.name] = true
		}
	}
	slices.SortStableFunc(all, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(b.Level, a.Level), strings.Compare(a.Check, b.Check), cmp.Compare(a.Tenant.ID, b.Tenant.ID), strings.Compare(a.Server, b.Server), strings.Compare(a.What, b.What))
	})
	return slices.CompactFunc(all, func(a, b Finding) bool { return a == b })
}

// read reads the servers and the places, without the passwords of tenants.
func (d *doctor) read(ctx context.Context) error {
	db := d.tn.primary
	rows, _ := db.pool.Query(ctx, `SELECT s.id, s.name, s.database, s.provisioner, s.tablespace, s.pooler, coalesce(r.role, '') FROM tenancy.servers s LEFT JOIN tenancy.readers r ON r.server = s.id ORDER BY s.id`)
	by := map[int64]*doctorServer{}
	var err error
	d.servers, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*doctorServer, error) {
		var s doctorServer
		var sealed []byte
		if err := row.Scan(&s.id, &s.name, &s.provisioner.Database, &sealed, &s.tablespace, &s.pooler, &s.reader); err != nil {
			return nil, err
		}
		by[s.id] = &s
		d.know(s.reader)
		if sealed == nil {
			s.err = ErrNoProvisioner
			return &s, nil
		}
		login, err := db.openSource(UID(db.realm.Value()), "provisioner", sealed)
		if err != nil {
			s.err = err
		} else {
			s.provisioner = login
		}
		return &s, nil
	})
	if err != nil {
		return unavailable("read servers", err)
	}
	rows, _ = db.pool.Query(ctx, `SELECT server, schema, owner, runtime, state FROM tenancy.shared_areas ORDER BY server`)
	var a area
	var server int64
	if _, err := pgx.ForEachRow(rows, []any{&server, &a.schema, &a.owner, &a.runtime, &a.state}, func() error {
		by[server].areas = append(by[server].areas, a)
		d.know(a.schema, a.owner, a.runtime)
		return nil
	}); err != nil {
		return unavailable("read areas", err)
	}
	rows, _ = db.pool.Query(ctx, `SELECT server, isolation, login, next_login, old_login FROM tenancy.dense_logins ORDER BY server, isolation`)
	var isolation Isolation
	var logins [3]string
	if _, err := pgx.ForEachRow(rows, []any{&server, &isolation, &logins[0], &logins[1], &logins[2]}, func() error {
		all := slices.DeleteFunc(slices.Clone(logins[:]), func(s string) bool { return s == "" })
		by[server].dense = append(by[server].dense, doctorDense{isolation, all})
		d.know(all...)
		return nil
	}); err != nil {
		return unavailable("read shared pools", err)
	}
	return d.readPlaces(ctx, by)
}

func (d *doctor) know(names ...string) {
	for _, n := range names {
		d.known[n] = true
	}
}

// doctorPlaces are the places that are not dropped, each with the tenant that is in it, was, or will be.
const doctorPlaces = `SELECT d.id, d.uid, d.server, d.state, d.isolation, coalesce(nullif(d.database, ''), s.database), d.schema, d.owner, d.runtime, d.login, d.next_login, d.old_login, d.dense, d.dense_role,
		greatest(d.updated, t.updated), coalesce(t.data_source = d.id, false), t.fenced IS NOT NULL, coalesce(t.id, 0), coalesce(t.name, ''), coalesce(t.display_name, ''), coalesce(t.state, ''), coalesce(t.generation, 0)
	FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server LEFT JOIN tenancy.tenants t ON t.uid = d.uid
	WHERE d.state <> 'dropped'`

func (d *doctor) readPlaces(ctx context.Context, by map[int64]*doctorServer) error {
	rows, _ := d.tn.primary.pool.Query(ctx, doctorPlaces+` ORDER BY d.id`)
	for rows.Next() {
		var p doctorPlace
		t := &p.tenant
		if err := rows.Scan(&p.id, &t.UID, &p.server, &p.state, &p.isolation, &p.source.Database, &p.source.Schema, &p.owner, &p.runtime, &p.source.User, &p.nextLogin, &p.oldLogin, &p.dense, &p.denseRole,
			&p.updated, &p.current, &p.fenced, &t.ID, &t.Name, &t.DisplayName, &t.State, &t.Generation); err != nil {
			return unavailable("read places", err)
		}
		s := by[p.server]
		t.Isolation, t.Dense, t.realm = p.isolation, p.dense, d.tn.realm
		p.provisioner = DataSource{User: s.provisioner.User, Database: s.provisioner.Database}
		if i := slices.IndexFunc(s.dense, func(l doctorDense) bool { return l.isolation == p.isolation }); i >= 0 {
			p.denseLogin = s.dense[i].logins[0]
		}
		s.places = append(s.places, &p)
		d.know(append(p.logins(), p.source.Schema, p.source.Database, p.owner, p.runtime, p.denseRole)...)
	}
	return unavailable("read places", rows.Err())
}

// forgetChanged takes back what was found at places that a verb has changed since they were read.
func (d *doctor) forgetChanged(ctx context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := map[int64]time.Time{}
	for _, s := range d.servers {
		for _, p := range s.places {
			if p.suspect {
				was[p.id] = p.updated
			}
		}
	}
	if len(was) == 0 {
		return
	}
	ids := make([]int64, 0, len(was))
	for id := range was {
		ids = append(ids, id)
	}
	rows, _ := d.tn.primary.pool.Query(ctx, `SELECT d.id, greatest(d.updated, t.updated) FROM tenancy.data_sources d LEFT JOIN tenancy.tenants t ON t.uid = d.uid WHERE d.id = ANY($1)`, ids)
	is := map[int64]time.Time{}
	var id int64
	var updated time.Time
	if _, err := pgx.ForEachRow(rows, []any{&id, &updated}, func() error { is[id] = updated; return nil }); err != nil {
		return // what was found stays
	}
	d.found = slices.DeleteFunc(d.found, func(f doctorFinding) bool {
		return f.place != nil && f.Level > LevelNote && !is[f.place.id].Equal(was[f.place.id])
	})
}

// missing adds what is not as the library wants it before it begins.
func (w *ward) missing(err error, why string) error {
	var setup *SetupError
	if !errors.As(err, &setup) {
		return err
	}
	for _, f := range setup.Missing {
		w.find(LevelFailure, f.What, why, f.Mend)
	}
	return nil
}
