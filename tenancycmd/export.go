package tenancycmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

func (a *app) exportCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{Use: "export NAME", Short: "Write all rows of a tenant, as JSON lines", Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1),
		Long: `Write all rows of a tenant as of one moment, in JSON lines, to the file of -o or to the standard output. A file is whole or not there. Without its last
line, {"end":...}, an export is not complete. While it runs, migrations of the tenant wait: write to a file, not to a slow program.`}
	cmd.Flags().StringVarP(&file, "output", "o", "", "file to write, which must not be there yet; default: the standard output")
	run := a.runs(func(ctx context.Context, s *session, args []string) error {
		t, err := s.tenant(ctx, args[0])
		if err != nil {
			return err
		}
		if file == "" {
			rows, err := s.c.Export(ctx, t.ID, a.out)
			if err == nil {
				s.err.printf("%s is exported: %d tables, %d rows\n", called(t), len(rows), sum(rows))
			}
			return err
		}
		rows, err := s.exportFile(ctx, t.ID, file)
		if err != nil {
			return err
		}
		v := struct {
			TenantID tenancy.ID `json:"tenant_id"`
			Name     string     `json:"name"`
			File     string     `json:"file"`
			Tables   []rowsJSON `json:"tables"`
		}{t.ID, t.Name, file, []rowsJSON{}}
		for _, r := range rows {
			v.Tables = append(v.Tables, rowsJSON(r))
		}
		return a.print(v, "%s is exported to %s: %d tables, %d rows", called(t), clean(file), len(rows), sum(rows))
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if file == "" && isTerminal(a.out) {
			return usage(cmd, "the rows would go to the terminal: give -o FILE")
		}
		return run(cmd, args)
	}
	return cmd
}

func sum(rows []tenancy.ExportedRows) (n int64) {
	for _, r := range rows {
		n += r.Rows
	}
	return n
}

// exportFile writes beside the file first, so that it is whole when it is there.
func (s *session) exportFile(ctx context.Context, id tenancy.ID, file string) (rows []tenancy.ExportedRows, err error) {
	if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
		return nil, usageError{fmt.Sprintf("-o: %s is there already, or cannot be looked for", file)}
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*") // for the owner alone
	if err != nil {
		return nil, usageError{fmt.Sprintf("-o: %v", err)}
	}
	defer os.Remove(f.Name())
	rows, err = s.c.Export(ctx, id, f)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return rows, os.Link(f.Name(), file) // unlike Rename it replaces nothing
}
