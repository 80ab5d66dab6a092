"""병합의 약속: PEFT와 비트까지 같고, 배운 모델과 같음을 스스로 증명하고, 4비트로 띄워도 배운 것이 남는다."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script, run_script, write_rows
from safetensors.torch import load_file, save_file
from tiny import build_neox

from utils.errors import UsageError
from utils.files import staged
from utils.merge import proof, writer
from utils.merge.job import open_job
from utils.model import merged, nf4, shards
from utils.model.folder import open_model_folder
from utils.model.loader import choose_device
from utils.model.tokenizer import end_token_ids
from utils.seals import damage, read_manifest

merge = load_script("merge-lora.py").merge


def train(model, ids: torch.Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def token_rows(base, data, n: int = 24, length: int = 48) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(text).input_ids for text in texts]
    return torch.tensor([(row + [2] * length)[:length] for row in rows[:n]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """끝까지 배운 작은 기반 모델과, 그 NF4 위에서 다른 글을 배운 어댑터 둘(one, two)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from utils.model.loader import keep_nf4_layout

    folder = tmp_path_factory.mktemp("trained")
    base = build_neox(folder / "polyglot-ko-tiny")
    data = write_rows(folder / "rows.json", 40)
    other = folder / "other.json"
    text = "### 질문: {0}번 길은 어디로 가나?\n\n### 답변: {0}번 길은 바다로 갑니다. 산으로는 안 갑니다.<|endoftext|>"
    other.write_text("\n".join(json.dumps({"text": text.format(i)}, ensure_ascii=False) for i in range(40)),
                     encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    train(model, token_rows(base, data), 80, 3e-3)
    model.half().save_pretrained(base)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for name, seed in (("one", 1), ("two", 2)):
        quantised = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=four_bit)
        keep_nf4_layout(quantised)
        torch.manual_seed(seed)
        tuned = get_peft_model(quantised, LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value", "dense"],
                                                     task_type="CAUSAL_LM", base_model_name_or_path=str(base)))
        train(tuned, token_rows(base, other), 60, 3e-3)
        tuned.save_pretrained(folder / name)
        settings = {"data_path": str(other), "val_set_size": 30, "seed": seed, "cutoff_len": 64}
        (folder / name / "run.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    return folder


def open_one(trained, name: str = "one", onto: str = "original"):
    return open_job(str(trained / name), None, None, onto)


def edit_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.fixture
def adapter(trained, tmp_path):
    """고쳐도 되는 어댑터의 사본."""
    return shutil.copytree(trained / "one", tmp_path / "adapter")


def peft_merge(base, adapter) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("changes", [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"layers.0.attention.query_key_value": 3, "dense": 5}},
    {"lora_alpha": 7.5, "alpha_pattern": {r"layers\.\d+\.attention\.dense": 1}},
])
def test_merge_is_bit_equal_to_peft_in_fp32(trained, adapter, changes):
    edit_config(adapter, **changes)
    job = open_job(str(adapter), None, None, "original")
    expected = peft_merge(job.base.path, adapter)
    assert len(job.updates) == 4
    for name, update in job.updates.items():
        entry = job.base.tensors[name]
        rows = job.base_rows(entry, set())
        merged = torch.cat([rows(*span) + update.rows(*span) for span in shards.row_spans(entry.shape)])
        assert torch.equal(merged, expected[name])


def test_rank_pattern_is_bit_equal_to_peft(trained, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = trained / "polyglot-ko-tiny"
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
        r=4, lora_alpha=8, target_modules=["query_key_value", "dense_h_to_4h", "lm_head"], init_lora_weights=False,
        rank_pattern={"layers.1.attention.query_key_value": 6}, base_model_name_or_path=str(base)))
    model.save_pretrained(tmp_path / "adapter")
    job = open_job(str(tmp_path / "adapter"), None, None, "original")
    assert "embed_out.weight" in job.updates or "lm_head.weight" in job.updates
    expected = peft_merge(base, tmp_path / "adapter")
    for name, update in job.updates.items():
        merged = shards.read_rows(job.base.tensors[name], 0, update.shape[0]).float() + update.rows(0, update.shape[0])
        assert torch.equal(merged, expected[name.replace("embed_out", "lm_head")])


def test_rows_in_small_chunks_change_nothing(monkeypatch, trained):
    job = open_one(trained)
    whole = {name: update.rows(0, update.shape[0]) for name, update in job.updates.items()}
    monkeypatch.setattr(shards, "CHUNK_BYTES", 4096)
    for name, update in job.updates.items():
        spans = list(shards.row_spans(update.shape))
        assert len(spans) > 3 and torch.equal(torch.cat([update.rows(*span) for span in spans]), whole[name])


def test_folder_loads_in_transformers_and_is_the_trained_model(trained, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"), max_shard_size="100KB")
    base = trained / "polyglot-ko-tiny"
    expected = {name: tensor.half() for name, tensor in peft_merge(base, trained / "one").items()}
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("model-*.safetensors")}
    biggest = max(entry.end - entry.start for entry in open_model_folder(tmp_path / "merged").tensors.values())
    assert len(sizes) > 3 and max(sizes.values()) < max(100_000, biggest) + 5000
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == 2
    assert json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))["eos_token_id"] == 2
    report = json.loads((tmp_path / "merged/merge-report.json").read_text(encoding="utf-8"))
    assert report["proof"]["top1"] == 1 and report["proof"]["kl"] < 1e-6 and report["proof"]["retained"] > 0.98
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_manifest_names_every_file_with_its_hash(trained, tmp_path):
    import hashlib

    merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"), verify=False)
    files = json.loads((tmp_path / "merged/manifest.json").read_text(encoding="utf-8"))["files"]
    found = {f.relative_to(tmp_path / "merged").as_posix(): f for f in (tmp_path / "merged").rglob("*") if f.is_file()}
    assert set(found) - {"manifest.json"} == set(files)
    for name, facts in files.items():
        content = found[name].read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_manifest_is_sealed_like_a_checkpoint(trained, tmp_path):
    merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"), verify=False)
    assert damage(tmp_path / "merged", required=("config.json", "model.safetensors")) is None
    file = tmp_path / "merged/manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"size": ', '"size": 1'), encoding="utf-8")
    assert read_manifest(tmp_path / "merged") is None


def test_second_merge_into_the_same_folder_is_refused(trained, tmp_path):
    output = str(tmp_path / "merged")
    with staged(output) as folder:
        (folder / "half.txt").write_text("x", encoding="utf-8")
        done = run_script("merge-lora.py", "--peft_root", str(trained / "one"), "--output_dir", output)
        assert done.returncode == 2 and f"다른 실행이 쓰는 중이다: {output}" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and (folder / "half.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["half.txt"]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_finite_check_sees_every_bad_value(dtype):
    entry = open_model_folder(ROOT / "resources/polyglot-ko-demo").tensors["gpt_neox.final_layer_norm.weight"]
    kind = shards.DTYPES[dtype]
    limits = torch.finfo(kind)
    good = torch.tensor([limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0], dtype=kind)
    writer.require_finite(shards.to_bytes(good), dtype, entry)
    for bad in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        for others in (good, good.abs(), -good.abs()):
            with pytest.raises(UsageError, match="NaN"):
                writer.require_finite(shards.to_bytes(torch.cat([others, torch.tensor([bad], dtype=kind)])), dtype,
                                      entry)


def test_ends_are_the_tokenizers_and_the_special_ones_of_the_settings(trained, tmp_path):
    from utils.model.tokenizer import load_tokenizer

    folder = shutil.copytree(trained / "polyglot-ko-tiny", tmp_path / "base")
    tokenizer = load_tokenizer(folder)
    assert end_token_ids(tokenizer, folder) == (tokenizer.eos_token_id,) == (2,)  # 0은 쓰지 않는 자리다
    assert end_token_ids(tokenizer, None) == (2,)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [0, 3, 300, 10**6], "temperature": 0.3}), encoding="utf-8")
    assert end_token_ids(tokenizer, folder) == (2, 3)  # 3은 <|sep|>, 300은 글자다


def test_every_end_and_every_field_of_the_generation_settings_is_kept(trained, tmp_path):
    base = shutil.copytree(trained / "polyglot-ko-tiny", tmp_path / "polyglot-ko-tiny")
    (base / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [3], "pad_token_id": 1, "temperature": 0.3, "do_sample": True}), encoding="utf-8")
    merge(peft_root=str(trained / "one"), base_model=str(base), output_dir=str(tmp_path / "merged"), verify=False)
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text(encoding="utf-8"))
    assert settings == {"eos_token_id": [2, 3], "pad_token_id": 1, "temperature": 0.3, "do_sample": True}
    assert json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))["eos_token_id"] == [2, 3]


def test_nf4_rows_equal_bitsandbytes(trained, monkeypatch):
    from bitsandbytes import functional as bnb

    monkeypatch.setattr(shards, "CHUNK_BYTES", 16384)
    entry = open_model_folder(trained / "polyglot-ko-tiny").tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    codes, state = bnb.quantize_4bit(shards.read_rows(entry, 0, entry.shape[0]).float(), blocksize=64,
                                     compress_statistics=True, quant_type="nf4")
    rounded = nf4.NF4Rows(entry)
    assert len(rounded.spans) > 1
    assert torch.equal(torch.cat([rounded.rows(*span) for span in rounded.spans]), bnb.dequantize_4bit(codes, state))


def test_merge_onto_quantized_is_what_was_trained(trained, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from utils.model.loader import load_base

    merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"), merge_onto="quantized")
    ids = token_rows(trained / "polyglot-ko-tiny", trained / "other.json", 4)
    tuned = PeftModel.from_pretrained(load_base(trained / "polyglot-ko-tiny", choose_device(), "4bit"), trained / "one")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        gap = (tuned(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max()
    assert gap < 0.02


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_four_bit_serving_keeps_what_was_learned(trained, tmp_path, onto):
    from utils.model.loader import load_base

    merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"), merge_onto=onto, verify=False)
    ids = token_rows(trained / "polyglot-ko-tiny", trained / "other.json", 40)[24:]

    @torch.no_grad()
    def loss(model):
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1),
                                                 ids[:, 1:].flatten()).item()

    device = choose_device()
    before = loss(load_base(trained / "polyglot-ko-tiny", device, "4bit"))
    model = merged.load_merged_4bit(tmp_path / "merged", device)
    tuned = loss(model)
    from peft import PeftModel

    trained_loss = loss(PeftModel.from_pretrained(load_base(trained / "polyglot-ko-tiny", device, "4bit"),
                                                  trained / "one"))
    assert (before - tuned) / (before - trained_loss) > 0.95
    assert merged.has_adapter(tmp_path / "merged") and not merged.has_adapter(trained / "one")


def written(trained, tmp_path, name: str = "one"):
    merge(peft_root=str(trained / name), output_dir=str(tmp_path / "merged"), verify=False)
    return tmp_path / "merged"


def prove_again(job, folder) -> None:
    proof.judge(proof.prove(job, proof.read_windows(job), folder))


def test_proof_catches_a_zeroed_tensor(trained, tmp_path):
    folder = written(trained, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="합친 모델이 기반 모델"):
        prove_again(open_one(trained), folder)


def test_proof_catches_a_swapped_adapter(trained, tmp_path):
    folder = written(trained, tmp_path, "two")
    with pytest.raises(UsageError, match="합친 모델이 기반 모델"):
        prove_again(open_one(trained, "one"), folder)


def test_proof_catches_a_wrong_alpha(trained, adapter, tmp_path):
    folder = written(trained, tmp_path)
    edit_config(adapter, lora_alpha=16)
    with pytest.raises(UsageError, match="합친 모델이 기반 모델"):
        prove_again(open_job(str(adapter), None, None, "original"), folder)


def test_failed_proof_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "MAX_KL", -1.0)
    with pytest.raises(UsageError):
        merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "out/merged"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("changes", "named"), [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"r": 8}, "rank"),
    ({"rank_pattern": {"dense": 2}}, "rank"),
    ({"base_model_name_or_path": None}, "--base_model"),
])
def test_what_cannot_be_merged_is_refused_by_name(trained, adapter, tmp_path, changes, named):
    edit_config(adapter, **changes)
    with pytest.raises(UsageError, match=named):
        merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def damage_weights(adapter, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k], "아무것도 바꾸지 않는다"),
    (lambda t: next(iter(t.values())).fill_(float("nan")), "NaN"),
    (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "짝"),
    (lambda t: t.update({"base_model.model.gpt_neox.layers.0.attention.dense.lora_magnitude_vector": torch.ones(64)}),
     "합칠 줄 모르는"),
    (lambda t: t.update({"base_model.model.gpt_neox.layers.9.attention.dense.lora_A.weight": torch.ones(4, 64),
                         "base_model.model.gpt_neox.layers.9.attention.dense.lora_B.weight": torch.ones(64, 4)}),
     "layers.9"),
])
def test_bad_adapter_weights_are_refused(trained, adapter, tmp_path, change, said):
    damage_weights(adapter, change)
    with pytest.raises(UsageError, match=said):
        merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_shapes_decide_and_names_only_warn(trained, tmp_path, capsys):
    small = build_neox(tmp_path / "polyglot-ko-tiny", hidden=32)
    with pytest.raises(UsageError, match="모양이 다르다"):
        merge(peft_root=str(trained / "one"), base_model=str(small), output_dir=str(tmp_path / "merged"))
    other = shutil.copytree(trained / "polyglot-ko-tiny", tmp_path / "another")
    merge(peft_root=str(trained / "one"), base_model=str(other), output_dir=str(tmp_path / "merged"), verify=False)
    assert "이름이나 설정이 어댑터가 말하는 것" in capsys.readouterr().out  # 모양이 맞으면 이름은 알리기만 한다


def test_base_with_nan_is_refused(trained, adapter, tmp_path):
    base = shutil.copytree(trained / "polyglot-ko-tiny", tmp_path / "polyglot-ko-tiny")
    tensors = load_file(base / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="NaN"):
        merge(peft_root=str(adapter), base_model=str(base), output_dir=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_tied_embedding_is_refused(trained, adapter, tmp_path):
    base = shutil.copytree(trained / "polyglot-ko-tiny", tmp_path / "polyglot-ko-tiny")
    edit = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**edit, "tie_word_embeddings": True}), encoding="utf-8")
    vocab = edit["vocab_size"]
    damage_weights(adapter, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                                                "base_model.model.lm_head.lora_B.weight": torch.ones(vocab, 4)}))
    with pytest.raises(UsageError, match="묶인"):
        merge(peft_root=str(adapter), base_model=str(base), output_dir=str(tmp_path / "merged"))


def test_an_adapter_is_not_merged_twice(trained, tmp_path):
    merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"), verify=False)
    with pytest.raises(UsageError, match="이미 이 어댑터를 합친 모델"):
        merge(peft_root=str(trained / "one"), base_model=str(tmp_path / "merged"), output_dir=str(tmp_path / "twice"))
    assert not (tmp_path / "twice").exists()


def test_broken_records_are_said_before_anything_is_written(trained, adapter, tmp_path, capsys):
    (adapter / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json"):
        merge(peft_root=str(adapter), output_dir=str(tmp_path / "merged"))
    assert "model.safetensors" not in capsys.readouterr().out


def test_output_that_would_hurt_something_is_refused(trained, tmp_path):
    base, adapter = trained / "polyglot-ko-tiny", trained / "one"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x", encoding="utf-8")
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    for target in (base, base / "merged", adapter, adapter / "merged", tmp_path / "full", tmp_path / "full/mine.txt"):
        with pytest.raises(UsageError, match="output_dir"):
            merge(peft_root=str(adapter), output_dir=str(target))
    assert before == {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_full_disk_is_said_before_writing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SPARE_BYTES", 10**18)
    with pytest.raises(UsageError, match="디스크"):
        merge(peft_root=str(trained / "one"), output_dir=str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL이 없다")
def test_killed_anywhere_leaves_no_model_and_can_be_repeated(trained, tmp_path):
    """정한 번째의 쓰기에서 스스로 SIGKILL을 받게 한다."""
    code = """
import os, runpy, signal, sys
root, at, *sys.argv = sys.argv[1:]
sys.path.insert(0, root)
from utils.model import shards
write, left = shards.HashingFile.write, iter(range(int(at)))

def write_or_die(self, chunk):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, chunk)

shards.HashingFile.write = write_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    output = tmp_path / "merged"
    flags = ["--peft_root", str(trained / "one"), "--output_dir", str(output), "--verify", "False",
             "--max_shard_size", "50KB"]
    for at in (1, 4, 8):
        done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(at), str(ROOT / "merge-lora.py"), *flags],
                              capture_output=True, encoding="utf-8")
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not output.exists()
    merge(peft_root=str(trained / "one"), output_dir=str(output))
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize(("text", "size"), [("1GB", 10**9), ("500MB", 5 * 10**8), ("1.5gb", 1500 * 10**6),
                                            ("2GiB", 2**31), ("4096", 4096)])
def test_shard_sizes(text, size):
    assert writer.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "0", "1", "1e3GB"])
def test_bad_shard_sizes_are_refused(text):
    with pytest.raises(UsageError, match="max_shard_size"):
        writer.parse_size(text)


def test_bad_flags_are_all_named():
    done = run_script("merge-lora.py", "--peft_root", "x", "--output_dir", "y", "--merge_onto", "both",
                      "--gguf_type", "q2")
    assert done.returncode == 2 and "merge_onto" in done.stderr and "gguf_type" in done.stderr


def test_gpt2_conv1d_is_bit_equal_to_peft(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32)).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(
        r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True,
        base_model_name_or_path=str(base)))
    model.save_pretrained(tmp_path / "adapter")
    job = open_job(str(tmp_path / "adapter"), None, None, "original")
    expected = peft_merge(base, tmp_path / "adapter")
    for name, update in job.updates.items():
        rows = shards.read_rows(job.base.tensors[name], 0, update.shape[0]) + update.rows(0, update.shape[0])
        assert torch.equal(rows, expected[name])
