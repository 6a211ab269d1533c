package tenancy

import (
	"fmt"
	"io"
	"log/slog"
)

// redacted is what every secret prints as, the empty one too: whether there is one is no one's business.
const redacted = "[secret]"

// Secret is a text that does not print: fmt, log/slog, encoding/json, encoding/xml and encoding/gob
// see the constant [secret] in its place. [Secret.Reveal] gives the text. The zero value is the
// empty secret. JSON is read into a Secret as into a string.
//
// It guards against habit and not against intent. The text still shows
//
//   - in an unexported field of a struct that is printed with %v, because fmt cannot call methods
//     there: a type that holds secrets has a Format method of its own, as [DataSource] has;
//   - under the verbs %p and %w, which are wrong for a text: fmt then calls no method;
//   - behind a pointer inside a printed value, to a struct without a Format method, under %s and
//     %q: these verbs are wrong for a pointer, so again no method is called;
//   - as the key of a map in JSON;
//   - to reflection and to a conversion.
type Secret string

// Reveal returns the text. A call of it is the place to look at in a review.
func (s Secret) Reveal() string { return string(s) }

// String returns [secret].
func (Secret) String() string { return redacted }

// GoString returns [secret].
func (Secret) GoString() string { return redacted }

// Format writes [secret], whatever the verb and the flags.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalJSON returns "[secret]".
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText returns [secret].
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalBinary returns [secret]; encoding/gob asks for it.
func (Secret) MarshalBinary() ([]byte, error) { return []byte(redacted), nil }

// LogValue returns [secret].
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }
