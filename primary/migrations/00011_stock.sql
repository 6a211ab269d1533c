-- Additive: a node of the previous release goes on reading and writing while the others are deployed. It takes no place of the stock, and drops none that is made.

-- +goose Up

-- Whether the node's verbs make the provisioner a member of a tenant's roles for themselves. False: it is of a release whose provisioner has to be one for good.
ALTER TABLE tenancy.nodes ADD COLUMN acts boolean NOT NULL DEFAULT false;

-- The place is one of those that are kept ready for new tenants, or is being made for it. A Create that takes it sets this back.
ALTER TABLE tenancy.data_sources ADD COLUMN stocked boolean NOT NULL DEFAULT false;
CREATE INDEX data_sources_stocked ON tenancy.data_sources (isolation, state) WHERE stocked;

-- +goose Down
DROP INDEX tenancy.data_sources_stocked;
ALTER TABLE tenancy.data_sources DROP COLUMN stocked;
ALTER TABLE tenancy.nodes DROP COLUMN acts;
