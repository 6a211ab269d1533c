package tenancy_test

import (
	"errors"
	"testing"

	"github.com/msmt-go/tenancy"
)

func TestRotateKeysMakesTheOldKeyNeedless(t *testing.T) {
	t.Parallel()
	f, _, acme, _ := twoTenants(t, tenancy.Config{})
	fresh, err := tenancy.NewKey("fresh")
	if err != nil {
		t.Fatal(err)
	}
	open := func(keys string) (*tenancy.Tenancy, error) {
		ring, err := tenancy.ParseKeyring(keys)
		if err != nil {
			t.Fatal(err)
		}
		return tenancy.Open(t.Context(), tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: ring})
	}
	if _, err := open(fresh); !errors.Is(err, tenancy.ErrWrongKey) {
		t.Fatalf("a new key alone, before the rotation: %v, want ErrWrongKey", err)
	}
	both, err := open(fresh + "," + f.KeyText)
	if err != nil {
		t.Fatal(err)
	}
	defer both.Close()
	// The sentinel, the provisioner and two data sources.
	if n, err := both.Catalog().RotateKeys(t.Context()); n != 4 || err != nil {
		t.Errorf("sealed %d records again, %v; want 4", n, err)
	}
	if n, err := both.Catalog().RotateKeys(t.Context()); n != 0 || err != nil {
		t.Errorf("a second time %d records, %v; want 0", n, err)
	}
	alone, err := open(fresh)
	if err != nil {
		t.Fatalf("a new key alone, after the rotation: %v", err)
	}
	defer alone.Close()
	ctx, err := alone.Enter(t.Context(), acme.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := alone.DB().Exec(ctx, `SELECT 1`); err != nil {
		t.Errorf("a tenant under the new key: %v", err)
	}
}
