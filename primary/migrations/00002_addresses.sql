-- +goose Up
ALTER TABLE tenancy.nodes ADD COLUMN address text NOT NULL DEFAULT '';

-- +goose Down
SELECT 1;
