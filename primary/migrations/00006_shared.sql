-- Additive for what a node of the previous release does. It knows nothing of shared schemas, so the first tenant in one comes after its last node.

-- +goose Up

-- The one schema of a server's tenants that share theirs, with the roles around it. Written before it is made; the version is that of the service's migrations.
CREATE TABLE tenancy.shared_areas (
    server  bigint PRIMARY KEY REFERENCES tenancy.servers,
    schema  text NOT NULL UNIQUE,
    owner   text NOT NULL,
    runtime text NOT NULL,
    state   text NOT NULL DEFAULT 'intent' CHECK (state IN ('intent', 'made')),
    version bigint NOT NULL DEFAULT 0,
    created timestamptz NOT NULL DEFAULT now(),
    updated timestamptz NOT NULL DEFAULT now()
);

-- Places in it have one schema and a login each.
ALTER TABLE tenancy.data_sources DROP CONSTRAINT data_sources_server_schema_key;
CREATE UNIQUE INDEX data_sources_server_schema_key ON tenancy.data_sources (server, schema) WHERE isolation <> 'shared';

-- The tenant in the place's rows: its ID, or the one that a tenant will have who takes it; null: the place is older than this column.
ALTER TABLE tenancy.data_sources ADD COLUMN promised bigint;

-- +goose Down
ALTER TABLE tenancy.data_sources DROP COLUMN promised;
DROP INDEX tenancy.data_sources_server_schema_key;
ALTER TABLE tenancy.data_sources ADD CONSTRAINT data_sources_server_schema_key UNIQUE (server, schema);
DROP TABLE tenancy.shared_areas;
