"""What the suite has to know of this machine before it measures anything, without a GPU of its own meanwhile."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from experiments.support.peers import PEERS
from experiments.support.results.report import output, run_info, versions

from kvrecomp.plan import MIB, Budget, Memory
from kvrecomp.run.limits import MARGIN, limits


@dataclass(frozen=True)
class Machine:
    """`about` is what a results file says of it; `allowed` are the bytes that a plan may use, `peers_allowed` a peer,
    which may have all of the device; `unavailable` says why peers cannot be run here."""

    about: dict[str, Any]
    allowed: dict[Memory, float]
    peers_allowed: dict[Memory, float]
    unavailable: dict[str, str]


def look(peers: Sequence[str], host_gib: float | None, commit: str) -> Machine:
    """This machine, seen by another process, which leaves nothing in device memory when it ends.

    A backend of jax keeps most of a GPU's memory for itself until its process ends, whether it needs it or not.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(look_here, tuple(peers), host_gib, commit).result()


def look_here(peers: Sequence[str], host_gib: float | None, commit: str) -> Machine:
    """This machine, seen by this process."""
    about = run_info(commit) | {"versions": versions()}
    allowed = limits(Budget.of_gib(None, host_gib))
    # jax takes three quarters of a GPU, unless told otherwise, and the limit above is of these.
    total = output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    whole = float(total) * MIB * (1 - MARGIN) if total.isdigit() else allowed["device"]
    reasons = {name: PEERS[name].unavailable(total.isdigit()) for name in peers}
    unavailable = {name: reason for name, reason in reasons.items() if reason}
    return Machine(about, allowed, {**allowed, "device": whole}, unavailable)
