-- The views of the active versions find the version by its set: by the version alone, SQLite read all versions of a set, and looked
-- for each row through the active versions of all sets.

DROP VIEW current_annotations;
CREATE VIEW current_annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw,
       n.class_id, n.ann_no AS annotation_no,
       CASE WHEN json_valid(c.attrs) THEN json_extract(c.attrs, '$.supercategory') END AS supercategory,
       i.width, i.height, i.split
FROM label_set s
JOIN label_active a ON a.label_set_id = s.id
JOIN label_version v ON v.id = a.version_id AND v.label_set_id = s.id
JOIN annotation n ON n.version_id = v.id
JOIN version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

DROP VIEW current_samples;
CREATE VIEW current_samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM label_set s
JOIN label_active a ON a.label_set_id = s.id
JOIN label_version v ON v.id = a.version_id AND v.label_set_id = s.id
JOIN version_sample i ON i.version_id = v.id;

DROP VIEW current_classes;
CREATE VIEW current_classes AS
SELECT s.name AS label_set, v.version, c.class_id, c.name AS class,
       CASE WHEN json_valid(c.attrs) THEN json_extract(c.attrs, '$.supercategory') END AS supercategory, c.attrs
FROM label_set s
JOIN label_active a ON a.label_set_id = s.id
JOIN label_version v ON v.id = a.version_id AND v.label_set_id = s.id
JOIN label_class c ON c.version_id = v.id;
