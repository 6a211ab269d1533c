-- Additive: a node of the previous release goes on reading and writing while the others are deployed. What it makes and migrates meanwhile, a reader sees
-- after the next AddReader.

-- +goose Up

-- The login that may read all tenants of a server, where there is one. Written before it is made, and made to an intent again before it is dropped.
CREATE TABLE tenancy.readers (
    server  bigint PRIMARY KEY REFERENCES tenancy.servers,
    role    text NOT NULL UNIQUE,
    state   text NOT NULL DEFAULT 'intent' CHECK (state IN ('intent', 'made')),
    created timestamptz NOT NULL DEFAULT now(),
    updated timestamptz NOT NULL DEFAULT now()
);

-- +goose Down
DROP TABLE tenancy.readers;
