"""Random models and circuits for the tests of the page that runs them, and what JAX makes of them."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import model_case
import numpy as np

from wsparse import model, taps, trees
from wsparse.circuits import graph, masks, model_file, scoring
from wsparse.config import ModelConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.nodes import NODES
from wsparse.viewer import live, page

TINY = ModelConfig(vocab_size=257, context=16, n_layer=2, d_model=12, n_head=3, d_head=4, d_mlp=20)
ALONE = dataclasses.replace(TINY, n_layer=1)
TASK = "task"

# Starts the page's own worker and returns its answers to messages.
ASK = """async ([code, load, requests]) => {
  const worker = new Worker(URL.createObjectURL(new Blob([code], { type: 'text/javascript' })));
  const plain = (value) => (ArrayBuffer.isView(value) ? Array.from(value)
    : Array.isArray(value) ? value.map(plain)
    : value && typeof value === 'object' ? object(value) : value);
  const object = (value) => Object.fromEntries(Object.entries(value).map(([k, each]) => [k, plain(each)]));
  const ask = (message, kind) => new Promise((done, fail) => {
    worker.onerror = (event) => fail(new Error(event.message));
    worker.onmessage = ({ data }) => {
      if (data.kind === 'failed') fail(new Error(data.reason));
      else if (data.kind === kind) done(plain(data));
    };
    worker.postMessage(message);
  });
  const answers = [await ask(load, 'loaded')];
  for (const [message, kind] of requests) answers.push(await ask(message, kind));
  worker.terminate();
  return answers;
}"""


@functools.cache
def tokenizer() -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.train(["no merges"], TINY.vocab_size)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with a circuit in it.

    Attributes:
      kept: Location -> bool `(L, N)`.
      means: Location -> `(L, N)`, "attn.y" included.
      removed: Kernel path -> bool `(L, in, out)`.
    """

    config: ModelConfig
    params: dict
    kept: dict
    means: dict
    removed: dict

    @functools.cached_property
    def stored(self) -> model_file.StoredModel:
        flat = trees.flatten(self.params)
        found = model_file.stored(flat, self.config, tokenizer=tokenizer().to_json(), digest="0")
        assert found is not None
        return found

    def messages(self, pairs=None) -> tuple[dict, dict]:
        """What the page's data says of the model, and of the circuit."""
        tokens_RT, positions_R, answers_R = pairs or (np.ones((2, 3)), np.array([2, 2]), np.array([1, 2]))
        found = live.contents(self.stored)
        circuit = types.SimpleNamespace(means=self.means, mask=lambda: self.kept, removed=self.removed)
        evidence = types.SimpleNamespace(
            pair_tokens_RT=tokens_RT, pair_positions_R=positions_R, pair_answers_R=answers_R
        )
        own = live.of_circuit(self.stored, circuit, evidence, found)
        return found, {TASK: own}

    def side(self, name: str):
        """Parameters with biases, and gates, of the whole "model" or the "circuit" alone."""
        config, params = scoring.with_biases(self.config, jax.tree.map(jnp.asarray, self.params))
        gates = {location: np.ones_like(mask_LN, np.float32) for location, mask_LN in self.kept.items()}
        if name == "circuit":
            stays = {path: jnp.asarray(~removed) for path, removed in self.removed.items()}
            params = graph.cut(params, stays, {key: jnp.asarray(mean) for key, mean in self.means.items()})
            gates = {location: mask_LN.astype(np.float32) for location, mask_LN in self.kept.items()}
        return config, params, gates


def case(config: ModelConfig, seed: int = 0) -> Case:
    """Half of the weights, three of four nodes kept and three of four weights left, at random."""
    random = np.random.default_rng(seed)
    drawn = model_case.random_params(config, np.float32, seed)

    def thin(path, leaf):
        matrix = path.endswith(("kernel", "embed/tokens", "unembed"))
        return (leaf * (random.random(leaf.shape) < 0.5)).astype(np.float32) if matrix else leaf

    params = trees.map_with_path(thin, drawn)
    shapes = masks.shapes(config) | {"attn.y": (config.n_layer, config.attention_width)}
    kept = {name: random.random(shapes[name]) < 0.75 for name in NODES}
    means = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    nonzero = graph.nonzero(params)
    removed = {path: weights & (random.random(weights.shape) < 0.25) for path, weights in nonzero.items()}
    return Case(config, params, kept, means, removed)


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens, gates, constants, config):
    return model.forward(params, tokens, config, tap=taps.NodeAblation(gates, constants))


def in_jax(given: Case, side: str, tokens: list[int], held: dict | None = None):
    """Logits `(T, V)` and the value of every node by name, with nodes of `held` at its values."""
    config, params, gates = given.side(side)
    gates = {name: gate.copy() for name, gate in gates.items()}
    constants = {name: given.means[name].copy() for name in NODES}
    for name, value in (held or {}).items():
        layer, location, channel = name.split(".", 1)[0], *name.split(".", 1)[1].rsplit(".", 1)
        gates[location][int(layer), int(channel)] = 0
        constants[location][int(layer), int(channel)] = value
    logits_BTV, acts = _forward(params, np.array([tokens], np.int32), gates, constants, config)
    values = np.concatenate(
        [np.moveaxis(np.asarray(acts[name])[:, 0], 1, 2).reshape(-1, len(tokens)) for name in NODES]
    )
    return np.asarray(logits_BTV)[0], dict(zip(masks.names(given.config), values, strict=True))


def in_browser(browser, given: Case, requests: list, pairs=None) -> list[dict]:
    """The worker's answers to requests `(message, kind of answer)`."""
    found, circuits = given.messages(pairs)
    load = {"kind": "load", "live": found, "circuits": circuits}
    tab = browser.new_page()
    try:
        return tab.evaluate(ASK, [page.engine(), load, requests])[1:]
    finally:
        tab.close()


def request(given: Case, text: str, edits=(), heads=()) -> dict:
    nodes = masks.names(given.config)
    return {"kind": "run", "id": 1, "task": TASK, "text": text, "edits": list(edits), "nodes": nodes,
            "heads": list(heads)}  # fmt: skip


def agrees(given: Case, answer: dict, expected, tokens: list[int], tolerance: float = 1e-4) -> None:
    """Asserts that a side's logits and nodes are those of JAX."""
    logits_TV, values = expected
    np.testing.assert_allclose(
        np.reshape(answer["logits"], (len(tokens), -1)), logits_TV, rtol=0, atol=tolerance
    )
    assert set(answer["values"]) == set(values)
    for name, value_T in values.items():
        np.testing.assert_allclose(answer["values"][name], value_T, rtol=0, atol=tolerance, err_msg=name)
