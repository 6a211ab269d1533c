package middleware

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/msmt-go/tenancy"
)

// Subdomain takes the first label of the request's host for the name of a tenant, where the host has one of the
// formats: with "{tenant}.example.com", acme.example.com names acme. {tenant} is one whole label, the first one;
// the rest must be equal. A [Domain] beside it is told "*.example.com", or it takes these hosts for a tenant's.
//
// Hosts of no format are no opinion: example.com, a.b.example.com, an IP address, a missing Host. So is the
// label www. A label that no tenant can have, such as 7up, does name one, which is missing.
//
// Trust: [tenancy.Place], so an anonymous caller gets the tenant too, not logged in. Any caller can send any
// Host, which is why it opens nothing by itself. X-Forwarded-Host and Forwarded are never read: a proxy passes
// Host on, or a middleware of the service that knows its proxies sets r.Host.
//
// The threat is a host that fits by half: acme.example.com.evil.test, or acmeexample.com. So the labels are
// compared as wholes; a port, one trailing dot and the case of ASCII letters make no difference, and everything
// else does: look-alikes and their punycode (xn--) are other names. A Host that is no host name is answered with
// 400, whatever it resembles.
//
// [New] refuses formats of another form, none, and one that is given twice.
func Subdomain(formats ...string) Contributor {
	s := &subdomain{}
	if len(formats) == 0 {
		s.err = errors.New(`Subdomain: no format is given, such as "{tenant}.example.com"`)
	}
	for _, f := range formats {
		if err := s.add(f); err != nil {
			s.err = fmt.Errorf("Subdomain(%q): %w", f, err)
			break
		}
	}
	return s
}

type subdomain struct {
	checked
	parents []string // what follows the tenant's label and its dot
}

func (s *subdomain) add(format string) error {
	parent, ok := strings.CutPrefix(format, "{tenant}.")
	if !ok || strings.HasSuffix(parent, ".") {
		return errors.New(`a format is "{tenant}." and the rest of the host's name, without a port`)
	}
	h, err := parseHostName(parent)
	if err != nil {
		return fmt.Errorf("%w; give no port", err)
	}
	if h.name == "" {
		return errors.New("an IP address has no labels")
	}
	return addOnce(&s.parents, h.name)
}

func (s *subdomain) Hint(r *http.Request) (tenancy.Hint, error) {
	if s.err != nil {
		return tenancy.Hint{}, s.miswired()
	}
	h, err := parseHost(r.Host)
	if err != nil {
		return tenancy.Hint{}, fmt.Errorf("subdomain: Host: %w", err)
	}
	label, parent, _ := strings.Cut(h.name, ".")
	if label == "www" || !slices.Contains(s.parents, parent) {
		return tenancy.Hint{}, nil
	}
	return tenancy.Hint{Source: "subdomain", Trust: tenancy.Place, By: tenancy.ByName, Value: label}, nil
}
