"""A comparison against sums done by hand, its page, and the command from profile to files."""

# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportArgumentType=false

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
import yaml

from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.profiles.catalogue.clouds import read_prices
from pocketmoe.profiles.catalogue.devices import find_device
from pocketmoe.profiles.compare import comparing
from pocketmoe.profiles.compare.columns import OPTIONS, grouped
from pocketmoe.profiles.compare.compare import compare
from pocketmoe.profiles.compare.cost import Assumptions
from pocketmoe.profiles.compare.endpoint import Level, LoadTest, Measurement, Target, measure
from pocketmoe.profiles.compare.findings import roofline_check
from pocketmoe.profiles.compare.offers import price, same_model
from pocketmoe.profiles.compare.page import render
from pocketmoe.profiles.compare.records import Comparison, Request
from pocketmoe.profiles.compare.subject import Subject, read_plan, subject_of_profile
from pocketmoe.profiles.estimate import roofline
from pocketmoe.profiles.plan.planning import PlanRequest, make_plan
from pocketmoe.profiles.report.charts import Axis, bar_chart, far_apart
from tests.hang import HANG_S
from tests.profiles import profiles
from tests.profiles.completions_server import Behaviour, serving

GIVEN = Assumptions(device_price_usd=730.5, years=2, utilisation=0.5, usd_per_kwh=0.2, load_watts=50, idle_watts=10)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(Request(subject(), read_prices(), GIVEN, "2026-11-24T00:00:00+00:00"))


def subject(**model: str | int) -> Subject:
    return subject_of_profile(profiles.make_profile(**model))


def pocketmoe(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketmoe.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)


def test_the_device_by_hand(found: Comparison) -> None:
    """25%: 41 tokens take 2 s + 40 / 10 s = 6 s; 100%: 4 s + 40 / 20 s = 6 s too. A dollar and 24 h x 10 W a day."""
    rates = {option.name: option.tokens_per_s for option in found.options if option.kind == "device"}
    assert rates == {name: pytest.approx(41 / 6) for name in ("this device, 25%", "this device, 100%")}
    device = found.device
    assert device.most_tokens_per_day == pytest.approx(86400 * 41 / 6)
    assert device.fixed_usd_per_day == pytest.approx(1.048)
    marginal = 1e6 / (41 / 6) / 3600 * 0.040 * 0.2
    assert device.marginal_usd_per_mtok == pytest.approx(marginal)
    assert device.usd_per_mtok == pytest.approx(1.048 / (0.5 * 86400 * 41 / 6) * 1e6 + marginal)


def test_apis_by_hand_and_whether_the_device_beats_them(found: Comparison) -> None:
    """Input counts with the output it belongs to; the break-even is where both cost the same, or never and why."""
    api = next(o for o in found.options if o.name == "together: Mixtral-8x7B")
    assert api.usd_per_mtok == pytest.approx(0.9 + 0.9 * 128 / 41)
    assert api.break_even_tokens_per_day is not None
    device = found.device
    own = device.fixed_usd_per_day / api.break_even_tokens_per_day * 1e6 + device.marginal_usd_per_mtok
    assert own == pytest.approx(api.usd_per_mtok)
    cheap = next(o for o in found.options if o.name == "openrouter: gpt-oss-20b")
    assert cheap.break_even_tokens_per_day is None
    assert cheap.never
    assert not cheap.same_model


def test_gpus_are_shown_for_one_user_and_kept_busy(found: Comparison) -> None:
    """At least six GPUs and three APIs; the shared one is cheaper by the token, and says how it is known."""
    gpus = [option for option in found.options if option.kind == "gpu"]
    assert len({option.gpu for option in gpus}) >= 6
    assert len({option.name for option in found.options if option.kind == "api"}) >= 3
    one, many = (
        [o for o in gpus if o.name == "aws g6.xlarge (1 x L4)" and (o.users == 1) == alone] for alone in (1, 0)
    )
    assert [o.basis for o in (*one, *many)] == ["predicted", "predicted"]
    assert one[0].usd_per_mtok == pytest.approx(1e6 * 0.8048 / 3600 / one[0].tokens_per_s / GIVEN.cloud_utilisation)
    assert many[0].usd_per_mtok < one[0].usd_per_mtok / 3
    assert many[0].tokens_per_s_per_user < one[0].tokens_per_s_per_user
    assert one[0].usd_per_month == pytest.approx(587, abs=1)  # an always-on g6.xlarge
    assert {option.basis for option in found.options} == {"measured", "predicted", "published", "price only"}
    assert all(option.latency_source for option in found.options if option.tokens_per_s is not None)
    assert all(option.price_source and option.price_as_of for option in found.options if option.kind != "device")


def test_the_roofline_is_near_what_was_published() -> None:
    """Within 15% of vLLM on an H100 at 16 users, 8 and 16 bits; the report says how far it is off."""
    errors = [int(match) for line in roofline_check(read_prices()) for match in re.findall(r": ([+-]\d+)%\.", line)]
    assert len(errors) == 2
    assert all(abs(error) <= 15 for error in errors)


def test_distinct_experts() -> None:
    """One token touches its own; very many touch all; 8 of 64 by two tokens: 64 (1 - (7/8)^2) = 15."""
    assert roofline.distinct_experts(64, 8, 1) == pytest.approx(8)
    assert roofline.distinct_experts(64, 8, 2) == pytest.approx(15)
    assert roofline.distinct_experts(64, 8, 1000) == pytest.approx(64)


def test_parameters_come_back_from_the_bytes_of_a_profile() -> None:
    """From int4 and int8 bytes the parameters of OLMoE's experts and dense part, within 1%."""
    model = roofline.served_of_profile(profiles.make_profile())
    assert model.expert_parameters == pytest.approx(3 * 2048 * 1024, rel=0.01)
    assert model.read_parameters == pytest.approx(profiles.DENSE, rel=0.01)
    assert model.kv_values_per_token == 16 * 2 * 2048


def test_models_are_the_same_by_name() -> None:
    assert same_model("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert not same_model("Qwen3-30B-A3B", "Qwen3.6-35B-A3B")
    assert not same_model("gpt-oss-20b", "gpt-oss-120b")
    assert not same_model("x", "x-large-model")


def test_words_follow_the_numbers(found: Comparison) -> None:
    """Dearer and cheaper are said as they are, for a dear device and for one that costs nothing."""
    said = " ".join(found.findings)
    assert "times cheaper than this device" in said
    free = replace(GIVEN, device_price_usd=0, load_watts=0.1, idle_watts=0, utilisation=1.0)
    gift = compare(Request(subject(), read_prices(), free, ""))
    said = " ".join(gift.findings)
    assert "times dearer than this device" in said
    assert re.search(r"break-even against (\d+) of \1 offers of this model", said)
    assert gift.verdict == "it pays"
    assert gift.findings[0].startswith("It pays at 100% use: ")
    dear = compare(Request(subject(), read_prices(), replace(GIVEN, device_price_usd=1e6), ""))
    assert "never cheaper" in " ".join(dear.findings)
    assert dear.verdict == "it does not pay"


def test_a_profile_without_a_budget_is_refused() -> None:
    with pytest.raises(BadInput, match="no measured budget"):
        subject_of_profile(msgspec.structs.replace(profiles.make_profile(), runs=()))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.outside += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]


def test_the_page_needs_nothing_and_has_a_table_for_every_picture(found: Comparison) -> None:
    """One file, no scripts, no references, each picture with its table, the words and sources in it, names escaped."""
    hostile = compare(
        Request(subject(source="<script>alert(1)/</script>"), read_prices(), GIVEN, "", warnings=("<b>",))
    )
    for comparison in (found, hostile):
        text = render(comparison)
        parsed = _Page()
        parsed.feed(text)
        assert parsed.outside == []
        assert "script" not in parsed.counts
        assert parsed.counts["svg"] == 4
        assert parsed.counts["table"] >= parsed.counts["svg"] + 3
        assert text.count('class="scroll" tabindex="0" role="region"') == parsed.counts["table"]
        assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", text)
    assert "&lt;script&gt;" in render(hostile)
    text = render(found)
    assert all(row.source.replace("&", "&amp;") in text for row in read_prices().api)
    assert "Measured" in text
    assert "predicted" in text


def test_from_a_profile_and_an_endpoint_to_files(tmp_path: Path) -> None:
    """The command measures a server, prices it, writes both files and the record; the record can be used again."""
    profile = profiles.write(tmp_path, profiles.make_profile())
    key = tmp_path / "key"
    key.write_text("sk-secret\n")
    with serving(Behaviour(first_s=0.02, step_s=0.002)) as url:
        done = pocketmoe(
            "compare", profile, "-o", tmp_path / "out", "--endpoint", url, "--model", "allenai/OLMoE-1B-7B-0924",
            "--api-key-file", key, "--concurrency", "1,3", "--requests", "2", "--instance", "aws/g6.xlarge", "--json",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "out" / "compare.json").read_text())
    measured = [o for o in printed["options"] if o["kind"] == "gpu" and o["basis"] == "measured"]
    assert [o["users"] for o in sorted(measured, key=lambda o: o["users"])] == [1, 3]
    for option in measured:
        assert option["usd_per_mtok"] == pytest.approx(1e6 * 0.8048 / 3600 / option["tokens_per_s"] / 0.25)
    everything = done.stdout + done.stderr + (tmp_path / "out" / "compare.html").read_text()
    assert "sk-secret" not in everything + (tmp_path / "out" / "endpoint.json").read_text()
    again = pocketmoe(
        "compare", profile, "--measurement", tmp_path / "out" / "endpoint.json", "--json", "--cloud", "aws"
    )
    assert again.returncode == 0, again.stderr
    assert {o["provider"] for o in json.loads(again.stdout)["options"]} == {"", "aws"}


def test_exit_codes_of_compare_and_plan(tmp_path: Path) -> None:
    """2 usage, 3 bad input, 4 nothing fits; one line on stderr that says what to do."""
    profile = profiles.write(tmp_path, profiles.make_profile())
    bad = tmp_path / "bad.toml"
    bad.write_text('[[api]]\nprovider = "x"\n')
    (tmp_path / "config.json").write_text("{")
    small = ("plan", Path(__file__).parents[3] / "models" / "reference" / "checkpoint", "--device")
    cases = [
        (2, ("compare", profile), "-o DIR"),
        (2, ("compare", "--json"), "--plan"),
        (2, ("compare", profile, "--json", "--plan", profile), "one of both"),
        (3, ("compare", "--json", "--plan", profile), "is no plan"),
        (2, ("compare", profile, "--json", "--endpoint", "http://127.0.0.1:9"), "--model"),
        (2, ("compare", profile, "--json", "--utilisation", "0"), "utilisation"),
        (2, ("plan", tmp_path), "--device"),
        (3, ("compare", tmp_path / "none", "--json"), "cannot be read"),
        (3, ("compare", profile, "--json", "--prices", bad), "bad.toml"),
        (2, ("compare", profile, "--json", "--cloud", "azur"), "azur"),
        (3, ("compare", profile, "--json", "--endpoint", "http://127.0.0.1:9", "--model", "m"), "cannot be measured"),
        (3, ("compare", profile, "--json", "--measurement", profile), "is no measurement"),
        (3, ("compare", profile, "--write-sky", tmp_path / "t.yaml", "--model", "olmoe"), "ORGANISATION/MODEL"),
        (3, ("plan", tmp_path, "--device", "pi5-8gb"), "config.json"),
        (2, (*small, "toaster"), "toaster"),
        (4, (*small, "pi5-8gb", "--target-tokens-per-s", "100000", "--json"), "No memory or disk would do"),
        (4, (*small, "pi5-8gb", "--reserve", "8.58GB"), "does not fit"),
    ]
    for code, args, words in cases:
        done = pocketmoe(*args)
        assert done.returncode == code, (args, done.stderr)
        assert words in done.stderr, (args, done.stderr)
        assert "Traceback" not in done.stderr
        if code > 2:
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "t.yaml").exists()


def test_the_sky_file_and_what_to_type_next(tmp_path: Path) -> None:
    """The task names the profile's own model, and the steps to measure it are printed."""
    profile = profiles.write(tmp_path, profiles.make_profile())
    done = pocketmoe("compare", profile, "--write-sky", tmp_path / "task.yaml", "--gpu", "L4")
    assert done.returncode == 0, done.stderr
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["envs"]["MODEL"] == "allenai/OLMoE-1B-7B-0924"
    assert task["resources"]["accelerators"] == "L4:1"
    assert "--endpoint http://localhost:8000 --model allenai/OLMoE-1B-7B-0924" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("damage", ["users", "control", "format", "empty"])
def test_a_record_of_a_measurement_is_checked(tmp_path: Path, damage: str) -> None:
    with serving(Behaviour(first_s=0.001, step_s=0.001)) as url:
        record = measure(Target(url, "m"), LoadTest(20, 8, (1,), 1), "now")
    changes = {
        "users": {"levels": (replace(record.levels[0], tokens_per_s=0.0),)},
        "control": {"model": "m\x1b[2J"},
        "format": {"format": 99},
        "empty": {"levels": ()},
    }
    comparing.write_measurement(tmp_path, record)
    assert comparing.read_measurement(tmp_path / "endpoint.json") == record
    comparing.write_measurement(tmp_path, replace(record, **changes[damage]))
    with pytest.raises(DamagedFile):
        comparing.read_measurement(tmp_path / "endpoint.json")


def test_a_gpu_works_as_much_of_its_hours_as_the_device() -> None:
    """Rented by the hour it costs four times as much at a quarter of the hours, by the second always the same."""
    assert comparing.assume(None, utilisation=0.1).cloud_utilisation == 0.1
    assert comparing.assume(None).cloud_utilisation == Assumptions().utilisation
    assert comparing.assume(None, utilisation=0.1, cloud_utilisation=0.9).cloud_utilisation == 0.9
    prices = {
        share: {
            option.name: option.usd_per_mtok
            for option in compare(
                Request(subject(), read_prices(), replace(GIVEN, cloud_utilisation=share), "")
            ).options
            if option.kind == "gpu" and option.users == 1
        }
        for share in (1.0, 0.25)
    }
    for instance in read_prices().instance:
        name = next((name for name in prices[1.0] if name.startswith(f"{instance.label} (")), None)
        if name is not None:
            dearer = 1 if instance.billed == "second" else 4
            assert prices[0.25][name] == pytest.approx(dearer * prices[1.0][name]), name


def test_no_break_even_is_printed_against_a_toy() -> None:
    """Below a billion parameters there is none in record, page or words, but every price is."""
    toy = compare(Request(subject(parameters=12_766_464), read_prices(), GIVEN, ""))
    assert all(option.break_even_tokens_per_day is None and not option.never for option in toy.options)
    assert "toy" in toy.verdict
    assert "break-even against" not in " ".join(toy.findings)
    page = render(toy)
    assert "Not reckoned: the model is a toy" in page
    assert "crosses the device" not in page
    assert all(option.usd_per_mtok is not None for option in toy.options if option.kind == "api")


def test_the_verdict_is_the_first_thing_said(found: Comparison) -> None:
    """In the title and in the first sentence, with speed and price per million tokens, as the record has them."""
    device = found.device
    title = re.findall(r"<h1>(.*?)</h1>", render(found))[0]
    assert title.startswith(f"{found.model}: {device.tokens_per_s:.3g} tokens/s at ")
    assert "per million tokens" in title
    assert title.endswith(found.verdict)
    offers = [
        option
        for option in found.options
        if option.kind != "device" and option.same_model and (option.kind == "api" or option.users == 1)
    ]
    cheapest = min(offers, key=price)
    assert cheapest.name in found.findings[0]
    assert (device.usd_per_mtok <= cheapest.usd_per_mtok) == (found.verdict == "it pays")


def test_crossings_are_marked_where_the_lines_cross() -> None:
    """Each ring lies on the device's line and on the other's; what never crosses is in a list of its own."""
    page = render(compare(Request(subject(), read_prices(), replace(GIVEN, device_price_usd=300.0), "")))
    chart = page.partition("From how many tokens a day")[2].partition("</svg>")[0]
    lines = [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'<polyline points="([^"]+)"', chart)
    ]
    rings = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="6"', chart)]
    assert len(rings) == len(lines) - 1 >= 2
    for (x, y), line in zip(rings, lines[1:], strict=True):
        for (x0, y0), (x1, y1) in (lines[0], line):
            assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.5)
    assert "Never cheaper than" in page


def test_bars_are_logarithmic_where_values_differ_a_hundredfold(found: Comparison) -> None:
    """Then a bar of a tenth is one step shorter, and the picture says so."""
    bars = [("a", [1.0]), ("b", [10.0]), ("c", [1000.0])]
    assert far_apart([1.0, 1000.0])
    assert not far_apart([1.0, 99.0, 0.0])
    drawn = bar_chart(bars, [("", "a")], Axis("USD", log=True), "")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', drawn)]
    assert widths[2] - widths[1] == pytest.approx(2 * (widths[1] - widths[0]), abs=0.3)
    cheap = replace(found.options[0], usd_per_mtok=0.001)
    assert "logarithmic" in render(replace(found, options=(cheap, *found.options)))


def test_assumed_watts_and_other_models_have_a_colour_of_their_own(found: Comparison) -> None:
    """No bar of assumed power is drawn as measured, and no price of another model as one of this."""
    page = render(found)
    energy = page.partition("<h2>Energy</h2>")[2].partition("</section>")[0]
    (device,) = re.findall(r'<rect[^>]*class="(\w)"><title>this device, watts assumed', energy)
    gpus = set(re.findall(r'<rect[^>]*class="(\w)"><title>[^<]*, the GPU&#x27;s power limit', energy))
    assert device not in gpus
    assert "power measured" not in energy
    prices = page.partition("<h2>What a million tokens cost</h2>")[2].partition("</section>")[0]
    other = re.findall(r'class="(\w)"><title>([^<]*), price of another model', prices)
    assert {colour for colour, _ in other} == {"f"}
    assert any("openai" in name for _, name in other)


def test_the_table_is_grouped_by_what_a_buyer_chooses_between(found: Comparison) -> None:
    """Every offer is in one group, each group is by price, and other models stand apart."""
    groups = dict(grouped(found.options))
    assert sum(map(len, groups.values())) == len(found.options)
    assert all(not option.same_model for option in groups["APIs that sell other models"])
    assert next(iter(groups)) == "This device"
    for name, rows in groups.items():
        prices = [option.usd_per_mtok for option in rows]
        assert name == "This device" or prices == sorted(prices)
        assert f'colspan="{len(OPTIONS)}"><span>{name}</span>' in render(found)
    assert {api.provider for api in read_prices().api} >= {"openai", "anthropic", "google"}


def test_the_endpoint_keeps_its_name_and_is_in_the_findings() -> None:
    """What its server calls the model renames nothing else; it counts as this model only by its name."""
    level = Level(1, 4, 0.2, 0.3, 40.0, 0.03, 38.0, 128.0, 41.0)
    served = Measurement(1, "http://127.0.0.1:8000", "my-server-model", "completions", "2026-11-30", "server", (level,))
    for name, same in (("my-server-model", False), ("allenai/OLMoE-1B-7B-0924", True)):
        request = Request(subject(), read_prices(), GIVEN, "", measurement=replace(served, model=name))
        comparison = compare(request)
        assert comparison.model == "allenai/OLMoE-1B-7B-0924"
        assert {o.model for o in comparison.options if o.kind == "device"} == {comparison.model}
        (option,) = [o for o in comparison.options if o.kind == "gpu" and o.basis == "measured"]
        assert (option.name, option.same_model) == (f"{name} at 127.0.0.1:8000", same)
        (said,) = [sentence for sentence in comparison.findings if "endpoint" in sentence]
        assert option.name in said
        assert "40.0 tokens/s each" in said
        assert "4 times this device's speed" in said
        assert option.name in render(comparison)
    priced = compare(replace(request, instance=read_prices().find_instance("aws/g6.xlarge")))
    assert any("per million tokens" in sentence and "endpoint" in sentence for sentence in priced.findings)


@cache
def plan_of_qwen() -> dict[str, object]:
    """A plan of Qwen3-30B-A3B, as `plan --json` prints it."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
        "max_position_embeddings": 40960, "decoder_sparse_step": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return msgspec.to_builtins(make_plan(PlanRequest(Path(folder), "laptop-16gb", name="Qwen/Qwen3-30B-A3B")))


def planned(tmp_path: Path, **changes: object) -> Path:
    """The same with changes, in a file."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_of_qwen() | changes))
    return path


def test_a_plan_is_compared_before_anything_is_bought(tmp_path: Path) -> None:
    """Its figures are the plan's own; sizes come back from its counts within 2%, price and power from devices.toml."""
    path = planned(tmp_path)
    plan = json.loads(path.read_text())
    there = read_plan(path)
    assert there.served.expert_parameters == pytest.approx(3 * 2048 * 768, rel=0.02)
    given = comparing.assume(None, there)
    device = find_device("laptop-16gb")
    assert (given.device_price_usd, given.load_watts) == (device.price_usd.value, device.load_watts.value)
    assert comparing.assume(None, there, device_price_usd=5.0).device_price_usd == 5.0
    comparison = compare(Request(there, read_prices(), given, "now"))
    assert comparison.device.basis == "predicted"
    best = plan["recommended"]["speed"]
    assert comparison.device.tokens_per_s >= best["tokens_per_s"]
    assert all(option.basis != "measured" for option in comparison.options)
    assert any(option.kind == "api" and option.same_model for option in comparison.options)
    assert "predicted" in render(comparison)
    assert any("nothing was measured" in warning for warning in comparison.warnings)
    done = pocketmoe("compare", "--plan", path, "-o", tmp_path / "out", "--cloud", "openai")
    assert done.returncode == 0, done.stderr
    assert "openai: gpt-5-mini" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "m\x1b[2J"}, "control characters"),
        ({"candidates": [], "recommended": None, "advice": {}}, "nothing of that plan fits"),
        ({"active_parameters": 1 << 52}, "more of a token's parameters"),
        ({"experts_per_token": 128}, "more of a token's parameters"),
        ({"parameters": "many"}, "is no plan"),
        ({"experts": 0}, "is no plan"),
    ],
)
def test_a_plan_is_checked(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises((BadInput, DamagedFile), match=words):
        read_plan(planned(tmp_path, **changes))
