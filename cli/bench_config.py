"""What a bench is asked for: the options of ``specdec bench``. Imports nothing heavy, so that ``--help`` can show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import options
from specdec.cli.workload_options import WorkloadOptions
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.records.prompts import BUILTIN
from specdec.settings import DEFAULTS


@dataclass(frozen=True, kw_only=True)
class BenchConfig(options.Speculation, options.Engine):
    """What to measure, and how.

    Raises:
        ValueError: a number outside its range, or a name that nothing has.
    """

    target: options.Target = DEFAULT_MODEL
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            metavar=options.DRAFTER_FORM,
            help=f"A drafter to measure; give it again for more. Default: {DEFAULTS.drafter!s}: hybrid, or model with a draft model. "
            + options.QUOTING,
        ),
    ] = None
    drafter_models: options.DrafterModel = None
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help=f"JSONL in Spec-Bench's form or with prompts; {BUILTIN}: our own suite.")
    ] = BUILTIN
    limit: Annotated[int | None, typer.Option(metavar="N", help="Take the first N prompts only.")] = None
    max_new_tokens: options.MaxNewTokens = options.DEFAULT_MAX_NEW_TOKENS
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts that are generated together.")] = 1
    temperature: options.Temperature = 0.0
    config: options.Config = None  # its costs are what the budgets start from
    synthetic_acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,RATE,...|mean=X", help="Also what a drafter accepted like this would bring; no text."
        ),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Let every answer match a JSON schema (FILE.json) or a Lark grammar (others)."
        ),
    ] = None
    trace: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write every step here.")] = None
    trace_probs: Annotated[
        bool, typer.Option("--trace-probs", help="With --trace: probabilities and entropies of every step too.")
    ] = False
    serving: WorkloadOptions = field(default_factory=WorkloadOptions)

    def __post_init__(self) -> None:
        from specdec.cli.synthetic import parse_acceptance
        from specdec.drafters import parse_drafter
        from specdec.hub.load import resolve_device, resolve_dtype
        from specdec.rng import PhiloxRng
        from specdec.sampling import SamplingParams
        from specdec.verifiers import make_verifier

        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("max_nodes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        SamplingParams(self.temperature)
        PhiloxRng(self.seed)
        make_verifier(self.verifier)
        resolve_dtype(self.dtype, resolve_device(self.device))
        for text in self.drafters or ():
            parse_drafter(text)
        if self.synthetic_acceptance is not None:
            if self.grammar is not None:
                raise ValueError("a synthetic acceptance has no text that a grammar could be about: choose one of them")
            parse_acceptance(self.synthetic_acceptance)

        self._check_workload()

    def _check_workload(self) -> None:
        """A workload brings its own prompts; what compares drafters on prompts does not go with it."""
        if self.serving.workload is None:
            return
        given = {
            "--prompts": self.prompts != BUILTIN, "--limit": self.limit is not None,
            "--batch-size": self.batch_size != 1, "--config": self.config is not None,
            "--synthetic-acceptance": self.synthetic_acceptance is not None, "--trace-probs": self.trace_probs,
            "--cuda-graphs": self.cuda_graphs,
        }  # fmt: skip
        if wrong := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{wrong[0]} does not go with --workload; leave one of them out")

    @property
    def drafter_specs(self) -> list[str]:
        """The drafters to measure, each once; plain decoding is always measured and is no drafter."""
        from specdec.drafters import parse_drafter, resolved_drafter

        def named(spec: str) -> str:
            resolved = resolved_drafter(spec, bool(self.drafter_models))
            is_guided = spec == "auto" and self.grammar is not None
            return f"grammar:base={resolved}" if is_guided else resolved

        specs = map(named, self.drafters or ("auto",))
        return [spec for spec in dict.fromkeys(specs) if parse_drafter(spec)[0] != "none"]
