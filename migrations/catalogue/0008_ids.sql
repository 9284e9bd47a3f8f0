-- Ids are parsed where they enter since this version: letters, digits, '.', '_' and '-', a letter or digit first, 64 bytes
-- at most. No hub makes other ids, but a hostile one could send them to older versions. Such rows cannot be read any more.
DELETE FROM delivery_part WHERE length(transfer) > 64 OR transfer NOT GLOB '[A-Za-z0-9]*' OR transfer GLOB '*[^A-Za-z0-9._-]*'
    OR length(delivery) > 64 OR delivery NOT GLOB '[A-Za-z0-9]*' OR delivery GLOB '*[^A-Za-z0-9._-]*';
DELETE FROM delivery WHERE length(id) > 64 OR id NOT GLOB '[A-Za-z0-9]*' OR id GLOB '*[^A-Za-z0-9._-]*';
DELETE FROM transfer WHERE length(id) > 64 OR id NOT GLOB '[A-Za-z0-9]*' OR id GLOB '*[^A-Za-z0-9._-]*'
    OR length(delivery) > 64 OR delivery NOT GLOB '[A-Za-z0-9]*' OR delivery GLOB '*[^A-Za-z0-9._-]*';
UPDATE transfer SET after_ids = '[]' WHERE EXISTS (SELECT 1 FROM json_each(transfer.after_ids)
    WHERE length(value) > 64 OR value NOT GLOB '[A-Za-z0-9]*' OR value GLOB '*[^A-Za-z0-9._-]*');
UPDATE transfer SET body = json_set(body, '$.waits_for', NULL)
    WHERE json_extract(body, '$.waits_for') NOT GLOB '[A-Za-z0-9]*' OR json_extract(body, '$.waits_for') GLOB '*[^A-Za-z0-9._-]*'
    OR length(json_extract(body, '$.waits_for')) > 64;
-- Every string in a run's body that is an id, wherever it stands: spec, borrowed, removed, left, home.
DELETE FROM run WHERE EXISTS (SELECT 1 FROM json_tree(run.body)
    WHERE type = 'text' AND (fullkey IN ('$.spec.id', '$.spec.delivery', '$.home', '$.site.id')
        OR fullkey GLOB '$.borrowed*.transfer' OR fullkey GLOB '$.removed*' OR fullkey GLOB '$.site.removed*')
    AND (length(atom) > 64 OR atom NOT GLOB '[A-Za-z0-9]*' OR atom GLOB '*[^A-Za-z0-9._-]*'));
DELETE FROM run WHERE EXISTS (SELECT 1 FROM json_each(run.body, '$.left')
    WHERE length(key) > 64 OR key NOT GLOB '[A-Za-z0-9]*' OR key GLOB '*[^A-Za-z0-9._-]*');
-- A run's name in an offer: lower case, up to 128 bytes.
UPDATE artifact SET offer = json_set(offer, '$.run', NULL)
    WHERE json_extract(offer, '$.run') NOT GLOB '[a-z0-9]*' OR json_extract(offer, '$.run') GLOB '*[^a-z0-9._-]*'
    OR length(json_extract(offer, '$.run')) > 128;
