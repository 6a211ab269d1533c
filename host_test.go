package tenancy_test

import (
	"context"
	"net/url"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/tenancytest"
)

// farHost is a node whose host's database is beyond a strait.
type farHost struct {
	*testing.T
	db     *tenancy.TenantAwareDB
	strait *strait
	admin  *pgx.Conn // past it
}

func newFarHost(t *testing.T) *farHost {
	t.Helper()
	f := tenancytest.NewFleet(t)
	x := &farHost{T: t, admin: f.Admin(t, "primary")} // a database that ends with the test
	u, err := url.Parse(f.AdminURL)
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	u.Path = scan[string](t, x.admin, `SELECT current_database()`)
	x.strait = newStrait(t, u.String())
	must(t, x.admin, `CREATE TABLE public.visitors (name text NOT NULL)`)
	x.db = f.Open(t, tenancy.Config{Migrations: noteMigrations, HostURL: x.strait.url}).Host()
	return x
}

// warm opens n connections, prepares insertVisitor on each and gives them back.
func (x *farHost) warm(n int) (pids []uint32) {
	x.Helper()
	for range n {
		tx, err := x.db.Begin(x.Context())
		if err != nil {
			x.Fatal(err)
		}
		defer tx.Rollback(x.Context())
		if _, err := tx.Exec(x.Context(), insertVisitor, "warm"); err != nil {
			x.Fatal(err)
		}
		pids = append(pids, tx.Conn().PgConn().PID())
	}
	return pids
}

func (x *farHost) terminate(pids ...uint32) {
	x.Helper()
	before := x.strait.leftBy()
	must(x, x.admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid = ANY($1)`, pids)
	untilTrue(x.T, "the client has been told", func() bool { return x.strait.leftBy() >= before+len(pids) })
}

const insertVisitor = `INSERT INTO public.visitors VALUES ($1)`

// TestWhatNeverReachedTheHostsDatabaseIsSentOnce, as for tenants: the server, or the network, has ended connections that were used a moment
// ago. A batch and a session are never tried again, and take no connection that is dead.
func TestWhatNeverReachedTheHostsDatabaseIsSentOnce(t *testing.T) {
	t.Parallel()
	if !budget.TellsUnheard {
		t.Skip("this system does not tell what has not arrived")
	}
	x := newFarHost(t)
	const returning = insertVisitor + ` RETURNING name`
	for how, end := range map[string]func(pids []uint32){
		"terminated": func(pids []uint32) { x.terminate(pids...) },
		"cut":        func([]uint32) { x.strait.drop() },
		"reset":      func([]uint32) { x.strait.reset(); x.strait.calm() },
	} {
		for name, call := range map[string]func(ctx context.Context, who string) error{
			"Exec": func(ctx context.Context, who string) error { return second(x.db.Exec(ctx, insertVisitor, who)) },
			"Exec without arguments": func(ctx context.Context, who string) error {
				return second(x.db.Exec(ctx, `INSERT INTO public.visitors VALUES ('`+who+`')`))
			},
			"Query": func(ctx context.Context, who string) error {
				rows, _ := x.db.Query(ctx, returning, who)
				_, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[string])
				return err
			},
			"QueryRow": func(ctx context.Context, who string) error {
				return x.db.QueryRow(ctx, returning, who).Scan(new(string))
			},
			"InTx": func(ctx context.Context, who string) error {
				return x.db.InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error { return second(tx.Exec(ctx, insertVisitor, who)) })
			},
			"CopyFrom": func(ctx context.Context, who string) error {
				return second(x.db.CopyFrom(ctx, pgx.Identifier{"public", "visitors"}, []string{"name"}, pgx.CopyFromRows([][]any{{who}})))
			},
			"SendBatch": func(ctx context.Context, who string) error {
				b := &pgx.Batch{}
				b.Queue(insertVisitor, who)
				return x.db.SendBatch(ctx, b).Close()
			},
			"WithConn": func(ctx context.Context, who string) error {
				return x.db.WithConn(ctx, func(ctx context.Context, c *pgx.Conn) error { return second(c.Exec(ctx, insertVisitor, who)) })
			},
		} {
			who := how + " " + name
			end(x.warm(3))
			if err := call(t.Context(), who); err != nil {
				t.Errorf("%s: %v", who, err)
			}
			if n := scan[int](t, x.admin, `SELECT count(*) FROM public.visitors WHERE name = $1`, who); n != 1 {
				t.Errorf("%s: written %d times", who, n)
			}
		}
	}
}

// TestASessionOfTheHostsThatTheServerEndsTakesTheOthersAlong: they are as old, and would be the next.
func TestASessionOfTheHostsThatTheServerEndsTakesTheOthersAlong(t *testing.T) {
	t.Parallel()
	x := newFarHost(t)
	old := x.warm(3)
	tx, err := x.db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context())
	x.terminate(tx.Conn().PgConn().PID())
	if _, err := tx.Exec(t.Context(), insertVisitor, "late"); sqlState(err) != "57P01" {
		t.Errorf("%v; want the server's good-bye", err)
	}
	untilTrue(t, "the others are gone", func() bool {
		return scan[int](t, x.admin, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid = ANY($1)`, old) == 0
	})
}
