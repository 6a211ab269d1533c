package tenancycmd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

type migrationJSON struct {
	Version       int64  `json:"version"`
	File          string `json:"file,omitempty"`
	NoTransaction bool   `json:"no_transaction"`
}

type migratedJSON struct {
	TenantID tenancy.ID        `json:"tenant_id"`
	Name     string            `json:"name"`
	Version  int64             `json:"version"`
	Applied  []int64           `json:"applied,omitempty"`
	Reverted int64             `json:"reverted,omitempty"`
	Pending  []migrationJSON   `json:"pending,omitempty"`
	Drift    *versionDriftJSON `json:"version_drift,omitempty"`
	NotBegun bool              `json:"not_begun,omitempty"`
	Error    string            `json:"error,omitempty"`
}

type versionDriftJSON struct {
	TenantID tenancy.ID `json:"tenant_id"`
	Name     string     `json:"name"`
	Recorded int64      `json:"recorded"`
	Actual   int64      `json:"actual"`
	Missing  []int64    `json:"missing,omitempty"`
	Error    string     `json:"error,omitempty"`
}

// runJSON is what migrate prints.
type runJSON struct {
	DryRun   bool           `json:"dry_run"`
	Migrated int            `json:"migrated"`
	UpToDate int            `json:"up_to_date"` // there was nothing to do
	Pending  int            `json:"pending"`    // of a dry run
	Failed   int            `json:"failed"`
	NotBegun int            `json:"not_begun"`
	Tenants  []migratedJSON `json:"tenants"`
}

func migratedOf(m tenancy.Migrated) migratedJSON {
	v := migratedJSON{TenantID: m.Tenant.ID, Name: m.Tenant.Name, Version: m.Version, Applied: m.Applied, Reverted: m.Reverted, NotBegun: errors.Is(m.Err, tenancy.ErrNotBegun), Error: text(m.Err)}
	for _, p := range m.Pending {
		v.Pending = append(v.Pending, migrationJSON{p.Version, p.File, p.NoTransaction})
	}
	if m.Drift != nil {
		d := driftedOf(*m.Drift)
		v.Drift = &d
	}
	return v
}

func driftedOf(d tenancy.VersionDrift) versionDriftJSON {
	return versionDriftJSON{d.Tenant.ID, d.Tenant.Name, d.Recorded, d.Actual, d.Missing, text(d.Err)}
}

// text is an error's, "" for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(err.Error(), "tenancy: ")
}

func (a *app) migrateCommand() *cobra.Command {
	var o tenancy.MigrateOptions
	var all bool
	var canary []string
	cmd := &cobra.Command{Use: "migrate {NAME... | --all}", Short: "Bring tenants' schemas to the service's version", Args: cobra.ArbitraryArgs, ValidArgsFunction: a.names(-1),
		Long: `Bring tenants' schemas to the service's version, several at a time. A tenant that fails does not stop the others; called again it goes on with
what is left. Tenants that are pinned go no further than that.`}
	f := cmd.Flags()
	f.BoolVar(&all, "all", false, "all tenants that were made and are not deleted")
	f.IntVar(&o.Parallel, "parallel", 0, "tenants at once; default: as a node of the service")
	f.StringSliceVar(&canary, "canary", nil, "tenants that are migrated first; unless all of them succeed, no other is begun")
	f.IntVar(&o.CanaryPercent, "canary-percent", 0, "take the first of those with something to do for that, in percent")
	f.IntVar(&o.StopAfter, "stop-after", 0, "failures after which no tenant is begun any more; 0: never")
	f.Int64Var(&o.UpTo, "up-to", 0, "version to stop at; default: the newest")
	f.DurationVar(&o.LockPatience, "lock-patience", 0, "how long a tenant's migration tries to get its locks; default 30s")
	f.BoolVar(&o.DryRun, "dry-run", false, "only say what would be applied")
	f.BoolVar(&o.Verify, "verify", false, "ask the schemas themselves for their versions first, not the catalog alone")
	_ = cmd.RegisterFlagCompletionFunc("canary", a.names(-1))
	conns := func() int { return baseConns + verbConns*max(1, o.Parallel) }
	run := a.runsWith(conns, func(ctx context.Context, s *session, args []string) (err error) {
		if o.Tenants, err = s.tenants(ctx, args); err != nil {
			return err
		}
		if o.Canary, err = s.tenants(ctx, canary); err != nil {
			return err
		}
		p := &progress{s: s}
		o.Progress = p.tell
		results, err := s.m.Run(ctx, o)
		p.end()
		return s.ran(o, results, err)
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if all == (len(args) > 0) {
			return usage(cmd, "name the tenants, or give --all")
		}
		return run(cmd, args)
	}
	return cmd
}

// schemaCommand has what is done to one tenant's versions. It is no part of migrate, whose arguments are names of tenants.
func (a *app) schemaCommand() *cobra.Command {
	return group("schema", "Versions of one tenant's schema", a.downCommand(), a.resolveCommand(), a.pinCommand(), a.unpinCommand())
}

// ran prints what a run has done.
func (s *session) ran(o tenancy.MigrateOptions, results []tenancy.Migrated, err error) error {
	var failures *tenancy.MigrateError
	if err != nil && !errors.As(err, &failures) {
		return err
	}
	v := runJSON{DryRun: o.DryRun, Tenants: []migratedJSON{}}
	for _, m := range results {
		v.Tenants = append(v.Tenants, migratedOf(m))
		switch {
		case errors.Is(m.Err, tenancy.ErrNotBegun):
			v.NotBegun++
		case m.Err != nil:
			v.Failed++
		case len(m.Pending) > 0:
			v.Pending++
		case len(m.Applied) > 0:
			v.Migrated++
		default:
			v.UpToDate++
		}
	}
	if s.json {
		if err := s.printJSON(v); err != nil {
			return err
		}
	} else if err := s.ranText(v); err != nil {
		return err
	}
	if failures != nil {
		return coded{errSome, failures}
	}
	return nil
}

func (s *session) ranText(v runJSON) error {
	t := newTable(s.out)
	head := false
	for _, m := range v.Tenants {
		var what string
		switch {
		case m.NotBegun: // it can be thousands: their number is told
			continue
		case m.Error != "":
			what = "failed: " + oneLine(m.Error)
		case len(m.Pending) > 0:
			var files []string
			for _, p := range m.Pending {
				name := cmp.Or(p.File, strconv.FormatInt(p.Version, 10)+" (code)")
				if p.NoTransaction {
					name += " (no transaction)"
				}
				files = append(files, name)
			}
			what = "would apply " + strings.Join(files, ", ")
		case m.Drift != nil:
			what = fmt.Sprintf("was at %d, recorded as %d", m.Drift.Actual, m.Drift.Recorded)
		default:
			continue
		}
		if !head {
			t.row("TENANT", "VERSION", "RESULT")
			head = true
		}
		t.row(fmt.Sprintf("%s (#%d)", m.Name, m.TenantID), strconv.FormatInt(m.Version, 10), what)
	}
	if err := t.end(); err != nil {
		return err
	}
	parts := []string{fmt.Sprintf("%d migrated", v.Migrated)}
	if v.DryRun {
		parts = []string{fmt.Sprintf("%d would be migrated", v.Pending)}
	}
	parts = append(parts, fmt.Sprintf("%d had nothing to do", v.UpToDate), fmt.Sprintf("%d failed", v.Failed))
	if v.NotBegun > 0 {
		parts = append(parts, fmt.Sprintf("%d were not begun", v.NotBegun))
	}
	_, err := fmt.Fprintf(s.out, "%s: %s\n", tenants(len(v.Tenants)), strings.Join(parts, ", "))
	return err
}

func (a *app) downCommand() *cobra.Command {
	var yes string
	cmd := &cobra.Command{Use: "down NAME", Short: "Take one tenant's newest migration back", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		Long: `Take one tenant's newest migration back, by its Down, with all that this drops. The next run applies it again, unless the tenant is pinned before.
The name is asked for on a terminal; elsewhere --yes-down gives it.`}
	cmd.Flags().StringVar(&yes, "yes-down", "", "the tenant's name once more, in place of the question")
	cmd.RunE = a.runsWith(migrates, func(ctx context.Context, s *session, args []string) error {
		t, err := s.tenant(ctx, args[0])
		if err != nil {
			return err
		}
		if err := s.confirm(ctx, t, "yes-down", yes, "The newest migration of %s will be taken back, with the data that its Down drops."); err != nil {
			return err
		}
		m, err := s.m.Down(ctx, t.ID)
		if err != nil {
			return err
		}
		return s.print(migratedOf(m), "%s is at version %d, without %d", called(t), m.Version, m.Reverted)
	})
	return cmd
}

// migrates is what a command needs that migrates one tenant.
func migrates() int { return baseConns + verbConns }

// version reads an argument.
func version(cmd *cobra.Command, arg string) (int64, error) {
	v, err := strconv.ParseInt(arg, 10, 64)
	if err != nil || v < 1 {
		return 0, usage(cmd, "%q is no version: a number above 0", arg)
	}
	return v, nil
}

type versionedJSON struct {
	TenantID tenancy.ID `json:"tenant_id"`
	Name     string     `json:"name"`
	Version  int64      `json:"version"`
	What     string     `json:"what"` // applied, undone, pinned or unpinned
}

func (a *app) resolveCommand() *cobra.Command {
	var applied, undone bool
	var v int64
	cmd := &cobra.Command{Use: "resolve NAME VERSION {--applied | --undone}", Short: "Say what became of a migration that died half-way", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		Long: `End what a migration without a transaction has left when it died half-way. Somebody has finished it by hand (--applied), or has undone what there
was of it (--undone): then the next run applies it from its beginning. It is believed, and nothing is done to the tables.`}
	cmd.Flags().BoolVar(&applied, "applied", false, "it was finished by hand")
	cmd.Flags().BoolVar(&undone, "undone", false, "what there was of it was undone")
	run := a.runsWith(migrates, func(ctx context.Context, s *session, args []string) error {
		t, err := s.tenant(ctx, args[0])
		if err != nil {
			return err
		}
		if err := s.m.Resolve(ctx, t.ID, v, applied); err != nil {
			return err
		}
		what := "undone"
		if applied {
			what = "applied"
		}
		return s.print(versionedJSON{t.ID, t.Name, v, what}, "%s: migration %d counts as %s", called(t), v, what)
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if applied == undone {
			return usage(cmd, "give --applied or --undone")
		}
		if v, err = version(cmd, args[1]); err != nil {
			return err
		}
		return run(cmd, args)
	}
	return cmd
}

func (a *app) pinCommand() *cobra.Command {
	var v int64
	run := a.runs(func(ctx context.Context, s *session, args []string) error {
		t, err := s.tenant(ctx, args[0])
		if err != nil {
			return err
		}
		if err := s.m.Pin(ctx, t.ID, v); err != nil {
			return err
		}
		return s.print(versionedJSON{t.ID, t.Name, v, "pinned"}, "%s goes no further than version %d", called(t), v)
	})
	return &cobra.Command{Use: "pin NAME VERSION", Short: "Hold a tenant at a version", Args: cobra.ExactArgs(2), ValidArgsFunction: a.names(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if v, err = version(cmd, args[1]); err != nil {
				return err
			}
			return run(cmd, args)
		}}
}

func (a *app) unpinCommand() *cobra.Command {
	return &cobra.Command{Use: "unpin NAME", Short: "Let a tenant go on", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			if err := s.m.Unpin(ctx, t.ID); err != nil {
				return err
			}
			return s.print(versionedJSON{TenantID: t.ID, Name: t.Name, What: "unpinned"}, "%s goes with all others", called(t))
		})}
}

type standingJSON struct {
	TenantID tenancy.ID `json:"tenant_id"`
	Name     string     `json:"name"`
	Version  int64      `json:"version"`
	Pinned   int64      `json:"pinned,omitempty"`
	Dirty    int64      `json:"dirty,omitempty"`
}

// statusJSON is what status prints.
type statusJSON struct {
	Newest   int64              `json:"newest"`
	Tenants  int                `json:"tenants"`
	Versions map[int64]int      `json:"versions"`
	Behind   []standingJSON     `json:"behind"`
	Ahead    []standingJSON     `json:"ahead"`
	Dirty    []standingJSON     `json:"dirty"`
	Pinned   []standingJSON     `json:"pinned"`
	Drift    []versionDriftJSON `json:"version_drift,omitempty"` // with --verify
}

func standingsOf(list []tenancy.TenantStatus) []standingJSON {
	out := []standingJSON{}
	for _, t := range list {
		out = append(out, standingJSON{t.Tenant.ID, t.Tenant.Name, t.Version, t.Pinned, t.Dirty})
	}
	return out
}

func (a *app) statusCommand() *cobra.Command {
	var verify, check bool
	cmd := &cobra.Command{Use: "status", Short: "Say at which version tenants' schemas are", Args: cobra.NoArgs,
		Long: "Say at which version tenants' schemas are, as the catalog has recorded it; with --verify, as the schemas themselves have it."}
	cmd.Flags().BoolVar(&verify, "verify", false, "ask the schemas themselves, too")
	cmd.Flags().BoolVar(&check, "check", false, "end with 5 when a tenant is behind, ahead, dirty or not at the version that is recorded")
	cmd.RunE = a.runs(func(ctx context.Context, s *session, _ []string) error {
		st, err := s.m.Status(ctx)
		if err != nil {
			return err
		}
		v := statusJSON{st.Newest, st.Tenants, st.Versions, standingsOf(st.Behind), standingsOf(st.Ahead), standingsOf(st.Dirty), standingsOf(st.Pinned), nil}
		if verify {
			drifts, err := s.m.Verify(ctx)
			if err != nil {
				return err
			}
			for _, d := range drifts {
				v.Drift = append(v.Drift, driftedOf(d))
			}
		}
		if a.json {
			err = a.printJSON(v)
		} else {
			err = s.statusText(v)
		}
		if err != nil {
			return err
		}
		if n := len(v.Behind) + len(v.Ahead) + len(v.Dirty) + len(v.Drift); check && n > 0 {
			return coded{errFound, fmt.Errorf("tenants are not at the service's version: %d behind, %d ahead, %d dirty, %d not as recorded", len(v.Behind), len(v.Ahead), len(v.Dirty), len(v.Drift))}
		}
		return nil
	})
	return cmd
}

// mostBehind is how many tenants that are behind are shown to people: before a run it is all of them.
const mostBehind = 10

func (s *session) statusText(v statusJSON) error {
	t := newTable(s.out, "VERSION", "TENANTS")
	versions := slices.Sorted(maps.Keys(v.Versions))
	if !slices.Contains(versions, v.Newest) {
		versions = append(versions, v.Newest)
	}
	for _, version := range slices.Backward(versions) {
		name := strconv.FormatInt(version, 10)
		if version == v.Newest {
			name += " (newest)"
		}
		t.row(name, strconv.Itoa(v.Versions[version]))
	}
	if err := t.end(); err != nil {
		return err
	}
	t, head := newTable(s.out), false
	row := func(id tenancy.ID, name string, version int64, what string) {
		if !head {
			_, _ = fmt.Fprintln(s.out)
			t.row("TENANT", "VERSION", "STATUS")
			head = true
		}
		if id == 0 {
			t.row("...", "", what)
			return
		}
		t.row(fmt.Sprintf("%s (#%d)", name, id), strconv.FormatInt(version, 10), what)
	}
	for i, p := range v.Behind {
		if i == mostBehind {
			row(0, "", 0, fmt.Sprintf("and %d more that are behind; --json has all of them", len(v.Behind)-i))
			break
		}
		row(p.TenantID, p.Name, p.Version, "behind")
	}
	for _, p := range v.Ahead {
		row(p.TenantID, p.Name, p.Version, "ahead: migrated by a newer release")
	}
	for _, p := range v.Dirty {
		row(p.TenantID, p.Name, p.Version, fmt.Sprintf("dirty: migration %d has died half-way; see schema resolve", p.Dirty))
	}
	for _, p := range v.Pinned {
		row(p.TenantID, p.Name, p.Version, fmt.Sprintf("pinned at %d", p.Pinned))
	}
	for _, d := range v.Drift {
		switch {
		case d.Error != "":
			row(d.TenantID, d.Name, d.Recorded, "could not be asked: "+oneLine(d.Error))
		case len(d.Missing) > 0:
			row(d.TenantID, d.Name, d.Actual, fmt.Sprintf("recorded as %d; never applied: %v", d.Recorded, d.Missing))
		default:
			row(d.TenantID, d.Name, d.Actual, fmt.Sprintf("recorded as %d; migrate --verify puts it right", d.Recorded))
		}
	}
	return t.end()
}
