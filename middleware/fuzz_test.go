package middleware_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/ident"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// hintOf asks c, and checks what holds of every answer: an error alone, no opinion, or a whole hint of this
// trust. said is its value.
func hintOf(t *testing.T, c tenantmw.Contributor, r *http.Request, whole tenancy.Hint) (said string, err error) {
	t.Helper()
	h, err := c.Hint(r)
	if err != nil || h.Value == "" {
		if h != (tenancy.Hint{}) {
			t.Errorf("half a hint: %+v, %v", h, err)
		}
		return "", err
	}
	whole.Value = h.Value
	if h != whole {
		t.Errorf("got %+v, want %+v", h, whole)
	}
	return h.Value, nil
}

// seeds are the values of the table, without the longest: the fuzzer takes a minute to make such an input
// smaller.
func seeds() (list []string) {
	for _, n := range names {
		if len(n.value) < 1000 {
			list = append(list, n.value)
		}
	}
	return list
}

func lowerASCII(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			b[i] = c | 0x20
		}
	}
	return string(b)
}

// wireHost is a Host in the spellings that mean the same: with a dot, a port, both.
var wireHost = regexp.MustCompile(`^(.*?)(\.?)(:[0-9]+)?$`)

func FuzzHost(f *testing.F) {
	for _, h := range hosts {
		if len(h.host) < 1000 {
			f.Add(h.host)
		}
	}
	f.Fuzz(func(t *testing.T, s string) {
		domain, subdomain := domainAndSubdomain()
		r := &http.Request{Host: s}
		name, err := hintOf(t, domain, r, tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain})
		bare := ""
		if m := wireHost.FindStringSubmatch(lowerASCII(s)); m != nil {
			bare = m[1]
		}
		switch {
		case err != nil:
			if _, bad := ident.Domain(s); bad == nil {
				t.Errorf("%q can be a tenant's domain, and is refused: %v", s, err)
			}
		case name == "":
			label, below := strings.CutSuffix(bare, ".own.example")
			if below = below && !strings.Contains(label, "."); bare != "own.test" && !below && bare != "127.0.0.1" && !strings.HasPrefix(s, "[") {
				t.Errorf("%q passes for one of the service's own", s)
			}
		default:
			if canonical, bad := ident.Domain(name); bad != nil || canonical != name {
				t.Errorf("%q names %q, which no tenant can have as it is: %v", s, name, bad)
			}
			if name != bare {
				t.Errorf("%q names %q, which it does not say", s, name)
			}
		}

		label, suberr := hintOf(t, subdomain, r, tenancy.Hint{Source: "subdomain", Trust: tenancy.Place, By: tenancy.ByName})
		if name != "" && suberr != nil {
			t.Errorf("%q is a host to Domain and none to Subdomain: %v", s, suberr)
		}
		if label != "" && label+".example.com" != bare && label+".localhost" != bare {
			t.Errorf("%q names %q", s, label)
		}
		if label == "www" || strings.Contains(label, ".") || label != "" && name == "" {
			t.Errorf("%q names %q", s, label)
		}
		for _, parent := range []string{".example.com", ".localhost"} {
			if l, ok := strings.CutSuffix(name, parent); ok && l != "www" && !strings.Contains(l, ".") && label != l {
				t.Errorf("%q is passed over: got %q, %v", s, label, suberr)
			}
		}
	})
}

func FuzzHeader(f *testing.F) {
	for _, v := range seeds() {
		f.Add(v, "", false)
		f.Add("acme", v, true)
	}
	c := tenantmw.Header("x-tenant")
	f.Fuzz(func(t *testing.T, one, other string, two bool) {
		r := &http.Request{Header: http.Header{"X-Tenant": {one}}}
		if two {
			r.Header.Add("X-Tenant", other)
		}
		said, err := hintOf(t, c, r, tenancy.Hint{Source: "header", Trust: tenancy.Choice})
		switch wanted := !two && ident.Slug(one) == nil; {
		case wanted && (err != nil || said != one):
			t.Errorf("%q: got %q, %v", one, said, err)
		case !wanted && err == nil:
			t.Errorf("%q of %q is taken", said, r.Header["X-Tenant"])
		}
	})
}

func FuzzCookie(f *testing.F) {
	for _, v := range seeds() {
		f.Add("a=b; tenant="+v, "")
		f.Add("tenant="+v+";c=d", "tenant=acme")
	}
	f.Add(`tenant="acme"`, "tenant = acme")
	f.Add("tenant", ";;=;tenant=;")
	c := tenantmw.Cookie("tenant")
	f.Fuzz(func(t *testing.T, one, other string) {
		r := &http.Request{Header: http.Header{"Cookie": {one, other}}}
		said, err := hintOf(t, c, r, tenancy.Hint{Source: "cookie", Trust: tenancy.Choice})
		if strings.Count(one+other, ";") > 2000 {
			return // net/http reads no cookies at all then
		}
		seen := r.CookiesNamed("tenant")
		switch {
		case err != nil: // net/http may see none or one, where there are more
			if len(seen) == 1 && strings.Count(one+other, "tenant") == 1 && ident.Slug(seen[0].Value) == nil && !seen[0].Quoted {
				t.Errorf("%q, %q: refused: %v", one, other, err)
			}
		case said == "" && len(seen) > 0:
			t.Errorf("%q, %q: net/http sees %v", one, other, seen)
		case said != "" && (len(seen) != 1 || seen[0].Value != said || ident.Slug(said) != nil || !strings.Contains(one+"\n"+other, "="+said)):
			t.Errorf("%q, %q: got %q, net/http sees %v", one, other, said, seen)
		}
	})
}

func FuzzQuery(f *testing.F) {
	for _, v := range seeds() {
		f.Add("a=b&tenant=" + v)
		f.Add("tenant=acme&tenant=" + v)
		f.Add("tenant=" + url.QueryEscape(v))
	}
	for _, s := range []string{"a=b;tenant=acme", "tenant=acme;a", "%74enant=acme", "%zz=1&tenant=acme", "tenant", "&&;;&tenant=a&", "t%65nant=a;", "tenant+=a"} {
		f.Add(s)
	}
	c := tenantmw.QueryParam("tenant")
	f.Fuzz(func(t *testing.T, raw string) {
		r := &http.Request{URL: &url.URL{RawQuery: raw}}
		said, err := hintOf(t, c, r, tenancy.Hint{Source: "query", Trust: tenancy.Choice})
		if strings.Count(raw, "&")+strings.Count(raw, ";") > 5000 {
			return // net/url reads none then
		}
		seen, _ := url.ParseQuery(raw)
		loose, _ := url.ParseQuery(strings.ReplaceAll(raw, ";", "&")) // as others read it
		switch {
		case err != nil:
			if v := loose["tenant"]; len(v) == 1 && !strings.ContainsAny(raw, ";%") && ident.Slug(v[0]) == nil {
				t.Errorf("%q: refused: %v", raw, err)
			}
		case said == "" && len(seen["tenant"])+len(loose["tenant"]) > 0:
			t.Errorf("%q: net/url sees %q, others %q", raw, seen["tenant"], loose["tenant"])
		case said != "" && (len(seen["tenant"]) != 1 || len(loose["tenant"]) != 1 || seen.Get("tenant") != said || ident.Slug(said) != nil || !strings.Contains(raw, "="+said)):
			t.Errorf("%q: got %q, net/url sees %q, others %q", raw, said, seen["tenant"], loose["tenant"])
		}
	})
}

var pathName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func FuzzPath(f *testing.F) {
	for _, v := range seeds() {
		f.Add(v)
		f.Add(url.PathEscape(v))
	}
	for _, s := range []string{"%61cme", "%2561cme", "acme%2fglobex", "%2e%2e", "..", "acme/../globex", "/acme", "acme%5c..", "acme%00", "%D0%B0cme", "{tenant}", "*"} {
		f.Add(s)
	}
	c := tenantmw.Path("tenant")
	var asked *http.Request
	var said string
	var err error
	f.Fuzz(func(t *testing.T, s string) {
		// As a router might set it.
		r := &http.Request{Pattern: "/t/{tenant}/*"}
		r.SetPathValue("tenant", s)
		whole := tenancy.Hint{Source: "path", Trust: tenancy.Place}
		switch said, err := hintOf(t, c, r, whole); {
		case pathName.MatchString(s) && (err != nil || said != s):
			t.Errorf("%q: got %q, %v", s, said, err)
		case !pathName.MatchString(s) && err == nil:
			t.Errorf("%q is taken for %q", s, said)
		}
		// As real routers do.
		u, bad := url.ParseRequestURI("/t/" + s + "/notes")
		if bad != nil {
			return
		}
		mw := func(http.Handler) http.Handler {
			return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				asked = r
				said, err = hintOf(t, c, r, whole)
			})
		}
		for name, h := range routers(mw) {
			asked, said, err = nil, "", nil
			h.ServeHTTP(httptest.NewRecorder(), &http.Request{Method: "GET", URL: u, Host: "own.test", Header: http.Header{}})
			if asked == nil {
				continue
			}
			if err == nil && said == "" || err != nil && strings.Contains(err.Error(), "wired") {
				t.Errorf("%s, %q: %q, %v: inside its route it is never without an opinion", name, u, said, err)
			}
			part, _, _ := strings.Cut(strings.TrimPrefix(u.EscapedPath(), "/t/"), "/")
			if strings.HasPrefix(name, "mux") {
				if part, bad = url.PathUnescape(part); bad != nil {
					t.Fatal(bad)
				}
			}
			if said != "" && (said != part || !pathName.MatchString(said)) {
				t.Errorf("%s, %q: got %q, the path has %q", name, u, said, part)
			}
		}
	})
}

func FuzzClaim(f *testing.F) {
	for _, v := range seeds() {
		f.Add([]byte(v))
		if b, err := json.Marshal(v); err == nil {
			f.Add(b)
		}
	}
	for _, s := range []string{`null`, `1`, `1e3`, `true`, `[]`, `["acme"]`, `{}`, `{"tenant":"acme"}`, `"\u0061cme"`, `"acme\u0000"`, `""`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, token []byte) {
		values := []any{token, string(token)}
		var v any
		if json.Unmarshal(token, &v) == nil {
			values = append(values, v)
		}
		for _, v := range values {
			c := tenantmw.Claim(func(*http.Request) (any, bool) { return v, true })
			said, err := hintOf(t, c, nil, tenancy.Hint{Source: "claim", Trust: tenancy.Identity})
			name, isString := v.(string)
			switch wanted := isString && ident.Slug(name) == nil; {
			case wanted && (err != nil || said != name):
				t.Errorf("%q: got %q, %v", name, said, err)
			case !wanted && !errors.Is(err, tenantmw.ErrUnauthenticated):
				t.Errorf("%#v: got %q, %v, want ErrUnauthenticated", v, said, err)
			}
		}
	})
}
