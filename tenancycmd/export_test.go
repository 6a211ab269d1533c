package tenancycmd

import "testing"

var (
	Clean          = clean
	ErrInterrupted = errInterrupted
)

// OnATerminal has every stream be a terminal until the test ends.
func OnATerminal(t *testing.T) {
	before := isTerminal
	isTerminal = func(any) bool { return true }
	t.Cleanup(func() { isTerminal = before })
}
