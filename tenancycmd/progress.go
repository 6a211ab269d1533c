package tenancycmd

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/msmt-go/tenancy"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progress shows how far a run of migrations is: a bar on a terminal, a line for each tenant elsewhere. Its methods are called one at a time.
type progress struct {
	s     *session
	state atomic.Pointer[reached]
	began time.Time
	skip  int // that had failed before the first began
	bar   *mpb.Bar
	all   *mpb.Progress
	below io.Writer // that the bar is drawn on
}

// reached is where the run was when it told of itself.
type reached struct {
	tenants tenancy.MigrateProgress
	ended   int
	when    time.Time
	left    time.Duration // that the rest would take from then on, at the pace so far; 0: nobody knows yet
}

func (p *progress) tell(now tenancy.MigrateProgress) {
	ended := now.Done + now.Failed + now.NotBegun
	at := &reached{tenants: now, ended: ended, when: time.Now()}
	if p.began.IsZero() {
		p.began, p.skip = at.when, ended
	} else if n := ended - p.skip; n > 0 {
		at.left = at.when.Sub(p.began) * time.Duration(now.Total-ended) / time.Duration(n)
	}
	if first := p.state.Swap(at) == nil; first && now.Total > 0 && isTerminal(p.s.err.w) {
		p.begin(now.Total)
	}
	if last := now.Last; last.Tenant.ID != 0 {
		switch {
		case errors.Is(last.Err, tenancy.ErrNotBegun): // the result has them
		case last.Err != nil:
			p.s.err.printf("%d of %d: %s failed: %s\n", ended, now.Total, called(last.Tenant), oneLine(text(last.Err)))
		case p.bar == nil:
			p.s.err.printf("%d of %d: %s is at version %d\n", ended, now.Total, called(last.Tenant), last.Version)
		}
	}
	if p.bar != nil {
		p.bar.SetCurrent(int64(ended))
	}
}

// begin draws the bar. What is written to stderr from now on goes above it.
func (p *progress) begin(total int) {
	p.all = mpb.New(mpb.WithOutput(p.s.err.w), mpb.WithAutoRefresh(), mpb.WithRefreshRate(100*time.Millisecond))
	p.bar = p.all.New(int64(total), mpb.BarStyle(), mpb.BarWidth(28), mpb.PrependDecorators(decor.Name("migrate ")),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return p.counts() })))
	p.below = p.s.err.swap(p.all)
}

func (p *progress) counts() string {
	at := p.state.Load()
	now := at.tenants
	text := fmt.Sprintf(" %d done, %d failed, %d left", now.Done, now.Failed, now.Total-now.Done-now.Failed)
	if left := at.left - time.Since(at.when); left > 0 {
		text += fmt.Sprintf(", about %v", left.Round(time.Second))
	}
	return text
}

// end leaves the bar as it is.
func (p *progress) end() {
	if p.bar == nil {
		return
	}
	p.s.err.swap(p.below)
	if !p.bar.Completed() {
		p.bar.Abort(false)
	}
	p.all.Wait()
}
