"""Distilling a small draft model: some of the target's own layers, then KL on text that the target wrote."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.training.job import Facts, Job
from specdec.drafters.training.outcome import Batch, Outcome
from specdec.drafters.training.recipes import DraftRecipe
from specdec.engine.hidden_states import decoder_layers
from specdec.errors import CheckpointError
from specdec.hub.load import load_model


def train_draft(job: Job, recipe: DraftRecipe) -> Facts:
    """Train a draft model by ``recipe`` and save it.

    Raises:
        CheckpointError: ``start_from`` names a model with another vocabulary.
        ValueError: not fewer layers than the target has.
    """
    start = recipe.start_from
    small = pruned(job.model, recipe.layers).float() if start is None else _started(job.model, start)
    facts = job.fit(DraftTraining(small), recipe.settings)
    job.save(lambda: small.to(job.model.dtype).save_pretrained(job.folder))
    return facts


def _started(model: Any, path: str) -> Any:
    small = load_model(path, dtype="float32", device=str(model.device))
    draft_size, target_size = (causal_lm.config.get_text_config().vocab_size for causal_lm in (small, model))
    if draft_size != target_size:
        raise CheckpointError(f"{path} has {draft_size} token ids and the target {target_size}")
    return small


def pruned(model: Any, num_layers: int) -> Any:
    """A copy of ``model`` with ``num_layers`` of its decoder layers: evenly spread, the first and last among them.

    Raises:
        ValueError: not fewer layers than the model has, or none.
    """
    total = len(decoder_layers(model))
    if not 1 <= num_layers < total:
        raise ValueError(f"a draft model must have 1 to {total - 1} layers (fewer than the target's), got {num_layers}")
    kept = [round(i * (total - 1) / max(num_layers - 1, 1)) for i in range(num_layers)]
    small = copy.deepcopy(model)
    layers = decoder_layers(small)
    chosen = [layers[i] for i in kept]
    del layers[num_layers:]
    for i, layer in enumerate(chosen):
        layers[i] = layer
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", i)  # noqa: B010 (modules have no such attribute in general)
    config = small.config.get_text_config()
    config.num_hidden_layers = num_layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == total:  # such as layer_types
            setattr(config, name, [value[i] for i in kept])
    return small


class DraftTraining(nn.Module):
    """A small causal LM with the KL divergence from the target's distribution.

    The target is known by its best tokens; what it gives to all others together is matched as one more outcome, so
    the draft model neither learns nor forgets the tail. Embedding and output matrix stay the target's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            matrix.weight.requires_grad_(False)

    def forward(self, batch: Batch) -> Outcome:
        positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)
        valid = positions < batch["lengths"][:, None]
        # Padding stands at the right, where nothing sees it.
        logits = self.model(input_ids=batch["tokens"], use_cache=False).logits[valid].float()
        loss, ranks = tail_divergence(logits, batch["top_ids"][valid], batch["top_logprobs"][valid])
        return Outcome(loss, (ranks,))


def tail_divergence(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL () between targets known by their best tokens (N, K) and softmax(``logits``) (N, V); ranks (N,)."""
    top_logits = logits.gather(-1, top_ids)
    draft_logprobs = (top_logits - logits.logsumexp(-1, keepdim=True)).clamp(max=-1e-6)
    rest, draft_rest = ((1 - logprobs.exp().sum(-1)).clamp(min=1e-6) for logprobs in (top_logprobs, draft_logprobs))
    loss = (top_logprobs.exp() * (top_logprobs - draft_logprobs)).sum(-1) + rest * (rest.log() - draft_rest.log())
    ranks = (logits.detach() > top_logits[:, :1].detach()).sum(-1)
    return loss.mean(), ranks
