-- What readers need beside the annotations: samples (also those without annotations), classes (also unused ones), and the number,
-- the class id and the supercategory of an annotation. The columns of before stay where they are; new ones come behind them.
--
-- A text that contains \u0000 is valid json, but neither jsonb nor a text of PostgreSQL can hold it: such a value is NULL here.

SET LOCAL lock_timeout = '500ms'; -- replacing a view waits for its readers, and new readers would wait behind

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

CREATE VIEW packhorse.samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM packhorse.version_sample i
JOIN packhorse.label_version v ON v.id = i.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id;

CREATE VIEW packhorse.current_samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM packhorse.version_sample i
JOIN packhorse.label_switch a ON a.version_id = i.version_id
    AND a.since <= transaction_timestamp() AND a.until > transaction_timestamp()
JOIN packhorse.label_version v ON v.id = i.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id;

CREATE VIEW packhorse.classes AS
SELECT s.name AS label_set, v.version, c.class_id, c.name AS class,
       CASE WHEN c.attrs::text NOT LIKE '%\\u0000%' THEN c.attrs ->> 'supercategory' END AS supercategory, c.attrs
FROM packhorse.label_class c
JOIN packhorse.label_version v ON v.id = c.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id;

CREATE VIEW packhorse.current_classes AS
SELECT s.name AS label_set, v.version, c.class_id, c.name AS class,
       CASE WHEN c.attrs::text NOT LIKE '%\\u0000%' THEN c.attrs ->> 'supercategory' END AS supercategory, c.attrs
FROM packhorse.label_class c
JOIN packhorse.label_switch a ON a.version_id = c.version_id
    AND a.since <= transaction_timestamp() AND a.until > transaction_timestamp()
JOIN packhorse.label_version v ON v.id = c.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id;

-- Whoever may read the annotations may read what belongs to them.
DO $$
DECLARE grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'packhorse.annotations'::regclass AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner
    LOOP
        EXECUTE 'GRANT SELECT ON packhorse.samples, packhorse.classes TO ' || grantee;
    END LOOP;
    FOR grantee IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'packhorse.current_annotations'::regclass AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner
    LOOP
        EXECUTE 'GRANT SELECT ON packhorse.current_samples, packhorse.current_classes TO ' || grantee;
    END LOOP;
END $$;
