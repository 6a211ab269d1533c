package tenancy_test

import (
	"context"
	"errors"
	"os"

	"github.com/msmt-go/tenancy"
)

// Reports over all tenants have a login of their own, which reads and writes nothing. Its password is returned once.
func ExampleCatalog_AddReader() {
	var tn *tenancy.Tenancy // of tenancy.Open
	handOver := func(ctx context.Context, server string, store func(login string, password tenancy.Secret) error) error {
		d, err := tn.Catalog().AddReader(ctx, server)
		if err != nil {
			return err
		}
		if err := store(d.User, d.Password); err != nil {
			return errors.Join(err, tn.Catalog().DropReader(ctx, server))
		}
		return nil
	}
	_ = handOver
}

// A tenant gets its data as lines of JSON. A file without its last line is not complete.
func ExampleCatalog_Export() {
	var tn *tenancy.Tenancy // of tenancy.Open
	export := func(ctx context.Context, id tenancy.ID, name string) error {
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		_, err = tn.Catalog().Export(ctx, id, f)
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(name))
		}
		return err
	}
	_ = export
}
