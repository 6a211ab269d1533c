//go:build unix

package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEachModelServesTheSameServiceWhileATenantMoves(t *testing.T) {
	var out strings.Builder
	if err := run(t.Context(), &out, options{clients: 8, time: 4 * time.Second}); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	const name, login = `t_[0-9a-f]+`, ` +login (t_[0-9a-f]+_(?:l1|d)) \((\d+) sessions\), current_user (\S+), schema (\S+), database (\S+): [1-9]\d* answers\n`
	ways := map[string][][]string{}
	for _, of := range tenants {
		part := regexp.MustCompile(`(?m)^` + of.name + ` +` + string(of.isolation) + `\S* .*[1-9]\d* requests, 0 failed, 0 rows of others, ([1-9]\d*) of ([1-9]\d*) notes\n((?:` + login + `)+)`).FindStringSubmatch(out.String())
		if part == nil || part[1] != part[2] {
			t.Fatalf("no line says how %s was served:\n%s", of.name, &out)
		}
		ways[of.name] = regexp.MustCompile(login).FindAllStringSubmatch(part[3], -1)
		if n := len(ways[of.name]); n != 1 && !of.moves {
			t.Errorf("%s was served in %d ways, want one:\n%s", of.name, n, &out)
		}
	}
	type served struct{ login, sessions, role, schema, database string }
	by := func(tenant string, i int) served {
		w := ways[tenant][i]
		return served{w[1], w[2], w[3], w[4], w[5]}
	}
	for tenant, own := range map[string]bool{"acme": true, "globex": true, "initech": true, "hooli": false, "pied-piper": false} {
		if w := by(tenant, 0); (w.login == w.role) != own || w.sessions == "0" {
			t.Errorf("%s: login %s, role %s, %s sessions", tenant, w.login, w.role, w.sessions)
		}
	}
	if a, g := by("acme", 0), by("globex", 0); a.database != "hybrid_tenants" || g.database != g.schema || !regexp.MustCompile(`^`+name+`$`).MatchString(g.database) {
		t.Errorf("acme is in database %s, globex in %s", a.database, g.database)
	}
	if i, p := by("initech", 0), by("pied-piper", 0); i.schema != p.schema || i.login == p.login {
		t.Errorf("initech is in schema %s with login %s, pied-piper in %s with %s", i.schema, i.login, p.schema, p.login)
	}
	if len(ways["rover"]) != 2 {
		t.Fatalf("rover was not seen in both pools:\n%s", &out)
	}
	hooli, own, shared := by("hooli", 0), by("rover", 0), by("rover", 1)
	if own.login == own.role == (shared.login == shared.role) {
		t.Errorf("rover had logins %s and %s", own.login, shared.login)
	} else if own.login != own.role {
		own, shared = shared, own
	}
	if shared.login != hooli.login || shared.role == hooli.role || shared.schema != own.schema || shared.schema == hooli.schema {
		t.Errorf("the shared pool served rover as %+v and hooli as %+v, and rover's own as %+v", shared, hooli, own)
	}
	for _, to := range []string{"the shared pool", "a pool of its own"} {
		if !regexp.MustCompile(`rover +moved to ` + to + ` in \d+(\.\d+)?m?s\n`).MatchString(out.String()) {
			t.Errorf("no move to %s:\n%s", to, &out)
		}
	}
}

// TestALoadSeesWhatIsWrong asks services that are.
func TestALoadSeesWhatIsWrong(t *testing.T) {
	for name, c := range map[string]struct {
		list, count string
		status      int
		want        string
	}{
		"a row of another tenant": {`["a note of globex"]`, "1", 200, "acme has seen 1 rows of other tenants"},
		"a row that is lost":      {`[]`, "0", 200, "acme has 0 notes, and 1 were written"},
		"a row that nobody wrote": {`[]`, "2", 200, "acme has 2 notes, and 1 were written"},
		"a request that failed":   {`[]`, "1", 503, "requests failed, the first: acme: GET /where: 503"},
		"nothing":                 {`["a note of acme"]`, "1", 200, ""},
	} {
		t.Run(name, func(t *testing.T) {
			mux := http.NewServeMux()
			mux.HandleFunc("GET /notes", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, c.list) })
			mux.HandleFunc("POST /notes", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, 1) })
			mux.HandleFunc("GET /notes/count", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, c.count) })
			mux.HandleFunc("GET /where", func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(c.status)
				fmt.Fprint(w, `{}`)
			})
			server := httptest.NewServer(mux)
			defer server.Close()
			l := newLoad(server.URL)
			defer l.client.CloseIdleConnections()
			for _, ask := range []func(context.Context, string) error{l.add, l.list, l.where} {
				l.judge("acme", ask(t.Context(), "acme"))
			}
			if err := l.count(t.Context(), "acme"); err != nil {
				t.Fatal(err)
			}
			if err := l.err(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
