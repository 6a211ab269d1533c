package tenancy_test

import (
	"context"

	"github.com/msmt-go/tenancy"
)

// An entry of one tenant is never another's answer: database ids repeat between tenants.
func ExampleNewCache() {
	var tn *tenancy.Tenancy // of tenancy.Open
	titles, err := tenancy.NewCache[int64, string](tn, tenancy.CacheConfig{Size: 10_000})
	if err != nil {
		return
	}
	title := func(ctx context.Context, id int64) (string, error) {
		return titles.Get(ctx, id, func(ctx context.Context, id int64) (title string, err error) {
			err = tn.DB().QueryRow(ctx, "select title from notes where id = $1", id).Scan(&title)
			return title, err
		})
	}
	_ = title
}
