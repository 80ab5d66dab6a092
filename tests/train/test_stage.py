"""학습 단계는 잘못된 입력을 모델을 올리기 전에 한 줄로 거절하고, 좋은 입력으로는 어댑터와 기록을 남긴다."""

import json
import os
import re
import shutil

import conftest
import pytest
from conftest import ROOT, load_script, run_script, train_settings

from utils.console import one_line
from utils.model import adapter
from utils.model.targets import choose_targets, linear_names
from utils.prompter import EXAMPLES, Prompter
from utils.train import defaults, results, stage
from utils.train.records import Recipe, Schedule

finetune_lora = load_script("finetune-lora.py")


def refuse(capsys, *flags: str) -> str:
    return conftest.refuse(capsys, finetune_lora.train, *flags, retired=finetune_lora.RETIRED)


@pytest.mark.parametrize("flags, named", [
    (["--num_epoch", "3"], "--num_train_epochs"),
    (["--batch_size", "0", "--lora_dropout", "1", "--val_set_size", "100"], "lora_dropout"),
    (["--batch_size", "16", "--micro_batch_size", "5"], "4, 8"),
    (["--learning_rate", "fast"], "숫자"),
    (["--dpo_beta", "0"], "dpo_beta는 0보다 크고"),
    (["--report_to", "mlflow"], "tensorboard"),
    (["--early_stopping_patience", "2", "--val_set_size", "0"], "검증"),
])
def test_bad_flags(capsys, flags, named):
    assert named in refuse(capsys, *flags)


@pytest.mark.parametrize("name, content, named", [
    ("rows.json", '{"text": "가"}\n{"text": \n', "2번째 줄"),
    ("rows.json", "", "비었다"),
    ("rows.json", '{"text": "가"}\n{"글": "나"}\n', "2번째 행"),
    ("rows.json", '{"question": "가"}\n', "question"),
    ("rows.json", '[{"text": "가"}, {"text": ', "2번째 행"),
    ("rows.json", "3\n", "1번째 행"),
    ("rows.json", '{"prompt": "가", "chosen": "나", "rejected": "다"}\n{"prompt": "가", "completion": "나"}\n',
     "섞여 있다"),
    ("rows.xlsx", "가", "xlsx"),
    ("rows.csv", "text\n\n", "비었다"),
])
def test_bad_data_is_named_and_nothing_is_written(capsys, tmp_path, tiny_neox, name, content, named):
    data = tmp_path / name
    data.write_text(content, encoding="utf-8")
    error = refuse(capsys, "--base_model", str(tiny_neox), "--data_path", str(data), "--cutoff_len", "64",
                   "--output_dir", str(tmp_path / "out"))
    assert named in error
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_missing_data_names_the_command_that_fetches_it(capsys, tiny_neox):
    named = "ko-datasets/KoAlpaca_v1.1a_textonly.json"
    assert "download-koalpaca.py" in refuse(capsys, "--base_model", str(tiny_neox), "--data_path", named)
    assert "none.json" in refuse(capsys, "--base_model", str(tiny_neox), "--data_path", "none.json")


def test_missing_base_names_the_command_that_fetches_it(capsys, tiny_data):
    error = refuse(capsys, "--base_model", "resources/polyglot-ko-1.3b-none", "--data_path", str(tiny_data))
    assert "hf download EleutherAI/polyglot-ko-1.3b" in error


def test_folder_that_is_no_model(capsys, tmp_path, tiny_data):
    assert "config.json" in refuse(capsys, "--base_model", str(tmp_path), "--data_path", str(tiny_data))


def test_block_longer_than_the_context(capsys, tiny_neox, tiny_data):
    error = refuse(capsys, "--base_model", str(tiny_neox), "--data_path", str(tiny_data), "--cutoff_len", "256")
    assert "128" in error


def test_run_leaves_an_adapter_that_describes_itself(tiny_run, tiny_neox):
    run = json.loads((tiny_run / "run.json").read_text(encoding="utf-8"))
    info = adapter.read_prompt_info(tiny_run)
    assert run["eval_loss_after"] < run["eval_loss_before"]
    assert info.end_token == "<|endoftext|>" and info.end_token_id == 2 and info.template["name"] == "default"
    assert adapter.find_adapter(tiny_run) == tiny_run
    assert adapter.read_adapter_config(tiny_run)["base_model_name_or_path"] == str(tiny_neox)
    for name in ("curves.png", "samples.md", "adapter_model.safetensors"):
        assert (tiny_run / name).stat().st_size > 0


def test_a_relative_base_is_recorded_as_a_path_that_any_folder_finds(lab, tiny_neox, tmp_path):
    """README의 명령은 모두 상대 경로다. PEFT의 영어 경고도 나오지 않는다."""
    done = lab.train(tmp_path / "run", base_model=os.path.relpath(tiny_neox, ROOT))
    assert done.code == 0 and "Warning" not in done.text, done.text
    assert adapter.read_adapter_config(tmp_path / "run")["base_model_name_or_path"] == str(tiny_neox)


@pytest.mark.parametrize("learned", ["default", "instruction-output"])
def test_another_template_than_the_base_has_learned_is_told(learned, tiny_neox, tiny_data, tmp_path):
    """합친 모델을 더 가르칠 때 템플릿을 빠뜨리면, 앞서 배운 꼴과 다른 글을 말없이 배운다."""
    base, lines = shutil.copytree(tiny_neox, tmp_path / "merged"), []
    adapter.write_prompt_info(base, adapter.PromptInfo(Prompter(learned).template, "<|endoftext|>", 2, 64))
    stage.prepare(train_settings(base_model=str(base), data_path=str(tiny_data), cache_dir=str(tmp_path / "cache"),
                                 cutoff_len=64), lines.append)
    told = [line for line in lines if "--prompt_template instruction-output" in line]
    assert len(told) == (learned != "default")


def test_run_says_how_many_answers_stopped_by_themselves():
    samples = [{"kind": "검증 질문", "base": "", "base_finish": "stop", "tuned": "", "tuned_finish": finish}
               for finish in ("stop", "length", "stop")]
    assert "검증 질문 3개 가운데" in results.stopped_line(samples) and "2개" in results.stopped_line(samples)


def test_samples_ask_the_users_own_questions(tiny_run, tiny_data):
    text = (tiny_run / "samples.md").read_text(encoding="utf-8")
    questions = re.findall(r"^## \d+\. 검증 질문\n\n> (\d+) 더하기 \1는\?  $", text, re.M)
    assert len(questions) == text.count("\n## ")
    asked = json.loads((tiny_run / "run.json").read_text(encoding="utf-8"))["data"]["questions"]
    assert asked == [f"{number} 더하기 {number}는?" for number in questions[:3]]  # 페이지의 예시
    assert not [question for question, _ in EXAMPLES if question in text]
    assert "endoftext" not in text and "### 질문" not in text


def test_run_describes_itself_in_korean(tiny_run, tiny_neox, tiny_data):
    text = (tiny_run / "README.md").read_text(encoding="utf-8")
    names = f"`{tiny_neox.name}`", f"`{tiny_data.name}`"
    for said in (*names, "40행", "2 epoch", "--peft_root", "merge-lora.py", "검증 loss"):
        assert said in text
    assert "More Information Needed" not in text
    for checkpoint in tiny_run.glob("checkpoint-*"):
        assert not (checkpoint / "README.md").exists()


def test_one_line():
    assert one_line("가\n\n 나") == "가 나" and one_line(" ") == "(빈 답)"
    assert one_line("가" * 500, 120) == "가" * 120 + "…"


def test_validation_counts_only_answers_whatever_is_learnt(tiny_neox, tiny_data, tmp_path):
    """검증 loss는 학습하는 자리를 바꾸어도 같은 것을 잰다."""
    inputs = [stage.prepare(train_settings(
        base_model=str(tiny_neox), data_path=str(tiny_data), cache_dir=str(tmp_path), cutoff_len=64, val_set_size=20.0,
        train_on_inputs=flag, lora_target_modules=("auto",)), lambda line: None) for flag in (True, False)]
    labels = [[int((block["labels"] >= 0).sum()) for block in (each.eval_set[0], each.train_set[0])] for each in inputs]
    assert labels[0][0] == labels[1][0] and labels[0][1] > labels[1][1]


def test_three_step_run_still_evaluates_and_saves():
    schedule = Schedule.from_blocks(n_blocks=3, batch_size=1, epochs=1)
    assert (schedule.steps, schedule.warmup, schedule.interval) == (3, 0, 1)


def test_auto_targets_follow_the_architecture():
    assert choose_targets(("auto",), {"model_type": "gpt_neox"}) == ("query_key_value",)
    assert choose_targets(("attention",), {"model_type": "llama"}) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert choose_targets(("query_key_value", "dense"), {"model_type": "gpt_neox"}) == ("query_key_value", "dense")


def test_a_learning_rate_not_given_follows_the_architecture():
    rates = [defaults.fill(train_settings(learning_rate=given), {"model_type": kind}).learning_rate
             for given, kind in ((None, "gpt_neox"), (None, "gemma3_text"), (2e-5, "gpt_neox"))]
    assert rates == [1e-3, 5e-4, 2e-5]


def test_all_means_every_linear_layer_but_the_head():
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen3Config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "vocab_size": 64}
    expected = {GPTNeoXConfig: {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
                Qwen3Config: {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}}
    for kind, names in expected.items():
        model = AutoModelForCausalLM.from_config(kind(**sizes))
        assert set(choose_targets(("all",), model.config.to_dict(), linear_names(model))) == names


def test_console_run_ends_with_the_next_commands(tiny_neox, tiny_data, tmp_path):
    output = tmp_path / "한글 폴더" / "run"
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data), "--output_dir",
                      str(output), "--cutoff_len", "64", "--num_train_epochs", "1", "--val_set_size", "0", cwd=tmp_path,
                      cold=True)
    assert done.returncode == 0, done.stderr
    assert f'--peft_root "{output}"' in done.stdout and "merge-lora.py" in done.stdout
    assert "학습에 쓴 질문" in done.stdout and "손으로 쓴" not in done.stdout
    assert done.stderr == ""  # 라이브러리를 읽을 때의 경고까지 없다
    assert not re.search(r"[Ww]arning|\{'", done.stdout)


@pytest.mark.parametrize("steps, warmup", [(3, 0), (100, 6), (1, 0), (20, 1)])
def test_learning_rate_starts_above_zero_and_never_reaches_it(steps, warmup):
    recipe = Recipe(steps, warmup, 1, 1, 1, 1e-3, 42)
    shares = [recipe.learning_share(taken) for taken in range(steps)]
    assert shares[0] == (1 / warmup if warmup else 1) and max(shares) == 1 and min(shares) > 0
    assert shares[:warmup] == [(taken + 1) / warmup for taken in range(warmup)]
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True) and recipe.learning_share(steps) == 0
