-- Additive: a node of the previous release goes on reading and writing while the others are deployed.

-- +goose Up

-- While a password is rotated a place has two logins: first the next one, with its sealed record, which nobody uses yet; then,
-- once that is the place's login, the old one until it is dropped. '' and null: none.
ALTER TABLE tenancy.data_sources ADD COLUMN next_login text NOT NULL DEFAULT '';
ALTER TABLE tenancy.data_sources ADD COLUMN next_sealed bytea;
ALTER TABLE tenancy.data_sources ADD COLUMN old_login text NOT NULL DEFAULT '';

-- Since when the place is to be closed at its server; null: it was, or need not be. Of a place that a tenant is in it says nothing.
ALTER TABLE tenancy.data_sources ADD COLUMN leaving timestamptz;

-- +goose Down
ALTER TABLE tenancy.data_sources DROP COLUMN next_login;
ALTER TABLE tenancy.data_sources DROP COLUMN next_sealed;
ALTER TABLE tenancy.data_sources DROP COLUMN old_login;
ALTER TABLE tenancy.data_sources DROP COLUMN leaving;
