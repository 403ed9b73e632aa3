"""A bundle where transformers and optimum want a model: `from_pretrained`, `generate`, pipelines, streamers.

    from pocketmoe.integrations.optimum import PocketMoEForCausalLM

    with PocketMoEForCausalLM.from_pretrained("SMALL", memory="4GB") as model:
        model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=32)

Tokens are chosen by transformers' own code; logits are the engine's. What that cannot do is refused, by name.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
from optimum.modeling_base import OptimizedModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from pocketmoe import api
from pocketmoe.bundle.manifest import MANIFEST
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.bundle.writer import BundleWriter, put
from pocketmoe.errors import BadInput
from pocketmoe.hub.client import Reference
from pocketmoe.hub.pull import Access
from pocketmoe.hub.push import Pushed, push
from pocketmoe.integrations import wrong_use
from pocketmoe.integrations.configuration import PocketMoEConfig, generation_config_of
from pocketmoe.integrations.loading import Folder, LoadOptions, PathLike, export_first, find_bundle
from pocketmoe.integrations.texts import Row, Texts, TextsCache
from pocketmoe.runtime.engine.segments import Rows
from pocketmoe.runtime.model import Model


class PocketMoEForCausalLM(OptimizedModel, GenerationMixin):
    """A bundle as a model for transformers' `generate`. Close it after use, or use it in a `with` block."""

    config_class = PocketMoEConfig
    auto_model_class = AutoModelForCausalLM
    base_model_prefix = "pocketmoe"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, model: Model, folder: Folder | None = None) -> None:
        """`model`, and the folder of a bundle that was only made for it, are this object's own from here on."""
        super().__init__(model, PocketMoEConfig.of(model.bundle.manifest))
        self.generation_config = generation_config_of(model.bundle.manifest)
        self.texts = Texts(model)
        self._close = weakref.finalize(self, _close, model, folder)

    @classmethod
    def from_pretrained(
        cls,
        model_id: PathLike,
        config: None = None,
        export: bool = False,
        *,
        scheme: str | None = None,
        output: PathLike | None = None,
        adapter: str | None = None,
        workers: int | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        subfolder: str = "",
        progress: Progress = no_progress,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a bundle, a directory or a hub id; with `export` make one of a checkpoint first, likewise.

        `scheme`, `adapter`, `workers`: as of `pocketmoe export`. `output`: where the new bundle goes; without it, into
        a temporary directory, which goes with the model. `options`: `memory`, `context`, `threads`, `prefix_cache` and
        others as of `pocketmoe.load`; `sequences` is how many rows a batch may have. Raises what that raises, and
        BadInput also for options of transformers that would mean something else than what is done.
        """
        load = {name: value for name, value in options.items() if name in LoadOptions.__annotations__}
        others = {name: value for name, value in options.items() if name not in load}
        wrong_use.refuse_options({**others, **({} if config is None else {"config": config})})
        if subfolder:
            raise BadInput(f"subfolder={subfolder!r}: a bundle is a directory of its own", "Name that directory.")
        making = {"scheme": scheme, "adapter": adapter, "workers": workers}
        folder = None
        if export:
            source = {"revision": revision, "trust_remote_code": trust_remote_code}
            place, folder = export_first(str(model_id), output, {**making, **source}, progress)
        else:
            wrong_use.refuse_making({**making, "output": output})
            cache = Path(cache_dir) if cache_dir is not None else None
            place = find_bundle(model_id, revision, Access(token, cache, local_files_only, force_download), progress)
        return cls(cast("Any", api.load)(place, structured=False, progress=progress, **load), folder)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TextsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, float32 [texts, tokens, vocab], of the last `logits_to_keep` tokens; 0: of all.

        `input_ids`: int64 [texts, tokens]. `attention_mask`: [texts, tokens so far and these], zeros on the left of a
        shorter text, whose logits there are zeros. `past_key_values`: what an earlier call gave. Raises BadInput for
        other inputs, and what the engine raises.
        """
        wrong_use.refuse_inputs(others)
        ids = wrong_use.checked_ids(input_ids, self.config.vocab_size)
        count, length = len(ids), len(ids[0])
        cache, padding = self._cache_for((count, length), attention_mask, past_key_values)
        begins = past_key_values is None
        tokens = [row[left if begins else 0 :] for row, left in zip(ids, padding, strict=True)]
        width = length if not logits_to_keep else min(int(logits_to_keep), length)
        wanted: Rows = "last" if width == 1 else "all"
        self._refuse_beyond_context(max(len(row) + len(more) for row, more in zip(cache.rows, tokens, strict=True)))
        found = self.texts.append(cache.rows, tokens, wanted)
        if len(found) == 1 and len(found[0]) == width:
            logits = torch.from_numpy(found[0]).unsqueeze(0)
        else:
            logits = torch.zeros(len(found), width, self.config.vocab_size)
            for target, rows in zip(logits, found, strict=True):
                kept = torch.from_numpy(rows[-width:])
                target[width - len(kept) :] = kept
        given = cache if use_cache is not False else None
        if return_dict is False:
            return (logits, given) if given else (logits,)
        return CausalLMOutputWithPast(logits=cast("torch.FloatTensor", logits), past_key_values=cast("Any", given))

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *arguments: Any,
        assistant_model: Any = None,
        custom_generate: str | Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """transformers' own `generate`: greedy or sampling, with streamers, stopping criteria, logits processors.

        `inputs`: token ids, int64 [batch, tokens]; so is what is returned, with the answers behind them.
        One call at a time computes. Raises BadInput for beams, assistants and whatever else is not offered.
        """
        wrong_use.refuse_arguments(assistant_model, custom_generate)
        _refuse_other_cache(options.get("past_key_values"))
        with self.texts.alone, _one_torch_thread(), torch.inference_mode():
            found = cast("Any", super()).generate(
                inputs, generation_config, *arguments, custom_generate=custom_generate, **options
            )
            self.texts.keep()
            return found

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TextsCache | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,  # noqa: ARG002 - transformers' signature
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` is given at a step. input_ids: int64 [batch, tokens]; attention_mask: int64 of the same."""
        kwargs.pop("tokenizer", None)  # which is for stop strings
        ids = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        return {"input_ids": ids, "past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}

    def save_pretrained(self, save_directory: PathLike, push_to_hub: bool = False, **options: Any) -> None:
        """Write the bundle into a directory, as `from_pretrained` reads it. `options`: those of `push_to_hub`.

        Raises OutputError, or what `push_to_hub` raises.
        """
        source, target = self.bundle, Path(save_directory)
        if options and not push_to_hub:
            raise BadInput(f"save_pretrained has no option {min(options)}", "Say push_to_hub=True, or leave it out.")
        if not target.exists() or not target.samefile(source.root):
            with BundleWriter(target) as writer, translate_write_errors(target):
                for name in source.manifest.files:
                    (writer.root / name).parent.mkdir(parents=True, exist_ok=True)
                    put(source, name, writer.root / name)
                (writer.root / MANIFEST).write_bytes((source.root / MANIFEST).read_bytes())
                writer.publish_sealed()
        if push_to_hub:
            self.push_to_hub(target, **options)

    def push_to_hub(
        self,
        save_directory: PathLike,
        repository_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> Pushed:
        """Upload a bundle that `save_pretrained` wrote, or with a repository's id alone the one that is loaded.

        Raises what `pocketmoe.hub.push` raises.
        """
        name = repository_id or str(save_directory)
        reference = Reference.parse(f"{name}@{revision}" if revision else name)
        if reference is None:
            raise BadInput(f"{name} is no place on the hub", "Name it ORG/NAME, and a branch by revision=.")
        root = Path(save_directory) if repository_id else self.bundle.root
        return push(root, reference, private=bool(private), token=token)

    @property
    def bundle(self) -> Bundle:
        """The bundle that is loaded."""
        return cast("Model", self.model).bundle

    def close(self) -> None:
        """Give everything back; a second time does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def can_generate(self) -> bool:
        return True

    def eval(self) -> Self:
        """As it is always: nothing here is trained."""
        return self

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """To where it is. Raises BadInput for another device or type."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if (device is not None and torch.device(device).type != "cpu") or dtype not in (None, torch.float32):
            raise BadInput(
                f"PocketMoE computes in float32 on the CPU, not in {dtype or device}", "Leave it where it is."
            )
        return self

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None of transformers'."""
        return {}

    def _save_pretrained(self, save_directory: Any) -> None:
        self.save_pretrained(save_directory)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_generation_config(self, *arguments: Any, **options: Any) -> Any:
        found = cast("Any", super())._prepare_generation_config(*arguments, **options)
        wrong_use.refuse_generation(found[0])
        return found

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        cast("Any", super())._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        self._refuse_beyond_context(int(generation_config.max_length))

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Continuous batching, which is not offered: `pocketmoe serve` has it."""
        raise BadInput("PocketMoE does not generate by generate_batch", "Use generate, or pocketmoe serve.")

    def _cache_for(self, shape: tuple[int, int], mask: torch.Tensor | None, past: Any) -> tuple[TextsCache, list[int]]:
        """The cache that a call appends to, a new one at the start of texts; and the padding of each row."""
        count, width = shape
        _refuse_other_cache(past)
        if past is None or not past.rows:
            padding = wrong_use.padding_of(mask, (count, width))
            cache = past or TextsCache([])
            cache.rows = [Row(left) for left in padding]
            return cache, padding
        if len(past) != count:
            raise BadInput(f"past_key_values is of {len(past)} texts, input_ids of {count}", "Give as many of both.")
        if mask is not None:
            before = past.get_seq_length() if mask.shape[1] != width else 0
            padding = wrong_use.padding_of(mask, (count, before + width))
            if padding != ([row.padding for row in past.rows] if before else [0] * count):
                raise BadInput("attention_mask does not fit past_key_values", "Give the mask of all tokens so far.")
        return past, [row.padding for row in past.rows]

    def _refuse_beyond_context(self, tokens: int) -> None:
        context = cast("Model", self.model).context_length
        if tokens > context:
            raise BadInput(
                f"the text may come to {tokens} tokens, the context holds {context}",
                "Ask for a shorter answer (max_new_tokens), or load the model with a larger context.",
            )


@contextlib.contextmanager
def _one_torch_thread() -> Generator[None]:
    """Let torch compute with one thread meanwhile.

    All it does between two tokens is to look at some logits. A helper for that waits for more work in a spinning loop,
    for milliseconds, on the CPU that the engine's own helper needs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _refuse_other_cache(past: Any) -> None:
    if not isinstance(past, TextsCache | None):
        raise BadInput(f"past_key_values is a {type(past).__name__}", "Give what an earlier call returned.")


def _close(model: Model, folder: Folder | None) -> None:
    model.close()
    if folder is not None:
        folder.cleanup()


AutoConfig.register(PocketMoEConfig.model_type, PocketMoEConfig)
AutoModelForCausalLM.register(PocketMoEConfig, PocketMoEForCausalLM)
