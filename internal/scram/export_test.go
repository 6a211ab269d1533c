package scram

// Derive makes a verifier with the salt of a test vector, or with a number of iterations to measure.
var Derive = derive
