// Package rowsec keeps the rows of many tenants apart in one schema, with row-level security by the login.
//
// Each tenant has a login of its own, a member of one runtime group. Policies learn the tenant from current_user, through a map that no tenant
// can read, so that injected SQL stays inside. Migrations call SQL functions, without a qualifier:
//
//	SELECT tenancy_must('notes');      -- each row is a tenant's
//	SELECT tenancy_may('plans');       -- or the host's, where tenant_id is NULL: tenants read it and do not write it
//	SELECT tenancy_common('countries') -- no tenant's: tenants read it
//	SELECT tenancy_view('open_notes')  -- a view of such tables
//
// What none of them was called for, tenants cannot reach at all (42501). tenant_id is filled in by itself. For a migration of rows the owner, to whom the policies
// apply as well, has to say whose they are, for its transaction:
//
//	DO $$ DECLARE t bigint; BEGIN
//	    FOR t IN SELECT tenancy_tenants() LOOP
//	        PERFORM tenancy_enter(t);
//	        UPDATE notes SET title = trim(title);
//	    END LOOP;
//	    PERFORM tenancy_enter_host();
//	    INSERT INTO plans (tenant_id, name) VALUES (NULL, 'free');
//	END $$;
//
// PostgreSQL checks the rows of a new foreign key as the owner, behind the wall: refused, when there are rows, and of a tenant that was entered it would check
// that one's alone. Such a migration takes FORCE off both tables and puts it on again in one transaction, whose locks keep everybody out
// meanwhile; [Shared.Verify] sees when it was forgotten:
//
//	ALTER TABLE notes NO FORCE ROW LEVEL SECURITY;
//	ALTER TABLE tags NO FORCE ROW LEVEL SECURITY;
//	ALTER TABLE tags ADD FOREIGN KEY (tenant_id, note) REFERENCES notes (tenant_id, id);
//	ALTER TABLE notes FORCE ROW LEVEL SECURITY;
//	ALTER TABLE tags FORCE ROW LEVEL SECURITY;
//
// The same files run in the schema model, where [InstallSchemaModel] makes the same functions and tenant_id is the one tenant's everywhere.
//
// A tenant may create nothing, temporary objects included: code of the owner's runs in the tenants' sessions (a function with SECURITY DEFINER, a trigger on
// rows that a foreign key deletes) and would take a tenant's temporary table for the service's one of the same name, with all that the tenant
// has attached to it. Then the tenant acts as the owner of all.
//
// PostgreSQL checks unique and foreign keys past the policies. Both are written with tenant_id, in either model:
//
//	CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY, tenant_id bigint, slug text, PRIMARY KEY (tenant_id, id), UNIQUE (tenant_id, slug));
//	CREATE TABLE tags (tenant_id bigint, note bigint, FOREIGN KEY (tenant_id, note) REFERENCES notes (tenant_id, id));
//
// A unique key without it tells that another tenant has the value (23505), and a foreign key without it lets a row of one tenant refer to a
// row of another, learn that it exists, and stand in the way of its deletion, or go with it. [Shared.Tables] lists those.
//
// Not closed either, and shared by all tenants: how far a sequence has counted; numbers of rows in the catalogs, and what EXPLAIN estimates from
// the values of all; and the locks of a table, which each tenant can take whole with LOCK TABLE.
// COPY FROM does not work on a table with policies (0A000): tenants use INSERT.
//
// Nothing here makes or drops a role, and nothing takes a lock against a second caller: whoever calls has one.
package rowsec

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

// ErrUnsafe is a role, or an owner of the schema, for whom the wall would not stand. The text says which and why.
var ErrUnsafe = errors.New("rowsec: unsafe")

// Shared names one schema of many tenants and the roles around it. It is a value; the zero value is not usable.
//
// Its methods are called by the owner or by a role that may become the owner, such as a provisioner; each runs in transactions of its own,
// and conn must not be in one. conn is closed when ctx ends in the middle of a statement, as pgx does.
type Shared struct {
	Schema  string
	Owner   string // holds the schema; neither a superuser nor one who bypasses row-level security
	Runtime string // the group of the tenants' logins; NOLOGIN
}

//go:embed shared.sql
var sharedSQL string

//go:embed schema.sql
var schemaSQL string

//go:embed holes.sql
var holesSQL string

// Install makes the schema, where it is missing and the caller may create it, and the tables, functions and rights in it. It may be called again, and
// leaves what is protected as it is.
//
// The error is [ErrUnsafe], that of a name that [ident.Schema] refuses, or the server's.
func (s Shared) Install(ctx context.Context, conn *pgx.Conn) error {
	if err := names(s.Schema, s.Owner, s.Runtime); err != nil {
		return err
	}
	if err := s.makeSchema(ctx, conn); err != nil {
		return err
	}
	err := s.asOwner(ctx, conn, pgx.TxOptions{}, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, s.fill(sharedSQL, 0))
		return err
	})
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	return s.Verify(ctx, conn)
}

// InstallSchemaModel makes the functions that migrations call in a schema of tenant id alone, as the schema's owner or a role that may
// become it. It may be called again, not with another id once tables are protected: rows keep theirs.
//
// The error is that of a name that [ident.Schema] refuses, or the server's.
func InstallSchemaModel(ctx context.Context, conn *pgx.Conn, schema, owner string, id int64) error {
	if err := names(schema, owner); err != nil {
		return err
	}
	s := Shared{Schema: schema, Owner: owner}
	err := s.asOwner(ctx, conn, pgx.TxOptions{}, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, s.fill(schemaSQL, id))
		return err
	})
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	return nil
}

// Verify asks the server what stands open: a table with rights and no wall, a wall that is not forced, a role that no wall stops. It is meant for
// after each migration. The error is [ErrUnsafe] with all findings, or the server's.
func (s Shared) Verify(ctx context.Context, conn *pgx.Conn) error {
	holes, err := s.Holes(ctx, conn)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if len(holes) == 0 {
		return nil
	}
	what := make([]string, len(holes))
	for i, h := range holes {
		what[i] = h.What
	}
	return fmt.Errorf("%w: %s", ErrUnsafe, strings.Join(what, "; "))
}

// Hole is one thing that stands open, and the statement that closes it.
type Hole struct{ What, Mend string }

// Holes lists what [Shared.Verify] refuses, in order. It reads the server's catalogs alone, and conn looks names up in pg_catalog first. The error is the server's.
func (s Shared) Holes(ctx context.Context, conn *pgx.Conn) ([]Hole, error) {
	rows, _ := conn.Query(ctx, holesSQL, s.Schema, s.Owner, s.Runtime)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Hole])
}

func (s Shared) makeSchema(ctx context.Context, conn *pgx.Conn) error {
	var owner string
	err := conn.QueryRow(ctx, `SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = $1`, s.Schema).Scan(&owner)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		_, err = conn.Exec(ctx, "CREATE SCHEMA "+ident.Quote(s.Schema)+" AUTHORIZATION "+ident.Quote(s.Owner))
	case err == nil && owner != s.Owner:
		err = fmt.Errorf("%w: schema %s belongs to role %s and not to %s: it was not touched", ErrUnsafe, s.Schema, owner, s.Owner)
	}
	return err
}

// systemNames has names mean the system's alone, until the transaction ends.
const systemNames = "SET LOCAL search_path = pg_catalog, pg_temp"

// asOwner runs fn in a transaction of the owner's, in which names mean the system's alone.
func (s Shared) asOwner(ctx context.Context, conn *pgx.Conn, options pgx.TxOptions, fn func(tx pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, systemNames+"; SET LOCAL ROLE "+ident.Quote(s.Owner))
		if err != nil {
			return err
		}
		return fn(tx)
	})
}

// enter makes the owner's transaction the tenant's. Not through tenancy_enter, which knows those on the roster alone.
func enter(ctx context.Context, tx pgx.Tx, id int64) error {
	_, err := tx.Exec(ctx, `SELECT set_config('tenancy.entered', $1, true)`, strconv.FormatInt(id, 10))
	return err
}

func (s Shared) fill(sql string, id int64) string {
	return strings.NewReplacer(
		"@schema@", ident.Quote(s.Schema),
		"@name@", ident.Literal(s.Schema),
		"@runtime@", ident.Quote(s.Runtime),
		"@role@", ident.Literal(s.Runtime),
		"@id@", strconv.FormatInt(id, 10),
	).Replace(sql)
}

// table is one of the library's own in the schema.
func (s Shared) table(name string) string { return ident.Quote(s.Schema, name) }

// names refuses what could leave the quotes of a function's body, and what is not one of the names that the library gives.
func names(all ...string) error {
	for _, name := range all {
		if err := ident.Schema(name); err != nil {
			return fmt.Errorf("rowsec: %q: %w", name, err)
		}
	}
	return nil
}
