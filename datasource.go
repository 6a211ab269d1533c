package tenancy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
)

const (
	maxURL            = 2048
	maxPGName         = 63 // PostgreSQL truncates longer names without a word
	maxPassword       = 1024
	defaultPGPort     = 5432
	connectTimeout    = 5 * time.Second
	statementCacheCap = 128
)

// DataSource is how to reach a tenant's data: structured fields, and nothing that is not in them.
// PG* variables, .pgpass, service files and the user of the operating system play no part.
//
// It is a comparable value, and it prints without the password; a type that keeps one in an
// unexported field has a Format method of its own, as [Secret] explains. The zero value is refused.
type DataSource struct {
	Host     string // one name or IP address; no list and no socket. Required.
	Port     uint16 // TCP port; 0 is refused. ParseDataSource fills in 5432.
	Database string // at most 63 bytes. Required.
	Schema   string // lower-case name of at most 48 bytes. Default: none.
	User     string // at most 63 bytes. Required.
	Password Secret // at most 1024 bytes. Required.
	// TLS is how the connection is protected: "disable"; "require" (encrypted, to whoever
	// answers); "verify-ca" (the certificate is of an authority the system trusts); or
	// "verify-full" (and it is the host's). There is no fall-back from one to another.
	// Default: "verify-full", and "disable" for localhost and loopback addresses.
	TLS string
	// Pooler is host:port of the pooler that the tenant's calls go through, to the same Database, as User; see
	// docs/poolers.md. What the library does for the tenant (migrations, fences) goes to Host and Port. Only the one that the place's
	// server is registered with is taken ([ServerConfig].Pooler). Default: none, the calls go to Host and Port too.
	Pooler string
	// PoolerTLS is as TLS, for the connections to Pooler, and with the same default, by the pooler's own host.
	PoolerTLS string
}

// ParseDataSource reads postgres://user:password@host:port/database?sslmode=verify-full&schema=name,
// of at most 2 KB. User, password, host and database must be there; the port is 5432 when left out;
// sslmode (the field TLS) and schema may follow, once each, and no other key. User, password,
// database and values are percent-decoded.
//
// The error is [ErrInvalid]; it names the field and the rule, and never contains a part of the URL.
func ParseDataSource(url string) (DataSource, error) {
	d, err := parseDataSource(url)
	if err == nil {
		err = d.validate()
	}
	if err != nil {
		return DataSource{}, invalid(err)
	}
	return d, nil
}

// parseDataSource takes the URL apart by hand. Parsers differ on where a password with @ or / in
// it ends; here each such text is refused. The errors of net/url quote their input and are dropped.
func parseDataSource(s string) (d DataSource, err error) {
	rest, err := cutScheme(s)
	if err != nil {
		return d, err
	}
	rest, query, _ := strings.Cut(rest, "?")
	authority, path, _ := strings.Cut(rest, "/")
	at := strings.LastIndexByte(authority, '@')
	if at < 0 {
		return d, errors.New("user is missing: write postgres://user:password@host:port/database, with / ? # and @ in user and password percent-encoded")
	}
	user, password, _ := strings.Cut(authority[:at], ":")
	if strings.Contains(authority[:at], "@") {
		return d, errors.New("password must have its @ written as %40")
	}
	if d.User, err = decodePart("user", user); err != nil {
		return d, err
	}
	if password, err = decodePart("password", password); err != nil {
		return d, err
	}
	d.Password = Secret(password)
	if d.Host, d.Port, err = splitHost(authority[at+1:]); err != nil {
		return d, err
	}
	if strings.Contains(path, "/") {
		return d, errors.New("database must be one path segment")
	}
	if d.Database, err = decodePart("database", path); err != nil {
		return d, err
	}
	d.TLS, d.Schema, err = parseKeys(query)
	return d, err
}

func cutScheme(s string) (string, error) {
	const form = "; write postgres://user:password@host:port/database"
	switch {
	case s == "":
		return "", errors.New("url is missing" + form)
	case len(s) > maxURL:
		return "", fmt.Errorf("url must be at most %d bytes", maxURL)
	case !utf8.ValidString(s):
		return "", errors.New("url must be valid UTF-8")
	case strings.ContainsFunc(s, func(r rune) bool { return r == ' ' || unicode.IsControl(r) }):
		return "", errors.New("url must not contain spaces or control characters (is there a line break at the end?)")
	case len(s) >= 5 && strings.EqualFold(s[:5], "jdbc:"):
		return "", errors.New("url must not be a jdbc: URL" + form)
	}
	for _, scheme := range []string{"postgres://", "postgresql://"} {
		if rest, ok := strings.CutPrefix(s, scheme); ok {
			if strings.Contains(rest, "#") {
				return "", errors.New("url must not have a fragment: write # in a password as %23")
			}
			return rest, nil
		}
	}
	if !strings.Contains(s, "://") && strings.Contains(s, "=") {
		return "", errors.New("url must not be key=value settings" + form)
	}
	return "", errors.New("url must begin with postgres:// or postgresql://" + form)
}

func decodePart(field, s string) (string, error) {
	out, err := url.PathUnescape(s)
	if err != nil {
		return "", errors.New(field + " must be percent-encoded: write % as %25")
	}
	return out, nil
}

func splitHost(s string) (host string, port uint16, err error) {
	switch {
	case strings.Contains(s, ","):
		return "", 0, errSeveralHosts
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", 0, errors.New("host must close its bracket")
		}
		host, s = s[1:end], s[end+1:]
		if addr, err := netip.ParseAddr(host); err != nil || !addr.Is6() {
			return "", 0, errors.New("host in brackets must be an IPv6 address")
		}
		if s != "" && s[0] != ':' {
			return "", 0, errors.New("host must be followed by its port only")
		}
	default:
		if n := strings.IndexByte(s, ':'); n >= 0 {
			host, s = s[:n], s[n:]
		} else {
			host, s = s, ""
		}
	}
	if s == "" {
		return host, defaultPGPort, nil
	}
	n, err := strconv.ParseUint(s[1:], 10, 16)
	if err != nil || n == 0 {
		return "", 0, errors.New("port must be a number from 1 to 65535 (an IPv6 host goes in brackets)")
	}
	return host, uint16(n), nil
}

func parseKeys(query string) (tlsMode, schema string, err error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return "", "", errors.New("keys must be written key=value, joined by & and percent-encoded")
	}
	for key, v := range values {
		if key != "sslmode" && key != "schema" {
			return "", "", errors.New(keyName(key) + " is refused: sslmode and schema are the only keys")
		}
		if len(v) > 1 {
			return "", "", errors.New(key + " is given twice")
		}
		if v[0] == "" {
			return "", "", errors.New(key + " is empty: leave the key out for the default")
		}
	}
	return values.Get("sslmode"), values.Get("schema"), nil
}

// keyName names a refused key where it is a well-known one. Any other may be the tail of a password
// with a question mark in it.
func keyName(key string) string {
	switch key {
	case "options", "role", "search_path", "session_authorization", "target_session_attrs", "application_name",
		"service", "servicefile", "passfile", "sslrootcert", "sslcert", "sslkey", "sslpassword", "connect_timeout",
		"host", "hostaddr", "port", "user", "password", "dbname", "database", "ssl", "default_query_exec_mode":
		return key
	}
	if strings.HasPrefix(key, "pool_") {
		return "pool_*"
	}
	return "a key"
}

var errSeveralHosts = errors.New("host must be one host")

// validate reports the first field that breaks its rule; the error repeats no value.
func (d DataSource) validate() error {
	if err := validateHost(d.Host); err != nil {
		return err
	}
	if d.Port == 0 {
		return errors.New("port must be from 1 to 65535")
	}
	for _, f := range []struct {
		name, value string
		max         int
	}{{"user", d.User, maxPGName}, {"password", d.Password.Reveal(), maxPassword}, {"database", d.Database, maxPGName}} {
		switch {
		case f.value == "":
			return errors.New(f.name + " is missing: the environment and .pgpass are not asked")
		case len(f.value) > f.max:
			return fmt.Errorf("%s must be at most %d bytes", f.name, f.max)
		case !utf8.ValidString(f.value):
			return errors.New(f.name + " must be valid UTF-8")
		case strings.ContainsFunc(f.value, unicode.IsControl):
			return errors.New(f.name + " must not contain control characters")
		}
	}
	if d.Schema != "" {
		if err := ident.Schema(d.Schema); err != nil {
			return err
		}
	}
	if err := validateTLS(d.TLS); err != nil {
		return err
	}
	return d.validatePooler()
}

func validateTLS(mode string) error {
	switch mode {
	case "", "disable", "require", "verify-ca", "verify-full":
		return nil
	case "allow", "prefer":
		return errors.New("sslmode must not be allow or prefer: they fall back to a connection without protection")
	}
	return errors.New("sslmode must be disable, require, verify-ca or verify-full")
}

func (d DataSource) validatePooler() error {
	if d.Pooler == "" {
		if d.PoolerTLS != "" {
			return errors.New("pooler is missing, and its TLS is given")
		}
		return nil
	}
	if _, err := d.viaPooler(); err != nil {
		return fmt.Errorf("pooler: %w", err)
	}
	if err := validateTLS(d.PoolerTLS); err != nil {
		return fmt.Errorf("pooler: %w", err)
	}
	return nil
}

// viaPooler returns how the tenant's calls reach their data: by the pooler's address where there is one.
func (d DataSource) viaPooler() (DataSource, error) {
	if d.Pooler == "" {
		return d, nil
	}
	host, text, err := net.SplitHostPort(d.Pooler)
	if err != nil {
		return DataSource{}, errors.New("it must be host:port, with an IPv6 host in brackets")
	}
	if err := validateHost(host); err != nil {
		return DataSource{}, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return DataSource{}, errors.New("port must be a number from 1 to 65535")
	}
	d.Host, d.Port, d.TLS = host, uint16(port), d.PoolerTLS
	return d, nil
}

func validateHost(s string) error {
	switch {
	case s == "":
		return errors.New("host is missing: the environment is not asked")
	case strings.Contains(s, ","):
		return errSeveralHosts
	case strings.ContainsAny(s, `/\@`), len(s) >= 3 && strings.EqualFold(s[:3], "%2f"):
		return errors.New("host must not be a socket")
	}
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.Zone() != "" || addr.IsUnspecified() || addr.Unmap().IsUnspecified() || addr.IsMulticast() {
			return errors.New("host must be the address of one server, without a zone")
		}
		return nil
	}
	// Names of containers have underscores, which names of domains have not.
	if _, err := ident.Domain(strings.ReplaceAll(s, "_", "x")); err != nil {
		return errors.New("host must be a name of letters, digits, hyphens, underscores and dots, or an IP address")
	}
	return nil
}

// tlsMode is TLS with its default filled in.
func (d DataSource) tlsMode() string {
	if d.TLS != "" {
		return d.TLS
	}
	if addr, err := netip.ParseAddr(d.Host); err == nil && addr.Unmap().IsLoopback() || strings.EqualFold(d.Host, "localhost") {
		return "disable"
	}
	return "verify-full"
}

// Address returns host:port/database, for logs.
func (d DataSource) Address() string {
	return net.JoinHostPort(d.Host, strconv.Itoa(int(d.Port))) + "/" + d.Database
}

// String returns every field but the password.
func (d DataSource) String() string {
	s := fmt.Sprintf("postgres://%s:%s@%s?sslmode=%s&schema=%s", d.User, redacted, d.Address(), d.tlsMode(), d.Schema)
	if d.Pooler != "" {
		s += " through the pooler " + d.Pooler
	}
	return s
}

// GoString returns the same as String.
func (d DataSource) GoString() string { return d.String() }

// Format writes the same as String, whatever the verb and the flags.
func (d DataSource) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, d.String()) }

// LogValue returns address, user, schema and TLS, and the pooler where there is one.
func (d DataSource) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("address", d.Address()), slog.String("user", d.User),
		slog.String("schema", d.Schema), slog.String("tls", d.tlsMode())}
	if d.Pooler != "" {
		attrs = append(attrs, slog.String("pooler", d.Pooler))
	}
	return slog.GroupValue(attrs...)
}

// connConfig makes pgx's configuration from the fields alone. The caller may change it; it has no
// runtime parameters, no fall-backs, and its ConnString holds no secret, but its Password does.
func (d DataSource) connConfig() (*pgx.ConnConfig, error) {
	var c *pgx.ConnConfig
	err := withoutEnvironment(func(settings string) (err error) {
		c, err = pgx.ParseConfig(settings)
		return err
	})
	if err == nil {
		err = d.fill(c)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// fill puts the fields into settings that withoutEnvironment has made.
func (d DataSource) fill(c *pgx.ConnConfig) error {
	if err := d.validate(); err != nil {
		return err
	}
	c.Host, c.Port, c.Database = d.Host, d.Port, d.Database
	c.User, c.Password = d.User, d.Password.Reveal()
	c.TLSConfig, c.SSLCertMode = d.tlsConfig(), "allow"
	c.Fallbacks = nil
	c.RuntimeParams = map[string]string{}
	c.ConnectTimeout = connectTimeout
	c.DialFunc = dialer().DialContext
	if d.tlsMode() != "verify-full" {
		// Whoever answers may be someone else: it must not be able to just ask for the password.
		c.RequireAuth = "!password"
	}
	c.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
	c.StatementCacheCapacity = statementCacheCap
	c.DescriptionCacheCapacity = 0
	return nil
}

// withoutEnvironment gives parse, which is ParseConfig of pgx or pgxpool, settings that leave
// nothing to PG* variables, .pgpass, files in the home directory or the user of the operating
// system, apart from RuntimeParams. They hold placeholders and no secret: the caller overwrites
// them and empties RuntimeParams, or replaces a pool's whole ConnConfig by that of connConfig.
func withoutEnvironment(parse func(settings string) error) error {
	settings := "host=localhost port=5432 dbname=placeholder user=placeholder password=placeholder passfile='' " +
		"sslmode=disable sslrootcert='' sslcert='' sslkey='' sslpassword='' sslsni=1 sslcertmode=disable sslnegotiation=postgres " +
		"channel_binding=prefer require_auth='' min_protocol_version='' max_protocol_version='' " +
		"target_session_attrs=any connect_timeout=" + strconv.Itoa(int(connectTimeout/time.Second))
	if os.Getenv("PGSERVICE") != "" {
		// A service, once named, cannot be unnamed, only be another one: one that says nothing.
		name, err := emptyService()
		if err != nil {
			return fmt.Errorf("PGSERVICE is set in the environment and cannot be shadowed by a temporary file: %w", err)
		}
		defer func() { _ = os.Remove(name) }()
		settings += " service=none servicefile='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(name) + "'"
	}
	if parse(settings) != nil {
		return errors.New("connection settings are refused by pgx") // its errors quote what they were given
	}
	return nil
}

func emptyService() (name string, err error) {
	f, err := os.CreateTemp("", "pg_service-*.conf")
	if err != nil {
		return "", err
	}
	_, err = f.WriteString("[none]\n")
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// tlsConfig returns nil for a connection without TLS. Trust is the system's: no file is read.
func (d DataSource) tlsConfig() *tls.Config {
	name := strings.TrimSuffix(d.Host, ".")
	switch d.tlsMode() {
	case "require":
		return &tls.Config{ServerName: name, InsecureSkipVerify: true} // as asked for
	case "verify-ca":
		// crypto/tls cannot check the chain without the name, so the chain is checked here.
		// VerifyConnection runs for resumed sessions too, VerifyPeerCertificate does not.
		return &tls.Config{ServerName: name, InsecureSkipVerify: true, VerifyConnection: verifyChain(nil)}
	case "verify-full":
		return &tls.Config{ServerName: name}
	}
	return nil
}

// verifyChain checks a server's certificate up to roots, the system's for nil, whatever its name.
func verifyChain(roots *x509.CertPool) func(tls.ConnectionState) error {
	return func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return errors.New("server sent no certificate")
		}
		o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, c := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(c)
		}
		_, err := s.PeerCertificates[0].Verify(o)
		return err
	}
}
