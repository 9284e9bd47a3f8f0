"""W11: W1 and W9 over the fallback on TCP, written down beside QUIC."""

import link
import w01
import w09
from lab import GIB, folder, median, rate, remove, seconds

TCP = '[line]\ntransport = "tcp"\n'


def run(results):
    path = w01.source()
    quic = w01.measure(results, "W11-quic", path, (0, 0), peers=False)
    tcp = w01.measure(results, "W11-tcp", path, (0, 0), more=TCP, peers=False)
    results.add("W11", f"W1 (a) on TCP, {w01.SIZE / GIB:.2f} GiB", rate(w01.SIZE, tcp), f"QUIC: {rate(w01.SIZE, quic)}", f"{median(quic) / median(tcp):.2f} ×", "-", None)
    remove(folder("w1"))
    over_the_line(results)


def over_the_line(results):
    path = w09.source()
    for loss, _ in w09.CASES:
        with link.Emulated(delay_ms=50, rate_mbit=w09.RATE_MBIT, loss=loss) as net:
            quic = w09.ours_over(net, path, f"W11-quic-{loss}")
            tcp = w09.ours_over(net, path, f"W11-tcp-{loss}", TCP)
        used, beside = w09.share(tcp), w09.share(quic)
        results.add("W11", f"W9 on TCP, {loss:.1%} loss", f"{used:.1%} of the line ({seconds(tcp)})", f"QUIC: {beside:.1%}", f"{used / beside:.2f} ×", "-", None)
    remove(folder("w9"))
