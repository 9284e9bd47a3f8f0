"""W14: one file of 1 GiB from site to site through the hub, against the direct way; what four receivers cost the source's uplink; the
hub's memory while it relays 10 GiB between a fast source and a sink at 1 MB/s."""

import urllib.request

import os
import time

import data
import link
import w07
from lab import GIB, MIB, RUNS, Farm, folder, landed, median, remove, same_content, say, scaled, scratch, seconds

SIZE = scaled(1024 * MIB)
RECEIVERS = 4
LONG = scaled(10 * GIB)
# So long the sink stays behind the slow line; then it goes on without it, for 10 GiB at 1 MB/s take three hours.
SLOW_SECONDS = scaled(180, 10)


def uplinked(hub):
    """Bytes that crossed the lines from sites for the relay so far, as the hub counts them."""
    with open(f"{hub.data}/api-token") as f:
        token = f.read().strip()
    request = urllib.request.Request(f"http://127.0.0.1:{hub.api}/metrics", headers={"X-Packhorse-Token": token})
    with urllib.request.urlopen(request, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("packhorse_relay_wire_bytes "))


def fresh(run):
    return data.random_file(scratch("w14", f"{run}.bin"), SIZE, "w14", run)


def run(results):
    direct, relayed = [], []
    for r in range(RUNS):
        farm = Farm(f"W14-{r}")
        source, sink = farm.site("source"), farm.site("sink")
        path = fresh(f"direct-{r}")
        farm.hub.publish(path, "model/direct:v1")
        took, _ = farm.hub.deliver("model/direct:v1", "sink")
        direct.append(took)
        remove(path)
        path = fresh(f"relayed-{r}")
        source.publish(path, "model/relayed:v1")
        took, _ = farm.hub.deliver("model/relayed:v1", "sink")
        relayed.append(took)
        same_content(path, f"{landed(sink, 'model/relayed:v1')}/relayed-{r}.bin")
        remove(path)
        farm.close()
    ratio = median(direct) / median(relayed)
    rate = [f"{SIZE / 1e6 / median(times):.0f} MB/s ({seconds(times)})" for times in (relayed, direct)]
    results.add("W14", f"site to site, {SIZE / MIB:.0f} MiB", rate[0], f"hub to site: {rate[1]}", f"{ratio:.2f} ×", "≥ 0.6 ×", ratio >= 0.6)

    farm = Farm("W14-many")
    source = farm.site("source")
    names = [f"sink{i}" for i in range(RECEIVERS)]
    for name in names:
        farm.site(name)
    path = fresh("one")
    source.publish(path, "model/one:v1")
    before = uplinked(farm.hub)
    farm.hub.deliver("model/one:v1", names[0])
    one = uplinked(farm.hub) - before
    remove(path)
    path = fresh("many")
    source.publish(path, "model/many:v1")
    before = uplinked(farm.hub)
    farm.hub.deliver("model/many:v1", ",".join(names))
    many = uplinked(farm.hub) - before
    say(f"W14: the source sent {one / 1e6:.0f} MB for one receiver, {many / 1e6:.0f} MB for {RECEIVERS}")
    ratio = many / one
    results.add("W14", f"the source's uplink for {RECEIVERS} receivers", f"{many / 1e6:.1f} MB", f"for one: {one / 1e6:.1f} MB", f"{ratio:.3f} ×", "≤ 1.01 ×", ratio <= 1.01)
    farm.close()
    remove(folder("w14"))
    memory(results)


def memory(results):
    where = w07.room(int(LONG * 3.2))
    source_file = os.path.join(where, "src", "model.bin")
    data.random_file(source_file, LONG, "w14-long")
    with link.Emulated(rate_mbit=8) as net:
        farm = Farm("W14-memory", net.a, net.address_a, net.a, where=os.path.join(where, "farm"))
        source = farm.site("source")
        sink = farm.site("sink", netns=net.b)
        source.publish(source_file, "model/long:v1")
        tid = farm.hub.json("deliver", "model/long:v1", "--to", "sink")["transfers"][0]
        time.sleep(SLOW_SECONDS)
        slow = farm.hub.transfer(tid)["bytes"]["received"]
        peak_slow = farm.hub.peak()
        sink.stop()
        sink.netns = net.a
        sink.start()
        farm.hub.cli("deliver", "model/long:v1", "--to", "sink", "--wait")
        same_content(source_file, f"{landed(sink, 'model/long:v1')}/model.bin")
        peak = farm.hub.peak()
        say(f"W14: {slow / MIB:.0f} MiB came in {SLOW_SECONDS} s of the slow line, the hub's peak then {peak_slow / MIB:.0f} MiB")
        farm.close()
    remove(where)
    results.add("W14", f"hub's peak memory, {LONG / GIB:.1f} GiB relayed, {SLOW_SECONDS} s of it at 1 MB/s", f"{peak / MIB:.0f} MiB", "-", "-", "≤ 256 MiB", peak <= w07.LIMIT)
