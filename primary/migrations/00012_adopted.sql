-- Additive: a node of the previous release goes on reading and writing while the others are deployed. It serves an adopted tenant as any other; a Create of it cannot be finished there, nor need be.

-- +goose Up

-- Places that are a service's own tables of before there were tenants, until that is confirmed or taken back: the schema as it was called, the login that owned what is in it, and what
-- gives the rest back. It is written before anything is done at the server.
CREATE TABLE tenancy.adoptions (
    data_source bigint PRIMARY KEY REFERENCES tenancy.data_sources,
    schema      text NOT NULL,
    login       text NOT NULL,
    owner       text NOT NULL DEFAULT '',   -- of the schema
    extensions  text[] NOT NULL DEFAULT '{}', -- that were in the schema
    undo        text[] NOT NULL DEFAULT '{}', -- statements that give back what others were granted
    created     timestamptz NOT NULL DEFAULT now(),
    updated     timestamptz NOT NULL DEFAULT now()
);

-- +goose Down
DROP TABLE tenancy.adoptions;
