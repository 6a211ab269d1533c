package tenancy

import (
	"context"
	"fmt"

	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

// BulkPlace is what has to be made of one tenant's place. Every field is ready for SQL.
type BulkPlace struct {
	Group, Owner, Runtime, Login, Schema string
	MayLogin                             string // the login's rights
	Verifier                             string // of its password
	Name, Realm, UID                     string
	ID, SchemaName                       string // the schema as a text
}

// CreateInBulk is Create for fleets of thousands, with another way to make the place: Create's own opens seven connections for it.
// The intent before and the activation after it are Create's. What place makes must be at the given version.
func (c *Catalog) CreateInBulk(ctx context.Context, name string, version int64, place func(BulkPlace) error) (Tenant, error) {
	fail := func(err error) (Tenant, error) { return Tenant{}, fmt.Errorf("create %s in bulk: %w", name, err) }
	n := NewTenant{Name: name}
	if err := n.check(); err != nil {
		return fail(err)
	}
	id, err := c.declare(ctx, &n, nil)
	if err != nil {
		return fail(err)
	}
	p, err := c.place(ctx, id)
	if err != nil {
		return fail(err)
	}
	verifier, err := scram.RandomVerifier(p.source.Password.Reveal())
	if err != nil {
		return fail(err)
	}
	quote, text := func(name string) string { return ident.Quote(name) }, ident.Literal
	err = place(BulkPlace{Group: quote(tenantsRole(p.source.Database)), Owner: quote(p.owner), Runtime: quote(p.runtime), Login: quote(p.source.User), Schema: quote(p.source.Schema),
		MayLogin: c.tn.mayLogin(), Verifier: text(verifier), Name: text(name), Realm: text(UID(c.tn.realm.Value()).String()), UID: text(p.tenant.UID.String()),
		ID: fmt.Sprint(id), SchemaName: text(p.source.Schema)})
	if err != nil {
		return fail(err)
	}
	p.version = version
	if err := c.activate(ctx, p); err != nil {
		return fail(err)
	}
	return c.Tenant(ctx, id)
}
