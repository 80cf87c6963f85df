"""Prompts as the decoder takes them: checked on the host, before anything is sent to the device."""

from typing import Any

import jax
import numpy as np
from jax import Array

from kvrecomp.plan import Plan


class PromptError(ValueError):
    """Token ids or a mask that cannot be decoded; the message says which row and why."""


def _as_array(name: str, given: Any) -> np.ndarray:
    """On the host; raises `PromptError` where it has rows of different lengths."""
    try:
        return np.asarray(jax.device_get(given))
    except ValueError:
        raise PromptError(f"the rows of {name} differ in length: prompts are padded on the left to one") from None


def as_ids(input_ids: Any) -> np.ndarray:
    """Token ids as int[batch, prompt]; raises `PromptError` if they are none, or a row or the batch is empty."""
    ids = _as_array("input_ids", input_ids)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        given = f"{ids.dtype}{list(ids.shape)}{', which is empty' if 0 in ids.shape else ''}"
        raise PromptError(f"input_ids must be integers [batch, prompt] with at least one token a row; got {given}")
    return ids


def as_row_ids(row_ids: Any, batch: int) -> np.ndarray:
    """Names of rows as uint32[batch], None for 0, 1, ...; raises `PromptError` if they are not that many whole numbers
    of 32 bits."""
    ids = np.arange(batch) if row_ids is None else _as_array("row_ids", row_ids)
    expected = f"it must be integers [{batch}] from 0 to 2**32 - 1, one for a row"
    if ids.shape != (batch,) or not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"row_ids is {ids.dtype}{list(ids.shape)}; {expected}")
    if (wrong := (ids < 0) | (ids >= 2**32)).any():
        raise PromptError(f"row_ids has {ids[wrong][0]}; {expected}")
    return ids.astype(np.uint32)


def as_token_ids(name: str, given: Any) -> list[int]:
    """What ends or pads rows: a token id, several or None, as a list; raises `PromptError` if they are no whole numbers
    of 32 bits."""
    try:
        ids = np.asarray([] if given is None else jax.device_get(list(given) if isinstance(given, set) else given))
    except ValueError:
        ids = np.zeros((1, 1))  # lists of different lengths
    whole = ids.dtype.kind in "iu" or not ids.size
    if ids.ndim > 1 or not whole or not ((ids >= -(2**31)) & (ids < 2**31)).all():
        raise PromptError(f"{name} is {given!r}; expected a token id, or a list of them")
    return np.atleast_1d(ids).astype(int).tolist()


def as_mask(attention_mask: Any, ids: np.ndarray) -> np.ndarray:
    """The mask as bool[batch, prompt], None for no padding; raises `PromptError` if it is not of the shape of `ids`."""
    mask = np.ones(ids.shape, bool) if attention_mask is None else _as_array("attention_mask", attention_mask) != 0
    if mask.shape != ids.shape:
        raise PromptError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}: they must be the same")
    return mask


def split_groups(input_ids: Any, attention_mask: Any, plan: Plan) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompts int[rows, prompt] and their mask, padded on the left to the plan's length where they are shorter, and cut
    into the plan's groups.

    Raises `PromptError` if the rows are not those of all groups, or the prompts longer than the plan's.
    """
    ids, rows, longest = as_ids(input_ids), plan.groups * plan.workload.batch, plan.workload.prompt
    mask = as_mask(attention_mask, ids)
    if len(ids) != rows or ids.shape[1] > longest:
        split = "" if plan.groups == 1 else f" in {plan.groups} groups"
        raise PromptError(
            f"input_ids is {list(ids.shape)}; plan {plan.name} is for {rows} rows{split} of at most {longest} tokens: "
            "make a plan for this one"
        )
    lacking = [(0, 0), (longest - ids.shape[1], 0)]
    groups = (np.split(np.pad(rows, lacking), plan.groups) for rows in (ids, mask))
    return list(zip(*groups))


def check_prompt(input_ids: Any, attention_mask: Any, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """int[batch, prompt] and its mask (None: no padding) -> int32 ids, and int32[batch] padding on the left.

    Raises `PromptError` where the shapes are not the plan's, the mask is not left-padded, a row is empty or a token id
    is outside the vocabulary.
    """
    ids = as_ids(input_ids)
    if ids.shape != (plan.workload.batch, plan.workload.prompt):
        raise PromptError(
            f"input_ids is {list(ids.shape)}, the plan is for [{plan.workload.batch}, {plan.workload.prompt}]: pad the "
            "prompts on the left to that length, or make a plan for this one"
        )
    mask = as_mask(attention_mask, ids)
    check_tokens(ids, mask, plan.shape.vocab)
    return np.where(mask, ids, 0).astype(np.int32), (~mask).sum(axis=1, dtype=np.int32)


def check_tokens(ids: np.ndarray, mask: np.ndarray, vocab: int) -> None:
    """Raises `PromptError` where bool[batch, prompt] `mask` is not left-padded or has an empty row, or one of the
    int[batch, prompt] ids in it is not of the vocabulary."""
    for row, is_token in enumerate(mask):
        if not is_token.any():
            raise PromptError(f"row {row} is empty: its mask has no token; give every row at least one")
        if not is_token[is_token.argmax() :].all():
            raise PromptError(f"row {row} is not left-padded: its mask has a 0 after a 1; move the padding to the left")
    wrong = (ids < 0) | (ids >= vocab)
    if (wrong & mask).any():
        row, column = np.argwhere(wrong & mask)[0]
        raise PromptError(f"token id {ids[row, column]} in row {row} is outside the vocabulary of {vocab} tokens")


def check_step(lengths: Array, token_ids: Any, plan: Plan) -> None:
    """Raises `PromptError` unless `token_ids` is int32[batch] and the cache of these `lengths` is not used up."""
    if np.shape(token_ids) != (plan.workload.batch,) or getattr(token_ids, "dtype", None) != np.int32:
        given = f"{getattr(token_ids, 'dtype', type(token_ids).__name__)}{list(np.shape(token_ids))}"
        raise PromptError(f"token_ids is {given}; it must be int32[{plan.workload.batch}], one token for every row")
    if lengths.is_deleted():
        raise PromptError("this cache was given to a step before, which wrote into it: go on with the one it returned")
