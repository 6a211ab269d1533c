package tenancy

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
)

// share is which tenants this node serves, when it does not serve all, and where the others are.
type share struct {
	only    []string // names
	address string   // this node's own: what is said of it is older than we are
	nodes   atomic.Pointer[[]node]
}

// node is another process of the service that takes callers.
type node struct {
	address string
	serves  []string // names; nil: every tenant
}

// has reports whether this node serves the tenant; a nil share is the whole.
func (s *share) has(name string) bool { return s == nil || slices.Contains(s.only, name) }

// elsewhere returns the addresses of the nodes that serve the tenant, as of the last report.
func (s *share) elsewhere(name string) (addresses []string) {
	nodes := s.nodes.Load()
	if nodes == nil {
		return nil
	}
	for _, n := range *nodes {
		if n.serves == nil || slices.Contains(n.serves, name) {
			addresses = append(addresses, n.address)
		}
	}
	return slices.Compact(addresses) // one that was killed and came back is there twice for a while
}

// read asks the primary which nodes take callers. One that has been silent for a while takes none.
func (s *share) read(ctx context.Context, q querier) error {
	rows, _ := q.Query(ctx, `SELECT address, serves FROM tenancy.nodes WHERE address <> '' AND address <> $2 AND seen > now() - $1::interval ORDER BY address`, nodeSilence.String(), s.address)
	nodes, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (n node, err error) {
		return n, row.Scan(&n.address, &n.serves)
	})
	if err != nil {
		return unavailable("read nodes", err)
	}
	s.nodes.Store(&nodes)
	return nil
}

// NotServedError is a tenant that this node does not serve (Config.OnlyTenants). It matches [ErrNotServed].
type NotServedError struct {
	// Nodes are the addresses (Config.NodeAddress) of those that do, as of a second ago, in order; empty when none
	// that lives has said so.
	Nodes []string
}

func (e *NotServedError) Error() string {
	if len(e.Nodes) == 0 {
		return fmt.Sprintf("%v: and no node that lives and has a Config.NodeAddress does", ErrNotServed)
	}
	return fmt.Sprintf("%v: these do: %s", ErrNotServed, strings.Join(e.Nodes, ", "))
}

func (e *NotServedError) Unwrap() error { return ErrNotServed }
