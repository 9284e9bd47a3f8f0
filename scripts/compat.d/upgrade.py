"""A hub and its sites of OLD, killed in the middle of their work; NEW opens their directories. Then OLD opens them again."""

import os
import time

from checks import expect, same
from lab import MIB, clean_env, end, start, wait_for
from sources import Sources, publish_all
from world import Trainer, World, assert_delivered, command, describe, kill, train, wait_run

# What a transfer says of itself that must not change when a daemon opens its directory, once it has ended.
LASTING = ("id", "delivery", "artifact", "digest", "site", "state", "reason", "bytes", "attempts", "location", "created_at", "finished_at", "receipt")
# What identifies one that goes on.
IDENTITY = ("id", "delivery", "artifact", "digest", "site", "created_at")
ENDED = ("done", "failed", "cancelled")


def of(transfers, fields, states=None):
    return {i: {f: t[f] for f in fields if f in t} for i, t in transfers.items() if states is None or t["state"] in states}


def subject(event):
    """What an event is about: its kind, and the id or the name of the object."""
    body = event["body"] or {}
    return event["what"], next((str(body[key]) for key in ("id", "artifact", "name") if key in body), "")


class Upgrade:
    def __init__(self, checks, where, old, new):
        self.checks, self.where, self.old, self.new = checks, where, old, new
        self.sources = Sources(os.path.join(where, "upgrade-sources"))
        self.world = World(os.path.join(where, "upgrade"), old)
        self.trainer = Trainer(self.world)

    def run(self):
        checks, world = self.checks, self.world
        try:
            checks.section = "OLD at work"
            self.deliver_some()
            self.begin_run()
            self.interrupt_publish()
            self.interrupt_transfers()
            checks.section = "NEW opens the directories"
            self.open_with_new()
            self.listed()
            self.resumed()
            self.contents()
            self.events_continue()
            self.training_ends()
            self.publisher_continues()
            self.goes_on()
            checks.section = "OLD opens them again"
            self.go_back()
        finally:
            world.close()

    # -- OLD ----------------------------------------------------------------------------------------------------------

    def deliver_some(self):
        world, old, s = self.world, self.old, self.sources
        self.hub = world.hub
        self.east = world.site("east", old, "quic", labels=("region=e",))
        self.west = world.site("west", old, "tcp", self.trainer.config(old), labels=("region=w",))
        self.north = world.site("north", old, run=False)
        self.at = {}
        with self.checks.step("one of each kind is published at the hub and delivered"):
            self.first = s.one_of_each("panels")
            publish_all(self.hub, self.first)
            self.hub.deliver(list(self.first), "east,west", "--wait")
            self.second = s.one_of_each("panels", 2)
            publish_all(self.hub, self.second)
            self.hub.deliver(list(self.second), "east", "--wait")
            for ref, (source, _) in (self.first | self.second).items():
                self.at[("east", ref)] = source
            for ref, (source, _) in self.first.items():
                self.at[("west", ref)] = source
            self.hub.publish(s.model("idle"), "model/idle:v1")
        with self.checks.step("one of each kind is published in place at a site, and some delivered to another"):
            self.local = s.one_of_each("local")
            publish_all(self.west, self.local)
            self.west.deliver(["dataset/local:v1", "labels/local:v1"], "east", "--wait")
            for ref in ("dataset/local:v1", "labels/local:v1"):
                self.at[("east", ref)] = self.local[ref][0]
        with self.checks.step("a transfer waits for a site that never ran, one has failed, one was cancelled"):
            (self.waiting,) = self.hub.deliver("dataset/panels:v1", "north")
            alien = self.east.folder("model/alien:v1")
            os.makedirs(alien)
            with open(os.path.join(alien, "somebody"), "w") as f:
                f.write("else")
            self.hub.publish(s.model("alien"), "model/alien:v1")
            (self.failed,) = self.hub.deliver("model/alien:v1", "east")
            wait_for("the transfer has failed", lambda: self.hub.transfer(self.failed)["state"] == "failed", 60, 0.1)
            (cancelled,) = self.hub.deliver("model/idle:v1", "north")
            self.hub.cli("cancel", cancelled)

    def begin_run(self):
        with self.checks.step("a run trains at west with what it borrowed"):
            self.inputs = ["dataset/panels:v2", "labels/panels:v2", "operator/panels:v1", "image/panels:v1"]
            train(self.hub, "r1", self.inputs, "east", "west")
            self.trainer.wait_begun("r1")

    def interrupt_publish(self):
        """A publisher without a daemon is killed when half of its file has passed."""
        with self.checks.step("a publisher publishes from another machine, and is killed in its next publish"):
            self.state = os.path.join(self.where, "publisher")
            self.office = self.world.new_line()
            token = self.hub.cli("token", "create", "--publisher", "office").strip()
            self.remote = ["--hub", self.office.address, "--state", self.state]
            self.office_model = self.sources.model("office")
            self.publish_remote(self.old, self.office_model, "model/office:v1", PACKHORSE_JOIN_TOKEN=token)
            self.half = self.sources.model("half", 48 * MIB)
            self.office.slow(up=12 * MIB)
            before = self.office.passed["up"]
            child = start([self.old, "publish", self.half, "--as", "model/half:v1", *self.remote], os.path.join(self.where, "publisher.log"))
            wait_for("half of it has passed", lambda: self.office.passed["up"] - before > 28 * MIB or child.poll() is not None, 60, 0.05)
            expect(child.poll() is None, "the publish ended before it was interrupted")
            end(child, 9)

    def publish_remote(self, program, source, ref, **env):
        done = command(program, "publish", source, "--as", ref, *self.remote, "-o", "json", env=clean_env(**env))
        expect(done.returncode == 0, f"publish --hub of {ref} ended with {done.returncode}: {done.stderr.strip()[-500:]}")

    def interrupt_transfers(self):
        s, hub, east = self.sources, self.hub, self.east
        with self.checks.step("hub and sites are killed in the middle of several transfers"):
            self.large = {
                "model/big:v1": s.model("big", 160 * MIB),
                "image/big:v1": s.image("big", large=160 * MIB),
                "model/here:v1": s.model("here", 160 * MIB),
                "dataset/many:v1": s.many("many", 6000, 20_000),
                "model/paused:v1": s.model("paused", 48 * MIB),
            }
            for ref, source in self.large.items():
                (self.west if ref == "model/here:v1" else hub).publish(source, ref)
            # A paused one first.
            east.line.slow(down=8 * MIB)
            (self.paused,) = hub.deliver("model/paused:v1", "east")
            hub.wait_committed(self.paused, 4 * MIB)
            hub.cli("pause", self.paused)
            hub.wait_state(self.paused, "paused")
            # A transfer has up to 32 MiB of requests on the way, and they are answered in their order. So the large ones are much larger:
            # when the last has something, none is done.
            east.line.slow(down=12 * MIB)
            self.open = hub.deliver([ref for ref in self.large if ref != "model/paused:v1"], "east")
            for tid in self.open:
                east.wait_committed(tid, 6 * MIB if east.transfer(tid)["artifact"] == "model/here:v1" else 2 * MIB)
            self.events = {n.name: n.events() for n in (hub, east)}
            self.cursors = {n.name: n.get("/v1/transfers?since=0&limit=1000")[1]["X-Packhorse-Cursor"] for n in (hub, east)}
            self.tokens = {n.name: n.token() for n in (hub, east, self.west)}
            self.before = {n.name: (n.artifacts(), n.transfers()) for n in self.world.nodes() if n.child}
            self.shows = {ref: hub.json("show", ref) for ref in [*self.first, *self.local]}
            self.runs = hub.json("train", "list")
            self.sites_before = {x["name"]: x for x in hub.json("sites")}
            self.rows = east.rows()
            self.digests = {node: {ref: a["digest"] for ref, a in self.before[node][0].items()} for node in self.before}
            kill(east, self.west, hub)
            begun = [t for t in self.before["east"][1].values() if t["id"] in self.open]
            unfinished = [t for t in begun if t["state"] not in ENDED]
            # Which one is ahead differs from run to run; the relayed one and another must be in the middle.
            self.at |= {("east", t["artifact"]): self.large[t["artifact"]] for t in begun}
            self.open = [t["id"] for t in unfinished]
            names = [t["artifact"] for t in unfinished]
            expect(len(names) > 1 and "model/here:v1" in names, lambda: f"too late: {list(map(describe, begun))}")
            self.missing = sum(t["bytes"]["total"] - t["bytes"]["committed"] for t in unfinished)
            self.committed = sum(t["bytes"]["committed"] for t in unfinished)
            self.relay = next(t for t in unfinished if t["artifact"] == "model/here:v1")

    # -- NEW ----------------------------------------------------------------------------------------------------------

    def open_with_new(self):
        # The lines stay slow until the lists have been compared.
        for node in self.world.nodes():
            with self.checks.step(f"{node.name} starts with the configuration and the directory of OLD"):
                began = time.monotonic()
                if node is self.hub:
                    self.passed = {name: dict(site.line.passed) for name, site in self.world.sites.items()}
                node.restart_as(self.new)
                if node is not self.hub:
                    self.world.wait_online(node.name)
                expect(time.monotonic() - began < 60, "it took more than 60 s")

    def listed(self):
        hub, checks = self.hub, self.checks
        for node in (hub, self.east, self.west):
            artifacts, transfers = self.before[node.name]
            with checks.step(f"{node.name} lists every artifact with the same digest and fields") as note:
                same(artifacts, node.artifacts())
                note[0] = f"{len(artifacts)} artifacts"
            with checks.step(f"{node.name} lists every transfer; what had ended is unchanged") as note:
                now = node.transfers()
                same(of(transfers, IDENTITY), of(now, IDENTITY))
                same(of(transfers, LASTING, ENDED), of(now, LASTING))
                note[0] = f"{len(transfers)} transfers"
        with checks.step("the API tokens are the same"):
            same(self.tokens, {n.name: n.token() for n in (hub, self.east, self.west)})
        with checks.step("`show` prints the same: kinds, counts, lineage"):
            for ref, before in self.shows.items():
                same({k: v for k, v in before.items() if k != "transfers"}, hub.json("show", ref))
        with checks.step("the paused transfer is still paused"):
            expect(hub.transfer(self.paused)["state"] == "paused", lambda: describe(hub.transfer(self.paused)))
        with checks.step("the sites have joined: names, labels and times are the same"):
            fields = ("name", "labels", "joined_at")
            now = {x["name"]: x for x in hub.json("sites")}
            same({n: {f: x[f] for f in fields} for n, x in self.sites_before.items()}, now)
        with checks.step("label rows are the same") as note:
            rows = self.east.rows()
            missing = set(self.rows) - set(rows)
            expect(not missing, lambda: f"{len(missing)} of {len(self.rows)} rows changed, {min(missing)} for example")
            note[0] = f"{len(self.rows)} rows"

    def resumed(self):
        hub, east, checks = self.hub, self.east, self.checks
        for tid in self.open:
            t = self.before["east"][1][tid]
            with checks.step(f"{t['artifact']} resumes and is done") as note:
                self.world.full_speed()
                done = hub.wait_state(tid, "done")
                b = done["bytes"]
                expect(b["resumed"] >= t["bytes"]["committed"], f"{t['bytes']['committed']} bytes were committed, {b['resumed']} resumed")
                expect(done["receipt"], "it has no receipt")
                note[0] = f"{t['bytes']['committed'] / MIB:.1f} of {b['total'] / MIB:.1f} MiB were committed, {b['resumed'] / MIB:.1f} resumed"
        # What the line carried: all that was missing, manifests and framing, and what other work of these seconds needed.
        with checks.step("nothing that was committed was fetched again") as note:
            fetched = east.line.passed["down"] - self.passed["east"]["down"]
            most = int(self.missing * 1.02) + 3 * MIB
            note[0] = f"{self.missing / MIB:.1f} MiB were missing, the line carried {fetched / MIB:.1f} MiB; {self.committed / MIB:.1f} MiB had been committed"
            expect(self.committed > 2 * (most - self.missing), f"too little was committed to see it: {self.committed} bytes")
            expect(fetched <= most, f"{self.missing} bytes were missing, the line to east carried {fetched}")
        with checks.step("the relay does not fetch again what it forwarded") as note:
            sent = self.west.line.passed["up"] - self.passed["west"]["up"]
            b = self.relay["bytes"]
            most = int((b["total"] - b["committed"]) * 1.01) + 1 * MIB
            note[0] = f"{b['committed'] / MIB:.1f} of {b['total'] / MIB:.1f} MiB were committed, west sent {sent / MIB:.1f} MiB"
            expect(most < b["total"], f"too little was committed to see it: {b['committed']} bytes")
            expect(sent <= most, f"{b['total'] - b['committed']} bytes were missing, the line from west carried {sent}")
        with checks.step("the paused transfer can be resumed, the failed one retried; a site that never ran gets its own"):
            hub.cli("resume", self.paused)
            alien = east.folder("model/alien:v1")
            os.unlink(os.path.join(alien, "somebody"))
            os.rmdir(alien)
            hub.cli("retry", self.failed)
            for tid in (self.paused, self.failed, self.waiting):
                hub.wait_state(tid, "done")
            self.at[("east", "model/paused:v1")] = self.large["model/paused:v1"]
            self.at[("east", "model/alien:v1")] = self.sources.model("alien")
            self.at[("north", "dataset/panels:v1")] = self.first["dataset/panels:v1"][0]

    def contents(self):
        for (site, ref), source in sorted(self.at.items()):
            with self.checks.step(f"{ref} at {site} is byte for byte what was published, and `verify` passes"):
                assert_delivered(self.world.sites[site], ref, source)
        with self.checks.step("`verify` passes at the hub and where something was published in place") as note:
            held = [ref for ref, a in self.hub.artifacts().items() if not a["origin"]]
            for ref in held:
                self.hub.cli("verify", ref)
            for ref in self.local:
                self.west.cli("verify", ref)
            note[0] = f"{len(held)} at the hub, {len(self.local)} at west"

    def events_continue(self):
        for node in (self.hub, self.east):
            with self.checks.step(f"a reader of events of {node.name} continues from its cursor") as note:
                before, cursor = self.events[node.name]
                after, _ = node.events(cursor)
                numbers = [e["seq"] for e in after]
                expect(numbers and min(numbers) > cursor and numbers == sorted(set(numbers)), f"numbers after {cursor}: {numbers[:5]}…")
                done = {e["body"]["id"] for e in after if e["what"] == "transfer" and e["body"] and e["body"]["state"] == "done"}
                expect(set(self.open) <= done, f"no event of {set(self.open) - done}")
                paged = [e["seq"] for e in node.events(cursor, limit=3)[0]]
                expect(set(numbers) <= set(paged), "small pages skip events")
                everything = node.events()[0]
                numbers = [e["seq"] for e in everything]
                expect(numbers == sorted(set(numbers)), "numbers do not rise")
                lost = {subject(e) for e in before} - {subject(e) for e in everything}
                expect(not lost, lambda: f"there is no event of {sorted(lost)[:3]} any more")
                note[0] = f"{len(before)} events before number {cursor}, {len(after)} after it"

            with self.checks.step(f"a reader of transfers of {node.name} continues from its cursor") as note:
                changed = {t["id"] for t in node.json("status", "--since", self.cursors[node.name])}
                ended = {t["id"] for t in self.before[node.name][1].values() if t["state"] in ("done", "cancelled")}
                expect(set(self.open) <= changed, f"not listed as changed: {set(self.open) - changed}")
                expect(not ended & changed, f"listed as changed: {ended & changed}")
                note[0] = f"{len(changed)} transfers changed"

    def training_ends(self):
        with self.checks.step("the run that trained goes on: the model comes home, and what was borrowed is removed"):
            same([{k: r[k] for k in ("name", "from", "on", "inputs", "expect", "created_at", "deadline_at")} for r in self.runs], self.hub.json("train", "list"))
            self.trainer.let_go("r1")
            run = wait_run(self.hub, "r1")
            self.trainer.assert_model(self.east, "model/judge:r1", self.second["dataset/panels:v2"][0])
            lineage = self.hub.json("show", "model/judge:r1")["lineage"]
            same(sorted(run["inputs"], key=str), sorted(lineage["inputs"], key=str))
            wait_for("what was borrowed is removed", lambda: self.hub.json("train", "show", "r1")["released"], 60, 0.1)
            expect(not os.path.exists(self.west.folder("dataset/panels:v2")), "the borrowed dataset is still at west")
            expect(os.path.exists(self.west.folder("operator/panels:v1")), "what west had before is gone")

        with self.checks.step("west trains again, after what CHANGELOG.md asks for") as note:
            begin = ["train", "start", "--name", "r2", "--from", "east", "--on", "west", "--expect", "model/judge", "--input", "dataset/panels:v1"]
            done = self.hub.raw(*begin)
            expect(done.returncode in (0, 4), f"train start ended with {done.returncode}: {done.stderr.strip()}")
            if done.returncode == 4:
                # "[train] allow: a site trains only for the sites that its own configuration names there."
                note[0] = "with [train] allow in its configuration"
                self.west.stop()
                self.west.add_config('allow = ["east"]\n')
                self.west.start()
                self.world.wait_online("west")
                wait_for("a run can begin", lambda: self.hub.raw(*begin).returncode == 0, 30, 0.5)
            self.trainer.wait_begun("r2")
            self.trainer.let_go("r2")
            wait_run(self.hub, "r2")

    def publisher_continues(self):
        with self.checks.step("the publisher of OLD's certificate publishes with NEW, and resumes what was interrupted") as note:
            self.office.slow()
            before = self.office.passed["up"]
            self.publish_remote(self.new, self.half, "model/half:v1")
            sent = self.office.passed["up"] - before
            note[0] = f"of 48 MiB half had passed, {sent / MIB:.1f} MiB were sent"
            expect(sent < 36 * MIB, f"{sent} bytes were sent again")
            self.hub.cli("verify", "model/half:v1")
        with self.checks.step("the publisher of OLD publishes at the hub of NEW"):
            self.publish_remote(self.old, self.sources.model("office2"), "model/office:v2")
            self.publish_remote(self.old, self.office_model, "model/office:v1")

    def goes_on(self):
        hub, s = self.hub, self.sources
        with self.checks.step("publishing the same again changes nothing, other content is refused"):
            for ref, (source, options) in self.first.items():
                answer = hub.publish(source, ref, *options)
                expect(answer["unchanged"] and answer["digest"] == self.digests["hub"][ref], f"{ref} was published anew")
            hub.cli("publish", s.model("other"), "--as", "model/panels:v1", ok=(6,))
        with self.checks.step("the chunk store of OLD serves NEW: a next version is stored and transferred as a difference") as note:
            third = s.one_of_each("panels", 3)
            answers = publish_all(hub, third)
            stored = answers["model/panels:v3"]["stored"]
            expect(stored < 600_000, f"{stored} bytes of a model with 100,000 new ones were stored")
            ids = hub.deliver(list(third), "east,west", "--wait")
            for tid in ids:
                t = hub.transfer(tid)
                note[0] += f"{t['artifact']} to {t['site']} {t['bytes']['wire']} B; " if t["artifact"].startswith(("model", "dataset")) else ""
                if t["artifact"].startswith(("model", "dataset")):
                    expect(t["bytes"]["wire"] < 1_000_000, f"{t['bytes']['wire']} bytes for {t['artifact']} at {t['site']}")
            for ref, (source, _) in third.items():
                assert_delivered(self.east, ref, source)
                assert_delivered(self.west, ref, source)
                self.at[("east", ref)] = source
        with self.checks.step("gc keeps what is in use"):
            hub.cli("gc")
            for ref in [*self.first, "model/big:v1"]:
                hub.cli("verify", ref)

    # -- OLD again ----------------------------------------------------------------------------------------------------

    def go_back(self):
        """One daemon at a time: OLD refuses with a reason, or works. Neither may change what NEW finds afterwards."""
        held = {node.name: {ref: a["digest"] for ref, a in node.artifacts().items()} for node in self.world.nodes()}
        rows = self.east.rows()
        for node in (self.hub, self.east, self.west):
            node.stop()
            with self.checks.step(f"{node.name}: OLD refuses the directory with a reason, or works with it") as note:
                note[0] = self.try_old(node, held[node.name])
            with self.checks.step(f"{node.name}: NEW finds everything as it was"):
                node.restart_as(self.new)
                self.world.wait_online(*(["east", "west"] if node is self.hub else [node.name]))
                same(held[node.name], {ref: a["digest"] for ref, a in node.artifacts().items()})
                for ref in held[node.name]:
                    if node is not self.hub or not self.hub.artifacts()[ref]["origin"]:
                        node.cli("verify", ref)
        with self.checks.step("label rows are the same afterwards, and transfers go on"):
            expect(set(rows) <= set(self.east.rows()), "rows changed")
            self.hub.deliver("model/half:v1", "east,west", "--wait")

    def try_old(self, node, held):
        """What OLD does with a directory that NEW has used, in words."""
        size = os.path.getsize(node.log)
        node.program = self.old
        node.start(wait=False)
        try:
            wait_for("it is ready or has ended", lambda: node.child.poll() is not None or node.ready(), 60, 0.05)
            if node.child.poll() is None:
                same(held, {ref: a["digest"] for ref, a in node.artifacts().items()})
                for ref in held:
                    if node.raw("show", ref).returncode == 0 and not node.json("show", ref)["origin"]:
                        node.cli("verify", ref)
                return "OLD works with it"
            with open(node.log, errors="replace") as f:
                f.seek(size)
                text = f.read()
            reason = [line for line in text.splitlines() if "error" in line.lower()]
            expect("panicked" not in text and node.child.returncode in range(1, 12) and reason, lambda: f"it ended with {node.child.returncode}: {text[-700:]}")
            return f"refused with exit code {node.child.returncode}: {reason[-1].strip()[:400]}"
        finally:
            node.stop()


def rolling(checks, where, old, new):
    """The upgrade that the documentation describes: first the hub, then one site after the other, while transfers run."""
    checks.section = "one daemon after the other"
    sources = Sources(os.path.join(where, "rolling-sources"))
    world = World(os.path.join(where, "rolling"), old)
    try:
        with checks.step("transfers go on while hub, destination and origin are replaced") as note:
            hub, east, west = world.hub, world.site("east", old, "quic"), world.site("west", old, "tcp")
            paths = {"model/hub:v1": sources.model("hub", 128 * MIB), "model/west:v1": sources.model("west", 128 * MIB)}
            hub.publish(paths["model/hub:v1"], "model/hub:v1")
            west.publish(paths["model/west:v1"], "model/west:v1")
            east.line.slow(down=10 * MIB)
            ids = hub.deliver(list(paths), "east")
            for node in (hub, east, west):
                for tid in ids:
                    hub.wait_committed(tid, hub.transfer(tid)["bytes"]["committed"] + 4 * MIB)
                expect(all(hub.transfer(tid)["state"] != "done" for tid in ids), "too late: a transfer is done")
                node.stop()
                node.restart_as(new)
                world.wait_online()
            world.full_speed()
            for tid in ids:
                hub.wait_state(tid, "done")
            for ref, path in paths.items():
                assert_delivered(east, ref, path)
            carried = east.line.passed["down"]
            note[0] = f"256 MiB in {carried / MIB:.1f} MiB over the line"
            expect(carried < 256 * MIB + 2 * 36 * MIB, f"{carried} bytes were carried")
    finally:
        world.close()
