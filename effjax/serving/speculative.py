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
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.mixers.tentative import Tentative, make_tentative, settle
from effjax.models import DecodeState, SequenceModel
from effjax.serving import decoding
from effjax.serving.acceptance import accept
from effjax.serving.inputs import NO_TOKEN
from effjax.serving.programs import compiled
from effjax.serving.sampling import Settings, probabilities
from effjax.serving.slots import batch_axes, put

# A target and a draft; their variables.
Models = tuple[SequenceModel, SequenceModel]
Variables = tuple[Any, Any]


@flax.struct.dataclass
class Texts:
    """Texts in the making, one a row.

    Attributes:
      target: decode state of the target, of mixers that are `Tentative`; it has seen every token but the newest.
      draft: decode state of the draft; it has seen every token but the unread.
      unread: [B, K + 1] the newest tokens of each row, from the first slot on.
      num_unread: [B] how many.
      count: [B] tokens drawn so far.
      limit: [B] most tokens that the row gets.
      stopped: [B] whether the row has drawn a stop token, or has no text.
      keys: [B] random keys.
      seen: [B, V] which tokens the row has, prompt included; None if no penalty asks for it.
      tokens, logprobs: [B, N] as in `Generation`.
      passes: [B] passes of the target after the one over the prompt.
      drafted: [B] tokens of the draft that the target has judged.
      accepted: [B] those that are in the text.
    """

    target: DecodeState
    draft: DecodeState
    unread: Int[Array, "B K+1"]
    num_unread: Int[Array, " B"]
    count: Int[Array, " B"]
    limit: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    passes: Int[Array, " B"]
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]

    @property
    def goes_on(self) -> Bool[Array, " B"]:
        """Which rows take further tokens."""
        return ~self.stopped & (self.count < self.limit)


@flax.struct.dataclass
class _Drafts:
    """Tokens that the draft proposes.

    Attributes:
      tokens: [B, K] the tokens.
      probabilities: [B, K, V] what each was drawn by.
      seen: [B, K + 1, V] `Texts.seen` before each of them and behind the last.
    """

    tokens: Int[Array, "B K"]
    probabilities: Float[Array, "B K V"]
    seen: Bool[Array, "B K+1 V"] | None


def begin(
    models: Models,
    num_draft_tokens: int,
    variables: Variables,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    limits: Int[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    *,
    max_length: int,
    max_new_tokens: int,
) -> Texts:
    """Both models read the prompts, and the target draws the first token of each row.

    Args:
      models: the target and the draft.
      num_draft_tokens: K, tokens that are drafted before each pass of the target.
      variables: of both.
      prompts: token ids, padding behind them.
      lengths: tokens of each prompt.
      keys: one a row.
      limits: most tokens that each row gets.
      settings: see `Sampling.settings`; one number for all rows, or one a row.
      stop_tokens: ids that end a row.
      max_length: tokens that a row has room for, prompt included.
      max_new_tokens: N.
    """
    rows, draft_rows = (
        decoding.begin(*pair, prompts, lengths, keys, settings, stop_tokens, max_length=max_length)
        for pair in zip(models, variables, strict=True)
    )
    num_rows = len(lengths)
    empty = _tentative(models[0], num_draft_tokens).init_state(num_rows, max_length)
    none = jnp.zeros((num_rows,), jnp.int32)
    return Texts(
        target=dataclasses.replace(
            rows.state, layers=make_tentative(rows.state.layers, empty.layers)
        ),
        draft=draft_rows.state,
        unread=jnp.zeros((num_rows, num_draft_tokens + 1), jnp.int32).at[:, 0].set(rows.token),
        num_unread=jnp.ones_like(none),
        count=rows.count,
        limit=limits,
        stopped=rows.stopped,
        keys=keys,
        seen=rows.seen,
        tokens=jnp.full((num_rows, max_new_tokens), NO_TOKEN, jnp.int32).at[:, 0].set(rows.token),
        logprobs=jnp.zeros((num_rows, max_new_tokens)).at[:, 0].set(rows.logprob),
        passes=none,
        drafted=none,
        accepted=none,
    )


def empty(
    models: Models, num_draft_tokens: int, num_rows: int, *, max_length: int, max_new_tokens: int
) -> Texts:
    """Rows without a text, which remember their tokens for a repetition penalty. Args as for `begin`."""
    none = jnp.zeros((num_rows,), jnp.int32)
    return Texts(
        target=_tentative(models[0], num_draft_tokens).init_state(num_rows, max_length),
        draft=models[1].init_state(num_rows, max_length),
        unread=jnp.zeros((num_rows, num_draft_tokens + 1), jnp.int32),
        num_unread=none,
        count=none,
        limit=none,
        stopped=jnp.ones((num_rows,), bool),
        keys=jax.random.split(jax.random.key(0), num_rows),
        seen=jnp.zeros((num_rows, models[0].vocab_size), bool),
        tokens=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((num_rows, max_new_tokens)),
        passes=none,
        drafted=none,
        accepted=none,
    )


def admit(
    models: Models,
    num_draft_tokens: int,
    variables: Variables,
    texts: Texts,
    rows: Int[Array, " K"],
    prompts: Int[Array, "K T"],
    lengths: Int[Array, " K"],
    keys: Key[Array, " K"],
    limits: Int[Array, " K"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
) -> Texts:
    """Begins texts in K rows that are free. Other args as for `begin`."""
    max_length = texts.target.max_length
    new = begin(
        models,
        num_draft_tokens,
        variables,
        prompts,
        lengths,
        keys,
        limits,
        settings,
        stop_tokens,
        max_length=max_length,
        max_new_tokens=texts.tokens.shape[1],
    )
    target_axes = batch_axes(_tentative(models[0], num_draft_tokens), max_length)
    draft_axes = batch_axes(models[1], max_length)
    first_axes = jax.tree.map(lambda _: 0, new)
    axes = dataclasses.replace(first_axes, target=target_axes, draft=draft_axes)
    return put(texts, new, rows, axes=axes)


def run(
    models: Models,
    num_draft_tokens: int,
    variables: Variables,
    texts: Texts,
    is_wanted: Bool[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    most_rounds: Int[Array, ""],
) -> Texts:
    """Rounds of drafting and judging until no row goes on, or so many.

    Args:
      models, num_draft_tokens, variables, settings, stop_tokens: as for `begin`.
      texts: in the making.
      is_wanted: rows whose text is to go on; the others are free from now on.
      most_rounds: passes of the target.
    """
    target = _tentative(models[0], num_draft_tokens)

    def round_of(texts):
        # One more token comes with the judgement.
        num_drafted = jnp.minimum(num_draft_tokens, texts.limit - texts.count - 1)
        num_drafted = jnp.where(texts.goes_on, num_drafted, 0)
        # Tokens so far are another number in every round, so no key is used twice.
        of_round = jax.vmap(jax.random.fold_in)(texts.keys, texts.count)
        draft_keys, accept_keys = jnp.moveaxis(jax.vmap(jax.random.split)(of_round), 1, 0)
        texts, drafts = _draft(models[1], variables[1], texts, num_drafted, draft_keys, settings)
        return _judge(
            target, variables[0], texts, drafts, num_drafted, accept_keys, settings, stop_tokens
        )

    def unfinished(carry):
        texts, rounds = carry
        return jnp.any(texts.goes_on) & (rounds < most_rounds)

    texts = dataclasses.replace(texts, stopped=texts.stopped | ~is_wanted)
    body = lambda carry: (round_of(carry[0]), carry[1] + 1)  # noqa: E731
    return jax.lax.while_loop(unfinished, body, (texts, jnp.int32(0)))[0]


class Programs(NamedTuple):
    """The functions of this file, compiled for a target and a draft."""

    begin: Callable[..., Texts]
    empty: Callable[..., Texts]
    admit: Callable[..., Texts]
    run: Callable[..., Texts]


def programs(model: SequenceModel, draft: SequenceModel, num_draft_tokens: int) -> Programs:
    """Those of the models as they are served; texts that are given to one of them it writes in their place.

    Raises:
      ValueError: for models of different vocabularies, or no tokens to draft.
    """
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens={num_draft_tokens}; valid: at least 1")
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"the draft has vocab_size={draft.vocab_size}; valid: that of the model, {model.vocab_size}"
        )
    given = (tuple(map(decoding.served, (model, draft))), num_draft_tokens)
    sizes = ("max_length", "max_new_tokens")
    return Programs(
        begin=compiled(begin, *given, static_argnames=sizes),
        # Compiled, so that no two arrays are one buffer: each is given away to be written in place.
        empty=compiled(empty, *given, static_argnames=("num_rows", *sizes)),
        admit=compiled(admit, *given, donate_argnums=1),
        run=compiled(run, *given, donate_argnums=1),
    )


def _tentative(model: SequenceModel, num_draft_tokens: int) -> SequenceModel:
    """The target as it reads drafts: the newest token and what was drafted behind it."""
    return model.clone(mixers=tuple(Tentative(m, num_draft_tokens + 1) for m in model.mixers))


def _draft(
    model: SequenceModel,
    variables: Any,
    texts: Texts,
    num_drafted: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: Settings,
) -> tuple[Texts, _Drafts]:
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
    if texts.seen is not None:
        seen = jnp.concatenate([texts.seen[:, None], seen], axis=1)
    return dataclasses.replace(texts, draft=output.state), _Drafts(tokens, q, seen)


def _judge(
    model: SequenceModel,
    variables: Any,
    texts: Texts,
    drafts: _Drafts,
    num_drafted: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
) -> Texts:
    """The texts with the drafted tokens that stay and the one behind them, as the target's pass over them says."""
    goes_on, slots = texts.goes_on, jnp.arange(texts.unread.shape[1])
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
    seen = None
    if drafts.seen is not None:
        behind = jnp.take_along_axis(drafts.seen, num_accepted[:, None, None], axis=1)[:, 0]
        seen = _with_token(behind, last)
    return dataclasses.replace(
        texts,
        target=dataclasses.replace(
            output.state, layers=settle(output.state.layers, length), length=length
        ),
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


def _with_token(seen: Bool[Array, "B V"] | None, token: Int[Array, " B"]):
    return None if seen is None else seen | (jnp.arange(seen.shape[1]) == token[:, None])
