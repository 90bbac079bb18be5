"""An HTTP server for a trained model: `python -m effjax.serving.server --workdir=runs/transformer`.

It speaks OpenAI's API on the loopback interface: `/v1/completions`, `/v1/chat/completions`, `/v1/embeddings`, with
`/healthz` and `/metrics` beside. Texts that come at the same time are decoded together, in the way that suits the model
(`effjax.serving.decoders`), and with `--draft_workdir`, `--draft_hf` or `--early_exit` speculatively. With the
environment variable EFFJAX_API_KEY clients have to show that key.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from effjax import checkpoint, cli, compilation, data, interop, models, run_config
from effjax.depth import Plain
from effjax.serving.decoders import DECODINGS, Draft, create_decoder
from effjax.serving.early_exit import early_exit as shallow
from effjax.serving.embedder import Embedder
from effjax.serving.engine import Engine

try:
    import uvicorn

    from effjax.serving.api import Service, create_app
    from effjax.serving.chat import ChatTemplate
except ModuleNotFoundError as error:
    cli.fail(f"{error}; install the extra that servers need: effjax[serve]")

logger = logging.getLogger(__name__)

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run, whose newest checkpoint is served."
)
_HF = flags.DEFINE_string("hf", None, "Folder of a Hugging Face model, which is served.")
_NAME = flags.DEFINE_string("name", None, "Name of the model for clients; default: the folder's.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Interface to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.", 0, 65535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Texts that are decoded at a time.", 1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens of a text, prompt included; default: what the model takes.", 1
)
_CACHE_TOKENS = flags.DEFINE_integer(
    "cache_tokens",
    None,
    "Tokens of all texts together whose keys and values are kept; default: the longest text in every slot.",
    1,
)
_DECODING = flags.DEFINE_enum(
    "decoding",
    "auto",
    DECODINGS,
    "How texts are decoded without a draft; auto: depth-wise where tokens differ in depth, else plain.",
)
_DRAFT_WORKDIR = flags.DEFINE_string(
    "draft_workdir", None, "Folder of a run whose model drafts for speculative decoding."
)
_DRAFT_HF = flags.DEFINE_string(
    "draft_hf", None, "Folder of a Hugging Face model that drafts for speculative decoding."
)
_EARLY_EXIT = flags.DEFINE_integer(
    "early_exit",
    None,
    "Speculative decoding whose draft is so many layers of the model, or recursions if it has them.",
    1,
)
_DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens", 4, "Tokens that are drafted before each pass of the model.", 1
)
_MAX_WAITING = flags.DEFINE_integer("max_waiting", 64, "Requests that may wait for a slot.", 1)
_WARM_UP = flags.DEFINE_integer(
    "warm_up",
    128,
    "Tokens of the longest prompt for which programs are compiled before the server answers; 0: none.",
    0,
)
_TIMEOUT = flags.DEFINE_float("timeout", 300.0, "Seconds that a request may take.", 0.001)


class Loaded(NamedTuple):
    """A model to be served."""

    model: models.SequenceModel
    variables: Any
    tokenizer: data.Tokenizer
    template: ChatTemplate
    stop_tokens: frozenset[int]


def load_run(workdir: str | Path) -> Loaded:
    """The newest checkpoint of a run.

    Raises:
      CheckpointError: if there is none that can be read.
    """
    config = json.loads(run_config.load(workdir).to_json())  # plain values
    variables, step = checkpoint.restore_variables(workdir)
    model = models.create(**config["model"]).at_step(step)
    tokenizer = data.tokenizer(config["data"])
    return Loaded(model, variables, tokenizer, ChatTemplate(), _ends(tokenizer.eos_id))


def load_folder(folder: str | Path) -> Loaded:
    """A Hugging Face folder with its tokenizer and chat template.

    Raises:
      ValueError, OSError: for a folder that is not one of a model that is known.
    """
    model, variables = interop.load_hf(folder)
    path = Path(folder) / "tokenizer.json"
    tokenizer = data.tokenizer({"tokenizer": {"name": "huggingface", "path": str(path)}})
    # A chat model ends its turns with a token that need not be the one that ends a document.
    generation = Path(folder) / "generation_config.json"
    fields = json.loads(generation.read_text()) if generation.is_file() else {}
    ends = _ends(fields.get("eos_token_id", tokenizer.eos_id))
    return Loaded(model, variables, tokenizer, ChatTemplate.of_folder(folder), ends)


def _ends(ids: int | Sequence[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def find_draft(
    loaded: Loaded,
    *,
    workdir: str | None = None,
    hf: str | None = None,
    early_exit: int | None = None,
    num_tokens: int = 4,
) -> Draft | None:
    """What drafts for a model: the model of a folder, or the first layers or recursions of the model itself.

    Args:
      loaded: the model.
      workdir: folder of a run.
      hf: folder of a Hugging Face model.
      early_exit: layers that stay, or recursions of a model that has them.
      num_tokens: of a draft.

    Returns:
      None if nothing is to draft.

    Raises:
      ValueError: for more than one of them, or an exit that the model does not have.
    """
    given = {"draft_workdir": workdir, "draft_hf": hf, "early_exit": early_exit}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are given; valid: one of them")
    if workdir is not None:
        model, variables, *_ = load_run(workdir)
    elif hf is not None:
        model, variables = interop.load_hf(hf)
    elif early_exit is not None:
        is_plain = isinstance(loaded.model.depth, Plain)
        where = {"num_layers" if is_plain else "num_recursions": early_exit}
        model, variables = shallow(loaded.model, loaded.variables, **where)
    else:
        return None
    return Draft(model, variables, num_tokens)


def serve(
    loaded: Loaded, name: str, *, max_waiting: int = 64, warm_up: int = 0, **options: Any
) -> Service:
    """Starts what answers requests: an engine for a model that scores the vocabulary, an embedder for one that embeds.

    Args:
      loaded: the model.
      name: of the model for clients.
      max_waiting: requests that may wait for a slot of the engine.
      warm_up: tokens of the longest prompt for which programs are compiled now, and not when it comes.
      **options: those of `create_decoder` for the engine, and fields of `Service`.
    """
    fields = {field.name for field in dataclasses.fields(Service)}
    of_service = {field: options.pop(field) for field in fields & options.keys()}
    model, variables = loaded.model, loaded.variables
    engine = embedder = None
    if scores_vocabulary(model):
        decoder = create_decoder(model, variables, **options)
        if warm_up:
            logger.info("compiling for prompts of up to %d tokens", warm_up)
            decoder.warm_up(warm_up)
        engine = Engine(decoder, max_waiting=max_waiting)
    elif options.get("draft") is not None:
        raise ValueError(
            "a draft for a model that embeds; valid: for one that scores the vocabulary"
        )
    else:
        embedder = Embedder(model, variables)
    return Service(
        name,
        loaded.tokenizer,
        engine,
        embedder,
        template=loaded.template,
        stop_tokens=loaded.stop_tokens,
        **of_service,
    )


def scores_vocabulary(model: models.SequenceModel) -> bool:
    """Whether the model's head gives logits of tokens."""
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    output, _ = jax.eval_shape(lambda t: model.init_with_output(jax.random.key(0), t), tokens)
    return output.logits is not None


def main():
    workdir, hf = _WORKDIR.value, _HF.value
    compilation.enable_cache()
    if workdir is not None and hf is None:
        folder, loaded = workdir, load_run(workdir)
    elif hf is not None and workdir is None:
        folder, loaded = hf, load_folder(hf)
    else:
        raise ValueError("give one of --workdir and --hf")
    key = os.environ.get("EFFJAX_API_KEY") or None
    if key is None and _HOST.value not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "anybody who reaches %s can use this server: EFFJAX_API_KEY is not set", _HOST.value
        )
    service = serve(
        loaded,
        _NAME.value or Path(folder).resolve().name,
        num_slots=_SLOTS.value,
        max_length=_MAX_LENGTH.value,
        max_waiting=_MAX_WAITING.value,
        warm_up=_WARM_UP.value,
        cache_tokens=_CACHE_TOKENS.value,
        decoding=_DECODING.value,
        draft=find_draft(
            loaded,
            workdir=_DRAFT_WORKDIR.value,
            hf=_DRAFT_HF.value,
            early_exit=_EARLY_EXIT.value,
            num_tokens=_DRAFT_TOKENS.value,
        ),
        timeout=_TIMEOUT.value,
        api_key=key,
    )
    uvicorn.run(create_app(service), host=_HOST.value, port=_PORT.value, log_level="info")


if __name__ == "__main__":
    cli.run(main)
