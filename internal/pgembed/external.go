package pgembed

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// externalWait bounds the wait for a server that was named but may not exist: a
// dropped packet should fail a test run, not hang it.
const externalWait = 15 * time.Second

// connectExternal accepts the server at url, if it answers and is new enough.
// Errors keep the URL out: it may hold a password.
func connectExternal(ctx context.Context, url string) (*Server, error) {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, errors.New("TENANCY_TEST_URL is not a PostgreSQL URL (it is not repeated here: it may hold a password)")
	}
	ctx, cancel := context.WithTimeout(ctx, externalWait)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("the server of TENANCY_TEST_URL does not answer: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))

	var text, num string
	row := conn.QueryRow(ctx, "SELECT current_setting('server_version'), current_setting('server_version_num')")
	if err := row.Scan(&text, &num); err != nil {
		return nil, fmt.Errorf("asking the server of TENANCY_TEST_URL for its version: %w", err)
	}
	n, err := strconv.Atoi(num)
	if err != nil {
		return nil, fmt.Errorf("the server of TENANCY_TEST_URL has the odd version %q", num)
	}
	text, _, _ = strings.Cut(text, " ") // "15.18 (Debian 15.18-0+deb12u1)"
	v := version{text: text, major: n / 10000, minor: n % 10000}
	if v.major < oldestMajor {
		return nil, tooOld(v.major, "TENANCY_TEST_URL")
	}
	return &Server{url: url, version: v}, nil
}
