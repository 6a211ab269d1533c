package tenancy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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
}

// identity is what a connection to the data source has to say when it is the tenant's.
func (tn *Tenancy) identity(tenant UID, source DataSource) identity {
	return identity{
		user:     source.User,
		database: source.Database,
		schemas:  schemasOf(source.Schema, tn.cfg.Extensions, tn.cfg.ReferenceTables),
		realm:    UID(tn.realm.Value()).String(),
		uid:      tenant.String(),
		// Two statements, because Citus refuses to plan the marker (a table of one node) together with
		// functions of the session. Names are qualified: the search_path is what is in doubt.
		question: "SELECT pg_catalog.to_json(pg_catalog.current_schemas(false)), pg_catalog.current_database(), " +
			"pg_catalog.pg_backend_pid(), session_user, current_user, pg_catalog.current_setting('search_path'); " +
			"SELECT realm, tenant FROM " + ident.Quote(source.Schema, markerTable) + " LIMIT 2",
	}
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
	schemas := schemasOf(schema, extensions, reference)
	for i, s := range schemas {
		schemas[i] = ident.Quote(s)
	}
	return strings.Join(schemas, ", ")
}

// proveLogin connects once as the place's login, on the same terms as a pool.
func (tn *Tenancy) proveLogin(ctx context.Context, p *place) error {
	cc, err := p.source.connConfig()
	if err != nil {
		return err
	}
	cc.ConnectTimeout = tn.cfg.Limits.ConnectTimeout
	tn.pins(cc, p.source.Schema).set(cc)
	tn.servers.single(cc)
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return withoutSecrets(err)
	}
	defer closeConn(conn)
	one := tenantPool{tenant: p.tenant, limits: tn.cfg.Limits, want: tn.identity(p.tenant.UID, p.source)}
	return one.proveWithin(ctx, conn)
}

// prove asks conn who it is, in one round trip, and marks it when every answer is the expected one.
// Otherwise the error is [ErrIdentity] or [ErrPooler] with what differed, or that of the connection.
// The caller closes conn then.
func (p *tenantPool) prove(ctx context.Context, conn *pgx.Conn) error {
	pg := conn.PgConn()
	established(pg)
	// First what the server said at login, for free: no statement is sent as a superuser, for whom
	// a marker that the tenant has turned into a view would be a trap.
	if err := p.want.login(pg.ParameterStatus("session_authorization"), pg.ParameterStatus("is_superuser")); err != nil {
		return err
	}
	if pg.ParameterStatus("in_hot_standby") == "on" {
		return errStandby
	}
	results, err := pg.Exec(ctx, p.want.question).ReadAll()
	if len(results) > 0 && results[0].Err == nil && len(results[0].Rows) == 1 {
		if err := p.want.session(pg.PID(), results[0].Rows[0]); err != nil {
			return err
		}
	}
	if refused, ok := errors.AsType[*pgconn.PgError](err); ok && notTheTenants(refused) {
		return fmt.Errorf("%w: its marker row cannot be read: %w", ErrIdentity, refused)
	}
	if err != nil {
		return &connectFailure{text: "asking a connection for its identity: " + withoutSecrets(err).Error(), cause: err}
	}
	if len(results) != 2 {
		return hinted(ErrIdentity, "it gave %d answers to two questions", len(results))
	}
	if err := p.want.marker(results[1].Rows); err != nil {
		return err
	}
	pg.CustomData()[markKey] = &proof{pool: p, conn: budget.Of(pg.Conn())}
	return nil
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

func (w *identity) session(pid uint32, row [][]byte) error {
	if len(row) != 6 {
		return hinted(ErrIdentity, "it gave %d columns for six", len(row))
	}
	database, backend, sessionUser, currentUser := string(row[1]), string(row[2]), string(row[3]), string(row[4])
	var schemas []string
	if err := json.Unmarshal(row[0], &schemas); err != nil {
		return hinted(ErrIdentity, "its search_path cannot be read")
	}
	switch {
	case backend != strconv.FormatUint(uint64(pid), 10):
		return hinted(ErrPooler, "we dialled backend %d and are answered by %s: connect to PostgreSQL directly", pid, backend)
	case sessionUser != w.user || currentUser != w.user:
		return hinted(ErrIdentity, "session user %q and current user %q, not %q", sessionUser, currentUser, w.user)
	case database != w.database:
		return hinted(ErrIdentity, "database %q, not %q", database, w.database)
	case !slices.Equal(schemas, w.schemas):
		return hinted(ErrIdentity, "search_path finds %q, not %q (a schema that is missing, or without USAGE, is not found)", schemas, w.schemas)
	// A schema on the path that does not exist, or not for us, is not found above, but would be on the day it does.
	case unquoted(string(row[5])) != strings.Join(w.schemas, ","):
		return hinted(ErrIdentity, "search_path is %s, which is more than %q", row[5], w.schemas)
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
