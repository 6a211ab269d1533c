-- +goose Up
-- No schema is named: each tenant's migration runs in the tenant's own.
CREATE TABLE notes (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title   text NOT NULL CHECK (title <> ''),
    created timestamptz NOT NULL DEFAULT now()
);

-- +goose Down
DROP TABLE notes;
