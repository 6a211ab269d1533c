package tenancy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// feed keeps this node's view true. It follows the primary's numbered changes, told by three
// messengers of which any one is enough: a notification (milliseconds), a poll (PollPeriod) and
// the validity job (ValidityCron). A notification is a hint: what changed is always read.
type feed struct {
	tn     *Tenancy
	log    *slog.Logger
	listen *pgx.ConnConfig
	node   UID
	name   string
	wake   chan struct{} // holds one: something may have changed
	stock  chan struct{} // holds one: a place may be missing in the stock

	syncing  sync.Mutex // one reader of the changes at a time; guards the fields below
	epoch    int64      // the last change applied
	stamp    UID        // of that change: tells two histories with the same numbers apart
	reported time.Time  // when the primary last heard from us
	heard    time.Time  // when we last heard from the primary

	ctx    context.Context // ends with stop
	stop   context.CancelFunc
	endJob func() // of the validity job; nil before it was started
	done   sync.WaitGroup
}

// follower is what holds values of tenants: the pools and the service's registries.
type follower interface {
	held() []ID
	retire(id ID, below int64)
}

const (
	changesAtOnce = 1000                      // more than these are not applied one by one
	reportPeriod  = time.Second / 2           // the least time between two reports without news: each tick of the default poll brings one
	nodeSilence   = 5 * time.Second           // a node that has been silent for so long is not waited for
	slowestPoll   = nodeSilence - time.Second // or a node that lives could be silent for so long, or be told too late
	listenPing    = 5 * time.Second
	syncTimeout   = 3 * time.Second // of one reading and its application, for which others wait; and of LISTEN
)

func newFeed(tn *Tenancy) *feed {
	host, _ := os.Hostname()
	listen := tn.primary.listen.Copy()
	listen.RuntimeParams["application_name"] = "tenancy feed"
	ctx, stop := context.WithCancel(context.Background())
	return &feed{tn: tn, log: tn.cfg.Logger, listen: listen, node: newUID(), name: fmt.Sprintf("%s/%d", host, os.Getpid()),
		wake: make(chan struct{}, 1), stock: make(chan struct{}, 1), ctx: ctx, stop: stop}
}

// start reads where the primary is and begins to follow. Nothing is cached before.
func (f *feed) start(ctx context.Context) error {
	if err := f.tn.primary.follow.QueryRow(ctx, `SELECT e.epoch, coalesce(c.stamp, gen_random_uuid()) FROM tenancy.epoch e LEFT JOIN tenancy.changes c USING (epoch)`).
		Scan(&f.epoch, &f.stamp); err != nil {
		return unavailable("start the feed", err)
	}
	f.heard = time.Now()
	if err := f.sync(ctx); err != nil {
		return err
	}
	if err := f.startJob(); err != nil {
		return err
	}
	f.done.Go(f.follow)
	f.done.Go(f.listenForever)
	if f.tn.cfg.Store != nil {
		f.done.Go(f.expireStore)
	}
	if f.tn.cfg.Stock > 0 {
		f.done.Go(f.keepStock)
		f.kickStock()
	}
	return nil
}

// expireStore forgets what Config.Store has answered, each StoreTTL: a store announces nothing. It is a goroutine of its own because a
// reading of the changes can hang.
func (f *feed) expireStore() {
	tick := time.NewTicker(f.tn.cfg.Lookups.StoreTTL)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
			f.tn.view.forgetStore()
		}
	}
}

// close ends the feed and takes this node off the list, so that no fence waits for it.
func (f *feed) close() {
	f.stop()
	if f.endJob != nil {
		f.endJob()
	}
	f.done.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _ = f.tn.primary.follow.Exec(ctx, `DELETE FROM tenancy.nodes WHERE id = $1`, f.node)
}

// follow reads the changes at each wake and each PollPeriod, and watches how long the primary has been silent.
func (f *feed) follow() {
	tick := time.NewTicker(f.tn.cfg.Lookups.PollPeriod)
	defer tick.Stop()
	quiet := false // one line for an outage, not one a second
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.wake:
		case <-tick.C:
		}
		err := f.sync(f.ctx)
		switch {
		case f.ctx.Err() != nil:
			return
		case err == nil && quiet:
			f.log.Info("tenancy: the primary answers again")
			quiet = false
		case err != nil && !quiet:
			f.log.Warn("tenancy: the primary does not answer; known users are served for StaleGrace", "grace", f.tn.cfg.Lookups.StaleGrace, "error", err)
			quiet = true
		}
	}
}

// catchUp applies what a write of this node has changed before the write returns. If that fails the feed will: the change itself is made.
func (f *feed) catchUp(ctx context.Context) {
	if err := f.sync(context.WithoutCancel(ctx)); err != nil && f.ctx.Err() == nil {
		f.log.Warn("tenancy: reading the changes failed; the feed tries again", "error", err)
	}
}

// change is one row of tenancy.changes.
type change struct {
	epoch  int64
	kind   string
	tenant ID
	key    string
	stamp  UID
}

// sync reads the changes since the last one applied, applies them and reports. A hole, a number
// that went backwards or another history under the same numbers (a restored primary) means
// that anything may have changed: everything is forgotten.
func (f *feed) sync(ctx context.Context) error {
	f.syncing.Lock()
	defer f.syncing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	latest, changes, err := f.read(ctx)
	if err != nil {
		if time.Since(f.heard) > f.tn.cfg.Lookups.StaleGrace && f.tn.view.stale.CompareAndSwap(false, true) {
			f.log.Error("tenancy: the primary has been silent for longer than StaleGrace: tenants are refused until it answers", "error", err)
		}
		return err
	}
	f.heard = time.Now()
	if f.tn.view.stale.Load() { // it was refused and not forgotten, and may be old by now
		f.tn.view.forgetEverything()
		f.tn.view.stale.Store(false)
	}
	before := f.epoch
	if why := f.doubt(latest, changes); why != "" {
		f.log.Warn("tenancy: forgetting everything that was cached", "reason", why, "epoch", f.epoch, "primary", latest)
		f.epoch, f.stamp = latest, UID{}
		if n := len(changes); n > 0 && changes[n-1].epoch == latest {
			f.stamp = changes[n-1].stamp
		} else if err := f.tn.primary.follow.QueryRow(ctx, `SELECT stamp FROM tenancy.changes WHERE epoch = $1`, latest).Scan(&f.stamp); err != nil && !errors.Is(err, pgx.ErrNoRows) {
			f.epoch = before // unsure where we are: the next read doubts again
			return unavailable("read changes", err)
		}
		f.tn.view.forgetEverything()
		f.review(ctx)
	} else {
		for _, c := range changes {
			if c.epoch > f.epoch {
				f.apply(ctx, c)
				f.epoch, f.stamp = c.epoch, c.stamp
			}
		}
	}
	if f.epoch != before || time.Since(f.reported) >= reportPeriod {
		return f.report(ctx)
	}
	return nil
}

// read returns the primary's epoch and its changes from the last one applied on, that one included.
func (f *feed) read(ctx context.Context) (latest int64, changes []change, err error) {
	rows, _ := f.tn.primary.follow.Query(ctx, `SELECT e.epoch, coalesce(c.epoch, 0), coalesce(c.kind, ''), coalesce(c.tenant, 0), coalesce(c.key, ''), coalesce(c.stamp, '00000000-0000-0000-0000-000000000000')
		FROM tenancy.epoch e LEFT JOIN tenancy.changes c ON c.epoch >= $1 AND c.epoch <= e.epoch ORDER BY c.epoch LIMIT $2`, f.epoch, changesAtOnce+2)
	defer rows.Close()
	for rows.Next() {
		var c change
		if err := rows.Scan(&latest, &c.epoch, &c.kind, &c.tenant, &c.key, &c.stamp); err != nil {
			return 0, nil, unavailable("read changes", err)
		}
		if c.epoch != 0 {
			changes = append(changes, c)
		}
	}
	return latest, changes, unavailable("read changes", rows.Err())
}

// doubt says why the changes do not continue what this node knows, "" when they do.
func (f *feed) doubt(latest int64, changes []change) string {
	switch {
	case latest < f.epoch:
		return "the primary's epoch went backwards: it was restored"
	case len(changes) > changesAtOnce:
		return "too many changes at once"
	}
	next := f.epoch
	if f.epoch == 0 {
		next = 1 // there is no change 0 to compare with
	}
	for _, c := range changes {
		if c.epoch != next {
			return "changes are missing"
		}
		if c.epoch == f.epoch && c.stamp != f.stamp {
			return "the primary has another history: it was restored"
		}
		next++
	}
	if next != latest+1 {
		return "changes are missing"
	}
	return ""
}

func (f *feed) apply(ctx context.Context, c change) {
	v := f.tn.view
	switch c.kind {
	case "tenant":
		v.forgetTenant(c.tenant)
		f.revise(ctx, c.tenant)
	case "member":
		if c.key == "" { // erased
			v.users.forgetAll()
		}
		v.users.forget(UserKey(c.key))
	case "domain":
		if c.key == "" { // erased
			v.domains.forgetAll()
		}
		v.domains.forget(c.key)
	default: // "server", "all", and kinds of a newer release
		v.forgetEverything()
		f.review(ctx)
	}
}

// review re-reads every tenant that something is held for.
func (f *feed) review(ctx context.Context) {
	seen := map[ID]bool{}
	for _, w := range f.tn.watchers() {
		for _, id := range w.held() {
			if !seen[id] {
				seen[id] = true
				f.revise(ctx, id)
			}
		}
	}
}

// revise ends what is held for a tenant that is out of service or has moved on. When that cannot be found out, all of it
// is ended: the next use builds it again, after a look at the catalog.
func (f *feed) revise(ctx context.Context, id ID) {
	below := int64(math.MaxInt64)
	if r, err := f.tn.view.record(ctx, id); err == nil && r.served("review") == nil {
		below = r.tenant.Generation
	}
	for _, w := range f.tn.watchers() {
		w.retire(id, below)
	}
}

// report tells the primary which change this node has applied, which fences wait for.
func (f *feed) report(ctx context.Context) error {
	cfg, pool := f.tn.cfg, f.tn.primary.follow
	_, err := pool.Exec(ctx, `INSERT INTO tenancy.nodes (id, name, epoch, serves, address, acts) VALUES ($1, $2, $3, $4, $5, true)
		ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch, seen = now()`, f.node, f.name, f.epoch, cfg.serves(), cfg.NodeAddress)
	if err != nil {
		return unavailable("report", err)
	}
	f.reported = time.Now()
	if f.tn.view.share != nil {
		return f.tn.view.share.read(ctx, pool)
	}
	return nil
}

// awaitNodes returns when every node that lives has applied what is committed by now, or has
// been silent for nodeSilence: a node that is paused or cut off is the server's fence's business.
func (f *feed) awaitNodes(ctx context.Context) error {
	pool := f.tn.primary.pool
	var epoch int64
	if err := pool.QueryRow(ctx, `SELECT epoch FROM tenancy.epoch`).Scan(&epoch); err != nil {
		return unavailable("await nodes", err)
	}
	for end := time.Now().Add(nodeSilence); time.Now().Before(end); {
		var behind int
		if err := pool.QueryRow(ctx, `SELECT count(*) FROM tenancy.nodes WHERE epoch < $1 AND seen > now() - $2::interval`, epoch, nodeSilence.String()).Scan(&behind); err != nil {
			return unavailable("await nodes", err)
		}
		if behind == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// listenForever keeps one connection that hears notifications. While it is away the poll goes on.
func (f *feed) listenForever() {
	quiet := false // one line for an outage, not one for each try
	for wait := 50 * time.Millisecond; f.ctx.Err() == nil; {
		began := time.Now()
		listened, err := f.listenOnce()
		if f.ctx.Err() != nil {
			return
		}
		if listened || !quiet {
			f.log.Warn("tenancy: the notification connection was lost; polling until it is back", "error", withoutSecrets(err))
			quiet = true
		}
		if time.Since(began) > 30*time.Second {
			wait = 50 * time.Millisecond
		}
		select {
		case <-f.ctx.Done():
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(wait*2, 5*time.Second)
	}
}

// listenOnce hears notifications until the connection fails, and says whether it came so far.
func (f *feed) listenOnce() (listened bool, err error) {
	conn, err := pgx.ConnectConfig(f.ctx, f.listen)
	if err != nil {
		return false, err
	}
	defer closeConn(conn)
	ctx, cancel := context.WithTimeout(f.ctx, syncTimeout)
	_, err = conn.Exec(ctx, `LISTEN tenancy`)
	cancel()
	if err != nil {
		return false, err
	}
	for {
		f.poke() // LISTEN first, then read: what was sent before is in the changes
		ctx, cancel := context.WithTimeout(f.ctx, listenPing)
		_, err := conn.WaitForNotification(ctx)
		cancel()
		switch {
		case f.ctx.Err() != nil:
			return true, f.ctx.Err()
		case err == nil:
		case errors.Is(err, context.DeadlineExceeded): // silence: is anybody there?
			ctx, cancel := context.WithTimeout(f.ctx, 2*time.Second)
			err := conn.Ping(ctx)
			cancel()
			if err != nil {
				return true, err
			}
		default:
			return true, err
		}
	}
}

func (f *feed) poke() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}
