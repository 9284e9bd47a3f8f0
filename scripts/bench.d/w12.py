"""W12: 1,000,000 COCO annotations into PostgreSQL at a site, against psql's COPY of the same rows and the same indexes."""

import re

import data
from lab import RUNS, Farm, Trouble, folder, median, remove, say, scaled, scratch, seconds, span, timed
from peers import Postgres

COUNT = scaled(1_000_000)


def run(results):
    source = scratch("w12", "labels.json")
    data.coco(source, COUNT)
    postgres = Postgres("w12")
    farm = Farm("W12")
    farm.hub.publish(source, "labels/w12:v1", "--format", "coco")
    ours, own, theirs = [], [], []
    for i in range(RUNS):
        postgres.psql("postgres", f"CREATE DATABASE site{i}")
        site = farm.site(f"s{i}", f'[sink.labels]\nurl = "{postgres.url(f"site{i}")}"\n')
        took, (transfer,) = farm.hub.deliver("labels/w12:v1", site.name)
        ours.append(took)
        own.append(span(transfer))
        held = int(postgres.psql(f"site{i}", "SELECT count(*) FROM packhorse.current_annotations"))
        if held != COUNT:
            raise Trouble(f"{held} annotations arrived of {COUNT}")
        theirs.append(copy_by_psql(postgres, f"site{i}", f"peer{i}"))
        farm.drop(site)
        postgres.psql("postgres", f"DROP DATABASE site{i}", f"DROP DATABASE peer{i}")
    say(f"W12: the transfers' own times {median(own):.2f} s")
    ratio = median(ours) / median(theirs)
    results.add("W12", f"{COUNT:,} annotations, psql COPY + indexes", seconds(ours), seconds(theirs), f"{ratio:.2f} ×", "≤ 1.3 ×", ratio <= 1.3)
    farm.close()
    postgres.close()
    remove(folder("w12"))


def copy_by_psql(postgres, site, peer):
    """Takes the rows and indexes that Packhorse made, and times psql making the same in an empty database."""
    tables = ["packhorse.annotation", "packhorse.version_sample"]
    postgres.psql("postgres", f"CREATE DATABASE {peer}")
    postgres.psql(peer, "CREATE SCHEMA packhorse")
    load = []
    for n, table in enumerate(tables):
        columns = postgres.psql(
            site,
            "SELECT string_agg(format('%I %s%s%s', attname, format_type(atttypid, atttypmod), CASE WHEN attcollation <> 0 THEN "
            "' COLLATE \"C\"' ELSE '' END, CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END), ', ' ORDER BY attnum) "
            f"FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped",
        ).strip()
        postgres.psql(peer, f"CREATE TABLE {table} ({columns})")
        rows = scratch("w12", f"rows{n}.copy")
        postgres.psql(site, f"\\copy (SELECT * FROM {table}) TO '{rows}'")
        load.append(f"\\copy {table} FROM '{rows}'")
    for table in tables:
        indexes = postgres.psql(site, f"SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = '{table}'::regclass").splitlines()
        load += [re.sub(r" ON ONLY ", " ON ", sql) for sql in indexes if sql]
        load.append(f"ANALYZE {table}")
    say(f"W12: psql does {[c for c in load if not c.startswith('ANALYZE')]}")
    return timed(postgres.psql, peer, *load)[0]
