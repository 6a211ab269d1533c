package seal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/seal"
)

func key(id string, b byte) seal.Key {
	k := seal.Key{ID: id}
	for i := range k.Bytes {
		k.Bytes[i] = b
	}
	return k
}

func ring(t testing.TB, keys ...seal.Key) *seal.Ring {
	t.Helper()
	r, err := seal.NewRing(keys...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sealed(t testing.TB, r *seal.Ring, plaintext string, aad ...string) []byte {
	t.Helper()
	rec, err := r.Seal([]byte(plaintext), aad...)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func TestOpenGivesBackWhatWasSealed(t *testing.T) {
	t.Parallel()
	r := ring(t, key("k1", 1))
	for _, plaintext := range []string{"", "x", "postgres password", strings.Repeat("long", 10_000)} {
		a, b := sealed(t, r, plaintext, "realm", "tenant"), sealed(t, r, plaintext, "realm", "tenant")
		if bytes.Equal(a, b) {
			t.Error("two records of one plaintext are equal")
		}
		if len(plaintext) > 1 && bytes.Contains(a, []byte(plaintext)) {
			t.Error("the record shows its plaintext")
		}
		if got, err := r.Open(a, "realm", "tenant"); err != nil || string(got) != plaintext {
			t.Errorf("Open = %q, %v", got, err)
		}
	}
}

func TestOpenRefusesEveryFlippedBitAndTruncation(t *testing.T) {
	t.Parallel()
	// k1 and k0 differ in one bit: a flipped key id must not lead to success under another key.
	r := ring(t, key("k1", 1), key("k0", 2))
	rec := sealed(t, r, "secret of tenant 1", "realm", "tenant 1")
	for i := range len(rec) * 8 {
		bad := bytes.Clone(rec)
		bad[i/8] ^= 1 << (i % 8)
		refused(t, r, bad, fmt.Sprintf("bit %d flipped", i))
	}
	for i := range rec {
		refused(t, r, rec[:i], fmt.Sprintf("cut to %d bytes", i))
		refused(t, r, rec[i+1:], fmt.Sprintf("first %d bytes lost", i+1))
	}
	refused(t, r, append(bytes.Clone(rec), 0), "one byte more")
	refused(t, r, nil, "nil")
}

func refused(t *testing.T, r *seal.Ring, rec []byte, what string) {
	t.Helper()
	got, err := r.Open(rec, "realm", "tenant 1")
	if got != nil || !errors.Is(err, seal.ErrTampered) && !errors.Is(err, seal.ErrUnknownKey) {
		t.Errorf("%s: %q, %v", what, got, err)
	}
}

func TestOpenRefusesARecordOfAnotherPlace(t *testing.T) {
	t.Parallel()
	r := ring(t, key("k1", 1))
	rec := sealed(t, r, "secret", "realm", "tenant 1", "password")
	for rule, aad := range map[string][]string{
		"other_realm":      {"realx", "tenant 1", "password"},
		"other_tenant":     {"realm", "tenant 2", "password"},
		"other_column":     {"realm", "tenant 1", "token"},
		"swapped":          {"tenant 1", "realm", "password"},
		"rotated":          {"password", "realm", "tenant 1"},
		"part_missing":     {"realm", "tenant 1"},
		"none":             nil,
		"part_more":        {"realm", "tenant 1", "password", ""},
		"joined":           {"realmtenant 1password"},
		"boundary_moved":   {"realmt", "enant 1", "password"},
		"boundary_to_next": {"realm", "tenant 1p", "assword"},
		"empty_between":    {"realm", "", "tenant 1", "password"},
	} {
		t.Run(rule, func(t *testing.T) {
			if got, err := r.Open(rec, aad...); !errors.Is(err, seal.ErrTampered) || got != nil {
				t.Errorf("Open = %q, %v", got, err)
			}
		})
	}
	if _, err := r.Open(rec, "realm", "tenant 1", "password"); err != nil {
		t.Error(err)
	}
}

func TestRotationOpensOldRecordsAndSealsUnderTheNewKey(t *testing.T) {
	t.Parallel()
	before, between, after := ring(t, key("old", 1)), ring(t, key("new", 2), key("old", 1)), ring(t, key("new", 2))
	rec := sealed(t, before, "secret", "tenant")
	got, err := between.Open(rec, "tenant")
	if err != nil || string(got) != "secret" {
		t.Fatalf("Open = %q, %v", got, err)
	}
	again := sealed(t, between, string(got), "tenant")
	if id, err := seal.KeyID(again); id != "new" || err != nil || between.Primary() != "new" {
		t.Errorf("KeyID = %q, %v; Primary = %q", id, err, between.Primary())
	}
	if got, err := after.Open(again, "tenant"); err != nil || string(got) != "secret" {
		t.Errorf("Open = %q, %v", got, err)
	}
	if _, err := after.Open(rec, "tenant"); !errors.Is(err, seal.ErrUnknownKey) || !strings.Contains(err.Error(), "old") {
		t.Errorf("a missing key is %v", err)
	}
	if _, err := ring(t, key("old", 3)).Open(rec, "tenant"); !errors.Is(err, seal.ErrTampered) {
		t.Errorf("another key of the same id is %v", err)
	}
}

func TestNewRingRefuses(t *testing.T) {
	t.Parallel()
	for rule, keys := range map[string][]seal.Key{
		"no_keys":         nil,
		"no_id":           {key("", 1)},
		"upper_case_id":   {key("K", 1)},
		"colon_in_id":     {key("a:b", 1)},
		"long_id":         {key(strings.Repeat("a", 33), 1)},
		"all_zero":        {key("a", 1), key("b", 0)},
		"id_twice":        {key("a", 1), key("b", 2), key("a", 3)},
		"same_bytes":      {key("a", 1), key("b", 2), key("c", 1)},
		"the_same_entire": {key("a", 1), key("a", 1)},
	} {
		t.Run(rule, func(t *testing.T) {
			if r, err := seal.NewRing(keys...); err == nil || r != nil {
				t.Errorf("NewRing = %v, %v", r, err)
			}
		})
	}
	ring(t, key(strings.Repeat("z", 32), 1), key("a_-9", 2))
}

func TestNilRingHoldsNoKeys(t *testing.T) {
	t.Parallel()
	var r *seal.Ring
	rec := sealed(t, ring(t, key("k1", 1)), "x")
	if _, err := r.Seal([]byte("x")); err == nil {
		t.Error("sealed without a key")
	}
	if _, err := r.Open(rec); !errors.Is(err, seal.ErrUnknownKey) {
		t.Errorf("Open = %v", err)
	}
	if r.Primary() != "" || r.IDs() != nil {
		t.Error("the nil Ring names keys")
	}
}

func TestKeysNeverPrint(t *testing.T) {
	t.Parallel()
	k := seal.Key{ID: "k1", Bytes: [32]byte([]byte("canary-canary-canary-canary-cana"))}
	r := ring(t, k)
	var out strings.Builder
	for _, v := range []any{
		k, &k, []seal.Key{k}, map[string]*seal.Key{"x": &k}, struct{ K seal.Key }{k}, struct{ K *seal.Key }{&k},
		r, *r, struct{ R *seal.Ring }{r}, struct{ r *seal.Ring }{r},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		if j, err := json.Marshal(v); err == nil {
			out.Write(j)
		}
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).Info("x", "v", v)
		}
	}
	text := out.String()
	for _, form := range []string{"canary", fmt.Sprintf("%x", "canary"), fmt.Sprintf("%X", "canary"), "99 97 110", "99,97,110", "0x63, 0x61", "Y2FuYXJ5"} {
		if strings.Contains(text, form) {
			t.Errorf("a key is shown as %q", form)
		}
	}
}

func FuzzOpen(f *testing.F) {
	r := ring(f, key("k1", 1), key("k2", 2))
	f.Add(sealed(f, r, "secret", "tenant"), "tenant")
	f.Add([]byte{0xA1, 2, 'k', '1'}, "")
	f.Add([]byte{0xA1, 255}, "")
	f.Add([]byte{}, "")
	f.Fuzz(func(t *testing.T, rec []byte, aad string) {
		// The seed was sealed with one part, so nothing opens with two.
		if got, err := r.Open(rec, aad, "more"); got != nil || !errors.Is(err, seal.ErrTampered) && !errors.Is(err, seal.ErrUnknownKey) {
			t.Fatalf("Open = %q, %v", got, err)
		}
		if id, err := seal.KeyID(rec); (err == nil) != (seal.CheckID(id) == nil) {
			t.Fatalf("KeyID = %q, %v", id, err)
		}
	})
}

func FuzzSealedRecord(f *testing.F) {
	f.Add([]byte("secret"), "realm", "tenant", uint(7), byte(1))
	f.Add([]byte{}, "", "", uint(0), byte(0))
	r := ring(f, key("k1", 1))
	f.Fuzz(func(t *testing.T, plaintext []byte, a, b string, at uint, flip byte) {
		rec := sealed(t, r, string(plaintext), a, b)
		if got, err := r.Open(rec, a, b); err != nil || !bytes.Equal(got, plaintext) {
			t.Fatalf("Open = %q, %v", got, err)
		}
		if a != b {
			if _, err := r.Open(rec, b, a); !errors.Is(err, seal.ErrTampered) {
				t.Fatalf("parts swapped: %v", err)
			}
		}
		if _, err := r.Open(rec, a+b); !errors.Is(err, seal.ErrTampered) {
			t.Fatalf("parts joined: %v", err)
		}
		if flip != 0 {
			rec[at%uint(len(rec))] ^= flip
			if got, err := r.Open(rec, a, b); err == nil {
				t.Fatalf("a changed record gave %q", got)
			}
		}
	})
}
