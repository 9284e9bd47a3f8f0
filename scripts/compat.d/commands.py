"""What programs and scripts see: the JSON of the commands, the API's description, the options, and the exit codes.

OLD and NEW do the same in a world each; what OLD prints must be in what NEW prints, with the same types. More is no change.
"""

import json
import os
import re
import sqlite3

from checks import expect, same, same_shape
from lab import wait_for
from sources import Sources, publish_all
from world import Trainer, World, command, train, wait_run

# Exit codes that CHANGELOG.md announces: what NEW may answer instead of OLD.
ANNOUNCED = {
    # "A daemon publishes neither its `data_dir` nor its configuration and password files."
    "publish of the daemon's own directory": (4, "not_allowed"),
}

# Configurations that CHANGELOG.md announces to be refused.
ANNOUNCED_CONFIGURATIONS = {'[listen]\napi = "0.0.0.0:7480"\n'}

# What a configuration may hold beside role, name, data_dir and the address of the hub. What OLD accepts, NEW must accept.
CONFIGURATIONS = [
    ("hub", '[listen]\napi = "127.0.0.1:7480"\nquic = "0.0.0.0:7443"\n'),
    ("hub", '[listen]\napi = "0.0.0.0:7480"\n'),
    ("hub", '[share]\nallow = ["suzhou", "line=3"]\n'),
    ("hub", '[relay]\nbudget = "10GiB"\nkeep = "3d"\n'),
    ("hub", '[line]\ncongestion = "bbr"\n'),
    ("hub", '[line]\ntransport = "tcp"\n'),
    ("hub", '[limits]\nmemory = "64MiB"\n'),
    ("hub", '[quota.site]\nbytes = "1TiB"\nartifacts = 10\nentries_per_artifact = 1000\n'),
    ("hub", '[quota.publisher]\nbytes = "1TiB"\n'),
    ("hub", '[registry."harbor.example.com"]\nrealm_hosts = ["tokens.example.com"]\n'),
    ("site", '[listen]\napi = "127.0.0.1:7481"\n'),
    ("site", '[share]\nallow = ["all"]\ncheck_every = "1m"\n'),
    ("site", '[share]\nallow = []\n'),
    ("site", '[line]\ncongestion = "cubic"\ntransport = "quic"\n'),
    ("site", '[limits]\nmemory = "32MiB"\n'),
    ("site", '[sink.labels]\nurl = "postgres://packhorse@db/labels"\n'),
    ("site", '[sink.labels]\nurl = "sqlite:///var/tmp/labels.db"\n'),
    ("site", '[sink.images]\nurl = "https://harbor.example.com/operators"\nrealm_hosts = ["tokens.example.com"]\ncreate_project = true\n'),
    ("site", '[sink.images]\nurl = "oci-layout:/var/tmp/images"\n'),
    ("site", '[train]\ncommand = ["/bin/true", "--run"]\nat_once = 2\n'),
    ("site", '[train]\nurl = "http://platform.example.com/runs"\n'),
]


def accepts(where, program, role, text):
    path = os.path.join(where, "configuration.toml")
    hub = '[hub]\naddress = "hub.example.com:7443"\n' if role == "site" else ""
    with open(path, "w") as f:
        f.write(f'role = "{role}"\nname = "n"\ndata_dir = "{where}/no-data"\n{hub}{text}')
    return command(program, "config", "check", "--config", path).returncode == 0


def run(checks, where, old, new):
    sources = Sources(os.path.join(where, "commands-sources"))
    make_bad_sources(sources.where)
    checks.section = "commands"
    seen = {}
    for name, program in (("OLD", old), ("NEW", new)):
        with checks.step(f"a hub and two sites of {name} do everything that is compared"):
            seen[name] = See(os.path.join(where, f"commands-{name}"), program, sources).run()
    if len(seen) < 2:
        return
    before, after = seen["OLD"], seen["NEW"]
    checks.section = "JSON"
    for what, value in before["json"].items():
        with checks.step(what):
            same_shape(value, after["json"][what])
    checks.section = "exit codes"
    for what, value in before["codes"].items():
        with checks.step(what) as note:
            now = after["codes"][what]
            note[0] = f"{value[0]}" if now == value else f"{value[0]} became {now[0]}, as announced"
            expect(now in (value, ANNOUNCED.get(what)), f"{value} became {now}")
    checks.section = "configuration"
    for role, text in CONFIGURATIONS:
        was, now = (accepts(where, program, role, text) for program in (old, new))
        if was:
            with checks.step(f"{role}: {' '.join(text.split())}") as note:
                announced = text in ANNOUNCED_CONFIGURATIONS
                note[0] = "refused, as announced" if announced and not now else ""
                expect(now or announced, "NEW refuses it")
    checks.section = "API"
    with checks.step("every route, parameter and field of the API's description is there"):
        found = narrower_api(before["openapi"], after["openapi"])
        expect(not found, lambda: "; ".join(found[:8]))
    with checks.step("every metric is there"):
        expect(not before["metrics"] - after["metrics"], lambda: f"missing: {sorted(before['metrics'] - after['metrics'])}")
    checks.section = "options"
    for words, options in before["options"].items():
        with checks.step(f"packhorse {words}".strip()):
            lost = options - after["options"].get(words, set())
            expect(words in after["options"], "there is no such command")
            expect(not lost, lambda: f"missing: {sorted(lost)}")
    checks.section = "layouts"
    for what, value in before["layouts"].items():
        with checks.step(what):
            now = after["layouts"][what]
            # New columns come after those that exist: a reader may name columns or count them.
            same(value, now[: len(value)] if what.startswith("columns of ") else now)


# ---------------------------------------------------------------------------------------------------------------------
# The API's description


def narrower_api(old, new):
    found = []
    for path, methods in old["paths"].items():
        for method, was in methods.items():
            now = new["paths"].get(path, {}).get(method)
            if now is None:
                found.append(f"{method} {path} is missing")
                continue
            wanted = {p["name"]: p for p in now.get("parameters", ())}
            for parameter in was.get("parameters", ()):
                if parameter["name"] not in wanted:
                    found.append(f"{method} {path}: no parameter {parameter['name']}")
            required = {n for n, p in wanted.items() if p.get("required")} - {p["name"] for p in was.get("parameters", ()) if p.get("required")}
            found += [f"{method} {path}: {name} became required" for name in sorted(required)]
            found += [f"{method} {path}: no answer {code}" for code in was.get("responses", {}) if code.startswith("2") and code not in now["responses"]]
    schemas = new["components"]["schemas"]
    requests = set(re.findall(r'#/components/schemas/(\w+)', json.dumps([m.get("requestBody") for p in new["paths"].values() for m in p.values() if isinstance(m, dict)])))
    for name, was in old["components"]["schemas"].items():
        if name not in schemas:
            found.append(f"schema {name} is missing")
            continue
        now = schemas[name]
        for field, kind in was.get("properties", {}).items():
            if field not in now.get("properties", {}):
                found.append(f"{name}.{field} is missing")
            elif types(kind) - types(now["properties"][field]) - {"null"}:
                found.append(f"{name}.{field}: {sorted(types(kind))} became {sorted(types(now['properties'][field]))}")
        for value in was.get("enum", ()):
            if value not in now.get("enum", ()):
                found.append(f"{name}: no value {value}")
        more = set(now.get("required", ())) - set(was.get("required", ()))
        if name in requests and more & set(was.get("properties", {})) | more - set(was.get("properties", {})):
            found.append(f"{name}: {sorted(more)} became required")
    return found


def types(schema):
    """The types of a field, or the schemas that it refers to."""
    kind = schema.get("type", [])
    found = set(kind if isinstance(kind, list) else [kind])
    for inner in (*schema.get("oneOf", ()), *schema.get("allOf", ()), *schema.get("anyOf", ())):
        found |= types(inner)
    return found | ({schema["$ref"]} if "$ref" in schema else set())


def options_of(program, words=()):
    """{command: its long options}, from `--help`, for all commands below these words."""
    text = command(program, *words, "--help").stdout
    found = {" ".join(words): set(re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", text, re.M))}
    listed = re.search(r"^Commands:\n((?:  .*\n|\n)+)", text, re.M)
    for name in re.findall(r"^  ([a-z][a-z-]*)(?:  |$)", listed.group(1), re.M) if listed else ():
        if name != "help":
            found |= options_of(program, (*words, name))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is tried


def make_bad_sources(where):
    os.makedirs(os.path.join(where, "outside"))
    os.symlink("/etc/passwd", os.path.join(where, "outside", "link"))
    os.makedirs(os.path.join(where.encode(), b"latin1"))
    with open(os.path.join(where.encode(), b"latin1", b"f\xfcr"), "wb") as f:
        f.write(b"x")
    with open(os.path.join(where, "bad.csv"), "w") as f:
        f.write("sample_path,class,x,y,w,h\nline0/a.bin,dent,one,2,3,4\n")
    with open(os.path.join(where, "bundle"), "wb") as f:
        f.write(b"this is no bundle" * 100)
    os.makedirs(os.path.join(where, "no-image"))
    with open(os.path.join(where, "bad.toml"), "w") as f:
        f.write('role = "hub"\nname = "hub"\ndata_dir = "/nowhere"\nsurprise = 1\n')


class See:
    """Does everything with one program, and remembers what it printed."""

    def __init__(self, where, program, sources):
        self.where, self.program, self.sources = where, program, sources
        self.world = World(where, program, plain_files=True)
        self.trainer = Trainer(self.world)
        self.found = {"json": {}, "codes": {}, "layouts": {}}

    def run(self):
        try:
            self.prepare()
            self.look()
            self.exit_codes()
            self.found["openapi"] = json.loads(self.hub.get("/openapi.json")[0])
            self.found["metrics"] = {line.split()[2] for node in (self.hub, self.east) for line in node.get("/metrics")[0].splitlines() if line.startswith("# TYPE")}
            self.found["options"] = options_of(self.program)
        finally:
            self.world.close()
        return self.found

    def see(self, what, value):
        self.found["json"][what] = value

    def prepare(self):
        world, s = self.world, self.sources
        self.hub = hub = world.hub
        self.see("token create", hub.json("token", "create", "--site", "nobody", "--label", "a=b"))
        self.east = world.site("east", self.program, labels=("region=e",))
        self.west = world.site("west", self.program, more=self.trainer.config(self.program), labels=("region=w",))
        self.north = world.site("north", self.program, run=False)
        for version in (1, 2):
            these = s.one_of_each("panels", version)
            answers = publish_all(hub, these)
            for kind in ("dataset", "labels", "image"):
                self.see(f"publish {kind}, version {version}", answers[f"{kind}/panels:v{version}"])
            if version == 1:
                self.see("plan", hub.json("plan", *these, "--to", "east,west"))
            answer = hub.json("deliver", *these, "--to", "east", "--wait")
            self.see("deliver --wait", answer)
            self.see("status DELIVERY", hub.json("status", answer["delivery"]))
        publish_all(self.west, s.one_of_each("local"))
        self.see("publish at a site", self.west.publish(s.operator("mine"), "operator/mine:v1"))
        self.see("deliver at a site", self.west.json("deliver", "dataset/local:v1", "--to", "east", "--wait"))
        (self.waits,) = hub.deliver("model/panels:v1", "north")
        (self.cancelled,) = hub.deliver("model/panels:v2", "north")
        for action in ("pause", "resume", "cancel"):
            self.see(action, hub.json(action, self.cancelled))
        self.see("retry of what is done", hub.json("retry", next(t["id"] for t in hub.json("status") if t["state"] == "done")))
        inputs = ["dataset/local:v1", "labels/local:v1", "operator/panels:v1", "image/panels:v1"]
        hub.deliver(["labels/local:v1", "image/local:v1"], "west", "--wait")
        self.see("train start", train(hub, "r1", inputs, "east", "west"))
        self.see("descriptor of a run", self.trainer.wait_begun("r1"))
        self.see("train show, training", wait_for("it trains", lambda: (r := hub.json("train", "show", "r1"))["state"] == "training" and r, 60, 0.1))
        self.trainer.let_go("r1")
        wait_run(hub, "r1")
        wait_for("it is given back", lambda: hub.json("train", "show", "r1")["released"], 60, 0.1)

    def look(self):
        hub, east, west = self.hub, self.east, self.west
        for node in (hub, east, west):
            self.see(f"status at {node.name}", node.json("status"))
            self.see(f"artifacts at {node.name}", node.json("artifacts"))
            self.see(f"sites at {node.name}", node.json("sites"))
            self.see(f"doctor at {node.name}", node.json("doctor", ok=(0, 1)))
            self.see(f"config check at {node.name}", node.json("config", "check"))
            events, cursor = node.events()
            self.see(f"events at {node.name}", events)
            # All of them: an event holds what its subject was like at that time.
            self.see(f"stream of events at {node.name}", [event | {"data": json.loads(event["data"])} for event in node.stream(2, cursor)])
        for ref in ("dataset/panels:v1", "labels/panels:v2", "image/panels:v1", "dataset/local:v1", "model/judge:r1"):
            self.see(f"show {ref} at the hub", hub.json("show", ref))
        self.see("show labels/panels:v2 at east", east.json("show", "labels/panels:v2"))
        self.see("status TRANSFER", hub.json("status", self.waits))
        self.see("status --since", hub.json("status", "--since", "0"))
        lines = hub.cli("status", "-o", "ndjson").splitlines()
        self.see("status -o ndjson", [json.loads(line) for line in lines])
        self.see("train list", hub.json("train", "list"))
        self.see("train show", hub.json("train", "show", "r1"))
        self.see("verify", east.json("verify", "dataset/panels:v1"))
        self.see("pin", hub.json("pin", "dataset/local:v1"))
        self.see("show of a pinned one", hub.json("show", "dataset/local:v1"))
        self.see("unpin", hub.json("unpin", "dataset/local:v1"))
        self.bundle = os.path.join(self.where, "bundle")
        self.see("export", hub.json("export", "dataset/panels:v1", "labels/panels:v1", "--out", self.bundle))
        self.see("import", hub.json("import", self.bundle))
        self.see("gc", hub.json("gc"))
        for path in ("/healthz", "/readyz", "/v1/deliveries", "/v1/doctor", "/v1/runs", "/v1/transfers", "/v1/artifacts"):
            self.see(f"GET {path}", json.loads(hub.get(path)[0]))
        self.layouts()

    def layouts(self):
        """What other people's scripts read: names below the NAS root, CURRENT, the schema and the receipts."""
        root = os.path.join(self.east.data, "artifacts")
        self.found["layouts"]["the folder of a name on the NAS"] = sorted(os.listdir(os.path.join(root, "dataset/panels")))
        with open(os.path.join(root, "dataset/panels/CURRENT")) as f:
            self.found["layouts"]["CURRENT"] = f.read()
        self.found["layouts"]["the link to the active version"] = os.readlink(os.path.join(root, "dataset/panels/current"))
        with sqlite3.connect(f"file:{self.east.data}/labels.db?mode=ro", uri=True) as db:
            for view in ("annotations", "current_annotations"):
                self.found["layouts"][f"columns of {view}"] = [row[1] for row in db.execute(f"SELECT * FROM pragma_table_info('{view}')")]
            rows = db.execute("SELECT label_set, version, count(*) FROM current_annotations GROUP BY 1, 2 ORDER BY 1").fetchall()
            self.found["layouts"]["rows of the active versions"] = [list(row) for row in rows]
        self.found["layouts"]["rows"] = self.east.rows("panels")
        self.found["layouts"]["digests of what was published"] = {ref: a["digest"] for ref, a in self.hub.artifacts().items() if not ref.startswith("model/judge")}
        self.found["layouts"]["an image in the OCI layout"] = self.east.image("image/panels:v2")[1]
        receipt = next(t for t in self.hub.json("status") if t["state"] == "done" and t["site"] == "east")["receipt"]
        self.see("statement of a receipt", json.loads(receipt["statement"]))

    def code(self, what, node, *args, env=None, config=True):
        """Runs a command; its exit code, and the `code` of its error in JSON."""
        if config:
            done = node.raw(*args, "-o", "json", env=env)
        else:
            done = command(self.program, *args, "-o", "json", env=env)
        code = None
        for line in done.stderr.splitlines():
            if line.startswith("{"):
                code = json.loads(line).get("code")
                self.see(f"error: {what}", json.loads(line))
        self.found["codes"][what] = (done.returncode, code)

    def exit_codes(self):
        hub, east, west, s = self.hub, self.east, self.west, self.sources
        place = lambda name: os.path.join(s.where, name)
        done = next(t["id"] for t in hub.json("status") if t["state"] == "done")
        c = self.code
        c("status", hub, "status")
        c("status of an unknown transfer", hub, "status", "t-nope")
        c("status of an unknown delivery", hub, "status", "d-nope")
        c("show of an unknown artifact", hub, "show", "dataset/nope:v1")
        c("show of no reference", hub, "show", "nonsense")
        c("an unknown command", hub, "fly")
        c("an unknown option", hub, "status", "--fast")
        c("publish of a path that does not exist", hub, "publish", "/nowhere/at/all", "--as", "dataset/x:v1")
        c("publish under a bad name", hub, "publish", s.operator("panels"), "--as", "dataset/Bad Name:v1")
        c("publish of an unknown kind", hub, "publish", s.operator("panels"), "--as", "film/x:v1")
        c("publish of the same again", hub, "publish", s.operator("panels"), "--as", "operator/panels:v1")
        c("publish of other content under a reference", hub, "publish", s.operator("other"), "--as", "operator/panels:v1")
        c("publish of a link that leaves the folder", hub, "publish", place("outside"), "--as", "dataset/x:v1")
        c("publish of a name that is not UTF-8", hub, "publish", place("latin1"), "--as", "dataset/x:v1")
        c("publish of malformed labels", hub, "publish", place("bad.csv"), "--as", "labels/x:v1")
        c("publish of labels for an unknown dataset", hub, "publish", s.labels("panels"), "--as", "labels/x:v1", "--for", "dataset/nope:v1")
        c("publish of an image that is none", hub, "publish", place("no-image"), "--as", "image/x:v1")
        c("publish of the daemon's own directory", hub, "publish", hub.data, "--as", "dataset/x:v1")
        c("publish to an unknown site", hub, "publish", s.operator("panels"), "--as", "operator/panels:v1", "--to", "nowhere")
        c("publish --hub with a bad token", hub, "publish", s.operator("panels"), "--as", "operator/x:v1", "--hub", f"127.0.0.1:{self.world.port}",
          "--join-token", "nonsense", "--state", place("state"), config=False)
        c("deliver of an unknown artifact", hub, "deliver", "dataset/nope:v1", "--to", "east")
        c("deliver to an unknown site", hub, "deliver", "dataset/panels:v1", "--to", "nowhere")
        c("deliver to a bad selection", hub, "deliver", "dataset/panels:v1", "--to", "region=")
        c("deliver --wait --timeout to a site that is away", hub, "deliver", "model/panels:v1", "--to", "north", "--wait", "--timeout", "1s")
        c("deliver --timeout without a unit", hub, "deliver", "model/panels:v1", "--to", "north", "--wait", "--timeout", "1")
        c("deliver of what is there", hub, "deliver", "dataset/panels:v1", "--to", "east", "--wait")
        c("plan of an unknown artifact", hub, "plan", "dataset/nope:v1", "--to", "east")
        c("plan at a site", east, "plan", "dataset/panels:v1", "--to", "east")
        c("pause of what is done", hub, "pause", done)
        c("resume of what is done", hub, "resume", done)
        c("cancel of what is done", hub, "cancel", done)
        c("cancel of what is cancelled", hub, "cancel", self.cancelled)
        c("pause of an unknown transfer", hub, "pause", "t-nope")
        c("verify", east, "verify", "dataset/panels:v1")
        c("verify of an unknown artifact", east, "verify", "dataset/nope:v1")
        damaged = os.path.join(east.folder("operator/panels:v1"), "main.py")
        with open(damaged, "ab") as f:
            f.write(b"# changed")
        c("verify of what was damaged", east, "verify", "operator/panels:v1")
        c("verify --repair", east, "verify", "operator/panels:v1", "--repair")
        c("pin of an artifact of the hub", hub, "pin", "dataset/panels:v1")
        c("pin at a site", east, "pin", "dataset/panels:v1")
        c("export into an existing file", hub, "export", "dataset/panels:v1", "--out", self.bundle)
        c("export of an unknown artifact", hub, "export", "dataset/nope:v1", "--out", os.path.join(self.where, "none"))
        c("export of what a site published", hub, "export", "dataset/local:v1", "--out", os.path.join(self.where, "none"))
        c("import of what is no bundle", hub, "import", place("bundle"))
        c("import of a file that does not exist", hub, "import", "/nowhere/at/all")
        c("import at a site", east, "import", self.bundle)
        c("gc at a site", east, "gc")
        c("token create for `all`", hub, "token", "create", "--site", "all")
        c("token create at a site", east, "token", "create", "--site", "x")
        c("join with a bad token", self.north, "join", "--hub", self.north.line.address, "--token", "nonsense")
        c("join while the daemon runs", east, "join", "--hub", east.line.address, "--token", "nonsense")
        c("join with the configuration of a hub", hub, "join", "--hub", east.line.address, "--token", "nonsense")
        c("serve on a directory that is in use", hub, "serve")
        c("serve with a bad configuration", hub, "serve", "--config", place("bad.toml"), config=False)
        c("config check of a bad configuration", hub, "config", "check", "--config", place("bad.toml"), config=False)
        c("config check of no file", hub, "config", "check", "--config", "/nowhere.toml", config=False)
        c("no daemon at the address", hub, "status", "--api", "http://127.0.0.1:1", "--token-file", os.path.join(hub.data, "api-token"), config=False)
        with open(os.path.join(self.where, "wrong-token"), "w") as f:
            f.write("0" * 64)
        c("a wrong API token", hub, "status", "--api", f"http://127.0.0.1:{hub.api}", "--token-file", os.path.join(self.where, "wrong-token"), config=False)
        c("train start on the site itself", hub, "train", "start", "--name", "x", "--from", "east", "--on", "east", "--input", "dataset/panels:v1", "--expect", "model/x")
        c("train start with an unknown input", hub, "train", "start", "--name", "x", "--from", "east", "--on", "west", "--input", "dataset/nope:v1", "--expect", "model/x")
        c("train start at an unknown site", hub, "train", "start", "--name", "x", "--from", "east", "--on", "nowhere", "--input", "dataset/panels:v1", "--expect", "model/x")
        c("train start under a name in use", hub, "train", "start", "--name", "r1", "--from", "east", "--on", "west", "--input", "dataset/panels:v1", "--expect", "model/x")
        c("train show of an unknown run", hub, "train", "show", "nope")
        c("train cancel of what is done", hub, "train", "cancel", "r1")
        c("train finish of what is done", hub, "train", "finish", "r1")
