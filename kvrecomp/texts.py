"""The texts of a batch as they are written: rows may be ahead of one another."""

from collections.abc import Sequence

import numpy as np

from kvrecomp.run.sampling import NO_TOKEN


class Texts:
    """The new tokens of every row, which may be ahead of one another."""

    def __init__(self, rows: int, most: int, eos: Sequence[int], pad: int):
        self.tokens, self.counts = np.full((rows, most), pad, np.int32), np.zeros(rows, int)
        self.passes, self.drafted, self.tried = (np.zeros(rows, np.int32) for _ in range(3))
        self.taken: list[np.ndarray] = []
        self.logits: np.ndarray | None = None
        self._eos, self._ended, self._streamed = eos, np.zeros(rows, bool), 0

    @property
    def complete(self) -> bool:
        return bool((self._ended | (self.counts == self.tokens.shape[1])).all())

    @property
    def longest(self) -> int:
        return int(self.counts.max())

    def add(
        self, tokens: np.ndarray, counts: np.ndarray, logits: np.ndarray | None, drafts: np.ndarray
    ) -> list[np.ndarray]:
        """Adds tokens [batch, q], of which each row takes so many, to rows that have not ended, and that had so many
        drafts; gives the columns int32[batch] that every row has now. Raises FloatingPointError for what is no token.
        """
        if tokens.ndim == 1:
            tokens, logits = tokens[:, None], None if logits is None else logits[:, None]
        before = self.counts.copy()
        for row in np.flatnonzero(~self._ended & (self.counts < self.tokens.shape[1])):
            start = self.counts[row]
            own = tokens[row, : counts[row]]
            if (own == NO_TOKEN).any():
                raise FloatingPointError(
                    f"the logits of row {row} are NaN or infinite at new token {start + own.tolist().index(NO_TOKEN)}: "
                    "check the weights, or use a dtype with a larger range"
                )
            if start:  # the first token is of the prefill
                self.passes[row] += 1
            if start and len(own):  # or the tail had no room for a token of this row
                drafted = min(drafts[row], self.tokens.shape[1] - start - 1)
                self.drafted[row] += drafted
                ended = np.isin(own, self._eos).any()
                self.tried[row] += len(own) - 1 + (len(own) <= drafted and not ended)
            self.tokens[row, start : start + len(own)] = own
            if logits is not None:
                if self.logits is None:
                    self.logits = np.zeros((self.tokens.shape[1], len(tokens), logits.shape[-1]), logits.dtype)
                self.logits[start : start + len(own), row] = logits[row, : len(own)]
            self.counts[row] += len(own)
            self._ended[row] = np.isin(own, self._eos).any()
        self.taken.append(self.counts - before)
        going = self.counts[~self._ended]
        first, self._streamed = self._streamed, int(going.min()) if len(going) else self.longest
        return list(self.tokens[:, first : self._streamed].T)
