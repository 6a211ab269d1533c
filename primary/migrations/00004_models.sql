-- Additive: a node of the previous release goes on reading and writing while the others are deployed. It serves a tenant with a database of its own, too.

-- +goose Up

-- How a tenant's data is kept apart: that of the place it is in.
ALTER TABLE tenancy.tenants DROP CONSTRAINT tenants_isolation_check;
ALTER TABLE tenancy.tenants ADD CONSTRAINT tenants_isolation_check CHECK (isolation IN ('schema', 'database', 'shared'));

ALTER TABLE tenancy.data_sources ADD COLUMN isolation text NOT NULL DEFAULT 'schema' CHECK (isolation IN ('schema', 'database', 'shared'));

-- The place's own database; '': that of the server.
ALTER TABLE tenancy.data_sources ADD COLUMN database text NOT NULL DEFAULT '';

-- A server's share of the new tenants that name none (below 0: none of them), and how many places it may have (0: any number).
ALTER TABLE tenancy.servers ADD COLUMN weight integer NOT NULL DEFAULT 1 CHECK (weight <> 0);
ALTER TABLE tenancy.servers ADD COLUMN capacity integer NOT NULL DEFAULT 0 CHECK (capacity >= 0);

-- +goose Down
ALTER TABLE tenancy.tenants DROP CONSTRAINT tenants_isolation_check;
ALTER TABLE tenancy.tenants ADD CONSTRAINT tenants_isolation_check CHECK (isolation IN ('schema'));
ALTER TABLE tenancy.data_sources DROP COLUMN isolation;
ALTER TABLE tenancy.data_sources DROP COLUMN database;
ALTER TABLE tenancy.servers DROP COLUMN weight;
ALTER TABLE tenancy.servers DROP COLUMN capacity;
