package pgembed

import (
	"context"
	"errors"
	"fmt"
	"net/url"
)

// bouncerSections is a PgBouncer for every database of a test server. It asks the server for the verifiers of tenants' logins as the superuser that the
// tests have anyway; an operator gives it less (docs/poolers.md).
const bouncerSections = `[databases]
* = host=%s port=%s auth_user=%s
[pgbouncer]
auth_type = scram-sha-256
auth_query = SELECT rolname, rolpassword FROM pg_authid WHERE rolname = $1 AND rolname ~ '^t_[0-9a-f]{20}_l[0-9]+$' AND rolcanlogin AND NOT rolsuper
pool_mode = transaction
default_pool_size = 8
max_client_conn = 2000
server_idle_timeout = 1
server_login_retry = 1
`

// StartBouncerBefore returns a PgBouncer in transaction mode before a server of which adminURL is the superuser's. Tenants' logins alone can come in,
// to whichever database is theirs. Otherwise it is as [StartBouncer] says.
func StartBouncerBefore(ctx context.Context, adminURL string) (*Bouncer, error) {
	u, err := url.Parse(adminURL)
	if err != nil || u.User == nil { // the parser's own error repeats the URL, and with it the password
		return nil, errors.New("the server's URL must be postgres://user:password@host:port/database")
	}
	password, _ := u.User.Password()
	return StartBouncer(ctx, fmt.Sprintf(bouncerSections, u.Hostname(), u.Port(), u.User.Username()), fmt.Sprintf("%q %q\n", u.User.Username(), password))
}
