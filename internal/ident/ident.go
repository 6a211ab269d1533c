// Package ident decides which names are safe, makes the generated ones and quotes them for SQL.
//
// Nothing here folds, truncates or repairs a name, [Domain] and the outer white space of
// [DisplayName] apart: two spellings that end up as one name are how one tenant reaches the data of
// another, so doubt is an error. Errors name the rule and never repeat the input, which may be
// hostile to a terminal or a log.
//
// All functions are safe for concurrent use.
package ident

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxSlug        = 40
	maxDisplayName = 200
	maxUserKey     = 256
	maxDomain      = 253
	maxLabel       = 63
	maxSchema      = 48 // below PostgreSQL's 63, so that a derived name still fits
	maxTablespace  = 63
)

// Slug reports whether s may be the unique name of a tenant: a lower-case ASCII letter, then up to
// 39 lower-case letters, digits or hyphens. Upper case is refused rather than folded.
func Slug(s string) error {
	ok := len(s) >= 1 && len(s) <= maxSlug && lower(s[0])
	for i := 1; ok && i < len(s); i++ {
		ok = lower(s[i]) || digit(s[i]) || s[i] == '-'
	}
	if !ok {
		return errors.New("name must be a lower-case letter followed by at most 39 lower-case letters, digits or hyphens")
	}
	return nil
}

// DisplayName returns s without outer white space, or an error: at most 200 bytes of valid UTF-8
// that stay on one line and do not turn the direction of the text around them. Empty is allowed.
//
// The text is not normalised: a display name is shown and never compared, and NFC would make
// golang.org/x/text a direct dependency for that alone.
func DisplayName(s string) (string, error) {
	s = strings.TrimSpace(s)
	switch {
	case len(s) > maxDisplayName:
		return "", fmt.Errorf("display name must be at most %d bytes", maxDisplayName)
	case !utf8.ValidString(s):
		return "", errors.New("display name must be valid UTF-8")
	case strings.ContainsFunc(s, unprintable):
		return "", errors.New("display name must not contain control, line break or text direction characters")
	}
	return s, nil
}

func unprintable(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control)
}

// UserKey reports whether s may identify a user: 1 to 256 bytes of valid UTF-8 without NUL and
// other control characters. Nothing is folded: keys are compared byte by byte.
func UserKey(s string) error {
	switch {
	case s == "":
		return errors.New("user key must not be empty")
	case len(s) > maxUserKey:
		return fmt.Errorf("user key must be at most %d bytes", maxUserKey)
	case printableASCII(s): // nearly all; every request passes here
		return nil
	case !utf8.ValidString(s):
		return errors.New("user key must be valid UTF-8")
	case strings.ContainsFunc(s, unicode.IsControl):
		return errors.New("user key must not contain control characters")
	}
	return nil
}

func printableASCII(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// Domain returns the canonical form of a host name: ASCII letters in lower case, one trailing dot
// removed. Names are at most 253 bytes, labels 1 to 63 bytes of letters, digits and inner hyphens.
//
// Ports, IP literals, a number as the last label (resolvers read 127.1 as an address) and
// non-ASCII names are refused; an internationalised name is accepted in its punycode form.
func Domain(s string) (string, error) {
	s = strings.TrimSuffix(s, ".")
	switch {
	case s == "":
		return "", errors.New("domain must not be empty")
	case len(s) > maxDomain:
		return "", fmt.Errorf("domain must be at most %d bytes", maxDomain)
	case strings.HasPrefix(s, "["), isAddr(s):
		return "", errors.New("domain must be a name, not an IP address")
	case strings.Contains(s, ":"):
		return "", errors.New("domain must not carry a port")
	}
	b := []byte(s)
	for i, c := range b {
		switch {
		case c >= utf8.RuneSelf:
			return "", errors.New("domain must be ASCII: write internationalised names in punycode (xn--)")
		case c >= 'A' && c <= 'Z':
			b[i] = c + ('a' - 'A')
		}
	}
	s = string(b)
	var last string
	for label := range strings.SplitSeq(s, ".") {
		if err := domainLabel(label); err != nil {
			return "", err
		}
		last = label
	}
	if numeric(last) {
		return "", errors.New("domain must not end in a number: it would be read as an IP address")
	}
	return s, nil
}

func domainLabel(s string) error {
	switch {
	case s == "":
		return errors.New("domain must not have an empty label")
	case len(s) > maxLabel:
		return fmt.Errorf("domain must not have a label over %d bytes", maxLabel)
	case s[0] == '-' || s[len(s)-1] == '-':
		return errors.New("domain must not have a label that begins or ends with a hyphen")
	}
	for i := range len(s) {
		if !lower(s[i]) && !digit(s[i]) && s[i] != '-' {
			return errors.New("domain must be made of letters, digits, hyphens and dots")
		}
	}
	return nil
}

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// numeric reports whether resolvers of the inet_aton kind read the label as part of an address.
func numeric(label string) bool {
	if hex, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(label, "0123456789") == ""
}

// Schema reports whether s, supplied by an operator, may name a schema or a role: 1 to 48 bytes of
// lower-case ASCII letters, digits and underscores, not beginning with a digit. Names that
// PostgreSQL or this library gives a meaning are refused: pg_*, template*, tenancy*, public,
// information_schema, postgres, none, session_user, current_user and current_role.
//
// A longer name is refused, never truncated: PostgreSQL truncates at 63 bytes, and two long names
// then mean one schema.
func Schema(s string) error {
	if s == "" || len(s) > maxSchema {
		return fmt.Errorf("schema must be 1 to %d bytes", maxSchema)
	}
	for i := range len(s) {
		if c := s[i]; !lower(c) && c != '_' && (i == 0 || !digit(c)) {
			return errors.New("schema must be made of lower-case letters, digits and underscores, and not begin with a digit")
		}
	}
	switch s {
	case "public", "information_schema", "postgres", "none", "session_user", "current_user", "current_role":
		return errors.New("schema must not be a name reserved by PostgreSQL")
	}
	for _, prefix := range []string{"pg_", "template", "tenancy"} {
		if strings.HasPrefix(s, prefix) {
			return fmt.Errorf("schema must not begin with %s, which is reserved", prefix)
		}
	}
	return nil
}

// Tablespace reports whether s may name a tablespace that an administrator has made: 1 to 63 bytes of valid UTF-8 without control characters. Of the names that begin with
// pg_, which are PostgreSQL's own, pg_default alone is one in which a table can be.
func Tablespace(s string) error {
	switch {
	case s == "" || len(s) > maxTablespace:
		return fmt.Errorf("tablespace must be 1 to %d bytes", maxTablespace)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unprintable):
		return errors.New("tablespace must be valid UTF-8 without control, line break or text direction characters")
	case strings.HasPrefix(s, "pg_") && s != "pg_default":
		return errors.New("tablespace must not begin with pg_, which is reserved, pg_default excepted")
	}
	return nil
}

// NewPlace makes a name for a tenant's schema and its roles: t_ and 20 lower-case hexadecimal
// digits, 80 bits from crypto/rand. It says nothing about the tenant, because the catalogs of
// PostgreSQL show it to every other one.
func NewPlace() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails: the program ends first
	return "t_" + hex.EncodeToString(b[:])
}

// Quote returns parts as one qualified SQL identifier: each part in double quotes, inner double
// quotes doubled, joined by dots. It always quotes, so that no keyword and no capital letter
// changes the meaning.
//
// Quote changes no name and judges none: the caller has validated the parts. PostgreSQL refuses
// what no quoting can express (an empty name, NUL, invalid UTF-8) and truncates over 63 bytes.
func Quote(parts ...string) string {
	var b strings.Builder
	for i, p := range parts {
		if i > 0 {
			b.WriteByte('.')
		}
		b.WriteByte('"')
		b.WriteString(strings.ReplaceAll(p, `"`, `""`))
		b.WriteByte('"')
	}
	return b.String()
}

// Literal returns s as an SQL string literal that means the same under both settings of
// standard_conforming_strings. With a backslash in s that is the escape form, with a space in front
// so that the E cannot join a word before it.
//
// Literal judges no text: PostgreSQL refuses NUL and invalid UTF-8.
func Literal(s string) string {
	s = strings.ReplaceAll(s, `'`, `''`)
	if !strings.Contains(s, `\`) {
		return `'` + s + `'`
	}
	return ` E'` + strings.ReplaceAll(s, `\`, `\\`) + `'`
}

func lower(c byte) bool { return c >= 'a' && c <= 'z' }
func digit(c byte) bool { return c >= '0' && c <= '9' }
