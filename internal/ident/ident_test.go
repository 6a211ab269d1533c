package ident_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/ident"
)

func TestSlugAcceptsOnlyTheRule(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"a", "acme", "a-1", "a--b", "acme-", "a" + strings.Repeat("9", 39)} {
		if err := ident.Slug(s); err != nil {
			t.Errorf("Slug(%q) = %v", s, err)
		}
	}
	for _, s := range []string{"", "A", "Acme", "aCme", "1a", "-a", "a_b", "a b", "a,b", `a"b`, "../x", "$user", "a\n", "a\x00", "ä", "aé", "a\u202eb", "ａcme", "a" + strings.Repeat("b", 40)} {
		err := ident.Slug(s)
		if err == nil {
			t.Errorf("Slug(%q) accepted", s)
		} else if !strings.HasPrefix(err.Error(), "name must") {
			t.Errorf("Slug(%q) = %v: the rule is not named", s, err)
		}
	}
}

func TestDisplayNameIsOneLineOfText(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"": "", "  Acme GmbH & Co. \u00a0": "Acme GmbH & Co.", "Ünïcode 株式会社 🎉": "Ünïcode 株式会社 🎉",
		"שלום": "שלום", "e\u0301": "e\u0301", strings.Repeat("x", 200): strings.Repeat("x", 200),
	} {
		if got, err := ident.DisplayName(in); err != nil || got != want {
			t.Errorf("DisplayName(%q) = %q, %v", in, got, err)
		}
	}
	for _, s := range []string{"a\x00b", "a\nb", "a\x7fb", "a\u0085b", "a\u2028b", "a\u202eb", "a\u2066b", "\xff", strings.Repeat("x", 201), strings.Repeat("é", 101)} {
		if got, err := ident.DisplayName(s); err == nil || got != "" {
			t.Errorf("DisplayName(%q) = %q, %v", s, got, err)
		}
	}
}

func TestUserKeyIsKeptByteForByte(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"a", "Bob@x.org", "https://issuer|sub", " padded ", "é", strings.Repeat("k", 256)} {
		if err := ident.UserKey(s); err != nil {
			t.Errorf("UserKey(%q) = %v", s, err)
		}
	}
	for _, s := range []string{"", "a\x00", "a\n", "\x7f", "\u0085", "\xc3", strings.Repeat("k", 257)} {
		if ident.UserKey(s) == nil {
			t.Errorf("UserKey(%q) accepted", s)
		}
	}
}

func TestDomainIsCanonical(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"example.com": "example.com", "EXAMPLE.Com.": "example.com", "localhost": "localhost",
		"xn--bcher-kva.example": "xn--bcher-kva.example", "1a.example": "1a.example", "7.example": "7.example",
		"a.0xz": "a.0xz", strings.Repeat(strings.Repeat("a", 62)+".", 4) + "b": strings.Repeat(strings.Repeat("a", 62)+".", 4) + "b",
	} {
		got, err := ident.Domain(in)
		if err != nil || got != want {
			t.Errorf("Domain(%q) = %q, %v", in, got, err)
		}
		if again, err := ident.Domain(got); err != nil || again != got {
			t.Errorf("Domain(%q) is not stable: %q, %v", got, again, err)
		}
	}
	for rule, s := range map[string]string{
		"empty": "", "only_dot": ".", "two_trailing_dots": "a..", "empty_label": "a..b", "leading_dot": ".a",
		"ipv4": "127.0.0.1", "ipv4_dot": "127.0.0.1.", "ipv6": "::1", "bracketed": "[::1]", "bracketed_port": "[::1]:80",
		"port": "example.com:80", "short_address": "127.1", "decimal_address": "2130706433", "hex_address": "0X7F000001",
		"non_ascii": "bücher.example", "dotted_capital_i": "İ.example", "full_width": "ａ.example", "underscore": "a_b.example",
		"space": "a .b", "slash": "a/b", "star": "*.example.com", "percent": "a%2eb", "userinfo": "u@a.b", "comma": "a,b",
		"nul": "a\x00.b", "newline": "a.b\n", "leading_hyphen": "-a.b", "trailing_hyphen": "a-.b",
		"long_label": strings.Repeat("a", 64) + ".b", "long": strings.Repeat("a.", 126) + "ab",
	} {
		t.Run(rule, func(t *testing.T) {
			if got, err := ident.Domain(s); err == nil || got != "" {
				t.Errorf("Domain(%q) = %q, %v", s, got, err)
			}
		})
	}
}

func TestSchemaRefusesReservedNames(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"acme", "_x", "a1", "pgx", "publica", "nonesuch", strings.Repeat("a", 48), ident.NewPlace()} {
		if err := ident.Schema(s); err != nil {
			t.Errorf("Schema(%q) = %v", s, err)
		}
	}
	for _, s := range []string{
		"", "1a", "a-b", "A", "a.b", `a"b`, "a b", "$user", "a\x00", "é", strings.Repeat("a", 49),
		"pg_", "pg_toast", "public", "information_schema", "postgres", "template0", "template1", "template_x",
		"none", "session_user", "current_user", "current_role", "tenancy", "tenancy_ext", "tenancyx",
	} {
		if err := ident.Schema(s); err == nil {
			t.Errorf("Schema(%q) accepted", s)
		} else if !strings.HasPrefix(err.Error(), "schema must") {
			t.Errorf("Schema(%q) = %v: the rule is not named", s, err)
		}
	}
}

func TestNewPlaceIsRandomAndSafe(t *testing.T) {
	t.Parallel()
	form, seen := regexp.MustCompile(`^t_[0-9a-f]{20}$`), map[string]bool{}
	for range 1000 {
		p := ident.NewPlace()
		if !form.MatchString(p) || ident.Schema(p) != nil || seen[p] {
			t.Fatalf("NewPlace() = %q", p)
		}
		seen[p] = true
	}
}

func TestQuoteDoublesQuotes(t *testing.T) {
	t.Parallel()
	for want, parts := range map[string][]string{
		``: nil, `"a"`: {"a"}, `"a"."B c"`: {"a", "B c"}, `"a""b"`: {`a"b`}, `""""."""."""""`: {`"`, `".""`}, `"a.b"`: {"a.b"}, `""`: {""},
	} {
		if got := ident.Quote(parts...); got != want {
			t.Errorf("Quote(%q) = %s, want %s", parts, got, want)
		}
	}
}

func TestLiteralMeansTheSameUnderBothSettings(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		``: `''`, `a`: `'a'`, `it's`: `'it''s'`, `\`: ` E'\\'`, `\'`: ` E'\\'''`, `a\'; drop table x; --`: ` E'a\\''; drop table x; --'`, `$$`: `'$$'`,
	} {
		if got := ident.Literal(in); got != want {
			t.Errorf("Literal(%q) = %s, want %s", in, got, want)
		}
		for _, standard := range []bool{true, false} {
			if back, ok := readLiteral(ident.Literal(in), standard); !ok || back != in {
				t.Errorf("standard_conforming_strings %v reads %s as %q", standard, ident.Literal(in), back)
			}
		}
	}
}

func FuzzSlug(f *testing.F) {
	for _, s := range []string{"acme", "Acme", "a-b", "", "a\n", "a" + strings.Repeat("b", 40)} {
		f.Add(s)
	}
	form := regexp.MustCompile(`\A[a-z][a-z0-9-]{0,39}\z`)
	f.Fuzz(func(t *testing.T, s string) {
		if err := ident.Slug(s); (err == nil) != form.MatchString(s) {
			t.Fatalf("Slug(%q) = %v", s, err)
		}
	})
}

func FuzzQuote(f *testing.F) {
	f.Add("a", "b")
	f.Add(`a"`, `".""`)
	f.Add(`\'`, `'\`)
	f.Fuzz(func(t *testing.T, a, b string) {
		q := ident.Quote(a, b)
		first, rest, ok := readIdentifier(q)
		if !ok || first != a || !strings.HasPrefix(rest, ".") {
			t.Fatalf("Quote(%q, %q) = %s", a, b, q)
		}
		if second, rest, ok := readIdentifier(rest[1:]); !ok || second != b || rest != "" {
			t.Fatalf("Quote(%q, %q) = %s", a, b, q)
		}
		for _, standard := range []bool{true, false} {
			if back, ok := readLiteral(ident.Literal(a), standard); !ok || back != a {
				t.Fatalf("standard_conforming_strings %v reads %s as %q", standard, ident.Literal(a), back)
			}
		}
	})
}

// readIdentifier reads one quoted identifier as PostgreSQL's scanner does.
func readIdentifier(s string) (name, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		return "", "", false
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		if s[i] != '"' {
			b.WriteByte(s[i])
		} else if i+1 < len(s) && s[i+1] == '"' {
			b.WriteByte('"')
			i++
		} else {
			return b.String(), s[i+1:], true
		}
	}
	return "", "", false
}

// readLiteral reads a whole string literal as PostgreSQL's scanner does.
func readLiteral(s string, standardConformingStrings bool) (string, bool) {
	s, escapes := strings.CutPrefix(s, " E")
	escapes = escapes || !standardConformingStrings
	if len(s) < 2 || s[0] != '\'' {
		return "", false
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case escapes && s[i] == '\\':
			if i+1 == len(s) || s[i+1] != '\\' && s[i+1] != '\'' {
				return "", false
			}
			i++
			b.WriteByte(s[i])
		case s[i] != '\'':
			b.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == '\'':
			b.WriteByte('\'')
			i++
		default:
			return b.String(), i == len(s)-1
		}
	}
	return "", false
}

func TestTablespaceRefusesReservedNames(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"fast", "Fast 1", `a"b`, "tenancy", "pg_default", "é", strings.Repeat("a", 63)} {
		if err := ident.Tablespace(s); err != nil {
			t.Errorf("Tablespace(%q) = %v", s, err)
		}
	}
	for _, s := range []string{"", "pg_global", "pg_", "pg_fast", "a\x00", "a\nb", "\xff", strings.Repeat("a", 64)} {
		if err := ident.Tablespace(s); err == nil {
			t.Errorf("Tablespace(%q) accepted", s)
		}
	}
}
