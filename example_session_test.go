package tenancy_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/msmt-go/tenancy"
)

// Resolve serves what is no HTTP request: a message that names its user and, as a choice, a tenant.
func ExampleTenancy_Resolve() {
	var tn *tenancy.Tenancy // of tenancy.Open
	handle := func(ctx context.Context, user tenancy.UserKey, tenant string) error {
		ctx, err := tn.Resolve(ctx, tenancy.Query{
			User:  user,
			Hints: []tenancy.Hint{{Source: "message", Trust: tenancy.Choice, By: tenancy.ByName, Value: tenant}},
		})
		if err != nil {
			return err // ErrForbidden for a foreign and for a missing tenant alike
		}
		_, err = tn.DB().Exec(ctx, "insert into inbox default values")
		return err
	}
	_ = handle
}

// Enter is for the service's own work on one tenant. Its ID never comes from a request.
func ExampleTenancy_Enter() {
	var tn *tenancy.Tenancy // of tenancy.Open
	nightly := func(ctx context.Context, id tenancy.ID) error {
		ctx, err := tn.Enter(ctx, id)
		if err != nil {
			return err
		}
		_, err = tn.DB().Exec(ctx, "delete from notes where created < now() - interval '1 year'")
		return err
	}
	_ = nightly
}

// Work that outlives its request keeps the session and nothing else of the request's context.
func ExampleDetach() {
	var tn *tenancy.Tenancy // of tenancy.Open
	handler := func(w http.ResponseWriter, r *http.Request) {
		ctx := tenancy.Detach(r.Context())
		go func() { _, _ = tn.DB().Exec(ctx, "insert into visits default values") }()
		w.WriteHeader(http.StatusAccepted)
	}
	_ = handler
}

// A context without a tenant is an error, never a default.
func ExampleTenantFrom() {
	_, err := tenancy.TenantFrom(context.Background())
	fmt.Println(errors.Is(err, tenancy.ErrNoTenant))

	_, err = tenancy.TenantFrom(tenancy.AsHost(context.Background()))
	fmt.Println(err)
	// Output:
	// true
	// tenancy: no tenant on the context: the session is the host's, which has no tenant data: use tn.Host() for host data, or tn.Enter for one tenant's
}
