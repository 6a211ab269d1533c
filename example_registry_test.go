package tenancy_test

import (
	"context"
	"net/http"
	"time"

	"github.com/msmt-go/tenancy"
)

// A registry holds one client of the service's own per tenant, closed when the tenant goes or falls idle.
func ExampleNewRegistry() {
	var tn *tenancy.Tenancy // of tenancy.Open
	clients, err := tenancy.NewRegistry(tn, tenancy.RegistryConfig[*http.Client]{
		Build: func(ctx context.Context, t tenancy.Tenant) (*http.Client, error) {
			return &http.Client{Transport: &http.Transport{}}, nil
		},
		Close: func(_ context.Context, c *http.Client) error {
			c.CloseIdleConnections()
			return nil
		},
		IdleAfter: 10 * time.Minute,
	})
	if err != nil {
		return
	}
	fetch := func(ctx context.Context, url string) error {
		return clients.Use(ctx, func(c *http.Client) error {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
			if err != nil {
				return err
			}
			res, err := c.Do(r)
			if err != nil {
				return err
			}
			return res.Body.Close()
		})
	}
	_ = fetch
}
