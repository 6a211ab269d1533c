package tenancy_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/middleware"
)

// TestARecordThatCannotBeReadRefusesItsTenantAlone: bytes of it are lost, it is another tenant's, or its key is none of this node's. A node that
// runs and one that starts refuse the tenant, whoever asks, and serve the other.
func TestARecordThatCannotBeReadRefusesItsTenantAlone(t *testing.T) {
	t.Parallel()
	f, tn, acme, globex := twoTenants(t, tenancy.Config{})
	primary := f.Admin(t, "primary")
	sealed := func(id tenancy.ID) []byte {
		return scan[[]byte](t, primary, `SELECT d.sealed FROM tenancy.data_sources d JOIN tenancy.tenants t ON t.data_source = d.id WHERE t.id = $1`, id)
	}
	good := sealed(acme.ID)
	write := func(record []byte) {
		t.Helper()
		must(t, primary, `UPDATE tenancy.data_sources d SET sealed = $2 FROM tenancy.tenants t WHERE t.data_source = d.id AND t.id = $1`, acme.ID, record)
		if err := tn.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	asAcme, asGlobex := entered(t, tn, acme.ID), entered(t, tn, globex.ID)
	if _, err := tn.DB().Exec(asAcme, `SELECT 1`); err != nil {
		t.Fatal(err)
	}
	held, err := tn.DB().Begin(asAcme)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Rollback(asAcme)

	for name, record := range map[string][]byte{
		"empty":           {},
		"not_sealed":      []byte("postgres://acme:secret@db/acme"),
		"cut_off":         good[:len(good)/2],
		"one_bit":         append(bytes.Clone(good[:len(good)-1]), good[len(good)-1]^1),
		"unknown_key":     append(append(bytes.Clone(good[:2]), good[2]^1), good[3:]...),
		"another_tenants": sealed(globex.ID),
	} {
		t.Run(name, func(t *testing.T) {
			write(record)
			started := f.Open(t, tenancy.Config{}) // one tenant's record is no reason not to
			for node, tn := range map[string]*tenancy.Tenancy{"running": tn, "started": started} {
				refusals := map[string]error{"enter": second(tn.Enter(t.Context(), acme.ID))}
				_, refusals["resolve"] = tn.Resolve(t.Context(), tenancy.Query{User: "alice@acme.test"})
				if node == "running" {
					refusals["exec"] = second(tn.DB().Exec(asAcme, `SELECT 1`))
					refusals["begin"] = tn.DB().InTx(asAcme, pgx.TxOptions{}, func(context.Context, pgx.Tx) error { return nil })
				}
				for way, err := range refusals {
					e, ok := errors.AsType[*tenancy.Error](err)
					if !ok || !errors.Is(err, tenancy.ErrWrongKey) || errors.Is(err, tenancy.ErrPrimaryUnavailable) || e.Tenant != acme.ID || e.RetryAfter != 0 {
						t.Errorf("%s, %s: %v", node, way, err)
						continue
					}
					if strings.Contains(err.Error(), "secret") {
						t.Errorf("%s, %s: the error repeats the record: %v", node, way, err)
					}
				}
				for user, want := range map[tenancy.UserKey]int{"alice@acme.test": http.StatusInternalServerError, "bob@globex.test": http.StatusOK} {
					if got := answered(t, tn, user); got.Code != want || got.Header().Get("Retry-After") != "" || strings.Contains(got.Body.String(), "key") {
						t.Errorf("%s: %s is answered %d, want %d: %s", node, user, got.Code, want, got.Body)
					}
				}
			}
			if _, err := tn.DB().Exec(asGlobex, `SELECT 1`); err != nil {
				t.Errorf("the other tenant: %v", err)
			}
		})
	}

	if err := held.Rollback(asAcme); err != nil {
		t.Errorf("what was begun before: %v", err)
	}
	write(good)
	if _, err := tn.DB().Exec(asAcme, `SELECT 1`); err != nil {
		t.Errorf("with its record again: %v", err)
	}
	if got := answered(t, tn, "alice@acme.test"); got.Code != http.StatusOK {
		t.Errorf("with its record again the tenant is answered %d", got.Code)
	}
}

// answered is what a user's request for the tenant's rows gets.
func answered(t *testing.T, tn *tenancy.Tenancy, user tenancy.UserKey) *httptest.ResponseRecorder {
	t.Helper()
	mw, err := middleware.New(tn, middleware.UserKeyFunc(func(*http.Request) (tenancy.UserKey, error) { return user, nil }))
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	mw.Tenant(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := tn.DB().Exec(r.Context(), `SELECT title FROM notes`); err != nil {
			mw.Error(w, r, err)
		}
	})).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	return w
}
