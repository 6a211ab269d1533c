package rowsec_test

import (
	"slices"
	"testing"
)

func TestATenantSeesItsOwnRowsByPlainSQL(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	must(t, h.owner, `CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text NOT NULL); SELECT tenancy_must('notes')`)
	for _, login := range []string{h.a, h.b} {
		conn := h.as(login)
		must(t, conn, "INSERT INTO notes (title) VALUES ($1)", "of "+login)
		if got := column(t, conn, "SELECT title FROM notes"); !slices.Equal(got, []string{"of " + login}) {
			t.Errorf("%s sees %q", login, got)
		}
	}
	if got := column(t, h.super, `SELECT tenant_id || ' ' || title FROM `+h.Schema+`.notes ORDER BY 1`); !slices.Equal(got, []string{"7 of " + h.a, "8 of " + h.b}) {
		t.Errorf("the table holds %q", got)
	}
	if err := h.Verify(t.Context(), h.prov); err != nil {
		t.Error(err)
	}
}
