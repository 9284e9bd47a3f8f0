"""Two network namespaces and what joins them: a veth pair, or a long line (tc netem where the kernel has it, else the
emulator in longline.c)."""

import contextlib
import ctypes
import itertools
import os
import subprocess

from lab import Trouble, at_end, end, need_root, run, say, scratch, start, wait_for

_numbers = itertools.count()


class Namespaces:
    """Two namespaces of our own, `a` for the hub and `b` for the sites."""

    def __init__(self):
        need_root("making network namespaces")
        mark = f"phb{os.getpid()}-{next(_numbers)}"
        self.a, self.b = f"{mark}a", f"{mark}b"

    def __enter__(self):
        for ns in (self.a, self.b):
            run(["ip", "netns", "add", ns])
            at_end(lambda ns=ns: subprocess.run(["ip", "netns", "del", ns], capture_output=True))
            run(["ip", "-n", ns, "link", "set", "lo", "up"])
            # Buffers of TCP that fill 200 Mbit/s × 100 ms several times over, for the peers' sake.
            for setting in ("net.ipv4.tcp_rmem=4096 131072 33554432", "net.ipv4.tcp_wmem=4096 131072 33554432"):
                run(["ip", "netns", "exec", ns, "sysctl", "-q", "-w", setting])
        self.join()
        return self

    def __exit__(self, *_):
        self.part()
        for ns in (self.a, self.b):
            subprocess.run(["ip", "netns", "del", ns], capture_output=True)

    def sysctl(self, setting):
        for ns in (self.a, self.b):
            run(["ip", "netns", "exec", ns, "sysctl", "-q", "-w", setting])

    def join(self):
        raise NotImplementedError

    def part(self):
        pass


class Alone(Namespaces):
    """Nothing but a loopback of our own, whose counters then count our bytes only."""

    def join(self):
        pass


@contextlib.contextmanager
def inside(ns):
    """Runs the bench itself in a namespace: what it starts meanwhile is there as well."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(path):
        with open(path) as f:
            if libc.setns(f.fileno(), 0x4000_0000) != 0:  # CLONE_NEWNET
                raise Trouble(f"cannot enter {path}: {os.strerror(ctypes.get_errno())}")

    home = f"/proc/{os.getpid()}/fd/{os.open('/proc/self/ns/net', os.O_RDONLY)}"
    enter(f"/run/netns/{ns}")
    try:
        yield
    finally:
        enter(home)
        os.close(int(home.rsplit("/", 1)[1]))


def loopback_bytes():
    """What went over this namespace's loopback so far, headers and acknowledgements included."""
    with open("/proc/net/dev") as f:
        return next(int(line.split(":")[1].split()[0]) for line in f if line.strip().startswith("lo:"))


class Veth(Namespaces):
    """A veth pair at MTU 1500."""

    address_a, address_b = "10.78.0.1", "10.78.0.2"

    def join(self):
        # Made within a: in the host's namespace the names could meet others'.
        run(["ip", "-n", self.a, "link", "add", "va", "mtu", "1500", "type", "veth", "peer", "name", "vb", "mtu", "1500", "netns", self.b])
        for ns, dev, address in ((self.a, "va", self.address_a), (self.b, "vb", self.address_b)):
            run(["ip", "-n", ns, "addr", "add", f"{address}/24", "dev", dev])
            run(["ip", "-n", ns, "link", "set", dev, "up"])


def _has_netem():
    if os.geteuid() != 0:
        return False
    ns = f"phb{os.getpid()}-probe"
    subprocess.run(["ip", "netns", "add", ns], capture_output=True)
    done = subprocess.run(["ip", "netns", "exec", ns, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"], capture_output=True)
    subprocess.run(["ip", "netns", "del", ns], capture_output=True)
    return done.returncode == 0


NETEM = _has_netem()
KIND = "tc netem" if NETEM else "our own emulator (longline.c)"


def _emulator():
    binary = scratch("longline")
    if not os.path.exists(binary):
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "longline.c")
        run(["gcc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", binary, source])
    return binary


class Emulated(Namespaces):
    """A line of this one-way delay, rate (0: no limit), and loss each way, with 100 ms of queue, at MTU 1500."""

    def __init__(self, delay_ms=0, rate_mbit=0, loss=0):
        super().__init__()
        self.delay_ms, self.rate_mbit, self.loss = delay_ms, rate_mbit, loss
        self.child = None
        self.address_a, self.address_b = (Veth.address_a, Veth.address_b) if NETEM else ("10.77.0.1", "10.77.0.2")

    def join(self):
        if NETEM:
            Veth.join(self)
            for ns, dev in ((self.a, "va"), (self.b, "vb")):
                # What is on the way counts against netem's limit besides what waits.
                packets = int(self.rate_mbit * 1e6 / 8 / 1500 * (self.delay_ms + 100) / 1000) or 100_000
                netem = ["delay", f"{self.delay_ms}ms", "loss", f"{self.loss:%}", "limit", str(packets)]
                rate = ["rate", f"{self.rate_mbit}mbit"] if self.rate_mbit else []
                run(["ip", "netns", "exec", ns, "tc", "qdisc", "add", "dev", dev, "root", "netem", *netem, *rate])
                # Loss and rate count packets on a wire, not the kernel's bundles of them.
                subprocess.run(["ip", "netns", "exec", ns, "ethtool", "-K", dev, "gso", "off", "tso", "off", "gro", "off"], capture_output=True)
            return
        if not os.path.exists("/dev/net/tun"):
            raise Trouble("the kernel has neither tc netem nor /dev/net/tun")
        log = scratch(f"{self.a}.log")
        options = [f"delay-ms={self.delay_ms}", f"rate-mbit={self.rate_mbit}", f"loss={self.loss}"]
        self.log = log
        self.child = start([_emulator(), self.a, self.b, *options], log)

        def up():
            if self.child.poll() is not None:
                with open(log) as f:
                    raise Trouble(f"the link emulator ended: {f.read()}")
            with open(log) as f:
                return "ready" in f.read()

        wait_for("the link emulator is ready", up, 10)

    def part(self):
        if self.child:
            end(self.child)
            with open(self.log) as f:
                carried = [line.strip() for line in f if "carried" in line]
            if self.rate_mbit and self.delay_ms:
                say("line: " + "; ".join(carried))
