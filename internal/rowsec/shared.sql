-- One schema for many tenants. @schema@ and @runtime@ are quoted names, @name@ is the schema's as a literal.
-- It runs as the owner, in one transaction, and may run again.

-- The roster: whose rows there can be. A tenant without a login stays on it, so that migrations reach its rows.
CREATE TABLE IF NOT EXISTS @schema@.tenancy_roster (
    id     bigint PRIMARY KEY CHECK (id > 0),
    realm  uuid   NOT NULL,
    tenant uuid   NOT NULL UNIQUE,
    UNIQUE (id, realm, tenant)
);

-- The map: which login is which tenant. It repeats the roster, because a new connection pays for each index that it opens.
CREATE TABLE IF NOT EXISTS @schema@.tenancy_map (
    login  name   PRIMARY KEY,
    id     bigint NOT NULL,
    realm  uuid   NOT NULL,
    tenant uuid   NOT NULL,
    FOREIGN KEY (id, realm, tenant) REFERENCES @schema@.tenancy_roster (id, realm, tenant)
);

CREATE TABLE IF NOT EXISTS @schema@.tenancy_readers (role name PRIMARY KEY);

CREATE TABLE IF NOT EXISTS @schema@.tenancy_receipts (
    id       bigint NOT NULL,
    relation name   NOT NULL,
    rows     bigint NOT NULL,
    PRIMARY KEY (id, relation)
);

-- tenancy_tenant is the tenant for whom the caller works, NULL for nobody's. The caller is an argument, because inside a
-- definer's function current_user is the definer, and the default of an argument is evaluated outside. Asking about
-- another role answers NULL: the session has to be allowed to become it.
--
-- current_user and not session_user, so that SET ROLE to the runtime group leaves nobody, and a login that serves
-- many tenants becomes one of them by SET ROLE.
--
-- When the caller is the owner, there are two: a session that may be the owner (a migration), which has to say
-- whose rows it is after; and a function of the owner's with SECURITY DEFINER, called by a tenant, which works for the tenant that
-- called it: current_setting('role') is what the session has set, whatever function it is in, and cannot be set in there.
CREATE OR REPLACE FUNCTION @schema@.tenancy_tenant(who name DEFAULT current_user) RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $tenancy$
DECLARE
    entered text;
BEGIN
    IF who = current_user THEN
        IF pg_has_role(session_user, current_user, 'MEMBER') THEN
            entered := coalesce(current_setting('tenancy.entered', true), '');
            IF entered = '' THEN
                RAISE EXCEPTION 'the owner of schema % is no tenant', @name@ USING ERRCODE = 'insufficient_privilege',
                    HINT = 'Say whose rows the transaction is after: SELECT tenancy_enter(id), for each id of tenancy_tenants(), or tenancy_enter_host().';
            END IF;
            RETURN nullif(entered, 'host')::bigint;
        END IF;
        who := coalesce(nullif(current_setting('role'), 'none'), session_user);
    END IF;
    RETURN (SELECT m.id FROM @schema@.tenancy_map m WHERE m.login = who AND pg_has_role(session_user, m.login, 'MEMBER'));
END
$tenancy$;

-- tenancy_hosting tells whether the caller is the owner's own session, which has entered the host.
CREATE OR REPLACE FUNCTION @schema@.tenancy_hosting(who name DEFAULT current_user) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    RETURN who = current_user AND pg_has_role(session_user, current_user, 'MEMBER')
        AND coalesce(current_setting('tenancy.entered', true), '') = 'host';
END
$tenancy$;

-- The caller's one row, and nothing of the others': a barrier, because a function in the caller's own WHERE could be asked before the view's.
CREATE OR REPLACE VIEW @schema@.tenancy_marker WITH (security_barrier) AS
    SELECT realm, tenant FROM @schema@.tenancy_map WHERE login = current_user;

CREATE OR REPLACE FUNCTION @schema@.tenancy_tenants() RETURNS SETOF bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $tenancy$
    SELECT id FROM @schema@.tenancy_roster ORDER BY id
$tenancy$;

-- tenancy_enter makes the owner's transaction the tenant's, until its end or the next call: it sees and writes that one's rows.
-- A login of a tenant has no right to call it, and setting what it sets has no effect there.
CREATE OR REPLACE FUNCTION @schema@.tenancy_enter(whose bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    IF NOT EXISTS (SELECT FROM @schema@.tenancy_roster r WHERE r.id = whose) THEN
        RAISE EXCEPTION 'schema % has no tenant %', @name@, coalesce(whose::text, 'NULL') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM set_config('tenancy.entered', whose::text, true);
END
$tenancy$;

-- tenancy_enter_host makes the owner's transaction the host's: it sees and writes the host's rows, and no tenant's.
CREATE OR REPLACE FUNCTION @schema@.tenancy_enter_host() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    PERFORM set_config('tenancy.entered', 'host', true);
END
$tenancy$;

-- tenancy_own refuses what is not one of the service's own relations in this schema.
CREATE OR REPLACE FUNCTION @schema@.tenancy_own(relation regclass, kinds "char"[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
DECLARE
    c record;
    refusal text;
    code text := 'wrong_object_type';
BEGIN
    IF relation IS NULL THEN
        RAISE EXCEPTION 'tenancy: the relation is NULL' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    SELECT k.*, n.nspname, n.nspowner INTO STRICT c FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace WHERE k.oid = relation;
    IF c.relpersistence = 't' THEN
        refusal := 'it is temporary';
    ELSIF c.nspname <> @name@ THEN
        refusal := format('it is not in schema %s', @name@);
        code := 'invalid_schema_name';
    ELSIF c.relname LIKE 'tenancy\_%' THEN
        refusal := 'it is the library''s';
    ELSIF c.relowner <> c.nspowner THEN
        refusal := format('it belongs to %s and not to the owner of the schema', pg_get_userbyid(c.relowner));
        code := 'insufficient_privilege';
    ELSIF c.relispartition THEN
        refusal := 'it is a partition: name the table that it is a part of';
    ELSIF c.relkind <> ALL (kinds) THEN
        refusal := CASE c.relkind
            WHEN 'v' THEN 'it is a view: its tables are protected, and tenancy_view opens it'
            WHEN 'm' THEN 'it is a materialized view, which has no row-level security: its rows are of whoever filled it'
            WHEN 'f' THEN 'it is a foreign table, which has no row-level security'
            WHEN 'r' THEN 'it is a table and no view'
            WHEN 'p' THEN 'it is a table and no view'
            ELSE 'it is no table' END;
    END IF;
    IF refusal IS NOT NULL THEN
        RAISE EXCEPTION 'tenancy: % is refused: %', relation, refusal USING ERRCODE = code;
    END IF;
END
$tenancy$;

-- tenancy_read builds the wall of a protected table, with its opening for the readers when there are any.
--
-- The condition is restrictive, so that no further policy of the service's widens what a tenant sees. It is the permissive policy's too: that
-- one is what an index is found by when the restrictive one has an OR for the readers, and else the server drops the second of two equal conditions.
--
-- All of them are TO PUBLIC: the name of the group in a policy is gone after DROP OWNED BY group, which each of its members may do.
CREATE OR REPLACE FUNCTION @schema@.tenancy_read(relation regclass, host boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $tenancy$
DECLARE
    readers text;
    names text;
    mine text := 'tenant_id = (SELECT @schema@.tenancy_tenant())';
    seen text := mine;
    written text := mine;
    policy text;
BEGIN
    IF host THEN
        seen := mine || ' OR tenant_id IS NULL';
        written := mine || ' OR tenant_id IS NULL AND (SELECT @schema@.tenancy_hosting())';
    END IF;
    SELECT string_agg(quote_ident(role), ', '), string_agg(quote_literal(role), ', ') INTO readers, names FROM @schema@.tenancy_readers;
    FOREACH policy IN ARRAY '{tenancy_open,tenancy_wall,tenancy_wall_insert,tenancy_wall_update,tenancy_wall_delete,tenancy_reader}'::text[] LOOP
        EXECUTE format('DROP POLICY IF EXISTS %I ON %s', policy, relation);
    END LOOP;
    EXECUTE format('CREATE POLICY tenancy_open ON %s USING (%s) WITH CHECK (true)', relation, seen);
    EXECUTE format('CREATE POLICY tenancy_wall ON %s AS RESTRICTIVE FOR SELECT USING (%s)', relation, seen || coalesce(' OR current_user IN (' || names || ')', ''));
    EXECUTE format('CREATE POLICY tenancy_wall_insert ON %s AS RESTRICTIVE FOR INSERT WITH CHECK (%s)', relation, written);
    EXECUTE format('CREATE POLICY tenancy_wall_update ON %s AS RESTRICTIVE FOR UPDATE USING (%s) WITH CHECK (%2$s)', relation, written);
    EXECUTE format('CREATE POLICY tenancy_wall_delete ON %s AS RESTRICTIVE FOR DELETE USING (%s)', relation, written);
    IF readers IS NOT NULL THEN
        EXECUTE format('CREATE POLICY tenancy_reader ON %s FOR SELECT TO %s USING (true)', relation, readers);
        EXECUTE format('GRANT SELECT ON %s TO %s', relation, readers);
    END IF;
END
$tenancy$;

-- tenancy_protect is both forms.
--
-- What a tenant may do is granted here and by no default privilege: a table that nobody protects is closed, and so is a partition, also
-- one attached later, but by way of its table. Row-level security without a policy closes partitions to the owner as well.
CREATE OR REPLACE FUNCTION @schema@.tenancy_protect(relation regclass, host boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $tenancy$
DECLARE
    c record;
    part regclass;
BEGIN
    PERFORM @schema@.tenancy_own(relation, '{r,p}');

    SELECT a.atttypid, a.attgenerated, a.attidentity INTO c FROM pg_attribute a WHERE a.attrelid = relation AND a.attname = 'tenant_id' AND NOT a.attisdropped;
    IF NOT FOUND THEN
        EXECUTE format('ALTER TABLE %s ADD COLUMN tenant_id bigint', relation);
    ELSIF c.atttypid <> 'bigint'::regtype OR c.attgenerated <> '' OR c.attidentity <> '' THEN
        RAISE EXCEPTION 'tenancy: % is refused: its column tenant_id has to be a bigint that is not generated', relation USING ERRCODE = 'datatype_mismatch';
    END IF;
    EXECUTE format('ALTER TABLE %s ALTER COLUMN tenant_id SET DEFAULT @schema@.tenancy_tenant()', relation);
    IF host THEN
        EXECUTE format('ALTER TABLE %s ALTER COLUMN tenant_id DROP NOT NULL', relation);
    ELSE
        BEGIN
            EXECUTE format('ALTER TABLE %s ALTER COLUMN tenant_id SET NOT NULL', relation);
        EXCEPTION WHEN not_null_violation THEN
            RAISE EXCEPTION 'tenancy: % is refused: it has rows of no tenant', relation USING ERRCODE = 'not_null_violation',
                HINT = 'Protect it before it is filled, or say in the same migration whose its rows are: UPDATE ... SET tenant_id.';
        END;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = relation AND a.attname = 'tenant_id' AND i.indisvalid AND i.indpred IS NULL) THEN
        EXECUTE format('CREATE INDEX ON %s (tenant_id)', relation);
    END IF;

    PERFORM @schema@.tenancy_read(relation, host);
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', relation);
    EXECUTE format('REVOKE ALL ON %s FROM PUBLIC, @runtime@', relation);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO @runtime@', relation);

    FOR part IN
        WITH RECURSIVE below AS (
            SELECT inhrelid FROM pg_inherits WHERE inhparent = relation
            UNION SELECT i.inhrelid FROM pg_inherits i JOIN below b ON i.inhparent = b.inhrelid)
        SELECT inhrelid FROM below b JOIN pg_class k ON k.oid = b.inhrelid
        WHERE k.relkind IN ('r', 'p') AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = b.inhrelid AND p.polname = 'tenancy_wall')
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', part);
        EXECUTE format('REVOKE ALL ON %s FROM PUBLIC, @runtime@', part);
    END LOOP;
END
$tenancy$;

-- tenancy_must protects a table of which each row is a tenant's.
CREATE OR REPLACE FUNCTION @schema@.tenancy_must(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    PERFORM @schema@.tenancy_protect(relation, false);
END
$tenancy$;

-- tenancy_may protects a table of which each row is a tenant's or, where tenant_id is NULL, the host's: all tenants read that one, and none writes it.
CREATE OR REPLACE FUNCTION @schema@.tenancy_may(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
BEGIN
    PERFORM @schema@.tenancy_protect(relation, true);
END
$tenancy$;

-- tenancy_common lets all tenants read a table that has no rows of tenants. The policy says yes to all, and that somebody meant it.
CREATE OR REPLACE FUNCTION @schema@.tenancy_common(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $tenancy$
BEGIN
    PERFORM @schema@.tenancy_own(relation, '{r,p}');
    IF EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = relation AND a.attname = 'tenant_id' AND NOT a.attisdropped) THEN
        RAISE EXCEPTION 'tenancy: % is refused: it has a tenant_id: tenancy_must and tenancy_may are for it', relation USING ERRCODE = 'wrong_object_type';
    END IF;
    EXECUTE format('REVOKE ALL ON %s FROM PUBLIC, @runtime@', relation);
    EXECUTE format('GRANT SELECT ON %s TO @runtime@', relation);
    EXECUTE format('DROP POLICY IF EXISTS tenancy_common ON %s', relation);
    EXECUTE format('CREATE POLICY tenancy_common ON %s USING (true)', relation);
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation);
END
$tenancy$;

-- tenancy_view opens a view to the tenants. It asks with the rights of who reads it, where the server can do that (15); before, with
-- the owner's, to whom the same condition applies, for the same tenant. Of what the tenants may not read themselves, no view may be.
CREATE OR REPLACE FUNCTION @schema@.tenancy_view(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $tenancy$
DECLARE
    closed regclass;
BEGIN
    PERFORM @schema@.tenancy_own(relation, '{v}');
    SELECT d.refobjid INTO closed FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        WHERE r.ev_class = relation AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> relation
        AND NOT has_any_column_privilege(@role@, d.refobjid, 'SELECT') LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'tenancy: % is refused: tenants may not read %', relation, closed USING ERRCODE = 'insufficient_privilege',
            HINT = 'Protect that one first, with tenancy_must or tenancy_may, or open it with tenancy_common or tenancy_view.';
    END IF;
    IF current_setting('server_version_num')::int >= 150000 THEN
        EXECUTE format('ALTER VIEW %s SET (security_invoker = true)', relation);
    END IF;
    EXECUTE format('REVOKE ALL ON %s FROM PUBLIC, @runtime@', relation);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO @runtime@', relation);
END
$tenancy$;

REVOKE ALL ON @schema@.tenancy_roster, @schema@.tenancy_map, @schema@.tenancy_readers, @schema@.tenancy_receipts, @schema@.tenancy_marker FROM PUBLIC, @runtime@;
REVOKE ALL ON FUNCTION @schema@.tenancy_tenant(name), @schema@.tenancy_hosting(name), @schema@.tenancy_tenants(), @schema@.tenancy_enter(bigint),
    @schema@.tenancy_enter_host(), @schema@.tenancy_own(regclass, "char"[]), @schema@.tenancy_read(regclass, boolean), @schema@.tenancy_protect(regclass, boolean),
    @schema@.tenancy_must(regclass), @schema@.tenancy_may(regclass), @schema@.tenancy_common(regclass), @schema@.tenancy_view(regclass) FROM PUBLIC, @runtime@;
REVOKE ALL ON SCHEMA @schema@ FROM PUBLIC, @runtime@;
GRANT USAGE ON SCHEMA @schema@ TO @runtime@;
GRANT SELECT ON @schema@.tenancy_marker TO @runtime@;
GRANT EXECUTE ON FUNCTION @schema@.tenancy_tenant(name), @schema@.tenancy_hosting(name) TO @runtime@;
-- To PUBLIC, which USAGE of the schema narrows down: a default privilege of the group is gone after DROP OWNED BY group, which PostgreSQL
-- allows to each of its members, and here these are all tenants. USAGE is nextval; SELECT would show how far the others have counted.
ALTER DEFAULT PRIVILEGES IN SCHEMA @schema@ GRANT USAGE ON SEQUENCES TO PUBLIC;
