"""Llama, Qwen, Gemma, GPT-2의 작은 모델도 학습, 병합, 대화의 세 단계를 지난다."""

import json

import pytest
import torch
from conftest import ROOT, call_script, run_script, write_rows
from tiny import build_tokenizer

from utils.model.configs import auto_config
from utils.model.targets import choose_targets

CHAT_TEMPLATE = ("{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
                 "{% if add_generation_prompt %}[assistant] {% endif %}")
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EVERY = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
TARGETS = {"llama": EVERY, "qwen3": EVERY, "gemma3_text": EVERY, "gpt2": {"c_attn"}}  # auto가 고르는 것


def build_model(kind: str, folder):
    """`kind` 구조의 무작위 모델과, 대화 템플릿이 든 토크나이저를 폴더에 쓴다."""
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256},
             "llama": SIZES | {"num_attention_heads": 3}}.get(kind, SIZES)  # kanana: hidden이 머리의 수로 나뉘지 않는다
    config = auto_config().for_model(kind, vocab_size=len(tokenizer) + 13, bos_token_id=0, eos_token_id=0,
                                  pad_token_id=None, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(folder)
    return folder


def write_data(kind: str, folder):
    """llama는 질문과 답, qwen은 질문 없는 글, 나머지는 textonly 형식으로 배운다."""
    if kind == "llama":
        rows = [{"instruction": f"{n} 더하기 {n}은?", "output": f"{2 * n}입니다."} for n in range(12)]
        text = json.dumps(rows, ensure_ascii=False)
    elif kind == "qwen3":
        text = "\n".join(json.dumps({"text": f"{n}은 수다."}, ensure_ascii=False) for n in range(12))
    else:
        return write_rows(folder / "rows.json", 12)
    (folder / "rows.json").write_text(text, encoding="utf-8")
    return folder / "rows.json"


@pytest.mark.parametrize("kind", TARGETS)
def test_all_three_stages(kind, tmp_path, capsys):
    base = build_model(kind, tmp_path / kind)
    data = write_data(kind, tmp_path)
    run, merged = tmp_path / "run", tmp_path / "merged"
    template = "chat" if kind == "llama" else "default"

    trained = call_script(capsys, "finetune-lora.py", "--base_model", str(base), "--data_path", str(data),
                          "--output_dir", str(run), "--cutoff_len", "64", "--batch_size", "8",
                          "--num_train_epochs", "1", "--val_set_size", "20", "--lora_target_modules", "auto",
                          "--prompt_template", template)
    assert "다른 길을 쓴다" not in trained
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(config["target_modules"]) == TARGETS[kind]
    prompt = json.loads((run / "prompt.json").read_text(encoding="utf-8"))
    assert (prompt["template"]["name"] == "chat") == (template == "chat")

    call_script(capsys, "merge-lora.py", "--peft_root", str(run), "--output_dir", str(merged))
    for source in (["--peft_root", str(run)], ["--base_model", str(merged)]):
        asked = call_script(capsys, "generate.py", *source, "--ask", "3 더하기 3은?")
        assert "[토큰 " in asked and "\ufffd" not in asked  # 한 토큰 만에 멈추면 속도는 없다


def test_default_targets_follow_the_architecture():
    default = ("query_key_value",)
    assert choose_targets(default, {"model_type": "gpt_neox"}) == default
    for kind, targets in TARGETS.items():
        names = EVERY if targets == EVERY else {"c_attn", "c_proj", "c_fc"}
        assert set(choose_targets(default, {"model_type": kind}, names)) == targets
        assert set(choose_targets(("auto",), {"model_type": kind}, names)) == targets
        assert set(choose_targets(("attention",), {"model_type": kind}, names)) == targets & (ATTENTION | {"c_attn"})
    assert set(choose_targets(("auto",), {"model_type": "qwen3_next"}, {*EVERY, "in_proj_qkvz"})) == ATTENTION
    assert choose_targets(("q_proj",), {"model_type": "llama"}) == ("q_proj",)


def test_unknown_target_is_refused_by_name(tiny_neox, tiny_data, tmp_path):
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data), "--cutoff_len",
                      "64", "--output_dir", str(tmp_path / "run"), "--lora_target_modules", "q_proj,v_proj", cwd=ROOT)
    assert done.returncode == 2
    assert "q_proj, v_proj" in done.stderr and "query_key_value" in done.stderr
