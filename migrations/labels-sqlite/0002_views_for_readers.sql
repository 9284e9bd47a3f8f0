-- What readers need beside the annotations: samples (also those without annotations), classes (also unused ones), and the number,
-- the class id and the supercategory of an annotation. The columns of before stay where they are; new ones come behind them.

DROP VIEW annotations;
CREATE VIEW annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw,
       n.class_id, n.ann_no AS annotation_no,
       CASE WHEN json_valid(c.attrs) THEN json_extract(c.attrs, '$.supercategory') END AS supercategory,
       i.width, i.height, i.split
FROM label_version v
JOIN label_set s ON s.id = v.label_set_id
JOIN annotation n ON n.version_id = v.id
JOIN version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

DROP VIEW current_annotations;
CREATE VIEW current_annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw,
       n.class_id, n.ann_no AS annotation_no,
       CASE WHEN json_valid(c.attrs) THEN json_extract(c.attrs, '$.supercategory') END AS supercategory,
       i.width, i.height, i.split
FROM label_active a
JOIN label_version v ON v.id = a.version_id
JOIN label_set s ON s.id = v.label_set_id
JOIN annotation n ON n.version_id = v.id
JOIN version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

CREATE VIEW samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM label_version v
JOIN label_set s ON s.id = v.label_set_id
JOIN version_sample i ON i.version_id = v.id;

CREATE VIEW current_samples AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, i.width, i.height, i.split, i.meta
FROM label_active a
JOIN label_version v ON v.id = a.version_id
JOIN label_set s ON s.id = v.label_set_id
JOIN version_sample i ON i.version_id = v.id;

CREATE VIEW classes AS
SELECT s.name AS label_set, v.version, c.class_id, c.name AS class,
       CASE WHEN json_valid(c.attrs) THEN json_extract(c.attrs, '$.supercategory') END AS supercategory, c.attrs
FROM label_version v
JOIN label_set s ON s.id = v.label_set_id
JOIN label_class c ON c.version_id = v.id;

CREATE VIEW current_classes AS
SELECT s.name AS label_set, v.version, c.class_id, c.name AS class,
       CASE WHEN json_valid(c.attrs) THEN json_extract(c.attrs, '$.supercategory') END AS supercategory, c.attrs
FROM label_active a
JOIN label_version v ON v.id = a.version_id
JOIN label_set s ON s.id = v.label_set_id
JOIN label_class c ON c.version_id = v.id;

-- Without statistics, a query for one image walks all annotations of its version. Each later commit renews them.
PRAGMA analysis_limit = 2000;
ANALYZE;
