-- Additive: a node of the previous release goes on reading and writing while the others are deployed.

-- +goose Up

-- The pooler that calls of the server's tenants go through, as host:port, and its TLS as in tls; '' for none.
ALTER TABLE tenancy.servers ADD COLUMN pooler text NOT NULL DEFAULT '';
ALTER TABLE tenancy.servers ADD COLUMN pooler_tls text NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE tenancy.servers DROP COLUMN pooler;
ALTER TABLE tenancy.servers DROP COLUMN pooler_tls;
