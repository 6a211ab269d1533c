package tenancycmd

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

// What a command needs of a server's budget: the library's own pools with the smallest primary pool, cancel requests, and one verb with a tenant beside it.
const (
	baseConns    = 16
	verbConns    = 5
	primaryConns = 3
	// wholeConns is that of a node, as the service has it: Doctor judges by the limits that it is opened with, and a budget is a bound and opens nothing.
	wholeConns = -1
)

// session is a command at work on an open primary.
type session struct {
	*app
	tn  *tenancy.Tenancy
	cfg tenancy.Config
	c   *tenancy.Catalog
	m   *tenancy.Migrator
}

// runs returns a RunE that opens the primary, runs fn and leaves.
func (a *app) runs(fn func(ctx context.Context, s *session, args []string) error) func(*cobra.Command, []string) error {
	return a.runsWith(func() int { return baseConns }, fn)
}

// runsWith is runs for a command that needs more connections than one verb does.
func (a *app) runsWith(conns func() int, fn func(ctx context.Context, s *session, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if a.stop != nil {
			defer a.stop()
		}
		ctx := cmd.Context()
		s, err := a.open(ctx, conns(), a.logger())
		if err != nil {
			return stopped(ctx, err)
		}
		err = fn(ctx, s, args)
		if closed := s.tn.Close(); err == nil {
			err = closed
		}
		return stopped(ctx, err)
	}
}

func (a *app) logger() *slog.Logger {
	level := slog.LevelWarn
	if a.verbose {
		level = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
}

// config is what the environment and the flags say. It is that of a node that serves nobody.
func (a *app) config(need int, log *slog.Logger) (tenancy.Config, error) {
	cfg, err := tenancy.FromEnv()
	if err != nil {
		return cfg, err
	}
	cfg.Migrations, cfg.GoMigrations = a.o.Migrations, a.o.GoMigrations
	if a.migrations != "" {
		if info, err := os.Stat(a.migrations); err != nil || !info.IsDir() {
			return cfg, usageError{fmt.Sprintf("--migrations (TENANCY_MIGRATIONS): %q is no directory", a.migrations)}
		}
		cfg.Migrations = os.DirFS(a.migrations)
	}
	if a.o.Configure != nil {
		a.o.Configure(&cfg)
	}
	cfg.HostURL, cfg.NodeAddress, cfg.OnlyTenants, cfg.Stock, cfg.Store, cfg.WrapResolver = "", "", nil, 0, nil, nil
	cfg.CheckPrimaryOnly, cfg.Logger = !a.mayUpdate, log
	l := &cfg.Limits
	l.PrimaryConns = primaryConns
	if need == wholeConns {
		return cfg, nil
	}
	nodes := cmp.Or(l.Nodes, 1)
	share := cmp.Or(l.ServerConns, 80) / nodes
	l.ServerConns = min(share, cmp.Or(a.conns, need)) * nodes
	return cfg, nil
}

func (a *app) open(ctx context.Context, need int, log *slog.Logger) (*session, error) {
	cfg, err := a.config(need, log)
	if err != nil {
		return nil, err
	}
	opened := cfg
	opened.SingleTenant = "" // Open would make it
	tn, err := tenancy.Open(ctx, opened)
	if err != nil {
		return nil, err
	}
	return &session{app: a, tn: tn, cfg: cfg, c: tn.Catalog(), m: tn.Migrator()}, nil
}

// tenant finds the tenant that an argument names.
func (s *session) tenant(ctx context.Context, arg string) (tenancy.Tenant, error) {
	digits, id := strings.CutPrefix(arg, "#")
	if !id && !s.byID {
		t, err := s.c.TenantByName(ctx, arg)
		return t, about(arg, err)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 1 {
		return tenancy.Tenant{}, usageError{fmt.Sprintf("%q is no tenant's id: a number above 0", arg)}
	}
	t, err := s.c.Tenant(ctx, tenancy.ID(n))
	return t, about(arg, err)
}

// about names the argument in an error that would not.
func about(arg string, err error) error {
	if err == nil || strings.Contains(err.Error(), arg) {
		return err
	}
	return fmt.Errorf("%s: %w", arg, err)
}

func (s *session) tenants(ctx context.Context, args []string) (ids []tenancy.ID, err error) {
	for _, arg := range args {
		t, err := s.tenant(ctx, arg)
		if err != nil {
			return nil, err
		}
		ids = append(ids, t.ID)
	}
	return ids, nil
}

// completeTimeout is how long a shell waits for names.
const completeTimeout = 2 * time.Second

// names completes the names of tenants, in the first positions arguments.
func (a *app) names(positions int, states ...tenancy.State) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if positions >= 0 && len(args) >= positions || a.byID {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, completeTimeout)
		defer cancel()
		s, err := a.open(ctx, baseConns, slog.New(slog.NewTextHandler(io.Discard, nil)))
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer s.tn.Close()
		var found []cobra.Completion
		if len(states) == 0 {
			states = []tenancy.State{""}
		}
		for _, state := range states {
			for t, err := range s.c.Tenants(ctx, tenancy.Filter{State: state, Prefix: prefix}) {
				if err != nil || len(found) == 1000 {
					break
				}
				found = append(found, t.Name)
			}
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}
