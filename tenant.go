package tenancy

import (
	"encoding/hex"
	"fmt"
	"unique"
)

// ID is a tenant's key in code and logs: a small number, never reused within a realm.
// It is no secret and no proof: an ID opens nothing without a [Session].
type ID int64

// UID is a tenant's identity for life: 128 random bits that are never changed and never reused.
// The marker row in the tenant's own schema, encryption and generated names are bound to it.
type UID [16]byte

// String returns the UID in the form of a UUID.
func (u UID) String() string {
	h := hex.EncodeToString(u[:])
	return h[0:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:32]
}

// UserKey identifies an authenticated user: an email or an external id, at most 256 bytes of UTF-8.
// Keys are compared byte by byte: a service that means Bob@x and bob@x to be one user folds them
// before it answers, and one with several issuers writes "issuer|subject".
type UserKey string

// State is where a tenant is in its life.
type State string

const (
	StateProvisioning State = "provisioning" // its place is being made; not served yet
	StateActive       State = "active"       // served
	StateSuspended    State = "suspended"    // refused with 403, its sessions ended at the server
	StateMaintenance  State = "maintenance"  // refused with 503 and the operator's message
	StateDeleted      State = "deleted"      // in quarantine: access is gone, data is kept, and the name unless it was released
	StatePurged       State = "purged"       // data dropped; the tombstone keeps the ID and UID from reuse, and says nothing of who it was
)

// Isolation is how a tenant's data is kept apart from that of others.
type Isolation string

const (
	// IsolationSchema keeps the tenant in a schema of its own, reached by a login of its own.
	IsolationSchema Isolation = "schema"
	// IsolationDatabase keeps the tenant in a database of its own, to which no other tenant can connect. Inside, all is as with IsolationSchema,
	// so that the service's code and migrations are the same for both. It needs what [AdminConfig].TenantDatabases makes.
	IsolationDatabase Isolation = "database"
	// IsolationShared keeps the rows of many tenants in the tables of one schema for each server, apart by row-level security and a login for each
	// tenant. It is for many small tenants. The service's migrations say which tables are protected: SELECT tenancy_must('notes'). What they say nothing
	// of, these tenants cannot reach (42501). Such a tenant does not move; see docs/guarantees.md for what else it has not.
	IsolationShared Isolation = "shared"
)

func (i Isolation) check() error {
	switch i {
	case IsolationSchema, IsolationDatabase, IsolationShared:
		return nil
	}
	return fmt.Errorf("%q is not supported, only %q, %q and %q are", i, IsolationSchema, IsolationDatabase, IsolationShared)
}

// Role is what a user is within one tenant.
type Role string

const (
	RoleMember Role = "member"
	RoleAdmin  Role = "admin"
)

// Tenant is a customer with its own data: an immutable, comparable value without secrets.
//
// A Tenant belongs to the realm (the primary) that it was read from; another realm refuses it,
// even where the ID exists there too. Its State and Generation are those of the moment it was
// read: whether a tenant may be served is decided anew at each use, never by this value.
type Tenant struct {
	ID          ID
	UID         UID
	Name        string // the unique slug; may be renamed. "#" and the ID when the tenant was purged, or its name released
	DisplayName string // free text
	State       State
	Isolation   Isolation // of the place where its data is now
	Dense       bool      // it shares a pool with others; see Catalog.SetDense
	Generation  int64     // rises whenever the way to the tenant's data changes

	realm realm
}

// realm is the random identity of one primary, interned so that a Tenant stays small and comparable.
type realm = unique.Handle[[16]byte]
