-- Which version of a set is active for a transaction: the one whose period contains the time at which that transaction began.
-- A session that planned before a partition was attached does not know it until its transaction ends. Its transaction also began
-- before the period of the new version, so it reads the old version, and no delivery has to wait for it.

SET LOCAL lock_timeout = '500ms'; -- replacing the view waits for its readers, and new readers would wait behind

CREATE TABLE packhorse.label_switch (
    label_set_id bigint NOT NULL REFERENCES packhorse.label_set (id),
    version_id   bigint NOT NULL REFERENCES packhorse.label_version (id),
    since        timestamptz NOT NULL,
    until        timestamptz NOT NULL DEFAULT 'infinity'
);
CREATE INDEX ON packhorse.label_switch (label_set_id);
CREATE INDEX ON packhorse.label_switch (version_id);

INSERT INTO packhorse.label_switch (label_set_id, version_id, since)
SELECT label_set_id, version_id, '-infinity' FROM packhorse.label_active;

CREATE OR REPLACE VIEW packhorse.current_annotations AS
SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash, c.name AS class,
       n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw
FROM packhorse.annotation n
JOIN packhorse.label_switch a ON a.version_id = n.version_id
    AND a.since <= transaction_timestamp() AND a.until > transaction_timestamp()
JOIN packhorse.label_version v ON v.id = n.version_id AND v.state = 'ready'
JOIN packhorse.label_set s ON s.id = v.label_set_id
JOIN packhorse.version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
LEFT JOIN packhorse.label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;
