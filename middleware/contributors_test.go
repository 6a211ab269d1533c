package middleware_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

const refused = "\x00refused" // what a table says of an input that must be an error

// wantHint checks what c says of r: the value, "" for no opinion, or refused.
func wantHint(t *testing.T, c tenantmw.Contributor, r *http.Request, want string) {
	t.Helper()
	h, err := c.Hint(r)
	switch {
	case err != nil && h != (tenancy.Hint{}):
		t.Errorf("an error and a hint: %+v, %v", h, err)
	case want == refused && err == nil:
		t.Errorf("got %+v, want an error", h)
	case want == refused:
	case err != nil:
		t.Errorf("got %v, want %q", err, want)
	case want == "" && h != (tenancy.Hint{}):
		t.Errorf("got %+v, want no opinion", h)
	case h.Value != want:
		t.Errorf("got %q, want %q", h.Value, want)
	}
}

// statusFor is the status of a request that a contributor refuses; the database is never asked. A request that
// it does not refuse fails the test.
func statusFor(t *testing.T, c tenantmw.Contributor, r *http.Request) int {
	t.Helper()
	if h, err := c.Hint(r); err == nil {
		t.Fatalf("not refused: %+v", h)
	}
	w := httptest.NewRecorder()
	refusing(t, c).Tenant(http.HandlerFunc(ok)).ServeHTTP(w, r)
	wantProblem(t, w, w.Code)
	return w.Code
}

// refusing is a middleware without a database behind it.
func refusing(t *testing.T, c ...tenantmw.Contributor) *tenantmw.Middleware {
	t.Helper()
	mw, err := tenantmw.New(&tenancy.Tenancy{}, tenantmw.UserKeyFunc(userOf), tenantmw.WithContributors(c...), tenantmw.WithLogger(silent))
	if err != nil {
		t.Fatal(err)
	}
	return mw
}

// names is what every source that carries the bare name of a tenant does with a value.
var names = []struct{ rule, value, want string }{
	{"a_slug", "acme", "acme"},
	{"one_letter", "a", "a"},
	{"digits_and_hyphens", "acme-2-eu", "acme-2-eu"},
	{"punycode_is_a_name_like_any", "xn--cme-7cd", "xn--cme-7cd"},
	{"40_bytes", "a" + strings.Repeat("b", 39), "a" + strings.Repeat("b", 39)},
	{"41_bytes", "a" + strings.Repeat("b", 40), refused},
	{"65_bytes", strings.Repeat("a", 65), refused},
	{"a_megabyte", strings.Repeat("a", 1<<20), refused},
	{"empty", "", refused},
	{"a_space", " ", refused},
	{"padded_before", " acme", refused},
	{"padded_behind", "acme ", refused},
	{"padded_with_a_tab", "acme\t", refused},
	{"capitals_are_not_folded", "ACME", refused},
	{"a_capital_inside", "acMe", refused},
	{"a_comma", "acme,globex", refused},
	{"a_comma_and_a_space", "acme, acme", refused},
	{"a_comma_alone", ",", refused},
	{"quoted", `"acme"`, refused},
	{"a_digit_first", "7up", refused},
	{"an_id", "1", refused},
	{"a_hyphen_first", "-acme", refused},
	{"an_underscore", "ac_me", refused},
	{"a_dot", "acme.test", refused},
	{"a_slash", "acme/globex", refused},
	{"dots", "../globex", refused},
	{"an_escape", "ac%6de", refused},
	{"a_plus", "ac+me", refused},
	{"NUL", "acme\x00", refused},
	{"a_line_break", "acme\r\nX: y", refused},
	{"a_semicolon", "acme;globex", refused},
	{"cyrillic_look_alike", "\u0430cme", refused},
	{"full_width_look_alike", "\uff41cme", refused},
	{"kelvin_sign", "\u212aelvin", refused},
	{"zero_width_space", "ac\u200bme", refused},
	{"right_to_left", "\u202eacme", refused},
	{"emoji", "\U0001F600", refused},
	{"no_utf8", "acme\xff", refused},
	{"sql", "a'--", refused},
}

func TestHeaderNamesATenant(t *testing.T) {
	t.Parallel()
	c := tenantmw.Header("x-tenant")
	for _, n := range names {
		t.Run(n.rule, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["X-Tenant"] = []string{n.value}
			wantHint(t, c, r, n.want)
		})
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("X-Tenant-Id", "globex")
	wantHint(t, c, r, "")
	for _, two := range [][]string{{"acme", "acme"}, {"acme", "globex"}, {"acme", ""}, {"", "acme"}, {"", ""}} {
		r.Header["X-Tenant"] = two
		wantHint(t, c, r, refused)
		if got := statusFor(t, c, r); got != http.StatusBadRequest {
			t.Errorf("%q: got %d, want 400", two, got)
		}
	}
	r.Header["X-Tenant"] = []string{"acme"}
	if h, _ := c.Hint(r); h != (tenancy.Hint{Source: "header", Trust: tenancy.Choice, By: tenancy.ByName, Value: "acme"}) {
		t.Errorf("got %+v", h)
	}
}

func TestCookieNamesATenant(t *testing.T) {
	t.Parallel()
	c := tenantmw.Cookie("__Host-tenant")
	for _, n := range names {
		if n.rule == "a_semicolon" || n.rule == "padded_behind" || n.rule == "padded_with_a_tab" || n.rule == "a_line_break" {
			continue // these end a cookie
		}
		t.Run(n.rule, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["Cookie"] = []string{"session=1; __Host-tenant=" + n.value + "; theme=dark"}
			wantHint(t, c, r, n.want)
		})
	}
	for _, row := range []struct {
		rule  string
		lines []string
		want  string
	}{
		{"none", nil, ""},
		{"others", []string{"a=b; tenant=globex; X__Host-tenant=globex"}, ""},
		{"other_case", []string{"__HOST-tenant=globex"}, ""},
		{"in_the_value_of_another", []string{"a=__Host-tenant=globex"}, ""},
		{"alone", []string{"__Host-tenant=acme"}, "acme"},
		{"without_spaces", []string{"a=b;__Host-tenant=acme;c=d"}, "acme"},
		{"in_the_second_line", []string{"a=b", "__Host-tenant=acme"}, "acme"},
		{"twice", []string{"__Host-tenant=acme; __Host-tenant=acme"}, refused},
		{"two_tenants", []string{"__Host-tenant=acme; __Host-tenant=globex"}, refused},
		{"two_lines", []string{"__Host-tenant=acme", "__Host-tenant=globex"}, refused},
		{"twice_of_which_net_http_sees_one", []string{`__Host-tenant=acme; __Host-tenant=glo"bex`}, refused},
		{"one_that_net_http_does_not_see", []string{`__Host-tenant=ac"me`}, refused},
		{"beside_more_cookies_than_net_http_reads", []string{strings.Repeat("a=b; ", 4000) + "__Host-tenant=acme"}, "acme"},
		{"no_value", []string{"__Host-tenant"}, refused},
		{"ends_at_a_semicolon", []string{"__Host-tenant=acme;globex"}, "acme"},
	} {
		t.Run(row.rule, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["Cookie"] = row.lines
			wantHint(t, c, r, row.want)
			if row.want == refused && statusFor(t, c, r) != http.StatusBadRequest {
				t.Error("want 400")
			}
		})
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.AddCookie(&http.Cookie{Name: "__Host-tenant", Value: "acme"})
	if h, _ := c.Hint(r); h != (tenancy.Hint{Source: "cookie", Trust: tenancy.Choice, By: tenancy.ByName, Value: "acme"}) {
		t.Errorf("got %+v", h)
	}
}

func TestQueryParamNamesATenant(t *testing.T) {
	t.Parallel()
	c := tenantmw.QueryParam("tenant")
	for _, n := range names {
		t.Run(n.rule, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.URL.RawQuery = "a=b&tenant=" + n.value + "&c=d"
			wantHint(t, c, r, n.want)
		})
	}
	for _, row := range []struct{ rule, query, want string }{
		{"none", "", ""},
		{"others", "a=b&tenants=globex&Tenant=globex&tenant[]=globex&xtenant=globex", ""},
		{"in_the_value_of_another", "a=tenant=globex", ""},
		{"in_the_escaped_value_of_another", "a=%26tenant=globex", ""},
		{"alone", "tenant=acme", "acme"},
		{"empty_pieces", "&&tenant=acme&", "acme"},
		{"no_value", "tenant", refused},
		{"twice", "tenant=acme&tenant=acme", refused},
		{"two_tenants", "tenant=acme&tenant=globex", refused},
		{"the_second_without_a_value", "tenant=acme&tenant", refused},
		{"the_second_in_another_spelling", "tenant=acme&%74enant=globex", refused},
		{"the_second_with_a_broken_escape", "tenant=acme&tenant=%zz", refused},
		{"the_second_behind_a_semicolon", "tenant=acme&a=b;tenant=globex", refused},
		{"behind_a_semicolon", "a=b;tenant=globex", refused},
		{"behind_a_semicolon_in_another_spelling", "a=b;t%65nant=globex", refused},
		{"before_a_semicolon", "tenant=acme;a=b", refused},
		{"a_semicolon_elsewhere_hides_nothing", "a=b;c=d&tenant=acme", "acme"},
		{"a_broken_escape_elsewhere_hides_nothing", "a=%zz&%=1&tenant=acme", "acme"},
		{"a_broken_escape_before_the_name", "%zztenant=globex", ""},
		{"an_escaped_value", "tenant=%61cme", refused},
		{"an_escaped_name", "%74enant=acme", "acme"},
		{"more_parameters_than_net_url_reads", strings.Repeat("a=b&", 20000) + "tenant=acme", "acme"},
	} {
		t.Run(row.rule, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.URL.RawQuery = row.query
			wantHint(t, c, r, row.want)
			if row.want == refused && statusFor(t, c, r) != http.StatusBadRequest {
				t.Error("want 400")
			}
		})
	}
	r := httptest.NewRequest("POST", "/?a=b", strings.NewReader("tenant=globex"))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	wantHint(t, c, r, "")
	if r.Form != nil || r.PostFormValue("tenant") != "globex" {
		t.Error("the body was read")
	}
	r = httptest.NewRequest("GET", "/?tenant=acme", nil)
	if h, _ := c.Hint(r); h != (tenancy.Hint{Source: "query", Trust: tenancy.Choice, By: tenancy.ByName, Value: "acme"}) {
		t.Errorf("got %+v", h)
	}
}

type claimString string

func TestClaimNamesATenant(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest("GET", "/", nil)
	returning := func(v any, present bool) tenantmw.Contributor {
		return tenantmw.Claim(func(*http.Request) (any, bool) { return v, present })
	}
	check := func(t *testing.T, c tenantmw.Contributor, want string) {
		t.Helper()
		wantHint(t, c, r, want)
		if _, err := c.Hint(r); want == refused {
			if !errors.Is(err, tenantmw.ErrUnauthenticated) {
				t.Errorf("got %v, want ErrUnauthenticated", err)
			}
			if got := statusFor(t, c, r); got != http.StatusUnauthorized {
				t.Errorf("got %d, want 401", got)
			}
		}
	}
	for _, n := range names {
		t.Run(n.rule, func(t *testing.T) { check(t, returning(n.value, true), n.want) })
	}
	for name, v := range map[string]any{
		"nil": nil, "int": 7, "int64": int64(7), "float": 7.0, "json_number": json.Number("7"), "bool": true,
		"array": []any{"acme"}, "strings": []string{"acme"}, "object": map[string]any{"tenant": "acme"}, "bytes": []byte("acme"),
		"raw_json": json.RawMessage(`"acme"`), "own_type": claimString("acme"), "pointer": new("acme"), "error": errors.New("acme"),
	} {
		t.Run(name, func(t *testing.T) { check(t, returning(v, true), refused) })
	}
	for _, token := range []struct{ rule, claims, want string }{
		{"null", `{"tenant":null}`, refused},
		{"number", `{"tenant":1}`, refused},
		{"array", `{"tenant":["acme"]}`, refused},
		{"object", `{"tenant":{"id":"acme"}}`, refused},
		{"empty", `{"tenant":""}`, refused},
		{"string", `{"tenant":"acme"}`, "acme"},
		{"absent", `{}`, ""},
	} {
		t.Run("json_"+token.rule, func(t *testing.T) {
			var claims map[string]any
			if err := json.Unmarshal([]byte(token.claims), &claims); err != nil {
				t.Fatal(err)
			}
			v, present := claims["tenant"]
			check(t, returning(v, present), token.want)
		})
	}
	check(t, returning("globex", false), "")
	if h, _ := returning("acme", true).Hint(r); h != (tenancy.Hint{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByName, Value: "acme"}) {
		t.Errorf("got %+v", h)
	}
}

func TestRefusalsDoNotRepeatTheRequest(t *testing.T) {
	t.Parallel()
	const hostile = "canary\x1b[2J"
	r := httptest.NewRequest("GET", "/", nil)
	r.Host, r.URL.RawQuery = hostile, "tenant="+hostile
	r.Header["X-Tenant"], r.Header["Cookie"] = []string{hostile}, []string{"tenant=" + hostile}
	r.SetPathValue("tenant", hostile)
	for _, c := range []tenantmw.Contributor{
		tenantmw.Header("X-Tenant"), tenantmw.Cookie("tenant"), tenantmw.QueryParam("tenant"), tenantmw.Path("tenant"),
		tenantmw.Domain(), tenantmw.Subdomain("{tenant}.example.com"), tenantmw.Claim(func(*http.Request) (any, bool) { return hostile, true }),
	} {
		if _, err := c.Hint(r); err == nil || contains(err.Error(), "canary") {
			t.Errorf("%T: got %v", c, err)
		}
	}
}

// unusable are contributors that New refuses.
var unusable = map[string]tenantmw.Contributor{
	"claim_nil":                  tenantmw.Claim(nil),
	"header_empty":               tenantmw.Header(""),
	"header_space":               tenantmw.Header("X Tenant"),
	"header_colon":               tenantmw.Header("X-Tenant:"),
	"header_host":                tenantmw.Header("hOST"),
	"header_non_ascii":           tenantmw.Header("X-T\u00e9nant"),
	"cookie_empty":               tenantmw.Cookie(""),
	"cookie_equals":              tenantmw.Cookie("a=b"),
	"cookie_semicolon":           tenantmw.Cookie("a;b"),
	"query_empty":                tenantmw.QueryParam(""),
	"query_escape":               tenantmw.QueryParam("ten%61nt"),
	"query_ampersand":            tenantmw.QueryParam("a&b"),
	"query_semicolon":            tenantmw.QueryParam("a;b"),
	"query_plus":                 tenantmw.QueryParam("a+b"),
	"path_empty":                 tenantmw.Path(""),
	"path_braces":                tenantmw.Path("{tenant}"),
	"path_catch_all":             tenantmw.Path("*"),
	"domain_empty":               tenantmw.Domain(""),
	"domain_port":                tenantmw.Domain("example.com:443"),
	"domain_address_and_port":    tenantmw.Domain("127.0.0.1:80"),
	"domain_url":                 tenantmw.Domain("https://example.com"),
	"domain_wildcard_alone":      tenantmw.Domain("*"),
	"domain_wildcard_of_all":     tenantmw.Domain("*."),
	"domain_two_wildcards":       tenantmw.Domain("*.*.example.com"),
	"domain_wildcard_inside":     tenantmw.Domain("a.*.example.com"),
	"domain_wildcard_of_ipv4":    tenantmw.Domain("*.127.0.0.1"),
	"domain_wildcard_of_ipv6":    tenantmw.Domain("*.::1"),
	"domain_wildcard_twice":      tenantmw.Domain("*.example.com", "*.Example.com."),
	"domain_non_ascii":           tenantmw.Domain("b\u00fccher.example"),
	"domain_number":              tenantmw.Domain("127.1"),
	"domain_zone":                tenantmw.Domain("fe80::1%eth0"),
	"domain_zone_in_brackets":    tenantmw.Domain("[fe80::1%eth0]"),
	"domain_ipv4_in_brackets":    tenantmw.Domain("[127.0.0.1]"),
	"domain_bracket":             tenantmw.Domain("[::1"),
	"domain_bracket_alone":       tenantmw.Domain("["),
	"domain_twice":               tenantmw.Domain("example.com", "EXAMPLE.com."),
	"domain_address_twice":       tenantmw.Domain("::1", "[0:0::1]"),
	"subdomain_none":             tenantmw.Subdomain(),
	"subdomain_empty":            tenantmw.Subdomain(""),
	"subdomain_no_placeholder":   tenantmw.Subdomain("example.com"),
	"subdomain_placeholder_only": tenantmw.Subdomain("{tenant}"),
	"subdomain_no_parent":        tenantmw.Subdomain("{tenant}."),
	"subdomain_dot":              tenantmw.Subdomain("{tenant}.example.com."),
	"subdomain_other_word":       tenantmw.Subdomain("{name}.example.com"),
	"subdomain_part_of_a_label":  tenantmw.Subdomain("{tenant}-app.example.com"),
	"subdomain_not_first":        tenantmw.Subdomain("app.{tenant}.example.com"),
	"subdomain_two":              tenantmw.Subdomain("{tenant}.{tenant}.example.com"),
	"subdomain_star":             tenantmw.Subdomain("*.example.com"),
	"subdomain_port":             tenantmw.Subdomain("{tenant}.example.com:443"),
	"subdomain_scheme":           tenantmw.Subdomain("https://{tenant}.example.com"),
	"subdomain_non_ascii":        tenantmw.Subdomain("{tenant}.b\u00fccher.example"),
	"subdomain_number":           tenantmw.Subdomain("{tenant}.1"),
	"subdomain_ipv4":             tenantmw.Subdomain("{tenant}.127.0.0.1"),
	"subdomain_ipv6":             tenantmw.Subdomain("{tenant}.[::1]"),
	"subdomain_twice":            tenantmw.Subdomain("{tenant}.example.com", "{tenant}.Example.COM"),
	"subdomain_one_is_bad":       tenantmw.Subdomain("{tenant}.example.com", "example.org"),
}

func TestNewRefusesContributorsThatCannotWork(t *testing.T) {
	t.Parallel()
	for name, c := range unusable {
		t.Run(name, func(t *testing.T) {
			mw, err := tenantmw.New(&tenancy.Tenancy{}, tenantmw.UserKeyFunc(userOf), tenantmw.WithContributors(byDomain, c))
			if mw != nil || !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "[1]") {
				t.Errorf("got %v, %v, want ErrInvalid that tells which", mw, err)
			}
		})
	}
	refusing(t, tenantmw.Claim(func(*http.Request) (any, bool) { return nil, false }), tenantmw.Header("X-Tenant"), tenantmw.Cookie("__Host-tenant"),
		tenantmw.QueryParam("tenant"), tenantmw.Path("tenant_id"), tenantmw.Domain(), tenantmw.Domain("example.com", "*.example.com", "::1", "127.0.0.1", "[::2]"),
		tenantmw.Subdomain("{tenant}.example.com", "{tenant}.localhost", "{tenant}.eu.example.com"))
}

// A contributor inside another one is not seen by New.
func TestContributorsThatCannotWorkRefuseEveryRequest(t *testing.T) {
	t.Parallel()
	for name, c := range unusable {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r.SetPathValue("*", "acme") // what chi leaves of a path
			if got := statusFor(t, tenantmw.ContributorFunc(c.Hint), r); got != http.StatusInternalServerError {
				t.Errorf("got %d, want 500", got)
			}
		})
	}
}

// TestNothingIsReadUnlessItIsAskedFor sends every source at once to a service that was given none.
func TestNothingIsReadUnlessItIsAskedFor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := func() *http.Request {
		r := httptest.NewRequest("GET", "http://globex.test/notes?tenant=globex", nil)
		r.Header.Set("User", "alice")
		r.Header.Set("Tenant", "globex")
		r.Header.Set("X-Tenant", "globex")
		r.AddCookie(&http.Cookie{Name: "tenant", Value: "globex"})
		return r
	}
	rec := httptest.NewRecorder()
	w.serve(t).ServeHTTP(rec, r())
	wantBody(t, rec, "of acme")
	for _, c := range []tenantmw.Contributor{
		tenantmw.Domain(), tenantmw.Subdomain("{tenant}.test"), tenantmw.QueryParam("tenant"), tenantmw.Header("X-Tenant"), tenantmw.Cookie("tenant"),
	} { // the control: each alone is heard
		rec := httptest.NewRecorder()
		w.serve(t, tenantmw.WithContributors(c)).ServeHTTP(rec, r())
		wantProblem(t, rec, http.StatusForbidden)
	}
}

func TestHintsReachTheTenantTheyName(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.serve(t, tenantmw.WithContributors(tenantmw.Domain("example.com", "*.example.com"),
		tenantmw.Subdomain("{tenant}.example.com"),
		tenantmw.Header("X-Tenant"), tenantmw.Cookie("tenant"), tenantmw.QueryParam("tenant"),
		tenantmw.Claim(func(r *http.Request) (any, bool) {
			v, present := r.Header["Claim"] // a test's authentication
			if !present {
				return nil, false
			}
			return v[0], true
		})))
	for _, c := range []struct {
		rule, path, user string
		headers          []string
		status           int
	}{
		{"own_host", "/notes", "alice", []string{"Host", "example.com"}, 200},
		{"own_domain", "/notes", "alice", []string{"Host", "ACME.test.:8080"}, 200},
		{"own_subdomain", "/notes", "alice", []string{"Host", "acme.example.com"}, 200},
		{"foreign_subdomain", "/notes", "alice", []string{"Host", "globex.example.com"}, 403},
		{"missing_subdomain", "/notes", "alice", []string{"Host", "initech.example.com"}, 403},
		{"impossible_subdomain", "/notes", "alice", []string{"Host", "7up.example.com"}, 403},
		{"foreign_domain", "/notes", "alice", []string{"Host", "globex.test"}, 403},
		{"unlisted_domain", "/notes", "alice", []string{"Host", "nobody.test"}, 403},
		{"anonymous_at_the_service", "/open", "", []string{"Host", "example.com"}, 200},
		{"anonymous_at_a_tenant", "/open", "", []string{"Host", "acme.example.com"}, 200},
		{"anonymous_at_a_missing_tenant", "/open", "", []string{"Host", "initech.example.com"}, 404},
		{"anonymous_at_an_impossible_tenant", "/open", "", []string{"Host", "7up.example.com"}, 404},
		{"anonymous_at_an_unlisted_domain", "/open", "", []string{"Host", "nobody.test"}, 404},
		{"anonymous_choices_open_nothing", "/notes", "", []string{"Host", "example.com", "X-Tenant", "acme"}, 401},
		{"all_agree", "/notes?tenant=acme", "alice", []string{"Host", "acme.test", "X-Tenant", "acme", "Cookie", "tenant=acme", "Claim", "acme"}, 200},
		{"the_header_disagrees", "/notes", "alice", []string{"Host", "acme.test", "X-Tenant", "globex"}, 403},
		{"the_cookie_disagrees", "/notes", "alice", []string{"Host", "acme.test", "Cookie", "tenant=globex"}, 403},
		{"the_query_disagrees", "/notes?tenant=globex", "alice", []string{"Host", "acme.test"}, 403},
		{"the_claim_disagrees", "/notes", "alice", []string{"Host", "acme.test", "Claim", "globex"}, 403},
		{"the_claim_is_of_a_foreign_tenant", "/notes", "alice", []string{"Host", "example.com", "Claim", "globex"}, 403},
		{"the_claim_is_malformed", "/notes", "alice", []string{"Host", "acme.test", "Claim", "ACME"}, 401},
		{"two_in_the_header", "/notes", "alice", []string{"Host", "acme.test", "X-Tenant", "acme, globex"}, 400},
		{"no_host", "/notes", "alice", []string{"Host", ""}, 400},
	} {
		t.Run(c.rule, func(t *testing.T) {
			res := get(h, c.path, c.user, c.headers...)
			if c.status == 200 && c.path == "/open" {
				wantBody(t, res, "ok")
			} else if c.status == 200 {
				wantBody(t, res, "of acme")
			} else {
				wantProblem(t, res, c.status)
			}
		})
	}
}
