"""The bench's workshop: scratch space, processes, the daemons under test, and the table of results.

Every process that is started here is ended here, by its id. Everything lies below one scratch folder, which is removed
at the end (BENCH_KEEP=1 keeps it).
"""

import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SEED = int(os.environ.get("BENCH_SEED", "20240229"))
SCALE = float(os.environ.get("BENCH_SCALE", "1"))
RUNS = int(os.environ.get("BENCH_RUNS", "3"))
MIB = 1 << 20
GIB = 1 << 30


class Trouble(Exception):
    """Something that keeps a workload from being measured; the others go on."""


def say(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def scaled(n, least=1):
    return max(least, int(n * SCALE))


def need_root(why):
    if os.geteuid() != 0:
        raise Trouble(f"{why} needs root")


# ---------------------------------------------------------------------------------------------------------------------
# Scratch


def _make_scratch():
    base = os.environ.get("BENCH_DIR", "/dev/shm")
    path = os.path.join(base, f"packhorse-bench.{os.getpid()}")
    os.makedirs(path)
    return path


ROOT = _make_scratch()


def scratch(*parts):
    path = os.path.join(ROOT, *parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def folder(*parts):
    path = os.path.join(ROOT, *parts)
    os.makedirs(path, exist_ok=True)
    return path


def remove(*paths):
    """Gives the memory of finished data back; tmpfs is memory."""
    for path in paths:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


# What a run uses at the most, unless its workload says more.
touched_bytes = scaled(4 * GIB)


def touch_memory():
    """Touches the memory that a run will use. A virtual machine gives free memory back to its host, and the first touch of a
    page costs several times its writing, whoever happens to touch it: without this the order of the runs decides."""
    with open("/proc/meminfo") as f:
        available = next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))
    path, block = scratch("touched"), bytes(MIB)
    with open(path, "wb") as f:
        for _ in range(min(touched_bytes, available * 3 // 4) // MIB):
            f.write(block)
    remove(path)


def tree_bytes(path):
    total = 0
    for here, _, files in os.walk(path):
        for name in files:
            total += os.lstat(os.path.join(here, name)).st_size
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Processes

_children = []


def clean_env(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PACKHORSE_", "RUST_LOG"))}
    if "BENCH_LOG" in os.environ:
        env["PACKHORSE_LOG"] = os.environ["BENCH_LOG"]
    return env | {"NO_COLOR": "1", "LC_ALL": "C.UTF-8"} | {k: str(v) for k, v in more.items()}


def in_netns(ns, argv):
    return ["ip", "netns", "exec", ns, *argv] if ns else list(argv)


def start(argv, log, env=None, user=None, cwd=None):
    """Starts a process that lives until `end`, or until the bench ends."""
    with open(log, "ab") as out:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env or clean_env(), user=user, group=user, cwd=cwd)
    _children.append(child)
    return child


def end(child, sig=signal.SIGTERM, patience=20):
    if child.poll() is None:
        child.send_signal(sig)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child in _children:
        _children.remove(child)


def run(argv, env=None, ok=(0,), timeout=7200, cwd=None, user=None, stdin=None):
    """Runs a command to its end; its standard output."""
    done = subprocess.run(
        argv, env=env or clean_env(), cwd=cwd, user=user, group=user, timeout=timeout, stdin=stdin or subprocess.DEVNULL, capture_output=True
    )
    if done.returncode not in ok:
        tail = (done.stderr or done.stdout).decode(errors="replace").strip()[-2000:]
        raise Trouble(f"{' '.join(map(str, argv))} ended with {done.returncode}: {tail}")
    return done.stdout.decode(errors="replace")


def timed(action, *args, **kw):
    """The seconds an action took, by the clock, and its result. Ours and the peers' alike."""
    touch_memory()
    began = time.monotonic()
    result = action(*args, **kw)
    return time.monotonic() - began, result


def free_port():
    """A port that is free for TCP and UDP alike."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port = tcp.getsockname()[1]
            try:
                udp.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def wait_for(what, test, seconds=60, every=0.02):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = test()
        if result:
            return result
        time.sleep(every)
    raise Trouble(f"waited {seconds} s in vain: {what}")


def wait_port(port, host="127.0.0.1", child=None, seconds=30):
    def there():
        if child is not None and child.poll() is not None:
            raise Trouble(f"{child.args[0]} ended with {child.returncode}")
        with socket.socket() as s:
            s.settimeout(1)
            return s.connect_ex((host, port)) == 0

    wait_for(f"{host}:{port} answers", there, seconds)


@atexit.register
def _end_all():
    for child in list(reversed(_children)):
        end(child, patience=5)
    for undo in reversed(_undo):
        with contextlib.suppress(Exception):
            undo()
    if os.environ.get("BENCH_KEEP") == "1":
        say(f"kept: {ROOT}")
    else:
        shutil.rmtree(ROOT, ignore_errors=True)


_undo = []


def at_end(action):
    _undo.append(action)


# ---------------------------------------------------------------------------------------------------------------------
# Packhorse

_binary = None


def packhorse():
    """The program under test: PACKHORSE_BIN, or the release build of this tree, copied so that a build cannot change it."""
    global _binary
    if _binary is None:
        source = os.environ.get("PACKHORSE_BIN")
        if not source:
            say("cargo build --release")
            subprocess.run(["cargo", "build", "--release", "--locked"], cwd=REPO, check=True, stdout=sys.stderr)
            target = os.environ.get("CARGO_TARGET_DIR", os.path.join(REPO, "target"))
            source = os.path.join(target, "release", "packhorse")
        _binary = shutil.copy(source, scratch("packhorse"))
    return _binary


class Daemon:
    """A hub or a site: its configuration, its process, and the command line bound to it."""

    def __init__(self, where, name, config, netns=None):
        self.name, self.netns, self.where = name, netns, where
        self.data = os.path.join(where, name)
        self.config = os.path.join(where, f"{name}.toml")
        self.log = os.path.join(where, f"{name}.log")
        self.api = free_port()
        self.child = None
        self.peak_before = 0
        os.makedirs(where, exist_ok=True)
        with open(self.config, "w") as f:
            f.write(config.format(name=name, data=self.data, api=self.api))

    def start(self, wait=True):
        self.child = start(in_netns(self.netns, [packhorse(), "serve", "--config", self.config]), self.log)
        if wait:
            self.wait_ready()

    def get(self, path, timeout=5):
        """A GET of the API by HTTP: only without a network namespace."""
        with open(os.path.join(self.data, "api-token")) as f:
            token = f.read().strip()
        request = urllib.request.Request(f"http://127.0.0.1:{self.api}{path}", headers={"X-Packhorse-Token": token})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def ready(self):
        if self.child.poll() is not None:
            with open(self.log, errors="replace") as f:
                raise Trouble(f"{self.name} ended with {self.child.returncode}: {f.read()[-1500:]}")
        if self.netns:
            code = "import sys,urllib.request as u\ntry: u.urlopen(sys.argv[1],timeout=5)\nexcept Exception: sys.exit(1)"
            url = f"http://127.0.0.1:{self.api}/readyz"
            return subprocess.run(in_netns(self.netns, [sys.executable, "-c", code, url])).returncode == 0
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.api}/readyz", timeout=5).close()
            return True
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self):
        wait_for(f"{self.name} is ready", self.ready, 60, 0.01)

    def note_peak(self):
        self.peak_before = self.peak()

    def peak(self):
        """The most memory that was ever resident, in bytes, over all starts."""
        now = 0
        with contextlib.suppress(OSError):
            with open(f"/proc/{self.child.pid}/status") as f:
                for line in f:
                    if line.startswith("VmHWM:"):
                        now = int(line.split()[1]) << 10
        return max(now, self.peak_before)

    def cpu(self):
        """Seconds of processor time that this process took so far."""
        with open(f"/proc/{self.child.pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        if self.child:
            end(self.child)
            self.child = None

    def kill(self):
        self.note_peak()
        end(self.child, signal.SIGKILL)

    def cli(self, *args, ok=(0,), env=None):
        return run(in_netns(self.netns, [packhorse(), *map(str, args), "--config", self.config]), ok=ok, env=env)

    def json(self, *args, ok=(0,)):
        return json.loads(self.cli(*args, "-o", "json", ok=ok))

    def publish(self, source, ref, *more):
        """Publishes; the seconds by the clock around the command, and its answer."""
        return timed(self.json, "publish", source, "--as", ref, *more)

    def deliver(self, ref, to):
        """Delivers and waits for the end; the seconds by the clock around `deliver --wait`, and the transfers."""
        seconds, answer = timed(self.json, "deliver", ref, "--to", to, "--wait")
        transfers = [self.transfer(t) for t in answer["transfers"]]
        for t in transfers:
            if t["state"] != "done":
                raise Trouble(f"{ref} to {t['site']} ended {t['state']}: {t['message']}")
        return seconds, transfers

    def transfer(self, tid):
        return self.json("status", tid)[0]


class Farm:
    """A hub and its sites in one folder."""

    def __init__(self, name, hub_netns=None, hub_address="127.0.0.1", site_netns=None, where=None):
        self.where = where or folder(name)
        self.site_netns = site_netns
        self.port = free_port()
        self.address = f"{hub_address}:{self.port}"
        self.sites = []
        config = 'role = "hub"\nname = "{{name}}"\ndata_dir = "{{data}}"\n[listen]\napi = "127.0.0.1:{{api}}"\nquic = "{}"\n'
        self.hub = Daemon(self.where, "hub", config.format(self.address), hub_netns)
        self.hub.start()

    def site(self, name, more="", netns=None):
        """A site that has joined, runs, and is connected."""
        config = 'role = "site"\nname = "{name}"\ndata_dir = "{data}"\n[listen]\napi = "127.0.0.1:{api}"\n[hub]\naddress = "HUB"\n'
        site = Daemon(self.where, name, config.replace("HUB", self.address) + more, netns or self.site_netns)
        token = self.hub.cli("token", "create", "--site", name).strip()
        join = in_netns(site.netns, [packhorse(), "join", "--config", site.config, "--hub", self.address])
        run(join, env=clean_env(PACKHORSE_JOIN_TOKEN=token))
        site.start()
        self.sites.append(site)
        self.wait_online(name)
        return site

    def wait_online(self, name):
        return wait_for(f"{name} is connected", lambda: [s for s in self.hub.json("sites") if s["name"] == name and s["online"]], 60, 0.05)

    def drop(self, site):
        """Ends a site and frees what it holds."""
        site.stop()
        self.sites.remove(site)
        remove(site.data)

    def close(self):
        for site in self.sites:
            site.stop()
        self.hub.stop()
        if os.environ.get("BENCH_KEEP") != "1":
            remove(self.where)


def landed(site, ref):
    """Where an artifact lies at a site with the default sink."""
    kind, rest = ref.split("/", 1)
    name, version = rest.rsplit(":", 1)
    return os.path.join(site.data, "artifacts", kind, name, version)


def same_content(a, b):
    """Raises unless two files or trees hold the same."""
    done = subprocess.run(["diff", "-rq", "--no-dereference", a, b], capture_output=True, text=True)
    if done.returncode != 0:
        raise Trouble(f"{b} differs from {a}: {done.stdout[:500]}{done.stderr[:500]}")


# ---------------------------------------------------------------------------------------------------------------------
# Results


class Results:
    def __init__(self):
        self.rows = []

    def add(self, workload, what, packhorse, peer, ratio, target, met):
        row = dict(workload=workload, what=what, packhorse=packhorse, peer=peer, ratio=ratio, target=target, met=met)
        self.rows.append(row)
        say(f"{workload} {what}: {packhorse} | {peer} | {ratio} | {target} | {verdict(met)}")
        if "BENCH_OUT" in os.environ:
            with open(os.environ["BENCH_OUT"], "a") as f:
                f.write(json.dumps(row) + "\n")

    def table(self):
        head = ("", "what", "Packhorse", "peer", "ratio", "to reach", "")
        rows = [head] + [(r["workload"], r["what"], r["packhorse"], r["peer"], r["ratio"], r["target"], verdict(r["met"])) for r in self.rows]
        widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
        lines = ["| " + " | ".join(str(c).ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(lines)


def verdict(met):
    return {True: "met", False: "MISSED", None: "-"}[met]


def median(values):
    return statistics.median(values)


def spread(values):
    return f"{min(values):.2f}–{max(values):.2f}"


def seconds(values):
    """A median with its spread, in seconds."""
    return f"{median(values):.2f} s ({spread(values)})"


def rate(size, values):
    return f"{size / median(values) / 1e6:.0f} MB/s ({seconds(values)})"


def rng(*parts):
    """A random generator of its own for each name, so that a workload's data does not depend on what ran before."""
    return random.Random(f"{SEED}/" + "/".join(map(str, parts)))


def span(transfer):
    """The seconds between a transfer's own two times, as the daemon wrote them."""
    from datetime import datetime

    began, ended = (datetime.fromisoformat(transfer[k].replace("Z", "+00:00")) for k in ("created_at", "finished_at"))
    return (ended - began).total_seconds()
