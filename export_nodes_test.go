package tenancy

import "context"

// PooledTenants returns the tenants that this node holds a pool of.
func PooledTenants(tn *Tenancy) []ID { return tableFollower[*tenantPool]{tn.pools}.held() }

// Buildable says why no pool and no registry's value of the tenant may be built, as a build asks that began when it still could.
func Buildable(ctx context.Context, tn *Tenancy, id ID) error {
	_, err := tn.view.recordAt(ctx, id, 0)
	return err
}
