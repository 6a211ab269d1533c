package tenancy

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/internal/ident"
)

// identity is what a connection of the tenant says about itself.
type identity struct {
	user     string
	database string
	schemas  []string
	realm    string
	uid      string
	question string // the statements that ask for it
	pooled   bool   // through a pooler, which is asked in another way
	unbound  bool   // of a login of many tenants: whose the connection is, is asked when it is bound
}

// identity is what a connection to the data source has to say when it is the tenant's.
func (tn *Tenancy) identity(tenant UID, source DataSource) identity {
	return identity{
		user:     source.User,
		database: source.Database,
		schemas:  schemasOf(source.Schema, tn.cfg.Extensions, tn.cfg.ReferenceTables),
		realm:    UID(tn.realm.Value()).String(),
		uid:      tenant.String(),
		question: question(source.Schema, tn.cfg.Extensions || tn.cfg.ReferenceTables),
		pooled:   source.Pooler != "",
	}
}

// question asks as little as it can, because the process that answers is new and looks up everything for the first time. The
// schema itself is found, and may be used, when its marker can be read; the shared ones behind it have to be looked for.
//
// The marker is apart, because Citus refuses to plan it (a table of one node) together with functions of the session.
// Names are qualified: the search_path is what is in doubt.
func question(schema string, shared bool) string {
	schemas := ""
	if shared {
		schemas = ", pg_catalog.current_schemas(false)"
	}
	return "SHOW search_path; SELECT current_catalog, pg_catalog.pg_backend_pid(), current_user" + schemas + "; " +
		markerQuestion(schema)
}

// loginQuestion asks a connection whose login is that of many tenants. It finds no schema of theirs.
const loginQuestion = "SHOW search_path; SELECT current_catalog, pg_catalog.pg_backend_pid(), current_user"

// boundQuestion asks such a connection when it has taken a tenant's role.
func boundQuestion(schema string) string {
	return "SELECT current_catalog, pg_catalog.pg_backend_pid(), current_user, pg_catalog.current_schemas(false); " + markerQuestion(schema)
}

func markerQuestion(schema string) string {
	return "SELECT realm, tenant FROM " + ident.Quote(schema, markerTable) + " LIMIT 2"
}

func schemasOf(schema string, extensions, reference bool) []string {
	schemas := []string{schema}
	if extensions {
		schemas = append(schemas, extSchema)
	}
	if reference {
		schemas = append(schemas, refSchema)
	}
	return schemas
}

// searchPath is the value of the startup parameter: quoted names, because an unquoted one is folded
// to another tenant's, and never public.
func searchPath(schema string, extensions, reference bool) string {
	return quotedPath(schemasOf(schema, extensions, reference))
}

func quotedPath(schemas []string) string {
	quoted := make([]string, len(schemas))
	for i, s := range schemas {
		quoted[i] = ident.Quote(s)
	}
	return strings.Join(quoted, ", ")
}

// proveLogin connects once as the place's login, on the same terms as a pool.
func (tn *Tenancy) proveLogin(ctx context.Context, p *place) error {
	source, err := p.source.viaPooler()
	if err != nil {
		return err
	}
	conn, err := tn.proved(ctx, p.tenant, source, "")
	if err == nil {
		closeConn(conn)
	}
	return err
}

// proved connects as the source's login, on the same terms as a pool, and proves the connection, which is the caller's to close.
func (tn *Tenancy) proved(ctx context.Context, t Tenant, source DataSource, application string) (*pgx.Conn, error) {
	cc, err := source.connConfig()
	if err != nil {
		return nil, err
	}
	cc.ConnectTimeout = tn.cfg.Limits.ConnectTimeout
	tn.pins(cc, source).set(cc)
	tn.servers.single(cc)
	if application != "" {
		cc.RuntimeParams["application_name"] = application
	}
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, connectError(err)
	}
	one := tenantPool{tenant: t, limits: tn.cfg.Limits, want: tn.identity(t.UID, source)}
	if err := one.proveWithin(ctx, conn); err != nil {
		closeConn(conn)
		return nil, err
	}
	return conn, nil
}

// prove asks conn who it is and marks it when every answer is the expected one.
// Otherwise the error is [ErrIdentity] or [ErrPooler] with what differed, or that of the connection.
// The caller closes conn then.
func (p *tenantPool) prove(ctx context.Context, conn *pgx.Conn) error {
	pg := conn.PgConn()
	established(pg)
	ask := p.want.proveDirect
	if p.want.pooled {
		ask = p.want.provePooled
	}
	if err := ask(ctx, pg); err != nil {
		return err
	}
	(&proof{pool: p}).carry(pg)
	return nil
}

// proveDirect asks in one round trip.
func (w *identity) proveDirect(ctx context.Context, pg *pgconn.PgConn) error {
	// First what the server said at login, for free: no statement is sent as a superuser, for whom
	// a marker that the tenant has turned into a view would be a trap.
	if err := w.login(pg.ParameterStatus("session_authorization"), pg.ParameterStatus("is_superuser")); err != nil {
		return err
	}
	if pg.ParameterStatus("in_hot_standby") == "on" {
		return errStandby
	}
	results, err := pg.Exec(ctx, w.question).ReadAll()
	if len(results) > 1 && results[1].Err == nil {
		if err := w.session(pg.PID(), results[0].Rows, results[1].Rows); err != nil {
			return err
		}
	}
	if err != nil {
		return unanswered(err)
	}
	if w.unbound && len(results) == 2 {
		return nil
	}
	if len(results) != 3 {
		return hinted(ErrIdentity, "it gave %d answers to three questions", len(results))
	}
	return w.marker(results[2].Rows)
}

// unanswered is the failure of a question: the connection's, or the server's refusal to read the marker.
func unanswered(err error) error {
	if refused, ok := errors.AsType[*pgconn.PgError](err); ok && notTheTenants(refused) {
		return fmt.Errorf("%w: its marker row cannot be read: %w", ErrIdentity, refused)
	}
	return &connectFailure{text: "asking a connection for its identity: " + withoutSecrets(err).Error(), cause: err}
}

// established says that the connection's further dials are those of cancel requests.
func established(pg *pgconn.PgConn) {
	if c := budget.Of(pg.Conn()); c != nil {
		c.Established()
	}
}

// errStandby is a server that cannot be written to: a failover is under way, or the address leads to the wrong one.
var errStandby = &connectFailure{text: "the server is a standby (in_hot_standby is on)"}

// notTheTenants tells a refusal from a failure: no such schema or table, or no right to it.
func notTheTenants(err *pgconn.PgError) bool {
	switch err.Code {
	case "42P01", "3F000", "42501", "42703", "42809":
		return true
	}
	return false
}

func (w *identity) login(user, superuser string) error {
	switch {
	case user == "" || superuser == "":
		return hinted(ErrPooler, "the server does not say who is logged in, as PostgreSQL does")
	case superuser != "off":
		return hinted(ErrIdentity, "login %q is a superuser, for whom no wall stands", user)
	case user != w.user:
		return hinted(ErrIdentity, "logged in as %q, not %q", user, w.user)
	}
	return nil
}

// session judges the answers to the first two questions. Who logged in has been judged before.
func (w *identity) session(pid uint32, path, rows [][][]byte) error {
	columns := 3
	if len(w.schemas) > 1 && !w.unbound {
		columns = 4
	}
	if len(path) != 1 || len(path[0]) != 1 || len(rows) != 1 || len(rows[0]) != columns {
		return hinted(ErrIdentity, "it gave other rows than it was asked for")
	}
	database, backend, user := string(rows[0][0]), string(rows[0][1]), string(rows[0][2])
	switch {
	case backend != strconv.FormatUint(uint64(pid), 10):
		return hinted(ErrPooler, "we dialled backend %d and are answered by %s: connect to PostgreSQL directly, or "+declarePooler, pid, backend)
	case user != w.user:
		return hinted(ErrIdentity, "current user %q, not %q", user, w.user)
	case database != w.database:
		return hinted(ErrIdentity, "database %q, not %q", database, w.database)
	case unquoted(string(path[0][0])) != strings.Join(w.schemas, ","):
		return hinted(ErrIdentity, "search_path is %s, not %q", path[0][0], w.schemas)
	case columns == 4 && string(rows[0][3]) != "{"+strings.Join(w.schemas, ",")+"}":
		return hinted(ErrIdentity, "search_path finds %s, not %q (a schema that is missing, or without USAGE, is not found)", rows[0][3], w.schemas)
	}
	return nil
}

// bound judges the answer to boundQuestion's first.
func (w *identity) bound(pid uint32, rows [][][]byte) error {
	if len(rows) != 1 || len(rows[0]) != 4 {
		return hinted(ErrIdentity, "it gave other rows than it was asked for")
	}
	database, backend, user, schemas := string(rows[0][0]), string(rows[0][1]), string(rows[0][2]), string(rows[0][3])
	switch {
	case backend != strconv.FormatUint(uint64(pid), 10):
		return hinted(ErrPooler, "we dialled backend %d and are answered by %s: tenants that share a pool do not go through a pooler", pid, backend)
	case user != w.user:
		return hinted(ErrIdentity, "current user %q, not %q", user, w.user)
	case database != w.database:
		return hinted(ErrIdentity, "database %q, not %q", database, w.database)
	case schemas != "{"+strings.Join(w.schemas, ",")+"}":
		return hinted(ErrIdentity, "search_path finds %s, not %q (a schema that is missing, or without USAGE, is not found)", schemas, w.schemas)
	}
	return nil
}

// unquoted takes the quotes and spaces out of a search_path; names of schemas have neither.
func unquoted(path string) string { return strings.NewReplacer(`"`, "", " ", "").Replace(path) }

func (w *identity) marker(rows [][][]byte) error {
	switch {
	case len(rows) != 1 || len(rows[0]) != 2:
		return hinted(ErrIdentity, "%s has %d rows or more, not one", markerTable, len(rows))
	case string(rows[0][0]) != w.realm:
		return hinted(ErrIdentity, "its marker is of realm %s, not %s", rows[0][0], w.realm)
	case string(rows[0][1]) != w.uid:
		return hinted(ErrIdentity, "its marker is of tenant %s, not %s", rows[0][1], w.uid)
	}
	return nil
}
