-- Additive: a node of the previous release goes on reading and writing while the others are deployed. It does not see these columns: it purges before a
-- quarantine is over, restores what a purge has begun to drop or whose name was released, and leaves the name in what it purges. Let it do none of these.

-- +goose Up

-- How long a deleted tenant is kept: until deleted + quarantine. What a node of the previous release deletes has the default.
ALTER TABLE tenancy.tenants ADD COLUMN quarantine interval NOT NULL DEFAULT interval '720 hours' CHECK (quarantine > interval '0');

-- What a purge drops, written before it is dropped; null: none has begun. The tombstone keeps it.
ALTER TABLE tenancy.tenants ADD COLUMN receipt jsonb;

-- Whether it was ever in service: one that was not is not restored, its Create goes on.
ALTER TABLE tenancy.tenants ADD COLUMN activated boolean NOT NULL DEFAULT true;

-- What the Config of the node that declared it adds to a new tenant (a seed, a shared pool): a node that would add something else does not go on with its Create by itself.
ALTER TABLE tenancy.tenants ADD COLUMN recipe text NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE tenancy.tenants DROP COLUMN quarantine;
ALTER TABLE tenancy.tenants DROP COLUMN receipt;
ALTER TABLE tenancy.tenants DROP COLUMN activated;
ALTER TABLE tenancy.tenants DROP COLUMN recipe;
