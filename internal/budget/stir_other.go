//go:build !linux && !darwin

package budget

type stirrer struct{}

func newStirrer(any) *stirrer { return nil }

// Stirs says nothing here.
func (c *Conn) Stirs() bool { return false }
