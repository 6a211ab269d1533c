package tenancy

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"testing"
	"unique"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// sqlcDBTX is the interface that sqlc generates for pgx/v5 with batches and copies.
type sqlcDBTX interface {
	Exec(context.Context, string, ...interface{}) (pgconn.CommandTag, error)
	Query(context.Context, string, ...interface{}) (pgx.Rows, error)
	QueryRow(context.Context, string, ...interface{}) pgx.Row
	CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error)
	SendBatch(context.Context, *pgx.Batch) pgx.BatchResults
}

// beginner is what pgx.BeginFunc and pgx.BeginTxFunc take.
type beginner interface {
	Begin(context.Context) (pgx.Tx, error)
	BeginTx(context.Context, pgx.TxOptions) (pgx.Tx, error)
}

var (
	_ sqlcDBTX = (*TenantAwareDB)(nil)
	_ beginner = (*TenantAwareDB)(nil)
	_ sqlcDBTX = (pgx.Tx)(nil)
)

// Embedding hands every new method of pgx through unguarded. So a release of pgx that adds
// one fails here, and somebody decides.
func TestEveryMethodOfPgxIsDecidedUpon(t *testing.T) {
	for _, c := range []struct {
		of    reflect.Type
		known []string
	}{
		{reflect.TypeFor[pgx.Tx](), []string{"Begin", "Commit", "Conn", "CopyFrom", "Exec", "LargeObjects", "Prepare", "Query", "QueryRow", "Rollback", "SendBatch"}},
		{reflect.TypeFor[pgx.Rows](), []string{"Close", "CommandTag", "Conn", "Err", "FieldDescriptions", "Next", "RawValues", "Scan", "TypeMap", "Values"}},
		{reflect.TypeFor[pgx.Row](), []string{"Scan"}},
		{reflect.TypeFor[pgx.BatchResults](), []string{"Close", "Exec", "Query", "QueryRow", "Tx"}},
	} {
		var have []string
		for m := range c.of.Methods() {
			have = append(have, m.Name)
		}
		if !slices.Equal(have, c.known) {
			t.Errorf("%v has methods %v, known are %v", c.of, have, c.known)
		}
	}
}

func TestErrorRowsAreSafeInEveryMethod(t *testing.T) {
	why := errors.New("why")
	db := &TenantAwareDB{tn: &Tenancy{}} // no session on the context: nothing else is asked
	rows, err := db.Query(t.Context(), "select 1")
	if !errors.Is(err, ErrNoTenant) || rows == nil {
		t.Fatalf("Query without a tenant: rows %v, error %v", rows, err)
	}
	if _, err := pgx.CollectRows(rows, pgx.RowToMap); !errors.Is(err, ErrNoTenant) {
		t.Errorf("CollectRows: %v", err)
	}
	for name, rows := range map[string]pgx.Rows{"query": errRows{why}, "batch": func() pgx.Rows {
		rows, _ := failedBatch{pgx.FailedBatchResults(&pgx.Batch{}, why), why}.Query()
		return rows
	}()} {
		if rows.Next() || rows.FieldDescriptions() != nil || rows.RawValues() != nil || rows.Conn() != nil || rows.TypeMap() != nil || rows.CommandTag().RowsAffected() != 0 {
			t.Errorf("%s: error rows have something in them", name)
		}
		if _, err := rows.Values(); err != why {
			t.Errorf("%s: Values: %v", name, err)
		}
		var n int
		if err := rows.Scan(&n); err != why || rows.Err() != why {
			t.Errorf("%s: Scan: %v, Err: %v", name, err, rows.Err())
		}
		rows.Close()
	}
}

func TestACallWithoutATenantIsRefusedInEveryMethod(t *testing.T) {
	db := &TenantAwareDB{tn: &Tenancy{}}
	for _, ctx := range []context.Context{t.Context(), AsHost(t.Context())} {
		for name, err := range everyMethod(ctx, db) {
			if !errors.Is(err, ErrNoTenant) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestHostDataThatIsNotConfiguredIsRefusedInEveryMethod(t *testing.T) {
	for name, err := range everyMethod(t.Context(), &TenantAwareDB{tn: &Tenancy{}, host: true}) {
		if !errors.Is(err, ErrNoHostData) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// everyMethod calls every method of db and returns their errors.
func everyMethod(ctx context.Context, db *TenantAwareDB) map[string]error {
	errs := map[string]error{}
	_, errs["Exec"] = db.Exec(ctx, "select 1")
	_, errs["Query"] = db.Query(ctx, "select 1")
	errs["QueryRow"] = db.QueryRow(ctx, "select 1").Scan()
	_, errs["Begin"] = db.Begin(ctx)
	_, errs["BeginTx"] = db.BeginTx(ctx, pgx.TxOptions{})
	_, errs["CopyFrom"] = db.CopyFrom(ctx, pgx.Identifier{"notes"}, []string{"n"}, pgx.CopyFromRows(nil))
	errs["InTx"] = db.InTx(ctx, pgx.TxOptions{}, func(context.Context, pgx.Tx) error { return nil })
	errs["WithConn"] = db.WithConn(ctx, func(context.Context, *pgx.Conn) error { return nil })
	b := &pgx.Batch{}
	b.Queue("select 1")
	br := db.SendBatch(ctx, b)
	_, errs["SendBatch.Exec"] = br.Exec()
	_, errs["SendBatch.Query"] = br.Query()
	errs["SendBatch.QueryRow"] = br.QueryRow().Scan()
	errs["SendBatch.Close"] = br.Close()
	if tx := br.Tx(); tx != nil {
		errs["SendBatch.Tx"] = errors.New("a batch without BeginTx has a transaction")
	}
	return errs
}

func TestABatchThatWasNeverSentHasAClosedTransaction(t *testing.T) {
	b := &pgx.Batch{}
	b.BeginTx(pgx.TxOptions{})
	br := (&TenantAwareDB{tn: &Tenancy{}}).SendBatch(t.Context(), b)
	if tx := br.Tx(); tx == nil {
		t.Error("no transaction")
	} else if err := tx.Rollback(t.Context()); !errors.Is(err, pgx.ErrTxClosed) {
		t.Errorf("Rollback: %v", err)
	}
	if err := br.Close(); !errors.Is(err, ErrNoTenant) {
		t.Errorf("Close: %v", err)
	}
}

// fakeTx counts what reaches pgx.
type fakeTx struct {
	pgx.Tx
	reached func(method string)
}

func (f fakeTx) Begin(context.Context) (pgx.Tx, error) { f.reached("Begin"); return f, nil }
func (f fakeTx) Commit(context.Context) error          { f.reached("Commit"); return nil }
func (f fakeTx) Rollback(context.Context) error        { f.reached("Rollback"); return nil }
func (f fakeTx) Exec(context.Context, string, ...any) (pgconn.CommandTag, error) {
	f.reached("Exec")
	return pgconn.CommandTag{}, nil
}
func (f fakeTx) Query(context.Context, string, ...any) (pgx.Rows, error) {
	f.reached("Query")
	return errRows{}, nil
}
func (f fakeTx) QueryRow(context.Context, string, ...any) pgx.Row {
	f.reached("QueryRow")
	return errRow{}
}
func (f fakeTx) SendBatch(context.Context, *pgx.Batch) pgx.BatchResults {
	f.reached("SendBatch")
	return fakeBatch{}
}
func (f fakeTx) CopyFrom(context.Context, pgx.Identifier, []string, pgx.CopyFromSource) (int64, error) {
	f.reached("CopyFrom")
	return 0, nil
}
func (f fakeTx) Prepare(context.Context, string, string) (*pgconn.StatementDescription, error) {
	f.reached("Prepare")
	return nil, nil
}

type fakeBatch struct{ pgx.BatchResults }

func (fakeBatch) Close() error { return nil }

// statements calls every method of tx that sends a statement, and returns their errors.
func statements(ctx context.Context, tx pgx.Tx) map[string]error {
	errs := map[string]error{}
	_, errs["Begin"] = tx.Begin(ctx)
	_, errs["Exec"] = tx.Exec(ctx, "")
	_, errs["Query"] = tx.Query(ctx, "")
	errs["QueryRow"] = tx.QueryRow(ctx, "").Scan()
	errs["SendBatch"] = tx.SendBatch(ctx, &pgx.Batch{}).Close()
	_, errs["CopyFrom"] = tx.CopyFrom(ctx, nil, nil, nil)
	_, errs["Prepare"] = tx.Prepare(ctx, "", "")
	return errs
}

func TestATransactionTakesItsOwnTenantOrNone(t *testing.T) {
	home, elsewhere := unique.Make([16]byte{1}), unique.Make([16]byte{2})
	a := Tenant{ID: 1, UID: UID{1}, realm: home}
	later := a
	later.Generation, later.Name, later.State = 7, "renamed", StateSuspended

	for name, c := range map[string]struct {
		ctx      context.Context
		admitted bool
	}{
		"no_session":            {context.Background(), true},
		"the_host":              {AsHost(context.Background()), true},
		"its_own_tenant":        {withSession(context.Background(), Session{tenant: &a}), true},
		"its_own_tenant_later":  {withSession(context.Background(), Session{tenant: &later}), true},
		"another_tenant":        {withSession(context.Background(), Session{tenant: &Tenant{ID: 2, UID: UID{2}, realm: home}}), false},
		"same_id_another_uid":   {withSession(context.Background(), Session{tenant: &Tenant{ID: 1, UID: UID{2}, realm: home}}), false},
		"same_id_another_realm": {withSession(context.Background(), Session{tenant: &Tenant{ID: 1, UID: UID{1}, realm: elsewhere}}), false},
	} {
		t.Run(name, func(t *testing.T) {
			reached := map[string]int{}
			inner := fakeTx{reached: func(m string) { reached[m]++ }}
			outer := &guardedTx{Tx: inner, pool: &tenantPool{tenant: a}}
			nested, err := outer.Begin(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			clear(reached)
			for which, tx := range map[string]pgx.Tx{"transaction": outer, "savepoint": nested} {
				for method, err := range statements(c.ctx, tx) {
					if c.admitted && err != nil || !c.admitted && !errors.Is(err, ErrTenantMismatch) {
						t.Errorf("%s: %s: %v", which, method, err)
					}
					if want := map[bool]int{true: 1}[c.admitted]; reached[method] != want {
						t.Errorf("%s: %s reached pgx %d times, want %d", which, method, reached[method], want)
					}
				}
				clear(reached)
				if err := errors.Join(tx.Commit(c.ctx), tx.Rollback(c.ctx)); err != nil || reached["Commit"] != 1 || reached["Rollback"] != 1 {
					t.Errorf("%s: the end was refused: %v", which, err)
				}
				clear(reached)
			}
		})
	}
	host := &guardedTx{Tx: fakeTx{reached: func(string) {}}}
	for method, err := range statements(withSession(context.Background(), Session{tenant: &a}), host) {
		if err != nil {
			t.Errorf("the host's transaction: %s: %v", method, err)
		}
	}
}

func TestIdentityIsComparedInFull(t *testing.T) {
	w := identity{user: "t_a", database: "db", schemas: []string{"t_a", "tenancy_ext"}, realm: "r", uid: "u"}
	row := func(cells ...string) (r [][]byte) {
		for _, c := range cells {
			r = append(r, []byte(c))
		}
		return r
	}
	rows := func(r ...[][]byte) [][][]byte { return r }
	path := rows(row(`"t_a", tenancy_ext`))
	good := rows(row("db", "42", "t_a", "{t_a,tenancy_ext}"))
	if err := errors.Join(w.login("t_a", "off"), w.session(42, path, good), w.marker(rows(row("r", "u")))); err != nil {
		t.Fatal(err)
	}
	alone := identity{user: "t_a", database: "db", schemas: []string{"t_a"}}
	if err := alone.session(42, rows(row("t_a")), rows(row("db", "42", "t_a"))); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ err, want error }{
		"superuser":           {w.login("t_a", "on"), ErrIdentity},
		"another_login":       {w.login("t_b", "off"), ErrIdentity},
		"login_unsaid":        {w.login("", ""), ErrPooler},
		"another_backend":     {w.session(43, path, good), ErrPooler},
		"current_user":        {w.session(42, path, rows(row("db", "42", "t_b", "{t_a,tenancy_ext}"))), ErrIdentity},
		"database":            {w.session(42, path, rows(row("other", "42", "t_a", "{t_a,tenancy_ext}"))), ErrIdentity},
		"schema_missing":      {w.session(42, path, rows(row("db", "42", "t_a", "{tenancy_ext}"))), ErrIdentity},
		"schema_more":         {w.session(42, path, rows(row("db", "42", "t_a", "{t_a,tenancy_ext,public}"))), ErrIdentity},
		"schema_order":        {w.session(42, path, rows(row("db", "42", "t_a", "{tenancy_ext,t_a}"))), ErrIdentity},
		"schemas_null":        {w.session(42, path, rows(append(row("db", "42", "t_a"), nil))), ErrIdentity},
		"schemas_unsaid":      {w.session(42, path, rows(row("db", "42", "t_a"))), ErrIdentity},
		"path_has_more":       {w.session(42, rows(row(`"t_a", tenancy_ext, none`)), good), ErrIdentity},
		"path_of_another":     {alone.session(42, rows(row("t_b")), rows(row("db", "42", "t_a"))), ErrIdentity},
		"path_missing":        {w.session(42, nil, good), ErrIdentity},
		"session_missing":     {w.session(42, path, nil), ErrIdentity},
		"marker_missing":      {w.marker(nil), ErrIdentity},
		"marker_twice":        {w.marker(rows(row("r", "u"), row("r", "u"))), ErrIdentity},
		"marker_other_tenant": {w.marker(rows(row("r", "v"))), ErrIdentity},
		"marker_other_realm":  {w.marker(rows(row("s", "u"))), ErrIdentity},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v, want %v", name, c.err, c.want)
		}
	}
}

// What a server or a pooler says of a COMMIT. Whether a session that PANIC ends had committed, it does not say either.
func TestAnAnswerToACommitIsOneOfTheServers(t *testing.T) {
	for name, c := range map[string]struct {
		err           error
		more, unknown bool
	}{
		"refused":              {err: &pgconn.PgError{Severity: "ERROR", SeverityUnlocalized: "ERROR", Code: "23505"}},
		"refused_translated":   {err: &pgconn.PgError{Severity: "FEHLER", SeverityUnlocalized: "ERROR", Code: "23505"}},
		"refused_commit_query": {err: &pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "23505"}, more: true, unknown: true},
		"fatal":                {err: &pgconn.PgError{Severity: "DODELIJK", SeverityUnlocalized: "FATAL", Code: "57P01"}, unknown: true},
		"panic":                {err: &pgconn.PgError{Severity: "PANIEK", SeverityUnlocalized: "PANIC", Code: "58030"}, unknown: true},
		"fatal_of_a_pooler":    {err: &pgconn.PgError{Severity: "FATAL", Code: "XX000"}, unknown: true},
		"lost_by_a_pooler":     {err: &pgconn.PgError{Severity: "ERROR", Code: "08006"}, unknown: true},
		"idle":                 {err: &pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "25P03"}, more: true},
		"timeout":              {err: &pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "25P04"}, unknown: true},
		"rolled_back":          {err: pgx.ErrTxCommitRollback},
		"closed":               {err: pgx.ErrTxClosed},
		"connection_closed":    {err: pgconn.ErrConnClosed, unknown: true},
	} {
		if got := mayHaveCommitted(c.err, c.more); got != c.unknown {
			t.Errorf("%s: %v", name, got)
		}
	}
}
