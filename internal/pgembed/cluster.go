//go:build linux || darwin

package pgembed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	socketFolder = "s"
	fastWait     = 10 * time.Second // for an orderly shutdown
	quitWait     = 15 * time.Second // a postmaster kills its backends 5 s after SIGQUIT
	readyWait    = time.Minute      // for a start whose ctx has no end
	portTries    = 10
)

// cluster is a data directory, the server on it when there is one, and the folder
// around both: data/, the socket's folder, and the log.
type cluster struct {
	bin      binaries
	account  account
	dir      string
	watchdog *watchdog

	mu       sync.Mutex // one of start, kill, restart and stop at a time; guards what follows
	port     int
	password string
	stopped  bool

	procMu sync.Mutex // guards proc, so that pid need not wait for a restart
	proc   *process   // nil when the server is down on purpose
}

func startCluster(ctx context.Context, o Options) (*Server, error) {
	acc, err := chooseAccount(os.Geteuid(), user.Lookup)
	if err != nil {
		return nil, err
	}
	cache, err := openCache(acc)
	if err != nil {
		return nil, err
	}
	bin, err := newSearch(acc, cache, o.Log).find(ctx, o.Download)
	if err != nil {
		return nil, err
	}
	tmpl, err := openTemplate(ctx, bin, acc, cache)
	if err != nil {
		return nil, err
	}
	c, err := newCluster(bin, acc)
	if err != nil {
		return nil, err
	}
	if err := c.build(ctx, tmpl, o.Settings); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return &Server{url: c.url(c.password), version: bin.version, cluster: c}, nil
}

// newCluster returns a cluster without data: a folder and its watchdog.
func newCluster(bin binaries, acc account) (*cluster, error) {
	dir, err := makeFolder(acc)
	if err != nil {
		return nil, err
	}
	w, err := startWatchdog(dir, acc)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &cluster{bin: bin, account: acc, dir: dir, watchdog: w}, nil
}

// build turns a copy of tmpl into a running server with a password of its own.
func (c *cluster) build(ctx context.Context, tmpl template, settings map[string]string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	if c.password, err = tmpl.password(); err != nil {
		return err
	}
	if err := tmpl.copyTo(ctx, c.data(), c.account); err != nil {
		return err
	}
	if err := c.configure(settings); err != nil {
		return err
	}
	for try := 1; ; try++ {
		if c.port, err = freePort(); err != nil {
			return err
		}
		err = c.startLocked(ctx)
		if err == nil {
			break
		}
		if !errors.Is(err, errPortTaken) || try == portTries {
			return err
		}
	}
	return c.changePassword(ctx)
}

// configure writes what the server reads at its start.
func (c *cluster) configure(settings map[string]string) error {
	lines, err := renderSettings(settings)
	if err != nil {
		return err
	}
	// A list of names, which are quoted inside the value: TMPDIR may hold a comma.
	socket := `"` + strings.ReplaceAll(c.socketDir(), `"`, `""`) + `"`
	lines += "listen_addresses = '127.0.0.1'\nunix_socket_directories = '" + quoteSetting(socket) + "'\n"
	// Appended, the last one wins: initdb has tuned the file for this machine.
	conf, err := os.OpenFile(filepath.Join(c.data(), "postgresql.conf"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = conf.WriteString(lines)
	if err := errors.Join(err, conf.Close()); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.data(), "pg_hba.conf"), []byte(hostBased), 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(c.socketDir(), 0o700); err != nil {
		return err
	}
	return c.account.give(c.socketDir())
}

// freePort returns a port that was free a moment ago.
func freePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// changePassword replaces the template's, which all servers of this user begin with.
// The statement holds a verifier only, so no log_statement can leak the password.
func (c *cluster) changePassword(ctx context.Context) error {
	password := rand.Text()
	verifier, err := scramVerifier(password)
	if err != nil {
		return err
	}
	cfg, err := pgx.ParseConfig(c.url(c.password))
	if err != nil {
		return err
	}
	// Or a crash right after the start would bring the old password back.
	cfg.RuntimeParams["synchronous_commit"] = "on"
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "ALTER ROLE postgres PASSWORD '"+verifier+"'"); err != nil {
		return err
	}
	c.password = password
	return nil
}

func (c *cluster) url(password string) string {
	return fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/postgres?sslmode=disable", password, c.port)
}

func (c *cluster) data() string      { return filepath.Join(c.dir, "data") }
func (c *cluster) socketDir() string { return filepath.Join(c.dir, socketFolder) }
func (c *cluster) logFile() string   { return filepath.Join(c.dir, "log") }

func (c *cluster) readLog() (string, error) {
	b, err := os.ReadFile(c.logFile())
	if errors.Is(err, os.ErrNotExist) {
		return "", ErrStopped
	}
	return string(b), err
}

func (c *cluster) pid() int {
	c.procMu.Lock()
	defer c.procMu.Unlock()
	if c.proc == nil || c.proc.hasEnded() {
		return 0
	}
	return c.proc.cmd.Process.Pid
}

func (c *cluster) setProc(p *process) {
	c.procMu.Lock()
	defer c.procMu.Unlock()
	c.proc = p
}

// startLocked starts the server on c.port and waits until it accepts connections.
// When it returns an error, no server is left. [errPortTaken] is worth another try.
func (c *cluster) startLocked(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyWait, fmt.Errorf("PostgreSQL %s accepts no connections after %v", c.bin.version.text, readyWait))
	defer cancel()
	p, err := c.fork()
	if err != nil {
		return err
	}
	c.setProc(p)
	if err := c.awaitReady(ctx, p); err != nil {
		c.setProc(nil)
		return errors.Join(err, p.end(syscall.SIGQUIT))
	}
	return nil
}

// fork starts the server's process.
func (c *cluster) fork() (*process, error) {
	// Not our stdout: go test waits for everyone who holds it.
	log, err := os.OpenFile(c.logFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	cmd := c.account.command(exec.Command(filepath.Join(c.bin.dir, "postgres"), "-D", c.data(), "-p", strconv.Itoa(c.port)))
	cmd.Stdout, cmd.Stderr = log, log
	if err := c.watchdog.tell("starting"); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(c.account.explain(err, cmd.Path), c.watchdog.tell("gone"))
	}
	told := c.watchdog.tell(cmd.Process.Pid)
	p := &process{cmd: cmd, log: c.logFile(), logFrom: from, ended: make(chan struct{})}
	// The goroutine ends with the server. It also keeps the watchdog's pipe in use: a
	// caller who holds the URL only, and forgets the Server, keeps the database.
	go func() {
		p.err = cmd.Wait()
		c.watchdog.tell("gone") // an error means the watchdog is gone too, and nothing is left to say
		close(p.ended)
	}()
	if told != nil {
		return nil, errors.Join(told, p.end(syscall.SIGQUIT))
	}
	return p, nil
}

// awaitReady waits for the socket first: a client that calls a port nobody has may,
// once in many thousand times, be given that same port and connect to itself, and the
// server could not have it then. The TCP port is bound before the socket is.
func (c *cluster) awaitReady(ctx context.Context, p *process) error {
	cfg, err := pgx.ParseConfig(c.url(c.password))
	if err != nil {
		return err
	}
	local := cfg.Copy()
	local.Host = c.socketDir()
	for {
		err := call(ctx, local)
		if err == nil {
			break
		}
		select {
		case <-p.ended:
			return p.failure(c.bin.version)
		case <-ctx.Done():
			if cause := context.Cause(ctx); !errors.Is(cause, ctx.Err()) {
				return fmt.Errorf("%w: %w; its log ends:\n%s", cause, err, p.logTail())
			}
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	if err := call(ctx, cfg); err != nil {
		return fmt.Errorf("PostgreSQL %s accepts no connections on 127.0.0.1: %w; its log ends:\n%s", c.bin.version.text, err, p.logTail())
	}
	return nil
}

// call asks whether a server answers. One that refuses the password does: a test may
// have given the superuser another before a restart.
func call(ctx context.Context, cfg *pgx.ConnConfig) error {
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Code == "28P01" {
			return nil
		}
		return err
	}
	return conn.Close(ctx)
}

// stopLocked ends the server if there is one.
func (c *cluster) stopLocked(sig syscall.Signal) error {
	c.procMu.Lock()
	p := c.proc
	c.procMu.Unlock()
	if p == nil {
		return nil
	}
	if err := p.end(sig); err != nil {
		return err
	}
	c.setProc(nil)
	return nil
}

func (c *cluster) kill() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return ErrStopped
	}
	return c.stopLocked(syscall.SIGQUIT)
}

func (c *cluster) restart(ctx context.Context, immediate bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return ErrStopped
	}
	sig := syscall.SIGINT
	if immediate {
		sig = syscall.SIGQUIT
	}
	if err := c.stopLocked(sig); err != nil {
		return err
	}
	for try := 1; ; try++ {
		err := c.startLocked(ctx)
		if !errors.Is(err, errPortTaken) || try == portTries {
			return err
		}
		// Some connection got our port while it was free. It has to go; our clients
		// know no other.
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c *cluster) stop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return nil
	}
	if err := c.stopLocked(syscall.SIGINT); err != nil {
		return err // not stopped: the folder is in use, and the watchdog still on duty
	}
	c.stopped = true
	err := removeFolder(c.dir)
	c.watchdog.release()
	return err
}
