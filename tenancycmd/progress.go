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
	state atomic.Pointer[tenancy.MigrateProgress]
	bar   *mpb.Bar
	all   *mpb.Progress
	below io.Writer // that the bar is drawn on
}

func (p *progress) tell(now tenancy.MigrateProgress) {
	first := p.state.Swap(&now) == nil
	if first && now.Total > 0 && isTerminal(p.s.err.w) {
		p.begin(now.Total)
	}
	ended := now.Done + now.Failed + now.NotBegun
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
	p.all = mpb.New(mpb.WithOutput(p.s.err.w), mpb.WithWidth(28), mpb.WithRefreshRate(100*time.Millisecond))
	p.bar = p.all.New(int64(total), mpb.BarStyle(), mpb.PrependDecorators(decor.Name("migrate ")),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return p.counts() }), decor.OnCompleteOrOnAbort(decor.AverageETA(decor.ET_STYLE_GO, decor.WC{C: decor.DextraSpace}), "")))
	p.below = p.s.err.swap(p.all)
}

func (p *progress) counts() string {
	now := p.state.Load()
	text := fmt.Sprintf(" %d done, %d failed, %d left", now.Done, now.Failed, now.Total-now.Done-now.Failed)
	if now.Total > now.Done+now.Failed+now.NotBegun {
		text += ", time left "
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
