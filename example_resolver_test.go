package tenancy_test

import (
	"context"
	"strings"

	"github.com/msmt-go/tenancy"
)

// A wrapped resolver answers for some users itself and leaves the others to the default one. What it names
// is loaded and judged by the library all the same.
func ExampleConfig_wrapResolver() {
	var support tenancy.ID // the tenant of the service's own staff
	cfg := tenancy.Config{
		WrapResolver: func(next tenancy.TenantResolver) tenancy.TenantResolver {
			return tenancy.TenantResolverFunc(func(ctx context.Context, q tenancy.Query) (tenancy.Resolution, error) {
				if strings.HasSuffix(string(q.User), "@support.example.org") && len(q.Hints) == 0 {
					return tenancy.Resolution{Tenant: support, Role: tenancy.RoleMember, Source: "staff"}, nil
				}
				return next.ResolveTenant(ctx, q)
			})
		},
	}
	_ = cfg
}
