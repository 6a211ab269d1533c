package main

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

const (
	primaryDatabase = "quickstart_primary"
	tenantsDatabase = "quickstart_tenants"
)

// errUsage: the program was called in a way that cannot work.
var errUsage = errors.New("usage")

// database is a PostgreSQL on which the library is set up.
type database struct {
	throwAway  bool // it ends with this program
	isolation  tenancy.Isolation
	primaryURL string
	keys       tenancy.Keyring
	keyText    string
	psqlURL    string // the tenants' database for the administrator
	stop       func() error
}

// openDatabase sets the library up on the administrator's server, or, with "", on one that lives as long
// as this program, however that ends.
func openDatabase(ctx context.Context, adminURL string, isolation tenancy.Isolation) (*database, error) {
	db := &database{isolation: isolation, stop: func() error { return nil }}
	if adminURL == "" {
		server, err := pgembed.Start(ctx, pgembed.Options{Download: true, Own: true})
		if err != nil {
			return nil, err
		}
		db.stop = server.Stop
		adminURL, db.throwAway = server.URL(), true
	}
	if err := db.setUp(ctx, adminURL); err != nil {
		return nil, errors.Join(err, db.stop())
	}
	return db, nil
}

func (db *database) setUp(ctx context.Context, adminURL string) (err error) {
	if db.keyText, err = keyText(db.throwAway); err != nil {
		return err
	}
	if db.keys, err = tenancy.ParseKeyring(db.keyText); err != nil {
		return fmt.Errorf("%w: TENANCY_KEYS: %w", errUsage, err)
	}
	admin, err := url.Parse(adminURL)
	if err != nil || admin.Scheme != "postgres" && admin.Scheme != "postgresql" || admin.Host == "" {
		// The parser's own error repeats the URL, and with it the password.
		return fmt.Errorf("%w: -database must be postgres://user:password@host:port/database", errUsage)
	}
	db.primaryURL = loginURL(admin, db.keyText, "quickstart_catalog", primaryDatabase)
	tenants := beside(admin, tenantsDatabase)
	if _, secret := tenants.User.Password(); secret && !db.throwAway {
		tenants.User = url.User(tenants.User.Username())
	}
	db.psqlURL = tenants.String()
	return tenancy.Init(ctx, tenancy.AdminConfig{
		AdminURL:   adminURL,
		PrimaryURL: db.primaryURL,
		Server:     tenancy.ServerConfig{URL: loginURL(admin, db.keyText, "quickstart_provisioner", tenantsDatabase)},
		Keys:       db.keys,
		// Tenants of both kinds can live in one fleet; a provisioner gets the right to make databases where they are wanted.
		TenantDatabases: db.isolation == tenancy.IsolationDatabase,
	})
}

// keyText returns the keys that seal passwords in the primary. A primary that outlives the program can only be opened with
// the keys of its first start, so there they come from outside.
func keyText(throwAway bool) (string, error) {
	keys := os.Getenv("TENANCY_KEYS")
	switch {
	case throwAway:
		return tenancy.NewKey("quickstart")
	case keys == "":
		return "", fmt.Errorf("%w: TENANCY_KEYS is not set. What this server keeps is sealed, and each start needs the same key. Make one, and keep it:\n\n\texport TENANCY_KEYS=\"main:$(openssl rand -base64 32)\"\n", errUsage)
	}
	return keys, nil
}

// loginURL is the way of one of the library's own logins to a database beside the administrator's. A service has the
// passwords in its secret store; the demo derives them, so that a second process on the same server has the same ones.
func loginURL(admin *url.URL, keys, login, database string) string {
	password, err := hkdf.Key(sha256.New, []byte(keys), nil, "quickstart login "+login, 24)
	if err != nil { // only for more bytes than it can make
		panic(err)
	}
	u := beside(admin, database)
	u.User = url.UserPassword(login, hex.EncodeToString(password))
	return u.String()
}

// beside is the administrator's URL for another database of the same server.
func beside(admin *url.URL, database string) *url.URL {
	u := &url.URL{Scheme: "postgres", User: admin.User, Host: admin.Host, Path: "/" + database}
	if mode := admin.Query().Get("sslmode"); mode != "" {
		u.RawQuery = url.Values{"sslmode": {mode}}.Encode()
	}
	return u
}

// greet prints what to try. Secrets are shown of the throw-away server alone.
func greet(addr net.Addr, db *database) {
	fmt.Printf("pid %d\nlistening on http://%s\n\n", os.Getpid(), addr)
	fmt.Printf("  curl -u alice@acme.test:demo -d '{\"title\":\"hello\"}' http://%s/notes\n", addr)
	fmt.Printf("  curl -u alice@acme.test:demo http://%s/notes\n", addr)
	fmt.Printf("  curl -u bob@globex.test:demo http://%s/notes\n", addr)
	fmt.Printf("  curl -u carol@both.test:demo -H 'X-Tenant: acme' http://%s/notes\n", addr)
	what, list := "table", `\dt *.notes`
	if db.isolation == tenancy.IsolationDatabase {
		what, list = "database", `\l t_*`
	}
	fmt.Printf("\nevery tenant's %s:\n\n  psql '%s' -c '%s'\n", what, db.psqlURL, list)
	if db.throwAway {
		fmt.Printf("\na program of yours on the same tenants:\n\n  export TENANCY_PRIMARY_URL='%s' TENANCY_KEYS='%s'\n", db.primaryURL, db.keyText)
	}
}
