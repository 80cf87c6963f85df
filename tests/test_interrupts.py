"""Ctrl-C wherever it may come leaves no thread, no cache and nothing to wait for behind."""

import dis
import gc
import sys
import threading
import time
import traceback
import types

import jax
import numpy as np
import pytest
import toy

import kvrecomp
from kvrecomp import background as background_module
from kvrecomp.background import BackgroundIterator
from kvrecomp.generate import TokenLoop
from kvrecomp.run import programs as programs_module
from kvrecomp.run.programs import Programs
from kvrecomp.run.sampling import Sampling

# After these, and as a function begins or goes on, the interpreter looks for signals.
CHECKED = ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD")


class Interrupts:
    """Calls functions, with KeyboardInterrupt at the first place of these files where one may come in this thread, at
    the second and so on."""

    def __init__(self, *files):
        self.files = files

    def _raises_at(self, number):
        left, before = [number], {}

        def trace(frame, event, _):
            if frame.f_code.co_filename not in self.files:
                return None
            frame.f_trace_opcodes = True
            seen = event == "call"
            if event == "opcode":
                seen = before.get(frame) in CHECKED
                before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if event == "return":
                before.pop(frame, None)  # or the frame would live on, with all that it has
            left[0] -= seen
            if left[0] < 0:
                before.clear()
                raise KeyboardInterrupt
            return trace

        return trace

    def errors(self, function, step=1):
        """The error of each call, with its traceback and so with the frames; ends with a call that has none."""
        for number in range(0, 10**6, step):
            before = sys.gettrace()
            sys.settrace(self._raises_at(number))
            try:
                function()
            except KeyboardInterrupt as error:
                sys.settrace(before)
                yield error
            else:
                sys.settrace(before)
                assert number > 10, "hardly anything was interrupted"
                return


def reading_threads():
    """How many threads are in a BackgroundIterator, once those that end have had the time to."""
    for _ in range(1000):
        frames = (frame for first in sys._current_frames().values() for frame, _ in traceback.walk_stack(first))
        count = sum(frame.f_code is BackgroundIterator._make.__code__ for frame in frames)
        if not count:
            break
        time.sleep(0.01)
    return count


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(background_module, "LOOK_SECONDS", 0.002)


@pytest.mark.parametrize("read", [2, 7])
def test_the_thread_ends_and_lets_go_wherever_its_reader_is_interrupted(read):
    """Of seven items, some or all of them read. Also while the traceback is kept, as a notebook does."""
    held = []

    def seven():
        holds = types.SimpleNamespace()
        held.append(holds)
        try:
            yield from range(7)
        finally:
            held.remove(holds)

    def run():
        numbers = BackgroundIterator(seven(), 2)
        with numbers.reading, numbers as items:
            for number in items:
                if number + 1 == read:
                    break

    tried = 0
    for error in Interrupts(background_module.__file__, __file__).errors(run):
        tried += 1
        assert not reading_threads() and not held, f"interruption {tried} left something"
        del error
    assert tried > 20


def test_what_decodes_is_gone_wherever_decoding_is_interrupted():
    """The thread, and the cache that it held: as many arrays are there as before."""
    decoder = toy.named_decoder("split:0.5", batch=2, prompt=5, new=4, tail=4)
    given = toy.texts(2, 5)
    loop = TokenLoop(decoder, Sampling(), (), 0, progress=False)
    loop.run(given.ids, given.mask, 4)
    gc.collect()
    before = len(jax.live_arrays())
    tried = 0
    for error in Interrupts(background_module.__file__, sys.modules[TokenLoop.__module__].__file__).errors(
        lambda: loop.run(given.ids, given.mask, 4), step=3
    ):
        tried += 1
        assert not reading_threads(), f"interruption {tried} left a thread"
        del error
    gc.collect()
    assert tried > 5 and len(jax.live_arrays()) <= before


def test_whoever_needs_a_program_gets_it_wherever_who_compiled_it_was_interrupted():
    def trace():
        return jax.jit(lambda x: x + x).trace(jax.ShapeDtypeStruct((), np.float32))

    tables = [Programs()]

    def run():
        tables.append(Programs())
        tables[-1].get("step", trace)

    tried = 0
    for error in Interrupts(programs_module.__file__).errors(run):
        tried, got = tried + 1, []
        again = threading.Thread(target=lambda: got.append(tables[-1].get("step", trace)), daemon=True)  # noqa: B023
        again.start()
        again.join(10)
        assert got, f"interruption {tried} left a program that everyone waits for"
        del error
    assert tried > 20


def test_a_run_goes_on_after_an_interruption():
    """As a notebook's cell that is run again."""
    given = toy.texts(2, 5)
    ids = given.ids
    plan = kvrecomp.named_plan("activations", toy.model().shape, kvrecomp.Workload(2, 5, 3))
    expected = kvrecomp.generate(toy.model(), ids, max_new_tokens=3, plan=plan).sequences

    class Streamer:
        def put(self, value):
            if value.ndim == 1:
                raise KeyboardInterrupt

        def end(self):
            raise AssertionError("it was interrupted")

    with pytest.raises(KeyboardInterrupt):
        kvrecomp.generate(toy.model(), ids, max_new_tokens=3, plan=plan, streamer=Streamer())
    np.testing.assert_array_equal(kvrecomp.generate(toy.model(), ids, max_new_tokens=3, plan=plan).sequences, expected)
