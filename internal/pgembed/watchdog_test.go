//go:build linux || darwin

package pgembed_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

func uidOf(t *testing.T, pid int) string {
	t.Helper()
	out, err := exec.Command("ps", "-o", "uid=", "-p", fmt.Sprint(pid)).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func TestKilledParentLeavesNothing(t *testing.T) {
	t.Parallel()
	cmd, o := startParent(t, "wait")
	if dead(o.server) || dead(o.watchdog) {
		t.Fatal("the server does not run")
	}
	begin := time.Now()
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	assertGone(t, o.server, o.folder)
	t.Logf("gone after %v", time.Since(begin).Round(time.Millisecond))
	if dead(o.child) {
		t.Error("the other child died too: the test shows nothing about inherited pipes")
	}
}

func TestPanickingOrExitingParentLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"panic", "exit", "stop"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			cmd, o := startParent(t, mode)
			cmd.Wait()
			assertGone(t, o.server, o.folder)
		})
	}
}

func TestParentKilledWhileItsServerWasStoppedLeavesNothing(t *testing.T) {
	t.Parallel()
	cmd, o := startParent(t, "wait")
	if err := syscall.Kill(o.server, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	assertGone(t, o.server, o.folder)
}

// go test waits for whoever holds its stdout; so does this test.
func TestServerHoldsNoStdoutOfItsParent(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/bin/sh", "-c", `"$0" & wait $!; echo over`, os.Args[0])
	cmd.Env = append(os.Environ(), parentMode+"=exit")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(30 * time.Second)) // the child "sleep 60" has no stdout either
	out, err := io.ReadAll(r)
	if err != nil || !strings.Contains(string(out), "over") {
		t.Errorf("someone holds stdout: %v: %s", err, out)
	}
	cmd.Wait()
	var o offspring
	if _, err := fmt.Sscan(string(out), &o.server, &o.watchdog, &o.child, &o.folder); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	syscall.Kill(o.child, syscall.SIGKILL)
	assertGone(t, o.server, o.folder)
}

// runParentAs runs a parent in mode "stop" under another uid.
func runParentAs(t *testing.T, uid uint32) (string, error) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pgembed-test-") // t.TempDir is closed to others
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "parent")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(dir, "home")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o755, program: 0o755} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(home, int(uid), int(uid)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Dir = "/"
	cmd.Env = []string{parentMode + "=stop", "HOME=" + home, "PATH=" + os.Getenv("PATH"), "TENANCY_PG_BINDIR=" + start(t, pgembed.Options{}).BinDir()}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	var o offspring
	if _, scanErr := fmt.Sscan(string(out), &o.server, &o.watchdog, &o.child, &o.folder); scanErr == nil {
		syscall.Kill(o.child, syscall.SIGKILL)
		assertGone(t, o.server, o.folder)
	}
	return string(out), err
}

func TestOrdinaryUserStartsAServer(t *testing.T) {
	t.Parallel()
	asRoot(t) // who is not root shows it with every other test
	out, err := runParentAs(t, 65534)
	if err == nil || err.Error() != "exit status 3" {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUserWithoutANameIsTold(t *testing.T) {
	t.Parallel()
	asRoot(t) // only root can be someone without a name
	out, err := runParentAs(t, 42424)
	if err == nil || !strings.Contains(out, "initdb needs a name for user 42424") {
		t.Errorf("%v: %s", err, out)
	}
}
