package tenancy_test

import (
	"fmt"

	"github.com/msmt-go/tenancy"
)

// A URL is read by its own rules: nothing comes from the environment, and nothing prints the password.
func ExampleParseDataSource() {
	d, err := tenancy.ParseDataSource("postgres://app:s3cret@db.example.org/app_tenants")
	fmt.Printf("%+v %v\n", d, err)

	_, err = tenancy.ParseDataSource("postgres://app:s3cret@db.example.org/app_tenants?sslmode=prefer")
	fmt.Println(err)
	// Output:
	// postgres://app:[secret]@db.example.org:5432/app_tenants?sslmode=verify-full&schema= <nil>
	// tenancy: invalid value: sslmode must not be allow or prefer: they fall back to a connection without protection
}
