package tenancy

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestWhatASessionBehindAPoolerSaysIsComparedInFull(t *testing.T) {
	t.Parallel()
	w := identity{user: "t_a", database: "db", schemas: []string{"t_a", "tenancy_ext"}, pooled: true}
	row := func(cells ...string) (r [][][]byte) {
		r = append(r, nil)
		for _, c := range cells {
			r[0] = append(r[0], []byte(c))
		}
		return r
	}
	path := row(`t_a, tenancy_ext`)
	facts := []string{"db", "t_a", "t_a", "off", "f", "t_a", "{t_a,tenancy_ext}"}
	if err := w.pooledSession(path, row(facts...)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		column int
		says   string
		want   error
	}{
		"database":     {0, "other", ErrIdentity},
		"session_user": {1, "t_b", ErrIdentity},
		"nobody":       {1, "", ErrPooler},
		"current_user": {2, "t_b", ErrIdentity},
		"superuser":    {3, "on", ErrIdentity},
		"standby":      {4, "t", errStandby},
		"login":        {5, "postgres", ErrIdentity},
		"found":        {6, "{t_a}", ErrIdentity},
		"found_more":   {6, "{t_a,tenancy_ext,public}", ErrIdentity},
	} {
		said := append([]string(nil), facts...)
		said[c.column] = c.says
		if err := w.pooledSession(path, row(said...)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	for name, err := range map[string]error{
		"path":         w.pooledSession(row("t_b, tenancy_ext"), row(facts...)),
		"path_more":    w.pooledSession(row("t_a, tenancy_ext, none"), row(facts...)),
		"path_missing": w.pooledSession(nil, row(facts...)),
		"facts_short":  w.pooledSession(path, row(facts[:6]...)),
		"facts_none":   w.pooledSession(path, nil),
	} {
		if !errors.Is(err, ErrIdentity) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyPgBouncersRefusalIsTakenForAPooler(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{"unsupported startup parameter: search_path": true, "unsupported startup parameter in options: search_path": true,
		"expected password response, got message type 88": false} {
		err := connectError(&pgconn.PgError{Code: "08P01", Message: text})
		if errors.Is(err, ErrPooler) != want {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := connectError(&pgconn.PgError{Code: "42704", Message: "unsupported startup parameter: x"}); errors.Is(err, ErrPooler) {
		t.Errorf("another code: %v", err)
	}
}

func TestTheWayToAPoolerHasItsOwnProtection(t *testing.T) {
	t.Parallel()
	d := DataSource{Host: "db.example.org", Port: 5432, Database: "db", User: "t_a", Password: "x", TLS: "disable", Pooler: "pooler.example.org:6432"}
	for mode, want := range map[string]string{"": "verify-full", "verify-full": "verify-full", "require": "require", "disable": "disable"} {
		d.PoolerTLS = mode
		via, err := d.viaPooler()
		if err != nil {
			t.Fatal(err)
		}
		cc, err := via.connConfig()
		if err != nil {
			t.Fatal(err)
		}
		if via.tlsMode() != want || cc.Host != "pooler.example.org" || cc.Port != 6432 || (cc.TLSConfig == nil) != (want == "disable") {
			t.Errorf("%q: %s to %s:%d with %v, want %s", mode, via.tlsMode(), cc.Host, cc.Port, cc.TLSConfig, want)
		}
		if cc.TLSConfig != nil && (cc.TLSConfig.ServerName != "pooler.example.org" || cc.TLSConfig.InsecureSkipVerify != (want == "require")) {
			t.Errorf("%q: the certificate of %q is asked for", mode, cc.TLSConfig.ServerName)
		}
	}
	direct, err := d.connConfig()
	if err != nil || direct.Host != "db.example.org" || direct.Port != 5432 || direct.TLSConfig != nil {
		t.Errorf("directly: %s:%d, %v", direct.Host, direct.Port, err)
	}
}

// TestTheReleaseBeforeGoesPastThePooler reads what is sealed as a release does that knows of none, in a deployment from node to node.
func TestTheReleaseBeforeGoesPastThePooler(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(sealedSource{Host: "db", Port: 5432, Database: "d", Schema: "t_a", User: "t_a_l1", Password: "x", TLS: "require", Pooler: "pooler:6432", PoolerTLS: "disable"})
	if err != nil {
		t.Fatal(err)
	}
	type before struct {
		Host, Database, Schema, User, Password, TLS string
		Port                                        uint16
	}
	var got before
	if err := json.Unmarshal(text, &got); err != nil || got != (before{"db", "d", "t_a", "t_a_l1", "x", "require", 5432}) {
		t.Errorf("it reads %+v, %v", got, err)
	}
}
