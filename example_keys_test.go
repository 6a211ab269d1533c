package tenancy_test

import (
	"fmt"

	"github.com/msmt-go/tenancy"
)

// A keyring prints the ids of its keys, the one that seals first.
func ExampleParseKeyring() {
	old, err := tenancy.NewKey("2025")
	if err != nil {
		fmt.Println(err)
		return
	}
	fresh, err := tenancy.NewKey("2026")
	if err != nil {
		fmt.Println(err)
		return
	}
	keys, err := tenancy.ParseKeyring(fresh + "," + old)
	fmt.Println(keys, err)

	_, err = tenancy.ParseKeyring("main:correct horse battery staple")
	fmt.Println(err)
	// Output:
	// keys[2026 2025] <nil>
	// tenancy: invalid value: key 1 (main): must be 32 bytes in base64, as tenancy.NewKey makes it; a passphrase is refused
}
