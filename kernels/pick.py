"""``pick_rows``: a token from each row of logits, with all the usual warpers and a grammar, without a sort.

Letters: R rows (any number of nodes of any number of trees), V vocabulary, M rows of grammar bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import choose
from specdec.kernels.launch import C_TYPES, Backend, float32, int32, require
from specdec.kernels.rng import RngKeys, target_gumbel

FILE = "pick.cu"
MAX_VOCAB = 1 << 24
_PART = 4096  # tokens a block: a function of nothing but the vocabulary, so that a row's result is its own
_ANY_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Grammar:
    """Which tokens are allowed: bit t % 32 of word t // 32 says so for token t."""

    bits: Tensor  # (M, ceil(V / 32)) int32
    rows: Tensor  # (R,) int32 the row of bits for each row of logits, -1: all tokens


@dataclass(frozen=True, slots=True)
class PickedRows:
    """What ``pick_rows`` found; p(v) = exp(logit(v) / T - lse) for the tokens that are kept, else 0.

    Kept are values above the bound, and of those equal to it the token ids up to ``lasts``. A row that allows nothing
    has token -1 and lse -inf; one with NaN or +inf has an lse that is not finite, and any token.
    """

    tokens: Tensor  # (R,) int64
    largest: Tensor  # (R,) float32 the largest of the kept logits / T (at T = 0 of the logits)
    lse: Tensor  # (R,) float32 log-sum-exp of the same
    bounds: Tensor | None = None  # (R,) float32; None: nothing is filtered
    lasts: Tensor | None = None  # (R,) int32


@dataclass(frozen=True, slots=True)
class Filters:
    """Temperature 0 is greedy; the other defaults change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                "temperature and top_k must not be negative, top_p be in (0, 1] and min_p in [0, 1], got "
                f"{self.temperature}, {self.top_k}, {self.top_p}, {self.min_p}"
            )

    def is_active(self, vocab: int) -> bool:
        """Whether anything is filtered; greedy picks need no filter."""
        return self.temperature > 0 and (0 < self.top_k < vocab or self.top_p < 1 or self.min_p > 0)


def expressions(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels of one dtype of logits."""
    name = C_TYPES[dtype]
    return f"filter_rows<{name}>", f"pick_parts<{name}>", "pick_rows"


def pick_rows(
    logits: Tensor, filters: Filters = Filters(), rng: RngKeys | None = None, grammar: Grammar | None = None
) -> PickedRows:
    """Argmax, or with a temperature argmax(logits / T + Gumbel noise) over what top-k, top-p, min-p and the grammar keep.

    The order is that of ``generate()``: grammar, temperature, top-k (ties with the k-th stay), top-p, min-p. The noise
    of a row is a function of its seed, row key and position alone, so the same token is picked in any batch. The
    kernel computes in float32: its token differs from the float64 twin's only where the two best scores nearly tie.

    Args:
        logits: (R, V), float32, float16 or bfloat16.
        noise: needed if the temperature is above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or no noise.
    """
    _check(logits, filters, rng, grammar)
    backend = choose("pick_rows", logits.device)
    if backend is None:
        return pick_rows_torch(logits, filters, rng, grammar)
    return _launch(backend, logits, filters, rng, grammar)


def _check(logits: Tensor, filters: Filters, rng: RngKeys | None, grammar: Grammar | None) -> None:
    require("logits", logits, tuple(C_TYPES), (None, None), logits)
    rows, vocab = logits.shape
    if not 0 < vocab <= MAX_VOCAB or rows == 0:
        raise ValueError(f"logits need 1 or more rows and 1 to {MAX_VOCAB} tokens, got shape {tuple(logits.shape)}")
    if filters.temperature > 0:
        if rng is None:
            raise ValueError("a temperature above 0 needs noise keys")
        check_noise(rng, rows, logits)
    if grammar is not None:
        require("grammar.bits", grammar.bits, torch.int32, (None, (vocab + 31) // 32), logits)
        require("grammar.rows", grammar.rows, torch.int32, (rows,), logits)


def check_noise(rng: RngKeys, rows: int, like: Tensor) -> None:
    """Raises ValueError unless there is one key a row."""
    require("noise.seed", rng.seed, torch.int64, (1,), like)
    require("noise.rows", rng.rows, torch.int64, (rows,), like)
    require("noise.positions", rng.positions, torch.int64, (rows,), like)


def _launch(
    backend: Backend, logits: Tensor, filters: Filters, rng: RngKeys | None, grammar: Grammar | None
) -> PickedRows:
    rows, vocab = logits.shape
    filter_rows, pick_parts, pick = backend.load(FILE, expressions(logits.dtype))
    device = logits.device
    bits = (grammar.bits, grammar.rows) if grammar else (None, None)
    bounds = lasts = None
    if filters.is_active(vocab):
        bounds = backend.empty((rows,), torch.float32, device)
        lasts = backend.empty((rows,), torch.int32, device)
        kept = (float32(filters.temperature), int32(filters.top_k), float32(filters.top_p), float32(filters.min_p))
        filter_rows((rows,), 512, (logits, *bits, bounds, lasts, int32(vocab), *kept))
    splits = -(-vocab // _PART)
    parts = backend.empty((rows, splits, 4), torch.float32, device)
    tokens = backend.empty((rows,), torch.int64, device)
    largest, lse = (backend.empty((rows,), torch.float32, device) for _ in range(2))
    keys = (rng.seed, rng.rows, rng.positions) if rng and filters.temperature > 0 else (None, None, None)
    inverse = float32(1 / filters.temperature if filters.temperature > 0 else 0.0)
    pick_parts((splits, rows), 256, (logits, *bits, bounds, lasts, *keys, parts, int32(vocab), int32(_PART), inverse))
    pick((rows,), 32, (parts, tokens, largest, lse, int32(splits)))
    return PickedRows(tokens, largest, lse, bounds, lasts)


def pick_rows_torch(
    logits: Tensor, filters: Filters = Filters(), rng: RngKeys | None = None, grammar: Grammar | None = None
) -> PickedRows:
    """The twin of :func:`pick_rows`, in float64 and by sorting."""
    raw = allowed_logits(logits, grammar)
    bounds = lasts = None
    if filters.is_active(raw.shape[1]):
        bounds, lasts = _bounds(raw, filters)
        raw = raw.masked_fill(~is_kept(raw, bounds, lasts), -math.inf)
    scaled = raw / filters.temperature if filters.temperature > 0 else raw
    scores = scaled
    if filters.temperature > 0:
        assert rng is not None
        scores = scaled + target_gumbel(rng, raw.shape[1])
    best = scores.max(-1)
    # Of equal scores the first one, which max() does not promise.
    first = torch.where(scores == best.values[:, None], _ids(scores), _ANY_TOKEN).amin(-1)
    tokens = torch.where(best.values > -math.inf, first, -1)
    return PickedRows(tokens, scaled.amax(-1).float(), scaled.logsumexp(-1).float(), bounds, lasts)


def allowed_logits(logits: Tensor, grammar: Grammar | None) -> Tensor:
    """(R, V) float64, -inf where the grammar forbids a token."""
    raw = logits.double()
    if grammar is None:
        return raw
    ids = torch.arange(logits.shape[1], device=logits.device)
    words = grammar.bits[grammar.rows.clamp(min=0).long()][:, ids >> 5]
    allowed = ((words >> (ids & 31)) & 1).bool() | (grammar.rows < 0)[:, None]
    return raw.masked_fill(~allowed, -math.inf)


def is_kept(raw: Tensor, bounds: Tensor | None, lasts: Tensor | None) -> Tensor:
    """(R, V) bool: which tokens the filters keep."""
    if bounds is None or lasts is None:
        return torch.ones_like(raw, dtype=torch.bool)
    bound = bounds[:, None].double()
    return ~(raw < bound) & ((raw != bound) | (_ids(raw) <= lasts[:, None]))  # NaN stays, for the caller to see


def _bounds(raw: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    bounds = torch.full_like(raw[:, 0], -math.inf)
    lasts = torch.full_like(raw[:, 0], _ANY_TOKEN, dtype=torch.int64)
    if 0 < filters.top_k < raw.shape[1]:
        bounds = raw.topk(filters.top_k).values[:, -1]
    if filters.top_p < 1:
        ordered, ids = raw.masked_fill(raw < bounds[:, None], -math.inf).sort(dim=-1, descending=True, stable=True)
        probs = (ordered / filters.temperature).softmax(-1)
        count = ((probs.cumsum(-1) - probs < filters.top_p) & (probs > 0)).sum(-1, keepdim=True).clamp(min=1)
        bounds = ordered.gather(-1, count - 1).squeeze(-1)
        lasts = ids.gather(-1, count - 1).squeeze(-1)
    if filters.min_p > 0:
        least = raw.amax(-1) + filters.temperature * math.log(filters.min_p)
        lasts = torch.where(least > bounds, _ANY_TOKEN, lasts)
        bounds = torch.maximum(bounds, least)
    return bounds.float(), lasts.int()


def _ids(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
