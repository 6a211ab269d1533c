-- What stands open in schema $1 of owner $2 and runtime group $3, a line each, with the statement that closes it: nothing, when all is as it must be.
-- Conditions are read as the server keeps them: pg_get_expr locks the table, which a tenant's transaction may hold.
WITH relation AS (
    SELECT c.oid, c.relname, c.relkind, c.relrowsecurity AND c.relforcerowsecurity AS forced, c.relname LIKE 'tenancy\_%' AS ours, c.reloptions,
        EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped) AS has_tenant,
        EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenancy_wall') AS walled,
        EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenancy_wall' AND p.polqual::text LIKE '%{NULLTEST %:nulltesttype 0 %') AS host,
        EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenancy_common') AS common,
        (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname LIKE 'tenancy\_wall%' AND NOT p.polpermissive
            AND p.polroles = '{0}'
            AND concat(p.polqual::text, p.polwithcheck::text) LIKE '%:funcid ' || (SELECT f.oid FROM pg_proc f WHERE f.pronamespace = n.oid AND f.proname = 'tenancy_tenant' AND f.pronargs = 1 AND f.proargtypes[0] = 'name'::regtype) || ' %'
            AND CASE p.polcmd WHEN 'r' THEN p.polqual::text NOT LIKE '%{CONST :consttype 16 %' ELSE concat(p.polqual::text, p.polwithcheck::text) NOT LIKE '%{CONST %' END) AS walls, -- no OR true: constants are the readers' names alone
        has_any_column_privilege($3::text, c.oid, 'SELECT') AS reads,
        has_any_column_privilege($3, c.oid, 'INSERT, UPDATE') OR has_table_privilege($3, c.oid, 'DELETE') AS writes,
        has_table_privilege($3, c.oid, 'TRUNCATE, TRIGGER') OR has_any_column_privilege($3, c.oid, 'REFERENCES') AS more
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
), reader AS (
    SELECT r.* FROM pg_roles r WHERE EXISTS (SELECT FROM pg_policy p JOIN relation ON relation.oid = p.polrelid WHERE p.polname = 'tenancy_reader' AND r.oid = ANY (p.polroles))
)
SELECT hole, mend FROM (
    SELECT format('role %s is a superuser or bypasses row-level security', rolname), format('ALTER ROLE %I NOSUPERUSER NOBYPASSRLS;', rolname)
        FROM pg_roles WHERE rolname IN ($2, $3) AND (rolsuper OR rolbypassrls)
    UNION ALL
    SELECT DISTINCT format('%s reads the rows of all tenants, and more than reads them', r.rolname), format('ALTER ROLE %I NOSUPERUSER NOBYPASSRLS; REVOKE %I FROM %1$I;', r.rolname, $2) FROM reader r
        WHERE r.rolsuper OR r.rolbypassrls OR pg_has_role(r.oid, $2, 'MEMBER')
    UNION ALL
    SELECT DISTINCT format('%s is a tenants'' role and may read as %s', t.rolname, r.rolname), format('REVOKE %I FROM %I;', r.rolname, t.rolname) FROM reader r JOIN pg_roles t
        ON pg_has_role(t.oid, r.oid, 'MEMBER') AND pg_has_role(t.oid, $3, 'MEMBER') AND NOT pg_has_role(t.oid, $2, 'MEMBER')
    UNION ALL
    SELECT format('tenants may create in schema %s', nspname), format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC, %I;', nspname, $3) FROM pg_namespace WHERE has_schema_privilege($3, oid, 'CREATE')
    UNION ALL
    SELECT 'tenants may create temporary objects, or schemas', format('REVOKE TEMPORARY, CREATE ON DATABASE %I FROM PUBLIC, %I;', current_database(), $3)
        WHERE has_database_privilege($3, current_database(), 'TEMPORARY, CREATE')
    UNION ALL
    SELECT format('%s is the library''s, and tenants may read or write it', relname),
        format('REVOKE ALL ON TABLE %I.%I FROM PUBLIC, %I;', $1, relname, $3) || CASE WHEN relname = 'tenancy_marker' THEN format(' GRANT SELECT ON TABLE %I.%I TO %I;', $1, relname, $3) ELSE '' END FROM relation
        WHERE ours AND (reads AND relname <> 'tenancy_marker' OR writes OR more)
    UNION ALL
    SELECT format('%s has a wall that is not forced, or was changed', relname), -- made anew as by the migration that protected it, by the owner
        format('SET ROLE %I; SELECT %I.%I(%L); RESET ROLE;', $2, $1, CASE WHEN host THEN 'tenancy_may' ELSE 'tenancy_must' END, format('%I.%I', $1, relname)) FROM relation
        WHERE walled AND (NOT forced OR walls <> 4)
    UNION ALL
    SELECT format('tenants may write %s, which has no wall', relname), format('REVOKE ALL ON TABLE %I.%I FROM PUBLIC, %I;', $1, relname, $3) FROM relation WHERE NOT walled AND NOT ours AND writes AND relkind <> 'v'
    UNION ALL
    SELECT format('tenants may read %s, which has no wall', relname), format('REVOKE ALL ON TABLE %I.%I FROM PUBLIC, %I;', $1, relname, $3) FROM relation
        WHERE NOT walled AND NOT ours AND reads AND NOT writes AND (has_tenant OR NOT common) AND relkind <> 'v'
    UNION ALL
    SELECT format('view %s asks with its owner''s rights', relname), format('ALTER VIEW %I.%I SET (security_invoker = true);', $1, relname) FROM relation
        WHERE relkind = 'v' AND NOT ours AND (reads OR writes) AND current_setting('server_version_num')::int >= 150000
        AND NOT coalesce(reloptions && ARRAY['security_invoker=true', 'security_invoker=on', 'security_invoker=1'], false)
    UNION ALL
    SELECT format('tenants may truncate %s, or refer to it, or put triggers on it', relname), format('REVOKE TRUNCATE, REFERENCES, TRIGGER ON TABLE %I.%I FROM PUBLIC, %I;', $1, relname, $3) FROM relation WHERE more AND NOT ours
) h (hole, mend) ORDER BY hole
