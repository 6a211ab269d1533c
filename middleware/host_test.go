package middleware_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/msmt-go/tenancy"
	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// hosts is what a Host is to Domain("own.test", "*.own.example", "127.0.0.1", "::1") and to Subdomain("{tenant}.example.com",
// "{tenant}.localhost").
var hosts = []struct{ rule, host, domain, subdomain string }{
	{"a_format", "acme.example.com", "acme.example.com", "acme"},
	{"another_format", "acme.localhost", "acme.localhost", "acme"},
	{"a_port", "acme.example.com:8443", "acme.example.com", "acme"},
	{"port_65535", "acme.example.com:65535", "acme.example.com", "acme"},
	{"a_dot", "acme.example.com.", "acme.example.com", "acme"},
	{"a_dot_and_a_port", "acme.example.com.:80", "acme.example.com", "acme"},
	{"capitals", "AcMe.EXAMPLE.Com", "acme.example.com", "acme"},
	{"a_label_that_no_tenant_can_have", "7up.example.com", "7up.example.com", "7up"},
	{"a_label_too_long_for_a_tenant", strings.Repeat("a", 63) + ".example.com", strings.Repeat("a", 63) + ".example.com", strings.Repeat("a", 63)},
	{"www", "www.example.com", "www.example.com", ""},
	{"www_in_capitals", "WWW.example.com", "www.example.com", ""},
	{"www2", "www2.example.com", "www2.example.com", "www2"},
	{"the_parent", "example.com", "example.com", ""},
	{"one_label", "localhost", "localhost", ""},
	{"two_labels_before_the_parent", "a.acme.example.com", "a.acme.example.com", ""},
	{"the_format_in_front_of_another_parent", "acme.example.com.evil.test", "acme.example.com.evil.test", ""},
	{"no_dot_before_the_parent", "acmeexample.com", "acmeexample.com", ""},
	{"the_end_of_the_parent", "acme.notexample.com", "acme.notexample.com", ""},
	{"part_of_the_parent", "acme.com", "acme.com", ""},

	{"punycode_is_compared_as_it_is", "xn--bcher-kva.example.com", "xn--bcher-kva.example.com", "xn--bcher-kva"},
	{"punycode_of_cyrillic_acme_is_another_name", "xn--cme-7cd.example.com", "xn--cme-7cd.example.com", "xn--cme-7cd"},
	{"look_alike_of_the_parent", "acme.examp1e.com", "acme.examp1e.com", ""},
	{"punycode_look_alike_of_the_parent", "acme.xn--exmple-cua.com", "acme.xn--exmple-cua.com", ""},
	{"cyrillic", "\u0430cme.example.com", refused, refused},
	{"full_width", "\uff41cme.example.com", refused, refused},
	{"ideographic_full_stop", "acme\u3002example.com", refused, refused},
	{"kelvin_sign_folds_to_k", "\u212aelvin.example.com", refused, refused},
	{"long_s", "acme.example\u017fcom", refused, refused},
	{"soft_hyphen", "ac\u00adme.example.com", refused, refused},
	{"no_utf8", "acme\xff.example.com", refused, refused},

	{"own", "own.test", "", ""},
	{"own_in_another_spelling", "OWN.test.:80", "", ""},
	{"below_own", "a.own.test", "a.own.test", ""},
	{"below_an_own_parent", "ACME.own.example:80", "", ""},
	{"two_labels_below_an_own_parent", "a.b.own.example", "a.b.own.example", ""},
	{"an_own_parent", "own.example", "own.example", ""},
	{"the_end_of_an_own_parent", "acme.notown.example", "acme.notown.example", ""},
	{"own_ipv4", "127.0.0.1", "", ""},
	{"own_ipv4_and_a_port", "127.0.0.1:8080", "", ""},
	{"own_ipv4_and_a_dot", "127.0.0.1.", "", ""},
	{"own_ipv6", "[::1]", "", ""},
	{"own_ipv6_and_a_port", "[0:0:0:0:0:0:0:1]:8080", "", ""},
	{"ipv4", "127.0.0.2", refused, ""},
	{"ipv4_and_a_port", "10.0.0.1:80", refused, ""},
	{"ipv6", "[::2]", refused, ""},
	{"ipv6_mapped", "[::ffff:127.0.0.1]", refused, ""},
	{"no_host", "", refused, ""},

	{"ipv6_without_brackets", "::1", refused, refused},
	{"ipv6_open", "[::1", refused, refused},
	{"ipv6_closed", "::1]", refused, refused},
	{"ipv6_zone", "[fe80::1%eth0]", refused, refused},
	{"ipv4_in_brackets", "[127.0.0.1]", refused, refused},
	{"a_name_in_brackets", "[acme.example.com]", refused, refused},
	{"behind_brackets", "[::1].example.com", refused, refused},
	{"brackets_alone", "[]", refused, refused},
	{"a_bracket_alone", "[", refused, refused},
	{"short_ipv4", "127.1", refused, refused},
	{"ipv4_with_zeros", "127.0.0.01", refused, refused},
	{"ipv4_as_a_number", "2130706433", refused, refused},
	{"ipv4_in_hex", "0x7f.0.0.0x1", refused, refused},
	{"a_number_as_parent", "acme.1", refused, refused},

	{"two_dots_at_the_end", "acme.example.com..", refused, refused},
	{"a_dot_alone", ".", refused, refused},
	{"two_dots", "..", refused, refused},
	{"a_dot_first", ".example.com", refused, refused},
	{"an_empty_label", "acme..example.com", refused, refused},
	{"a_hyphen_first", "-acme.example.com", refused, refused},
	{"a_hyphen_last", "acme-.example.com", refused, refused},
	{"a_label_of_64", strings.Repeat("a", 64) + ".example.com", refused, refused},
	{"254_bytes", strings.Repeat("a.", 121) + "example.com.", strings.Repeat("a.", 121) + "example.com", ""},
	{"255_bytes", strings.Repeat("a.", 121) + "aexample.com.", refused, refused},
	{"a_megabyte", strings.Repeat("a.", 1<<19) + "example.com", refused, refused},
	{"an_underscore", "ac_me.example.com", refused, refused},
	{"an_escape", "ac%6de.example.com", refused, refused},
	{"an_escaped_dot", "acme%2eexample.com", refused, refused},
	{"an_escaped_NUL", "acme%00.example.com", refused, refused},
	{"NUL", "acme.example.com\x00.evil.test", refused, refused},
	{"a_space", "acme.example.com ", refused, refused},
	{"a_space_first", " acme.example.com", refused, refused},
	{"a_line_break", "acme.example.com\r\n", refused, refused},
	{"a_comma", "acme.example.com,globex.example.com", refused, refused},
	{"a_user", "x@acme.example.com", refused, refused},
	{"a_slash", "acme.example.com/", refused, refused},
	{"a_backslash", `evil.test\.example.com`, refused, refused},
	{"a_scheme", "http://acme.example.com", refused, refused},
	{"a_wildcard", "*.example.com", refused, refused},
	{"the_format_itself", "{tenant}.example.com", refused, refused},

	{"port_0", "acme.example.com:0", refused, refused},
	{"port_65536", "acme.example.com:65536", refused, refused},
	{"port_99999", "acme.example.com:99999", refused, refused},
	{"port_empty", "acme.example.com:", refused, refused},
	{"port_with_a_sign", "acme.example.com:+80", refused, refused},
	{"port_that_is_a_name", "acme.example.com:http", refused, refused},
	{"port_and_a_dot", "acme.example.com:80.", refused, refused},
	{"port_with_an_underscore", "acme.example.com:8_0", refused, refused},
	{"two_ports", "acme.example.com:80:80", refused, refused},
	{"a_port_alone", ":80", refused, refused},
}

func domainAndSubdomain() (domain, subdomain tenantmw.Contributor) {
	return tenantmw.Domain("Own.test", "*.OWN.example", "127.0.0.1", "::1"), tenantmw.Subdomain("{tenant}.example.com", "{tenant}.LOCALHOST")
}

func TestHostNamesADomainOrATenant(t *testing.T) {
	t.Parallel()
	domain, subdomain := domainAndSubdomain()
	for _, h := range hosts {
		t.Run(h.rule, func(t *testing.T) {
			r := &http.Request{Host: h.host, Header: http.Header{}, Method: "GET"}
			wantHint(t, domain, r, h.domain)
			wantHint(t, subdomain, r, h.subdomain)
		})
	}
	r := httptest.NewRequest("GET", "http://acme.example.com/", nil)
	if h, _ := domain.Hint(r); h != (tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: "acme.example.com"}) {
		t.Errorf("got %+v", h)
	}
	if h, _ := subdomain.Hint(r); h != (tenancy.Hint{Source: "subdomain", Trust: tenancy.Place, By: tenancy.ByName, Value: "acme"}) {
		t.Errorf("got %+v", h)
	}
	for host, what := range map[string]string{"": "no Host", "10.0.0.1": "service's own", "a.test:0": "port", "a..test": "host name"} {
		r.Host = host
		if _, err := domain.Hint(r); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%q: %v does not tell what to mend", host, err)
		}
	}
	for _, c := range []tenantmw.Contributor{domain, subdomain} {
		r.Host = "acme.example.com:0"
		if got := statusFor(t, c, r); got != http.StatusBadRequest {
			t.Errorf("got %d, want 400", got)
		}
	}
}

func TestForwardedHostsAreNotRead(t *testing.T) {
	t.Parallel()
	domain, subdomain := domainAndSubdomain()
	r := httptest.NewRequest("GET", "http://acme.example.com/", nil)
	for _, name := range []string{"X-Forwarded-Host", "X-Host", "X-Original-Host", "X-Forwarded-Server", "X-HTTP-Host-Override", "Host"} {
		r.Header.Set(name, "globex.example.com")
	}
	r.Header.Set("Forwarded", `host="globex.example.com"`)
	r.Header.Set("X-Original-URL", "http://globex.example.com/")
	wantHint(t, domain, r, "acme.example.com")
	wantHint(t, subdomain, r, "acme")
}

// TestHostAsItComesOverTheWire pins what net/http makes of a Host before a contributor sees it.
func TestHostAsItComesOverTheWire(t *testing.T) {
	t.Parallel()
	domain, subdomain := domainAndSubdomain()
	tenant := tenantmw.Header("X-Tenant")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var said []string
		for _, c := range []tenantmw.Contributor{domain, subdomain, tenant} {
			h, err := c.Hint(r)
			if err != nil {
				h.Value = "refused"
			}
			said = append(said, h.Value)
		}
		fmt.Fprint(w, strings.Join(said, "|"))
	}))
	defer server.Close()
	for _, c := range []struct {
		rule, request string
		status        int
		said          string // of domain, subdomain and header
	}{
		{"an_ordinary_host", "GET / HTTP/1.1\r\nHost: Acme.Example.com:80", 200, "acme.example.com|acme|"},
		{"a_whole_URL_overrides_Host", "GET http://globex.example.com/ HTTP/1.1\r\nHost: acme.example.com", 200, "globex.example.com|globex|"},
		{"a_whole_URL_of_HTTP_1_0", "GET http://globex.example.com/ HTTP/1.0", 200, "globex.example.com|globex|"},
		{"a_whole_URL_with_a_user", "GET http://acme.example.com@globex.example.com/ HTTP/1.1\r\nHost: acme.example.com", 200, "globex.example.com|globex|"},
		{"a_whole_URL_with_a_bad_host", "GET http://acme%2eexample.com/ HTTP/1.1\r\nHost: acme.example.com", 400, ""},
		{"a_whole_URL_without_a_host", "GET http:///x HTTP/1.1\r\nHost: acme.example.com", 200, "acme.example.com|acme|"},
		{"no_Host_in_HTTP_1_0", "GET / HTTP/1.0", 200, "refused||"},
		{"no_Host_in_HTTP_1_1", "GET / HTTP/1.1", 400, ""},
		{"an_empty_Host", "GET / HTTP/1.1\r\nHost:", 200, "refused||"},
		{"two_Hosts", "GET / HTTP/1.1\r\nHost: acme.example.com\r\nHost: globex.example.com", 400, ""},
		{"two_equal_Hosts", "GET / HTTP/1.1\r\nHost: acme.example.com\r\nhost: acme.example.com", 400, ""},
		{"a_space_before_the_colon", "GET / HTTP/1.1\r\nHost : acme.example.com", 400, ""},
		{"a_user", "GET / HTTP/1.1\r\nHost: x@acme.example.com", 400, ""},
		{"raw_non_ASCII", "GET / HTTP/1.1\r\nHost: \u0430cme.example.com", 400, ""},
		{"two_dots_at_the_end", "GET / HTTP/1.1\r\nHost: acme.example.com..", 200, "refused|refused|"},
		{"half_an_address", "GET / HTTP/1.1\r\nHost: [::1", 200, "refused|refused|"},
		{"an_escaped_dot", "GET / HTTP/1.1\r\nHost: acme%2eexample.com", 200, "refused|refused|"},
		{"port_99999", "GET / HTTP/1.1\r\nHost: acme.example.com:99999", 200, "refused|refused|"},
		{"a_list", "GET / HTTP/1.1\r\nHost: acme.example.com, globex.example.com", 400, ""},
		{"a_probe_by_address", "GET / HTTP/1.1\r\nHost: 127.0.0.1:8080", 200, "||"},
		{"one_header", "GET / HTTP/1.1\r\nHost: own.test\r\nx-tenant:  acme  ", 200, "||acme"},
		{"two_headers", "GET / HTTP/1.1\r\nHost: own.test\r\nX-Tenant: acme\r\nx-tenant: globex", 200, "||refused"},
		{"a_second_header_that_is_empty", "GET / HTTP/1.1\r\nHost: own.test\r\nX-Tenant: acme\r\nX-Tenant:", 200, "||refused"},
		{"a_folded_header", "GET / HTTP/1.1\r\nHost: own.test\r\nX-Tenant: acme\r\n globex", 200, "||refused"},
	} {
		t.Run(c.rule, func(t *testing.T) {
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, c.request+"\r\nConnection: close\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != c.status || c.status == 200 && string(body) != c.said {
				t.Errorf("got %d %q, want %d %q", res.StatusCode, body, c.status, c.said)
			}
		})
	}
}
