package tenancy

import (
	"context"
	"hash/maphash"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// refusedHints writes to the audit trail who named a tenant that exists and is not theirs.
//
// It works behind the request's back: whether the tenant exists must not show in the time of the answer, and a flood of
// refusals must not wait for the primary, fill it or grow a queue. One user at one tenant is one row a minute for each source; beyond what fits into the
// queue, or into what is looked into in a minute, is counted in the log alone.
type refusedHints struct {
	tn    *Tenancy
	log   *slog.Logger
	queue chan refusedQuery
	done  sync.WaitGroup
	stop  context.CancelFunc

	mu       sync.Mutex // guards the fields below
	dropped  int        // not recorded, for want of room or of the primary
	failed   error      // why, the last time
	lastUser UserKey    // whose, the last time
	closed   bool
}

type refusedQuery struct {
	user  UserKey
	hints []Hint
}

var refusedSeed = maphash.MakeSeed()

// hash tells queries apart, as far as 64 bits do: a record that is lost among others is no harm.
func (q refusedQuery) hash() uint64 {
	var h maphash.Hash
	h.SetSeed(refusedSeed)
	h.WriteString(string(q.user))
	for _, hint := range q.hints {
		maphash.WriteComparable(&h, hint)
	}
	return h.Sum64()
}

// refusedKey is what is written once a minute.
type refusedKey struct {
	user   UserKey
	tenant ID
	source string
}

const (
	refusedQueue   = 1024
	refusedPeriod  = time.Minute
	refusedQueries = 8192 // that are looked into in a period, each once
	refusedPerUser = 512  // of these: one who makes up names must not hide another
	refusedClose   = time.Second
)

func newRefusedHints(tn *Tenancy) *refusedHints {
	r := &refusedHints{tn: tn, log: tn.cfg.Logger, queue: make(chan refusedQuery, refusedQueue)}
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	r.done.Go(func() { r.write(ctx) })
	return r
}

// note never waits.
func (r *refusedHints) note(q Query) {
	kept := make([]Hint, 0, len(q.Hints)) // the caller's slice is the caller's; and no name is longer
	for _, h := range q.Hints {
		if h.Value != "" && len(h.Value) <= 256 {
			kept = append(kept, h)
		}
	}
	if q.User == "" || len(kept) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	select {
	case r.queue <- refusedQuery{q.User, kept}:
	default:
		r.dropped++
		r.lastUser = q.User
	}
}

// close writes what is in the queue, until ctx ends and for refusedClose at most: nobody's work waits for it.
func (r *refusedHints) close(ctx context.Context) {
	r.mu.Lock()
	if !r.closed {
		r.closed = true
		close(r.queue)
	}
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, refusedClose)
	defer cancel()
	defer context.AfterFunc(ctx, r.stop)()
	r.done.Wait()
	r.stop()
	r.tell()
}

func (r *refusedHints) write(ctx context.Context) {
	seen, asked, of := map[refusedKey]struct{}{}, map[uint64]struct{}{}, map[UserKey]int{}
	period := time.NewTicker(refusedPeriod)
	defer period.Stop()
	for {
		select {
		case q, more := <-r.queue:
			if !more {
				return
			}
			id := q.hash()
			if _, before := asked[id]; before {
				continue
			}
			if len(asked) >= refusedQueries || of[q.user] >= refusedPerUser {
				r.drop(q.user, nil)
				continue
			}
			asked[id] = struct{}{}
			of[q.user]++
			for key, why := range r.foreign(ctx, q) {
				if _, told := seen[key]; told {
					continue
				}
				seen[key] = struct{}{}
				if err := r.record(ctx, key, why); err != nil {
					r.drop(key.user, err)
				}
			}
		case <-period.C:
			clear(seen)
			clear(asked)
			clear(of)
			r.tell()
		}
	}
}

func (r *refusedHints) drop(user UserKey, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropped++
	r.lastUser = user
	if err != nil {
		r.failed = err
	}
}

// tell logs once a period what was not recorded.
func (r *refusedHints) tell() {
	r.mu.Lock()
	dropped, user, err := r.dropped, r.lastUser, r.failed
	r.dropped, r.failed = 0, nil
	r.mu.Unlock()
	if dropped > 0 {
		r.log.Warn("tenancy: more hints were refused than the audit trail takes", "not_recorded", dropped, "last_user", user, "error", withoutSecrets(err))
	}
}

// foreign yields the tenants that the query names and that exist and are not the user's; of a query whose hints
// are all the user's own and disagree, those.
func (r *refusedHints) foreign(ctx context.Context, q refusedQuery) map[refusedKey]string {
	members, _, err := r.tn.view.users.get(ctx, q.user)
	if err != nil {
		r.drop(q.user, err)
		return nil
	}
	found, own, mine := map[refusedKey]string{}, map[refusedKey]string{}, map[ID]bool{}
	for _, h := range q.hints {
		id, err := r.tn.view.find(ctx, h)
		if err != nil {
			r.drop(q.user, err)
			continue
		}
		key := refusedKey{q.user, id, h.Source}
		switch {
		case id == 0:
		case belonging(members, id) != nil:
			own[key] = "the request names two of the user's tenants"
			mine[id] = true
		default:
			found[key] = "the user does not belong to the tenant"
		}
	}
	if len(found) == 0 && len(mine) > 1 {
		return own
	}
	return found
}

func (r *refusedHints) record(ctx context.Context, key refusedKey, why string) error {
	ctx, cancel := context.WithTimeout(withSession(ctx, Session{user: key.user}), r.tn.cfg.Lookups.Timeout)
	defer cancel()
	return r.tn.primary.transact(ctx, func(tx pgx.Tx) error {
		return audit(ctx, tx, "refused hint", key.tenant, map[string]any{"source": key.source, "why": why})
	})
}
