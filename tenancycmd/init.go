package tenancycmd

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

type placeJSON struct {
	Server  string `json:"server,omitempty"`
	Address string `json:"address"` // host:port/database
}

// serverFlags are those that a server is registered with.
func serverFlags(cmd *cobra.Command, s *tenancy.ServerConfig) {
	f := cmd.Flags()
	f.IntVar(&s.Weight, "weight", 0, "the server's share of new tenants; default 1, below 0: only those that name it")
	f.IntVar(&s.Capacity, "capacity", 0, "tenants' places that it may have; 0: no limit")
	f.StringVar(&s.Tablespace, "tablespace", "", "where tables of tenants are kept that are made from now on; default: the database's own")
	f.StringVar(&s.Pooler, "pooler", "", "host:port of the pooler that its tenants' calls go through")
	f.StringVar(&s.PoolerTLS, "pooler-tls", "", "disable, require, verify-ca or verify-full; default: as for any address")
}

// setting reads a URL that has to be there.
func setting(name, what string) (string, error) {
	if v := os.Getenv(name); v != "" {
		return v, nil
	}
	return "", usageError{name + " is not set: " + what}
}

const serverURL = "the tenants' database with the provisioner's login, postgres://user:password@host:port/database"

func (a *app) initCommand() *cobra.Command {
	var admin tenancy.AdminConfig
	cmd := &cobra.Command{Use: "init", Short: "Make the databases and logins that a fleet needs; it may be run again", Args: cobra.NoArgs,
		Long: `Make what a fleet needs before its first tenant: the two databases, the catalog login, the provisioner, their privileges and the primary's own schema, and
register the server. It may be run again, and brings the primary's schema up to date; with another --server it adds one.

Its settings are in the environment, because they hold passwords:
  TENANCY_ADMIN_URL         a superuser, or a login with CREATEDB and CREATEROLE; used by this command alone
  TENANCY_SERVER_ADMIN_URL  the same on the tenants' server, where that is another PostgreSQL
  TENANCY_PRIMARY_URL       the primary database and the catalog login, as they are to be
  TENANCY_SERVER_URL        the tenants' database and the provisioner, as they are to be
  TENANCY_KEYS              the keys that seal passwords in the primary; 'keygen' makes one`}
	f := cmd.Flags()
	f.StringVar(&admin.Server.Name, "server", "main", "name of the tenants' server")
	f.StringSliceVar(&admin.Extensions, "extension", nil, "extensions to make for all tenants; may be repeated")
	f.BoolVar(&admin.TenantDatabases, "tenant-databases", false, "prepare for tenants with a database of their own")
	serverFlags(cmd, &admin.Server)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if a.stop != nil {
			defer a.stop()
		}
		cfg, err := tenancy.FromEnv()
		if err != nil {
			return err
		}
		admin.PrimaryURL, admin.Keys, admin.ServerAdminURL = cfg.PrimaryURL, cfg.Keys, os.Getenv("TENANCY_SERVER_ADMIN_URL")
		if admin.AdminURL, err = setting("TENANCY_ADMIN_URL", "an administrator, postgres://user:password@host:port/database"); err != nil {
			return err
		}
		if admin.Server.URL, err = setting("TENANCY_SERVER_URL", serverURL); err != nil {
			return err
		}
		if err := tenancy.Init(cmd.Context(), admin); err != nil {
			return stopped(cmd.Context(), err)
		}
		primary, err := tenancy.ParseDataSource(admin.PrimaryURL)
		if err != nil {
			return err
		}
		server, err := tenancy.ParseDataSource(admin.Server.URL)
		if err != nil {
			return err
		}
		return a.print(struct {
			Primary placeJSON `json:"primary"`
			Tenants placeJSON `json:"tenants"`
		}{placeJSON{"", primary.Address()}, placeJSON{admin.Server.Name, server.Address()}},
			"the primary at %s and the server %s at %s are set up", primary.Address(), admin.Server.Name, server.Address())
	}
	return cmd
}

func (a *app) keygenCommand() *cobra.Command {
	return &cobra.Command{Use: "keygen [ID]", Short: "Print a new key for TENANCY_KEYS", Args: cobra.MaximumNArgs(1), ValidArgsFunction: cobra.NoFileCompletions,
		Long: "Print a new key for TENANCY_KEYS. It is the one command that prints a secret: keep it where the service's secrets are.",
		RunE: func(_ *cobra.Command, args []string) error {
			id := "main"
			if len(args) > 0 {
				id = args[0]
			}
			key, err := tenancy.NewKey(id)
			if err != nil {
				return err
			}
			return a.print(struct {
				Key string `json:"key"`
			}{key}, "%s", key)
		}}
}

type serverJSON struct {
	Name        string `json:"name"`
	Address     string `json:"address"`
	Weight      int    `json:"weight"`
	Capacity    int    `json:"capacity"`
	Places      int    `json:"places"`
	Tablespace  string `json:"tablespace,omitempty"`
	Pooler      string `json:"pooler,omitempty"`
	Provisioner bool   `json:"provisioner"`
}

func (a *app) serverCommand() *cobra.Command {
	var s tenancy.ServerConfig
	add := &cobra.Command{Use: "add NAME", Short: "Register a server that init has set up, or change its weight, capacity, tablespace and pooler", Args: cobra.ExactArgs(1), ValidArgsFunction: cobra.NoFileCompletions,
		Long: "Register the server of TENANCY_SERVER_URL (" + serverURL + "). One that is registered is known by its address, and its name stays."}
	serverFlags(add, &s)
	add.RunE = a.runs(func(ctx context.Context, open *session, args []string) (err error) {
		s.Name = args[0]
		if s.URL, err = setting("TENANCY_SERVER_URL", serverURL); err != nil {
			return err
		}
		if err := open.c.AddServer(ctx, s); err != nil {
			return err
		}
		d, err := tenancy.ParseDataSource(s.URL)
		if err != nil {
			return err
		}
		return a.print(placeJSON{s.Name, d.Address()}, "the server at %s is registered", d.Address())
	})
	list := &cobra.Command{Use: "list", Short: "List the servers in which tenants live", Args: cobra.NoArgs,
		RunE: a.runs(func(ctx context.Context, open *session, _ []string) error {
			servers, err := open.c.Servers(ctx)
			if err != nil {
				return err
			}
			t := newTable(a.out)
			if !a.json {
				t.row("NAME", "ADDRESS", "WEIGHT", "PLACES", "CAPACITY", "POOLER")
			}
			for _, s := range servers {
				if a.json {
					if err := a.printJSON(serverJSON(s)); err != nil {
						return err
					}
					continue
				}
				capacity := "no limit"
				if s.Capacity > 0 {
					capacity = strconv.Itoa(s.Capacity)
				}
				pooler := s.Pooler
				if !s.Provisioner {
					pooler = fmt.Sprintf("%s (no provisioner is known)", pooler)
				}
				t.row(s.Name, s.Address, strconv.Itoa(s.Weight), strconv.Itoa(s.Places), capacity, pooler)
			}
			return t.end()
		})}
	return group("server", "The servers in which tenants live", add, list)
}
