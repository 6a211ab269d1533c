package tenancy_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/pgembed"
)

// leakLog collects everything that a program could show to someone. Safe for concurrent use.
type leakLog struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (l *leakLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *leakLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// show prints v in every usual way, and the errors inside of it.
func (l *leakLog) show(v any) {
	for _, verb := range []string{"%v\n", "%+v\n", "%#v\n", "%s\n", "%q\n"} {
		fmt.Fprintf(l, verb, v)
	}
	if j, err := json.Marshal(v); err == nil {
		_, _ = l.Write(j)
	}
	for _, h := range []slog.Handler{slog.NewTextHandler(l, nil), slog.NewJSONHandler(l, nil)} {
		slog.New(h).Info("shown", "value", v)
	}
	if err, ok := v.(error); ok {
		l.unwrap(err)
	}
}

// unwrap shows what errors.As could reach.
func (l *leakLog) unwrap(err error) {
	switch u := err.(type) {
	case interface{ Unwrap() error }:
		if inner := u.Unwrap(); inner != nil {
			l.show(inner)
		}
	case interface{ Unwrap() []error }:
		for _, inner := range u.Unwrap() {
			l.show(inner)
		}
	}
}

// wantHidden looks for the secrets in five encodings.
func wantHidden(t *testing.T, where, text string, secrets map[string]string) {
	t.Helper()
	for name, secret := range secrets {
		if len(secret) < 12 {
			t.Fatalf("%s is too short to be looked for", name)
		}
		for _, form := range []string{secret, hex.EncodeToString([]byte(secret)), url.QueryEscape(secret), url.PathEscape(secret),
			base64.StdEncoding.EncodeToString([]byte(secret))[:len(secret)], strings.Trim(fmt.Sprintf("%q", secret), `"`), strings.Trim(fmt.Sprint([]byte(secret)), "[]")} {
			if i := strings.Index(text, form); i >= 0 {
				t.Errorf("%s shows %s: %.300q", where, name, text[max(0, i-150):])
				break
			}
		}
	}
}

func TestNoSecretIsShownAnywhere(t *testing.T) {
	t.Parallel()
	// A server of its own, which logs every statement, and each failed one.
	server, err := pgembed.Start(t.Context(), pgembed.Options{Settings: map[string]string{"log_statement": "all", "log_min_duration_statement": "0",
		"log_connections": "on", "log_min_error_statement": "debug5", "log_parameter_max_length_on_error": "-1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	if server.External() {
		t.Skip("the log of the server of TENANCY_TEST_URL cannot be read")
	}
	base, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal("the test server's URL cannot be parsed")
	}
	at := func(user, password, database string) string {
		u := *base
		u.User, u.Path = url.UserPassword(user, password), "/"+database
		return u.String()
	}
	_, key, _ := strings.Cut(newKey(t), ":")
	secrets := map[string]string{
		"the catalog's password":     `cnry-catalog-9d1f"'\ %`,
		"the provisioner's password": `cnry-provisioner-3c7a"'\ %`,
		"a wrong password":           `cnry-wrong-5b2e"'\ %`,
		"the host's password":        `cnry-host-77aa"'\ %`,
		"the key":                    key,
		"another key":                strings.TrimPrefix(newKey(t), "test:"),
	}
	catalog, provisioner, wrong := secrets["the catalog's password"], secrets["the provisioner's password"], secrets["a wrong password"]
	adminPassword, _ := base.User.Password()
	secrets["the superuser's password"] = adminPassword
	keys, err := tenancy.ParseKeyring("test:" + key)
	if err != nil {
		t.Fatal(err)
	}

	var out leakLog
	ctx := t.Context()
	admin := tenancy.AdminConfig{AdminURL: server.URL(), PrimaryURL: at("fleet_catalog", catalog, "fleet_primary"),
		Server: tenancy.ServerConfig{URL: at("fleet_provisioner", provisioner, "fleet_tenants")}, Keys: keys}
	if err := tenancy.Init(ctx, admin); err != nil {
		out.show(err)
		wantHidden(t, "an error", out.String(), secrets)
		t.Fatal("init failed")
	}
	cfg := tenancy.Config{PrimaryURL: admin.PrimaryURL, HostURL: at("fleet_catalog", catalog, "fleet_primary"), Server: &admin.Server, Keys: keys,
		Migrations: noteMigrations, Logger: slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	tn, err := tenancy.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close()
	a, err := tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "acme", Admin: "alice"})
	if err != nil {
		t.Fatal(err)
	}
	source, err := tn.Catalog().SourceForTest(ctx, a.ID)
	if err != nil {
		t.Fatal(err)
	}
	secrets["the tenant's password"] = source.Password.Reveal()
	d, err := tn.Catalog().Prepare(ctx, a.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	secrets["the prepared place's password"] = d.Password.Reveal()
	reader, err := tn.Catalog().AddReader(ctx, "main")
	if err != nil {
		t.Fatal(err)
	}
	secrets["the reader's password"] = reader.Password.Reveal()
	enter, err := tn.Enter(ctx, a.ID)
	if err != nil {
		t.Fatal(err)
	}

	// What a program prints without a thought.
	session, _ := tenancy.FromContext(enter)
	for _, v := range []any{cfg, &cfg, admin, &admin, admin.Server, &admin.Server, source, &source, d, reader, keys, &keys, a,
		tenancy.NewTenant{Name: "acme", DataSource: &source}, []tenancy.DataSource{source}, map[string]any{"source": source, "config": cfg},
		session, &session, enter, tn, tn.Catalog(), tn.DB(), tn.Migrator(), struct{ DB *tenancy.TenantAwareDB }{tn.DB()},
		struct{ Config tenancy.Config }{cfg}, &tenancy.SetupError{Missing: []tenancy.Finding{{What: "w", Mend: "f"}}}} {
		out.show(v)
	}

	// Every failure that can be provoked. Each must fail.
	broken := cfg
	broken.Migrations = fstest.MapFS{"00001_notes.sql": {Data: []byte("-- +goose Up\nSELECT 1;\n")}, "00002_bad.sql": {Data: []byte("-- +goose Up\nSELECT 1 / 0;\n")}}
	later, err := tenancy.Open(ctx, broken)
	if err != nil {
		t.Fatal(err)
	}
	defer later.Close()
	super := connectURL(t, server.URL())
	wrongSource := d
	wrongSource.Password = tenancy.Secret(wrong)
	unknownDatabase := source
	unknownDatabase.Database = "nowhere"
	open := func(change func(*tenancy.Config)) error {
		c := cfg
		change(&c)
		tn, err := tenancy.Open(ctx, c)
		if err == nil {
			tn.Close()
		}
		return err
	}
	initialise := func(change func(*tenancy.AdminConfig)) error {
		c := admin
		change(&c)
		return tenancy.Init(ctx, c)
	}
	down := func(s string) string { return strings.Replace(s, base.Host, "127.0.0.1:1", 1) }
	failures := []struct {
		name string
		run  func() error
	}{
		{"open_wrong_password", func() error {
			return open(func(c *tenancy.Config) { c.PrimaryURL = at("fleet_catalog", wrong, "fleet_primary") })
		}},
		{"open_unknown_database", func() error {
			return open(func(c *tenancy.Config) { c.PrimaryURL = at("fleet_catalog", catalog, "nowhere") })
		}},
		{"open_server_down", func() error { return open(func(c *tenancy.Config) { c.PrimaryURL = down(c.PrimaryURL) }) }},
		{"open_cancelled", func() error {
			cancelled, cancel := context.WithCancel(ctx)
			cancel()
			return second(tenancy.Open(cancelled, cfg))
		}},
		{"open_other_keys", func() error {
			k, err := tenancy.ParseKeyring("test:" + secrets["another key"])
			if err != nil {
				return err
			}
			return open(func(c *tenancy.Config) { c.Keys = k })
		}},
		{"init_wrong_admin", func() error {
			return initialise(func(c *tenancy.AdminConfig) { c.AdminURL = at("postgres", wrong, "postgres") })
		}},
		{"init_server_down", func() error { return initialise(func(c *tenancy.AdminConfig) { c.AdminURL = down(c.AdminURL) }) }},
		{"init_unprivileged_admin", func() error { return initialise(func(c *tenancy.AdminConfig) { c.AdminURL = c.PrimaryURL }) }},
		{"init_other_logins", func() error { // a CREATE ROLE that fails at the server, with its password in it
			return initialise(func(c *tenancy.AdminConfig) {
				c.AdminURL, c.PrimaryURL = c.PrimaryURL, at("fleet_other", wrong, "fleet_other_primary")
			})
		}},
		{"add_server_wrong_password", func() error {
			return tn.Catalog().AddServer(ctx, tenancy.ServerConfig{URL: at("fleet_provisioner", wrong, "fleet_tenants")})
		}},
		{"add_server_down", func() error { return tn.Catalog().AddServer(ctx, tenancy.ServerConfig{URL: down(admin.Server.URL)}) }},
		{"add_server_unprivileged", func() error {
			return tn.Catalog().AddServer(ctx, tenancy.ServerConfig{URL: at("fleet_catalog", catalog, "fleet_primary")})
		}},
		{"set_data_source_wrong_password", func() error { return tn.Catalog().SetDataSource(ctx, a.ID, wrongSource) }},
		{"set_data_source_unknown", func() error { return tn.Catalog().SetDataSource(ctx, a.ID, unknownDatabase) }},
		{"create_with_an_unknown_source", func() error {
			return second(tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "globex", DataSource: &unknownDatabase}))
		}},
		{"migration_fails", func() error { return second(later.Migrator().Tenant(ctx, a.ID)) }},
		{"migrations_fail", func() error { return second(later.Migrator().All(ctx)) }},
		{"create_fails_at_create_role", func() error {
			must(t, super, `ALTER ROLE fleet_provisioner NOCREATEROLE`)
			defer must(t, super, `ALTER ROLE fleet_provisioner CREATEROLE`)
			return second(tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "initech"}))
		}},
		{"open_without_createrole", func() error {
			must(t, super, `ALTER ROLE fleet_provisioner NOCREATEROLE`)
			defer must(t, super, `ALTER ROLE fleet_provisioner CREATEROLE`)
			return open(func(*tenancy.Config) {})
		}},
		{"create_with_a_provisioner_changed_by_hand", func() error {
			must(t, super, `ALTER ROLE fleet_provisioner PASSWORD 'changed by hand'`)
			return errors.Join(second(tn.Catalog().Create(ctx, tenancy.NewTenant{Name: "hooli"})), open(func(c *tenancy.Config) { c.PrimaryURL = down(c.PrimaryURL) }))
		}},
		{"query_with_a_login_changed_by_hand", func() error {
			must(t, super, `ALTER ROLE `+pgx.Identifier{source.User}.Sanitize()+` PASSWORD 'changed by hand'`)
			return second(tn.DB().Exec(enter, `SELECT 1`))
		}},
	}
	for _, text := range []string{"postgres://u:%s@h:port/d", "postgres://u:%s@@h/d/e", "postgres:/u:%s@h/d", "jdbc:postgresql://h/d?user=u&password=%s", "password = %s host=h", "PASSWORD=%s", "pass=%s", "%s",
		"host=h password=%s\\ x user", "host=h password='%s", "postgres://u:a@%s@h/d", "postgres://u:1/%s@h/d", "postgres://%s", "postgres://u:p@h/d?%s", "postgres://u:p@h/d?%s=1", "postgres://u:p@h/d?sslmode=%s"} {
		bad := fmt.Sprintf(text, "cnry-malformed-1234")
		failures = append(failures, []struct {
			name string
			run  func() error
		}{
			{"parse " + text, func() error { return second(tenancy.ParseDataSource(bad)) }},
			{"server " + text, func() error { return tn.Catalog().AddServer(ctx, tenancy.ServerConfig{URL: bad}) }},
			{"keys " + text, func() error { return second(tenancy.ParseKeyring(bad)) }},
			{"server's format " + text, func() error { out.show(tenancy.ServerConfig{URL: bad}); return errNotRun }},
		}...)
	}
	secrets["a malformed URL"] = "cnry-malformed-1234"
	for _, f := range failures {
		err := f.run()
		if err == nil {
			t.Errorf("%s did not fail", f.name)
			continue
		}
		var one leakLog
		one.show(err)
		wantHidden(t, f.name, one.String(), secrets)
		if strings.Contains(one.String(), "SCRAM-SHA-256$") {
			t.Errorf("%s shows a verifier: %v", f.name, err)
		}
	}
	wantHidden(t, "the output", out.String(), secrets)
	if err := tn.Catalog().Suspend(ctx, 999, tenancy.Suspension{}); err == nil {
		t.Error("suspended nobody")
	}

	log, err := server.Log()
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []string{"CREATE ROLE", "PASSWORD 'SCRAM-SHA-256$", "permission denied", "password authentication failed", "division by zero"} {
		if !strings.Contains(log, must) {
			t.Errorf("the server's log does not have %q: the test looks at nothing", must)
		}
	}
	wantHidden(t, "the server's log", log, secrets)
}

var errNotRun = errors.New("this only prints")

func newKey(tb testing.TB) string {
	tb.Helper()
	key, err := tenancy.NewKey("test")
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// TestTheSearchForSecretsHasTeeth shows that each way of hiding a secret badly is found.
func TestTheSearchForSecretsHasTeeth(t *testing.T) {
	t.Parallel()
	const secret = `cnry-teeth-0001"'\ %`
	for _, text := range []string{secret, fmt.Sprintf("%q", secret), url.QueryEscape(secret), fmt.Sprintf("%x", secret), base64.StdEncoding.EncodeToString([]byte(secret)), fmt.Sprint([]byte(secret))} {
		found := &testing.T{}
		wantHidden(found, "text", "before "+text+" after", map[string]string{"it": secret})
		if !found.Failed() {
			t.Errorf("%q was not found", text)
		}
	}
}
