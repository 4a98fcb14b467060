"""What it costs to decide on all rows of a pass: by kernels and in one copy, or row by row on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_sections.timing import Run
from specdec.cuda.batch_verdicts import verdicts_on_device
from specdec.distributions import WarperTransform
from specdec.interfaces import Row, Scores, Verdict, Verifier
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.match import MatchVerifier
from specdec.verifiers.rejection import RejectionVerifier

NOISE = PhiloxRng(7)
TOP_P = SamplingParams(top_p=0.9)
WAYS: dict[str, tuple[Verifier, SamplingParams]] = {
    "greedy": (MatchVerifier(), GREEDY),
    "match, T=1": (MatchVerifier(), SamplingParams()),
    "match, top-p": (MatchVerifier(), TOP_P),
    "rejection, T=1": (RejectionVerifier(), SamplingParams()),
    "rejection, top-p": (RejectionVerifier(), TOP_P),
}


@dataclass(frozen=True, slots=True)
class Pass:
    """Scored trees, before anything is decided."""

    rows: list[Row]
    trees: list[TokenTree]
    scores: list[Scores]

    @classmethod
    def of(cls, logits: Tensor) -> Pass:
        """Binary trees over ``logits`` (B, n, V): of the two children one is drawn and one is the best token."""
        num_rows, num_nodes, _ = logits.shape
        probs = (logits[:, : num_nodes // 2].float() * 0.8).softmax(-1)
        drawn = torch.multinomial(probs.flatten(0, 1), 1).view(num_rows, -1).tolist()
        best = probs.argmax(-1).tolist()
        parents = (-1, *((node - 1) // 2 for node in range(1, num_nodes)))
        sources = (-1, *(parent if node % 2 else -1 for node, parent in enumerate(parents[1:], 1)))
        trees = [
            TokenTree(
                (0, *((drawn if node % 2 else best)[row][parents[node]] for node in range(1, num_nodes))),
                parents,
                sources,
                probs[row],
                (Draw.INDEPENDENT,) * probs.shape[1],
            )
            for row in range(num_rows)
        ]
        rows = [Row(key, [0] * 20, 999) for key in range(num_rows)]
        return cls(rows, trees, [Scores(each) for each in logits])

    def on_device(self, verifier: Verifier, params: SamplingParams) -> Callable[[], list[Verdict]]:
        def decide() -> list[Verdict]:
            found = verdicts_on_device(verifier, WarperTransform(params), NOISE, self.rows, self.trees, self.scores)
            if found is None:
                raise RuntimeError("nothing is decided on the device here: no kernels can run")
            return found

        return decide

    def on_host(self, verifier: Verifier, params: SamplingParams) -> Callable[[], list[Verdict]]:
        logits_transform = WarperTransform(params)
        return lambda: [
            verifier.verify(tree, logits_transform.target_probs(row, tree, scores), NOISE.at(row.key, len(row.tokens)))
            for row, tree, scores in zip(self.rows, self.trees, self.scores, strict=True)
        ]


def verdicts(run: Run) -> None:
    """Both ways over the same trees; sampled verdicts may differ where two scores nearly tie."""
    nodes, vocab = run.pick((32, 128256), (6, 300))
    for num_rows in run.pick((1, 8), (2,)):
        given = Pass.of(run.randn(num_rows, nodes, vocab) * 3)
        for name, way in WAYS.items():
            what = f"{num_rows} x {nodes} nodes x {vocab}, {name}"
            methods = {"device": given.on_device(*way), "host": given.on_host(*way)}
            if "device" not in run.time("verdicts", what, dict(methods)):
                continue
            expected = methods["host"]()
            differ = sum(a != b for a, b in zip(methods["device"](), expected, strict=True))
            accepted = sum(verdict.num_accepted for verdict in expected)
            same = {"match": differ == 0} if way[1].is_greedy else {"rows_that_differ": differ}
            run.add("verdicts", f"{what}: verdicts", accepted=accepted, **same)
