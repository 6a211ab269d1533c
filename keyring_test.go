package tenancy_test

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy"
)

const rawKey = "canary\xff\xfe-canary-canary-canary-ca" // with bytes that differ between the alphabets

func TestParseKeyringReadsBothAlphabetsPaddedOrNot(t *testing.T) {
	t.Parallel()
	if len(rawKey) != 32 {
		t.Fatal(len(rawKey))
	}
	for _, e := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding} {
		second, err := tenancy.NewKey("old_1")
		if err != nil {
			t.Fatal(err)
		}
		k, err := tenancy.ParseKeyring(" 2026-01:" + e.EncodeToString([]byte(rawKey)) + " , " + second + "\n")
		if err != nil || k.IsZero() {
			t.Fatal(err)
		}
		if k.String() != "keys[2026-01 old_1]" {
			t.Errorf("String() = %s", k)
		}
	}
}

func TestKeyringPrintsIDsOnly(t *testing.T) {
	t.Parallel()
	k, err := tenancy.ParseKeyring("k1:" + base64.StdEncoding.EncodeToString([]byte(rawKey)))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{k, &k, []tenancy.Keyring{k}, struct{ K tenancy.Keyring }{k}, struct{ k tenancy.Keyring }{k}, &struct{ K *tenancy.Keyring }{&k}, tenancy.Keyring{}} {
		wantNoCanary(t, shown(v), rawKey)
	}
	if !strings.Contains(shown(k), "keys[k1]") || !(tenancy.Keyring{}).IsZero() || (tenancy.Keyring{}).String() != "keys[]" {
		t.Error("a keyring does not print as its ids")
	}
}

func TestParseKeyringRefuses(t *testing.T) {
	t.Parallel()
	good := base64.StdEncoding.EncodeToString([]byte(rawKey))
	other, _ := tenancy.NewKey("k2")
	for rule, c := range map[string]struct{ in, says string }{
		"empty":            {"", "keys must not be empty"},
		"blank":            {" \n", "keys must not be empty"},
		"no_id":            {good, "key 1: must be id:key"},
		"empty_id":         {":" + good, "key 1: id must be"},
		"upper_case_id":    {"K1:" + good, "key 1: id must be"},
		"halves_swapped":   {good + ":k1", "key 1: id must be"},
		"empty_key":        {"k1:", "key 1 (k1): must be 32 bytes"},
		"passphrase":       {"k1:canary horse battery staple", "key 1 (k1): must be 32 bytes"},
		"hex":              {"k1:" + strings.Repeat("ca", 32), "key 1 (k1): must be 32 bytes"},
		"31_bytes":         {"k1:" + base64.StdEncoding.EncodeToString([]byte(rawKey[:31])), "key 1 (k1): must be 32 bytes"},
		"33_bytes":         {"k1:" + base64.StdEncoding.EncodeToString([]byte(rawKey+"x")), "key 1 (k1): must be 32 bytes"},
		"padded_twice":     {"k1:" + good + "=", "key 1 (k1): must be 32 bytes"},
		"line_break":       {"k1:" + good[:20] + "\n" + good[20:], "key 1 (k1): must be 32 bytes"},
		"trailing_bits":    {"k1:" + good[:42] + "9=", "key 1 (k1): must be 32 bytes"},
		"second_is_wrong":  {other + ",k1:canary", "key 2 (k1): must be 32 bytes"},
		"trailing_comma":   {"k1:" + good + ",", "key 2: must be id:key"},
		"all_zero":         {"k1:" + strings.Repeat("A", 43), "key k1: bytes must not be all zero"},
		"id_twice":         {other + ",k2:" + good, "key k2: id is given twice"},
		"bytes_twice":      {"k1:" + good + "," + other + ",k3:" + good, "key k3: bytes are those of key k1"},
		"space_in_the_key": {"k1: " + good, "key 1 (k1): must be 32 bytes"},
	} {
		t.Run(rule, func(t *testing.T) {
			k, err := tenancy.ParseKeyring(c.in)
			if !k.IsZero() || !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("ParseKeyring = %v, %v; want %q", k, err, c.says)
			}
			for _, secret := range []string{good[:8], "canary", rawKey[:8]} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error shows a key: %v", err)
				}
			}
		})
	}
}

func TestNewKeyMakesAnEntry(t *testing.T) {
	t.Parallel()
	a, err := tenancy.NewKey("k1")
	b, _ := tenancy.NewKey("k1")
	if err != nil || a == b || !strings.HasPrefix(a, "k1:") {
		t.Errorf("NewKey = %q, %q, %v", a, b, err)
	}
	if _, err := tenancy.ParseKeyring(a); err != nil {
		t.Error(err)
	}
	if k, err := tenancy.NewKey("K:1"); k != "" || !errors.Is(err, tenancy.ErrInvalid) {
		t.Errorf("NewKey = %q, %v", k, err)
	}
}
