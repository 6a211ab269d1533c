-- What stands open in schema $1 of owner $2 and runtime group $3, a line each: nothing, when all is as it must be.
WITH relation AS (
    SELECT c.oid, c.relname, c.relkind, c.relrowsecurity AND c.relforcerowsecurity AS forced, c.relname LIKE 'tenancy\_%' AS ours, c.reloptions,
        EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped) AS has_tenant,
        EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenancy_wall') AS walled,
        (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname LIKE 'tenancy\_wall%' AND NOT p.polpermissive
            AND p.polroles = '{0}'
            AND concat(pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)) LIKE '%tenancy_tenant(%') AS walls,
        has_any_column_privilege($3::text, c.oid, 'SELECT') AS reads,
        has_any_column_privilege($3, c.oid, 'INSERT, UPDATE') OR has_table_privilege($3, c.oid, 'DELETE') AS writes,
        has_table_privilege($3, c.oid, 'TRUNCATE, TRIGGER') OR has_any_column_privilege($3, c.oid, 'REFERENCES') AS more
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
)
SELECT hole FROM (
    SELECT format('role %s is a superuser or bypasses row-level security', rolname) FROM pg_roles WHERE rolname IN ($2, $3) AND (rolsuper OR rolbypassrls)
    UNION ALL
    SELECT format('role %s bypasses row-level security and has access as a reader', r.rolname) FROM pg_roles r
        WHERE (r.rolsuper OR r.rolbypassrls) AND EXISTS (SELECT FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = $1 AND p.polname = 'tenancy_reader' AND r.oid = ANY (p.polroles))
    UNION ALL
    SELECT 'tenants may create in the schema' WHERE has_schema_privilege($3, $1, 'CREATE')
    UNION ALL
    SELECT format('%s is the library''s, and tenants may read or write it', relname) FROM relation
        WHERE ours AND (reads AND relname <> 'tenancy_marker' OR writes OR more)
    UNION ALL
    SELECT format('%s has a wall that is not forced, or was changed', relname) FROM relation
        WHERE walled AND (NOT forced OR walls <> 4)
    UNION ALL
    SELECT format('tenants may write %s, which has no wall', relname) FROM relation WHERE NOT walled AND NOT ours AND writes AND relkind <> 'v'
    UNION ALL
    SELECT format('tenants may read %s, which has a tenant_id and no wall', relname) FROM relation
        WHERE NOT walled AND NOT ours AND reads AND NOT writes AND has_tenant AND relkind <> 'v'
    UNION ALL
    SELECT format('view %s asks with its owner''s rights', relname) FROM relation
        WHERE relkind = 'v' AND NOT ours AND (reads OR writes) AND current_setting('server_version_num')::int >= 150000
        AND NOT coalesce(reloptions && ARRAY['security_invoker=true', 'security_invoker=on', 'security_invoker=1'], false)
    UNION ALL
    SELECT format('tenants may truncate %s, or refer to it, or put triggers on it', relname) FROM relation WHERE more AND NOT ours
) h (hole) ORDER BY hole
