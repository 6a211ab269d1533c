package tenancy_test

import (
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy"
)

const canary = "canary-4f1d&'\"é"

// shown prints v in every way a program prints values.
func shown(v any) string {
	var b strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%#q", "%x", "%X", "% x", "%d", "%t", "%c", "%U", "%e", "%20.3v", "%!"} {
		fmt.Fprintf(&b, verb+"\n", v)
	}
	fmt.Fprintln(&b, v)
	fmt.Fprint(&b, fmt.Errorf("an argument too many: %d", 1), fmt.Sprintf("%d", append([]any{1}, v)...))
	if j, err := json.Marshal(v); err == nil {
		b.Write(j)
	}
	if x, err := xml.Marshal(v); err == nil {
		b.Write(x)
	}
	_ = gob.NewEncoder(&b).Encode(v)
	for _, h := range []slog.Handler{slog.NewTextHandler(&b, nil), slog.NewJSONHandler(&b, nil)} {
		slog.New(h).Info("x", "v", v)
		slog.New(h).With("v", v).WithGroup("g").Info("x", slog.Any("v", []any{v}))
	}
	return b.String()
}

// wantNoCanary looks for secret in the usual encodings.
func wantNoCanary(t *testing.T, text, secret string) {
	t.Helper()
	start := secret[:6]
	for _, form := range []string{
		start, hex.EncodeToString([]byte(start)), strings.ToUpper(hex.EncodeToString([]byte(start))), fmt.Sprintf("% x", start),
		base64.StdEncoding.EncodeToString([]byte(start)), strings.Trim(fmt.Sprint([]byte(start)), "[]"), fmt.Sprintf("%#v", []byte(start))[8:20],
	} {
		if i := strings.Index(text, form); i >= 0 {
			t.Errorf("the secret is shown as %q: %.200s", form, text[max(0, i-40):])
		}
	}
}

func TestSecretPrintsAsAConstant(t *testing.T) {
	t.Parallel()
	s := tenancy.Secret(canary)
	for name, v := range map[string]any{
		"value": s, "pointer": &s, "slice": []tenancy.Secret{s}, "array": [1]*tenancy.Secret{&s}, "map": map[string]tenancy.Secret{"k": s},
		"field": struct{ S tenancy.Secret }{s}, "pointer_field": struct{ S *tenancy.Secret }{&s},
		"pointer_to_struct": &struct{ S tenancy.Secret }{s}, "deep": &struct{ A []any }{[]any{struct{ S tenancy.Secret }{s}, &s}},
		"unexported_pointer": struct{ s *tenancy.Secret }{&s},
	} {
		t.Run(name, func(t *testing.T) { wantNoCanary(t, shown(v), canary) })
	}
	for _, got := range []string{s.String(), s.GoString(), fmt.Sprintf("%+v|%#v|%x", s, s, s), tenancy.Secret("").String()} {
		if strings.Trim(strings.ReplaceAll(got, "[secret]", ""), "|") != "" {
			t.Errorf("printed %q", got)
		}
	}
	if j, err := json.Marshal(s); string(j) != `"[secret]"` || err != nil {
		t.Errorf("JSON is %s, %v", j, err)
	}
	if s.Reveal() != canary {
		t.Error("Reveal does not give the text")
	}
}

func TestSecretIsReadFromJSON(t *testing.T) {
	t.Parallel()
	var v struct{ Password tenancy.Secret }
	if err := json.Unmarshal([]byte(`{"Password":"p"}`), &v); err != nil || v.Password.Reveal() != "p" {
		t.Errorf("read %q, %v", v.Password.Reveal(), err)
	}
}

// The limits that the comment of Secret states, so that it is amended when fmt changes.
func TestSecretShowsWhereFmtCallsNoMethod(t *testing.T) {
	t.Parallel()
	s := tenancy.Secret(canary)
	verbs := []string{"%p", "%w", "%s"} // in a variable, so that vet does not object
	for what, text := range map[string]string{
		"unexported field": fmt.Sprintf("%+v", struct{ s tenancy.Secret }{s}),
		"%p":               fmt.Sprintf(verbs[0], s),
		"%w":               fmt.Sprintf(verbs[1], s),
		"%s of a pointer":  fmt.Sprintf(verbs[2], []any{&struct{ S tenancy.Secret }{s}}),
	} {
		if !strings.Contains(text, "canary") {
			t.Errorf("%s no longer shows a Secret: %s", what, text)
		}
	}
}
