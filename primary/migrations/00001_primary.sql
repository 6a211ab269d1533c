-- The primary: who the tenants are, where their data lives and who belongs to them.
-- Every name is qualified: no statement here or in the library depends on a search_path.

-- +goose Up

-- One row: which primary this is, and a record that only the right keys can open.
CREATE TABLE tenancy.realm (
    one      boolean PRIMARY KEY DEFAULT true CHECK (one),
    realm    uuid NOT NULL,
    sentinel bytea NOT NULL,
    created  timestamptz NOT NULL DEFAULT now()
);

-- The number of the last change. Its row lock makes commit order equal number order.
CREATE TABLE tenancy.epoch (
    one   boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL
);
INSERT INTO tenancy.epoch (epoch) VALUES (0);

-- What changed, by number. stamp tells two histories apart that share numbers (a restored primary).
CREATE TABLE tenancy.changes (
    epoch  bigint PRIMARY KEY,
    kind   text NOT NULL CHECK (kind IN ('tenant', 'member', 'domain', 'server', 'all')),
    tenant bigint,
    key    text,
    stamp  uuid NOT NULL DEFAULT gen_random_uuid(),
    at     timestamptz NOT NULL DEFAULT now()
);

-- +goose StatementBegin
CREATE FUNCTION tenancy.changed(kind text, tenant bigint, key text) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    n bigint;
BEGIN
    UPDATE tenancy.epoch e SET epoch = e.epoch + 1 RETURNING e.epoch INTO n;
    INSERT INTO tenancy.changes (epoch, kind, tenant, key) VALUES (n, kind, tenant, key);
    PERFORM pg_catalog.pg_notify('tenancy', n::text);
    RETURN n;
END
$$;
-- +goose StatementEnd

-- The service's processes, by the server's clock.
CREATE TABLE tenancy.nodes (
    id      uuid PRIMARY KEY,
    name    text NOT NULL,
    epoch   bigint NOT NULL,
    serves  text[],
    started timestamptz NOT NULL DEFAULT now(),
    seen    timestamptz NOT NULL DEFAULT now()
);

-- Where tenants can live. provisioner is a sealed login, or null where this fleet may only serve.
CREATE TABLE tenancy.servers (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL UNIQUE,
    host        text NOT NULL,
    port        integer NOT NULL,
    database    text NOT NULL,
    tls         text NOT NULL DEFAULT '',
    provisioner bytea,
    created     timestamptz NOT NULL DEFAULT now(),
    updated     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (host, port, database)
);

CREATE TABLE tenancy.tenants (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uid          uuid NOT NULL UNIQUE,
    name         text NOT NULL UNIQUE,
    display_name text NOT NULL DEFAULT '',
    state        text NOT NULL CHECK (state IN ('provisioning', 'active', 'suspended', 'maintenance', 'deleted', 'purged')),
    isolation    text NOT NULL CHECK (isolation IN ('schema')),
    generation   bigint NOT NULL DEFAULT 1,
    intent       bytea NOT NULL,  -- what Create was asked for; the same request resumes, another is refused
    max_users    integer CHECK (max_users > 0),
    attributes   jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(attributes) = 'object'),
    message      text NOT NULL DEFAULT '',
    retry_after  integer NOT NULL DEFAULT 0, -- seconds
    data_source  bigint,
    fenced       timestamptz,     -- when the server last refused and ended this tenant's sessions; null: not fenced
    created      timestamptz NOT NULL DEFAULT now(),
    updated      timestamptz NOT NULL DEFAULT now(),
    deleted      timestamptz
);

-- Places of tenants. The row comes before the place (an intent), so that no crash leaves a place nobody knows.
-- The plain columns exist for uniqueness and for operators; the sealed record is what is used.
CREATE TABLE tenancy.data_sources (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uid       uuid NOT NULL,  -- the tenant that the place's marker row names
    server    bigint NOT NULL REFERENCES tenancy.servers,
    schema    text NOT NULL,
    owner     text NOT NULL,
    runtime   text NOT NULL,
    login     text NOT NULL,
    sealed    bytea NOT NULL,
    state     text NOT NULL CHECK (state IN ('intent', 'made', 'dropped')),
    version   bigint NOT NULL DEFAULT 0, -- of the tenant's migrations
    created   timestamptz NOT NULL DEFAULT now(),
    updated   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (server, schema),
    UNIQUE (server, login)
);
CREATE INDEX ON tenancy.data_sources (uid);
ALTER TABLE tenancy.tenants ADD FOREIGN KEY (data_source) REFERENCES tenancy.data_sources;

CREATE TABLE tenancy.memberships (
    user_key   text NOT NULL CHECK (user_key <> '' AND octet_length(user_key) <= 256),
    tenant     bigint NOT NULL REFERENCES tenancy.tenants,
    role       text NOT NULL CHECK (role IN ('member', 'admin')),
    source     text NOT NULL DEFAULT '',
    is_default boolean NOT NULL DEFAULT false,
    created    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_key, tenant)
);
CREATE INDEX ON tenancy.memberships (tenant);
CREATE UNIQUE INDEX ON tenancy.memberships (user_key) WHERE is_default;

CREATE TABLE tenancy.domains (
    domain  text PRIMARY KEY,
    tenant  bigint NOT NULL REFERENCES tenancy.tenants,
    created timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON tenancy.domains (tenant);

-- Who did what to which tenant. Only a purge touches it again, to take its members' keys out.
CREATE TABLE tenancy.audit (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL DEFAULT now(),
    actor  text NOT NULL,
    action text NOT NULL,
    tenant bigint,
    detail jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX ON tenancy.audit (tenant, id);

-- +goose Down
SELECT 'the first version of the primary is not taken back' / 0;
