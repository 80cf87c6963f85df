"""The profile of this machine: measured once, kept as JSON under the user's cache directory."""

import json
import logging
import pathlib
import re
from typing import Any

from kvrecomp.files import cache_folder, write_json
from kvrecomp.measure.layers import measure_layer
from kvrecomp.measure.machine import measure_machine, this_machine
from kvrecomp.plan import PlanError
from kvrecomp.predict.hardware import HardwareProfile, LayerTimes
from kvrecomp.progress import waiting
from kvrecomp.run.model import Model

LOG = logging.getLogger("kvrecomp")
FORMAT = 14  # of the file, and of what its numbers mean; another one is measured anew


def profile(model: Model | None = None, *, batch: int = 1, refresh: bool = False) -> HardwareProfile:
    """The profile of this machine, measured if it was not before or if `refresh` says so.

    With a `model`, its layers are timed too at that `batch`, and again for a model of the same layers with more
    positions. What was measured is kept in `profile_path()` and holds for this kind and number of devices, jax version
    and driver; `refresh` forgets the layers timed before.
    """
    found = None if refresh else _read()
    if found is None:
        with waiting("measuring this machine, which is done once"):
            known = measure_machine()
    else:
        known = found
    timed: list[LayerTimes] = []
    if model is not None:
        for layer in model.shape.distinct_layers:
            if refresh or not _covers(known.times(layer, model.shape.dtype, batch), model.shape.positions):
                with waiting(f"timing a layer of {model.shape.name} with {batch} rows, which is done once"):
                    timed.append(measure_layer(model, layer, batch))
    if timed and found:
        known = _read() or known  # another process may have timed other layers meanwhile
    for times in timed:
        known = known.with_times(times)
    if timed or not found:
        try:
            keep(known)
        except OSError as error:
            LOG.warning("the profile cannot be kept (%s), and is measured again next time: set XDG_CACHE_HOME", error)
    return known


def _covers(times: LayerTimes | None, positions: int) -> bool:
    """Whether these are times of as many tokens as a model with so many positions caches."""
    return times is not None and (times.positions is None or times.positions >= positions)


def keep(measured: HardwareProfile) -> None:
    """Writes the profile to where `profile` finds it."""
    write_json(profile_path(), {"format": FORMAT, **measured.to_json()})


def profile_path() -> pathlib.Path:
    """Where this machine's profile is kept. Raises OSError where there is no cache directory."""
    name = "-".join(map(str, this_machine().values()))
    return cache_folder() / f"profile-{re.sub(r'[^A-Za-z0-9.]+', '_', name).strip('_')}.json"


def check_profile(given: HardwareProfile) -> None:
    """Raises `PlanError` where the profile is of another machine than this."""
    this = this_machine()
    profiled = {name: getattr(given, name) for name in this}
    if profiled != this:
        raise PlanError(
            f"the profile is of {_describe(profiled)}; this machine is {_describe(this)}: use kvrecomp.profile(), or "
            "make_plan to see what another machine would do"
        )


def _describe(machine: dict[str, Any]) -> str:
    return f"{machine['device']} x{machine['count']}, jax {machine['jax'] or '-'}, driver {machine['driver'] or '-'}"


def _read() -> HardwareProfile | None:
    """The profile that is kept, or None, with a line that says why where there is a file."""
    try:
        path = profile_path()
    except OSError:
        return None  # `profile` says it when it can keep none
    try:
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise ValueError("it is of another version of kvrecomp")
        read = HardwareProfile.from_json(data)
        check_profile(read)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        LOG.warning("%s is no profile of this machine (%s); measuring it anew", path, error)
        return None
    return read
