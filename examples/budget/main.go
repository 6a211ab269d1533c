// Budget shows 1,000 tenants on 20 connections.
//
//	go run ./examples/budget
//	go run ./examples/budget -tenants 100 -clients 64 -for 10s
//
// Each tenant has a login of its own, so a connection serves one tenant and no other. Clients ask a few tenants often and
// most of them seldom, and the node may have 20 connections at the server, those to its primary among them. When a tenant needs one and
// none is left, the idle one that was used longest ago is closed; who needs one waits, and nobody is refused. The view
// shows what the library says of its budget, and beside it what PostgreSQL counts.
//
// This file is the program, fleet.go its database and tenants, load.go its clients, and view.go what is on the screen.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

// options are the program's flags.
type options struct {
	tenants, conns, clients int
	time                    time.Duration // 0: until Ctrl-C
}

func main() {
	var o options
	flag.IntVar(&o.tenants, "tenants", 1000, "how many there are; it takes some 50 ms to make one")
	flag.IntVar(&o.conns, "conns", 20, "the budget: `connections` that the node has at the server, its own among them")
	flag.IntVar(&o.clients, "clients", 32, "how many ask, each as fast as it is answered")
	flag.DurationVar(&o.time, "for", 0, "ends it after that `time`; default: Ctrl-C does")
	flag.Parse()
	if flag.NArg() > 0 || o.tenants < 2 || o.clients < 1 || o.conns < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	info, err := os.Stdout.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	if _, err = run(ctx, os.Stdout, terminal, o); err == nil || ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return
	}
	fmt.Fprintln(os.Stderr, "budget:", err)
	os.Exit(1)
}

// run makes the tenants and has them asked until ctx ends, or the time is over.
func run(ctx context.Context, out io.Writer, terminal bool, o options) (end figures, err error) {
	f, err := openFleet(ctx, o.conns)
	if err != nil {
		return figures{}, err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	v := view{out: out, terminal: terminal, of: o}
	if err := f.provision(ctx, o.tenants, v.made); err != nil {
		return figures{}, err
	}
	if o.time > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.time)
		defer cancel()
	}
	l := &load{fleet: f, asked: make([]atomic.Int64, len(f.tenants))}
	ended, err := l.start(ctx, o.clients)
	if err != nil {
		return figures{}, err
	}
	v.follow(ctx, l)
	err = ended()
	end = l.figures()
	fmt.Fprintf(out, "\n%d tenants, %d connections, %d clients: %s\n", o.tenants, o.conns, o.clients, end)
	return end, errors.Join(err, end.firstError)
}
