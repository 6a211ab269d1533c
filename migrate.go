package tenancy

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
)

// migrations is one set of goose migrations.
type migrations struct {
	files  fs.FS // *.sql at its root; nil: none
	code   []GoMigration
	reader string      // the role that may read the version table and not write it; "": none
	guard  string      // the table of the schema that a run locks; "": it takes an advisory lock
	each   bool        // the database is that of openLocked, whose transactions lock the guard by themselves
	list   []Migration // in order of version; of the service's alone
}

// alone are the versions of those without a transaction, in order.
func (m migrations) alone() (versions []int64) {
	for _, f := range m.list {
		if f.NoTransaction {
			versions = append(versions, f.Version)
		}
	}
	return versions
}

// newest is the version that the migrations lead to, 0 without any.
func (m migrations) newest() int64 {
	if len(m.list) == 0 {
		return 0
	}
	return m.list[len(m.list)-1].Version
}

// between are those that lead from one version to the other.
func (m migrations) between(from, to int64) []Migration {
	var some []Migration
	for _, f := range m.list {
		if f.Version > from && f.Version <= to {
			some = append(some, f)
		}
	}
	return some
}

// find returns the one of the version.
func (m migrations) find(version int64) (Migration, bool) {
	i := slices.IndexFunc(m.list, func(f Migration) bool { return f.Version == version })
	if i < 0 {
		return Migration{}, false
	}
	return m.list[i], true
}

func (m migrations) empty() bool { return m.files == nil && len(m.code) == 0 }

// serviceMigrations finds the service's files at the root of fsys or in its one subdirectory
// that has any, which is the shape that go:embed gives.
func serviceMigrations(fsys fs.FS, code []GoMigration) (migrations, error) {
	m := migrations{code: code}
	if fsys != nil {
		files, err := oneFolder(fsys)
		if err != nil {
			return m, err
		}
		m.files = files
	}
	if m.empty() {
		return m, nil
	}
	if err := m.read(); err != nil {
		return m, invalid(fmt.Errorf("Config.Migrations: %w", err))
	}
	return m, nil
}

func oneFolder(fsys fs.FS) (fs.FS, error) {
	found := map[string]bool{}
	for _, pattern := range []string{"*.sql", "*/*.sql"} {
		names, err := fs.Glob(fsys, pattern)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			found[path.Dir(name)] = true
		}
	}
	switch {
	case found["."]:
		return fsys, nil
	case len(found) > 1:
		return nil, invalid(errors.New("Config.Migrations has .sql files in several directories and none at its root: choose one with fs.Sub"))
	}
	for dir := range found {
		return fs.Sub(fsys, dir)
	}
	return nil, invalid(errors.New("Config.Migrations has no .sql file at its root or in a subdirectory: check the go:embed pattern"))
}

// read makes the list.
func (m *migrations) read() error {
	r, err := newRun(nil, "check", *m)
	if err != nil {
		return err
	}
	for _, s := range r.provider.ListSources() {
		f := Migration{Version: s.Version}
		if s.Type == goose.TypeSQL {
			f.File = path.Base(s.Path)
			text, err := fs.ReadFile(m.files, s.Path)
			if err != nil {
				return err
			}
			f.NoTransaction, f.down = annotated(text, "NO TRANSACTION"), annotated(text, "Down")
			f.calls = bytes.Contains(bytes.ToLower(text), []byte("tenancy_"))
		} else {
			f.calls = true // nobody knows
			f.down = slices.ContainsFunc(m.code, func(g GoMigration) bool { return g.Version == s.Version && g.Down != nil })
		}
		m.list = append(m.list, f)
	}
	slices.SortFunc(m.list, func(a, b Migration) int { return cmp.Compare(a.Version, b.Version) })
	return nil
}

// annotated says whether a file has goose's annotation, by goose's own rules.
func annotated(text []byte, annotation string) bool {
	for line := range strings.Lines(string(text)) {
		rest, comment := strings.CutPrefix(line, "--")
		_, of, goose := strings.Cut(rest, "+goose")
		if comment && goose && strings.EqualFold(strings.TrimSpace(strings.ReplaceAll(of, "--", "")), annotation) {
			return true
		}
	}
	return false
}

const versionTable = "goose_db_version"

// run is one use of goose on one schema. goose remembers a failed first look for good and keeps
// lock budgets in the locker, so nothing of it outlives the run.
type run struct {
	provider *goose.Provider
	store    database.Store
	db       *sql.DB
}

// newRun prepares goose for the schema that db's search_path names. db may be nil to check the files alone.
func newRun(db *sql.DB, schema string, m migrations) (*run, error) {
	table := ident.Quote(schema, versionTable)
	inner, err := database.NewStore(goose.DialectPostgres, table)
	if err != nil {
		return nil, err
	}
	store := &versionStore{Store: inner, table: table, reader: m.reader, closed: m.guard != ""}
	if db == nil {
		db = stdlib.OpenDB(pgx.ConnConfig{}) // never connected
		defer db.Close()
	}
	var code []*goose.Migration
	for _, g := range m.code {
		up := &goose.GoFunc{RunTx: g.Up}
		var down *goose.GoFunc
		if g.Down != nil {
			down = &goose.GoFunc{RunTx: g.Down}
		}
		code = append(code, goose.NewGoMigration(g.Version, up, down))
	}
	options := []goose.ProviderOption{goose.WithStore(store), goose.WithGoMigrations(code...), goose.WithDisableGlobalRegistry(true)}
	switch {
	case m.each:
	case m.guard != "":
		options = append(options, goose.WithSessionLocker(&ownerLock{db: db, table: ident.Quote(schema, m.guard)}))
	default:
		options = append(options, goose.WithSessionLocker(schemaLock{schema}))
	}
	provider, err := goose.NewProvider("", db, m.files, options...)
	if err != nil {
		return nil, err
	}
	return &run{provider: provider, store: store, db: db}, nil
}

// stepError is a migration that was begun and has failed.
type stepError struct {
	version int64
	err     error
}

func (e *stepError) Error() string { return fmt.Sprintf("migration %d: %v", e.version, e.err) }
func (e *stepError) Unwrap() error { return e.err }

// up applies what is pending up to the version, and returns the versions applied, also when a later one failed.
func (r *run) up(ctx context.Context, to int64) ([]int64, error) {
	results, err := r.provider.UpTo(ctx, to)
	if partial, ok := errors.AsType[*goose.PartialError](err); ok {
		results = partial.Applied
		err = &stepError{partial.Failed.Source.Version, withoutSecrets(partial.Err)}
	}
	applied := make([]int64, len(results))
	for i, res := range results {
		applied[i] = res.Source.Version
	}
	return applied, withoutSecrets(err)
}

// upBefore is up that stops before the first of those which are to be run alone, and returns which that is; 0: none is pending.
func (r *run) upBefore(ctx context.Context, to int64, alone []int64) (applied []int64, next int64, err error) {
	if len(alone) > 0 {
		version, err := r.version(ctx)
		if err != nil {
			return nil, 0, withoutSecrets(err)
		}
		for _, v := range alone {
			if v > version && v <= to {
				next = v
				break
			}
		}
	}
	switch {
	case next == 1: // nothing comes before it
		return nil, next, nil
	case next > 0:
		to = next - 1
	}
	applied, err = r.up(ctx, to)
	return applied, next, err
}

// down takes one version back.
func (r *run) down(ctx context.Context, version int64) error {
	_, err := r.provider.ApplyVersion(ctx, version, false)
	if partial, ok := errors.AsType[*goose.PartialError](err); ok {
		err = &stepError{version, withoutSecrets(partial.Err)}
	}
	return withoutSecrets(err)
}

// applied says whether the schema has the version.
func (r *run) applied(ctx context.Context, version int64) (bool, error) {
	there := false
	err := r.onTable(ctx, func(conn *sql.Conn) error {
		_, err := r.store.GetMigration(ctx, conn, version)
		there = err == nil
		if errors.Is(err, database.ErrVersionNotFound) {
			return nil
		}
		return err
	})
	return there, err
}

// write says that the schema has the version, or has it not. Its table has to be there.
func (r *run) write(ctx context.Context, version int64, applied bool) error {
	there, err := r.applied(ctx, version)
	if err != nil || there == applied {
		return err
	}
	return r.onTable(ctx, func(conn *sql.Conn) error {
		if applied {
			return r.store.Insert(ctx, conn, database.InsertRequest{Version: version})
		}
		return r.store.Delete(ctx, conn, version)
	})
}

// onTable runs fn where there is a table of versions.
func (r *run) onTable(ctx context.Context, fn func(conn *sql.Conn) error) error {
	conn, err := r.db.Conn(ctx)
	if err != nil {
		return withoutSecrets(err)
	}
	defer conn.Close()
	there, err := r.store.(database.StoreExtender).TableExists(ctx, conn)
	if err != nil || !there {
		return err
	}
	return fn(conn)
}

// version returns the newest applied version, 0 when none is.
func (r *run) version(ctx context.Context) (version int64, err error) {
	err = r.onTable(ctx, func(conn *sql.Conn) error {
		version, err = r.store.GetLatestVersion(ctx, conn)
		if errors.Is(err, database.ErrVersionNotFound) {
			return nil
		}
		return err
	})
	return version, err
}

// versionStore is goose's own store but for two things. goose's TableExists finds another
// tenant's table when the schema is missing, splits quoted names and scans the whole catalog.
// And its table falls under the schema's default privileges, by which the tenant's runtime role could rewrite history.
type versionStore struct {
	database.Store
	table  string
	reader string
	closed bool // to everybody but the reader, whatever the default privileges
}

var _ database.StoreExtender = (*versionStore)(nil)

func (s *versionStore) TableExists(ctx context.Context, db database.DBTxConn) (bool, error) {
	var there bool
	err := db.QueryRowContext(ctx, `SELECT to_regclass($1) IS NOT NULL`, s.table).Scan(&there)
	return there, err
}

// Insert refuses a version that is there: of two runs that lost sight of each other, the second one rolls back.
func (s *versionStore) Insert(ctx context.Context, db database.DBTxConn, req database.InsertRequest) error {
	var there bool
	if err := db.QueryRowContext(ctx, "SELECT EXISTS (SELECT FROM "+s.table+" WHERE version_id = $1)", req.Version).Scan(&there); err != nil {
		return err
	}
	if there {
		return errors.New("another run has applied it meanwhile: call it again")
	}
	return s.Store.Insert(ctx, db, req)
}

func (s *versionStore) CreateVersionTable(ctx context.Context, db database.DBTxConn) error {
	if err := s.Store.CreateVersionTable(ctx, db); err != nil || !s.closed {
		return err
	}
	var sequence string
	if err := db.QueryRowContext(ctx, `SELECT pg_get_serial_sequence($1, 'id')`, s.table).Scan(&sequence); err != nil {
		return err
	}
	if s.reader == "" { // of a shared schema, whose default privileges open sequences to all who may use it
		_, err := db.ExecContext(ctx, "REVOKE ALL ON SEQUENCE "+sequence+" FROM PUBLIC")
		return err
	}
	reader := ident.Quote(s.reader)
	for _, sql := range []string{
		"REVOKE ALL ON TABLE " + s.table + " FROM " + reader,
		"GRANT SELECT ON TABLE " + s.table + " TO " + reader,
		"REVOKE ALL ON SEQUENCE " + sequence + " FROM " + reader, // the server's answer is quoted
	} {
		if _, err := db.ExecContext(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// ownerLock keeps two runs off one tenant's schema. Advisory locks are one space for all who may
// connect, so that any tenant could hold up another's migration; this one is on the marker,
// where no tenant's login may take a lock that stands against it.
type ownerLock struct {
	db    *sql.DB
	table string
	tx    *sql.Tx // holds the lock, on a connection of its own: goose needs its one free of transactions
}

func (l *ownerLock) SessionLock(ctx context.Context, _ *sql.Conn) (err error) {
	// The lock outlives a cancelled ctx until SessionUnlock, which goose calls with one of its own.
	if l.tx, err = l.db.BeginTx(context.WithoutCancel(ctx), nil); err != nil {
		return err
	}
	if _, err = l.tx.ExecContext(ctx, "LOCK TABLE "+l.table+" IN SHARE UPDATE EXCLUSIVE MODE"); err != nil {
		return errors.Join(err, l.SessionUnlock(ctx, nil))
	}
	return nil
}

func (l *ownerLock) SessionUnlock(context.Context, *sql.Conn) error {
	if err := l.tx.Rollback(); err != nil && !errors.Is(err, sql.ErrTxDone) && !errors.Is(err, driver.ErrBadConn) {
		return err
	}
	return nil
}

// openLocked opens a database of one connection, which is enough for migrations with a transaction: each of its transactions has the lock of ownerLock from its beginning. What
// another run has applied before that, versionStore.Insert refuses, and it is rolled back.
func openLocked(cc pgx.ConnConfig, table string) *sql.DB {
	db := sql.OpenDB(lockedConnector{stdlib.GetConnector(cc), table})
	db.SetMaxOpenConns(1)
	return db
}

type lockedConnector struct {
	driver.Connector
	table string
}

func (c lockedConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return lockedConn{conn.(*stdlib.Conn), c.table}, nil
}

type lockedConn struct {
	*stdlib.Conn
	table string
}

func (c lockedConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	tx, err := c.Conn.BeginTx(ctx, opts)
	if err != nil {
		return nil, err
	}
	if _, err := c.Conn.Conn().Exec(ctx, "LOCK TABLE "+c.table+" IN SHARE UPDATE EXCLUSIVE MODE"); err != nil {
		return nil, errors.Join(err, tx.Rollback())
	}
	return tx, nil
}

// schemaLock keeps two runs off one schema. goose's own locker has one lock id for a whole
// database and polls; this one is of the schema and waits in the server.
type schemaLock struct{ schema string }

func (l schemaLock) id() int64 {
	h := fnv.New64a()
	h.Write([]byte("tenancy schema " + l.schema))
	return int64(h.Sum64())
}

func (l schemaLock) SessionLock(ctx context.Context, conn *sql.Conn) error {
	_, err := conn.ExecContext(ctx, `SELECT pg_advisory_lock($1)`, l.id())
	return err
}

func (l schemaLock) SessionUnlock(ctx context.Context, conn *sql.Conn) error {
	_, err := conn.ExecContext(ctx, `SELECT pg_advisory_unlock($1)`, l.id())
	return err
}
