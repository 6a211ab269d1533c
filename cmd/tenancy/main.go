// Command tenancy manages the tenants of a service. Its migrations are a directory of goose files; a service with migrations in code builds its own, with
// package tenancycmd. See docs/cli.md.
package main

import "github.com/msmt-go/tenancy/tenancycmd"

func main() { tenancycmd.Main(tenancycmd.Options{}) }
