-- The newest format of manifests that the site reads; NULL: it has not said, and reads the first one if its version is known.
ALTER TABLE site ADD COLUMN manifest_format INTEGER;
