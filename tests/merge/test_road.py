"""병합의 길 전체: 공개된 폴더의 모양마다 4비트로 배우고, 합치고, 배운 모델과 같은 답을 하는지 본다."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call_script, load_script, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import published_neox, rename_tensors, tiny_model

from utils.data.questions import Question
from utils.errors import UsageError
from utils.merge import proof
from utils.merge.job import open_job
from utils.model import diskmap, loader
from utils.model.adapter import load_adapter
from utils.model.folder import open_model_folder
from utils.model.tokenizer import load_tokenizer
from utils.paths import DATA_DEMO

merge = load_script("merge-lora.py").merge
TARGETS = {"gpt2": ["c_attn", "c_proj"], "bloom": ["query_key_value", "dense"], "neox": ["query_key_value"]}


def tune(base, adapter, targets, *, steps: int = 12, rate: float = 1e-2, ids=None, **settings):
    """NF4로 올린 기반 모델 위에서 몇 걸음 배운 어댑터를 PEFT로 쓴다. 배운 모델을 돌려준다."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
    loader.keep_nf4_layout(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM",
                                             **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    ids = torch.arange(4, 132).view(4, 32) if ids is None else ids
    for _ in range(steps):
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(adapter)
    return model.eval()


def logits_of(folder, ids):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits


IDS = torch.arange(4, 36).view(2, 16)


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float16, 3), (torch.float32, 1)])
def test_published_neox_goes_the_whole_road(tmp_path, dtype, shards, capsys):
    base = published_neox(tmp_path / "polyglot-ko-tiny", dtype, shards)
    run, merged = tmp_path / "run", tmp_path / "merged"
    for flags in (("finetune-lora.py", "--base_model", str(base), "--data_path", str(write_rows(tmp_path / "r.json")),
                   "--output_dir", str(run), "--cutoff_len", "64", "--batch_size", "4", "--num_train_epochs", "1",
                   "--val_set_size", "20"),
                  ("merge-lora.py", "--peft_root", str(run), "--output_dir", str(merged)),
                  ("generate.py", "--base_model", str(merged), "--ask", "물은?")):
        call_script(capsys, *flags)
    settings = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == json.loads((merged / "config.json").read_text())["eos_token_id"] == 2
    before, after = (open_model_folder(folder).tensors for folder in (base, merged))
    assert set(after) == set(before)
    untouched = [name for name in before if ".attention.bias" in name or "masked_bias" in name or "inv_freq" in name]
    assert len(untouched) == 6
    for name in untouched:  # 가중치가 아니다: dtype도 바이트도 그대로다
        contents = [entry.file.read_bytes()[entry.start:entry.end] for entry in (before[name], after[name])]
        assert contents[0] == contents[1] and before[name].dtype == after[name].dtype
    assert after["embed_out.weight"].dtype == "F16"
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run)
    with torch.no_grad():
        gap = (expected.eval()(input_ids=IDS).logits - logits_of(merged, IDS)).abs().max()
    assert gap < 0.02


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_names_on_disk_need_not_be_those_in_memory(tmp_path, kind, prefix):
    base = tiny_model(tmp_path / "base", kind)
    rename_tensors(base, lambda name: prefix + name.removeprefix("transformer."))
    tuned = tune(base, tmp_path / "adapter", TARGETS[kind])
    merge(peft_root=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged"), merge_onto="quantized")
    with torch.no_grad():
        gap = (tuned(input_ids=IDS).logits - logits_of(tmp_path / "merged", IDS)).abs().max()
    assert gap < 0.02
    assert set(open_model_folder(tmp_path / "merged").tensors) == set(open_model_folder(base).tensors)
    if kind == "bloom":
        return
    from utils.model.merged import load_merged_4bit

    four_bit = load_merged_4bit(tmp_path / "merged", loader.choose_device())
    with torch.no_grad():
        assert (tuned(input_ids=IDS).logits - four_bit(input_ids=IDS).logits).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma3", "gemma2", "qwen3", "llama"])
@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_every_kind_is_merged_and_proved(tmp_path, kind, onto, capsys):
    base = tiny_model(tmp_path / "base", kind)
    targets = r".*language_model.*\.(q|v)_proj" if kind == "gemma3" else ["q_proj", "v_proj"]
    tuned = tune(base, tmp_path / "adapter", targets, target_parameters=[])
    merge(peft_root=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged"), merge_onto=onto)
    assert "같은 첫 토큰" in capsys.readouterr().out
    with torch.no_grad():
        gap = (tuned(input_ids=IDS).logits - logits_of(tmp_path / "merged", IDS)).abs().max()
    assert gap < (0.02 if onto == "quantized" else 2)
    if onto == "original":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                                          tmp_path / "adapter").eval()
        with torch.no_grad():
            assert (plain(input_ids=IDS).logits - logits_of(tmp_path / "merged", IDS)).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["neox", "gpt2", "bloom", "mixtral", "qwen3_moe", "gemma3", "gemma2", "llama"])
def test_streamed_model_is_the_model_transformers_loads(tmp_path, kind):
    from utils.merge import streamed

    base = published_neox(tmp_path / "base") if kind == "neox" else tiny_model(tmp_path / "base", kind)
    folder = open_model_folder(base)
    source = streamed.Source(folder, diskmap.read(folder), streamed.read_plain, {})
    with torch.no_grad():
        logits = streamed.build(source, torch.device("cpu"))(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(logits, logits_of(base, IDS), atol=1e-4)


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """NF4로 반올림하면 많이 달라지는 기반 모델(64개마다 큰 값이 하나씩 있다)과, 그 NF4 위에서 배운 어댑터."""
    folder = tmp_path_factory.mktemp("hard")
    base = tiny_model(folder / "base", "llama", torch.float16)
    state = load_file(base / "model.safetensors")
    torch.manual_seed(3)
    for name, value in state.items():
        if value.ndim == 2:
            value.normal_(0, 0.5 if "embed" in name else 0.15)
        if "proj" in name:
            value[:, ::64] = 3.0 * torch.sign(torch.randn(value[:, ::64].shape))
    save_file(state, base / "model.safetensors", {"format": "pt"})
    data = write_rows(folder / "rows.json", 24)
    tokenizer = load_tokenizer(base)
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    rows = torch.tensor([(tokenizer(text).input_ids + [2] * 48)[:48] for text in texts])
    tune(base, folder / "adapter", "all-linear", steps=80, ids=rows)
    settings = {"data_path": str(data), "val_set_size": 30, "seed": 1, "cutoff_len": 64}
    (folder / "adapter/run.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    return folder


def test_proof_compares_with_the_model_that_was_trained(hard, tmp_path, capsys):
    reports = {}
    for onto in ("original", "quantized"):
        merge(peft_root=str(hard / "adapter"), output_dir=str(tmp_path / onto), merge_onto=onto)
        reports[onto] = json.loads((tmp_path / onto / "merge-report.json").read_text(encoding="utf-8"))["proof"]
        said = capsys.readouterr().out
        assert ("--merge_onto quantized로 다시 합친다" in said) is (onto == "original")
        assert reports[onto]["kl"] < 1e-4  # 쓴 것은 쓰려던 것과 같다
        assert trained_loss(hard, reports[onto]) == pytest.approx(reports[onto]["trained_loss"], abs=2e-3)
    assert reports["original"]["retained"] < 0.9 < 0.98 < reports["quantized"]["retained"]
    assert reports["original"]["merged_loss"] > reports["quantized"]["merged_loss"] + 0.1


@torch.no_grad()
def trained_loss(hard, report: dict) -> float:
    """검산이 고른 행에서, transformers와 PEFT로 올린 배운 모델의 답의 loss."""
    from peft import PeftModel

    job = open_job(str(hard / "adapter"), None, None, "original")
    windows = proof.read_windows(job)
    assert len(windows.ids) == report["prompts"]
    model = PeftModel.from_pretrained(loader.load_base(hard / "base", loader.choose_device(), "4bit"), hard / "adapter")
    logits = model.eval()(input_ids=windows.ids, use_cache=False).logits[:, :-1][windows.answer[:, 1:]]
    return torch.nn.functional.cross_entropy(logits, windows.ids[:, 1:][windows.answer[:, 1:]]).item()


def test_windows_keep_the_head_and_the_whole_question_when_few_tokens_are_compared():
    """어휘가 크면 행마다 몇 토큰만 비교하지만, 모델은 배울 때처럼 글머리와 질문을 모두 읽는다."""
    asked = Question(np.arange(2, 30, dtype=np.int32), np.array([50, 51, 1], np.int32))  # 글머리의 토큰은 2
    windows = proof.cut_windows([asked], 1, 64, 6, end_id=1, source="rows.json")
    assert windows.ids[0, :31].tolist() == [*range(2, 30), 50, 51, 1] and (windows.ids[0, 31:] == 1).all()
    assert windows.targets.tolist() == [28, 29, 50, 51, 1] and windows.targets[windows.scored].tolist() == [50, 51, 1]
    short = proof.cut_windows([asked], 1, 12, 6, end_id=1, source="rows.json")
    assert short.ids[0].tolist() == [2, *range(22, 30), 50, 51, 1]
    assert short.targets.tolist() == windows.targets.tolist() and short.scored.tolist() == windows.scored.tolist()
    long = Question(asked.prompt, np.arange(100, 160, dtype=np.int32))
    cut = proof.cut_windows([asked, long], 1, 64, 6, end_id=1, source="rows.json")
    assert cut.targets.tolist() == [28, 29, 50, 51, 1, 28, 29, 100, 101, 102, 103]


@pytest.mark.parametrize(("losses", "warned"), [
    ((2.78, 3.07, 5.03), True),  # 배운 것이 나빠졌고, 합친 것은 더 나쁘다
    ((3.0, 1.0, 1.19), False),
    ((3.0, 1.0, 1.21), True),
    ((3.0, 2.99, 3.0), False),
    ((3.0, 1.0, 0.8), False),  # 원래 가중치가 배운 모델보다 낫다
])
def test_a_tenth_of_the_gain_may_be_lost_silently(losses, warned):
    names = ("base_loss", "trained_loss", "merged_loss")
    report = proof.Proof(8, 100, "rows.json", None, "original", top1=1.0, kl=0.0, largest_gap=0.0, retained=None,
                         **dict(zip(names, losses, strict=True)))
    assert bool(proof.warnings(report)) is warned


def test_a_few_tokens_that_rounding_sends_to_another_expert_are_no_mistake():
    """KL이 큰 십분의 일의 토큰은 첫 토큰이 달라도 되고, 더 많은 토큰이 다르면 틀린 것이다."""
    torch.manual_seed(0)
    expected = torch.randn(40, 30)
    for moved, right in ((4, True), (12, False)):
        actual = expected.clone()
        actual[:moved] = actual[:moved].flip(-1)
        found = proof._compare(expected, actual)
        assert found["top1"] <= 1 - (moved - 1) / 40 and (found["top1_most"] == 1) is right


def test_proof_says_when_the_data_is_gone(hard, tmp_path, capsys):
    adapter = shutil.copytree(hard / "adapter", tmp_path / "adapter")
    settings = {"data_path": str(tmp_path / "gone.json"), "cutoff_len": 64}
    (adapter / "run.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))
    assert "gone.json" in capsys.readouterr().out
    report = json.loads((tmp_path / "merged/merge-report.json").read_text(encoding="utf-8"))["proof"]
    assert report["absent_data"].endswith("gone.json") and report["data"] == str(DATA_DEMO)


def change_keys(source, folder, rename):
    adapter = shutil.copytree(source, folder)
    rename_tensors_of(adapter / "adapter_model.safetensors", rename)
    return adapter


def rename_tensors_of(file, rename):
    """tensor의 이름을 바꾼다. 새 이름이 None이면 뺀다."""
    renamed = {rename(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in renamed.items() if name is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("rename", [
    lambda name: name.removeprefix("base_model.model."),
    lambda name: name.removeprefix("base_model."),
    lambda name: "base_model.model." + name,
    lambda name: name.replace("base_model.model.model.", "base_model.model."),
    lambda name: name.replace("model.layers", "model._fsdp_wrapped_module.layers"),
    lambda name: name.replace("lora_A.weight", "lora_A.mine.weight"),
    lambda name: name.replace("layers.1.", "layers.7."),
    lambda name: name.replace("layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj.lora_C"),
    lambda name: name.replace("q_proj", "gate_proj"),
    lambda name: None if "layers.1.self_attn.q_proj" in name else name,
])
def test_adapter_that_finds_no_place_is_refused_everywhere(hard, tmp_path, rename):
    adapter = change_keys(hard / "adapter", tmp_path / "adapter", rename)
    model = loader.load_base(hard / "base", loader.choose_device(), "4bit")
    with pytest.raises(UsageError, match="어댑터를 얹지 못했다"):
        load_adapter(model, adapter)
    with pytest.raises(UsageError):
        merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_good_adapter_is_applied_whole(hard):
    from peft import PeftModel

    model = load_adapter(loader.load_base(hard / "base", loader.choose_device(), "4bit"), hard / "adapter")
    other = PeftModel.from_pretrained(loader.load_base(hard / "base", loader.choose_device(), "4bit"), hard / "adapter")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize("settings", [
    {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 5]},
    {"bias": "lora_only"}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]},
])
def test_adapters_beyond_lora_are_served_whole_and_refused_by_name_in_the_merge(tmp_path, settings):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_model(tmp_path / "base", "llama", attention_bias="bias" in settings)
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM",
                                             **{"target_modules": ["q_proj"], **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.eval().save_pretrained(tmp_path / "adapter")
    served = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, served.eval()(input_ids=IDS).logits, atol=1e-5)
    named = next(iter(settings)) if "target_modules" not in settings else "lora_embedding_A"
    with pytest.raises(UsageError, match=named):
        merge(peft_root=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged"))


def test_an_adapter_with_its_own_tokenizer_is_asked_and_merged_with_it(hard, tmp_path):
    """다른 도구는 배우며 쓴 대화 템플릿을 어댑터와 함께 담는다. 기반 모델의 템플릿으로 물으면 조용히 틀린다."""
    from transformers import AutoTokenizer

    from utils.talk.source import find_source, load_answerers

    adapter = shutil.copytree(hard / "adapter", tmp_path / "adapter")
    (adapter / "prompt.json").unlink(missing_ok=True)
    own = AutoTokenizer.from_pretrained(hard / "base")
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}{% if " \
                        "add_generation_prompt %}<assistant>{% endif %}"
    own.save_pretrained(adapter)
    (answerer,) = load_answerers([find_source(str(hard / "base"), str(adapter), str)], None, None, False, "chat", str)
    assert own.decode(answerer.ask("왜?")) == "<user>왜?<|endoftext|><assistant>"
    merge(peft_root=str(adapter), base_model=str(hard / "base"), output_dir=str(tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == own.chat_template


def test_saved_embedding_is_refused_by_name(hard, tmp_path):
    """vocab을 늘리면 PEFT는 embedding을 통째로 어댑터에 담는다."""
    adapter = shutil.copytree(hard / "adapter", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    embedding = load_file(hard / "base/model.safetensors")["model.embed_tokens.weight"]
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": embedding + 1}, file, {"format": "pt"})
    with pytest.raises(UsageError, match="embed_tokens"):
        merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))


def test_defaults_of_any_version_are_not_settings_but_unknown_settings_are(hard, tmp_path):
    from utils.model import lora

    adapter = shutil.copytree(hard / "adapter", tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    defaults = {"target_parameters": [], "modules_to_save": [], "layer_replication": {}, "use_dora": None,
                "bias": "none"}
    file.write_text(json.dumps({**config, **defaults, "use_something_new": False}), encoding="utf-8")
    assert lora.read_updates(adapter, lora.read_config(adapter))
    file.write_text(json.dumps({**config, "use_something_new": True}), encoding="utf-8")
    with pytest.raises(UsageError, match="use_something_new=True"):
        lora.read_config(adapter)


def test_unreachable_base_is_one_line_with_what_to_do(hard, tmp_path):
    adapter = shutil.copytree(hard / "adapter", tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in ("someone/korean-llm", "/home/someone/models/korean-llm", "C:\\models\\korean-llm"):
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}), encoding="utf-8")
        with pytest.raises(UsageError, match="--base_model") as refused:
            merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))
        assert "\n" not in str(refused.value)
    merge(peft_root=str(adapter), base_model=str(hard / "base"), output_dir=str(tmp_path / "merged"), verify=False)


def test_base_that_is_already_quantised_is_refused(hard, tmp_path):
    base = shutil.copytree(hard / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match="이미 양자화된"):
        merge(peft_root=str(hard / "adapter"), base_model=str(base), output_dir=str(tmp_path / "merged"))


@pytest.mark.parametrize("value", [-1e9, float("-inf"), float("nan")])
def test_what_the_model_does_not_read_is_never_judged(hard, tmp_path, value):
    base = shutil.copytree(hard / "base", tmp_path / "base")
    file = base / "model.safetensors"
    odd = {"model.layers.0.self_attn.masked_bias": torch.tensor(value), "extra.weight": torch.full((3, 3), value)}
    save_file({**load_file(file), **odd}, file, {"format": "pt"})
    merge(peft_root=str(hard / "adapter"), base_model=str(base), output_dir=str(tmp_path / "merged"), verify=False)
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as written:
        assert torch.equal(written.get_tensor("extra.weight"), odd["extra.weight"]) or value != value
