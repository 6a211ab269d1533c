-- Additive: a node of the previous release goes on reading and writing while the others are deployed.

-- +goose Up

-- Whether the node's verbs make the provisioner a member of a tenant's roles for themselves. False: it is of a release whose provisioner has to be one for good.
ALTER TABLE tenancy.nodes ADD COLUMN acts boolean NOT NULL DEFAULT false;

-- +goose Down
ALTER TABLE tenancy.nodes DROP COLUMN acts;
