package tenancycmd

import (
	"context"
	"fmt"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

type driftJSON struct {
	TenantID    tenancy.ID       `json:"tenant_id"`
	Name        string           `json:"name"`
	Version     int64            `json:"version"`
	Wants       int64            `json:"wants"`
	Fingerprint string           `json:"fingerprint,omitempty"`
	Differences []differenceJSON `json:"differences"`
	Error       string           `json:"error,omitempty"`
}

type differenceJSON struct {
	Kind   string `json:"kind"`
	Object string `json:"object"`
	Has    string `json:"has"`
	Wants  string `json:"wants"`
}

func (a *app) driftCommand() *cobra.Command {
	var against string
	var check bool
	cmd := &cobra.Command{Use: "drift", Short: "Find schemas that somebody has changed by hand", Args: cobra.NoArgs,
		Long: `Compare the schemas of all tenants with a new one that is made with the service's migrations, and dropped; or, with --against, with those of
one tenant. With --json there is a line for each tenant that was compared.`}
	cmd.Flags().StringVar(&against, "against", "", "the tenant that is the reference")
	cmd.Flags().BoolVar(&check, "check", false, "end with 5 when a tenant differs")
	_ = cmd.RegisterFlagCompletionFunc("against", a.names(-1))
	cmd.RunE = a.runsWith(func() int { return baseConns + 2*verbConns }, func(ctx context.Context, s *session, _ []string) error {
		var reference []tenancy.ID
		if against != "" {
			t, err := s.tenant(ctx, against)
			if err != nil {
				return err
			}
			reference = append(reference, t.ID)
		}
		list, err := s.c.Drift(ctx, reference...)
		if err != nil {
			return err
		}
		var differ, failed int
		for _, d := range list {
			if d.Err != nil {
				failed++
			} else if len(d.Differences) > 0 || d.Version != d.Wants {
				differ++
			}
			if err := s.driftOf(d); err != nil {
				return err
			}
		}
		if !a.json {
			if _, err := fmt.Fprintf(a.out, "%s: %d differ, %d could not be compared\n", tenants(len(list)), differ, failed); err != nil {
				return err
			}
		}
		switch {
		case failed > 0:
			return coded{errSome, fmt.Errorf("%d of %d tenants could not be compared", failed, len(list))}
		case check && differ > 0:
			return coded{errFound, fmt.Errorf("%d of %d tenants differ", differ, len(list))}
		}
		return nil
	})
	return cmd
}

// driftOf prints one tenant: in text only what is not as it should be.
func (s *session) driftOf(d tenancy.Drift) error {
	v := driftJSON{d.Tenant.ID, d.Tenant.Name, d.Version, d.Wants, d.Fingerprint, []differenceJSON{}, text(d.Err)}
	for _, one := range d.Differences {
		v.Differences = append(v.Differences, differenceJSON(one))
	}
	if s.json {
		return s.printJSON(v)
	}
	var lines []string
	switch {
	case d.Err != nil:
		lines = append(lines, "could not be compared: "+oneLine(v.Error))
	case d.Version != d.Wants:
		lines = append(lines, fmt.Sprintf("is at version %d of the migrations, and the reference at %d", d.Version, d.Wants))
	}
	for _, one := range d.Differences {
		lines = append(lines, one.String())
	}
	for _, line := range lines {
		if _, err := fmt.Fprintf(s.out, "%s: %s\n", called(d.Tenant), clean(line)); err != nil {
			return err
		}
	}
	return nil
}
