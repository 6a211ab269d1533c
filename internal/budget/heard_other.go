//go:build !linux

package budget

// TellsUnheard says whether [Conn.Unheard] can tell here.
const TellsUnheard = false

func (c *Conn) owes() bool { return false }
