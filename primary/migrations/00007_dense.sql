-- Additive: a node of the previous release goes on reading and writing while the others are deployed. It serves each tenant by the login of its own.

-- +goose Up

-- Whether the tenant's calls go through the pool that tenants of its server share: that of the place it is in.
ALTER TABLE tenancy.tenants ADD COLUMN dense boolean NOT NULL DEFAULT false;
ALTER TABLE tenancy.data_sources ADD COLUMN dense boolean NOT NULL DEFAULT false;

-- The role that a session of that pool takes for this place. It is written before it is made, and outlives dense until it is dropped; '': none.
ALTER TABLE tenancy.data_sources ADD COLUMN dense_role text NOT NULL DEFAULT '';

-- The login of each such pool, with its sealed record. Written before it is made.
CREATE TABLE tenancy.dense_logins (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    server     bigint NOT NULL REFERENCES tenancy.servers,
    isolation  text NOT NULL CHECK (isolation IN ('schema', 'shared')),
    login      text NOT NULL UNIQUE,
    sealed     bytea NOT NULL,
    generation bigint NOT NULL DEFAULT 1, -- rises with each login
    next_login text NOT NULL DEFAULT '',  -- while it is rotated, as a place's
    next_sealed bytea,
    old_login  text NOT NULL DEFAULT '',
    created    timestamptz NOT NULL DEFAULT now(),
    updated    timestamptz NOT NULL DEFAULT now(),
    UNIQUE (server, isolation)
);

-- +goose Down
DROP TABLE tenancy.dense_logins;
ALTER TABLE tenancy.data_sources DROP COLUMN dense_role;
ALTER TABLE tenancy.data_sources DROP COLUMN dense;
ALTER TABLE tenancy.tenants DROP COLUMN dense;
