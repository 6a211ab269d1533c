package tenancy

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/budget"
)

const (
	feedConns = 3 // two to read with, one that listens
	verbConns = 5 // a verb's, at most: its lock, the provisioner, and three of a migration, or two and the lock of a shared schema
	workConns = 3 // kept for verbs: the lock, the provisioner and a proof, so that a tenant that uses up the budget can be suspended
)

// servers holds this node's budget for each server that it has to do with. Safe for concurrent use.
type servers struct {
	log   *slog.Logger
	total int            // permits of each
	own   map[string]int // of them, for the library's own pools; written before use only

	mu sync.Mutex // guards by
	by map[string]*server
}

func newServers(cfg Config) *servers {
	return &servers{log: cfg.Logger, total: cfg.Limits.ServerConns / cfg.Limits.Nodes, own: map[string]int{}, by: map[string]*server{}}
}

// setAside keeps n permits for a pool of the library's own, and as many as may be needed to cancel a statement of it.
func (s *servers) setAside(cc *pgx.ConnConfig, n int) { s.own[serverKey(cc.Host, cc.Port)] += n + 1 }

// check refuses a budget in which the library's own connections leave too little.
func (s *servers) check() error {
	for address, own := range s.own {
		if shared := (budget.Limits{Total: s.total, Own: own}).Shared(); shared < verbConns+1 {
			return invalid(fmt.Errorf("Config.Limits.ServerConns/Nodes is %d for the server %s: its own pools need %d of them, cancel requests %d, "+
				"a verb of the catalog %d and tenants at least 1; raise ServerConns or lower PrimaryConns", s.total, address, own, budget.Cancels, verbConns))
		}
	}
	if s.total < verbConns+1+budget.Cancels {
		return invalid(errors.New("Config.Limits.ServerConns/Nodes is below " + strconv.Itoa(verbConns+1+budget.Cancels) +
			": a verb of the catalog needs " + strconv.Itoa(verbConns) + " connections, cancel requests 2 and tenants at least 1"))
	}
	return nil
}

// of returns the budget of a server. Servers are told apart by host and port as they are written.
func (s *servers) of(host string, port uint16) *server {
	key := serverKey(host, port)
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.by[key]
	if b == nil {
		b = &server{Server: budget.NewServer(budget.Limits{Total: s.total, Own: s.own[key], Work: workConns}), address: key, log: s.log}
		s.by[key] = b
	}
	return b
}

// verbs returns how many verbs may be at work at once so that none waits for connections which the others hold.
func (s *servers) verbs(cc *pgx.ConnConfig) int {
	l := budget.Limits{Total: s.total, Own: s.own[serverKey(cc.Host, cc.Port)]}
	return max(1, (l.Shared()-1)/verbConns)
}

// ownPool has cc dial with the permits that were set aside.
func (s *servers) ownPool(cc *pgx.ConnConfig) {
	server := s.of(cc.Host, cc.Port)
	cc.DialFunc, cc.OnPgError = server.OwnDialer(cc.DialFunc), server.heed(cc.OnPgError)
}

// single has cc, of a connection in no pool, wait for a permit of those that tenants share.
func (s *servers) single(cc *pgx.ConnConfig) {
	server := s.of(cc.Host, cc.Port)
	cc.DialFunc, cc.OnPgError = server.Dialer(cc.DialFunc), server.heed(cc.OnPgError)
}

func serverKey(host string, port uint16) string {
	return net.JoinHostPort(strings.ToLower(host), strconv.Itoa(int(port)))
}

// sorted returns every server, by address.
func (s *servers) sorted() iter.Seq[*server] {
	s.mu.Lock()
	all := maps.Clone(s.by)
	s.mu.Unlock()
	return func(yield func(*server) bool) {
		for _, address := range slices.Sorted(maps.Keys(all)) {
			if !yield(all[address]) {
				return
			}
		}
	}
}
