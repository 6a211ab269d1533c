package tenancycmd

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

// tenantJSON is a tenant in JSON.
type tenantJSON struct {
	ID          tenancy.ID        `json:"id"`
	UID         string            `json:"uid"`
	Name        string            `json:"name"`
	DisplayName string            `json:"display_name"`
	State       tenancy.State     `json:"state"`
	Isolation   tenancy.Isolation `json:"isolation"`
	Dense       bool              `json:"dense"`
}

func asJSON(t tenancy.Tenant) tenantJSON {
	return tenantJSON{t.ID, t.UID.String(), t.Name, t.DisplayName, t.State, t.Isolation, t.Dense}
}

// called is how a tenant is named in a line of text.
func called(t tenancy.Tenant) string {
	if t.Name == "" || strings.HasPrefix(t.Name, "#") { // it was released
		return fmt.Sprintf("tenant #%d", t.ID)
	}
	return fmt.Sprintf("%s (#%d)", clean(t.Name), t.ID)
}

// report prints the tenant as it is now.
func (s *session) report(ctx context.Context, id tenancy.ID, format string, args ...any) error {
	t, err := s.c.Tenant(ctx, id)
	if err != nil {
		return err
	}
	return s.print(asJSON(t), "%s "+format, append([]any{called(t)}, args...)...)
}

func (a *app) createCommand() *cobra.Command {
	var n tenancy.NewTenant
	var admin, isolation string
	cmd := &cobra.Command{Use: "create NAME", Short: "Make a tenant, and wait until it is active", Args: cobra.ExactArgs(1), ValidArgsFunction: cobra.NoFileCompletions,
		Long: "Make a tenant: roles, schema or database, and the service's migrations. The same command again finishes one that was cut off."}
	f := cmd.Flags()
	f.StringVar(&n.DisplayName, "display-name", "", "free text")
	f.StringVar(&admin, "admin", "", "key of the first administrator")
	f.StringArrayVar(&n.Domains, "domain", nil, "host name that stands for the tenant; may be repeated, the first is the primary one")
	f.StringVar(&n.Server, "server", "", "where it lives; default: the server with most room")
	f.StringVar(&isolation, "isolation", "", "schema, database or shared; default: TENANCY_ISOLATION")
	f.IntVar(&n.MaxUsers, "max-users", 0, "members that it may have; 0: no limit")
	cmd.RunE = a.runs(func(ctx context.Context, s *session, args []string) error {
		if only := s.cfg.SingleTenant; only != "" && only != args[0] {
			return usageError{fmt.Sprintf("TENANCY_SINGLE_TENANT is %q: nodes refuse to start beside another tenant", only)}
		}
		n.Name, n.Admin, n.Isolation = args[0], tenancy.UserKey(admin), tenancy.Isolation(isolation)
		t, err := s.c.Create(ctx, n)
		if err != nil {
			return err
		}
		return s.print(asJSON(t), "%s is active", called(t))
	})
	return cmd
}

func (a *app) listCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{Use: "list [PREFIX]", Short: "List the tenants, all but purged ones", Args: cobra.MaximumNArgs(1), ValidArgsFunction: cobra.NoFileCompletions}
	cmd.Flags().StringVar(&state, "state", "", "only those in this state: provisioning, active, suspended, maintenance, deleted, purged")
	cmd.RunE = a.runs(func(ctx context.Context, s *session, args []string) error {
		f := tenancy.Filter{State: tenancy.State(state)}
		switch f.State {
		case "", tenancy.StateProvisioning, tenancy.StateActive, tenancy.StateSuspended, tenancy.StateMaintenance, tenancy.StateDeleted, tenancy.StatePurged:
		default:
			return usageError{fmt.Sprintf("--state: there is no state %q", state)}
		}
		if len(args) > 0 {
			f.Prefix = args[0]
		}
		var t *table
		if !a.json {
			t = newTable(a.out, "ID", "NAME", "STATE", "ISOLATION", "DISPLAY NAME")
		}
		for tenant, err := range s.c.Tenants(ctx, f) {
			if err != nil {
				return err
			}
			if a.json {
				if err := a.printJSON(asJSON(tenant)); err != nil {
					return err
				}
				continue
			}
			isolation := string(tenant.Isolation)
			if tenant.Dense {
				isolation += ", dense"
			}
			t.row(strconv.FormatInt(int64(tenant.ID), 10), tenant.Name, string(tenant.State), isolation, tenant.DisplayName)
		}
		if a.json {
			return nil
		}
		return t.end()
	})
	return cmd
}

// shown is what show prints.
type shown struct {
	tenantJSON
	MaxUsers   int            `json:"max_users"`
	Attributes map[string]any `json:"attributes"`
	Domains    []string       `json:"domains"`
	Address    string         `json:"address"`
	Schema     string         `json:"schema"`
	Login      string         `json:"login"`
	Pooler     string         `json:"pooler,omitempty"`
	Created    time.Time      `json:"created"`
	Updated    time.Time      `json:"updated"`
	PurgeAfter *time.Time     `json:"purge_after,omitempty"`
}

func (a *app) showCommand() *cobra.Command {
	return &cobra.Command{Use: "show NAME", Short: "Show a tenant, and where its data is", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			p, err := s.c.Profile(ctx, t.ID)
			if err != nil {
				return err
			}
			v := shown{tenantJSON: asJSON(t), MaxUsers: p.MaxUsers, Attributes: p.Attributes, Created: p.Created.UTC(), Updated: p.Updated.UTC()}
			until := ""
			if !p.PurgeAfter.IsZero() {
				v.PurgeAfter = new(p.PurgeAfter.UTC())
				until = v.PurgeAfter.Format(time.RFC3339)
			}
			if v.Domains, err = s.domainsOf(ctx, t.ID); err != nil {
				return err
			}
			if t.State != tenancy.StatePurged {
				d, err := s.c.DataSource(ctx, t.ID)
				if err != nil {
					return err
				}
				v.Address, v.Schema, v.Login, v.Pooler = d.Address(), d.Schema, d.User, d.Pooler
			}
			if a.json {
				return a.printJSON(v)
			}
			users := "no limit"
			if v.MaxUsers > 0 {
				users = strconv.Itoa(v.MaxUsers)
			}
			return facts(a.out, "Name", v.Name, "ID", strconv.FormatInt(int64(v.ID), 10), "UID", v.UID, "Display name", v.DisplayName, "State", string(v.State),
				"Isolation", string(v.Isolation), "Dense", strconv.FormatBool(v.Dense), "Max users", users, "Domains", strings.Join(v.Domains, " "),
				"Server", v.Address, "Schema", v.Schema, "Login", v.Login, "Pooler", v.Pooler,
				"Created", v.Created.Format(time.RFC3339), "Updated", v.Updated.Format(time.RFC3339), "Purge after", until)
		})}
}

// verb is a command that does one thing to one tenant.
func (a *app) verb(use, short, done string, do func(ctx context.Context, c *tenancy.Catalog, id tenancy.ID) error, states ...tenancy.State) *cobra.Command {
	return &cobra.Command{Use: use + " NAME", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1, states...),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			if err := do(ctx, s.c, t.ID); err != nil {
				return about(args[0], err)
			}
			return s.report(ctx, t.ID, done)
		})}
}

func (a *app) suspendCommand() *cobra.Command {
	var how tenancy.Suspension
	cmd := a.verb("suspend", "Take a tenant out of service, on every node and at its server", "is out of service", func(ctx context.Context, c *tenancy.Catalog, id tenancy.ID) error {
		return c.Suspend(ctx, id, how)
	}, tenancy.StateActive)
	f := cmd.Flags()
	f.StringVar(&how.Message, "message", "", "what its members are told")
	f.BoolVar(&how.Maintenance, "maintenance", false, "answer 503, try again, and not 403")
	f.DurationVar(&how.RetryAfter, "retry-after", 0, "with --maintenance, when members are told to try again; default 60s")
	f.DurationVar(&how.Drain, "drain", 0, "what work in flight has to finish; default 10s, 1ns: nothing")
	return cmd
}

func (a *app) resumeCommand() *cobra.Command {
	return a.verb("resume", "Take a suspended tenant back into service", "is in service", func(ctx context.Context, c *tenancy.Catalog, id tenancy.ID) error { return c.Resume(ctx, id) },
		tenancy.StateSuspended, tenancy.StateMaintenance)
}

func (a *app) restoreCommand() *cobra.Command {
	var as string
	cmd := a.verb("restore", "Take a deleted tenant back into service", "is in service", func(ctx context.Context, c *tenancy.Catalog, id tenancy.ID) error {
		if as != "" {
			return c.RestoreAs(ctx, id, as)
		}
		return c.Restore(ctx, id)
	}, tenancy.StateDeleted)
	cmd.Flags().StringVar(&as, "as", "", "under another name; one whose name was released needs it")
	return cmd
}

func (a *app) renameCommand() *cobra.Command {
	return &cobra.Command{Use: "rename OLD NEW", Short: "Give a tenant another name; its data and its logins stay", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			if err := s.c.Rename(ctx, t.ID, args[1]); err != nil {
				return err
			}
			return s.report(ctx, t.ID, "was %s", clean(t.Name))
		})}
}

// doomed is what a dry run of delete or purge prints.
type doomed struct {
	Tenant  tenantJSON `json:"tenant"`
	Would   string     `json:"would"`
	Address string     `json:"address"`
	Schema  string     `json:"schema"`
	Login   string     `json:"login"`
	Members int        `json:"members"`
	Domains []string   `json:"domains"`
}

// foretell says what would be done to the tenant.
func (s *session) foretell(ctx context.Context, t tenancy.Tenant, would string) error {
	v := doomed{Tenant: asJSON(t), Would: would}
	d, err := s.c.DataSource(ctx, t.ID)
	if err != nil {
		return err
	}
	v.Address, v.Schema, v.Login = d.Address(), d.Schema, d.User
	for _, err := range s.c.Members(ctx, t.ID) {
		if err != nil {
			return err
		}
		v.Members++
	}
	if v.Domains, err = s.domainsOf(ctx, t.ID); err != nil {
		return err
	}
	if s.json {
		return s.printJSON(v)
	}
	if _, err := fmt.Fprintf(s.out, "Nothing was done. It would %s:\n", would); err != nil {
		return err
	}
	return facts(s.out, "Tenant", called(t), "State", string(t.State), "Server", v.Address, "Schema", v.Schema, "Login", v.Login,
		"Members", strconv.Itoa(v.Members), "Domains", strings.Join(v.Domains, " "))
}

func (a *app) deleteCommand() *cobra.Command {
	var dry, release bool
	cmd := &cobra.Command{Use: "delete NAME", Short: "Take a tenant out of service for good; its data is kept until purge", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		Long: "Take a tenant into quarantine: nobody gets in, and its data, name and domains are kept until purge. Restore takes it back."}
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would be done")
	cmd.Flags().BoolVar(&release, "release-name", false, "free its name and domains for others at once; restore needs --as then")
	cmd.RunE = a.runs(func(ctx context.Context, s *session, args []string) error {
		t, err := s.tenant(ctx, args[0])
		if err != nil {
			return err
		}
		if dry {
			switch t.State {
			case tenancy.StatePurged:
				return about(args[0], tenancy.ErrTenantGone)
			case tenancy.StateProvisioning:
				return about(args[0], tenancy.ErrTenantNotReady)
			}
			would := "end all sessions of the tenant and close its login"
			if release {
				would += ", and free its name and domains"
			}
			return s.foretell(ctx, t, would)
		}
		if err := s.c.Delete(ctx, t.ID); err != nil {
			return about(args[0], err)
		}
		if release {
			if err := s.c.ReleaseName(ctx, t.ID); err != nil {
				return about(args[0], err)
			}
		}
		p, err := s.c.Profile(ctx, t.ID)
		if err != nil {
			return err
		}
		return s.report(ctx, t.ID, "is deleted; its data is kept until purge, which waits until %s", p.PurgeAfter.UTC().Format(time.RFC3339))
	})
	return cmd
}

// purged is what purge prints.
type purged struct {
	ID        tenancy.ID `json:"id"`
	UID       string     `json:"uid"`
	Name      string     `json:"name"`
	Tables    int        `json:"tables"`
	Roles     []string   `json:"roles"`
	Databases []string   `json:"databases"`
	Rows      []rowsJSON `json:"rows"`
	Members   int        `json:"members"`
}

type rowsJSON struct {
	Table string `json:"table"`
	Rows  int64  `json:"rows"`
}

func (a *app) purgeCommand() *cobra.Command {
	var dry, now bool
	var yes string
	cmd := &cobra.Command{Use: "purge NAME", Short: "Drop a deleted tenant's data, for good", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1, tenancy.StateDeleted),
		Long: "Drop a deleted tenant's data, roles, members and domains, for good, when its quarantine is over. The name is asked for on a terminal; elsewhere --yes-purge gives it."}
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would be dropped")
	cmd.Flags().BoolVar(&now, "now", false, "do not wait for the end of the quarantine")
	cmd.Flags().StringVar(&yes, "yes-purge", "", "the tenant's name once more, in place of the question")
	cmd.RunE = a.runs(func(ctx context.Context, s *session, args []string) error {
		t, err := s.tenant(ctx, args[0])
		if err != nil {
			return err
		}
		switch {
		case t.State == tenancy.StatePurged:
			return about(args[0], tenancy.ErrTenantGone)
		case t.State != tenancy.StateDeleted:
			return usageError{fmt.Sprintf("%s is %s: delete it first", called(t), t.State)}
		case dry:
			return s.foretell(ctx, t, "drop all data of the tenant, its roles, members and domains, for good")
		}
		if err := s.confirm(ctx, t, "yes-purge", yes, "All data of %s will be dropped, for good."); err != nil {
			return err
		}
		purge := s.c.Purge
		if now {
			purge = s.c.PurgeNow
		}
		r, err := purge(ctx, t.ID, t.Name)
		if err != nil {
			return err
		}
		v := purged{ID: r.Tenant, UID: r.UID.String(), Name: r.Name, Tables: r.Tables, Roles: append([]string{}, r.Roles...), Databases: append([]string{}, r.Databases...), Members: r.Members, Rows: []rowsJSON{}}
		for _, e := range r.Rows {
			v.Rows = append(v.Rows, rowsJSON(e))
		}
		return a.print(v, "%s is purged: %d relations, %d roles, %d databases, %d members", called(t), v.Tables, len(v.Roles), len(v.Databases), v.Members)
	})
	return cmd
}

// confirm asks for the tenant's name once more before what cannot be taken back, unless a flag has it.
func (s *session) confirm(ctx context.Context, t tenancy.Tenant, flag, typed, what string) error {
	if typed == "" {
		if !isTerminal(s.in) {
			return usageError{fmt.Sprintf("the tenant's name is asked for on a terminal: give it with --%s %s", flag, clean(t.Name))}
		}
		var err error
		if typed, err = s.ask(ctx, fmt.Sprintf(what, called(t))+" Type its name to go on: "); err != nil {
			return err
		}
	}
	if typed != t.Name {
		return usageError{fmt.Sprintf("%q is not the tenant's name: nothing was done", typed)}
	}
	return nil
}

// ask reads one line. The reader is left behind when ctx ends before there is one: the process ends, too.
func (s *session) ask(ctx context.Context, question string) (string, error) {
	s.err.printf("%s", question)
	line, failed := make(chan string, 1), make(chan error, 1)
	go func() {
		text, err := bufio.NewReader(s.in).ReadString('\n')
		if err != nil && (err != io.EOF || text == "") {
			failed <- fmt.Errorf("read the answer: %w", err)
			return
		}
		line <- strings.TrimSpace(text)
	}()
	select {
	case text := <-line:
		return text, nil
	case err := <-failed:
		return "", err
	case <-ctx.Done():
		s.err.printf("\n")
		return "", context.Cause(ctx)
	}
}
