// Hybrid is one service whose tenants are kept apart in all the ways that there are, and one of them moves while it is served.
//
//	go run ./examples/hybrid
//	go run ./examples/hybrid -for 30s -clients 32
//
// Acme has a schema, globex a database, initech its rows in a schema of many. Hooli and pied-piper have a schema and rows as well, and share
// the pool of those: few connections, and one login that takes each tenant's role. Rover has a schema, and goes from a pool of its own to the shared one
// and back. The handlers, the SQL and the migrations know none of this. At the end the program prints what PostgreSQL said about who was served how. It is an error when a
// request failed, a row of another tenant was seen, or a row that was written is not there.
//
// This file is the program, service.go the service, fleet.go its database and tenants, and load.go its clients.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// options are the program's flags.
type options struct {
	clients int
	time    time.Duration
}

func main() {
	var o options
	flag.IntVar(&o.clients, "clients", 12, "how many ask, each as fast as it is answered")
	flag.DurationVar(&o.time, "for", 6*time.Second, "how long they do")
	flag.Parse()
	if flag.NArg() > 0 || o.clients < 1 || o.time <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, os.Stdout, o)
	if err == nil || ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return
	}
	fmt.Fprintln(os.Stderr, "hybrid:", err)
	os.Exit(1)
}

// run makes the tenants, serves them while one moves, and reports.
func run(ctx context.Context, out io.Writer, o options) (err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer listener.Close()
	f, err := openFleet(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.provision(ctx, out); err != nil {
		return err
	}
	handler, err := newHandler(f.node)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: time.Minute}
	go func() { served <- server.Serve(listener) }()
	defer func() {
		err = errors.Join(err, server.Close())
		<-served
	}()

	l := newLoad("http://" + listener.Addr().String())
	defer l.client.CloseIdleConnections()
	end, cancel := context.WithTimeout(ctx, o.time)
	defer cancel()
	ended := l.start(end, o.clients)
	err = f.move(end, out)
	if err != nil {
		cancel()
	}
	ended()
	if err := errors.Join(err, ctx.Err()); err != nil {
		return err
	}
	for _, t := range tenants {
		if err := l.count(ctx, t.name); err != nil {
			return err
		}
	}
	sessions, err := f.sessions(ctx)
	if err != nil {
		return err
	}
	l.report(out, sessions)
	return l.err()
}
