"""How fast the runtime computes: that what is measured is what it says, in sizes that take no time."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from pocketmoe.ort import Rows, Session, session_options
from pocketmoe.profiles.estimate.roofline import scheme_bits
from pocketmoe.profiles.machine import computing, layer_costs
from pocketmoe.profiles.machine.computing import DENSE, EXPERTS, measure_computing
from pocketmoe.profiles.machine.made_up import Form, chain, expert_record
from pocketmoe.profiles.machine.pace import Pace
from pocketmoe.quantize.algorithms.formats import parse_format
from pocketmoe.quantize.schemes import find_scheme

HIDDEN, WIDTH = 256, 128


@pytest.mark.parametrize("form", EXPERTS, ids=lambda form: form.scheme)
def test_made_up_weights_are_stored_as_bundles_store_them(form: Form) -> None:
    """To the shape and the byte; their label says the bits that predictions reckon with."""
    known = parse_format(form.scheme)
    assert [shape for _, _, shape in form.tensors(WIDTH, HIDDEN)] == known.shapes(WIDTH, HIDDEN)
    assert form.nbytes(WIDTH, HIDDEN) == known.nbytes(WIDTH, HIDDEN)
    assert 8 * form.nbytes(WIDTH, HIDDEN) / WIDTH / HIDDEN == pytest.approx(scheme_bits(form.scheme))
    record = expert_record(form, HIDDEN, WIDTH)
    assert len(record) == form.nbytes(2 * WIDTH, HIDDEN) + form.nbytes(HIDDEN, WIDTH)


def test_the_formats_of_every_scheme_are_measured() -> None:
    """But for mixed and int2, which are reckoned by the format that is most alike."""
    schemes = [find_scheme(name) for name in ("int4", "int8", "nf4", "int4-all")]
    assert {scheme.experts.label for scheme in schemes} <= {form.scheme for form in EXPERTS}
    assert {scheme.dense["attention"].label for scheme in schemes} <= {form.scheme for form in DENSE}


@pytest.mark.parametrize("form", DENSE, ids=lambda form: form.scheme)
def test_a_run_of_products_is_one(form: Form) -> None:
    """Twice the input is twice the output, of all bytes that it says it has."""
    widths = (128, 256, 128)
    model, nbytes = chain(form, widths)
    assert nbytes == sum(form.nbytes(n, k) for k, n in pairwise(widths))
    run = Rows(Session(model, session_options(1), "made up")).run
    x = np.random.default_rng(0).standard_normal((1, 128), np.float32)
    once = run(x).copy()
    assert np.abs(once).max() > 0
    np.testing.assert_allclose(run(2 * x), 2 * once, rtol=1e-3, atol=1e-6)


def test_every_format_on_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In sizes that take no time: each figure is there, and none is nothing."""
    for name, value in (("HIDDEN", HIDDEN), ("WIDTH", WIDTH), ("TEXT", 8), ("LONGEST_S", 0.0)):
        monkeypatch.setattr(computing, name, value)
    monkeypatch.setattr(computing, "FAR", (HIDDEN, WIDTH, HIDDEN))
    monkeypatch.setattr(computing, "NEAR", (WIDTH, WIDTH))
    monkeypatch.setattr(computing, "DISPLACING_BYTES", 1 << 12)
    for name in ("TOKENS", "TOKENS_FAR", "TOKENS_WAITING"):
        monkeypatch.setattr(layer_costs, name, 1)
    said: list[str] = []
    found = measure_computing((1, 2, 2), lambda what, _done, _total: said.append(what))
    expected = {("experts", form.scheme) for form in EXPERTS} | {("dense", form.scheme) for form in DENSE}
    expected.add(("caches", "fp32"))
    assert {(each.what, each.scheme, each.threads) for each in found.products} == {
        (*each, threads) for each in expected for threads in (1, 2)
    }
    for each in found.products:
        assert 0 < each.far_bytes_per_s <= each.near_bytes_per_s < math.inf
        assert 0 <= each.busy_cpus <= each.threads
    layer = found.layer
    for part in ("segment", "expert", "python"):
        assert 0 < getattr(layer, f"near_{part}_s") <= getattr(layer, f"far_{part}_s")
    assert min(layer.miss_s, layer.long_miss_s, layer.long_wait_s) >= 0
    assert found.spread >= 1
    assert said[0] == "computing experts"


def test_a_pace_is_of_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean leaves out a twentieth at either end, the spread a tenth."""
    clock = iter(range(10_000))
    waits = [*range(1, 100), 10**6]
    ticks = [tick for begin, wait in zip(clock, waits, strict=False) for tick in (1000 * begin, 1000 * begin + wait)]
    monkeypatch.setattr("pocketmoe.profiles.machine.pace.time.perf_counter", iter(ticks).__next__)
    pace = Pace()
    for _ in waits:
        pace()
    assert pace.mean_s == pytest.approx(50.5)
    assert pace.median_s == pytest.approx(50.5)
    assert pace.spread == pytest.approx(91 / 11)
