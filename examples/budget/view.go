package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// What terminals understand: go to a screen of its own and back, hide and show the cursor, cut long lines or wrap them, clear the rest of the line or of the screen.
const (
	ownScreen, usualScreen = "\x1b[?1049h", "\x1b[?1049l"
	hideCursor, showCursor = "\x1b[?25l", "\x1b[?25h"
	cutLines, wrapLines    = "\x1b[?7l", "\x1b[?7h"
	restOfLine             = "\x1b[K"
	restOfScreen           = "\x1b[J"
)

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
		fmt.Fprintf(v.out, "%s\rmaking tenants %s %d of %d%s", cutLines, bar(n, v.of.tenants), n, v.of.tenants, wrapLines)
	case n%100 == 0:
		fmt.Fprintf(v.out, "%d of %d tenants are made\n", n, v.of.tenants)
	}
}

const (
	redraws = 5 // in a second, on a terminal
	history = 2 // seconds over which the rate of calls is taken
)

// follow shows the load until ctx ends.
func (v view) follow(ctx context.Context, l *load) {
	period := time.Second
	if v.terminal {
		period /= redraws
		fmt.Fprint(v.out, ownScreen, hideCursor, cutLines)
		defer fmt.Fprint(v.out, wrapLines, showCursor, usualScreen)
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	began := time.Now()
	past := []moment{{at: began}}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, at := l.figures(), time.Now()
		if !v.terminal {
			fmt.Fprintf(v.out, "%4v  %s\n", at.Sub(began).Round(time.Second), now)
			continue
		}
		past = append(past, moment{at, now.calls})
		past = past[max(0, len(past)-history*redraws-1):]
		rate := float64(now.calls-past[0].calls) / at.Sub(past[0].at).Seconds()
		// Each line goes where it belongs: on a screen that is too low, only the last of them are lost.
		for i, line := range v.page(l, now, rate, at.Sub(began)) {
			fmt.Fprintf(v.out, "\x1b[%d;1H%s%s", i+1, line, restOfLine)
		}
		fmt.Fprint(v.out, restOfScreen)
	}
}

type moment struct {
	at    time.Time
	calls int
}

// page is the whole screen, what matters most first.
func (v view) page(l *load, now figures, rate float64, elapsed time.Duration) (lines []string) {
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	add("%d tenants on %d connections, %d clients, %v (Ctrl-C ends it)", v.of.tenants, v.of.conns, v.of.clients, elapsed.Round(time.Second))
	for b := range l.fleet.node.Servers() { // there is one
		add("tenants  %s %d of %d, %d on their way out; %d more are for verbs", bar(b.Used, b.Tenants), b.Used, b.Tenants, b.Closing, b.Shared-b.Tenants)
		add("library  %s %d of %d; %d more are for cancel requests", bar(b.OwnUsed, b.Own), b.OwnUsed, b.Own, b.Budget-b.Own-b.Shared)
		add("hungry   %d tenants wait for a connection of the budget", b.Hungry)
		add("evicted  %d idle connections were closed for others", b.Evicted)
	}
	add("server   PostgreSQL counts %d connections, at most %d", now.conns, now.most)
	add("calls    %.0f/s, p50 %v, p99 %v, %d errors", rate, now.p50, now.p99, now.errors)

	tenants := l.tenants()
	list := func(title string, of func(tenant) int) {
		add("")
		add("%-16s  calls  conns  busy  waiting  mean wait", title)
		slices.SortFunc(tenants, func(a, b tenant) int { return cmp.Or(of(b)-of(a), strings.Compare(a.Name, b.Name)) })
		for _, t := range tenants[:min(5, len(tenants))] {
			wait := "-"
			if t.WaitTime > 0 {
				wait = (t.WaitTime / time.Duration(max(1, t.Waits))).Round(10 * time.Microsecond).String()
			}
			add("%-16s  %5d  %5d  %4d  %7d  %9s", t.Name, t.calls, t.Conns, t.Busy, t.Waiting, wait)
		}
	}
	list("asked most", func(t tenant) int { return t.calls })
	list("waiting most", func(t tenant) int { return t.Waiting })
	add("")
	add("%d tenants have a pool, the others nothing", len(tenants))
	return lines
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
