"""W2: 20,000 files, log-normal around 40 KB, 1.2 GB."""

import data
from lab import RUNS, Farm, folder, landed, median, remove, same_content, say, scaled, scratch, seconds, span
from peers import RsyncDaemon

COUNT = scaled(20_000)


def run(results):
    tree = scratch("w2", "src")
    total = data.photos(tree, COUNT, "w2")
    farm = Farm("W2")
    farm.hub.publish(tree, "dataset/w2:v1")
    rsyncd = RsyncDaemon("w2", tree)
    ours, own, cpu, theirs = [], [], [], []
    for i in range(RUNS):
        site = farm.site(f"s{i}")
        before = farm.hub.cpu(), site.cpu()
        took, (transfer,) = farm.hub.deliver("dataset/w2:v1", site.name)
        cpu.append((farm.hub.cpu() - before[0], site.cpu() - before[1]))
        ours.append(took)
        own.append(span(transfer))
        if i == 0:
            same_content(tree, landed(site, "dataset/w2:v1"))
        farm.drop(site)
        into = folder("w2", "into")
        theirs.append(rsyncd.pull(into)[0])
        remove(into)
    say(f"W2: {total / 1e9:.2f} GB; own times {median(own):.2f} s; processor seconds of hub, site: {cpu}")
    ratio = median(theirs) / median(ours)

    def shown(times):
        return f"{COUNT / median(times):.0f} files/s ({seconds(times)})"

    results.add("W2", f"{COUNT} files, rsync daemon", shown(ours), shown(theirs), f"{ratio:.2f} ×", "≥ 1.5 ×", ratio >= 1.5)
    rsyncd.close()
    farm.close()
    remove(folder("w2"))
