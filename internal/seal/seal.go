// Package seal encrypts what the primary keeps at rest, with AES-256-GCM under one of several keys.
//
// A record says which key opens it, so keys can be rotated: put the new one first, seal every
// record again, then take the old one away. What a record belongs to (realm, tenant, column) is
// given as additional data and must be the same at [Ring.Open]: a record copied into another row
// does not open. An older record of the same row does, unless the data names the row's version.
//
// Sealing does not protect from who holds the keys, nor the memory of the process.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
)

// A record is: the format, the length of the key id, the key id, then what the AEAD made (a
// nonce of 12 bytes, the ciphertext, a tag of 16 bytes). The additional data covers all of it.
const (
	format    = 0xA1 // version 1; not ASCII and not valid UTF-8, so that text is not taken for a record
	maxID     = 32
	headSize  = 2
	redaction = "[secret]"
)

var (
	// ErrUnknownKey: the record was sealed under a key that the ring does not hold; the text names it.
	ErrUnknownKey = errors.New("seal: unknown key")
	// ErrTampered: the record is not what was sealed, belongs elsewhere, or the key of that id is another one.
	ErrTampered = errors.New("seal: record was changed or belongs elsewhere")

	errNoKeys = errors.New("seal: the ring holds no keys")
)

// Key is one key of a [Ring]. It prints as its id alone, also inside other values; held in an
// unexported field of another struct it does not, because fmt cannot call methods there.
type Key struct {
	ID    string   // 1 to 32 of a-z, 0-9, _ and -; stored in clear in each record
	Bytes [32]byte // not all zero
}

// String returns the id.
func (k Key) String() string { return "key " + k.ID + " " + redaction }

// GoString returns the id.
func (k Key) GoString() string { return k.String() }

// Format writes the id for every verb.
func (k Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// MarshalText returns the id, for JSON too.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// LogValue returns the id.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Ring seals under its primary key and opens under all of its keys. It is immutable and safe for
// concurrent use. The nil Ring holds no keys: it seals nothing and knows no record's key.
type Ring struct {
	ids   []string // the primary first
	aeads map[string]cipher.AEAD
}

// NewRing makes a ring of which the first key is the primary. Without keys, with an id or a key
// given twice, and with a key that is all zero, it fails with an error that names ids only.
//
// One key may seal 2^32 records.
func NewRing(keys ...Key) (*Ring, error) {
	if len(keys) == 0 {
		return nil, errors.New("keys must not be empty")
	}
	r := &Ring{aeads: make(map[string]cipher.AEAD, len(keys))}
	for i, k := range keys {
		if err := CheckID(k.ID); err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
		if k.Bytes == [32]byte{} {
			return nil, fmt.Errorf("key %s: bytes must not be all zero", k.ID)
		}
		for _, before := range keys[:i] {
			switch {
			case before.ID == k.ID:
				return nil, fmt.Errorf("key %s: id is given twice", k.ID)
			case before.Bytes == k.Bytes:
				return nil, fmt.Errorf("key %s: bytes are those of key %s", k.ID, before.ID)
			}
		}
		aead, err := newAEAD(k)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", k.ID, err)
		}
		r.ids = append(r.ids, k.ID)
		r.aeads[k.ID] = aead
	}
	return r, nil
}

func newAEAD(k Key) (cipher.AEAD, error) {
	block, err := aes.NewCipher(k.Bytes[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// CheckID reports whether id may name a key: 1 to 32 lower-case letters, digits, underscores and
// hyphens. The error does not repeat the id.
func CheckID(id string) error {
	ok := len(id) >= 1 && len(id) <= maxID
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-'
	}
	if !ok {
		return fmt.Errorf("id must be 1 to %d lower-case letters, digits, underscores or hyphens", maxID)
	}
	return nil
}

// Primary returns the id of the key that seals, "" for the nil Ring.
func (r *Ring) Primary() string {
	if r == nil || len(r.ids) == 0 {
		return ""
	}
	return r.ids[0]
}

// IDs returns the ids of all keys, the primary first.
func (r *Ring) IDs() []string {
	if r == nil {
		return nil
	}
	return slices.Clone(r.ids)
}

// Seal encrypts plaintext under the primary key and binds it to aad: Open needs the same parts in
// the same order. The same plaintext gives another record each time. It fails for a ring without
// keys only.
func (r *Ring) Seal(plaintext []byte, aad ...string) ([]byte, error) {
	id := r.Primary()
	if id == "" {
		return nil, errNoKeys
	}
	aead := r.aeads[id]
	record := make([]byte, 0, headSize+len(id)+len(plaintext)+aead.Overhead())
	record = append(record, format, byte(len(id)))
	record = append(record, id...)
	return aead.Seal(record, nil, plaintext, additional(id, aad)), nil
}

// Open decrypts a record of Seal. The error is [ErrUnknownKey], naming the key, or [ErrTampered],
// which is also the answer to other aad and to anything that is no record.
func (r *Ring) Open(record []byte, aad ...string) ([]byte, error) {
	id, err := KeyID(record)
	if err != nil {
		return nil, err
	}
	var aead cipher.AEAD
	if r != nil {
		aead = r.aeads[id]
	}
	if aead == nil {
		return nil, fmt.Errorf("%w: %s", ErrUnknownKey, id)
	}
	plaintext, err := aead.Open(nil, nil, record[headSize+len(id):], additional(id, aad))
	if err != nil {
		return nil, ErrTampered
	}
	return plaintext, nil
}

// KeyID returns the id of the key that a record names, without opening it: what it says is not
// proved. The error is [ErrTampered] for anything that is no record.
func KeyID(record []byte) (string, error) {
	if len(record) < headSize || record[0] != format {
		return "", ErrTampered
	}
	n := int(record[1])
	if len(record) < headSize+n {
		return "", ErrTampered
	}
	id := string(record[headSize : headSize+n])
	if CheckID(id) != nil {
		return "", ErrTampered
	}
	return id, nil
}

// additional encodes what a record is bound to. Each part carries its length, so that no two
// lists of parts have one encoding, as plain concatenation would.
func additional(id string, parts []string) []byte {
	b := appendPart(nil, string([]byte{format}))
	b = appendPart(b, id)
	for _, p := range parts {
		b = appendPart(b, p)
	}
	return b
}

func appendPart(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint64(b, uint64(len(s))), s...)
}
