// Proxy stands in front of nodes of one service that serve different tenants (tenancy.Config.OnlyTenants), and brings
// each request to a node that serves its tenant. Callers see one address.
//
//	go run ./examples/proxy -addr 127.0.0.1:8000 -nodes 10.0.0.7:8080,10.0.0.8:8080
//
// It knows no tenants, no users and no database: it asks any node, and one that does not serve the tenant says who does.
// The nodes are named as their Config.NodeAddress names them. proxy.go is the whole of it, this file starts and ends it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8000", "`host:port` to listen on")
	list := flag.String("nodes", "", "the nodes, as `host:port,host:port`")
	flag.Parse()
	nodes, err := parseNodes(*list)
	if err != nil || flag.NArg() > 0 {
		if err != nil {
			fmt.Fprintln(os.Stderr, "proxy: -nodes:", err)
		}
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	if err := run(ctx, *addr, nodes); err != nil {
		fmt.Fprintln(os.Stderr, "proxy:", err)
		os.Exit(1)
	}
}

// parseNodes reads host:port,host:port.
func parseNodes(list string) (nodes []string, err error) {
	for node := range strings.SplitSeq(list, ",") {
		node = strings.TrimSpace(node)
		if host, port, err := net.SplitHostPort(node); err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("%q is not host:port", node)
		}
		if slices.Contains(nodes, node) {
			return nil, fmt.Errorf("%s is named twice", node)
		}
		nodes = append(nodes, node)
	}
	return nodes, nil
}

// run answers requests until ctx ends, then lets those under way finish.
func run(ctx context.Context, addr string, nodes []string) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Printf("listening on http://%s for %s\n", listener.Addr(), strings.Join(nodes, ", "))
	// How long a whole request or answer takes is for the nodes to say: a stream may last for hours.
	server := &http.Server{Handler: newHandler(nodes), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(server.Shutdown(drain), server.Close())
}
