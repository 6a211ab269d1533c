package tenancy_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/msmt-go/tenancy"

// floors lists what each part of the house may import of the house. Imports go down only.
var floors = map[string][]string{
	"":            {"internal/", "primary"},
	"primary":     {},
	"internal/":   {"internal/"},
	"middleware":  {""},
	"tenancytest": {"", "internal/pgembed"},
	"tenancycmd":  {""},
	"cmd/":        {"tenancycmd"},
	"examples/":   {"", "middleware", "tenancytest", "internal/pgembed", "examples/internal/demo"},
}

// homes says in which files an outside module may be imported: each has one home, so that it can be replaced.
var homes = map[string][]string{
	"github.com/hashicorp/golang-lru": {"lookup.go"},
	"github.com/pressly/goose":        {"migrate.go"},
	"github.com/robfig/cron":          {"validity.go"},
	"github.com/go-chi/chi":           {"examples/"},
	"github.com/golang-jwt/jwt":       {"examples/integrations/"}, // a module of its own
	"golang.org/x/sync":               {"migrator.go"},
	"github.com/jackc/pgx":            nil, // everywhere
	"github.com/jackc/puddle":         {"errors.go"},
	"github.com/sony/gobreaker":       {"breaker.go"},
	"github.com/spf13/cobra":          {"tenancycmd/"},
	"github.com/vbauerster/mpb":       {"tenancycmd/progress.go"},
	"golang.org/x/term":               {"tenancycmd/output.go"},
}

func TestImportsGoDownTheFloors(t *testing.T) {
	for file, imports := range goFiles(t) {
		if strings.HasSuffix(file, "_test.go") {
			continue // tests look from outside and use what users use
		}
		dir := strings.TrimPrefix(path.Dir(file), ".")
		for _, imp := range imports {
			switch {
			case imp == module || strings.HasPrefix(imp, module+"/"):
				of := strings.TrimPrefix(strings.TrimPrefix(imp, module), "/")
				if !allowed(floors[floor(dir)], of) {
					t.Errorf("%s imports %s: not below it", file, imp)
				}
			case strings.Contains(strings.Split(imp, "/")[0], "."):
				home, known := homeOf(imp)
				if !known || home != nil && !allowed(home, file) {
					t.Errorf("%s imports %s: its home is %v", file, imp, home)
				}
			case imp == "testing" && floor(dir) != "tenancytest":
				t.Errorf("%s imports testing", file)
			}
		}
	}
}

// TestProgramsOfUsersLinkTheStatedModulesAlone keeps a program that imports the library free of surprises.
func TestProgramsOfUsersLinkTheStatedModulesAlone(t *testing.T) {
	stated := []string{module, "github.com/hashicorp/golang-lru/v2", "github.com/jackc/pgpassfile", "github.com/jackc/pgservicefile",
		"github.com/jackc/pgx/v5", "github.com/jackc/puddle/v2", "github.com/mfridman/interpolate", "github.com/pressly/goose/v3",
		"github.com/robfig/cron/v3", "github.com/sethvargo/go-retry", "github.com/sony/gobreaker/v2", "go.uber.org/multierr", "golang.org/x/sync", "golang.org/x/text"}
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}} {{.ImportPath}}", ".", "./middleware").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		mod, pkg, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if mod != "" && !slices.Contains(stated, mod) {
			t.Errorf("%s of module %s is linked into every user's program", pkg, mod)
		}
		if pkg == "testing" {
			t.Error("package testing is linked into every user's program")
		}
	}
}

// allowed reports whether name is one of list, or below one of its entries that end in a slash.
func allowed(list []string, name string) bool {
	return slices.ContainsFunc(list, func(a string) bool {
		return a == name || strings.HasSuffix(a, "/") && strings.HasPrefix(name, a)
	})
}

func floor(dir string) string {
	for _, f := range []string{"internal/", "examples/", "cmd/"} {
		if strings.HasPrefix(dir+"/", f) {
			return f
		}
	}
	return dir
}

func homeOf(imp string) ([]string, bool) {
	for mod, home := range homes {
		if strings.HasPrefix(imp, mod) {
			return home, true
		}
	}
	return nil, false
}

// goFiles returns the imports of every Go file of the module, by its path.
func goFiles(t *testing.T) map[string][]string {
	t.Helper()
	files := map[string][]string{}
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(file, ".go") {
			return err
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, imp := range parsed.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			files[filepath.ToSlash(file)] = append(files[filepath.ToSlash(file)], p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
