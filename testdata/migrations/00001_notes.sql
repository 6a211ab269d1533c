-- +goose Up
CREATE TABLE notes (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    title  text NOT NULL
);
SELECT tenancy_must('notes');

-- +goose Down
DROP TABLE notes;
