"""What an EAGLE head's config.json says, for EAGLE-3 and for EAGLE-1 and 2; what is not understood is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdec.errors import CheckpointError

ARCHITECTURE = "LlamaForCausalLMEagle3"
# Heads were published under the name of their base class, too.
_KNOWN = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "EagleLlamaForCausalLM", "LlamaForCausalLM")
# Engines count these one apart, and both mean hidden_states[2], [L // 2] and [L - 3]: the only features known here.
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "draft_vocab_size", "target_hidden_size", "num_hidden_layers", "max_position_embeddings",
)  # fmt: skip
_SHARES_OUTPUT = "specdec_shares_output"  # our own: other engines need the matrix


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """The sizes of a head. Flags that published configs leave out are inferred from a checkpoint's keys."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the target's
    draft_vocab_size: int
    target_hidden_size: int
    rms_norm_eps: float = 1e-5
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 2048
    num_hidden_layers: int = 1
    hidden_act: str = "silu"
    norm_before_residual: bool = False
    torch_dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    attention_bias: bool = False
    fc_bias: bool = False
    has_embedding: bool = False  # an embedding of its own; otherwise the target's
    shares_output: bool = False  # the target's output matrix at the draft vocabulary, not stored with the head

    @classmethod
    def for_target(cls, config: Any, draft_vocab_size: int, **changes: Any) -> EagleConfig:
        """A head of the same widths as the target with transformers' ``config``; ``changes`` are other fields."""
        config = config.get_text_config()
        size, heads = config.hidden_size, config.num_attention_heads
        eos = config.eos_token_id
        fields: dict[str, Any] = {
            "hidden_size": size,
            "intermediate_size": _size(config, "intermediate_size") or 4 * size,
            "num_attention_heads": heads,
            "num_key_value_heads": _size(config, "num_key_value_heads") or heads,
            "head_dim": _size(config, "head_dim") or size // heads,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": draft_vocab_size,
            "target_hidden_size": size,
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-5),
            "max_position_embeddings": _size(config, "max_position_embeddings") or 2048,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        }
        rope = getattr(config, "rope_parameters", None)
        if rope and "rope_theta" in rope:  # others are keyed by layer type: the head keeps plain ones
            fields["rope_parameters"] = dict(rope)
        return cls(**(fields | changes))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EagleConfig:
        """From a config.json.

        Raises:
            CheckpointError: an architecture, layer ids or a size that are not understood.
        """
        _check_architecture(config)
        try:
            size, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            found = cls(
                hidden_size=size,
                intermediate_size=int(config["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or size // max(heads, 1)),
                vocab_size=int(config["vocab_size"]),
                draft_vocab_size=int(config.get("draft_vocab_size") or config["vocab_size"]),
                target_hidden_size=int(config.get("target_hidden_size") or size),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
                rope_parameters=_rope(config),
                max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
                num_hidden_layers=int(config.get("num_hidden_layers", 1)),
                hidden_act=str(config.get("hidden_act", "silu")),
                norm_before_residual=bool(config.get("norm_before_residual", False)),
                torch_dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
                bos_token_id=config.get("bos_token_id"),
                eos_token_id=config.get("eos_token_id"),
                shares_output=bool(config.get(_SHARES_OUTPUT, False)),
            )
        except KeyError as error:
            raise CheckpointError(f"the head's config.json lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the head's config.json holds a value that is no size: {error}") from None
        found._check()
        return found

    def _check(self) -> None:
        """Refuse what no network can be made of."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} in the head's config.json must be at least 1, got {getattr(self, name)}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups or self.head_dim % 2:
            raise CheckpointError(
                "the head's config.json must have a multiple of num_key_value_heads as num_attention_heads and an even "
                f"head_dim, got {groups}, {heads} and {self.head_dim}"
            )
        kind = self.rope_parameters["rope_type"]
        for name, value, known in (("hidden_act", self.hidden_act, ACT2FN), ("rope_type", kind, _ROPE_TYPES)):
            if value not in known:
                raise CheckpointError(f"{name} {value!r} in the head's config.json is not known to transformers")

    def to_dict(self) -> dict[str, Any]:
        """The config.json of the EAGLE-3 layout that serving engines read."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.target_hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "attention_bias": self.attention_bias,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_parameters["rope_theta"],
            "rope_parameters": dict(self.rope_parameters),
            **self._rope_scaling(),
            "max_position_embeddings": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "tie_word_embeddings": False,
            "norm_before_residual": self.norm_before_residual,
            "torch_dtype": self.torch_dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            **({_SHARES_OUTPUT: True} if self.shares_output else {}),
        }

    def _rope_scaling(self) -> dict[str, Any]:
        """What readers of older configs look for where positions are scaled: without it they scale none, in silence."""
        if self.rope_parameters.get("rope_type", "default") == "default":
            return {}
        return {"rope_scaling": {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}}

    def llama(self) -> LlamaConfig:
        """What transformers' rotary embeddings are made from."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),
        )


def _size(config: Any, name: str) -> int | None:
    """A size of a target's config; None if it has none of that name, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' own, where layers differ
        return None
    return value if isinstance(value, int) else None


def _check_architecture(config: Mapping[str, Any]) -> None:
    names = config.get("architectures") or []
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        raise CheckpointError(f"the head's architecture {unknown[0]} is not known here; known are {', '.join(_KNOWN)}")
    ids = config.get(_LAYER_IDS) or (config.get("eagle_config") or {}).get(_LAYER_IDS)
    if ids is not None:
        raise CheckpointError(
            f"the head's config names the target's layers itself ({_LAYER_IDS} = {ids}), and engines disagree by one on "
            "what that means; only heads trained on hidden_states[2], [L // 2] and [L - 3] can be used"
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters, also from the older rope_theta and rope_scaling."""
    parameters = dict(config.get("rope_parameters") or {})
    if not parameters:
        parameters = dict(config.get("rope_scaling") or {})
        if "type" in parameters:
            parameters.setdefault("rope_type", parameters.pop("type"))
    parameters.setdefault("rope_type", "default")
    parameters.setdefault("rope_theta", float(config.get("rope_theta") or 10000.0))
    return parameters
