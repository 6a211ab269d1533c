package tenancy_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/msmt-go/tenancy"
	"github.com/pressly/goose/v3"
)

// BenchmarkMigrate compares the Migrator with a loop over the tenants that connects to each as its owner and calls goose, as services do it by hand: the same files, the same
// number at once. TENANCY_MIGRATE_TENANTS sets the number of tenants; default: 1,000.
//
// nothing: all are up to date. One iteration is {loop, Run}; reported are the time of each and speedup, the loop's time by that of Run. The target is 100. status-ms is a Status, whose target is 1 s.
//
// pending: one migration is pending for all. One iteration has the loop apply one to all tenants, and then Run the next; reported is speedup in the same way. The target is 1.5.
// The owners' logins of the loop are there already; Run opens and closes them, which the loop is spared.
//
//	go test -run '^$' -bench BenchmarkMigrate/nothing -benchtime=5x -timeout 30m .
//	go test -run '^$' -bench BenchmarkMigrate/pending -benchtime=5x -timeout 30m .
//	TENANCY_MIGRATE_TENANTS=100 go test -run '^$' -bench BenchmarkMigrate -benchtime=10x .
func BenchmarkMigrate(b *testing.B) {
	n := 1000
	if s := os.Getenv("TENANCY_MIGRATE_TENANTS"); s != "" {
		if _, err := fmt.Sscan(s, &n); err != nil {
			b.Fatal(err)
		}
	}
	const parallel = 4
	f := newBulkFleet(b, n, 200)
	primary, server := superuser(b, f.AdminURL, bulkPrimary), superuser(b, f.AdminURL, bulkTenants)
	owners := make([]*pgx.ConnConfig, n)
	for i, t := range f.tenants {
		p := bulkPlaceOf(b, primary, t.ID)
		must(b, server, `ALTER ROLE `+p.Owner+` LOGIN PASSWORD 'by-hand'`)
		cc := server.Config().Copy()
		cc.User, cc.Password, cc.Database = p.Owner, "by-hand", bulkTenants
		cc.RuntimeParams["search_path"] = p.Schema
		owners[i] = cc
	}
	loop := func(files fs.FS) time.Duration {
		began := time.Now()
		var next atomic.Int64
		var wg sync.WaitGroup
		for range parallel {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
					if err := gooseByHand(b.Context(), owners[i], files); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		return time.Since(began)
	}
	run := func(files fs.FS) (took, status time.Duration) {
		tn := f.Open(b, tenancy.Config{Migrations: files, Limits: tenancy.Limits{ServerConns: 100}})
		defer tn.Close()
		began := time.Now()
		if _, err := tn.Migrator().Run(b.Context(), tenancy.MigrateOptions{Parallel: parallel}); err != nil {
			b.Error(err)
		}
		took = time.Since(began)
		if _, err := tn.Migrator().Status(b.Context()); err != nil {
			b.Error(err)
		}
		return took, time.Since(began) - took
	}
	report := func(b *testing.B, rounds int, byHand, ours, status time.Duration) {
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(byHand)/float64(ours), "speedup")
		b.ReportMetric(byHand.Seconds()/float64(rounds), "loop-s")
		b.ReportMetric(ours.Seconds()/float64(rounds), "run-s")
		b.ReportMetric(status.Seconds()*1000/float64(rounds), "status-ms")
	}
	var more []string
	b.Run("pending", func(b *testing.B) {
		var byHand, ours, status time.Duration
		rounds := 0
		for b.Loop() {
			rounds++
			more = append(more, fmt.Sprintf("-- +goose Up\nALTER TABLE notes ADD COLUMN c%d int;\n", len(more)))
			byHand += loop(notesAnd(b, more...))
			// What was applied past the catalog is what Run takes for pending: it is told first.
			must(b, primary, `UPDATE tenancy.data_sources SET version = $1`, len(more)+1)
			more = append(more, fmt.Sprintf("-- +goose Up\nALTER TABLE notes ADD COLUMN c%d int;\n", len(more)))
			took, look := run(notesAnd(b, more...))
			ours, status = ours+took, status+look
			for _, cc := range owners { // Run has taken their logins back
				must(b, server, `ALTER ROLE `+cc.User+` LOGIN PASSWORD 'by-hand' VALID UNTIL 'infinity'`)
			}
		}
		report(b, rounds, byHand, ours, status)
	})
	b.Run("nothing", func(b *testing.B) {
		var byHand, ours, status time.Duration
		rounds := 0
		for b.Loop() {
			rounds++
			byHand += loop(notesAnd(b, more...))
			took, look := run(notesAnd(b, more...))
			ours, status = ours+took, status+look
		}
		report(b, rounds, byHand, ours, status)
	})
}

// gooseByHand brings one schema up to date.
func gooseByHand(ctx context.Context, cc *pgx.ConnConfig, files fs.FS) error {
	db := stdlib.OpenDB(*cc)
	defer db.Close()
	p, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return err
	}
	_, err = p.Up(ctx)
	return err
}
