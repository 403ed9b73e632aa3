"""The columns of a profile's runs and of its predictions for other machines."""

from __future__ import annotations

from pocketmoe.profiles.estimate.device_prediction import DeviceBudget
from pocketmoe.profiles.estimate.predict import Checked
from pocketmoe.profiles.profile import Run
from pocketmoe.profiles.report.columns import Column
from pocketmoe.sizes import in_words, range_words


def ms(seconds: float) -> str:
    """Milliseconds."""
    return f"{1e3 * seconds:.2f} ms"


def energy_words(run: Run) -> str:
    """Joules, or that nothing tells."""
    joules = run.energy.joules_per_token
    return f"{joules:.2f} J ({run.energy.label})" if joules is not None else "unavailable"


def heat_words(run: Run) -> str:
    """The highest temperature and whether it throttled."""
    heat = run.thermal
    degrees = f"{heat.highest_celsius:.0f} °C" if heat.highest_celsius is not None else "unknown"
    return degrees + {True: ", throttled", False: "", None: ""}[heat.throttled]


def _disk(run: Run) -> str:
    return f"slowed to {in_words(run.read_bytes_per_s)}/s" if run.read_bytes_per_s else "as it is"


MEASURED: tuple[Column[Checked], ...] = (
    Column("memory", lambda entry: entry.run.memory),
    Column("tokens/s", lambda entry: f"{entry.run.decode_tokens_per_s:.2f}"),
    Column("budget", lambda entry: in_words(entry.run.memory_budget_bytes)),
    Column("peak", lambda entry: in_words(entry.run.peak_memory_bytes)),
    Column("limit", lambda entry: "cgroup" if entry.run.limited_by == "cgroup" else "none", brief=False),
    Column("disk", lambda entry: _disk(entry.run)),
    Column("p95 step", lambda entry: ms(entry.run.step_p95_s)),
    Column("first token", lambda entry: f"{entry.run.ttft_s:.2f} s"),
    Column("prompt tokens/s", lambda entry: f"{entry.run.prefill_tokens_per_s:.1f}", brief=False),
    Column("hits", lambda entry: f"{entry.run.hit_rate:.1%}"),
    Column("by prefetch", lambda entry: f"{entry.run.prefetch_hit_rate:.1%}", brief=False),
    Column("read/token", lambda entry: in_words(entry.run.bytes_read_per_token)),
    Column("read in all", lambda entry: in_words(entry.run.bytes_read), brief=False),
    Column("faults", lambda entry: str(entry.run.major_faults), brief=False),
    Column("energy/token", lambda entry: energy_words(entry.run), brief=False),
    Column("heat", lambda entry: heat_words(entry.run), brief=False),
    Column("others' CPU", lambda entry: f"{entry.run.others_cpu:.0%}", brief=False),
    Column("prediction off by", lambda entry: "calibrated" if entry.calibrated else f"{entry.error:+.1%}"),
)
PREDICTED: tuple[Column[DeviceBudget], ...] = (
    Column("memory", lambda budget: in_words(budget.memory_budget_bytes)),
    Column("tokens/s (predicted)", lambda budget: range_words(budget.tokens_per_s_low, budget.tokens_per_s_high)),
    Column("experts there", lambda budget: f"{budget.prediction.expert_share:.0%}"),
    Column("hits", lambda budget: f"{budget.prediction.hit_rate:.0%}"),
    Column("read/token", lambda budget: in_words(budget.prediction.bytes_read_per_token)),
    Column("waiting", lambda budget: ms(budget.prediction.waiting_s)),
)
