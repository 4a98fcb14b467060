"""``generate()`` with speculation: the same arguments, the same tokens, fewer passes of the target.

transformers prepares everything (generation config, processors, criteria, padding) and hands over to the loop here
through its own hook, ``custom_generate``. What the hook drops (streamer, tokenizer, stop strings) is carried around it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.accelerate import accelerated_copy
from specdec.budget import PassCosts, make_budget
from specdec.captured import graph_pool, kernel_copy
from specdec.decode import Decoder, Emission
from specdec.defaults import DEFAULT_DRAFTER, DEFAULT_MAX_NODES, DEFAULT_VERIFIER
from specdec.device_verdicts import BatchVerdicts
from specdec.drafters import make_drafter
from specdec.errors import UnsupportedOptionError
from specdec.interfaces import DraftContext, Drafter, Row, Step, Verifier
from specdec.metrics import Stats
from specdec.model_state import ModelState
from specdec.noise import PhiloxNoise
from specdec.options import check_generation_config, check_model_kwargs, make_policy, num_padding
from specdec.policy import LazyProbs
from specdec.target import CausalLM
from specdec.tuned import SUFFIX, load_tuned
from specdec.verifiers import make_verifier


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What ``generate()`` returns with ``return_dict_in_generate``, and the acceptance statistics."""

    stats: Stats | None = None


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: str | Drafter = DEFAULT_DRAFTER,
    verifier: str | Verifier = DEFAULT_VERIFIER,
    draft_model: Any | None = None,
    seed: int | None = None,
    max_nodes: int = DEFAULT_MAX_NODES,
    adaptive: bool = True,
    accelerate: bool = False,
    cuda_graphs: bool = False,
    on_step: Callable[[Step], None] | None = None,
    streamer: Any | None = None,
    tokenizer: Any | None = None,
    stop_strings: str | Sequence[str] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Drop-in for ``model.generate(input_ids, ...)``: same arguments, same tokens.

    Greedy output equals ``model.generate`` in float32 and float64 (in 16 bits up to near ties). Sampled output follows
    the same distribution; with verifier ``match`` it is token-identical to plain decoding with the same ``seed``.

    Args:
        model: any causal LM of transformers; it is not modified.
        inputs: (B, L) token ids, left-padded; ``input_ids=`` works as well.
        drafter: a name, "name:option=value,...", a Drafter, or a file of ``specdec tune`` ("tuned.json"), which then
            also decides on ``max_nodes`` and ``adaptive``.
        verifier: a name or a Verifier.
        draft_model: for drafters that run a model; a list of models for merged speculation.
        seed: of the sampling noise; None takes one from torch's generator, so ``torch.manual_seed`` governs it.
        max_nodes: the largest tree, in nodes below the root.
        adaptive: size each step's trees by what they bring and cost on this machine, down to no draft at all (see
            AdaptiveBudget); False: always up to ``max_nodes``.
        accelerate: on a CPU, run a copy of the models with packed linear layers, which takes a second copy of their
            weights for as long as the models live; elsewhere nothing changes.
        cuda_graphs: on a GPU, run on our attention kernels and replay each pass over a tree as a CUDA graph; cache and
            graphs stay for the next call. Not yet seen on a GPU (docs/gpu-todo.md), so it is off by default.
        on_step: called with every step of every row.
        streamer, tokenizer, stop_strings, stopping_criteria, **kwargs: as for ``model.generate``.

    Returns:
        What ``model.generate`` returns: (B, L + new) token ids, or with ``return_dict_in_generate`` a
        SpeculativeOutput, whose ``stats`` hold the acceptance statistics.

    Raises:
        UnsupportedOptionError: an option that is not supported here; the message names it.
        UnsupportedModelError: the model cannot be verified; the message says why.
    """
    if kwargs.pop("assistant_model", None) is not None:
        raise UnsupportedOptionError(
            "pass the draft model as draft_model= with drafter='model' instead of assistant_model="
        )
    criteria = StoppingCriteriaList(stopping_criteria or [])
    config = kwargs.get("generation_config") or model.generation_config
    if stop_strings is None:
        stop_strings = config.stop_strings
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=... as for model.generate")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
        # generate() would ask for the tokenizer that its hook cannot pass on.
        kwargs["stop_strings"] = None
    loop = custom_generate(
        drafter,
        verifier,
        draft_model=draft_model,
        seed=seed,
        max_nodes=max_nodes,
        adaptive=adaptive,
        accelerate=accelerate,
        cuda_graphs=cuda_graphs,
        on_step=on_step,
        streamer=streamer,
    )
    return model.generate(inputs, custom_generate=loop, stopping_criteria=criteria, **kwargs)


def custom_generate(
    drafter: str | Drafter = DEFAULT_DRAFTER,
    verifier: str | Verifier = DEFAULT_VERIFIER,
    *,
    draft_model: Any | None = None,
    seed: int | None = None,
    max_nodes: int = DEFAULT_MAX_NODES,
    adaptive: bool = True,
    accelerate: bool = False,
    cuda_graphs: bool = False,
    on_step: Callable[[Step], None] | None = None,
    streamer: Any | None = None,
) -> Callable[..., Any]:
    """A callable for ``model.generate(..., custom_generate=...)``; arguments as in :func:`generate`.

    transformers hands such a callable neither the streamer nor the tokenizer: give the streamer here, and use
    :func:`generate` for stop strings.
    """
    rule = make_verifier(verifier) if isinstance(verifier, str) else verifier

    def run(
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        ours = kernel_copy if cuda_graphs else accelerated_copy if accelerate else lambda plain: plain
        run_model = ours(model)
        target = CausalLM(run_model, replays=graph_pool(run_model) if cuda_graphs else None)
        check_generation_config(generation_config)
        padding = num_padding(input_ids, check_model_kwargs(model_kwargs, input_ids))
        models = tuple(map(ours, _as_models(draft_model)))
        plan = _plan(drafter, max_nodes, adaptive, target.model, len(input_ids))
        named = plan.drafter
        proposer = make_drafter(named, DraftContext(target, rule, models)) if isinstance(named, str) else named
        budget = make_budget(plan.max_nodes, plan.adaptive, plan.costs)
        batch = _Batch(input_ids, padding, generation_config, stopping_criteria, streamer)
        policy = make_policy(logits_processor, generation_config, batch.padding_tokens)
        noise = PhiloxNoise(int(torch.randint(2**62, ()).item()) if seed is None else seed)
        decide = BatchVerdicts(rule, policy, noise)
        decoder = Decoder(target, proposer, rule, policy, noise, batch.stop, budget, decide=decide)
        stats = Stats()
        for emission in decoder.run(batch.rows):
            stats.add(emission.step)
            if on_step is not None:
                on_step(emission.step)
            batch.collect(emission)
        return batch.result(stats)

    return run


def _as_models(given: Any) -> Sequence[Any]:
    if given is None:
        return ()
    return given if isinstance(given, list | tuple) else (given,)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What decides on drafts, whether named in the call or by a tuned file."""

    drafter: str | Drafter
    max_nodes: int
    adaptive: bool
    costs: PassCosts


def _plan(drafter: str | Drafter, max_nodes: int, adaptive: bool, model: Any, num_rows: int) -> _Plan:
    if not (isinstance(drafter, str) and drafter.endswith(SUFFIX)):
        return _Plan(drafter, max_nodes, adaptive, ModelState.of(model).costs())
    tuned = load_tuned(drafter)
    warning = tuned.warning(model)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    entry = tuned.nearest(num_rows)
    costs = ModelState.of(model).costs(PassCosts if warning else tuned.costs)
    return _Plan(entry.drafter, entry.max_nodes, entry.adaptive, costs)


@dataclass(slots=True)
class _Batch:
    """The rows of one call: what goes in as a padded tensor comes out as one."""

    input_ids: Tensor  # (B, L)
    padding: list[int]  # (B,) masked tokens on the left
    config: Any
    criteria: Sequence[Any]
    streamer: Any
    rows: list[Row] = field(init=False)
    padding_tokens: dict[int, list[int]] = field(init=False)
    _eos: frozenset[int] = field(init=False)
    _others: list[Any] = field(init=False)
    _num_streamed: int = 0
    _finished: set[int] = field(default_factory=set)
    _logits: list[list[Tensor]] = field(init=False)  # for each row and new token (V,)
    _scores: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        width = self.input_ids.shape[1]
        lengths = [c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)]
        num_new = min([self.config.max_length, *lengths]) - width
        if num_new <= 0:
            raise ValueError(
                f"max_length leaves no new token: the prompt has {width} tokens; raise max_new_tokens or max_length"
            )
        tokens = self.input_ids.tolist()
        self.padding_tokens = {i: t[:n] for i, (t, n) in enumerate(zip(tokens, self.padding, strict=True))}
        self.rows = [
            Row(i, t[n:], width - n + num_new) for i, (t, n) in enumerate(zip(tokens, self.padding, strict=True))
        ]
        eos = [c.eos_token_id.tolist() for c in self.criteria if isinstance(c, EosTokenCriteria)]
        self._eos = frozenset(token for ids in eos for token in ids)
        self._others = [c for c in self.criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        self._logits = [[] for _ in tokens]
        self._scores = [[] for _ in tokens]
        if self.streamer is not None:
            self.streamer.put(self.input_ids.cpu())

    def stop(self, row: Row) -> bool:
        """Whether the row ends with its newest token: asked after every one, so nothing overshoots."""
        if row.tokens[-1] in self._eos:
            return True
        if not self._others:
            return False
        ids = torch.tensor([self.padding_tokens[row.key] + row.tokens], device=self.input_ids.device)
        return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self._others)

    def collect(self, emission: Emission) -> None:
        """Stream what every row has reached, and keep logits if they were asked for."""
        row, nodes = emission.row.key, emission.step.nodes
        if emission.step.finished:
            self._finished.add(row)
        if self.config.return_dict_in_generate and self.config.output_logits:
            self._logits[row] += [emission.scores.logits[node].float() for node in nodes]
        if self.config.return_dict_in_generate and self.config.output_scores:
            assert isinstance(emission.probs, LazyProbs)
            self._scores[row] += [emission.probs.scores(node) for node in nodes]
        if self.streamer is not None:
            self._stream()

    def _stream(self) -> None:
        columns = min((r.num_emitted for r in self.rows if r.key not in self._finished), default=self._num_new)
        for i in range(self._num_streamed, columns):
            column = [r.tokens[r.num_prompt + i] if i < r.num_emitted else self._pad for r in self.rows]
            self.streamer.put(torch.tensor(column))
        self._num_streamed = max(columns, self._num_streamed)

    @property
    def _num_new(self) -> int:
        return max(row.num_emitted for row in self.rows)

    @property
    def _pad(self) -> int:
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def result(self, stats: Stats) -> Any:
        if self.streamer is not None:
            self.streamer.end()
        new = [row.tokens[row.num_prompt :] + [self._pad] * (self._num_new - row.num_emitted) for row in self.rows]
        sequences = torch.cat([self.input_ids, torch.tensor(new, device=self.input_ids.device)], 1)
        if not self.config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(
            sequences=sequences,
            scores=_by_step(self._scores) if self.config.output_scores else None,
            logits=_by_step(self._logits) if self.config.output_logits else None,
            stats=stats,
        )


def _by_step(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """For each step (B, V); zeros where a row had ended."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([r[i] if i < len(r) else blank for r in rows]) for i in range(max(map(len, rows))))
