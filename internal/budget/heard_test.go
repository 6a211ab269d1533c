package budget_test

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/budget"
)

// TestWhatTheServerCannotHaveHeardIsKnown, by real sockets, and nothing else is taken for it.
func TestWhatTheServerCannotHaveHeardIsKnown(t *testing.T) {
	if !budget.TellsUnheard {
		t.Skip("this system does not tell")
	}
	for name, c := range map[string]struct {
		before, after   func(server *net.TCPConn) // the client writes
		heard           bool                      // the server reads it
		words           bool                      // the client reads the server's last words and not the end
		ended, farewell bool                      // what Unheard answers, without the server's last words and with them
	}{
		"closed_before":     {before: func(s *net.TCPConn) { s.Close() }, ended: true, farewell: true},
		"good_bye_before":   {before: func(s *net.TCPConn) { _, _ = s.Write([]byte("bye")); s.Close() }, ended: true, farewell: true},
		"reset_before":      {before: func(s *net.TCPConn) { _ = s.SetLinger(0); s.Close() }},
		"closed_after":      {after: func(s *net.TCPConn) { s.Close() }, heard: true},
		"last_words_before": {before: func(s *net.TCPConn) { _, _ = s.Write([]byte("bye")); s.Close() }, words: true, farewell: true},
		"last_words_after":  {after: func(s *net.TCPConn) { _, _ = s.Write([]byte("bye")); s.Close() }, heard: true, words: true},
		"good_bye_after":    {after: func(s *net.TCPConn) { _, _ = s.Write([]byte("bye")); s.Close() }, heard: true},
		"reset_after":       {after: func(s *net.TCPConn) { _ = s.SetLinger(0); s.Close() }, heard: true},
	} {
		t.Run(name, func(t *testing.T) {
			conn, server := socketPair(t)
			if c.before != nil {
				c.before(server)
				untilStirs(t, conn)
			}
			_, _ = conn.Write([]byte("statement"))
			if c.heard {
				if _, err := io.ReadFull(server, make([]byte, len("statement"))); err != nil {
					t.Fatal(err)
				}
			}
			if c.after != nil {
				c.after(server)
			}
			if !c.words {
				_, _ = io.Copy(io.Discard, conn)
			} else if _, err := io.ReadFull(conn, make([]byte, len("bye"))); err != nil {
				t.Fatal(err)
			}
			conn.LastWords()
			_, _ = conn.Write([]byte("good-bye of TLS, or of pgx"))
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
			if got := conn.Unheard(false); got != c.ended {
				t.Errorf("Unheard(false) is %v", got)
			}
			if got := conn.Unheard(true); got != c.farewell {
				t.Errorf("Unheard(true) is %v", got)
			}
		})
	}
}

// socketPair returns a connection of an account, and its server's end.
func socketPair(t *testing.T) (*budget.Conn, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := budget.NewServer(budget.Limits{Total: 4}).NewAccount(budget.AccountConfig{Ceiling: 1})
	conn, err := a.Route((&net.Dialer{}).DialContext).Dial(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.(*budget.Conn).Abort(); server.Close() })
	return conn.(*budget.Conn), server.(*net.TCPConn)
}

func untilStirs(t *testing.T, conn *budget.Conn) {
	t.Helper()
	for began := time.Now(); !conn.Stirs(); {
		if time.Since(began) > 5*time.Second {
			t.Fatal("the server's end is not noticed")
		}
	}
}
