"""``specdec export``: a trained drafter in the layout that serving engines read, with the command that serves it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import options
from specdec.cli.text import tell
from specdec.hub.catalog import DEFAULT_MODEL, known_models, model_path

if TYPE_CHECKING:
    from specdec.stats import Stats

EXAMPLE = "Example: specdec export eagle3 my-eagle --target MODEL --output exported --for vllm"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_NUM_TOKENS = 3  # drafted ahead by the vllm command, and measured


class Layout(StrEnum):
    EAGLE3 = "eagle3"


class Engine(StrEnum):
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"


# Which config keys of unusual heads each engine is known to read; others it would pass over in silence.
_READS = {
    Engine.VLLM: {
        "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "num_hidden_layers", "use_aux_hidden_state",
        _LAYER_IDS, "qk_norm", "attention_bias", "mlp_bias",
    },
    Engine.SGLANG: {"norm_before_fc", "fc_norm", "norm_output", "use_aux_hidden_state", _LAYER_IDS, "bias"},
    Engine.LLAMA_CPP: {"norm_before_residual", "norm_before_fc"},
}  # fmt: skip


def export(
    layout: Annotated[Layout, typer.Argument(help="eagle3: the one layout that all of these engines read.")],
    drafter: Annotated[Path, typer.Argument(help="The folder of an EAGLE-3 head, as specdec train eagle writes it.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    target: options.Target = DEFAULT_MODEL,
    engine: Annotated[
        Engine, typer.Option("--for", help="Whose command to print; the files are the same.")
    ] = Engine.VLLM,
    measure: Annotated[
        int, typer.Option(metavar="N", help="Built-in prompts to measure the acceptance of the chain on; 0: none.")
    ] = 8,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Write an EAGLE-3 head for vLLM, SGLang or llama.cpp.

    Chains carry over to all three, trees to SGLang only; Medusa heads to none. Also written: acceptance.json, what
    the exported chain accepts here in vLLM's field names, to compare with what the engine reports.
    """
    options.set_threads(threads)
    import torch

    from specdec.drafters.heads.checkpoint_io import read_json
    from specdec.drafters.heads.eagle_cell import EagleCell
    from specdec.drafters.heads.eagle_engine import head_layers, share_output
    from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
    from specdec.drafters.heads.shipped import mismatch, target_facts
    from specdec.hub.load import load_model
    from specdec.records.files import write_json, write_text

    drafter, output = drafter.expanduser(), output.expanduser()
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; name a new folder")
    model = load_model(target, dtype=dtype, device=device, progress=tell)
    facts = target_facts(model)
    trained = read_json(drafter / "config.json").get("specdec_target")
    if trained and (fault := mismatch(trained, facts)):
        raise ValueError(f"{drafter} was trained for another target ({fault}); name that one with --target")
    cell = load_eagle(drafter, facts["hidden_size"], facts["vocab_size"])
    if not isinstance(cell, EagleCell):
        raise ValueError(f"{drafter} is a head of EAGLE-1 or 2, which these engines no longer read; train eagle anew")
    head_layers(cell.config, facts["num_hidden_layers"])
    if unread := unread_keys(cell.config.unusual(), engine):
        raise ValueError(
            f"{engine.value} is not known to read {', '.join(unread)} of {drafter}, and would draft badly without a word; "
            "choose another engine with --for, or train a head with specdec train eagle"
        )
    share_output(cell, model)
    save_eagle(cell.to(getattr(torch, cell.config.torch_dtype, torch.float32)), output)
    commands = {
        engine_name: command
        for engine_name, command in serve_commands(_name_for_engines(target), output).items()
        if not unread_keys(cell.config.unusual(), engine_name)
    }
    write_text(output / "README.md", _readme(target, commands))
    if measure > 0:
        stats = chain_acceptance(output, target, model, measure)
        write_json(output / "acceptance.json", acceptance_facts(stats))
        tell(f"mean acceptance length of a chain of {_NUM_TOKENS}: {stats.mean_acceptance_length:.2f}")
    print(commands[engine])


def unread_keys(unusual: Sequence[str], engine: Engine) -> list[str]:
    """Which of a head's ``unusual`` config keys ``engine`` is not known to read."""
    return [key for key in unusual if key not in _READS[engine]]


def serve_commands(target: str, folder: Path) -> dict[Engine, str]:
    """The command line of each engine."""
    place = shlex.quote(str(folder))
    config = json.dumps({"method": "eagle3", "model": str(folder), "num_speculative_tokens": _NUM_TOKENS})
    name = shlex.quote(target)
    return {
        Engine.VLLM: f"vllm serve --model {name} --speculative-config {shlex.quote(config)}",
        Engine.SGLANG: (
            f"python -m sglang.launch_server --model-path {name} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {place} --speculative-num-steps 5 --speculative-eagle-topk 4 "
            "--speculative-num-draft-tokens 8"
        ),
        Engine.LLAMA_CPP: f"python convert_hf_to_gguf.py {place} --target-model-dir {name}",
    }


def chain_acceptance(folder: Path, target: str, model: Any, count: int) -> Stats:
    """What the exported head accepts as a chain, greedy, on built-in prompts."""
    from specdec.cli.acceptance import measure_acceptance
    from specdec.drafters import format_drafter
    from specdec.hub.load import load_tokenizer
    from specdec.records.prompts import BUILTIN, load_prompts, render_turns

    tokenizer, prompts = load_tokenizer(target), load_prompts(BUILTIN)
    chosen = prompts[:: max(1, len(prompts) // count)][:count]
    questions = [render_turns(tokenizer, prompt, []) for prompt in chosen]
    spec = format_drafter("eagle", {"path": str(folder), "shape": "chain", "num_tokens": _NUM_TOKENS})
    return measure_acceptance(model, spec, questions, _NUM_TOKENS)


def acceptance_facts(stats: Stats) -> dict[str, Any]:
    """vLLM's field names."""
    return {
        "num_drafts": stats.num_drafts,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_accepted_tokens": stats.num_accepted_tokens,
        "num_accepted_tokens_per_pos": list(stats.num_accepted_tokens_per_pos),
        "mean_acceptance_length": round(stats.mean_acceptance_length, 4),
    }


def _name_for_engines(target: str) -> str:
    """A built-in model lies in a folder that an engine can read."""
    is_built_in = target in [builtin.name for builtin in known_models()]
    return str(model_path(target)) if is_built_in else target


def _readme(target: str, commands: dict[Engine, str]) -> str:
    blocks = "\n".join(f"{engine}:\n\n```sh\n{command}\n```\n" for engine, command in commands.items())
    return f"# EAGLE-3 draft head for {target}\n\nWritten by `specdec export eagle3`.\n\n{blocks}"
