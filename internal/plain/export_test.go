package plain

// Keywords and Functions are the lists that the tests compare with a server.
var (
	Keywords  = keywords
	Functions = functions
)

const Longest = longest
