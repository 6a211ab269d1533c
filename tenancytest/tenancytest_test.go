package tenancytest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestMain(m *testing.M) {
	// This repository's own tests may fetch a PostgreSQL; those of its users ask first.
	if os.Getenv("TENANCY_PG_DOWNLOAD") == "" {
		if err := os.Setenv("TENANCY_PG_DOWNLOAD", "on"); err != nil {
			panic(err)
		}
	}
	tenancytest.Main(m)
}

// TestAServiceIsTested is what a user's first test looks like.
func TestAServiceIsTested(t *testing.T) {
	for _, isolation := range []tenancy.Isolation{tenancy.IsolationSchema, tenancy.IsolationDatabase, tenancy.IsolationShared} {
		for name, pooler := range map[string]string{string(isolation): "", string(isolation) + "_behind_a_pooler": "1"} {
			t.Run(name, func(t *testing.T) {
				t.Setenv("TENANCY_TEST_ISOLATION", string(isolation)) // as a user sets them for all tests of the service
				t.Setenv("TENANCY_TEST_POOLER", pooler)
				aService(t, isolation, pooler == "1")
			})
		}
	}
}

func aService(t *testing.T, isolation tenancy.Isolation, pooled bool) {
	tn := tenancytest.Open(t, tenancy.Config{Migrations: os.DirFS("../testdata/migrations")})
	if made := tenancytest.Create(t, tn, "acme"); made.Isolation != isolation {
		t.Errorf("made %+v, want isolation %s", made, isolation)
	}
	err := tn.DB().InTx(tenancytest.Context(t, tn, "acme"), pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error {
		var pid uint32
		err := tx.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&pid)
		if other := pid != tx.Conn().PgConn().PID(); other != pooled {
			t.Errorf("another backend than the one that was dialled: %t, want %t", other, pooled)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	tenancytest.NoCrossing(t, tn, func(ctx context.Context) error {
		tenant, err := tenancy.TenantFrom(ctx)
		if err != nil {
			return err
		}
		if _, err := tn.DB().Exec(ctx, `INSERT INTO notes (tenant, title) VALUES ($1, 'a note')`, tenant.Name); err != nil {
			return err
		}
		var others int
		err = tn.DB().QueryRow(ctx, `SELECT count(*) FROM notes WHERE tenant <> $1`, tenant.Name).Scan(&others)
		if others > 0 {
			err = fmt.Errorf("%d notes of others", others)
		}
		return err
	})
}

// TestFleetsLeaveNothingBehind makes a fleet with a tenant inside a subtest and looks for its databases and roles afterwards.
func TestFleetsLeaveNothingBehind(t *testing.T) {
	look := tenancytest.NewFleet(t).Admin(t, "primary")
	count := func() (n int) {
		t.Helper()
		if err := look.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM pg_database) + (SELECT count(*) FROM pg_roles)`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	t.Run("fleet", func(t *testing.T) {
		tn := tenancytest.Open(t, tenancy.Config{Migrations: os.DirFS("../testdata/migrations"), Isolation: tenancy.IsolationDatabase})
		tenancytest.Create(t, tn, "acme")
		if _, err := tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex", Isolation: tenancy.IsolationSchema}); err != nil {
			t.Error(err)
		}
		if err := tn.DB().QueryRow(tenancytest.Context(t, tn, "acme"), `SELECT 1`).Scan(new(int)); err != nil {
			t.Error(err)
		}
		if err := tn.DB().QueryRow(t.Context(), `SELECT 1`).Scan(new(int)); !errors.Is(err, tenancy.ErrNoTenant) {
			t.Errorf("without a tenant: %v", err)
		}
		if count() <= before {
			t.Error("the fleet is on another server than the look")
		}
	})
	if after := count(); after != before {
		t.Errorf("%d databases and roles before, %d after", before, after)
	}
}
