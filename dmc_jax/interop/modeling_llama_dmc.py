"""Llama with a compressed cache for transformers, in one file of plain PyTorch.

Computes whole sequences with the decisions of inference, for evaluation; there is no cache, so
nothing is saved here. What decides on a token, and what becomes of it, the config says:

`config.dmc`: tokens are merged (Nawrot et al. 2024, arXiv 2403.09636). The last channel of every
key decides whether its token joins the slot of the token before it, the last channel of the queries
how much it weighs there, and neither takes part in attention.

`config.gates`: gates decide, for every KV head a linear read-out of the input of its attention,
which is in a file of its own; no channel is taken from the model. Some time after it came, a token
is dropped (method "dms": Lancucki et al. 2025, arXiv 2506.05345) or merged ("dmc").

Without both it is a dense Llama, whose layers may differ in their number of KV heads
(`num_key_value_heads_per_layer`, or `block_configs`).
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
OF_LAYERS = ("mean", "deviation")  # what is in it: of every layer, and of every KV head of all
OF_ROWS = ("weight", "bias", "importance_weight", "importance_bias", "gamma")  # some may be missing
MOST_TOKENS = 65_535  # that a slot counts
NEXT_TO_NOTHING = 2**-10  # weight of a token that is dropped in the slot that it joins


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


def ages(x):
    """How old every key's token is when a query comes [T, T], in tokens, of x [..., T, H]."""
    position = torch.arange(x.shape[-2], device=x.device)
    return position[:, None] - position


def bias_of(visible):
    """What to add to scores so that only what is visible counts."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)


def merged(k, v, merges, importance, settings, gamma=None):
    """Merge tokens into slots, every one as soon as it is `delay` tokens old.

    Args:
        k, v: of tokens [B, K, T, H], before rotation.
        merges: whether a token joins the slot of the token before it [B, K, T].
        importance: its weight in the average that is the slot's state [B, K, T].
        settings: `window` and `delay`; either may be missing.
        gamma: [K]; times the logarithm of the tokens in a slot it is added to the slot's scores.

    Returns:
        k and v [B, K, S, H]: after every token, the state of its slot (S = T), and where there is a
        delay the tokens before all that (S = 2 T); and what to add to the scores [B, K, T, S].
    """
    delay, window = settings.get("delay", 0), settings.get("window")
    age = ages(k)
    position = age[:, 0]
    merges = merges & (position > 0)  # the first has nothing to merge into

    # Token i's slot holds the tokens since its segment began, the last `window` of them.
    began = torch.where(merges, 0, position).cummax(dim=-1).values  # [B, K, T]
    inside = (age >= 0) & (position >= began[..., None])
    if window:
        inside = inside & (age < window)
    weights = inside * importance[..., None, :]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    states = [(weights @ x.float()).to(x.dtype) for x in (k, v)]

    # A state is there once its token has settled, until the next one settles and joins its slot.
    joined = torch.cat([merges[..., 1:], torch.zeros_like(merges[..., :1])], dim=-1)
    bias = bias_of((age == delay) | ((age > delay) & ~joined[..., None, :]))
    if gamma is not None:
        tokens = inside.sum(dim=-1).clamp(max=MOST_TOKENS).float()
        bias = bias + (gamma.float()[:, None] * tokens.log())[..., None, :]
    if not delay:
        return *states, bias
    unsettled = bias_of((age >= 0) & (age < delay)).expand_as(bias)
    k, v = (torch.cat([x, state], dim=-2) for x, state in zip((k, v), states, strict=True))
    return k, v, torch.cat([unsettled, bias], dim=-1)


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
    """Causal attention over tokens, or what the config leaves of them."""

    def __init__(self, config, kv_heads):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, kv_heads, head_dim
        self.dmc = getattr(config, "dmc", None)
        self.gates = getattr(config, "gates", None)
        if self.gates is not None and self.gates["method"] not in ("dms", "dmc"):
            raise ValueError(f"gates for {self.gates['method']!r}: this file computes dms and dmc")
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
        if self.dmc is not None:
            q, k, v, bias = self.by_channel(q, k, v, angles)
        else:
            bias = bias_of(ages(k) >= 0)
            if self.gates is not None:
                k, v, bias = self.by_gates(x, k, v)
            q, k = rotate(q, angles), rotate(k, angles.repeat(k.shape[2] // q.shape[2], 1))
        q = q.unflatten(1, (self.kv_heads, -1))  # [B, K, G, T, H]
        scores = (q @ k[:, :, None].transpose(-1, -2)).float() * self.head_dim**-0.5
        weights = (scores + bias.unsqueeze(-3)).softmax(dim=-1)
        out = (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def by_channel(self, q, k, v, angles):
        """Queries and slots merged as a channel decides, rotated, and what to add to scores."""
        offset, eps = self.dmc["offset"], self.dmc["eps"]
        merges = k[..., -1].float() - offset > self.dmc["threshold"]  # [B, K, T]
        logits = q[..., -1].float().unflatten(1, (self.kv_heads, -1)).mean(dim=2)
        k, v, bias = merged(k, v, merges, torch.sigmoid(logits + offset) + eps, self.dmc)
        q, k = (
            without_last_channel(rotate(without_last_channel(x), angles)) for x in (q, k)
        )  # again after the rotation, which mixes the channel with its partner
        return q, k, v, bias

    def by_gates(self, x, k, v):
        """Keys and values that gates leave, unrotated, and what to add to scores."""
        logits = self.read_out(x, self.gate_weight, self.gate_bias) - self.gates["threshold"]
        if self.gates["method"] == "dms":
            age = ages(k)
            stays = (logits <= 0)[..., None, :] | (age < self.gates["delay"])
            return k, v, bias_of((age >= 0) & stays)
        importance = torch.ones_like(logits)
        if self.gate_importance_weight is not None:
            u = self.read_out(x, self.gate_importance_weight, self.gate_importance_bias)
            importance = torch.sigmoid(u) + self.gates["eps"]
        if self.gates.get("margin") is not None:
            dropped = logits > self.gates["margin"]
            importance = torch.where(dropped, NEXT_TO_NOTHING * importance, importance)
        return merged(k, v, logits > 0, importance, self.gates, self.gate_gamma)

    def read_out(self, x, weight, bias):
        """Read a number for every KV head and token [B, K, T] from x [B, T, D]."""
        standard = (x.float() - self.gate_mean) / self.gate_deviation
        return F.linear(standard, weight.float(), bias.float()).transpose(1, 2)


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
        if blocks := getattr(config, "block_configs", None):
            groups = [block["attention"]["n_heads_in_group"] for block in blocks]
            kv_heads = [config.num_attention_heads // group for group in groups]
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
            for part in (*OF_LAYERS, *OF_ROWS):
                own = gates.get(part)
                if own is not None:
                    own = own[index if part in OF_LAYERS else rows]
                    own = own.to(attention.k_proj.weight.device)
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
