"""How many tokens blocks, tails and chunks of queries have: by the memory that there is, and by what kernels are fast
for."""

import itertools
from collections.abc import Sequence

from kvrecomp.plan.codecs import LOSSY, Codec
from kvrecomp.plan.layout import MOST_BLOCKS, BlockSpec
from kvrecomp.plan.shapes import ALIGNED, FORMS, GIB, LEAST_ALIGNED, Form, LayerShape, Memory, ModelShape, PlanError
from kvrecomp.plan.table import format_bytes
from kvrecomp.plan.workload import Workload

BLOCKS_PER_WINDOW = 4  # so that copies of the next blocks run while one is in use
TAIL_BYTES = 2 * GIB
# Of a prompt, in blocks of their own on the device where others have loss: tokens attend to the first one whatever it
# is (Xiao et al. 2023, "Efficient streaming language models with attention sinks", arXiv 2309.17453), and what it has
# far beyond other tokens would make the steps of its group large. With SmolLM2-135M's activations in 4 bits, texts of
# 2048 tokens cost 1.5 % more bits a token before that (cpu_quality_e6e733b.json), 0.1 since (cpu_quality.json). Of a
# row that is padded by as many or more the first token is not among them.
FIRST_TOKENS = ALIGNED
SCORE_BYTES = 2**28  # scores of one chunk of queries during prefill


def cut_runs(
    runs: Sequence[tuple[Form, Memory, int]],
    layer: LayerShape,
    shape: ModelShape,
    workload: Workload,
    most_bytes: int,
    codec: Codec = "plain",
) -> tuple[BlockSpec, ...]:
    """Runs of (form, memory, tokens) as blocks; runs of no tokens are left out.

    A run on the device is one block. On the host there are as few as `most_bytes` of plain numbers a block allow, equal
    within one token. Where LEAST_ALIGNED tokens fit in a block, and not all do, blocks are multiples of ALIGNED, equal
    within one of these, and the last has what is left.

    Raises `PlanError` for more than MOST_BLOCKS.
    """
    blocks: list[BlockSpec] = []
    for form, memory, tokens in runs:
        token_bytes = workload.batch * layer.width(form) * shape.itemsize
        largest = tokens if memory == "device" else max(1, most_bytes // token_bytes)
        unit = ALIGNED if LEAST_ALIGNED <= largest < tokens else 1
        units = -(-tokens // unit)
        count = -(-units // max(1, largest // unit))
        if count > MOST_BLOCKS:
            raise PlanError(
                f"{tokens} tokens of {format_bytes(token_bytes)} in host memory are {count} blocks of a layer, of at "
                f"most {format_bytes(most_bytes)} each; {MOST_BLOCKS} are the most: use a larger window"
            )
        for number in range(count):
            size = min(tokens, unit * (units // count + (number < units % count)))
            blocks.append(BlockSpec(form, memory, size, codec))
            tokens -= size
    return tuple(blocks)


def first_tokens(layer: LayerShape, prompt: int, codecs: Sequence[Codec]) -> int:
    """How many of a prompt's tokens are plain on the device, where some of the codecs have loss: none where the layer
    does not see them."""
    return min(FIRST_TOKENS, prompt) if set(codecs) & set(LOSSY) and layer.cached(prompt) == prompt else 0


def first_block(form: Form, tokens: int) -> tuple[BlockSpec, ...]:
    """The block of so many first tokens, if there are any."""
    return (BlockSpec(form, "device", tokens),) if tokens else ()


def without_first(runs: Sequence[tuple[Form, Memory, int]], first: int) -> list[tuple[Form, Memory, int]]:
    """Runs of (form, memory, tokens) without so many tokens at the start."""
    ends = itertools.accumulate(tokens for *_, tokens in runs)
    return [(form, memory, min(tokens, max(0, end - first))) for (form, memory, tokens), end in zip(runs, ends)]


def default_tail(shape: ModelShape, workload: Workload, window: int, most_bytes: float = TAIL_BYTES) -> int:
    """Tokens of a tail of at most `most_bytes` in all layers and a block's share of the window in one: a power of two
    from 16 to 1024, smaller where the window is, or all `new` tokens where these are fewer.

    A write-out needs a new program, and compiling it takes longer than a few steps. Steps that send little are short
    and their tails long, so that the tail fills while the next program is compiled.
    """
    widths = [max(layer.width(form) for form in FORMS) for layer in shape.layers]
    row_bytes = workload.batch * shape.itemsize
    fitting = max(16, min(1024, int(most_bytes) // (row_bytes * sum(widths))))
    fitting = max(1, min(fitting, window // BLOCKS_PER_WINDOW // (row_bytes * max(widths))))
    return min(workload.new, 1 << (fitting.bit_length() - 1))


def chunk_of_queries(batch: int, heads: int, tokens: int) -> int:
    """How many queries of a prompt attend to it at once: equal chunks, as few as have SCORE_BYTES of scores at most, or
    one query each."""
    chunks = -(-tokens // max(1, SCORE_BYTES // (4 * batch * heads * tokens)))
    return -(-tokens // chunks)
