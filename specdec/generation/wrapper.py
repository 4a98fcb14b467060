"""``generate()`` with speculation: the same arguments, the same tokens, fewer passes of the target.

transformers prepares everything (generation config, processors, criteria, padding) and hands over to the loop here
through its own hook, ``custom_generate``. What the hook drops is carried around it (``specdec.generation.hook``).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.budget import PassCosts, make_budget
from specdec.checks import whole_number
from specdec.cpu.accelerate import accelerated_copy
from specdec.cuda.batch_verdicts import BatchVerdicts
from specdec.cuda.graphs import graph_pool, kernel_copy
from specdec.decode import Decoder, Emission
from specdec.defaults import DEFAULT_DRAFTER, DEFAULT_MAX_NODES, DEFAULT_VERIFIER
from specdec.distributions import NodeDistributions
from specdec.drafters import make_drafter, tuned_file
from specdec.engine.causal_lm import CausalLM
from specdec.engine.model_state import ModelState
from specdec.engine.wrapped import what_runs
from specdec.generation.arguments import DraftModels, as_models, check_call, check_callable, drafter_of, verifier_of
from specdec.generation.caller_objects import Given, arrange
from specdec.generation.hook import Call, Dropped, check_dropped, dropped_arguments, heal_tokens, take_stop_strings
from specdec.generation.options import check_generation_config, check_inputs
from specdec.generation.streaming import Stream
from specdec.interfaces import DraftContext, Drafter, Row, Step, Verifier
from specdec.records.tuned import load_tuned
from specdec.rng import PhiloxRng
from specdec.stats import Stats


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What ``generate()`` returns with ``return_dict_in_generate``, and the acceptance statistics."""

    stats: Stats | None = None


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    synced_gpus: bool | None = None,
    assistant_model: Any | None = None,
    streamer: Any | None = None,
    *,
    drafter: str | Path | Drafter = DEFAULT_DRAFTER,
    verifier: str | Verifier = DEFAULT_VERIFIER,
    draft_model: Any | None = None,
    seed: int | None = None,
    max_nodes: int = DEFAULT_MAX_NODES,
    adaptive: bool = True,
    accelerate: bool = False,
    cuda_graphs: bool = False,
    on_step: Callable[[Step], None] | None = None,
    on_emission: Callable[[Emission], None] | None = None,
    tokenizer: Any | None = None,
    **kwargs: Any,
) -> Any:
    """Drop-in for ``model.generate(input_ids, ...)``: same arguments, same tokens.

    Greedy output equals ``model.generate`` in float32 and float64 (in 16 bits up to near ties). Sampled output follows
    the same distribution; with verifier ``match`` it is token-identical to plain decoding with the same ``seed``.

    Args:
        model: any causal LM of transformers; it is not modified.
        inputs: (B, L) token ids, left-padded; ``input_ids=`` works as well.
        drafter: a name, "name:option=value,...", a Drafter, or a file of ``specdec tune`` ("tuned.json", or a Path),
            which then also decides on ``max_nodes`` and ``adaptive``.
        verifier: a name or a Verifier.
        draft_model: for drafters that run a model; a list of models for merged speculation.
        seed: of the sampling noise, in [0, 2**64); None takes one from torch's generator, so ``torch.manual_seed``
            governs it.
        max_nodes: the largest tree, in nodes below the root.
        adaptive: size each step's trees by what they bring and cost on this machine, down to no draft at all (see
            AdaptiveBudget); False: always up to ``max_nodes``.
        accelerate: on a CPU, run a copy of the models with packed linear layers, which takes a second copy of their
            weights for as long as the models live; elsewhere nothing changes.
        cuda_graphs: on a GPU, run on our attention kernels and replay each pass over a tree as a CUDA graph; cache and
            graphs stay for the next call. Not yet seen on a GPU (docs/gpu-todo.md), so it is off by default.
        on_step: called with every step of every row.
        on_emission: the same, with what is needed to look behind a step: its tree and the distributions at its nodes.
        generation_config and all others: as for ``model.generate``. Logits processors and criteria of your own are
            asked about the whole batch, once for each token, as there; rows then wait for each other. Give one the
            attribute ``is_rowwise = True`` if it answers for a row by the ids (and scores) of that row alone and keeps
            no state: then they need not, and verifiers that look ahead may ask it too. ``tokenizer`` is for stop strings
            and token healing. The streamer is ended even if an error ends the call.

    Returns:
        What ``model.generate`` returns: (B, L + new) token ids, or with ``return_dict_in_generate`` a
        SpeculativeOutput, whose ``stats`` hold the acceptance statistics. Its ``past_key_values`` are None: the
        loop's cache has another layout. Its ``scores`` and ``logits`` are zeros where a row had ended.

    Raises:
        ValueError: an argument of another kind than it must be; the message says which.
        UnsupportedOptionError: an option that is not supported here; the message names it.
        UnsupportedModelError: the model cannot be verified; the message says why.
    """
    named = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
    }
    kwargs |= {name: value for name, value in named.items() if value is not None}
    with Stream(streamer) as stream:
        check_call(model, inputs, generation_config, kwargs)
        check_dropped(Dropped(streamer, assistant_model, synced_gpus))
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
            on_emission=on_emission,
            streamer=stream,
        )
        call = Call(model, inputs, generation_config, kwargs)
        take_stop_strings(call, tokenizer)
        heal_tokens(call, tokenizer)
        return call.run(loop)


def custom_generate(
    drafter: str | Path | Drafter = DEFAULT_DRAFTER,
    verifier: str | Verifier = DEFAULT_VERIFIER,
    *,
    draft_model: Any | None = None,
    seed: int | None = None,
    max_nodes: int = DEFAULT_MAX_NODES,
    adaptive: bool = True,
    accelerate: bool = False,
    cuda_graphs: bool = False,
    on_step: Callable[[Step], None] | None = None,
    on_emission: Callable[[Emission], None] | None = None,
    streamer: Any | None = None,
) -> Callable[..., Any]:
    """A callable for ``model.generate(..., custom_generate=...)``; arguments as in :func:`generate`.

    A streamer may be given here or to ``model.generate``. transformers hands such a callable no tokenizer: use
    :func:`generate` for stop strings and token healing.

    Raises:
        ValueError: an argument of another kind than it must be; the message says which.
    """
    Stream(streamer)  # refuses what is none
    check_callable("on_step", on_step)
    return _Loop(
        drafter_of(drafter),
        verifier_of(verifier),
        as_models(draft_model),
        None if seed is None else PhiloxRng(seed),
        whole_number("max_nodes", max_nodes),
        adaptive,
        accelerate,
        cuda_graphs,
        on_step,
        on_emission,
        streamer,
    )


@dataclass(frozen=True, slots=True)
class _Loop:
    """What ``model.generate`` calls when it has prepared everything."""

    drafter: str | Path | Drafter
    verifier: Verifier
    draft_models: Sequence[Any]
    rng: PhiloxRng | None
    max_nodes: int
    adaptive: bool
    accelerate: bool
    cuda_graphs: bool
    on_step: Callable[[Step], None] | None
    on_emission: Callable[[Emission], None] | None
    streamer: Any | None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        dropped = dropped_arguments(model)
        given = self.streamer if isinstance(self.streamer, Stream) else Stream(self.streamer)
        with given, Stream(dropped.streamer, has_prompt=True) as found:
            check_dropped(dropped)
            if given.is_open and found.is_open:
                raise ValueError("give the streamer to custom_generate or to model.generate, not to both")
            check_generation_config(generation_config)
            padding = check_inputs(input_ids, model_kwargs)
            stream = found if found.is_open else given
            batch = _Batch(input_ids, padding, generation_config, stopping_criteria, stream)
            return self._run(self._decoder(model, batch, logits_processor), batch)

    def _decoder(self, model: Any, batch: _Batch, processors: Sequence[Any]) -> Decoder:
        ours = kernel_copy if self.cuda_graphs else accelerated_copy if self.accelerate else lambda plain: plain
        run_model = ours(what_runs(model))
        target = CausalLM(run_model, replays=graph_pool(run_model) if self.cuda_graphs else None)
        drafts = DraftModels([ours(each) for each in self.draft_models])
        plan = _plan(self.drafter, self.max_nodes, self.adaptive, target.model, len(batch.rows))
        named = plan.drafter
        context = DraftContext(target, self.verifier, drafts)
        proposer = make_drafter(named, context) if isinstance(named, str) else named
        if named is self.drafter:  # a tuned file may name a drafter that runs a model for other batches only
            drafts.check_use(proposer.name)
        budget = make_budget(plan.max_nodes, plan.adaptive, plan.costs)
        given = Given(
            batch.input_ids,
            batch.padding_tokens,
            processors,
            batch.criteria,
            batch.config,
            model,
            target.vocab_size,
        )
        asked = arrange(given, self.verifier, target)
        rng = self.rng or PhiloxRng(int(torch.randint(2**62, ()).item()))
        decide = asked.decide(self.verifier, rng) or BatchVerdicts(self.verifier, asked.logits_transform, rng)
        return Decoder(
            asked.target, proposer, self.verifier, asked.logits_transform, rng, asked.stop, budget, decide=decide
        )

    def _run(self, decoder: Decoder, batch: _Batch) -> Any:
        stats = Stats()
        batch.begin()
        for emission in decoder.run(batch.rows):
            stats.add(emission.step)
            if self.on_step is not None:
                self.on_step(emission.step)
            if self.on_emission is not None:
                self.on_emission(emission)
            batch.collect(emission)
            del emission  # it holds what the pass computed, whose room the next pass may need
        return batch.result(stats)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What decides on drafts, whether named in the call or by a tuned file."""

    drafter: str | Drafter
    max_nodes: int
    adaptive: bool
    costs: PassCosts


def _plan(drafter: str | Path | Drafter, max_nodes: int, adaptive: bool, model: Any, num_rows: int) -> _Plan:
    file = tuned_file(drafter) if isinstance(drafter, str | Path) else None
    if file is None:
        assert not isinstance(drafter, Path)
        return _Plan(drafter, max_nodes, adaptive, ModelState.of(model).costs())
    tuned = load_tuned(file)
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
    stream: Stream
    rows: list[Row] = field(init=False)
    padding_tokens: dict[int, list[int]] = field(init=False)
    _num_streamed: int = 0
    _finished: set[int] = field(default_factory=set)
    _logits: list[list[Tensor]] = field(init=False)  # for each row and new token (V,)
    _scores: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        num_new = _num_new_tokens(self.input_ids.shape[1], self.config, self.criteria)
        tokens = self.input_ids.tolist()
        self.padding_tokens = {i: t[:n] for i, (t, n) in enumerate(zip(tokens, self.padding, strict=True))}
        self.rows = [
            Row(i, t[n:], len(t) - n + num_new) for i, (t, n) in enumerate(zip(tokens, self.padding, strict=True))
        ]
        are_padded = any(hasattr(c, "eos_token_id") for c in self.criteria)
        if are_padded and self.config._pad_token_tensor is None and len(tokens) > 1:
            raise ValueError("rows that end before others are filled with pad_token_id, which is not set; pass it")
        self._logits = [[] for _ in tokens]
        self._scores = [[] for _ in tokens]

    def begin(self) -> None:
        """Show the prompts to the stream."""
        self.stream.put_prompt(self.input_ids)

    def collect(self, emission: Emission) -> None:
        """Stream what every row has reached, and keep logits if they were asked for."""
        row, nodes = emission.row.key, emission.step.nodes
        if emission.step.finished:
            self._finished.add(row)
        if self.config.return_dict_in_generate and self.config.output_logits:
            self._logits[row] += [self._kept(emission.scores.logits[node]) for node in nodes]
        if self.config.return_dict_in_generate and self.config.output_scores:
            assert isinstance(emission.probs, NodeDistributions)
            self._scores[row] += [self._kept(emission.probs.scores(node)) for node in nodes]
        if self.stream.is_open:
            self._stream()

    def _kept(self, scores: Tensor) -> Tensor:
        """A copy (V,) as generate() returns it; a view would keep everything that the pass computed."""
        return scores.to(self.input_ids.device, torch.float32, copy=True)

    def _stream(self) -> None:
        columns = min([self._num_new, *(r.num_emitted for r in self.rows if r.key not in self._finished)])
        for i in range(self._num_streamed, columns):
            column = [r.tokens[r.num_prompt + i] if i < r.num_emitted else self._pad for r in self.rows]
            self.stream.put(torch.tensor(column))
        self._num_streamed = max(columns, self._num_streamed)

    @property
    def _num_new(self) -> int:
        return max(row.num_emitted for row in self.rows)

    @property
    def _pad(self) -> int:
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def result(self, stats: Stats) -> Any:
        num_new = self._num_new
        new = [(r.tokens[r.num_prompt :] + [self._pad] * (num_new - r.num_emitted))[:num_new] for r in self.rows]
        sequences = torch.cat([self.input_ids, torch.tensor(new, device=self.input_ids.device)], 1)
        if not self.config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(
            sequences=sequences,
            scores=_by_step(self._scores, num_new) if self.config.output_scores else None,
            logits=_by_step(self._logits, num_new) if self.config.output_logits else None,
            stats=stats,
        )


def _by_step(rows: Sequence[Sequence[Tensor]], num_new: int) -> tuple[Tensor, ...]:
    """For each step (B, V); zeros where a row had ended."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([r[i] if i < len(r) else blank for r in rows]) for i in range(num_new))


def _num_new_tokens(width: int, config: Any, criteria: Sequence[Any]) -> int:
    """How many tokens a row of ``width`` may get; generate() takes one before it asks any criterion."""
    longest: float = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [config.max_length])
    return max(1, math.ceil(min(longest, sys.maxsize)) - width)
