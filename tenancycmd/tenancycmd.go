// Package tenancycmd is the command line of package tenancy: what an operator does with tenants, their members and their schemas.
//
// The program cmd/tenancy has it with migrations from a directory. A service whose migrations are embedded, or are Go code, builds its own, in a few lines:
//
//	func main() {
//		tenancycmd.Main(tenancycmd.Options{Migrations: migrations, GoMigrations: goMigrations})
//	}
//
// or adds [New] to a command tree that it has. docs/cli.md lists commands, settings and exit codes.
//
// A command opens the library as a service does, as one more node, with few connections, and leaves when it is done: no fence waits for it.
package tenancycmd

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

// Options are what a service's own command line knows. The zero value is that of cmd/tenancy.
type Options struct {
	// Name of the root command. Default: "tenancy".
	Name string
	// Migrations are the service's, as in tenancy.Config. Default: the directory of --migrations or TENANCY_MIGRATIONS.
	Migrations fs.FS
	// GoMigrations are the service's migrations in code. Default: none.
	GoMigrations []tenancy.GoMigration
	// Configure changes the Config that a command opens: what the service sets in code (Extensions, Limits.TenantConns, PoolConfig) must be set here too. What makes a node one that
	// serves (HostURL, NodeAddress, OnlyTenants, SingleTenant, Stock, Store, WrapResolver) is taken out afterwards. Default: nothing is changed.
	Configure func(*tenancy.Config)
}

// app is one run of the command line.
type app struct {
	o       Options
	out     io.Writer
	err     *screen
	in      io.Reader
	lent    *atomic.Bool // the terminal is another program's: an interrupt is for that
	timeout time.Duration
	stop    context.CancelFunc

	json, verbose, byID, mayUpdate bool
	migrations                     string
	conns                          int
}

// New returns the root command. Its commands return errors and print none: [ExitCode] says what the process should end with.
func New(o Options) *cobra.Command { return newApp(o).root() }

func newApp(o Options) *app { return &app{o: o, lent: new(atomic.Bool)} }

// Main runs the command line of the process and exits. The first interrupt, SIGTERM or SIGHUP, cancels the command, which leaves in order; the second one ends the process.
func Main(o Options) {
	ctx, cancel := context.WithCancelCause(context.Background())
	a := newApp(o)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // a reader that has left is an error of a write, and the node leaves in order
	go func() {
		var first time.Time
		for s := range signals {
			switch {
			case a.lent.Load() && s == os.Interrupt:
			case first.IsZero():
				first = time.Now()
				cancel(errInterrupted)
			case time.Since(first) > time.Second/2: // timeout(1) sends one signal twice
				os.Exit(exitInterrupted)
			}
		}
	}()
	os.Exit(a.run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// Run runs one command and returns its exit code. Errors go to stderr, as one line.
func Run(ctx context.Context, o Options, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return newApp(o).run(ctx, args, stdin, stdout, stderr)
}

func (a *app) run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !errors.Is(err, syscall.EPIPE) {
		printError(stderr, root.Name(), err)
	}
	return ExitCode(err)
}

func (a *app) root() *cobra.Command {
	name := a.o.Name
	if name == "" {
		name = "tenancy"
	}
	root := group(name, "Tenants of a service: their life, members, schemas and data",
		a.initCommand(), a.keygenCommand(), a.serverCommand(),
		a.createCommand(), a.adoptCommand(), a.listCommand(), a.showCommand(), a.suspendCommand(), a.resumeCommand(), a.renameCommand(),
		a.deleteCommand(), a.restoreCommand(), a.purgeCommand(),
		a.membersCommand(), a.domainsCommand(),
		a.migrateCommand(), a.schemaCommand(), a.statusCommand(), a.driftCommand(),
		a.execCommand(), a.psqlCommand(), a.exportCommand(), a.rotateCommand(), a.doctorCommand(), a.reconcileCommand(),
	)
	root.Long = rootHelp
	f := root.PersistentFlags()
	f.BoolVar(&a.json, "json", false, "print JSON: one document, or one line for each item of a list")
	f.BoolVar(&a.verbose, "verbose", false, "log what is done, not only what an operator should know")
	f.BoolVar(&a.byID, "id", false, "tenants are given by id, not by name")
	f.DurationVar(&a.timeout, "timeout", 0, "end the command after this time (such as 30s); 0: never")
	f.IntVar(&a.conns, "conns", 0, "connections that the command may have open at one server; 0: what it needs, and never more than a node of the service")
	f.BoolVar(&a.mayUpdate, "update-primary", false, "bring the primary's own schema up to date, where it is older than this release")
	if a.o.Migrations == nil {
		f.StringVar(&a.migrations, "migrations", os.Getenv("TENANCY_MIGRATIONS"), "directory of the service's goose files (TENANCY_MIGRATIONS)")
	}
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return a.begin(cmd) }
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage(cmd, "%v", err) })
	prepare(root)
	return root
}

// begin takes streams and time of a command that is about to run.
func (a *app) begin(cmd *cobra.Command) error {
	a.in, a.out, a.err = cmd.InOrStdin(), cmd.OutOrStdout(), &screen{w: cmd.ErrOrStderr()}
	if a.timeout < 0 {
		return usage(cmd, "--timeout is below 0")
	}
	if a.conns < 0 {
		return usage(cmd, "--conns is below 0")
	}
	if a.timeout > 0 {
		ctx, cancel := context.WithTimeoutCause(cmd.Context(), a.timeout, errTimeout)
		cmd.SetContext(ctx)
		a.stop = cancel
	}
	return nil
}

// prepare makes all commands quiet: who runs the root prints the error, and a failure at run time is not answered with the usage.
func prepare(cmd *cobra.Command) {
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if args := cmd.Args; args != nil {
		cmd.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return usage(cmd, "%v", err)
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		prepare(sub)
	}
}

// group is a command that only has others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 && !cmd.HasParent() {
			return cmd.Help()
		}
		return unknown(cmd, args)
	}
	cmd.AddCommand(subs...)
	return cmd
}
