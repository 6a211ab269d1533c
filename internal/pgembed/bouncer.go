//go:build linux || darwin

package pgembed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bouncerHint is what someone without PgBouncer reads.
const bouncerHint = "no pgbouncer found (looked in PATH and /usr/sbin): the tests of poolers need one, 1.18 or newer. " +
	"Debian/Ubuntu: apt-get install -y pgbouncer. macOS: brew install pgbouncer."

// Bouncer is a running PgBouncer, for tests of what stands before a PostgreSQL. It listens on 127.0.0.1, and ends with the
// process that started it. Safe for concurrent use; who called [StartBouncer] calls [Bouncer.Stop].
type Bouncer struct {
	dir      string
	account  account
	port     int
	proc     *process
	watchdog *watchdog
}

// StartBouncer returns a PgBouncer that takes connections. sections is the text of pgbouncer.ini, with [databases] and, last, [pgbouncer]; where
// it listens, its log and its auth_file, which holds users, are set at the end of that.
//
// Cancelling ctx ends the start and leaves nothing behind. The error says what to install when there is no PgBouncer, and holds the end of its
// log when it ends while starting.
func StartBouncer(ctx context.Context, sections, users string) (*Bouncer, error) {
	acc, err := chooseAccount(os.Geteuid(), user.Lookup)
	if err != nil {
		return nil, err
	}
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil { // often not in the PATH of those who are not root
			return nil, errors.New(bouncerHint)
		}
	}
	dir, err := makeFolder(acc)
	if err != nil {
		return nil, err
	}
	w, err := startWatchdog(dir, acc)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	b := &Bouncer{dir: dir, account: acc, watchdog: w}
	for try := 1; ; try++ {
		err := b.start(ctx, program, sections, users)
		if err == nil {
			return b, nil
		}
		if !errors.Is(err, errPortTaken) || try == portTries {
			return nil, errors.Join(err, b.Stop())
		}
	}
}

// Port is where it listens, on 127.0.0.1.
func (b *Bouncer) Port() int { return b.port }

// Log returns all that it has logged. The error is that of reading a file.
func (b *Bouncer) Log() (string, error) {
	text, err := os.ReadFile(b.logFile())
	return string(text), err
}

// Stop ends it and removes its folder. Stopping twice is safe.
func (b *Bouncer) Stop() error {
	if p := b.proc; p != nil {
		p.signal(syscall.SIGTERM) // at once: SIGINT would wait for its clients
		if !p.endsWithin(fastWait) {
			p.signal(syscall.SIGKILL)
			if !p.endsWithin(quitWait) {
				return fmt.Errorf("PgBouncer (process %d) does not stop", p.cmd.Process.Pid)
			}
		}
		b.proc = nil
	}
	err := removeFolder(b.dir)
	b.watchdog.release()
	return err
}

func (b *Bouncer) logFile() string { return filepath.Join(b.dir, "log") }

func (b *Bouncer) start(ctx context.Context, program, sections, users string) (err error) {
	if b.port, err = freePort(); err != nil {
		return err
	}
	ini, auth := filepath.Join(b.dir, "pgbouncer.ini"), filepath.Join(b.dir, "users.txt")
	// Of a setting that is there twice, the last one counts. A second [pgbouncer] would set all that it does not name back to the defaults.
	sections += fmt.Sprintf("\nlisten_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\nlogfile =\npidfile =\nauth_file = %s\n", b.port, auth)
	for file, text := range map[string]string{ini: sections, auth: users} {
		if err := errors.Join(os.WriteFile(file, []byte(text), 0o600), b.account.give(file)); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(b.logFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return err
	}
	cmd := b.account.command(exec.Command(program, ini))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return b.account.explain(err, program)
	}
	p := &process{cmd: cmd, log: b.logFile(), logFrom: from, ended: make(chan struct{})}
	b.proc = p
	go func() { // ends with the process
		p.err = cmd.Wait()
		_ = b.watchdog.tell("gone") // an error means the watchdog is gone too
		close(p.ended)
	}()
	if err := b.watchdog.tell(cmd.Process.Pid); err != nil {
		return err
	}
	return b.awaitReady(ctx, p)
}

func (b *Bouncer) awaitReady(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	for {
		// Its own word: another process can have got the port meanwhile.
		if strings.Contains(p.thisLog(), "process up: PgBouncer") {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(b.port)))
			if err == nil {
				return conn.Close()
			}
		}
		select {
		case <-p.ended:
			err := fmt.Errorf("PgBouncer ended while starting (%v); its log ends:\n%s", p.err, p.logTail())
			if strings.Contains(p.thisLog(), "Address already in use") {
				return fmt.Errorf("%w: %w", errPortTaken, err)
			}
			return err
		case <-ctx.Done():
			return fmt.Errorf("PgBouncer takes no connections: %w; its log ends:\n%s", ctx.Err(), p.logTail())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
