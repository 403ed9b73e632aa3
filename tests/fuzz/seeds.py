"""What cases are mutations of: tiny checkpoints and their bundles, made once and kept in a work directory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.cases import command
from tests.fuzz.place import Place
from tests.fuzz.zygote import Order, Zygote

_TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "olmoe": {**_TINY, "num_experts": 4, "intermediate_size": 16},
    "mixtral": {**_TINY, "num_hidden_layers": 1, "num_local_experts": 4, "intermediate_size": 16},
    "qwen3_moe": {
        **_TINY,
        "num_hidden_layers": 1,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "intermediate_size": 16,
    },
    "deepseek_v3": {"num_hidden_layers": 2, "n_routed_experts": 4},
}
_HEAVY_BYTES = 4 << 30


@dataclass
class Seeds:
    """Checkpoints and bundles below `root`, made when first asked for."""

    root: Path
    zygotes: dict[bool, Zygote]
    small: bool = False  # one architecture will do

    def __post_init__(self) -> None:
        for heavy, zygote in self.zygotes.items():
            known = self.root / f"modules-{heavy}"
            zygote.preload(known.read_text().split() if known.exists() else [])

    def checkpoint(self, family: str) -> Path:
        target = self.root / f"checkpoint-{family}"
        if not (target / "done").exists():
            shutil.rmtree(target, ignore_errors=True)
            task = "tests.fuzz.tasks:make_checkpoint"
            self._do(Order(task, (family, str(target / "c"), CHECKPOINTS[family]), _HEAVY_BYTES, heavy=True))
            (target / "done").touch()
        return target / "c"

    def bundle(self, family: str) -> Path:
        """A bundle that has been run once, so that it has packed experts; `FAMILY-int4`: quantized."""
        target = self.root / f"bundle-{family}"
        if not (target / "done").exists():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            plain = family.removesuffix("-int4")
            if plain != family:
                order = ("quantize", self.bundle(plain), "-o", target / "b", "--scheme", "int4")
            else:
                order = ("export", self.checkpoint(plain), "-o", target / "b")
            self._do(command(*order, heavy=True, memory_bytes=_HEAVY_BYTES, cpu_s=300))
            run = ("run", target / "b", "--prompt", "once", "--max-tokens", 2, "--raw", "--trace", target / "trace.npy")
            self._do(command(*run))
            (target / "done").touch()
        return target / "b"

    def profile(self) -> Path:
        """The directory of a profile of the smallest kind."""
        target = self.root / "profile"
        if not (target / "done").exists():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            options = ("--memory", "50%", "--prompt-tokens", 4, "--output-tokens", 4)
            self._do(command("profile", self.bundle("olmoe"), "-o", target / "p", *options, cpu_s=300))
            (target / "done").touch()
        return target / "p"

    def plan(self) -> Path:
        """What `plan --json` says of the smallest bundle on a small device."""
        target = self.root / "plan.json"
        if not target.exists():
            self._do(command("plan", self.bundle("olmoe"), "--device", "pi5-8gb", "--json"))
            shutil.copyfile(self.root / "making-output.out", target)
        return target

    def _do(self, order: Order) -> None:
        scratch = self.root / "making"
        shutil.rmtree(scratch, ignore_errors=True)
        place = Place.make(scratch)
        output = self.root / "making-output"
        ending = self.zygotes[order.heavy].learn(order, place.cwd, output, place.environment())
        if ending.code:
            said = output.with_name("making-output.err").read_text(errors="replace")
            raise RuntimeError(f"{order.arguments}: {ending.code} {ending.killed_for}\n{said[-2000:]}")
        with (self.root / f"modules-{order.heavy}").open("a") as known:
            known.write(output.with_name("making-output.modules").read_text() + "\n")
        shutil.rmtree(scratch)
