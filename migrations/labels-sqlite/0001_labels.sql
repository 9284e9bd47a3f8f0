-- Label sets as rows; the same names as in Postgres, without the schema and without partitions.
-- The views at the end are what readers use; the tables may change with later migrations.

CREATE TABLE label_set (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);

CREATE TABLE label_version (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    label_set_id    INTEGER NOT NULL REFERENCES label_set (id),
    version         TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    n_samples       INTEGER NOT NULL DEFAULT 0,
    n_annotations   INTEGER NOT NULL DEFAULT 0,
    n_classes       INTEGER NOT NULL DEFAULT 0,
    -- BLAKE3 of annotations.jsonl.
    rows_digest     TEXT,
    committed_at    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    UNIQUE (label_set_id, version)
);

-- One row a label set: changing it is the switch that readers see.
CREATE TABLE label_active (
    label_set_id INTEGER PRIMARY KEY REFERENCES label_set (id),
    version_id   INTEGER NOT NULL REFERENCES label_version (id)
);

CREATE TABLE label_class (
    version_id INTEGER NOT NULL,
    class_id   INTEGER NOT NULL,
    name       TEXT NOT NULL,
    attrs      TEXT,
    PRIMARY KEY (version_id, class_id)
) WITHOUT ROWID;

CREATE TABLE version_sample (
    version_id INTEGER NOT NULL,
    sample_no  INTEGER NOT NULL,
    path       TEXT NOT NULL,
    hash       TEXT,
    width      INTEGER,
    height     INTEGER,
    split      TEXT,
    meta       TEXT,
    PRIMARY KEY (version_id, sample_no)
) WITHOUT ROWID;
CREATE INDEX version_sample_by_path ON version_sample (version_id, path);

-- x, y, w and h have no declared type on purpose: a REAL column would turn -0.0 into 0.0, and an export must give back
-- the bytes that came in.
CREATE TABLE annotation (
    version_id INTEGER NOT NULL,
    ann_no     INTEGER NOT NULL,
    sample_no  INTEGER NOT NULL,
    class_id   INTEGER,
    kind       TEXT NOT NULL,
    x, y, w, h,
    geom       TEXT,
    attrs      TEXT,
    raw        TEXT NOT NULL,
    PRIMARY KEY (version_id, ann_no)
);
CREATE INDEX annotation_by_sample ON annotation (version_id, sample_no);
CREATE INDEX annotation_by_class ON annotation (version_id, class_id);

CREATE VIEW annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw
FROM label_version v
JOIN label_set s ON s.id = v.label_set_id
JOIN annotation n ON n.version_id = v.id
JOIN version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

CREATE VIEW current_annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw
FROM label_active a
JOIN label_version v ON v.id = a.version_id
JOIN label_set s ON s.id = v.label_set_id
JOIN annotation n ON n.version_id = v.id
JOIN version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;
