package tenancy_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// FuzzNotification sends forged notifications. A notification is a hint: whatever it says, the node reads
// the changes, finds none, and goes on.
func FuzzNotification(f *testing.F) {
	for _, payload := range []string{"", "1", "-1", "99999999999999999999", "{}", "acme", strings.Repeat("x", 7999), "é\n'\""} {
		f.Add(payload)
	}
	fleet := tenancytest.NewFleet(f)
	tn := fleet.Open(f, tenancy.Config{Migrations: noteMigrations})
	if _, err := tn.Catalog().Create(f.Context(), tenancy.NewTenant{Name: "acme", Admin: "alice"}); err != nil {
		f.Fatal(err)
	}
	conn, err := pgx.Connect(f.Context(), fleet.PrimaryURL)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = conn.Close(f.Context()) })
	f.Fuzz(func(t *testing.T, payload string) {
		if len(payload) > 7999 || strings.ContainsRune(payload, 0) {
			return // the server refuses them
		}
		if _, err := conn.Exec(t.Context(), `SELECT pg_notify('tenancy', $1)`, strings.ToValidUTF8(payload, "?")); err != nil {
			return
		}
		ctx, err := tn.Resolve(t.Context(), tenancy.Query{User: "alice"})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := tenancy.TenantFrom(ctx); err != nil || got.Name != "acme" {
			t.Fatalf("%v, %v", got, err)
		}
		if _, err := tn.Resolve(t.Context(), tenancy.Query{User: tenancy.UserKey("mallory")}); err == nil {
			t.Fatal("a stranger was let in")
		}
	})
}
