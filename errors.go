package tenancy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"
	"github.com/msmt-go/tenancy/internal/budget"
	"github.com/msmt-go/tenancy/internal/lease"
)

// The classes of failure. Errors of this package are matched with errors.Is against these; the text around
// them says what was tried, for which tenant and what to do.
var (
	// ErrNoTenant: the context carries no tenant. It is never answered with a default tenant.
	ErrNoTenant = errors.New("tenancy: no tenant on the context")
	// ErrTenantMismatch: a value of one tenant or realm was used in the context of another.
	ErrTenantMismatch = errors.New("tenancy: tenant mismatch")
	// ErrTenantNotFound: no such tenant.
	ErrTenantNotFound = errors.New("tenancy: no such tenant")
	// ErrTenantExists: the name is taken, by a living tenant or by a deleted one that is not purged and whose name was not released.
	ErrTenantExists = errors.New("tenancy: tenant name is taken")
	// ErrTenantSuspended: the tenant is suspended.
	ErrTenantSuspended = errors.New("tenancy: tenant is suspended")
	// ErrTenantMaintenance: the tenant is under maintenance and will be back.
	ErrTenantMaintenance = errors.New("tenancy: tenant is under maintenance")
	// ErrTenantGone: the tenant was deleted.
	ErrTenantGone = errors.New("tenancy: tenant was deleted")
	// ErrQuarantined: the tenant was deleted too short a time ago to be purged; the text says until when.
	ErrQuarantined = errors.New("tenancy: tenant is in quarantine")
	// ErrTenantNotReady: the tenant is still being provisioned.
	ErrTenantNotReady = errors.New("tenancy: tenant is being provisioned")
	// ErrTenantUnavailable: the tenant's own database could not be reached. Other tenants are not concerned.
	ErrTenantUnavailable = errors.New("tenancy: the tenant's database is unavailable")
	// ErrForbidden: the user does not belong to the tenant; also when there is no such tenant, so that the two cannot be told apart.
	ErrForbidden = errors.New("tenancy: not a member")
	// ErrAmbiguousTenant: the user belongs to several tenants, none is the default and the request names none.
	ErrAmbiguousTenant = errors.New("tenancy: several tenants and no default")
	// ErrNotServed: this node does not serve the tenant.
	ErrNotServed = errors.New("tenancy: tenant is not served by this node")
	// ErrPrimaryUnavailable: the primary database could not be asked. It is never answered as "not found".
	ErrPrimaryUnavailable = errors.New("tenancy: primary database is unavailable")
	// ErrWrongKey: the keys cannot open what the primary holds.
	ErrWrongKey = errors.New("tenancy: the keys do not fit the primary")
	// ErrPrimaryNewer: the primary's schema was migrated by a newer release.
	ErrPrimaryNewer = errors.New("tenancy: the primary is newer than this code")
	// ErrSetup: something that Init makes is missing; the error is a [*SetupError] with the statements that mend it.
	ErrSetup = errors.New("tenancy: set-up is incomplete")
	// ErrNoProvisioner: no provisioner login is known for the tenant's server.
	ErrNoProvisioner = errors.New("tenancy: no provisioner for this server")
	// ErrNoRoom: no server takes another tenant: those that could have as many places as their Capacity says, or take only tenants that name them.
	ErrNoRoom = errors.New("tenancy: no server has room for the tenant")
	// ErrNoMigrations: a tenant cannot be created without the service's migrations.
	ErrNoMigrations = errors.New("tenancy: no migrations are configured")
	// ErrMigrationDirty: a migration that says NO TRANSACTION has died half-way, and somebody has to look at what it left; see [Migrator.Resolve].
	ErrMigrationDirty = errors.New("tenancy: a migration without a transaction has died half-way")
	// ErrSchemaBehind: the tenant's schema is older than this code needs ([Config].MinVersion); it is served as soon as it is migrated.
	ErrSchemaBehind = errors.New("tenancy: the tenant's schema is behind")
	// ErrNotBegun: the run of migrations was stopped before it came to this tenant. Nothing was done.
	ErrNotBegun = errors.New("tenancy: the run was stopped before this tenant")
	// ErrNoHostData: Config.HostURL is not set.
	ErrNoHostData = errors.New("tenancy: no host data is configured")
	// ErrIdentity: a connection did not prove to be the tenant's own.
	ErrIdentity = errors.New("tenancy: connection is not the tenant's")
	// ErrPooler: a connection pooler that was not declared (ServerConfig.Pooler) stands between us and PostgreSQL.
	ErrPooler = errors.New("tenancy: undeclared connection pooler")
	// ErrSessionPooled: WithConn was called for a tenant whose calls go through a pooler, where a connection is no session.
	ErrSessionPooled = errors.New("tenancy: the tenant's calls go through a pooler, which gives nobody a session of its own")
	// ErrUserLimit: the tenant's MaxUsers is reached.
	ErrUserLimit = errors.New("tenancy: the tenant's user limit is reached")
	// ErrInvalid: a value from outside was refused; the text names the field and the rule.
	ErrInvalid = errors.New("tenancy: invalid value")
	// ErrNotClosed: the tenant has moved, or has its new login, and what it left could not be closed or dropped at its server.
	// The validity job tries again.
	ErrNotClosed = errors.New("tenancy: what the tenant has left is not closed")
	// ErrInProgress: another node is working on the same tenant.
	ErrInProgress = errors.New("tenancy: another operation on this tenant is in progress")
	// ErrBusy: too many calls wait for a connection of the tenant, or none came in time. Nothing was sent.
	ErrBusy = errors.New("tenancy: no connection is free")
	// ErrCommitUnknown: the answer to a COMMIT was lost, or a CommitQuery (pgx.TxOptions) failed, which may have been behind its COMMIT. The transaction is committed or rolled back, whole either way; the library does not try again.
	ErrCommitUnknown = errors.New("tenancy: it is not known whether the transaction was committed")
	// ErrClosed: the Tenancy was shut down.
	ErrClosed = errors.New("tenancy: closed")
)

// Error is a failure with what the person on call needs: the operation, the tenant, and when to try again.
type Error struct {
	Op         string        // what was tried: "create", "query", "resolve"
	Tenant     ID            // 0: none or unknown
	Name       string        // the tenant's name, "" when unknown
	RetryAfter time.Duration // 0: a later try will not help by itself
	Message    string        // the operator's words for the tenant's members; "" for none
	Err        error         // the cause; errors.Is and errors.As reach it
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("tenancy: ")
	b.WriteString(e.Op)
	switch {
	case e.Name != "" && e.Tenant != 0:
		fmt.Fprintf(&b, ": tenant %q (id %d)", e.Name, e.Tenant)
	case e.Name != "":
		fmt.Fprintf(&b, ": tenant %q", e.Name)
	case e.Tenant != 0:
		fmt.Fprintf(&b, ": tenant id %d", e.Tenant)
	}
	b.WriteString(": ")
	b.WriteString(strings.TrimPrefix(e.Err.Error(), "tenancy: "))
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// hinted adds what to do to a sentinel.
func hinted(class error, format string, args ...any) error {
	return fmt.Errorf("%w: %s", class, fmt.Sprintf(format, args...))
}

// invalid is ErrInvalid with the reason of a parser, which names the field and the rule.
func invalid(err error) error { return fmt.Errorf("%w: %w", ErrInvalid, err) }

var (
	errNoSession   = hinted(ErrNoTenant, "no session: the request did not pass middleware.Tenant, or the context is not the request's (context.Background() in a goroutine: pass tenancy.Detach(r.Context()) instead; in jobs use tn.Enter)")
	errHostSession = hinted(ErrNoTenant, "the session is the host's, which has no tenant data: use tn.Host() for host data, or tn.Enter for one tenant's")
)

func errNoTenant(s *Session) error {
	switch {
	case s == nil:
		return errNoSession
	case s.refused:
		return errSwitchInTx
	}
	return errHostSession
}

// connectFailure stands in for pgconn.ConnectError, whose exported Config holds the password.
type connectFailure struct {
	text  string
	cause error // a *pgconn.PgError, a context error or a network error; never a ConnectError
}

func (f *connectFailure) Error() string { return f.text }
func (f *connectFailure) Unwrap() error { return f.cause }

// withoutSecrets replaces errors of pgx that carry the connection's configuration. Every error
// that leaves this package from a connect or an acquire passes through it.
func withoutSecrets(err error) error {
	var parse *pgconn.ParseConfigError
	if errors.As(err, &parse) {
		return errors.New("the connection settings cannot be parsed")
	}
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) {
		return err
	}
	f := &connectFailure{text: connect.Error()}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		f.cause = pg
	} else if errors.Is(err, budget.ErrNoPermit) {
		f.cause = budget.ErrNoPermit
	} else if errors.Is(err, budget.ErrTimeout) {
		f.cause = hinted(ErrBusy, "no connection of this node's budget came free (Limits.ServerConns)")
	} else if errors.Is(err, context.DeadlineExceeded) {
		f.cause = context.DeadlineExceeded
	} else if errors.Is(err, context.Canceled) {
		f.cause = context.Canceled
	} else if op, ok := errors.AsType[*net.OpError](err); ok {
		f.cause = op
	}
	return f
}

// poolClosed says whether err is that of a pool that somebody has closed.
func poolClosed(err error) bool { return errors.Is(err, puddle.ErrClosedPool) }

// logPanic writes where a callback of the service panicked: the error that its callers get does not say.
func (tn *Tenancy) logPanic(t Tenant, err error) {
	var stack []byte
	if p, ok := errors.AsType[*lease.PanicError](err); ok {
		stack = p.Stack
	} else if p, ok := errors.AsType[*loadPanic](err); ok {
		stack = p.stack
	} else {
		return
	}
	tn.cfg.Logger.Error("tenancy: a callback panicked", "tenant", t.ID, "name", t.Name, "error", err, "stack", string(stack))
}

// unavailable marks a failure to ask the primary. An answer of the primary that refuses (a wrong
// statement, a lost privilege) is reported with the same class: it is never "not found".
func unavailable(op string, err error) error {
	switch {
	case err == nil || errors.Is(err, ErrPrimaryUnavailable) || errors.Is(err, ErrClosed):
		return err
	case poolClosed(err):
		return &Error{Op: op, Err: ErrClosed}
	case errors.Is(err, budget.ErrTimeout):
		return &Error{Op: op, RetryAfter: busyRetryAfter, Err: hinted(ErrBusy, "no connection of this node's budget came free (Limits.ServerConns)")}
	case errors.Is(err, context.Canceled): // the caller's doing, not the primary's
		return &Error{Op: op, Err: withoutSecrets(err)}
	}
	return &Error{Op: op, RetryAfter: primaryRetryAfter, Err: fmt.Errorf("%w: %w", ErrPrimaryUnavailable, withoutSecrets(err))}
}

const primaryRetryAfter = 2 * time.Second
