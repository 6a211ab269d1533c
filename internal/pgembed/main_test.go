//go:build linux || darwin

package pgembed_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

// parentMode makes the test binary a parent which starts a server and comes to the
// end that its value names.
const parentMode = "PGEMBED_TEST_PARENT"

func TestMain(m *testing.M) {
	os.Unsetenv("TENANCY_TEST_URL") // these tests are about servers of our own
	if mode := os.Getenv(parentMode); mode != "" {
		os.Exit(parent(mode))
	}
	goleak.VerifyTestMain(m)
}

func parent(mode string) int {
	if mode == "bouncer" {
		b, err := pgembed.StartBouncer(context.Background(), "[databases]\n[pgbouncer]\nauth_type = trust\n", "")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(b.PID(), 0, 0, b.Folder())
		io.Copy(io.Discard, os.Stdin)
		return 3
	}
	s, err := pgembed.Start(context.Background(), pgembed.Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// A child that outlives us must not keep the watchdog waiting.
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(s.PID(), s.WatchdogPID(), child.Process.Pid, s.Folder())
	switch mode {
	case "wait":
		io.Copy(io.Discard, os.Stdin)
	case "panic":
		panic("the parent panics")
	case "stop":
		if err := s.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 3
}

// offspring is what a parent has started.
type offspring struct {
	server, watchdog, child int
	folder                  string
}

// startParent starts a parent process; the caller ends it.
func startParent(t *testing.T, mode string) (*exec.Cmd, offspring) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), parentMode+"="+mode)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		cmd.Wait()
		t.Fatalf("the parent started no server: %v: %s", err, stderr.String())
	}
	var o offspring
	if _, err := fmt.Sscan(line, &o.server, &o.watchdog, &o.child, &o.folder); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	if o.child != 0 {
		t.Cleanup(func() { syscall.Kill(o.child, syscall.SIGKILL) })
	}
	return cmd, o
}

// assertGone waits until nothing is left of a server. The process may remain as a
// zombie where nobody reaps orphans.
func assertGone(t *testing.T, pid int, folder string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		_, err := os.Stat(folder)
		removed := errors.Is(err, fs.ErrNotExist)
		if removed && dead(pid) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: folder %s (removed: %v), process %d (dead: %v)", folder, removed, pid, dead(pid))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func dead(pid int) bool {
	if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return true
	}
	out, err := exec.Command("ps", "-o", "stat=", "-p", fmt.Sprint(pid)).Output()
	return err != nil || strings.HasPrefix(strings.TrimSpace(string(out)), "Z")
}

// start returns a server that is stopped at the end of the test.
func start(t *testing.T, o pgembed.Options) *pgembed.Server {
	t.Helper()
	s, err := pgembed.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func exec1(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func ask(t *testing.T, conn *pgx.Conn, sql string) string {
	t.Helper()
	var answer string
	if err := conn.QueryRow(t.Context(), sql).Scan(&answer); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return answer
}

func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root lends another account to the server")
	}
}
