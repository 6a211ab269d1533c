package middleware

import (
	"fmt"
	"net/http"

	"github.com/msmt-go/tenancy"
)

// Claim takes a claim of the caller's token for the name of a tenant. fn returns it from where the service's own
// authentication left the verified claims, as it was decoded; present is false where the token has none, which
// is no opinion:
//
//	tenantmw.Claim(func(r *http.Request) (any, bool) {
//		v, ok := claimsOf(r.Context())["tenant"]
//		return v, ok
//	})
//
// Trust: [tenancy.Identity]: it is worth what the authentication is, and fn must return nothing that was not
// verified. Still the user must be a member of that tenant, and a place or choice of another tenant is refused.
//
// The threat is a token that another issuer meant otherwise: a number, a list of tenants, JSON null, a name that
// is empty, padded or in capitals. None is taken for no opinion or turned into a name: all that is not a string
// with a possible name of a tenant is [ErrUnauthenticated], answered with 401. A string of a type of its own is
// none.
//
// fn is called once per request, concurrently. [New] refuses nil.
func Claim(fn func(r *http.Request) (value any, present bool)) Contributor {
	c := &claim{fn: fn}
	if fn == nil {
		c.err = fmt.Errorf("Claim: fn is nil")
	}
	return c
}

type claim struct {
	checked
	fn func(*http.Request) (any, bool)
}

func (c *claim) Hint(r *http.Request) (tenancy.Hint, error) {
	if c.err != nil {
		return tenancy.Hint{}, c.miswired()
	}
	v, present := c.fn(r)
	if !present {
		return tenancy.Hint{}, nil
	}
	name, ok := v.(string)
	if !ok {
		return tenancy.Hint{}, fmt.Errorf("%w: claim: a %T and no string", ErrUnauthenticated, v)
	}
	if !slug(name) {
		return tenancy.Hint{}, fmt.Errorf("%w: claim: not the name of a tenant", ErrUnauthenticated)
	}
	return tenancy.Hint{Source: "claim", Trust: tenancy.Identity, By: tenancy.ByName, Value: name}, nil
}
