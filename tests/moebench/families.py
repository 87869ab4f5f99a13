"""Families of models: the keys of their configurations, each with the file that the keys were taken from.

Paths of sources are in github.com/huggingface/transformers, folder src/transformers/models, or name a published
config.json on the Hugging Face hub.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Family(NamedTuple):
    source: str
    config: dict[str, Any]
    shape: str  # as moebench writes it
    notes: tuple[str, ...] = ()  # a part of each note
    fields: Mapping[str, Any] = MappingProxyType({})  # what differs from swiglu without biases and limits


def _config(model_type: str, experts: int, top_k: int, dim: int, inter: int, *keys: str, **more: Any) -> dict[str, Any]:
    """Return a configuration whose keys of experts, top-k and inner size are named by `keys`."""
    return {"model_type": model_type, keys[0]: experts, keys[1]: top_k, "hidden_size": dim, keys[2]: inter, **more}


_QWEN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_DEEPSEEK = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_MIXTRAL = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
_ERNIE = ("moe_num_experts", "moe_k", "moe_intermediate_size")
_STEP = ("moe_num_experts", "moe_top_k", "moe_intermediate_size")
_HUNYUAN = ("num_experts", "moe_topk", "moe_intermediate_size")
_SILU = {"hidden_act": "silu", "torch_dtype": "bfloat16"}
_DENSE = {"intermediate_size": 12288, **_SILU}

FAMILIES: dict[str, Family] = {
    "qwen3-moe": Family(
        "qwen3_moe/configuration_qwen3_moe.py",
        _config("qwen3_moe", 128, 8, 2048, 768, *_QWEN, **_DENSE, mlp_only_layers=[], decoder_sparse_step=1),
        "e128k8d2048i768",
    ),
    "qwen3-next": Family(
        "qwen3_next/configuration_qwen3_next.py",
        _config("qwen3_next", 512, 10, 2048, 512, *_QWEN, **_DENSE, shared_expert_intermediate_size=512),
        "e512k10d2048i512",
        ("shared experts are left out (shared_expert_intermediate_size = 512)",),
    ),
    "mixtral": Family(
        "mixtral/configuration_mixtral.py",
        _config("mixtral", 8, 2, 4096, 14336, *_MIXTRAL, **_SILU),
        "e8k2d4096i14336",
    ),
    "deepseek-v2": Family(
        "deepseek_v2/configuration_deepseek_v2.py",
        _config("deepseek_v2", 64, 6, 2048, 1408, *_DEEPSEEK, **_DENSE, n_shared_experts=2, mlp_bias=False),
        "e64k6d2048i1408",
        ("n_shared_experts = 2",),
    ),
    "deepseek-v3": Family(
        "deepseek_v3/configuration_deepseek_v3.py; quantization_config: huggingface.co/deepseek-ai/DeepSeek-V3",
        _config(
            *("deepseek_v3", 256, 8, 7168, 2048, *_DEEPSEEK),
            **_DENSE,
            n_shared_experts=1,
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
        ),
        "e256k8d7168i2048",
        ("n_shared_experts = 1", "quantized (fp8)"),
    ),
    "gpt-oss": Family(
        "gpt_oss/configuration_gpt_oss.py (hidden_act is silu there; the code interleaves, clamps and adds biases)",
        _config("gpt_oss", 128, 4, 2880, 2880, *_MIXTRAL, hidden_act="silu", swiglu_limit=7.0, experts_per_token=4),
        "e128k4d2880i2880",
        fields={
            "expert_activation": "quick_geglu",
            "expert_bias": True,
            "activation_alpha": 1.702,
            "activation_limit": 7.0,
        },
    ),
    "glm4-moe": Family(
        "glm4_moe/configuration_glm4_moe.py",
        _config("glm4_moe", 128, 8, 4096, 1408, *_DEEPSEEK, **_DENSE, n_shared_experts=1, attention_bias=True),
        "e128k8d4096i1408",
        ("n_shared_experts = 1",),
    ),
    "olmoe": Family(
        "olmoe/configuration_olmoe.py",
        _config("olmoe", 64, 8, 2048, 1024, "num_experts", "num_experts_per_tok", "intermediate_size", **_SILU),
        "e64k8d2048i1024",
    ),
    "kimi": Family(
        "huggingface.co/moonshotai/Kimi-K2-Instruct (keys of DeepSeek-V3)",
        _config("kimi_k2", 384, 8, 7168, 2048, *_DEEPSEEK, **_DENSE, n_shared_experts=1),
        "e384k8d7168i2048",
        ("n_shared_experts = 1",),
    ),
    "minimax": Family(
        "minimax/configuration_minimax.py",
        _config("minimax", 32, 2, 6144, 9216, *_MIXTRAL, **_SILU),
        "e32k2d6144i9216",
    ),
    "nemotron-h": Family(
        "nemotron_h/configuration_nemotron_h.py",
        _config(
            *("nemotron_h", 128, 6, 2688, 1856, *_DEEPSEEK),
            mlp_hidden_act="relu2",
            mamba_hidden_act="silu",
            intermediate_size=1856,
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=3712,
            moe_latent_size=None,
            use_bias=False,
            mlp_bias=False,
            dtype="bfloat16",
        ),
        "e128k6d2688i1856",
        ("n_shared_experts = 1, moe_shared_expert_intermediate_size = 3712",),
        {"expert_activation": "relu2"},
    ),
    "granite-moe": Family(
        "granitemoeshared/configuration_granitemoeshared.py",
        _config("granitemoeshared", 40, 8, 1536, 512, *_MIXTRAL, **_SILU, shared_intermediate_size=1024),
        "e40k8d1536i512",
        ("shared_intermediate_size = 1024",),
    ),
    "llama4": Family(
        "llama4/configuration_llama4.py (nested text_config, vision_config beside it)",
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1408, "intermediate_size": 5632, "hidden_act": "gelu"},
            "text_config": _config(
                *("llama4_text", 16, 1, 5120, 8192, *_MIXTRAL), hidden_act="silu", intermediate_size_mlp=16384
            ),
        },
        "e16k1d5120i8192",
        ("one shared expert", "multiplies an expert's input"),
    ),
    "ernie": Family(
        "ernie4_5_moe/configuration_ernie4_5_moe.py",
        _config("ernie4_5_moe", 64, 6, 2560, 1536, *_ERNIE, **_DENSE, moe_num_shared_experts=2, use_bias=False),
        "e64k6d2560i1536",
        ("moe_num_shared_experts = 2",),
    ),
    "minimax-m2": Family(
        "minimax_m2/configuration_minimax_m2.py",
        _config("minimax_m2", 256, 8, 3072, 1536, *_MIXTRAL, **_SILU),
        "e256k8d3072i1536",
    ),
    "qwen2-moe": Family(
        "qwen2_moe/configuration_qwen2_moe.py",
        _config("qwen2_moe", 60, 4, 2048, 1408, *_QWEN, **_DENSE, shared_expert_intermediate_size=5632),
        "e60k4d2048i1408",
        ("shared_expert_intermediate_size = 5632",),
    ),
    "qwen3.5": Family(
        "qwen3_5_moe/configuration_qwen3_5_moe.py (nested text_config, its own dtype)",
        {
            "model_type": "qwen3_5_moe",
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "hidden_act": "gelu_pytorch_tanh"},
            "text_config": _config("qwen3_5_moe_text", 256, 8, 2048, 512, *_QWEN, hidden_act="silu", dtype="float16"),
        },
        "e256k8d2048i512",
    ),
    "phi3.5-moe": Family(
        "phimoe/configuration_phimoe.py",
        _config("phimoe", 16, 2, 4096, 6400, *_MIXTRAL, **_SILU, attention_bias=True, lm_head_bias=True),
        "e16k2d4096i6400",
    ),
    "jamba": Family(
        "jamba/configuration_jamba.py",
        _config(
            *("jamba", 16, 2, 4096, 14336, "num_experts", "num_experts_per_tok", "intermediate_size"),
            **_SILU,
            mamba_proj_bias=False,
        ),
        "e16k2d4096i14336",
    ),
    "dbrx": Family(
        "dbrx/configuration_dbrx.py (d_model outside, ffn_config inside)",
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "attn_config": {"kv_n_heads": 8},
            "ffn_config": {
                "ffn_act_fn": {"name": "silu"},
                "ffn_hidden_size": 10752,
                "moe_num_experts": 16,
                "moe_top_k": 4,
            },
        },
        "e16k4d6144i10752",
    ),
    "hunyuan": Family(
        "hunyuan_v1_moe/configuration_hunyuan_v1_moe.py; lists: huggingface.co/tencent/Hunyuan-A13B-Instruct",
        _config(
            *("hunyuan_v1_moe", 64, 0, 4096, 0, *_HUNYUAN),
            **_DENSE,
        )
        | {"moe_topk": [8] * 32, "moe_intermediate_size": [3072] * 32, "num_shared_expert": [1] * 32},
        "e64k8d4096i3072",
        ("shared experts are left out (num_shared_expert",),
    ),
    "dots1": Family(
        "dots1/configuration_dots1.py",
        _config("dots1", 128, 6, 4096, 1408, *_DEEPSEEK, **_DENSE, n_shared_experts=2),
        "e128k6d4096i1408",
        ("n_shared_experts = 2",),
    ),
    "step3.5": Family(
        "huggingface.co/stepfun-ai/Step-3.5-Flash",
        _config("step3p5", 288, 8, 4096, 1280, *_STEP, **_DENSE, share_expert_dim=1280),
        "e288k8d4096i1280",
        ("share_expert_dim = 1280",),
    ),
    "bailing": Family(
        "class BailingMoeV2Config of github.com/vllm-project/vllm-omni (Ling-mini-2.0)",
        _config("bailing_moe", 256, 8, 2048, 512, *_QWEN, **_DENSE, num_shared_experts=1, use_bias=False),
        "e256k8d2048i512",
        ("num_shared_experts = 1",),
    ),
    "lfm2-moe": Family(
        "lfm2_moe/configuration_lfm2_moe.py (no activation is named; use_expert_bias is a bias of the router)",
        _config(
            *("lfm2_moe", 32, 4, 2048, 1792, *_QWEN), intermediate_size=7168, use_expert_bias=True, conv_bias=False
        ),
        "e32k4d2048i1792",
    ),
    "gemma4": Family(
        "gemma4/configuration_gemma4.py (text_config)",
        {
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                "num_experts": 128,
                "top_k_experts": 8,
                "hidden_size": 2816,
                "moe_intermediate_size": 704,
                "intermediate_size": 2112,
                "hidden_activation": "gelu_pytorch_tanh",
            },
        },
        "e128k8d2816i704",
        fields={"expert_activation": "geglu"},
    ),
    "kimi-linear": Family(
        "huggingface.co/moonshotai/Kimi-Linear-48B-A3B-Instruct",
        _config(
            *("kimi_linear", 256, 8, 2304, 1024, "num_experts", "num_experts_per_token", "moe_intermediate_size"),
            **_DENSE,
            num_shared_experts=1,
        ),
        "e256k8d2304i1024",
        ("num_shared_experts = 1",),
    ),
}
