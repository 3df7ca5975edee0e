"""Llama with a compressed cache for transformers, in one file of plain PyTorch.

Computes whole sequences with the decisions of inference, for evaluation; there is no cache, so
nothing is saved here. Either of two methods, or neither:

`config.dmc`: tokens are merged (Nawrot et al. 2024, arXiv 2403.09636). The last channel of every
key decides whether its token joins the slot of the token before it, the last channel of the queries
how much it weighs there, and neither takes part in attention.

`config.gates`: tokens are dropped some time after they came (Lancucki et al. 2025, arXiv
2506.05345), from a model that stays as it was pretrained. A gate for every KV head, a linear
read-out of the input of its attention, decides; the gates are in a file of their own.

Without both it is a dense Llama, whose layers may differ in their number of KV heads
(`num_key_value_heads_per_layer`).
"""

import math

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

GATES_FILE = "gates.safetensors"  # beside the weights


def rotary_angles(config, length, device):
    """Angles [T, H/2] in float32, from either spelling of the config."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0
    rope = rope or getattr(config, "rope_scaling", None) or {}
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = theta ** (-steps / config.head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / rope["factor"]
    elif kind != "default":
        raise ValueError(f"rotary scaling of type {kind!r} is not supported")
    return torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies


def rotate(x, angles):
    """Rotate the channel pairs (f, f + H/2) of x [B, heads, T, H], in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def without_last_channel(x):
    """Set the channel that decides to 0."""
    return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, in float32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        """Normalised x [B, T, D], in its dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Causal attention, over merged slots, or without dropped tokens, as the config says."""

    def __init__(self, config, kv_heads):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, kv_heads, head_dim
        self.dmc = getattr(config, "dmc", None)
        self.gates = getattr(config, "gates", None)
        if self.gates is not None and self.gates["method"] != "dms":
            raise ValueError(f"gates for {self.gates['method']!r}: this file computes dms alone")
        self.q_proj = nn.Linear(width, self.heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * head_dim, width, bias=False)

    def forward(self, x, angles):
        """The attention's output [B, T, D]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads, T, H]
        length = x.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if self.dmc is None:
            q, k = rotate(q, angles), rotate(k, angles)
        else:
            q, k, v, visible = self.merge(q, k, v, angles, visible)
        if self.gates is not None:
            visible = visible & self.held(x)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() * self.head_dim**-0.5
        if visible.ndim == 4:
            visible = visible.repeat_interleave(groups, dim=1)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out = weights.to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def held(self, x):
        """Which tokens a query finds in the cache [B, K, T, T]: those that stay, and the newest."""
        standard = (x.float() - self.gate_mean) / self.gate_deviation
        logits = F.linear(standard, self.gate_weight.float(), self.gate_bias.float())
        dropped = (logits > self.gates["threshold"]).transpose(1, 2)  # [B, K, T]
        position = torch.arange(x.shape[1], device=x.device)
        age = position[:, None] - position
        return ~dropped[:, :, None] | (age < self.gates["delay"])

    def merge(self, q, k, v, angles, visible):
        """Queries and pooled states, ready for attention, and which states a query sees.

        Returns:
            q [B, N, T, H], k and v [B, K, T, H], visible [B, K, T, T].
        """
        settings, length = self.dmc, q.shape[2]
        decisions = k[..., -1].float() - settings["offset"] > settings["threshold"]  # [B, K, T]
        decisions[..., 0] = False  # there is nothing to merge into
        logits = q[..., -1].float().unflatten(1, (self.kv_heads, -1)).mean(dim=2)
        importance = torch.sigmoid(logits + settings["offset"]) + settings["eps"]  # [B, K, T]

        # Token i's slot holds the tokens since its segment began, the last `window` of them.
        position = torch.arange(length, device=q.device)
        began = torch.where(decisions, 0, position).cummax(dim=-1).values  # [B, K, T]
        inside = (position <= position[:, None]) & (position >= began[..., None])
        if settings["window"]:
            inside = inside & (position > position[:, None] - settings["window"])
        weights = inside * importance[..., None, :]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        k, v = ((weights @ x.float()).to(x.dtype) for x in (k, v))

        # A state is superseded where the next token joins its slot; a query always sees its own.
        kept = torch.cat([~decisions[..., 1:], torch.ones_like(decisions[..., :1])], dim=-1)
        own = torch.eye(length, dtype=torch.bool, device=q.device)
        visible = visible & (kept[..., None, :] | own)
        q, k = (
            without_last_channel(rotate(without_last_channel(x), angles)) for x in (q, k)
        )  # again after the rotation, which mixes the channel with its partner
        return q, k, v, visible


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        """The MLP's output [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm, around the residual stream."""

    def __init__(self, config, kv_heads):
        super().__init__()
        self.self_attn = Attention(config, kv_heads)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, angles):
        """The residual stream x [B, T, D] after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything but the head."""

    def __init__(self, config):
        super().__init__()
        kv_heads = getattr(config, "num_key_value_heads_per_layer", None)
        kv_heads = kv_heads or [config.num_key_value_heads] * config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, count) for count in kv_heads)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaDMCForCausalLM(PreTrainedModel):
    """Logits of a Llama with (or, without `config.dmc`, without) compressed memory."""

    config_class = LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name, *args, **options):
        """Load the model, and its gates if it has any."""
        loaded = super().from_pretrained(name, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model.config, "gates", None) is not None:
            where = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
            where = {option: options[option] for option in where if option in options}
            model.set_gates(load_file(cached_file(name, GATES_FILE, **where)))
        return loaded

    def set_gates(self, gates):
        """Give every layer its part of the gates, of which the file has all rows in order."""
        first = 0
        for index, layer in enumerate(self.model.layers):
            attention = layer.self_attn
            rows = slice(first, first + attention.kv_heads)
            for part, of in (
                ("mean", index),
                ("deviation", index),
                ("weight", rows),
                ("bias", rows),
            ):
                own = gates[part][of].to(attention.k_proj.weight.device)
                attention.register_buffer(f"gate_{part}", own, persistent=False)
            first = rows.stop

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=True, **unused):
        """Logits of whole sequences, each starting at position 0.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens; padding may only follow them.
            labels: [B, T], ids to predict (as `input_ids`; -100 is left out); gives the mean loss.
            return_dict: False for a tuple.
            unused: what other models take, such as `use_cache`.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("padding before tokens is not supported: pad on the right")
        x = self.model.embed_tokens(input_ids)
        angles = rotary_angles(self.config, input_ids.shape[1], input_ids.device)
        for layer in self.model.layers:
            x = layer(x, angles)
        x = self.model.norm(x)
        tied = self.config.tie_word_embeddings
        logits = F.linear(x, self.model.embed_tokens.weight) if tied else self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)
