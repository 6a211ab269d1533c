package shape

import (
	"strings"
	"testing"
)

// shapeOf makes a shape of what a server could print of a schema, in whose name ? stands for it; of is the role of an owner or a grant.
func shapeOf(number int64, schema string, objects ...Object) Shape {
	s := Shape{objects: map[key]Object{}}
	r := newReading(Place{Schema: schema, Roles: map[string]string{schema + "_o": "{owner}", schema + "_l1": "{login}", schema: "{dense role}"}, Without: "reader", Number: number}, &s)
	for _, o := range objects {
		role := o.of
		if o.Kind != "owner" && o.Kind != grant {
			role = ""
		} else {
			o.of = ""
		}
		o.Name, o.Definition = strings.ReplaceAll(o.Name, "?", schema), strings.ReplaceAll(o.Definition, "?", schema)
		r.add(o, strings.ReplaceAll(role, "?", schema))
	}
	return s
}

func TestWhatIsATenantsOwnHasPlaceholders(t *testing.T) {
	t.Parallel()
	all := func(number int64, schema, tenant string) Shape {
		return shapeOf(number, schema,
			Object{"owner", "table a", "-", "?_o"},
			Object{grant, "table a", "SELECT", "?_l1"},
			Object{grant, "function f()", "EXECUTE", "public"},
			Object{"view", "v", "SELECT * FROM ?.a", ""}, Object{"index", "?", "ON ?.a", ""},
			Object{"function", "tenancy_tenant()", "SELECT " + tenant + "::bigint", ""})
	}
	if is, wants := all(7, "t_a", "7"), all(12, "t_b", "12"); is.Fingerprint() != wants.Fingerprint() {
		t.Errorf("%v\n%v", is.Objects(), wants.Objects())
	}
	if o := all(7, "t_a", "7").Objects(); o[len(o)-1].Definition != "SELECT * FROM {schema}.a" {
		t.Errorf("a name that is the schema's and a role's: %v", o[len(o)-1])
	}
	if d := Compare(all(7, "t_a", "12"), all(12, "t_b", "12")); len(d) != 1 || d[0].Has != "SELECT 12::bigint" {
		t.Errorf("the number of another tenant: %v", d)
	}
	if d := Compare(shapeOf(7, "t_a", Object{grant, "table a", "SELECT", "reader"}), Shape{}); d != nil {
		t.Errorf("a reader's grant: %v", d)
	}
}

func TestOfAMissingTableNothingElseIsTold(t *testing.T) {
	t.Parallel()
	table, column, other := Object{Kind: "table", Name: "a", Definition: "table"}, Object{"column", "a.id", "bigint", "a"}, Object{Kind: "table", Name: "b", Definition: "table"}
	if d := Compare(shapeOf(1, "t_a", other), shapeOf(1, "t_b", table, column, other)); len(d) != 1 || d[0].String() != `missing table a: wants "table"` {
		t.Errorf("got %v", d)
	}
	if d := Compare(Shape{}, shapeOf(1, "t_b", table)); len(d) != 1 || d[0].Kind != "schema" {
		t.Errorf("got %v", d)
	}
}

func TestAListIsPrintedAsAfterARestore(t *testing.T) {
	t.Parallel()
	for before, after := range map[string]string{
		`CHECK (((a)::text = ANY ((ARRAY['it''s'::character varying, E'b\\'::character varying])::text[])))`: `CHECK (((a)::text = ANY (ARRAY[('it''s'::character varying)::text, (E'b\\'::character varying)::text])))`,
		`CHECK ((a = ANY ((ARRAY[f(b), c])::text[])))`:                                                       `CHECK ((a = ANY ((ARRAY[f(b), c])::text[])))`,
	} {
		if got := restored(before); got != after || restored(after) != after {
			t.Errorf("%s\n%s", before, got)
		}
	}
}
