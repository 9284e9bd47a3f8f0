"""W10: kill -9 the site, then the hub, at random moments of W1: nothing is sent again but what was not committed yet."""

import time

import data
import link
from lab import GIB, MIB, Farm, folder, landed, median, remove, rng, same_content, say, scaled, scratch

SIZE = scaled(2 * GIB)
KILLS = scaled(20, 2)
AGAIN_MAX = 64 * MIB


def run(results):
    # A loopback of our own counts what really crossed it: a daemon that is killed forgets what it had not noted yet.
    with link.Alone() as net, link.inside(net.a):
        measure(results)
    remove(folder("w10"))


def measure(results):
    path = data.random_file(scratch("w10", "src", "model.bin"), SIZE, "w1")
    farm = Farm("W10")
    say(f"W10: {KILLS} kills, the site and the hub in turn")
    farm.hub.publish(path, "model/w10:v1")
    site = farm.site("calm")
    before = link.loopback_bytes()
    calm, _ = farm.hub.deliver("model/w10:v1", "calm")
    undisturbed = link.loopback_bytes() - before
    farm.drop(site)
    gen = rng("w10")
    again, first, wrong = [], {"site": [], "hub": []}, 0
    for i in range(KILLS):
        victim = ("site", "hub")[i % 2]
        site = farm.site(f"s{i}")
        before = link.loopback_bytes()
        tid = farm.hub.json("deliver", "model/w10:v1", "--to", site.name)["transfers"][0]
        time.sleep(gen.uniform(0.05, 0.85) * calm)
        daemon = site if victim == "site" else farm.hub
        daemon.kill()
        daemon.start()
        first[victim].append(first_byte(farm.hub, tid, time.monotonic(), link.loopback_bytes()))
        farm.hub.cli("deliver", "model/w10:v1", "--to", site.name, "--wait")
        b = farm.hub.transfer(tid)["bytes"]
        # What was on the way to the dead, and a few looks at the status, are in it.
        again.append(link.loopback_bytes() - before - undisturbed)
        try:
            same_content(path, f"{landed(site, 'model/w10:v1')}/model.bin")
        except Exception as e:
            wrong += 1
            say(f"W10: {e}")
        say(f"W10: killed the {victim}: {again[-1] / MIB:.1f} MiB again, resumed {b['resumed'] / MIB:.0f} MiB, first byte after {first[victim][-1]} s")
        farm.drop(site)
    farm.close()
    worst = max(again)
    results.add("W10", f"{KILLS} kills: sent again", f"at most {worst / MIB:.1f} MiB, median {median(again) / MIB:.1f}", "-", "-", "≤ 64 MiB", worst <= AGAIN_MAX)
    for victim, times in first.items():
        seen = [t for t in times if t is not None]
        if seen:
            results.add("W10", f"first new byte after the {victim} is ready", f"at most {max(seen):.2f} s, median {median(seen):.2f}", "-", "-", "≤ 1 s", max(seen) <= 1)
    results.add("W10", "content", f"{KILLS - wrong} of {KILLS} right", "-", "-", "every time", wrong == 0)


def first_byte(hub, tid, ready, seen):
    """Seconds from ready until data flows again, by the loopback's counter; None when there was none left to come."""
    look = ready + 1
    while time.monotonic() - ready < 60:
        # What a line needs to stand is kilobytes; a megabyte is data.
        if link.loopback_bytes() - seen > MIB:
            return round(time.monotonic() - ready, 3)
        if time.monotonic() > look:
            look += 1
            if hub.transfer(tid)["state"] == "done":
                return None
        time.sleep(0.005)
    return 60.0
