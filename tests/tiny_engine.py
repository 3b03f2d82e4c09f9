"""An engine over a tiny model; a process that hands `build` on to another one needs no torch."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from hotset.errors import ConfigError
from hotset.model.loaded import LoadedModel
from hotset.options import Options

if TYPE_CHECKING:
    from hotset.engine.engine import Engine


def build(
    config: Options, context: int = 512, family: str = "llama", overlap: bool | None = None
) -> tuple["Engine", LoadedModel]:
    """An engine over a tiny random model, instead of `config.model.model`."""
    import torch
    from tiny_models import make_model
    from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

    from hotset.engine.build import build_engine

    torch.set_num_threads(1)
    model = make_model(family, vocab_size=VOCAB_SIZE, max_position_embeddings=context)
    loaded = LoadedModel(model, make_tokenizer(), "tiny", "tiny", (EOS_TOKEN_ID,), context)
    return build_engine(config, loaded, overlap=overlap), loaded


def build_for_long(config: Options) -> tuple["Engine", LoadedModel]:
    """Make the file `config.model.model`, and never come to an end."""
    assert config.model.model is not None
    Path(config.model.model).touch()
    time.sleep(300)
    raise ConfigError("too late")
