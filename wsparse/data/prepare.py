"""Turn sources into a folder of token shards, so that a large corpus is tokenized only once.

    python -m wsparse.data.prepare --source='files:/data/**/*.py' --out=prepared [--vocab_size=2048]
    python -m wsparse.train --config.data.source=arrayrecord:prepared ...

It may be interrupted at any moment; the same command continues after the last finished shards and gives the
same bytes as an uninterrupted one. A finished folder is left as it is. See `wsparse.data.encode`.
"""

from __future__ import annotations

from collections.abc import Sequence
import logging
import pathlib
from typing import Any

from absl import flags

from wsparse.command import define_fields, given_fields, run_command
from wsparse.data import encode, tokens
from wsparse.data.encode import Options
from wsparse.data.encode import write as prepare

__all__ = ["Options", "prepare"]

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    values: Any = flags.FLAGS
    options = Options(**given_fields(Options))
    out = pathlib.Path(values.out).expanduser()
    manifest = encode.write(options, out)
    if values.verify:
        tokens.verify(out)
    for component in manifest.components:
        log.info("%s", component.report)
        log.info("  %d training tokens, %d held out", component.train_tokens, component.validation_tokens)
    log.info("read it with --config.data.source=arrayrecord:%s", out)


def _define_flags() -> None:
    """Called only by the command, so that importing this module defines no global flag."""
    flags.DEFINE_string("out", None, "The folder to write.", required=True)
    flags.DEFINE_boolean("verify", False, "At the end, read every shard and compare its sha256.")
    define_fields(Options)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
