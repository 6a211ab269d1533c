package plain_test

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/pgembed"
	"go.uber.org/goleak"
)

var server *pgembed.Server

func TestMain(m *testing.M) {
	var err error
	if server, err = pgembed.Start(context.Background(), pgembed.Options{Download: true}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := server.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, "goroutines are left after all tests:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// dial connects to the server's first database, in which nothing is made that outlives its session.
func dial(t *testing.T) *pgx.Conn {
	t.Helper()
	cc, err := pgx.ParseConfig(server.URL())
	if err != nil {
		t.Fatal("the server's URL cannot be parsed")
	}
	conn, err := pgx.ConnectConfig(t.Context(), cc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func column(t *testing.T, conn *pgx.Conn, sql string, args ...any) []string {
	t.Helper()
	rows, _ := conn.Query(t.Context(), sql, args...)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return all
}
