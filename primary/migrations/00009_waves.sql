-- Additive: a node of the previous release goes on reading and writing while the others are deployed. It does not see these columns: let one release migrate tenants at a time.

-- +goose Up

-- The migration of the place that is at work and could not be rolled back if it died, or, below 0, the one that is being taken back. Written before it begins and
-- cleared with the version that it led to; null: none.
ALTER TABLE tenancy.data_sources ADD COLUMN migrating bigint;
ALTER TABLE tenancy.shared_areas ADD COLUMN migrating bigint;

-- The version that the tenant's schema is not to go beyond; null: none.
ALTER TABLE tenancy.tenants ADD COLUMN pinned bigint CHECK (pinned > 0);

-- +goose Down
ALTER TABLE tenancy.data_sources DROP COLUMN migrating;
ALTER TABLE tenancy.shared_areas DROP COLUMN migrating;
ALTER TABLE tenancy.tenants DROP COLUMN pinned;
