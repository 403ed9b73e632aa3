"""What a model would take where nobody ran it, in figures: the same plan as the runtime's, from shapes."""

from __future__ import annotations

import pytest

from pocketmoe.profiles.estimate import footprint, shapes
from pocketmoe.profiles.measure.measure import budget_bytes
from pocketmoe.profiles.routing.replay import Sizes
from tests.profiles import made_up
from tests.profiles.plan.test_plan import OLMOE, QWEN3

# fixed part, least budget, budget for a quarter of the experts, at 64 and at 2048 tokens of text
FIGURES = {
    ("olmoe", "fp32"): [(1937192857, 2339846041, 8429975449), (2560636825, 2963290009, 9053419417)],
    ("olmoe", "int8"): [(626032128, 732986880, 2387639808), (1249476096, 1356430848, 3011083776)],
    ("olmoe", "int4"): [(607452672, 664862208, 1576336896), (1230896640, 1288306176, 2199780864)],
    ("olmoe", "int4-all"): [(390650880, 444521472, 1302912000), (1014094848, 1067965440, 1926355968)],
    ("qwen3", "fp32"): [(5691766272, 5993756160, 34984785408), (6234732032, 6536721920, 35527751168)],
    ("qwen3", "int8"): [(1675734937, 1755951001, 9678466969), (2218700697, 2298916761, 10221432729)],
    ("qwen3", "int4"): [(1661800345, 1704857497, 6097276825), (2204766105, 2247823257, 6640242585)],
    ("qwen3", "int4-all"): [(954771865, 995174809, 5138590105), (1497737625, 1538140569, 5681555865)],
    ("olmoe", "nf4"): [(607157760, 663780864, 1563459072), (1230601728, 1287224832, 2186903040)],
    ("olmoe", "mixed"): [(602439168, 646479360, 1357413888), (1225883136, 1269923328, 1980857856)],
    ("qwen3", "nf4"): [(1661579161, 1704046489, 6040432537), (2204544921, 2247012249, 6583398297)],
    ("qwen3", "mixed"): [(1658040217, 1691070361, 5130923929), (2201005977, 2234036121, 5673889689)],
}


@pytest.mark.parametrize(("name", "config"), [("olmoe", OLMOE), ("qwen3", QWEN3)])
def test_the_figures_of_a_shape(name: str, config: dict[str, object]) -> None:
    """To the byte."""
    for found in footprint.footprints_of_shape(shapes.shape_of_config(config, "config.json")):
        rows = [(found.fixed_bytes(n), found.least_bytes(n), found.budget_bytes(0.25, n)) for n in (64, 2048)]
        assert rows == FIGURES[name, found.scheme]
    (int4,) = (f for f in footprint.footprints_of_shape(shapes.shape_of_config(OLMOE, "")) if f.scheme == "int4")
    assert int4.share_in(4e9, 2048) == pytest.approx(0.714508321)


def test_slots_come_on_top_of_the_fixed_part_once_loading_is_over() -> None:
    """Of a replay, with two slots a pool while it loads; and of a profile, in tenths of a megabyte."""
    sizes = Sizes((10, 20), (1000, 2000), fixed_bytes=50_000, loading_bytes=7000, source="")
    assert sizes.total_bytes([1, 1]) == 50_000 + 7000 + 2 * 3000
    assert sizes.total_bytes([10, 10]) == 50_000 + 30_000
    profile = made_up.profile()
    found = [budget_bytes(profile, text) for text in ("least", "1%", "50%", "100%", "120MB")]
    assert found == [104_000_000, 104_000_000, 116_000_000, 132_000_000, 120_000_000]
