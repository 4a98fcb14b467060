"""``generate()`` with speculation: the same arguments, the same tokens, fewer passes of the target.

transformers prepares everything (generation config, processors, criteria, padding) and hands over to the loop here
through its own hook, ``custom_generate``. What the hook drops is carried around it (``specdec.generation.hook``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.checks import shown, whole_number
from specdec.decode import Decoder, Emission
from specdec.drafters.grammar import guided
from specdec.engine.wrapped import what_runs
from specdec.errors import UnsupportedOptionError
from specdec.generation.arguments import DraftModels, as_models, check_call, check_callable, drafter_of, verifier_of
from specdec.generation.batch import Batch
from specdec.generation.caller_objects import Given, arrange
from specdec.generation.constrained import attach_grammars, constrain
from specdec.generation.hook import Call, Dropped, check_dropped, dropped_arguments, heal_tokens, take_stop_strings
from specdec.generation.options import check_generation_config, check_inputs
from specdec.generation.prefix_cache import PrefixCache
from specdec.generation.streaming import Stream
from specdec.grammar.inputs import Grammar
from specdec.interfaces import Drafter, Step, Verifier
from specdec.rng import PhiloxRng
from specdec.runtime import Runtime, as_verifier
from specdec.settings import DEFAULTS, Settings
from specdec.stats import Stats


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
    drafter: str | Path | Drafter = DEFAULTS.drafter,
    verifier: str | Verifier = DEFAULTS.verifier,
    draft_model: Any | None = None,
    seed: int | None = DEFAULTS.seed,
    max_nodes: int = DEFAULTS.max_nodes,
    adaptive: bool = DEFAULTS.adaptive,
    accelerate: bool = DEFAULTS.accelerate,
    cuda_graphs: bool = DEFAULTS.cuda_graphs,
    prefix_cache: PrefixCache | None = None,
    grammar: Grammar | Sequence[Grammar | None] | None = None,
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
        prefix_cache: what earlier calls computed of texts that begin alike is not computed again, and this call's texts
            are kept for later ones.
        grammar: what every text must match (``specdec.Grammar``), or one for each prompt, None for a free one; needs the
            ``tokenizer``. The output is that of plain constrained decoding, and a text that is complete ends.
        on_step: called with every step of every row.
        on_emission: the same, with what is needed to look behind a step: its tree and the distributions at its nodes.
        generation_config and all others: as for ``model.generate``. Logits processors and criteria of your own are
            asked about the whole batch, once for each token, as there; rows then wait for each other. Give one the
            attribute ``is_rowwise = True`` if it answers for a row by the ids (and scores) of that row alone and keeps
            no state: then they need not, and verifiers that look ahead may ask it too. ``tokenizer`` is for stop strings,
            token healing and grammars. The streamer is ended even if an error ends the call.

    Returns:
        What ``model.generate`` returns: (B, L + new) token ids, or with ``return_dict_in_generate`` a
        SpeculativeOutput, whose ``stats`` hold the acceptance statistics and whose ``finish_reasons`` tell texts that are
        whole from those that were cut. Its ``past_key_values`` are None: the
        loop's cache has another layout. Its ``scores`` and ``logits`` are zeros where a row had ended.

    Raises:
        ValueError: an argument of another kind than it must be; the message says which.
        UnsupportedOptionError: an option that is not supported here; the message names it.
        UnsupportedModelError: the model cannot be verified; the message says why.
        GrammarError: a grammar that cannot be kept to; the message says why.
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
        settings = Settings(
            drafter=drafter,
            verifier=verifier,
            seed=seed,
            max_nodes=max_nodes,
            adaptive=adaptive,
            accelerate=accelerate,
            cuda_graphs=cuda_graphs,
        )
        loop = _Loop.of(settings, draft_model, prefix_cache, on_step, on_emission, stream)
        call = Call(model, inputs, generation_config, kwargs)
        take_stop_strings(call, tokenizer)
        heal_tokens(call, tokenizer)
        if grammar is not None:
            constrain(call, grammar, tokenizer)
        return call.run(loop)


def custom_generate(
    drafter: str | Path | Drafter = DEFAULTS.drafter,
    verifier: str | Verifier = DEFAULTS.verifier,
    *,
    draft_model: Any | None = None,
    seed: int | None = DEFAULTS.seed,
    max_nodes: int = DEFAULTS.max_nodes,
    adaptive: bool = DEFAULTS.adaptive,
    accelerate: bool = DEFAULTS.accelerate,
    cuda_graphs: bool = DEFAULTS.cuda_graphs,
    prefix_cache: PrefixCache | None = None,
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
    settings = Settings(
        drafter=drafter,
        verifier=verifier,
        seed=seed,
        max_nodes=max_nodes,
        adaptive=adaptive,
        accelerate=accelerate,
        cuda_graphs=cuda_graphs,
    )
    return _Loop.of(settings, draft_model, prefix_cache, on_step, on_emission, streamer)


@dataclass(frozen=True, slots=True)
class _Loop:
    """What ``model.generate`` calls when it has prepared everything."""

    settings: Settings
    draft_models: Sequence[Any]
    prefix_cache: PrefixCache | None
    on_step: Callable[[Step], None] | None
    on_emission: Callable[[Emission], None] | None
    streamer: Any | None

    @classmethod
    def of(
        cls, settings: Settings, draft_model: Any, prefix_cache: Any, on_step: Any, on_emission: Any, streamer: Any
    ) -> _Loop:
        """Everything checked before a model runs.

        Raises:
            ValueError: an argument of another kind than it must be.
        """
        Stream(streamer)  # refuses what is none
        check_callable("on_step", on_step)
        check_callable("on_emission", on_emission)
        if settings.seed is not None:
            PhiloxRng(settings.seed)
        checked = replace(
            settings,
            drafter=drafter_of(settings.drafter),
            verifier=verifier_of(settings.verifier),
            max_nodes=whole_number("max_nodes", settings.max_nodes),
        )
        if prefix_cache is not None and not isinstance(prefix_cache, PrefixCache):
            raise ValueError(f"prefix_cache must be a specdec.PrefixCache, got {shown(prefix_cache)}")
        if prefix_cache is not None and settings.cuda_graphs:
            raise UnsupportedOptionError("cuda_graphs cannot be replayed over a prefix_cache; leave one of them out")
        return cls(checked, as_models(draft_model), prefix_cache, on_step, on_emission, streamer)

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
            batch = Batch(input_ids, padding, generation_config, stopping_criteria, stream)
            attach_grammars(logits_processor, batch.rows)
            with self.prefix_cache.lock if self.prefix_cache else nullcontext():
                return self._run(self._decoder(model, batch, logits_processor), batch)

    def _decoder(self, model: Any, batch: Batch, processors: Sequence[Any]) -> Decoder:
        settings, num_rows = self.settings, len(batch.rows)
        runtime = self._runtime(what_runs(model))
        verifier = as_verifier(settings.verifier)
        named = runtime.plan(settings, num_rows).drafter

        def build() -> tuple[Drafter, DraftModels]:
            drafts = DraftModels(runtime.draft_models)
            return runtime.drafter(named, verifier, drafts), drafts

        is_kept = self.prefix_cache is not None and isinstance(named, str)
        drafter, drafts = self.prefix_cache.kept((named, verifier.name), build) if is_kept else build()  # type: ignore[union-attr]
        if any(row.grammar for row in batch.rows):
            drafter = guided(drafter, verifier, is_growing=named == "auto")
        if named is settings.drafter:  # a tuned file may name a drafter that runs a model for other batches only
            drafts.check_use(drafter.name)
        given = Given(
            batch.input_ids,
            batch.padding_tokens,
            processors,
            batch.criteria,
            batch.config,
            model,
            runtime.target.vocab_size,
        )
        asked = arrange(given, verifier, runtime.target)
        return runtime.decoder(
            settings,
            asked.logits_transform,
            asked.stop,
            drafter=drafter,
            target=asked.target,
            decide=asked.decide,
            num_rows=num_rows,
        )

    def _runtime(self, model: Any) -> Runtime:
        settings = self.settings
        if self.prefix_cache is not None:
            return self.prefix_cache.runtime(model, self.draft_models, settings.accelerate)
        return Runtime(model, self.draft_models, accelerate=settings.accelerate, cuda_graphs=settings.cuda_graphs)

    def _run(self, decoder: Decoder, batch: Batch) -> Any:
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
