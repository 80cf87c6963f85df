"""How often a model's drafts were right, kept from run to run in a file under the user's cache directory."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from kvrecomp.files import cache_folder, write_json
from kvrecomp.plan import AUTO, Drafting, ModelShape
from kvrecomp.predict.scheduler import DRAFTINGS

LOG = logging.getLogger("kvrecomp")
MOST_TRIED = 10_000  # drafts that count: of more the older ones count less, since texts change
FEWEST_TRIED = 100  # of fewer nothing is said


def with_acceptance(shape: ModelShape, drafting: Any) -> Drafting | Sequence[Drafting] | None:
    """These drafts, or those that `auto` weighs, with the acceptance that is known of them for the model."""
    if drafting is None:
        return None
    known = _read().get(_key(shape), {})

    def told(one: Drafting) -> Drafting:
        right, tried = known.get(one.name, (0, 0))
        return dataclasses.replace(one, acceptance=right / tried) if tried >= FEWEST_TRIED else one

    return tuple(map(told, DRAFTINGS)) if drafting == AUTO else told(drafting)


def keep(shape: ModelShape, drafting: Drafting | None, right: int, tried: int) -> None:
    """Counts that so many of the drafts that were tried were right; what cannot be kept is said, and not kept."""
    if drafting is None or not tried:
        return
    every = _read()
    of_model = every.setdefault(_key(shape), {})
    before = of_model.get(drafting.name, (0, 0))
    counts = [old + new for old, new in zip(before, (right, tried))]
    fewer = min(1.0, MOST_TRIED / counts[1])
    of_model[drafting.name] = [fewer * count for count in counts]
    try:
        write_json(acceptance_path(), every)
    except OSError as error:
        LOG.warning("how often drafts were right cannot be kept (%s): set XDG_CACHE_HOME", error)


def acceptance_path() -> pathlib.Path:
    """Where it is kept. Raises OSError where there is no cache directory."""
    return cache_folder() / "acceptance.json"


def _key(shape: ModelShape) -> str:
    layer = shape.layers[0]
    return f"{shape.name}, {len(shape.layers)} layers of {layer.hidden}, {shape.dtype}"


def _read() -> dict[str, dict[str, Any]]:
    """Of each model, [right, tried] by drafter; nothing where the file is not one of these."""
    try:
        every = json.loads(acceptance_path().read_text())
        for counts in (counts for of_model in every.values() for counts in of_model.values()):
            right, tried = counts
            if not 0 <= right <= tried:
                raise ValueError(f"{right} of {tried} are right")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        LOG.warning("what is kept of drafts cannot be read (%s); they are counted anew", error)
        return {}
    return every
