-- The number of the newest event. Each transaction that changes something raises it before its commit.
CREATE TABLE counter (
    name        TEXT PRIMARY KEY,
    value       INTEGER NOT NULL
);
-- The numbers continue: old events may be removed, and a transfer may have a number of its own.
INSERT INTO counter (name, value)
    SELECT 'event', MAX(COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'event'), 0),
                        COALESCE((SELECT MAX(seq) FROM event), 0),
                        COALESCE((SELECT MAX(cursor) FROM transfer), 0));
