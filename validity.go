package tenancy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/robfig/cron/v3"
)

const (
	validityBudget = 5 * time.Minute
	finishTimeout  = time.Minute // of one tenant's loose ends, the drain apart
	keepChanges    = 10_000
)

// soonAfterOpen is when a node ties up loose ends for the first time, up to half of it earlier, so that nodes which are deployed together do not do it together:
// where they are deployed often, none may live until ValidityCron. What a node that ended before Open has left is old enough by then, but for the place of a Prepare. Tests set it.
var soonAfterOpen = 2 * time.Minute

// startJob runs check at the times of Config.ValidityCron, and finish once before, until endJob.
func (f *feed) startJob() error {
	schedule, err := parseCron(f.tn.cfg.ValidityCron)
	if err != nil {
		return invalid(err)
	}
	// Skip outside of Recover: the other order stops a job for ever after one panic.
	logger := cronLogger{f.log}
	jobs := cron.New(cron.WithLocation(time.UTC), cron.WithLogger(logger),
		cron.WithChain(cron.SkipIfStillRunning(logger), cron.Recover(logger)))
	run := func(job func(ctx context.Context) error) cron.FuncJob {
		return func() {
			if err := job(f.ctx); err != nil && f.ctx.Err() == nil {
				f.log.Error("tenancy: validity job failed; the next run tries again", "error", err)
			}
		}
	}
	jobs.Schedule(schedule, run(f.check))
	jobs.Schedule(once(time.Now().Add(soonAfterOpen-rand.N(soonAfterOpen/2))), run(f.finish))
	jobs.Start()
	f.endJob = func() { <-jobs.Stop().Done() }
	return nil
}

// once is a schedule that fires at one time.
type once time.Time

func (o once) Next(now time.Time) time.Time {
	if at := time.Time(o); now.Before(at) {
		return at
	}
	return time.Time{} // never
}

// check is the validity job: this node re-reads what it holds, and the fleet's loose ends are tied up.
func (f *feed) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, validityBudget)
	defer cancel()
	defer context.AfterFunc(f.ctx, cancel)()
	if err := f.sync(ctx); err != nil {
		return err
	}
	f.tn.view.forgetEverything()
	f.review(ctx)
	pool := f.tn.primary.pool
	if _, err := pool.Exec(ctx, `DELETE FROM tenancy.changes WHERE epoch < (SELECT epoch FROM tenancy.epoch) - $1::bigint`, keepChanges); err != nil {
		return unavailable("validity", err)
	}
	if _, err := pool.Exec(ctx, `DELETE FROM tenancy.nodes WHERE seen < now() - interval '1 hour'`); err != nil {
		return unavailable("validity", err)
	}
	return f.finish(ctx)
}

// finish ties up the fleet's loose ends. Each kind has its share of the time that is left.
func (f *feed) finish(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, validityBudget)
	defer cancel()
	c, run := f.tn.catalog, &jobRun{silent: map[string]error{}}
	ctx = context.WithValue(ctx, runKey{}, run)
	end, _ := ctx.Deadline()
	kinds := []func(context.Context) error{c.finishFences, c.finishPlaces, c.finishDense, c.finishPurges, c.dropUnfinishedPlaces, c.endLeftMemberships, c.finishCreates, c.fillStock}
	var errs []error
	for i, kind := range kinds {
		run.until = time.Now().Add(time.Until(end) / time.Duration(len(kinds)-i))
		errs = append(errs, kind(ctx))
	}
	return errors.Join(errs...)
}

// jobRun is what one run of the validity job knows. A server that does not answer, or work that takes its time, keeps it from no other work.
type jobRun struct {
	until time.Time // nothing more of the present kind is begun then

	mu     sync.Mutex       // guards silent
	silent map[string]error // servers, by address, that could not be reached in this run
}

type runKey struct{}

// eachInTime calls finish for what there is to do, as long as the run has time for it. What is left is the next run's.
func eachInTime[T any](ctx context.Context, list []T, finish func(T) error) error {
	run := ctx.Value(runKey{}).(*jobRun)
	var errs []error
	for _, one := range list {
		if !time.Now().Before(run.until) {
			break
		}
		errs = append(errs, finish(one))
	}
	return errors.Join(errs...)
}

// unlessSilent connects to the server at address, but in a run of the validity job only if no connect of the run was in vain: each would wait for as long.
func unlessSilent(ctx context.Context, address string, connect func() (*pgx.Conn, error)) (*pgx.Conn, error) {
	run, _ := ctx.Value(runKey{}).(*jobRun)
	if run == nil {
		return connect()
	}
	run.mu.Lock()
	err := run.silent[address]
	run.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("it is not asked again in this run: %w", err)
	}
	conn, err := connect()
	if silent(err) && ctx.Err() == nil && !errors.Is(err, ErrBusy) { // the budget's want of permits is no server's silence
		run.mu.Lock()
		run.silent[address] = err
		run.mu.Unlock()
	}
	return conn, err
}

// oursToFinish is the condition on a tenant t for a job of this node's: it serves the tenant, or nobody does. $1 are Config.serves, null for all.
const oursToFinish = `($1::text[] IS NULL OR t.name = ANY($1) OR NOT EXISTS (SELECT FROM tenancy.nodes n
	WHERE n.seen > now() - interval '1 minute' AND (n.serves IS NULL OR t.name = ANY(n.serves))))`

// finishFences fences the tenants whose fence was cut off by a crash.
func (c *Catalog) finishFences(ctx context.Context) error {
	// In no order: tenants of one server that is gone for good keep no other one waiting for ever.
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT t.id FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source JOIN tenancy.servers s ON s.id = d.server
		WHERE t.state IN ('suspended', 'maintenance', 'deleted') AND t.fenced IS NULL AND s.provisioner IS NOT NULL AND t.updated < now() - interval '30 s' AND `+oursToFinish+` ORDER BY random() LIMIT 100`, c.tn.cfg.serves())
	ids, err := pgx.CollectRows(rows, pgx.RowTo[ID])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, ids, func(id ID) error { return c.finishFence(ctx, id) })
}

func (c *Catalog) finishFence(ctx context.Context, id ID) error {
	ctx, release, err := c.lockToFinish(ctx, id)
	if err != nil || release == nil {
		return err
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return err
	}
	switch p.tenant.State {
	case StateSuspended, StateMaintenance, StateDeleted:
		if !p.fenced {
			return c.fenceTenant(ctx, p, c.tn.cfg.DrainTimeout)
		}
	}
	return nil
}

// finishCreates resumes the Create of a tenant that died or failed, and was not called again, where this node would make the same of it; a few in each run, for each may take as long as its
// migrations and its seed do. An Adopt is its caller's to finish: it closes a service's login.
func (c *Catalog) finishCreates(ctx context.Context) error {
	if c.tn.migrations.empty() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, validityBudget/3)
	defer cancel()
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT t.id FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source JOIN tenancy.servers s ON s.id = d.server
		WHERE t.state = 'provisioning' AND s.provisioner IS NOT NULL AND t.updated < now() - interval '1 minute'
		AND t.recipe = $2 AND NOT EXISTS (SELECT FROM tenancy.adoptions a WHERE a.data_source = d.id) AND `+oursToFinish+` ORDER BY random() LIMIT 10`, c.tn.cfg.serves(), c.tn.cfg.recipe())
	ids, err := pgx.CollectRows(rows, pgx.RowTo[ID])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, ids, func(id ID) error { return c.finishCreate(ctx, id) })
}

func (c *Catalog) finishCreate(ctx context.Context, id ID) error {
	ctx, release, err := c.lockToFinish(ctx, id)
	if err != nil || release == nil {
		return err
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil || p.tenant.State != StateProvisioning {
		return err
	}
	if err := c.complete(ctx, p, false); err != nil {
		return &Error{Op: "finish create", Tenant: id, Name: p.tenant.Name, Err: err}
	}
	return nil
}

// finishPurges goes on with purges that were cut off: what is left of such a tenant is not all of it, and nobody can have it back.
func (c *Catalog) finishPurges(ctx context.Context) error {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT t.id, t.name FROM tenancy.tenants t JOIN tenancy.data_sources d ON d.id = t.data_source JOIN tenancy.servers s ON s.id = d.server
		WHERE t.state = 'deleted' AND t.deleted IS NOT NULL AND t.receipt IS NOT NULL AND s.provisioner IS NOT NULL AND t.updated < now() - interval '1 minute' AND `+oursToFinish+` ORDER BY random() LIMIT 10`, c.tn.cfg.serves())
	type begun struct {
		Tenant ID
		Name   string
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[begun])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, list, func(b begun) error { return c.finishPurge(ctx, b.Tenant, b.Name) })
}

// finishPurge is Purge that waits for nobody who is at work on the tenant.
func (c *Catalog) finishPurge(ctx context.Context, id ID, name string) error {
	ctx, release, err := c.lockToFinish(ctx, id)
	if err != nil || release == nil {
		return err
	}
	defer release()
	_, err = c.purgeLocked(ctx, id, name, false)
	if errors.Is(err, ErrTenantGone) || errors.Is(err, ErrInvalid) { // another one came first
		return nil
	}
	return err
}

// lockToFinish locks the tenant for as long as one tenant may take of a run. release is nil when a verb is at work on it: what is left
// then is that one's, or the next run's, and the others of this run do not wait for it.
func (c *Catalog) lockToFinish(ctx context.Context, id ID) (held context.Context, release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, c.tn.cfg.DrainTimeout+finishTimeout)
	held, unlock, err := c.tn.primary.tryLockTenant(ctx, id)
	if err != nil {
		cancel()
		if errors.Is(err, errLocked) {
			err = nil
		}
		return nil, nil, err
	}
	return held, func() { unlock(); cancel() }, nil
}

// finishPlaces finishes the rotations and the moves that a crash, or a server that was out of reach, has cut off. What is left of a
// tenant that is deleted, its fence closes and its Purge drops.
func (c *Catalog) finishPlaces(ctx context.Context) error {
	// In no order, as the fences.
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT t.id, d.id FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.uid = d.uid JOIN tenancy.servers s ON s.id = d.server
		WHERE (d.next_login <> '' OR d.dense_role <> '' AND NOT d.dense OR d.old_login <> '' OR d.leaving IS NOT NULL AND d.id <> t.data_source) AND d.state = 'made' AND s.provisioner IS NOT NULL
		AND t.state IN ('active', 'suspended', 'maintenance') AND d.updated < now() - interval '30 s' AND `+oursToFinish+` ORDER BY random() LIMIT 100`, c.tn.cfg.serves())
	type unfinished struct {
		Tenant ID
		Place  int64
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[unfinished])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, list, func(u unfinished) error {
		if err := c.finishPlace(ctx, u.Tenant, u.Place); err != nil {
			return &Error{Op: "finish place", Tenant: u.Tenant, Err: err}
		}
		return nil
	})
}

func (c *Catalog) finishPlace(ctx context.Context, id ID, source int64) error {
	ctx, release, err := c.lockToFinish(ctx, id)
	if err != nil || release == nil {
		return err
	}
	defer release()
	p, err := c.place(ctx, id)
	if err != nil {
		return err
	}
	if settled(p.tenant.State) != nil {
		return nil
	}
	if p.id == source {
		return c.finishRotation(ctx, p)
	}
	left, err := c.placeByID(ctx, source)
	if err != nil || left.state != "made" {
		return err
	}
	left.tenant = p.tenant
	if err := c.leavePlace(ctx, left); err != nil {
		return err
	}
	if left.denseRole != "" && !left.dense {
		if err := c.leaveDense(ctx, left); err != nil {
			return err
		}
	}
	return errors.Join(c.dropNextLogin(ctx, left), c.dropOldLogin(ctx, left))
}

// dropUnfinishedPlaces removes what a Prepare or a DropPlace that died has left. A place that belongs to a tenant is its Create's to finish.
func (c *Catalog) dropUnfinishedPlaces(ctx context.Context) error {
	rows, _ := c.tn.primary.pool.Query(ctx, `SELECT d.id FROM tenancy.data_sources d JOIN tenancy.servers s ON s.id = d.server
		WHERE d.state = 'intent' AND s.provisioner IS NOT NULL AND d.updated < now() - interval '1 hour'
		AND NOT EXISTS (SELECT FROM tenancy.tenants t WHERE t.data_source = d.id)
		AND NOT EXISTS (SELECT FROM tenancy.tenants t WHERE t.uid = d.uid AND NOT `+oursToFinish+`) ORDER BY random() LIMIT 100`, c.tn.cfg.serves())
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return unavailable("validity", err)
	}
	return eachInTime(ctx, ids, func(id int64) error { return c.dropUnfinishedPlace(ctx, id) })
}

func (c *Catalog) dropUnfinishedPlace(ctx context.Context, id int64) error {
	ctx, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	p, err := c.placeByID(ctx, id)
	if err != nil {
		return err
	}
	ctx, p, release, err := c.lockUnused(ctx, p)
	switch {
	case errors.Is(err, errLocked): // a Prepare that takes its time
		return nil
	case err != nil:
		return err
	}
	defer release()
	if p.state != "intent" {
		return nil
	}
	return c.dropUnused(ctx, p)
}

// parseCron reads a schedule. The parser panics on some zone prefixes and accepts schedules that never fire, so both are refused here.
func parseCron(spec string) (schedule cron.Schedule, err error) {
	if len(spec) > 128 {
		return nil, errors.New("at most 128 bytes")
	}
	if strings.Contains(spec, "TZ=") {
		return nil, errors.New("no time zone prefix: fields are in UTC")
	}
	defer func() {
		if p := recover(); p != nil {
			schedule, err = nil, fmt.Errorf("not a cron expression: %v", p)
		}
	}()
	if every, ok := strings.CutPrefix(spec, "@every "); ok {
		if d, err := time.ParseDuration(every); err != nil || d < time.Second {
			return nil, errors.New("@every wants a duration of at least 1s, such as @every 10m")
		}
	}
	schedule, err = cron.ParseStandard(spec)
	if err != nil {
		return nil, fmt.Errorf("not a cron expression of five fields or @every: %w", err)
	}
	now := time.Now().UTC()
	if next := schedule.Next(now); next.IsZero() || next.Sub(now) > 366*24*time.Hour {
		return nil, errors.New("it does not fire within a year")
	}
	return schedule, nil
}

// cronLogger gives cron's few words to slog.
type cronLogger struct{ log *slog.Logger }

func (l cronLogger) Info(msg string, args ...any) { l.log.Debug("tenancy: cron: "+msg, args...) }

func (l cronLogger) Error(err error, msg string, args ...any) {
	l.log.Error("tenancy: cron: "+msg, append(args, "error", err)...)
}
