package tenancy_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/tenancytest"
)

// BenchmarkCreateAmong is what Create takes at a server that has the roles of many tenants: "apart", and "member" where the provisioner is a member of all of them, as the
// releases before had it. The two take turns on one fleet, and each iteration is one Create of each; the roles of the many stand alone, without schemas, which costs Create
// nothing. Beyond 2,000 tenants there is no "member": on PostgreSQL 15 it takes minutes, and its verbs run into their own bounds.
//
//	go test -run '^$' -bench CreateAmong -benchtime 5x .
func BenchmarkCreateAmong(b *testing.B) {
	for _, many := range []int{100, 2000, 5000} {
		b.Run(fmt.Sprintf("tenants=%d", many), func(b *testing.B) {
			f := tenancytest.NewFleet(b)
			tn := f.Open(b, tenancy.Config{Migrations: noteMigrations, Isolation: tenancy.IsolationSchema, ValidityCron: "@every 10h"})
			admin := f.Admin(b, "tenants")
			provisioner := fleetName(b, f) + "_provisioner"
			each := func(sql string) {
				b.Helper()
				must(b, admin, fmt.Sprintf(`DO $do$ DECLARE t text; BEGIN FOR i IN 1..%d LOOP t := 't_' || left(md5(i || '%s'), 20); EXECUTE format($$%s$$, t); IF i %% 200 = 0 THEN COMMIT; END IF; END LOOP; END $do$`, many, provisioner, sql))
			}
			must(b, admin, "SET ROLE "+provisioner)
			each(`CREATE ROLE %1$s_o; CREATE ROLE %1$s_r; CREATE ROLE %1$s_l1; GRANT ` + fleetName(b, f) + `_tenants_tenants TO %1$s_o, %1$s_l1; GRANT %1$s_r TO %1$s_l1`)
			took := map[string]time.Duration{}
			n := 0
			for b.Loop() {
				for _, how := range []struct{ name, before string }{
					{"apart", `REVOKE %1$s_o, %1$s_r, %1$s_l1 FROM ` + provisioner},
					{"member", `GRANT %1$s_o, %1$s_r, %1$s_l1 TO ` + provisioner + with(b, f)},
				} {
					if how.name == "member" && many > 2000 {
						continue
					}
					each(how.before)
					began := time.Now()
					tenancytest.Create(b, tn, fmt.Sprintf("%s-%d", how.name, n))
					took[how.name] += time.Since(began)
				}
				n++
			}
			each(`REVOKE %1$s_o, %1$s_r, %1$s_l1 FROM ` + provisioner)
			each(`DROP ROLE %1$s_o; DROP ROLE %1$s_r; DROP ROLE %1$s_l1`)
			must(b, admin, "RESET ROLE")
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(took["apart"].Seconds()*1000/float64(n), "apart-ms")
			if took["member"] > 0 {
				b.ReportMetric(took["member"].Seconds()*1000/float64(n), "member-ms")
			}
		})
	}
}

// with is what a server wants said of a membership from PostgreSQL 16 on.
func with(tb testing.TB, f *tenancytest.Fleet) string {
	tb.Helper()
	if scan[int](tb, f.Admin(tb, "tenants"), `SELECT current_setting('server_version_num')::int`) >= 160000 {
		return " WITH INHERIT TRUE, SET TRUE"
	}
	return ""
}
