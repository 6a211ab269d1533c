// Package primary holds the migrations of the primary database's own schema, tenancy.
package primary

import (
	"embed"
	"io/fs"
)

//go:embed migrations/*.sql
var files embed.FS

// Schema is the schema of the primary that the library owns.
const Schema = "tenancy"

// Version is the newest version that this code knows; a primary with a higher one is refused.
const Version = 13

// Migrations returns the goose files, at the root of the returned file system.
func Migrations() fs.FS {
	sub, err := fs.Sub(files, "migrations")
	if err != nil {
		panic(err) // unreachable: the folder is embedded
	}
	return sub
}
