"""Evaluates a trained model, or lets it write.

uv run eval.py --workdir=runs/mor
uv run eval.py --workdir=runs/mor --prompt="def main():" --temperature=0.7 --top_p=0.9
"""

import logging

from absl import flags

from effjax import cli, huge_pages

_CONFIG = cli.define_config("Config of the evaluation; without one, that of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
_PROMPT = flags.DEFINE_string(
    "prompt",
    None,
    "Text that the model continues, as the beginning of a document; nothing is evaluated then.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens after the prompt.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the tokens drawn after the prompt.")
_SAMPLING = (
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the most likely token."),
    flags.DEFINE_integer("top_k", None, "Draw from so many of the most likely tokens."),
    flags.DEFINE_float("top_p", None, "Draw from the most likely tokens of this probability."),
    flags.DEFINE_float("min_p", None, "Draw from tokens of this share of the largest probability."),
    flags.DEFINE_float("repetition_penalty", 1.0, "Divides the logits of tokens that are there."),
)


def main():
    logging.getLogger("effjax").setLevel(logging.INFO)  # says what it is at
    workdir = _WORKDIR.value or cli.default_workdir()
    if _PROMPT.value is None:
        _evaluate(workdir)
    else:
        _continue(workdir)


def _evaluate(workdir):
    for flag in (_MAX_NEW_TOKENS, _SEED, *_SAMPLING):
        if flag.present:
            raise ValueError(f"--{flag.name} without --prompt; valid: both, or neither")
    from effjax import evaluation  # after the flags: a wrong one is told at once
    from effjax.evaluation import report

    found = evaluation.evaluate(_CONFIG.value, workdir)
    print(report.table(found))
    print(f"wrote {workdir}/{report.JSON_FILE} and {', '.join(found['plots'])}")


def _continue(workdir):
    from effjax import evaluation
    from effjax.serving import Sampling

    sampling = Sampling(**{flag.name: flag.value for flag in _SAMPLING})
    pieces = evaluation.continue_text(
        _CONFIG.value,
        workdir,
        _PROMPT.value,
        _MAX_NEW_TOKENS.value,
        sampling=sampling,
        seed=_SEED.value,
    )
    print(_PROMPT.value, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    huge_pages.restart()
    cli.run(main)
