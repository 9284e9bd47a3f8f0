"""W9: 200 MiB over 200 Mbit/s with 100 ms round trip at 0, 0.1 and 1 % loss each way, on a connection that stands."""

import os

import data
import link
from lab import MIB, RUNS, Farm, Trouble, folder, landed, median, remove, same_content, say, scaled, scratch, seconds
from peers import RsyncDaemon

SIZE = scaled(200 * MIB)
RATE_MBIT = 200
CASES = ((0, 0.92), (0.001, 0.91), (0.01, 0.90))


def source():
    return data.random_file(scratch("w9", "src", "model.bin"), SIZE, "w9")


def share(times):
    """The share of the line that the payload used."""
    return SIZE * 8 / median(times) / (RATE_MBIT * 1e6)


def run(results):
    path = source()
    for loss, target in CASES:
        with link.Emulated(delay_ms=50, rate_mbit=RATE_MBIT, loss=loss) as net:
            ours = ours_over(net, path, f"W9-{loss}")
            theirs = rsync_over(net, path)
        used, peer = share(ours), share(theirs)
        what = f"{loss:.1%} loss each way, {link.KIND}"
        results.add("W9", what, f"{used:.1%} of the line ({seconds(ours)})", f"rsync, TCP BBR: {peer:.1%} ({seconds(theirs)})", f"{used / peer:.2f} ×", f"≥ {target:.0%}", used >= target)
    remove(folder("w9"))


def ours_over(net, path, label, more=""):
    farm = Farm(label, net.a, net.address_a, net.b)
    farm.hub.publish(path, "model/w9:v1")
    ours = []
    for i in range(RUNS):
        site = farm.site(f"s{i}", more)
        took, (transfer,) = farm.hub.deliver("model/w9:v1", site.name)
        ours.append(took)
        if i == 0:
            same_content(path, f"{landed(site, 'model/w9:v1')}/model.bin")
            line = [s for s in farm.hub.json("sites") if s["name"] == site.name][0]
            say(f"{label}: line {line['line']}, round trip {line['rtt_ms']} ms, wire {transfer['bytes']['wire'] / SIZE:.4f}, attempts {transfer['attempts']}")
        farm.drop(site)
    farm.close()
    return ours


def rsync_over(net, path):
    try:
        net.sysctl("net.ipv4.tcp_congestion_control=bbr")
    except Trouble as e:
        say(f"W9: no TCP BBR here, rsync runs on the default: {e}")
    rsyncd = RsyncDaemon(f"w9-{net.a}", os.path.dirname(path), net.address_a, net.a, net.b)
    theirs = []
    for _ in range(RUNS):
        into = folder("w9", "into")
        theirs.append(rsyncd.pull(into)[0])
        remove(into)
    rsyncd.close()
    return theirs
