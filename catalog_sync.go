package tenancy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Synced counts what [Catalog.SyncMembers] did, in memberships.
type Synced struct {
	Added   int // not there before
	Changed int // of the source before and after, with another role or another say on the default
	Removed int // of the source before, and not in the set
	Kept    int // in the set, and left as they are because they are made by hand or of another source
}

// SyncMembers makes the memberships of one source, such as "ldap", those of set, over all tenants and in one transaction.
// A directory is the truth for its own source and for no other: a membership made by hand, or of another source, is
// neither taken over nor removed. Where the set has it too it stays as it is, and what the set says of it counts for nothing, until
// it was removed: the next sync then adds the source's.
//
// An empty set removes every membership of the source, in all tenants. A directory that could not be asked, or that
// answered nothing, must not come here as an empty set: only the caller can tell the two apart.
//
// Roles and defaults are as if what goes were removed with [Catalog.RemoveMember] and the set then added with [Catalog.AddMember],
// one by one in its order. So a user who has no membership, or none left, gets the first as the default; a Default in the set
// takes the place of any other, also of one that [Catalog.SetDefault] chose; without it a choice stays, also that of none.
// A tenant's MaxUsers must hold for what is there at the end, unless the sync adds nobody to the tenant.
//
// The Source of each membership in set is "" or source. Where nothing changes, nothing is announced or audited; where more
// than 100 users are concerned, every node looks all users up anew. While it runs, other changes of memberships and of
// the set's tenants wait; requests do not. Cancelling ctx, like every error, leaves all as it was, unless the primary has just committed.
//
// The error is [ErrInvalid] for a source that is "" or over 64 bytes, and for a membership in set that is not valid, is there twice or is a
// second Default of its user (the text names its index); [ErrTenantNotFound], [ErrTenantGone] or [ErrUserLimit], naming the
// first tenant by ID that it is about; or [ErrPrimaryUnavailable].
func (c *Catalog) SyncMembers(ctx context.Context, source string, set []Membership) (Synced, error) {
	const op = "sync members"
	set, at, err := checkSet(source, set)
	if err != nil {
		return Synced{}, &Error{Op: op, Tenant: at, Err: invalid(err)}
	}
	if ctx, err = begin(ctx); err != nil {
		return Synced{}, &Error{Op: op, Err: err}
	}
	var d difference
	err = c.tn.primary.transact(ctx, func(tx pgx.Tx) (err error) {
		// The locks, in the order of all verbs: tenants' rows, by ID; users or, here, the table that they guard; the epoch.
		// A lock for each user would be as many entries in the server's lock table, which is small.
		if at, err = lockTenants(ctx, tx, set); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `LOCK TABLE tenancy.memberships IN SHARE ROW EXCLUSIVE MODE`); err != nil {
			return err
		}
		have, err := concerned(ctx, tx, source, set)
		if err != nil {
			return err
		}
		d = compare(source, set, have)
		if err := d.write(ctx, tx); err != nil {
			return err
		}
		if at, err = overfull(ctx, tx, d.added); err != nil {
			return err
		}
		if err := d.audit(ctx, tx, op, source); err != nil {
			return err
		}
		return d.announce(ctx, tx)
	})
	if err != nil {
		return Synced{}, &Error{Op: op, Tenant: at, Err: refusal(op, err)}
	}
	c.tn.feed.catchUp(ctx)
	return Synced{Added: len(d.added), Changed: len(d.changed), Removed: len(d.removed), Kept: d.kept}, nil
}

// seat is what there is one membership for.
type seat struct {
	user   UserKey
	tenant ID
}

func (m *Membership) seat() seat { return seat{m.User, m.Tenant} }

// checkSet returns a copy of the set with the defaults filled in, or the rule that it breaks and the tenant where.
func checkSet(source string, set []Membership) ([]Membership, ID, error) {
	if source == "" {
		return nil, 0, errors.New("source: it is empty, which means by hand")
	}
	if err := checkSource(source); err != nil {
		return nil, 0, err
	}
	set = slices.Clone(set)
	seats, defaults := make(map[seat]int, len(set)), map[UserKey]int{}
	for i := range set {
		m := &set[i]
		if m.Source != "" && m.Source != source {
			return nil, m.Tenant, fmt.Errorf("set[%d]: source: it is neither empty nor that of the sync", i)
		}
		m.Source = source
		if err := m.check(); err != nil {
			return nil, m.Tenant, fmt.Errorf("set[%d]: %w", i, err)
		}
		if first, ok := seats[m.seat()]; ok {
			return nil, m.Tenant, fmt.Errorf("set[%d]: user and tenant are those of set[%d]", i, first)
		}
		seats[m.seat()] = i
		if first, ok := defaults[m.User]; ok && m.Default {
			return nil, m.Tenant, fmt.Errorf("set[%d]: default: the user has one in set[%d]", i, first)
		}
		if m.Default {
			defaults[m.User] = i
		}
	}
	return set, 0, nil
}

// lockTenants locks the rows of the set's tenants in the order of their IDs, so that no two wait for each other, and none can
// be filled or deleted meanwhile. It returns the first tenant that may not have members, with the reason.
func lockTenants(ctx context.Context, tx pgx.Tx, set []Membership) (ID, error) {
	ids := tenantsIn(set)
	rows, _ := tx.Query(ctx, `SELECT id, state FROM tenancy.tenants WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE`, ids)
	states := make(map[ID]State, len(ids))
	var id ID
	var state State
	if _, err := pgx.ForEachRow(rows, []any{&id, &state}, func() error { states[id] = state; return nil }); err != nil {
		return 0, err
	}
	for _, id := range ids {
		switch states[id] {
		case "":
			return id, ErrTenantNotFound
		case StateDeleted, StatePurged:
			return id, ErrTenantGone
		}
	}
	return 0, nil
}

// tenantsIn returns the tenants of the memberships, in order.
func tenantsIn(list []Membership) []ID {
	seen := map[ID]bool{}
	for _, m := range list {
		seen[m.Tenant] = true
	}
	return slices.Sorted(maps.Keys(seen))
}

// concerned reads the memberships that the sync may touch or must leave alone: the source's, and all of the set's users.
func concerned(ctx context.Context, tx pgx.Tx, source string, set []Membership) ([]Membership, error) {
	users := map[string]bool{}
	for _, m := range set {
		users[string(m.User)] = true
	}
	rows, _ := tx.Query(ctx, `SELECT user_key, tenant, role, source, is_default FROM tenancy.memberships WHERE source = $1
		UNION ALL
		SELECT m.user_key, m.tenant, m.role, m.source, m.is_default
		FROM unnest($2::text[]) u (user_key) JOIN tenancy.memberships m ON m.user_key = u.user_key AND m.source <> $1`, source, slices.Collect(maps.Keys(users)))
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Membership])
}

// difference is what has to be written so that a source's memberships are those of a set.
type difference struct {
	added, changed, removed []Membership
	lost                    []Membership // of any source: the default, to another tenant of the user
	kept                    int
}

// compare finds the difference between the set and what there is.
func compare(source string, set, have []Membership) (d difference) {
	wanted := make(map[seat]bool, len(set))
	for _, m := range set {
		wanted[m.seat()] = true
	}
	stay := make(map[seat]Membership, len(have))
	known, defaults := map[UserKey]bool{}, map[UserKey]ID{} // users with a membership, and with a default
	for _, m := range have {
		if m.Source == source && !wanted[m.seat()] {
			d.removed = append(d.removed, m)
			continue
		}
		stay[m.seat()], known[m.User] = m, true
		if m.Default {
			defaults[m.User] = m.Tenant
		}
	}
	var own []Membership // those of the set that the source may give
	for _, m := range set {
		if old, ok := stay[m.seat()]; ok && old.Source != source {
			d.kept++
			continue
		}
		if m.Default || !known[m.User] {
			defaults[m.User] = m.Tenant
		}
		known[m.User] = true
		own = append(own, m)
	}
	for _, m := range own {
		m.Default = defaults[m.User] == m.Tenant
		if old, ok := stay[m.seat()]; !ok {
			d.added = append(d.added, m)
		} else if old != m {
			d.changed = append(d.changed, m)
		}
	}
	for _, m := range stay {
		if m.Default && defaults[m.User] != m.Tenant {
			d.lost = append(d.lost, m)
		}
	}
	return d
}

// write writes the difference. A default goes before another comes: the index that allows one looks at each row as it is written.
func (d *difference) write(ctx context.Context, tx pgx.Tx) error {
	const listed = `unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::boolean[]) s (user_key, tenant, role, source, is_default)`
	const theirs = ` WHERE m.user_key = s.user_key AND m.tenant = s.tenant`
	for _, w := range []struct {
		sql  string
		list []Membership
	}{
		{`DELETE FROM tenancy.memberships m USING ` + listed + theirs, d.removed},
		{`UPDATE tenancy.memberships m SET is_default = false FROM ` + listed + theirs, d.lost},
		{`UPDATE tenancy.memberships m SET role = s.role, is_default = s.is_default FROM ` + listed + theirs, d.changed},
		{`INSERT INTO tenancy.memberships (user_key, tenant, role, source, is_default) SELECT s.* FROM ` + listed, d.added},
	} {
		if len(w.list) == 0 {
			continue
		}
		if _, err := tx.Exec(ctx, w.sql, columns(w.list)...); err != nil {
			return err
		}
	}
	return nil
}

// columns turns memberships into one array for each of their fields.
func columns(list []Membership) []any {
	n := len(list)
	users, tenants, roles, sources, defaults := make([]string, n), make([]int64, n), make([]string, n), make([]string, n), make([]bool, n)
	for i, m := range list {
		users[i], tenants[i], roles[i], sources[i], defaults[i] = string(m.User), int64(m.Tenant), string(m.Role), m.Source, m.Default
	}
	return []any{users, tenants, roles, sources, defaults}
}

// overfull returns the first tenant that has more members now than it may, with the reason.
func overfull(ctx context.Context, tx pgx.Tx, added []Membership) (id ID, err error) {
	err = tx.QueryRow(ctx, `SELECT t.id FROM tenancy.tenants t
		WHERE t.id = ANY($1) AND t.max_users < (SELECT count(*) FROM tenancy.memberships m WHERE m.tenant = t.id)
		ORDER BY t.id LIMIT 1`, tenantsIn(added)).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	return id, ErrUserLimit
}

// audit records what became of each tenant, without a record for each member.
func (d *difference) audit(ctx context.Context, tx pgx.Tx, op, source string) error {
	counts := map[ID]*[3]int{}
	for i, list := range [][]Membership{d.added, d.changed, d.removed} {
		for _, m := range list {
			if counts[m.Tenant] == nil {
				counts[m.Tenant] = new([3]int)
			}
			counts[m.Tenant][i]++
		}
	}
	for _, id := range slices.Sorted(maps.Keys(counts)) {
		n := counts[id]
		if err := audit(ctx, tx, op, id, map[string]any{"source": source, "added": n[0], "changed": n[1], "removed": n[2]}); err != nil {
			return err
		}
	}
	return nil
}

const usersAtOnce = 100 // more than these are not announced one by one: every node forgets all users instead

// announce numbers one change for each user concerned, with one of the tenants: its purge takes the user's key out of the changes.
func (d *difference) announce(ctx context.Context, tx pgx.Tx) error {
	users := map[UserKey]ID{}
	for _, m := range slices.Concat(d.added, d.changed, d.removed) { // who lost a default got another with one of these
		users[m.User] = m.Tenant
	}
	if len(users) > usersAtOnce {
		return changed(ctx, tx, "member", 0, "")
	}
	keys, tenants := make([]string, 0, len(users)), make([]int64, 0, len(users))
	for user, id := range users {
		keys, tenants = append(keys, string(user)), append(tenants, int64(id))
	}
	// In one statement: from the first change on, every other writer waits.
	_, err := tx.Exec(ctx, `SELECT tenancy.changed('member', c.tenant, c.user_key) FROM unnest($1::bigint[], $2::text[]) c (tenant, user_key)`, tenants, keys)
	return err
}
