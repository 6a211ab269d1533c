package tenancycmd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

func (a *app) psqlCommand() *cobra.Command {
	return &cobra.Command{Use: "psql NAME [-- ARGUMENT...]", Short: "Start psql with a tenant's login", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.names(1),
		Long: `Start psql with the tenant's own login: it reaches what the tenant's calls reach, and nothing else. The password is in the environment of psql alone. What
follows -- is given to psql. The audit trail of the primary has that the login was asked for.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			program, err := exec.LookPath("psql")
			if err != nil {
				return fmt.Errorf("psql is not on the PATH: install the client of PostgreSQL: %w", err)
			}
			var env []string
			if err := a.runs(func(ctx context.Context, s *session, args []string) error {
				t, err := s.tenant(ctx, args[0])
				if err != nil {
					return err
				}
				d, err := s.c.Login(ctx, t.ID)
				if err != nil {
					return about(args[0], err)
				}
				env = clientEnv(os.Environ(), d, s.cfg)
				return nil
			})(cmd, args); err != nil {
				return err
			}
			// The node has left the primary before psql starts: nobody waits for it while somebody types.
			c := exec.Command(program, append([]string{"--no-password"}, args[1:]...)...)
			c.Env, c.Stdin, c.Stdout, c.Stderr = env, a.in, a.out, a.err.w
			a.lent.Store(true)
			defer a.lent.Store(false)
			err = c.Run()
			if exit, ok := errors.AsType[*exec.ExitError](err); ok {
				return fmt.Errorf("psql ended with %d", exit.ExitCode())
			}
			return err
		}}
}

// clientEnv is the environment of a client of PostgreSQL that is to be in one place only: nothing that leads elsewhere is left, nor what the service's own secrets are in.
func clientEnv(from []string, d tenancy.DataSource, cfg tenancy.Config) []string {
	var env []string
	roots := ""
	for _, v := range from {
		name, value, _ := strings.Cut(v, "=")
		if name == "PGSSLROOTCERT" {
			roots = value
		}
		if !strings.HasPrefix(name, "TENANCY_") && !strings.HasPrefix(name, "PG") {
			env = append(env, v)
		}
	}
	path := `"` + d.Schema + `"`
	if cfg.Extensions {
		path += `,"tenancy_ext"`
	}
	if cfg.ReferenceTables {
		path += `,"tenancy_ref"`
	}
	mode := d.TLS
	if mode == "" { // as DataSource.TLS says
		mode = "verify-full"
		if ip, err := netip.ParseAddr(d.Host); strings.EqualFold(d.Host, "localhost") || err == nil && ip.Unmap().IsLoopback() {
			mode = "disable"
		}
	}
	if strings.HasPrefix(mode, "verify") {
		env = append(env, "PGSSLROOTCERT="+cmp.Or(roots, "system"))
	}
	return append(env, "PGHOST="+d.Host, "PGPORT="+strconv.Itoa(int(d.Port)), "PGDATABASE="+d.Database, "PGUSER="+d.User, "PGPASSWORD="+d.Password.Reveal(),
		"PGSSLMODE="+mode, "PGAPPNAME=tenancy psql", "PGCLIENTENCODING=UTF8", "PGOPTIONS=-c search_path="+path)
}
