"""Profiles as data: kept as JSON and read back, refused where they are none, and machines from data sheets."""

import functools
import json
from dataclasses import replace

import pytest

from kvrecomp.plan import LayerShape, PlanError
from kvrecomp.predict.datasheets import DATASHEETS
from kvrecomp.predict.hardware import LARGEST_DEVICE, WORKS, Curve, HardwareProfile, LayerTimes, Line

LAYER = LayerShape(hidden=35, heads=6, kv_heads=2, head_dim=4, intermediate=59, gated=True, absorbs_keys=False)
WORK = {work: Curve.line(number * 1e-6, number * 1e-9) for number, work in enumerate(WORKS, 2)}
WORK |= {"keys_values": Curve((0, 7, 53), (3e-6, 9e-6, 5e-5))}
WORK |= {"device_keys_values": Curve((0, 11, 29, 31), (2e-6, 1e-6, 3e-6, 8e-6))}
TIMES = LayerTimes(LAYER, "bfloat16", 3, WORK, outside=1e-4)
PROFILE = HardwareProfile(
    device="Some GPU",
    device_bytes=80e9,
    to_device=Line(1e-5, 2e-11),
    beside_compute=53e9,
    matmul_rate=7e14,
    memory_rate=3e12,
    handoff_seconds=7e-6,
    kernel_seconds=2e-6,
    host_bytes=512e9,
    count=2,
    jax="0.11.2",
    driver="570.1",
    layers=(TIMES, replace(TIMES, batch=5, vocab=97, positions=101)),
    source="measured",
)

RATES = ["device_bytes", "beside_compute", "matmul_rate", "memory_rate"]
OTHERS = ["handoff_seconds", "kernel_seconds", "host_bytes"]  # which may be zero


# --- kept as JSON -----------------------------------------------------------------------------------------------------


def through_json(profile):
    return json.loads(json.dumps(profile.to_json()))


@pytest.mark.parametrize("profile", [PROFILE, HardwareProfile.from_datasheet("t4")], ids=["measured", "data sheet"])
def test_a_profile_survives_json(profile):
    """Bit by bit; and with what older ones say that nobody read."""
    data = through_json(profile)
    assert HardwareProfile.from_json(data) == profile and through_json(HardwareProfile.from_json(data)) == data
    assert HardwareProfile.from_json(data | {"measured_in": 5.0, "to_host": {"base": 1.0, "each": 2.0}}) == profile


def changed(*path, to=None):
    """The profile's JSON with one value replaced; removed where `to` is KeyError."""
    data = through_json(PROFILE)
    *parents, last = path
    inner = data
    for key in parents:
        inner = inner[key]
    if to is KeyError:
        del inner[last]
    else:
        inner[last] = to
    return data


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "profile",
        {},
        *(changed(name, to=bad) for name in RATES for bad in (0, -1.0, float("nan"), float("inf"), "5", None)),
        *(changed(name, to=bad) for name in OTHERS for bad in (-1.0, float("nan"), "5")),
        *(changed(name, to=KeyError) for name in [*RATES, "to_device", "layers", "device"]),
        changed("unheard_of", to=1),
        changed("to_device", to=3.0),
        changed("to_device", "base", to=-1e-6),
        changed("to_device", "each", to=float("nan")),
        changed("to_device", "each", to="slow"),
        changed("to_device", "each", to=KeyError),
        changed("layers", to=7),
        changed("layers", to={"a": 1}),
        changed("layers", 0, to=None),
        changed("layers", 0, "layer", "heads", to=KeyError),
        changed("layers", 0, "layer", "hidden", to=0),
        changed("layers", 0, "work", to=[1, 2]),
        changed("layers", 0, "work", "project", to=KeyError),
        changed("layers", 1, "work", "absorb", "seconds", 1, to=-1e-9),
        changed("layers", 1, "work", "absorb", "sizes", to=[0, 0]),
        changed("layers", 1, "work", "keys_values", "sizes", to=[0, 9]),
        changed("layers", 1, "work", "keys_values", "sizes", 0, to=1),
        changed("layers", 1, "work", "prepare", "seconds", to=KeyError),
        changed("layers", 1, "outside", to=KeyError),
        changed("layers", 1, "outside", to=float("nan")),
    ],
)
def test_corrupt_data_are_refused(data):
    with pytest.raises((PlanError, TypeError, KeyError, ValueError)):
        HardwareProfile.from_json(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(PROFILE, memory_rate=0.0), "HardwareProfile: memory_rate is 0.0; it must be a finite number"),
        (lambda: replace(PROFILE, host_bytes=-7.0), "HardwareProfile: host_bytes is -7.0; it must be a finite number"),
        (
            lambda: replace(PROFILE, kernel_seconds=10**40),
            f"kernel_seconds is {10**40}; it must be a finite number, not",
        ),
        (
            lambda: replace(PROFILE, beside_compute=1e-300),
            "beside_compute is 1e-300; it must be a finite number, from 1",
        ),
        (lambda: Line(-1e-9, 0.0), "Line: base is -1e-09; it must be a finite number, not negative"),
        (lambda: Line(0.0, float("nan")), "Line: each is nan; it must be a finite number, not negative"),
        (lambda: Curve((0, 1), (1.0, float("nan"))), "Curve: seconds is nan; it must be a finite number, not negative"),
        (lambda: replace(TIMES, work={"project": Curve.line(0.0)}), "project; expected project, project_absorb"),
        *(
            (functools.partial(Curve, tuple(sizes), (1.0,) * count), "expected as many of both, 2 to 7, and sizes that")
            for sizes, count in [([0], 1), ([1, 2], 2), ([0, 2, 2], 3), ([0, 2], 3), ([0, 2, 3], 2), (range(8), 8)]
        ),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(PlanError) as raised:
        make()
    assert message in str(raised.value)


def test_a_curve_by_hand():
    """Straight between its points, and on from the last two, but never less than nothing."""
    assert Line(2.0, 3.0)(5) == 17.0
    curve = Curve((0, 4, 6), (3.0, 5.0, 1.0))
    assert [curve(size) for size in (0, 1, 4, 5, 6, 6.25, 7)] == [3.0, 3.5, 5.0, 3.0, 1.0, 0.5, 0.0]
    assert curve.knots.tolist() == [[0, 4, 6, 8, 10, 12, 14], [3, 5, 1, -3, -7, -11, -15]]
    assert curve.times(2.0) == Curve((0, 4, 6), (6.0, 10.0, 2.0))
    assert curve.plus(-2.0) == Curve((0, 4, 6), (1.0, 3.0, 0.0)) and curve.plus(0.5).seconds == (3.5, 5.5, 1.5)
    assert [Curve.line(2.0, 3.0)(size) for size in (0, 5)] == [2.0, 17.0] and Curve.line(2.0)(7) == 2.0


# --- data sheets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASHEETS)
def test_data_sheets_are_plausible(name):
    """A unit wrong by a thousand, or gigabits for gigabytes, would be outside of these."""
    sheet = DATASHEETS[name]
    profile = HardwareProfile.from_datasheet(name)
    assert ("data sheet" in profile.source or "white paper" in profile.source) and "; link: " in profile.source
    assert profile.device == sheet.device and profile.host_bytes is None and profile.layers == ()
    assert 8e9 <= profile.device_bytes <= 200e9 < LARGEST_DEVICE
    assert 5e9 <= profile.beside_compute <= 500e9
    assert profile.to_device(profile.beside_compute) == pytest.approx(1.0)
    assert 5 * profile.beside_compute < profile.memory_rate < 100 * profile.beside_compute
    assert 200e9 <= profile.memory_rate <= 10e12
    assert 50 < profile.matmul_rate / profile.memory_rate < 400  # operations a byte


def test_data_sheets_by_hand():
    """A100 40 GB PCIe, NVIDIA's data sheet: 312 TFLOPS in bfloat16, 1555 GB/s; its link as KVPR counts it, 32 GB/s."""
    a100 = HardwareProfile.from_datasheet("a100")
    assert (a100.device_bytes, a100.matmul_rate, a100.memory_rate) == (40e9, 312e12, 1555e9)
    assert a100.beside_compute == 32e9
    # PCIe 3.0 and 5.0 with 16 lanes, 8 and 32 GT/s in 128 of 130 bits.
    lanes = 16 * 128 / 130 / 8
    links = {name: HardwareProfile.from_datasheet(name).beside_compute for name in DATASHEETS}
    assert links["t4"] == links["rtx5000"] == pytest.approx(8e9 * lanes, rel=2e-3)
    assert links["rtx4090"] == pytest.approx(16e9 * lanes, rel=2e-3)
    assert links["h100"] == links["h200"] == pytest.approx(32e9 * lanes, rel=2e-3)
    assert links["gh200"] == 450e9


def test_an_unknown_data_sheet_names_those_that_are_there():
    with pytest.raises(PlanError) as raised:
        HardwareProfile.from_datasheet("a1000")
    names = "a100, rtx5000, rtx4090, t4, h100, h200, gh200"
    assert str(raised.value) == f"there is no data sheet 'a1000'; there are {names}" and names == ", ".join(DATASHEETS)
