"""One compilation per distinct program; none where only data changes; the next program before it is needed."""

import contextlib
import dataclasses
import gc
import sys
import threading
import time

import jax
import numpy as np
import pytest
import toy

import kvrecomp
from experiments.support.suite.step_timing import filled_cache
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import LayerPlan, Plan, Workload
from kvrecomp.run import decoder as runtime
from kvrecomp.run import programs as programs_module
from kvrecomp.run.decoder import Decoder
from kvrecomp.run.programs import Programs, side_by_side
from kvrecomp.run.sampling import Sampling
from kvrecomp.run.schedule import OVERLAPPING, compile_overlapping

COMPILED = []  # the seconds that XLA took for each program of this process
BATCH, PROMPT, TAIL = 2, 5, 3
GRAPHLESS = {**OVERLAPPING, **runtime.NO_GRAPHS}


def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(listen)


def wait_for(program, decoder):
    """Waits for a program that is compiled in the background."""
    end = time.monotonic() + 60
    while program not in decoder.compiled:
        assert time.monotonic() < end, f"{program} is not among {sorted(decoder.compiled)}"
        time.sleep(0.01)


def run(decoder, *, new, sampling=None, seed=0, padding=0):
    """Generates from a random prompt; gives the token ids."""
    given = toy.texts(BATCH, PROMPT, longest_padding=padding, seed=seed)
    return TokenLoop(decoder, sampling or Sampling(), eos=(), pad=0).run(given.ids, given.mask, new).sequences


@pytest.fixture(scope="module")
def used():
    """A decoder that has run to the end of its plan: its tail was written out twice."""
    decoder = toy.named_decoder("split:0.5", batch=BATCH, prompt=PROMPT, new=9, tail=TAIL)
    run(decoder, new=9)
    return decoder


def mixed_plan():
    """Tails of one token, one layer's of which are written to the device first."""
    shape, work = toy.model().shape, Workload(BATCH, PROMPT, 5)
    prompt = kvrecomp.named_plan("activations", shape, work).layers[0].prompt
    layers = LayerPlan(prompt, "activations", ("device", "host")), LayerPlan(prompt, "keys_values", ("host",))
    return Plan("two", shape, work, layers, tail=1)


@pytest.mark.parametrize(
    ("make", "steps", "write_outs"),
    [
        (lambda: kvrecomp.named_plan("keys_values", toy.model().shape, Workload(BATCH, PROMPT, 3), tail=3), 1, set()),
        (mixed_plan, 5, {("device", "host"), ("host", "host")}),
    ],
    ids=["a tail that lasts to the end", "a write-out for each set of memories"],
)
def test_one_program_each(make, steps, write_outs):
    """And none beyond the plan."""
    decoder, given = kvrecomp.Decoder(toy.model(), make()), toy.texts(BATCH, PROMPT + 5)
    cache, _ = decoder.prefill(given.ids[:, :PROMPT])
    for slot in range(decoder.plan.workload.new):
        cache, _ = decoder.step(cache, toy.put(given.ids[:, PROMPT + slot]))
    time.sleep(0.3)  # for a program that should not be there to appear
    expected = {("prefill",), *(("step", number) for number in range(steps))}
    plain = {tuple((memory, "plain") for memory in memories) for memories in write_outs}
    expected |= {("write-out", written_to) for written_to in plain} | ({("shift",)} if plain else set())
    assert set(decoder.compiled) == expected
    assert all(compiled.seconds > 0 and compiled.temp_bytes >= 0 for compiled in decoder.compiled.values())


def test_that_compiling_takes_minutes_is_said(caplog):
    """Two layers of ten blocks of one token; another one a layer for each of 30 write-outs, each a program. All of it
    five times, where groups go through a layer together."""
    token = BATCH * toy.OPT.hidden * 4
    decoder = toy.named_decoder("activations", batch=BATCH, prompt=10, new=31, tail=1, window=token)
    assert not caplog.records
    kvrecomp.Decoder(toy.model("opt"), dataclasses.replace(decoder.plan, groups=5, order="column"))
    (record,) = caplog.records
    assert "its 31 programs of steps take some 12 minutes to compile" in record.message


def test_changed_data_compiles_nothing(used):
    """Counted by jax itself, the choice of tokens included: whatever the text, the mask, the seed and the number of
    tokens, one, within the tail or across write-outs. Another way of sampling is no program of the decoder's."""
    before = len(COMPILED)
    jax.jit(lambda x: x * x)(toy.put(np.float32(3)))
    assert len(COMPILED) == before + 1  # it is counted
    sampled = Sampling(True, seed=1)
    run(used, new=9, sampling=sampled)
    before, programs = len(COMPILED), dict(used.compiled)
    for new, options in [
        (9, {"seed": 1}),
        (9, {"padding": 4}),
        (1, {}),
        (2, {"seed": 2, "padding": 1}),
        (8, {}),
        (5, {"sampling": sampled, "seed": 3, "padding": 2}),
    ]:
        assert run(used, new=new, **options).shape == (BATCH, PROMPT + new)
    one, other = (run(used, new=5, sampling=Sampling(True, seed=seed)).tolist() for seed in (1, 2))
    assert len(COMPILED) == before and one != other
    run(used, new=4, sampling=Sampling(True, 0.7, top_k=5, top_p=0.9))
    assert used.compiled == programs


@pytest.mark.parametrize(("least", "expected"), [(1, GRAPHLESS), (10**9, OVERLAPPING)])
def test_a_program_that_sends_much_and_is_first_run_while_decoding_has_no_graphs(monkeypatch, least, expected):
    made = {}
    monkeypatch.setattr(runtime, "NO_GRAPHS_FROM", least)
    monkeypatch.setattr(Decoder, "_program", lambda *_: lambda weights, blocks, recents, ids: (recents, ids))
    monkeypatch.setattr(Programs, "start", lambda _, name, trace, options: made.setdefault(name, options))
    decoder = toy.named_decoder("activations", batch=BATCH, prompt=PROMPT, new=7, tail=TAIL)
    decoder.step(filled_cache(decoder.plan), toy.put(np.zeros(BATCH, np.int32)))
    assert [options for name, options in made.items() if name[0] == "step"] == [expected] * 2


@pytest.mark.parametrize(("order", "expected"), [("row", OVERLAPPING), ("column", GRAPHLESS)])
def test_a_program_of_one_group_sends_what_is_its_own(monkeypatch, order, expected):
    plan = kvrecomp.named_plan("activations", toy.model().shape, Workload(BATCH, PROMPT, 7), tail=TAIL)
    plan = dataclasses.replace(plan, groups=3, order=order)
    monkeypatch.setattr(runtime, "NO_GRAPHS_FROM", plan.link_bytes(1))
    assert kvrecomp.Decoder(toy.model(), plan)._options("step", 1) == expected


def test_the_next_program_is_there_before_it_is_needed():
    decoder = toy.named_decoder("activations", batch=BATCH, prompt=PROMPT, new=7, tail=TAIL)
    given = toy.texts(BATCH, PROMPT + 7)
    assert not decoder.compiled
    cache, _ = decoder.prefill(given.ids[:, :PROMPT])
    assert set(decoder.compiled) == {("prefill",), ("step", 0)}
    write_out = ("write-out", (("host", "plain"),) * 2)
    for _ in range(2):
        # One step into a tail, with two to go until it is full.
        cache, _ = decoder.step(cache, toy.put(given.ids[:, -1]))
        wait_for(("step", 2), decoder)  # the last; both are begun after the first step
        wait_for(write_out, decoder)
        wait_for(("shift",), decoder)
        before = len(COMPILED)
        for _ in range(TAIL - 1):
            cache, _ = decoder.step(cache, toy.put(given.ids[:, -1]))
        assert len(COMPILED) == before and cache.in_tail == TAIL
    before = len(COMPILED)
    cache, logits = decoder.step(cache, toy.put(given.ids[:, -1]))  # writes out, and steps with the new layout
    jax.block_until_ready(logits)
    assert len(COMPILED) == before
    assert set(decoder.compiled) == {("prefill",), ("step", 0), ("step", 1), ("step", 2), write_out, ("shift",)}


# --- the table of programs --------------------------------------------------------------------------------------------


class Traced:
    """Counts compilations, which take until they are let go; traced and lowered at once. No options are given."""

    def __init__(self):
        self.count = 0
        self.go = threading.Event()

    def lower(self):
        return self

    def compile(self, compiler_options):
        assert compiler_options == {}
        assert self.go.wait(30)
        self.count += 1
        return jax.jit(lambda x: x + x).lower(jax.ShapeDtypeStruct((), np.float32)).compile()


def test_whoever_asks_gets_the_one_program():
    programs, traced = Programs(), Traced()
    programs.start("sum", lambda: traced)
    programs.start("sum", lambda: traced)
    assert not programs.compiled
    got = []
    threads = [threading.Thread(target=lambda: got.append(programs.get("sum", lambda: traced))) for _ in range(5)]
    for thread in threads:
        thread.start()
    traced.go.set()
    for thread in threads:
        thread.join()
    assert len(got) == 5 and len(set(map(id, got))) == 1 and traced.count == 1
    assert set(programs.compiled) == {"sum"} and got[0](toy.put(np.float32(3))) == toy.put(np.float32(6))


def test_whoever_asks_compiles_side_by_side(monkeypatch):
    """Neither is traced before the other has begun to be; one in the background has a thread of its own."""
    monkeypatch.setattr(programs_module.os, "cpu_count", lambda: 2)
    all_traced, programs = threading.Barrier(3, timeout=30), Programs()

    def trace(name):
        all_traced.wait()
        return jax.jit(lambda x: x + len(name)).trace(jax.ShapeDtypeStruct((), np.float32))

    programs.start("four", lambda: trace("four"))
    names = ["a", "two"]
    made = side_by_side(lambda name: programs.get(name, lambda: trace(name)), names)
    made.append(programs.get("four", lambda: trace("four")))
    assert [float(toy.get(program(toy.put(np.float32(1))))) for program in made] == [2, 4, 5]


def test_what_waits_in_the_background_is_compiled_by_whoever_needs_it():
    """Behind what has the only thread there; so it does not matter to them that it is given up."""
    programs, traced, needed = Programs(), Traced(), Traced()
    begun = []
    programs.start("first", lambda: begun.append("first") or traced)
    programs.start("second", lambda: needed)
    needed.go.set()
    program = programs.get("second", lambda: needed)
    programs.cancel()
    assert set(programs.compiled) == {"second"} and programs.get("second", lambda: needed) is program
    traced.go.set()
    programs.get("first", lambda: begun.append("again") or traced)
    assert (traced.count, needed.count) == (1, 1) and begun == ["first"]


def test_pythons_garbage_collection_and_turns_are_the_users():
    """Beside what is compiled in the background, and after it."""
    before, seen = (gc.isenabled(), sys.getswitchinterval()), []

    def trace():
        seen.append((gc.isenabled(), sys.getswitchinterval()))
        return jax.jit(lambda x: x + x).trace(jax.ShapeDtypeStruct((), np.float32))

    programs = Programs()
    programs.start("sum", trace)
    while not programs.compiled:
        time.sleep(0.01)
    assert seen == [before] and (gc.isenabled(), sys.getswitchinterval()) == before


def test_what_failed_is_said_to_who_needs_it_and_tried_again():
    """Memory may be free by then, and what was interrupted may be wanted."""
    programs, errors = Programs(), [RuntimeError("no memory"), KeyboardInterrupt(), RuntimeError("no memory")]

    def trace():
        if errors:
            raise errors.pop()
        return jax.jit(lambda x: x + x).trace(jax.ShapeDtypeStruct((), np.float32))

    programs.start("sum", trace)
    while len(errors) == 3:
        time.sleep(0.01)  # for the background to fail
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            programs.get("sum", trace)
        assert not programs.compiled
    assert programs.get("sum", trace) is programs.get("sum", trace) and not errors


def test_programs_are_of_the_precision_that_was_asked_for():
    """Where the decoder is made; they are traced in other threads."""
    with jax.default_matmul_precision("highest"):
        precise = toy.named_decoder("activations", batch=BATCH, prompt=PROMPT, new=3)
    plain = toy.named_decoder("activations", batch=BATCH, prompt=PROMPT, new=3)
    for name in (("prefill",), ("step", 0)):
        (said,) = side_by_side(lambda name: str(precise._trace(*name).jaxpr), [name])
        assert "HIGHEST" in said and "HIGHEST" not in str(plain._trace(*name).jaxpr)


@pytest.mark.parametrize(("source", "times"), [("f32[7]{0:S(5)}", 2), ("f32[7]{0}", 1)])
def test_a_program_that_copies_from_the_host_is_compiled_twice_with_options_that_do_not_change(source, times):
    """jax's persistent cache knows a program by its options. The profile has kernels, and no copies."""

    class Lowered:
        def __init__(self):
            self.options = []

        def compile(self, compiler_options):
            self.options.append(compiler_options)
            return self

        def as_text(self):
            copy = f"  %copy-start.1 = (f32[7]{{0}}, {source}, u32[]) copy-start(%a)\n"
            return f"HloModule m\n\nENTRY %main {{\n{copy}  ROOT %fusion.3 = f32[7]{{0}} fusion(%b), kind=kLoop\n}}"

    first, second = Lowered(), Lowered()
    for lowered in (first, second):
        assert compile_overlapping(lowered, OVERLAPPING) is lowered
    assert first.options == second.options and len(first.options) == times
    assert [options.get("fdo_profile") for options in first.options[1:]] == [
        b'costs { name: "fusion.3" cost_us: 1e-06 }\n'
    ] * (times - 1)


def test_plans_that_differ_in_words_only_are_equal_programs():
    """A plan's name and reason are not in a program: its text is the same."""
    plan = kvrecomp.named_plan("activations", toy.model().shape, Workload(BATCH, PROMPT, 3))
    renamed = dataclasses.replace(plan, name="renamed", reason="because")
    texts = {kvrecomp.Decoder(toy.model(), plan)._trace_step(0).lower().as_text() for plan in (plan, renamed)}
    assert len(texts) == 1


def test_the_scopes_of_layers_are_not_in_the_program(monkeypatch):
    """They are metadata, which its text without debug information does not have."""

    def lowered():
        return toy.named_decoder("split:0.5", batch=BATCH, prompt=PROMPT, new=3)._trace("step", 0).lower()

    with_scopes = lowered()
    assert "layer_1/" in with_scopes.as_text(debug_info=True)
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    without = lowered()
    assert "layer_1/" not in without.as_text(debug_info=True)
    assert with_scopes.as_text() == without.as_text()
