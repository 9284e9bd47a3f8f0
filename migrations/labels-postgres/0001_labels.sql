-- Label sets as rows. The schema `packhorse` exists when this runs.
-- The views at the end are what readers use; the tables may change with later migrations.

CREATE TABLE packhorse.label_set (
    id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE
);

CREATE TABLE packhorse.label_version (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    label_set_id    bigint NOT NULL REFERENCES packhorse.label_set (id),
    version         text COLLATE "C" NOT NULL,
    manifest_digest text NOT NULL,
    -- loading: its rows are being copied into tables of their own; attached: they are partitions, and readers who
    -- planned earlier are waited for; ready: the views show it; removing: the views no longer show it.
    state           text NOT NULL CHECK (state IN ('loading', 'attached', 'ready', 'removing')),
    n_samples       bigint NOT NULL DEFAULT 0,
    n_annotations   bigint NOT NULL DEFAULT 0,
    n_classes       bigint NOT NULL DEFAULT 0,
    -- BLAKE3 of annotations.jsonl.
    rows_digest     text,
    committed_at    timestamptz NOT NULL DEFAULT now(),
    UNIQUE (label_set_id, version)
);

-- One row a label set: changing it is the switch that readers see.
CREATE TABLE packhorse.label_active (
    label_set_id bigint PRIMARY KEY REFERENCES packhorse.label_set (id),
    version_id   bigint NOT NULL REFERENCES packhorse.label_version (id)
);

CREATE TABLE packhorse.label_class (
    version_id bigint NOT NULL REFERENCES packhorse.label_version (id),
    class_id   bigint NOT NULL,
    name       text NOT NULL,
    attrs      json,
    PRIMARY KEY (version_id, class_id)
);

-- Indexes stand on the partitions: each is built once, after its rows are in.
CREATE TABLE packhorse.version_sample (
    version_id bigint NOT NULL,
    sample_no  bigint NOT NULL,
    path       text COLLATE "C" NOT NULL,
    hash       text COLLATE "C",
    width      bigint,
    height     bigint,
    split      text,
    meta       json
) PARTITION BY LIST (version_id);

CREATE TABLE packhorse.annotation (
    version_id bigint NOT NULL,
    ann_no     bigint NOT NULL,
    sample_no  bigint NOT NULL,
    class_id   bigint,
    kind       text COLLATE "C" NOT NULL,
    x          double precision,
    y          double precision,
    w          double precision,
    h          double precision,
    geom       json,
    attrs      json,
    raw        json NOT NULL
) PARTITION BY LIST (version_id);

CREATE VIEW packhorse.annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw
FROM packhorse.annotation n
JOIN packhorse.label_version v ON v.id = n.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id
JOIN packhorse.version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN packhorse.label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;

CREATE VIEW packhorse.current_annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw
FROM packhorse.annotation n
JOIN packhorse.label_active a ON a.version_id = n.version_id
JOIN packhorse.label_version v ON v.id = n.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id
JOIN packhorse.version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN packhorse.label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;
