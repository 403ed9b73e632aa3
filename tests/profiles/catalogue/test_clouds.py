"""The data files: every row says where it is from, a user's rows go over them, a bad file is an error of one line."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml

from pocketmoe.errors import BadInput
from pocketmoe.profiles.catalogue import clouds, sky
from pocketmoe.profiles.catalogue.clouds import choose, merge, read_own, read_prices
from pocketmoe.profiles.catalogue.devices import find_device, known_devices, rate_at, read_devices
from pocketmoe.profiles.catalogue.sourced_value import stale
from pocketmoe.profiles.compare import comparing

TODAY = datetime.date(2026, 11, 30)
SOURCE = 'source = "me", as_of = 2026-11-20, confidence = "V"'
ROW = SOURCE.replace(", ", "\n")


def test_every_figure_says_where_it_is_from() -> None:
    """Devices and prices: source, day and confidence; read sizes with disk bandwidths; the GPUs and clouds promised."""
    for name, device in known_devices().items():
        figures = list(device.figures())
        assert len(figures) >= 9, name
        assert all(figure.source and figure.confidence in "VMC" and figure.as_of <= TODAY for figure in figures)
        assert device.load_watts.value > device.idle_watts.value > 0
    prices = read_prices()
    assert all(row.source and row.confidence in "VMC" and row.as_of <= TODAY for row in prices.rows())
    for gpu in ("T4", "L4", "A10G", "L40S", "A100-80GB", "H100", "H200"):
        assert any(instance.gpu == gpu for instance in prices.instance), gpu
    assert len({instance.provider for instance in prices.instance}) >= 3
    assert any(instance.spot for instance in prices.instance)
    assert len({api.key for api in prices.api}) >= 3
    assert {api.key for api in prices.api} == {tuple(api.key) for api in prices.api}


def test_targets_of_the_issue_are_known() -> None:
    names = " ".join(known_devices())
    for part in ("pi5", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb", "thor", "laptop-8gb", "laptop-32gb", "apple"):
        assert part in names
    with pytest.raises(BadInput, match="no device is named"):
        find_device("toaster")


def test_a_disk_is_as_fast_as_its_read_size_lets_it() -> None:
    """Known sizes give known rates; smaller reads take as long as the smallest known, larger ones are no faster."""
    rates = [(4096, 4e7), (1 << 20, 2e9)]
    assert rate_at(rates, 4096) == pytest.approx(4e7)
    assert rate_at(rates, 1 << 20) == pytest.approx(2e9)
    assert rate_at(rates, 1 << 24) == pytest.approx(2e9)
    assert rate_at(rates, 1024) == pytest.approx(1e7)
    assert rate_at(rates, 64 << 10) == pytest.approx((4e7 * 2e9) ** 0.5)  # the middle of both, in logarithms


def test_own_rows_replace_and_add(tmp_path: Path) -> None:
    """A row with a known key replaces that one, another is added, and nothing else changes."""
    base = read_prices()
    path = tmp_path / "mine.toml"
    path.write_text(
        f'[[instance]]\nprovider = "aws"\nname = "g6.xlarge"\ngpu = "L4"\nusd_per_hour = 0.5\n{ROW}\n'
        f'[[gpu]]\nname = "Mine"\nmemory_bytes = 1e9\nbandwidth_bytes_per_s = 1e11\ndense_flops_per_s = 1e12\n'
        f"watts = 10\n{ROW}\n"
        f'[[instance]]\nprovider = "home"\nname = "box"\ngpu = "Mine"\nusd_per_hour = 0.01\n{ROW}\n'
    )
    merged = merge(base, read_own(path, base))
    assert merged.find_instance("aws/g6.xlarge").usd_per_hour == 0.5
    assert merged.find_instance("home/box").gpu == "Mine"
    assert len(merged.instance) == len(base.instance) + 1
    assert merged.api == base.api


def test_the_rows_that_the_documentation_shows_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "COMPARE.md").read_text().partition("```toml\n")[2].partition("```")[0]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    found = read_own(path, read_prices())
    assert len(found.api) == len(found.instance) == len(found.gpu) == len(found.published) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[instance]", "not TOML"),
        ('[[api]]\nprovider = "x"\nmodel = "m"\nusd_per_mtok_in = 1\nusd_per_mtok_out = 1\n', "source"),
        (f'[[api]]\nprovider = "x"\nmodel = "m"\nusd_per_mtok_in = -1\nusd_per_mtok_out = 1\n{ROW}', "usd_per_mtok_in"),
        (
            f'[[api]]\nprovider = "x\\u001b[2J"\nmodel = "m"\nusd_per_mtok_in = 1\nusd_per_mtok_out = 1\n{ROW}',
            "provider",
        ),
        ('[[instance]]\nprovider = "x"\nname = "n"\ngpu = "L4"\nusd_per_hour = "much"\n' + ROW, "usd_per_hour"),
        ('[[instance]]\nprovider = "x"\nname = "n"\ngpu = "GTX"\nusd_per_hour = 1\n' + ROW, "GTX"),
        ('[[instance]]\nprovider = "x"\nname = "n"\ngpu = "L4"\nusd_per_hour = 1\nprice = 2\n' + ROW, "price"),
        ("[[instance]]\n" + ROW.replace('"V"', '"X"'), "confidence"),
        ("[cheap]\n", "cheap"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        read_own(path, read_prices())
    line = caught.value.one_line()
    assert caught.value.exit_code == 3
    assert str(path) in line
    assert words in line


def test_read_sizes_of_devices_must_ascend(tmp_path: Path) -> None:
    text = (Path(clouds.__file__).with_name("devices.toml")).read_text()
    first = text.index("read_bytes = 1048576")
    path = tmp_path / "devices.toml"
    path.write_text(text[:first] + text[first:].replace("read_bytes = 1048576", "read_bytes = 512", 1))
    with pytest.raises(BadInput, match="ascend"):
        read_devices(path)


def test_old_rows_are_warned_of(tmp_path: Path) -> None:
    """Beyond 90 days, not at 90; the warning names the oldest."""
    old = read_prices().instance[0].as_of
    rows = [read_prices().instance[0]]
    assert stale(rows, old + datetime.timedelta(days=90)) == []
    assert stale(rows, old + datetime.timedelta(days=91)) == rows
    _, warnings, skipped = comparing.gather_prices(None, (), tmp_path, TODAY)
    assert any("more than 90 days old" in warning and "2026-03-31" in warning for warning in warnings)
    assert any("SkyPilot" in line and "skipped" in line for line in skipped)


def test_clouds_are_chosen_by_provider_instance_gpu_or_model() -> None:
    prices = read_prices()
    assert {i.provider for i in choose(prices, ["aws"]).instance} == {"aws"}
    assert {a.provider for a in choose(prices, ["aws"]).api} == {"aws"}
    assert {i.gpu for i in choose(prices, ["H100", "t4"]).instance} == {"H100", "T4"}
    assert [i.name for i in choose(prices, ["aws/g6.xlarge"]).instance] == ["g6.xlarge"]
    with pytest.raises(BadInput, match="no cloud is named 'azur'"):
        choose(prices, ["aws", "azur"])


def test_skypilots_catalogue_is_read_where_it_is(tmp_path: Path) -> None:
    """The newest version, the cheapest region, spot prices; rows without a GPU of ours or a price are passed over."""
    head = (
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone"
    )
    rows = [
        "g6.xlarge,L4,1.0,4,16,,0.9,0.4,eu-west-1,a",
        "g6.xlarge,L4,1.0,4,16,,0.8,,us-east-1,a",
        "p5.48xlarge,H100,8.0,192,2048,,55.0,20.0,us-east-1,a",
        "m5.large,,,2,8,,0.096,0.04,us-east-1,a",
        "odd,L4,1.0,4,16,,nan,,us-east-1,a",
    ]
    for version, cloud, lines in (("v7", "aws", rows[:1]), ("v8", "aws", rows), ("v8", "gcp", rows)):
        folder = tmp_path / version / cloud
        folder.mkdir(parents=True)
        (folder / "vms.csv").write_text("\n".join([head, *lines]))
    found, said = sky.read_catalogue(tmp_path)
    assert {i.key: (i.usd_per_hour, i.region, i.gpu, i.gpus) for i in found} == {
        ("aws", "g6.xlarge"): (0.8, "us-east-1", "L4", 1),
        ("aws", "p5.48xlarge"): (55.0, "us-east-1", "H100", 8),
    }
    assert "v8" in said
    assert "gcp" in said
    prices, _, skipped = comparing.gather_prices(None, ("aws/g6.xlarge",), tmp_path, TODAY)
    assert prices.instance[0].usd_per_hour == 0.8
    assert skipped == ()


def test_the_sky_task_is_yaml_that_serves_the_model() -> None:
    """It parses, asks for the GPU by SkyPilot's name, serves the model; what is no hub id never gets into a shell."""
    gpu = read_prices().find_gpu("A100-40GB")
    task = yaml.safe_load(sky.task("allenai/OLMoE-1B-7B-0924", gpu, 2, 2048))
    assert task["resources"]["accelerators"] == "A100:2"
    assert task["envs"]["MODEL"] == "allenai/OLMoE-1B-7B-0924"
    assert 'vllm serve "$MODEL"' in task["run"]
    assert "--tensor-parallel-size 2" in task["run"]
    assert "0.0.0.0" not in task["run"]
    for bad in ("checkpoint", "", "a/b; rm -rf /", "a/b\nenvs: {}", "$(x)/y"):
        with pytest.raises(BadInput, match="not the id of a model"):
            sky.task(bad, gpu, 1, 2048)
