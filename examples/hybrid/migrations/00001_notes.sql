-- +goose Up
-- No schema is named: each tenant's migration runs in the tenant's own, or in the one that tenants share.
CREATE TABLE notes (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title   text NOT NULL CHECK (title <> ''),
    created timestamptz NOT NULL DEFAULT now()
);
-- Each row is a tenant's. In a schema that tenants share, they see what such a line names and nothing else.
SELECT tenancy_must('notes');

-- +goose Down
DROP TABLE notes;
