package tenancy_test

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// BenchmarkCreate compares how long a sign-up waits for its tenant: "stock" is a Create that takes a place of the stock, "made" is one that makes its place, and "goose" is no more
// than a new schema and goose's provider on it, as services do it by hand: without roles, marker, catalog and proof. The migrations are 20 files with 12 tables.
//
// One iteration is one of each, in turns; the stock is full before each. Reported are the medians, and goose's by that of stock, whose target is 2.5 on a RAM disk, which the
// tests' server has on Linux.
//
//	go test -run '^$' -bench 'Create$' -benchtime 21x .
func BenchmarkCreate(b *testing.B) {
	files := benchMigrations()
	f := tenancytest.NewFleet(b)
	plain := tenancytest.NewFleet(b).Open(b, tenancy.Config{Migrations: files, Isolation: tenancy.IsolationSchema, ValidityCron: "@every 10h"})
	admin := f.Admin(b, "tenants")
	took := map[string][]float64{}
	n := 0
	measure := func(name string, fn func() error) {
		b.Helper()
		began := time.Now()
		if err := fn(); err != nil {
			b.Fatal(err)
		}
		took[name] = append(took[name], time.Since(began).Seconds()*1000)
	}
	create := func(tn *tenancy.Tenancy, name string) func() error {
		return func() error {
			_, err := tn.Catalog().Create(b.Context(), tenancy.NewTenant{Name: fmt.Sprintf("%s-%d", name, n)})
			return err
		}
	}
	filler := stocked(b, f, tenancy.Config{Stock: 1, Migrations: files})
	for b.Loop() {
		awaitStock(b, f, 1)
		measure("goose", func() error {
			cc := admin.Config().Copy()
			schema := fmt.Sprintf("by_hand_%d", n)
			cc.RuntimeParams["search_path"] = schema
			if _, err := admin.Exec(b.Context(), "CREATE SCHEMA "+pgx.Identifier{schema}.Sanitize()); err != nil {
				return err
			}
			return gooseByHand(b.Context(), cc, files)
		})
		measure("stock", create(filler, "stock"))
		awaitStock(b, f, 1) // it is not filled beside the next
		measure("made", create(plain, "made"))
		n++
	}
	_, goose, _ := medianInterval(took["goose"])
	_, stock, _ := medianInterval(took["stock"])
	_, made, _ := medianInterval(took["made"])
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(goose, "goose-ms")
	b.ReportMetric(stock, "stock-ms")
	b.ReportMetric(made, "made-ms")
	b.ReportMetric(goose/stock, "goose/stock")
	b.ReportMetric(made/stock, "made/stock")
}

// benchMigrations are those of a small service: 20 files, 12 tables, each with an index and a reference.
func benchMigrations() fs.FS {
	files := fstest.MapFS{}
	for i := 1; i <= 20; i++ {
		up := fmt.Sprintf("ALTER TABLE t%d ADD COLUMN note text NOT NULL DEFAULT '';\nCREATE INDEX ON t%[1]d (note);", i-12)
		if i <= 12 {
			up = fmt.Sprintf("CREATE TABLE t%d (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, parent bigint REFERENCES t%d, name text NOT NULL, made timestamptz NOT NULL DEFAULT now());\nCREATE INDEX ON t%[1]d (name);", i, max(1, i-1))
		}
		files[fmt.Sprintf("%05d_step.sql", i)] = &fstest.MapFile{Data: []byte(strings.Join([]string{"-- +goose Up", up, "-- +goose Down", "SELECT 1;"}, "\n"))}
	}
	return files
}
