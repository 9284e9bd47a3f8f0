-- What a publisher may publish, and where it may deliver that (JSON); NULL: no limit. Its join token sets it.
ALTER TABLE token ADD COLUMN scope TEXT;
ALTER TABLE publisher ADD COLUMN scope TEXT;
