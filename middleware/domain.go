package middleware

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/msmt-go/tenancy"
)

// Domain takes the request's host for a domain of a tenant, as the catalog lists them: www.acme.com. Own are the
// hosts of the service itself: names, IP addresses, and "*.example.com" for every host with one label more than
// example.com, as beside a [Subdomain] of the same hosts. They name no tenant, are never looked up, and have no
// port. With none given every host must be a tenant's.
//
// Trust: [tenancy.Place], so an anonymous caller gets the tenant too, not logged in. Any caller can send any
// Host, which is why it opens nothing by itself. X-Forwarded-Host and Forwarded are never read: a proxy passes
// Host on, or a middleware of the service that knows its proxies sets r.Host.
//
// The threat is a second spelling of a tenant's domain, and a host that passes for one of the service's. So a
// port, one trailing dot and the case of ASCII letters make no difference, and everything else does: look-alikes
// and their punycode (xn--) are other names. A Host that is missing, no name, or an IP address outside own is
// answered with 400; a domain that is not listed as a missing tenant.
//
// [New] refuses an entry of own that is no host or stands there twice.
func Domain(own ...string) Contributor {
	d := &domain{}
	for _, o := range own {
		if err := d.add(o); err != nil {
			d.err = fmt.Errorf("Domain(%q): %w", o, err)
			break
		}
	}
	return d
}

type domain struct {
	checked
	names   []string // of the service itself
	parents []string // of hosts of the service itself
	addrs   []netip.Addr
}

func (d *domain) add(own string) error {
	if addr, err := netip.ParseAddr(own); err == nil && addr.Is6() {
		own = "[" + own + "]" // it may come without its brackets
	}
	own, below := strings.CutPrefix(own, "*.")
	h, err := parseHostName(own)
	switch {
	case err != nil:
		return fmt.Errorf("%w; give a name or an address without a port", err)
	case h.name == "" && below:
		return errors.New("an IP address has no labels")
	case h.name == "":
		return addOnce(&d.addrs, h.addr)
	case below:
		return addOnce(&d.parents, h.name)
	}
	return addOnce(&d.names, h.name)
}

func addOnce[T comparable](list *[]T, v T) error {
	if slices.Contains(*list, v) {
		return errors.New("it is given twice")
	}
	*list = append(*list, v)
	return nil
}

func (d *domain) Hint(r *http.Request) (tenancy.Hint, error) {
	if d.err != nil {
		return tenancy.Hint{}, d.miswired()
	}
	h, err := parseHost(r.Host)
	switch {
	case err != nil:
		return tenancy.Hint{}, fmt.Errorf("domain: Host: %w", err)
	case d.own(h):
		return tenancy.Hint{}, nil
	case h.addr.IsValid():
		return tenancy.Hint{}, errors.New("domain: Host is an IP address: if callers such as probes use it, name it in Domain as one of the service's own")
	case h.name == "":
		return tenancy.Hint{}, errors.New("domain: the request has no Host")
	}
	return tenancy.Hint{Source: "domain", Trust: tenancy.Place, By: tenancy.ByDomain, Value: h.name}, nil
}

func (d *domain) own(h host) bool {
	if h.addr.IsValid() {
		return slices.Contains(d.addrs, h.addr)
	}
	_, parent, _ := strings.Cut(h.name, ".")
	return slices.Contains(d.names, h.name) || slices.Contains(d.parents, parent)
}
