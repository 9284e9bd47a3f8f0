"""Hubs and sites of either program, each behind a line of its own that can be slowed down and that counts."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request

from checks import expect, same_tree
from lab import Daemon, Trouble, clean_env, end, free_port, start, wait_for

COMMAND_SECONDS = 180


class Line:
    """Forwards UDP and TCP of one port to the hub. `rate` holds bytes a second for each direction, None for no limit."""

    def __init__(self, target, udp=True):
        self.target, self.port = target, free_port()
        self.rate, self.passed, self.free_at = {"up": None, "down": None}, {"up": 0, "down": 0}, {"up": 0.0, "down": 0.0}
        self.lock, self.closed = threading.Lock(), False
        tcp = socket.create_server(("127.0.0.1", self.port))
        self._thread(self._accept, tcp)
        if udp:
            door = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            door.bind(("127.0.0.1", self.port))
            self._thread(self._packets_up, door)

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def slow(self, down=None, up=None):
        self.rate = {"up": up, "down": down}

    def close(self):
        self.closed = True

    def _thread(self, work, *args):
        threading.Thread(target=work, args=args, daemon=True).start()

    def _take(self, direction, size):
        """Waits until the line may carry so many bytes more."""
        with self.lock:
            self.passed[direction] += size
            rate = self.rate[direction]
            if rate is None:
                return
            now = time.monotonic()
            until = self.free_at[direction] = max(self.free_at[direction], now) + size / rate
        # Short waits are collected: a sleep takes longer than they are.
        if until - now > 0.003:
            time.sleep(min(until - now, 1))

    def _accept(self, tcp):
        tcp.settimeout(0.5)
        while not self.closed:
            with contextlib.suppress(OSError):
                near, _ = tcp.accept()
                try:
                    far = socket.create_connection(self.target, 5)
                except OSError:
                    near.close()
                    continue
                for pair in ((near, far, "up"), (far, near, "down")):
                    pair[0].settimeout(None)
                    self._thread(self._stream, *pair)
        tcp.close()

    def _stream(self, source, sink, direction):
        with contextlib.suppress(OSError):
            while not self.closed and (data := source.recv(16384)):
                self._take(direction, len(data))
                sink.sendall(data)
        for end_of in (source, sink):
            with contextlib.suppress(OSError):
                end_of.shutdown(socket.SHUT_RDWR)

    def _packets_up(self, door):
        door.settimeout(0.5)
        peers = {}
        while not self.closed:
            try:
                data, client = door.recvfrom(65536)
            except OSError:
                continue
            if client not in peers:
                far = peers[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                # What waits in this buffer is the queue of the line when it is slow.
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 512 << 10)
                far.connect(self.target)
                self._thread(self._packets_down, door, far, client)
            self._take("up", len(data))
            with contextlib.suppress(OSError):
                peers[client].send(data)
        door.close()

    def _packets_down(self, door, far, client):
        far.settimeout(0.5)
        while not self.closed:
            with contextlib.suppress(OSError):
                data = far.recv(65536)
                self._take("down", len(data))
                door.sendto(data, client)
        far.close()


def knows_train_allow(program, where, known={}):
    """Whether a site's `[train]` has `allow`, and needs it."""
    if program not in known:
        path = os.path.join(where, "allow.toml")
        with open(path, "w") as f:
            f.write(f'role = "site"\nname = "s"\ndata_dir = "{where}/none"\n[hub]\naddress = "127.0.0.1:1"\n[train]\ncommand = ["/bin/true"]\nallow = ["all"]\n')
        known[program] = command(program, "config", "check", "--config", path).returncode == 0
    return known[program]


def command(program, *args, env=None):
    """Runs a command to its end, whatever its exit code."""
    argv = [program, *map(str, args)]
    try:
        return subprocess.run(argv, env=env or clean_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired as e:
        raise Trouble(f"`{' '.join(argv[1:])}` did not end within {COMMAND_SECONDS} s") from e


class Node(Daemon):
    """A daemon and the program that it runs; `program` can be changed between two starts."""

    def __init__(self, world, name, program, config):
        super().__init__(world.where, name, config)
        self.world, self.program, self.line = world, program, None

    def start(self, wait=True):
        self.child = start([self.program, "serve", "--config", self.config], self.log)
        if wait:
            self.wait_ready()

    def restart_as(self, program):
        self.program = program
        self.start()

    def add_config(self, text):
        with open(self.config, "a") as f:
            f.write(text)

    def raw(self, *args, program=None, env=None):
        """Runs a command of this daemon's program, or of another one, which may not know its configuration."""
        if program in (None, self.program):
            return command(self.program, *args, "--config", self.config, env=env)
        token = os.path.join(self.data, "api-token")
        return command(program, *args, "--api", f"http://127.0.0.1:{self.api}", "--token-file", token, env=env)

    def cli(self, *args, ok=(0,), env=None, program=None):
        done = self.raw(*args, program=program, env=env)
        if done.returncode not in ok:
            text = " ".join(map(str, args))
            raise Trouble(f"`{text}` at {self.name} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-700:]}")
        return done.stdout

    def json(self, *args, ok=(0,), program=None):
        return json.loads(self.cli(*args, "-o", "json", ok=ok, program=program))

    def token(self):
        with open(os.path.join(self.data, "api-token")) as f:
            return f.read().strip()

    def open(self, path, headers=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.api}{path}", headers={"X-Packhorse-Token": self.token()} | (headers or {}))
        return urllib.request.urlopen(request, timeout=30)

    def get(self, path):
        """A GET of the API: the body and the headers."""
        with self.open(path) as answer:
            return answer.read().decode(), answer.headers

    def stream(self, since, until):
        """The events of the stream after a number, to another: the lines of each by their names."""
        found, event = [], {}
        with self.open("/v1/events", {"Accept": "text/event-stream", "Last-Event-ID": str(since)}) as answer:
            while not found or int(found[-1].get("id", until)) < until:
                line = answer.readline().decode()
                expect(line, "the stream ended")
                name, _, value = line.rstrip("\n").partition(":")
                if name:
                    event[name] = value.strip()
                elif "data" in event:
                    found.append(event)
                    event = {}
        return found

    def events(self, since=0, limit=1000):
        """All events after a number, page by page; and the number to continue from."""
        found, cursor = [], since
        while True:
            body, headers = self.get(f"/v1/events?format=json&since={cursor}&limit={limit}")
            page = json.loads(body)
            if not page:
                return found, cursor
            found += page
            cursor = int(headers["X-Packhorse-Cursor"])

    def artifacts(self):
        return {a["artifact"]: a for a in self.json("artifacts")}

    def transfers(self):
        return {t["id"]: t for t in self.json("status")}

    def publish(self, source, ref, *more):
        kind = ref.split("/")[0]
        if self.world.plain_files and kind in ("dataset", "operator", "model") and "--no-times" in command(self.program, "publish", "--help").stdout:
            more = (*more, "--no-times")
        return self.json("publish", source, "--as", ref, *more)

    def deliver(self, refs, to, *more, **kw):
        """Delivers; the ids of the transfers."""
        return self.json("deliver", *([refs] if isinstance(refs, str) else refs), "--to", to, *more, **kw)["transfers"]

    def wait_state(self, tid, *states, seconds=120):
        """Waits until a transfer has one of these states; the transfer."""
        last = {}

        def there():
            last.update(self.transfer(tid))
            expect(last["state"] in states or last["state"] not in ("failed", "cancelled"), lambda: describe(last))
            return last["state"] in states and last

        try:
            return wait_for(f"transfer {tid} is {' or '.join(states)}", there, seconds, 0.1)
        except Trouble as e:
            raise Trouble(f"{e}; now {describe(last)}") from e

    def wait_committed(self, tid, least, seconds=60):
        return wait_for(f"{least} bytes of {tid} are committed", lambda: self.transfer(tid)["bytes"]["committed"] >= least, seconds, 0.1)

    def folder(self, ref):
        kind, rest = ref.split("/", 1)
        return os.path.join(self.data, "artifacts", kind, *rest.rsplit(":", 1))

    def rows(self, label_set=None):
        """The rows that a reader of the label database sees."""
        columns = "label_set, version, sample_path, sample_hash, class, kind, x, y, w, h, geom, attrs, raw"
        with contextlib.closing(sqlite3.connect(f"file:{self.data}/labels.db?mode=ro", uri=True)) as db:
            found = sorted(map(repr, db.execute(f"SELECT {columns} FROM annotations")))
        return [row for row in found if label_set is None or row.startswith(f"({label_set!r},")]

    def image(self, ref):
        """{tag's digest and blobs} of an image in the OCI layout of this site."""
        name, version = ref.split("/", 1)[1].rsplit(":", 1)
        root = os.path.join(self.data, "images", name)
        with open(os.path.join(root, "index.json")) as f:
            entries = [m for m in json.load(f)["manifests"] if m.get("annotations", {}).get("org.opencontainers.image.ref.name") == version]
        expect(len(entries) == 1, f"{root} has {len(entries)} images with the tag {version}")
        return root, entries[0]["digest"]


def describe(transfer):
    return f"{transfer.get('artifact')} to {transfer.get('site')} is {transfer.get('state')}, {transfer.get('reason')}: {transfer.get('message')}"


class World:
    """A hub and its sites below one folder. Each site reaches the hub through its own line."""

    def __init__(self, where, hub_program, plain_files=False):
        """`plain_files`: files are published without what programs of before did not keep, so that the digests can be compared."""
        os.makedirs(where)
        self.plain_files = plain_files
        self.where, self.port, self.sites, self.lines = where, free_port(), {}, []
        config = 'role = "hub"\nname = "{{name}}"\ndata_dir = "{{data}}"\n[listen]\napi = "127.0.0.1:{{api}}"\nquic = "127.0.0.1:{}"\n'
        self.hub = Node(self, "hub", hub_program, config.format(self.port))
        self.hub.start()

    def new_line(self, udp=True):
        self.lines.append(Line(("127.0.0.1", self.port), udp))
        return self.lines[-1]

    def site(self, name, program, transport="auto", more="", labels=(), run=True):
        config = 'role = "site"\nname = "{name}"\ndata_dir = "{data}"\n[listen]\napi = "127.0.0.1:{api}"\n[hub]\naddress = "HUB"\n[line]\ntransport = "WAY"\n'
        line = self.new_line()
        site = Node(self, name, program, config.replace("HUB", line.address).replace("WAY", transport) + more)
        site.line = line
        token = self.hub.cli("token", "create", "--site", name, *(x for label in labels for x in ("--label", label))).strip()
        site.cli("join", "--hub", line.address, env=clean_env(PACKHORSE_JOIN_TOKEN=token))
        self.sites[name] = site
        if run:
            site.start()
            self.wait_online(name)
        return site

    def wait_online(self, *names):
        for name in names or self.sites:
            wait_for(f"{name} is connected", lambda: any(s["name"] == name and s["online"] for s in self.hub.json("sites")), 90, 0.1)

    def nodes(self):
        return [self.hub, *self.sites.values()]

    def full_speed(self):
        for line in self.lines:
            line.slow()

    def close(self):
        for node in [*self.sites.values(), self.hub]:
            node.stop()
        for line in self.lines:
            line.close()


def kill(*nodes):
    """Kills daemons as a power cut does."""
    for node in nodes:
        if node.child:
            end(node.child, signal.SIGKILL)
            node.child = None


# ---------------------------------------------------------------------------------------------------------------------
# What a delivered artifact must look like


def assert_delivered(site, ref, source):
    """Raises unless what was published as `ref` is at the site, and its daemon verifies it."""
    kind = ref.split("/", 1)[0]
    if kind == "image":
        root, digest = site.image(ref)
        with open(os.path.join(source, "index.json")) as f:
            expect(digest == json.load(f)["manifests"][0]["digest"], f"{ref} at {site.name} has the digest {digest}")
        for name in os.listdir(os.path.join(source, "blobs", "sha256")):
            same_tree(os.path.join(source, "blobs", "sha256", name), os.path.join(root, "blobs", "sha256"))
    elif kind == "labels":
        name, version = ref.split("/", 1)[1].rsplit(":", 1)
        found = len([row for row in site.rows(name) if row.startswith(f"({name!r}, {version!r},")])
        with open(source) as f:
            wanted = sum(1 for _ in f) - 1
        expect(found == wanted, f"{ref} at {site.name} has {found} rows, not {wanted}")
    else:
        same_tree(source, site.folder(ref))
    site.cli("verify", ref)


# ---------------------------------------------------------------------------------------------------------------------
# A trainer

TRAINER = """
import hashlib, json, os, sys, time
folder, path = sys.argv[1], sys.argv[-1]
run = json.load(open(path))
name = run["run"]
with open(os.path.join(folder, name + ".tmp"), "w") as f:
    json.dump(run, f)
os.rename(os.path.join(folder, name + ".tmp"), os.path.join(folder, name + ".json"))
last = time.monotonic() + 600
while not os.path.exists(os.path.join(folder, name + ".go")):
    # It ends by itself with the folder: nobody has to kill it.
    if time.monotonic() > last or not os.path.isdir(folder):
        sys.exit(9)
    time.sleep(0.05)
total = hashlib.sha256()
root = next(i["path"] for i in run["inputs"] if i["kind"] == "dataset")
for here, folders, files in os.walk(root):
    folders.sort()
    for file in sorted(files):
        total.update(open(os.path.join(here, file), "rb").read())
json.dump({"dataset": total.hexdigest()}, open(os.path.join(run["output"], "model.json"), "w"))
"""


class Trainer:
    """A command trainer that waits until it is let go; `[train]` for a site that runs it."""

    def __init__(self, world):
        self.folder = os.path.join(world.where, "trainer")
        os.makedirs(self.folder, exist_ok=True)
        self.script = os.path.join(self.folder, "trainer.py")
        with open(self.script, "w") as f:
            f.write(TRAINER)

    def config(self, program):
        allow = 'allow = ["all"]\n' if knows_train_allow(program, self.folder) else ""
        return f"[train]\ncommand = {json.dumps([sys.executable, self.script, self.folder])}\n{allow}"

    def wait_begun(self, run):
        path = os.path.join(self.folder, f"{run}.json")
        wait_for(f"the trainer of {run} has begun", lambda: os.path.exists(path), 90, 0.1)
        with open(path) as f:
            return json.load(f)

    def let_go(self, run):
        open(os.path.join(self.folder, f"{run}.go"), "w").close()

    def assert_model(self, site, ref, dataset):
        """Raises unless the model at a site was made of exactly this dataset."""
        total = hashlib.sha256()
        for here, folders, files in os.walk(dataset):
            folders.sort()
            for file in sorted(files):
                with open(os.path.join(here, file), "rb") as f:
                    total.update(f.read())
        with open(os.path.join(site.folder(ref), "model.json")) as f:
            expect(json.load(f)["dataset"] == total.hexdigest(), f"{ref} at {site.name} was made of another dataset")


def train(node, run, inputs, start_at, train_at):
    return node.json("train", "start", "--name", run, "--from", start_at, "--on", train_at, "--expect", "model/judge", "--input", *inputs)


def wait_run(node, run, seconds=120):
    last = {}

    def done():
        last.update(node.json("train", "show", run))
        expect(last["state"] not in ("failed", "cancelled"), lambda: f"run {run} {last['state']}: {last['message']}")
        return last["state"] == "done" and last

    try:
        return wait_for(f"run {run} is done", done, seconds, 0.1)
    except Trouble as e:
        raise Trouble(f"{e}; now {last.get('state')}: {last.get('message')}") from e
