// Package shape reads what schemas are made of from the server's catalogs, for many at once, and says in words how two of them differ.
//
// The names of a tenant's own schema and roles are replaced by placeholders, so that two tenants of the same migrations have the same shape,
// wherever they are. Not in it are rows, how far a sequence has counted, OIDs, statistics, the tablespace, and the order of a table's columns: a column that was added by
// hand where it was missing is the same column. The order is in the shape of views and composite types, where it is what they are.
//
// Nothing of the tenant's is run: the server prints definitions, and no row is read.
package shape

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Place is a schema to read, with the names that are its tenant's own.
type Place struct {
	Schema string
	// Roles are the place's, each with what stands for it, such as {owner}.
	Roles map[string]string
	// Without is a role whose grants do not count, a reader; "": none.
	Without string
	// Number is the tenant's, which the functions that the library installs have in their bodies.
	Number int64
}

// Runtime stands for the group of the tenant's logins. What PUBLIC may do with a routine or a sequence counts as the group's: a reader
// takes it from PUBLIC and gives it to the group, and nobody else may use the schema.
const Runtime = "{runtime}"

// Object is one thing in a schema, as the server prints it.
type Object struct {
	Kind, Name string
	Definition string
	of         string // the relation, routine or type that it belongs to; "": none
}

type key struct{ kind, name string }

// Shape is all of a schema. The zero Shape is that of one that is not there.
type Shape struct{ objects map[key]Object }

// Objects are sorted by kind and name.
func (s Shape) Objects() []Object {
	return slices.SortedFunc(maps.Values(s.objects), func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
	})
}

// Fingerprint is a hash of all objects, in hexadecimal.
func (s Shape) Fingerprint() string {
	h := sha256.New()
	var size [8]byte
	for _, o := range s.Objects() {
		for _, text := range []string{o.Kind, o.Name, o.Definition} {
			binary.BigEndian.PutUint64(size[:], uint64(len(text)))
			h.Write(size[:])
			h.Write([]byte(text))
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

//go:embed shape.sql
var shapeSQL string

// settings are those that what the server prints depends on, beside the search_path.
const settings = `SELECT set_config(name, value, true) FROM (VALUES ('quote_all_identifiers', 'off'), ('DateStyle', 'ISO, YMD'), ('IntervalStyle', 'postgres'),
	('TimeZone', 'UTC'), ('bytea_output', 'hex'), ('extra_float_digits', '1'), ('standard_conforming_strings', 'on'), ('xmlbinary', 'base64'), ('lc_monetary', 'C')) s (name, value)`

// Read returns the shapes of the places, in their order, which are schemas of conn's database. conn is in no transaction, and needs no right to the schemas. Its search_path is pg_catalog from
// the start: nothing of a tenant's is found in the place of the server's own, and every name that is not the server's is printed with its schema. The error is the server's:
// one of a single schema, such as a lock that was not to be had in time (55P03), fails them all.
func Read(ctx context.Context, conn *pgx.Conn, places []Place) (shapes []Shape, err error) {
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		shapes, err = ReadWithin(ctx, tx, places)
		return err
	})
	return shapes, err
}

// Querier is a transaction.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// ReadWithin is Read in a transaction, some settings of which are changed until its end.
func ReadWithin(ctx context.Context, tx Querier, places []Place) ([]Shape, error) {
	if _, err := tx.Exec(ctx, settings); err != nil {
		return nil, err
	}
	shapes, names, at := make([]Shape, len(places)), make([]string, len(places)), map[string]*reading{}
	for i, p := range places {
		shapes[i].objects = map[key]Object{}
		names[i], at[p.Schema] = p.Schema, newReading(p, &shapes[i])
	}
	var oid uint32
	var name string
	by := map[uint32]*reading{}
	rows, _ := tx.Query(ctx, `SELECT oid, nspname::text FROM pg_namespace WHERE nspname = ANY($1)`, names)
	if _, err := pgx.ForEachRow(rows, []any{&oid, &name}, func() error { by[oid] = at[name]; return nil }); err != nil {
		return nil, err
	}
	oids := slices.Sorted(maps.Keys(by))
	for query := range strings.SplitSeq(shapeSQL, ";\n") {
		if err := read(ctx, tx, query, oids, by); err != nil {
			return nil, err
		}
	}
	return shapes, nil
}

func read(ctx context.Context, tx Querier, query string, oids []uint32, by map[uint32]*reading) error {
	var schema uint32
	var o Object
	var role string
	rows, _ := tx.Query(ctx, query, oids)
	_, err := pgx.ForEachRow(rows, []any{&schema, &o.Kind, &o.Name, &o.of, &role, &o.Definition}, func() error {
		by[schema].add(o, role)
		return nil
	})
	return err
}

// reading puts placeholders into what is read of one schema.
type reading struct {
	without string
	to      *Shape
	own     *strings.Replacer
	number  *regexp.Regexp
}

func newReading(p Place, to *Shape) *reading {
	stand := map[string]string{}
	maps.Copy(stand, p.Roles)
	stand[p.Schema] = "{schema}" // also where a role has that name
	var pairs []string
	for _, name := range slices.SortedFunc(maps.Keys(stand), func(a, b string) int { return len(b) - len(a) }) { // a role's name begins with the schema's
		pairs = append(pairs, name, stand[name])
	}
	return &reading{p.Without, to, strings.NewReplacer(pairs...), regexp.MustCompile(`(^|\W)` + strconv.FormatInt(p.Number, 10) + `\b`)}
}

// numbered are the library's functions in which the tenant's number is.
var numbered = map[string]bool{"tenancy_tenant": true, "tenancy_tenants": true, "tenancy_enter": true}

const grant = "grant"

// add takes an object. role is whom a grant is to, or who owns it.
func (r *reading) add(o Object, role string) {
	if role != "" && role == r.without {
		return
	}
	switch o.Kind {
	case "owner":
		o.Definition = role
	case grant, "default privileges":
		if what, _, _ := strings.Cut(o.Name, " "); o.Kind == grant && role == "public" && (what == "function" || what == "procedure" || what == "aggregate" || what == "sequence") {
			role = Runtime
		}
		if role == "public" {
			role = "everybody"
		}
		o.Name += " to " + role
	case "function":
		if name, _, _ := strings.Cut(o.Name, "("); numbered[name] {
			o.Definition = r.number.ReplaceAllString(o.Definition, "${1}{tenant}")
		}
	}
	o.Name, o.of, o.Definition = r.own.Replace(o.Name), r.own.Replace(o.of), restored(r.own.Replace(o.Definition))
	k := key{o.Kind, o.Name}
	if before, twice := r.to.objects[k]; twice && o.Kind == grant { // to two logins, or to the group and to PUBLIC
		rights := append(strings.Split(before.Definition, ", "), strings.Split(o.Definition, ", ")...)
		slices.Sort(rights)
		o.Definition = strings.Join(slices.Compact(rights), ", ")
	}
	r.to.objects[k] = o
}

var (
	textList    = regexp.MustCompile(`\(ARRAY\[(` + textElement.String() + `(?:, ` + textElement.String() + `)*)\]\)::text\[\]`)
	textElement = regexp.MustCompile(`E?'(?:[^']|'')*'::character varying`)
)

// restored writes IN of a character varying as the server prints it after a dump and a restore. All else that it prints, it reads as the same.
func restored(definition string) string {
	if !strings.Contains(definition, "])::text[]") {
		return definition
	}
	return textList.ReplaceAllStringFunc(definition, func(list string) string {
		list = strings.TrimSuffix(strings.TrimPrefix(list, "("), ")::text[]")
		return textElement.ReplaceAllString(list, "($0)::text")
	})
}

// Difference is an object that is not the same in two schemas.
type Difference struct {
	Kind, Object string
	Has, Wants   string // definitions; "" where it is not there
}

// Compare says how a schema differs from what it should be, sorted by kind and name. Of a table that one of the two lacks nothing is told but
// that, and so of what else has parts.
func Compare(has, wants Shape) []Difference {
	if len(has.objects) == 0 && len(wants.objects) > 0 {
		return []Difference{{Kind: "schema", Object: "{schema}", Wants: "a schema"}}
	}
	whole, there := parents(has), parents(wants)
	var all []Difference
	for k := range union(has.objects, wants.objects) {
		h, w := has.objects[k], wants.objects[k]
		if h.Definition == w.Definition && (h.Kind == "") == (w.Kind == "") {
			continue
		}
		if of := cmp.Or(h.of, w.of); of != "" && whole[of] != there[of] {
			continue
		}
		all = append(all, Difference{k.kind, k.name, h.Definition, w.Definition})
	}
	slices.SortFunc(all, func(a, b Difference) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Object, b.Object)) })
	return all
}

func union(a, b map[key]Object) map[key]bool {
	all := make(map[key]bool, len(a))
	for k := range a {
		all[k] = true
	}
	for k := range b {
		all[k] = true
	}
	return all
}

// parents are the names of what has parts.
func parents(s Shape) map[string]bool {
	names := map[string]bool{}
	for k, o := range s.objects {
		if o.of == "" || o.Kind == "sequence" {
			names[k.name] = true
		}
	}
	return names
}

// String tells a missing object, one too many and a different one apart, on one line that a terminal shows as it is: a tenant can have written names and definitions.
func (d Difference) String() string {
	object := d.Object
	if quoted := strconv.Quote(object); quoted != `"`+object+`"` {
		object = quoted
	}
	switch {
	case d.Has == "":
		return fmt.Sprintf("missing %s %s: wants %q", d.Kind, object, d.Wants)
	case d.Wants == "":
		return fmt.Sprintf("extra %s %s: has %q", d.Kind, object, d.Has)
	}
	return fmt.Sprintf("%s %s: has %q, wants %q", d.Kind, object, d.Has, d.Wants)
}
