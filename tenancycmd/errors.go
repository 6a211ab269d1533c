package tenancycmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

// What a process ends with.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitSome        = 3
	exitNotFound    = 4
	exitFound       = 5
	exitUnavailable = 6
	exitInterrupted = 130
)

const rootHelp = `Tenants of a service: their life, members, schemas and data.

A tenant is named by its name, or by its id as '#12' or with --id. Settings come from the service's environment (TENANCY_PRIMARY_URL, TENANCY_KEYS
and the others), flags stand above them; passwords and keys are read from the environment alone.

Exit codes:
  0    done
  1    failed
  2    wrong usage, or a value that was refused
  3    one tenant or more of a run failed (migrate, exec, drift); the others are done
  4    no such tenant
  5    with --check: something is behind, dirty or drifted; doctor: there is a finding of --fail-on; adopt --dry-run: something stands in the way
  6    the primary database is unavailable
  130  interrupted`

var (
	errInterrupted = errors.New("interrupted")
	errTimeout     = errors.New("the time of --timeout is over")
	errSome        = errors.New("tenants failed")
	errFound       = errors.New("found")
)

// usageError is a command that was not understood.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

// coded is an error whose class decides what the process ends with.
type coded struct{ class, err error }

func (e coded) Error() string   { return text(e.err) }
func (e coded) Unwrap() []error { return []error{e.class, e.err} }

func usage(cmd *cobra.Command, format string, args ...any) error {
	return usageError{fmt.Sprintf(format, args...) + "; see '" + cmd.CommandPath() + " --help'"}
}

// unknown refuses what is no command of the group.
func unknown(cmd *cobra.Command, args []string) error {
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	if len(args) == 0 {
		return usage(cmd, "say what: %s", strings.Join(names, ", "))
	}
	if !cmd.HasParent() {
		return usage(cmd, "no command %q", args[0])
	}
	return usage(cmd, "no command %q here, there are %s", args[0], strings.Join(names, ", "))
}

// ExitCode returns what a process should end with after a command's error: 0 for nil, and else as the help of the root command lists them.
func ExitCode(err error) int {
	var wrong usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errInterrupted):
		return exitInterrupted
	case errors.Is(err, errTimeout):
		return exitFailed
	case errors.As(err, &wrong):
		return exitUsage
	case errors.Is(err, errSome):
		return exitSome
	case errors.Is(err, errFound):
		return exitFound
	case errors.Is(err, tenancy.ErrPrimaryUnavailable):
		return exitUnavailable
	case errors.Is(err, tenancy.ErrTenantNotFound):
		return exitNotFound
	case errors.Is(err, tenancy.ErrInvalid):
		return exitUsage
	}
	return exitFailed
}

// stopped puts the reason of an end from outside before what it led to.
func stopped(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if end, bounded := ctx.Deadline(); bounded && cause == nil && !time.Now().Before(end) {
		cause = errTimeout // a dialer's clock was first
	}
	if err != nil && (errors.Is(cause, errInterrupted) || errors.Is(cause, errTimeout)) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// printError writes the error as one line, with what to do where the library cannot know it.
func printError(w io.Writer, name string, err error) {
	text := strings.ReplaceAll(text(err), ": tenancy: ", ": ")
	for _, h := range []struct {
		of   error
		hint string
	}{
		{tenancy.ErrNoMigrations, "name their directory with --migrations or TENANCY_MIGRATIONS"},
		{tenancy.ErrWrongKey, "give the command the service's TENANCY_KEYS"},
		{tenancy.ErrTenantNotFound, "'list' shows the tenants"},
		{tenancy.ErrPrimaryUnavailable, "TENANCY_PRIMARY_URL says where it is"},
		{tenancy.ErrInProgress, "try again later"},
		{tenancy.ErrBusy, "try again later"},
	} {
		if errors.Is(err, h.of) {
			text += "; " + h.hint
		}
	}
	if strings.Contains(text, "Config.CheckPrimaryOnly") {
		text += "; a node of this release does it when it starts, and so does any command with --update-primary"
	}
	_, _ = fmt.Fprintf(w, "%s: %s\n", name, oneLine(text))
}

// oneLine joins lines, and shows what must not reach a terminal.
func oneLine(text string) string {
	fields := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' || r == '\t' })
	for i := range fields {
		fields[i] = strings.TrimSpace(fields[i])
	}
	return clean(strings.Join(fields, " | "))
}
