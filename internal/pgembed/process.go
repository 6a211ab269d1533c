//go:build linux || darwin

package pgembed

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// errPortTaken: between being chosen and being bound, the port went to someone else.
var errPortTaken = errors.New("the port is taken")

// process is one run of the server.
type process struct {
	cmd     *exec.Cmd
	log     string // file
	logFrom int64  // where this run's part begins

	ended chan struct{} // closed when the process was reaped
	err   error         // how it ended; read after ended
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// end sends sig and waits. SIGINT (disconnect all, write out, go) is followed by
// SIGQUIT if it takes too long; SIGKILL never comes, shared memory would stay behind.
func (p *process) end(sig syscall.Signal) error {
	p.signal(sig)
	if sig == syscall.SIGINT {
		if p.endsWithin(fastWait) {
			return nil
		}
		p.signal(syscall.SIGQUIT)
	}
	if p.endsWithin(quitWait) {
		return nil
	}
	return fmt.Errorf("PostgreSQL (process %d) does not stop; its log ends:\n%s", p.cmd.Process.Pid, p.logTail())
}

// signal wakes the process too, in case a test has put it to sleep (SIGSTOP). That it
// has ended already is no error.
func (p *process) signal(sig syscall.Signal) {
	p.cmd.Process.Signal(sig)
	p.cmd.Process.Signal(syscall.SIGCONT)
}

func (p *process) endsWithin(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-p.ended:
		return true
	case <-t.C:
		return p.hasEnded()
	}
}

// failure says why the process, which has ended, did so at its start.
func (p *process) failure(v version) error {
	err := fmt.Errorf("PostgreSQL %s ended while starting (%v); its log ends:\n%s", v.text, p.err, p.logTail())
	if strings.Contains(p.thisLog(), "could not bind IPv4 address") {
		return fmt.Errorf("%w: %w", errPortTaken, err)
	}
	return err
}

// logTail is the end of this run's log.
func (p *process) logTail() string { return lastLines(p.thisLog(), 20) }

func (p *process) thisLog() string {
	f, err := os.Open(p.log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, p.logFrom, 1<<20))
	if err != nil {
		return err.Error()
	}
	return string(b)
}
