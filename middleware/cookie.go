package middleware

import (
	"net/http"
	"net/textproto"
	"strings"

	"github.com/msmt-go/tenancy"
)

// Cookie takes a cookie for the name of a tenant, as an application's tenant switch sets it.
//
// Trust: [tenancy.Choice]: it chooses among the user's own tenants, and says nothing for an anonymous caller.
//
// The threat is a cookie from elsewhere: every sister host can set one for the common domain, alone or beside
// the service's own. Two of one name are answered with 400, and where the name begins with __Host- a browser lets
// no other host set it. A value that is empty, quoted or no possible name of a tenant is a 400 too; net/http
// would pass over some of them, which then meant the default tenant. No cookie is no opinion.
//
// [New] refuses a name that is empty or has other characters than letters, digits, '-', '_' and '.'.
func Cookie(name string) Contributor {
	return &cookie{checkName("Cookie", name), name}
}

type cookie struct {
	checked
	name string
}

func (c *cookie) Hint(r *http.Request) (tenancy.Hint, error) {
	if c.err != nil {
		return tenancy.Hint{}, c.miswired()
	}
	n, value := 0, ""
	for _, line := range r.Header["Cookie"] {
		for line != "" {
			var pair string
			pair, line, _ = strings.Cut(line, ";")
			name, v, _ := strings.Cut(textproto.TrimString(pair), "=")
			if textproto.TrimString(name) == c.name {
				n, value = n+1, v
			}
		}
	}
	return choice("cookie", c.name, n, value)
}
