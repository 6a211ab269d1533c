-- +goose Up
CREATE TABLE notes (
    id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title text NOT NULL
);
INSERT INTO notes (title) VALUES ('welcome');

-- +goose Down
DROP TABLE notes;
