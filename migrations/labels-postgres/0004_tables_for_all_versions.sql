-- The tables that replace the partitions of versions: one table for the samples and one for the annotations of all versions.
-- A query over partitions locks each of them with its indexes, whatever it asks for: 7 locks a version. A query over these tables
-- holds the same few locks with any number of versions.
--
-- The daemon copies the rows of each version into them; then the next migration shows them to readers.

CREATE TABLE packhorse.version_sample_of_all (
    version_id bigint NOT NULL,
    sample_no  bigint NOT NULL,
    path       text COLLATE "C" NOT NULL,
    hash       text COLLATE "C",
    width      bigint,
    height     bigint,
    split      text,
    meta       json,
    PRIMARY KEY (version_id, sample_no)
);
CREATE INDEX version_sample_by_path ON packhorse.version_sample_of_all (version_id, path);

CREATE TABLE packhorse.annotation_of_all (
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
    raw        json NOT NULL,
    PRIMARY KEY (version_id, ann_no)
);
CREATE INDEX annotation_by_sample ON packhorse.annotation_of_all (version_id, sample_no);
CREATE INDEX annotation_by_class ON packhorse.annotation_of_all (version_id, class_id);
