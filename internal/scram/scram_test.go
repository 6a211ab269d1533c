package scram_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"regexp"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/scram"
)

// The exchange of RFC 7677, section 3: a server that holds our verifier must accept the RFC's
// client proof and give the RFC's server signature.
func TestVerifierServesTheExchangeOfRFC7677(t *testing.T) {
	t.Parallel()
	const (
		salt  = "W22ZaJ0SNY7soEsUEjb6gQ=="
		nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
		auth  = "n=user,r=rOprNGfwEbeRWgbNEkqO,r=" + nonce + ",s=" + salt + ",i=4096,c=biws,r=" + nonce
	)
	v, err := scram.Derive("pencil", decode(t, salt), 4096)
	if err != nil {
		t.Fatal(err)
	}
	keys, ok := strings.CutPrefix(v, "SCRAM-SHA-256$4096:"+salt+"$")
	if !ok {
		t.Fatalf("verifier = %s", v)
	}
	stored, server, _ := strings.Cut(keys, ":")

	clientKey := make([]byte, sha256.Size)
	subtle.XORBytes(clientKey, decode(t, "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="), mac(decode(t, stored), auth))
	if got := sha256.Sum256(clientKey); !bytes.Equal(got[:], decode(t, stored)) {
		t.Error("the client proof is not accepted")
	}
	if got := mac(decode(t, server), auth); base64.StdEncoding.EncodeToString(got) != "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=" {
		t.Error("the server signature differs")
	}
}

func TestVerifierSaltsEachTime(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^SCRAM-SHA-256\$5000:[A-Za-z0-9+/]{22}==\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=$`)
	a, err := scram.Verifier("pencil", 5000)
	if err != nil || !form.MatchString(a) {
		t.Fatalf("Verifier = %q, %v", a, err)
	}
	if b, _ := scram.Verifier("pencil", 5000); a == b {
		t.Error("two verifiers share a salt")
	}
}

func TestVerifierRefusesWhatNeedsSASLprep(t *testing.T) {
	t.Parallel()
	for _, p := range []string{"", "pencilé", "pencil\x00", "pencil\n", "pencil\x7f", "pencil\u00a0", "pencil\xff"} {
		if v, err := scram.Verifier(p, 0); err == nil || v != "" || p != "" && strings.Contains(err.Error(), "pencil") {
			t.Errorf("Verifier(%q) = %q, %v", p, v, err)
		}
	}
	for _, n := range []int{-1, 1, 4095, 1_000_001} {
		if v, err := scram.Verifier("pencil", n); err == nil || v != "" {
			t.Errorf("Verifier with %d iterations = %q, %v", n, v, err)
		}
	}
}

func TestVerifierOfARandomPasswordHasOneIteration(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^SCRAM-SHA-256\$1:[A-Za-z0-9+/]{22}==\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=$`)
	p := password(t)
	a, err := scram.RandomVerifier(p)
	if err != nil || !form.MatchString(a) {
		t.Fatalf("RandomVerifier = %q, %v", a, err)
	}
	if b, _ := scram.RandomVerifier(p); a == b {
		t.Error("two verifiers share a salt")
	}
}

func TestRandomVerifierRefusesWhatPasswordDoesNotMake(t *testing.T) {
	t.Parallel()
	p := password(t)
	for name, chosen := range map[string]string{
		"empty": "", "chosen": "pencil", "phrase": "correct horse battery staple, and a good bit more", "short": p[:42], "long": p + "A", "padded": p + "=",
		"newline": p + "\n", "newline_inside": p[:20] + "\n" + p[20:], "newline_instead": p[:42] + "\n", "other_alphabet": "+/" + p[2:], "bits_left": p[:42] + "B",
	} {
		v, err := scram.RandomVerifier(chosen)
		if err == nil || v != "" || len(chosen) > 5 && strings.Contains(err.Error(), chosen) {
			t.Errorf("%s: RandomVerifier(%q) = %q, %v", name, chosen, v, err)
		}
	}
}

func TestPasswordHas256RandomBits(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 100 {
		p, err := scram.Password()
		if err != nil || seen[p] {
			t.Fatalf("Password() = %q, %v", p, err)
		}
		seen[p] = true
		if b, err := base64.RawURLEncoding.DecodeString(p); err != nil || len(b) != 32 {
			t.Fatalf("Password() holds %d bytes, %v", len(b), err)
		}
	}
	p := password(t)
	if _, err := scram.Verifier(p, 0); err != nil {
		t.Error(err)
	}
	if _, err := scram.RandomVerifier(p); err != nil {
		t.Error(err)
	}
}

func password(tb testing.TB) string {
	tb.Helper()
	p, err := scram.Password()
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func decode(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mac(key []byte, message string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(message))
	return h.Sum(nil)
}
