// Package scram makes database passwords and the verifiers under which PostgreSQL stores them, so
// that a password is never part of a statement and so of no log of the server.
package scram

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
)

const (
	defaultIterations = 4096 // PostgreSQL's default, and what RFC 7677 recommends at least
	maxIterations     = 1_000_000
	randomIterations  = 1 // PostgreSQL stores 0 and less as well, and then no client logs in
	saltSize          = 16
	passwordSize      = 32
)

// Password makes a password of 32 random bytes in URL-safe base64: 43 ASCII characters that need
// no quoting in SQL or in a URL. The error is that of the source of randomness; with crypto/rand
// it is always nil.
func Password() (string, error) {
	var b [passwordSize]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("password: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(b[:]), nil
}

// Verifier returns what CREATE ROLE and ALTER ROLE accept in the place of password:
// SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey, with a random salt of 16 bytes. It takes
// some milliseconds. Iterations is from 4096 to 1,000,000; 0 means 4096.
//
// The password is printable ASCII and not empty. Anything else would need SASLprep, where client
// and server must agree on the form of each character; ASCII means itself in all of them.
// No error contains the password.
func Verifier(password string, iterations int) (string, error) {
	if iterations == 0 {
		iterations = defaultIterations
	}
	if iterations < defaultIterations || iterations > maxIterations {
		return "", fmt.Errorf("iterations must be from %d to %d", defaultIterations, maxIterations)
	}
	if password == "" {
		return "", errors.New("password must not be empty")
	}
	for i := range len(password) {
		if c := password[i]; c < ' ' || c > '~' {
			return "", errors.New("password must be printable ASCII")
		}
	}
	return salted(password, iterations)
}

// RandomVerifier is [Verifier] for a password that [Password] made, with a single iteration. Iterations
// make each guess dearer, and 256 random bits cannot be guessed; the login, where the client derives
// the key anew for every connection, is what they cost.
//
// It refuses a password that has not the form of Password's. That its bytes are random it cannot see.
func RandomVerifier(password string) (string, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(password)
	if err != nil || len(b) != passwordSize || len(password) != base64.RawURLEncoding.EncodedLen(passwordSize) { // it skips newlines
		return "", errors.New("password has not the form that Password gives")
	}
	return salted(password, randomIterations)
}

// salted makes the verifier with a salt of its own.
func salted(password string, iterations int) (string, error) {
	var salt [saltSize]byte
	if _, err := rand.Read(salt[:]); err != nil {
		return "", fmt.Errorf("salt: %w", err)
	}
	return derive(password, salt[:], iterations)
}

// derive accepts any number of iterations: what a password is worth, its callers know.
func derive(password string, salt []byte, iterations int) (string, error) {
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", errors.New("password cannot be derived: PBKDF2 refused") // not wrapped: nothing about the password leaves
	}
	stored := sha256.Sum256(mac(salted, "Client Key"))
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations,
		base64.StdEncoding.EncodeToString(salt),
		base64.StdEncoding.EncodeToString(stored[:]),
		base64.StdEncoding.EncodeToString(mac(salted, "Server Key"))), nil
}

func mac(key []byte, message string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(message))
	return h.Sum(nil)
}
