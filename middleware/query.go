package middleware

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/msmt-go/tenancy"
)

// QueryParam takes a parameter of the request's query for the name of a tenant: QueryParam("tenant") reads
// /notes?tenant=acme. The body is not read.
//
// Trust: [tenancy.Choice]: it chooses among the user's own tenants, and says nothing for an anonymous caller.
//
// The threat is a link: whoever makes a user follow one chooses among that user's tenants, and queries end up in
// logs and Referer headers. A header is the better place for what changes data. The other is a parameter that is
// there twice, of which a proxy reads one and the service the other: that is answered with 400, also where it is
// hidden behind a semicolon, which net/url drops and others take for a separator. A value that is empty, escaped
// or no possible name of a tenant is a 400 too. No parameter is no opinion, whatever else is broken in the
// query.
//
// [New] refuses a name that is empty or has other characters than letters, digits, '-', '_' and '.'.
func QueryParam(name string) Contributor {
	return &queryParam{checkName("QueryParam", name), name}
}

type queryParam struct {
	checked
	name string
}

// Hint scans the query instead of parsing it: url.ParseQuery drops what it cannot read, and makes a map for one
// value.
func (q *queryParam) Hint(r *http.Request) (tenancy.Hint, error) {
	if q.err != nil {
		return tenancy.Hint{}, q.miswired()
	}
	n, value := 0, ""
	for rest := r.URL.RawQuery; rest != ""; {
		var piece string
		piece, rest, _ = strings.Cut(rest, "&")
		semicolon := strings.Contains(piece, ";")
		for pair := range strings.SplitSeq(piece, ";") {
			key, v, _ := strings.Cut(pair, "=")
			if !q.named(key) {
				continue
			}
			if semicolon {
				return tenancy.Hint{}, fmt.Errorf("query %s: beside a semicolon, which can mean two things", q.name)
			}
			n, value = n+1, v
		}
	}
	return choice("query", q.name, n, value)
}

// named reports whether key is the name, in whatever spelling. One that cannot be decoded is not: no reading of
// a broken escape makes a character of a name.
func (q *queryParam) named(key string) bool {
	if key == q.name {
		return true
	}
	if !strings.Contains(key, "%") {
		return false
	}
	key, err := url.QueryUnescape(key)
	return err == nil && key == q.name
}
