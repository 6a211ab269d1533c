// Package integrations is a module of its own for the examples that need another library, so that the library's own
// module does not name it. Each directory is one program, with one idea.
package integrations
