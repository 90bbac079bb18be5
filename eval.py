"""Evaluates a trained model, or lets it write.

uv run eval.py --workdir=runs/mor
uv run eval.py --workdir=runs/mor --distributed
uv run eval.py --workdir=runs/mor --prompt="def main():" --temperature=0.7 --top_p=0.9
"""

import logging

from absl import flags

from effjax import cli, huge_pages

_CONFIG = cli.define_config("Config of the evaluation; without one, that of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
_JOINED = cli.define_distributed("evaluate together")
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
    from effjax import compilation  # after the flags: a wrong one is told at once

    logging.getLogger("effjax").setLevel(logging.INFO)  # says what it is at
    compilation.enable_cache()
    workdir = _WORKDIR.value or cli.default_workdir()
    if _PROMPT.value is None:
        _evaluate(workdir)
    else:
        _continue(workdir)


def _evaluate(workdir):
    cli.check_not_alone((_MAX_NEW_TOKENS, _SEED, *_SAMPLING), _PROMPT)
    from effjax import evaluation, processes  # after the flags: a wrong one is told at once
    from effjax.evaluation import report

    with _JOINED():
        found = evaluation.evaluate(_CONFIG.value, workdir)
        if processes.is_first():
            print(report.table(found))
            print(f"wrote {workdir}/{report.JSON_FILE} and {', '.join(found['plots'])}")


def _continue(workdir):
    if flags.FLAGS.distributed:
        raise ValueError("--distributed with --prompt; valid: one of them")
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
