"""Makes a random checkpoint route like a real model, so that every engine that runs it does so by itself.

    python benchmarks/routing.py CHECKPOINT olmoe        a fitted model (profiles/routing/synthetic.py), or a trace.npy

Random routers choose nearly uniformly. Here the embeddings of the tokens from `FIRST` on are chosen such that the token
`FIRST` + t is routed, in every layer, to the experts that row t of a trace names. The state of a random model is its
token's embedding and little else, and a router is linear: L * E logits are asked of `hidden_size` numbers, which has
an exact solution as long as there are more numbers than logits. A model with more layers than that gets the routers of
its first layers again in later ones, each time with its experts numbered otherwise: such layers share a layer of the
trace. No other weight changes, and no engine is hooked. Fed in order, these tokens have the popularity and the
repetition of the trace; all other tokens still route uniformly.

What it does not imitate: the next layer's router sees this layer's state, and here that is nearly its own, so that
predicting one layer ahead is almost always right. Real models recall .6 to .9; benchmarks dilute the predictions to .8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FIRST = 2000  # the id of the trace's first token
TOKENS = 2048
UNIFORM = range(300, FIRST)  # ids that route by chance
RECORD = "routing.npy"  # in the checkpoint: the trace that was followed, int16 [tokens, layers, top_k]
_ROOM = 0.75  # logits per hidden number; beyond, what is asked of an embedding outgrows it

EMBEDDING = "model.embed_tokens.weight"


def routes(source: str, seed: int = 0) -> np.ndarray:
    """Expert ids, int16 [TOKENS or fewer, layers, top_k], of a fitted model by name or of a recorded trace."""
    from pocketmoe.profiles.routing.synthetic import fitted_models, synthetic_routing
    from pocketmoe.runtime.trace import read_trace

    if source in fitted_models():
        return synthetic_routing(fitted_models()[source], [TOKENS], seed)
    return read_trace(Path(source)).ids[:TOKENS]


def shape_embeddings(routers: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Embeddings, float32 [tokens, hidden], of mean square 1, which `routers`, float32 [layers, experts, hidden], route
    to ids, int [tokens, layers, top_k]: the smallest solution in which every chosen expert leads by the same margin.
    """
    layers, experts, hidden = routers.shape
    if ids.shape[2] == experts:
        raise SystemExit(f"All {experts} experts are chosen for every token: there is nothing to shape.")
    wanted = np.full((len(ids), layers, experts), -ids.shape[2] / experts)
    np.put_along_axis(wanted, ids.astype(np.int64), 1 - ids.shape[2] / experts, axis=2)
    rows = routers.reshape(-1, hidden).astype(np.float64)
    found = np.linalg.solve(rows @ rows.T, wanted.reshape(len(ids), -1).T).T @ rows
    return (found / np.sqrt((found**2).mean(axis=1, keepdims=True))).astype(np.float32)


def shape_checkpoint(directory: Path, ids: np.ndarray) -> None:
    """Give a checkpoint of make_checkpoint.py the embeddings for ids, int16 [tokens, layers, top_k].

    A trace with fewer layers starts over from its first one. Files are replaced, not written to.
    """
    import torch  # not where an engine is measured, whose process would be 200 MB larger
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    if ids.shape[2] != config["num_experts_per_tok"] or ids.max() >= experts:
        raise SystemExit(f"The trace is not of a model with {experts} experts, {config['num_experts_per_tok']} chosen.")
    own = min(layers, int(_ROOM * config["hidden_size"]) // experts)  # with a router that no earlier layer has
    ids = ids[:, np.arange(own) % ids.shape[1]]
    orders = numberings(layers, own, experts)

    def change(name: str, value: torch.Tensor) -> None:
        """Put another tensor of the same shape into its shard."""
        content = load_file(directory / index[name])
        content[name] = value
        partial = directory / "shard.partial"
        save_file(content, partial, metadata={"format": "pt"})
        partial.replace(directory / index[name])

    def read(name: str) -> torch.Tensor:
        with safe_open(directory / index[name], "pt") as shard:
            return shard.get_tensor(name)

    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(layers)]
    first = [read(gate) for gate in gates[:own]]
    for layer in range(own, layers):
        change(gates[layer], first[layer % own][orders[layer]].contiguous())
    shaped = torch.from_numpy(shape_embeddings(np.stack([gate.float().numpy() for gate in first]), ids))
    embedding = read(EMBEDDING)
    embedding[FIRST : FIRST + len(ids)] = shaped.to(torch.bfloat16)
    change(EMBEDDING, embedding)
    ids = np.stack([np.argsort(orders[layer])[ids[:, layer % own]] for layer in range(layers)], axis=1)
    np.save(directory / RECORD, ids.astype(np.int16))
    routers = np.stack([read(gate).float().numpy() for gate in gates])
    share = follows(routers, embedding[FIRST : FIRST + len(ids)].float().numpy(), ids)
    print(f"tokens {FIRST} to {FIRST + len(ids) - 1} follow the trace: {share:.2%}")


def numberings(layers: int, own: int, experts: int) -> np.ndarray:
    """Which of the shared router's experts each expert of a layer is, int64 [layers, experts]."""
    rng = np.random.default_rng(0)
    later = [rng.permutation(experts) for _ in range(layers - own)]
    return np.stack([*[np.arange(experts)] * own, *later])


def given_tokens(routing: str, count: int) -> list[int]:
    """Token ids, the same for every engine: "realistic" ones follow the trace from its start, "uniform" ones none."""
    if routing == "realistic":
        return list(range(FIRST, FIRST + count))
    rng = np.random.default_rng(0)
    rounds = -(-count // len(UNIFORM))  # each in another order
    return np.concatenate([rng.permutation(UNIFORM) for _ in range(rounds)])[:count].tolist()


def follows(routers: np.ndarray, states: np.ndarray, ids: np.ndarray) -> float:
    """The share of ids, int [tokens, layers, top_k], that the routers choose on states, float32 [tokens, hidden]."""
    logits = np.einsum("leh,th->tle", routers, states, optimize=True)
    return agreement(np.argpartition(-logits, ids.shape[2] - 1, axis=2)[..., : ids.shape[2]], ids)


def agreement(chosen: np.ndarray, wanted: np.ndarray) -> float:
    """The share of wanted, int [tokens, layers, top_k], that is in chosen, of the same shape, whatever the order."""
    return float((wanted[..., :, None] == chosen[..., None, :]).any(axis=-1).mean())


def repetition(ids: np.ndarray, distance: int = 1) -> float:
    """The share of experts of ids, int [tokens, layers, top_k], that are chosen again `distance` tokens later."""
    return agreement(ids[distance:], ids[:-distance])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of make_checkpoint.py")
    parser.add_argument(
        "routing", help="a trace, or a fitted model: olmoe, qwen3-30b, ... (pocketmoe/profiles/routing/routing.toml)"
    )
    args = parser.parse_args()
    shape_checkpoint(args.checkpoint, routes(args.routing))


if __name__ == "__main__":
    main()
