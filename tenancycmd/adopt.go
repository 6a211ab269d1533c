package tenancycmd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

// planJSON is an adoption that was not done.
type planJSON struct {
	Version   int64         `json:"version"`
	Wants     int64         `json:"wants"`
	Obstacles []findingJSON `json:"obstacles"`
	Warnings  []findingJSON `json:"warnings"`
	Steps     []stepJSON    `json:"steps"`
}

type stepJSON struct {
	What string   `json:"what"`
	SQL  []string `json:"sql"`
}

func (a *app) adoptCommand() *cobra.Command {
	adopt := a.adoptItself()
	adopt.AddCommand(
		a.verb("confirm", "End the time in which an adoption can be taken back", "is confirmed", func(ctx context.Context, c *tenancy.Catalog, id tenancy.ID) error { return c.ConfirmAdoption(ctx, id) }),
		&cobra.Command{Use: "undo NAME", Short: "Give the tables back to the service's login", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
			RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
				t, err := s.tenant(ctx, args[0])
				if err != nil {
					return err
				}
				if err := s.c.Unadopt(ctx, t.ID); err != nil {
					return about(args[0], err)
				}
				return s.report(ctx, t.ID, "was %s: its tables are the service's again", clean(t.Name))
			})},
	)
	return adopt
}

func (a *app) adoptItself() *cobra.Command {
	var n tenancy.Adoption
	var admin string
	var dry bool
	cmd := &cobra.Command{Use: "adopt NAME", Short: "Make the tables of a service that has had one customer a tenant's", Args: cobra.ExactArgs(1), ValidArgsFunction: cobra.NoFileCompletions,
		Long: `Make the schema of a service that has had one customer the schema of a tenant: no row moves, the service's login is closed and its sessions end. The same
command again finishes one that was cut off. Until 'adopt confirm', 'adopt undo' takes it back. See docs/adoption.md, and --dry-run first.`}
	f := cmd.Flags()
	f.StringVar(&n.Login, "login", "", "the service's login, which owns the tables; required")
	f.StringVar(&n.Schema, "schema", "", "where the tables are; default public")
	f.StringVar(&n.Server, "server", "", "the server whose database has them; default: the only one")
	f.StringVar(&n.DisplayName, "display-name", "", "free text")
	f.StringVar(&admin, "admin", "", "key of the first administrator")
	f.StringArrayVar(&n.Domains, "domain", nil, "host name that stands for the tenant; may be repeated, the first is the primary one")
	f.IntVar(&n.MaxUsers, "max-users", 0, "members that it may have; 0: no limit")
	f.BoolVar(&dry, "dry-run", false, "only show the plan, and what stands in its way, which ends with 5")
	cmd.RunE = a.runs(func(ctx context.Context, s *session, args []string) error {
		n.Name, n.Admin = args[0], tenancy.UserKey(admin)
		if dry {
			plan, err := s.c.PlanAdoption(ctx, n)
			if err != nil {
				return err
			}
			return s.plan(plan)
		}
		t, err := s.c.Adopt(ctx, n)
		if err != nil {
			return err
		}
		return s.print(asJSON(t), "%s is active; 'adopt undo' takes it back until 'adopt confirm'", called(t))
	})
	return cmd
}

func (s *session) plan(p tenancy.AdoptionPlan) error {
	if s.json {
		v := planJSON{Version: p.Version, Wants: p.Wants, Obstacles: findingsJSON(p.Obstacles), Warnings: findingsJSON(p.Warnings), Steps: []stepJSON{}}
		for _, step := range p.Steps {
			v.Steps = append(v.Steps, stepJSON{step.What, append([]string{}, step.SQL...)})
		}
		if err := s.printJSON(v); err != nil {
			return err
		}
	} else {
		for line := range strings.Lines(p.String()) {
			if _, err := fmt.Fprintln(s.out, indented(line)); err != nil {
				return err
			}
		}
		if _, err := fmt.Fprintln(s.out, "Nothing was done."); err != nil {
			return err
		}
	}
	if len(p.Obstacles) > 0 {
		return coded{errFound, errors.New("something stands in the way of the adoption")}
	}
	return nil
}

// indented is clean for a line that may begin with a tab.
func indented(line string) string {
	rest, found := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "\t")
	if found {
		return "    " + clean(rest)
	}
	return clean(rest)
}
