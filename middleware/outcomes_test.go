package middleware_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
	"github.com/msmt-go/tenancy/tenancytest"
)

// outcomes is what becomes of a request, one row each, by the rules of resolution. "-" is nothing.
//
// Who: alice is acme's administrator and bob globex's. carol and dave and erin are members of both: carol without a default, dave
// with globex, erin with acme. mallory belongs nowhere. root and ruth are managers of the host, and ruth is a member of globex too. The service's own
// resolver sends ward to acme. The credentials of forged are wrong.
//
// Claim, header, domain, cookie and path name a tenant; globex is active in every state of acme, and nosuch does not exist. "elsewhere" is
// acme on a node that serves globex alone. At "down" and "stale" the primary cannot be asked, for less and for longer than StaleGrace; that node
// knew alice and the domain acme.test before.
const outcomes = `
rule                                            who     claim  header domain cookie path   acme         status problem            tenant role   caller       source      besides

# 1. The user key comes from the service's authentication. Contributors hint; all hints are collected and compared. A resolver names a tenant, and the library judges it.
1_wrong_credentials_are_no_user                 forged  acme   acme   acme   acme   -      active       401    about:blank        -      -      -            -           -
1_a_claim_without_a_user_is_nobody              -       acme   -      -      -      -      active       200    -                  -      -      anonymous    -           -
1_all_hints_count_and_the_first_is_the_source   carol   acme   acme   acme   acme   acme   active       200    -                  acme   member tenant_user  claim       -
1_the_last_hint_is_compared_too                 carol   acme   acme   acme   globex acme   active       403    forbidden          -      -      -            -           -
1_two_choices_are_compared                      dave    -      acme   -      globex -      active       403    forbidden          -      -      -            -           -
1_two_places_are_compared                       dave    -      -      acme   -      globex active       403    forbidden          -      -      -            -           -
1_a_resolver_names_the_tenant                   ward    -      -      -      -      -      active       200    -                  acme   member tenant_user  ward        -
1_and_the_library_judges_a_half_made_one        ward    -      -      -      -      -      provisioning 503    tenant-not-ready   -      -      -            -           retry=1
1_and_the_library_judges_a_suspended_one        ward    -      -      -      -      -      suspended    403    tenant-suspended   -      -      -            -           message=unpaid
1_and_the_library_judges_a_deleted_one          ward    -      -      -      -      -      deleted      410    tenant-gone        -      -      -            -           -
1_and_the_library_judges_one_elsewhere          ward    -      -      -      -      -      elsewhere    421    not-served         -      -      -            -           nodes=10.0.0.7:8080

# 2. A user without a hint: the default membership; several and no default, the choices; no membership, the host for its managers and else nothing.
2_the_only_membership                           alice   -      -      -      -      -      active       200    -                  acme   admin  tenant_user  membership  -
2_the_default_membership                        dave    -      -      -      -      -      active       200    -                  globex member tenant_user  membership  -
2_several_and_no_default_is_a_choice            carol   -      -      -      -      -      active       409    ambiguous-tenant   -      -      -            -           tenants=acme,globex
2_the_choices_are_those_in_service              carol   -      -      -      -      -      suspended    409    ambiguous-tenant   -      -      -            -           tenants=globex
2_the_choices_are_those_of_all_nodes            carol   -      -      -      -      -      elsewhere    409    ambiguous-tenant   -      -      -            -           tenants=acme,globex
2_a_default_out_of_service_is_not_passed_over   erin    -      -      -      -      -      suspended    403    tenant-suspended   -      -      -            -           message=unpaid
2_no_membership_and_a_manager_is_the_host       root    -      -      -      -      -      active       200    -                  -      -      host_user    host        -
2_a_manager_with_a_membership_has_it            ruth    -      -      -      -      -      active       200    -                  globex member tenant_user  membership  -
2_no_membership_and_no_manager                  mallory -      -      -      -      -      active       403    forbidden          -      -      -            -           -

# 3. A user with a hint: that tenant for its members; else a refusal, the same whether it exists or not. A choice chooses among the user's own. A claim against another hint is refused.
3_a_claim_of_an_own_tenant                      carol   acme   -      -      -      -      active       200    -                  acme   member tenant_user  claim       -
3_a_header_of_an_own_tenant                     carol   -      globex -      -      -      active       200    -                  globex member tenant_user  header      -
3_a_domain_of_an_own_tenant                     carol   -      -      acme   -      -      active       200    -                  acme   member tenant_user  domain      -
3_a_cookie_of_an_own_tenant                     carol   -      -      -      globex -      active       200    -                  globex member tenant_user  cookie      -
3_a_path_of_an_own_tenant                       carol   -      -      -      -      acme   active       200    -                  acme   member tenant_user  path        -
3_a_hint_comes_before_the_default               dave    -      -      -      acme   -      active       200    -                  acme   member tenant_user  cookie      -
3_a_claim_of_a_foreign_tenant                   alice   globex -      -      -      -      active       403    forbidden          -      -      -            -           -
3_a_header_of_a_foreign_tenant                  alice   -      globex -      -      -      active       403    forbidden          -      -      -            -           -
3_a_domain_of_a_foreign_tenant                  alice   -      -      globex -      -      active       403    forbidden          -      -      -            -           -
3_a_cookie_of_a_foreign_tenant                  alice   -      -      -      globex -      active       403    forbidden          -      -      -            -           -
3_a_path_of_a_foreign_tenant                    alice   -      -      -      -      globex active       403    forbidden          -      -      -            -           -
3_a_claim_of_a_missing_tenant                   alice   nosuch -      -      -      -      active       403    forbidden          -      -      -            -           -
3_a_header_of_a_missing_tenant                  alice   -      nosuch -      -      -      active       403    forbidden          -      -      -            -           -
3_a_domain_of_a_missing_tenant                  alice   -      -      nosuch -      -      active       403    forbidden          -      -      -            -           -
3_a_cookie_of_a_missing_tenant                  alice   -      -      -      nosuch -      active       403    forbidden          -      -      -            -           -
3_a_path_of_a_missing_tenant                    alice   -      -      -      -      nosuch active       403    forbidden          -      -      -            -           -
3_a_choice_gives_a_stranger_nothing             mallory -      acme   -      -      -      active       403    forbidden          -      -      -            -           -
3_a_place_gives_a_stranger_nothing              mallory -      -      acme   -      -      active       403    forbidden          -      -      -            -           -
3_a_claim_gives_a_stranger_nothing              mallory acme   -      -      -      -      active       403    forbidden          -      -      -            -           -
3_a_claim_against_a_header                      carol   acme   globex -      -      -      active       403    forbidden          -      -      -            -           -
3_a_claim_against_a_domain                      carol   acme   -      globex -      -      active       403    forbidden          -      -      -            -           -
3_a_claim_against_a_cookie                      dave    globex -      -      acme   -      active       403    forbidden          -      -      -            -           -
3_a_claim_against_a_path                        dave    globex -      -      -      acme   active       403    forbidden          -      -      -            -           -
3_a_claim_against_a_missing_tenant              alice   acme   nosuch -      -      -      active       403    forbidden          -      -      -            -           -

# 4. Nobody: only a place names a tenant. Unknown, suspended or deleted is not found. Without a place it is the anonymous host session.
4_a_domain_names_a_tenant                       -       -      -      acme   -      -      active       200    -                  acme   -      tenant_guest domain      -
4_a_path_names_a_tenant                         -       -      -      -      -      acme   active       200    -                  acme   -      tenant_guest path        -
4_a_header_names_none                           -       -      acme   -      -      -      active       200    -                  -      -      anonymous    -           -
4_a_cookie_names_none                           -       -      -      -      acme   -      active       200    -                  -      -      anonymous    -           -
4_a_missing_choice_names_none                   -       nosuch nosuch -      nosuch -      active       200    -                  -      -      anonymous    -           -
4_only_the_place_counts                         -       globex globex acme   nosuch -      active       200    -                  acme   -      tenant_guest domain      -
4_two_places_of_one_tenant                      -       -      -      acme   -      acme   active       200    -                  acme   -      tenant_guest domain      -
4_two_places_that_disagree                      -       -      -      acme   -      globex active       404    tenant-not-found   -      -      -            -           -
4_an_unknown_domain                             -       -      acme   nosuch -      -      active       404    tenant-not-found   -      -      -            -           -
4_an_unknown_path                               -       -      -      -      -      nosuch active       404    tenant-not-found   -      -      -            -           -
4_a_suspended_place                             -       -      -      acme   -      -      suspended    404    tenant-not-found   -      -      -            -           -
4_a_place_under_maintenance                     -       -      -      -      -      acme   maintenance  404    tenant-not-found   -      -      -            -           -
4_a_deleted_place                               -       -      -      acme   -      -      deleted      404    tenant-not-found   -      -      -            -           -
4_a_purged_place                                -       -      -      -      -      acme   purged       404    tenant-not-found   -      -      -            -           -
4_a_half_made_place                             -       -      -      acme   -      -      provisioning 404    tenant-not-found   -      -      -            -           -
4_no_place                                      -       -      -      -      -      -      active       200    -                  -      -      anonymous    -           -

# 5. Members are told the state of their tenant. One that other nodes serve: the nodes. Without the primary: unavailable, but known users go on for StaleGrace.
5_a_member_of_a_suspended_tenant                alice   -      -      -      -      -      suspended    403    tenant-suspended   -      -      -            -           message=unpaid
5_a_member_who_names_a_suspended_tenant         dave    -      -      acme   -      -      suspended    403    tenant-suspended   -      -      -            -           message=unpaid
5_a_member_of_a_tenant_under_maintenance        alice   -      -      -      -      -      maintenance  503    tenant-maintenance -      -      -            -           retry=90,message=back-at-9
5_a_member_of_a_deleted_tenant                  alice   -      -      -      -      -      deleted      410    tenant-gone        -      -      -            -           -
5_a_member_of_a_half_made_tenant                alice   -      -      -      -      -      provisioning 503    tenant-not-ready   -      -      -            -           retry=1
5_a_purged_tenant_has_no_members                alice   -      -      -      -      -      purged       403    forbidden          -      -      -            -           -
5_nor_does_its_name_bring_them_back             carol   -      acme   -      -      -      purged       403    forbidden          -      -      -            -           -
5_nor_does_it_count_among_several               carol   -      -      -      -      -      purged       200    -                  globex member tenant_user  membership  -
5_other_tenants_are_served                      bob     -      -      globex -      -      maintenance  200    -                  globex admin  tenant_user  domain      -
5_a_stranger_is_not_told_of_a_suspension        mallory -      acme   -      -      -      suspended    403    forbidden          -      -      -            -           -
5_a_stranger_is_not_told_of_maintenance         bob     -      -      acme   -      -      maintenance  403    forbidden          -      -      -            -           -
5_a_stranger_is_not_told_of_a_deletion          bob     acme   -      -      -      -      deleted      403    forbidden          -      -      -            -           -
5_a_stranger_is_not_told_of_a_half_made_one     bob     -      -      -      acme   -      provisioning 403    forbidden          -      -      -            -           -
5_a_manager_is_a_stranger_too                   root    -      acme   -      -      -      suspended    403    forbidden          -      -      -            -           -
5_a_tenant_that_other_nodes_serve               alice   -      -      -      -      -      elsewhere    421    not-served         -      -      -            -           nodes=10.0.0.7:8080
5_a_guest_is_sent_there_too                     -       -      -      acme   -      -      elsewhere    421    not-served         -      -      -            -           nodes=10.0.0.7:8080
5_a_stranger_is_not_told_of_nodes               bob     -      -      acme   -      -      elsewhere    403    forbidden          -      -      -            -           -
5_what_this_node_serves                         bob     -      -      -      -      -      elsewhere    200    -                  globex admin  tenant_user  membership  -
5_without_the_primary_a_known_user_goes_on      alice   acme   acme   acme   acme   -      down         200    -                  acme   admin  tenant_user  claim       -
5_without_the_primary_a_known_place_goes_on     -       -      -      acme   -      -      down         200    -                  acme   -      tenant_guest domain      -
5_without_the_primary_a_user_is_not_unknown     bob     -      -      -      -      -      down         503    unavailable        -      -      -            -           retry=2
5_without_the_primary_a_stranger_is_not_unknown mallory -      acme   -      -      -      down         503    unavailable        -      -      -            -           retry=2
5_without_the_primary_a_place_is_not_unknown    -       -      -      nosuch -      -      down         503    unavailable        -      -      -            -           retry=2
5_without_the_primary_no_place_needs_none       -       -      -      -      -      -      down         200    -                  -      -      anonymous    -           -
5_after_the_grace_nobody_is_known               alice   -      -      -      -      -      stale        503    unavailable        -      -      -            -           retry=2
5_after_the_grace_no_place_is_known             -       -      -      acme   -      -      stale        503    unavailable        -      -      -            -           retry=2

# 6. Four callers: anonymous, host user, tenant user, tenant guest. A manager of the host enters a tenant on purpose alone.
6_a_manager_enters_on_purpose                   root    -      -      -      -      /visit active       200    -                  acme   member tenant_user  impersonate -
6_a_manager_does_not_enter_by_a_hint            root    -      -      acme   -      -      active       403    forbidden          -      -      -            -           -
6_a_visit_is_for_managers                       alice   -      -      -      -      /visit active       403    forbidden          -      -      -            -           -
6_a_visit_needs_a_tenant_in_service             root    -      -      -      -      /visit suspended    403    tenant-suspended   -      -      -            -           message=unpaid
`

// outcomeRow is one row of outcomes.
type outcomeRow struct {
	rule  string
	asked asked
	acme  string
	want  answer
}

// asked is a request: who sends it, and what its claim, header, domain, cookie and path name. path may be a whole one.
type asked struct{ user, claim, header, domain, cookie, path string }

// answer is what a caller gets.
type answer struct {
	status                       int
	problem                      string
	tenant, role, caller, source string
	besides                      string // Retry-After, the operator's message, the user's choices, the nodes
}

// rowsOf returns the rows of one state of acme.
func rowsOf(t *testing.T, acme string) (rows []outcomeRow) {
	t.Helper()
	names := map[string]bool{}
	for line := range strings.Lines(outcomes) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "rule" || f[0] == "#" {
			continue
		}
		if len(f) != 15 || names[f[0]] {
			t.Fatalf("a row has %d fields, or its name is there twice: %s", len(f), line)
		}
		names[f[0]] = true
		for i := range f {
			if f[i] == "-" {
				f[i] = ""
			}
		}
		caller := strings.ReplaceAll(f[12], "_", " ")
		row := outcomeRow{f[0], asked{f[1], f[2], f[3], f[4], f[5], f[6]}, f[7], answer{0, f[9], f[10], f[11], caller, f[13], f[14]}}
		if _, err := fmt.Sscan(f[8], &row.want.status); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if row.acme == acme {
			rows = append(rows, row)
		}
	}
	return rows
}

// TestOutcomesFollowTheRules sends every row of outcomes, and in each state of acme every combination of claim, header, domain, cookie and user.
func TestOutcomesFollowTheRules(t *testing.T) {
	t.Parallel()
	s := newOutcomeService(t)
	rows := 0
	for _, state := range []string{"provisioning", "active", "elsewhere", "suspended", "maintenance", "deleted", "purged"} {
		if state == "purged" { // which takes the members' names out of the trail
			t.Run("the_audit_trail", s.wantTrail)
		}
		s.enter(t, state)
		for _, row := range rowsOf(t, state) {
			rows++
			t.Run(row.rule, func(t *testing.T) {
				res := s.send(row.asked)
				if got := answerOf(t, row.asked, res); got != row.want {
					t.Errorf("%+v\ngot  %+v\nwant %+v\n%s", row.asked, got, row.want, res.Body)
				}
			})
		}
		t.Run("all_combinations_"+state, func(t *testing.T) { s.sendAll(t, state) })
	}
	// Resolved once per request, or not at all with wrong credentials.
	if users, resolved := s.authenticated.Load(), s.resolved.Load()+s.rejected.Load(); users != int64(s.sent) || resolved != users {
		t.Errorf("%d requests were authenticated %d times and resolved %d times", s.sent, users, resolved)
	}
	t.Logf("%d rows, %d requests", rows, s.sent)
}

// TestOutcomesWithoutThePrimary sends the rows of a node that cannot ask the primary.
func TestOutcomesWithoutThePrimary(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tn := w.fleet.Open(t, tenancy.Config{Logger: silent, Lookups: tenancy.LookupConfig{StaleGrace: 8 * time.Second, Timeout: time.Second}})
	h := new(outcomeService).serve(t, tn)
	for _, known := range []asked{{user: "alice"}, {domain: "acme"}} {
		if res := known.send(h); res.Code != http.StatusOK {
			t.Fatalf("%+v: %d %s", known, res.Code, res.Body)
		}
	}
	closePrimary(t, w.fleet)
	check := func(state string) {
		for _, row := range rowsOf(t, state) {
			t.Run(row.rule, func(t *testing.T) {
				res := row.asked.send(h)
				if got := answerOf(t, row.asked, res); got != row.want {
					t.Errorf("%+v\ngot  %+v\nwant %+v\n%s", row.asked, got, row.want, res.Body)
				}
			})
		}
	}
	check("down")
	t.Run("a_refusal_asks_the_primary_for_no_name", func(t *testing.T) { wantNoNameAskedFor(t, h) })
	t.Run("a_refusal_asks_the_primary_for_no_id", func(t *testing.T) { wantNoIDAskedFor(t, w, tn) })
	eventually(t, 20*time.Second, "the grace is over", func() bool { return asked{user: "alice"}.send(h).Code != http.StatusOK })
	check("stale")
}

// wantNoNameAskedFor sends what alice can say of a foreign and of a missing tenant. With the primary out of reach a look-up of either would be
// answered with 503. That none is shows that neither is looked up while the caller waits, and so neither takes longer.
func wantNoNameAskedFor(t *testing.T, h http.Handler) {
	t.Helper()
	for _, claim := range outcomeNames {
		for _, header := range outcomeNames {
			for _, cookie := range outcomeNames {
				for _, path := range outcomeNames {
					a := asked{user: "alice", claim: claim, header: header, cookie: cookie, path: path}
					want := expect(a, "active")
					if got := answerOf(t, a, a.send(h)).withoutSource(); got != want {
						t.Errorf("%+v\ngot  %+v\nwant %+v", a, got, want)
					}
				}
			}
		}
	}
}

// wantNoIDAskedFor is wantNoNameAskedFor for a service whose tokens hold IDs.
func wantNoIDAskedFor(t *testing.T, w *world, tn *tenancy.Tenancy) {
	t.Helper()
	mw, err := tenantmw.New(tn, tenantmw.UserKeyFunc(userOf), tenantmw.WithLogger(silent),
		tenantmw.WithContributors(tenantmw.ContributorFunc(func(r *http.Request) (tenancy.Hint, error) {
			return tenancy.Hint{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByID, Value: r.Header.Get("Claim")}, nil
		})))
	if err != nil {
		t.Fatal(err)
	}
	h := mw.Tenant(http.HandlerFunc(ok))
	wantBody(t, get(h, "/", "alice", "Claim", fmt.Sprint(w.acme.ID)), "ok")
	wantProblem(t, get(h, "/", "alice", "Claim", fmt.Sprint(w.globex.ID)), http.StatusForbidden)
	wantProblem(t, get(h, "/", "alice", "Claim", "4711"), http.StatusForbidden)
}

// closePrimary ends all sessions of the primary and lets none in.
func closePrimary(t *testing.T, f *tenancytest.Fleet) {
	t.Helper()
	u, err := url.Parse(f.PrimaryURL)
	if err != nil {
		t.Fatal(err)
	}
	primary := strings.TrimPrefix(u.Path, "/")
	admin := f.Admin(t, "tenants")
	if _, err := admin.Exec(t.Context(), `ALTER DATABASE `+pgx.Identifier{primary}.Sanitize()+` ALLOW_CONNECTIONS false`); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, primary); err != nil {
		t.Fatal(err)
	}
}

// outcomeService is a service on two nodes, whose tenant acme goes through all states.
type outcomeService struct {
	fleet     *tenancytest.Fleet
	admin     *pgx.Conn        // to the primary
	tn        *tenancy.Tenancy // serves all
	other     *tenancy.Tenancy // serves globex alone
	acme      tenancy.ID
	here      http.Handler // of tn
	elsewhere http.Handler // of other
	now       http.Handler // one of the two

	sent, probes                      int
	authenticated, rejected, resolved atomic.Int64
	trail                             map[string]bool // what the audit trail must have, as "user tenant source"
}

var newAcme = tenancy.NewTenant{Name: "acme", Admin: "alice", Domains: []string{"acme.test"}}

// newOutcomeService leaves acme half made.
func newOutcomeService(t *testing.T) *outcomeService {
	t.Helper()
	s := &outcomeService{fleet: tenancytest.NewFleet(t), trail: map[string]bool{}}
	cfg := tenancy.Config{Migrations: migrations, HostManagers: []tenancy.UserKey{"root", "ruth"}, NodeAddress: "10.0.0.7:8080", Logger: silent,
		WrapResolver: s.countResolutions}
	s.tn = s.fleet.Open(t, cfg)
	cfg.OnlyTenants, cfg.NodeAddress = []string{"globex"}, "10.0.0.8:8080"
	cfg.Migrations = fstest.MapFS{"00001_notes.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}
	s.other = s.fleet.Open(t, cfg)
	s.admin = s.fleet.Admin(t, "primary")
	s.here, s.elsewhere = s.serve(t, s.tn), s.serve(t, s.other)
	s.now = s.here

	// First: in a shared schema a migration that another tenant's Create has run is run.
	if _, err := s.other.Catalog().Create(t.Context(), newAcme); err == nil {
		t.Fatal("the migration did not fail")
	}
	globex, err := s.tn.Catalog().Create(t.Context(), tenancy.NewTenant{Name: "globex", Admin: "bob", Domains: []string{"globex.test"}})
	if err != nil {
		t.Fatal(err)
	}
	acme, err := s.tn.Catalog().TenantByName(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	s.acme = acme.ID
	s.await(t, s.tn, tenancy.ErrTenantNotReady)
	for _, m := range []tenancy.Membership{
		{User: "carol", Tenant: globex.ID}, {User: "carol", Tenant: acme.ID},
		{User: "dave", Tenant: globex.ID, Default: true}, {User: "dave", Tenant: acme.ID},
		{User: "erin", Tenant: globex.ID}, {User: "erin", Tenant: acme.ID, Default: true},
		{User: "ruth", Tenant: globex.ID},
	} {
		if err := s.tn.Catalog().AddMember(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.tn.Catalog().SetDefault(t.Context(), "carol", 0); err != nil {
		t.Fatal(err)
	}
	return s
}

// countResolutions sends ward to acme, as a resolver of the service's own may.
func (s *outcomeService) countResolutions(next tenancy.TenantResolver) tenancy.TenantResolver {
	return tenancy.TenantResolverFunc(func(ctx context.Context, q tenancy.Query) (tenancy.Resolution, error) {
		s.resolved.Add(1)
		if q.User == "ward" {
			return tenancy.Resolution{Tenant: s.acme, Role: tenancy.RoleMember, Source: "ward"}, nil
		}
		return next.ResolveTenant(ctx, q)
	})
}

// serve answers with the session. Its authentication believes the headers User and Claim, which no service should.
func (s *outcomeService) serve(t *testing.T, tn *tenancy.Tenancy) http.Handler {
	t.Helper()
	users := tenantmw.UserKeyFunc(func(r *http.Request) (tenancy.UserKey, error) {
		s.authenticated.Add(1)
		if r.Header.Get("User") == "forged" {
			s.rejected.Add(1)
			return "", errors.New("wrong credentials")
		}
		return userOf(r)
	})
	contributors := []tenantmw.Contributor{
		tenantmw.Claim(func(r *http.Request) (any, bool) {
			claim := r.Header.Get("Claim")
			return claim, claim != ""
		}),
		tenantmw.Header("X-Tenant"), tenantmw.Domain("service.test"), tenantmw.Cookie("tenant"),
	}
	plain, err := tenantmw.New(tn, users, tenantmw.WithContributors(contributors...), tenantmw.WithLogger(silent))
	if err != nil {
		t.Fatal(err)
	}
	inPath, err := tenantmw.New(tn, users, tenantmw.WithContributors(append(contributors, tenantmw.Path("tenant"))...), tenantmw.WithLogger(silent))
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	r.With(plain.Tenant).Get("/", tellSession)
	r.With(inPath.Tenant).Get("/t/{tenant}", tellSession)
	r.With(plain.Tenant).Get("/visit", func(w http.ResponseWriter, r *http.Request) {
		ctx, err := tn.Impersonate(r.Context(), s.acme, tenancy.Visit{Reason: "asked for help"})
		if err != nil {
			plain.Error(w, r, err)
			return
		}
		tellSession(w, r.WithContext(ctx))
	})
	return r
}

// told is the body of a 200.
type told struct{ User, Tenant, Role, Caller, Source string }

func tellSession(w http.ResponseWriter, r *http.Request) {
	s, _ := tenancy.FromContext(r.Context())
	tenant, _ := s.Tenant()
	_ = json.NewEncoder(w).Encode(told{string(s.User()), tenant.Name, string(s.Role()), s.Caller().String(), s.Source()})
}

// enter takes acme into the next state, and returns when the node that is asked in it knows.
func (s *outcomeService) enter(t *testing.T, state string) {
	t.Helper()
	c, ctx := s.tn.Catalog(), t.Context()
	var err error
	s.now = s.here
	switch state {
	case "provisioning": // it was left so
	case "active":
		_, err = c.Create(ctx, newAcme)
	case "elsewhere":
		s.now = s.elsewhere
		s.await(t, s.other, tenancy.ErrNotServed)
	case "suspended":
		err = c.Suspend(ctx, s.acme, tenancy.Suspension{Message: "unpaid"})
	case "maintenance":
		err = c.Suspend(ctx, s.acme, tenancy.Suspension{Message: "back-at-9", Maintenance: true, RetryAfter: 90 * time.Second})
	case "deleted":
		err = c.Delete(ctx, s.acme)
	case "purged":
		_, err = c.PurgeNow(ctx, s.acme, "acme")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// await waits until the node refuses acme so.
func (s *outcomeService) await(t *testing.T, tn *tenancy.Tenancy, class error) {
	t.Helper()
	eventually(t, 5*time.Second, class.Error(), func() bool {
		_, err := tn.Enter(t.Context(), s.acme)
		return errors.Is(err, class)
	})
}

func eventually(t *testing.T, limit time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// send sends the request and keeps what the audit trail must have of it.
func (s *outcomeService) send(a asked) *httptest.ResponseRecorder {
	s.sent++
	for _, entry := range expectTrail(a) {
		s.trail[entry] = true
	}
	return a.send(s.now)
}

func (a asked) send(h http.Handler) *httptest.ResponseRecorder {
	path, headers := "/", []string{"Host", "service.test"}
	if a.path != "" {
		path = a.path
		if path[0] != '/' {
			path = "/t/" + path
		}
	}
	if a.domain != "" {
		headers[1] = a.domain + ".test"
	}
	if a.claim != "" {
		headers = append(headers, "Claim", a.claim)
	}
	if a.header != "" {
		headers = append(headers, "X-Tenant", a.header)
	}
	if a.cookie != "" {
		headers = append(headers, "Cookie", "tenant="+a.cookie)
	}
	return get(h, path, a.user, headers...)
}

// answerOf reads what was answered, and checks what every answer has.
func answerOf(t *testing.T, a asked, res *httptest.ResponseRecorder) answer {
	t.Helper()
	got := answer{status: res.Code}
	if res.Code == http.StatusOK {
		var s told
		if err := json.Unmarshal(res.Body.Bytes(), &s); err != nil || s.User != a.user {
			t.Errorf("%+v: session of user %q, %v", a, s.User, err)
		}
		got.tenant, got.role, got.caller, got.source = s.Tenant, s.Role, s.Caller, s.Source
		return got
	}
	p := wantProblem(t, res, res.Code)
	got.problem = strings.TrimPrefix(p.Type, "urn:tenancy:problem:")
	var besides []string
	if retry := res.Header().Get("Retry-After"); retry != "" {
		besides = append(besides, "retry="+retry)
	}
	for _, message := range []string{"unpaid", "back-at-9"} {
		if strings.Contains(res.Body.String(), message) {
			besides = append(besides, "message="+message)
		}
	}
	if len(p.Tenants) > 0 {
		slices.Sort(p.Tenants) // their order is no rule
		besides = append(besides, "tenants="+strings.Join(p.Tenants, ","))
	}
	if nodes := strings.Join(p.Nodes, ", "); nodes != "" || res.Header().Get(tenantmw.NodesHeader) != "" {
		besides = append(besides, "nodes="+nodes)
		if got := res.Header().Get(tenantmw.NodesHeader); got != nodes {
			t.Errorf("%+v: %s is %q, the body's nodes %q", a, tenantmw.NodesHeader, got, nodes)
		}
	}
	got.besides = strings.Join(besides, ",")
	return got
}
