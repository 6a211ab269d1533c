package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// seen is what one tenant's users have seen.
type seen struct {
	requests, failed int
	foreign          int // rows of other tenants
	written, found   int // notes
	ways             map[way]int
}

// load is the users: what they ask for, and what they are told. Safe for concurrent use.
type load struct {
	client *http.Client
	url    string

	mu    sync.Mutex // guards what follows
	of    map[string]*seen
	first error // the first request that failed
}

func newLoad(url string) *load {
	l := &load{url: url, of: map[string]*seen{}, client: &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}}
	for _, t := range tenants {
		l.of[t.name] = &seen{ways: map[way]int{}}
	}
	return l
}

// start has clients ask for all tenants until ctx ends. ended waits for the requests that have begun: none is cut off.
func (l *load) start(ctx context.Context, clients int) (ended func()) {
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				l.ask(context.WithoutCancel(ctx), tenants[n%len(tenants)].name)
			}
		})
	}
	return wg.Wait
}

// ask makes one request for the tenant.
func (l *load) ask(ctx context.Context, tenant string) {
	what := []func(context.Context, string) error{l.add, l.list, l.where}[rand.IntN(3)]
	l.judge(tenant, what(ctx, tenant))
}

func (l *load) judge(tenant string, err error) {
	l.note(tenant, func(s *seen) {
		if s.requests++; err == nil {
			return
		}
		if s.failed++; l.first == nil {
			l.first = fmt.Errorf("%s: %w", tenant, err)
		}
	})
}

// add writes a note that says whose it is.
func (l *load) add(ctx context.Context, tenant string) error {
	var id int64
	err := l.do(ctx, http.MethodPost, "/notes?title="+url.QueryEscape("a note of "+tenant), tenant, &id)
	if err == nil {
		l.note(tenant, func(s *seen) { s.written++ })
	}
	return err
}

func (l *load) list(ctx context.Context, tenant string) error {
	var titles []string
	err := l.do(ctx, http.MethodGet, "/notes", tenant, &titles)
	l.note(tenant, func(s *seen) {
		for _, title := range titles {
			if title != "a note of "+tenant {
				s.foreign++
			}
		}
	})
	return err
}

func (l *load) where(ctx context.Context, tenant string) error {
	var is way
	err := l.do(ctx, http.MethodGet, "/where", tenant, &is)
	if err == nil {
		l.note(tenant, func(s *seen) { s.ways[is]++ })
	}
	return err
}

// count asks how many notes the tenant has: as many as were written for it.
func (l *load) count(ctx context.Context, tenant string) error {
	var n int
	err := l.do(ctx, http.MethodGet, "/notes/count", tenant, &n)
	l.note(tenant, func(s *seen) { s.found = n })
	return err
}

// do asks the service as the tenant's user.
func (l *load) do(ctx context.Context, method, path, user string, into any) error {
	r, err := http.NewRequestWithContext(ctx, method, l.url+path, nil)
	if err != nil {
		return err
	}
	r.SetBasicAuth(user, "demo")
	res, err := l.client.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %d %s", method, path, res.StatusCode, strings.TrimSpace(string(body)))
	}
	return json.Unmarshal(body, into)
}

func (l *load) note(tenant string, what func(*seen)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	what(l.of[tenant])
}

// report prints a line for each tenant, and one for each way in which it was served.
func (l *load) report(out io.Writer, sessions map[string]int) {
	for _, t := range tenants {
		s, model := l.of[t.name], string(t.isolation)
		switch {
		case t.dense:
			model += ", dense"
		case t.moves:
			model += ", moves"
		}
		fmt.Fprintf(out, "\n%-10s  %-13s  %d requests, %d failed, %d rows of others, %d of %d notes\n", t.name, model, s.requests, s.failed, s.foreign, s.found, s.written)
		for _, is := range slices.SortedFunc(maps.Keys(s.ways), func(a, b way) int { return strings.Compare(a.Login, b.Login) }) {
			fmt.Fprintf(out, "            login %s (%d sessions), current_user %s, schema %s, database %s: %d answers\n",
				is.Login, sessions[is.Login], is.Role, is.Schema, is.Database, s.ways[is])
		}
	}
}

// err is what the report has that it must not have.
func (l *load) err() error {
	var errs []error
	if l.first != nil {
		errs = append(errs, fmt.Errorf("requests failed, the first: %w", l.first))
	}
	for _, t := range tenants {
		s := l.of[t.name]
		if s.foreign > 0 {
			errs = append(errs, fmt.Errorf("%s has seen %d rows of other tenants", t.name, s.foreign))
		}
		if s.found != s.written {
			errs = append(errs, fmt.Errorf("%s has %d notes, and %d were written", t.name, s.found, s.written))
		}
	}
	return errors.Join(errs...)
}
