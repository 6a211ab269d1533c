//go:build linux || darwin

package pgembed

import (
	"fmt"
	"os"
	"os/exec"
)

// watchdog is a shell that outlives us by a moment. It blocks on a pipe whose only
// writer we are, so it notices every end: exit, panic, a test's timeout, kill -9.
// Then it ends the server and removes the folder.
//
// Pdeathsig would be shorter, but fires when the forking thread ends, exists on
// Linux only, and removes no folder.
type watchdog struct {
	cmd *exec.Cmd
	in  *os.File // open as long as we live; no child inherits it (O_CLOEXEC)
}

// watchdogScript reads what became of the server: "starting" before it is forked,
// its process id after, "gone" when it was seen to end, so that no other process
// which got its number since is ever signalled. The end of input is our end.
//
// SIGQUIT, never SIGKILL: the postmaster takes its backends and its shared memory
// along. Its pid file tells when it is done; its process may stay as a zombie where
// nobody reaps orphans.
const watchdogScript = `
dir=$1
pidfile=$dir/data/postmaster.pid
server=
while read -r line; do server=$line; done

pause() { sleep 0.02 2>/dev/null || sleep 1; }

if [ "$server" = starting ]; then
	n=0
	while [ ! -s "$pidfile" ] && [ $n -lt 50 ]; do pause; n=$((n+1)); done
	read -r server < "$pidfile"
fi 2>/dev/null

case $server in
''|*[!0-9]*) ;;
*)
	kill -CONT "$server"
	kill -QUIT "$server"
	n=0 seen=
	while kill -0 "$server" && [ $n -lt 750 ]; do
		if [ -e "$pidfile" ]; then seen=1; elif [ -n "$seen" ] || [ $n -gt 50 ]; then break; fi
		pause; n=$((n+1))
	done
	;;
esac 2>/dev/null

n=0
while ! rm -rf "$dir" 2>/dev/null && [ $n -lt 100 ]; do pause; n=$((n+1)); done
`

// startWatchdog guards dir. It comes before the server, so there is no moment
// without it.
func startWatchdog(dir string, acc account) (*watchdog, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := acc.command(exec.Command("/bin/sh", "-c", watchdogScript, "tenancy-pg-watchdog", dir))
	cmd.Stdin = r
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, fmt.Errorf("watchdog: %w", err)
	}
	return &watchdog{cmd: cmd, in: w}, nil
}

// tell says what became of the server.
func (w *watchdog) tell(what any) error {
	if _, err := fmt.Fprintln(w.in, what); err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	return nil
}

// release ends the watchdog, which removes the folder if it is still there.
func (w *watchdog) release() {
	w.in.Close()
	w.cmd.Wait() // its exit status is that of rm, of which nobody hears in its main use
}
