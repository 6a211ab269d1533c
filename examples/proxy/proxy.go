package main

import (
	"bytes"
	"errors"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"time"

	tenantmw "github.com/msmt-go/tenancy/middleware"
)

const (
	maxMoves     = 2       // how often one request is sent on because of a 421
	maxReplay    = 1 << 20 // bytes of a body that are kept to be sent again
	maxCallers   = 10_000  // whose node is remembered
	maxDiscarded = 64 << 10
)

// deciding are the headers by which the service finds the user and the tenant, besides Host: its credentials and its
// hints. One that is missing here costs a request its shortcut, and never leads to a wrong tenant: nodes decide.
var deciding = []string{"Authorization", "Cookie", "X-Api-Key", "X-Tenant"}

// newHandler returns the proxy for nodes, which are host:port and speak plain HTTP.
func newHandler(nodes []string) http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			// The Host header stays: subdomains and domains name tenants. The router says to which node.
			r.Out.URL.Scheme = "http"
			r.Out.URL.RawQuery = r.In.URL.RawQuery // as it came: nothing here reads it
			r.SetXForwarded()                      // and nothing that the caller says of itself there
		},
		Transport: newRouter(nodes),
	}
}

// router finds a node for each request. It follows a 421 to a node that the answer names, and no answer to an
// address that it was not configured with: that would make it everybody's way into this network.
//
// A request is sent a second time in two cases: after a 421 of the tenancy middleware, which is given before any
// handler runs, and after a connection that could not be made. A 421 that cannot be followed goes to the caller as it is,
// with its nodes: they help one who is a balancer too, and are no secret to the middleware. It is safe for concurrent use.
type router struct {
	nodes []string
	to    http.RoundTripper
	last  memory
}

func newRouter(nodes []string) *router {
	return &router{nodes: slices.Clone(nodes), last: memory{seed: maphash.MakeSeed(), nodes: map[uint64]string{}}, to: &http.Transport{
		// No Proxy from the environment: nodes are neighbours.
		DialContext:         (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     30 * time.Second, // less than the nodes' own, so that no request meets a connection that is being closed
		DisableCompression:  true,             // what the caller did not ask for
	}}
}

// RoundTrip sends r to the node where its caller was served last, else to any, and on from there.
func (p *router) RoundTrip(r *http.Request) (*http.Response, error) {
	caller := p.last.key(r)
	body, whole, err := keep(r)
	if err != nil {
		return nil, err
	}
	next, tried, moves := p.order(caller), []string(nil), 0
	for len(next) > 0 {
		node := next[0]
		next, tried = next[1:], append(tried, node)
		var res *http.Response
		if res, err = p.send(r, node, body()); err != nil {
			if !neverSent(err) {
				return nil, err // 502: whether the node did it is not known
			}
			p.last.forget(caller, node)
			continue
		}
		if res.StatusCode != http.StatusMisdirectedRequest {
			if res.StatusCode < 400 { // refusals are not remembered: strangers could wash out what is
				p.last.remember(caller, node)
			}
			return res, nil
		}
		named := p.named(res, tried)
		if len(named) == 0 || moves == maxMoves {
			return res, nil
		}
		p.last.remember(caller, named[0])
		if !whole {
			return res, nil // the caller's to send again: it goes to the right node then
		}
		_, _ = io.CopyN(io.Discard, res.Body, maxDiscarded) // so that the connection can be used again
		res.Body.Close()
		next, moves = named, moves+1
	}
	return nil, err
}

// order returns all nodes: the one where the caller was served last, then the others as they fall.
func (p *router) order(caller uint64) []string {
	nodes := slices.Clone(p.nodes)
	rand.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	if i := slices.Index(nodes, p.last.node(caller)); i > 0 {
		nodes[0], nodes[i] = nodes[i], nodes[0]
	}
	return nodes
}

// named returns those of our nodes that a 421 names and that this request has not seen, as they fall.
func (p *router) named(res *http.Response, tried []string) (nodes []string) {
	list := strings.Join(res.Header.Values(tenantmw.NodesHeader), ",")
	for node := range strings.SplitSeq(list, ",") {
		node = strings.TrimSpace(node)
		if slices.Contains(p.nodes, node) && !slices.Contains(tried, node) && !slices.Contains(nodes, node) {
			nodes = append(nodes, node)
		}
	}
	rand.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	return nodes
}

func (p *router) send(r *http.Request, node string, body io.ReadCloser) (*http.Response, error) {
	out, url := r.WithContext(r.Context()), *r.URL // a copy: r may be sent again
	url.Host = node
	out.URL, out.Body = &url, body
	return p.to.RoundTrip(out)
}

// neverSent reports whether err is that of a connection that could not be made.
func neverSent(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}

// keep reads the body of r, if it is small enough, and returns what gives it anew for each sending. A larger one is not
// whole: it can be sent on, once. One of unknown length is held back until it has ended or is larger, so a service that
// streams both ways at once needs another rule here.
func keep(r *http.Request) (body func() io.ReadCloser, whole bool, err error) {
	if r.Body == nil || r.Body == http.NoBody {
		return func() io.ReadCloser { return r.Body }, true, nil
	}
	if r.ContentLength > maxReplay {
		return func() io.ReadCloser { return io.NopCloser(r.Body) }, false, nil // open also after a connection that could not be made
	}
	begin, err := io.ReadAll(io.LimitReader(r.Body, maxReplay+1))
	if err != nil {
		return nil, false, err
	}
	if len(begin) > maxReplay {
		rest := io.MultiReader(bytes.NewReader(begin), r.Body)
		return func() io.ReadCloser { return io.NopCloser(rest) }, false, nil
	}
	return func() io.ReadCloser { return io.NopCloser(bytes.NewReader(begin)) }, true, nil
}

// memory is the node where each caller was served last, of the callers that fit into it. It is a shortcut and no
// knowledge: a node that does not serve the tenant any more says so. Keys are hashes with a seed of this process, so no credential is kept.
type memory struct {
	seed maphash.Seed

	mu    sync.Mutex // guards nodes
	nodes map[uint64]string
}

// key stands for what decides on the tenant of r. Two callers with one key would only share a shortcut.
func (m *memory) key(r *http.Request) uint64 {
	var h maphash.Hash
	h.SetSeed(m.seed)
	h.WriteString(r.Host)
	for _, name := range deciding {
		for _, value := range r.Header.Values(name) {
			h.WriteByte(1)
			h.WriteString(value)
		}
		h.WriteByte(0) // neither is in a header's value
	}
	return h.Sum64()
}

func (m *memory) node(caller uint64) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.nodes[caller]
}

func (m *memory) remember(caller uint64, node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.nodes[caller]; !known && len(m.nodes) >= maxCallers {
		for one := range m.nodes { // whichever comes first
			delete(m.nodes, one)
			break
		}
	}
	m.nodes[caller] = node
}

func (m *memory) forget(caller uint64, node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.nodes[caller] == node {
		delete(m.nodes, caller)
	}
}
