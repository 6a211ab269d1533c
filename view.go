package tenancy

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// view is what this node knows of the catalog: bounded look-ups that the feed keeps true.
// It answers from memory; the primary is asked on a miss alone.
type view struct {
	primary *primaryDB
	store   Store  // Config.Store; nil: the primary
	share   *share // nil: this node serves every tenant
	least   int64  // Config.MinVersion
	records *lookup[ID, *record]
	stored  *lookup[ID, *record] // records with the store's word; nil without a store
	names   *lookup[string, ID]
	domains *lookup[string, ID]
	users   *lookup[UserKey, []*member]

	// changes counts what was forgotten of tenants. A record that was looked up at the present
	// count is current, and need not be looked up again.
	changes atomic.Uint64

	// stale is set by the feed when the primary has been silent for longer than StaleGrace.
	// From then on nothing that was remembered is believed.
	stale atomic.Bool
}

// record is one tenant as the catalog last told it: immutable but for checked, and replaced as a whole.
type record struct {
	// What each request reads comes first, together.
	checked   uint64 // atomic, and first so that it is aligned on 32 bits too: view.changes, one more, when this record was last looked up
	view      *view  // that looked it up: a context can carry the record of another node
	elsewhere *share // who knows the nodes that serve it; nil: this one does
	sourceErr error  // why source is unusable, or of no use to this node's code: this tenant is refused, the others are not

	tenant     Tenant
	message    string
	retryAfter time.Duration
	source     DataSource   // how to reach its data, with the password
	dense      *denseSource // the shared pool that its calls go through; nil: one of its own
	denseRole  string
	version    int64 // of its schema, as recorded; not in a record with the store's word
}

// Format keeps the login inside from being printed by a stray %+v.
func (r *record) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "tenant %q (id %d, %s)", r.tenant.Name, r.tenant.ID, r.tenant.State)
}

// member is one membership of a user.
type member struct {
	tenant    ID
	role      Role
	isDefault bool
	record    atomic.Pointer[record] // the tenant's, as last looked up for this user; used while it is current
}

func newView(primary *primaryDB, store Store, cfg Config) (*view, error) {
	v := &view{primary: primary, store: store, least: cfg.MinVersion}
	if len(cfg.OnlyTenants) > 0 {
		v.share = &share{only: cfg.OnlyTenants, address: cfg.NodeAddress}
	}
	bounds := lookupConfig{size: cfg.Lookups.Size, negativeSize: cfg.Lookups.NegativeSize, negativeTTL: cfg.Lookups.NegativeTTL, loadTimeout: cfg.Lookups.Timeout}
	var errs [4]error
	v.records, errs[0] = newLookup(bounds, v.loadRecord)
	v.names, errs[1] = newLookup(bounds, v.loadName)
	v.domains, errs[2] = newLookup(bounds, v.loadDomain)
	v.users, errs[3] = newLookup(bounds, v.loadUser)
	if store != nil {
		var err error
		v.stored, err = newLookup(bounds, v.loadStored)
		return v, errors.Join(append(errs[:], err)...)
	}
	return v, errors.Join(errs[:]...)
}

// tenants returns where records are looked up.
func (v *view) tenants() *lookup[ID, *record] {
	if v.stored != nil {
		return v.stored
	}
	return v.records
}

func (v *view) close(ctx context.Context) error {
	var err error
	if v.stored != nil { // first: it loads from the records
		err = v.stored.close(ctx)
	}
	return errors.Join(err, v.records.close(ctx), v.names.close(ctx), v.domains.close(ctx), v.users.close(ctx))
}

// record returns what is known of the tenant. Unknown is ErrTenantNotFound, an unreachable
// primary ErrPrimaryUnavailable.
func (v *view) record(ctx context.Context, id ID) (*record, error) {
	if v.stale.Load() {
		return nil, errStale
	}
	now := v.changes.Load() + 1 // before the look-up: what changes meanwhile is not in it
	r, found, err := v.tenants().get(ctx, id)
	if err != nil {
		return nil, lookupFailure(ctx, err)
	}
	if !found {
		return nil, ErrTenantNotFound
	}
	if atomic.LoadUint64(&r.checked) != now { // mostly so already, and then the line stays shared between processors
		atomic.StoreUint64(&r.checked, now)
	}
	return r, nil
}

// current reports whether nothing that could concern r was forgotten since it was looked up: two loads, where a look-up is a
// lock and a move in a list.
func (v *view) current(r *record) bool {
	return r != nil && r.view == v && atomic.LoadUint64(&r.checked) == v.changes.Load()+1 && !v.stale.Load()
}

// recordAt is record for who builds something of the tenant's: it must be served, and not older than who asked knows it.
func (v *view) recordAt(ctx context.Context, id ID, generation int64) (*record, error) {
	r, err := v.record(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := r.served("build"); err != nil {
		return nil, err
	}
	if r.tenant.Generation < generation {
		return nil, fmt.Errorf("tenancy: generation %d was asked for, the catalog tells of %d", generation, r.tenant.Generation)
	}
	return r, nil
}

// lookupFailure tells a caller who left from a primary that did not answer.
func lookupFailure(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return ctx.Err()
	}
	return unavailable("look up", err)
}

var errStale = &Error{Op: "look up", RetryAfter: primaryRetryAfter,
	Err: hinted(ErrPrimaryUnavailable, "it has been out of reach for longer than Lookups.StaleGrace")}

// forgetEverything is the answer to every doubt: a hole in the feed, a restored primary, a cut connection.
func (v *view) forgetEverything() {
	v.records.forgetAll()
	if v.stored != nil {
		v.stored.forgetAll()
	}
	v.names.forgetAll()
	v.domains.forgetAll()
	v.users.forgetAll()
	v.changes.Add(1) // after the forgetting: who reads the new count finds the old records gone
}

// forgetStore forgets what Config.Store has answered, and keeps what the primary has.
func (v *view) forgetStore() {
	v.stored.forgetAll()
	v.names.forgetAll()
	v.domains.forgetAll()
	v.users.forgetAll()
	v.changes.Add(1)
}

// forgetTenant forgets one tenant, and every name and every answer "unknown": the change may be a rename or a birth.
func (v *view) forgetTenant(id ID) {
	v.records.forget(id)
	if v.stored != nil {
		v.stored.forget(id)
	}
	v.names.forgetAll()
	v.changes.Add(1) // after the forgetting: who reads the new count finds the old record gone
}

// doubt has what is remembered of one tenant read again, and waits for it. It stays remembered where the primary does not answer: what
// can be done with what there is goes on, for StaleGrace as ever.
func (v *view) doubt(ctx context.Context, id ID) { v.await(ctx, v.reread(id)) }

// reread begins what doubt waits for.
func (v *view) reread(id ID) (read <-chan struct{}) {
	if v.stored == nil {
		return v.records.reload(id, v.loadRecord)
	}
	return v.stored.reload(id, func(ctx context.Context, id ID) (*record, bool, error) {
		select {
		case <-v.records.reload(id, v.loadRecord):
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
		return v.loadStored(ctx, id)
	})
}

// await waits for what reread has begun.
func (v *view) await(ctx context.Context, read <-chan struct{}) {
	select {
	case <-read:
		v.changes.Add(1) // after the reading, as after a forgetting in forgetTenant
	case <-ctx.Done():
	}
}

// behindRetryAfter is when to look again whether a tenant was migrated: it may be the next one of a run.
const behindRetryAfter = 10 * time.Second

// served says whether the tenant may be served now, as an error of the state's class.
func (r *record) served(op string) error {
	fail := func(class error, after time.Duration) error {
		return &Error{Op: op, Tenant: r.tenant.ID, Name: r.tenant.Name, RetryAfter: after, Message: r.message, Err: class}
	}
	switch r.tenant.State {
	case StateActive:
		if r.sourceErr != nil {
			after := time.Duration(0)
			if errors.Is(r.sourceErr, ErrSchemaBehind) {
				after = behindRetryAfter
			}
			return fail(r.sourceErr, after)
		}
		if r.elsewhere != nil {
			return fail(&NotServedError{Nodes: r.elsewhere.elsewhere(r.tenant.Name)}, 0)
		}
		return nil
	case StateProvisioning:
		return fail(ErrTenantNotReady, time.Second)
	case StateSuspended:
		return fail(ErrTenantSuspended, 0)
	case StateMaintenance:
		return fail(ErrTenantMaintenance, r.retryAfter)
	case StateDeleted, StatePurged:
		return fail(ErrTenantGone, 0)
	default:
		return fail(fmt.Errorf("%w: state %q is unknown to this release", ErrTenantNotFound, r.tenant.State), 0)
	}
}

// find returns the tenant that a hint means, 0 when there is none: that is an answer, and what becomes of it depends on who asks.
func (v *view) find(ctx context.Context, h Hint) (id ID, err error) {
	switch h.By {
	case ByName:
		if ident.Slug(h.Value) != nil {
			return 0, nil // no tenant has such a name; the primary need not be asked
		}
		id, _, err = v.names.get(ctx, h.Value)
	case ByDomain:
		domain, bad := ident.Domain(h.Value)
		if bad != nil {
			return 0, nil
		}
		id, _, err = v.domains.get(ctx, domain)
	case ByID:
		n := parseID(h.Value)
		if n == 0 {
			return 0, nil
		}
		_, found, e := v.tenants().get(ctx, n)
		if err = e; found {
			id = n
		}
	}
	if err != nil {
		return 0, lookupFailure(ctx, err)
	}
	return id, nil
}

// parseID returns 0 for what is no ID in its one spelling.
func parseID(s string) ID {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || strconv.FormatInt(n, 10) != s {
		return 0
	}
	return ID(n)
}

func (v *view) loadRecord(ctx context.Context, id ID) (*record, bool, error) {
	r, err := v.primary.record(ctx, v.primary.pool, id)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	r.view = v
	if r.version < v.least && r.sourceErr == nil {
		r.sourceErr = hinted(ErrSchemaBehind, "it is at version %d, and Config.MinVersion is %d: call Migrator.Run", r.version, v.least)
	}
	if !v.share.has(r.tenant.Name) {
		r.elsewhere = v.share
	}
	return r, true, nil
}

// loadStored reads what the store says of a tenant, over what is known of it from the primary.
func (v *view) loadStored(ctx context.Context, id ID) (*record, bool, error) {
	known, found, err := v.records.get(ctx, id)
	if err != nil || !found {
		return nil, false, err
	}
	r := &record{tenant: known.tenant, message: known.message, retryAfter: known.retryAfter, source: known.source, sourceErr: known.sourceErr,
		dense: known.dense, denseRole: known.denseRole}
	if err := r.heed(v.store.Tenant(ctx, id)); err != nil {
		return nil, false, err
	}
	r.view = v
	if !v.share.has(r.tenant.Name) {
		r.elsewhere = v.share
	}
	return r, true, nil
}

func (v *view) loadName(ctx context.Context, name string) (ID, bool, error) {
	if v.store != nil {
		return known(v.store.TenantByName(ctx, name))
	}
	return v.loadID(ctx, `SELECT id FROM tenancy.tenants WHERE name = $1`, name)
}

func (v *view) loadDomain(ctx context.Context, domain string) (ID, bool, error) {
	if v.store != nil {
		return known(v.store.TenantByDomain(ctx, domain))
	}
	return v.loadID(ctx, `SELECT tenant FROM tenancy.domains WHERE domain = $1`, domain)
}

func (v *view) loadID(ctx context.Context, sql, key string) (ID, bool, error) {
	var id ID
	err := v.primary.pool.QueryRow(ctx, sql, key).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, false, nil
	}
	return id, err == nil, err
}

func (v *view) loadUser(ctx context.Context, key UserKey) ([]*member, bool, error) {
	if v.store != nil {
		list, err := v.store.TenantsOf(ctx, key)
		return membersOf(key, list, err)
	}
	rows, _ := v.primary.pool.Query(ctx, `SELECT tenant, role, is_default FROM tenancy.memberships WHERE user_key = $1 ORDER BY tenant`, key)
	members, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*member, error) {
		m := new(member)
		return m, row.Scan(&m.tenant, &m.role, &m.isDefault)
	})
	return members, len(members) > 0, err
}
