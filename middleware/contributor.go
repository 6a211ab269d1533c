package middleware

import (
	"net/http"

	"github.com/msmt-go/tenancy"
)

// Contributor reads from a request what it says about its tenant. None is asked unless it is given to
// [WithContributors]. Those of this package, by what their word is worth:
//
//   - [Claim] is a [tenancy.Identity]: what the service's authentication proved.
//   - [Domain], [Subdomain] and [Path] are a [tenancy.Place]: where the request went.
//   - [Header], [Cookie] and [QueryParam] are a [tenancy.Choice]: what the caller can set at will.
//
// They are safe for concurrent use, fold and trim nothing but the host's case, port and last dot, and refuse
// what a request says twice. [ContributorFunc] is for all else.
//
// A hint is not believed by itself, and its Trust says what it is worth: an implementation
// claims [tenancy.Place] only for where the request went and [tenancy.Identity] only for what the service's
// authentication proved; all that a caller can set at will is a [tenancy.Choice]. Where a request says two
// things in one place, such as a header given twice, that is an error. So is what stands there and cannot be
// read: taken for no opinion, it would quietly mean the default tenant.
//
// Hint is called once per request, concurrently. The zero Hint is no opinion. Its error is answered with 400,
// unless it matches [ErrUnauthenticated], an error of package tenancy or is the context's: then as [ProblemOf]
// says.
type Contributor interface {
	Hint(r *http.Request) (tenancy.Hint, error)
}

// ContributorFunc is a function as a Contributor. What a value may look like is the function's to check: one that no tenant can have is
// taken for a tenant that does not exist.
type ContributorFunc func(r *http.Request) (tenancy.Hint, error)

// Hint calls f.
func (f ContributorFunc) Hint(r *http.Request) (tenancy.Hint, error) { return f(r) }
