package demo

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
	"strings"
	"syscall"
	"time"

	"github.com/msmt-go/tenancy"
)

// Main is the main of an example program: it opens a [Demo], serves the handler until Ctrl-C, and prints what to try, in
// which {port} stands for the port.
func Main(cfg tenancy.Config, newHandler func(*Demo) (http.Handler, error), try ...string) {
	addr := flag.String("addr", "127.0.0.1:8080", "`host:port` to listen on")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, os.Stdout, *addr, cfg, newHandler, try)
	if err == nil || ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func run(ctx context.Context, out io.Writer, addr string, cfg tenancy.Config, newHandler func(*Demo) (http.Handler, error), try []string) (err error) {
	listener, err := net.Listen("tcp", addr) // first: a taken address is found out before anything is made
	if err != nil {
		return err
	}
	defer listener.Close()
	d, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	d.URL = "http://" + listener.Addr().String()
	handler, err := newHandler(d)
	if err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String()) // it was made by one
	fmt.Fprintf(out, "listening on %s\n\n  %s\n\n", d.URL, strings.ReplaceAll(strings.Join(try, "\n  "), "{port}", port))
	return serve(ctx, listener, handler)
}

// serve answers requests until ctx ends, then lets those under way finish.
func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := errors.Join(server.Shutdown(drain), server.Close())
	<-served
	return err
}
