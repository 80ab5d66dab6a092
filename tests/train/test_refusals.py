"""끝까지 갈 수 없는 기반 모델과 데이터는 데이터를 읽기 전에, 또는 모델을 올리기 전에 한 줄로 거절한다."""

import json
import shutil
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import load_script, run_script
from tiny import build_tokenizer

from utils import record
from utils.data import dataset
from utils.data.blocks import Split
from utils.data.documents import Documents
from utils.data.encoder import Encoder
from utils.decode.decoder import Reply
from utils.errors import UsageError
from utils.model import loader
from utils.model.targets import choose_targets
from utils.prompter import make_prompter
from utils.train import corpus, samples

finetune_lora = load_script("finetune-lora.py")
TEXT = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 16}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}


def refuse(capsys, base, *flags: str) -> str:
    """없는 데이터가 아니라 기반 모델을 말하는 거절 한 줄. 데이터의 내용은 읽기 전이어야 한다."""
    return conftest.refuse(capsys, finetune_lora.train, "--base_model", str(base), *flags,
                           retired=finetune_lora.RETIRED)


def unreadable(tmp_path):
    """읽으면 곧바로 거절되는 데이터. 그보다 앞선 거절을 시험한다."""
    file = tmp_path / "broken.json"
    file.write_text("{", encoding="utf-8")
    return str(file)


def write_gemma3(folder):
    """그림도 보는 Gemma 3의 꼴. 글의 설정은 text_config에 있다."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    size = len(build_tokenizer(folder)) + 13
    config = Gemma3Config(text_config={**TEXT, "vocab_size": size}, vision_config=VISION, mm_tokens_per_image=4,
                          image_token_index=size - 1, boi_token_index=size - 2, eoi_token_index=size - 3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(folder)
    return folder


def test_model_that_also_sees_learns_in_its_text_part_only(tmp_path, tiny_data):
    base, run = write_gemma3(tmp_path / "gemma3"), tmp_path / "run"
    assert "text_config" in json.loads((base / "config.json").read_text(encoding="utf-8"))
    done = run_script("finetune-lora.py", "--base_model", str(base), "--data_path", str(tiny_data), "--output_dir",
                      str(run), "--cutoff_len", "64", "--batch_size", "8", "--num_train_epochs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    path = json.loads((run / "run.json").read_text(encoding="utf-8"))["path"]
    assert "손실은 조각으로" in path and path not in done.stdout and "다른 길을 쓴다" not in done.stdout
    from safetensors import safe_open

    with safe_open(run / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        assert all(file.get_tensor(name).any() for name in names if "lora_B" in name)
    assert len(names) == 2 * 2 * 7 and all("language_model" in name for name in names)


@pytest.mark.parametrize("kind, named", [("mistral3", "mistral3"), ("qwen2_5_vl", "qwen2_5_vl"), ("t5", "t5"),
                                         ("whisper", "whisper"), ("vit", "vit")])
def test_models_that_do_not_continue_text_are_refused_before_the_data(kind, named, tmp_path, capsys):
    from safetensors.torch import save_file
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
    save_file({f"layer.{n}.weight": torch.zeros(1) for n in range(200)}, tmp_path / kind / "model.safetensors")
    error = refuse(capsys, tmp_path / kind, "--data_path", unreadable(tmp_path))
    assert named in error and "causal LM" in error and "broken.json" not in error


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "mxfp4"])
def test_base_that_is_already_quantised_is_refused_before_the_data(method, tiny_neox, tmp_path, capsys):
    base = tmp_path / "quantised"
    shutil.copytree(tiny_neox, base)
    file = base / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    file.write_text(json.dumps(content), encoding="utf-8")
    error = refuse(capsys, base, "--data_path", unreadable(tmp_path))
    assert method in error and "양자화하기 전" in error and "broken.json" not in error


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_base_whose_learning_4bit_would_erase_is_refused_before_the_data(onto, tiny_neox, tmp_path, capsys):
    base = shutil.copytree(tiny_neox, tmp_path / "merged")
    (base / "merge-report.json").write_text(json.dumps({"merge_onto": onto}), encoding="utf-8")
    error = refuse(capsys, base, "--data_path", unreadable(tmp_path), "--cutoff_len", "64")
    assert ("--merge_onto original로 다시 합쳐" in error) is (onto == "quantized")
    assert ("broken.json" in error) is (onto == "original")


def test_folder_with_an_adapter_is_refused_before_the_data(tiny_neox, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter_model.safetensors").write_bytes(b"")
    error = refuse(capsys, tiny_neox, "--data_path", unreadable(tmp_path), "--output_dir", str(tmp_path / "run"))
    assert "이미 어댑터가 있다" in error and "run-2" in error and "broken.json" not in error


def test_unknown_layer_is_refused_before_the_data(tiny_neox, tmp_path, capsys):
    error = refuse(capsys, tiny_neox, "--data_path", unreadable(tmp_path), "--cutoff_len", "64",
                   "--lora_target_modules", "q_proj")
    assert "q_proj" in error and "query_key_value" in error


def test_targets_are_chosen_among_the_layers_that_exist():
    assert choose_targets(("auto",), {"model_type": "mpt"}, {"Wqkv", "out_proj"}) == ("Wqkv",)
    assert choose_targets(("auto",), {"model_type": "ctrl"}, {"Wq", "Wv", "0"}, {"Wq", "Wv"}) == ("Wq", "Wv")
    assert choose_targets(("auto",), {"model_type": "opt"}, {"q_proj", "k_proj", "v_proj", "fc1"}) == (
        "q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("kind, settings", [
    ("gemma2", {**TEXT}), ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    ("gpt_oss", {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1}), ("llama", {**TEXT}),
])
def test_attention_is_the_one_that_the_model_has(kind, settings, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = loader.load_base(tmp_path, loader.Device(torch.device("cpu"), torch.float32, ""))
    assert model.config._attn_implementation == ("sdpa" if kind == "llama" else "eager")


def test_settings_have_common_names_whatever_the_architecture(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=3, n_embd=48, n_head=4).save_pretrained(tmp_path)
    config = loader.load_config(tmp_path)
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (3, 48, 4)
    assert config["vocab_size"] == GPT2Config().vocab_size  # config.json에는 기본값이 적히지 않는다


def test_tokens_outside_the_embedding_are_refused_in_data_and_template(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    n_rows = len(tokenizer)
    tokenizer.add_tokens(["<|질문|>"], special_tokens=False)
    encoder = Encoder(tokenizer, 2, n_rows=n_rows)
    assert encoder.encode_prompt("물음")
    for encode in (encoder.encode_prompt, lambda text: encoder.encode_batch([[("물음", text)]])):
        with pytest.raises(UsageError, match=rf"<\|질문\|>.*{n_rows}.*{n_rows}행"):
            encode("<|질문|>")
    with pytest.raises(UsageError, match="답의 끝"):
        Encoder(tokenizer, n_rows, n_rows=n_rows)


def test_cache_of_another_embedding_is_not_reused(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    prints = {Encoder(tokenizer, 2, n_rows=n_rows).fingerprint() for n_rows in (None, 900, 901)}
    assert len(prints) == 3


def documents(lengths, answers, cutoff: int) -> Documents:
    """길이와, 답이 시작되는 자리가 주어진 문서들."""
    answer = np.concatenate([np.arange(length) >= start for length, start in zip(lengths, answers, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Documents(np.ones(sum(lengths), np.int32), answer, offsets, np.arange(len(lengths), dtype=np.uint64),
                     cutoff_len=cutoff, end_id=2)


def test_rows_whose_answer_is_cut_off_are_dropped_and_counted():
    said = []
    found = documents([10, 30, 30], [5, 8, 25], cutoff=16)
    everything, none = np.arange(3), np.arange(0)
    for flag, kept in ((False, [0, 1]), (True, [0, 1, 2])):
        settings = SimpleNamespace(train_on_inputs=flag, cutoff_len=16)
        train, held = corpus.drop_answerless(settings, found, Split(everything, np.array([2])), said.append)
        assert train.tolist() == kept and held.tolist() == []
    assert "학습 1행, 검증 1행" in said[0] and "학습 0행, 검증 1행" in said[1]
    corpus.drop_answerless(settings, found, Split(np.array([0]), none), said.append)
    assert len(said) == 2


def test_no_row_left_is_refused(capsys, tiny_neox, tmp_path):
    data = tmp_path / "rows.json"
    rows = [{"instruction": "긴 질문 " * 60, "output": f"{n}"} for n in range(3)]
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    error = refuse(capsys, tiny_neox, "--data_path", str(data), "--cutoff_len", "64", "--train_on_inputs", "False",
                   "--output_dir", str(tmp_path / "run"))
    assert "배울 것이 없다" in error and not (tmp_path / "run").exists()


class Failing:
    """질문의 묶음 몇 개에 답한 뒤에 죽거나, 오류가 없으면 시간이 다 되는 decoder."""

    context = 256
    notice = ""

    def __init__(self, after: int, error: BaseException | None = None):
        self.left, self.error = after, error

    def use_adapter(self, on: bool) -> None:
        pass

    def answer_many(self, questions, settings, until):
        self.left -= 1
        if self.left < 0 and self.error is not None:
            raise self.error
        return [Reply([5], "cancelled" if self.left < 0 else "stop") for _ in questions]


def sample_inputs(folder, monkeypatch, decoder: Failing) -> tuple[SimpleNamespace, list[int]]:
    """짧은 질문 아홉 개와, 시험의 답이 쓸 decoder와, 그 decoder를 만든 길이들."""
    tokenizer, made = build_tokenizer(folder), []
    monkeypatch.setattr(samples, "Decoder", lambda *args, longest: made.append(longest) or decoder)
    monkeypatch.setattr(samples.exact, "measure", lambda *given: None)
    return SimpleNamespace(tokenizer=tokenizer, end_ids=(2,), prompter=make_prompter("default", tokenizer),
                           encoder=dataset.Encoder(tokenizer, 2), documents=documents([10] * 9, [5] * 9, 16),
                           parts=Split(np.arange(0), np.arange(9)), exams=[]), made


@pytest.mark.parametrize("error, named", [(torch.OutOfMemoryError("CUDA out of memory"), "메모리가 모자란다"),
                                          (RuntimeError("커널\n둘째 줄"), "RuntimeError: 커널"),
                                          (KeyboardInterrupt(), "Ctrl+C")])
def test_a_failing_sample_costs_one_line(error, named, tmp_path, monkeypatch):
    inputs, made = sample_inputs(tmp_path, monkeypatch, Failing(2, error))
    answers, said = samples.Samples(), []
    problem = samples.answer_samples(SimpleNamespace(data_path="faq.csv"), inputs, None, answers, 60, said.append)
    assert named in problem and "\n" not in problem
    assert len(answers.rows) == samples.N_COMPARED and all({"tuned", "base"} <= set(row) for row in answers.rows)
    assert record.write_samples(tmp_path, answers.rows).is_file()
    assert 256 < made[0] < 1024
    assert "검증 질문 9개" in said[0] and "Ctrl+C" in said[0]


@pytest.mark.parametrize("groups, answered", [(0, 0), (2, samples.N_COMPARED), (3, 9)])
def test_samples_that_ran_out_of_time_are_told(groups, answered, tmp_path, monkeypatch):
    """느린 CPU에서 답을 하나도 끝내지 못하고도 아무 말이 없었다."""
    inputs, _ = sample_inputs(tmp_path, monkeypatch, Failing(groups))
    answers, said = samples.Samples(), []
    assert samples.answer_samples(SimpleNamespace(data_path="faq.csv"), inputs, None, answers, 60, said.append) is None
    assert len(answers.rows) == answered
    told = f"60초가 다 되어 학습한 모델이 검증 질문 9개 가운데 {answered}개에만 답했다"
    assert said[1:] == ([told] if answered < 9 else [])


def test_samples_do_not_size_the_cache_by_the_context(tmp_path):
    """문맥이 131,072인 모델의 예시 답에 그만한 cache를 잡지 않는다."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(tmp_path)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**TEXT, "max_position_embeddings": 131072}))
    assert samples.Decoder(model, tokenizer, (2,)).context == 131072
    assert samples.Decoder(model, tokenizer, (2,), longest=300).context == 300
