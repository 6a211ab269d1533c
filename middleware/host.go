package middleware

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

// host is what a request's Host names: a name, an address, or neither where it is empty.
//
// Only r.Host is read, which is the Host header, or the target where the request line has a whole URL (RFC 9112,
// 3.2.2). X-Forwarded-Host and Forwarded are not: any caller can send them, and nothing in a request says which
// proxy did. A proxy in front passes Host on as it came; where it cannot, a middleware of the service that knows
// its proxies sets r.Host.
type host struct {
	name string // lower case, no port, no trailing dot
	addr netip.Addr
}

// Errors tell the rule and never the host, which may be hostile to a log.
var (
	errHostPort = errors.New("the port is not a number from 1 to 65535")
	errHostName = errors.New("not a host name of ASCII letters, digits and inner hyphens (internationalised ones are in punycode)")
)

// parseHost takes the port off and reads the rest. HTTP/1.0 needs no Host: an empty one is no error here.
func parseHost(s string) (host, error) {
	if s == "" {
		return host{}, nil
	}
	if i := strings.LastIndexByte(s, ':'); i >= 0 && s[len(s)-1] != ']' {
		if !port(s[i+1:]) {
			return host{}, errHostPort
		}
		s = s[:i]
	}
	return parseHostName(s)
}

func port(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16) // takes no sign, and no underscore in base 10
	return err == nil && n > 0
}

// parseHostName reads a host without a port. It takes the names that a tenant's domain can have, and no others:
// labels of 1 to 63 letters, digits and inner hyphens, the last one no number (resolvers read 127.1 as an
// address).
//
// Non-ASCII is refused before anything is folded: the Kelvin sign's lower case is an ASCII k.
func parseHostName(s string) (host, error) {
	if strings.HasPrefix(s, "[") {
		addr, err := netip.ParseAddr(strings.TrimSuffix(s[1:], "]"))
		if err != nil || !addr.Is6() || addr.Zone() != "" || s[len(s)-1] != ']' {
			return host{}, errHostName
		}
		return host{addr: addr}, nil
	}
	s = strings.TrimSuffix(s, ".")
	if len(s) > 253 {
		return host{}, errHostName
	}
	last := 0 // where the current label begins
	for i := 0; i <= len(s); i++ {
		switch {
		case i == len(s) || s[i] == '.':
			if label := s[last:i]; label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
				return host{}, errHostName
			}
			if i < len(s) {
				last = i + 1
			}
		case !letter(s[i]) && !digit(s[i]) && s[i] != '-':
			return host{}, errHostName
		}
	}
	s = strings.ToLower(s)
	if numeric(s[last:]) {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return host{}, errHostName
		}
		return host{addr: addr}, nil
	}
	return host{name: s}, nil
}

// numeric reports whether resolvers of the inet_aton kind read the label as part of an address.
func numeric(label string) bool {
	if hex, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(label, "0123456789") == ""
}
