"""From a Hugging Face config.json, or a table of the same keys in a recipe, to a ModelSpec.

Everything is decided by `architectures`: model_type names are shared by architectures that differ, and copied by
others. `FAMILIES` is the whole list; a key that an architecture has but that we would compute differently is an error,
never ignored. Configs of transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype) are
both read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from autotune.spec.config_file import config_file, read_config
from autotune.spec.config_keys import COMMON, DEEPSEEK, ROTARY_EXTRA, ROUTER, TENSOR_PARALLEL, WINDOW
from autotune.spec.errors import UsageError, nearest_divisor, nearest_name
from autotune.spec.fields import Fields, shown
from autotune.spec.heads import FORMS, heads_from
from autotune.spec.model import Experts, LatentAttention, ModelSpec

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Rotary scalings and the keys that each needs, as transformers names them (llama3: Llama 3.1; yarn: 2309.00071).
ROTARY: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def _no_window(fields: Fields, layers: int) -> int:
    """Full attention: the architecture has no such key, and one that is there anyway means nothing to it."""
    return 0


def _plain_window(fields: Fields, layers: int) -> int:
    """Every layer, unless the key is null. transformers' MistralConfig takes 4096 when it is not there at all."""
    return fields.integer("sliding_window", 0 if "sliding_window" in fields.raw else 4096)


def _mixtral_window(fields: Fields, layers: int) -> int:
    """Every layer, where the key is there."""
    return fields.integer("sliding_window", 0)


def _switched_window(fields: Fields, layers: int) -> int:
    """Only with use_sliding_window, which published configs have false beside a sliding_window that is not null."""
    return _plain_window(fields, layers) if fields.flag("use_sliding_window", False) else 0


def _late_window(fields: Fields, layers: int) -> int:
    """As `_switched_window`, on layers from max_window_layers on, or as layer_types lists them: all or none here."""
    window = _switched_window(fields, layers)
    start = fields.integer("max_window_layers", 28, least=0)
    listed = fields.names("layer_types")
    if not window:
        return 0
    sliding = [name == "sliding_attention" for name in listed] or [i >= start for i in range(layers)]
    if any(sliding) and not all(sliding):
        key = "layer_types" if listed else "max_window_layers"
        found = f"a sliding window on {sum(sliding)} of {layers} layers"
        fields.problem(
            key, found, "one attention window for all layers: 0 for all of them, or use_sliding_window false"
        )
    return window if any(sliding) else 0


def _no_bias(fields: Fields) -> tuple[bool, bool]:
    """No bias anywhere in attention."""
    return False, False


def _qkv_bias(fields: Fields) -> tuple[bool, bool]:
    """Always on queries, keys and values, never on the output: Qwen2 has no key for it."""
    return True, False


def _both_bias(fields: Fields) -> tuple[bool, bool]:
    """attention_bias is for queries, keys, values and the output alike."""
    bias = fields.flag("attention_bias", False)
    return bias, bias


def _mixtral_experts(fields: Fields, layers: int) -> Experts:
    """Every layer routed; an expert is as wide as intermediate_size says; weights of the chosen sum to one."""
    return Experts(
        count=fields.integer("num_local_experts", also=("num_experts",)),
        top_k=fields.integer("num_experts_per_tok"),
        ffn=fields.integer("intermediate_size"),
    )


def _qwen3_experts(fields: Fields, layers: int) -> Experts:
    """Routed every decoder_sparse_step layers, but for mlp_only_layers; no shared expert."""
    return Experts(
        count=fields.integer("num_experts", also=("num_local_experts",)),
        top_k=fields.integer("num_experts_per_tok"),
        ffn=fields.integer("moe_intermediate_size"),
        every=fields.integer("decoder_sparse_step", 1),
        dense_layers=fields.integers("mlp_only_layers", layers),
        normalise=fields.flag("norm_topk_prob", False),
    )


def _deepseek_experts(fields: Fields, layers: int, sigmoid: bool) -> Experts:
    """Dense layers first, then routed ones with shared experts; groups of experts limit the choice, where used."""
    fields.only("moe_layer_freq", 1, "other strides are read differently by different implementations")
    scoring = fields.choice("scoring_func", ("sigmoid" if sigmoid else "softmax",), "sigmoid" if sigmoid else "softmax")
    if not sigmoid:
        fields.only("norm_topk_prob", False, "implementations differ in what they normalise")
    methods = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    grouped = fields.choice("topk_method", methods, methods[0]) != "greedy"
    ffn = fields.integer("moe_intermediate_size")
    experts = Experts(
        count=fields.integer("n_routed_experts", also=("num_experts", "num_local_experts")),
        top_k=fields.integer("num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn * fields.integer("n_shared_experts", 0, least=0),
        first_layer=fields.integer("first_k_dense_replace", least=0),
        groups=fields.integer("n_group", None if grouped else 1),
        top_groups=fields.integer("topk_group", None if grouped else 1),
        scoring=scoring,
        normalise=fields.flag("norm_topk_prob", sigmoid),
        scale=fields.number("routed_scaling_factor", 2.5 if sigmoid else 1.0),
        score_bias=sigmoid,
    )
    if fields.fine("n_group", "n_routed_experts") and experts.count % experts.groups:
        nearest = str(nearest_divisor(experts.groups, experts.count))
        fields.problem("n_group", str(experts.groups), f"a divisor of n_routed_experts = {experts.count}", nearest)
    if fields.fine("n_group", "topk_group") and experts.top_groups > experts.groups:
        fields.problem(
            "topk_group", str(experts.top_groups), f"at most n_group = {experts.groups}", str(experts.groups)
        )
    return experts


def _deepseek2_experts(fields: Fields, layers: int) -> Experts:
    return _deepseek_experts(fields, layers, sigmoid=False)


def _deepseek3_experts(fields: Fields, layers: int) -> Experts:
    return _deepseek_experts(fields, layers, sigmoid=True)


@dataclass(frozen=True)
class Family:
    """What an architecture's configs say with the same keys, or leave unsaid.

    `model_type` is transformers' name, which its loaders look for and ours do not; `head_dim` the default (0:
    hidden_size / num_attention_heads), `own_kv_heads` whether a missing num_key_value_heads means one for each head,
    `ignored` keys of its own that change nothing here, whatever they say.
    """

    model_type: str
    bias: Callable[[Fields], tuple[bool, bool]] = _no_bias
    window: Callable[[Fields, int], int] = _no_window
    experts: Callable[[Fields, int], Experts] | None = None
    qk_norm: bool = False
    latent: bool = False
    head_dim: int = 0
    own_kv_heads: bool = False
    rope_theta: float = 10000.0
    ignored: frozenset[str] = frozenset()


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", bias=_both_bias, own_kv_heads=True, ignored=TENSOR_PARALLEL),
    "MistralForCausalLM": Family("mistral", window=_plain_window),
    "Qwen2ForCausalLM": Family("qwen2", bias=_qkv_bias, window=_late_window, ignored=WINDOW),
    "Qwen3ForCausalLM": Family(
        "qwen3", bias=_both_bias, window=_late_window, qk_norm=True, head_dim=128, ignored=WINDOW
    ),
    "MixtralForCausalLM": Family(
        "mixtral", window=_mixtral_window, experts=_mixtral_experts, rope_theta=1e6, ignored=ROUTER
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        bias=_both_bias,
        window=_switched_window,
        experts=_qwen3_experts,
        qk_norm=True,
        ignored=WINDOW | ROUTER,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2",
        bias=_both_bias,
        experts=_deepseek2_experts,
        latent=True,
        own_kv_heads=True,
        ignored=DEEPSEEK | TENSOR_PARALLEL,
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        bias=_both_bias,
        experts=_deepseek3_experts,
        latent=True,
        own_kv_heads=True,
        ignored=DEEPSEEK | TENSOR_PARALLEL,
    ),
}


def _architecture(fields: Fields) -> str | None:
    """The one known architecture that the config names; after a slip of spelling, the one that was meant."""
    listed = fields.value("architectures")
    name = listed[0] if isinstance(listed, list | tuple) and len(listed) == 1 else listed
    known = (*FAMILIES, *FORMS)
    if isinstance(name, str) and name in known:
        return name
    found = "no such key" if listed is None else shown(listed)
    nearest = nearest_name(name, known) if isinstance(name, str) else None
    fields.problem("architectures", found, f"one of {', '.join(known)}", nearest)
    slips = get_close_matches(name, known, n=1, cutoff=0.9) if isinstance(name, str) else []
    return slips[0] if slips else None


def _rotary(fields: Fields, default: float, inline: bool) -> tuple[float, tuple[tuple[str, float | int | str], ...]]:
    """Base and scaling: of rope_parameters where there is one, else of rope_theta and rope_scaling."""
    new, old = fields.table("rope_parameters"), fields.table("rope_scaling")
    where, items = ("rope_parameters", dict(new)) if new else ("rope_scaling", dict(old or {}))
    theta = fields.number("rope_theta", default)
    inner = Fields(items, fields.source)
    theta = inner.number("rope_theta", theta)
    kind = inner.choice("rope_type", tuple(ROTARY), "default", also=("type",))
    for key in ROTARY[kind]:
        inner.number(key)
    inner.only("partial_rotary_factor", 1.0, "part of a head without rotation is not supported")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    scaling: dict[str, float | int | str] = {"rope_type": kind}
    for key, value in items.items():
        if isinstance(value, str | int | float) and key not in known:
            scaling[key] = value
        elif value is not None and key not in known:
            inner.problem(key, shown(value), "a number or a name")
    if inline:
        inner.unknown(ROTARY_EXTRA[kind])
    for problem in inner.problems:
        fields.problem(f"{where}.{problem.key}", problem.found, problem.expected, problem.nearest)
    return theta, () if kind == "default" else tuple(sorted(scaling.items()))


def _heads(fields: Fields, family: Family, hidden: int) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim), with the checks that combine them."""
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads if family.own_kv_heads else None, null=heads)
    if fields.fine("num_attention_heads", "num_key_value_heads") and heads % kv_heads:
        nearest = str(nearest_divisor(kv_heads, heads))
        fields.problem("num_key_value_heads", str(kv_heads), f"a divisor of num_attention_heads = {heads}", nearest)
    if family.latent:
        return heads, kv_heads, 0
    head_dim = fields.integer("head_dim", family.head_dim, least=2)
    if not head_dim:
        head_dim = hidden // heads
        if fields.fine("num_attention_heads", "hidden_size") and hidden % heads:
            found = f"no such key, and hidden_size = {hidden} is no multiple of num_attention_heads = {heads}"
            fields.problem("head_dim", found, "the width of one head")
    if fields.fine("head_dim", "num_attention_heads", "hidden_size") and head_dim % 2:
        fields.problem("head_dim", str(head_dim), "an even number: rotary positions turn pairs", str(head_dim + 1))
    return heads, kv_heads, head_dim


def _latent(fields: Fields) -> LatentAttention:
    """The low-rank widths. q_lora_rank must be there: null says that queries are projected directly."""
    latent = LatentAttention(
        q_rank=fields.integer("q_lora_rank", least=0, null=0),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        v_dim=fields.integer("v_head_dim"),
    )
    if fields.fine("qk_rope_head_dim") and latent.rope_dim % 2:
        expected = "an even number: rotary positions turn pairs"
        fields.problem("qk_rope_head_dim", str(latent.rope_dim), expected, str(latent.rope_dim + 1))
    fields.only("rope_interleave", True, "only the published interleaved rotation is supported")
    return latent


def _masks(fields: Fields, latent: bool) -> tuple[int, int]:
    """(tokens drafted in one pass, distinct mask tokens), keys of our own: PARD (2504.18583, 3.1) has one mask for all
    places, ParallelSpec (2410.05589, 3.1) one for each."""
    drafts = fields.integer("parallel_draft", 0, least=2)
    if not drafts:
        if fields.value("parallel_masks") is not None:
            fields.problem("parallel_masks", "masks without parallel_draft", "parallel_draft, or no such key")
        return 0, 0
    masks = fields.integer("parallel_masks", 1)
    if masks > drafts - 1:
        expected = f"at most one for each token but the first: parallel_draft - 1 = {drafts - 1}"
        fields.problem("parallel_masks", str(masks), expected, str(drafts - 1))
    if latent:
        fields.problem(
            "parallel_draft", str(drafts), "attention with a key-value cache: latent attention drafts nothing"
        )
    return drafts, masks


def from_config(raw: Mapping[str, Any], source: str, name: str = "", *, inline: bool = False) -> ModelSpec:
    """A ModelSpec from config keys. `source` is the file they came from, for errors; `name` defaults to its name.

    `inline` says that a person wrote the keys: one that is neither read nor known of such configs is then an error. In
    a config.json only one that all but equals a key that is missing is.

    Raises UsageError with every problem at once: unknown architecture, missing or mistyped keys, heads that do not
    divide, and settings that this version would not compute as the architecture does.
    """
    if not isinstance(raw, Mapping):
        raise UsageError(f"{source}: found {type(raw).__name__}; expected a table of a model's settings")
    fields = Fields(raw, source)
    architecture = _architecture(fields)
    if architecture is None:
        fields.raise_problems("this model")
    assert architecture is not None
    if architecture in FORMS:
        made = heads_from(fields, architecture, name or _name(raw, source), DTYPES, inline)
        fields.raise_problems(f"these {architecture}")
        return made
    family = FAMILIES[architecture]
    hidden, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    heads, kv_heads, head_dim = _heads(fields, family, hidden)
    latent = _latent(fields) if family.latent else None
    experts = family.experts(fields, layers) if family.experts else None
    if experts and fields.fine("num_experts_per_tok") and experts.top_k > experts.count:
        found, most = str(experts.top_k), str(experts.count)
        fields.problem("num_experts_per_tok", found, f"at most the number of experts, {most}", most)
    qkv_bias, out_bias = family.bias(fields)
    drafts, masks = _masks(fields, family.latent)
    theta, scaling = _rotary(fields, family.rope_theta, inline)
    fields.choice("hidden_act", ("silu",), "silu")
    fields.only("mlp_bias", False, "a bias in the feed-forward is not supported")
    fields.only("attention_dropout", 0.0, "dropout is not supported")
    model = ModelSpec(
        name=name or _name(raw, source),
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=latent.nope_dim + latent.rope_dim if latent else head_dim,
        ffn=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        tied=fields.flag("tie_word_embeddings", False),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=family.qk_norm,
        window=family.window(fields, layers),
        max_positions=fields.integer("max_position_embeddings", 0),
        dtype=fields.choice("dtype", DTYPES, "bfloat16", also=("torch_dtype",)),
        experts=experts,
        latent=latent,
        extra_layers=fields.integer("num_nextn_predict_layers", 0, least=0, also=("num_mtp_layers",)),
        drafts=drafts,
        masks=masks,
    )
    if inline:
        fields.unknown(COMMON | family.ignored)
    else:
        fields.misspelled()
    fields.raise_problems(f"this {architecture}")
    return model


def _name(raw: Mapping[str, Any], source: str) -> str:
    """What the config calls itself, else its file's name, else (for a config.json) its folder's."""
    if isinstance(raw.get("name"), str) and raw["name"]:
        return str(raw["name"])
    path = Path(source)
    return path.parent.name if path.stem == "config" and path.parent.name else path.stem


def load_model(path: str | Path) -> ModelSpec:
    """The ModelSpec of a config.json, or of the config.json in a folder. Raises UsageError (see read_config,
    from_config)."""
    file = config_file(path)
    return from_config(read_config(file), str(file))
