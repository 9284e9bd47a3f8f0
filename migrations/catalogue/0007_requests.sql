-- Lists are read a page at a time, in this order.
CREATE INDEX transfer_created ON transfer (created_ms, id);

-- Which publisher brought an artifact that is the hub's own; NULL: nobody else did. It is for the publisher's quota.
ALTER TABLE artifact ADD COLUMN publisher TEXT;
CREATE INDEX artifact_publisher ON artifact (publisher) WHERE publisher IS NOT NULL;
CREATE INDEX artifact_origin ON artifact (origin) WHERE origin IS NOT NULL;

-- Bytes of its files, as its root manifest says.
ALTER TABLE artifact ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE artifact SET bytes = COALESCE(json_extract(CAST(root AS TEXT), '$.totals.bytes'), 0) WHERE json_valid(CAST(root AS TEXT));
