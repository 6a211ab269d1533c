package tenancy_test

import (
	"fmt"
	"io"
	"iter"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
)

// The figures as Prometheus reads them, at each scrape. Those of servers count since Open; those of tenants begin anew with each pool, which
// rate() and increase() allow for.
func ExampleTenancy_Servers() {
	var tn *tenancy.Tenancy // of tenancy.Open
	http.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		writeServers(w, tn.Servers())
		writeTenants(w, tn.Stats())
	})

	writeServers(os.Stdout, slices.Values([]tenancy.ServerStats{{Address: "db:5432", Budget: 44, Own: 13, OwnUsed: 10, Shared: 29, Tenants: 26, Used: 25, Hungry: 3,
		Waits: 120, WaitTime: 1500 * time.Millisecond, Starved: 7, Refused: 2, Canceled: 1, Connects: 300, Evicted: 80}}))
	writeTenants(os.Stdout, maps.All(map[tenancy.ID]tenancy.TenantStats{7: {Name: "acme", Server: "db:5432", Conns: 4, Busy: 4, Waiting: 9, Waits: 100, Breaker: "closed"}}))
	// Output:
	// # TYPE tenancy_server_budget_connections gauge
	// tenancy_server_budget_connections{server="db:5432"} 44
	// # TYPE tenancy_server_own_connections gauge
	// tenancy_server_own_connections{server="db:5432"} 10
	// # TYPE tenancy_server_tenant_connections_max gauge
	// tenancy_server_tenant_connections_max{server="db:5432"} 26
	// # TYPE tenancy_server_shared_connections gauge
	// tenancy_server_shared_connections{server="db:5432"} 25
	// # TYPE tenancy_server_hungry gauge
	// tenancy_server_hungry{server="db:5432"} 3
	// # TYPE tenancy_server_waits_total counter
	// tenancy_server_waits_total{server="db:5432"} 120
	// # TYPE tenancy_server_wait_seconds_total counter
	// tenancy_server_wait_seconds_total{server="db:5432"} 1.5
	// # TYPE tenancy_server_starved_total counter
	// tenancy_server_starved_total{server="db:5432"} 7
	// # TYPE tenancy_server_refused_total counter
	// tenancy_server_refused_total{server="db:5432"} 2
	// # TYPE tenancy_server_canceled_total counter
	// tenancy_server_canceled_total{server="db:5432"} 1
	// # TYPE tenancy_server_evicted_total counter
	// tenancy_server_evicted_total{server="db:5432"} 80
	// # TYPE tenancy_server_connects_total counter
	// tenancy_server_connects_total{server="db:5432"} 300
	// # TYPE tenancy_server_connect_failures_total counter
	// tenancy_server_connect_failures_total{server="db:5432"} 0
	// # TYPE tenancy_server_too_many_connections_total counter
	// tenancy_server_too_many_connections_total{server="db:5432"} 0
	// # TYPE tenancy_tenant_connections gauge
	// tenancy_tenant_connections{id="7",name="acme",server="db:5432"} 4
	// # TYPE tenancy_tenant_waiting gauge
	// tenancy_tenant_waiting{id="7",name="acme",server="db:5432"} 9
	// # TYPE tenancy_tenant_waits_total counter
	// tenancy_tenant_waits_total{id="7",name="acme",server="db:5432"} 100
	// # TYPE tenancy_tenant_refused_total counter
	// tenancy_tenant_refused_total{id="7",name="acme",server="db:5432"} 0
	// # TYPE tenancy_tenant_canceled_total counter
	// tenancy_tenant_canceled_total{id="7",name="acme",server="db:5432"} 0
	// # TYPE tenancy_tenant_breaker_open gauge
	// tenancy_tenant_breaker_open{id="7",name="acme",server="db:5432"} 0
}

// figure is one metric of an S.
type figure[S any] struct {
	name, kind string
	of         func(S) float64
}

func writeServers(w io.Writer, servers iter.Seq[tenancy.ServerStats]) {
	type S = tenancy.ServerStats
	all := slices.Collect(servers)
	for _, f := range []figure[S]{
		{"budget_connections", "gauge", func(s S) float64 { return float64(s.Budget) }},
		{"own_connections", "gauge", func(s S) float64 { return float64(s.OwnUsed) }},
		{"tenant_connections_max", "gauge", func(s S) float64 { return float64(s.Tenants) }},
		{"shared_connections", "gauge", func(s S) float64 { return float64(s.Used) }},
		{"hungry", "gauge", func(s S) float64 { return float64(s.Hungry) }},
		{"waits_total", "counter", func(s S) float64 { return float64(s.Waits) }},
		{"wait_seconds_total", "counter", func(s S) float64 { return s.WaitTime.Seconds() }},
		{"starved_total", "counter", func(s S) float64 { return float64(s.Starved) }},
		{"refused_total", "counter", func(s S) float64 { return float64(s.Refused) }},
		{"canceled_total", "counter", func(s S) float64 { return float64(s.Canceled) }},
		{"evicted_total", "counter", func(s S) float64 { return float64(s.Evicted) }},
		{"connects_total", "counter", func(s S) float64 { return float64(s.Connects) }},
		{"connect_failures_total", "counter", func(s S) float64 { return float64(s.ConnectFailures) }},
		{"too_many_connections_total", "counter", func(s S) float64 { return float64(s.TooManyConns) }},
	} {
		fmt.Fprintf(w, "# TYPE tenancy_server_%s %s\n", f.name, f.kind)
		for _, s := range all {
			fmt.Fprintf(w, "tenancy_server_%s{server=%s} %v\n", f.name, label(s.Address), f.of(s))
		}
	}
}

// writeTenants writes those that have a pool on this node. For thousands of them write those alone that wait or are refused.
func writeTenants(w io.Writer, tenants iter.Seq2[tenancy.ID, tenancy.TenantStats]) {
	type S = tenancy.TenantStats
	all := maps.Collect(tenants)
	open := func(s S) float64 {
		if s.Breaker == "closed" {
			return 0
		}
		return 1
	}
	for _, f := range []figure[S]{
		{"connections", "gauge", func(s S) float64 { return float64(s.Conns) }},
		{"waiting", "gauge", func(s S) float64 { return float64(s.Waiting) }},
		{"waits_total", "counter", func(s S) float64 { return float64(s.Waits) }},
		{"refused_total", "counter", func(s S) float64 { return float64(s.Refused) }},
		{"canceled_total", "counter", func(s S) float64 { return float64(s.Canceled) }},
		{"breaker_open", "gauge", open},
	} {
		fmt.Fprintf(w, "# TYPE tenancy_tenant_%s %s\n", f.name, f.kind)
		for id, s := range all { // by ID: a name can go to another tenant
			fmt.Fprintf(w, "tenancy_tenant_%s{id=\"%d\",name=%s,server=%s} %v\n", f.name, id, label(s.Name), label(s.Server), f.of(s))
		}
	}
}

var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func label(value string) string { return `"` + escape.Replace(value) + `"` }
