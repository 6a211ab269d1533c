//go:build unix

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func Example() {
	d := demo.Must(demo.Open(context.Background(), tenancy.Config{}))
	defer d.Close()
	key := demo.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	h := demo.Must(newHandler(d, &key.PublicKey))
	token := func(subject, tenant string) func(*http.Request) {
		return demo.Token(demo.Must(issue(key, subject, tenant)))
	}

	fmt.Println(demo.Get(h, "/notes", token("alice", "acme")))
	fmt.Println(demo.Get(h, "/notes", token("carol", "globex")))
	fmt.Println(demo.Get(h, "/notes", token("carol", "globex"), demo.Header("X-Tenant", "acme")))
	fmt.Println(demo.Get(h, "/notes", token("bob", "acme")))
	fmt.Println(demo.Get(h, "/notes"))
	// Output:
	// 200 ["note of acme"]
	// 200 ["note of globex"]
	// 403 Forbidden
	// 403 Forbidden
	// 401 Unauthorized
}

// TestBobReadsNothingOfAcme asks for acme's notes with tokens of globex's user bob, and with tokens that nobody should believe.
func TestBobReadsNothingOfAcme(t *testing.T) {
	d := demo.Must(demo.Open(t.Context(), tenancy.Config{}))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	key := demo.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	other := demo.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	public := demo.Must(x509.MarshalPKIXPublicKey(&key.PublicKey))
	h := demo.Must(newHandler(d, &key.PublicKey))

	// signed makes a token for alice of acme, but for the claims in change, where drop takes one out.
	type claims = jwt.MapClaims
	drop := new(int)
	signed := func(method jwt.SigningMethod, key any, change claims) func(*http.Request) {
		c := claims{"iss": issuer, "aud": audience, "sub": "alice", "exp": time.Now().Add(time.Hour).Unix(), "tenant": "acme"}
		for name, value := range change {
			if c[name] = value; value == any(drop) {
				delete(c, name)
			}
		}
		return demo.Token(demo.Must(jwt.NewWithClaims(method, c).SignedString(key)))
	}
	token := func(change claims) func(*http.Request) { return signed(jwt.SigningMethodES256, key, change) }
	named := func(name string) func(*http.Request) { return demo.Header("X-Tenant", name) }
	now := time.Now().Unix()

	if got := demo.Get(h, "/notes", token(nil)); got != `200 ["note of acme"]` {
		t.Fatalf("alice gets %s", got)
	}
	for name, c := range map[string]struct{ got, want string }{
		"claim_of_a_foreign_tenant":        {demo.Get(h, "/notes", token(claims{"sub": "bob"})), "403 Forbidden"},
		"claim_of_a_missing_tenant":        {demo.Get(h, "/notes", token(claims{"sub": "bob", "tenant": "nosuch"})), "403 Forbidden"},
		"claim_and_header_disagree":        {demo.Get(h, "/notes", token(nil), named("globex")), "403 Forbidden"},
		"disagree_though_a_member_of_both": {demo.Get(h, "/notes", token(claims{"sub": "carol"}), named("globex")), "403 Forbidden"},
		"claim_and_header_agree":           {demo.Get(h, "/notes", token(claims{"sub": "carol"}), named("acme")), `200 ["note of acme"]`},
		"no_claim_and_foreign_header":      {demo.Get(h, "/notes", token(claims{"sub": "bob", "tenant": drop}), named("acme")), "403 Forbidden"},
		"no_claim_is_the_user's_own":       {demo.Get(h, "/notes", token(claims{"sub": "bob", "tenant": drop})), `200 ["note of globex"]`},
		"no_claim_and_two_tenants":         {demo.Get(h, "/notes", token(claims{"sub": "carol", "tenant": drop})), "409 Which tenant? acme, globex"},
		"subject_that_looks_like_a_key":    {demo.Get(h, "/notes", token(claims{"sub": string(userKey("alice"))})), "403 Forbidden"},

		"claim_is_a_number":      {demo.Get(h, "/notes", token(claims{"tenant": 1})), "401 Unauthorized"},
		"claim_is_a_list":        {demo.Get(h, "/notes", token(claims{"tenant": []string{"acme"}})), "401 Unauthorized"},
		"claim_is_null":          {demo.Get(h, "/notes", token(claims{"tenant": nil})), "401 Unauthorized"},
		"claim_is_empty":         {demo.Get(h, "/notes", token(claims{"tenant": ""})), "401 Unauthorized"},
		"expired":                {demo.Get(h, "/notes", token(claims{"exp": now - 1})), "401 Unauthorized"},
		"never_expires":          {demo.Get(h, "/notes", token(claims{"exp": drop})), "401 Unauthorized"},
		"not_valid_yet":          {demo.Get(h, "/notes", token(claims{"nbf": now + 60})), "401 Unauthorized"},
		"other_issuer":           {demo.Get(h, "/notes", token(claims{"iss": "https://evil.example.com"})), "401 Unauthorized"},
		"no_issuer":              {demo.Get(h, "/notes", token(claims{"iss": drop})), "401 Unauthorized"},
		"other_audience":         {demo.Get(h, "/notes", token(claims{"aud": "billing"})), "401 Unauthorized"},
		"no_audience":            {demo.Get(h, "/notes", token(claims{"aud": drop})), "401 Unauthorized"},
		"no_subject":             {demo.Get(h, "/notes", token(claims{"sub": drop})), "401 Unauthorized"},
		"empty_subject":          {demo.Get(h, "/notes", token(claims{"sub": ""})), "401 Unauthorized"},
		"subject_is_a_number":    {demo.Get(h, "/notes", token(claims{"sub": 1})), "401 Unauthorized"},
		"signed_by_another_key":  {demo.Get(h, "/notes", signed(jwt.SigningMethodES256, other, nil)), "401 Unauthorized"},
		"public_key_as_secret":   {demo.Get(h, "/notes", signed(jwt.SigningMethodHS256, public, nil)), "401 Unauthorized"},
		"right_key_other_method": {demo.Get(h, "/notes", otherMethod(key)), "401 Unauthorized"},
		"method_none":            {demo.Get(h, "/notes", signed(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, nil)), "401 Unauthorized"},
		"signature_cut_off":      {demo.Get(h, "/notes", cutOff(key)), "401 Unauthorized"},
		"no_token_at_all":        {demo.Get(h, "/notes", demo.Token("alice")), "401 Unauthorized"},
		"two_tokens":             {demo.Get(h, "/notes", token(claims{"sub": "bob", "tenant": "globex"}), token(nil)), "401 Unauthorized"},
		"header_alone":           {demo.Get(h, "/notes", named("acme")), "401 Unauthorized"},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", name, c.got, c.want)
		}
	}
}

// otherMethod is a token for alice that the right key signed, with a method which the service does not use: the library
// that makes tokens refuses to, so it is made by hand.
func otherMethod(key *ecdsa.PrivateKey) func(*http.Request) {
	claims := strings.Split(demo.Must(issue(key, "alice", "acme")), ".")[1]
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES384","typ":"JWT"}`)) + "." + claims
	hash := sha512.Sum384([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, hash[:])
	if err != nil {
		panic(err)
	}
	signature := append(r.FillBytes(make([]byte, 48)), s.FillBytes(make([]byte, 48))...)
	return demo.Token(text + "." + base64.RawURLEncoding.EncodeToString(signature))
}

// cutOff is a token for alice whose signature is empty.
func cutOff(key *ecdsa.PrivateKey) func(*http.Request) {
	token := demo.Must(issue(key, "alice", "acme"))
	return demo.Token(token[:strings.LastIndex(token, ".")+1])
}
