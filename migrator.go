package tenancy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// Migrator brings tenants' schemas to the service's version with goose. It is safe for
// concurrent use, also by several nodes: a tenant is migrated by one at a time.
//
// Migrations run logged in as the tenant's owner, with a password made for the run: never on a
// provisioner's session, where a trigger planted by the tenant would inherit its rights. They have a lock_timeout: behind a statement that
// waits for a lock all of the tenant's own calls wait, so it gives up after 2 s and the migration is tried again.
//
// A file that says NO TRANSACTION is marked in the primary before it begins. One that died leaves the tenant dirty, with [ErrMigrationDirty] for everyone who migrates it, until [Migrator.Resolve].
// It waits for locks without a try after the other: keep statements that lock a table in use out of such files.
type Migrator struct{ tn *Tenancy }

// MigrateOptions say what [Migrator.Run] migrates and how. The zero value is that of [Migrator.All].
type MigrateOptions struct {
	// Tenants are those to migrate. Default: all that were made and are not deleted.
	Tenants []ID
	// UpTo is the version to stop at. Who is beyond it stays there. Default: the newest.
	UpTo int64
	// Parallel is how many are migrated at once, at most as many as this node's budget of connections has verbs for (Limits.ServerConns). Default: Limits.Provisions,
	// together with what else this node makes and migrates.
	Parallel int
	// Canary are tenants that are migrated first: unless all of them succeed, no other one is begun. CanaryPercent takes the first of those with something to do for
	// that, rounded up. Default: none.
	Canary        []ID
	CanaryPercent int
	// StopAfter is the number of failures after which no tenant is begun any more. Default: 0, never.
	StopAfter int
	// LockPatience is how long a tenant's migration tries to get the locks that it needs. Default: 30 s.
	LockPatience time.Duration
	// DryRun has nothing done: the results say in Pending what would be.
	DryRun bool
	// Verify has the schemas themselves asked for their versions first, as [Migrator.Verify] does. Default: the version that the catalog has recorded counts.
	Verify bool
	// Progress is told of each tenant that was migrated, has failed or was not begun, one at a time, and before the first: it should not block. It is not called in a dry run. Default: nobody is told.
	Progress func(MigrateProgress)
}

// MigrateProgress is where a run stands.
type MigrateProgress struct {
	Total    int // tenants with something to do, those included that cannot be migrated
	Done     int // up to date by now
	Failed   int
	NotBegun int
	Last     Migrated // the tenant that ended last; zero before the first
}

// Migration is one of the service's.
type Migration struct {
	Version       int64
	File          string // its name; "": it is code
	NoTransaction bool   // nothing rolls it back when it dies

	down  bool // there is a way back
	calls bool // it can call a function of the library's
}

// Migrated is what one tenant's migration did.
type Migrated struct {
	Tenant   Tenant
	Version  int64 // after the run
	Applied  []int64
	Reverted int64         // what [Migrator.Down] took back; 0: nothing
	Pending  []Migration   // in a dry run, what would be applied
	Drift    *VersionDrift // what MigrateOptions.Verify has found before; nil: nothing
	Err      error         // nil when the tenant is up to date; [ErrNotBegun] where the run was stopped before
}

// MigrateError is the error of a run over many tenants: every tenant's own result.
type MigrateError struct{ Results []Migrated }

func (e *MigrateError) Error() string {
	failed := e.Unwrap()
	stopped := len(e.of(func(err error) bool { return errors.Is(err, ErrNotBegun) }))
	text := fmt.Sprintf("tenancy: migrate: %d of %d tenants failed", len(failed), len(e.Results))
	if stopped > 0 {
		text += fmt.Sprintf(", %d were not begun", stopped)
	}
	if len(failed) > 0 {
		text += fmt.Sprintf(", the first with: %v", failed[0])
	}
	return text
}

// Unwrap returns the errors of the tenants that failed, without those that were not begun.
func (e *MigrateError) Unwrap() []error {
	return e.of(func(err error) bool { return !errors.Is(err, ErrNotBegun) })
}

func (e *MigrateError) of(kind func(error) bool) (errs []error) {
	for _, r := range e.Results {
		if r.Err != nil && kind(r.Err) {
			errs = append(errs, r.Err)
		}
	}
	return errs
}

// Tenant migrates one tenant to the newest version, or to where it is pinned, and waits for it. It looks at the schema, whatever version is recorded. Cancelling ctx ends the
// run between or within statements; what was committed stays, and a second call goes on from there.
//
// A tenant with [IsolationShared] has its tables with others: all those of its server are migrated at once, and the Create of another one
// does it too. Applied then says what this call has applied.
//
// The error is [ErrTenantNotFound], [ErrTenantGone], [ErrTenantNotReady], [ErrNoProvisioner], [ErrNoMigrations], [ErrMigrationDirty], [ErrPrimaryUnavailable] or that of the migration.
func (m *Migrator) Tenant(ctx context.Context, id ID) (Migrated, error) {
	e := m.tn.newest()
	return m.at(ctx, opMigrate, id, e, func(ctx context.Context, p *place) (done Migrated, err error) {
		e.look = p.isolation != IsolationShared
		done.Applied, err = m.tn.catalog.migratePlace(ctx, p, e)
		return done, err
	})
}

// All is [Migrator.Run] for every tenant that was made and is not deleted.
func (m *Migrator) All(ctx context.Context) ([]Migrated, error) {
	return m.Run(ctx, MigrateOptions{})
}

// Run migrates many tenants, several at a time, and goes on past those that fail. To whom the catalog has recorded the version nobody connects. Tenants that are
// pinned go no further than that. Called again it goes on with what is left; two runs at once share the tenants, and none is migrated twice.
//
// One tenant with [IsolationShared] stands for all of its server, also where the others are not among Tenants: they have one schema. It counts as one
// for Parallel and StopAfter.
//
// The results are in order of ID, one for each tenant of the run. When one failed, the error is a [*MigrateError] with the same results. Otherwise it is
// [ErrInvalid], [ErrNoMigrations] or [ErrPrimaryUnavailable], and nothing was done. Cancelling ctx ends what is under way as in [Migrator.Tenant], and begins no other.
func (m *Migrator) Run(ctx context.Context, o MigrateOptions) ([]Migrated, error) {
	fail := func(err error) ([]Migrated, error) { return nil, &Error{Op: opMigrate, Err: err} }
	if err := m.check(&o); err != nil {
		return fail(err)
	}
	ctx, err := begin(ctx)
	if err != nil {
		return fail(err)
	}
	fleet, err := m.fleet(ctx, o.Tenants)
	if err != nil {
		return fail(err)
	}
	r := &round{m: m, o: o, fleet: fleet, results: make([]Migrated, len(fleet))}
	if o.Verify {
		if err := r.verify(ctx); err != nil {
			return fail(err)
		}
	}
	pending := r.plan()
	if o.DryRun {
		return r.end()
	}
	canary, rest, err := r.split(pending)
	if err != nil {
		return fail(err)
	}
	r.progress.Failed = int(r.failures.Load())
	r.progress.Total = len(pending) + r.progress.Failed
	if o.Progress != nil {
		o.Progress(r.progress)
	}
	if r.wave(ctx, canary); r.canaryFailed(canary) {
		r.o.StopAfter = 1
	}
	r.wave(ctx, rest)
	return r.end()
}

const opMigrate = "migrate"

// check fills in the defaults, and names the first option that cannot be.
func (m *Migrator) check(o *MigrateOptions) error {
	if m.tn.migrations.empty() {
		return errNoMigrations
	}
	newest, most := m.tn.migrations.newest(), cap(m.tn.primary.verbs)
	def(&o.UpTo, newest)
	def(&o.LockPatience, lockPatience)
	_, known := m.tn.migrations.find(o.UpTo)
	switch {
	case !known:
		return invalid(fmt.Errorf("MigrateOptions.UpTo is %d: the service has no migration of that version; the newest is %d", o.UpTo, newest))
	case o.Parallel < 0 || o.Parallel > most:
		return invalid(fmt.Errorf("MigrateOptions.Parallel is %d: from 1 to %d, for which this node's Limits.ServerConns has connections", o.Parallel, most))
	case o.CanaryPercent < 0 || o.CanaryPercent > 100:
		return invalid(fmt.Errorf("MigrateOptions.CanaryPercent is %d: from 0 to 100", o.CanaryPercent))
	case o.CanaryPercent > 0 && o.Canary != nil:
		return invalid(errors.New("MigrateOptions has Canary and CanaryPercent: give one"))
	case o.StopAfter < 0:
		return invalid(fmt.Errorf("MigrateOptions.StopAfter is %d: at least 0", o.StopAfter))
	case o.LockPatience < 0:
		return invalid(fmt.Errorf("MigrateOptions.LockPatience is %v: above 0", o.LockPatience))
	case o.Tenants != nil && len(o.Tenants) == 0:
		return invalid(errors.New("MigrateOptions.Tenants is an empty list: nil means all"))
	}
	return nil
}

// round is one Run.
type round struct {
	m        *Migrator
	o        MigrateOptions
	fleet    []standing // in order of ID
	results  []Migrated
	failures atomic.Int64

	mu       sync.Mutex // guards progress, and is held while it is told
	progress MigrateProgress
}

// tell says that the tenant at i has its result.
func (r *round) tell(i int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	res := r.results[i]
	switch {
	case res.Err == nil:
		r.progress.Done++
	case errors.Is(res.Err, ErrNotBegun):
		r.progress.NotBegun++
	default:
		r.progress.Failed++
	}
	if r.progress.Last = res; r.o.Progress != nil {
		r.o.Progress(r.progress)
	}
}

// verify asks the schemas. What it finds is in the results; the fleet has what is true.
func (r *round) verify(ctx context.Context) error {
	drifts, err := r.m.verify(ctx, r.fleet)
	if err != nil {
		return err
	}
	at := map[ID]int{}
	for i, t := range r.fleet {
		at[t.tenant.ID] = i
	}
	for _, d := range drifts {
		t := &r.fleet[at[d.Tenant.ID]]
		r.results[at[d.Tenant.ID]].Drift = &d
		if d.Err != nil {
			t.err = d.Err
			continue
		}
		t.version, t.drifted = d.Actual, true
	}
	return nil
}

// plan writes into the results what is known before anything is done, and returns whose tenants' turn it is.
func (r *round) plan() (pending []int) {
	for i, t := range r.fleet {
		res := &r.results[i]
		res.Tenant, res.Version = t.tenant, t.version
		to := t.upTo(r.o.UpTo)
		switch {
		case t.err != nil:
			res.Err = &Error{Op: opMigrate, Tenant: t.tenant.ID, Name: t.tenant.Name, Err: t.err}
			r.failures.Add(1)
		case t.version < to || t.migrating != 0 || t.drifted || !t.made:
			pending = append(pending, i)
			if r.o.DryRun {
				res.Pending = r.m.tn.migrations.between(t.version, to)
			}
		}
	}
	return pending
}

// split takes the canaries out of those whose turn it is.
func (r *round) split(pending []int) (canary, rest []int, err error) {
	if r.o.CanaryPercent > 0 {
		n := (len(pending)*r.o.CanaryPercent + 99) / 100
		return pending[:n], pending[n:], nil
	}
	for _, id := range r.o.Canary {
		if !slices.ContainsFunc(r.fleet, func(t standing) bool { return t.tenant.ID == id }) {
			return nil, nil, invalid(fmt.Errorf("MigrateOptions.Canary: tenant id %d is not one of the run", id))
		}
	}
	for _, i := range pending {
		if slices.Contains(r.o.Canary, r.fleet[i].tenant.ID) {
			canary = append(canary, i)
		} else {
			rest = append(rest, i)
		}
	}
	return canary, rest, nil
}

// canaryFailed looks at the canaries whose turn it was, and at those that could not have one.
func (r *round) canaryFailed(canary []int) bool {
	for i, res := range r.results {
		if res.Err != nil && (slices.Contains(canary, i) || slices.Contains(r.o.Canary, res.Tenant.ID)) {
			return true
		}
	}
	return false
}

// wave migrates those tenants.
func (r *round) wave(ctx context.Context, tenants []int) {
	var units [][]int // each of one schema
	areas := map[int64]int{}
	for _, i := range tenants {
		t := r.fleet[i]
		if t.tenant.Isolation != IsolationShared {
			units = append(units, []int{i})
		} else if n, known := areas[t.server]; known {
			units[n] = append(units[n], i)
		} else {
			areas[t.server] = len(units)
			units = append(units, []int{i})
		}
	}
	parallel := r.o.Parallel
	def(&parallel, r.m.tn.cfg.Limits.Provisions)
	var next atomic.Int64
	var workers errgroup.Group
	for range min(parallel, len(units)) {
		workers.Go(func() error {
			w := &worker{}
			defer w.close()
			for i := int(next.Add(1)) - 1; i < len(units); i = int(next.Add(1)) - 1 {
				r.turn(ctx, units[i], w)
			}
			return nil
		})
	}
	_ = workers.Wait()
	r.m.tn.feed.catchUp(ctx)
}

// turn is the unit's. A tenant's failure is data, not the end of the run.
func (r *round) turn(ctx context.Context, unit []int, w *worker) {
	if err := r.stopped(ctx); err != nil {
		for _, i := range unit {
			t := r.results[i].Tenant
			r.results[i].Err = &Error{Op: opMigrate, Tenant: t.ID, Name: t.Name, Err: err}
		}
	} else if !r.migrate(ctx, unit, w) {
		r.failures.Add(1)
		w.close() // its sessions may be what failed
	}
	for _, i := range unit {
		r.tell(i)
	}
}

// stopped says why no other tenant is begun.
func (r *round) stopped(ctx context.Context) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ErrNotBegun, context.Cause(ctx))
	}
	if failed := r.failures.Load(); r.o.StopAfter > 0 && failed >= int64(r.o.StopAfter) {
		return hinted(ErrNotBegun, "%d have failed; mend what they say and call it again", failed)
	}
	return nil
}

// migrate migrates the schema of the unit. Where it has several tenants, the first one stands for them, unless something is wrong with that tenant itself.
func (r *round) migrate(ctx context.Context, unit []int, w *worker) (ok bool) {
	ok = true
	for n, i := range unit {
		e := &errand{to: r.o.UpTo, patience: r.o.LockPatience, look: r.fleet[i].drifted, worker: w, crowded: r.o.Parallel > 0}
		done, err := r.m.tenant(ctx, r.fleet[i].tenant.ID, e)
		res := &r.results[i]
		res.Version, res.Applied, res.Err = done.Version, done.Applied, err
		if done.Tenant.ID != 0 {
			res.Tenant = done.Tenant
		}
		ok = ok && err == nil
		if err != nil && e.area == nil {
			continue
		}
		for _, other := range unit[n+1:] {
			res := &r.results[other]
			res.Version = done.Version
			if err != nil {
				res.Err = &Error{Op: opMigrate, Tenant: res.Tenant.ID, Name: res.Tenant.Name, Err: e.area}
			}
		}
		return ok
	}
	return ok
}

func (r *round) end() ([]Migrated, error) {
	if slices.ContainsFunc(r.results, func(m Migrated) bool { return m.Err != nil }) {
		return r.results, &MigrateError{Results: r.results}
	}
	return r.results, nil
}

// tenant is the migration of one tenant.
func (m *Migrator) tenant(ctx context.Context, id ID, e *errand) (done Migrated, err error) {
	return m.at(ctx, opMigrate, id, e, func(ctx context.Context, p *place) (done Migrated, err error) {
		done.Applied, err = m.tn.catalog.migratePlace(ctx, p, e)
		return done, err
	})
}

// at runs fn on the tenant's place, alone among all nodes. Err of what it returns is the error, too.
func (m *Migrator) at(ctx context.Context, op string, id ID, e *errand, fn func(ctx context.Context, p *place) (Migrated, error)) (done Migrated, err error) {
	var name string
	defer func() {
		if err != nil {
			err = &Error{Op: op, Tenant: id, Name: name, Err: err}
			done.Err = err
		}
	}()
	ctx, release, err := e.worker.lockTenant(ctx, m.tn.primary, id)
	if err != nil {
		return done, err
	}
	defer release()
	p, err := m.tn.catalog.place(ctx, id)
	if err != nil {
		return done, err
	}
	name = p.tenant.Name
	done = Migrated{Tenant: p.tenant, Version: p.version}
	if err := migratable(p.tenant.State); err != nil && (op != opResolve || p.tenant.State != StateProvisioning) {
		return done, err
	}
	if !e.crowded {
		finished, err := m.tn.slot(ctx)
		if err != nil {
			return done, err
		}
		defer finished()
	}
	done, err = fn(ctx, p)
	done.Tenant, done.Version = p.tenant, p.version
	return done, err
}

// migratable says whether a tenant of the state has a schema to migrate.
func migratable(s State) error {
	switch s {
	case StateActive, StateSuspended, StateMaintenance:
		return nil
	case StateProvisioning: // its Create migrates it
		return ErrTenantNotReady
	}
	return ErrTenantGone
}

// Down takes the newest migration of one tenant back, by its Down. The version is what the schema has, also where the service's newest is above it. The next run applies it again, unless the
// tenant is pinned before.
//
// The error is that of [Migrator.Tenant], and [ErrInvalid] where there is no way back: the service does not know the migration, it has no Down, or the tenant's tables are others' too ([IsolationShared]).
func (m *Migrator) Down(ctx context.Context, id ID) (Migrated, error) {
	const op = "migrate down"
	c := m.tn.catalog
	return m.at(ctx, op, id, &errand{}, func(ctx context.Context, p *place) (done Migrated, err error) {
		switch {
		case m.tn.migrations.empty():
			return done, errNoMigrations
		case p.isolation == IsolationShared:
			return done, invalid(fmt.Errorf("isolation: the tables of a tenant with %q are those of others, too: write a migration that takes it back", IsolationShared))
		}
		err = c.lendOwner(ctx, p, nil, func(ctx context.Context, cc *pgx.ConnConfig) (err error) {
			done.Reverted, err = c.revert(ctx, cc, p)
			return err
		})
		if done.Reverted > 0 || p.marked {
			err = errors.Join(err, c.recordVersion(context.WithoutCancel(ctx), p))
			m.tn.feed.catchUp(ctx)
		}
		return done, err
	})
}

// revert takes the newest migration back. It is marked before, because a version that is lower than the recorded one would be seen by nobody.
func (c *Catalog) revert(ctx context.Context, cc *pgx.ConnConfig, p *place) (reverted int64, err error) {
	if err := c.withGoose(ctx, cc, p, false, lockTimeout, func(r *run) error { return c.settle(ctx, r, p) }); err != nil {
		return 0, err
	}
	version := p.version
	f, known := c.tn.migrations.find(version)
	switch {
	case version == 0:
		return 0, invalid(errors.New("no migration is applied"))
	case !known:
		return 0, invalid(fmt.Errorf("the service has no migration %d, at which the tenant is: take it back with the release that has it", version))
	case !f.down:
		return 0, invalid(fmt.Errorf("migration %d has no Down", version))
	}
	if err := c.note(ctx, "migrate down", p.tenant.ID, map[string]any{"version": version}); err != nil {
		return 0, err
	}
	down := func(r *run) error { return r.down(ctx, version) }
	if f.NoTransaction {
		err = c.migrateAlone(ctx, cc, p, lockPatience, -version, down)
	} else if err = c.mark(ctx, p, -version); err == nil {
		err = untilFree(ctx, lockPatience, func() error { return c.withGoose(ctx, cc, p, false, lockTimeout, down) })
	}
	if err != nil {
		return 0, err
	}
	if p.version >= version { // it could not be looked at: the mark stays, by which the next run does
		p.migrating = -version
		return version, fmt.Errorf("migration %d is taken back, and the schema could not be asked for its version: call Migrator.Tenant, which looks again", version)
	}
	p.migrating = 0
	return version, nil
}

const opResolve = "resolve migration"

// Resolve ends what a migration without a transaction has left when it died half-way. Somebody has finished it by hand, and applied is true, or has undone what there was of it, and applied is
// false: then the next run applies it from its beginning. It believes what it is told, is written to the audit trail, and does nothing to the tables.
//
// The error is that of [Migrator.Tenant], and [ErrInvalid] for a tenant that is not dirty at that version. A tenant with [IsolationShared] stands for all of its server.
func (m *Migrator) Resolve(ctx context.Context, id ID, version int64, applied bool) error {
	c := m.tn.catalog
	_, err := m.at(ctx, opResolve, id, &errand{}, func(ctx context.Context, p *place) (done Migrated, err error) {
		var a area
		if p.isolation == IsolationShared {
			held, release, err := c.lockArea(ctx, p)
			if err != nil {
				return done, err
			}
			defer release()
			ctx = held
			if a, err = readArea(ctx, m.tn.primary.pool, p.server); err != nil {
				return done, unavailable("read area", err)
			}
			p.version, p.migrating = a.version, a.migrating
		}
		if dirty, _ := p.marks(); dirty != version || version == 0 {
			return done, invalid(fmt.Errorf("version %d is not one that has died in this tenant; see Migrator.Status", version))
		}
		if err := c.note(ctx, opResolve, id, map[string]any{"version": version, "applied": applied}); err != nil {
			return done, err
		}
		if err := c.lendOwner(ctx, p, nil, func(ctx context.Context, cc *pgx.ConnConfig) error {
			return c.withGoose(ctx, cc, p, false, lockTimeout, func(r *run) error { return r.write(ctx, version, applied) })
		}); err != nil {
			return done, err
		}
		p.migrating, p.marked = 0, true
		if p.isolation == IsolationShared {
			return done, c.recordArea(ctx, p, a, a.state == "made")
		}
		defer m.tn.feed.catchUp(ctx)
		return done, c.recordVersion(ctx, p)
	})
	return err
}

// note writes to the audit trail what is about to be done.
func (c *Catalog) note(ctx context.Context, op string, id ID, detail map[string]any) error {
	return unavailable(op, pgx.BeginFunc(ctx, c.tn.primary.pool, func(tx pgx.Tx) error { return audit(ctx, tx, op, id, detail) }))
}

// Pin holds the tenant at a version: whoever migrates it goes no further, and one that is beyond stays where it is. The service has to work with a schema of that age.
//
// The error is [ErrInvalid], also for a tenant with [IsolationShared], whose tables are those of others, too, [ErrTenantNotFound], [ErrTenantGone] or [ErrPrimaryUnavailable].
func (m *Migrator) Pin(ctx context.Context, id ID, version int64) error {
	if version < 1 {
		return &Error{Op: "pin", Tenant: id, Err: invalid(fmt.Errorf("version %d: at least 1", version))}
	}
	return m.pin(ctx, "pin", id, version)
}

// Unpin lets the tenant go on. The errors are those of Pin.
func (m *Migrator) Unpin(ctx context.Context, id ID) error { return m.pin(ctx, "unpin", id, 0) }

func (m *Migrator) pin(ctx context.Context, op string, id ID, version int64) error {
	return m.tn.catalog.write(ctx, op, id, func(tx pgx.Tx) error {
		if _, err := lockRow(ctx, tx, id); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE tenancy.tenants SET pinned = nullif($2::bigint, 0), updated = now() WHERE id = $1 AND isolation <> 'shared'`, id, version)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return invalid(fmt.Errorf("isolation: the tables of a tenant with %q are those of others, too", IsolationShared))
		}
		if err := audit(ctx, tx, op, id, map[string]any{"version": version}); err != nil {
			return err
		}
		return changed(ctx, tx, "tenant", id, "")
	})
}
