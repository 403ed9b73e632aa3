"""Makes pocketmoe/profiles/machine/sample.zip, the bundle by which `doctor` measures what a layer takes whatever its
size: python -m tests.profiles.machine.make_sample.

Four layers of OLMoE's graphs with eight of sixteen experts, in int4, hidden size 64. Weights are a few numbers over and
over, so that the archive is small; what they are does not matter.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from pocketmoe.profiles.machine.layer_costs import SAMPLE
from tests import tiny

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "intermediate_size": 64,
    "vocab_size": 512,
}
_DATE = (2026, 12, 1, 0, 0, 0)  # of every entry, so that the same bundle makes the same archive


def main() -> None:
    import torch

    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.export.convert import export_checkpoint
    from pocketmoe.pipeline.quantize import QuantizeRequest, quantize

    model = tiny.make_model("olmoe", **SIZES)
    numbers = torch.randn(64) * 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            flat = numbers.repeat(-(-parameter.numel() // len(numbers)))[: parameter.numel()]
            if parameter.ndim > 1:
                parameter.copy_(flat.reshape(parameter.shape))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, exported, small = (Path(folder) / name for name in ("checkpoint", "exported", "small"))
        tiny.save_checkpoint(checkpoint, model)
        export_checkpoint(checkpoint, exported)
        quantize(exported, small, QuantizeRequest(scheme="int4"))
        Bundle.open(small).check_all_but_store()
        with zipfile.ZipFile(SAMPLE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(small.rglob("*")):
                if path.is_file() and "packed" not in path.parts:
                    archive.writestr(
                        zipfile.ZipInfo(str(path.relative_to(small)), _DATE), path.read_bytes(), zipfile.ZIP_DEFLATED
                    )


if __name__ == "__main__":
    main()
