package tenancy

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"path"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
	"github.com/pressly/goose/v3/lock"
	"golang.org/x/sync/errgroup"
)

// Migrator brings tenants' schemas to the service's version with goose. It is safe for
// concurrent use, also by several nodes: a tenant is migrated by one at a time.
//
// Migrations run logged in as the tenant's owner, with a password made for the run: never on a
// provisioner's session, where a trigger planted by the tenant would inherit its rights.
type Migrator struct{ tn *Tenancy }

// Migrated is what one tenant's migration did.
type Migrated struct {
	Tenant  Tenant
	Version int64 // after the run
	Applied []int64
	Err     error // nil when the tenant is up to date
}

// MigrateError is the error of a run over many tenants: every tenant's own result.
type MigrateError struct{ Results []Migrated }

func (e *MigrateError) Error() string {
	failed := 0
	var first error
	for _, r := range e.Results {
		if r.Err != nil {
			failed++
			if first == nil {
				first = r.Err
			}
		}
	}
	return fmt.Sprintf("tenancy: migrate: %d of %d tenants failed, the first with: %v", failed, len(e.Results), first)
}

// Unwrap returns the errors of the tenants that failed.
func (e *MigrateError) Unwrap() []error {
	var errs []error
	for _, r := range e.Results {
		if r.Err != nil {
			errs = append(errs, r.Err)
		}
	}
	return errs
}

// Tenant migrates one tenant to the newest version and waits for it. Cancelling ctx ends the run between or within
// statements; what was committed stays, and a second call goes on from there.
//
// A tenant with [IsolationShared] has its tables with others: all those of its server are migrated at once, and the Create of another one
// does it too. Applied then says what this call has applied.
//
// The error is [ErrTenantNotFound], [ErrTenantGone], [ErrNoProvisioner], [ErrNoMigrations], [ErrPrimaryUnavailable] or that of the migration.
func (m *Migrator) Tenant(ctx context.Context, id ID) (Migrated, error) {
	return m.tenant(ctx, id, nil)
}

func (m *Migrator) tenant(ctx context.Context, id ID, failed failedAreas) (Migrated, error) {
	const op = "migrate"
	ctx, release, err := m.tn.primary.lockTenant(ctx, id)
	if err != nil {
		return Migrated{}, &Error{Op: op, Tenant: id, Err: err}
	}
	defer release()
	p, err := m.tn.catalog.place(ctx, id)
	if err != nil {
		return Migrated{}, &Error{Op: op, Tenant: id, Err: err}
	}
	done := Migrated{Tenant: p.tenant, Version: p.version}
	switch p.tenant.State {
	case StateDeleted, StatePurged:
		return done, &Error{Op: op, Tenant: id, Name: p.tenant.Name, Err: ErrTenantGone}
	case StateProvisioning: // its Create migrates it
		return done, &Error{Op: op, Tenant: id, Name: p.tenant.Name, Err: ErrTenantNotReady}
	}
	finished, err := m.tn.slot(ctx)
	if err != nil {
		return done, &Error{Op: op, Tenant: id, Name: p.tenant.Name, Err: err}
	}
	defer finished()
	done.Applied, err = m.tn.catalog.migratePlace(ctx, p, failed)
	done.Version = p.version
	if err != nil {
		done.Err = &Error{Op: op, Tenant: id, Name: p.tenant.Name, Err: err}
		return done, done.Err
	}
	return done, nil
}

// All migrates every tenant that was made and is not deleted, Limits.Provisions at a time, and goes on past
// those that fail. The results are in order of ID; when one failed, the error is a [*MigrateError] with the same results.
func (m *Migrator) All(ctx context.Context) ([]Migrated, error) {
	var ids []ID
	for t, err := range m.tn.catalog.Tenants(ctx, Filter{}) {
		if err != nil {
			return nil, err
		}
		switch t.State {
		case StateActive, StateSuspended, StateMaintenance:
			ids = append(ids, t.ID)
		}
	}
	results, failed := make([]Migrated, len(ids)), failedAreas{}
	var g errgroup.Group
	g.SetLimit(m.tn.cfg.Limits.Provisions)
	for i, id := range ids {
		g.Go(func() error {
			var err error
			results[i], err = m.tenant(ctx, id, failed)
			results[i].Err = err
			return nil // a tenant's failure is data, not the end of the run
		})
	}
	_ = g.Wait()
	if slices.ContainsFunc(results, func(r Migrated) bool { return r.Err != nil }) {
		return results, &MigrateError{Results: results}
	}
	return results, nil
}

// migrations is one set of goose migrations.
type migrations struct {
	files  fs.FS // *.sql at its root; nil: none
	code   []GoMigration
	reader string // the role that may read the version table and not write it; "": none
	guard  string // the table of the schema that a run locks; "": it takes an advisory lock
}

func (m migrations) empty() bool { return m.files == nil && len(m.code) == 0 }

// serviceMigrations finds the service's files at the root of fsys or in its one subdirectory
// that has any, which is the shape that go:embed gives.
func serviceMigrations(fsys fs.FS, code []GoMigration) (migrations, error) {
	m := migrations{code: code}
	if fsys == nil {
		return m, nil
	}
	found := map[string]bool{}
	for _, pattern := range []string{"*.sql", "*/*.sql"} {
		names, err := fs.Glob(fsys, pattern)
		if err != nil {
			return m, err
		}
		for _, name := range names {
			found[path.Dir(name)] = true
		}
	}
	switch {
	case found["."]:
		m.files = fsys
	case len(found) == 1:
		for dir := range found {
			sub, err := fs.Sub(fsys, dir)
			if err != nil {
				return m, err
			}
			m.files = sub
		}
	case len(found) > 1:
		return m, invalid(errors.New("Config.Migrations has .sql files in several directories and none at its root: choose one with fs.Sub"))
	default:
		return m, invalid(errors.New("Config.Migrations has no .sql file at its root or in a subdirectory: check the go:embed pattern"))
	}
	if _, err := newRun(nil, "check", m); err != nil {
		return m, invalid(fmt.Errorf("Config.Migrations: %w", err))
	}
	return m, nil
}

const versionTable = "goose_db_version"

// newest is the version that the migrations lead to.
func (m migrations) newest() (version int64, err error) {
	if m.empty() {
		return 0, errNoMigrations
	}
	r, err := newRun(nil, "check", m)
	if err != nil {
		return 0, err
	}
	for _, s := range r.provider.ListSources() {
		version = max(version, s.Version)
	}
	return version, nil
}

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
	var locker lock.SessionLocker = schemaLock{schema}
	if m.guard != "" {
		locker = &ownerLock{db: db, table: ident.Quote(schema, m.guard)}
	}
	provider, err := goose.NewProvider("", db, m.files,
		goose.WithStore(store),
		goose.WithSessionLocker(locker),
		goose.WithGoMigrations(code...),
		goose.WithDisableGlobalRegistry(true),
	)
	if err != nil {
		return nil, err
	}
	return &run{provider: provider, store: store, db: db}, nil
}

// up applies what is pending and returns the versions applied, also when a later one failed.
func (r *run) up(ctx context.Context) ([]int64, error) {
	results, err := r.provider.Up(ctx)
	if partial, ok := errors.AsType[*goose.PartialError](err); ok {
		results = partial.Applied
		err = fmt.Errorf("migration %d: %w", partial.Failed.Source.Version, partial.Err)
	}
	applied := make([]int64, len(results))
	for i, res := range results {
		applied[i] = res.Source.Version
	}
	return applied, withoutSecrets(err)
}

// version returns the newest applied version, 0 when none is.
func (r *run) version(ctx context.Context) (int64, error) {
	conn, err := r.db.Conn(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	there, err := r.store.(database.StoreExtender).TableExists(ctx, conn)
	if err != nil || !there {
		return 0, err
	}
	version, err := r.store.GetLatestVersion(ctx, conn)
	if errors.Is(err, database.ErrVersionNotFound) {
		return 0, nil
	}
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
