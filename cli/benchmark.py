"""The measurement behind ``specdec bench``: all methods in one process, interleaved prompt by prompt.

``run_bench`` is what the command calls; it knows nothing of tables or files but the trace.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from specdec.budget.adaptive import make_budget
from specdec.budget.costs import PassCosts
from specdec.cli.bench_config import BenchConfig
from specdec.cli.bench_trace import BenchTrace
from specdec.cli.loading import Loaded, all_model_facts, check_prompt, eos_ids, load
from specdec.cli.matching import Judge
from specdec.cli.measure import (
    HF_ASSISTED,
    HF_GENERATE,
    HF_LOOKUP,
    PLAIN,
    Batch,
    Clock,
    HfGenerate,
    Method,
    Output,
    Speculative,
    ends_with,
)
from specdec.cli.options import read_config, set_threads, warn_config
from specdec.cli.progress import Tell
from specdec.cli.results import Group, Question, Results, Turn
from specdec.cli.saved import silent_transformers
from specdec.cli.synthetic import SYNTHETIC, synthetic_pair
from specdec.constraints import GrammarState
from specdec.distributions import WarperTransform
from specdec.drafters import parse_drafter
from specdec.drafters.grammar import guided
from specdec.drafters.model import check_vocabulary
from specdec.engine.causal_lm import CausalLM
from specdec.grammar.compiler import GrammarCompiler
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import GrammarTransform
from specdec.interfaces import Drafter, Verifier
from specdec.records.prompts import Prompt, load_prompts, render_turns
from specdec.records.provenance import collect
from specdec.records.trace import TraceWriter
from specdec.sampling import SamplingParams
from specdec.settings import DEFAULTS
from specdec.verifiers import make_verifier

WARM_UP_TOKENS = 8


def run_bench(
    config: BenchConfig,
    *,
    command: Sequence[str] = ("run_bench",),
    tell: Tell | None = None,
    clock: Clock = time.perf_counter,
) -> Results:
    """Measure; Ctrl-C ends it early with what was complete by then, marked partial.

    Raises:
        ValueError, OSError: bad input, before anything is measured.
    """
    set_threads(config.threads)
    prompts = load_prompts(config.prompts, limit=config.limit)
    loaded = load(config.target, config.drafter_models or (), config, compare=True)
    grammar = _start_grammar(config, loaded)
    methods, skipped = build_methods(config, loaded, clock, grammar)
    _check_prompts(config, loaded, prompts)
    judge = Judge(loaded.model, SamplingParams(config.temperature), config.seed, grammar)
    results = Results(config, methods, skipped, _provenance(config, loaded, command, len(prompts)), judge)
    bench = _Bench(config, loaded, results, tell or (lambda _done, _total, _what: None))
    questions = [Question(number, prompt) for number, prompt in enumerate(prompts)]
    with ExitStack() as stack:
        stack.enter_context(silent_transformers())
        writer = stack.enter_context(TraceWriter(config.trace, results.provenance)) if config.trace else None
        trace = None if writer is None else BenchTrace(writer, loaded.tokenizer)
        bench.measure(questions, trace)
    return results


def _start_grammar(config: BenchConfig, loaded: Loaded) -> GrammarState | None:
    """What every answer must match: the state of an empty one."""
    if config.grammar is None:
        return None
    is_schema = config.grammar.suffix == ".json"
    grammar = Grammar.json_schema(config.grammar) if is_schema else Grammar.lark(config.grammar)
    ends = tuple(sorted(eos_ids(loaded.model)))
    return GrammarCompiler(loaded.tokenizer, loaded.target.vocab_size, ends).start(grammar)


def build_methods(
    config: BenchConfig, loaded: Loaded, clock: Clock, grammar: GrammarState | None = None
) -> tuple[list[Method], list[dict[str, str]]]:
    """What will be measured, and what will not and why. All our own methods share one engine."""
    ends, verifier = eos_ids(loaded.model), make_verifier(config.verifier)
    skipped: list[dict[str, str]] = []
    tuned = read_config(config.config)
    warn_config(tuned, loaded.model)
    # One machine, one target: what one method's passes cost holds for all.
    costs = tuned.costs() if tuned else PassCosts()

    def hf(name: str, draft_model: Any | None = None) -> HfGenerate:
        return HfGenerate(
            name, loaded.model, ends, config.temperature, config.seed, draft_model, clock, grammar=grammar
        )

    def own(
        name: str, spec: str | None, verifier: Verifier, drafter: Drafter | None = None, *, adaptive: bool = True
    ) -> Speculative:
        settings = config.settings(drafter=spec or "none", verifier=verifier)
        budget = make_budget(config.max_nodes, adaptive and config.adaptive, costs)
        params, stop = SamplingParams(config.temperature), ends_with(ends)
        transform = WarperTransform(params) if grammar is None else GrammarTransform(params)
        if grammar is not None and spec is not None:
            drafter = guided(loaded.runtime.drafter(spec, verifier), verifier, is_growing=False)
        decoder = loaded.runtime.decoder(settings, transform, stop, drafter=drafter, budget=budget, clock=clock)
        is_detailed = config.trace_probs and name != SYNTHETIC
        return Speculative(name, spec, decoder, loaded.target, ends, clock, is_detailed, grammar)

    methods: list[Method] = [hf(HF_GENERATE)]
    for name, drafts in ((HF_LOOKUP, (None,)), (HF_ASSISTED, loaded.draft_models)):
        for draft in drafts:
            if config.batch_size > 1:
                skipped.append({"method": name, "reason": "transformers supports it at batch size 1 only"})
                continue
            if draft is not None:
                check_vocabulary(CausalLM(draft), loaded.target)
            methods.append(hf(name, draft))
    # Where nothing is drafted every exact rule is the same; a lossy one must not touch the reference.
    methods.append(own(PLAIN, None, make_verifier(str(DEFAULTS.verifier)), adaptive=False))
    methods += [own(parse_drafter(spec)[0], spec, verifier) for spec in config.drafter_specs]
    if config.synthetic_acceptance is not None:
        drafter, judge = synthetic_pair(config.synthetic_acceptance, ends)
        spec = f"{SYNTHETIC}:{config.synthetic_acceptance}"
        methods.append(own(SYNTHETIC, spec, judge, drafter, adaptive=False))
    return methods, skipped


def _check_prompts(config: BenchConfig, loaded: Loaded, prompts: Sequence[Prompt]) -> None:
    """Refuse what would fail in the middle. Answers are counted at their longest: they are not known yet."""
    for prompt in prompts:
        for turn in range(len(prompt.turns)):
            ids = render_turns(loaded.tokenizer, prompt, [""] * turn)
            what = f"question {prompt.question_id}" + (f", turn {turn + 1} (with its earlier answers)" if turn else "")
            check_prompt(loaded.target, ids, (turn + 1) * config.max_new_tokens, what)


def _provenance(config: BenchConfig, loaded: Loaded, command: Sequence[str], num_prompts: int) -> dict[str, Any]:
    drafter_models = config.drafter_models or []
    models = all_model_facts(config.target, drafter_models)
    settings = {**asdict(config), "drafters": config.drafter_specs, "drafter_models": drafter_models}
    settings |= {"num_prompts": num_prompts}
    del settings["serving"]
    settings |= {"context_limit": loaded.target.context_length, "trees": not loaded.target.chain_only}
    return collect(command, dtype=loaded.dtype, device=str(loaded.model.device), models=models, settings=settings)


@dataclass(slots=True)
class _Bench:
    """One run through all prompts."""

    config: BenchConfig
    loaded: Loaded
    results: Results
    tell: Tell
    num_runs: int = 0
    num_turns: int = 0

    def measure(self, questions: Sequence[Question], trace: BenchTrace | None) -> None:
        size = self.config.batch_size
        groups = [Group(tuple(questions[i : i + size])) for i in range(0, len(questions), size)]
        total = sum(max(len(q.prompt.turns) for q in group.questions) for group in groups) * len(self.results.methods)
        try:
            self._warm_up(groups[0])
            for number, group in enumerate(groups):
                self._measure(group, total)
                # A group counts once every method has done all of it.
                self.results.groups.append(group)
                if trace is not None:
                    trace.write(group, number)
        except KeyboardInterrupt:
            self.results.is_partial = True
            return
        if trace is not None:
            trace.writer.end()

    def _warm_up(self, group: Group) -> None:
        """A few tokens with each method; our own loop first, because it tells broken logits for what they are.

        The prompts are the first ones backwards: as long, but nothing that a drafter could learn from.
        """
        self.tell(0, 1, "warming up")
        batch = self._batch(group.questions, [()] * len(group.questions))
        backwards = tuple(ids[::-1] for ids in batch.prompts)
        short = Batch(backwards, batch.keys, min(WARM_UP_TOKENS, self.config.max_new_tokens))
        for method in sorted(self.results.methods, key=lambda m: m.name != PLAIN):
            method.run(short)

    def _measure(self, group: Group, total: int) -> None:
        answers: dict[int, tuple[str, ...]] = {q.number: () for q in group.questions}
        for turn in range(max(len(q.prompt.turns) for q in group.questions)):
            questions = tuple(q for q in group.questions if len(q.prompt.turns) > turn)
            batch = self._batch(questions, [answers[q.number] for q in questions])
            outputs = {method: self._run(method, batch, total) for method in self._rotated()}
            group.turns.append(Turn(questions, batch, outputs))
            baseline = outputs[self.results.methods[0]]
            for question, ids in zip(questions, baseline.tokens, strict=True):
                text = self.loaded.tokenizer.decode(ids, skip_special_tokens=True)
                answers[question.number] += (text,)

    def _batch(self, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Batch:
        prompts = []
        for question, earlier_answers in zip(questions, answers, strict=True):
            ids = render_turns(self.loaded.tokenizer, question.prompt, earlier_answers)
            check_prompt(self.loaded.target, ids, self.config.max_new_tokens, f"question {question.prompt.question_id}")
            prompts.append(tuple(ids))
        return Batch(tuple(prompts), tuple(q.number for q in questions), self.config.max_new_tokens)

    def _rotated(self) -> list[Method]:
        """The methods, beginning with another one each turn: nobody always runs right behind the same one."""
        first = self.num_turns % len(self.results.methods)
        self.num_turns += 1
        return self.results.methods[first:] + self.results.methods[:first]

    def _run(self, method: Method, batch: Batch, total: int) -> Output:
        self.tell(self.num_runs, total, method.drafter or method.name)
        output = method.run(batch)
        self.num_runs += 1
        return output
