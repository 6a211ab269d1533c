package tenancy

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/msmt-go/tenancy/internal/seal"
)

// Keyring holds the keys under which the primary keeps passwords: the first key seals, all of them
// open. To rotate, put a new key first, let [Catalog] seal everything again, then remove the old one.
//
// The zero Keyring holds no keys. A Keyring is immutable, safe for concurrent use, and prints as
// the ids of its keys.
type Keyring struct{ ring *seal.Ring }

// ParseKeyring reads keys from "id:key,id:key": an id is 1 to 32 lower-case letters, digits,
// underscores or hyphens, a key is 32 bytes in base64, standard or URL alphabet, padded or not.
// White space around an entry is ignored. [NewKey] makes an entry.
//
// A passphrase is refused, as are keys of another size, keys that are all zero, and ids or keys
// given twice. The error is [ErrInvalid]; it names the entry by its place and id and never
// contains a key.
func ParseKeyring(s string) (Keyring, error) {
	if strings.TrimSpace(s) == "" {
		return Keyring{}, invalid(errors.New("keys must not be empty: tenancy.NewKey makes one"))
	}
	var keys []seal.Key
	for entry := range strings.SplitSeq(s, ",") {
		k, err := parseKey(strings.TrimSpace(entry))
		if err != nil {
			return Keyring{}, invalid(fmt.Errorf("key %d%w", len(keys)+1, err))
		}
		keys = append(keys, k)
	}
	ring, err := seal.NewRing(keys...)
	if err != nil {
		return Keyring{}, invalid(err)
	}
	return Keyring{ring: ring}, nil
}

// parseKey reads one entry. The id is only repeated when it has the form of one: where the two
// halves are swapped, it is the key.
func parseKey(entry string) (seal.Key, error) {
	id, text, ok := strings.Cut(entry, ":")
	if !ok {
		return seal.Key{}, errors.New(": must be id:key, the key being 32 bytes in base64")
	}
	if err := seal.CheckID(id); err != nil {
		return seal.Key{}, fmt.Errorf(": %w", err)
	}
	k := seal.Key{ID: id}
	// The decoder would skip line breaks. Length 44 is the padded form.
	if len(text) == 44 {
		text = strings.TrimSuffix(text, "=")
	}
	text = strings.NewReplacer("-", "+", "_", "/").Replace(text)
	b, err := base64.RawStdEncoding.Strict().DecodeString(text)
	if err != nil || len(b) != len(k.Bytes) || strings.ContainsAny(text, "\r\n") {
		return seal.Key{}, fmt.Errorf(" (%s): must be 32 bytes in base64, as tenancy.NewKey makes it; a passphrase is refused", id)
	}
	copy(k.Bytes[:], b)
	return k, nil
}

// NewKey makes an entry for [ParseKeyring]: id, a colon, and 32 random bytes in base64. The result
// is a secret. The error is [ErrInvalid] for an id that is not 1 to 32 lower-case letters, digits,
// underscores or hyphens.
func NewKey(id string) (string, error) {
	if err := seal.CheckID(id); err != nil {
		return "", invalid(fmt.Errorf("key: %w", err))
	}
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails: the program ends first
	return id + ":" + base64.StdEncoding.EncodeToString(b[:]), nil
}

// IsZero reports whether k holds no keys.
func (k Keyring) IsZero() bool { return k.ring == nil }

// String returns the ids of the keys, the one that seals first.
func (k Keyring) String() string { return "keys[" + strings.Join(k.ring.IDs(), " ") + "]" }

// GoString returns the same as String.
func (k Keyring) GoString() string { return k.String() }

// Format writes the same as String, whatever the verb and the flags.
func (k Keyring) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// MarshalText returns the same as String, for JSON too.
func (k Keyring) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// LogValue returns the same as String.
func (k Keyring) LogValue() slog.Value { return slog.StringValue(k.String()) }
