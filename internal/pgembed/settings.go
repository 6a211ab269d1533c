package pgembed

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// ourSettings make a server that is quick and forgetful, and roomy enough for
// tests that open many pools and touch many schemas in one transaction.
var ourSettings = map[string]string{
	"fsync":                     "off",
	"synchronous_commit":        "off",
	"full_page_writes":          "off",
	"jit":                       "off", // compiling costs more than small queries win
	"wal_level":                 "minimal",
	"max_wal_senders":           "0", // what wal_level=minimal asks for
	"shared_buffers":            "32MB",
	"max_connections":           "300",
	"max_locks_per_transaction": "256", // DROP SCHEMA CASCADE locks every object
	"password_encryption":       "scram-sha-256",
	"log_line_prefix":           "%m [%p] %q%u@%d ",
	"timezone":                  "UTC", // the same on every machine
	"log_timezone":              "UTC",
	"cluster_name":              "tenancy-pgembed", // so that ps tells whose it is
}

// reservedSettings are how this package finds, guards, hears and stops the server.
var reservedSettings = []string{
	"config_file", "data_directory", "external_pid_file", "hba_file", "ident_file",
	"listen_addresses", "log_destination", "logging_collector", "port",
	"unix_socket_directories", "unix_socket_group", "unix_socket_permissions",
}

var settingName = regexp.MustCompile(`^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?$`)

// renderSettings returns ours and extra as lines of postgresql.conf. Names are lower
// case, which is how PostgreSQL's manual writes them, so that no spelling of a
// reserved one slips through.
func renderSettings(extra map[string]string) (string, error) {
	for name, value := range extra {
		switch {
		case !settingName.MatchString(name):
			return "", fmt.Errorf("Settings[%q]: not a lower-case name of a PostgreSQL setting", name)
		case slices.Contains(reservedSettings, name):
			return "", fmt.Errorf("Settings[%q]: reserved, the server is run by it", name)
		case strings.ContainsAny(value, "\n\r\x00"):
			return "", fmt.Errorf("Settings[%q]: the value must be one line", name)
		}
	}
	all := maps.Clone(ourSettings)
	maps.Copy(all, extra)
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&b, "%s = '%s'\n", name, quoteSetting(all[name]))
	}
	return b.String(), nil
}

// quoteSetting escapes what is special inside the quotes of postgresql.conf.
func quoteSetting(value string) string {
	return strings.NewReplacer(`'`, `''`, `\`, `\\`).Replace(value)
}

// hostBased is pg_hba.conf: a password from everyone, on the socket too.
const hostBased = `# type  database     user  address       method
local   all          all                 scram-sha-256
local   replication  all                 scram-sha-256
host    all          all   127.0.0.1/32  scram-sha-256
host    replication  all   127.0.0.1/32  scram-sha-256
`
