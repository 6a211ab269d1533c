-- +goose Up
CREATE TABLE notes (title text NOT NULL);

-- +goose Down
DROP TABLE notes;
