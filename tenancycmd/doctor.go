package tenancycmd

import (
	"context"
	"errors"
	"fmt"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

type findingJSON struct {
	Check    string     `json:"check"`
	Level    string     `json:"level"` // ok, note, warning or failure
	TenantID tenancy.ID `json:"tenant_id,omitempty"`
	Name     string     `json:"name,omitempty"`
	Server   string     `json:"server,omitempty"`
	What     string     `json:"what"`
	Why      string     `json:"why,omitempty"`
	Mend     string     `json:"mend,omitempty"`
}

func findingsJSON(list []tenancy.Finding) []findingJSON {
	some := make([]findingJSON, len(list))
	for i, f := range list {
		some[i] = findingJSON{f.Check, f.Level.String(), f.Tenant.ID, f.Tenant.Name, f.Server, f.What, f.Why, f.Mend}
	}
	return some
}

func (a *app) doctorCommand() *cobra.Command {
	var failOn string
	var all bool
	cmd := &cobra.Command{Use: "doctor", Short: "Look for what is wrong, and say what mends it", Args: cobra.NoArgs,
		Long: "Look at the primary, at each server and at the walls between tenants, and say what is wrong, why it matters and what mends it. It only reads. It judges by the service's own limits (TENANCY_SERVER_CONNS, TENANCY_NODES), and --conns changes nothing. With --json there is a line for each finding."}
	cmd.Flags().StringVar(&failOn, "fail-on", "failure", "end with 5 at this level or a worse one: note, warning, failure")
	cmd.Flags().BoolVar(&all, "all", false, "show the checks that have found nothing, too")
	look := a.runsWith(func() int { return wholeConns }, func(ctx context.Context, s *session, _ []string) error {
		findings, err := s.tn.Doctor(ctx)
		if err != nil {
			return err
		}
		return a.diagnose(findings, failOn, all)
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		err := look(cmd, args)
		if e, refused := errors.AsType[*tenancy.SetupError](err); refused { // no node starts either
			return a.diagnose(e.Missing, failOn, all)
		}
		return err
	}
	return cmd
}

// diagnose prints the findings, and is an error where one is as bad as failOn.
func (a *app) diagnose(findings []tenancy.Finding, failOn string, all bool) error {
	worst := map[string]tenancy.Level{"note": tenancy.LevelNote, "warning": tenancy.LevelWarning, "failure": tenancy.LevelFailure}[failOn]
	if worst == tenancy.LevelOK {
		return usageError{fmt.Sprintf("--fail-on: there is no level %q", failOn)}
	}
	bad, checks := 0, map[string]bool{}
	for i, f := range findings {
		checks[f.Check] = true
		if f.Level >= worst {
			bad++
		}
		if a.json {
			if err := a.printJSON(findingsJSON(findings)[i]); err != nil {
				return err
			}
		} else if f.Level > tenancy.LevelOK || all {
			if err := a.printFinding(f); err != nil {
				return err
			}
		}
	}
	if !a.json {
		if _, err := fmt.Fprintf(a.out, "%d checks, %d findings at level %s or worse\n", len(checks), bad, failOn); err != nil {
			return err
		}
	}
	if bad > 0 {
		return coded{errFound, fmt.Errorf("%d findings at level %s or worse", bad, failOn)}
	}
	return nil
}

func (a *app) reconcileCommand() *cobra.Command {
	return &cobra.Command{Use: "reconcile", Short: "Finish what a process that died has left, as the validity job does", Args: cobra.NoArgs,
		Long: "Run the validity job at once: creations, fences, rotations, moves and purges that were cut off more than a minute ago are finished, a bounded number of each, and places that nobody finishes are dropped.",
		RunE: a.runs(func(ctx context.Context, s *session, _ []string) error {
			if err := s.tn.Refresh(ctx); err != nil {
				return err
			}
			return a.print(struct {
				Done bool `json:"done"`
			}{true}, "one run of the validity job is done")
		})}
}

func (a *app) printFinding(f tenancy.Finding) error {
	where := ""
	if f.Server != "" {
		where += ", server " + clean(f.Server)
	}
	if f.Tenant.ID != 0 {
		where += ", " + called(f.Tenant)
	}
	text := fmt.Sprintf("%s: %s%s: %s\n", f.Level, clean(f.Check), where, oneLine(f.What))
	if f.Why != "" {
		text += "    why:  " + oneLine(f.Why) + "\n"
	}
	if f.Mend != "" {
		text += "    mend: " + oneLine(f.Mend) + "\n"
	}
	_, err := fmt.Fprint(a.out, text)
	return err
}
