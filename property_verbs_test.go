package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
)

// The verbs of tenants' lives, each with what the test knows before it is called, after it has
// returned, and once the other node has heard.

// create makes one more tenant.
func (m *machine) create(_ *subject, node int, _ tenancy.UserKey) {
	number := len(m.everyone()) + 1
	if number > most {
		return
	}
	as := []tenancy.Isolation{tenancy.IsolationShared, tenancy.IsolationSchema, tenancy.IsolationDatabase}[(number-1)%3]
	s := &subject{name: fmt.Sprintf("tenant-%d", number), shared: as == tenancy.IsolationShared, members: map[tenancy.UserKey][]membership{}}
	from, catalog := time.Now(), m.nodes[node].Catalog()
	t, err := catalog.Create(context.Background(), tenancy.NewTenant{Name: s.name, Isolation: as})
	if err != nil {
		m.found(failed, "create %s: %v", s.name, err)
		return
	}
	place, err := catalog.DataSource(context.Background(), t.ID)
	if err != nil {
		m.found(failed, "data source of %s: %v", s.name, err)
		return
	}
	s.id, s.uid = t.ID, t.UID.String()
	s.stays = []stay{{schema: place.Schema, login: place.User, from: from}}
	m.mu.Lock()
	m.subjects = append(m.subjects, s)
	m.mu.Unlock()
	m.eventually(s, "served", func() bool { _, err := m.nodes[1-node].Enter(context.Background(), s.id); return err == nil })
}

// rest marks the time of a verb, in which calls may fail.
func (s *subject) rest() (over func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := len(s.restless)
	s.restless = append(s.restless, span{from: time.Now()})
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.restless[i].to = time.Now()
	}
}

// state asks the catalog. The caller holds s.verb.
func (m *machine) state(s *subject) tenancy.State {
	t, err := m.nodes[0].Catalog().Tenant(context.Background(), s.id)
	if err != nil {
		m.found(failed, "state of %s: %v", s.name, err)
	}
	return t.State
}

// withdraw suspends a tenant, or deletes it, unless it is the last one served.
func (m *machine) withdraw(s *subject, node int, user tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	serving := 0
	for _, other := range m.everyone() {
		if other.serves() {
			serving++
		}
	}
	if !s.serves() || serving < 2 {
		return
	}
	over := s.rest()
	catalog := m.nodes[node].Catalog()
	suspend := func() error { return catalog.Suspend(context.Background(), s.id, tenancy.Suspension{}) }
	if user == m.users[0] {
		suspend = func() error { return catalog.Delete(context.Background(), s.id) }
	}
	if err := suspend(); err != nil {
		m.found(failed, "withdraw %s: %v", s.name, err)
		return
	}
	s.mu.Lock()
	s.out = append(s.out, span{from: time.Now()})
	s.mu.Unlock()
	over()
	m.mu.Lock()
	defer m.mu.Unlock()
	var sessions int
	err := m.admin.QueryRow(context.Background(), `SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, s.current().login).Scan(&sessions)
	if err != nil || sessions > 0 {
		m.found(letIn, "%s was withdrawn and has %d sessions at the server (%v)", s.name, sessions, err)
	}
}

// reopen brings back what withdraw took away.
func (m *machine) reopen(s *subject, node int, _ tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	if s.serves() {
		return
	}
	reopen := m.nodes[node].Catalog().Resume
	if m.state(s) == tenancy.StateDeleted {
		reopen = m.nodes[node].Catalog().Restore
	}
	defer s.rest()()
	s.mu.Lock()
	s.out[len(s.out)-1].to = time.Now()
	s.mu.Unlock()
	if err := reopen(context.Background(), s.id); err != nil {
		m.found(failed, "reopen %s: %v", s.name, err)
		return
	}
	m.eventually(s, "served", func() bool { _, err := m.nodes[1-node].Enter(context.Background(), s.id); return err == nil })
}

// move gives the tenant another, empty place. The rows stay behind: what matters is where new ones go.
func (m *machine) move(s *subject, node int, _ tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	if m.state(s) == tenancy.StateDeleted {
		return
	}
	catalog := m.nodes[node].Catalog()
	as := tenancy.IsolationDatabase // from one to the other, each time
	if t, err := catalog.Tenant(context.Background(), s.id); err == nil && t.Isolation == as {
		as = tenancy.IsolationSchema
	}
	place, err := catalog.Prepare(context.Background(), s.id, "", as)
	if s.shared {
		if !errors.Is(err, tenancy.ErrInvalid) {
			m.found(unguarded, "a place of its own was prepared for %s, whose rows are in shared tables: %v", s.name, err)
		}
		return
	}
	if err != nil {
		m.found(failed, "prepare for %s: %v", s.name, err)
		return
	}
	s.mu.Lock()
	s.stays = append(s.stays, stay{schema: place.Schema, login: place.User, from: time.Now()})
	s.mu.Unlock()
	if err := catalog.SetDataSource(context.Background(), s.id, place); err != nil {
		if node == 0 && errors.Is(err, tenancy.ErrInvalid) && strings.Contains(err.Error(), "Config.Migrations do not have") { // the tenant is where the newer node has brought it
			s.mu.Lock()
			s.stays = s.stays[:len(s.stays)-1]
			s.mu.Unlock()
			return
		}
		m.found(failed, "move %s: %v", s.name, err)
		return
	}
	s.leave(node, time.Now())
	s.leave(1-node, time.Now().Add(heard))
	if !s.serves() {
		return
	}
	m.eventually(s, "moved", func() bool {
		ctx, err := m.nodes[1-node].Enter(context.Background(), s.id)
		if err != nil {
			return false
		}
		var schema string
		err = m.nodes[1-node].DB().QueryRow(ctx, `SELECT current_schema()`).Scan(&schema)
		return err == nil && schema == place.Schema
	})
	s.leave(1-node, time.Now())
}

// leave says by when the node must have left the last place but one.
func (s *subject) leave(node int, by time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stays[len(s.stays)-2].until[node] = by
}

// migrate brings the tenant to the second node's version.
func (m *machine) migrate(s *subject, _ int, _ tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	if m.state(s) == tenancy.StateDeleted {
		return
	}
	if _, err := m.nodes[1].Migrator().Tenant(context.Background(), s.id); err != nil {
		m.found(failed, "migrate %s: %v", s.name, err)
	}
}

func (m *machine) refresh(_ *subject, node int, _ tenancy.UserKey) {
	if err := m.nodes[node].Refresh(context.Background()); err != nil {
		m.found(failed, "refresh: %v", err)
	}
}

// isMember asks a node. A tenant out of service says so to its members alone.
func (m *machine) isMember(s *subject, node int, user tenancy.UserKey) bool {
	_, err := m.nodes[node].Resolve(context.Background(), askingFor(user, s))
	return err == nil || !errors.Is(err, tenancy.ErrForbidden)
}

func askingFor(user tenancy.UserKey, s *subject) tenancy.Query {
	return tenancy.Query{User: user, Hints: []tenancy.Hint{{Source: "test", Trust: tenancy.Choice, By: tenancy.ByName, Value: s.name}}}
}

func (m *machine) enrol(s *subject, node int, user tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	m.enrolling.Lock()
	defer m.enrolling.Unlock()
	if _, surely := s.belonged(user, node, time.Now(), time.Now()); surely || m.state(s) == tenancy.StateDeleted {
		return
	}
	s.mu.Lock()
	s.members[user] = append(s.members[user], membership{from: time.Now()})
	at := &s.members[user][len(s.members[user])-1]
	s.mu.Unlock()
	if err := m.nodes[node].Catalog().AddMember(context.Background(), tenancy.Membership{User: user, Tenant: s.id}); err != nil {
		m.found(failed, "enrol %s: %v", s.name, err)
		return
	}
	s.stamp(&at.sure[node], time.Now())
	m.eventually(s, "enrolled", func() bool { return m.isMember(s, 1-node, user) })
	s.stamp(&at.sure[1-node], time.Now())
}

func (m *machine) expel(s *subject, node int, user tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	m.enrolling.Lock()
	defer m.enrolling.Unlock()
	if _, surely := s.belonged(user, node, time.Now(), time.Now()); !surely {
		return
	}
	s.mu.Lock()
	at := &s.members[user][len(s.members[user])-1]
	at.removed = time.Now()
	s.mu.Unlock()
	if err := m.nodes[node].Catalog().RemoveMember(context.Background(), s.id, user); err != nil {
		m.found(failed, "expel from %s: %v", s.name, err)
		return
	}
	s.stamp(&at.until[node], time.Now())
	s.stamp(&at.until[1-node], time.Now().Add(heard))
	m.eventually(s, "expelled", func() bool { return !m.isMember(s, 1-node, user) })
	s.stamp(&at.until[1-node], time.Now())
}

func (s *subject) stamp(field *time.Time, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*field = at
}

// setDefault makes the tenant the user's first choice, and asks for it without naming it.
func (m *machine) setDefault(s *subject, node int, user tenancy.UserKey) {
	s.verb.Lock()
	defer s.verb.Unlock()
	m.enrolling.Lock()
	defer m.enrolling.Unlock()
	if _, surely := s.belonged(user, node, time.Now(), time.Now()); !surely || !s.serves() {
		return
	}
	if err := m.nodes[node].Catalog().SetDefault(context.Background(), user, s.id); err != nil {
		m.found(failed, "set default %s: %v", s.name, err)
		return
	}
	ctx, err := m.nodes[node].Resolve(context.Background(), tenancy.Query{User: user})
	if err != nil {
		m.found(failed, "resolve the default %s: %v", s.name, err)
		return
	}
	if t, _ := tenancy.TenantFrom(ctx); t.ID != s.id {
		m.found(letIn, "the default of %s is %s, resolved to %s", user, s.name, t.Name)
	}
}

// eventually waits until the other node knows.
func (m *machine) eventually(s *subject, what string, done func() bool) {
	for start := time.Now(); !done(); time.Sleep(time.Millisecond) {
		if time.Since(start) > heard {
			m.found(late, "%s: not %s on the other node after %v", s.name, what, heard)
			return
		}
	}
}
