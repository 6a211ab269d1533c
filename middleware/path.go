package middleware

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/msmt-go/tenancy"
)

// Path takes a parameter of the request's route for the name of a tenant: r.PathValue(name), which chi and
// http.ServeMux set. The middleware stands inside the route that has the parameter, because a router knows it no
// sooner:
//
//	r.Route("/t/{tenant}", func(r chi.Router) {
//		r.Use(mw.Tenant) // with tenantmw.Path("tenant")
//		r.Get("/notes", listNotes)
//	})
//
// A route without the parameter is answered with 500 and told to the log. It is never no opinion: a middleware
// in the wrong place would then give each user the default tenant, whatever the path says.
//
// Trust: [tenancy.Place], so an anonymous caller gets the tenant too, not logged in. Any caller can ask for any
// path, which is why it opens nothing by itself.
//
// The threat is a second spelling of a tenant's path, or one that reads as another path further on. So a value
// with anything but ASCII letters, digits, '-' and '_', or of more than 64 bytes, is answered with 400: slashes
// and dots, plain and escaped. Any other that no tenant can have, such as Acme, names a tenant that is missing.
// ServeMux decodes a path before it compares: there /t/%61cme is /t/acme, for this as for every route. chi does
// not, and there it is a 400.
//
// [New] refuses a name that is empty or has other characters than letters, digits, '-', '_' and '.'.
func Path(name string) Contributor {
	return &pathValue{checkName("Path", name), name}
}

type pathValue struct {
	checked
	name string
}

func (p *pathValue) Hint(r *http.Request) (tenancy.Hint, error) {
	if p.err != nil {
		return tenancy.Hint{}, p.miswired()
	}
	value := r.PathValue(p.name)
	if value == "" && !p.routed(r.Pattern) {
		return tenancy.Hint{}, fmt.Errorf("%w: Path(%q): the request's route has no {%s}: put mw.Tenant inside the route that has it, "+
			`such as r.Route("/t/{%[3]s}", func(r chi.Router) { r.Use(mw.Tenant) })`, errMiswired, p.name, p.name)
	}
	if !segment(value) {
		return tenancy.Hint{}, fmt.Errorf("path %s: not the name of a tenant", p.name)
	}
	return tenancy.Hint{Source: "path", Trust: tenancy.Place, By: tenancy.ByName, Value: value}, nil
}

// routed reports whether the route has the parameter. It is asked about an empty value alone: chi lets /t//notes
// through, and that is the caller's mistake.
func (p *pathValue) routed(pattern string) bool {
	for _, end := range []string{"}", ":", "..."} {
		if strings.Contains(pattern, "{"+p.name+end) {
			return true
		}
	}
	return false
}

// segment reports whether s can stand in a path without being anything but a name.
func segment(s string) bool {
	for i := range len(s) {
		if !letter(s[i]) && !digit(s[i]) && s[i] != '-' && s[i] != '_' {
			return false
		}
	}
	return s != "" && len(s) <= 64
}
