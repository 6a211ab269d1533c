package middleware

import (
	"errors"
	"fmt"
	"strings"

	"github.com/msmt-go/tenancy"
)

// errMiswired: the service put a contributor where it cannot work. No request is to blame, and none may go on as
// if it had said nothing: it is answered with 500.
var errMiswired = errors.New("tenancy/middleware: wired wrongly")

// checked is the verdict on a contributor's arguments. [WithContributors] asks for it; a contributor that is
// called without having been asked (from within another) refuses every request.
type checked struct{ err error }

func (c checked) check() error { return c.err }

func (c checked) miswired() error { return fmt.Errorf("%w: %w", errMiswired, c.err) }

// checkName judges the name of a header, cookie, parameter. What is more than this needs quoting or escapes
// somewhere on its way, and then one name has two spellings.
func checkName(constructor, name string) checked {
	for i := range len(name) {
		if !letter(name[i]) && !digit(name[i]) && !strings.Contains("-_.", name[i:i+1]) {
			return checked{fmt.Errorf("%s(%q): a name is made of letters, digits, '-', '_' and '.'", constructor, name)}
		}
	}
	if name == "" {
		return checked{fmt.Errorf("%s: the name is empty", constructor)}
	}
	return checked{}
}

// choice is the hint of a header, cookie or parameter that stands n times in a request.
//
// One that stands there without a value is refused: that is what a template of a proxy or a client leaves whose
// variable is missing, and the default tenant would be a guess.
func choice(source, name string, n int, value string) (tenancy.Hint, error) {
	switch {
	case n == 0:
		return tenancy.Hint{}, nil
	case n > 1:
		return tenancy.Hint{}, fmt.Errorf("%s %s: given more than once", source, name)
	case !slug(value): // empty, padded, a list, escaped, too long
		return tenancy.Hint{}, fmt.Errorf("%s %s: not the name of a tenant", source, name)
	}
	return tenancy.Hint{Source: source, Trust: tenancy.Choice, By: tenancy.ByName, Value: value}, nil
}

// slug reports whether a tenant can have the name s: a lower-case letter, then up to 39 lower-case letters,
// digits or hyphens. Nothing is folded or trimmed.
func slug(s string) bool {
	if s == "" || len(s) > 40 || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && !digit(c) && c != '-' {
			return false
		}
	}
	return true
}

func letter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
func digit(c byte) bool  { return c >= '0' && c <= '9' }
