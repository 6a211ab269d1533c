package scram

// VerifierWithSalt is Verifier with the salt of a test vector.
var VerifierWithSalt = verifier
