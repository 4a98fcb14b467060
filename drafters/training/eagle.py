"""Training of EAGLE-3's cell by its training-time test (Li et al., 2025): the cell learns on its own outputs.

Slot t reads the embedding of token t + 1 and a state, and predicts token t + 2. In step 0 the state is made of the
target's features at t. In step k it is the cell's output of step k - 1 at slot t - 1, as if drafting had begun k slots
earlier: the slot then attends to true slots up to t - k, and to its own k latest ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.heads.eagle_cell import EagleCell
from specdec.drafters.training.outcome import Batch, Outcome
from specdec.drafters.training.targets import SoftTargets
from specdec.engine.hidden_states import decoder_layers

DECAY = 0.8
_LARGE = 2.0**10


class EagleTraining(nn.Module):
    """A cell with the loss of EAGLE-3: cross entropy with the target's distribution, weighted by 0.8^step.

    Args:
        cell: what is trained.
        embedding: (V, H) of the target; stays fixed.
        num_steps: how many tokens ahead the cell is unrolled.
    """

    embedding: Tensor

    def __init__(self, cell: EagleCell, embedding: Tensor, num_steps: int = 3) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.cell, self.num_steps = cell, num_steps
        self.register_buffer("embedding", embedding, persistent=False)
        self.targets = SoftTargets(cell.target_ids(), cell.config.vocab_size)

    def forward(self, batch: Batch) -> Outcome:
        tokens, lengths = batch["tokens"], batch["lengths"]
        num_slots = tokens.shape[1] - 1
        slots = torch.arange(num_slots, device=tokens.device)
        positions = slots.expand(len(tokens), -1)
        dtype = self.cell.dtype
        embeds = self.embedding[tokens[:, 1:]].to(dtype)
        features = batch["features"][:, :-1].to(dtype)
        loss = embeds.new_zeros(())
        ranks: list[Tensor] = []
        for step, states in enumerate(unrolled(self.cell, embeds, features, positions, self.num_steps)):
            valid = (slots + 1 < lengths[:, None]) & (slots >= step)
            top_ids, top_logprobs = (batch[key][:, 1:][valid] for key in ("top_ids", "top_logprobs"))
            step_loss, rank = self.targets(
                self.cell.outputs(states[valid]), self.cell.lm_head.weight, top_ids, top_logprobs
            )
            loss = loss + DECAY**step * step_loss
            ranks.append(rank)
        return Outcome(loss, tuple(ranks))


def unrolled(cell: EagleCell, embeds: Tensor, features: Tensor, positions: Tensor, num_steps: int) -> Iterator[Tensor]:
    """The states (B, T, H) of each step on ``embeds`` (B, T, H), ``features`` (B, T, F) and ``positions`` (B, T).

    Step k reads at slot t what step k - 1 put out at slot t - 1.
    """
    keys: list[list[Tensor]] = [[] for _ in range(cell.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(cell.num_layers)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[layer].append(k)
        values[layer].append(v)
        return unrolled_attention(q, keys[layer], values[layer])

    states = cell.fuse(features)
    for step in range(num_steps):
        if step:
            states = nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
        states = cell(embeds, states, positions, attend)
        yield states


def unrolled_attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """(B, heads, T, D): what step k = len(keys) - 1 attends to.

    The queries ``q`` (B, heads, T, D) of slot t see the keys (B, G, T, D) of step 0 up to slot t - k, and those of
    step j at slot t - k + j for each j from 1 to k.
    """
    step = len(keys) - 1
    if step == 0:
        return nn.functional.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True, enable_gqa=True)
    batch, heads, length, size = q.shape
    groups = keys[0].shape[1]
    q = q.view(batch, groups, heads // groups, length, size) * size**-0.5
    scores = q @ keys[0][:, :, None].transpose(-1, -2)
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1 - step)
    scores = scores.masked_fill(hidden, float("-inf"))
    own = [(_shifted(keys[j], step - j), _shifted(values[j], step - j)) for j in range(1, step + 1)]
    extra = torch.stack([(q * k[:, :, None]).sum(-1) for k, _ in own], -1)
    weights = torch.cat([scores, extra], -1).float().softmax(-1).to(q.dtype)
    mixed = weights[..., :length] @ values[0][:, :, None]
    for j, (_, v) in enumerate(own):
        mixed = mixed + weights[..., length + j, None] * v[:, :, None]
    return mixed.view(batch, heads, length, size)


def _shifted(x: Tensor, by: int) -> Tensor:
    """``x`` (B, G, T, D) moved ``by`` slots to the right, zeros in front."""
    return x if by == 0 else nn.functional.pad(x[:, :, :-by], (0, 0, by, 0))


@torch.no_grad()
def warm_start(cell: EagleCell, model: nn.Module) -> bool:
    """Copy the target's last decoder layer into the cell, as far as its parts have the same names and shapes.

    Attention reads the embedding and the state side by side, so each half gets the layer's weights by a half; the
    first state is the last of the three features. The output matrix is the target's at the draft vocabulary. A norm
    gets the scale of the one that stands before the same part of the target, be it stored as such or as an offset
    from 1. Returns whether the whole layer fitted.
    """
    layer = decoder_layers(model)[-1]
    size, source = cell.config.hidden_size, dict(layer.state_dict())
    attention, feedforward, output = _norms_before(model, layer)
    norms = {"input_layernorm": attention, "hidden_norm": attention, "post_attention_layernorm": feedforward}
    fitted = True
    for name, parameter in cell.midlayer.named_parameters():
        part = name.split(".")[0]
        value = norm_scale(norms[part], size) if part in norms else source.get(name)
        if value is not None and name.split(".")[1][:1] in "qkv" and value.dim() == 2:
            value = torch.cat([value, value], 1) / 2
        if value is None or value.shape != parameter.shape:
            fitted = False
            continue
        parameter.copy_(value)
    if cell.fc is not None and cell.fc.weight.shape == (size, 3 * size):
        cell.fc.weight.zero_()
        cell.fc.weight[:, 2 * size :].fill_diagonal_(1.0)
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    if head.shape[1] == size:
        cell.lm_head.weight.copy_(head[cell.target_ids()])
    final = norm_scale(output, size)
    if final is not None:
        cell.norm.weight.copy_(final)
    return fitted


def _norms_before(model: Any, layer: nn.Module) -> list[nn.Module | None]:
    """What made the input of ``layer``'s attention, of its feed-forward part and of the output matrix, seen in a pass.

    Architectures agree neither on the names of their norms nor on their places.
    """
    decoder, parts = model.get_decoder(), dict(layer.named_modules())
    made: list[tuple[nn.Module, Any]] = []  # all are kept: memory that is used again would deceive
    read: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, out: made.append((module, out)))
        for module in decoder.modules()
        if not any(True for _ in module.children())
    ]
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        if name in parts:
            see = partial(_see, read, name)
            hooks.append(parts[name].register_forward_pre_hook(see))
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        read["output"] = decoder(input_ids=ids, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return [_maker(read.get(name), made) for name in ("self_attn.q_proj", "mlp.gate_proj", "output")]


def _see(read: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    read[name] = args[0]


def _maker(x: Tensor | None, made: Sequence[tuple[nn.Module, Any]]) -> nn.Module | None:
    """The first module that put out ``x``, perhaps in another shape."""
    for module, out in made:
        if x is not None and isinstance(out, Tensor) and (out.data_ptr(), out.numel()) == (x.data_ptr(), x.numel()):
            return module
    return None


@torch.no_grad()
def norm_scale(norm: nn.Module | None, size: int) -> Tensor | None:
    """(H,) what ``norm`` multiplies each of ``size`` normalised values by, whatever it stores; None if it is no norm.

    A vector of 1 and -1 in turn has mean 0 and length 1 already, so a norm gives back its scale with these signs, plus
    its bias; a large multiple of it makes nothing of the epsilon.
    """
    if norm is None:
        return None
    norm = copy.deepcopy(norm).float()
    signs = torch.ones(size, device=next((p.device for p in norm.parameters()), None))
    signs[1::2] = -1
    up, twice, down = (norm(factor * signs) for factor in (_LARGE, 2 * _LARGE, -_LARGE))
    if up.shape != signs.shape or not torch.allclose(up, twice):
        return None
    scale: Tensor = signs * (up - down) / 2
    return scale
