package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// FleetStatus is where the tenants that were made and are not deleted stand, as the catalog has recorded it. Lists are in order of ID.
type FleetStatus struct {
	Newest   int64          // the version that the service's migrations lead to
	Tenants  int            // how many there are
	Versions map[int64]int  // how many are at each version
	Behind   []TenantStatus // below Newest, those apart that are where they are pinned
	Ahead    []TenantStatus // above Newest: migrated by a newer release
	Dirty    []TenantStatus // with a migration that has died half-way
	Pinned   []TenantStatus
}

// TenantStatus is where one tenant stands.
type TenantStatus struct {
	Tenant  Tenant
	Version int64
	Pinned  int64 // the version that it does not go beyond; 0: none
	Dirty   int64 // the version that has died half-way, on its way up or back; 0: none
}

// Status says where all tenants stand, by one query of the primary. What is being migrated at the moment is not dirty.
// The error is [ErrNoMigrations] or [ErrPrimaryUnavailable].
func (m *Migrator) Status(ctx context.Context) (FleetStatus, error) {
	const op = "migration status"
	s := FleetStatus{Newest: m.tn.migrations.newest(), Versions: map[int64]int{}}
	if m.tn.migrations.empty() {
		return s, &Error{Op: op, Err: errNoMigrations}
	}
	fleet, err := m.fleet(ctx, nil)
	if err != nil {
		return s, &Error{Op: op, Err: err}
	}
	s.Tenants = len(fleet)
	alone := m.tn.migrations.alone()
	for _, t := range fleet {
		s.Versions[t.version]++
		at := TenantStatus{Tenant: t.tenant, Version: t.version, Pinned: t.pinned}
		_, known := m.tn.migrations.find(max(t.migrating, -t.migrating))
		if v := max(t.migrating, -t.migrating); v != 0 && !t.running && (!known || slices.Contains(alone, v)) {
			at.Dirty = v
			s.Dirty = append(s.Dirty, at)
		}
		switch {
		case t.version > s.Newest:
			s.Ahead = append(s.Ahead, at)
		case t.version < t.upTo(s.Newest):
			s.Behind = append(s.Behind, at)
		}
		if t.pinned > 0 {
			s.Pinned = append(s.Pinned, at)
		}
	}
	return s, nil
}

// standing is one tenant of the fleet, as the catalog has it.
type standing struct {
	tenant    Tenant
	server    int64
	version   int64
	migrating int64
	pinned    int64
	made      bool  // its schema is as it must be
	running   bool  // a verb is at work on it, which may be the one that is migrating
	drifted   bool  // version is that of the schema, and not the recorded one
	err       error // it cannot be migrated
}

func (t standing) upTo(version int64) int64 { return (&place{pinned: t.pinned}).upTo(version) }

// fleet reads the tenants: those with a schema to migrate, or those of the list, of which each has an entry.
func (m *Migrator) fleet(ctx context.Context, ids []ID) ([]standing, error) {
	db := m.tn.primary
	// Whether a verb has the lock of primaryDB.lockTenant, or that of Catalog.lockArea, is asked of the few only that are marked.
	rows, _ := db.pool.Query(ctx, `SELECT `+tenantColumns+`, coalesce(d.server, 0), coalesce(a.version, d.version, 0), coalesce(a.migrating, d.migrating, 0), coalesce(t.pinned, 0), coalesce(a.state, 'made') = 'made',
		CASE WHEN coalesce(a.migrating, d.migrating) IS NULL THEN false ELSE EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
			AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
			AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended(CASE WHEN a.server IS NULL THEN 'tenancy tenant ' || t.id ELSE 'tenancy area ' || a.server END, 0)) END
		FROM tenancy.tenants t LEFT JOIN tenancy.data_sources d ON d.id = t.data_source LEFT JOIN tenancy.shared_areas a ON d.isolation = 'shared' AND a.server = d.server
		WHERE CASE WHEN $1::bigint[] IS NULL THEN t.state IN ('active', 'suspended', 'maintenance') ELSE t.id = ANY($1) END ORDER BY t.id`, ids)
	fleet, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t standing, err error) {
		t.tenant, err = db.scanTenant(row, &t.server, &t.version, &t.migrating, &t.pinned, &t.made, &t.running)
		t.err = migratable(t.tenant.State)
		return t, err
	})
	if err != nil {
		return nil, unavailable("read tenants", err)
	}
	wanted := slices.Sorted(slices.Values(ids))
	for _, id := range slices.Compact(wanted) {
		if !slices.ContainsFunc(fleet, func(t standing) bool { return t.tenant.ID == id }) {
			fleet = append(fleet, standing{tenant: Tenant{ID: id}, err: ErrTenantNotFound})
		}
	}
	slices.SortFunc(fleet, func(a, b standing) int { return int(a.tenant.ID - b.tenant.ID) })
	return fleet, nil
}

// VersionDrift is a tenant whose schema is not at the version that the catalog has recorded: it was restored from a backup, or somebody ran goose by hand.
type VersionDrift struct {
	Tenant   Tenant
	Recorded int64
	Actual   int64   // the newest version that was applied in the schema
	Missing  []int64 // migrations of the service below Actual that were never applied there; a run refuses such a tenant, until they are renumbered or applied by hand
	Err      error   // not nil: the schema could not be asked
}

// Verify asks the tenants' schemas for their versions, all tenants by default, and returns those with another one than is recorded, in order of ID. It takes one session for
// each database with tenants' schemas, and none for each tenant. It changes nothing: [Migrator.Run] with Verify does.
//
// The error is [ErrNoMigrations] or [ErrPrimaryUnavailable]. A tenant whose schema could not be asked is one of those returned.
func (m *Migrator) Verify(ctx context.Context, tenants ...ID) ([]VersionDrift, error) {
	const op = "verify versions"
	if m.tn.migrations.empty() {
		return nil, &Error{Op: op, Err: errNoMigrations}
	}
	ctx, err := begin(ctx)
	if err != nil {
		return nil, &Error{Op: op, Err: err}
	}
	fleet, err := m.fleet(ctx, tenants)
	if err != nil {
		return nil, &Error{Op: op, Err: err}
	}
	drifts, err := m.verify(ctx, fleet)
	if err != nil {
		return nil, &Error{Op: op, Err: err}
	}
	return drifts, nil
}

// province is the tenants' schemas in one database.
type province struct {
	server   int64
	database string
}

func (m *Migrator) verify(ctx context.Context, fleet []standing) ([]VersionDrift, error) {
	ids := make([]ID, len(fleet))
	for i, t := range fleet {
		ids[i] = t.tenant.ID
	}
	rows, _ := m.tn.primary.pool.Query(ctx, `SELECT t.id, d.server, d.database, d.schema FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source WHERE t.id = ANY($1)`, ids)
	schemaOf, schemas := map[ID]string{}, map[province][]string{}
	var id ID
	var at province
	var schema string
	if _, err := pgx.ForEachRow(rows, []any{&id, &at.server, &at.database, &schema}, func() error {
		schemaOf[id] = schema
		schemas[at] = append(schemas[at], schema)
		return nil
	}); err != nil {
		return nil, unavailable("read places", err)
	}
	done, err := m.tn.primary.verb(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	found := map[string]versions{}
	for at, some := range schemas {
		m.askSchemas(ctx, at, slices.Compact(slices.Sorted(slices.Values(some))), found)
	}
	var drifts []VersionDrift
	for _, t := range fleet {
		if t.err != nil {
			drifts = append(drifts, VersionDrift{Tenant: t.tenant, Recorded: t.version, Err: t.err})
			continue
		}
		if d := m.drift(t, found[schemaOf[t.tenant.ID]]); d.Err != nil || d.Actual != d.Recorded || len(d.Missing) > 0 {
			drifts = append(drifts, d)
		}
	}
	return drifts, nil
}

// versions are those that a schema has.
type versions struct {
	applied []int64
	err     error
}

func (m *Migrator) drift(t standing, v versions) VersionDrift {
	d := VersionDrift{Tenant: t.tenant, Recorded: t.version, Err: v.err}
	if len(v.applied) > 0 {
		d.Actual = slices.Max(v.applied)
	}
	for _, f := range m.tn.migrations.between(0, d.Actual) {
		if !slices.Contains(v.applied, f.Version) {
			d.Missing = append(d.Missing, f.Version)
		}
	}
	return d
}

// schemasAtOnce is how many tables one statement reads: each takes a lock of those that a server has for all.
const schemasAtOnce = 100

// askSchemas writes into found what the schemas of one database have.
func (m *Migrator) askSchemas(ctx context.Context, at province, schemas []string, found map[string]versions) {
	fail := func(schemas []string, err error) {
		for _, s := range schemas {
			found[s] = versions{err: err}
		}
	}
	conn, err := m.provisionerOf(ctx, at)
	if err != nil {
		fail(schemas, err)
		return
	}
	defer closeConn(conn)
	for some := range slices.Chunk(schemas, schemasAtOnce) {
		if err := asOwners(ctx, conn, some, func(tx pgx.Tx) error { return readVersions(ctx, tx, some, found) }); err != nil {
			if len(some) > 1 && ctx.Err() == nil { // one that is locked holds up nobody else
				for _, s := range some {
					if err := asOwners(ctx, conn, []string{s}, func(tx pgx.Tx) error { return readVersions(ctx, tx, []string{s}, found) }); err != nil {
						fail([]string{s}, fmt.Errorf("read versions: %w", withoutSecrets(err)))
					}
				}
				continue
			}
			fail(some, fmt.Errorf("read versions: %w", withoutSecrets(err)))
		}
	}
}

// asOwners runs fn in a transaction that may only read, with the provisioner a member of the schemas' owners. It is rolled back, so that nobody else sees the memberships.
func asOwners(ctx context.Context, conn *pgx.Conn, schemas []string, fn func(tx pgx.Tx) error) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	rows, _ := tx.Query(ctx, `SELECT DISTINCT r.rolname::text FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner
		WHERE n.nspname = ANY($1) AND r.rolname ~ '^t_[0-9a-f]{20}_o$' AND NOT pg_has_role(r.oid, 'USAGE') ORDER BY 1`, schemas)
	owners, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	if len(owners) > 0 {
		if _, err := tx.Exec(ctx, grantMemberships(conn, owners)); err != nil {
			return err
		}
	}
	if _, err := tx.Exec(ctx, "SET TRANSACTION READ ONLY"); err != nil {
		return err
	}
	return fn(tx)
}

func (m *Migrator) provisionerOf(ctx context.Context, at province) (*pgx.Conn, error) {
	db := m.tn.primary
	var sealed []byte
	if err := db.pool.QueryRow(ctx, `SELECT provisioner FROM tenancy.servers WHERE id = $1`, at.server).Scan(&sealed); err != nil {
		return nil, unavailable("read servers", err)
	}
	if sealed == nil {
		return nil, errNoProvisioner
	}
	d, err := db.openSource(UID(db.realm.Value()), "provisioner", sealed)
	if err != nil {
		return nil, err
	}
	def(&at.database, d.Database)
	d.Database = at.database
	return connectProvisioner(ctx, m.tn.servers, d)
}

// plainTables are those of the schemas' version tables of which nothing but the server's own code runs when they are read: the session is the provisioner's, and the tables
// are their owners'. Neither a view nor a policy is one, nor a type with a cast of somebody's, nor an index with an expression, which the planner looks at.
const plainTables = `SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
	WHERE n.nspname = ANY($1) AND c.relname = '` + versionTable + `' AND c.relkind = 'r' AND NOT c.relrowsecurity
	AND 2 = (SELECT count(*) FROM pg_attribute a WHERE a.attrelid = c.oid AND (a.attname = 'version_id' AND a.atttypid = 'bigint'::regtype OR a.attname = 'is_applied' AND a.atttypid = 'boolean'::regtype))
	AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL))
	AND NOT EXISTS (SELECT FROM pg_statistic_ext s WHERE s.stxrelid = c.oid) ORDER BY 1`

// readVersions asks twice what the tables are: after the second time they are locked, against changes of what they are, too.
func readVersions(ctx context.Context, tx pgx.Tx, schemas []string, found map[string]versions) error {
	tables := func(schemas []string) ([]string, error) {
		rows, _ := tx.Query(ctx, plainTables, schemas)
		return pgx.CollectRows(rows, pgx.RowTo[string])
	}
	for _, s := range schemas {
		found[s] = versions{err: errors.New("it has no table " + versionTable + " as goose makes it")}
	}
	plain, err := tables(schemas)
	if err != nil || len(plain) == 0 {
		return err
	}
	names := make([]string, len(plain))
	for i, s := range plain {
		names[i] = ident.Quote(s, versionTable)
	}
	if _, err := tx.Exec(ctx, "LOCK TABLE "+strings.Join(names, ", ")+" IN SHARE UPDATE EXCLUSIVE MODE"); err != nil {
		return err
	}
	locked, err := tables(plain)
	if err != nil {
		return err
	}
	selects := make([]string, len(locked))
	for i, s := range locked {
		selects[i] = "SELECT " + ident.Literal(s) + ", array_agg(version_id) FROM ONLY " + ident.Quote(s, versionTable) + " WHERE is_applied"
	}
	if len(selects) == 0 {
		return nil
	}
	rows, err := tx.Query(ctx, strings.Join(selects, "\nUNION ALL "), pgx.QueryExecModeExec)
	if err != nil {
		return err
	}
	var schema string
	var applied []int64
	_, err = pgx.ForEachRow(rows, []any{&schema, &applied}, func() error {
		found[schema] = versions{applied: slices.Clone(applied)}
		return nil
	})
	return err
}
