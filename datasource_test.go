package tenancy_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/msmt-go/tenancy"
)

func TestParseDataSourceReadsEveryField(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]tenancy.DataSource{
		"postgres://u:p@h/d": {Host: "h", Port: 5432, Database: "d", User: "u", Password: "p"},
		"postgresql://u:p@db.example.com.:6543/d?sslmode=verify-ca": {Host: "db.example.com.", Port: 6543, Database: "d", User: "u", Password: "p", TLS: "verify-ca"},
		"postgres://u:p@127.0.0.1:1/d?schema=t_1&sslmode=disable":   {Host: "127.0.0.1", Port: 1, Database: "d", User: "u", Password: "p", Schema: "t_1", TLS: "disable"},
		"postgres://u:p@[::1]:65535/d":                              {Host: "::1", Port: 65535, Database: "d", User: "u", Password: "p"},
		"postgres://u:p@[2001:db8::1]/d?":                           {Host: "2001:db8::1", Port: 5432, Database: "d", User: "u", Password: "p"},
		"postgres://u:p@my_db-1:5432/d":                             {Host: "my_db-1", Port: 5432, Database: "d", User: "u", Password: "p"},
		"postgres://u%40x:p%40%2F%3F%23%25%3A+%20:é@h/d%2Fe%20f":    {Host: "h", Port: 5432, Database: "d/e f", User: "u@x", Password: "p@/?#%:+ :é"},
	} {
		got, err := tenancy.ParseDataSource(in)
		if err != nil || got != want {
			t.Errorf("ParseDataSource(%q) = %+v, %v", in, got, err)
		}
		if got.Password.Reveal() != want.Password.Reveal() {
			t.Errorf("ParseDataSource(%q): password is %q", in, got.Password.Reveal())
		}
	}
}

func TestParseDataSourceRefuses(t *testing.T) {
	t.Parallel()
	for rule, c := range map[string]struct{ in, says string }{
		"empty":                 {"", "url is missing"},
		"jdbc":                  {"jdbc:postgresql://u:canary@h/d", "url must not be a jdbc:"},
		"jdbc_upper_case":       {"JDBC:postgresql://u:canary@h/d", "url must not be a jdbc:"},
		"key_value":             {"user=u password=canary host=h", "url must not contain spaces"},
		"key_value_one":         {"password=canary", "url must not be key=value"},
		"bare_password":         {"canary", "url must begin with"},
		"other_scheme":          {"mysql://u:canary@h/d", "url must begin with"},
		"upper_case_scheme":     {"POSTGRES://u:canary@h/d", "url must begin with"},
		"no_slashes":            {"postgres:u:canary@h/d", "url must begin with"},
		"too_long":              {"postgres://u:canary@h/d" + strings.Repeat("d", 2048), "url must be at most 2048"},
		"trailing_newline":      {"postgres://u:canary@h/d\n", "url must not contain spaces or control"},
		"leading_space":         {" postgres://u:canary@h/d", "url must not contain spaces or control"},
		"nul":                   {"postgres://u:canary\x00@h/d", "url must not contain spaces or control"},
		"invalid_utf8":          {"postgres://u:canary\xff@h/d", "url must be valid UTF-8"},
		"escaped_nul":           {"postgres://u:canary%00@h/d", "password must not contain control"},
		"escaped_newline":       {"postgres://u%0a:canary@h/d", "user must not contain control"},
		"escaped_utf8":          {"postgres://u:canary@h/d%ff", "database must be valid UTF-8"},
		"bad_escape":            {"postgres://u:canary%zz@h/d", "password must be percent-encoded"},
		"bad_escape_in_user":    {"postgres://canary%z:p@h/d", "user must be percent-encoded"},
		"no_user_info":          {"postgres://h/d", "user is missing"},
		"no_user":               {"postgres://:canary@h/d", "user is missing"},
		"no_password":           {"postgres://u@h/d", "password is missing"},
		"empty_password":        {"postgres://u:@h/d", "password is missing"},
		"no_host":               {"postgres://u:canary@/d", "host is missing"},
		"no_host_but_port":      {"postgres://u:canary@:5432/d", "host is missing"},
		"no_database":           {"postgres://u:canary@h", "database is missing"},
		"empty_database":        {"postgres://u:canary@h/", "database is missing"},
		"two_segments":          {"postgres://u:canary@h/d/e", "database must be one path segment"},
		"long_database":         {"postgres://u:canary@h/" + strings.Repeat("d", 64), "database must be at most 63"},
		"long_user":             {"postgres://" + strings.Repeat("u", 64) + ":canary@h/d", "user must be at most 63"},
		"long_password":         {"postgres://u:" + strings.Repeat("canary", 180) + "@h/d", "password must be at most 1024"},
		"at_in_password":        {"postgres://u:can@ary@h/d", "password must have its @"},
		"slash_in_password":     {"postgres://u:12/canary@h/d", "user is missing"},
		"question_in_password":  {"postgres://u:12?canary@h/d", "user is missing"},
		"question_then_at":      {"postgres://u:1@2?canary@h/d", "a key is refused"},
		"fragment":              {"postgres://u:can#ary@h/d", "url must not have a fragment"},
		"several_hosts":         {"postgres://u:canary@h1,h2/d", "host must be one host"},
		"several_hosts_ports":   {"postgres://u:canary@h1:5432,h2:5432/d", "host must be one host"},
		"socket":                {"postgres://u:canary@%2Fvar%2Frun/d", "host must not be a socket"},
		"abstract_socket":       {"postgres://u:canary@%40abstract/d", "host must be a name"},
		"encoded_host":          {"postgres://u:canary@h%2e/d", "host must be a name"},
		"short_address":         {"postgres://u:canary@127.1/d", "host must be a name"},
		"decimal_address":       {"postgres://u:canary@2130706433/d", "host must be a name"},
		"unspecified":           {"postgres://u:canary@0.0.0.0/d", "host must be the address of one server"},
		"unspecified_6":         {"postgres://u:canary@[::]/d", "host must be the address of one server"},
		"zone":                  {"postgres://u:canary@[fe80::1%25eth0]/d", "host must be the address of one server"},
		"non_ascii_host":        {"postgres://u:canary@hé/d", "host must be a name"},
		"name_in_brackets":      {"postgres://u:canary@[h]/d", "host in brackets must be"},
		"ipv4_in_brackets":      {"postgres://u:canary@[127.0.0.1]/d", "host in brackets must be"},
		"open_bracket":          {"postgres://u:canary@[::1/d", "host must close its bracket"},
		"after_bracket":         {"postgres://u:canary@[::1]x/d", "host must be followed"},
		"ipv6_without_brackets": {"postgres://u:canary@::1/d", "port must be"},
		"port_0":                {"postgres://u:canary@h:0/d", "port must be"},
		"port_over":             {"postgres://u:canary@h:65536/d", "port must be"},
		"port_empty":            {"postgres://u:canary@h:/d", "port must be"},
		"port_signed":           {"postgres://u:canary@h:+1/d", "port must be"},
		"port_text":             {"postgres://u:x@h:canary/d", "port must be"},
		"options":               {"postgres://u:canary@h/d?options=-crole%3Dx", "options is refused"},
		"role":                  {"postgres://u:canary@h/d?role=x", "role is refused"},
		"search_path":           {"postgres://u:canary@h/d?search_path=x", "search_path is refused"},
		"target_session_attrs":  {"postgres://u:canary@h/d?target_session_attrs=any", "target_session_attrs is refused"},
		"pool":                  {"postgres://u:canary@h/d?pool_max_conns=1", "pool_* is refused"},
		"passfile":              {"postgres://u:canary@h/d?passfile=x", "passfile is refused"},
		"sslrootcert":           {"postgres://u:canary@h/d?sslrootcert=x", "sslrootcert is refused"},
		"service":               {"postgres://u:canary@h/d?service=x", "service is refused"},
		"password_key":          {"postgres://u:p@h/d?password=canary", "password is refused"},
		"host_key":              {"postgres://u:canary@h/d?host=/tmp", "host is refused"},
		"unknown_key":           {"postgres://u:p@h/d?canary=x", "a key is refused"},
		"upper_case_key":        {"postgres://u:canary@h/d?SSLMODE=disable", "a key is refused"},
		"key_twice":             {"postgres://u:canary@h/d?sslmode=require&sslmode=require", "sslmode is given twice"},
		"key_twice_encoded":     {"postgres://u:canary@h/d?sslmode=verify-full&ssl%6dode=disable", "sslmode is given twice"},
		"empty_value":           {"postgres://u:canary@h/d?sslmode=", "sslmode is empty"},
		"no_value":              {"postgres://u:canary@h/d?schema", "schema is empty"},
		"semicolon":             {"postgres://u:canary@h/d?sslmode=require;schema=x", "keys must be written"},
		"allow":                 {"postgres://u:canary@h/d?sslmode=allow", "sslmode must not be allow or prefer"},
		"prefer":                {"postgres://u:canary@h/d?sslmode=prefer", "sslmode must not be allow or prefer"},
		"unknown_mode":          {"postgres://u:canary@h/d?sslmode=canary", "sslmode must be disable"},
		"schema_public":         {"postgres://u:canary@h/d?schema=public", "schema must not be a name reserved"},
		"schema_list":           {"postgres://u:canary@h/d?schema=a,b", "schema must be made of"},
	} {
		t.Run(rule, func(t *testing.T) {
			d, err := tenancy.ParseDataSource(c.in)
			if d != (tenancy.DataSource{}) || !errors.Is(err, tenancy.ErrInvalid) || !strings.Contains(err.Error(), ": "+c.says) {
				t.Fatalf("ParseDataSource = %v, %v; want %q", d, err, c.says)
			}
			for _, part := range []string{"canary", "can@", "ary@", "can#", "#ary"} {
				if strings.Contains(err.Error(), part) {
					t.Errorf("the error shows its input: %v", err)
				}
			}
		})
	}
}

func exampleSource() tenancy.DataSource {
	return tenancy.DataSource{Host: "db.example.com", Port: 6543, Database: "app", Schema: "t_1", User: "app_login", Password: canary}
}

func TestDataSourceIsValidatedWithoutAURL(t *testing.T) {
	t.Parallel()
	if err := exampleSource().Validate(); err != nil {
		t.Fatal(err)
	}
	for says, change := range map[string]func(*tenancy.DataSource){
		"host is missing":                    func(d *tenancy.DataSource) { d.Host = "" },
		"host must be one host":              func(d *tenancy.DataSource) { d.Host = "a,b" },
		"host must not be a socket":          func(d *tenancy.DataSource) { d.Host = "/var/run/postgresql" },
		"host must not be a socket ":         func(d *tenancy.DataSource) { d.Host = "@abstract" },
		"host must not be a socket  ":        func(d *tenancy.DataSource) { d.Host = `C:\pg` },
		"host must be a name":                func(d *tenancy.DataSource) { d.Host = "h:5432" },
		"host must be a name ":               func(d *tenancy.DataSource) { d.Host = "h\x00" },
		"port must be":                       func(d *tenancy.DataSource) { d.Port = 0 },
		"database is missing":                func(d *tenancy.DataSource) { d.Database = "" },
		"user is missing":                    func(d *tenancy.DataSource) { d.User = "" },
		"password is missing":                func(d *tenancy.DataSource) { d.Password = "" },
		"password must not contain control":  func(d *tenancy.DataSource) { d.Password = canary + "\x00" },
		"user must be valid UTF-8":           func(d *tenancy.DataSource) { d.User = "\xff" },
		"schema must":                        func(d *tenancy.DataSource) { d.Schema = "Acme" },
		"sslmode must not be allow":          func(d *tenancy.DataSource) { d.TLS = "prefer" },
		"sslmode must be disable, require, ": func(d *tenancy.DataSource) { d.TLS = canary },
	} {
		d := exampleSource()
		change(&d)
		err := d.Validate()
		if err == nil || !strings.HasPrefix(err.Error(), strings.TrimRight(says, " ")) || strings.Contains(err.Error(), "canary") {
			t.Errorf("validate = %v, want %q", err, says)
		}
		if c, err := d.ConnConfig(); err == nil || c != nil {
			t.Errorf("connConfig accepted what validate refuses: %s", says)
		}
	}
}

func TestDataSourcePrintsWithoutItsPassword(t *testing.T) {
	t.Parallel()
	d := exampleSource()
	for _, v := range []any{d, &d, []tenancy.DataSource{d}, map[string]*tenancy.DataSource{"k": &d}, struct{ D tenancy.DataSource }{d}, &struct{ D *tenancy.DataSource }{&d}} {
		wantNoCanary(t, shown(v), canary)
	}
	if text := shown(d); !strings.Contains(text, "db.example.com:6543/app") || !strings.Contains(text, "app_login") || !strings.Contains(text, "t_1") {
		t.Error("a data source does not say where it leads")
	}
	if got := d.Address(); got != "db.example.com:6543/app" {
		t.Errorf("Address() = %s", got)
	}
	if got := (tenancy.DataSource{Host: "::1", Port: 1, Database: "d"}).Address(); got != "[::1]:1/d" {
		t.Errorf("Address() = %s", got)
	}
	c, err := d.ConnConfig()
	if err != nil {
		t.Fatal(err)
	}
	wantNoCanary(t, c.ConnString(), canary)
}

func TestConnConfigHoldsTheFieldsAndNothingElse(t *testing.T) {
	d := exampleSource()
	plain := configFingerprint(t, d)
	// HOME with every default file, and every PG* variable that pgx knows.
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, ".postgresql"), 0o700); err != nil {
		t.Fatal(err)
	}
	evil := filepath.Join(home, "service.conf")
	for _, f := range []string{evil, filepath.Join(home, ".pg_service.conf")} {
		writeFile(t, f, "[evil]\nhost=evil\nrole=evil\nstatement_cache_capacity=7\n")
	}
	writeFile(t, filepath.Join(home, ".pgpass"), "*:*:*:*:evil\n")
	for _, f := range []string{"root.crt", "postgresql.crt", "postgresql.key"} {
		writeFile(t, filepath.Join(home, ".postgresql", f), "evil")
	}
	t.Setenv("HOME", home)
	for name, value := range map[string]string{
		"PGHOST": "evil", "PGPORT": "1", "PGDATABASE": "evil", "PGUSER": "evil", "PGPASSWORD": "evil", "PGPASSFILE": filepath.Join(home, ".pgpass"),
		"PGAPPNAME": "evil", "PGCONNECT_TIMEOUT": "77", "PGSSLMODE": "prefer", "PGSSLKEY": "/evil", "PGSSLCERT": "/evil", "PGSSLCERTMODE": "require",
		"PGSSLSNI": "0", "PGSSLROOTCERT": "/evil", "PGSSLPASSWORD": "evil", "PGSSLNEGOTIATION": "direct", "PGTARGETSESSIONATTRS": "standby",
		"PGSERVICE": "evil", "PGSERVICEFILE": evil, "PGTZ": "evil", "PGOPTIONS": "-crole=evil", "PGMINPROTOCOLVERSION": "3.2",
		"PGMAXPROTOCOLVERSION": "latest", "PGCHANNELBINDING": "disable", "PGREQUIREAUTH": "none",
	} {
		t.Setenv(name, value)
		if got := configFingerprint(t, d); !reflect.DeepEqual(got, plain) {
			t.Errorf("with %s set:\n%v\nwithout:\n%v", name, got, plain)
		}
	}
	for _, bad := range []string{"PGSSLMODE", "PGSSLCERTMODE", "PGTARGETSESSIONATTRS", "PGPORT", "PGCONNECT_TIMEOUT", "PGMINPROTOCOLVERSION", "PGREQUIREAUTH", "PGSERVICEFILE"} {
		t.Setenv(bad, "no such value")
		if got := configFingerprint(t, d); !reflect.DeepEqual(got, plain) {
			t.Errorf("with a wrong %s:\n%v", bad, got)
		}
	}
	plainMax := max(4, int32(runtime.NumCPU())) // pgxpool's default
	err := tenancy.WithoutEnvironment(func(s string) error {
		c, err := pgxpool.ParseConfig(s)
		if err == nil && (c.ConnConfig.ValidateConnect != nil || c.ConnConfig.TLSConfig != nil || c.ConnConfig.Host != "localhost" || c.MaxConns != plainMax) {
			t.Errorf("a pool's configuration is taken from the environment: host %s", c.ConnConfig.Host)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "pg_service-*.conf")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// configFingerprint is what a configuration does, without its functions.
func configFingerprint(t *testing.T, d tenancy.DataSource) map[string]any {
	t.Helper()
	c, err := d.ConnConfig()
	if err != nil {
		t.Fatal(err)
	}
	f := map[string]any{
		"validate": c.ValidateConnect == nil, "after": c.AfterConnect == nil, "statements": c.StatementCacheCapacity,
		"descriptions": c.DescriptionCacheCapacity, "mode": c.DefaultQueryExecMode, "conn string": strings.Contains(c.ConnString(), "evil"),
		"server name": c.TLSConfig.ServerName, "insecure": c.TLSConfig.InsecureSkipVerify, "roots": c.TLSConfig.RootCAs == nil,
		"certificates": len(c.TLSConfig.Certificates), "protocols": len(c.TLSConfig.NextProtos),
	}
	v := reflect.ValueOf(c.Config)
	for i := range v.NumField() {
		if s := v.Type().Field(i); s.IsExported() && s.Type.Kind() != reflect.Func && s.Name != "TLSConfig" {
			f[s.Name] = v.Field(i).Interface()
		}
	}
	return f
}

func TestConnConfigSetsEachField(t *testing.T) {
	t.Parallel()
	f := configFingerprint(t, exampleSource())
	for name, want := range map[string]any{
		"Host": "db.example.com", "Port": uint16(6543), "Database": "app", "User": "app_login", "Password": canary,
		"ConnectTimeout": 5 * time.Second, "RuntimeParams": map[string]string{}, "statements": 128, "descriptions": 0,
		"mode": pgx.QueryExecModeCacheStatement, "server name": "db.example.com", "insecure": false, "roots": true,
	} {
		if !reflect.DeepEqual(f[name], want) {
			t.Errorf("%s = %v, want %v", name, f[name], want)
		}
	}
	if c, _ := exampleSource().ConnConfig(); c.Fallbacks != nil {
		t.Error("there are fall-backs")
	}
}

func TestTLSDefaultsToVerifyFullButOnLoopback(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ host, mode, want string }{
		{"localhost", "", "disable"}, {"LOCALHOST", "", "disable"}, {"127.0.0.1", "", "disable"}, {"127.9.9.9", "", "disable"},
		{"::1", "", "disable"}, {"::ffff:127.0.0.1", "", "disable"},
		{"db", "", "full"}, {"10.0.0.1", "", "full"}, {"localhost.example.com", "", "full"}, {"x.localhost", "", "full"}, {"2001:db8::1", "", "full"},
		{"localhost", "verify-full", "full"}, {"db", "disable", "disable"}, {"db", "require", "require"}, {"db", "verify-ca", "ca"},
	} {
		d := exampleSource()
		d.Host, d.TLS = c.host, c.mode
		cc, err := d.ConnConfig()
		if err != nil {
			t.Fatal(err)
		}
		got := "disable"
		if tc := cc.TLSConfig; tc != nil {
			switch {
			case tc.ServerName != c.host:
				got = "no server name"
			case !tc.InsecureSkipVerify && tc.VerifyConnection == nil:
				got = "full"
			case tc.VerifyConnection != nil:
				got = "ca"
			default:
				got = "require"
			}
		}
		if got != c.want || (cc.RequireAuth == "!password") != (got != "full") {
			t.Errorf("host %s, mode %q: %s, auth %q; want %s", c.host, c.mode, got, cc.RequireAuth, c.want)
		}
	}
}

func TestVerifyCAChecksTheChainAndNotTheName(t *testing.T) {
	t.Parallel()
	ca, caKey := newCertificate(t, "ca", nil, nil)
	other, _ := newCertificate(t, "other ca", nil, nil)
	leaf, _ := newCertificate(t, "another name", ca, caKey)
	for name, c := range map[string]struct {
		root *x509.Certificate
		sent []*x509.Certificate
		ok   bool
	}{
		"trusted": {ca, []*x509.Certificate{leaf}, true}, "not_trusted": {other, []*x509.Certificate{leaf}, false}, "none": {ca, nil, false},
	} {
		pool := x509.NewCertPool()
		pool.AddCert(c.root)
		verify := tenancy.VerifyChain(pool).(func(tls.ConnectionState) error)
		if err := verify(tls.ConnectionState{PeerCertificates: c.sent}); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func newCertificate(t *testing.T, name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"elsewhere.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	if parent == nil {
		parent, parentKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}

func FuzzParseDataSource(f *testing.F) {
	for _, s := range []string{
		"postgres://u:@h/d", "postgresql://u:x@[::1]:5432/d?sslmode=require&schema=t_1", "jdbc:postgresql://u:@h/d", "postgres://u:@h1,h2/d",
		"postgres://u:@%2Ftmp/d", "postgres://u:%@h/d", "postgres://u:@h:0/d?options=x", "postgres://u:a/b?c#d@e@h/d", "host=h password=",
	} {
		before, after, _ := strings.Cut(s, ":@")
		f.Add(before+":", after)
		f.Add(s, "")
	}
	const secret = "cAnArY1"
	f.Fuzz(func(t *testing.T, before, after string) {
		for _, in := range []string{before + secret + after, before + ":" + secret + "@" + after, "postgres://u:" + secret + before + "@" + after} {
			d, err := tenancy.ParseDataSource(in)
			if err != nil {
				if d != (tenancy.DataSource{}) || !errors.Is(err, tenancy.ErrInvalid) || strings.Contains(err.Error(), secret) {
					t.Fatalf("ParseDataSource(%q) = %v, %v", in, d, err)
				}
				continue
			}
			if err := d.Validate(); err != nil {
				t.Fatalf("ParseDataSource(%q): accepted, yet %v", in, err)
			}
			sameAsURL(t, in, d)
		}
	})
}

// sameAsURL fails when net/url reads another host, user, password or database out of s.
func sameAsURL(t *testing.T, s string, d tenancy.DataSource) {
	u, err := url.Parse(s)
	if err != nil {
		return // net/url refuses more than we do
	}
	password, _ := u.User.Password()
	if u.Hostname() != d.Host || u.User.Username() != d.User || password != d.Password.Reveal() || u.Path != "/"+d.Database {
		t.Fatalf("%q is %v, and to net/url %s", s, d, u.Redacted())
	}
}
