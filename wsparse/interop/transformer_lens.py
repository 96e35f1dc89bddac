"""Models in TransformerLens: the export of a run, and a bridge with the run's logits and hooks.

    python -m wsparse.interop.transformer_lens --run=RUN --out=FOLDER

writes weights, config and tokenizer. Where PyTorch and TransformerLens are installed (the extra `lens`):

    from wsparse.interop import transformer_lens
    bridge = transformer_lens.load("FOLDER")
    logits, cache = bridge.run_with_cache("x = 'hello'")

Neither is imported before `load` is called. TransformerLens finds the adapter, `lens_adapter.WsparseAdapter`,
by its entry point `transformer_lens.architectures`.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
from typing import Any

from absl import flags
import safetensors

from wsparse import files
from wsparse.command import run_command
from wsparse.config import ModelConfig, from_dict
from wsparse.errors import UserError, missing_extra


def export(run_folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes a run's model and tokenizer as a folder that `load`, and `pretrained.from_pretrained`, read.

    Raises:
      UserError: `run_folder` is not a run, or the folder cannot be written.
    """
    from wsparse import runs  # Needs jax, which `load` does not.
    from wsparse.interop import pretrained

    run = runs.load(run_folder)
    pretrained.save_pretrained(out, run.config.model, run.params, run.tokenizer, data=run.config.data)


def load(folder: str | os.PathLike[str]) -> Any:
    """Returns the `TransformerBridge` of a folder of `export`, in float32.

    Raises:
      UserError: PyTorch or TransformerLens is missing, or the folder is not one of `export`.
    """
    folder = pathlib.Path(folder)
    config = _config(folder)
    try:
        from safetensors import torch as safetensors_torch
        import torch
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources import build_bridge_from_module
        import transformers
    except ImportError as error:
        raise missing_extra(str(error.name or "transformer_lens"), "lens", "a bridge") from error
    from wsparse.interop import lens_adapter, torch_model

    try:
        leaves = safetensors_torch.load_file(folder / "model.safetensors")
        model = torch_model.load(config, {path: leaf.to(torch.float32) for path, leaf in leaves.items()})
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'model.safetensors'} is not of this model: {reason}") from error
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    # Where the package is not installed but on the path, there is no entry point.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(lens_adapter.ARCHITECTURE, lens_adapter.WsparseAdapter)
    return build_bridge_from_module(
        model,
        lens_adapter.ARCHITECTURE,
        tl_config=lens_adapter.bridge_config(config),
        tokenizer=tokenizer,
        model_name=folder.name,
    )


def _config(folder: pathlib.Path) -> ModelConfig:
    """Returns the model's config of a folder of `export`."""
    values = files.read_json(folder / "config.json")
    if values.get("model_type") != "wsparse" or not isinstance(values.get("model"), dict):
        raise UserError(
            f"{folder} is not an exported model: python -m wsparse.interop.transformer_lens --run=RUN "
            "--out=FOLDER makes one of a run"
        )
    return from_dict(ModelConfig, values["model"], where="model.")


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    export(options.run, options.out)
    print(f"wrote {options.out}: wsparse.interop.transformer_lens.load({options.out!r}) makes a bridge of it")


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The run's folder.", required=True)
    flags.DEFINE_string("out", None, "The folder to write.", required=True)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
