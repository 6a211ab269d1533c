package tenancy_test

import (
	"context"
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/tenancytest"
)

// wantUnknown wants the error of a COMMIT that may have been done: of the class, and for nobody to repeat.
func wantUnknown(t *testing.T, err error) {
	t.Helper()
	wantError(t, err, tenancy.ErrCommitUnknown)
	if pgconn.SafeToRetry(err) {
		t.Errorf("it is called safe to retry: %v", err)
	}
}

// TestALostCommitBehindAPoolerIsUnknown: it is PgBouncer that says so, and its errors have fewer fields than PostgreSQL's.
func TestALostCommitBehindAPoolerIsUnknown(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	s := newStrait(t, f.ServerURL)
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal("the strait's URL cannot be parsed")
	}
	b := newBouncer(t, f, "port="+u.Port())
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	register(t, f, tn, b.address())
	acme := createIn(t, tn, "acme", tenancy.IsolationSchema)
	ctx := tenancytest.Context(t, tn, "acme")
	tx, err := tn.DB().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, insert, "behind"); err != nil {
		t.Fatal(err)
	}
	lost := s.loseAnswer("commit")
	err = tx.Commit(ctx)
	<-lost
	wantUnknown(t, err)
	if sqlState(err) != "08P01" {
		t.Errorf("the cause is lost: %v", err)
	}
	if n := scan[int](t, b.admin, `SELECT count(*) FROM `+tableOf(sourceOf(t, tn, acme.ID))+` WHERE title = 'behind'`); n != 1 {
		t.Errorf("written %d times", n)
	}
}

// TestAPoolersGoodByeIsUnderstood: PgBouncer has closed idle connections, and what is sent over one of them is sent once more.
func TestAPoolersGoodByeIsUnderstood(t *testing.T) {
	t.Parallel()
	if !budget.TellsUnheard {
		t.Skip("nothing tells here what has not arrived")
	}
	f := tenancytest.NewFleet(t)
	b := newBouncer(t, f, "", "client_idle_timeout = 1")
	s := newStrait(t, "postgres://"+b.address())
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal("the strait's URL cannot be parsed")
	}
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations, PoolConfig: func(_ context.Context, _ tenancy.Tenant, cfg *pgxpool.Config) error {
		cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false } // which would find out before
		return nil
	}})
	register(t, f, tn, u.Host)
	acme := createIn(t, tn, "acme", tenancy.IsolationSchema)
	ctx := tenancytest.Context(t, tn, "acme")
	for title, call := range map[string]func(title string) error{
		"Exec": func(title string) error { _, err := tn.DB().Exec(ctx, insert, title); return err },
		"InTx": func(title string) error {
			return tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error { _, err := tx.Exec(ctx, insert, title); return err })
		},
	} {
		if _, err := tn.DB().Exec(ctx, `SELECT $1::int`, 1); err != nil {
			t.Fatal(err)
		}
		before := s.leftBy()
		untilTrue(t, "PgBouncer has closed the connection", func() bool { return s.leftBy() > before })
		if err := call(title); err != nil {
			t.Errorf("%s: %v", title, err)
		}
		if n := scan[int](t, b.admin, `SELECT count(*) FROM `+tableOf(sourceOf(t, tn, acme.ID))+` WHERE title = $1`, title); n != 1 {
			t.Errorf("%s: written %d times", title, n)
		}
	}
}

// TestALostCommitOfACopyIsUnknown where the copy is a transaction of the library's own. Inside the service's it has no COMMIT.
func TestALostCommitOfACopyIsUnknown(t *testing.T) {
	t.Parallel()
	x := newFaulty(t, tenancy.Config{Isolation: tenancy.IsolationShared})
	x.neighbourAtWork()
	x.warm(1)
	copying := func(title string) (string, []string, pgx.CopyFromSource) {
		return "notes", []string{"tenant", "title"}, pgx.CopyFromRows([][]any{{"acme", title}})
	}
	lost := x.strait.loseAnswer("commit")
	table, columns, rows := copying("copied")
	_, err := x.tn.DB().CopyFrom(x.ctx, pgx.Identifier{table}, columns, rows)
	<-lost
	wantUnknown(t, err)
	if e, ok := errors.AsType[*tenancy.Error](err); !ok || e.Op != "commit" || e.Tenant != x.acme.ID {
		t.Errorf("%#v", err)
	}
	if n := x.written("copied"); n != 1 {
		t.Errorf("written %d times", n)
	}
	x.warm(1)
	lost = x.strait.loseAnswer("release")
	err = x.tn.DB().InTx(x.ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		table, columns, rows := copying("in a transaction")
		_, err := tx.CopyFrom(ctx, pgx.Identifier{table}, columns, rows)
		return err
	})
	<-lost
	if n := x.written("in a transaction"); err == nil || errors.Is(err, tenancy.ErrCommitUnknown) || n != 0 {
		t.Errorf("in a transaction: %v, written %d times", err, n)
	}
}

// TestACommitQueryThatFailsIsUnknown: it may have failed behind its COMMIT.
func TestACommitQueryThatFailsIsUnknown(t *testing.T) {
	t.Parallel()
	x := newFaulty(t, tenancy.Config{})
	x.neighbourAtWork()
	for query, want := range map[string]int{"commit; SELECT 1/0": 1, "SELECT 1/0; commit": 0} {
		err := x.tn.DB().InTx(x.ctx, pgx.TxOptions{CommitQuery: query}, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, insert, query)
			return err
		})
		wantUnknown(t, err)
		if n := x.written(query); sqlState(err) != "22012" || n != want {
			t.Errorf("%s: %v, written %d times, want %d", query, err, n, want)
		}
	}
}

// TestAProcedureThatCommitsIsNotCalledAgain when a plan in it is older than a migration: what it had committed stays.
func TestAProcedureThatCommitsIsNotCalledAgain(t *testing.T) {
	t.Parallel()
	x := newFaulty(t, tenancy.Config{Limits: tenancy.Limits{TenantConns: 1}})
	x.neighbourAtWork()
	procedure := strings.Replace(x.place.table("notes"), "notes", "note_and_read", 1)
	must(x, x.admin, `CREATE PROCEDURE `+procedure+`(title text) LANGUAGE plpgsql AS $$
		BEGIN INSERT INTO notes (tenant, title) VALUES ('acme', title); COMMIT; EXECUTE 'EXECUTE outdated'; END $$`)
	if _, err := x.tn.DB().Exec(x.ctx, `PREPARE outdated AS SELECT * FROM notes`); err != nil {
		t.Fatal(err)
	}
	must(x, x.admin, `ALTER TABLE `+x.place.table("notes")+` ADD COLUMN added int`)
	_, err := x.tn.DB().Exec(x.ctx, `CALL note_and_read($1)`, "called")
	if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.Code != "0A000" || pg.Routine != "RevalidateCachedQuery" {
		t.Errorf("%v; want an outdated plan", err)
	}
	if n := x.written("called"); n != 1 {
		t.Errorf("written %d times", n)
	}
}
