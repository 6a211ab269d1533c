-- Additive: a node of the previous release goes on reading and writing while the others are deployed.

-- +goose Up

-- The domain that stands for the tenant where one is wanted, such as in a link.
ALTER TABLE tenancy.domains ADD COLUMN is_primary boolean NOT NULL DEFAULT false;
CREATE UNIQUE INDEX ON tenancy.domains (tenant) WHERE is_primary;
UPDATE tenancy.domains d SET is_primary = true
    WHERE d.domain = (SELECT o.domain FROM tenancy.domains o WHERE o.tenant = d.tenant ORDER BY o.created, o.domain LIMIT 1);

-- Where a node takes callers; '' when it does not say.
ALTER TABLE tenancy.nodes ADD COLUMN address text NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE tenancy.domains DROP COLUMN is_primary;
ALTER TABLE tenancy.nodes DROP COLUMN address;
