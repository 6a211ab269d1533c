package tenancy

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5/pgconn"
)

// sockets is the book of what a pool has dialled, so that all of it can be cut: pgxpool has no
// forced close. The zero value works.
type sockets struct {
	mu     sync.Mutex // guards open and closed
	open   map[*socket]struct{}
	closed bool
}

// socket is a connection in the book.
type socket struct {
	net.Conn
	book *sockets
}

// Close closes the socket and takes it out of the book.
func (s *socket) Close() error {
	s.book.mu.Lock()
	delete(s.book.open, s)
	s.book.mu.Unlock()
	return s.Conn.Close()
}

// dialer returns dial with a book. After cut it refuses.
func (b *sockets) dialer(dial pgconn.DialFunc) pgconn.DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		s := &socket{Conn: conn, book: b}
		if !b.enter(s) {
			conn.Close()
			return nil, ErrClosed
		}
		return s, nil
	}
}

func (b *sockets) enter(s *socket) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	if b.open == nil {
		b.open = map[*socket]struct{}{}
	}
	b.open[s] = struct{}{}
	return true
}

// cut closes every socket and lets no new one in.
func (b *sockets) cut() {
	b.mu.Lock()
	b.closed = true
	open := slices.Collect(maps.Keys(b.open))
	b.mu.Unlock()
	for _, s := range open {
		s.Close()
	}
}
