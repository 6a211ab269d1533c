package tenancycmd

import (
	"context"
	"fmt"
	"strconv"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

type memberJSON struct {
	TenantID tenancy.ID      `json:"tenant_id"`
	User     tenancy.UserKey `json:"user"`
	Role     tenancy.Role    `json:"role"`
	Source   string          `json:"source"`
	Default  bool            `json:"default"`
}

func (a *app) membersCommand() *cobra.Command {
	var role, source string
	var first bool
	add := &cobra.Command{Use: "add NAME USER", Short: "Let a user into a tenant, or change the role of one who is in", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			m := tenancy.Membership{User: tenancy.UserKey(args[1]), Tenant: t.ID, Role: tenancy.Role(role), Source: source, Default: first}
			if err := s.c.AddMember(ctx, m); err != nil {
				return err
			}
			return s.print(memberJSON{t.ID, m.User, m.Role, m.Source, m.Default}, "%s is in %s as %s", clean(args[1]), called(t), clean(role))
		})}
	add.Flags().StringVar(&role, "role", string(tenancy.RoleMember), "member or admin")
	add.Flags().StringVar(&source, "source", "", "the directory that says so, such as ldap; default: by hand")
	add.Flags().BoolVar(&first, "default", false, "the tenant for requests of the user that name none")

	remove := &cobra.Command{Use: "remove NAME USER", Short: "Take a user out of a tenant; one who is not in is no error", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			if err := s.c.RemoveMember(ctx, t.ID, tenancy.UserKey(args[1])); err != nil {
				return err
			}
			return s.print(struct {
				TenantID tenancy.ID `json:"tenant_id"`
				User     string     `json:"user"`
				Removed  bool       `json:"removed"`
			}{t.ID, args[1], true}, "%s is not in %s", clean(args[1]), called(t))
		})}

	list := &cobra.Command{Use: "list NAME", Short: "List a tenant's members", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			rows := newTable(a.out)
			if !a.json {
				rows.row("USER", "ROLE", "SOURCE", "DEFAULT")
			}
			for m, err := range s.c.Members(ctx, t.ID) {
				if err != nil {
					return err
				}
				if !a.json {
					rows.row(string(m.User), string(m.Role), m.Source, strconv.FormatBool(m.Default))
				} else if err := a.printJSON(memberJSON{m.Tenant, m.User, m.Role, m.Source, m.Default}); err != nil {
					return err
				}
			}
			return rows.end()
		})}
	return group("members", "Who belongs to a tenant", add, remove, list)
}

type domainsJSON struct {
	TenantID tenancy.ID `json:"tenant_id"`
	Domains  []string   `json:"domains"` // the primary one first
}

// domainsOf returns the tenant's domains; never nil, which JSON would have as null.
func (s *session) domainsOf(ctx context.Context, id tenancy.ID) ([]string, error) {
	list, err := s.c.Domains(ctx, id)
	if list == nil {
		list = []string{}
	}
	return list, err
}

// reportDomains prints what domains the tenant has now.
func (s *session) reportDomains(ctx context.Context, t tenancy.Tenant) error {
	list, err := s.domainsOf(ctx, t.ID)
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(domainsJSON{t.ID, list})
	}
	rows := newTable(s.out, "DOMAIN", "PRIMARY")
	for i, d := range list {
		rows.row(d, strconv.FormatBool(i == 0))
	}
	return rows.end()
}

func (a *app) domainsCommand() *cobra.Command {
	var first bool
	add := &cobra.Command{Use: "add NAME DOMAIN", Short: "Let a host name stand for a tenant", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			if err := s.c.AddDomain(ctx, t.ID, args[1]); err != nil {
				return err
			}
			if first {
				if err := s.c.SetPrimaryDomain(ctx, t.ID, args[1]); err != nil {
					return err
				}
			}
			return s.reportDomains(ctx, t)
		})}
	add.Flags().BoolVar(&first, "primary", false, "make it the primary one")

	remove := &cobra.Command{Use: "remove NAME DOMAIN", Short: "Free a host name of the tenant's", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			has, err := s.c.TenantByDomain(ctx, args[1])
			if err != nil {
				return about(args[1], err)
			}
			if has.ID != t.ID {
				return usageError{fmt.Sprintf("%s belongs to %s: nothing was done", clean(args[1]), called(has))}
			}
			if err := s.c.RemoveDomain(ctx, args[1]); err != nil {
				return err
			}
			return s.reportDomains(ctx, t)
		})}

	list := &cobra.Command{Use: "list NAME", Short: "List a tenant's host names, the primary one first", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			return s.reportDomains(ctx, t)
		})}
	return group("domains", "The host names that stand for a tenant", add, remove, list)
}
