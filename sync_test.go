package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// allMembers reads every membership past the library, one line for each.
func allMembers(tb testing.TB, admin *pgx.Conn) string {
	tb.Helper()
	return scan[string](tb, admin, `SELECT coalesce(string_agg(format('%s %s %s %s%s', user_key, tenant, role, coalesce(nullif(source, ''), 'hand'), CASE WHEN is_default THEN ' default' ELSE '' END), E'\n'
		ORDER BY user_key COLLATE "C", tenant), '') FROM tenancy.memberships`)
}

func lines(l ...string) string { return strings.Join(l, "\n") }

// recorded is how much the primary has announced and audited.
func recorded(tb testing.TB, admin *pgx.Conn) [2]int64 {
	tb.Helper()
	return [2]int64{scan[int64](tb, admin, `SELECT epoch FROM tenancy.epoch`), scan[int64](tb, admin, `SELECT count(*) FROM tenancy.audit`)}
}

func mustSync(tb testing.TB, tn *tenancy.Tenancy, set []tenancy.Membership, want tenancy.Synced) {
	tb.Helper()
	got, err := tn.Catalog().SyncMembers(tb.Context(), "ldap", set)
	if err != nil {
		tb.Fatal(err)
	}
	if got != want {
		tb.Errorf("synced %+v, want %+v", got, want)
	}
}

func mustAdd(tb testing.TB, tn *tenancy.Tenancy, list ...tenancy.Membership) {
	tb.Helper()
	for _, m := range list {
		if err := tn.Catalog().AddMember(tb.Context(), m); err != nil {
			tb.Fatal(err)
		}
	}
}

// syncFleet is a fleet with two empty tenants, of IDs 1 and 2.
func syncFleet(tb testing.TB) (f *tenancytest.Fleet, tn *tenancy.Tenancy, a, b tenancy.ID) {
	tb.Helper()
	f = tenancytest.NewFleet(tb)
	tn = f.Open(tb, tenancy.Config{Migrations: noteMigrations})
	a, b = tenancytest.Create(tb, tn, "acme").ID, tenancytest.Create(tb, tn, "globex").ID
	if a != 1 || b != 2 {
		tb.Fatalf("the tenants have the IDs %d and %d", a, b)
	}
	return f, tn, a, b
}

func TestSyncMakesASourceWhatTheSetSaysAndNoOther(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	admin := f.Admin(t, "primary")
	mustAdd(t, tn,
		tenancy.Membership{User: "hand", Tenant: a, Role: tenancy.RoleAdmin},
		tenancy.Membership{User: "scim", Tenant: a, Source: "scim"},
		tenancy.Membership{User: "both", Tenant: a},
		tenancy.Membership{User: "gone", Tenant: b, Source: "ldap"},
		tenancy.Membership{User: "upper", Tenant: b, Source: "LDAP"},
	)
	set := []tenancy.Membership{
		{User: "hand", Tenant: a, Source: "ldap"}, // by hand, as an administrator
		{User: "scim", Tenant: a, Default: true, Role: tenancy.RoleAdmin},
		{User: "both", Tenant: b},
		{User: "new", Tenant: b},
		{User: "new", Tenant: a, Role: tenancy.RoleAdmin},
	}
	mustSync(t, tn, set, tenancy.Synced{Added: 3, Removed: 1, Kept: 2})
	want := lines(
		"both 1 member hand default",
		"both 2 member ldap",
		"hand 1 admin hand default",
		"new 1 admin ldap",
		"new 2 member ldap default",
		"scim 1 member scim default",
		"upper 2 member LDAP default",
	)
	if got := allMembers(t, admin); got != want {
		t.Errorf("after the sync:\n%s\nwant:\n%s", got, want)
	}
	for id, detail := range map[tenancy.ID]string{
		a: `{"added": 1, "source": "ldap", "changed": 0, "removed": 0}`,
		b: `{"added": 2, "source": "ldap", "changed": 0, "removed": 1}`,
	} {
		if got := scan[string](t, admin, `SELECT string_agg(detail::text, ';') FROM tenancy.audit WHERE action = 'sync members' AND tenant = $1`, id); got != detail {
			t.Errorf("the audit of tenant %d says %s, want %s", id, got, detail)
		}
	}

	// The same again changes nothing, and says nothing.
	before := recorded(t, admin)
	mustSync(t, tn, set, tenancy.Synced{Kept: 2})
	if after := recorded(t, admin); after != before || allMembers(t, admin) != want {
		t.Errorf("a sync without a change goes from %v to %v:\n%s", before, after, allMembers(t, admin))
	}

	// Another role and another default are changes; the default comes from a membership by hand, too.
	set[2].Default, set[3].Role = true, tenancy.RoleAdmin
	mustSync(t, tn, set, tenancy.Synced{Changed: 2, Kept: 2})
	want = strings.NewReplacer("both 1 member hand default", "both 1 member hand", "both 2 member ldap", "both 2 member ldap default", "new 2 member", "new 2 admin").Replace(want)
	if got := allMembers(t, admin); got != want {
		t.Errorf("after the changes:\n%s\nwant:\n%s", got, want)
	}

	// What its holder has removed is the directory's to give from then on.
	if err := tn.Catalog().RemoveMember(t.Context(), a, "hand"); err != nil {
		t.Fatal(err)
	}
	mustSync(t, tn, set, tenancy.Synced{Added: 1, Kept: 1})
	want = strings.Replace(want, "hand 1 admin hand default", "hand 1 member ldap default", 1)
	if got := allMembers(t, admin); got != want {
		t.Errorf("after the removal by hand:\n%s\nwant:\n%s", got, want)
	}

	// Nothing is the source's any more, and all of the others stays.
	mustSync(t, tn, nil, tenancy.Synced{Removed: 4})
	if got, want := allMembers(t, admin), lines("both 1 member hand", "scim 1 member scim default", "upper 2 member LDAP default"); got != want {
		t.Errorf("after the empty set:\n%s\nwant:\n%s", got, want)
	}
}

// TestSyncIsAsIfMadeOneByOne compares with RemoveMember and AddMember, called one after the other on another fleet.
func TestSyncIsAsIfMadeOneByOne(t *testing.T) {
	t.Parallel()
	f, tn, _, _ := syncFleet(t)
	g, slow, _, _ := syncFleet(t)
	admin, oracle := f.Admin(t, "primary"), g.Admin(t, "primary")
	third, fourth := tenancytest.Create(t, tn, "initech").ID, tenancytest.Create(t, slow, "initech").ID
	if third != fourth {
		t.Fatal("the fleets differ")
	}
	r := rand.New(rand.NewPCG(1, 2))
	on := func(verb func(c *tenancy.Catalog) error) {
		t.Helper()
		if a, b := verb(tn.Catalog()), verb(slow.Catalog()); (a == nil) != (b == nil) {
			t.Fatalf("%v on one fleet, %v on the other", a, b)
		}
	}
	for round := range 60 {
		user, id := tenancy.UserKey(fmt.Sprint("u", r.IntN(3))), tenancy.ID(1+r.IntN(3))
		switch r.IntN(6) { // what people do between two syncs
		case 0:
			on(func(c *tenancy.Catalog) error {
				return c.AddMember(t.Context(), tenancy.Membership{User: user, Tenant: id})
			})
		case 1:
			on(func(c *tenancy.Catalog) error { return c.RemoveMember(t.Context(), id, user) })
		case 2:
			on(func(c *tenancy.Catalog) error { return c.SetDefault(t.Context(), user, id) })
		case 3:
			on(func(c *tenancy.Catalog) error { return c.SetDefault(t.Context(), user, 0) })
		}
		var set []tenancy.Membership
		hasDefault := map[tenancy.UserKey]bool{}
		for _, s := range r.Perm(9) {
			if r.IntN(2) == 0 {
				continue
			}
			m := tenancy.Membership{User: tenancy.UserKey(fmt.Sprint("u", s/3)), Tenant: tenancy.ID(1 + s%3), Role: []tenancy.Role{tenancy.RoleMember, tenancy.RoleAdmin}[r.IntN(2)]}
			m.Default = r.IntN(4) == 0 && !hasDefault[m.User]
			hasDefault[m.User] = hasDefault[m.User] || m.Default
			set = append(set, m)
		}
		before := allMembers(t, admin)
		synced, err := tn.Catalog().SyncMembers(t.Context(), "ldap", set)
		if err != nil {
			t.Fatal(err)
		}
		removed, kept := oneByOne(t, slow, set)
		after, want := allMembers(t, admin), allMembers(t, oracle)
		if after != want || synced.Removed != removed || synced.Kept != kept {
			t.Fatalf("round %d, from\n%s\nby %+v:\n%s\n%+v; one by one:\n%s\n%d removed, %d kept", round, before, set, after, synced, want, removed, kept)
		}
	}
}

// oneByOne is what SyncMembers of "ldap" is documented to be like.
func oneByOne(tb testing.TB, tn *tenancy.Tenancy, set []tenancy.Membership) (removed, kept int) {
	tb.Helper()
	c, others := tn.Catalog(), map[tenancy.Membership]bool{}
	for id := tenancy.ID(1); id <= 3; id++ {
		for m, err := range c.Members(tb.Context(), id) {
			if err != nil {
				tb.Fatal(err)
			}
			if m.Source != "ldap" {
				others[tenancy.Membership{User: m.User, Tenant: m.Tenant}] = true
			} else if !slices.ContainsFunc(set, func(s tenancy.Membership) bool { return s.User == m.User && s.Tenant == m.Tenant }) {
				removed++
				if err := c.RemoveMember(tb.Context(), m.Tenant, m.User); err != nil {
					tb.Fatal(err)
				}
			}
		}
	}
	for _, m := range set {
		if others[tenancy.Membership{User: m.User, Tenant: m.Tenant}] {
			kept++
			continue
		}
		m.Source = "ldap"
		if err := c.AddMember(tb.Context(), m); err != nil {
			tb.Fatal(err)
		}
	}
	return removed, kept
}

func TestARefusedSyncChangesNothing(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	c, ctx, admin := tn.Catalog(), t.Context(), f.Admin(t, "primary")
	full, err := c.Create(ctx, tenancy.NewTenant{Name: "full", MaxUsers: 3})
	if err != nil {
		t.Fatal(err)
	}
	deleted, purged := tenancytest.Create(t, tn, "deleted").ID, tenancytest.Create(t, tn, "purged").ID
	for _, id := range []tenancy.ID{deleted, purged} {
		if err := c.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.PurgeNow(ctx, purged, "purged"); err != nil {
		t.Fatal(err)
	}
	mustAdd(t, tn,
		tenancy.Membership{User: "one", Tenant: full.ID}, tenancy.Membership{User: "two", Tenant: full.ID, Source: "ldap"},
		tenancy.Membership{User: "stays", Tenant: a, Source: "ldap"})
	members, records := allMembers(t, admin), recorded(t, admin)
	in := func(id tenancy.ID, users ...tenancy.UserKey) (list []tenancy.Membership) {
		list = append(list, tenancy.Membership{User: "stays", Tenant: b, Default: true}, tenancy.Membership{User: "fresh", Tenant: a})
		for _, u := range users {
			list = append(list, tenancy.Membership{User: u, Tenant: id})
		}
		return list
	}
	for rule, r := range map[string]struct {
		source string
		set    []tenancy.Membership
		class  error
		tenant tenancy.ID
		says   string
	}{
		"no_source":             {"", in(a), tenancy.ErrInvalid, 0, "source: it is empty, which means by hand"},
		"long_source":           {strings.Repeat("s", 65), in(a), tenancy.ErrInvalid, 0, "source: at most 64 bytes"},
		"source_with_nul":       {"a\x00b", nil, tenancy.ErrInvalid, 0, "source"},
		"another_source_in_it":  {"ldap", append(in(a), tenancy.Membership{User: "u", Tenant: b, Source: "scim"}), tenancy.ErrInvalid, b, "set[2]: source"},
		"no_user":               {"ldap", in(b, ""), tenancy.ErrInvalid, b, "set[2]: user key: user key must not be empty"},
		"unknown_role":          {"ldap", append(in(a), tenancy.Membership{User: "u", Tenant: b, Role: "owner"}), tenancy.ErrInvalid, b, `set[2]: role: "owner"`},
		"twice":                 {"ldap", in(a, "u", "v", "fresh"), tenancy.ErrInvalid, a, "set[4]: user and tenant are those of set[1]"},
		"two_defaults":          {"ldap", append(in(a), tenancy.Membership{User: "stays", Tenant: a, Default: true}), tenancy.ErrInvalid, a, "set[2]: default: the user has one in set[0]"},
		"unknown_tenant":        {"ldap", in(999, "u"), tenancy.ErrTenantNotFound, 999, "tenant id 999"},
		"no_tenant":             {"ldap", in(0, "u"), tenancy.ErrTenantNotFound, 0, ""},
		"deleted_tenant":        {"ldap", in(deleted, "u"), tenancy.ErrTenantGone, deleted, fmt.Sprintf("tenant id %d", deleted)},
		"purged_tenant":         {"ldap", in(purged, "u"), tenancy.ErrTenantGone, purged, fmt.Sprintf("tenant id %d", purged)},
		"the_first_of_several":  {"ldap", append(in(999, "u"), tenancy.Membership{User: "u", Tenant: deleted}), tenancy.ErrTenantGone, deleted, ""},
		"too_many_users":        {"ldap", in(full.ID, "two", "three", "four"), tenancy.ErrUserLimit, full.ID, fmt.Sprintf("tenant id %d", full.ID)},
		"too_many_for_the_rest": {"ldap", in(full.ID, "three", "four", "five"), tenancy.ErrUserLimit, full.ID, ""},
	} {
		t.Run(rule, func(t *testing.T) {
			set := slices.Clone(r.set)
			got, err := c.SyncMembers(ctx, r.source, r.set)
			wantError(t, err, r.class, "sync members", r.says)
			if e, ok := errors.AsType[*tenancy.Error](err); !ok || e.Tenant != r.tenant || got != (tenancy.Synced{}) {
				t.Errorf("%+v; the error is of tenant %d, want %d", got, e.Tenant, r.tenant)
			}
			if !slices.Equal(set, r.set) {
				t.Error("the caller's set was written to")
			}
			if now := allMembers(t, admin); now != members {
				t.Errorf("memberships are now\n%s\nand were\n%s", now, members)
			}
			if now := recorded(t, admin); now != records {
				t.Errorf("epoch and audit went from %v to %v", records, now)
			}
		})
	}
	// One who leaves makes room, and a tenant over its limit may be left.
	mustSync(t, tn, in(full.ID, "three", "four"), tenancy.Synced{Added: 4, Removed: 2})
	if err := c.SetProfile(ctx, full.ID, tenancy.Profile{MaxUsers: 1}); err != nil {
		t.Fatal(err)
	}
	mustSync(t, tn, in(full.ID, "three"), tenancy.Synced{Removed: 1})
}

func TestASyncAnnouncesUsersOneByOneUpToAHundred(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	admin := f.Admin(t, "primary")
	users := func(n int, id tenancy.ID) (set []tenancy.Membership) {
		for i := range n {
			set = append(set, tenancy.Membership{User: tenancy.UserKey(fmt.Sprint("user-", i)), Tenant: id})
		}
		return set
	}
	announced := func() (changes, keys int64) {
		changes = scan[int64](t, admin, `SELECT count(*) FROM tenancy.changes WHERE kind = 'member'`)
		return changes, scan[int64](t, admin, `SELECT count(DISTINCT key) FROM tenancy.changes WHERE kind = 'member'`)
	}
	mustSync(t, tn, users(100, a), tenancy.Synced{Added: 100})
	if changes, keys := announced(); changes != 100 || keys != 100 {
		t.Errorf("100 users make %d changes of %d keys", changes, keys)
	}
	mustSync(t, tn, users(100, b), tenancy.Synced{Added: 100, Removed: 100}) // a user in two tenants is one
	if changes, keys := announced(); changes != 200 || keys != 100 {
		t.Errorf("100 users who move make %d changes of %d keys", changes, keys)
	}
	mustSync(t, tn, append(users(101, a), users(100, b)...), tenancy.Synced{Added: 101})
	if changes, keys := announced(); changes != 201 || keys != 100 {
		t.Errorf("101 users make %d changes of %d keys more", changes-200, keys-100)
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM tenancy.changes WHERE kind = 'member' AND key IS NULL AND tenant IS NULL`); n != 1 {
		t.Errorf("%d changes without a key, want one", n)
	}
	// A key in the changes goes with its tenant's purge.
	if n := scan[int](t, admin, `SELECT count(*) FROM tenancy.changes WHERE kind = 'member' AND key IS NOT NULL AND tenant IS NULL`); n != 0 {
		t.Errorf("%d keys that no purge takes out", n)
	}
}

func TestASecondProcessHearsOfASync(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	other := startNode(t, f)
	for _, size := range []int{3, 500} { // announced one by one, and all at once
		var set []tenancy.Membership
		for i := range size {
			set = append(set, tenancy.Membership{User: tenancy.UserKey(fmt.Sprint("user-", i)), Tenant: a})
		}
		for _, step := range []struct {
			set  []tenancy.Membership
			want string
		}{
			{nil, refused(tenancy.ErrForbidden)},
			{set, "acme"},
			{append(slices.Clone(set[1:]), tenancy.Membership{User: "user-0", Tenant: b}), "globex"},
			{append(slices.Clone(set), tenancy.Membership{User: "user-0", Tenant: b}), "globex"},
			{append(slices.Clone(set[1:]), tenancy.Membership{User: "user-0", Tenant: b}, tenancy.Membership{User: "user-0", Tenant: a, Default: true}), "acme"},
			{nil, refused(tenancy.ErrForbidden)},
		} {
			if _, err := tn.Catalog().SyncMembers(t.Context(), "ldap", step.set); err != nil {
				t.Fatal(err)
			}
			here := func() string { // at once: it has applied what it wrote
				ctx, err := tn.Resolve(t.Context(), tenancy.Query{User: "user-0"})
				if err != nil {
					return refused(errors.New(class(err)))
				}
				tenant, _ := tenancy.TenantFrom(ctx)
				return tenant.Name
			}
			if got := here(); got != step.want {
				t.Errorf("%d users: this node says %q, want %q", size, got, step.want)
			}
			took := until(t, 2*time.Second, step.want, func() string { return other.ask("resolve", "user-0") })
			t.Logf("%d users: %q after %v", size, step.want, took)
		}
	}
}

// blockedOn waits until n sessions of the primary wait for a lock.
func blockedOn(tb testing.TB, admin *pgx.Conn, n int) {
	tb.Helper()
	until(tb, 10*time.Second, fmt.Sprint(n), func() string {
		return fmt.Sprint(scan[int](tb, admin, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`))
	})
}

func TestASyncThatIsCutOffChangesNothing(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	admin, holder := f.Admin(t, "primary"), f.Admin(t, "primary")
	mustAdd(t, tn, tenancy.Membership{User: "gone", Tenant: b, Source: "ldap"}, tenancy.Membership{User: "hand", Tenant: b})
	var set []tenancy.Membership
	for i := range 300 {
		set = append(set, tenancy.Membership{User: tenancy.UserKey(fmt.Sprint("user-", i)), Tenant: a + tenancy.ID(i%2)})
	}
	set = append(set, tenancy.Membership{User: "hand", Tenant: a, Default: true})
	members, records := allMembers(t, admin), recorded(t, admin)
	for how, cut := range map[string]func(cancel func()){
		"cancelled": func(cancel func()) { cancel() },
		"killed": func(func()) {
			must(t, admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`)
		},
	} {
		t.Run(how, func(t *testing.T) {
			// Its last lock is the epoch's: all is written by then, and nothing is committed.
			tx, err := holder.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Exec(t.Context(), `SELECT FROM tenancy.epoch FOR UPDATE`); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failed := make(chan error, 1)
			go func() { failed <- second(tn.Catalog().SyncMembers(ctx, "ldap", set)) }()
			blockedOn(t, admin, 1)
			cut(cancel)
			err = <-failed
			if want := map[string]error{"cancelled": context.Canceled, "killed": tenancy.ErrPrimaryUnavailable}[how]; !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
			blockedOn(t, admin, 0)
			if err := tx.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
			if now := allMembers(t, admin); now != members {
				t.Errorf("memberships are now\n%s\nand were\n%s", now, members)
			}
			if now := recorded(t, admin); now != records {
				t.Errorf("epoch and audit went from %v to %v", records, now)
			}
		})
	}
	mustSync(t, tn, set, tenancy.Synced{Added: 301, Removed: 1})
}

// TestMaxUsersHoldsForASyncAndAHand stops AddMember after it has counted: a sync must not fill the place meanwhile.
func TestMaxUsersHoldsForASyncAndAHand(t *testing.T) {
	t.Parallel()
	f, tn, a, _ := syncFleet(t)
	c, ctx, admin, holder := tn.Catalog(), t.Context(), f.Admin(t, "primary"), f.Admin(t, "primary")
	if err := c.SetProfile(ctx, a, tenancy.Profile{MaxUsers: 1}); err != nil {
		t.Fatal(err)
	}
	must(t, holder, `SELECT pg_advisory_lock(hashtextextended('tenancy user hand', 0))`)
	var byHand, bySync error
	var wg sync.WaitGroup
	wg.Go(func() { byHand = c.AddMember(ctx, tenancy.Membership{User: "hand", Tenant: a}) })
	blockedOn(t, admin, 1)
	var over atomic.Bool
	wg.Go(func() {
		defer over.Store(true)
		bySync = second(c.SyncMembers(ctx, "ldap", []tenancy.Membership{{User: "synced", Tenant: a}}))
	})
	until(t, 10*time.Second, "true", func() string {
		waiting := scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`)
		return fmt.Sprint(waiting == 2 || over.Load())
	})
	must(t, holder, `SELECT pg_advisory_unlock_all()`)
	wg.Wait()
	if byHand != nil || !errors.Is(bySync, tenancy.ErrUserLimit) {
		t.Errorf("by hand: %v; by the sync: %v, want ErrUserLimit", byHand, bySync)
	}
	if got := allMembers(t, admin); got != "hand 1 member hand default" {
		t.Errorf("the members of a tenant of one:\n%s", got)
	}
}

// TestSyncsAndAllOtherVerbsGoTogether runs two sets of one source against each other, against another source and against whoever changes
// memberships by hand. Whenever one looks, the source's users are those of one of the sets, whole.
func TestSyncsAndAllOtherVerbsGoTogether(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	other := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	nodes := []*tenancy.Catalog{tn.Catalog(), other.Catalog()}
	admin, ctx := f.Admin(t, "primary"), t.Context()
	var sets [2][]tenancy.Membership
	for i := range 40 {
		user := tenancy.UserKey(fmt.Sprint("pure-", i))
		sets[0] = append(sets[0], tenancy.Membership{User: user, Tenant: a + tenancy.ID(i%2)})
		sets[1] = append(sets[1], tenancy.Membership{User: user, Tenant: b, Role: tenancy.RoleAdmin, Default: i%3 == 0}, tenancy.Membership{User: user, Tenant: a})
		mixed := tenancy.UserKey(fmt.Sprint("mixed-", i%4))
		if i < 4 {
			sets[0] = append(sets[0], tenancy.Membership{User: mixed, Tenant: a, Default: true})
			sets[1] = append(sets[1], tenancy.Membership{User: mixed, Tenant: b})
		}
	}
	whole := map[string]bool{"": true}
	for _, set := range sets {
		var l []string
		for _, m := range set {
			if strings.HasPrefix(string(m.User), "pure-") {
				role := m.Role
				if role == "" {
					role = tenancy.RoleMember
				}
				l = append(l, fmt.Sprintf("%s %d %s", m.User, m.Tenant, role))
			}
		}
		slices.Sort(l)
		whole[lines(l...)] = true
	}
	var calls atomic.Int64
	var wg sync.WaitGroup
	end := time.Now().Add(4 * time.Second)
	busy := func(verb func(c *tenancy.Catalog, r *rand.Rand) error) {
		for i := range nodes {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 7))
				for time.Now().Before(end) && !t.Failed() {
					if err := verb(nodes[i], r); err != nil {
						t.Error(err)
						return
					}
					calls.Add(1)
				}
			})
		}
	}
	someone := func(r *rand.Rand) tenancy.UserKey {
		if r.IntN(2) == 0 {
			return tenancy.UserKey(fmt.Sprint("mixed-", r.IntN(4)))
		}
		return tenancy.UserKey(fmt.Sprint("pure-", r.IntN(40)))
	}
	mixed := func(r *rand.Rand) tenancy.UserKey { return tenancy.UserKey(fmt.Sprint("mixed-", r.IntN(4))) }
	somewhere := func(r *rand.Rand) tenancy.ID { return a + tenancy.ID(r.IntN(2)) }
	for _, set := range sets {
		busy(func(c *tenancy.Catalog, _ *rand.Rand) error { return second(c.SyncMembers(ctx, "ldap", set)) })
	}
	busy(func(c *tenancy.Catalog, r *rand.Rand) error {
		return second(c.SyncMembers(ctx, "scim", []tenancy.Membership{{User: mixed(r), Tenant: b, Default: true}, {User: "scim", Tenant: a}}))
	})
	busy(func(c *tenancy.Catalog, r *rand.Rand) error {
		return c.AddMember(ctx, tenancy.Membership{User: mixed(r), Tenant: somewhere(r), Default: r.IntN(2) == 0, Source: []string{"", "ldap"}[r.IntN(2)]})
	})
	busy(func(c *tenancy.Catalog, r *rand.Rand) error { return c.RemoveMember(ctx, somewhere(r), mixed(r)) })
	busy(func(c *tenancy.Catalog, r *rand.Rand) error {
		if err := c.SetDefault(ctx, someone(r), somewhere(r)); !errors.Is(err, tenancy.ErrForbidden) {
			return err
		}
		return nil
	})
	busy(func(c *tenancy.Catalog, r *rand.Rand) error { return c.SetDefault(ctx, someone(r), 0) })
	busy(func(c *tenancy.Catalog, r *rand.Rand) error {
		domain := fmt.Sprintf("d%d.test", r.IntN(3))
		if err := c.AddDomain(ctx, somewhere(r), domain); err != nil && !errors.Is(err, tenancy.ErrTenantExists) {
			return err
		}
		return c.RemoveDomain(ctx, domain)
	})
	busy(func(c *tenancy.Catalog, r *rand.Rand) error {
		return c.SetProfile(ctx, somewhere(r), tenancy.Profile{MaxUsers: 1000 + r.IntN(9)})
	})
	wg.Go(func() { // one that comes and goes, with members
		for i := 0; time.Now().Before(end) && !t.Failed(); i++ {
			name := fmt.Sprint("passing-", i)
			made, err := nodes[0].Create(ctx, tenancy.NewTenant{Name: name, Admin: "mixed-0", Domains: []string{name + ".test", "a-" + name + ".test"}})
			if err == nil {
				err = errors.Join(nodes[1].AddMember(ctx, tenancy.Membership{User: "mixed-1", Tenant: made.ID, Source: "ldap"}), nodes[1].Delete(ctx, made.ID),
					second(nodes[0].PurgeNow(ctx, made.ID, name)))
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	seen := map[string]int{}
	for time.Now().Before(end) && !t.Failed() {
		now := scan[string](t, admin, `SELECT coalesce(string_agg(concat_ws(' ', user_key, tenant, role), E'\n' ORDER BY user_key COLLATE "C", tenant), '')
			FROM tenancy.memberships WHERE source = 'ldap' AND user_key LIKE 'pure-%'`)
		if seen[now]++; !whole[now] {
			t.Errorf("half a set:\n%s", now)
		}
		if n := scan[int](t, admin, `SELECT count(*) FROM (SELECT FROM tenancy.memberships WHERE is_default GROUP BY user_key HAVING count(*) > 1) x`); n != 0 {
			t.Errorf("%d users have two defaults", n)
		}
	}
	wg.Wait()
	t.Logf("%d calls; %d states of the source were seen", calls.Load(), len(seen))
	if len(seen) < 2 {
		t.Error("the two sets did not meet")
	}
	for i, set := range sets { // alone, the last word is whole
		if _, err := nodes[i].SyncMembers(ctx, "ldap", set); err != nil {
			t.Fatal(err)
		}
		for _, m := range set {
			if n := scan[int](t, admin, `SELECT count(*) FROM tenancy.memberships WHERE user_key = $1 AND tenant = $2`, m.User, m.Tenant); n != 1 {
				t.Errorf("%s is not in tenant %d", m.User, m.Tenant)
			}
		}
		if n := scan[int](t, admin, `SELECT count(*) FROM tenancy.memberships WHERE source = 'ldap'`); n > len(set) {
			t.Errorf("%d memberships of a set of %d", n, len(set))
		}
	}
	// A deadlock is tried again, and so stays unseen by callers. The server counts it, at the latest when the session ends.
	if err := errors.Join(tn.Close(), other.Close()); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "1", func() string {
		return fmt.Sprint(scan[int](t, admin, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()`))
	})
	if n := scan[int](t, admin, `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`); n != 0 {
		t.Errorf("%d deadlocks", n)
	}
}

func TestASyncOfThousandsIsOneTransaction(t *testing.T) {
	t.Parallel()
	f, tn, a, b := syncFleet(t)
	admin := f.Admin(t, "primary")
	users := 2500
	if os.Getenv("TENANCY_LONG") == "1" {
		users = 50_000
	}
	set := make([]tenancy.Membership, 0, 2*users)
	for i := range users {
		user := tenancy.UserKey(fmt.Sprint("user-", i, "@example.com"))
		set = append(set, tenancy.Membership{User: user, Tenant: a}, tenancy.Membership{User: user, Tenant: b, Default: i%2 == 0})
	}
	mustAdd(t, tn, tenancy.Membership{User: "hand", Tenant: a})
	timed := func(what string, set []tenancy.Membership, want tenancy.Synced) {
		t.Helper()
		epoch, start := recorded(t, admin)[0], time.Now()
		mustSync(t, tn, set, want)
		changes := recorded(t, admin)[0] - epoch
		t.Logf("%s: %v, %d changes", what, time.Since(start), changes)
		if changes > 1 {
			t.Errorf("%s: %d changes", what, changes)
		}
	}
	timed("all added", set, tenancy.Synced{Added: 2 * users})
	for range 8 { // the server may keep a plan from the sixth on
		timed("nothing changed", set, tenancy.Synced{})
	}
	if n := scan[int](t, admin, `SELECT count(*) FROM tenancy.memberships WHERE is_default AND (tenant = $1) = (substring(user_key, 'user-(\d+)')::int % 2 = 1)`, a); n != users {
		t.Errorf("%d of %d users have the default that the set says", n, users)
	}
	for i := range set {
		set[i].Role, set[i].Default = tenancy.RoleAdmin, set[i].Tenant == a
	}
	timed("all changed", set, tenancy.Synced{Changed: 2 * users})
	timed("all removed", nil, tenancy.Synced{Removed: 2 * users})
	if got := allMembers(t, admin); got != "hand 1 member hand default" {
		t.Errorf("what is left:\n%.200s", got)
	}
}
