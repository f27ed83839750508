"""The emulated AVX-512 and AMX intrinsics against what Intel's manual says, and against hardware.

Of the build that `make emulated` makes and names. Where the processor has the instructions, they
are held against the same oracles: these could be wrong too.
"""

import os
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import gen_fast  # noqa: F401  (its path, in tests/conftest.py, leads to the emulated modules)
from gen_fast.ops import native

if "GEN_FAST_EMULATED" not in os.environ:
    pytest.skip("run by make emulated", allow_module_level=True)

from gen_fast import _intrinsics

Oracle = Callable[..., np.ndarray]

SMALLEST = 2.0**-126  # normal float32
EDGES = np.array(
    [
        *(0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 2.5, 3.0),
        *(1e-45, -1e-45, 2.0**-127, -(2.0**-128), SMALLEST, -SMALLEST, 3.4028235e38, -3.4028235e38),
        *(2.0**127, 1.7e38, 127.0, 127.5, -126.0, -126.5, -149.0, -150.0, -1e30, 1e30),
    ],
    dtype=np.float32,
)
# Halfway between two bfloat16, above an even and an odd one; the largest floats; signalling NaN.
EDGE_BITS = np.array(
    [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF7F8000, 0x7FA00000], dtype=np.uint32
)
LARGEST_32 = np.array([0, 1, -1, 2**31 - 1, -(2**31), 2**24 + 1, 255, 256], dtype=np.int32)


@pytest.fixture(params=["emulated", "hardware"])
def in_hardware(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "hardware")


def run(name: str, *inputs: np.ndarray, in_hardware: bool = False, mask: int = 0xFFFF) -> bytes:
    if in_hardware and not _intrinsics.in_hardware(name):
        pytest.skip(f"{name}: not on this processor")
    return bytes(_intrinsics.run(name, in_hardware, mask, [x.tobytes() for x in inputs]))


def floats(rng: np.random.Generator) -> np.ndarray:
    """16 of them: random bits, moderate values, or edges."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(0, 2**32, 16, dtype=np.uint32).view(np.float32)
    if kind == 1:
        return (rng.standard_normal(16) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
    return rng.choice(np.concatenate([EDGES, EDGE_BITS.view(np.float32)]), 16)


def integers(rng: np.random.Generator) -> np.ndarray:
    """64 bytes, some of them at the ends of their range."""
    if rng.integers(2):
        return rng.choice(LARGEST_32, 16).view(np.uint8)
    return rng.integers(0, 256, 64, dtype=np.uint8)


def masked(mask: int, lanes: np.ndarray) -> np.ndarray:
    keep = (mask >> np.arange(len(lanes))) & 1
    return np.where(keep.astype(bool), lanes, lanes.dtype.type(0))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def interleaved(first: int, width: int) -> Oracle:
    """Elements first, first + 1, … of each 16 bytes of a and b in turns."""

    def oracle(mask: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (x.view(f"<u{width}").reshape(4, -1) for x in (a, b))
        half = a.shape[1] // 2
        both = np.stack([a[:, first : first + half], b[:, first : first + half]], axis=2)
        return masked(mask, both.reshape(-1))

    return oracle


def shuffled(*parts: int) -> Oracle:
    def oracle(mask: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (x.view("<u4").reshape(4, 4) for x in (a, b))
        return masked(mask, np.concatenate([a[parts[0]], a[parts[1]], b[parts[2]], b[parts[3]]]))

    return oracle


def multiplied(mask: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = [int(x) * int(y) for x, y in zip(a.view("<u4")[::2], b.view("<u4")[::2], strict=True)]
    return masked(mask, np.array(low, dtype=np.uint64))


def byte_products(mask: int, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = a.view(np.uint8).astype(np.int64) * b.view(np.int8)
    total = c.view(np.int32) + products.reshape(-1, 4).sum(1)
    return (total & 0xFFFFFFFF).astype(np.uint32)


def to_bf16(mask: int, x: np.ndarray) -> np.ndarray:
    """By the two neighbours: the nearer one, or the even one."""
    x = flushed(x.view(np.float32))
    bits = x.view(np.uint32)
    below = (bits >> 16).astype(np.uint32)
    distance = bits & 0xFFFF
    up = (distance > 0x8000) | ((distance == 0x8000) & (below % 2 == 1))
    out = np.where(np.isnan(x), below | 0x40, below + np.where(np.isinf(x), 0, up))
    return out.astype(np.uint16)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum, and what was rounded off (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def remainders(control: int) -> Oracle:
    rounding = {0: np.rint, 1: np.floor, 2: np.ceil, 3: np.trunc}[control & 3]

    def oracle(mask: int, x: np.ndarray) -> np.ndarray:
        wide = x.view(np.float32).astype(np.float64)
        scale = 2.0 ** (control >> 4)
        whole = rounding(wide * scale) / scale
        exact, error = two_sum(wide, -whole)
        out = exact.astype(np.float32)
        # The difference too is rounded the way that control says (seen on a Zen 5).
        if control & 3 in (1, 2):
            sign = -1 if control & 3 == 1 else 1
            beyond = sign * (exact - out)
            again = (beyond > 0) | ((beyond == 0) & (sign * error > 0))
            out[again] = np.nextafter(out[again], np.float32(sign * np.inf))
        out[np.isinf(wide)] = 0
        out[out == 0] = -0.0 if control & 3 == 1 else 0.0
        out[np.isinf(wide)] = 0
        return masked(mask, out)

    return oracle


def with_power(mask: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.view(np.float32).astype(np.float64) for x in (a, b))
    out = (a * 2.0 ** np.clip(np.floor(b), -400, 400)).astype(np.float32)
    out[np.isinf(b) & (b < 0) & np.isinf(a)] = np.nan
    out[np.isinf(b) & (b > 0) & (a == 0)] = np.nan
    quiet = np.isnan(a)  # the signalling ones were made quiet on their way to float64
    out[quiet & (b == np.inf)] = np.inf
    out[quiet & (b == -np.inf)] = 0
    return masked(mask, out)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return flushed((x.view(np.uint16).astype(np.uint32) << 16).view(np.float32))


def pair_products(mask: int, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact products in float64, a rounding for each sum: odd elements first."""
    products = from_bf16(a).astype(np.float64) * from_bf16(b)
    total = flushed(c.view(np.float32))
    for one in (products[1::2], products[::2]):
        total = flushed((total.astype(np.float64) + one).astype(np.float32))
    return total


INTEGERS: dict[str, tuple[Oracle, tuple[int, ...]]] = {  # by the bytes of the inputs
    "loadu_si512": (lambda mask, a: a, (64,)),
    "storeu_si512": (lambda mask, a: a, (64,)),
    "maskz_loadu_epi32": (lambda mask, a: masked(mask, a.view("<u4")), (64,)),
    "set1_epi32": (lambda mask, a: np.tile(a, 16), (4,)),
    "xor_si512": (lambda mask, a, b: a ^ b, (64, 64)),
    "maskz_unpacklo_epi32": (interleaved(0, 4), (64, 64)),
    "maskz_unpackhi_epi32": (interleaved(2, 4), (64, 64)),
    "maskz_unpacklo_epi64": (interleaved(0, 8), (64, 64)),
    "maskz_unpackhi_epi64": (interleaved(1, 8), (64, 64)),
    "maskz_shuffle_i32x4 88": (shuffled(0, 2, 0, 2), (64, 64)),
    "maskz_shuffle_i32x4 dd": (shuffled(1, 3, 1, 3), (64, 64)),
    "maskz_shuffle_i32x4 1b": (shuffled(3, 2, 1, 0), (64, 64)),
    "maskz_permutexvar_ps": (
        lambda mask, index, a: masked(mask, a.view("<u4")[index.view("<u4") % 16]),
        (64, 64),
    ),
    "maskz_permutexvar_epi16": (
        lambda mask, index, a: masked(mask, a.view("<u2")[index.view("<u2") % 32]),
        (64, 64),
    ),
    "maskz_mul_epu32": (multiplied, (64, 64)),
    "dpbusd_epi32": (byte_products, (64, 64, 64)),
    "256 dpbusd_avx_epi32": (byte_products, (32, 32, 32)),
    "maskz_cvtepu8_epi32": (lambda mask, a: masked(mask, a.astype(np.uint32)), (16,)),
    "maskz_cvtepu16_epi32": (lambda mask, a: masked(mask, a.view("<u2").astype("<u4")), (32,)),
    "maskz_cvtepi32_epi8": (lambda mask, a: masked(mask, a[::4]), (64,)),
    "cvtepi32_ps": (lambda mask, a: a.view(np.int32).astype(np.float32), (64,)),
}
FLOATS: dict[str, tuple[Oracle, int]] = {  # by the number of inputs
    "cvtneps_pbh": (to_bf16, 1),
    "cvtne2ps_pbh": (
        lambda mask, high, low: np.concatenate((to_bf16(mask, low), to_bf16(mask, high))),
        2,
    ),
    "dpbf16_ps": (pair_products, 3),
    "maskz_reduce_ps nearest": (remainders(0x00), 1),
    "maskz_reduce_ps down": (remainders(0x21), 1),
    "maskz_reduce_ps up": (remainders(0x12), 1),
    "maskz_reduce_ps to zero": (remainders(0x03), 1),
    "maskz_scalef_ps": (with_power, 2),
}


def test_the_ops_under_test_are_the_emulated_ones() -> None:
    assert native.module().emulated
    assert os.path.realpath(os.environ["GEN_FAST_EMULATED"]) in native.module().__file__
    if native.isa() == native.Isa.BASELINE:
        pytest.skip("this processor has no AVX2")
    assert native.isa() == native.Isa.AMX
    assert native.instructions() == "AVX-512 with VNNI, bfloat16 and AMX"


def test_where_the_system_refuses_tiles_attention_runs_without_and_info_says_so() -> None:
    if native.isa() == native.Isa.BASELINE:
        pytest.skip("this processor has no AVX2")
    code = (
        "import os, torch, gen_fast; "
        "gen_fast.__path__.insert(0, os.environ['GEN_FAST_EMULATED'] + '/gen_fast'); "
        "from gen_fast.ops.attention import AttentionOptions, attention; "
        "starts = torch.tensor([0, 3]).int(); "
        "x = torch.ones(3, 1, 8).bfloat16(); "
        "assert attention(x, x, x, AttentionOptions(starts, starts), impl='cpu').eq(1).all(); "
        "from gen_fast.cli.app import main; "
        "main()"
    )
    folder = os.path.realpath(os.environ["GEN_FAST_EMULATED"])
    refusing = {**os.environ, "GEN_FAST_EMULATED": folder, "GEN_FAST_EMULATED_REFUSES_TILES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "--device", "cpu"],
        env=refusing,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("instructions:")]
    assert line == (
        "instructions: AVX-512 with VNNI and bfloat16"
        " (AMX is there, but the system refuses its tiles to this process)"
    ), done


def test_every_intrinsic_has_a_test() -> None:
    tiles = {"tile_dpbssd", "tile_dpbf16ps"}
    assert set(_intrinsics.names()) == {*INTEGERS, *FLOATS, "maskz_rcp14_ps", *tiles}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str, in_hardware: bool) -> None:
    oracle, sizes = INTEGERS[name]
    rng = np.random.default_rng(0)
    for mask in (2**32 - 1, 0, 0xFF, 0x5A3C, *rng.integers(0, 2**32, 100).tolist()):
        inputs = [integers(rng)[:size] for size in sizes]
        out = run(name, *inputs, mask=mask, in_hardware=in_hardware)
        assert out == oracle(mask, *inputs).tobytes(), (mask, inputs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str, in_hardware: bool) -> None:
    oracle, count = FLOATS[name]
    rng = np.random.default_rng(0)
    for mask in (2**32 - 1, 0, 0x5A3C, *rng.integers(0, 2**32, 500).tolist()):
        inputs = [floats(rng) for _ in range(count)]
        expected = oracle(mask, *inputs)
        out = np.frombuffer(run(name, *inputs, mask=mask, in_hardware=in_hardware), expected.dtype)
        if in_hardware and name == "dpbf16_ps":  # processors add in different orders
            magnitude = summed_magnitudes(*inputs)
            near = np.abs(out - expected) <= 2.0**-22 * magnitude + 2 * SMALLEST
            assert (near | ~(magnitude < 3e38)).all(), inputs
            continue
        assert bits_without_nan(out).tolist() == bits_without_nan(expected).tolist(), inputs


def summed_magnitudes(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = np.abs(from_bf16(a).astype(np.float64) * from_bf16(b))
    return np.abs(c.view(np.float32)) + products[::2] + products[1::2]


def bits_without_nan(x: np.ndarray) -> np.ndarray:
    """The bits, also of zeros; all NaN alike, as a float's NaN may be any."""
    if x.dtype == np.uint16:
        return x
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


def test_reciprocals(in_hardware: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        exponents = rng.integers(-125, 125, 16)
        significands = rng.choice([-1, 1], 16) * rng.uniform(1, 2, 16)
        x = np.ldexp(significands, exponents).astype(np.float32)
        out = np.frombuffer(run("maskz_rcp14_ps", x, in_hardware=in_hardware), np.float32)
        assert np.abs(out.astype(np.float64) * x - 1).max() < 2.0**-14
        powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
        out = np.frombuffer(run("maskz_rcp14_ps", powers, in_hardware=in_hardware), np.float32)
        assert out.tolist() == (1 / powers).tolist()
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, 2.0**-128, -1e-45, *[1] * 9], np.float32)
    out = np.frombuffer(run("maskz_rcp14_ps", edges, in_hardware=in_hardware), np.float32)
    expected = [np.inf, -np.inf, 0, -0.0, np.nan, np.inf, -np.inf]
    assert bits_without_nan(out)[:7].tolist() == bits_without_nan(np.float32(expected)).tolist()
    out = np.frombuffer(run("maskz_rcp14_ps", edges, mask=0x8000, in_hardware=in_hardware), "<f4")
    assert out.tolist() == [0] * 15 + [1]


def test_estimated_reciprocals_are_not_more_exact_than_hardware_has_to_be() -> None:
    x = np.random.default_rng(0).uniform(1, 2, (100, 16)).astype(np.float32)
    out = np.array([np.frombuffer(run("maskz_rcp14_ps", row), np.float32) for row in x])
    assert np.abs(out.astype(np.float64) * x - 1).max() > 0.9 * 2.0**-14


def test_odd_elements_are_added_first() -> None:
    """2^24 + 1 is a tie, which goes to 2^24; the other way round 1 would be left."""
    c = np.full(16, 2.0**24, np.float32)
    a = np.tile(np.float32([-(2.0**24), 1]), 16)
    b = np.ones(32, np.float32)
    a, b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    assert np.frombuffer(run("dpbf16_ps", c, a, b), np.float32).tolist() == [0.0] * 16


def configuration(m: int, n: int, k: int, **changes: int) -> np.ndarray:
    """Of tiles 0: [m, n], 1: [m, k] and 2: [k, n] groups of 4 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    rows, columns = (m, m, k), (4 * n, 4 * k, 4 * n)
    config[48:51] = rows
    config[16:22] = np.frombuffer(struct.pack("<3H", *columns), np.uint8)
    for byte, value in changes.items():
        config[int(byte.removeprefix("byte"))] = value
    return config


SHAPES = [(16, 16, 16), (1, 1, 1), (5, 16, 3), (16, 7, 16), (3, 2, 11)]


def tiles(rng: np.random.Generator, dtype: type) -> list[np.ndarray]:
    if dtype is np.int8:
        return [rng.integers(0, 256, 1024, dtype=np.uint8) for _ in range(3)]
    c, a, b = (rng.standard_normal(size).astype(np.float32) for size in (256, 512, 512))
    return [c, *((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))]


def groups(tile: np.ndarray, rows: int, columns: int, dtype: type, size: int) -> np.ndarray:
    """[rows, columns, size]"""
    return tile.view(dtype).reshape(16, 16, size)[:rows, :columns]


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_of_integers(shape: tuple[int, int, int], in_hardware: bool) -> None:
    m, n, k = shape
    c, a, b = tiles(np.random.default_rng(0), np.int8)
    out = run("tile_dpbssd", configuration(m, n, k), c, a, b, in_hardware=in_hardware)
    left = groups(a, m, k, np.int8, 4).astype(np.int64)
    right = groups(b, k, n, np.int8, 4).astype(np.int64)
    total = groups(c, m, n, np.int32, 1)[..., 0] + np.einsum("mkg,kng->mn", left, right)
    expected = np.full((16, 16), 0xAAAAAAAA, np.uint32)
    expected[:m, :n] = (total & 0xFFFFFFFF).astype(np.uint32)
    assert out == expected.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_of_bfloat16(shape: tuple[int, int, int], in_hardware: bool) -> None:
    m, n, k = shape
    c, a, b = tiles(np.random.default_rng(0), np.float32)
    printed = run("tile_dpbf16ps", configuration(m, n, k), c, a, b, in_hardware=in_hardware)
    out = np.frombuffer(printed, np.float32).reshape(16, 16)
    left, right = from_bf16(a).reshape(16, 16, 2), from_bf16(b).reshape(16, 16, 2)
    exact = np.einsum("mkg,kng->mn", left[:m, :k].astype(np.float64), right[:k, :n])
    np.testing.assert_allclose(out[:m, :n], c.reshape(16, 16)[:m, :n] + exact, atol=1e-5)
    assert (out.view(np.uint32)[m:] == 0xAAAAAAAA).all()
    assert (out.view(np.uint32)[:, n:] == 0xAAAAAAAA).all()


def test_tiles_take_denormals_for_zeros() -> None:
    denormal, one = np.float32(2.0**-127), np.float32(1)
    c, b = np.full(256, denormal), np.full(512, one)
    for value, sum_of_one in ((denormal, 0), (np.float32(SMALLEST), 2 * SMALLEST)):
        a, ones = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (np.full(512, value), b))
        out = run("tile_dpbf16ps", configuration(16, 16, 1), c, a, ones)
        assert np.frombuffer(out, np.float32).tolist() == [sum_of_one] * 256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (configuration(16, 16, 16, byte48=17), "at most 16 rows"),
        (configuration(16, 16, 16, byte16=68), "at most 64 bytes"),
        (configuration(16, 16, 16, byte48=0), "bytes without rows"),
        (configuration(16, 16, 16, byte48=0, byte16=0), "not configured"),
        (configuration(16, 16, 16, byte0=0), "not configured"),
        (configuration(16, 16, 16, byte0=2), "palette"),
        (configuration(16, 16, 16, byte1=1), "later row"),
        (configuration(16, 16, 16, byte63=1), "reserved"),
        (configuration(16, 16, 16, byte48=15), "as many rows as the left"),
        (configuration(16, 16, 16, byte16=60), "as long as the right tile's"),
        (configuration(16, 16, 16, byte50=15), "as the right has rows"),
        (configuration(16, 16, 16, byte18=62), "whole groups of 4"),
    ],
)
@pytest.mark.parametrize("name", ["tile_dpbssd", "tile_dpbf16ps"])
def test_what_would_be_a_fault_ends_the_process(
    name: str, config: np.ndarray, message: str
) -> None:
    code = (
        "import sys, importlib.machinery as m; "
        f"_C = m.ExtensionFileLoader('_intrinsics', {_intrinsics.__file__!r}).load_module(); "
        f"_C.run({name!r}, False, 0, [bytes({config.tolist()}), *[bytes(1024)] * 3])"
    )
    command = [sys.executable, "-S", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -6, done
    assert message in done.stderr
