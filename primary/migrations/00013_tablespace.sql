-- Additive: a node of the previous release goes on reading and writing while the others are deployed. What it makes is in the database's own tablespace, the new tables of a place
-- that has another one included.

-- +goose Up

-- Where the tables of places are kept that are made at the server from now on; '': in the database's own tablespace.
ALTER TABLE tenancy.servers ADD COLUMN tablespace text NOT NULL DEFAULT '';

-- Where those of the place, or of the shared schema, are: its later migrations put theirs there, too.
ALTER TABLE tenancy.data_sources ADD COLUMN tablespace text NOT NULL DEFAULT '';
ALTER TABLE tenancy.shared_areas ADD COLUMN tablespace text NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE tenancy.shared_areas DROP COLUMN tablespace;
ALTER TABLE tenancy.data_sources DROP COLUMN tablespace;
ALTER TABLE tenancy.servers DROP COLUMN tablespace;
