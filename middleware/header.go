package middleware

import (
	"errors"
	"net/http"
	"strings"

	"github.com/msmt-go/tenancy"
)

// Header takes a header of the request for the name of a tenant: Header("X-Tenant").
//
// Trust: [tenancy.Choice]: it chooses among the user's own tenants, and says nothing for an anonymous caller.
// Any caller can send it, and a proxy that sets it makes it no proof: what the service's authentication proved
// is a [Claim].
//
// The threat is a request that says two things, of which a proxy or a log reads one and the service the other.
// So a header that comes twice, is empty, holds a list, or is no possible name of a tenant is answered with 400;
// nothing is folded or trimmed. No header is no opinion.
//
// [New] refuses a name that is empty or has other characters than letters, digits, '-', '_' and '.'; and Host,
// which is for [Domain] and [Subdomain].
func Header(name string) Contributor {
	h := &header{checkName("Header", name), http.CanonicalHeaderKey(name)}
	if strings.EqualFold(name, "Host") { // net/http takes it out of the headers: there would never be an opinion
		h.err = errors.New("Header(\"Host\"): use Domain or Subdomain")
	}
	return h
}

type header struct {
	checked
	name string // canonical, the key of http.Header
}

func (h *header) Hint(r *http.Request) (tenancy.Hint, error) {
	if h.err != nil {
		return tenancy.Hint{}, h.miswired()
	}
	values := r.Header[h.name]
	if len(values) == 0 {
		return tenancy.Hint{}, nil
	}
	return choice("header", h.name, len(values), values[0])
}
