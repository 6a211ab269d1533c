package tenancytest

import (
	"context"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

// pooler is the address of the test process's one PgBouncer before the server, started at first use; "" without TENANCY_TEST_POOLER=1.
func pooler(tb testing.TB) string {
	tb.Helper()
	if os.Getenv("TENANCY_TEST_POOLER") != "1" {
		return ""
	}
	start(tb)
	server.Lock()
	defer server.Unlock()
	if server.pooler == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		b, err := pgembed.StartBouncerBefore(ctx, server.URL())
		if err != nil {
			tb.Fatal(err)
		}
		server.pooler = b
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(server.pooler.Port()))
}
