package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/msmt-go/tenancy"
)

// What terminals understand: go to the upper left corner, clear the rest of the line or of the screen, hide and show the cursor.
const home, restOfLine, restOfScreen, hideCursor, showCursor = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[?25l", "\x1b[?25h"

// view draws on a terminal, again and again. Elsewhere it writes a line each second.
type view struct {
	out      io.Writer
	terminal bool
	of       options
}

// made tells how many tenants there are.
func (v view) made(n int) {
	switch {
	case v.terminal:
		fmt.Fprintf(v.out, "\rmaking tenants %s %d of %d", bar(n, v.of.tenants), n, v.of.tenants)
	case n%100 == 0:
		fmt.Fprintf(v.out, "%d of %d tenants are made\n", n, v.of.tenants)
	}
}

// follow shows the load until ctx ends.
func (v view) follow(ctx context.Context, l *load) {
	period := time.Second
	if v.terminal {
		period = 200 * time.Millisecond
		fmt.Fprint(v.out, hideCursor, home, restOfScreen)
		defer fmt.Fprint(v.out, showCursor)
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	began, before := time.Now(), figures{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, elapsed := l.figures(), time.Since(began).Round(time.Second)
		if v.terminal {
			page := v.page(l.fleet.node, now, (now.calls-before.calls)*int(time.Second/period), elapsed)
			fmt.Fprint(v.out, home, strings.ReplaceAll(page, "\n", restOfLine+"\n"), restOfScreen)
		} else {
			fmt.Fprintf(v.out, "%4v  %s\n", elapsed, now)
		}
		before = now
	}
}

// page is the whole screen.
func (v view) page(node *tenancy.Tenancy, now figures, perSecond int, elapsed time.Duration) string {
	var p strings.Builder
	fmt.Fprintf(&p, "%d tenants, %d connections, %d clients, %v (Ctrl-C ends it)\n\n", v.of.tenants, v.of.conns, v.of.clients, elapsed)
	for b := range node.Servers() { // there is one
		fmt.Fprintf(&p, "  tenants  %s %d of %d, of them %d on their way out\n", bar(b.Used, b.Shared), b.Used, b.Shared, b.Closing)
		fmt.Fprintf(&p, "  library  %s %d of %d, and %d are kept for cancel requests\n", bar(b.OwnUsed, b.Own), b.OwnUsed, b.Own, b.Budget-b.Own-b.Shared)
		fmt.Fprintf(&p, "  hungry   %d tenants wait for a connection of the budget\n", b.Hungry)
		fmt.Fprintf(&p, "  evicted  %d idle connections were closed for others\n", b.Evicted)
	}
	fmt.Fprintf(&p, "  server   PostgreSQL counts %d connections, at most %d\n", now.conns, now.most)
	fmt.Fprintf(&p, "  calls    %d/s, p50 %v, p99 %v, %d errors\n\n", perSecond, now.p50, now.p99, now.errors)

	var all []tenancy.TenantStats
	for _, t := range node.Stats() {
		all = append(all, t)
	}
	list := func(title string, of func(tenancy.TenantStats) int) {
		fmt.Fprintf(&p, "  %-20s  conns  busy  waiting  mean wait\n", title)
		slices.SortFunc(all, func(a, b tenancy.TenantStats) int { return cmp.Or(of(b)-of(a), strings.Compare(a.Name, b.Name)) })
		for _, t := range all[:min(5, len(all))] {
			wait := t.WaitTime / time.Duration(max(1, t.Waits))
			fmt.Fprintf(&p, "  %-20s  %5d  %4d  %7d  %9v\n", t.Name, t.Conns, t.Busy, t.Waiting, wait.Round(10*time.Microsecond))
		}
		fmt.Fprintln(&p)
	}
	list("the hottest", func(t tenancy.TenantStats) int { return int(t.Waits) })
	list("those that wait", func(t tenancy.TenantStats) int { return t.Waiting })
	fmt.Fprintf(&p, "  %d tenants have a pool, the others nothing\n", len(all))
	return p.String()
}

const widest = 40

// bar has a character for each of a few, and a share of the widest for each of many.
func bar(n, of int) string {
	if of > widest {
		n, of = n*widest/of, widest
	}
	n = min(n, of)
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", of-n) + "]"
}
