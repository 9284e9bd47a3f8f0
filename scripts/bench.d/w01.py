"""W1: one file of 2 GiB, incompressible, hub to site: (a) on loopback, (b) between two namespaces joined by veth at MTU 1500."""

import data
import link
from lab import GIB, RUNS, Farm, folder, landed, median, rate, remove, same_content, say, scaled, scratch, span
from peers import RsyncDaemon, RsyncSsh

SIZE = scaled(2 * GIB)


def source():
    return data.random_file(scratch("w1", "src", "model.bin"), SIZE, "w1")


def run(results):
    path = source()
    measure(results, "W1a", path, (1.3, 3.0))
    with link.Veth() as net:
        measure(results, "W1b", path, (0.9, 2.5), net)
    remove(folder("w1"))


def measure(results, label, path, targets, net=None, more="", peers=True):
    """Packhorse, the rsync daemon and rsync over ssh in turn, each into an empty place; without peers, the transfers' own times."""
    where = {"netns": net.a, "client_netns": net.b, "address": net.address_a} if net else {}
    farm = Farm(label, net and net.a, net.address_a if net else "127.0.0.1", net and net.b)
    farm.hub.publish(path, "model/w1:v1")
    ours, own, cpu, daemon, ssh = [], [], [], [], []
    base = path.rsplit("/", 1)[0]
    rsyncd = RsyncDaemon(label, base, **where) if peers else None
    sshd = RsyncSsh(base, **where) if peers else None
    for i in range(RUNS):
        site = farm.site(f"s{i}", more)
        before = farm.hub.cpu() + site.cpu()
        took, (transfer,) = farm.hub.deliver("model/w1:v1", site.name)
        cpu.append(farm.hub.cpu() + site.cpu() - before)
        ours.append(took)
        own.append(span(transfer))
        if i == 0:
            same_content(path, f"{landed(site, 'model/w1:v1')}/model.bin")
            lines = farm.hub.json("sites")
            say(f"{label}: line {[s['line'] for s in lines]}, wire {transfer['bytes']['wire'] / SIZE:.4f} of the file")
        farm.drop(site)
        for peer, times in ((rsyncd, daemon), (sshd, ssh)):
            if peer:
                into = folder("w1", "into")
                times.append(peer.pull(into)[0])
                remove(into)
    say(f"{label}: the transfers' own times {median(own):.2f} s, processor time of both daemons {median(cpu):.2f} s")
    farm.close()
    if not peers:
        return own
    rsyncd.close()
    sshd.close()
    for name, times, target in (("rsync daemon", daemon, targets[0]), ("rsync over ssh", ssh, targets[1])):
        ratio = median(times) / median(ours)
        results.add(label, f"{SIZE / GIB:.2f} GiB, {name}", rate(SIZE, ours), rate(SIZE, times), f"{ratio:.2f} ×", f"≥ {target} ×", ratio >= target)
    return ours
