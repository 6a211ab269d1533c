package tenancy

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/primary"
)

// setting is one of a server's, and where it comes from.
type setting struct{ value, source string }

const (
	oldestMajor = 15 // of PostgreSQL, that the library works with
	newestMajor = 18 // that its tests have run on
	clockSkew   = time.Second
	clockLooks  = 5
)

// readSettings reads them once for a session, before anything is set in it.
func (w *ward) readSettings(ctx context.Context) error {
	if w.settings != nil {
		return nil
	}
	rows, _ := w.conn.Query(ctx, `SELECT name, setting, source FROM pg_settings WHERE name IN ('server_version_num', 'server_version', 'synchronous_commit', 'password_encryption', 'ssl',
			'default_transaction_read_only', 'lo_compat_privileges', 'max_connections', 'superuser_reserved_connections', 'reserved_connections')
		UNION ALL SELECT 'in_recovery', pg_is_in_recovery()::text, ''`)
	settings := map[string]setting{}
	var name string
	var s setting
	if _, err := pgx.ForEachRow(rows, []any{&name, &s.value, &s.source}, func() error { settings[name] = s; return nil }); err != nil {
		return err
	}
	w.settings = settings
	return nil
}

// number is a setting that is a number; 0 where the server has none of that name.
func (w *ward) number(name string) (n int) {
	_, _ = fmt.Sscan(w.settings[name].value, &n)
	return n
}

func checkVersion(ctx context.Context, w *ward) error {
	if err := w.readSettings(ctx); err != nil {
		return err
	}
	switch major := w.number("server_version_num") / 10_000; {
	case major < oldestMajor:
		w.find(LevelFailure, fmt.Sprintf("PostgreSQL %d is older than the library works with", major), "statements of it are missing there", fmt.Sprintf("upgrade it to PostgreSQL %d or newer", oldestMajor))
	case major > newestMajor:
		w.find(LevelNote, fmt.Sprintf("PostgreSQL %d is newer than this release was tested with", major), "roles and their memberships change between major versions", "run the service's tests on it")
	}
	return nil
}

func checkSettings(ctx context.Context, w *ward) error {
	if err := w.readSettings(ctx); err != nil {
		return err
	}
	database := "ALTER DATABASE " + ident.Quote(w.address.Database)
	if w.settings["in_recovery"].value == "true" {
		w.find(LevelFailure, "the server is a standby", "nothing can be written there: a failover is under way, or the address leads to the wrong one", "SELECT pg_promote(); -- if it is to be the one, or give the other's address")
	}
	for _, s := range []struct {
		name     string
		bad      string
		level    Level
		why, set string
	}{
		{"synchronous_commit", "off", LevelWarning, "what callers were told is committed is lost when the server dies: at the primary a suspension, or the way to a tenant's new place", database + " SET synchronous_commit = on;"},
		{"default_transaction_read_only", "on", LevelFailure, "each write is refused", "BEGIN READ WRITE; " + database + " SET default_transaction_read_only = off; COMMIT;"},
		{"lo_compat_privileges", "on", LevelFailure, "a tenant may read and write the large objects of the others", "ALTER SYSTEM SET lo_compat_privileges = off; SELECT pg_reload_conf();"},
		{"password_encryption", "md5", LevelWarning, "a password that is set by hand is kept as MD5, which is as good as the password to who reads it; the library's own are SCRAM", "ALTER SYSTEM SET password_encryption = 'scram-sha-256'; SELECT pg_reload_conf();"},
	} {
		if is := w.settings[s.name]; is.value == s.bad {
			if s.name == "lo_compat_privileges" && (is.source == "global" || strings.HasPrefix(is.source, "database") || is.source == "user") {
				continue // checkRoles tells whose it is
			}
			mend := s.set
			switch is.source { // whatever says it
			case "user":
				mend = "ALTER ROLE " + ident.Quote(w.address.User) + " RESET " + s.name + ";"
			case "database user":
				mend = "ALTER ROLE " + ident.Quote(w.address.User) + " IN DATABASE " + ident.Quote(w.address.Database) + " RESET " + s.name + ";"
			case "database":
				if strings.HasPrefix(mend, "ALTER SYSTEM") {
					mend = database + " RESET " + s.name + ";"
				}
			}
			w.find(s.level, s.name+" is "+s.bad, s.why, mend)
		}
	}
	if away := w.address; w.settings["ssl"].value == "off" {
		away.TLS = ""
		if away.tlsMode() != "disable" && !strings.HasPrefix(away.Host, "/") {
			w.find(LevelWarning, "the server has no TLS, and "+away.Host+" is no loopback address", "passwords are not sent in clear, and all rows are", "give the server a certificate, and: ALTER SYSTEM SET ssl = on; SELECT pg_reload_conf();")
		}
	}
	return nil
}

func checkConnections(ctx context.Context, w *ward) error {
	if err := w.readSettings(ctx); err != nil {
		return err
	}
	most := w.number("max_connections") - w.number("superuser_reserved_connections") - w.number("reserved_connections")
	if conns := w.tn.cfg.Limits.ServerConns; conns > most {
		w.find(LevelWarning, fmt.Sprintf("Limits.ServerConns is %d, and the server gives %d connections to who is no superuser", conns, most),
			"at full load connections are refused, of whoever comes last", fmt.Sprintf("lower Limits.ServerConns to %d less what else connects, or: ALTER SYSTEM SET max_connections = %d; and restart the server", most, conns+w.number("max_connections")-most))
	}
	return nil
}

// checkPooler asks who answers: behind a pooler it is another process than that which was dialled.
func checkPooler(ctx context.Context, w *ward) error {
	const mend = "give PostgreSQL's own address; tenants' calls alone may go through a pooler: ServerConfig.Pooler, docs/poolers.md"
	pooled := func(conn *pgx.Conn) (bool, error) {
		var pid uint32
		err := conn.QueryRow(ctx, `SELECT pg_catalog.pg_backend_pid()`, pgx.QueryExecModeSimpleProtocol).Scan(&pid)
		return pid != conn.PgConn().PID(), err
	}
	through, err := pooled(w.conn)
	if err != nil {
		return err
	}
	if w.server != nil {
		if w.pooled = through; through {
			w.find(LevelFailure, "between this node and the server is a pooler", "the provisioner's sessions, migrations and tenants without a pooler need sessions of their own, and what they set goes to others; nothing else was looked at", mend)
		}
		return w.dialPooler(ctx)
	}
	if through {
		w.find(LevelFailure, "Config.ListenURL leads through a pooler", "locks and notifications need a session of their own: two verbs can be at work on one tenant", "give PostgreSQL's own address in Config.ListenURL")
	}
	conn, err := w.tn.primary.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	if through, err = pooled(conn.Conn()); err == nil && through && w.tn.cfg.ListenURL != w.tn.cfg.PrimaryURL {
		w.find(LevelNote, "Config.PrimaryURL leads through a pooler", "that is supported: what needs a session goes to Config.ListenURL", "nothing is to be done")
	}
	return err
}

// dialPooler sees whether the pooler that the server is registered with is there.
func (w *ward) dialPooler(ctx context.Context) error {
	if w.server.pooler == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, w.tn.cfg.Limits.ConnectTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", w.server.pooler)
	if err != nil {
		w.find(LevelFailure, "its pooler cannot be reached: "+err.Error(), "tenants whose calls go through it cannot be served", "start it, or take it out with Catalog.AddServer and Catalog.RotatePassword; docs/poolers.md")
		return nil
	}
	return conn.Close()
}

// checkClock compares the clocks by the shortest of some round trips.
func checkClock(ctx context.Context, w *ward) error {
	var skew, least time.Duration
	for i := range clockLooks {
		var there time.Time
		sent, began := w.now(), time.Now()
		if err := w.conn.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&there); err != nil {
			return err
		}
		if trip := time.Since(began); i == 0 || trip < least {
			least, skew = trip, there.Sub(sent.Add(trip/2))
		}
	}
	if skew.Abs()-least/2 <= clockSkew {
		return nil
	}
	way := "ahead of"
	if skew < 0 {
		way = "behind"
	}
	w.find(LevelWarning, fmt.Sprintf("the server's clock is %v %s this node's", skew.Abs().Round(time.Millisecond), way),
		"tokens and visits end by this node's clock, and records, leases and silence are told by the servers': what one says is over goes on for the other", "let both follow one time server")
	return nil
}

func checkPrimary(ctx context.Context, w *ward) error {
	var version int64
	if err := w.conn.QueryRow(ctx, `SELECT coalesce(max(version_id), 0) FROM tenancy.`+versionTable+` WHERE is_applied`).Scan(&version); err != nil {
		return err
	}
	switch {
	case version > primary.Version:
		w.find(LevelWarning, fmt.Sprintf("its schema is at version %d, and this release knows %d", version, primary.Version), "this node is refused when it starts again", "deploy the newer release on this node")
	case version < primary.Version:
		w.find(LevelFailure, fmt.Sprintf("its schema is at version %d, and this release needs %d", version, primary.Version), "it was restored, or somebody took it back: statements of this release fail", "start this node again, with a login that owns schema tenancy")
	}
	return w.missing(w.tn.primary.verify(ctx), "the primary is open to roles that have no business there")
}

// checkListen sends itself a notification: by the way of the pool, and back by that of ListenURL.
func checkListen(ctx context.Context, w *ward) error {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	channel := "tenancy_doctor_" + hex.EncodeToString(b[:])
	if _, err := w.conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	if _, err := w.tn.primary.pool.Exec(ctx, `SELECT pg_notify($1, '')`, channel); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if _, err := w.conn.WaitForNotification(ctx); err != nil {
		w.find(LevelWarning, fmt.Sprintf("a notification did not come back within %v: %v", probeTimeout, err), "changes are heard of by the poll alone, up to Lookups.PollPeriod late", "give PostgreSQL's own address in Config.ListenURL: a pooler swallows notifications")
		return nil
	}
	_, err := w.conn.Exec(ctx, "UNLISTEN "+channel)
	return err
}

// sealedRecords are all that RotateKeys seals anew, each by the id of its key, which stands in clear before the rest.
const sealedRecords = `SELECT CASE WHEN octet_length(sealed) > 1 AND octet_length(sealed) > 2 + get_byte(sealed, 1) THEN encode(substring(sealed FROM 3 FOR get_byte(sealed, 1)), 'escape') ELSE '' END, count(*) FROM (
		SELECT sentinel FROM tenancy.realm
		UNION ALL SELECT provisioner FROM tenancy.servers WHERE provisioner IS NOT NULL
		UNION ALL SELECT sealed FROM tenancy.data_sources WHERE state <> 'dropped'
		UNION ALL SELECT sealed FROM tenancy.dense_logins) all_of_them (sealed) GROUP BY 1 ORDER BY 1`

func checkKeys(ctx context.Context, w *ward) error {
	ring := w.tn.primary.keys.ring
	rows, _ := w.tn.primary.pool.Query(ctx, sealedRecords)
	var id string
	var n int
	used := map[string]bool{}
	_, err := pgx.ForEachRow(rows, []any{&id, &n}, func() error {
		used[id] = true
		switch {
		case id == ring.Primary():
		case slices.Contains(ring.IDs(), id):
			w.find(LevelWarning, fmt.Sprintf("%d records are sealed with the older key %q", n, id), "that key cannot be taken out of Config.Keys, nor be forgotten when it has leaked", "call Catalog.RotateKeys, when each node has the newer key")
		default:
			w.find(LevelFailure, fmt.Sprintf("%d records are sealed with a key of id %q, which Config.Keys has not", n, id), "what is sealed cannot be opened: those tenants cannot be served from here", "give this node the whole keyring; docs/operations.md, \"The keys are wrong\"")
		}
		return nil
	})
	for _, id := range ring.IDs() {
		if err == nil && !used[id] && id != ring.Primary() {
			w.find(LevelNote, fmt.Sprintf("key %q seals nothing any more", id), "a key that is not needed can only leak", "take it out of Config.Keys, on each node")
		}
	}
	return err
}

// checkNodes counts the nodes that take callers. This one is among them where it has an address or a tenant's pool: a process that only calls Doctor, as the command does, takes none.
func checkNodes(ctx context.Context, w *ward) error {
	rows, _ := w.tn.primary.pool.Query(ctx, `SELECT id::text, name, extract(epoch FROM now() - seen)::float8, seen <= now() - $1::interval FROM tenancy.nodes ORDER BY name, id`, nodeSilence.String())
	var id, name string
	var age float64
	var silent bool
	own, serves, living := w.tn.feed.node.String(), w.tn.cfg.NodeAddress != "", 0
	for range w.tn.Stats() {
		serves = true
		break
	}
	_, err := pgx.ForEachRow(rows, []any{&id, &name, &age, &silent}, func() error {
		if !silent {
			if id != own || serves {
				living++
			}
			return nil
		}
		w.find(LevelWarning, fmt.Sprintf("node %s (%s) has been silent for %v", name, id, time.Duration(age*float64(time.Second)).Round(time.Second)), "it is paused, cut off or dead: it serves what it knew then, and fences do not wait for it",
			w.within("DELETE FROM tenancy.nodes WHERE id = "+ident.Literal(id)+";")+", when its process is gone; the validity job does it after an hour")
		return nil
	})
	if limit := w.tn.cfg.Limits.Nodes; err == nil && living > limit {
		w.find(LevelWarning, fmt.Sprintf("%d nodes are alive, and Limits.Nodes is %d", living, limit), "each takes its part of Limits.ServerConns as if there were no more: together they open too many connections", "raise Limits.Nodes on each node")
	}
	return err
}

func checkIntents(ctx context.Context, w *ward) error {
	return w.eachPlace(ctx, `d.state = 'intent' AND d.updated < now() - interval '1 hour'`, func(p *doctorPlace) {
		mend := "nothing is to be done: the validity job drops it"
		if p.tenant.ID != 0 {
			mend = "call Catalog.Create again with the same request, or Catalog.Delete and Catalog.Purge"
		}
		w.ofTenant(p.tenant, LevelWarning, fmt.Sprintf("place %s is unfinished for more than an hour", p.source.Schema), "whoever made it has died, or gave up: its tenant cannot be served, and what is there takes up room", mend)
	})
}

func checkFences(ctx context.Context, w *ward) error {
	if err := w.eachPlace(ctx, `t.data_source = d.id AND t.state IN ('suspended', 'maintenance', 'deleted') AND t.fenced IS NULL AND t.updated < now() - interval '1 minute'`, func(p *doctorPlace) {
		verb := "Suspend"
		if p.tenant.State == StateDeleted {
			verb = "Delete"
		}
		w.ofTenant(p.tenant, LevelWarning, fmt.Sprintf("the tenant is %s, and was not closed at its server", p.tenant.State), "a node that does not hear of it goes on serving it, and a stolen password opens it", "call Catalog."+verb+" again; the validity job does it, too")
	}); err != nil {
		return err
	}
	return w.eachPlace(ctx, `d.leaving < now() - interval '1 hour' AND t.data_source IS DISTINCT FROM d.id`, func(p *doctorPlace) {
		w.ofTenant(p.tenant, LevelWarning, fmt.Sprintf("the tenant has left place %s, which was not closed", p.source.Schema), "its login opens what the tenant's data was", "see why the validity job does not close it: the server, or its provisioner")
	})
}

// eachPlace calls fn for the places of the condition.
func (w *ward) eachPlace(ctx context.Context, condition string, fn func(p *doctorPlace)) error {
	rows, _ := w.tn.primary.pool.Query(ctx, `SELECT d.id FROM tenancy.data_sources d LEFT JOIN tenancy.tenants t ON t.uid = d.uid WHERE d.state <> 'dropped' AND `+condition)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	for _, s := range w.servers {
		for _, p := range s.places {
			if slices.Contains(ids, p.id) {
				fn(p)
			}
		}
	}
	return err
}

func checkMigrations(ctx context.Context, w *ward) error {
	if w.tn.migrations.empty() {
		w.find(LevelNote, "the versions of tenants' schemas were not looked at", "a tenant behind the service's code fails", "set Config.Migrations")
		return nil
	}
	s, err := w.tn.Migrator().Status(ctx)
	if err != nil {
		return err
	}
	for _, t := range s.Dirty {
		w.ofTenant(t.Tenant, LevelFailure, fmt.Sprintf("migration %d has died half-way", t.Dirty), "no migration of it runs, and the service meets a schema that is neither of two", "look at its schema, then call Migrator.Resolve; docs/operations.md, \"Migrating all tenants\"")
	}
	for _, t := range s.Behind {
		w.ofTenant(t.Tenant, LevelWarning, fmt.Sprintf("its schema is at version %d, and the service wants %d", t.Version, (&place{pinned: t.Pinned}).upTo(s.Newest)), "the service's code may ask for what is not there", "call Migrator.Run")
	}
	for _, t := range s.Ahead {
		w.ofTenant(t.Tenant, LevelNote, fmt.Sprintf("its schema is at version %d, and this release knows %d", t.Version, s.Newest), "a newer release has migrated it", "deploy that release everywhere")
	}
	for _, t := range s.Pinned {
		w.ofTenant(t.Tenant, LevelNote, fmt.Sprintf("it is pinned to version %d", t.Pinned), "it goes no further with the others", "call Migrator.Unpin, when it may")
	}
	return nil
}
