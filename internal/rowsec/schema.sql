-- A schema of one tenant: the functions of shared.sql that migrations call, so that one file serves both models. @schema@ is the
-- quoted name, @id@ the tenant's number. There is no wall to build: the schema is the wall. The column tenant_id is there
-- all the same, so that SELECT *, a unique constraint over (tenant_id, ...) and ON CONFLICT with it mean the same in both.

CREATE OR REPLACE FUNCTION @schema@.tenancy_tenant(who name DEFAULT current_user) RETURNS bigint
LANGUAGE sql STABLE PARALLEL SAFE AS $tenancy$ SELECT @id@::bigint $tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_tenants() RETURNS SETOF bigint
LANGUAGE sql STABLE AS $tenancy$ SELECT @id@::bigint $tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_enter(whose bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    IF whose IS DISTINCT FROM @id@ THEN
        RAISE EXCEPTION 'schema % has no tenant %', @name@, coalesce(whose::text, 'NULL') USING ERRCODE = 'invalid_parameter_value';
    END IF;
END
$tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_enter_host() RETURNS void
LANGUAGE sql AS $tenancy$ $tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_protect(relation regclass, host boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $tenancy$
BEGIN
    IF relation IS NULL THEN
        RAISE EXCEPTION 'tenancy: the relation is NULL' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_class WHERE oid = relation AND relkind IN ('r', 'p') AND relpersistence <> 't' AND NOT relispartition AND relnamespace = to_regnamespace(quote_ident(@name@))) THEN
        RAISE EXCEPTION 'tenancy: % is refused: it is no table of schema %', relation, @name@ USING ERRCODE = 'wrong_object_type',
            HINT = 'A view, a foreign table, a temporary table and a partition are refused in the shared model too.';
    END IF;
    EXECUTE format('ALTER TABLE %s ADD COLUMN IF NOT EXISTS tenant_id bigint', relation);
    EXECUTE format('ALTER TABLE %s ALTER COLUMN tenant_id SET DEFAULT @schema@.tenancy_tenant()', relation);
    IF host THEN
        EXECUTE format('ALTER TABLE %s ALTER COLUMN tenant_id DROP NOT NULL', relation);
    ELSE -- rows that are there already are the tenant's
        EXECUTE format('UPDATE %s SET tenant_id = DEFAULT WHERE tenant_id IS NULL', relation);
        EXECUTE format('ALTER TABLE %s ALTER COLUMN tenant_id SET NOT NULL', relation);
    END IF;
END
$tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_must(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    PERFORM @schema@.tenancy_protect(relation, false);
END
$tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_may(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    PERFORM @schema@.tenancy_protect(relation, true);
END
$tenancy$;

-- What all tenants read in the shared model is each tenant's own copy here.
CREATE OR REPLACE FUNCTION @schema@.tenancy_common(relation regclass) RETURNS void
LANGUAGE sql AS $tenancy$ $tenancy$;

CREATE OR REPLACE FUNCTION @schema@.tenancy_view(relation regclass) RETURNS void
LANGUAGE sql AS $tenancy$ $tenancy$;
