"""The trace of a bench: what each method did with each group of questions, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.cli.details import token_texts
from specdec.cli.results import Group
from specdec.records.trace import TraceWriter


@dataclass(slots=True)
class BenchTrace:
    """Writes groups, and the text of each token once."""

    writer: TraceWriter
    tokenizer: Any
    _written: set[int] = field(default_factory=set)  # tokens whose texts are in the trace

    def write(self, group: Group, number: int) -> None:
        """One group: for each turn the prompts, then for each method the steps and the outputs."""
        new = sorted(_tokens_in(group) - self._written)
        self._written.update(new)
        self.writer.vocabulary(token_texts(self.tokenizer, new))
        for index, turn in enumerate(group.turns):
            for question, ids in zip(turn.questions, turn.batch.prompts, strict=True):
                prompt = question.prompt
                self.writer.prompt(ids, question_id=prompt.question_id, category=prompt.category, turn=index)
            for method, output in turn.outputs.items():
                names = {"method": method.name, "drafter": method.drafter, "verifier": method.verifier}
                labels = {
                    q.number: {
                        **names,
                        "question_id": q.prompt.question_id,
                        "category": q.prompt.category,
                        "turn": index,
                    }
                    for q in turn.questions
                }
                for i, step in enumerate(output.steps):
                    details = output.details[i].as_dict() if output.details else None
                    self.writer.step(step, details, **labels[step.row])
                for question, ids, tokens in zip(turn.questions, turn.batch.prompts, output.tokens, strict=True):
                    self.writer.output(
                        tokens,
                        wall_s=output.total_s,
                        prefill_s=output.first_s,
                        **labels[question.number],
                        group=number,
                        num_rows=len(turn.questions),
                        num_prompt_tokens=len(ids),
                        lossless=method.lossless,
                    )


def _tokens_in(group: Group) -> set[int]:
    """Every token of the prompts, the outputs and the drafts."""
    tokens: set[int] = set()
    for turn in group.turns:
        tokens.update(*turn.batch.prompts)
        for output in turn.outputs.values():
            tokens.update(*output.tokens, *(step.tree_tokens for step in output.steps))
    return tokens
