"""The token loop: greedy and sampled choice, stopping, streaming, what comes back."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
import toy

import kvrecomp
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import PlanError, Workload
from kvrecomp.run.prompt import PromptError
from kvrecomp.run.sampling import NO_TOKEN, Sampling, choose, start_rows, truncate

BATCH, PROMPT, NEW, TAIL = 3, 5, 11, 3


@pytest.fixture(scope="module")
def decoder():
    return toy.named_decoder("activations", batch=BATCH, prompt=PROMPT, new=NEW, tail=TAIL)


PROMPTS = toy.texts(BATCH, PROMPT, longest_padding=4)


def run(decoder, sampling=None, given=PROMPTS, new=NEW, eos=(), pad=0, **options):
    return TokenLoop(decoder, sampling or Sampling(), eos, pad, **options).run(given.ids, given.mask, new)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_greedy_is_the_likeliest_of_the_plain_forward_pass(decoder):
    result = run(decoder, output_logits=True)
    assert result.sequences.shape == (BATCH, PROMPT + NEW) and result.sequences.dtype == np.int32
    np.testing.assert_array_equal(result.sequences[:, :PROMPT], PROMPTS.ids)
    plain = toy.plain_logits(toy.model(), toy.Texts(result.sequences, PROMPTS.padding))[:, PROMPT - 1 : -1]
    np.testing.assert_array_equal(result.sequences[:, PROMPT:], plain.argmax(axis=-1))
    assert result.logits.shape == (NEW, BATCH, toy.VOCAB) and result.logits.dtype == np.float32
    np.testing.assert_allclose(result.logits.swapaxes(0, 1), plain, atol=1e-4)
    assert len(np.unique(result.sequences[:, PROMPT:])) > 9  # or it says little
    assert result.plan is decoder.plan and result.new_tokens.tolist() == [NEW] * BATCH


def test_logits_are_gone_when_a_step_makes_others(decoder, monkeypatch):
    """They are counted once, and there may be 500 MiB of them."""
    there, step = [], decoder.step_groups

    def step_groups(*given):
        live = [array for array in jax.live_arrays() if array.shape == (BATCH, toy.VOCAB)]
        there.append(len(set(map(id, live)) - before))
        return step(*given)

    monkeypatch.setattr(decoder, "step_groups", step_groups)
    before = {id(array) for array in jax.live_arrays()}
    run(decoder)
    assert there == [0] * (NEW - 1)


def test_times_and_bytes_of_each_step(decoder):
    result, plan = run(decoder), decoder.plan
    assert result.logits is None
    assert len(result.step_seconds) == NEW - 1 and min(result.step_seconds) >= 0 and result.prefill_seconds > 0
    written = [step // TAIL for step in range(NEW - 1)]
    assert result.link_bytes == [plan.bytes_in("host", write_outs) for write_outs in written]
    assert written[-1] == plan.write_outs == 3


def test_generate_is_the_same_with_huggingfaces_names(decoder):
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 3}
    expected = run(decoder, Sampling(True, 1.3, 20, 0.9, 3))
    ids, mask = PROMPTS.ids.tolist(), PROMPTS.mask.tolist()
    result = kvrecomp.generate(toy.model(), ids, mask, max_new_tokens=NEW, plan="keys_values", **options)
    assert result.plan.name == "keys_values"
    np.testing.assert_array_equal(result.sequences, expected.sequences)


def test_more_rows_or_tokens_than_the_plan_has(decoder):
    for rows, tokens in ((BATCH + 1, PROMPT), (BATCH, PROMPT + 1)):
        told = rf"is \[{rows}, {tokens}\]; plan activations is for {BATCH} rows of at most {PROMPT} tokens: make a plan"
        with pytest.raises(PromptError, match=told):
            run(decoder, given=toy.texts(rows, tokens))


@pytest.mark.parametrize("groups", [1, 3])
def test_prompts_shorter_than_the_plans_are_padded(decoder, groups):
    """The rows' own padding, positions and texts are what they are under a plan for as many tokens."""
    plan = dataclasses.replace(decoder.plan, workload=Workload(BATCH // groups, PROMPT, NEW), groups=groups)
    asked = {"max_new_tokens": NEW, "output_logits": True, "do_sample": True}
    exact = kvrecomp.generate(toy.model(), PROMPTS.ids, PROMPTS.mask, plan=plan, **asked)
    work = Workload(BATCH // groups, PROMPT + 7, NEW)
    longer = kvrecomp.named_plan("split:0.5", toy.model().shape, work, tail=TAIL)
    longer = dataclasses.replace(longer, groups=groups)
    padded = kvrecomp.generate(toy.model(), PROMPTS.ids, PROMPTS.mask, plan=longer, **asked)
    np.testing.assert_array_equal(padded.sequences, exact.sequences)
    np.testing.assert_allclose(padded.logits, exact.logits, atol=1e-4)


def test_one_token_needs_no_step(decoder):
    result = run(decoder, new=1)
    assert result.sequences.shape == (BATCH, PROMPT + 1)
    assert result.step_seconds == result.link_bytes == []


def test_nothing_is_written_where_there_is_no_terminal(decoder, capfd):
    run(decoder, new=2)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_can_be_left_to_others(decoder, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    run(decoder, new=2)
    assert "decoding" in capfd.readouterr().err
    run(decoder, new=2, progress=False)
    assert capfd.readouterr() == ("", "")


# --- stopping and streaming -------------------------------------------------------------------------------------------


def ends_of(free):
    """For texts without an end: a token of each row, to end it."""
    return [int(row[index]) for index, row in zip((2, 5, 3), free)]


def test_rows_stop_by_themselves_and_are_padded(decoder):
    free = run(decoder).sequences[:, PROMPT:]
    end = ends_of(free)[0]
    lengths = [np.flatnonzero(row == end)[0] + 1 if end in row else NEW for row in free]
    assert min(lengths) < NEW
    result = run(decoder, eos=[end], pad=7)
    expected = [[*row[:length], *[7] * (NEW - length)] for row, length in zip(free, lengths)]
    width = max(lengths)
    np.testing.assert_array_equal(result.sequences[:, PROMPT:], np.array(expected)[:, :width])
    assert result.new_tokens.tolist() == lengths


def test_any_of_several_ends_stops_and_all_rows_end_the_loop(decoder):
    free = run(decoder).sequences[:, PROMPT:]
    eos = ends_of(free)
    lengths = [next(index for index, token in enumerate(row) if token in eos) + 1 for row in free]
    assert max(lengths) < NEW and len(set(lengths)) > 1
    result = run(decoder, eos=eos, pad=eos[1], output_logits=True)
    assert result.sequences.shape[1] == PROMPT + max(lengths)
    assert result.new_tokens.tolist() == lengths
    for row, own, length in zip(result.sequences[:, PROMPT:], free, lengths):
        np.testing.assert_array_equal(row[:length], own[:length])
        assert (row[length:] == eos[1]).all()
    assert len(result.logits) == max(lengths) == len(result.step_seconds) + 1 == len(result.link_bytes) + 1


@pytest.mark.parametrize(("given", "pad"), [({"pad_token_id": 9}, 9), ({"pad_token_id": -1}, -1), ({}, None)])
def test_what_rows_are_padded_with(decoder, given, pad):
    """The token that is asked for, or the first end token; some configurations have -1, which is none."""
    free = run(decoder).sequences[:, PROMPT:]
    eos = ends_of(free)
    result = kvrecomp.generate(toy.model(), PROMPTS.ids, PROMPTS.mask, max_new_tokens=NEW, eos_token_id=eos, **given)
    row, new = result.new_tokens.argmin(), result.new_tokens.min()
    rest = result.sequences[row, PROMPT + new :]
    assert len(rest) and (rest == (eos[0] if pad is None else pad)).all()


class Recorder:
    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.values.append(value)

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("stop", [False, True])
def test_streamer_gets_the_prompt_then_tokens(decoder, stop):
    eos = ends_of(run(decoder).sequences[:, PROMPT:]) if stop else []
    streamer = Recorder()
    result = run(decoder, eos=eos, pad=2, streamer=streamer)
    prompt, *tokens = streamer.values
    np.testing.assert_array_equal(prompt, PROMPTS.ids)
    assert all(isinstance(token, np.ndarray) and token.shape == (BATCH,) for token in tokens)
    np.testing.assert_array_equal(np.stack(tokens, axis=1), result.sequences[:, PROMPT:])
    assert streamer.ends == 1


def test_more_tokens_than_the_plan_has(decoder):
    """Refused before anything is computed, not when the texts are half done."""
    streamer = Recorder()
    with pytest.raises(PlanError, match=f"{NEW} new tokens") as raised:
        run(decoder, new=NEW + 2, streamer=streamer)
    assert "\n" not in str(raised.value) and not streamer.values


# --- sampling ---------------------------------------------------------------------------------------------------------


def kept_by(logits, top_k, top_p):
    """One row in NumPy: the ids that may be chosen, likeliest first; None where rounding decides."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    if top_p == 1:
        return order
    likely = np.exp(logits[order].astype(np.float64))
    cumulative = np.cumsum(likely / likely.sum())
    if np.abs(cumulative - top_p).min() < 1e-5:
        return None
    return order[: np.flatnonzero(cumulative > top_p)[0] + 1]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 1e-6), (0, 0.5), (0, 0.999), (7, 0.9), (2, 0.1), (100, 1.0)]
)
def test_truncation_is_that_of_numpy(top_k, top_p):
    """For even and for sharp distributions over 31 tokens."""
    rng = np.random.default_rng(0)
    logits = (np.linspace(0.2, 4, 50)[:, None] * rng.normal(size=(50, 31))).astype(np.float32)
    result = toy.get(jax.jit(lambda logits: truncate(Sampling(True, 1.0, top_k, top_p), logits))(toy.put(logits)))
    compared = 0
    for row, whole in zip(result, logits):
        kept = kept_by(whole, top_k, top_p)
        if kept is not None:
            assert set(np.flatnonzero(row > -np.inf)) == set(kept)
            np.testing.assert_array_equal(row[kept], whole[kept])
            compared += 1
    assert compared > 45


def test_truncation_by_hand():
    """Probabilities 0.1, 0.4, 0.2, 0.3: of the three likeliest, two reach 0.7 of what is left."""
    logits = toy.put(np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32)))
    cases = {(0, 1.0): [0, 1, 2, 3], (3, 1.0): [1, 2, 3], (0, 0.65): [1, 3], (0, 0.75): [1, 2, 3], (3, 0.75): [1, 3]}
    for (top_k, top_p), kept in cases.items():
        truncated = jax.jit(lambda logits, sampling: truncate(sampling, logits), static_argnums=1)
        result = toy.get(truncated(logits, Sampling(True, 1.0, top_k, top_p)))
        assert np.flatnonzero(result[0] > -np.inf).tolist() == kept


def chosen(sampling, logits, row_ids, positions, eos=(), finished=None):
    """One choice: tokens, what is reported, and the rows after it."""

    def run(logits, row_ids, positions, eos, pad, finished):
        rows = start_rows(np.uint32(sampling.seed), row_ids, positions, positions * 0)._replace(finished=finished)
        return choose(sampling, eos, pad, rows, logits)

    finished = np.zeros(len(logits), bool) if finished is None else finished
    arrays = (np.asarray(logits, np.float32), *(np.asarray(each, np.int32) for each in (row_ids, positions, eos, 7)))
    rows, tokens, report = jax.jit(run)(*map(toy.put, (*arrays, finished)))
    return toy.get(tokens), toy.get(report), rows


def test_frequencies_are_the_probabilities():
    """Of 20000 rows with the same logits, tempered and cut to four tokens: within four standard deviations."""
    count, logits = 20_000, np.log(np.array([0.05, 0.3, 0.2, 0.1, 0.35]))
    expected = np.array([0, 0.3, 0.2, 0.1, 0.35]) ** (1 / 1.5)
    expected /= expected.sum()
    tokens, _, _ = chosen(Sampling(True, 1.5, top_k=4), np.tile(logits, (count, 1)), range(count), [3] * count)
    frequencies = np.bincount(tokens, minlength=5) / count
    assert (np.abs(frequencies - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)).all()


def test_randomness_is_keyed_by_seed_row_and_position():
    logits = np.zeros((6, 1009), np.float32)
    one, _, _ = chosen(Sampling(True), logits, [0, 1, 2, 0, 0, 5], [4, 4, 4, 5, 4, 4])
    assert one[4] == one[0] and len(set(one.tolist())) == 5  # the same row and position, nothing else the same
    other, _, _ = chosen(Sampling(True), logits[:2], [5, 1], [4, 4])
    assert other.tolist() == [one[5], one[1]]  # whatever is decoded beside it
    seeded, _, _ = chosen(Sampling(True, seed=1), logits[:2], [5, 1], [4, 4])
    assert (seeded != other).all()


def test_choice_step_by_step():
    """Greedy; a row that has ended gets the pad; one that ends now says so; NaN is reported, unless it has ended."""
    logits = np.array([[1, 3, 2], [5, 4, 3], [0, 0, 1], [np.nan, 1, 2], [np.nan, 1, 2]])
    finished = np.array([False, True, False, False, True])
    tokens, report, rows = chosen(Sampling(), logits, range(5), range(5), eos=[1, 0], finished=finished)
    assert tokens[[0, 1, 2, 4]].tolist() == [1, 7, 2, 7] and report.tolist() == [1, 7, 2, NO_TOKEN, 7]
    assert toy.get(rows.finished)[[0, 1, 2, 4]].tolist() == [True, True, False, True]
    assert toy.get(rows.positions).tolist() == [1, 2, 3, 4, 5]


def test_the_seed_changes_texts_and_nothing_else_does(decoder):
    one, again, other = (run(decoder, Sampling(True, seed=seed)).sequences for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other)[:, PROMPT:].any(axis=1).all()


def test_a_rows_text_depends_on_itself_only(decoder):
    """Not on its padding, on the rows beside it, nor on how many there are."""
    sampling = Sampling(True, 0.8, top_p=0.95, seed=5)
    given = toy.texts(BATCH, PROMPT, seed=2)
    padded = toy.Texts(given.ids, np.array([2, 0, 1], np.int32))
    beside = toy.Texts(np.where([[1], [0], [0]], given.ids, given.ids[:, ::-1]), np.array([2, 3, 0], np.int32))
    expected = run(decoder, sampling, padded).sequences[0, PROMPT:]
    np.testing.assert_array_equal(run(decoder, sampling, beside).sequences[0, PROMPT:], expected)
    alone = toy.named_decoder("keys_values", batch=1, prompt=PROMPT - 2, new=NEW, tail=TAIL)
    bare = toy.Texts(given.ids[:1, 2:], np.array([0], np.int32))
    np.testing.assert_array_equal(run(alone, sampling, bare).sequences[0, PROMPT - 2 :], expected)
    # Rows are told apart by their number, so the same text in another row goes on differently.
    twice = run(decoder, sampling, toy.Texts(given.ids[[0, 0, 0]], np.array([2, 2, 2], np.int32))).sequences
    assert len(np.unique(twice, axis=0)) == 3


def test_a_row_that_keeps_its_id_keeps_its_text_in_any_batch(decoder):
    """By default ids count the rows; only sampling asks for them."""
    sampling = Sampling(True, 0.8, top_p=0.95, seed=5)
    given = toy.Texts(PROMPTS.ids[[0, 0, 0]], np.zeros(BATCH, np.int32))
    loop = TokenLoop(decoder, sampling, (), 0)
    plain, named, moved, large = (
        loop.run(given.ids, given.mask, NEW, ids).sequences for ids in (None, [0, 1, 2], [7, 0, 1], [2**32 - 1, 7, 7])
    )
    np.testing.assert_array_equal(named, plain)
    np.testing.assert_array_equal(moved[1:], plain[:2])
    np.testing.assert_array_equal(large[1:], moved[[0, 0]])
    assert len(np.unique(np.concatenate([plain, moved, large]), axis=0)) == 5  # of ids 0, 1, 2, 7 and the largest
    options = {"max_new_tokens": NEW, "plan": decoder.plan, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    result = kvrecomp.generate(toy.model(), given.ids, row_ids=np.array([7, 0, 1]), seed=5, **options)
    np.testing.assert_array_equal(result.sequences, moved)


def test_next_to_no_temperature_is_greedy(decoder):
    """Logits divided by that little would be infinite, several of a row."""
    greedy = run(decoder, Sampling()).sequences
    np.testing.assert_array_equal(run(decoder, Sampling(True, temperature=1e-38)).sequences, greedy)


def test_sampled_texts_are_likely_ones(decoder):
    """With top_k=2 every token is one of the plain forward pass's two likeliest, and both occur."""
    result = run(decoder, Sampling(True, top_k=2, seed=1), output_logits=True)
    ranks = Counter()
    for tokens, logits in zip(result.sequences[:, PROMPT:].T, result.logits, strict=True):
        ranks.update((logits > logits[range(BATCH), tokens][:, None]).sum(axis=1).tolist())
    assert set(ranks) == {0, 1}
