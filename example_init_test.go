package tenancy_test

import (
	"context"
	"log"
	"os"

	"github.com/msmt-go/tenancy"
)

// Init makes databases, logins and privileges once, with an administrator's login that is stored nowhere.
func ExampleInit() {
	keys, err := tenancy.ParseKeyring(os.Getenv("TENANCY_KEYS"))
	if err != nil {
		log.Fatal(err)
	}
	err = tenancy.Init(context.Background(), tenancy.AdminConfig{
		AdminURL:   os.Getenv("ADMIN_URL"),
		PrimaryURL: os.Getenv("TENANCY_PRIMARY_URL"),                    // .../app_primary, with the catalog login to make
		Server:     tenancy.ServerConfig{URL: os.Getenv("TENANTS_URL")}, // .../app_tenants, with the provisioner to make
		Keys:       keys,
		Extensions: []string{"citext"},
	})
	if err != nil {
		log.Fatal(err)
	}
}
