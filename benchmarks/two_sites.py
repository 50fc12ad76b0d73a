"""A pipeline on two sites: stages in two network namespaces with a slow link between them, started by torchrun with two nodes.

python benchmarks/two_sites.py --delay 20 --megabits 100          writes benchmarks/results/two_sites.json

Each namespace has its own network, as a machine has: no socket and no file of the other can be reached but through the link. That is a pair
of TUN devices; a thread here passes their packets on, late and no faster than the link is, so that gloo and the kernel's TCP see a real
link::

    namespace pipeoptim-a   10.77.0.1 tun0 <--> this program: delay, jitter, rate, loss <--> tun0 10.77.0.2   namespace pipeoptim-b
      torchrun --node-rank 0, stages 0 .. D/2-1                                              torchrun --node-rank 1, stages D/2 .. D-1

A veth pair with ``tc netem`` would do the same where the kernel has these modules; many guests and containers have not, and TUN is nearly
everywhere. Only addresses inside these namespaces are used. It needs Linux, the right to make namespaces, and /dev/net/tun; elsewhere it
says so and ends.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

SITES = {"pipeoptim-a": "10.77.0.1", "pipeoptim-b": "10.77.0.2"}
RESULTS = Path(__file__).parent / "results/two_sites.json"
_TUNSETIFF, _TUN, _NO_PACKET_INFO, _CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000
_MTU = 9000


class Link:
    """Passes packets between two TUN devices, in both directions.

    Args:
        ends: descriptors of the devices.
        delay, jitter: seconds one way, and the standard deviation of what is added to it; packets keep their order.
        rate: bytes per second and direction; 0 for no limit.
        loss: share of packets that are dropped.
    """

    def __init__(self, ends: list[int], delay: float, jitter: float, rate: float, loss: float) -> None:
        self.ends, self.delay, self.jitter, self.rate, self.loss = ends, delay, jitter, rate, loss
        self.random, self.closed = random.Random(0), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        free, last, count = [0.0, 0.0], [0.0, 0.0], 0
        while not self.closed:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, end, packet = heapq.heappop(waiting)
                os.write(self.ends[end], packet)
            pause = min(0.05, waiting[0][0] - now) if waiting else 0.05
            for source in select.select(self.ends, [], [], max(0.0, pause))[0]:
                here = self.ends.index(source)
                packet, now = os.read(source, _MTU + 100), time.monotonic()
                if self.loss and self.random.random() < self.loss:
                    continue
                free[here] = max(free[here], now) + (len(packet) / self.rate if self.rate else 0.0)
                late = max(0.0, self.random.gauss(self.delay, self.jitter)) if self.jitter else self.delay
                last[here] = max(last[here], free[here] + late)
                heapq.heappush(waiting, (last[here], count, 1 - here, packet))
                count += 1

    def close(self) -> None:
        """No packet passes any more."""
        self.closed = True
        self._thread.join()
        for end in self.ends:
            os.close(end)


def make_sites(stack: ExitStack) -> list[int]:
    """Two namespaces with a TUN device each; the devices' descriptors. They go when ``stack`` is closed."""
    ends = []
    for site, address in SITES.items():
        _ip("netns", "add", site)
        stack.callback(_ip, "netns", "del", site)
        ends.append(_tun_in(site))
        _ip("-n", site, "addr", "add", f"{address}/24", "dev", "tun0")
        _ip("-n", site, "link", "set", "tun0", "up", "mtu", str(_MTU))
        _ip("-n", site, "link", "set", "lo", "up")
    return ends


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _tun_in(site: str) -> int:
    """A TUN device in the namespace ``site``, made by a thread that goes there, for a namespace is a thread's own."""
    made: list[int] = []

    def go() -> None:
        namespace = os.open(f"/var/run/netns/{site}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET) == 0:
            made.append(os.open("/dev/net/tun", os.O_RDWR))
            fcntl.ioctl(made[0], _TUNSETIFF, struct.pack("16sH", b"tun0", _TUN | _NO_PACKET_INFO))
        os.close(namespace)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if not made:
        raise OSError("this thread cannot enter a network namespace")
    return made[0]


def run_on_sites(options: dict[str, object], depth: int, timeout: float) -> list[dict[str, object]]:
    """Start the worker below on both sites; the rows that stage 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({**options, "out": str(Path(folder) / "rows.json")}))
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "tun0", "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
        started = []
        for node, site in enumerate(SITES):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(depth // 2)]
            torchrun += ["--node-rank", str(node), "--master-addr", SITES["pipeoptim-a"], "--master-port", "29500"]
            command = ["ip", "netns", "exec", site, *torchrun, __file__, "--job", str(job)]
            started.append(subprocess.Popen(command, env=environment))
        try:
            for process in started:
                if process.wait(timeout):
                    raise SystemExit(f"a site ended with {process.returncode}")
        finally:
            for process in started:
                process.terminate()
        return json.loads((Path(folder) / "rows.json").read_text())


def work(job: Path) -> None:
    """One stage on one of the sites."""
    import torch.distributed as dist

    options = json.loads(job.read_text())
    dist.init_process_group("gloo")
    rows = [_measured(options, *contender) for contender in options["contenders"]]
    if dist.get_rank() == 0:
        Path(options["out"]).write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # torch's schedules leave receives behind that nobody answers


def _measured(options: dict[str, object], name: str, m: int, slack: str, compress: str) -> dict[str, object]:
    import torch.distributed as dist

    from pipeoptim.bench import efficiency

    depth, seconds = dist.get_world_size(), options["milliseconds"] / 1e3
    given = {"width": options["width"], "gloo": False, "slack": slack, "compress": compress or None}
    device = efficiency.Device(seconds / 3, 0.0, seed=dist.get_rank())
    make = {"plain loops": efficiency._alone}.get(name, efficiency._torchs if name.startswith("Schedule") else efficiency._ours)
    step = make(device, name, m, given)
    # What flushes is warm after a few; a pipeline that does not fills up first.
    warm_up = 10 if name.startswith("Schedule") else 60
    alone = [efficiency.TimedSteps(step, device, warm_up)]
    _, (taken,) = efficiency.timed_windows(alone, options["steps"], options["repeats"])
    samples = (options["steps"] * seconds / taken).tolist()
    words = [name, f"M={m}"] + ([f"slack {slack}"] if slack != "0" else []) + ([compress] if compress else [])
    settings = {"ours": not name.startswith("Schedule"), "depth": depth, "slack": slack, "compress": compress}
    settings |= {"contender": " ".join(words), "link": options["link"]}
    return {"name": f"{' '.join(words)}, {options['link']}", "samples": samples, "settings": settings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds one way")
    parser.add_argument("--jitter", type=float, default=0.0, help="its standard deviation, milliseconds")
    parser.add_argument("--megabits", type=float, default=100.0, help="per second and direction; 0: no limit")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets that are lost")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--milliseconds", type=float, default=30.0, help="of a stage per mini-batch")
    parser.add_argument("--slack", nargs="*", default=["0", "0,2,0", "auto"])
    parser.add_argument("--compress", nargs="*", default=[""], help="'' and int8")
    parser.add_argument("--torch-microbatches", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--add", action="store_true", help="to the rows that are there")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job is not None:
        work(chosen.job)
    from pipeoptim.bench.record import Record, ResultRow

    link = f"{chosen.delay:g} ms" if chosen.delay else "no delay"
    link += f", {chosen.megabits:g} Mbit/s" if chosen.megabits else ", no limit"
    link += f", jitter {chosen.jitter:g} ms" * bool(chosen.jitter) + f", loss {chosen.loss:.1%}" * bool(chosen.loss)
    contenders = [("plain loops", 1, "0", "")]
    contenders += [("pipeoptim", 1, slack, compress) for compress in chosen.compress for slack in chosen.slack]
    contenders += [(name, m, "0", "") for name in ("ScheduleGPipe", "Schedule1F1B") for m in chosen.torch_microbatches]
    options = {"contenders": contenders, "milliseconds": chosen.milliseconds, "width": 256, "repeats": chosen.repeats}
    options |= {"steps": chosen.steps, "link": link}
    with ExitStack() as stack:
        try:
            ends = make_sites(stack)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"skipped: no network namespaces with a TUN device can be made here ({error})")
            return 0
        wire = Link(ends, chosen.delay / 1e3, chosen.jitter / 1e3, chosen.megabits * 1e6 / 8, chosen.loss)
        stack.callback(wire.close)
        rows = [ResultRow(**row) for row in run_on_sites(options, chosen.depth, timeout=900)]
    if chosen.add and RESULTS.exists():
        names = {row.name for row in rows}
        rows = [row for row in Record.read(RESULTS).rows if row.name not in names] + rows
    settings = {"stages": chosen.depth, "ms per stage": chosen.milliseconds, "stages per site": chosen.depth // 2}
    record = Record("two sites", "efficiency", settings, rows)
    for row in rows:
        print(f"{row.median:.3f}  ({min(row.samples):.3f} .. {max(row.samples):.3f})  {row.name}")
    record.write(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
