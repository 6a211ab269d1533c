package tenancy_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestTheLoginOfATenantIsGivenOutAndReachesItsOwnRowsAlone(t *testing.T) {
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	acme, globex := tenancytest.Create(t, tn, "acme"), tenancytest.Create(t, tn, "globex")
	d, err := tn.Catalog().Login(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%v %+v %q", d, d, d); d.Password == "" || strings.Contains(text, d.Password.Reveal()) {
		t.Error("the password is missing, or prints")
	}
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://%s:%s@%s:%d/%s?sslmode=disable", d.User, d.Password.Reveal(), d.Host, d.Port, d.Database))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	other, err := tn.Catalog().DataSource(t.Context(), globex.ID)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM "+d.Schema+".notes").Scan(&n); err != nil {
		t.Error(err)
	}
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM "+other.Schema+".notes").Scan(&n); err == nil {
		t.Error("the login reads another tenant's rows")
	}
	if err := f.Admin(t, "primary").QueryRow(t.Context(), "SELECT count(*) FROM tenancy.audit WHERE action = 'login' AND tenant = $1", acme.ID).Scan(&n); err != nil || n != 1 {
		t.Errorf("the audit trail has %d log-ins, %v", n, err)
	}
	for want, change := range map[error]func() error{
		tenancy.ErrTenantSuspended: func() error { return tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{Drain: 1}) },
		tenancy.ErrTenantMaintenance: func() error {
			return tn.Catalog().Suspend(t.Context(), acme.ID, tenancy.Suspension{Maintenance: true, Drain: 1})
		},
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if d, err := tn.Catalog().Login(t.Context(), acme.ID); !errors.Is(err, want) || d.Password != "" {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	if err := tn.Catalog().Delete(t.Context(), acme.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := tn.Catalog().Login(t.Context(), acme.ID); !errors.Is(err, tenancy.ErrTenantGone) {
		t.Errorf("got %v, want ErrTenantGone", err)
	}
	servers, err := tn.Catalog().Servers(t.Context())
	if err != nil || len(servers) != 1 || servers[0].Name != "main" || servers[0].Places != 2 || servers[0].Weight != 1 || !servers[0].Provisioner || !strings.HasSuffix(servers[0].Address, "/"+d.Database) {
		t.Errorf("got servers %+v, %v", servers, err)
	}
}

func TestExtensionsAndReferenceTablesComeFromTheEnvironment(t *testing.T) {
	key, err := tenancy.NewKey("k")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TENANCY_PRIMARY_URL", "postgres://u@127.0.0.1:1/db")
	t.Setenv("TENANCY_KEYS", key)
	for name, field := range map[string]func(tenancy.Config) bool{
		"TENANCY_EXTENSIONS": func(c tenancy.Config) bool { return c.Extensions }, "TENANCY_REFERENCE_TABLES": func(c tenancy.Config) bool { return c.ReferenceTables }} {
		for value, want := range map[string]bool{"": false, "true": true, "false": false} {
			t.Setenv(name, value)
			if cfg, err := tenancy.FromEnv(); err != nil || field(cfg) != want {
				t.Errorf("%s=%q: got %t, %v", name, value, field(cfg), err)
			}
		}
		t.Setenv(name, "perhaps")
		if _, err := tenancy.FromEnv(); !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s=perhaps: got %v", name, err)
		}
		t.Setenv(name, "")
	}
}
