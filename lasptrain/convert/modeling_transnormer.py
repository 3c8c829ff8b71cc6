"""TransNormerLLM (arXiv:2307.14995) for transformers, in plain PyTorch: this one file is the model.

It stands beside weights in the layout of OpenNLPLab's releases and imports nothing of lasptrain. Slopes and angles are
made in every forward, in fp32 and fp64; the cache holds one fp32 state [B, H, K, V] per layer and the position.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CHUNK = 128  # tokens of a prefill that are computed at once


class TransnormerConfig(PretrainedConfig):  # type: ignore[misc]
    """The keys of OpenNLPLab's configuration that say what is computed."""

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  as transformers has it
    attribute_map = {  # noqa: RUF012
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
    }

    def __init__(
        self,
        vocab_size: int = 64000,
        decoder_embed_dim: int = 1024,
        decoder_layers: int = 24,
        decoder_attention_heads: int = 8,
        hidden_dim: int = 1024,
        glu_dim: int = 2816,
        linear_use_lrpe_list: list[int] | None = None,
        no_scale_embedding: bool = False,
        init_std: float = 0.02,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.decoder_embed_dim = decoder_embed_dim
        self.decoder_layers = decoder_layers
        self.decoder_attention_heads = decoder_attention_heads
        self.hidden_dim = hidden_dim
        self.glu_dim = glu_dim
        self.linear_use_lrpe_list = linear_use_lrpe_list or [1] + [0] * (decoder_layers - 1)
        self.no_scale_embedding = no_scale_embedding
        self.init_std = init_std
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class TransnormerCache:
    """States of all layers after `seen` tokens, padding included; what transformers asks of a cache and no more."""

    is_compileable = False

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_cache_shape(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states = {i: state.index_select(0, beam_idx) for i, state in self.states.items()}


def srms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def slopes(heads: int) -> list[float]:
    """2^(−8(h+1)/H), and ALiBi's rule (arXiv:2108.12409) where H is no power of two."""
    power = 2 ** math.floor(math.log2(heads))
    base = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return base if power == heads else base + slopes(2 * power)[0::2][: heads - power]


class Lrpe(nn.Module):
    def __init__(self, heads: int, key_dim: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(heads, 1, key_dim))

    def forward(self, x: Tensor, start: int) -> Tensor:
        """[x cos θt, x sin θt] of x [B, H, T, K] at positions from `start` on; only differences of positions matter."""
        position = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float64)[:, None]
        angle = self.theta.double() * position
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)


class TokenMixer(nn.Module):
    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.heads = config, layer, config.decoder_attention_heads
        dim, width = config.decoder_embed_dim, config.hidden_dim
        self.qkvu_proj = nn.Linear(dim, 4 * width, bias=False)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.lrpe = Lrpe(self.heads, width // self.heads) if config.linear_use_lrpe_list[layer] else None

    def forward(self, x: Tensor, valid: Tensor | None, cache: TransnormerCache | None) -> Tensor:
        """x [B, T, D]; valid [B, T], 0 where a token is padding, which writes nothing."""
        q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (F.silu(q), F.silu(k), v))
        q, k, v = q.float(), k.float(), v.float()
        if self.lrpe is not None:
            start = 0 if cache is None else cache.seen
            q, k = self.lrpe(q, start), self.lrpe(k, start)
        if valid is not None:
            v = v * valid[:, None, :, None].to(v.dtype)
        depth = 1 - self.layer / max(self.config.decoder_layers - 1, 1) + 1e-5
        slope = torch.tensor([s * depth for s in slopes(self.heads)], dtype=torch.float32, device=x.device)
        state = None if cache is None else cache.states.get(self.layer)
        o, state = recurrence(q, k, v, slope, state)
        if cache is not None:
            cache.states[self.layer] = state
        o = srms(o.transpose(1, 2).flatten(2)).to(u.dtype)
        y: Tensor = self.out_proj(u * o)
        return y


def recurrence(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """o [B, H, T, V] and the last state, of S_t = e^{−s} S_{t−1} + k_tᵀ v_t, o_t = q_t S_t, in chunks."""
    if state is None:
        state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for a, b, c in zip(q.split(CHUNK, 2), k.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
        steps = torch.arange(a.shape[2], device=q.device, dtype=torch.float32)
        distance = steps[:, None] - steps
        within = torch.where(distance >= 0, torch.exp(-slope[:, None, None] * distance.clamp(min=0)), 0.0)
        entered = torch.exp(-slope[:, None] * (steps + 1))[..., None]
        left = torch.exp(-slope[:, None] * (len(steps) - 1 - steps))[..., None]
        outputs.append((a @ b.transpose(-1, -2) * within) @ c + (a * entered) @ state)
        state = torch.exp(-slope * len(steps))[:, None, None] * state + (b * left).transpose(-1, -2) @ c
    return torch.cat(outputs, dim=2), state


class ChannelMixer(nn.Module):
    def __init__(self, config: TransnormerConfig):
        super().__init__()
        self.l1 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.decoder_embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l3(self.l1(x) * self.l2(x))
        return y


class Layer(nn.Module):
    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        self.token_mixer = TokenMixer(config, layer)
        self.channel_mixer = ChannelMixer(config)

    def forward(self, x: Tensor, valid: Tensor | None, cache: TransnormerCache | None) -> Tensor:
        x = x + self.token_mixer(srms(x), valid, cache)
        y: Tensor = x + self.channel_mixer(srms(x))
        return y


class TransnormerModel(nn.Module):
    def __init__(self, config: TransnormerConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.decoder_layers))
        self.scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)

    def forward(self, ids: Tensor, valid: Tensor | None, cache: TransnormerCache | None) -> Tensor:
        x = self.embed_tokens(ids) * self.scale
        for layer in self.layers:
            x = layer(x, valid, cache)
        return srms(x)


class TransnormerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model."""

    config_class = TransnormerConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: TransnormerConfig):
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        cache: TransnormerCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab]; attention_mask [B, T or more] is 0 at padding, which stands on the left.

        `cache` is what transformers calls `past_key_values` from 5.24 on.
        """
        cache = past_key_values if cache is None else cache
        cache = cache if isinstance(cache, TransnormerCache) else None
        if cache is None and use_cache:
            cache = TransnormerCache()
        length = input_ids.shape[1]
        valid = None if attention_mask is None else attention_mask[:, -length:]
        x = self.model(input_ids, valid, cache)
        if cache is not None:
            cache.seen += length
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What has been seen is in the cache; only the rest is given to `forward`."""
        cache = past_key_values if cache is None else cache
        cache = cache if isinstance(cache, TransnormerCache) else None
        return {
            "input_ids": input_ids if cache is None else input_ids[:, cache.seen :],
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": use_cache is not False,
        }
