package middleware_test

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// outcomeNames is what a claim, header, domain, cookie or path can say in the combinations; "" is nothing.
var outcomeNames = []string{"", "acme", "globex", "nosuch"}

// outcomeMembers are the roles of those who take part in the combinations.
var outcomeMembers = map[string]map[string]string{
	"":        {},
	"alice":   {"acme": "admin"},
	"bob":     {"globex": "admin"},
	"carol":   {"acme": "member", "globex": "member"},
	"dave":    {"acme": "member", "globex": "member"},
	"mallory": {},
	"root":    {},
	"ruth":    {"globex": "member"},
	"erin":    {"acme": "member", "globex": "member"},
}

// outOfService is what acme's members are answered in a state. In the other states it is served.
var outOfService = map[string]answer{
	"provisioning": {status: 503, problem: "tenant-not-ready", besides: "retry=1"},
	"suspended":    {status: 403, problem: "tenant-suspended", besides: "message=unpaid"},
	"maintenance":  {status: 503, problem: "tenant-maintenance", besides: "retry=90,message=back-at-9"},
	"deleted":      {status: 410, problem: "tenant-gone"},
}

// set is a set of tenants' names.
type set map[string]bool

func setOf(names ...string) set {
	s := set{}
	for _, name := range names {
		if name != "" {
			s[name] = true
		}
	}
	return s
}

func (s set) only(name string) bool { return len(s) == 1 && s[name] }

func (s set) sorted() []string { return slices.Sorted(maps.Keys(s)) }

// ownOf returns the tenants that the user belongs to.
func ownOf(user, state string) set {
	own := setOf(slices.Collect(maps.Keys(outcomeMembers[user]))...)
	if state == "purged" {
		delete(own, "acme")
	}
	return own
}

// shownTo returns the tenants that the user may know of: their own, and for nobody those that have a place on the web.
func shownTo(user, state string) set {
	if user != "" {
		return ownOf(user, state)
	}
	shown := setOf("acme", "globex")
	if _, out := outOfService[state]; out || state == "purged" {
		delete(shown, "acme")
	}
	return shown
}

// expect is the rules once more, in terms of sets: the tenants that a request names, and those that the caller may be shown. The source
// of the decision is left out.
func expect(a asked, state string) answer {
	shown := shownTo(a.user, state)
	named := setOf(a.claim, a.header, a.domain, a.cookie, a.path)
	refused := answer{status: 403, problem: "forbidden"}
	if a.user == "" {
		named = setOf(a.domain, a.path)
		refused = answer{status: 404, problem: "tenant-not-found"}
	}
	if len(named) == 0 {
		switch {
		case a.user == "":
			return answer{status: 200, caller: "anonymous"}
		case len(shown) == 0 && (a.user == "root" || a.user == "ruth"):
			return answer{status: 200, caller: "host user"}
		case a.user == "dave":
			named = setOf("globex")
		case a.user == "erin" && shown["acme"]:
			named = setOf("acme")
		case len(shown) > 1:
			if _, out := outOfService[state]; out {
				delete(shown, "acme")
			}
			return answer{status: 409, problem: "ambiguous-tenant", besides: "tenants=" + strings.Join(shown.sorted(), ",")}
		default:
			named = shown
		}
	}
	for tenant := range shown {
		if !named.only(tenant) {
			continue
		}
		if out, is := outOfService[state]; is && tenant == "acme" {
			return out
		}
		if state == "elsewhere" && tenant == "acme" {
			return answer{status: 421, problem: "not-served", besides: "nodes=10.0.0.7:8080"}
		}
		if a.user == "" {
			return answer{status: 200, tenant: tenant, caller: "tenant guest"}
		}
		return answer{status: 200, tenant: tenant, role: outcomeMembers[a.user][tenant], caller: "tenant user"}
	}
	return refused
}

func (a answer) withoutSource() answer {
	a.source = ""
	return a
}

// expectTrail returns what the audit trail must have of a request: who named a tenant that exists and is not theirs, or two of their own.
func expectTrail(a asked) (entries []string) {
	roles, known := outcomeMembers[a.user]
	if a.user == "" || !known || strings.HasPrefix(a.path, "/") {
		return nil
	}
	named := map[string]string{"claim": a.claim, "header": a.header, "domain": a.domain, "cookie": a.cookie, "path": a.path}
	foreign, own := set{}, set{}
	for _, name := range named {
		if roles[name] != "" {
			own[name] = true
		} else if name == "acme" || name == "globex" {
			foreign[name] = true
		}
	}
	tell := foreign
	if len(foreign) == 0 && len(own) > 1 {
		tell = own
	}
	for source, name := range named {
		if tell[name] {
			entries = append(entries, fmt.Sprint(a.user, " ", name, " ", source))
		}
	}
	return entries
}

// sendAll sends every combination, and compares the answers with expect and with each other.
func (s *outcomeService) sendAll(t *testing.T, state string) {
	for _, user := range []string{"", "alice", "carol", "dave", "mallory", "root"} {
		for _, claim := range outcomeNames {
			for _, header := range outcomeNames {
				for _, domain := range outcomeNames {
					for _, cookie := range outcomeNames[:3] {
						a := asked{user: user, claim: claim, header: header, domain: domain, cookie: cookie}
						s.compare(t, a, state)
						if t.Failed() {
							t.FailNow() // the other thousand would say the same
						}
					}
				}
			}
		}
		s.settle(t)
	}
}

func (s *outcomeService) compare(t *testing.T, a asked, state string) {
	t.Helper()
	res := s.send(a)
	got := answerOf(t, a, res)
	if want := expect(a, state); got.withoutSource() != want {
		t.Errorf("%+v\ngot  %+v\nwant %+v\n%s", a, got, want, res.Body)
	}
	if got.status == http.StatusOK && got.tenant != "" && outcomeMembers[a.user][got.tenant] == "" && (a.user != "" || got.tenant != a.domain) {
		t.Errorf("%+v was let into %s", a, got.tenant)
	}
	// What must not be shown is answered like what does not exist.
	shown := shownTo(a.user, state)
	for _, hidden := range []string{"acme", "globex"} {
		b := a
		for _, value := range []*string{&b.claim, &b.header, &b.domain, &b.cookie} {
			if *value == hidden {
				*value = "nosuch"
			}
		}
		if a == b || shown[hidden] {
			continue
		}
		if twin := s.send(b); twin.Code != res.Code || twin.Body.String() != res.Body.String() || fmt.Sprint(twin.Header()) != fmt.Sprint(res.Header()) {
			t.Errorf("%+v\n%s can be told from a tenant that does not exist:\n%d %v %s\n%d %v %s", a, hidden,
				res.Code, res.Header(), res.Body, twin.Code, twin.Header(), twin.Body)
		}
	}
}

// settle waits until the trail has everything that was sent so far: it is written in the order of the requests, and the last one is a probe.
func (s *outcomeService) settle(t *testing.T) {
	t.Helper()
	s.probes++
	user := fmt.Sprintf("probe-%d", s.probes)
	if res := s.send(asked{user: user, header: "globex"}); res.Code != http.StatusForbidden {
		t.Fatalf("the probe is answered with %d", res.Code)
	}
	eventually(t, 10*time.Second, "the audit trail is written", func() bool {
		var n int
		if err := s.admin.QueryRow(t.Context(), `SELECT count(*) FROM tenancy.audit WHERE actor = $1`, user).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n == 1
	})
}

// wantTrail compares the trail with what was sent. Each node writes for itself.
func (s *outcomeService) wantTrail(t *testing.T) {
	t.Helper()
	rows, _ := s.admin.Query(t.Context(), `SELECT DISTINCT a.actor || ' ' || t.name || ' ' || (a.detail->>'source')
		FROM tenancy.audit a JOIN tenancy.tenants t ON t.id = a.tenant WHERE action = 'refused hint' AND actor NOT LIKE 'probe-%'`)
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	got := setOf(list...)
	for entry := range s.trail {
		if !got[entry] {
			t.Errorf("the trail lacks %q", entry)
		}
	}
	for entry := range got {
		if !s.trail[entry] {
			t.Errorf("the trail has %q, and nobody did that", entry)
		}
	}
	t.Logf("%d entries of the trail", len(got))
}
