"""어떤 설정의 모델이든 학습한 것이 그 모델이고, 합친 것이 배운 것이고, 답이 transformers의 것과 같다.

구조마다 설정을 뽑아(활성화, bias, rotary의 비율, 묶임, kv group, norm, 배율, soft cap, 창, 잔차의 모양) 작은 모델을
만들고 세 단계를 모두 지나며 transformers와 peft로 따로 구한 값과 비교한다. `-m slow`로 청하면 구조마다 스무 가지다.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import load_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from road import walk
from tiny import tiny

from utils.errors import UsageError

NORMS = (1e-5, 1e-2)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG = ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, ROPE,
        {"rope_type": "llama3", "factor": 4.0, "rope_theta": 10000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 36},
        {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20,
         "short_factor": [1.0], "long_factor": [4.0]})
PARTS = tuple({**ROPE, "partial_rotary_factor": share} for share in (0.25, 0.5, 1.0))
LAYERS = (["sliding_attention", "full_attention"], ["full_attention"] * 2, ["sliding_attention"] * 2)
ACTS = ("gelu_pytorch_tanh", "silu", "relu")
# 구조 -> 설정의 이름 -> 뽑을 값들. 앞의 값이 흔하지 않은 값이다: hypothesis는 그것부터 뽑는다
LLAMA = {"hidden_act": ACTS, "attention_bias": (True, False), "mlp_bias": (True, False),
         "tie_word_embeddings": (True, False), "num_key_value_heads": (1, 2, 4), "rms_norm_eps": NORMS,
         "head_dim": (32, 16), "rope_parameters": LONG}
SHORT = {name: LLAMA[name] for name in ("hidden_act", "tie_word_embeddings", "num_key_value_heads", "rms_norm_eps")}
SCALES = {"embedding_multiplier": (3.0, 1.0), "logits_scaling": (4.0, 1.0), "residual_multiplier": (0.4, 1.0),
          "attention_multiplier": (0.3, 0.25)}
FAMILIES = {
    "gpt_neox": {"hidden_act": ("gelu", "gelu_fast", "relu"), "attention_bias": (False, True),
                 "use_parallel_residual": (True, False), "tie_word_embeddings": (True, False),
                 "rope_parameters": PARTS[::-1], "layer_norm_eps": NORMS, "num_attention_heads": (2, 4)},
    "llama": LLAMA,
    "mistral": {**SHORT, "head_dim": (32, 16), "sliding_window": (8, None)},
    "qwen2": {**SHORT, "use_sliding_window": (True, False), "layer_types": LAYERS, "sliding_window": (8, 16)},
    "qwen3": {**SHORT, "head_dim": (32, 16), "attention_bias": (True, False)},
    "gemma": {"hidden_activation": ACTS, "num_key_value_heads": (1, 2, 4), "attention_bias": (True, False)},
    "gemma2": {"hidden_activation": ACTS, "num_key_value_heads": (1, 2, 4), "final_logit_softcapping": (2.0, None),
               "attn_logit_softcapping": (1.0, None, 50.0), "query_pre_attn_scalar": (4, 256), "layer_types": LAYERS,
               "sliding_window": (8, 16), "tie_word_embeddings": (False, True)},
    "gemma3_text": {"num_key_value_heads": (1, 2, 4), "final_logit_softcapping": (2.0, None), "layer_types": LAYERS,
                    "query_pre_attn_scalar": (4, 256), "sliding_window": (8, 16)},
    "exaone4": {**SHORT, "layer_types": LAYERS, "sliding_window": (8, 16)},
    "hyperclovax": {**SHORT, **SCALES},
    "granite": {**SHORT, **SCALES, "attention_bias": (True, False), "mlp_bias": (True, False)},
    "cohere": {"logit_scale": (0.25, 1.0), "use_qk_norm": (True, False), "attention_bias": (True, False),
               "tie_word_embeddings": (False, True), "num_key_value_heads": (1, 2, 4)},
    "phi3": {**SHORT, "sliding_window": (8, None), "rope_parameters": PARTS},
    "olmo2": {**SHORT, "attention_bias": (True, False)},
    "gpt2": {"activation_function": ("relu", "gelu_new"), "scale_attn_by_inverse_layer_idx": (True, False),
             "scale_attn_weights": (False, True), "tie_word_embeddings": (False, True), "n_inner": (96, None)},
    "bloom": {"apply_residual_connection_post_layernorm": (True, False), "tie_word_embeddings": (False, True),
              "layer_norm_epsilon": NORMS},
    "falcon": {"new_decoder_architecture": (True, False), "multi_query": (True, False), "parallel_attn": (True, False),
               "bias": (True, False), "alibi": (True, False), "tie_word_embeddings": (False, True)},
    "apertus": {name: SHORT[name] for name in ("tie_word_embeddings", "num_key_value_heads", "rms_norm_eps")},
    "llama4_text": {name: SHORT[name] for name in ("tie_word_embeddings", "num_key_value_heads", "rms_norm_eps")},
    "mixtral": {**SHORT, "sliding_window": (8, None), "num_experts_per_tok": (1, 2)},
    "stablelm": {"use_qkv_bias": (True, False), "qk_layernorm": (True, False), "rope_parameters": PARTS,
                 "use_parallel_residual": (True, False), "tie_word_embeddings": (True, False)},
}


# 값의 쓰임이 저마다 다른 구조. 나머지는 -m slow에서 본다
QUICK = ("gpt_neox", "llama", "qwen2", "gemma2", "gemma3_text", "exaone4", "granite", "cohere", "gpt2", "bloom",
         "falcon", "apertus", "mixtral")


def check(family: str, drawn: dict) -> None:
    with tempfile.TemporaryDirectory() as place:
        base = tiny(family, Path(place) / family, **drawn)
        road = walk(base, Path(place) / "road", val_set_size=0)
    assert road.outcome in ("pass", "fallback"), f"{road.outcome}: {road.note}\n{road.gaps}\n{road.said}"
    assert set(road.gaps) >= {"loss", "gradient", "merged", "merged_4bit", "answer", "answer_4bit"}


def drawing(examples: int):
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


def configs(family: str):
    drawn = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FAMILIES[family].items()})
    return drawn.filter(lambda fields: not fields.get("new_decoder_architecture") or fields["parallel_attn"])


@pytest.mark.parametrize("family", QUICK)
def test_a_drawn_model_passes_the_whole_road(family):
    drawing(1)(given(configs(family))(lambda drawn: check(family, drawn)))()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_drawn_models_pass_the_whole_road(family):
    drawing(20)(given(configs(family))(lambda drawn: check(family, drawn)))()


@pytest.mark.parametrize("kind", ["codegen", "mpt"])
def test_the_proof_and_the_samples_stay_within_the_context(kind, tmp_path):
    road = walk(tiny(kind, tmp_path / "base"), tmp_path / "road", both_bases=False, val_set_size=13)
    assert road.outcome in ("pass", "fallback"), f"{road.note}\n{road.said}"
    assert "예시 답을 모두 만들지 못했다" not in road.said


def test_a_model_with_an_integer_table_is_proved(tmp_path):
    road = walk(tiny("deepseek_v4", tmp_path / "base"), tmp_path / "road", val_set_size=0)
    assert road.outcome in ("pass", "fallback"), f"{road.note}\n{road.said}"


def test_layers_built_from_several_tensors_are_not_trained(tmp_path):
    """합칠 수 없는 층은 auto가 고르지 않고, 적으면 데이터를 읽기 전에 거절한다."""
    base = tiny("hrm_text", tmp_path / "base")
    road = walk(base, tmp_path / "road", both_bases=False, val_set_size=0)
    assert road.outcome in ("pass", "fallback"), f"{road.note}\n{road.said}"
    road = walk(base, tmp_path / "asked", lora_target_modules=("k_proj",))
    assert road.outcome == "refused_start" and "배워도 합칠 수 없다: k_proj" in road.note
    merge = load_script("merge-lora.py").merge
    with pytest.raises(UsageError, match="NF4를 다녀온 값을 적을 수 없다"):
        merge(peft_root=str(tmp_path / "road" / "run"), output_dir=str(tmp_path / "new"), merge_onto="quantized")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["openai-gpt", "minimax", "moshi"])
def test_a_model_without_a_usable_cache_answers_as_transformers_does(kind, tmp_path):
    """cache를 받지 않는 구조, 제 cache만 받는 구조, 창을 설정에만 적고 mask에는 두지 않은 구조."""
    road = walk(tiny(kind, tmp_path / "base"), tmp_path / "road", both_bases=False, val_set_size=0)
    assert road.outcome in ("pass", "fallback"), f"{road.note}\n{road.said}"


@pytest.mark.parametrize("kind", ["exaone_moe", "dots1"])
def test_layers_that_peft_moves_to_the_experts_are_not_trained(kind, tmp_path):
    """전문가들을 한데 담은 가중치의 LoRA는 합칠 수 없다. 그 이름들은 auto가 고르지 않고, 적으면 먼저 거절한다."""
    base = tiny(kind, tmp_path / "base")
    road = walk(base, tmp_path / "road", both_bases=False, val_set_size=0)
    assert road.outcome in ("pass", "fallback"), f"{road.note}\n{road.said}"
    road = walk(base, tmp_path / "asked", lora_target_modules=("gate_proj", "up_proj"))
    assert road.outcome == "refused_start" and "배워도 합칠 수 없다: gate_proj" in road.note


def test_weights_that_cannot_be_merged_are_not_trained(tmp_path):
    base = tiny("llama", tmp_path / "base", dtype=torch.float64)
    road = walk(base, tmp_path / "road")
    assert road.outcome == "refused_start" and "F64" in road.note, f"{road.note}\n{road.said}"


def test_a_layer_that_peft_refuses_is_named_before_the_data(tmp_path):
    road = walk(tiny("mamba2", tmp_path / "base"), tmp_path / "road", lora_target_modules=("all",))
    assert road.outcome == "refused_start" and "'out_proj'" in road.note, f"{road.note}\n{road.said}"


def test_an_adapter_that_cannot_be_loaded_again_is_not_trained(tmp_path):
    road = walk(tiny("inkling2_text", tmp_path / "base"), tmp_path / "road", both_bases=False, val_set_size=0)
    assert road.outcome == "refused_check" and "다시 얹지 못한다" in road.note, f"{road.note}\n{road.said}"
