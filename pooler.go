package tenancy

import (
	"context"
	"errors"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// declarePooler is what to do about a pooler that was met and is wanted.
const declarePooler = "declare the pooler (ServerConfig.Pooler, Catalog.AddServer; docs/poolers.md)"

// pooledFacts asks the session of the pooler's that answers who it is. It begins a transaction, which a pooler keeps on one session: what
// is asked next is asked of the same one. A pooler's own word (parameter status) is that of whichever session it opened first, so it counts for nothing here.
//
// It may reach a superuser's session, so it touches nothing that a tenant could have made: keywords, and functions of pg_catalog by their qualified
// names. session_user and is_superuser are changed by SET SESSION AUTHORIZATION, and can be changed back by whoever began as a
// superuser; the user that pg_stat_get_activity shows is the one that logged in, whatever was set since.
const pooledFacts = "BEGIN READ ONLY; SHOW search_path; SELECT current_catalog, session_user, current_user, " +
	"pg_catalog.current_setting('is_superuser'), pg_catalog.pg_is_in_recovery(), pg_catalog.pg_get_userbyid(a.usesysid), pg_catalog.current_schemas(false) " +
	"FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) a"

// provePooled asks in two round trips of one transaction: the marker is read when it is known who reads it.
func (w *identity) provePooled(ctx context.Context, pg *pgconn.PgConn) error {
	facts, err := pg.Exec(ctx, pooledFacts).ReadAll()
	if err != nil {
		return unanswered(err)
	}
	if len(facts) != 3 {
		return hinted(ErrIdentity, "it gave %d answers to three statements", len(facts))
	}
	if err := w.pooledSession(facts[1].Rows, facts[2].Rows); err != nil {
		return err
	}
	marker, err := pg.Exec(ctx, markerQuestion(w.schemas[0])+"; COMMIT").ReadAll()
	if err != nil {
		return unanswered(err)
	}
	return w.marker(marker[0].Rows)
}

// pooledSession judges the answers to pooledFacts.
func (w *identity) pooledSession(path, rows [][][]byte) error {
	if len(path) != 1 || len(path[0]) != 1 || len(rows) != 1 || len(rows[0]) != 7 {
		return hinted(ErrIdentity, "it gave other rows than it was asked for")
	}
	fact := make([]string, len(rows[0]))
	for i, cell := range rows[0] {
		fact[i] = string(cell)
	}
	database, session, current, superuser, recovery, login, schemas := fact[0], fact[1], fact[2], fact[3], fact[4], fact[5], fact[6]
	if err := w.login(session, superuser); err != nil {
		return err
	}
	switch {
	case login != w.user:
		return hinted(ErrIdentity, "the pooler has logged in as %q, not %q", login, w.user)
	case current != w.user:
		return hinted(ErrIdentity, "current user %q, not %q", current, w.user)
	case database != w.database:
		return hinted(ErrIdentity, "database %q, not %q", database, w.database)
	case recovery != "f":
		return errStandby
	case unquoted(string(path[0][0])) != strings.Join(w.schemas, ","):
		return hinted(ErrIdentity, "search_path is %s, not %q: behind a pooler it is a setting of the login's, which Catalog.RotatePassword and Catalog.SetDataSource make anew",
			path[0][0], w.schemas)
	case schemas != "{"+strings.Join(w.schemas, ",")+"}":
		return hinted(ErrIdentity, "search_path finds %s, not %q (a schema that is missing, or without USAGE, is not found)", schemas, w.schemas)
	}
	return nil
}

// connectError is withoutSecrets for a connection to a tenant's data, which may meet a pooler that nobody has declared: PgBouncer refuses
// parameters that it does not know with a text of its own. PostgreSQL never says this.
func connectError(err error) error {
	refused, ok := errors.AsType[*pgconn.PgError](err)
	if ok && refused.Code == "08P01" && strings.Contains(refused.Message, "unsupported startup parameter") {
		return hinted(ErrPooler, "something before PostgreSQL says %q, as PgBouncer does: connect to PostgreSQL directly, or "+declarePooler, refused.Message)
	}
	return withoutSecrets(err)
}

// loginRefused says whether err may be the refusal of a login, in p where its pool could be built. PgBouncer 1.18 says 08P01 then, as it does to all
// that goes wrong.
func loginRefused(p *tenantPool, err error) bool {
	return isState(err, "28P01", "28000") || p != nil && p.want.pooled && isState(err, "08P01")
}
