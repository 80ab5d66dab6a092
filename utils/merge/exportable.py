"""GGUF로 옮길 수 있는 모델인지: 아는 구조, GGUF에 적을 자리가 있는 설정, llama.cpp가 하는 계산."""

from utils.errors import UsageError
from utils.model.configs import auto_config

ARCHITECTURES = {"gpt_neox": "gptneox", "llama": "llama"}
# GGUF에 적거나 tensor로 나타나는 설정
_EXPRESSED = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "intermediate_size", "max_position_embeddings", "layer_norm_eps", "rms_norm_eps",
              "attention_bias", "mlp_bias", "tie_word_embeddings", "use_parallel_residual", "rope_parameters",
              "rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base", "partial_rotary_factor", "hidden_act",
              "bos_token_id", "eos_token_id", "pad_token_id"}
# 답하는 계산을 바꾸지 않는 설정
_HARMLESS = {"attention_dropout", "hidden_dropout", "classifier_dropout", "initializer_range", "use_cache", "dtype",
             "architectures", "model_type", "transformers_version", "_name_or_path", "pretraining_tp", "id2label",
             "label2id", "output_attentions", "output_hidden_states", "return_dict", "problem_type", "num_labels",
             "_attn_implementation", "torch_dtype", "chunk_size_feed_forward", "tokenizer_class"}
# llama.cpp가 이 구조에서 쓰는 활성 함수
_ACTIVATIONS = {"gpt_neox": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "llama": ("silu", "swish")}


def require_exportable(config: dict) -> None:
    """합치기 전에 옮길 수 있는 모델인지 설정의 항목마다 본다.

    Raises:
        UsageError: 모르는 구조거나, GGUF에 적을 자리가 없는 설정이 있다.
    """
    import_gguf()
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise UsageError(f"GGUF로 옮길 줄 모르는 구조다: {kind} (아는 것: {', '.join(ARCHITECTURES)})")
    usual = auto_config().for_model(kind).to_dict()
    for name, value in config.items():
        if name in usual and name not in _EXPRESSED | _HARMLESS and value != usual[name]:
            raise UsageError(f"GGUF로 옮길 줄 모르는 설정이다: {name}={value!r}")
    activation = config.get("hidden_act", usual["hidden_act"])
    if activation not in _ACTIVATIONS[kind]:
        raise UsageError(f"GGUF로 옮길 줄 모르는 활성 함수다: hidden_act={activation!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary 방식이다: {config.get('rope_scaling') or rope}")
    width = rotary_share(config) * head_dim_of(config)
    if kind == "gpt_neox" and width % 2:
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary의 폭이다: {width:g}(짝수만 안다)")
    if kind == "llama" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary 방식이다: {rope}")


def import_gguf():
    """gguf 패키지. 쓸 때에만 설치하면 된다.

    Raises:
        UsageError: 설치되지 않았다.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF를 쓰려면 gguf가 있어야 한다: python -m pip install gguf") from None
    return gguf


def head_dim_of(config: dict) -> int:
    """attention head 하나의 폭."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotary_share(config: dict) -> float:
    """head의 폭 가운데 회전하는 몫(0에서 1)."""
    rope = config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
