package tenancy_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/tenancytest"
)

func TestWrongNamesAndKeysAreRefused(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{Migrations: noteMigrations})
	c, ctx := tn.Catalog(), t.Context()
	a := create(t, f, tn, "acme")
	for _, slug := range []string{"", "A", "Acme", "acme ", " acme", "1acme", "-acme", "_acme", "ac_me", "a.b", "a,b", `a"b`, `a'b`, "../x", "a/b", "$user", "a b", "a\nb", "a\x00b",
		"café", "cafe\u0301", "аcme", "\u202eacme", "😀", "a\xffb", strings.Repeat("a", 41), strings.Repeat("a", 64)} {
		for op, err := range map[string]error{
			"create": second(c.Create(ctx, tenancy.NewTenant{Name: slug})),
			"rename": c.Rename(ctx, a.ID, slug),
		} {
			if !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), "name must be a lower-case letter followed by at most 39") {
				t.Errorf("%s %q: %v, want the field and the rule", op, slug, err)
			}
		}
	}
	for _, slug := range []string{"a", "a-", "a--b", "x9", "public", "pg-x", strings.Repeat("a", 40)} { // names of tenants are never names of the server's
		if err := c.Rename(ctx, a.ID, slug); err != nil {
			t.Errorf("rename to %q: %v", slug, err)
		}
	}
	keys := map[string]string{"": "empty", strings.Repeat("k", 257): "at most 256 bytes", "a\x00b": "control", "a\nb": "control", "a\xff": "UTF-8"}
	for key, rule := range keys {
		wantError(t, c.AddMember(ctx, tenancy.Membership{User: tenancy.UserKey(key), Tenant: a.ID}), tenancy.ErrInvalid, "user key", rule)
		if key != "" {
			wantError(t, second(c.Create(ctx, tenancy.NewTenant{Name: "globex", Admin: tenancy.UserKey(key)})), tenancy.ErrInvalid, "admin", rule)
		}
		wantError(t, second(tenancy.Open(ctx, tenancy.Config{PrimaryURL: f.PrimaryURL, Keys: f.Keys, HostManagers: []tenancy.UserKey{"fine", tenancy.UserKey(key)}})),
			tenancy.ErrInvalid, "Config.HostManagers[1]", rule)
	}
	for name, n := range map[string]tenancy.NewTenant{
		"display name must be at most 200 bytes":    {DisplayName: strings.Repeat("é", 101)},
		"display name must be valid UTF-8":          {DisplayName: "a\xff"},
		"display name must not contain control":     {DisplayName: "a\x00b"},
		"display name must not contain":             {DisplayName: "a\u202eb"},
		"max users":                                 {MaxUsers: -1},
		"attributes: JSON of at most 64 KB":         {Attributes: map[string]any{"x": strings.Repeat("x", 65<<10)}},
		"attributes: JSON":                          {Attributes: map[string]any{"x": make(chan int)}},
		"domains[1]: domain must not carry a port":  {Domains: []string{"acme.test", "acme.test:80"}},
		"domains[0]: domain must be a name, not an": {Domains: []string{"127.0.0.1"}},
		"domains[0]: domain must be ASCII":          {Domains: []string{"münchen.test"}},
		"domains[0]: domain must not be empty":      {Domains: []string{"."}},
		"give one of the two":                       {Server: "main", DataSource: &tenancy.DataSource{}},
		"data source: host is missing":              {DataSource: &tenancy.DataSource{}},
	} {
		n.Name = "globex"
		wantError(t, second(c.Create(ctx, n)), tenancy.ErrInvalid, name)
	}
	wantError(t, c.AddMember(ctx, tenancy.Membership{User: "u", Tenant: a.ID, Role: "owner"}), tenancy.ErrInvalid, `role: "owner"`)
	wantError(t, c.AddMember(ctx, tenancy.Membership{User: "u", Tenant: a.ID, Source: strings.Repeat("s", 65)}), tenancy.ErrInvalid, "source")
	wantError(t, c.AddDomain(ctx, a.ID, "a..b"), tenancy.ErrInvalid, "domain")
	wantError(t, c.RemoveDomain(ctx, "a b"), tenancy.ErrInvalid, "domain")
	if _, err := c.TenantByName(ctx, "globex"); !errors.Is(err, tenancy.ErrTenantNotFound) {
		t.Errorf("a refused request left something: %v", err)
	}
	// A value at the limit is kept to the byte, and user keys are neither folded nor trimmed.
	for _, key := range []tenancy.UserKey{tenancy.UserKey(strings.Repeat("k", 256)), " bob", "bob", "Bob", "café", "cafe\u0301", `o'neil"; DROP TABLE x; --`} {
		if err := c.AddMember(ctx, tenancy.Membership{User: key, Tenant: a.ID}); err != nil {
			t.Errorf("%q: %v", key, err)
		}
		if got, err := c.TenantsOf(ctx, key); err != nil || len(got) != 1 || got[0].User != key {
			t.Errorf("%q comes back as %+v, %v", key, got, err)
		}
	}
}

// TestReadsAcceptAnyText shows that text from outside that is no name is not taken for a failure of the primary.
func TestReadsAcceptAnyText(t *testing.T) {
	t.Parallel()
	tn := tenancytest.Open(t, tenancy.Config{})
	c, ctx := tn.Catalog(), t.Context()
	for _, s := range []string{"", "Acme", "a\x00b", "a\xff", strings.Repeat("x", 1<<16)} {
		storable := utf8.ValidString(s) && !strings.ContainsRune(s, 0)
		list, err := c.TenantsOf(ctx, tenancy.UserKey(s))
		var listed error
		for _, err := range c.Tenants(ctx, tenancy.Filter{Prefix: s}) {
			listed = err
		}
		for op, err := range map[string]error{"TenantsOf": err, "RemoveMember": c.RemoveMember(ctx, 1, tenancy.UserKey(s)), "Tenants": listed} {
			if storable && err != nil || !storable && !errors.Is(err, tenancy.ErrInvalid) || len(list) > 0 {
				t.Errorf("%s(%.20q): %v", op, s, err)
			}
		}
		if _, err := c.TenantByName(ctx, s); !errors.Is(err, tenancy.ErrTenantNotFound) && (storable || !errors.Is(err, tenancy.ErrInvalid)) {
			t.Errorf("TenantByName(%.20q): %v", s, err)
		}
	}
}

func TestWrongSettingsAreRefusedAtOpen(t *testing.T) {
	t.Parallel()
	good := func() tenancy.Config {
		return tenancy.Config{PrimaryURL: "postgres://u:p@127.0.0.1:1/d", Keys: otherKeys(t)}
	}
	for says, change := range map[string]func(*tenancy.Config){
		"Config.PrimaryURL is required":                 func(c *tenancy.Config) { c.PrimaryURL = "" },
		"Config.PrimaryURL|not a PostgreSQL URL":        func(c *tenancy.Config) { c.PrimaryURL = "postgres://u:p@host:port/d" },
		"Config.ListenURL|not a PostgreSQL URL":         func(c *tenancy.Config) { c.ListenURL = "mysql://u:p@host/d" },
		"Config.Keys is required":                       func(c *tenancy.Config) { c.Keys = tenancy.Keyring{} },
		`Config.Isolation: "dense"`:                     func(c *tenancy.Config) { c.Isolation = "dense" },
		"Config.Lookups.Size is -1: at least 1":         func(c *tenancy.Config) { c.Lookups.Size = -1 },
		"Config.Lookups.StaleGrace is 1s: from 5s":      func(c *tenancy.Config) { c.Lookups.StaleGrace = time.Second },
		"Config.Lookups.PollPeriod is 5s: from 100ms":   func(c *tenancy.Config) { c.Lookups.PollPeriod = 5 * time.Second },
		"Config.Limits.PrimaryConns is 2: at least 3":   func(c *tenancy.Config) { c.Limits.PrimaryConns = 2 },
		"Config.Limits.TenantConns is -4":               func(c *tenancy.Config) { c.Limits.TenantConns = -4 },
		"Config.DrainTimeout is -1s":                    func(c *tenancy.Config) { c.DrainTimeout = -time.Second },
		"Config.GoMigrations: version 0":                func(c *tenancy.Config) { c.GoMigrations = []tenancy.GoMigration{{}} },
		"Config.ValidityCron: no time zone prefix":      func(c *tenancy.Config) { c.ValidityCron = "CRON_TZ=Europe/Paris 0 0 * * *" },
		"Config.ValidityCron: at most 128 bytes":        func(c *tenancy.Config) { c.ValidityCron = strings.Repeat("*", 200) },
		"Config.ValidityCron: it does not fire within":  func(c *tenancy.Config) { c.ValidityCron = "0 0 31 2 *" },
		"Config.ValidityCron: @every wants a duration":  func(c *tenancy.Config) { c.ValidityCron = "@every 1ms" },
		"Config.ValidityCron: not a cron expression of": func(c *tenancy.Config) { c.ValidityCron = "every minute" },
	} {
		t.Run(says, func(t *testing.T) {
			c := good()
			change(&c)
			tn, err := tenancy.Open(t.Context(), c)
			if err == nil {
				tn.Close()
			}
			wantError(t, err, tenancy.ErrInvalid, strings.Split(says, "|")...)
		})
	}
}

func TestCronSpecifications(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, spec := range []string{"", " ", "TZ=", "TZ=UTC", "CRON_TZ=", "CRON_TZ=UTC", "CRON_TZ=Europe/Paris 0 0 * * *", "TZ=UTC * * * * *", " TZ=", "0 0 31 2 *", "0 0 30 2 *", "@every 1ms", "@every -5s", "@every 0s", "@every", "@every 10",
		"@every 999ms", "@every 100000h", "@never", "@reboot", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "a * * * *", "*/0 * * * *", "5-1 * * * *", "\x00", "😀", strings.Repeat("*", 200), strings.Repeat("0,", 100) + "0 * * * *"} {
		if next, err := tenancy.NextOfCron(spec, now); err == nil {
			t.Errorf("%q is accepted and fires at %v", spec, next)
		}
	}
	for spec, want := range map[string]time.Duration{"@every 10m": 10 * time.Minute, "@every 1s": time.Second, "@hourly": time.Hour, "@daily": 24 * time.Hour, "*/5 * * * *": 5 * time.Minute, "30 2 * * *": 150 * time.Minute} {
		if next, err := tenancy.NextOfCron(spec, now); err != nil || next.Sub(now) != want {
			t.Errorf("%q fires at %v, %v; want after %v", spec, next, err, want)
		}
	}
}

func FuzzCron(f *testing.F) {
	for _, spec := range []string{"TZ=", "TZ=UTC", "CRON_TZ=UTC * * * * *", "0 0 31 2 *", "@every 1ms", "@every 10m", "*/5 * * * *", "@daily", "0 0 29 2 *", "@every 9999999999h", "?/1 1-2 L * SUN"} {
		f.Add(spec)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		now := time.Now().UTC()
		next, err := tenancy.NextOfCron(spec, now) // which must not panic
		if err != nil {
			return
		}
		if len(spec) > 128 || strings.Contains(spec, "TZ=") {
			t.Errorf("%q was accepted", spec)
		}
		again, _ := tenancy.NextOfCron(spec, next)
		if !next.After(now) || next.Sub(now) > 367*24*time.Hour || !again.IsZero() && again.Sub(next) < time.Second {
			t.Errorf("%q fires at %v and %v", spec, next, again)
		}
	})
}

func TestWrongServersAreRefused(t *testing.T) {
	t.Parallel()
	f := tenancytest.NewFleet(t)
	tn := f.Open(t, tenancy.Config{})
	for url, rule := range map[string]string{
		"":                                    "url is missing",
		"postgres://u:p@h":                    "database",
		"postgres://h/d":                      "user",
		"postgres://u@h/d":                    "password",
		"postgres://u:p@/d":                   "host",
		"postgres://u:p@h/d/e":                "database",
		"mysql://u:p@h/d":                     "postgres",
		"jdbc:postgresql://h/d?user=u":        "jdbc",
		"host=h":                              "key=value",
		"postgres://u:p@h1,h2/d":              "one host",
		"postgres://u:p@h:0/d":                "port",
		"postgres://u:p@h:x/d":                "port",
		"postgres://u:p@%2ftmp/d":             "socket",
		"postgres://u:p@0.0.0.0/d":            "address of one server",
		"postgres://u:p@h/d?options=-c":       "options",
		"postgres://u:p@h/d?search_path=x":    "search_path",
		"postgres://u:p@h/d?role=x":           "role",
		"postgres://u:p@h/d?pool_max_conns=9": "pool_*",
		"postgres://u:p@h/d?sslmode=prefer":   "sslmode",
		"postgres://u:p@h/d?sslmode=disable&sslmode=require": "twice",
		"postgres://u:p@h/d\n":                               "line break",
		"postgres://u:p@h/d\x00":                             "control",
		"postgres://u:p@h/" + strings.Repeat("d", 2100):      "2048 bytes",
		"postgres://u:p@h/template0":                         "reserved",
		"postgres://pg_u:p@h/d":                              "reserved",
		"postgres://u:p@h/Data":                              "lower-case",
	} {
		wantError(t, tn.Catalog().AddServer(t.Context(), tenancy.ServerConfig{URL: url}), tenancy.ErrInvalid, "ServerConfig.URL", rule)
	}
}

// FuzzQuoteIdent compares our quoting with the server's own. The server quotes where it must, we always.
func FuzzQuoteIdent(f *testing.F) {
	fleet := tenancytest.NewFleet(f)
	conn := fleet.Admin(f, "tenants")
	for _, s := range []string{"a", "A", `a"b`, `"`, `""`, "a b", "a.b", "select", "$user", "é", "e\u0301", "a\nb", `a\b`, `\`, `'`, "\u202e", strings.Repeat("é", 32), strings.Repeat("a", 64), "a--b", "/*", "user", "t_0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if s == "" || strings.ContainsRune(s, 0) || !utf8.ValidString(s) || len(s) > 10_000 {
			return // no quoting expresses these: the server refuses them
		}
		var ident1, literal string
		var same, plain bool
		err := conn.QueryRow(t.Context(), fmt.Sprintf(`SELECT quote_ident($1), quote_literal($1), %s = $1, parse_ident($2) = ARRAY[$1] FROM (SELECT 1 AS %s) x`,
			ident.Literal(s), ident.Quote(s)), s, ident.Quote(s)).Scan(&ident1, &literal, &same, &plain)
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if ours := ident.Quote(s); ours != ident1 && (ident1 != s || ours != `"`+s+`"`) {
			t.Errorf("%q: we quote %s, the server %s", s, ours, ident1)
		}
		if ours := strings.TrimPrefix(ident.Literal(s), " "); ours != literal {
			t.Errorf("%q: our literal is %s, the server's %s", s, ours, literal)
		}
		if !same || !plain {
			t.Errorf("%q does not come back: as a literal %v, as a name %v", s, same, plain)
		}
	})
}
