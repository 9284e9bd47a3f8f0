"""W8: one hub and eight sites at once, 256 MiB each; then one of the eight behind a line of 1 MB/s."""

import data
import link
import w01
from lab import MIB, RUNS, Farm, folder, median, remove, scaled, scratch, seconds, span

SITES = 8
SIZE = scaled(256 * MIB)


def together(farm, ref, names):
    """Delivers to all these sites at once; the longest that a quick one took, by the transfers' own times.

    One command waits for all of them: eight would take processor time from what is measured.
    """
    answer = farm.hub.json("deliver", ref, "--to", ",".join(names))
    transfers = [farm.hub.transfer(t) for t in answer["transfers"]]
    quick = ",".join(name for name in names if name != "slow")
    farm.hub.cli("deliver", ref, "--to", quick, "--wait")
    transfers = [farm.hub.transfer(t["id"]) for t in transfers]
    return max(span(t) for t in transfers if t["site"] != "slow")


def run(results):
    path = data.random_file(scratch("w8", "model.bin"), SIZE, "w8")
    alone = w01.measure(results, "W8-one", w01.source(), (0, 0), peers=False)
    one_rate = w01.SIZE / median(alone)
    remove(folder("w1"))

    def sweep(label, slow):
        """Each run with fresh sites; the seconds until the last of the quick ones was done."""
        lasts = []
        for r in range(RUNS):
            with link.Emulated(rate_mbit=8 if slow == "slow" else 0) as net:
                # The slow site sits behind the line; the others dial the same hub on the line's near end.
                farm = Farm(f"W8-{label}{r}", net.a, net.address_a, net.a)
                names = [f"s{i}" for i in range(SITES - (1 if slow else 0))]
                for name in names:
                    farm.site(name)
                if slow == "slow":
                    farm.site("slow", netns=net.b)
                    names.append("slow")
                farm.hub.publish(path, "model/w8:v1")
                lasts.append(together(farm, "model/w8:v1", names))
                farm.close()
        return lasts

    eight = sweep("eight", None)
    total = SITES * SIZE / median(eight)
    share = total / one_rate
    results.add("W8", f"{SITES} sites at once, {SIZE / MIB:.0f} MiB each", f"{total / 1e6:.0f} MB/s together", f"one site: {one_rate / 1e6:.0f} MB/s", f"{share:.2f} ×", "≥ 0.9 ×", share >= 0.9)
    seven = sweep("seven", "absent")
    beside = sweep("beside", "slow")
    loss = 1 - median(seven) / median(beside)
    results.add("W8", "seven sites beside one at 1 MB/s", seconds(beside), f"the seven alone: {seconds(seven)}", f"{loss:+.1%} lost", "≤ 10 %", loss <= 0.10)
    remove(folder("w8"))
