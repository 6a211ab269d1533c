package tenancycmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

// answerJSON is what one tenant's server has answered. Values are PostgreSQL's own text, NULL is null.
type answerJSON struct {
	TenantID tenancy.ID   `json:"tenant_id"`
	Name     string       `json:"name"`
	Results  []resultJSON `json:"results"`
	Error    string       `json:"error,omitempty"`
}

type resultJSON struct {
	Command string      `json:"command"`
	Columns []string    `json:"columns,omitempty"`
	Rows    [][]*string `json:"rows,omitempty"`
}

func (a *app) execCommand() *cobra.Command {
	var all, bare bool
	var file string
	parallel := 1
	cmd := &cobra.Command{Use: "exec {NAME | --all} [SQL]", Short: "Run SQL as one tenant, or as each of all", Args: cobra.MaximumNArgs(2), ValidArgsFunction: a.names(1),
		Long: `Run SQL, several statements if need be, with the tenant's own login: it reaches what the tenant's calls reach, and nothing else. For each tenant it is one
transaction, unless --no-transaction. The SQL is the argument, the file of -f, or the standard input. A tenant that fails does not stop
the others. With --json there is a line for each tenant, as it ends.`}
	cmd.Flags().BoolVar(&all, "all", false, "all tenants that are in service")
	cmd.Flags().StringVarP(&file, "file", "f", "", "file with the SQL; -: the standard input")
	cmd.Flags().IntVar(&parallel, "parallel", 1, "tenants at once")
	cmd.Flags().BoolVar(&bare, "no-transaction", false, "for what cannot be in a transaction, such as VACUUM; on a session of its own")
	run := a.runsWith(func() int { return baseConns + parallel }, func(ctx context.Context, s *session, args []string) error {
		sql, err := s.sql(args[1:], file)
		if err != nil {
			return err
		}
		var list []tenancy.Tenant
		if all {
			for t, err := range s.c.Tenants(ctx, tenancy.Filter{State: tenancy.StateActive}) {
				if err != nil {
					return err
				}
				list = append(list, t)
			}
		} else {
			t, err := s.tenant(ctx, args[0])
			if err != nil {
				return err
			}
			list = append(list, t)
		}
		return s.each(ctx, list, parallel, all, func(ctx context.Context) ([]resultJSON, error) { return s.query(ctx, sql, bare) })
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case parallel < 1:
			return usage(cmd, "--parallel is below 1")
		case all && len(args) > 1 || !all && len(args) == 0:
			return usage(cmd, "name one tenant, or give --all, and then the SQL")
		case all:
			args = append([]string{""}, args...)
		}
		if len(args) > 1 && file != "" {
			return usage(cmd, "give the SQL as an argument or with -f, not both")
		}
		return run(cmd, args)
	}
	return cmd
}

// sql reads what is to be run.
func (s *session) sql(args []string, file string) (string, error) {
	var raw []byte
	var err error
	switch {
	case len(args) > 0:
		raw = []byte(args[0])
	case file != "" && file != "-":
		raw, err = os.ReadFile(file)
	case isTerminal(s.in):
		return "", usageError{"there is no SQL: give it as an argument, with -f, or on the standard input"}
	default:
		raw, err = io.ReadAll(s.in)
	}
	if err != nil {
		return "", usageError{fmt.Sprintf("the SQL cannot be read: %v", err)}
	}
	if strings.TrimSpace(string(raw)) == "" {
		return "", usageError{"the SQL is empty"}
	}
	return string(raw), nil
}

// each runs fn in each tenant, and prints what came of it as soon as it is there.
func (s *session) each(ctx context.Context, list []tenancy.Tenant, parallel int, named bool, fn func(ctx context.Context) ([]resultJSON, error)) error {
	var mu sync.Mutex // guards what follows, and the output
	var failures int
	var first, broken error
	slots := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	for _, t := range list {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			results, err := s.inside(ctx, t, fn)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				if failures++; first == nil {
					first = err
				}
			}
			if out := s.answer(t, results, err, named); out != nil {
				broken = out
			}
		})
	}
	wg.Wait()
	switch {
	case broken != nil:
		return broken
	case failures > 0 && named:
		return coded{errSome, fmt.Errorf("%d of %d tenants failed, the first with: %w", failures, len(list), first)}
	case failures > 0:
		return coded{errSome, about(list[0].Name, first)}
	}
	return nil
}

func (s *session) inside(ctx context.Context, t tenancy.Tenant, fn func(ctx context.Context) ([]resultJSON, error)) ([]resultJSON, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("not begun: %w", context.Cause(ctx))
	}
	in, err := s.tn.Enter(ctx, t.ID)
	if err != nil {
		return nil, err
	}
	return fn(in)
}

// query runs the SQL in the tenant of ctx.
func (s *session) query(ctx context.Context, sql string, bare bool) (results []resultJSON, err error) {
	on := func(ctx context.Context, conn *pgx.Conn) (err error) {
		results, err = simple(ctx, conn, sql)
		return err
	}
	if bare {
		return results, s.tn.DB().WithConn(ctx, on)
	}
	err = s.tn.DB().InTx(ctx, pgx.TxOptions{}, func(ctx context.Context, tx pgx.Tx) error { return on(ctx, tx.Conn()) })
	return results, err
}

// simple sends the SQL as psql does, so that it may be several statements, and their values come as text.
func simple(ctx context.Context, conn *pgx.Conn, sql string) (results []resultJSON, err error) {
	reader := conn.PgConn().Exec(ctx, sql)
	// A COPY FROM STDIN would wait for rows for ever; where there is none the server passes over this.
	conn.PgConn().Frontend().Send(&pgproto3.CopyFail{Message: "exec has no rows to send: use psql"})
	_ = conn.PgConn().Frontend().Flush() // a broken connection is met when it is read
	for reader.NextResult() {
		rows := reader.ResultReader()
		var one resultJSON
		for _, f := range rows.FieldDescriptions() {
			one.Columns = append(one.Columns, f.Name)
		}
		for rows.NextRow() {
			values := make([]*string, len(one.Columns))
			for i, v := range rows.Values() {
				if v != nil {
					text := string(v)
					values[i] = &text
				}
			}
			one.Rows = append(one.Rows, values)
		}
		tag, err := rows.Close()
		if err != nil {
			return results, errors.Join(err, ignore(reader.Close(), err))
		}
		one.Command = tag.String()
		results = append(results, one)
	}
	return results, reader.Close()
}

// ignore returns err unless it says the same as told.
func ignore(err, told error) error {
	if err == nil || errors.Is(told, err) || err.Error() == told.Error() {
		return nil
	}
	return err
}

// answer prints what one tenant has answered.
func (s *session) answer(t tenancy.Tenant, results []resultJSON, err error, named bool) error {
	if results == nil {
		results = []resultJSON{}
	}
	if s.json {
		return s.printJSON(answerJSON{t.ID, t.Name, results, text(err)})
	}
	if named {
		if _, err := fmt.Fprintf(s.out, "-- %s\n", called(t)); err != nil {
			return err
		}
	}
	for _, r := range results {
		if r.Columns != nil {
			rows := newTable(s.out, r.Columns...)
			for _, values := range r.Rows {
				cells := make([]string, len(values))
				for i, v := range values {
					if v != nil {
						cells[i] = *v
					}
				}
				rows.row(cells...)
			}
			if err := rows.end(); err != nil {
				return err
			}
		}
		if _, err := fmt.Fprintf(s.out, "%s\n", clean(r.Command)); err != nil {
			return err
		}
	}
	if err != nil && named {
		s.err.printf("%s failed: %s\n", called(t), oneLine(text(err)))
	}
	return nil
}
