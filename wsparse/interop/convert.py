"""The command that imports published checkpoints as runs, and exports runs as published checkpoints.

    python -m wsparse.interop.convert --from=FOLDER --out=RUN [--tokenizer=PATH] [--source=stdlib]
    python -m wsparse.interop.convert --from=RUN --out=FOLDER --export

Which format a checkpoint has, that of Gao et al. 2025 (`wsparse.interop.openai`) or that of its replication
in PyTorch (`wsparse.interop.sparse_pretrain`), its files say. Exports are of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Any

from absl import flags

from wsparse import files, runs
from wsparse.command import run_command
from wsparse.config import DataConfig, TrainConfig
from wsparse.data import sources
from wsparse.errors import UserError
from wsparse.interop import openai, sparse_pretrain

# What the continued prompt may be, by the kind of text of the model.
_PROMPTS = {"python": "def add(a, b):", "stories": "Mia went to the park"}


def import_run(
    folder: pathlib.Path,
    out: pathlib.Path,
    *,
    tokenizer: pathlib.Path | None = None,
    source: str | None = None,
) -> TrainConfig:
    """Makes a run folder of a published checkpoint of either format.

    Args:
      folder: The checkpoint.
      out: The run folder, which must not exist or be empty.
      tokenizer: Where its tokenizer is, if not in `folder`: a folder, or a `tokenizer.json`.
      source: Source of the run's text, as `config.data.source` in training; None is that of the format. It is
        read when it is first needed.

    Returns:
      The config of the run, with defaults for the training (sparsity, optimizer, steps), which is unknown.

    Raises:
      UserError: There is no checkpoint, or as its format's `load`; there is no tokenizer, or it does not fit
        the model; `out` exists.
    """
    if (folder / openai.CONFIG_FILE).is_file():
        layout = openai
    elif any((folder / name).is_file() for name in sparse_pretrain.WEIGHTS_FILES):
        layout = sparse_pretrain
    else:
        raise UserError(
            f"{folder} is not a published checkpoint: it has neither {openai.CONFIG_FILE} nor "
            f"{' nor '.join(sparse_pretrain.WEIGHTS_FILES)}"
        )
    files.check_new_folder(out)
    source = layout.SOURCE if source is None else source
    sources.parse_mix(source)
    config, params = layout.load(folder)
    loaded = layout.load_tokenizer(tokenizer or folder)
    if loaded.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {loaded.vocab_size} tokens, the model {config.vocab_size}: "
            "give the model's own tokenizer with --tokenizer"
        )
    run = TrainConfig(model=config, data=DataConfig(source=source, domain=layout.DOMAIN))
    runs.create(out, run, params, loaded, summary={"imported_from": str(folder)})
    return run


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    # `from` is a keyword, so the flag cannot be read as an attribute.
    folder, out = pathlib.Path(options["from"].value), pathlib.Path(options.out)
    if options.export:
        config = openai.export_run(folder, out)
        # The published code's default leaves sinks out, and says nothing.
        call = f"load_model({str(out)!r}{', flash=True' if config.sink else ''})"
        print(f"wrote {out}: read it with --from={out}, or with the published code's {call}")
        return
    tokenizer = pathlib.Path(options.tokenizer) if options.tokenizer else None
    config = import_run(folder, out, tokenizer=tokenizer, source=options.source)
    print(f"wrote {out}: python -m wsparse.sample --run={out} --prompt='{_PROMPTS[config.data.domain]}'")


def _define_flags() -> None:
    flags.DEFINE_string("from", None, "A published checkpoint's folder; a run with --export.")
    flags.DEFINE_string("out", None, "The folder to write: a run; a checkpoint with --export.")
    flags.DEFINE_bool("export", False, "Write the run --from as a published checkpoint to --out.")
    flags.DEFINE_string(
        "tokenizer",
        None,
        "Where the tokenizer is, if not in --from: the folder of encoder.json and vocab.bpe, or a "
        "tokenizer.json.",
    )
    flags.DEFINE_string(
        "source",
        None,
        "Source of text for prune, as config.data.source in training; by default the format's.",
    )
    flags.mark_flags_as_required(["from", "out"])


if __name__ == "__main__":
    _define_flags()
    run_command(main)
