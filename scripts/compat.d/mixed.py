"""Peers of both programs: a hub of one, and a site of each, over QUIC and over TCP."""

import os

from checks import expect, same
from lab import MIB, clean_env, wait_for
from sources import KINDS, Sources, publish_all
from world import Trainer, World, assert_delivered, command, describe, kill, train, wait_run


def run(checks, where, old, new):
    sources = Sources(os.path.join(where, "mixed-sources"))
    programs = {"OLD": old, "NEW": new}
    bundles = {}
    for hub in ("NEW", "OLD"):
        for transport in ("quic", "tcp"):
            site = "OLD" if hub == "NEW" else "NEW"
            checks.section = f"hub {hub}, site {site}, {transport}"
            Mixed(checks, os.path.join(where, f"mixed-{hub}-{transport}"), sources, programs, hub, site, transport, bundles).run()
    checks.section = "bundles"
    for name, program in programs.items():
        with checks.step(f"{name} imports what the other exported"):
            (other,) = (n for n in programs if n != name)
            world = World(os.path.join(where, f"import-{name}"), program)
            try:
                world.hub.json("import", bundles[other]["file"])
                same(bundles[other]["digests"], {ref: a["digest"] for ref, a in world.hub.artifacts().items()})
                for ref in bundles[other]["digests"]:
                    world.hub.cli("verify", ref)
            finally:
                world.close()


class Mixed:
    """`other` is the site whose program is not the hub's, `same` the one whose program is."""

    def __init__(self, checks, where, sources, programs, hub, other, transport, bundles):
        self.checks, self.where, self.sources, self.transport, self.bundles = checks, where, sources, transport, bundles
        self.programs, self.hub_name = programs, hub
        self.hub_program, self.other_program = programs[hub], programs[other]
        self.world = World(where, self.hub_program)
        self.hub = self.world.hub
        self.trainer = Trainer(self.world)

    def run(self):
        try:
            with self.checks.step("both sites join and connect"):
                self.other = self.world.site("other", self.other_program, self.transport, self.trainer.config(self.other_program), ("region=o",))
                self.same = self.world.site("same", self.hub_program, self.transport, self.trainer.config(self.hub_program), ("region=s",))
                sites = {s["name"]: s for s in self.hub.json("sites")}
                expect(all(s["line"] == self.transport for s in sites.values()), f"the lines are {[s['line'] for s in sites.values()]}")
            self.deliver()
            self.relay()
            self.control()
            self.interrupt()
            self.away()
            self.damage()
            self.remote_publish()
            self.training()
            self.commands_of_the_other()
            self.export()
        finally:
            self.world.close()

    def deliver(self):
        hub, s = self.hub, self.sources
        for version in (1, 2):
            with self.checks.step(f"version {version} of every kind is published at the hub, planned, delivered and verified"):
                these = s.one_of_each("panels", version)
                publish_all(hub, these)
                plan = hub.json("plan", *these, "--to", "all")
                expect(len(plan) == 10 and all(row["asked"] for row in plan), f"a site did not answer a plan: {plan}")
                ids = hub.deliver(list(these), "all", "--wait")
                for ref, (source, _) in these.items():
                    assert_delivered(self.other, ref, source)
                    assert_delivered(self.same, ref, source)
                for tid in ids:
                    t = hub.transfer(tid)
                    expect(t["receipt"] and t["location"], f"{describe(t)} has no receipt or location")
                    if version == 2 and t["artifact"].startswith(("model", "dataset")):
                        expect(t["bytes"]["wire"] < 1_000_000, f"{t['bytes']['wire']} bytes for the second version {t['artifact']}")
        with self.checks.step("a second delivery of what arrived fetches nothing"):
            before = self.other.line.passed["down"]
            hub.deliver("model/panels:v2", "other", "--wait")
            expect(self.other.line.passed["down"] - before < 1 * MIB, "it was fetched again")

    def relay(self):
        for here, there in ((self.other, self.same), (self.same, self.other)):
            for kind in KINDS:
                name = f"from-{here.name}"
                ref = f"{kind}/{name}:v1"
                with self.checks.step(f"{kind} published in place at site {here.name}, delivered to site {there.name}"):
                    source, options = self.sources.one_of_each(name)[ref]
                    here.publish(source, ref, *options)
                    here.deliver(ref, there.name, "--wait")
                    assert_delivered(there, ref, source)
                    shown = {node.name: node.json("show", ref) for node in (self.hub, here, there)}
                    expect(len({x["digest"] for x in shown.values()}) == 1 and shown["hub"]["origin"] == here.name, f"{shown}")

    def control(self):
        """Each action, from the hub and from the site."""
        for at in (self.hub, self.other):
            name = f"control-{at.name}"
            # What the buffers of a slow TCP connection hold is a small part of it.
            source, ref = self.sources.model(name, 96 * MIB), f"model/{name}:v1"
            with self.checks.step(f"pause, resume, cancel and retry at {'the hub' if at is self.hub else 'the site'}"):
                self.hub.publish(source, ref)
                self.other.line.slow(down=8 * MIB)
                try:
                    (tid,) = self.hub.deliver(ref, "other")
                    self.hub.wait_committed(tid, 2 * MIB)
                    at.cli("pause", tid)
                    for node in (self.hub, self.other):
                        paused = node.wait_state(tid, "paused")
                    at.cli("resume", tid)
                    self.hub.wait_committed(tid, paused["bytes"]["committed"] + MIB)
                    at.cli("cancel", tid)
                    for node in (self.hub, self.other):
                        wait_for(f"it is cancelled at {node.name}", lambda: node.transfer(tid)["state"] == "cancelled", 60, 0.1)
                finally:
                    self.world.full_speed()
                at.cli("retry", tid)
                self.hub.wait_state(tid, "done")
                assert_delivered(self.other, ref, source)

    def interrupt(self):
        hub, other = self.hub, self.other
        source = self.sources.model("large", 48 * MIB)
        hub.publish(source, "model/large:v1")
        with self.checks.step("the site is killed in the middle: it resumes from what was committed") as note:
            self.killed("model/large:v1", source, hub, other, other, note)
        for here, there in ((other, self.same), (self.same, other)):
            name = f"large-{here.name}"
            path = self.sources.model(name, 32 * MIB)
            here.publish(path, f"model/{name}:v1")
            with self.checks.step(f"the hub is killed while it relays from site {here.name} to site {there.name}") as note:
                self.killed(f"model/{name}:v1", path, here, there, hub, note)

    def killed(self, ref, source, at, to, victim, note):
        to.line.slow(down=6 * MIB)
        try:
            (tid,) = at.deliver(ref, to.name)
            to.wait_committed(tid, 6 * MIB)
            before = to.transfer(tid)
            kill(victim)
        finally:
            to.line.slow()
        expect(before["state"] != "done", "it was done before the kill")
        passed = to.line.passed["down"]
        victim.start()
        done = self.hub.wait_state(tid, "done")
        fetched = to.line.passed["down"] - passed
        b = before["bytes"]
        missing = b["total"] - b["committed"]
        note[0] = f"{b['committed'] / MIB:.1f} of {b['total'] / MIB:.1f} MiB were committed, {fetched / MIB:.1f} MiB fetched after it"
        expect(fetched <= missing * 1.05 + 2 * MIB, f"{missing} bytes were missing, {fetched} were fetched")
        expect(done["receipt"], "it has no receipt")
        assert_delivered(to, ref, source)
        self.world.wait_online()

    def away(self):
        """Either end is not there for a while: the hub prefetches, or the transfer waits."""
        for here, there, gone, reason in (
            (self.other, self.same, self.same, "site_offline"),
            (self.same, self.other, self.other, "site_offline"),
            (self.other, self.same, self.other, "waiting_for_source"),
            (self.same, self.other, self.same, "waiting_for_source"),
        ):
            name = f"{reason.replace('_', '-')}-{here.name}"
            with self.checks.step(f"from site {here.name} to site {there.name} while {gone.name} is away: {reason}"):
                source, ref = self.sources.model(name, 3 * MIB), f"model/{name}:v1"
                here.publish(source, ref)
                wait_for("the hub knows of it", lambda: ref in self.hub.artifacts(), 30, 0.1)
                gone.stop()
                try:
                    (tid,) = self.hub.deliver(ref, there.name)
                    wait_for(f"its reason is {reason}", lambda: self.hub.transfer(tid)["reason"] == reason, 60, 0.1)
                finally:
                    gone.start()
                self.hub.wait_state(tid, "done")
                assert_delivered(there, ref, source)

    def damage(self):
        with self.checks.step("what was damaged at the site is found, and fetched again from the hub"):
            path = os.path.join(self.other.folder("model/panels:v2"), os.path.basename(self.sources.model("panels", version=2)))
            with open(path, "r+b") as f:
                f.seek(1000)
                f.write(b"damaged")
            self.other.cli("verify", "model/panels:v2", ok=(8,))
            self.other.cli("verify", "model/panels:v2", "--repair", ok=(8,))
            wait_for("it is intact again", lambda: self.other.raw("verify", "model/panels:v2").returncode == 0, 60, 0.2)
            assert_delivered(self.other, "model/panels:v2", self.sources.model("panels", version=2))

    def remote_publish(self):
        # Over TCP nothing answers on UDP: the publisher has to find that out.
        line = self.world.new_line(udp=self.transport == "quic")
        state = os.path.join(self.where, "publisher")
        token = self.hub.cli("token", "create", "--publisher", "office").strip()
        for version in (1, 2):
            with self.checks.step(f"version {version} of every kind is published from another machine and delivered") as note:
                before = line.passed["up"]
                # A publisher cannot read the dataset that labels belong to: no --for.
                these = {ref: source for ref, (source, _) in self.sources.one_of_each("office", version).items()}
                for ref, source in these.items():
                    args = ["publish", source, "--as", ref, "--hub", line.address, "--state", state, "-o", "json"]
                    done = command(self.other_program, *args, env=clean_env(PACKHORSE_JOIN_TOKEN=token))
                    expect(done.returncode == 0, f"{ref} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
                note[0] = f"{(line.passed['up'] - before) / MIB:.1f} MiB were sent"
                for ref, source in these.items():
                    self.hub.deliver(ref, "other", "--wait")
                    assert_delivered(self.other, ref, source)
                    self.hub.cli("verify", ref)

    def training(self):
        for start_at, train_at in ((self.other, self.same), (self.same, self.other)):
            name = f"run-{train_at.name}"
            with self.checks.step(f"site {train_at.name} trains for site {start_at.name} with what that one published"):
                inputs = [f"{kind}/from-{start_at.name}:v1" for kind in ("dataset", "labels", "operator", "image")]
                train(self.hub, name, inputs, start_at.name, train_at.name)
                self.trainer.wait_begun(name)
                self.trainer.let_go(name)
                run = wait_run(self.hub, name)
                self.trainer.assert_model(start_at, run["model"]["artifact"], self.sources.dataset(f"from-{start_at.name}"))
                wait_for("what was borrowed is removed", lambda: self.hub.json("train", "show", name)["released"], 60, 0.1)

    def commands_of_the_other(self):
        """The command line of one program and a daemon of the other: a program is replaced before its daemon is started again."""
        for node, program in ((self.hub, self.other_program), (self.other, self.hub_program)):
            names = ["OLD", "NEW"] if program == self.programs["OLD"] else ["NEW", "OLD"]
            what = f"commands of {names[0]} and the {'hub' if node is self.hub else 'site'} of {names[1]}"
            if names[0] == "OLD":
                with self.checks.step(f"{what}: they work, and print what they printed"):
                    for words in (["status"], ["artifacts"], ["sites"], ["show", "dataset/panels:v1"], ["train", "list"]):
                        same(node.json(*words, program=program), node.json(*words))
                    node.cli("verify", "dataset/panels:v1", program=program)
                    node.cli("doctor", program=program, ok=(0, 1))
                    answer = node.json("publish", self.sources.operator("cross"), "--as", f"operator/cross-{node.name}:v1", program=program)
                    node.json("deliver", answer["artifact"], "--to", "same", "--wait", program=program)
            else:
                with self.checks.step(f"{what}: they work, or are refused with a reason") as note:
                    done = node.raw("status", "-o", "json", program=program)
                    expect(done.returncode in (0, 10), f"status ended with {done.returncode}: {done.stderr.strip()}")
                    note[0] = "they work" if done.returncode == 0 else done.stderr.splitlines()[0]

    def export(self):
        if self.hub_name in self.bundles:
            return
        with self.checks.step("every kind is exported"):
            refs = list(self.sources.one_of_each("panels", 1)) + list(self.sources.one_of_each("panels", 2))
            path = os.path.join(self.where, "bundle")
            self.hub.cli("export", *refs, "--out", path)
            digests = {ref: a["digest"] for ref, a in self.hub.artifacts().items() if ref in refs}
            self.bundles[self.hub_name] = {"file": path, "digests": digests}
