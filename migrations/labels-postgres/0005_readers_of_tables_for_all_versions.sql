-- The views show the tables for all versions, after the daemon has copied the rows of all versions into them. The partitions are
-- dropped after this migration, a few at a time.

SET LOCAL lock_timeout = '500ms'; -- this waits for readers, and new readers would wait behind

ALTER TABLE packhorse.version_sample RENAME TO version_sample_by_version;
ALTER TABLE packhorse.annotation RENAME TO annotation_by_version;
ALTER TABLE packhorse.version_sample_of_all RENAME TO version_sample;
ALTER TABLE packhorse.annotation_of_all RENAME TO annotation;

-- What an interrupted delivery or removal left is not copied.
DELETE FROM packhorse.label_class WHERE version_id IN (SELECT id FROM packhorse.label_version WHERE state <> 'ready');
DELETE FROM packhorse.label_switch WHERE version_id IN (SELECT id FROM packhorse.label_version WHERE state <> 'ready');
DELETE FROM packhorse.label_version WHERE state <> 'ready';
DELETE FROM packhorse.version_sample WHERE version_id NOT IN (SELECT id FROM packhorse.label_version);
DELETE FROM packhorse.annotation WHERE version_id NOT IN (SELECT id FROM packhorse.label_version);

DO $$
BEGIN
    IF EXISTS (
        SELECT FROM packhorse.label_version v
        WHERE (v.n_samples > 0 AND NOT EXISTS (SELECT FROM packhorse.version_sample i WHERE i.version_id = v.id))
           OR (v.n_annotations > 0 AND NOT EXISTS (SELECT FROM packhorse.annotation n WHERE n.version_id = v.id))
    ) THEN
        RAISE 'another daemon stored a label version during the migration' USING ERRCODE = 'serialization_failure';
    END IF;
END $$;

CREATE OR REPLACE VIEW packhorse.annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw,
       n.class_id, n.ann_no AS annotation_no,
       CASE WHEN c.attrs::text NOT LIKE '%\\u0000%' THEN c.attrs ->> 'supercategory' END AS supercategory,
       i.width, i.height, i.split,
       CASE WHEN n.attrs::text NOT LIKE '%\\u0000%' THEN n.attrs::text::jsonb END AS attrs_jsonb
FROM packhorse.annotation n
JOIN packhorse.label_version v ON v.id = n.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id
JOIN packhorse.version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN packhorse.label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

CREATE OR REPLACE VIEW packhorse.current_annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw,
       n.class_id, n.ann_no AS annotation_no,
       CASE WHEN c.attrs::text NOT LIKE '%\\u0000%' THEN c.attrs ->> 'supercategory' END AS supercategory,
       i.width, i.height, i.split,
       CASE WHEN n.attrs::text NOT LIKE '%\\u0000%' THEN n.attrs::text::jsonb END AS attrs_jsonb
FROM packhorse.annotation n
JOIN packhorse.label_switch a ON a.version_id = n.version_id
    AND a.since <= transaction_timestamp() AND a.until > transaction_timestamp()
JOIN packhorse.label_version v ON v.id = n.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id
JOIN packhorse.version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN packhorse.label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

CREATE OR REPLACE VIEW packhorse.samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM packhorse.version_sample i
JOIN packhorse.label_version v ON v.id = i.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id;

CREATE OR REPLACE VIEW packhorse.current_samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM packhorse.version_sample i
JOIN packhorse.label_switch a ON a.version_id = i.version_id
    AND a.since <= transaction_timestamp() AND a.until > transaction_timestamp()
JOIN packhorse.label_version v ON v.id = i.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id;

-- The new tables have the owner and the readers of the old ones: a view reads with the rights of its owner.
DO $$
DECLARE t text; grantee text; old_owner text;
BEGIN
    FOREACH t IN ARRAY ARRAY['version_sample', 'annotation'] LOOP
        FOR grantee IN
            SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
            FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.oid = format('packhorse.%I', t || '_by_version')::regclass AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner
        LOOP
            EXECUTE format('GRANT SELECT ON packhorse.%I TO %s', t, grantee);
        END LOOP;
        SELECT pg_get_userbyid(relowner) INTO old_owner FROM pg_class WHERE oid = format('packhorse.%I', t || '_by_version')::regclass;
        EXECUTE format('ALTER TABLE packhorse.%I OWNER TO %I', t, old_owner);
    END LOOP;
END $$;
