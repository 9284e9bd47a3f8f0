-- What is published in place is watched where it lies: it may change there.
ALTER TABLE artifact ADD COLUMN changed TEXT;                      -- how, as its site found it; NULL: it is sound as far as is known
CREATE INDEX artifact_changed ON artifact (reference) WHERE changed IS NOT NULL;
CREATE INDEX artifact_published ON artifact (reference) WHERE published_ms IS NOT NULL;
-- Whether a site has a version of a series.
CREATE INDEX transfer_series ON transfer (site, reference);
