"""Speculative decoding: a small model drafts a few tokens, and the large one reads them all in one pass.

A pass over a few tokens takes about as long as over one where reading the weights is what takes time, and the text is
distributed as if the large model had drawn it alone (`effjax.serving.acceptance`).

A round leaves rows at different lengths and both models with tokens behind them that are no part of the text. Each gets
back to its text in a way that is exact for every mixer and depth policy and costs no pass:

- The target's mixers are `Tentative`: they take in the tokens that stayed at the beginning of the next pass.
- The draft begins every round by reading the tokens that the last one added, all in one pass, which gives the first
  draft. What it reads after that, its own drafts but the last, goes into a copy of its state that the round throws
  away. So it makes one pass a drafted token, as it would without any of this.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.mixers.tentative import Tentative, make_tentative, settle
from effjax.models import DecodeState, SequenceModel
from effjax.serving import decoding
from effjax.serving.acceptance import accept
from effjax.serving.generation import Generation
from effjax.serving.inputs import NO_TOKEN, Inputs
from effjax.serving.prompts import bucket
from effjax.serving.sampling import PLAIN, Sampling, Settings, adjust


@dataclasses.dataclass(frozen=True)
class Speculation(Generation):
    """What came after each prompt, and what the draft did for it.

    Attributes:
      passes: [B] passes of the target after the one over the prompt, as long as the row went on.
      drafted: [B] tokens of the draft that the target has judged.
      accepted: [B] those that are in the text.
    """

    passes: Int[np.ndarray, " B"]
    drafted: Int[np.ndarray, " B"]
    accepted: Int[np.ndarray, " B"]


def speculate(
    model: SequenceModel,
    variables: Any,
    draft: SequenceModel,
    draft_variables: Any,
    prompts: Sequence[Int[Array, " n"]],
    max_new_tokens: int,
    *,
    num_draft_tokens: int = 4,
    sampling: Sampling = PLAIN,
    stop_tokens: Collection[int] = (),
    key: Key[Array, "..."] | None = None,
) -> Speculation:
    """Continues prompts as `generate` does: with the same distribution, and greedily with the same tokens.

    What stays of a draft is decided by the distributions after repetition penalty, temperature and filters, so these
    are exact too. Sampled texts are other draws than those of `generate` by the same key. As there, a row's tokens
    depend on its prompt and its key alone; programs are compiled for two models, a number of rows, and lengths up to
    the next power of two; and a mixture of experts drops no token.

    Args:
      model: the target, as for `generate`.
      variables: its variables.
      draft: any model of the same vocabulary; see also `early_exit`.
      draft_variables: its variables.
      prompts: token ids of each prompt, at least one.
      max_new_tokens: most tokens that a row gets.
      num_draft_tokens: tokens that are drafted before each pass of the target.
      sampling: how tokens are drawn.
      stop_tokens: ids that end a row.
      key: as for `generate`.

    Raises:
      ValueError: as `generate` does for either model, for models of different vocabularies, or no tokens to draft.
    """
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens={num_draft_tokens}; valid: at least 1")
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"the draft has vocab_size={draft.vocab_size}; valid: that of the model, {model.vocab_size}"
        )
    inputs = Inputs.of((model, draft), prompts, max_new_tokens, sampling, stop_tokens, key)
    # Reading the prompt gives a token, and so does judging a draft: a longer one could not stay.
    programs = _programs(model, draft, min(num_draft_tokens, max(1, max_new_tokens - 2)))
    both = (variables, draft_variables)
    loop = (inputs.keys, inputs.settings, inputs.stop_tokens)
    texts = programs.begin(
        both,
        inputs.prompts,
        inputs.lengths,
        *loop,
        max_length=inputs.max_length,
        size=bucket(max_new_tokens),
    )
    texts = programs.complete(both, texts, *loop, max_new_tokens)
    found = jax.device_get(texts.replace(target=None, draft=None))
    return Speculation(
        tokens=found.tokens[:, :max_new_tokens],
        logprobs=found.logprobs[:, :max_new_tokens],
        lengths=found.count,
        stopped=found.stopped,
        passes=found.passes,
        drafted=found.drafted,
        accepted=found.accepted,
    )


@flax.struct.dataclass
class _Texts:
    """Texts in the making.

    Attributes:
      target: decode state of the target, of mixers that are `Tentative`; it has seen every token but the newest.
      draft: decode state of the draft; it has seen every token but the unread.
      unread: [B, K + 1] the newest tokens of each row, from the first slot on.
      num_unread: [B] how many.
      count: [B] tokens drawn so far.
      stopped: [B] whether the row has drawn a stop token.
      seen: [B, V] which tokens the row has, prompt included; None if no penalty asks for it.
      tokens, logprobs: [B, N] as in `Generation`.
      passes, drafted, accepted: [B] as in `Speculation`.
    """

    target: DecodeState
    draft: DecodeState
    unread: Int[Array, "B K+1"]
    num_unread: Int[Array, " B"]
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    passes: Int[Array, " B"]
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]

    def goes_on(self, max_new_tokens: Int[Array, ""]) -> Bool[Array, " B"]:
        """Which rows take further tokens."""
        return ~self.stopped & (self.count < max_new_tokens)


@flax.struct.dataclass
class _Drafts:
    """Tokens that the draft proposes.

    Attributes:
      tokens: [B, K] the tokens.
      probabilities: [B, K, V] what each was drawn by.
      seen: [B, K + 1, V] `_Texts.seen` before each of them and behind the last.
    """

    tokens: Int[Array, "B K"]
    probabilities: Float[Array, "B K V"]
    seen: Bool[Array, "B K+1 V"] | None


class _Programs:
    """The compiled functions of a target and a draft."""

    def __init__(self, model: SequenceModel, draft: SequenceModel, num_draft_tokens: int):
        models = tuple(map(decoding.served, (model, draft)))
        begin = functools.partial(_begin, models, num_draft_tokens)
        self.begin = jax.jit(begin, static_argnames=("max_length", "size"))
        # The caches are written in place.
        self.complete = jax.jit(functools.partial(_complete, models), donate_argnums=1)


@functools.lru_cache(maxsize=16)
def _programs(model: SequenceModel, draft: SequenceModel, num_draft_tokens: int) -> _Programs:
    return _Programs(model, draft, num_draft_tokens)


def _tentative(model: SequenceModel, num_draft_tokens: int) -> SequenceModel:
    """The target as it reads drafts: the newest token and what was drafted behind it."""
    return model.clone(mixers=tuple(Tentative(m, num_draft_tokens + 1) for m in model.mixers))


def _begin(
    models: tuple[SequenceModel, SequenceModel],
    num_draft_tokens: int,
    variables: tuple[Any, Any],
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    *,
    max_length: int,
    size: int,
) -> _Texts:
    """Both models read the prompts, and the target draws the first token of each row."""
    rows, draft_rows = (
        decoding.begin(*pair, prompts, lengths, keys, settings, stop_tokens, max_length=max_length)
        for pair in zip(models, variables, strict=True)
    )
    num_rows = len(lengths)
    empty = _tentative(models[0], num_draft_tokens).init_state(num_rows, max_length)
    layers = make_tentative(rows.state.layers, empty.layers)
    none = jnp.zeros((num_rows,), jnp.int32)
    return _Texts(
        target=rows.state.replace(layers=layers),
        draft=draft_rows.state,
        unread=jnp.zeros((num_rows, num_draft_tokens + 1), jnp.int32).at[:, 0].set(rows.token),
        num_unread=jnp.ones_like(none),
        count=rows.count,
        stopped=rows.stopped,
        seen=rows.seen,
        tokens=jnp.full((num_rows, size), NO_TOKEN, jnp.int32).at[:, 0].set(rows.token),
        logprobs=jnp.zeros((num_rows, size)).at[:, 0].set(rows.logprob),
        passes=none,
        drafted=none,
        accepted=none,
    )


def _complete(
    models: tuple[SequenceModel, SequenceModel],
    variables: tuple[Any, Any],
    texts: _Texts,
    keys: Key[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    max_new_tokens: Int[Array, ""],
) -> _Texts:
    """Rounds of drafting and judging until no row goes on."""
    target = _tentative(models[0], texts.unread.shape[1] - 1)

    def round_of(texts):
        goes_on = texts.goes_on(max_new_tokens)
        # One more token comes with the judgement.
        num_drafted = jnp.minimum(texts.unread.shape[1] - 1, max_new_tokens - texts.count - 1)
        num_drafted = jnp.where(goes_on, num_drafted, 0)
        # Tokens so far are another number in every round, so no key is used twice.
        of_round = jax.vmap(jax.random.fold_in)(keys, texts.count)
        draft_keys, accept_keys = jnp.moveaxis(jax.vmap(jax.random.split)(of_round), 1, 0)
        texts, drafts = _draft(models[1], variables[1], texts, num_drafted, draft_keys, settings)
        return _judge(
            target,
            variables[0],
            texts,
            drafts,
            goes_on,
            num_drafted,
            accept_keys,
            settings,
            stop_tokens,
        )

    return jax.lax.while_loop(lambda texts: jnp.any(texts.goes_on(max_new_tokens)), round_of, texts)


def _draft(
    model: SequenceModel,
    variables: Any,
    texts: _Texts,
    num_drafted: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: Settings,
) -> tuple[_Texts, _Drafts]:
    """Reads what is unread and draws up to K tokens, `num_drafted` of which are of use."""
    num_slots = texts.unread.shape[1] - 1

    def propose(i, logits, seen):
        q = probabilities(logits, settings, seen)
        key = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
        token = jax.vmap(jax.random.categorical)(key, jnp.log(q)).astype(jnp.int32)
        return token, q, _with_token(seen, token)

    def step(carry, i):
        state, token, seen = carry
        output = model.apply(
            variables,
            token[:, None],
            segment_ids=(i < num_drafted)[:, None].astype(jnp.int32),
            state=state,
        )
        proposal = propose(i, output.logits[:, 0], seen)
        return (output.state, proposal[0], proposal[2]), proposal

    is_unread = jnp.arange(num_slots + 1) < texts.num_unread[:, None]
    output = model.apply(
        variables,
        texts.unread,
        segment_ids=is_unread.astype(jnp.int32),
        state=texts.draft,
        head_at=jnp.maximum(texts.num_unread - 1, 0)[:, None],
    )
    first = propose(0, output.logits[:, 0], texts.seen)
    carry = (output.state, first[0], first[2])
    _, rest = jax.lax.scan(step, carry, jnp.arange(1, num_slots))
    join = lambda one, others: jnp.moveaxis(jnp.concatenate([one[None], others]), 0, 1)  # noqa: E731
    tokens, q, seen = jax.tree.map(join, first, rest)
    if seen is not None:
        seen = jnp.concatenate([texts.seen[:, None], seen], axis=1)
    return texts.replace(draft=output.state), _Drafts(tokens, q, seen)


def _judge(
    model: SequenceModel,
    variables: Any,
    texts: _Texts,
    drafts: _Drafts,
    goes_on: Bool[Array, " B"],
    num_drafted: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
) -> _Texts:
    """The texts with the drafted tokens that stay and the one behind them, as the target's pass over them says."""
    slots = jnp.arange(texts.unread.shape[1])
    newest = jnp.take_along_axis(
        texts.unread, jnp.maximum(texts.num_unread - 1, 0)[:, None], axis=1
    )
    is_read = goes_on[:, None] & (slots <= num_drafted[:, None])
    output = model.apply(
        variables,
        jnp.concatenate([newest, drafts.tokens], axis=1),
        segment_ids=is_read.astype(jnp.int32),
        state=texts.target,
    )
    p = probabilities(output.logits, settings, drafts.seen)
    num_accepted, last = accept(keys, drafts.tokens, num_drafted, drafts.probabilities, p)

    is_last = slots == num_accepted[:, None]
    fresh = jnp.where(is_last, last[:, None], jnp.pad(drafts.tokens, ((0, 0), (0, 1))))
    is_stop = jnp.any(fresh[..., None] == stop_tokens, axis=-1)
    is_behind_stop = jnp.cumsum(is_stop, axis=1) > is_stop
    is_new = goes_on[:, None] & (slots <= num_accepted[:, None]) & ~is_behind_stop
    num_new = jnp.sum(is_new, axis=1)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(output.logits), fresh[..., None], axis=-1)[
        ..., 0
    ]
    place = (
        jnp.arange(len(fresh))[:, None],
        jnp.where(is_new, texts.count[:, None] + slots, texts.tokens.shape[1]),
    )
    length = texts.target.length + num_new
    seen = texts.seen
    if seen is not None:
        behind = jnp.take_along_axis(drafts.seen, num_accepted[:, None, None], axis=1)[:, 0]
        seen = _with_token(behind, last)
    return texts.replace(
        target=output.state.replace(layers=settle(output.state.layers, length), length=length),
        unread=fresh,
        num_unread=num_new,
        count=texts.count + num_new,
        stopped=texts.stopped | jnp.any(is_new & is_stop, axis=1),
        seen=seen,
        tokens=texts.tokens.at[place].set(fresh, mode="drop"),
        logprobs=texts.logprobs.at[place].set(logprobs, mode="drop"),
        passes=texts.passes + goes_on,
        drafted=texts.drafted + num_drafted,
        accepted=texts.accepted + jnp.sum(is_new & ~is_last, axis=1),
    )


def probabilities(
    logits: Float[Array, "... V"], settings: Settings, seen: Bool[Array, "... V"] | None = None
) -> Float[Array, "... V"]:
    """What tokens are drawn by (`sampling.draw`); without a temperature all of it is on the most likely one.

    Args:
      logits: of the next token, at one or more places.
      settings: see `Sampling.settings`, one number for all rows.
      seen: tokens that the text has already before that place, for `repetition_penalty`.
    """
    num_tokens = logits.shape[-1]
    flat = lambda x: None if x is None else x.reshape(-1, num_tokens)  # noqa: E731
    adjusted = adjust(flat(logits), settings, flat(seen))
    if "temperature" in settings:
        found = jax.nn.softmax(adjusted)
    else:
        found = jax.nn.one_hot(jnp.argmax(adjusted, axis=-1), num_tokens)
    return found.reshape(logits.shape)


def _with_token(seen: Bool[Array, "B V"] | None, token: Int[Array, " B"]):
    return None if seen is None else seen | (jnp.arange(seen.shape[1]) == token[:, None])
